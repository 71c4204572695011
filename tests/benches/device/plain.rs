//! What is compared with: the link's rate by a bare socket loop, and "one stream, whole state, then load".

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use multifd_guest::{DeviceConfig, DeviceRead, ModelDevice};
use multifd_wire::DeviceState;

use crate::link::Link;

/// Bytes of one call of the bare loop.
const BODY: usize = 256 << 10;

/// Bytes a second that `connections` carry, from memory to memory, with nothing else: the link's rate.
pub(crate) fn bare_rate(link: &Link, octets: &mut [u8], connections: usize) -> f64 {
    let pairs = link.plain_pairs(connections);
    let total = octets.len();
    let share = total.div_ceil(connections);
    let source = octets.to_vec();
    let began = Instant::now();
    std::thread::scope(|scope| {
        let places = source.chunks(share).zip(octets.chunks_mut(share));
        for ((mut ours, mut theirs), (from, to)) in pairs.into_iter().zip(places) {
            scope.spawn(move || {
                for piece in from.chunks(BODY) {
                    ours.write_all(piece).expect("the link");
                }
            });
            scope.spawn(move || {
                for piece in to.chunks_mut(BODY) {
                    theirs.read_exact(piece).expect("the link");
                }
            });
        }
    });
    total as f64 / began.elapsed().as_secs_f64()
}

/// Bytes a second of a device by itself: read to its end, and written, by one thread with one buffer.
pub(crate) fn device_rates(config: &DeviceConfig, chunk: usize) -> (f64, f64) {
    let mut source = device(config, DeviceState::StopCopy);
    let mut sink = device(config, DeviceState::Resuming);
    let mut buffer = vec![0; chunk];
    let (mut reading, mut writing, mut octets) = (Duration::ZERO, Duration::ZERO, 0);
    loop {
        let began = Instant::now();
        let read = source.read(&mut buffer).expect("a sound device");
        reading += began.elapsed();
        let DeviceRead::Bytes(count) = read else {
            break;
        };
        let began = Instant::now();
        sink.write(&buffer[..count]).expect("a sound stream");
        writing += began.elapsed();
        octets += count as u64;
    }
    let rate = |time: Duration| octets as f64 / time.as_secs_f64();
    (rate(reading), rate(writing))
}

/// How it is done elsewhere: each device's state is read whole into one buffer, one device after the other; the buffer is sent over
/// one connection, received whole, and loaded, one device after the other. From the stop of the devices to the word that the last is
/// loaded.
pub(crate) fn one_stream(link: &Link, configs: &[DeviceConfig]) -> Duration {
    let mut sources: Vec<_> = configs
        .iter()
        .map(|c| device(c, DeviceState::RunningP2p))
        .collect();
    let mut sinks: Vec<_> = configs
        .iter()
        .map(|c| device(c, DeviceState::Resuming))
        .collect();
    let (ours, theirs) = link.plain_pairs(1).remove(0);
    std::thread::scope(|scope| {
        scope.spawn(move || load_whole(theirs, &mut sinks));
        let began = Instant::now();
        for source in &mut sources {
            lead(source, DeviceState::StopCopy);
        }
        send_whole(ours, &mut sources);
        began.elapsed()
    })
}

fn send_whole(mut socket: TcpStream, sources: &mut [ModelDevice]) {
    let bytes: u64 = sources.iter_mut().map(ModelDevice::stop_copy_bytes).sum();
    let mut whole = vec![0; usize::try_from(bytes).expect("it fits")];
    let mut ends = Vec::new();
    let mut at = 0;
    for source in sources {
        while let DeviceRead::Bytes(count) = source.read(&mut whole[at..]).expect("a sound device")
        {
            at += count;
            if at == whole.len() {
                break;
            }
        }
        ends.push(at as u64);
    }
    assert_eq!(at, whole.len());
    for end in ends {
        socket.write_all(&end.to_le_bytes()).expect("the link");
    }
    socket.write_all(&whole).expect("the link");
    let mut word = [0];
    socket.read_exact(&mut word).expect("the word");
}

fn load_whole(mut socket: TcpStream, sinks: &mut [ModelDevice]) {
    let mut ends = Vec::new();
    for _ in &*sinks {
        let mut end = [0; 8];
        socket.read_exact(&mut end).expect("the link");
        ends.push(usize::try_from(u64::from_le_bytes(end)).expect("it fits"));
    }
    let mut whole = vec![0; ends.last().copied().unwrap_or(0)];
    socket.read_exact(&mut whole).expect("the link");
    let mut at = 0;
    for (sink, end) in sinks.iter_mut().zip(ends) {
        sink.write(&whole[at..end]).expect("a sound stream");
        lead(sink, DeviceState::Stop);
        at = end;
    }
    socket.write_all(&[1]).expect("the link");
}

fn device(config: &DeviceConfig, state: DeviceState) -> ModelDevice {
    // Without configuration: one step less here.
    let config = DeviceConfig {
        config: 0,
        ..config.clone()
    };
    let mut device = ModelDevice::new(config).expect("a device");
    lead(&mut device, state);
    device
}

fn lead(device: &mut ModelDevice, to: DeviceState) {
    while let Some(next) = device.state().step_to(to, device.flags()) {
        device.set_state(next).expect("an arc");
    }
}
