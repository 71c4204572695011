//! The destination's memory with a source that fills what it was granted, in the worst ways: within the window and a little.
//!
//! One test in a process of its own, since it looks at the memory of the whole process.

use std::time::Duration;

use multifd_tests::blotter::{Blotter, Tap};
use multifd_tests::bounded::{Destination, GRACE, rx_builder};
use multifd_tests::fake_source::FakeSource;
use multifd_tests::resident::{peak_bytes, resident_bytes};
use multifd_wire::frame::{DeviceChunk, Mark, Section};
use multifd_wire::{DeviceId, Frame, Kind};

const WINDOW: u64 = 32 << 20;

const CHUNK: u64 = 256 << 10;

/// What `Config::device_window_bytes` states: buffers of at most 8/7 of what is held, a chunk that is copied, and 1/16 for the
/// bookkeeping of the smallest chunks. The rest is this process: threads, the lanes' own buffers, the heap's.
const BOUND: u64 = WINDOW / 7 * 8 + CHUNK + WINDOW / 16 + (3 << 20);

/// Sends bytes of a device and knows how much it may.
struct Stream {
    index: u64,
    offset: u64,
    granted: u64,
    octets: Vec<u8>,
}

impl Stream {
    fn new() -> Self {
        Self {
            index: 0,
            offset: 0,
            granted: WINDOW,
            octets: vec![7; CHUNK as usize],
        }
    }

    fn send(&mut self, source: &mut FakeSource<'_>, section: Section, bytes: u64) {
        while self.offset + bytes > self.granted {
            self.hear_credit(source);
        }
        let chunk = DeviceChunk {
            device: DeviceId::new(0),
            section,
            index: self.index,
            offset: self.offset,
        };
        source.chunk(0, chunk, &self.octets[..bytes as usize]);
        (self.index, self.offset) = (self.index + 1, self.offset + bytes);
    }

    fn hear_credit(&mut self, source: &mut FakeSource<'_>) {
        let heard = source.control.hear_kind(Kind::Credit);
        if let Frame::Credit(credits) = heard.frame() {
            let granted = credits.iter().map(|credit| credit.offset_max);
            self.granted = granted.max().unwrap_or(self.granted);
        }
    }

    /// What was granted is used up by chunks of this size.
    fn fill(&mut self, source: &mut FakeSource<'_>, section: Section, bytes: u64) {
        while self.offset + bytes <= self.granted {
            self.send(source, section, bytes);
        }
    }

    /// One chunk is left out, so that nothing behind it can be loaded.
    fn leave_out(&mut self, bytes: u64) {
        (self.index, self.offset) = (self.index + 1, self.offset + bytes);
    }
}

/// What a source does to a device behind a tap.
type Act = fn(&mut FakeSource<'_>, &mut Stream, &Tap);

const ACTS: [(&str, Act); 7] = [
    ("state without end", |source, stream, tap| {
        tap.open();
        while stream.offset < 8 * WINDOW {
            stream.send(source, Section::Data, CHUNK);
        }
    }),
    ("a full window that is not taken", |source, stream, _| {
        stream.fill(source, Section::Data, CHUNK);
    }),
    ("a full window behind a hole", |source, stream, _| {
        stream.leave_out(4096);
        stream.fill(source, Section::Data, CHUNK);
    }),
    ("chunks that waste most of a buffer", |source, stream, _| {
        stream.fill(source, Section::Data, CHUNK / 8 * 7);
    }),
    ("chunks a little too small for one", |source, stream, _| {
        stream.fill(source, Section::Data, CHUNK / 8 * 7 - 1);
    }),
    ("small chunks after large ones", |source, stream, tap| {
        // A window of buffers was needed at once, and is kept for what comes: it must make room.
        stream.fill(source, Section::Data, CHUNK);
        std::thread::sleep(Duration::from_millis(100));
        tap.open();
        while tap.taken() < stream.offset {
            std::thread::sleep(Duration::from_millis(1));
        }
        while stream.granted < stream.offset + WINDOW / 4 * 3 {
            stream.hear_credit(source);
        }
        stream.leave_out(4096);
        stream.fill(source, Section::Data, 4096 * 2);
    }),
    (
        "a configuration as large as the window",
        |source, stream, _| {
            source.mark(Mark::DataEnd, 0, 0, 0);
            stream.index = 1;
            while stream.offset < 16 << 20 {
                stream.send(source, Section::Config, CHUNK);
            }
        },
    ),
];

fn run(act: Act) {
    let tap = Tap::shut();
    let device = Box::new(Blotter::new("nic0", tap.clone()));
    // What is measured is memory: a host on which pages are hard to come by has its time.
    let config = rx_builder().device_window_bytes(WINDOW);
    let config = config.stall(Duration::from_secs(60)).build().unwrap();
    let destination = Destination::with_devices(config, vec![device]);
    let connect = || destination.connect();
    let mut source = FakeSource::with_devices(&connect, 1, &["nic0"], CHUNK);
    act(&mut source, &mut Stream::new(), &tap);
    // Everything that was sent is there, or was refused.
    let nobody = DeviceChunk {
        device: DeviceId::new(9),
        section: Section::Data,
        index: 0,
        offset: 0,
    };
    source.chunk(0, nobody, &[1]);
    tap.open();
    let told = source.control.hear_abort();
    let end = destination.end(GRACE);
    let error = end.finished.error.expect("it failed");
    assert!(
        error.to_string().contains("device"),
        "{error} {}",
        told.text
    );
    assert!(!end.running && end.discarded);
}

// SPEC: CREDIT-4
#[test]
fn what_is_held_of_a_device_stays_within_its_window() {
    // Once, so that what is only made once is there already; and what the heap keeps of one act counts in the next.
    run(|source, stream, _| stream.send(source, Section::Data, 1));
    let before = resident_bytes();
    for (name, act) in ACTS {
        let growth = peak_bytes(|| run(act)).saturating_sub(before);
        assert!(growth < BOUND, "{name}: {growth} bytes, {BOUND} allowed");
    }
}
