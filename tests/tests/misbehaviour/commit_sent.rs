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
use multifd_wire::frame::{Abort, LaneDown, RoundClosed};
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
            "random octets",
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
            "random octets",
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
            "{bytes} octets: {error}"
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
