//! Against the destination, on data channels: what must not land does not land.

use std::time::{Duration, Instant};

use multifd_tests::bounded::{Destination, GRACE};
use multifd_tests::fake_source::{FakeSource, REGION_PAGES, run};
use multifd_tests::peer::{Craft, altered, encode};
use multifd_wire::frame::{Commit, DeviceChunk, Pages, RoundEnd, Section, Zeros};
use multifd_wire::{Body, ChannelRef, DeviceId, Digest, Frame, Kind, LaneId, Reason, Round};
use zerocopy::byteorder::little_endian::U32;

/// What lane 0 does, how the destination ends, what it says.
type Case = (&'static str, fn(&mut FakeSource<'_>), &'static str, Reason);

fn check(cases: &[Case]) {
    for (name, act, code, reason) in cases {
        let destination = Destination::start();
        let connect = || destination.connect();
        let mut source = FakeSource::in_rounds(&connect, 2);
        let began = Instant::now();
        act(&mut source);
        let told = source.control.hear_abort();
        assert_eq!(told.reason, *reason, "{name}: {}", told.text);
        assert_eq!(
            told.channel,
            ChannelRef::Lane(LaneId::new(0)),
            "{name}: {}",
            told.text
        );
        destination.fails(GRACE, code, name);
        assert!(began.elapsed() < GRACE, "{name}: {:?}", began.elapsed());
    }
}

fn crcs(pages: usize) -> Vec<U32> {
    vec![U32::new(1); pages]
}

/// A PAGES frame of one run, with a body as long as it should be.
fn send_run(source: &FakeSource<'_>, round: u32, region: u32, first: u64, count: u32) {
    let pages = Pages {
        round: Round::new(round),
        runs: &[run(region, first, count)],
        checksums: &crcs(count as usize),
    };
    let body = vec![5; count as usize * 4096];
    source.lanes[0].peer.send_with(pages, Body::Pages, &body);
}

fn send_zeros(source: &FakeSource<'_>, round: u32, region: u32, first: u64, count: u32) {
    let runs = [run(region, first, count)];
    let round = Round::new(round);
    source.lanes[0].peer.send(Zeros { round, runs: &runs });
}

fn mark(round: u32, pages: u64, zero_pages: u64) -> RoundEnd {
    RoundEnd {
        round: Round::new(round),
        final_round: false,
        pages,
        zero_pages,
    }
}

const MISBEHAVED: Reason = Reason::Misbehaved;
const MALFORMED: Reason = Reason::Malformed;

// SPEC: SEC-5, RUN-1, RUN-3
#[test]
fn runs_outside_guest_memory_are_refused() {
    const PAST: &str = "wire.misbehaved.run-past-region";
    const UNKNOWN: &str = "wire.misbehaved.unknown-region";
    check(&[
        (
            "one page past the end",
            |s| send_run(s, 0, 0, REGION_PAGES, 1),
            PAST,
            MISBEHAVED,
        ),
        (
            "a run over the end",
            |s| send_run(s, 0, 1, REGION_PAGES - 1, 2),
            PAST,
            MISBEHAVED,
        ),
        (
            "a run as far as the format goes",
            |s| send_run(s, 0, 0, (1 << 40) - 1, 1),
            PAST,
            MISBEHAVED,
        ),
        (
            "a region that is not there",
            |s| send_run(s, 0, 2, 0, 1),
            UNKNOWN,
            MISBEHAVED,
        ),
        (
            "zeros past the end",
            |s| send_zeros(s, 0, 0, 1, REGION_PAGES as u32),
            PAST,
            MISBEHAVED,
        ),
        (
            "zeros in a region that is not there",
            |s| send_zeros(s, 0, 1023, 0, 1),
            UNKNOWN,
            MISBEHAVED,
        ),
        (
            "more zeros than the guest has pages",
            |s| {
                let runs = [run(0, 0, 64), run(1, 0, 64), run(0, 0, 1)];
                s.lanes[0].peer.send(Zeros {
                    round: Round::new(0),
                    runs: &runs,
                });
            },
            "wire.misbehaved.amount",
            MISBEHAVED,
        ),
        (
            "a run without pages",
            |s| {
                s.lanes[0].peer.instead(|number| {
                    let zeros = Zeros {
                        round: Round::new(0),
                        runs: &[run(0, 0, 1)],
                    };
                    altered(encode(number, zeros, Body::None), 20, &[0])
                });
            },
            "wire.malformed.value",
            MALFORMED,
        ),
    ]);
}

