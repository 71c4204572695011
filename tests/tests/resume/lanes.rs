//! Lanes that die and come back while the control channel lives (SPEC: section 14).

use std::time::{Duration, Instant};

use multifd_tests::bounded::{GRACE, STALL};

use super::pairs::{Pair, RECONNECT, comes_back, waits};

/// 24 MiB at 24 MiB/s: long enough to cut something.
fn slow(channels: u32) -> Pair {
    let config = comes_back().channels(channels).bandwidth(Some(24 << 20));
    Pair::new(24 << 20, config.body_bytes(64 << 10))
}

#[test]
fn a_lane_that_is_cut_is_opened_again_and_takes_part() {
    let pair = slow(4);
    for octets in [2 << 20, 5 << 20, 8 << 20] {
        pair.sent(octets);
        pair.links.cut_lane(1);
        std::thread::sleep(Duration::from_millis(100));
    }
    let ends = pair.arrives("one of four");
    ends.source.stays_paused("one of four");
    let report = &ends.source.finished.report;
    assert_eq!((report.channels_lost, report.channels_reopened), (3, 3));
    assert_eq!(ends.destination.report.channels_reopened, 3);
}

#[test]
fn the_only_lane_may_die_again_and_again() {
    let pair = slow(1);
    for octets in [1u64 << 20, 3 << 20, 7 << 20, 12 << 20] {
        pair.sent(octets);
        pair.links.cut_lanes();
        std::thread::sleep(Duration::from_millis(50));
    }
    let ends = pair.arrives("the only lane");
    let report = &ends.source.finished.report;
    assert_eq!((report.channels_lost, report.channels_reopened), (4, 4));
    // Nothing was sent twice but what was on its way.
    assert!(
        report.sent_again_bytes < 4 * (2 << 20),
        "{}",
        report.sent_again_bytes
    );
}

#[test]
fn all_lanes_may_die_at_once_and_stay_away_for_a_while() {
    let pair = slow(3);
    pair.sent(4 << 20);
    pair.links.set_down(true);
    pair.links.cut_lanes();
    std::thread::sleep(3 * STALL);
    pair.links.set_down(false);
    let back = Instant::now();
    let handle = pair.source.handle();
    while handle.progress().lanes < 3 {
        assert!(
            back.elapsed() < Duration::from_secs(1) + GRACE,
            "{:?}",
            handle.progress()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    let ends = pair.arrives("all lanes");
    assert_eq!(ends.source.finished.report.channels_reopened, 3);
}

#[test]
fn lanes_that_never_come_back_end_it_at_the_deadline_and_the_guest_runs_on() {
    let config = comes_back().channels(2).bandwidth(Some(8 << 20));
    let pair = Pair::with(16 << 20, config, waits().suspend(2 * RECONNECT));
    pair.sent(2 << 20);
    let began = Instant::now();
    pair.links.set_down(true);
    pair.links.cut_lanes();
    let ends = pair.end();
    ends.source
        .failed("sender.channel.all-lanes-lost", "never again");
    assert!(began.elapsed() >= RECONNECT && began.elapsed() < RECONNECT + GRACE);
    assert!(ends.destination.error.is_some());
}

#[test]
fn a_destination_gives_up_waiting_for_lanes_by_itself() {
    let config = comes_back().channels(2).bandwidth(Some(8 << 20));
    let pair = Pair::with(16 << 20, config, waits().suspend(2 * STALL));
    pair.sent(2 << 20);
    pair.links.set_down(true);
    pair.links.cut_lanes();
    let ends = pair.end();
    let error = ends.destination.error.as_ref().unwrap();
    assert_eq!(error.code(), "receiver.channel.all-lanes-lost", "{error}");
    ends.source.failed("sender.peer.aborted", "given up there");
}

#[test]
fn every_lane_cut_at_any_moment_costs_nothing_but_what_was_on_its_way() {
    for seed in 0..12u64 {
        let pair = slow(1 + (seed % 4) as u32);
        let mut random = multifd_tests::model::Random::new(seed + 1);
        let handle = pair.source.handle();
        for _ in 0..6 {
            std::thread::sleep(Duration::from_millis(random.below(120)));
            if handle.progress().phase >= multifd_wire::Phase::Commit {
                break;
            }
            match random.below(5) {
                0 => pair.links.cut_lanes(),
                lane => pair.links.cut_lane(lane as u32 - 1),
            }
        }
        pair.arrives(&format!("seed {seed}"));
    }
}
