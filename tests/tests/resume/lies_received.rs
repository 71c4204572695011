//! Against the destination: resumes and questions that are not what they should be (SPEC: sections 16.1, 16.2).

use std::time::{Duration, Instant};

use multifd_tests::bounded::{Destination, DestinationEnd, GRACE, STALL};
use multifd_tests::fake_source::{FakeSource, run};
use multifd_tests::model::DestinationMachine;
use multifd_tests::peer::Peer;
use multifd_wire::frame::{Devices, OutcomeState, RawRegion, RawRun, Regions};
use multifd_wire::{
    Features, Frame, Hello, HelloReply, Incarnation, Kind, LaneId, Phase, Reason, Region, RegionId,
    SessionId, Token,
};

use super::pairs::waits;

fn kept() -> Destination {
    Destination::with(waits().build().unwrap(), DestinationMachine::default())
}

fn refused(reply: &HelloReply, case: &str) -> Reason {
    match reply {
        HelloReply::Refused { reason, .. } => *reason,
        HelloReply::Accepted { .. } => panic!("{case}: it was accepted"),
    }
}

fn other(token: Token) -> Token {
    let mut octets = token.value();
    octets[15] ^= 1;
    Token::new(octets)
}

#[test]
fn who_does_not_know_session_and_secret_disturbs_nothing() {
    let destination = kept();
    let connect = || destination.connect();
    let mut source = FakeSource::in_rounds_with(&connect, 1, Features::RESUME);
    source.round_zero();
    let (session, secret) = (source.session, source.grant.resume_secret);
    let stranger = SessionId::new([0x99; 16]);
    let resume = |session, secret| Hello::resume(session, secret, Features::RESUME);
    let cases = [
        (
            "another session",
            resume(stranger, secret),
            Reason::WrongSession,
        ),
        (
            "another secret",
            resume(session, other(secret)),
            Reason::BadTicket,
        ),
        (
            "the ticket",
            resume(session, source.grant.ticket),
            Reason::BadTicket,
        ),
        (
            "without the feature",
            Hello::resume(session, secret, Features::NONE),
            Reason::Feature,
        ),
        (
            "a question about another",
            Hello::ask(stranger, secret),
            Reason::WrongSession,
        ),
        (
            "a question with another secret",
            Hello::ask(session, other(secret)),
            Reason::BadTicket,
        ),
    ];
    for (case, hello, reason) in cases {
        let (_peer, reply) = source.try_join(&hello);
        assert_eq!(refused(&reply, case), reason, "{case}");
    }
    source.complete(1);
    let end = destination.end(GRACE);
    assert!(end.finished.error.is_none() && end.running);
    assert_eq!(end.finished.report.suspensions, 0);
}

// SPEC: FEAT-5
#[test]
fn a_session_that_is_not_kept_is_not_resumed() {
    let destination = Destination::start();
    let connect = || destination.connect();
    let mut source = FakeSource::in_rounds(&connect, 1);
    let (_peer, reply) = source.try_join(&source.resume_hello());
    assert_eq!(refused(&reply, "not kept"), Reason::Feature);
    source.round_zero();
    source.complete(1);
    assert!(destination.end(GRACE).running);
}

/// What LANDED says: rounds, and frames of lane 0.
fn hear_landed(source: &mut FakeSource<'_>) -> (u32, Vec<(u32, u32, u64)>) {
    let heard = source.control.hear_kind(Kind::Landed);
    let Frame::Landed(landed) = heard.frame() else {
        unreachable!("that kind was waited for")
    };
    let marks = landed
        .iter()
        .map(|mark| (mark.lane.value(), mark.incarnation.value(), mark.frames))
        .collect();
    (landed.rounds_closed, marks)
}

#[test]
fn a_resume_of_a_live_session_ends_its_old_channels_and_goes_on() {
    let destination = kept();
    let connect = || destination.connect();
    let mut source = FakeSource::in_rounds_with(&connect, 1, Features::RESUME);
    source.round_zero();
    let (old_grant, old_hello) = (source.grant, source.join_hello(0));
    let mut old = std::mem::replace(&mut source.control, Peer::new(destination.connect()));
    source.resume();
    assert!(matches!(old.hear_the_end(), (kinds, _) if !kinds.contains(&Kind::Abort)));
    // SPEC: GRANT-1
    assert_eq!(source.grant.resume_secret, old_grant.resume_secret);
    assert_ne!(source.grant.ticket, old_grant.ticket);
    source.send_tables(1);
    let (_peer, reply) = source.try_join(&old_hello);
    assert_eq!(refused(&reply, "the old ticket"), Reason::BadTicket);
    let (_peer, reply) = source.try_join(&source.join_hello(0));
    assert_eq!(refused(&reply, "the old incarnation"), Reason::Misbehaved);
    source.rejoin(0, 1);
    source.control.hear_kind(Kind::Ready);
    // Eight pages, the zeros and the mark.
    assert_eq!(hear_landed(&mut source), (1, vec![(0, 0, 10)]));
    source.complete(1);
    let end = destination.end(GRACE);
    assert!(
        end.finished.error.is_none() && end.running,
        "{:?}",
        end.finished.error
    );
    assert_eq!(end.finished.report.suspensions, 1);
}