#[test]
fn frames_of_another_round_and_wrong_counts_are_refused() {
    const ROUND: &str = "wire.misbehaved.round";
    const AMOUNT: &str = "wire.misbehaved.amount";
    check(&[
        (
            "pages of the next round",
            |s| send_run(s, 1, 0, 0, 1),
            ROUND,
            MISBEHAVED,
        ),
        (
            "zeros of the next round",
            |s| send_zeros(s, 1, 0, 0, 1),
            ROUND,
            MISBEHAVED,
        ),
        (
            "the end of the next round",
            |s| s.lanes[0].peer.send(mark(1, 0, 0)),
            ROUND,
            MISBEHAVED,
        ),
        (
            "an end mark that counts one page too many",
            |s| {
                s.page(0, 0, 3, 3);
                s.lanes[0].peer.send(mark(0, 2, 0));
            },
            AMOUNT,
            MISBEHAVED,
        ),
        (
            "an end mark that counts one page too few",
            |s| {
                s.page(0, 0, 3, 3);
                s.lanes[0].peer.send(mark(0, 0, 0));
            },
            AMOUNT,
            MISBEHAVED,
        ),
        (
            "an end mark that counts other zero pages",
            |s| {
                s.zeros(0, 0, 0, 7);
                s.lanes[0].peer.send(mark(0, 0, 8));
            },
            AMOUNT,
            MISBEHAVED,
        ),
        (
            "the last round that there is",
            |s| {
                s.lanes[0]
                    .peer
                    .send(mark(multifd_wire::limits::ROUND_MAX, 0, 0))
            },
            ROUND,
            MISBEHAVED,
        ),
    ]);
}

#[test]
fn frames_that_do_not_belong_on_a_data_channel_are_refused() {
    const DIRECTION: &str = "wire.misbehaved.direction";
    check(&[
        (
            "COMMIT",
            |s| {
                s.lanes[0].peer.send(Commit {
                    digest: Digest::EMPTY,
                })
            },
            DIRECTION,
            MISBEHAVED,
        ),
        (
            "SETUP_END",
            |s| {
                let end = s.setup_end(1);
                s.lanes[0].peer.send(end);
            },
            DIRECTION,
            MISBEHAVED,
        ),
        (
            "device state that was not agreed on",
            |s| {
                let chunk = DeviceChunk {
                    device: DeviceId::new(0),
                    section: Section::Data,
                    index: 0,
                    offset: 0,
                };
                s.lanes[0].peer.send_with(chunk, Body::Octets(&[1]), &[1]);
            },
            "wire.misbehaved.feature",
            MISBEHAVED,
        ),
        (
            "a frame that was left out",
            |s| {
                s.lanes[0].peer.skip(1);
                s.page(0, 0, 0, 1);
            },
            "wire.misbehaved.sequence",
            MISBEHAVED,
        ),
        (
            "a frame that comes twice",
            |s| {
                s.lanes[0]
                    .peer
                    .instead(|number| encode(number, mark(0, 0, 0), Body::None));
                s.lanes[0].peer.raw(&encode(0, mark(1, 0, 0), Body::None));
                s.end_round(1, 0, false);
            },
            "wire.misbehaved.sequence",
            MISBEHAVED,
        ),
    ]);
}

// SPEC: ERR-2, ERR-5
#[test]
fn octets_that_are_no_frame_are_refused() {
    check(&[
        (
            "random bytes",
            |s| s.lanes[0].peer.raw(&[0x3C; 200]),
            "wire.malformed.header-crc",
            Reason::Corruption,
        ),
        (
            "a flipped bit in a header",
            |s| {
                s.lanes[0].peer.instead(|number| {
                    let mut head = encode(number, mark(0, 0, 0), Body::None);
                    head[8] ^= 0x10;
                    head
                });
            },
            "wire.malformed.header-crc",
            Reason::Corruption,
        ),
        (
            "a flipped bit in a table",
            |s| {
                s.lanes[0].peer.instead(|number| {
                    let mut head = encode(number, mark(0, 0, 0), Body::None);
                    head[33] ^= 0x10;
                    head
                });
            },
            "wire.malformed.table-crc",
            Reason::Corruption,
        ),
        (
            "a body that is shorter than its pages",
            |s| {
                s.lanes[0].peer.instead(|number| {
                    let pages = Pages {
                        round: Round::new(0),
                        runs: &[run(0, 0, 2)],
                        checksums: &crcs(2),
                    };
                    let head = encode(number, pages, Body::Pages);
                    Craft {
                        body_bytes: 4096,
                        ..Craft::new(Kind::Pages.code(), number, &head[32..])
                    }
                    .octets()
                });
            },
            "wire.malformed.body-bytes",
            MALFORMED,
        ),
        (
            "fewer checksums than pages",
            |s| {
                s.lanes[0].peer.instead(|number| {
                    let pages = Pages {
                        round: Round::new(0),
                        runs: &[run(0, 0, 2)],
                        checksums: &crcs(2),
                    };
                    let head = encode(number, pages, Body::Pages);
                    Craft {
                        body_bytes: 8192,
                        ..Craft::new(Kind::Pages.code(), number, &head[32..head.len() - 4])
                    }
                    .octets()
                });
            },
            "wire.malformed.count",
            MALFORMED,
        ),
        (
            "an unknown kind",
            |s| {
                s.lanes[0]
                    .peer
                    .instead(|number| Craft::new(0x0015, number, &[]).octets())
            },
            "wire.malformed.unknown-kind",
            Reason::Incompatible,
        ),
    ]);
}

