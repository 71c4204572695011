//! After COMMIT: the source asks what came of it, and never runs the guest but by the destination's own word.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use multifd_sender as tx;
use multifd_tests::bounded::{COMMIT_DEADLINE, GRACE, Source, SourceEnd};
use multifd_tests::fake_destination::{FakeDestination, Taking, accepted};
use multifd_tests::peer::{PATIENCE, Peer, encode};
use multifd_wire::frame::{Outcome, OutcomeState};
use multifd_wire::{Body, HelloReply, Intent, Reason};

use super::pairs::{RECONNECT, comes_back};

/// A source that has sent COMMIT to a destination that then says nothing more.
fn committed() -> (Source, Taking) {
    let fake = FakeDestination::listen();
    let config = comes_back().channels(1).build().unwrap();
    let source = Source::to(&fake.address, config);
    let mut taking = fake.committed();
    taking.control.cut();
    (source, taking)
}

/// Takes the next question, and answers it.
fn answer(taking: &Taking, reply: &HelloReply, state: Option<OutcomeState>) {
    let mut peer = Peer::new(taking.accept());
    let hello = peer.hear_hello();
    assert_eq!((hello.intent, hello.session), (Intent::Ask, taking.session));
    peer.raw(&reply.encode());
    if let Some(state) = state {
        peer.raw(&encode(0, Outcome { state }, Body::None));
    }
    peer.finish();
    let _ = peer.hear(Duration::from_millis(200));
}

fn told(states: &[OutcomeState]) -> SourceEnd {
    let (source, taking) = committed();
    for state in states {
        answer(&taking, &accepted(taking.session), Some(*state));
    }
    source.end(RECONNECT + GRACE)
}

#[test]
fn the_answer_that_it_runs_there_ends_well() {
    let end = told(&[OutcomeState::CommittedNotRunning, OutcomeState::Running]);
    assert!(end.finished.error.is_none(), "{:?}", end.finished.error);
    assert_eq!(end.finished.report.outcome, tx::OutcomeKind::Migrated);
    assert_eq!(end.finished.report.asked, 2);
    end.stays_paused("it runs there");
}

#[test]
fn the_answer_that_it_was_not_committed_gives_the_guest_back() {
    let end = told(&[OutcomeState::NotCommitted]);
    end.failed("sender.not-committed", "not committed");
}

#[test]
fn the_answer_that_it_could_not_be_run_leaves_it_paused() {
    let end = told(&[OutcomeState::FailedAfterCommit]);
    assert_eq!(end.finished.report.outcome, tx::OutcomeKind::Stranded);
    end.stays_paused("it could not be run there");
}

#[test]
fn no_answer_leaves_it_unknown_at_the_deadline() {
    let began = Instant::now();
    let (source, taking) = committed();
    drop(taking);
    let end = source.end(RECONNECT + COMMIT_DEADLINE + GRACE);
    assert!(began.elapsed() >= RECONNECT);
    end.unknown("sender.outcome-unknown", "no answer");
}

#[test]
fn a_destination_that_knows_nothing_leaves_it_unknown_at_once() {
    let (source, taking) = committed();
    let no = HelloReply::refused(Reason::WrongSession, "who?", taking.session);
    let began = Instant::now();
    answer(&taking, &no, None);
    let end = source.end(GRACE);
    end.unknown("sender.peer.session-lost", "it knows nothing");
    assert!(began.elapsed() < RECONNECT);
}

#[test]
fn a_lie_in_the_place_of_an_answer_is_no_answer() {
    let (source, taking) = committed();
    // Another frame, random bytes, an answer cut off: it goes on asking.
    for octets in [
        encode(0, multifd_tests::fake_destination::running(), Body::None),
        vec![7; 48],
        encode(
            0,
            Outcome {
                state: OutcomeState::Running,
            },
            Body::None,
        )[..47]
            .to_vec(),
    ] {
        let mut peer = Peer::new(taking.accept());
        let hello = peer.hear_hello();
        peer.raw(&accepted(hello.session).encode());
        peer.raw(&octets);
        peer.finish();
        let _ = peer.hear(Duration::from_millis(50));
    }
    answer(
        &taking,
        &accepted(taking.session),
        Some(OutcomeState::Running),
    );
    let end = source.end(GRACE);
    assert_eq!(end.finished.report.outcome, tx::OutcomeKind::Migrated);
}

#[test]
fn a_cancel_while_it_asks_leaves_it_unknown() {
    let (source, taking) = committed();
    let mut peer = Peer::new(taking.accept());
    let _ = peer.hear_hello();
    source.handle().cancel();
    let end = source.end(PATIENCE + GRACE);
    end.unknown("sender.outcome-unknown", "cancelled");
}

#[test]
fn a_real_destination_answers_after_the_link_was_lost_around_the_commit() {
    for seed in 0..12u64 {
        let config = comes_back().channels(2);
        let pair = super::pairs::Pair::new(4 << 20, config);
        let handle = pair.source.handle();
        let since = Instant::now();
        while handle.progress().phase < multifd_wire::Phase::Switchover
            || handle.progress().phase == multifd_wire::Phase::Suspended
        {
            assert!(since.elapsed() < 5 * GRACE);
            std::hint::spin_loop();
        }
        std::thread::sleep(Duration::from_micros(seed * 150));
        pair.links.take_down();
        std::thread::sleep(Duration::from_millis(100));
        pair.links.set_down(false);
        let (running, there) = (
            Arc::clone(&pair.source.running),
            Arc::clone(&pair.destination.running),
        );
        let ends = pair.end();
        let report = &ends.source.finished.report;
        let (here, there) = (running.load(Ordering::SeqCst), there.load(Ordering::SeqCst));
        let fits = match report.outcome {
            tx::OutcomeKind::Migrated => there && !here,
            tx::OutcomeKind::Failed => here && !there,
            _ => false,
        };
        assert!(
            fits,
            "seed {seed}: {:?}, here {here}, there {there}: {:?} / {:?}",
            report.outcome, ends.source.finished.error, ends.destination.error
        );
    }
}
