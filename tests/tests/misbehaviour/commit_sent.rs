//! Against the source, with its guest paused: it is resumed on every failure before COMMIT and on none after it.

use std::time::{Duration, Instant};

use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_tests::bounded::{
    COMMIT_DEADLINE, Destination, GRACE, STALL, Source, destination_config, tx_builder,
};
use multifd_tests::fake_destination::{FakeDestination, Taking, prepared, running};
use multifd_tests::host::Host;
use multifd_tests::model::{DestinationMachine, Refuse};
use multifd_tests::peer::{PATIENCE, encode};
use multifd_wire::frame::{Abort, Asks, KeepAlive, LaneDown, RoundClosed};
use multifd_wire::{Body, ChannelRef, Digest, Frame, Incarnation, Kind, LaneId, Phase, Reason};

/// Long enough for whatever a busy host does late: for deadlines that are not what is tested.
const LATE: Duration = Duration::from_secs(15);

/// A source that waits for what the destination owes, and that gives nothing up meanwhile, since this one acknowledges nothing.
fn source_to(fake: &FakeDestination) -> Source {
    source_with(fake, LATE, LATE)
}

fn source_with(fake: &FakeDestination, stall: Duration, commit: Duration) -> Source {
    let config = tx_builder().stall(stall).commit_deadline(commit);
    Source::to(&fake.address, config.build().unwrap())
}

fn abort(phase: Phase) -> Abort<'static> {
    Abort {
        reason: Reason::VmmRefused,
        phase,
        channel: ChannelRef::None,
        text: "it does not start",
    }
}

#[test]
fn prepared_with_another_digest_is_answered_with_reason_7_and_the_guest_runs_on() {
    let fake = FakeDestination::listen();
    let source = source_to(&fake);
    let (mut taking, digest) = fake.at_final();
    taking
        .control
        .send(prepared(Digest::new(digest.value() ^ 1)));
    let told = taking.control.hear_abort();
    assert_eq!(
        (told.reason, told.phase),
        (Reason::DigestMismatch, Phase::Switchover)
    );
    source.fails(
        GRACE,
        "sender.digest-mismatch",
        "PREPARED with another digest",
    );
}

/// A sign of life of a destination whose clock stands.
fn alive(echo_us: u64, held_us: u64, asks: Asks) -> KeepAlive {
    KeepAlive {
        stamp_us: 1,
        echo_us,
        held_us,
        asks,
    }
}

// SPEC: ALIVE-5, ALIVE-6, RUNNING-2
#[test]
fn echoes_that_are_late_or_lie_stretch_no_forecast_and_are_not_answered() {
    type Lie = fn(u64) -> (u64, u64);
    let lies: [(&str, Lie); 4] = [
        ("late, and does not say so", |stamp| (stamp, 0)),
        ("never sent", |_| (1, 0)),
        ("from the future", |stamp| (stamp + (1 << 40), 0)),
        ("held for ever", |stamp| (stamp, u64::MAX)),
    ];
    for (name, lie) in lies {
        let fake = FakeDestination::listen();
        // Three times the lie is more than this, so a source that believed it would never switch over.
        let config = tx_builder()
            .stall(LATE)
            .keep_alive(STALL / 20)
            .commit_deadline(LATE)
            .downtime_limit(Duration::from_secs(2));
        let source = Source::to(&fake.address, config.build().unwrap());
        let mut taking = fake.welcome();
        taking.grant();
        taking.hear_tables();
        taking.accept_lane();
        let heard = taking.control.hear_kind(Kind::KeepAlive);
        let Frame::KeepAlive(question) = heard.frame() else {
            unreachable!("that kind was waited for")
        };
        assert_eq!(question.asks, Asks::Answer, "{name}");
        std::thread::sleep(Duration::from_millis(800));
        let (echo_us, held_us) = lie(question.stamp_us);
        for _ in 0..20 {
            taking.control.send(alive(echo_us, held_us, Asks::Nothing));
        }
        taking.ready(1);
        taking.read_lanes();
        // None of the twenty was answered: the source goes on to ask, and says nothing else.
        let mut heard = 0;
        let digest = loop {
            let frame = taking.control.hear(PATIENCE).expect("no FINAL came");
            match frame.frame() {
                Frame::KeepAlive(alive) => {
                    assert_eq!(alive.asks, Asks::Answer, "{name}: an answer was answered");
                    heard += 1;
                }
                Frame::Final(last) => break last.digest,
                Frame::Abort(abort) => panic!("{name}: {}", abort.text),
                _ => {}
            }
        };
        assert!(heard < 1000, "{name}: {heard} signs of life");
        taking.control.send(prepared(digest));
        taking.control.hear_kind(Kind::Commit);
        taking.control.send(running());
        // By the letter: the newest stamp is echoed here, too.
        let farewell = KeepAlive {
            stamp_us: 2,
            ..alive(question.stamp_us, 7, Asks::Answer)
        };
        taking.control.send(farewell);
        loop {
            let heard = taking.control.hear_kind(Kind::KeepAlive);
            if matches!(heard.frame(), Frame::KeepAlive(answer) if answer.echo_us == 2) {
                break;
            }
        }
        let end = source.end(GRACE);
        assert_eq!(end.finished.report.outcome, tx::OutcomeKind::Migrated);
    }
}

