//! Oversized numbers and floods: what the peer says must not become memory of the honest side.
//!
//! One test in a process of its own, since it looks at the memory of the whole process.

use std::time::{Duration, Instant};

use multifd_tests::bounded::{Destination, GRACE, Source, destination_config, tx_builder};
use multifd_tests::fake_destination::{FakeDestination, Taking};
use multifd_tests::fake_source::{FakeSource, run};
use multifd_tests::model::DestinationMachine;
use multifd_tests::peer::{Craft, altered, encode};
use multifd_tests::resident::{peak_bytes, resident_bytes};
use multifd_wire::frame::{Asks, BlobPart, Config, KeepAlive, Pages, RawRegion, Regions, Zeros};
use multifd_wire::{Body, Kind, Region, RegionId, Round};
use zerocopy::byteorder::little_endian::U32;

/// What a lie may cost: one body of 1 MiB, some threads and buffers. The numbers below ask for gigabytes.
const GROWTH_BYTES_MAX: u64 = 6 << 20;

/// Looks at the memory for as long as `act` runs, and fails if it grows beyond the bound.
fn bounded(name: &str, act: impl FnOnce()) {
    let before = resident_bytes();
    let growth = peak_bytes(act).saturating_sub(before);
    assert!(growth < GROWTH_BYTES_MAX, "{name}: {growth} bytes");
}

const MOST: [u8; 4] = u32::MAX.to_le_bytes();

fn part(blob_bytes: u64) -> Config {
    Config {
        blob: BlobPart {
            kind: 1,
            version: 1,
            index: 0,
            part: 0,
            blob_bytes,
        },
    }
}

/// What a source says on its control channel after the grant, and how the destination ends.
type ToDestination = (&'static str, fn(&mut FakeSource<'_>), &'static str);

const IN_SET_UP: [ToDestination; 8] = [
    (
        "a table of 4 GiB",
        |s| {
            s.control.instead(|number| {
                let plain = Craft::new(Kind::Regions.code(), number, &[0; 8]);
                Craft {
                    table_bytes: Some(u32::MAX),
                    ..plain
                }
                .octets()
            });
        },
        "wire.malformed.table-bytes",
    ),
    (
        "a body of 4 GiB",
        |s| {
            s.control.instead(|number| {
                let plain = Craft::new(Kind::Config.code(), number, &[0; 32]);
                Craft {
                    body_bytes: u32::MAX,
                    body_crc: 1,
                    ..plain
                }
                .octets()
            });
        },
        "wire.malformed.body-bytes",
    ),
    (
        "a skipped kind with a body of 4 GiB",
        |s| {
            s.control.instead(|number| {
                let plain = Craft::new(0xFF01, number, &[]);
                Craft {
                    body_bytes: u32::MAX,
                    body_crc: 1,
                    ..plain
                }
                .octets()
            });
        },
        "wire.malformed.body-bytes",
    ),
    (
        "a blob of 2^64 bytes",
        |s| {
            let body = vec![1; 1 << 20];
            s.control.instead(|number| {
                let head = encode(number, part((1 << 20) + 1), Body::Octets(&body));
                altered(head, 16, &u64::MAX.to_le_bytes())
            });
        },
        "wire.malformed.value",
    ),
    (
        "2^32 regions",
        |s| {
            s.control.instead(|number| {
                let region = RawRegion::from(Region {
                    id: RegionId::new(0),
                    guest_address: 0,
                    bytes: 4096,
                });
                altered(
                    encode(number, Regions { regions: &[region] }, Body::None),
                    0,
                    &MOST,
                )
            });
        },
        "wire.malformed.count",
    ),
    (
        "4 PiB of memory",
        |s| {
            s.send_config();
            let region = RawRegion::from(Region {
                id: RegionId::new(0),
                guest_address: 0,
                bytes: 1 << 52,
            });
            s.control.send(Regions { regions: &[region] });
            s.send_devices();
            let end = multifd_wire::frame::SetupEnd {
                regions: 1,
                memory_bytes: 1 << 52,
                ..s.setup_end(1)
            };
            s.control.send(end);
        },
        "receiver.vmm.refused",
    ),
    (
        "more memory than the format has",
        |s| {
            let region = RawRegion::from(Region {
                id: RegionId::new(0),
                guest_address: 0,
                bytes: 1 << 53,
            });
            s.control.send(Regions { regions: &[region] });
        },
        "wire.layout.pages",
    ),
    (
        "an ABORT with a text of 4 GiB",
        |s| {
            s.control.instead(|number| {
                let mut table = [0; 16];
                table[0] = 1;
                table[12..].copy_from_slice(&MOST);
                Craft::new(Kind::Abort.code(), number, &table).octets()
            });
        },
        "wire.malformed.count",
    ),
];

