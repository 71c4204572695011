//! All channels lost, the control channel among them: the guest runs on, and the migration goes on where it was.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use multifd_sender as tx;
use multifd_sender::config::WhenDestinationLost;
use multifd_tests::bounded::{Destination, GRACE, STALL, Source};
use multifd_tests::host::Host;
use multifd_tests::links::Links;
use multifd_tests::model::{DestinationMachine, Random};
use multifd_wire::{ChannelRef, Phase};

use super::pairs::{Pair, RECONNECT, comes_back, waits};

/// 24 MiB at 24 MiB/s: long enough to cut something.
fn slow(channels: u32) -> Pair {
    let config = comes_back().channels(channels).bandwidth(Some(24 << 20));
    Pair::new(24 << 20, config.body_bytes(64 << 10))
}

fn wait_for(what: &str, done: impl Fn() -> bool) {
    let since = Instant::now();
    while !done() {
        assert!(since.elapsed() < 2 * GRACE, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn everything_cut_for_a_while_costs_what_was_on_its_way() {
    let pair = slow(3);
    pair.sent(6 << 20);
    pair.links.take_down();
    let (ours, theirs) = (pair.source.handle(), pair.destination.handle());
    wait_for("suspended", || {
        ours.progress().phase == Phase::Suspended && theirs.progress().phase == Phase::Suspended
    });
    assert!(pair.source.running.load(Ordering::SeqCst));
    std::thread::sleep(2 * STALL);
    assert!(ours.progress().reconnect.is_some());
    pair.links.set_down(false);
    let (back, host) = (Instant::now(), Host::watch());
    wait_for("resumed", || ours.progress().phase == Phase::Rounds);
    assert!(
        back.elapsed() < Duration::from_secs(1) + host.delayed(),
        "{:?}",
        back.elapsed()
    );
    let ends = pair.arrives("cut for a while");
    ends.source.stays_paused("cut for a while");
    let report = &ends.source.finished.report;
    assert_eq!(
        (report.suspensions, ends.destination.report.suspensions),
        (1, 1)
    );
    assert!(report.suspended_ms >= 2.0 * STALL.as_secs_f64() * 1e3);
    assert!(
        report.sent_again_bytes < 3 << 20,
        "{}",
        report.sent_again_bytes
    );
    assert!(report.content_bytes < 34 << 20, "{}", report.content_bytes);
}

#[test]
fn with_one_way_closed_for_good_it_goes_on_over_the_others() {
    for closed in 0..3 {
        let pair = slow(3);
        pair.sent(6 << 20);
        pair.links.set_way_closed(closed, true);
        pair.links.cut_all();
        let case = format!("lane {closed}");
        let ends = pair.arrives(&case);
        let report = &ends.source.finished.report;
        let suspensions = (report.suspensions, ends.destination.report.suspensions);
        assert_eq!(suspensions, (1, 1), "{case}");
        // What is noticed before the control channel's loss counts; the way that stays closed is no loss again and again.
        let (lost, reopened) = (report.channels_lost, report.channels_reopened);
        assert!(reopened <= lost && lost <= 3, "{case}: {lost}, {reopened}");
        assert!(report.content_bytes < 34 << 20, "{}", report.content_bytes);
    }
}

#[test]
fn again_and_again_over_the_only_way_that_is_left() {
    let pair = slow(3);
    for octets in [3u64 << 20, 7 << 20, 11 << 20] {
        pair.sent(octets);
        pair.links.set_way_closed(0, true);
        pair.links.set_way_closed(2, true);
        pair.links.cut_all();
    }
    let ends = pair.arrives("the only way");
    assert_eq!(ends.source.finished.report.suspensions, 3);
}

// SPEC: JOIN-4
#[test]
fn a_way_that_opens_after_the_resume_is_used_again() {
    let config = comes_back().channels(3).bandwidth(Some(24 << 20));
    let pair = Pair::new(48 << 20, config.body_bytes(64 << 10));
    let (ours, theirs) = (pair.source.handle(), pair.destination.handle());
    pair.sent(4 << 20);
    pair.links.set_way_closed(1, true);
    pair.links.cut_all();
    let lanes = || (ours.progress().lanes, theirs.progress().lanes);
    wait_for("two lanes", || {
        ours.progress().phase == Phase::Rounds && lanes() == (2, 2)
    });
    pair.links.set_way_closed(1, false);
    wait_for("three lanes", || lanes() == (3, 3));
    pair.arrives("opened later");
}

#[test]
fn with_the_ways_of_all_lanes_closed_it_ends_at_the_deadline_and_names_one() {
    let pair = slow(2);
    pair.sent(4 << 20);
    let began = Instant::now();
    for lane in 0..2 {
        pair.links.set_way_closed(lane, true);
    }
    pair.links.cut_all();
    let ends = pair.end();
    let case = "no way for lanes";
    ends.source.failed("sender.channel.not-reconnected", case);
    assert!(began.elapsed() >= RECONNECT, "{:?}", began.elapsed());
    let error = ends.source.finished.error.as_ref().unwrap();
    assert!(matches!(error.channel(), ChannelRef::Lane(_)), "{error}");
    assert!(error.to_string().contains("this way is closed"), "{error}");
    assert!(ends.destination.error.is_some());
}

#[test]
fn the_control_channel_lost_alone_is_the_same() {
    let pair = slow(2);
    for octets in [2u64 << 20, 6 << 20] {
        pair.sent(octets);
        pair.links.cut(ChannelRef::Control);
        std::thread::sleep(Duration::from_millis(200));
    }
    let ends = pair.arrives("control alone");
    assert_eq!(ends.source.finished.report.suspensions, 2);
}

#[test]
fn everything_cut_at_any_moment_ends_well() {
    for seed in 0..16u64 {
        let pair = slow(1 + (seed % 3) as u32);
        let mut random = Random::new(seed + 100);
        let handle = pair.source.handle();
        // What is lost in set-up is lost: nothing was moved yet.
        pair.sent(1);
        for _ in 0..5 {
            std::thread::sleep(Duration::from_millis(random.below(250)));
            if handle.progress().phase == Phase::Commit || handle.progress().phase == Phase::Done {
                break;
            }
            match random.below(4) {
                0 => pair.links.cut(ChannelRef::Control),
                1 => pair.links.cut_lanes(),
                2 => {
                    pair.links.take_down();
                    std::thread::sleep(Duration::from_millis(random.below(100)));
                    pair.links.set_down(false);
                }
                _ => pair.links.cut_all(),
            }
        }
        let running = Arc::clone(&pair.source.running);
        let ends = pair.end();
        let (ours, theirs) = (&ends.source.finished, &ends.destination);
        match ours.report.outcome {
            tx::OutcomeKind::Migrated => {
                assert!(theirs.error.is_none(), "seed {seed}: {:?}", theirs.error);
                assert!(!running.load(Ordering::SeqCst), "seed {seed}");
            }
            // Cut between COMMIT and its arrival.
            tx::OutcomeKind::Failed => {
                let code = ours.error.as_ref().unwrap().code();
                assert_eq!(
                    code, "sender.not-committed",
                    "seed {seed}: {:?}",
                    ours.error
                );
                assert!(
                    theirs.error.is_some() && running.load(Ordering::SeqCst),
                    "seed {seed}"
                );
            }
            other => panic!("seed {seed}: {other:?}, {:?}", ours.error),
        }
    }
}

#[test]
fn a_link_that_stays_away_ends_it_at_the_deadline_and_frees_both_sides() {
    let pair = slow(2);
    pair.sent(2 << 20);
    let began = Instant::now();
    pair.links.take_down();
    let ends = pair.end();
    ends.source
        .failed("sender.channel.not-reconnected", "it stays away");
    assert_eq!(
        ends.source.finished.error.as_ref().unwrap().phase(),
        Phase::Suspended
    );
    assert!(began.elapsed() < RECONNECT + 2 * GRACE);
    let error = ends.destination.error.as_ref().unwrap();
    assert_eq!(error.code(), "receiver.timeout", "{error}");
    assert_eq!(error.phase(), Phase::Suspended);
}

#[test]
fn a_cancel_while_suspended_is_heeded_at_once() {
    let pair = slow(2);
    pair.sent(2 << 20);
    pair.links.take_down();
    let handle = pair.source.handle();
    wait_for("suspended", || handle.progress().phase == Phase::Suspended);
    let began = Instant::now();
    handle.cancel();
    let ends = pair.end();
    assert_eq!(
        ends.source.finished.report.outcome,
        tx::OutcomeKind::Cancelled
    );
    ends.source.runs_on("cancelled");
    assert!(began.elapsed() < RECONNECT + GRACE);
    assert!(ends.destination.error.is_some());
}

#[test]
fn a_cancel_while_suspended_does_not_wait_for_a_dial_that_hangs() {
    let pair = slow(2);
    pair.sent(2 << 20);
    pair.links.set_hanging(true);
    pair.links.cut_all();
    let (handle, links) = (pair.source.handle(), pair.links.clone());
    wait_for("suspended", || handle.progress().phase == Phase::Suspended);
    let (began, host) = (Instant::now(), Host::watch());
    handle.cancel();
    let source = pair.source.end(5 * GRACE);
    // A second for the last word, half a one for the thread that dials.
    assert!(
        began.elapsed() < Duration::from_millis(2500) + host.delayed(),
        "{:?}",
        began.elapsed()
    );
    source.runs_on("cancelled");
    // Nobody could tell the destination: it frees after its own deadline.
    links.set_hanging(false);
    let received = pair.destination.end(RECONNECT + GRACE).finished;
    assert_eq!(received.error.unwrap().code(), "receiver.timeout");
}

#[test]
fn a_cancel_while_suspended_reaches_the_destination_if_the_link_is_back_soon() {
    let pair = slow(2);
    pair.sent(2 << 20);
    pair.links.take_down();
    let (handle, links) = (pair.source.handle(), pair.links.clone());
    wait_for("suspended", || handle.progress().phase == Phase::Suspended);
    let began = Instant::now();
    handle.cancel();
    wait_for("over", || handle.progress().phase == Phase::Done);
    links.set_down(false);
    let ends = pair.end();
    ends.source.runs_on("cancelled");
    let error = ends.destination.error.unwrap();
    assert_eq!(error.code(), "receiver.peer.aborted", "{error}");
    assert!(began.elapsed() < RECONNECT, "{:?}", began.elapsed());
}

/// A destination that is replaced by a fresh one while the link is down.
fn replaced(choice: WhenDestinationLost) -> Pair {
    // Who begins again is only a source that starts: what it dials in vain ends it, as at the beginning.
    let config = comes_back()
        .channels(2)
        .bandwidth(Some(24 << 20))
        .hello_deadline(2 * GRACE)
        .when_destination_lost(choice);
    let first = Destination::with(waits().build().unwrap(), DestinationMachine::default());
    let links = Links::to(first.handle());
    let source = Source::sized(16 << 20, links.dial(), config.build().unwrap());
    let pair = Pair::of(links, source, first);
    pair.sent(4 << 20);
    pair.links.take_down();
    let second = Destination::with(waits().build().unwrap(), DestinationMachine::default());
    pair.links.lead_to(second.handle());
    pair.links.set_down(false);
    let (links, source) = (pair.links.clone(), pair.source);
    pair.destination.handle().cancel();
    assert!(pair.destination.end(GRACE).finished.error.is_some());
    Pair::of(links, source, second)
}

#[test]
fn a_destination_that_was_restarted_is_named_and_the_guest_runs_on() {
    let pair = replaced(WhenDestinationLost::Fail);
    pair.destination.handle().cancel();
    let ends = pair.end();
    // The cancelled one may be gone before the source has asked it; then the link is what does not come back.
    let code = ends.source.finished.error.as_ref().unwrap().code();
    assert!(
        ["sender.peer.session-lost", "sender.channel.not-reconnected"].contains(&code),
        "{code}"
    );
    ends.source.runs_on("restarted");
}

#[test]
fn a_destination_that_was_restarted_gets_everything_if_told_to() {
    let host = Host::watch();
    let pair = replaced(WhenDestinationLost::StartAfresh);
    let ends = pair.arrives("begun again");
    ends.source.stays_paused("begun again");
    // Of its own, and not of the one before; a host that stood still for so long is a loss like any other.
    assert!(ends.destination.report.suspensions == 0 || host.delayed() >= STALL);
}
