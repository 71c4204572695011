//! Against the source: a destination that lies about what landed, or does not let it come back (SPEC: LANDED-1, RESUME-6).

use std::time::{Duration, Instant};

use multifd_sender as tx;
use multifd_tests::bounded::{GRACE, STALL, Source, SourceEnd};
use multifd_tests::fake_destination::{FakeDestination, Taking};
use multifd_tests::fake_source::run;
use multifd_tests::peer::{PATIENCE, Peer};
use multifd_wire::frame::{Landed, LaneMark, RawLaneMark};
use multifd_wire::{HelloReply, Incarnation, LaneId, Phase, Reason};

use super::pairs::comes_back;

/// A source in the middle of round 0, and the destination that it is about to resume at.
fn lost() -> (Source, Taking) {
    let fake = FakeDestination::listen();
    let config = comes_back().channels(1).bandwidth(Some(2 << 20));
    let source = Source::to(&fake.address, config.build().unwrap());
    let mut taking = fake.keeping_in_rounds();
    taking.control.cut();
    taking.cut_lanes();
    (source, taking)
}

fn landed(taking: &Taking, rounds_closed: u32, marks: &[(u32, u32, u64)]) {
    let lanes: Vec<RawLaneMark> = marks
        .iter()
        .map(|(lane, incarnation, frames)| {
            RawLaneMark::from(LaneMark {
                lane: LaneId::new(*lane),
                incarnation: Incarnation::new(*incarnation),
                frames: *frames,
            })
        })
        .collect();
    taking.control.send(Landed {
        rounds_closed,
        lanes: &lanes,
    });
}

/// Pages come after the resume; then it is cancelled, and the guest runs on.
fn goes_on(source: Source, mut taking: Taking) -> SourceEnd {
    taking.read_lanes();
    taking.hear_pages();
    source.handle().cancel();
    let end = source.end(GRACE);
    assert_eq!(end.finished.report.suspensions, 1);
    end.runs_on("cancelled");
    end
}

#[test]
fn what_landed_is_checked_against_what_was_sent() {
    const AMOUNT: &str = "wire.misbehaved.amount";
    const LANE: &str = "wire.misbehaved.lane";
    const ROUND: &str = "wire.misbehaved.round";
    const ORDER: &str = "wire.misbehaved.order";
    type Act = fn(&Taking);
    let cases: [(&str, Act, &str); 7] = [
        (
            "more frames than were sent",
            |t| {
                t.ready(1);
                landed(t, 0, &[(0, 0, 1 << 40)]);
            },
            AMOUNT,
        ),
        (
            "a lane that never was",
            |t| {
                t.ready(1);
                landed(t, 0, &[(3, 0, 0)]);
            },
            LANE,
        ),
        (
            "frames of an incarnation that carried none",
            |t| {
                t.ready(1);
                landed(t, 0, &[(0, 1, 1)]);
            },
            LANE,
        ),
        (
            "rounds that were not begun",
            |t| {
                t.ready(1);
                landed(t, 2, &[]);
            },
            ROUND,
        ),
        ("before READY", |t| landed(t, 0, &[]), ORDER),
        (
            "a page given back before READY",
            |t| t.give_back(0, run(0, 0, 1)),
            ORDER,
        ),
        (
            "twice",
            |t| {
                t.ready(1);
                landed(t, 0, &[]);
                landed(t, 0, &[]);
            },
            ORDER,
        ),
    ];
    for (case, act, code) in cases {
        let (source, mut taking) = lost();
        taking.resumed();
        act(&taking);
        let told = taking.control.hear_abort();
        assert_eq!(told.reason, Reason::Misbehaved, "{case}: {}", told.text);
        source.fails(GRACE, code, case);
    }
}

#[test]
fn landed_outside_a_resume_is_refused() {
    let fake = FakeDestination::listen();
    let config = comes_back().channels(1).bandwidth(Some(2 << 20));
    let source = Source::to(&fake.address, config.build().unwrap());
    let mut taking = fake.keeping_in_rounds();
    landed(&taking, 0, &[]);
    assert_eq!(taking.control.hear_abort().reason, Reason::Misbehaved);
    source.fails(GRACE, "wire.misbehaved.order", "LANDED in the rounds");
}

// SPEC: RESUME-10
#[test]
fn pages_are_given_back_before_landed() {
    let (source, mut taking) = lost();
    taking.resumed();
    taking.ready(1);
    let handle = source.handle();
    let (before, began) = (handle.progress().pages_given_back, Instant::now());
    taking.give_back(0, run(0, 0, 1));
    // Known before LANDED is there.
    while handle.progress().pages_given_back == before {
        assert!(began.elapsed() < GRACE, "nobody took it");
        std::thread::sleep(Duration::from_millis(1));
    }
    landed(&taking, 0, &[]);
    goes_on(source, taking);
}

#[test]
fn nothing_landed_means_that_everything_comes_again() {
    let (source, mut taking) = lost();
    taking.resumed();
    taking.ready(1);
    landed(&taking, 0, &[]);
    let end = goes_on(source, taking);
    assert!(end.finished.report.pages_given_back > 0);
}

#[test]
fn a_destination_that_refuses_the_resume_is_named_and_the_guest_runs_on() {
    for (reason, ends) in [
        (Reason::WrongSession, true),
        (Reason::BadTicket, true),
        (Reason::Busy, false),
    ] {
        let (source, taking) = lost();
        let began = Instant::now();
        let mut peer = Peer::new(taking.accept());
        let hello = peer.hear_hello();
        peer.raw(&HelloReply::refused(reason, "no", hello.session).encode());
        peer.finish();
        if ends {
            source.fails(GRACE, "sender.peer.session-lost", "refused");
            assert!(began.elapsed() < GRACE);
        } else {
            // It may have time later.
            let mut again = Peer::new(taking.accept());
            let _ = again.hear_hello();
            source.handle().cancel();
            again.cut();
            assert_eq!(
                source.end(GRACE + PATIENCE).finished.report.outcome,
                tx::OutcomeKind::Cancelled
            );
        }
    }
}

#[test]
fn a_destination_that_only_says_that_it_lives_is_given_up() {
    let fake = FakeDestination::listen();
    let config = comes_back().channels(1).progress_deadline(STALL);
    // Nothing is left to send soon, and the destination never says that it has it.
    let source = Source::to(&fake.address, config.build().unwrap());
    let mut taking = fake.in_rounds();
    let told = taking.control.hear_abort();
    assert_eq!(told.reason, Reason::Timeout, "{}", told.text);
    assert!(told.phase <= Phase::Switchover);
    source.fails(GRACE, "sender.timeout", "signs of life only");
}

#[test]
fn a_dead_link_with_the_guest_paused_is_found_within_a_second() {
    let fake = FakeDestination::listen();
    let config = comes_back().channels(1).stall(20 * STALL);
    let source = Source::to(&fake.address, config.keep_alive(STALL).build().unwrap());
    let mut taking = fake.keeping_in_rounds();
    let _ = taking.hear_final();
    assert!(!source.running.load(std::sync::atomic::Ordering::SeqCst));
    taking.control.fall_silent();
    let (began, host) = (Instant::now(), multifd_tests::host::Host::watch());
    while !source.running.load(std::sync::atomic::Ordering::SeqCst) {
        let still_max = STALL * 4 + host.delayed();
        assert!(began.elapsed() < still_max, "the guest stands still");
        std::thread::sleep(Duration::from_millis(1));
    }
    source.handle().cancel();
    let end = source.end(GRACE + PATIENCE);
    assert!(end.finished.report.broken_off_pause_ms > 0.0);
}
