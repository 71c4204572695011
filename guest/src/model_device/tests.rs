//! The model device against itself: what is read from one is taken in by another, and every fault on the way is found.

use multifd_transport::GuestMemory;
use multifd_transport::memory::RegionLayout;

use super::stream::BLOCK;
use super::*;

const MIB: u64 = 1 << 20;

fn device(text: &str) -> ModelDevice {
    ModelDevice::new(text.parse().unwrap()).unwrap()
}

fn stop(device: &mut ModelDevice) {
    while let Some(next) = device
        .state()
        .step_to(DeviceState::StopCopy, device.flags())
    {
        device.set_state(next).unwrap();
    }
}

fn resuming(text: &str) -> ModelDevice {
    let mut sink = device(text);
    while let Some(next) = sink.state().step_to(DeviceState::Resuming, sink.flags()) {
        sink.set_state(next).unwrap();
    }
    sink
}

/// The whole stream in pieces of so many bytes.
fn read_all(device: &mut ModelDevice, piece: usize) -> Vec<Vec<u8>> {
    let mut pieces = Vec::new();
    loop {
        let mut buffer = vec![0; piece];
        match device.read(&mut buffer).unwrap() {
            DeviceRead::Bytes(count) => pieces.push(buffer[..count].to_vec()),
            DeviceRead::NothingNow | DeviceRead::End => return pieces,
        }
    }
}

fn take_in(sink: &mut ModelDevice, pieces: &[Vec<u8>], config: &[u8]) -> Result<(), DeviceFault> {
    pieces.iter().try_for_each(|piece| sink.write(piece))?;
    if !config.is_empty() {
        sink.load_config(config)?;
    }
    sink.set_state(DeviceState::Stop)
}

#[test]
fn a_state_of_any_size_moves_whole_and_counts_on() {
    for size in [
        4096,
        4097,
        65_535,
        65_536,
        65_537,
        65_536 + 31,
        65_536 + 32,
        65_536 + 33,
        3 * MIB + 5,
    ] {
        let text = format!("model:size={size},config=1000");
        let mut source = device(&text);
        source.operate(77);
        stop(&mut source);
        let pieces = read_all(&mut source, 10_007);
        let config = source.save_config().unwrap();
        let mut sink = resuming(&text);
        take_in(&mut sink, &pieces, &config).unwrap_or_else(|e| panic!("{size}: {e}"));
        sink.set_state(DeviceState::RunningP2p).unwrap();
        sink.set_state(DeviceState::Running).unwrap();
        assert_eq!(sink.operations(), 77, "{size}");
        // And it moves on from there.
        stop(&mut sink);
        let mut third = resuming(&text);
        let (pieces, config) = (read_all(&mut sink, 65_536), sink.save_config().unwrap());
        take_in(&mut third, &pieces, &config).unwrap();
    }
}

#[test]
fn initial_octets_come_first_then_what_changed_then_the_rest() {
    let text = "model:size=4M,initial=3M";
    let mut source = device(text);
    source.set_state(DeviceState::PreCopy).unwrap();
    let info = source.pre_copy_info().unwrap();
    assert_eq!(
        (info.initial_bytes, info.dirty_bytes, info.reinit),
        (3 * MIB, 0, false)
    );
    let mut pieces = Vec::new();
    let mut left = info.initial_bytes;
    while left > 0 {
        let mut buffer = vec![0; 100_000.min(usize::try_from(left).unwrap())];
        let DeviceRead::Bytes(count) = source.read(&mut buffer).unwrap() else {
            panic!()
        };
        buffer.truncate(count);
        left -= count as u64;
        pieces.push(buffer);
    }
    assert_eq!(source.pre_copy_info().unwrap(), DevicePreCopy::default());
    assert_eq!(source.read(&mut [0; 10]).unwrap(), DeviceRead::NothingNow);
    source.operate(5);
    assert_eq!(source.pre_copy_info().unwrap().dirty_bytes, 5 * BLOCK);
    assert_eq!(source.stop_copy_bytes(), 5 * BLOCK + MIB + 32);
    pieces.extend(read_all(&mut source, 50_000));
    source.operate(2);
    stop(&mut source);
    let rest = read_all(&mut source, 65_536);
    assert_eq!(
        rest.iter().map(Vec::len).sum::<usize>() as u64,
        2 * BLOCK + MIB + 32
    );
    pieces.extend(rest);
    take_in(&mut resuming(text), &pieces, &[]).unwrap();
}