// SPEC: RESUME-11
#[test]
fn resumes_that_come_to_nothing_lose_nothing() {
    let destination = kept();
    let connect = || destination.connect();
    let mut source = FakeSource::in_rounds_with(&connect, 1, Features::RESUME);
    source.round_zero();
    source.resume(); // left after the grant
    source.resume(); // left after the tables
    source.send_tables(1);
    source.resume(); // left after LANDED, as if that had been lost
    source.send_tables(1);
    source.rejoin(0, 1);
    assert_eq!(hear_landed(&mut source), (1, vec![(0, 0, 10)]));
    source.resume();
    source.send_tables(1);
    source.rejoin(0, 2);
    // SPEC: LANDED-1
    assert_eq!(hear_landed(&mut source), (1, vec![(0, 0, 10)]));
    source.complete(1);
    let end = destination.end(GRACE);
    assert!(
        end.finished.error.is_none() && end.running,
        "{:?}",
        end.finished.error
    );
}

#[test]
fn a_page_that_was_damaged_before_is_given_back_before_landed() {
    let destination = kept();
    let connect = || destination.connect();
    let mut source = FakeSource::in_rounds_with(&connect, 1, Features::RESUME);
    source.page(0, 0, 3, 0x33);
    source.page_as(0, 0, 7, 0x77, &FakeSource::content(0x78));
    source.control.hear_kind(Kind::GiveBack);
    source.resume();
    source.send_tables(1);
    source.rejoin(0, 1);
    let heard = source.control.hear_until(&[Kind::GiveBack, Kind::Landed]);
    let Frame::GiveBack(back) = heard.frame() else {
        panic!("the source may act on LANDED before it knows of the page")
    };
    assert_eq!(
        (back.lane, back.incarnation),
        (LaneId::new(0), Incarnation::new(0))
    );
    assert_eq!(back.runs, [run(0, 7, 1)] as [RawRun; 1]);
    assert_eq!(hear_landed(&mut source), (0, vec![(0, 0, 2)]));
    source.page(0, 0, 7, 0x77);
    source.end_round(0, 0, false);
    source.control.hear_kind(Kind::RoundClosed);
    source.complete(1);
    let end = destination.end(GRACE);
    assert!(
        end.finished.error.is_none() && end.running,
        "{:?}",
        end.finished.error
    );
}