#[test]
fn a_frame_cut_off_at_any_place_loses_its_lane_and_not_the_migration() {
    let body = FakeSource::content(0x42);
    for bytes in [1, 31, 32, 33, 60, 67, 68, 69, 2000, 68 + 4095] {
        let destination = Destination::start();
        let connect = || destination.connect();
        let mut source = FakeSource::in_rounds(&connect, 2);
        source.page(1, 0, 30, 0x33);
        source.lanes[1].peer.instead(|number| {
            let pages = Pages {
                round: Round::new(0),
                runs: &[run(0, 31, 1)],
                checksums: &[U32::new(crc32fast::hash(&body))],
            };
            let whole = [encode(number, pages, Body::Pages), body.clone()].concat();
            assert_eq!(whole.len(), 68 + 4096);
            whole[..bytes].to_vec()
        });
        source.lanes[1].peer.finish();
        let heard = source.control.hear_kind(Kind::LaneDown);
        let Frame::LaneDown(down) = heard.frame() else {
            unreachable!()
        };
        assert_eq!(
            (down.lane, down.reason),
            (LaneId::new(1), Reason::ChannelsLost),
            "{bytes} bytes"
        );
        source.lanes.pop();
        // Some of the page may have landed, and none of it counts: it is sent again.
        source.page(0, 0, 31, 0x42);
        source.round_zero();
        source.complete(1);
        let end = destination.end(GRACE);
        assert!(end.finished.error.is_none() && end.running, "{bytes} bytes");
    }
}

// SPEC: LANE-6
#[test]
fn the_loss_of_every_lane_ends_it_with_the_reason() {
    let destination = Destination::start();
    let connect = || destination.connect();
    let mut source = FakeSource::in_rounds(&connect, 2);
    for lane in &mut source.lanes {
        lane.peer.finish();
    }
    assert_eq!(source.control.hear_abort().reason, Reason::ChannelsLost);
    destination.fails(GRACE, "receiver.channel.all-lanes-lost", "no lane is left");
}

// SPEC: LANE-8
#[test]
fn a_lane_that_stops_inside_a_page_is_given_up_and_the_others_go_on() {
    let destination = Destination::start();
    let connect = || destination.connect();
    let mut source = FakeSource::in_rounds(&connect, 2);
    let body = FakeSource::content(0x42);
    let pages = Pages {
        round: Round::new(0),
        runs: &[run(0, 31, 1)],
        checksums: &[U32::new(crc32fast::hash(&body))],
    };
    source.lanes[1]
        .peer
        .send_with(pages, Body::Pages, &body[..100]);
    source.control.hear_kind(Kind::LaneDown);
    let stalled = source.lanes.pop();
    // What the page holds now is not what was said of it: it is sent again.
    source.page(0, 0, 31, 0x42);
    source.round_zero();
    source.complete(1);
    drop(stalled);
    let end = destination.end(GRACE);
    assert!(end.finished.error.is_none() && end.running);
}

/// The first byte of a page of region 0 at the destination.
fn landed(destination: &Destination, page: u64) -> u8 {
    let memory = destination.memory.lock().unwrap();
    let span = memory.as_ref().unwrap().span(0, page * 4096, 1).unwrap();
    let mut octet = [0];
    span.copy_to(&mut octet);
    octet[0]
}