#[test]
fn a_lost_doubled_exchanged_or_changed_piece_is_found() {
    let text = "model:size=1M,config=64";
    let mut source = device(text);
    source.operate(9);
    stop(&mut source);
    let pieces = read_all(&mut source, 50_000);
    let config = source.save_config().unwrap();
    type Breaks = fn(&mut Vec<Vec<u8>>);
    let broken: [(&str, Breaks); 5] = [
        ("lost", |p| drop(p.remove(3))),
        ("the last is lost", |p| drop(p.pop())),
        ("doubled", |p| p.insert(3, p[3].clone())),
        ("exchanged", |p| p.swap(3, 4)),
        ("changed", |p| p[5][777] ^= 4),
    ];
    for (what, break_it) in broken {
        let mut pieces = pieces.clone();
        break_it(&mut pieces);
        assert!(
            take_in(&mut resuming(text), &pieces, &config).is_err(),
            "{what}"
        );
    }
    // A whole block exchanged with another, and one that is old: the records look right.
    let blocks = {
        let mut again = device(text);
        again.operate(9);
        stop(&mut again);
        read_all(&mut again, 65_536)
    };
    let mut exchanged = blocks.clone();
    exchanged.swap(2, 3);
    assert!(take_in(&mut resuming(text), &exchanged, &config).is_err());
    let mut old = device(text);
    stop(&mut old);
    let mut stale = blocks;
    stale[2] = read_all(&mut old, 65_536).remove(2);
    let error = take_in(&mut resuming(text), &stale, &config).unwrap_err();
    assert!(error.to_string().contains("version"), "{error}");
    take_in(&mut resuming(text), &pieces, &config).unwrap();
    assert!(
        take_in(&mut resuming(text), &pieces, &[]).is_err(),
        "without its configuration"
    );
}

#[test]
fn it_announces_new_initial_octets_as_often_as_it_was_told() {
    let mut source = device("model:size=1M,initial=1M,reinit=2");
    source.set_state(DeviceState::PreCopy).unwrap();
    let (mut announced, mut read) = (0, 0);
    let until = Instant::now() + Duration::from_secs(5);
    while (announced < 2 || read < 3 * MIB) && Instant::now() < until {
        announced += u32::from(source.pre_copy_info().unwrap().reinit);
        read += read_all(&mut source, 65_536)
            .iter()
            .map(Vec::len)
            .sum::<usize>() as u64;
    }
    assert_eq!((announced, read), (2, 3 * MIB));
}

#[test]
fn writes_guest_memory_only_when_it_is_not_quiescent_and_finds_what_did_not_arrive() {
    let memory = || {
        let layout = [RegionLayout {
            guest_address: 0,
            bytes: MIB,
        }];
        GuestMemory::anonymous(&layout).unwrap()
    };
    let text = "model:size=1M,dma=64K,config=64,after-memory=yes";
    let (here, there) = (memory(), memory());
    let mut source = device(text).with_dma(Dma::new(here.clone(), 0, 16, 16).unwrap());
    let set = multifd_tracking::DirtySet::new(&[256]);
    let mut tracking = source.dma.as_ref().unwrap().source();
    tracking.start(&set).unwrap();
    source.operate(20);
    assert_eq!((set.dirty_pages(), tracking.figures().reported), (16, 16));
    drop(set.take_round());
    let set_before = set.dirty_pages();
    source.set_state(DeviceState::RunningP2p).unwrap();
    source.operate(3);
    assert_eq!(set.dirty_pages(), set_before, "it is quiescent");
    stop(&mut source);
    let (pieces, config) = (read_all(&mut source, 65_536), source.save_config().unwrap());
    let sink = || resuming(text).with_dma(Dma::new(there.clone(), 0, 16, 16).unwrap());
    let error = take_in(&mut sink(), &pieces, &config).unwrap_err();
    assert!(error.to_string().contains("guest memory"), "{error}");
    let mut octets = vec![0; MIB as usize];
    here.span(0, 0, MIB).unwrap().copy_to(&mut octets);
    there.span(0, 0, MIB).unwrap().copy_from(&octets);
    take_in(&mut sink(), &pieces, &config).unwrap();
    assert!(
        Dma::new(here, 0, 250, 16).is_err(),
        "past the end of memory"
    );
}

#[test]
fn fails_once_at_the_moment_that_it_was_told() {
    let mut source = device("model:size=1M,fail=read@100K");
    stop(&mut source);
    let mut buffer = vec![0; 65_536];
    assert!(source.read(&mut buffer).is_ok() && source.read(&mut buffer).is_ok());
    assert!(source.read(&mut buffer).is_err());
    let mut source = device("model:size=1M,fail=break@stop-copy");
    source.set_state(DeviceState::RunningP2p).unwrap();
    source.set_state(DeviceState::Stop).unwrap();
    assert!(source.set_state(DeviceState::StopCopy).is_err());
    assert_eq!(source.probe().state(), DeviceState::Error);
    source.reset();
    assert_eq!(
        (source.state(), source.probe().resets()),
        (DeviceState::Running, 1)
    );
    let mut source = device("model:size=1M,fail=step@running-p2p");
    assert!(source.set_state(DeviceState::RunningP2p).is_err());
    assert_eq!(source.state(), DeviceState::Running);
    source.set_state(DeviceState::RunningP2p).unwrap();
    assert!(
        source.set_state(DeviceState::PreCopyP2p).is_err(),
        "it has no pre-copy"
    );
}

#[test]
fn a_slow_device_takes_its_time() {
    let mut source = device("model:size=2M,read=20M");
    stop(&mut source);
    let began = Instant::now();
    read_all(&mut source, 1 << 20);
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(90), "{took:?}");
}