#[test]
fn running_before_commit_is_refused_and_the_guest_runs_on() {
    let fake = FakeDestination::listen();
    let source = source_to(&fake);
    let (mut taking, _) = fake.at_final();
    taking.control.send(running());
    assert_eq!(taking.control.hear_abort().reason, Reason::Misbehaved);
    source.fails(
        GRACE,
        "sender.misbehaved.out-of-turn",
        "RUNNING before COMMIT",
    );
}

// SPEC: ERR-6
#[test]
fn whatever_fails_after_final_gives_the_guest_back() {
    type Act = fn(&mut Taking, &Source);
    let cases: [(&str, Act, &str, Option<Reason>, Duration); 6] = [
        (
            "silence",
            |t, source| {
                // Nothing is owed on the lane, so that the control channel alone is what is waited for.
                t.keep_acknowledging();
                let (handle, since) = (source.handle(), Instant::now());
                while handle.progress().acked_bytes < handle.progress().sent_bytes {
                    assert!(since.elapsed() < PATIENCE, "{:?}", handle.progress());
                    std::thread::sleep(Duration::from_millis(1));
                }
                t.control.fall_silent();
            },
            "sender.timeout",
            Some(Reason::Timeout),
            GRACE,
        ),
        (
            "signs of life and nothing else",
            |_, _| {},
            "sender.channel.all-lanes-lost",
            Some(Reason::ChannelsLost),
            GRACE,
        ),
        (
            "acknowledgements and nothing else",
            |t, _| t.keep_acknowledging(),
            "sender.timeout",
            Some(Reason::Timeout),
            COMMIT_DEADLINE,
        ),
        (
            "random bytes",
            |t, _| t.control.raw(&[1; 32]),
            "wire.malformed.header-crc",
            Some(Reason::Corruption),
            STALL,
        ),
        (
            "an end of the stream",
            |t, _| t.control.finish(),
            "channel-closed",
            Some(Reason::ChannelsLost),
            STALL,
        ),
        (
            "an ABORT",
            |t, _| t.control.send(abort(Phase::Switchover)),
            "sender.peer.aborted",
            None,
            STALL,
        ),
    ];
    for (name, act, code, told, deadline) in cases {
        let fake = FakeDestination::listen();
        // What is waited for is the one deadline that the case is about.
        let source = match name {
            "silence" | "signs of life and nothing else" => source_with(&fake, GRACE, LATE),
            "acknowledgements and nothing else" => source_with(&fake, LATE, COMMIT_DEADLINE),
            _ => source_to(&fake),
        };
        let host = Host::watch();
        let (mut taking, _) = fake.at_final();
        let began = Instant::now();
        act(&mut taking, &source);
        if let Some(reason) = told {
            assert_eq!(taking.control.hear_abort().reason, reason, "{name}");
        } else {
            assert!(
                !taking.control.hear_the_end().0.contains(&Kind::Abort),
                "{name}"
            );
            taking.control.cut();
        }
        source.fails(GRACE, code, name);
        assert!(
            began.elapsed() < deadline + GRACE + host.delayed(),
            "{name}: {:?}",
            began.elapsed()
        );
    }
}

