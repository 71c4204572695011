//! Against the destination, device state on data channels: what breaks a stream's rules ends it, with the device and the rule named.

use std::time::Instant;

use multifd_receiver::DeviceSink;
use multifd_tests::blotter::{Blotter, Tap};
use multifd_tests::bounded::{Destination, GRACE, rx_builder};
use multifd_tests::fake_source::FakeSource;
use multifd_wire::frame::{Device, DeviceChunk, DeviceFlags, Mark, RawDevice, Section};
use multifd_wire::{DeviceId, Features, Kind, Reason, Text};

const CHUNK: u64 = 64 << 10;

/// What the destination grants each device.
const WINDOW: u64 = 256 << 10;

/// What the source does; how the destination ends; words that it says, of the device and the rule.
type Case = (
    &'static str,
    fn(&mut FakeSource<'_>),
    &'static str,
    [&'static str; 2],
);

const CREDIT: &str = "wire.misbehaved.credit";
const STREAM: &str = "wire.misbehaved.device-stream";
const LIMIT: &str = "receiver.limit";

fn check(window: u64, cases: &[Case]) {
    for (name, act, code, words) in cases {
        // Nothing is taken, so whatever comes has to be held, or refused.
        let tap = Tap::shut();
        let devices: Vec<Box<dyn DeviceSink>> = vec![
            Box::new(Blotter::new("nic0", tap.clone())),
            Box::new(Blotter::new("gpu", tap.clone())),
        ];
        let config = rx_builder().device_window_bytes(window).build().unwrap();
        let destination = Destination::with_devices(config, devices);
        let connect = || destination.connect();
        let mut source = FakeSource::with_devices(&connect, 2, &["nic0", "gpu"], CHUNK);
        let began = Instant::now();
        act(&mut source);
        let told = source.control.hear_abort();
        tap.open();
        let reason = if *code == LIMIT {
            Reason::ResourceLimit
        } else {
            Reason::Misbehaved
        };
        assert_eq!(told.reason, reason, "{name}: {}", told.text);
        for word in words {
            assert!(told.text.contains(word), "{name}: {}", told.text);
        }
        destination.fails(GRACE, code, name);
        assert!(began.elapsed() < GRACE, "{name}: {:?}", began.elapsed());
    }
}

fn chunk(index: u64, offset: u64) -> DeviceChunk {
    DeviceChunk {
        device: DeviceId::new(0),
        section: Section::Data,
        index,
        offset,
    }
}

fn config(index: u64, offset: u64) -> DeviceChunk {
    DeviceChunk {
        section: Section::Config,
        ..chunk(index, offset)
    }
}

/// The first `count` chunks of full size.
fn chunks(source: &FakeSource<'_>, count: u64) {
    for index in 0..count {
        source.chunk(0, chunk(index, index * CHUNK), &full());
    }
}

fn full() -> Vec<u8> {
    vec![7; CHUNK as usize]
}

#[test]
fn several_devices_of_which_none_has_p2p_are_refused_in_set_up() {
    let destination = Destination::start();
    let connect = || destination.connect();
    let mut source = FakeSource::open_with(&connect, Features::DEVICE_STATE);
    let device = |id: u32, name| {
        RawDevice::from(Device {
            id: DeviceId::new(id),
            flags: DeviceFlags::NONE,
            initial_bytes: 0,
            state_bytes: 1,
            chunk_bytes_max: CHUNK,
            name: Text::clip(name),
        })
    };
    source.devices = vec![device(0, "nic0"), device(1, "gpu")];
    source.send_tables(1);
    let told = source.control.hear_abort();
    assert_eq!(told.reason, Reason::DeviceRefused);
    assert_eq!(
        told.text,
        "the devices of the source can't be taken: nic0 has no P2P-quiescent state, so it can only be moved alone"
    );
    destination.fails(GRACE, "receiver.device.refused", "two without P2P");
}

// SPEC: CREDIT-3, GRANT-4
#[test]
fn more_than_was_granted_is_refused() {
    check(
        WINDOW,
        &[
            (
                "one chunk past the window",
                |s| chunks(s, WINDOW / CHUNK + 1),
                CREDIT,
                ["nic0", "were granted"],
            ),
            (
                "one byte past the window",
                |s| s.chunk(0, chunk(9, WINDOW - CHUNK + 1), &full()),
                CREDIT,
                ["nic0", "were granted"],
            ),
            (
                "an index and an offset from far ahead",
                |s| s.chunk(0, chunk(1 << 60, 1 << 40), &full()),
                CREDIT,
                ["nic0", "were granted"],
            ),
            (
                "a configuration larger than the window",
                |s| {
                    s.mark(Mark::DataEnd, 0, 0, 0);
                    for index in 0..=WINDOW / CHUNK {
                        s.chunk(0, config(index + 1, index * CHUNK), &full());
                    }
                },
                CREDIT,
                ["nic0", "were granted"],
            ),
        ],
    );
}

// SPEC: CREDIT-5
#[test]
fn a_configuration_larger_than_the_format_allows_is_refused() {
    check(
        32 << 20,
        &[(
            "16 MiB and a chunk",
            |s| {
                s.mark(Mark::DataEnd, 0, 0, 0);
                for index in 0..=(16 << 20) / CHUNK {
                    s.chunk(0, config(index + 1, index * CHUNK), &full());
                }
            },
            LIMIT,
            ["nic0", "configuration"],
        )],
    );
}

#[test]
fn items_far_ahead_and_in_great_numbers_are_refused() {
    check(
        WINDOW,
        &[
            (
                "the last index of all",
                |s| s.chunk(0, chunk(u64::MAX, 1), &[1]),
                STREAM,
                ["nic0", "DEVSTREAM-2"],
            ),
            (
                "thousands of bytes, each by itself, behind a hole",
                |s| {
                    for index in 1..3000 {
                        s.chunk(0, chunk(index, index), &[1]);
                    }
                },
                LIMIT,
                ["nic0", "chunks and marks"],
            ),
            (
                "thousands of marks behind a hole",
                |s| {
                    for index in 1..3000 {
                        s.mark(Mark::InitialEnd, 1, index, 0);
                    }
                },
                LIMIT,
                ["nic0", "chunks and marks"],
            ),
        ],
    );
}

#[test]
fn items_that_come_again_are_refused_unless_a_lane_was_lost() {
    check(
        WINDOW,
        &[
            (
                "the same",
                |s| {
                    chunks(s, 1);
                    s.chunk(0, chunk(0, 0), &full());
                },
                STREAM,
                ["nic0", "DEVSTREAM-1, it was sent again"],
            ),
            (
                "the same behind a hole",
                |s| {
                    s.chunk(0, chunk(2, 2 * CHUNK), &full());
                    s.chunk(0, chunk(2, 2 * CHUNK), &full());
                },
                STREAM,
                ["nic0", "DEVSTREAM-1, it was sent again"],
            ),
            (
                "with other content, after a lane was lost",
                |s| {
                    s.chunk(0, chunk(2, 2 * CHUNK), &full());
                    s.taken(0, 1);
                    s.lanes[1].peer.cut();
                    s.control.hear_kind(Kind::LaneDown);
                    s.chunk(0, chunk(2, 2 * CHUNK), &full());
                    s.chunk(0, chunk(2, 2 * CHUNK), &vec![8; CHUNK as usize]);
                },
                STREAM,
                ["nic0", "DEVSTREAM-1, it was sent again with other"],
            ),
            (
                "without end, after a lane was lost",
                |s| {
                    chunks(s, 3);
                    s.taken(0, 3);
                    s.lanes[1].peer.cut();
                    s.control.hear_kind(Kind::LaneDown);
                    for _ in 0..100 {
                        s.chunk(0, chunk(1, CHUNK), &full());
                    }
                },
                STREAM,
                ["nic0", "DEVSTREAM-1, it was sent again"],
            ),
            (
                "on two lanes at once",
                |s| {
                    let head = multifd_tests::peer::encode(
                        0,
                        chunk(0, 0),
                        multifd_wire::Body::Octets(&full()),
                    );
                    s.lanes[1].peer.raw(&head);
                    std::thread::sleep(std::time::Duration::from_millis(50));
                    s.chunk(0, chunk(0, 0), &full());
                },
                STREAM,
                ["nic0", "DEVSTREAM-1, it comes on two lanes"],
            ),
        ],
    );
}

#[test]
fn what_is_no_stream_is_refused() {
    check(
        WINDOW,
        &[
            (
                "a chunk that overlaps",
                |s| {
                    chunks(s, 1);
                    s.chunk(0, chunk(1, 1), &full());
                },
                STREAM,
                ["nic0", "DEVSTREAM-2"],
            ),
            (
                "a chunk that leaves a gap",
                |s| {
                    chunks(s, 1);
                    s.chunk(0, chunk(1, CHUNK + 1), &full());
                },
                STREAM,
                ["nic0", "DEVSTREAM-2"],
            ),
            (
                "a chunk longer than the device's are",
                |s| s.chunk(0, chunk(0, 0), &vec![1; CHUNK as usize + 1]),
                STREAM,
                ["nic0", "DEVSTREAM-2"],
            ),
            (
                "data after the end of the data",
                |s| {
                    s.mark(Mark::DataEnd, 0, 0, 0);
                    s.chunk(0, chunk(1, 0), &full());
                },
                STREAM,
                ["nic0", "DEVSTREAM-3"],
            ),
            (
                "a chunk after the end of everything",
                |s| {
                    s.mark(Mark::DataEnd, 0, 0, 0);
                    s.mark(Mark::ConfigEnd, 0, 1, 0);
                    s.chunk(0, config(2, 0), &full());
                },
                STREAM,
                ["nic0", "DEVSTREAM-3"],
            ),
            (
                "the end of the initial bytes twice",
                |s| {
                    chunks(s, 1);
                    s.mark(Mark::InitialEnd, 1, 1, CHUNK);
                    s.mark(Mark::InitialEnd, 1, 2, CHUNK);
                },
                STREAM,
                ["nic0", "DEVSTREAM-3 and -4"],
            ),
            (
                "a generation that is left out",
                |s| s.mark(Mark::InitialEnd, 2, 0, 0),
                STREAM,
                ["nic0", "DEVSTREAM-3 and -4"],
            ),
            (
                "a device that is not there",
                |s| {
                    let other = DeviceChunk {
                        device: DeviceId::new(2),
                        ..chunk(0, 0)
                    };
                    s.chunk(0, other, &full());
                },
                "wire.misbehaved.unknown-device",
                ["device 2", "table"],
            ),
        ],
    );
}

#[test]
fn a_stream_without_its_end_is_refused_at_the_end_and_nobody_waits_for_it() {
    check(
        WINDOW,
        &[
            (
                "a hole",
                |s| {
                    s.chunk(0, chunk(0, 0), &full());
                    s.chunk(1, chunk(2, 2 * CHUNK), &full());
                    s.round_zero();
                    s.switchover(1);
                    s.last_round(1);
                },
                STREAM,
                ["nic0", "item 1 does not fit its stream: DEVSTREAM-7"],
            ),
            (
                "no end of the data",
                |s| {
                    chunks(s, 3);
                    s.round_zero();
                    s.switchover(1);
                    s.last_round(1);
                },
                STREAM,
                ["nic0", "item 3 does not fit its stream: DEVSTREAM-7"],
            ),
            (
                "another device without anything",
                |s| {
                    s.mark(Mark::DataEnd, 0, 0, 0);
                    s.mark(Mark::ConfigEnd, 0, 1, 0);
                    s.round_zero();
                    s.switchover(1);
                    s.last_round(1);
                },
                STREAM,
                ["gpu", "item 0 does not fit its stream: DEVSTREAM-7"],
            ),
            (
                "a hole, and a lane was lost long ago",
                |s| {
                    s.lanes[1].peer.cut();
                    s.control.hear_kind(Kind::LaneDown);
                    s.lanes.remove(1);
                    s.chunk(0, chunk(1, CHUNK), &full());
                    s.round_zero();
                    s.switchover(1);
                    s.last_round(1);
                },
                STREAM,
                ["nic0", "item 0 does not fit its stream: DEVSTREAM-7"],
            ),
        ],
    );
}