/// What a source says on a lane in round 0.
const IN_ROUNDS: [ToDestination; 4] = [
    (
        "a run of 2^32 pages",
        |s| {
            let pages = Pages {
                round: Round::new(0),
                runs: &[run(0, 0, 1)],
                checksums: &[U32::new(0)],
            };
            s.lanes[0]
                .peer
                .instead(|number| altered(encode(number, pages, Body::Pages), 20, &MOST));
        },
        "wire.malformed.count",
    ),
    (
        "2^32 runs",
        |s| {
            let pages = Pages {
                round: Round::new(0),
                runs: &[run(0, 0, 1)],
                checksums: &[U32::new(0)],
            };
            s.lanes[0]
                .peer
                .instead(|number| altered(encode(number, pages, Body::Pages), 4, &MOST));
        },
        "wire.malformed.",
    ),
    (
        "2^32 zero pages",
        |s| {
            let runs = [run(0, 0, u32::MAX)];
            s.lanes[0].peer.send(Zeros {
                round: Round::new(0),
                runs: &runs,
            });
        },
        "wire.misbehaved.amount",
    ),
    (
        "a body of 4 GiB",
        |s| {
            s.lanes[0].peer.instead(|number| {
                let plain = Craft::new(Kind::Pages.code(), number, &[0; 36]);
                Craft {
                    body_bytes: !4095,
                    ..plain
                }
                .octets()
            });
        },
        "wire.malformed.body-bytes",
    ),
];

fn destination_ends(name: &str, destination: Destination, code: &str) {
    let end = destination.end(GRACE);
    let error = end
        .finished
        .error
        .unwrap_or_else(|| panic!("{name}: it did not fail"));
    assert!(error.code().starts_with(code), "{name}: {error}");
    assert!(!end.running && end.discarded, "{name}");
}

fn to_destinations() {
    for (name, act, code) in IN_SET_UP {
        let destination = Destination::start();
        bounded(name, || {
            let connect = || destination.connect();
            let mut source = FakeSource::open(&connect);
            act(&mut source);
            source.control.hear_abort();
        });
        destination_ends(name, destination, code);
    }
    for (name, act, code) in IN_ROUNDS {
        let destination = Destination::start();
        bounded(name, || {
            let connect = || destination.connect();
            let mut source = FakeSource::in_rounds(&connect, 1);
            act(&mut source);
            source.control.hear_abort();
        });
        destination_ends(name, destination, code);
    }
}

/// A source that announces 16 MiB and sends little of it makes the destination hold little.
fn announced_and_not_sent() {
    let destination = Destination::start();
    bounded("a blob that was announced", || {
        let connect = || destination.connect();
        let mut source = FakeSource::open(&connect);
        let body = vec![1; 1 << 20];
        source
            .control
            .send_with(part(16 << 20), Body::Octets(&body), &body);
        source.control.hear_abort();
    });
    destination_ends("a blob that was announced", destination, "receiver.timeout");
}

/// A source that asks for answers and does not read them.
fn flooded() {
    let destination = Destination::with(destination_config(), DestinationMachine::default());
    bounded("a flood", || {
        let connect = || destination.connect();
        let mut source = FakeSource::open(&connect);
        source.control.fall_silent();
        let until = Instant::now() + Duration::from_millis(1500);
        while Instant::now() < until {
            for stamp_us in 1..200 {
                source.control.send(KeepAlive {
                    stamp_us,
                    echo_us: 0,
                    held_us: 0,
                    asks: Asks::Answer,
                });
            }
        }
        source.control.cut();
    });
    let end = destination.end(GRACE);
    assert!(end.finished.error.is_some() && !end.running);
}

/// What a destination says after set-up, and how the source ends.
type ToSource = (&'static str, fn(&mut Taking), &'static str);

const FROM_DESTINATION: [ToSource; 4] = [
    (
        "2^32 acknowledgements",
        |t| {
            t.control.instead(|number| {
                let mut table = [0; 24];
                table[..4].copy_from_slice(&MOST);
                Craft::new(Kind::Ack.code(), number, &table).octets()
            });
        },
        "wire.malformed.",
    ),
    (
        "2^32 runs that go back",
        |t| {
            t.control.instead(|number| {
                let mut table = [0; 40];
                table[16..20].copy_from_slice(&MOST);
                table[20] = 1;
                Craft::new(Kind::GiveBack.code(), number, &table).octets()
            });
        },
        "wire.malformed.",
    ),
    (
        "a table of 4 GiB",
        |t| {
            t.control.instead(|number| {
                let plain = Craft::new(Kind::Ack.code(), number, &[0; 8]);
                Craft {
                    table_bytes: Some(u32::MAX),
                    ..plain
                }
                .octets()
            });
        },
        "wire.malformed.table-bytes",
    ),
    (
        "a body where none belongs",
        |t| {
            t.control.instead(|number| {
                let plain = Craft::new(Kind::Ready.code(), number, &[1; 16]);
                Craft {
                    body_bytes: u32::MAX,
                    body_crc: 1,
                    ..plain
                }
                .octets()
            });
        },
        "wire.malformed.body-bytes",
    ),
];

fn to_sources() {
    for (name, act, code) in FROM_DESTINATION {
        let fake = FakeDestination::listen();
        let source = Source::to(&fake.address, tx_builder().build().unwrap());
        let mut taking = fake.set_up();
        bounded(name, || {
            act(&mut taking);
            taking.control.hear_abort();
        });
        let end = source.end(GRACE);
        let error = end.finished.error.as_ref().unwrap();
        assert!(error.code().starts_with(code), "{name}: {error}");
        end.runs_on(name);
    }
}

// SPEC: GEN-6, SEC-4
#[test]
fn no_number_of_the_peer_becomes_memory() {
    // Once by the rules, so that what is only made once is there already.
    let destination = Destination::start();
    let connect = || destination.connect();
    let mut source = FakeSource::in_rounds(&connect, 1);
    source.round_zero();
    source.complete(1);
    assert!(destination.end(GRACE).running);
    to_destinations();
    announced_and_not_sent();
    flooded();
    to_sources();
}