#[test]
fn whatever_fails_after_commit_leaves_the_outcome_unknown_and_the_guest_paused() {
    type Act = fn(&mut Taking);
    let cases: [(&str, Act, &str, Duration); 7] = [
        (
            "silence",
            |t| t.control.fall_silent(),
            "sender.timeout",
            GRACE,
        ),
        (
            "signs of life and nothing else",
            |_| {},
            "sender.timeout",
            GRACE,
        ),
        (
            "random bytes",
            |t| t.control.raw(&[1; 32]),
            "wire.malformed.header-crc",
            STALL,
        ),
        (
            "an end of the stream",
            |t| t.control.finish(),
            "channel-closed",
            STALL,
        ),
        (
            "an ABORT",
            |t| t.control.send(abort(Phase::Commit)),
            "sender.peer.aborted",
            STALL,
        ),
        (
            "PREPARED again",
            |t| t.control.send(prepared(Digest::EMPTY)),
            "sender.misbehaved.out-of-turn",
            STALL,
        ),
        (
            "a closed connection",
            |t| t.control.cut(),
            "channel-",
            STALL,
        ),
    ];
    for (name, act, code, deadline) in cases {
        let fake = FakeDestination::listen();
        let source = match name {
            "silence" => source_with(&fake, GRACE, LATE),
            "signs of life and nothing else" => source_with(&fake, LATE, GRACE),
            _ => source_to(&fake),
        };
        let host = Host::watch();
        let mut taking = fake.committed();
        let began = Instant::now();
        act(&mut taking);
        let (heard, _) = taking.control.hear_the_end();
        assert!(
            !heard.contains(&Kind::Abort),
            "{name}: no ABORT after COMMIT (SPEC: COMMIT-5)"
        );
        taking.control.cut();
        let end = source.end(deadline + GRACE);
        assert_eq!(
            end.finished.report.outcome,
            tx::OutcomeKind::Unknown,
            "{name}"
        );
        let error = end.finished.error.as_ref().unwrap();
        assert!(error.code().starts_with(code), "{name}: {error}");
        assert_eq!(error.phase(), Phase::Commit, "{name}");
        end.stays_paused(name);
        assert!(
            began.elapsed() < deadline + GRACE + host.delayed(),
            "{name}: {:?}",
            began.elapsed()
        );
    }
}

#[test]
fn prepared_cut_off_commits_nothing_and_running_cut_off_is_not_believed() {
    for bytes in [1, 31, 32, 33, 71] {
        let fake = FakeDestination::listen();
        let source = source_to(&fake);
        let (mut taking, digest) = fake.at_final();
        taking.control.fall_silent();
        let cut_off = |number| encode(number, prepared(digest), Body::None)[..bytes].to_vec();
        taking.control.instead(cut_off);
        taking.control.finish();
        assert_eq!(taking.control.hear_abort().reason, Reason::ChannelsLost);
        let end = source.end(GRACE);
        let error = end.finished.error.as_ref().unwrap();
        assert!(
            error.code().starts_with("channel-closed"),
            "{bytes} bytes: {error}"
        );
        end.runs_on("PREPARED cut off");
    }
    for bytes in [1, 31, 32, 33, 63] {
        let fake = FakeDestination::listen();
        let source = source_to(&fake);
        let mut taking = fake.committed();
        taking.control.fall_silent();
        let cut_off = |number| encode(number, running(), Body::None)[..bytes].to_vec();
        taking.control.instead(cut_off);
        taking.control.finish();
        let end = source.end(GRACE);
        let code = if bytes == 32 {
            // Between header and table.
            "channel-closed"
        } else {
            "channel-closed-midway"
        };
        end.unknown(code, "RUNNING cut off");
    }
}

