//! Against the destination, in set-up: everything that can be found wrong is found here, and the source is told.

use std::time::Instant;

use multifd_receiver as rx;
use multifd_tests::bounded::{Destination, GRACE, SETUP_DEADLINE, STALL, rx_builder};
use multifd_tests::fake_source::{FakeSource, REGION_PAGES};
use multifd_tests::model::{DestinationMachine, Refuse};
use multifd_tests::peer::{Craft, altered, encode};
use multifd_wire::frame::{
    Asks, BlobPart, Commit, Config, Device, DeviceFlags, Devices, KeepAlive, LaneDown, RawDevice,
    RawRegion, Ready, Regions, RoundEnd, Running, SetupEnd, VmState,
};
use multifd_wire::{
    Body, DeviceId, Digest, Incarnation, Kind, LaneId, Phase, Reason, Region, RegionId, Round, Text,
};

/// One case: what the source does after the grant, and how the destination ends.
struct Case {
    name: &'static str,
    act: fn(&mut FakeSource<'_>),
    code: &'static str,
    reason: Reason,
}

const fn case(
    name: &'static str,
    code: &'static str,
    reason: Reason,
    act: fn(&mut FakeSource<'_>),
) -> Case {
    Case {
        name,
        act,
        code,
        reason,
    }
}

fn check(cases: &[Case]) {
    for case in cases {
        let destination = Destination::start();
        let connect = || destination.connect();
        let mut source = FakeSource::open(&connect);
        let began = Instant::now();
        (case.act)(&mut source);
        let told = source.control.hear_abort();
        assert_eq!(told.reason, case.reason, "{}: {}", case.name, told.text);
        assert_eq!(told.phase, Phase::Setup, "{}: {}", case.name, told.text);
        destination.fails(GRACE, case.code, case.name);
        assert!(
            began.elapsed() < GRACE,
            "{}: {:?}",
            case.name,
            began.elapsed()
        );
    }
}

fn region(id: u32, guest_address: u64, pages: u64) -> RawRegion {
    RawRegion::from(Region {
        id: RegionId::new(id),
        guest_address,
        bytes: pages * 4096,
    })
}

fn part(index: u32, part: u32, blob_bytes: u64) -> Config {
    Config {
        blob: BlobPart {
            kind: 1,
            version: 1,
            index,
            part,
            blob_bytes,
        },
    }
}

const MISBEHAVED: Reason = Reason::Misbehaved;
const MALFORMED: Reason = Reason::Malformed;
const ORDER: &str = "wire.misbehaved.order";
const AMOUNT: &str = "wire.misbehaved.amount";
const DIRECTION: &str = "wire.misbehaved.direction";
const OUT_OF_TURN: &str = "receiver.misbehaved.out-of-turn";

#[test]
fn set_up_frames_out_of_order_are_refused() {
    check(&[
        case("SETUP_END first", ORDER, MISBEHAVED, |s| {
            s.control.send(s.setup_end(1))
        }),
        case("SETUP_END without REGIONS", ORDER, MISBEHAVED, |s| {
            s.send_config();
            s.control.send(s.setup_end(1));
        }),
        case("SETUP_END without DEVICES", ORDER, MISBEHAVED, |s| {
            s.send_config();
            s.send_regions();
            s.control.send(s.setup_end(1));
        }),
        case("DEVICES first", ORDER, MISBEHAVED, |s| s.send_devices()),
        case("REGIONS twice", ORDER, MISBEHAVED, |s| {
            s.send_regions();
            s.send_regions();
        }),
        case("DEVICES twice", ORDER, MISBEHAVED, |s| {
            s.send_regions();
            s.send_devices();
            s.send_devices();
        }),
        case("CONFIG after REGIONS", ORDER, MISBEHAVED, |s| {
            s.send_regions();
            s.send_config();
        }),
        case("CONFIG after SETUP_END", ORDER, MISBEHAVED, |s| {
            s.send_tables(1);
            s.send_config();
        }),
        case("SETUP_END twice", OUT_OF_TURN, MISBEHAVED, |s| {
            s.send_tables(1);
            s.control.send(s.setup_end(1));
        }),
        case("the second part of a blob first", ORDER, MISBEHAVED, |s| {
            s.control
                .send_with(part(0, 1, (1 << 20) + 5), Body::Octets(&[1; 5]), &[1; 5]);
        }),
        case("the second blob first", ORDER, MISBEHAVED, |s| {
            s.control
                .send_with(part(1, 0, 5), Body::Octets(&[1; 5]), &[1; 5]);
        }),
        case("half a blob, then SETUP_END", ORDER, MISBEHAVED, |s| {
            let body = vec![1; 1 << 20];
            s.control
                .send_with(part(0, 0, (1 << 20) + 5), Body::Octets(&body), &body);
            s.send_regions();
            s.send_devices();
            let end = SetupEnd {
                configs: 0,
                ..s.setup_end(1)
            };
            s.control.send(end);
        }),
        case(
            "a blob that changes its size on the way",
            ORDER,
            MISBEHAVED,
            |s| {
                let body = vec![1; 1 << 20];
                s.control
                    .send_with(part(0, 0, (1 << 20) + 5), Body::Octets(&body), &body);
                s.control
                    .send_with(part(0, 1, (1 << 20) + 4), Body::Octets(&[1; 4]), &[1; 4]);
            },
        ),
    ]);
}

#[test]
fn frames_of_later_phases_are_refused_in_set_up() {
    check(&[
        case("COMMIT", OUT_OF_TURN, MISBEHAVED, |s| {
            s.control.send(Commit {
                digest: Digest::EMPTY,
            })
        }),
        case("SWITCHOVER", OUT_OF_TURN, MISBEHAVED, |s| s.switchover(0)),
        case("FINAL", AMOUNT, MISBEHAVED, |s| {
            s.control.send(s.final_of(0))
        }),
        case("FINAL after the tables", OUT_OF_TURN, MISBEHAVED, |s| {
            s.send_tables(1);
            s.control.send(s.final_of(0));
        }),
        case("COMMIT after the tables", OUT_OF_TURN, MISBEHAVED, |s| {
            s.send_tables(1);
            s.commit();
        }),
        case("VM_STATE", "wire.misbehaved.phase", MISBEHAVED, |s| {
            s.control.send(VmState {
                blob: part(0, 0, 0).blob,
            });
        }),
        case(
            "LANE_DOWN of a lane that never was",
            "wire.misbehaved.lane",
            MISBEHAVED,
            |s| {
                s.control.send(LaneDown {
                    lane: LaneId::new(0),
                    incarnation: Incarnation::new(0),
                    reason: Reason::ChannelsLost,
                });
            },
        ),
    ]);
}

#[test]
fn frames_of_the_other_side_or_of_data_channels_are_refused_on_control() {
    check(&[
        case("READY", DIRECTION, MISBEHAVED, |s| {
            s.control.send(Ready {
                lanes: 1,
                prepare_us: 1,
            })
        }),
        case("GRANT", DIRECTION, MISBEHAVED, |s| s.control.send(s.grant)),
        case("RUNNING", DIRECTION, MISBEHAVED, |s| {
            s.control.send(Running {
                resume_us: 1,
                cpu_us: 1,
                landed_bytes: 1,
            });
        }),
        case("ROUND_END", DIRECTION, MISBEHAVED, |s| {
            s.control.send(RoundEnd {
                round: Round::new(0),
                final_round: false,
                pages: 0,
                zero_pages: 0,
            });
        }),
    ]);
}

#[test]
fn octets_that_are_no_frame_are_refused() {
    check(&[
        case(
            "random bytes",
            "wire.malformed.header-crc",
            Reason::Corruption,
            |s| {
                s.control.instead(|_| vec![0xA7; 64]);
            },
        ),
        case(
            "a flipped bit in a header",
            "wire.malformed.header-crc",
            Reason::Corruption,
            |s| {
                s.control.instead(|number| {
                    let mut head = encode(number, s.setup_end(1), Body::None);
                    head[9] ^= 1;
                    head
                });
            },
        ),
        case(
            "a flipped bit in a table",
            "wire.malformed.table-crc",
            Reason::Corruption,
            |s| {
                s.control.instead(|number| {
                    let mut head = encode(number, s.setup_end(1), Body::None);
                    head[40] ^= 1;
                    head
                });
            },
        ),
        case(
            "a flipped bit in a body",
            "wire.malformed.body-crc",
            Reason::Corruption,
            |s| {
                s.control
                    .send_with(part(0, 0, 5), Body::Octets(&[1; 5]), &[1, 1, 3, 1, 1]);
            },
        ),
        case(
            "a reserved bit in a header",
            "wire.malformed.reserved",
            MALFORMED,
            |s| {
                s.control.instead(|number| {
                    let plain = Craft::new(Kind::SetupEnd.code(), number, &[0; 32]);
                    Craft {
                        reserved: 1,
                        ..plain
                    }
                    .octets()
                });
            },
        ),
        case(
            "a reserved field in a table",
            "wire.malformed.reserved",
            MALFORMED,
            |s| {
                s.control.instead(|number| {
                    altered(encode(number, s.setup_end(1), Body::None), 24, &[1])
                });
            },
        ),
        case(
            "an unknown kind",
            "wire.malformed.unknown-kind",
            Reason::Incompatible,
            |s| {
                s.control
                    .instead(|number| Craft::new(0x7F00, number, &[]).octets());
            },
        ),
        case(
            "a frame that was left out",
            "wire.misbehaved.sequence",
            MISBEHAVED,
            |s| {
                s.control.skip(1);
                s.send_config();
            },
        ),
        case(
            "ABORT with an impossible phase",
            "wire.malformed.value",
            MALFORMED,
            |s| {
                s.control.instead(|number| {
                    Craft::new(
                        Kind::Abort.code(),
                        number,
                        &[1, 0, 0, 0, 99, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
                    )
                    .octets()
                });
            },
        ),
        case(
            "ABORT whose text is no text",
            "wire.malformed.text",
            MALFORMED,
            |s| {
                s.control.instead(|number| {
                    Craft::new(
                        Kind::Abort.code(),
                        number,
                        &[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0xFF],
                    )
                    .octets()
                });
            },
        ),
        case(
            "KEEP_ALIVE without a stamp",
            "wire.malformed.value",
            MALFORMED,
            |s| {
                s.control.instead(|number| {
                    Craft::new(Kind::KeepAlive.code(), number, &[0; 32]).octets()
                });
            },
        ),
    ]);
}

#[test]
fn tables_that_describe_no_machine_are_refused() {
    check(&[
        case(
            "regions that overlap",
            "wire.layout.overlap",
            MALFORMED,
            |s| {
                let regions = [region(0, 0, 4), region(1, 3 * 4096, 4)];
                s.control.send(Regions { regions: &regions });
            },
        ),
        case("a region that wraps", "wire.layout.wraps", MALFORMED, |s| {
            s.control.send(Regions {
                regions: &[region(0, u64::MAX - 4095, 2)],
            });
        }),
        case("an empty region", "wire.layout.alignment", MALFORMED, |s| {
            s.control.send(Regions {
                regions: &[region(0, 0, 0)],
            });
        }),
        case(
            "region numbers with a gap",
            "wire.layout.order",
            MALFORMED,
            |s| {
                s.control.send(Regions {
                    regions: &[region(1, 0, 4)],
                });
            },
        ),
        case(
            "a device, though none was agreed on",
            "wire.misbehaved.feature",
            MISBEHAVED,
            |s| {
                s.send_regions();
                let device = Device {
                    id: DeviceId::new(0),
                    flags: DeviceFlags::NONE,
                    initial_bytes: 0,
                    state_bytes: 1 << 20,
                    chunk_bytes_max: 4096,
                    name: Text::clip("nic"),
                };
                s.control.send(Devices {
                    devices: &[RawDevice::from(device)],
                });
            },
        ),
        case("fewer blobs than SETUP_END says", AMOUNT, MISBEHAVED, |s| {
            s.send_regions();
            s.send_devices();
            s.control.send(s.setup_end(1));
        }),
        case("another size of memory", AMOUNT, MISBEHAVED, |s| {
            s.send_config();
            s.send_regions();
            s.send_devices();
            let end = SetupEnd {
                memory_bytes: 4096,
                ..s.setup_end(1)
            };
            s.control.send(end);
        }),
        case("another number of regions", AMOUNT, MISBEHAVED, |s| {
            s.send_config();
            s.send_regions();
            s.send_devices();
            let end = SetupEnd {
                regions: 3,
                ..s.setup_end(1)
            };
            s.control.send(end);
        }),
        case("more lanes than granted", AMOUNT, MISBEHAVED, |s| {
            s.send_tables(5)
        }),
        case(
            "a lane that is not among those announced",
            OUT_OF_TURN,
            MISBEHAVED,
            |s| {
                s.join(3);
                s.send_tables(2);
            },
        ),
    ]);
}

// SPEC: CHAN-3
#[test]
fn a_frame_cut_off_at_any_place_ends_it() {
    type Make = fn(&FakeSource<'_>, u64) -> Vec<u8>;
    let frames: [(&str, Make); 4] = [
        ("CONFIG", |_, number| {
            let body = [7; 100];
            let head = encode(number, part(0, 0, 100), Body::Octets(&body));
            [&head[..], &body].concat()
        }),
        ("REGIONS", |s, number| {
            let regions: Vec<RawRegion> = s.layout.regions().map(RawRegion::from).collect();
            encode(number, Regions { regions: &regions }, Body::None)
        }),
        ("DEVICES", |_, number| {
            encode(number, Devices { devices: &[] }, Body::None)
        }),
        ("SETUP_END", |s, number| {
            encode(number, s.setup_end(1), Body::None)
        }),
    ];
    for (name, make) in frames {
        for bytes in [1, 16, 31, 32, 33, usize::MAX] {
            let destination = Destination::start();
            let connect = || destination.connect();
            let mut source = FakeSource::open(&connect);
            source.control.fall_silent();
            source.control.instead(|number| {
                let mut whole = make(&source, number);
                whole.truncate(bytes.min(whole.len() - 1));
                whole
            });
            source.control.finish();
            // The other direction is still open: it carries the reason.
            assert_eq!(
                source.control.hear_abort().reason,
                Reason::ChannelsLost,
                "{name}"
            );
            let end = destination.end(GRACE);
            let error = end.finished.error.unwrap();
            assert!(
                error.code().starts_with("channel-closed"),
                "{name}, {bytes} bytes: {error}"
            );
            assert!(!end.running && end.discarded);
        }
    }
}

#[test]
fn a_source_that_leaves_is_not_waited_for() {
    for step in 0..3 {
        let destination = Destination::start();
        let connect = || destination.connect();
        let mut source = FakeSource::open(&connect);
        if step > 0 {
            source.send_config();
            source.send_regions();
        }
        if step > 1 {
            source.send_devices();
            source.control.send(source.setup_end(2));
            source.join(0);
        }
        source.control.finish();
        assert_eq!(source.control.hear_abort().reason, Reason::ChannelsLost);
        destination.fails(GRACE, "channel-closed", &format!("after step {step}"));
    }
}

// SPEC: CHAN-5, ALIVE-2
#[test]
fn a_source_that_stalls_in_set_up_is_given_up_however_alive_it_says_it_is() {
    // It says that it lives, and sends nothing.
    let destination = Destination::start();
    let connect = || destination.connect();
    let began = Instant::now();
    let mut source = FakeSource::open(&connect);
    assert_eq!(source.control.hear_abort().reason, Reason::Timeout);
    assert!(began.elapsed() >= SETUP_DEADLINE && began.elapsed() < SETUP_DEADLINE + GRACE);
    destination.fails(GRACE, "receiver.timeout", "alive without tables");
    // Its tables are here, its lanes are not.
    let destination = Destination::start();
    let connect = || destination.connect();
    let mut source = FakeSource::open(&connect);
    source.send_tables(2);
    source.join(1);
    assert_eq!(source.control.hear_abort().reason, Reason::Timeout);
    destination.fails(GRACE, "receiver.timeout", "a lane that never comes");
    // It falls silent.
    let destination = Destination::start();
    let connect = || destination.connect();
    let mut source = FakeSource::open(&connect);
    source.send_tables(2);
    let began = Instant::now();
    source.control.fall_silent();
    assert_eq!(source.control.hear_abort().reason, Reason::Timeout);
    assert!(began.elapsed() < STALL + GRACE);
    destination.fails(GRACE, "receiver.timeout", "silence");
}

#[test]
fn more_than_this_side_is_set_to_hold_is_refused() {
    let pages = 2 * REGION_PAGES;
    let limits: [(&str, rx::Config); 1] = [(
        "memory",
        rx_builder()
            .memory_bytes_max(Some(pages * 4096 - 1))
            .build()
            .unwrap(),
    )];
    for (name, config) in limits {
        let destination = Destination::with(config, DestinationMachine::default());
        let connect = || destination.connect();
        let mut source = FakeSource::open(&connect);
        source.send_config();
        source.send_regions();
        let told = source.control.hear_abort();
        assert_eq!(told.reason, Reason::ResourceLimit, "{name}");
        destination.fails(GRACE, "receiver.limit", name);
    }
    // At the limit it is taken.
    let config = rx_builder()
        .memory_bytes_max(Some(pages * 4096))
        .build()
        .unwrap();
    let destination = Destination::with(config, DestinationMachine::default());
    let connect = || destination.connect();
    let source = FakeSource::in_rounds(&connect, 1);
    drop(source);
    // Blobs: 1 MiB is allowed, one byte more is not.
    let config = rx_builder().blob_bytes_max(1 << 20).build().unwrap();
    let destination = Destination::with(config, DestinationMachine::default());
    let connect = || destination.connect();
    let mut source = FakeSource::open(&connect);
    let body = vec![1; 1 << 20];
    source
        .control
        .send_with(part(0, 0, 1 << 20), Body::Octets(&body), &body);
    source.control.send(KeepAlive {
        stamp_us: 7,
        echo_us: 0,
        held_us: 0,
        asks: Asks::Answer,
    });
    source.control.hear_kind(Kind::KeepAlive);
    source
        .control
        .send_with(part(1, 0, 1), Body::Octets(&[1]), &[1]);
    assert_eq!(source.control.hear_abort().reason, Reason::ResourceLimit);
    destination.fails(GRACE, "receiver.limit", "blobs");
}

// SPEC: SETUP-3
#[test]
fn a_machine_that_cannot_be_built_refuses_the_migration_in_set_up() {
    for (refuse, code, reason) in [
        (Refuse::Prepare, "receiver.vmm.refused", Reason::VmmRefused),
        (
            Refuse::OtherMemory,
            "receiver.vmm.memory-differs",
            Reason::MemoryMismatch,
        ),
    ] {
        let machine = DestinationMachine {
            refuse,
            ..DestinationMachine::default()
        };
        let destination = Destination::with(rx_builder().build().unwrap(), machine);
        let connect = || destination.connect();
        let mut source = FakeSource::open(&connect);
        source.send_tables(1);
        let told = source.control.hear_abort();
        assert_eq!(
            (told.reason, told.phase),
            (reason, Phase::Setup),
            "{}",
            told.text
        );
        destination.fails(GRACE, code, "a machine that can't be built");
    }
}

#[test]
fn what_may_be_skipped_is_skipped() {
    let destination = Destination::start();
    let connect = || destination.connect();
    let mut source = FakeSource::open(&connect);
    let body = [3; 10_000];
    let optional = |number| {
        let plain = Craft::new(0xFF00, number, &[1, 2, 3]);
        let frame = Craft {
            body_bytes: 10_000,
            body_crc: crc32fast::hash(&body),
            ..plain
        };
        [&frame.octets()[..], &body].concat()
    };
    source.control.instead(optional);
    source.send_tables(1);
    source.join(0);
    source.control.hear_kind(Kind::Ready);
    source.lanes[0].peer.instead(optional);
    source.round_zero();
    source.complete(1);
    let end = destination.end(GRACE);
    assert!(end.finished.error.is_none() && end.running);
}