/// Waits until a page holds this byte.
fn lands(destination: &Destination, page: u64, octet: u8) {
    let since = Instant::now();
    while landed(destination, page) != octet {
        assert!(since.elapsed() < GRACE, "page {page} never held {octet:#x}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn nothing_behind_an_end_mark_lands_before_every_lane_has_reached_its_own() {
    let destination = Destination::start();
    let connect = || destination.connect();
    let mut source = FakeSource::in_rounds(&connect, 2);
    // Lane 0 is a round ahead, with a newer version of the page that lane 1 still owes in the round before.
    source.end_round(0, 0, false);
    source.page(0, 1, 5, 0x51);
    source.page(0, 1, 6, 0x61);
    source.page(1, 0, 6, 0x60);
    lands(&destination, 6, 0x60);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(landed(&destination, 5), 0, "the gate is closed");
    assert_eq!(landed(&destination, 6), 0x60);
    // The digest knows the newest version last, so it is said again in its order.
    source.end_round(1, 0, false);
    source.control.hear_kind(Kind::RoundClosed);
    lands(&destination, 5, 0x51);
    lands(&destination, 6, 0x61);
    source.end_round(0, 1, false);
    source.end_round(1, 1, false);
    source.page(0, 2, 6, 0x62);
    source.switchover(2);
    source.last_round(2);
    source.control.hear_kind(Kind::Prepared);
    source.commit();
    source.control.hear_kind(Kind::Running);
    source.control.finish();
    assert_eq!(landed(&destination, 6), 0x62);
    let end = destination.end(GRACE);
    assert!(end.finished.error.is_none() && end.running);
}

#[test]
fn damaged_pages_go_back_before_they_are_acknowledged_and_can_be_sent_again() {
    let destination = Destination::start();
    let connect = || destination.connect();
    let mut source = FakeSource::in_rounds(&connect, 1);
    let mut flipped = FakeSource::content(0x77);
    flipped[4000] ^= 0x08;
    source.page(0, 0, 10, 0x70);
    source.page_as(0, 0, 11, 0x77, &flipped);
    source.page(0, 0, 12, 0x72);
    source.end_round(0, 0, false);
    // GIVE_BACK names frame 1, and no ACK before it covers that frame.
    let mut given_back = false;
    loop {
        let heard = source
            .control
            .hear_until(&[Kind::Ack, Kind::GiveBack, Kind::RoundClosed]);
        match heard.frame() {
            Frame::GiveBack(back) => {
                assert_eq!((back.lane, back.sequence.value()), (LaneId::new(0), 1));
                let runs: Vec<_> = back
                    .runs
                    .iter()
                    .map(|r| (r.region.get(), r.first.get(), r.count.get()))
                    .collect();
                assert_eq!(runs, [(0, 11, 1)]);
                given_back = true;
            }
            Frame::Ack(acks) => {
                let frames = acks.iter().map(|mark| mark.frames).max().unwrap();
                assert!(
                    given_back || frames <= 1,
                    "frame 1 was acknowledged before it was given back"
                );
            }
            Frame::RoundClosed(closed) => {
                assert!(given_back);
                assert_eq!(closed.damaged_pages, 1);
                break;
            }
            _ => unreachable!("those kinds were waited for"),
        }
    }
    // Sent again, in the version that it has then.
    source.page(0, 1, 11, 0x78);
    source.end_round(0, 1, false);
    let heard = source.control.hear_kind(Kind::RoundClosed);
    assert!(matches!(heard.frame(), Frame::RoundClosed(closed) if closed.damaged_pages == 0));
    source.complete(2);
    let end = destination.end(GRACE);
    assert!(end.finished.error.is_none() && end.running);
    assert_eq!(end.finished.report.pages_mismatched, 1);
}

#[test]
fn a_page_damaged_with_the_guest_paused_is_repaired_in_a_further_round() {
    let destination = Destination::start();
    let connect = || destination.connect();
    let mut source = FakeSource::in_switchover(&connect);
    source.page_as(0, 1, 11, 0x77, &FakeSource::content(0x76));
    source.end_round(0, 1, true);
    source.send_state();
    source.control.send(source.final_of(1));
    source.control.hear_kind(Kind::RoundClosed);
    source.switchover(2);
    source.page(0, 2, 11, 0x77);
    source.end_round(0, 2, true);
    source.control.send(source.final_of(2));
    source.control.hear_kind(Kind::Prepared);
    source.commit();
    source.control.hear_kind(Kind::Running);
    source.control.finish();
    assert_eq!(landed(&destination, 11), 0x77);
    let end = destination.end(GRACE);
    assert!(end.finished.error.is_none() && end.running);
}