#[test]
fn lanes_that_close_after_commit_change_nothing() {
    let fake = FakeDestination::listen();
    let source = source_to(&fake);
    let mut taking = fake.committed();
    taking.cut_lanes();
    taking.control.send(LaneDown {
        lane: LaneId::new(0),
        incarnation: Incarnation::new(0),
        reason: Reason::ChannelsLost,
    });
    taking.control.hear_kind(Kind::LaneDown);
    taking.control.send(running());
    taking.control.finish();
    let end = source.end(GRACE);
    assert!(end.finished.error.is_none(), "{:?}", end.finished.error);
    assert_eq!(end.finished.report.outcome, tx::OutcomeKind::Migrated);
    end.stays_paused("migrated");
}

#[test]
fn a_cancel_after_commit_comes_too_late() {
    let fake = FakeDestination::listen();
    let source = source_to(&fake);
    let mut taking = fake.committed();
    source.handle().cancel();
    std::thread::sleep(STALL / 5);
    taking.control.send(running());
    taking.control.finish();
    let end = source.end(GRACE);
    assert_eq!(end.finished.report.outcome, tx::OutcomeKind::Migrated);
    end.stays_paused("migrated");
}

// SPEC: BACK-4, SWITCH-2
#[test]
fn pages_that_are_damaged_for_ever_end_it_at_the_bound_and_the_guest_runs_on() {
    let fake = FakeDestination::listen();
    let source = source_to(&fake);
    let mut taking = fake.in_rounds();
    let mut rounds = 0;
    loop {
        let heard = taking.control.hear(PATIENCE).unwrap();
        match heard.frame() {
            Frame::Final(last) => {
                rounds += 1;
                taking.control.send(RoundClosed {
                    round: last.final_round,
                    pages: 1,
                    zero_pages: 0,
                    digest: last.digest,
                    elapsed_us: 1,
                    damaged_pages: 1,
                });
            }
            Frame::Abort(abort) => {
                assert_eq!(
                    (abort.reason, abort.phase),
                    (Reason::Corruption, Phase::Switchover)
                );
                break;
            }
            _ => {}
        }
    }
    taking.control.cut();
    // One of the repairs is that of the page that saving the state dirtied.
    assert_eq!(rounds, tx::session::REPAIR_ROUNDS_MAX);
    source.fails(GRACE, "sender.unrepairable", "damaged for ever");
}

/// A whole migration to a machine that refuses.
fn to_a_machine_that_refuses(refuse: Refuse) -> (Source, Destination) {
    let machine = DestinationMachine {
        refuse,
        ..DestinationMachine::default()
    };
    let destination = Destination::with(destination_config(), machine);
    let config = tx_builder().channels(2).build().unwrap();
    (Source::to(&destination.address, config), destination)
}

#[test]
fn a_machine_that_refuses_before_the_commit_leaves_the_guest_running_at_the_source() {
    for (refuse, code) in [
        (Refuse::Prepare, "receiver.vmm.refused"),
        (Refuse::OtherMemory, "receiver.vmm.memory-differs"),
        (Refuse::Load, "receiver.vmm.refused"),
    ] {
        let (source, destination) = to_a_machine_that_refuses(refuse);
        source.fails(
            COMMIT_DEADLINE + GRACE,
            "sender.peer.aborted",
            &format!("{refuse:?}"),
        );
        destination.fails(GRACE, code, &format!("{refuse:?}"));
    }
}

#[test]
fn a_machine_that_does_not_start_after_the_commit_leaves_the_source_paused_and_says_so_on_both_sides()
 {
    let (source, destination) = to_a_machine_that_refuses(Refuse::Resume);
    let end = source.end(COMMIT_DEADLINE + GRACE);
    end.unknown("sender.peer.aborted", "resume fails");
    let end = destination.end(GRACE);
    assert_eq!(end.finished.report.outcome, rx::OutcomeKind::Stranded);
    assert!(!end.running && !end.discarded);
}