fn comes_back_otherwise(case: &str, act: impl FnOnce(&mut FakeSource<'_>)) {
    let destination = kept();
    let connect = || destination.connect();
    let mut source = FakeSource::in_rounds_with(&connect, 1, Features::RESUME);
    source.round_zero();
    source.resume();
    act(&mut source);
    let told = source.control.hear_abort();
    assert_eq!(
        (told.reason, told.phase),
        (Reason::Misbehaved, Phase::Setup),
        "{case}"
    );
    destination.fails(GRACE, "receiver.misbehaved.setup-changed", case);
}

#[test]
fn a_source_that_comes_back_with_another_machine_is_refused() {
    comes_back_otherwise("other memory", |source| {
        source.send_config();
        let region = Region {
            id: RegionId::new(0),
            guest_address: 0,
            bytes: 4096,
        };
        let regions = [RawRegion::from(region)];
        source.control.send(Regions { regions: &regions });
    });
    comes_back_otherwise("no configuration", |source| {
        source.send_regions();
        source.control.send(Devices { devices: &[] });
        let mut end = source.setup_end(1);
        end.configs = 0;
        source.control.send(end);
    });
}

fn ask(source: &FakeSource<'_>) -> OutcomeState {
    let hello = Hello::ask(source.session, source.grant.resume_secret);
    let (mut peer, reply) = source.try_join(&hello);
    assert!(matches!(reply, HelloReply::Accepted { .. }), "{reply:?}");
    let heard = peer.hear_kind(Kind::Outcome);
    let Frame::Outcome(outcome) = heard.frame() else {
        unreachable!("that kind was waited for")
    };
    outcome.state
}

fn refused_for_good(end: &DestinationEnd) {
    let error = end.finished.error.as_ref().unwrap();
    assert_eq!(error.code(), "receiver.asked-before-commit");
    assert!(!end.running && end.discarded);
}

#[test]
fn whoever_was_told_not_committed_can_commit_no_more() {
    for lost in [false, true] {
        let destination = kept();
        let connect = || destination.connect();
        let mut source = FakeSource::in_rounds_with(&connect, 1, Features::RESUME);
        source.round_zero();
        source.switchover(1);
        source.last_round(1);
        source.control.hear_kind(Kind::Prepared);
        if lost {
            source.control.cut();
            std::thread::sleep(STALL / 5);
        }
        assert_eq!(ask(&source), OutcomeState::NotCommitted);
        source.commit();
        source.control.cut();
        refused_for_good(&destination.end(GRACE));
    }
}

#[test]
fn a_question_in_the_rounds_ends_them() {
    let destination = kept();
    let connect = || destination.connect();
    let mut source = FakeSource::in_rounds_with(&connect, 1, Features::RESUME);
    source.round_zero();
    assert_eq!(ask(&source), OutcomeState::NotCommitted);
    source.control.cut();
    refused_for_good(&destination.end(GRACE));
}

#[test]
fn a_source_that_lost_the_link_after_commit_is_told_that_it_runs() {
    let destination = kept();
    let connect = || destination.connect();
    let mut source = FakeSource::in_rounds_with(&connect, 1, Features::RESUME);
    source.round_zero();
    source.switchover(1);
    source.last_round(1);
    source.control.hear_kind(Kind::Prepared);
    source.commit();
    source.control.hear_kind(Kind::Running);
    // It is closed, without a goodbye.
    source.control.cut();
    let began = Instant::now();
    let state = ask(&source);
    assert!(
        [OutcomeState::Running, OutcomeState::CommittedNotRunning].contains(&state),
        "{state:?}"
    );
    let end = destination.end(GRACE);
    assert!(end.running && began.elapsed() < GRACE);
}

// SPEC: GRANT-3, RESUME-3
#[test]
fn a_suspended_session_is_freed_at_its_deadline() {
    let config = waits().suspend(2 * STALL).build().unwrap();
    let destination = Destination::with(config, DestinationMachine::default());
    let connect = || destination.connect();
    let mut source = FakeSource::in_rounds_with(&connect, 1, Features::RESUME);
    source.round_zero();
    let began = Instant::now();
    source.control.cut();
    let end = destination.end(2 * STALL + GRACE);
    let error = end.finished.error.as_ref().unwrap();
    assert_eq!(
        (error.code(), error.phase()),
        ("receiver.timeout", Phase::Suspended)
    );
    assert!(began.elapsed() >= 2 * STALL && end.discarded && !end.running);
}

#[test]
fn a_lane_that_stops_inside_a_head_is_given_up_and_an_idle_one_is_not() {
    let destination = kept();
    let connect = || destination.connect();
    let mut source = FakeSource::in_rounds_with(&connect, 2, Features::RESUME);
    source.page(0, 0, 3, 0x33);
    source.lanes[1].peer.raw(&[0x10, 0, 0, 0, 0]);
    let began = Instant::now();
    let heard = source.control.hear_kind(Kind::LaneDown);
    assert!(matches!(heard.frame(), Frame::LaneDown(down) if down.lane == LaneId::new(1)));
    assert!(began.elapsed() >= STALL / 2 && began.elapsed() < STALL + GRACE);
    // The other one was idle for as long, and still is part of the round.
    std::thread::sleep(STALL);
    source.end_round(0, 0, false);
    source.control.hear_kind(Kind::RoundClosed);
    destination.handle().cancel();
    let _ = destination.end(GRACE);
}

#[test]
fn a_source_that_only_says_that_it_lives_is_given_up() {
    let config = waits().progress_deadline(2 * STALL).build().unwrap();
    let destination = Destination::with(config, DestinationMachine::default());
    let connect = || destination.connect();
    let mut source = FakeSource::in_rounds_with(&connect, 1, Features::RESUME);
    source.round_zero();
    let began = Instant::now();
    assert_eq!(source.control.hear_abort().reason, Reason::Timeout);
    assert!(began.elapsed() + Duration::from_millis(100) >= 2 * STALL);
    destination.fails(GRACE, "receiver.timeout", "signs of life only");
}
