//! The tables of states against frames and events, printed and compared with `table.txt`; what must hold of them; traces, bounds,
//! random walks.

mod steps;
mod table;

use multifd_wire::Reason;
use multifd_wire::frame::OutcomeState;
use proptest::prelude::*;

use self::steps::*;
use super::*;
use crate::common::VmmError;
use crate::destination::config::AfterFailedSetup;
use crate::destination::event::{Counts, DeviceEvent, Outcome};
use crate::destination::lane::Begins;
use crate::destination::lanes::Life;

fn count(effects: &[Effect], wanted: impl Fn(&Effect) -> bool) -> usize {
    effects.iter().filter(|effect| wanted(effect)).count()
}

fn finishes(effects: &[Effect]) -> usize {
    count(effects, |e| matches!(e, Effect::Finish(_)))
}

fn sends(effects: &[Effect], kind: Kind) -> usize {
    count(
        effects,
        |e| matches!(e, Effect::Send(frame) if frame.kind() == kind),
    )
}

/// Every state with every step, and what came of it.
fn each_cell(mut check: impl FnMut(&str, &str, &Session, &[Effect])) {
    for (state, _) in states() {
        for (name, step, at) in all_steps() {
            let mut session = state_after(state);
            let effects = feed(&mut session, step, at);
            check(state, name, &session, &effects);
        }
    }
}

#[test]
fn the_guest_runs_only_on_a_commit_with_the_prepared_digest() {
    each_cell(|state, step, _, effects| {
        let resumes = count(effects, |e| matches!(e, Effect::Resume(_)));
        let due = (state, step) == ("prepared", "COMMIT");
        assert_eq!(resumes, usize::from(due), "{state} × {step}");
    });
}

#[test]
fn prepared_is_said_only_when_state_and_devices_were_loaded_on_equal_digests() {
    each_cell(|state, step, _, effects| {
        let due = matches!(
            (state, step),
            ("loading" | "devices: loading, devices loaded", "loaded")
                | ("devices: loading, state loaded", "device loaded")
        );
        let said = sends(effects, Kind::Prepared);
        assert_eq!(said, usize::from(due), "{state} × {step}");
        if count(effects, |e| matches!(e, Effect::Load { .. })) == 1 {
            let due = matches!(
                (state, step),
                ("fenced" | "fenced, lane lost, FINAL differs", "FINAL 1")
            );
            assert!(due, "{state} × {step}");
        }
    });
}

#[test]
fn a_guest_that_is_ours_is_never_discarded() {
    each_cell(|state, step, _, effects| {
        if ["owning", "over"].contains(&state) {
            let discards = count(effects, |e| matches!(e, Effect::Discard));
            assert_eq!(discards, 0, "{state} × {step}");
        }
    });
}

#[test]
fn every_failure_before_the_commit_discards_the_machine_and_finishes_once() {
    each_cell(|state, step, session, effects| {
        let over = matches!(session.state, State::Over);
        let ends = over && state != "over";
        assert_eq!(finishes(effects) == 1, ends, "{state} × {step}");
        if finishes(effects) == 1 && state != "owning" {
            let discards = count(effects, |e| matches!(e, Effect::Discard));
            assert_eq!(discards, 1, "{state} × {step}");
        }
    });
}

/// Whatever happens here, it is not the source that is accused of it.
#[test]
fn our_own_faults_are_never_reported_as_the_sources() {
    each_cell(|state, step, _, effects| {
        // Frames are in capitals; what a lane, or the marks of lanes, said came from the source as well.
        let from_the_source = step.starts_with(char::is_uppercase)
            || step.ends_with("misbehaved")
            || step.starts_with("closed")
            || step.starts_with("lane 9 joined");
        if from_the_source {
            return;
        }
        for effect in effects {
            if let Effect::Finish(Outcome::Failed(error) | Outcome::Stranded(error)) = effect {
                assert_ne!(error.reason(), Reason::Misbehaved, "{state} × {step}");
            }
        }
    });
}

#[test]
fn every_state_has_a_deadline() {
    for (state, _) in states() {
        let mut session = state_after(state);
        if ["owning", "over"].contains(&state) {
            continue;
        }
        let (deadline, _) = session.deadline();
        let most = if state.contains("suspended") || state == "settling" {
            Config::default().suspend()
        } else {
            STALL
        };
        assert!(deadline <= most + NOW, "{state}: {deadline:?}");
        let early = tick_until(&mut session, deadline - MS);
        assert_eq!(early, 0, "{state}: too early");
        let mut effects = feed(&mut session, tick(), deadline);
        if matches!(session.state, State::Suspended { .. }) {
            // A silent source may come back, but not for ever.
            let (until, _) = session.deadline();
            effects = feed(&mut session, tick(), until);
        }
        assert_eq!(finishes(&effects), 1, "{state}");
    }
}

/// Lets the time go on in small steps, with these at each; how often it ended.
fn pass_until(session: &mut Session, until: Duration, steps: &[fn() -> Step]) -> usize {
    let mut now = NOW;
    let mut ends = 0;
    while now < until {
        now = (now + Config::default().keep_alive()).min(until);
        ends += steps
            .iter()
            .map(|step| finishes(&feed(session, step(), now)))
            .sum::<usize>();
    }
    ends
}

fn tick_until(session: &mut Session, until: Duration) -> usize {
    pass_until(session, until, &[tick])
}

/// With a source that says that it lives.
fn live_until(session: &mut Session, until: Duration) -> usize {
    pass_until(session, until, &[alive, tick])
}

/// No silence of the source changes what the VMM has to do, but a VMM that does not come back ends it.
#[test]
fn a_guest_that_is_ours_waits_for_the_vmm_alone() {
    let mut session = state_after("owning");
    let most = Config::default().progress_deadline();
    assert_eq!(tick_until(&mut session, MS + most - MS), 0);
    let words = say(&mut session, tick(), MS + most);
    assert_eq!(words, ["finish: stranded, receiver.thread-stuck"]);
    // Nobody knows what becomes of it: it may run the guest yet.
    assert_eq!(
        say(&mut session, Step::Event(Event::Asked), MS + most),
        ["answer 2"]
    );
    let ran = Step::Event(Event::Resumed(Counts::default()));
    assert_eq!(say(&mut session, ran, MS * 2 + most), ["finish: running"]);
    assert_eq!(
        say(&mut session, Step::Event(Event::Asked), MS * 2 + most),
        ["answer 3"]
    );
}

/// What it says in the end counts, also when it comes late.
#[test]
fn a_vmm_that_refuses_after_it_was_given_up_makes_the_answer_final() {
    let mut session = state_after("owning");
    let most = MS + Config::default().progress_deadline();
    assert_eq!(tick_until(&mut session, most), 1);
    let fault = Fault::Vmm {
        step: "run the guest",
        source: crate::common::VmmError::new("no"),
    };
    let refused = Step::Event(Event::NotResumed(fault));
    let words = say(&mut session, refused, most + MS);
    assert_eq!(words, ["finish: stranded, receiver.vmm.refused"]);
    assert_eq!(
        say(&mut session, Step::Event(Event::Asked), most + MS),
        ["answer 4"]
    );
}

/// A source that answers nothing, and says again and again what it has said, is not waited for without end.
#[test]
fn what_is_missing_is_waited_for_no_longer_than_the_progress_deadline_whatever_the_source_says() {
    let again = || final_of(1, OTHER_DIGEST);
    let mut session = state_after("fenced, lane lost, FINAL differs");
    let most = MS + Config::default().progress_deadline();
    assert_eq!(
        pass_until(&mut session, most - MS, &[alive, again, tick]),
        0
    );
    let words = say(&mut session, tick(), most);
    let end = "finish: failed, receiver.timeout".to_owned();
    assert!(words.contains(&end), "{words:?}");
}

/// A program that stood still as a whole gives its own threads their time again.
#[test]
fn a_vmm_that_stood_still_with_its_program_is_waited_for() {
    let mut session = state_after("owning");
    let most = Config::default().progress_deadline();
    let woken = MS + most * 2;
    assert_eq!(finishes(&feed(&mut session, tick(), woken)), 0);
    assert_eq!(tick_until(&mut session, woken + most - MS), 0);
    assert_eq!(finishes(&feed(&mut session, tick(), woken + most)), 1);
}

#[test]
fn pages_that_stay_missing_after_final_end_it_although_the_source_says_that_it_lives() {
    for (state, code) in [
        ("fenced, damaged, FINAL", "receiver.timeout"),
        (
            "fenced, lane lost, FINAL differs",
            "receiver.digest-mismatch",
        ),
    ] {
        let mut session = state_after(state);
        let asked = MS + Config::default().keep_alive();
        let words = say(&mut session, tick(), asked);
        assert!(words.iter().any(|word| word == "KEEP_ALIVE"), "{words:?}");
        let stamp_us = u64::try_from(asked.as_micros()).unwrap();
        let known = asked + MS;
        let _ = feed(&mut session, answers(stamp_us), known);
        let _ = feed(&mut session, alive(), STALL);
        let early = feed(&mut session, tick(), STALL);
        assert_eq!(finishes(&early), 0, "{state}: too early");
        let words = say(&mut session, tick(), STALL + known);
        let end = format!("finish: failed, {code}");
        assert!(words.contains(&end), "{state}: {words:?}");
    }
}

#[test]
fn the_source_is_told_the_reason_phase_and_channel_unless_it_said_so_itself() {
    let mut session = state_after("rounds");
    let words = say(&mut session, ended_by(1, misbehaved()), NOW);
    assert_eq!(
        words.last().unwrap(),
        "ABORT 3 in rounds about data channel 1"
    );
    let mut session = state_after("rounds");
    let told = feed(&mut session, abort(), NOW);
    assert_eq!((sends(&told, Kind::Abort), finishes(&told)), (0, 1));
}

// SPEC: PHASE-1
#[test]
fn a_migration_goes_through_its_states_in_order() {
    assert_eq!(trace(happy_path()), HAPPY);
}

#[test]
fn nothing_is_prepared_before_both_the_state_and_every_device_are_loaded() {
    for both in [[loaded(), device_loaded(0)], [device_loaded(0), loaded()]] {
        let mut session = state_after("devices: loading");
        let [first, second] = both;
        let early = feed(&mut session, first, NOW);
        assert_eq!(sends(&early, Kind::Prepared), 0);
        let words = say(&mut session, second, NOW);
        assert_eq!(words.last().unwrap(), "PREPARED");
    }
    // A device that was loaded early, and began anew: the mark came, its loader has not got to it yet.
    let mut session = state_after("devices: rounds");
    let _ = feed(&mut session, device_loaded(0), NOW);
    let rest = happy_path().into_iter().skip(ROUNDS).take(COMMITS - ROUNDS);
    for mut step in rest {
        if let Step::Event(Event::Closed(closed)) = &mut step {
            closed.restarts = vec![1];
        }
        let words = say(&mut session, step, NOW);
        assert!(!words.contains(&"PREPARED".to_owned()), "{words:?}");
    }
    let _ = feed(
        &mut session,
        Step::Event(Event::Device(DeviceEvent::Restarted(NIC))),
        NOW,
    );
    let words = say(&mut session, device_loaded(1), NOW);
    assert_eq!(words.last().unwrap(), "PREPARED");
}

#[test]
fn a_device_that_cannot_start_after_the_commit_strands_the_guest_and_says_so() {
    let mut session = state_after("owning");
    let source = crate::common::DeviceError::new("no power");
    let fault = Fault::Device {
        device: "nic".into(),
        step: "start",
        source,
    };
    let words = say(&mut session, Step::Event(Event::Failed(fault)), NOW);
    let stranded = "finish: stranded, receiver.device.failed";
    assert_eq!(words, [stranded, "ABORT 9 in commit about no channel"]);
}

#[test]
fn switchover_and_final_may_come_before_the_lanes_or_after_them() {
    let tail = || happy_path().into_iter().skip(COMMITS - 1);
    let lanes = || [arrived(0, 1, true), arrived(1, 1, true), closed(0)];
    let said = || [switchover(1), vm_state()];
    let head = || happy_path().into_iter().take(SECOND_ROUND);
    let chain = |steps: Vec<Vec<Step>>| steps.into_iter().flatten().collect::<Vec<_>>();
    let orders: [Vec<Step>; 3] = [
        chain(vec![
            said().into(),
            vec![final_of(1, DIGEST)],
            lanes().into(),
        ]),
        chain(vec![
            lanes().into(),
            said().into(),
            vec![final_of(1, DIGEST)],
        ]),
        chain(vec![
            said().into(),
            lanes().into(),
            vec![final_of(1, DIGEST)],
        ]),
    ];
    for order in orders {
        assert_eq!(trace(head().chain(order).chain(tail())), HAPPY);
    }
    // Even before the live round is closed: the source does not wait for it.
    let early = happy_path()
        .into_iter()
        .take(ROUNDS)
        .chain(said())
        .chain([final_of(1, DIGEST)]);
    let rest = [arrived(0, 0, false), arrived(1, 0, false), closed(0)];
    assert_eq!(trace(early.chain(rest).chain(lanes()).chain(tail())), HAPPY);
}

// SPEC: SWITCH-2, SWITCH-3
#[test]
fn the_gate_to_a_further_round_opens_with_its_switchover_and_not_before() {
    let mut session = state_after("fenced, damaged, FINAL");
    assert_eq!(say(&mut session, switchover(2), NOW), ["open 2"]);
    // Two rounds were announced while the first was still being read.
    let mut session = state_after("rounds, paused, closing");
    assert!(say(&mut session, switchover(2), NOW).is_empty());
    assert!(say(&mut session, switchover(3), NOW).is_empty());
    let words = say(&mut session, closed(1), NOW);
    assert_eq!(words, ["ROUND_CLOSED 1", "open 2"]);
    let _ = feed(&mut session, arrived(0, 2, true), NOW);
    let _ = feed(&mut session, arrived(1, 2, true), NOW);
    let words = say(&mut session, closed(0), NOW);
    assert_eq!(words, ["ROUND_CLOSED 2", "open 3"]);
}

/// SPEC: RESUME-7. Of a ROUND_CLOSED that could not be sent nobody knows how much was read.
#[test]
fn a_round_that_was_being_closed_when_the_channel_was_lost_is_closed() {
    for (name, open) in [("rounds", 0), ("rounds, closing", 1), ("fenced", 2)] {
        let mut session = state_after(name);
        let _ = feed(&mut session, lost(), NOW);
        assert_eq!(session.round(), Round::new(open), "{name}");
    }
}

/// SPEC: SWITCH-1, SWITCH-2, ROUND-4
#[test]
fn an_end_mark_that_contradicts_switchover_ends_it() {
    let out_of_turn = "finish: failed, receiver.misbehaved.out-of-turn".to_owned();
    let head = |steps| happy_path().into_iter().take(steps);
    // Round 1 was announced as paused, but its marks say live.
    let live = [arrived(0, 1, false), arrived(1, 1, false), closed(0)];
    let words = trace(head(SWITCHED).chain(live));
    assert!(words.contains(&out_of_turn), "{words:?}");
    // Round 2 was announced, but already round 1 says paused.
    let early = [
        switchover(2),
        arrived(0, 1, true),
        arrived(1, 1, true),
        closed(0),
    ];
    let words = trace(head(SECOND_ROUND).chain(early));
    assert!(words.contains(&out_of_turn), "{words:?}");
    // The lanes disagree.
    let split = [arrived(0, 1, true), arrived(1, 1, false), closed(0)];
    let words = trace(head(SWITCHED).chain(split));
    assert!(words.contains(&out_of_turn), "{words:?}");
}

// SPEC: LANE-6
#[test]
fn a_lost_lane_is_waited_for_no_longer_and_without_any_one_is_waited_for() {
    for (state, _) in states() {
        let mut session = state_after(state);
        let _ = feed(&mut session, ended(1), NOW);
        let effects = feed(&mut session, ended(0), NOW);
        let over = matches!(session.state, State::Over);
        assert_eq!(over, state == "over", "{state}: {effects:?}");
        // The fence of a round without lanes does not fall by itself.
        let closes = count(&effects, |e| matches!(e, Effect::CloseRound(_)));
        assert_eq!(closes, 0, "{state}");
    }
    let mut session = state_after("rounds, lane 0 at the fence");
    let words = say(&mut session, ended(1), NOW);
    assert_eq!(words, ["LANE_DOWN 1.0: 18", "close 0"]);
}

/// SPEC: LANE-1, LANE-2. A lane that ends before READY is noticed and said; it may be dialled again, and READY waits for it.
#[test]
fn a_lane_that_is_lost_in_a_first_set_up_is_answered_and_waited_for() {
    let mut session = state_after("set-up, tables and a lane");
    assert_eq!(say(&mut session, ended(0), NOW), ["LANE_DOWN 0.0: 18"]);
    assert_eq!(say(&mut session, lane_down(0, 0), NOW), [""; 0]);
    assert_eq!(say(&mut session, joined(1), NOW), ["admit 1.0"]);
    assert_eq!(
        say(&mut session, Step::Event(Event::MachineReady), NOW),
        [""; 0]
    );
    let words = say(&mut session, joined_again(0, 1), NOW);
    assert_eq!(words, ["admit 0.1", "start 0", "READY 2"]);
    // The source gave one up: the one that is here is closed, and one that is not here yet is answered, and never let in.
    let mut session = state_after("set-up, tables and a lane");
    assert_eq!(say(&mut session, lane_down(0, 0), NOW), ["close lane 0"]);
    assert_eq!(say(&mut session, ended(0), NOW), ["LANE_DOWN 0.0: 18"]);
    assert_eq!(
        say(&mut session, lane_down(1, 0), NOW),
        ["LANE_DOWN 1.0: 18"]
    );
    assert_eq!(say(&mut session, joined(1), NOW), ["turn 1.0 away: 3"]);
}

/// A thread of ours that does not come back keeps the fence, but not for ever.
#[test]
fn a_lane_that_was_closed_and_does_not_end_ends_the_session() {
    let mut session = state_after("rounds");
    let _ = feed(&mut session, lane_down(1, 0), NOW);
    let due = NOW + Config::default().device_deadline();
    assert_eq!(live_until(&mut session, due - MS), 0);
    let words = say(&mut session, tick(), due);
    let end = "finish: failed, receiver.thread-stuck".to_owned();
    assert!(words.contains(&end), "{words:?}");
}

#[test]
fn without_any_lane_it_ends_at_once_if_nothing_is_kept_and_otherwise_at_the_deadline() {
    let lost = |suspend| {
        let config = Config::builder().suspend(suspend).build().unwrap();
        let mut session = Session::new(config, FEATURES, Duration::ZERO);
        for step in happy_path().into_iter().take(ROUNDS) {
            let _ = feed(&mut session, step, MS);
        }
        let _ = feed(&mut session, ended(1), NOW);
        let words = say(&mut session, ended(0), NOW);
        (session, words)
    };
    let over = [
        "discard",
        "finish: failed, receiver.channel.all-lanes-lost",
        "ABORT 18 in rounds about no channel",
    ];
    let (_, words) = lost(Duration::ZERO);
    assert_eq!(words[1..], over);
    let (mut session, words) = lost(2 * STALL);
    assert_eq!(words, ["LANE_DOWN 0.0: 18"]);
    let _ = feed(&mut session, alive(), 2 * STALL);
    assert_eq!(session.deadline().0, NOW + 2 * STALL);
    let words = say(&mut session, tick(), NOW + 2 * STALL);
    assert!(words.ends_with(&over.map(String::from)), "{words:?}");
}

#[test]
fn a_lane_that_joins_again_is_waited_for_at_the_fence() {
    let mut session = state_after("rounds, lane 0 at the fence");
    let words = say(&mut session, joined_again(1, 1), NOW);
    assert_eq!(words, ["turn 1.1 away: 19"], "it lives");
    let _ = feed(&mut session, ended(0), NOW);
    let words = say(&mut session, joined_again(0, 1), NOW);
    assert_eq!(words, ["admit 0.1 within 0"], "lost in round 0");
    assert!(say(&mut session, arrived(1, 0, false), NOW).is_empty());
    // Of the connection before nothing counts any more.
    assert!(say(&mut session, arrived(0, 0, false), NOW).is_empty());
    assert!(say(&mut session, damaged(0, 0), NOW).is_empty());
    let words = say(&mut session, arrived_again(0, 1, 0, false), NOW);
    assert_eq!(words, ["close 0"]);
    // With the gate shut it comes in behind the fence.
    let mut session = state_after("fenced");
    let _ = feed(&mut session, ended(0), NOW);
    let words = say(&mut session, joined_again(0, 1), NOW);
    assert_eq!(words, ["admit 0.1 behind 2"]);
    let _ = feed(&mut session, switchover(2), NOW);
    assert!(say(&mut session, arrived(1, 2, true), NOW).is_empty());
    let words = say(&mut session, arrived_again(0, 1, 2, true), NOW);
    assert_eq!(words, ["close 2"]);
}

/// SPEC: LANE-7
#[test]
fn a_connection_that_was_given_up_or_could_not_be_told_is_as_if_it_had_never_come() {
    let mut session = state_after("rounds");
    let _ = feed(&mut session, ended(1), NOW);
    let words = say(&mut session, lane_down(1, 1), NOW);
    assert_eq!(words, ["LANE_DOWN 1.1: 18"]);
    let words = say(&mut session, joined_again(1, 1), NOW);
    assert_eq!(words, ["turn 1.1 away: 3"]);
    let _ = feed(&mut session, joined_again(1, 2), NOW);
    let unheard = Event::LaneUnheard {
        lane: LaneId::new(1),
        incarnation: Incarnation::new(2),
    };
    assert!(say(&mut session, Step::Event(unheard), NOW).is_empty());
    let words = say(&mut session, arrived(0, 0, false), NOW);
    assert_eq!(words, ["close 0"], "nobody waits for it");
    let words = say(&mut session, lane_down(1, 2), NOW);
    assert_eq!(words, ["LANE_DOWN 1.2: 18"]);
}

/// SPEC: LANE-7. The source does not wait until the channel of an attempt that got no answer has ended before it makes the next.
#[test]
fn an_attempt_is_given_up_while_the_one_before_it_is_still_being_closed() {
    let mut session = state_after("rounds");
    let _ = feed(&mut session, ended(1), NOW);
    let words = say(&mut session, joined_again(1, 1), NOW);
    assert_eq!(words, ["admit 1.1 within 0"]);
    let words = say(&mut session, lane_down(1, 1), NOW);
    assert_eq!(words, ["close lane 1"]);
    let words = say(&mut session, lane_down(1, 2), NOW);
    assert_eq!(words, ["LANE_DOWN 1.2: 18"]);
    let (mark, fault) = (mark(1, 1, 0), channel_closed());
    let words = say(
        &mut session,
        Step::Event(Event::LaneEnded { mark, fault }),
        NOW,
    );
    assert_eq!(words, ["LANE_DOWN 1.1: 18"]);
    let words = say(&mut session, joined_again(1, 2), NOW);
    assert_eq!(words, ["turn 1.2 away: 3"]);
    let words = say(&mut session, joined_again(1, 3), NOW);
    assert_eq!(words, ["admit 1.3 within 0"]);
}

/// SPEC: BACK-2, RESUME-10
#[test]
fn pages_are_given_back_until_their_lane_has_ended_and_before_they_are_acknowledged() {
    let mut session = state_after("rounds");
    assert_eq!(say(&mut session, damaged(0, 0), NOW), ["GIVE_BACK 0.0"]);
    assert_eq!(say(&mut session, handled(3), NOW), ["ACK 3 3"]);
    assert!(say(&mut session, handled(3), NOW).is_empty(), "nothing new");
    // Given up by the source, but not at its end.
    let _ = feed(&mut session, lane_down(0, 0), NOW);
    assert_eq!(say(&mut session, damaged(0, 0), NOW), ["GIVE_BACK 0.0"]);
    let words = say(&mut session, ended_at(0, 5), NOW);
    assert_eq!(words, ["ACK 5", "LANE_DOWN 0.0: 18"]);
    assert!(say(&mut session, damaged(0, 0), NOW).is_empty());
    // What a lane still says of the channels that were lost comes to nothing, in any phase; LANDED is preceded by all that counts.
    let _ = feed(&mut session, lost(), NOW);
    assert!(say(&mut session, damaged(1, 0), NOW).is_empty());
    let words = say(&mut session, resuming(), NOW);
    assert_eq!(words, ["settle"]);
    let words = say(&mut session, settled(3, 1), NOW);
    assert_eq!(words, ["accept", "GRANT"]);
    for step in set_up(2) {
        let _ = feed(&mut session, step, NOW);
    }
    assert!(say(&mut session, damaged(1, 0), NOW).is_empty());
    let words = say(&mut session, joined_again(1, 1), NOW);
    assert_eq!(
        words,
        [
            "admit 1.1",
            "start 0",
            "READY 1",
            "GIVE_BACK 0.0",
            "LANDED 0: 3 3"
        ]
    );
}

#[test]
fn signs_of_life_alone_are_not_enough() {
    for (state, _) in states() {
        let mut session = state_after(state);
        let late = Config::default().progress_deadline() + MS;
        let ends = live_until(&mut session, late) == 1;
        let may_take_longer = ["loading", "over"].contains(&state)
            || state.ends_with("resumed, tables")
            || state.starts_with("devices: loading");
        assert_eq!(ends, !may_take_longer, "{state}");
    }
}

/// SPEC: ALIVE-1, ALIVE-2, ALIVE-4, KIND-2
#[test]
fn it_says_that_it_lives_and_answers_the_stamps_of_the_source() {
    let mut session = state_after("set-up");
    let due = Config::default().keep_alive() + MS;
    assert_eq!(say(&mut session, alive(), NOW), ["KEEP_ALIVE, echo 7"]);
    let words = say(&mut session, tick(), due);
    assert_eq!(
        words,
        ["count", "KEEP_ALIVE, echo 7"],
        "PROGRESS has no place here"
    );
    let mut session = state_after("rounds");
    let words = say(&mut session, tick(), due);
    assert_eq!(words, ["count", "KEEP_ALIVE", "PROGRESS"]);
    assert!(say(&mut session, tick(), due + MS).is_empty());
    let mut session = state_after("suspended in round 0");
    assert!(say(&mut session, tick(), due).is_empty(), "to nobody");
}

/// SPEC: FINAL-4
#[test]
fn digests_that_differ_end_it_at_once_unless_a_lane_was_lost() {
    let mut session = state_after("fenced");
    let words = say(&mut session, final_of(1, OTHER_DIGEST), NOW);
    assert_eq!(
        words,
        [
            "discard",
            "finish: failed, receiver.digest-mismatch",
            "ABORT 7 in switchover about control channel"
        ]
    );
    // A lane that died before SWITCHOVER was read, but too late for the source to know when it sent FINAL.
    let short = || {
        let session = after(happy_path().into_iter().take(SECOND_ROUND).chain([
            ended(1),
            switchover(1),
            arrived(0, 1, true),
            closed(0),
            final_of(1, OTHER_DIGEST),
        ]));
        assert!(matches!(&session.state, State::Fenced(fence) if fence.short_since().is_some()));
        session
    };
    assert_eq!(say(&mut short(), switchover(2), NOW), ["open 2"]);
    // One that has read what was said and sends nothing is told what is missing; of one that does not answer, words may still
    // be on their way while it stands still.
    let asked = NOW + Config::default().keep_alive() + MS;
    let ask = |session: &mut Session| {
        let words = say(session, tick(), asked);
        assert!(words.iter().any(|word| word == "KEEP_ALIVE"), "{words:?}");
        u64::try_from(asked.as_micros()).unwrap()
    };
    let mut lives = short();
    let stamp_us = ask(&mut lives);
    let _ = feed(&mut lives, answers(stamp_us), NOW + STALL - MS);
    let _ = feed(&mut lives, answers(stamp_us), NOW + 2 * STALL - 3 * MS);
    let words = say(&mut lives, tick(), NOW + 2 * STALL - MS);
    assert!(
        words
            .iter()
            .any(|word| word.contains("receiver.digest-mismatch")),
        "{words:?}"
    );
    // Steps are taken at 1 ms, so this is when what is missing would be too late.
    let mut stands_still = short();
    let _ = ask(&mut stands_still);
    let _ = feed(&mut stands_still, alive(), NOW + STALL - MS);
    let words = say(&mut stands_still, tick(), NOW + 2 * STALL - 2 * MS);
    let ends = |word: &String| word.starts_with("finish") || word.contains("digest");
    assert!(!words.iter().any(ends), "{words:?}");
}

/// SPEC: DEVSTREAM-7
#[test]
fn a_device_that_is_not_whole_at_the_end_is_named_or_waited_for_if_a_lane_was_lost() {
    let head = || happy_path().into_iter().take(ROUNDS);
    let steps = [switchover(0), arrived(0, 0, true), arrived(1, 0, true)];
    let mut session = after(head().chain(steps));
    let _ = feed(&mut session, closed_without_device(), NOW);
    let words = say(&mut session, final_of(0, DIGEST), NOW);
    assert!(
        words[1].contains("wire.misbehaved.device-stream"),
        "{words:?}"
    );
    assert!(words[2].starts_with("ABORT 3"), "{words:?}");
    // A lane that was lost may have carried it: the source begins a further round, or is told after a while.
    let mut session = after(head().chain([ended(1), switchover(0), arrived(0, 0, true)]));
    let _ = feed(&mut session, closed_without_device(), NOW);
    assert!(say(&mut session, final_of(0, DIGEST), NOW).is_empty());
    assert_eq!(say(&mut session, switchover(1), NOW), ["open 1"]);
}

/// What the driver or a good source would do next.
fn expected(session: &Session) -> Step {
    match &session.state {
        State::Setup if session.secrets.is_none() => opened(),
        State::Setup if !session.set_up.has_ended() => {
            let tables = set_up(2).into_iter();
            let mut wanted = tables.skip(session.set_up.tables());
            wanted.next().unwrap()
        }
        State::Setup if !session.set_up.is_complete() => Step::Event(Event::MachineReady),
        State::Setup => {
            let lane = u32::from(session.lanes.life(LaneId::new(0)) == Some(Life::InRound));
            joined_again(lane, session.lanes.next_incarnation(LaneId::new(lane)))
        }
        State::Rounds if session.rounds.is_closing() => closed(0),
        State::Rounds if session.lanes.none_lives() => {
            joined_again(0, session.lanes.next_incarnation(LaneId::new(0)))
        }
        State::Rounds => {
            let round = session.round();
            let lane = u32::from(session.lanes.life(LaneId::new(0)) != Some(Life::InRound));
            let incarnation = session
                .lanes
                .next_incarnation(LaneId::new(lane))
                .saturating_sub(1);
            let last = session.rounds.contradicts(false);
            arrived_again(lane, incarnation, round.value(), last)
        }
        State::Fenced(fence) => match session.rounds.newest_switchover() {
            Some(newest) if newest == fence.round && session.states.count() == 0 => vm_state(),
            Some(newest) if newest == fence.round => final_of(newest.value(), DIGEST),
            _ => switchover(fence.round.value()),
        },
        State::Suspended { .. } if session.secrets.is_some() => settled(0, 0),
        State::Suspended { .. } => resuming(),
        State::Loading(_) => loaded(),
        State::Prepared(_) => commit(DIGEST),
        State::Owning { .. } | State::Over => Step::Event(Event::Resumed(Counts::default())),
    }
}

proptest! {
    /// Whatever happens in whatever order: no panic, one end, no guest without PREPARED and a COMMIT of the same digest.
    #[test]
    fn no_order_of_frames_and_events_starts_a_guest_that_is_not_ours(
        walk in proptest::collection::vec((0u8..5, any::<prop::sample::Index>(), 0u64..3000), 1..120),
        is_kept in any::<bool>(),
    ) {
        let features = if is_kept { FEATURES } else { Features::DEVICE_STATE };
        let mut session = Session::new(Config::default(), features, Duration::ZERO);
        let (mut now, mut prepared, mut resumed, mut ended) = (Duration::ZERO, false, false, 0);
        let mut refused = false;
        for (mood, index, pause_ms) in walk {
            now += MS * u32::try_from(pause_ms / 10).unwrap();
            let _ = feed(&mut session, alive(), now);
            let mut choices = all_steps();
            let step = if mood > 0 {
                expected(&session)
            } else {
                choices.swap_remove(index.index(choices.len())).1
            };
            let commits = matches!(&step, Step::Frame(Say::Commit(digest)) if *digest == DIGEST);
            for effect in feed(&mut session, step, now) {
                match effect {
                    Effect::Send(frame) if frame.kind() == Kind::Prepared => {
                        prop_assert!(!prepared, "prepared twice");
                        prepared = true;
                    }
                    // What was prepared is void.
                    Effect::Suspend => prepared = false,
                    Effect::Answer(OutcomeState::NotCommitted) => {
                        prop_assert!(!resumed);
                        refused = true;
                    }
                    Effect::Resume(_) => {
                        prop_assert!(!refused, "run after it was said that it never will be");
                        prop_assert!(!resumed && prepared && commits);
                        resumed = true;
                    }
                    Effect::Discard => prop_assert!(!resumed, "discarded a guest that is ours"),
                    Effect::Finish(outcome) => {
                        ended += 1;
                        prop_assert_eq!(resumed, !matches!(outcome, Outcome::Failed(_)));
                    }
                    Effect::Admit { .. } | Effect::OpenGate(_) | Effect::Load { .. } => {
                        prop_assert_eq!(ended, 0);
                    }
                    _ => {}
                }
            }
            prop_assert!(ended <= 1);
            prop_assert_eq!(ended == 1, matches!(session.state, State::Over));
        }
    }
}

#[test]
fn a_session_that_is_not_kept_ends_with_its_channels() {
    let mut session = Session::new(Config::default(), Features::DEVICE_STATE, Duration::ZERO);
    for step in happy_path().into_iter().take(ROUNDS) {
        let _ = feed(&mut session, step, MS);
    }
    assert_eq!(say(&mut session, resuming(), NOW), ["refuse: 15"]);
    let words = say(&mut session, lost(), NOW);
    assert!(
        words.contains(&"finish: failed, channel.closed".to_owned()),
        "{words:?}"
    );
}

#[test]
fn a_resumed_session_goes_on_with_the_first_round_that_is_not_closed() {
    for (state, round) in [("suspended in round 0", 0), ("suspended after PREPARED", 2)] {
        let mut session = state_after(state);
        let mut words = Vec::new();
        let steps = [resuming(), settled(0, 0)]
            .into_iter()
            .chain(set_up(1))
            .chain([
                joined_again(0, 1),
                arrived_again(0, 1, round, false),
                closed(0),
            ]);
        for step in steps {
            words.extend(say(&mut session, step, NOW));
        }
        let expected = [
            "settle".to_owned(),
            "accept".into(),
            "GRANT".into(),
            "admit 0.1".into(),
            format!("start {round}"),
            "READY 1".into(),
            format!("LANDED {round}:"),
            format!("close {round}"),
            format!("ROUND_CLOSED {round}"),
            format!("open {}", round + 1),
        ];
        assert_eq!(words, expected, "{state}");
    }
}

/// SPEC: RESUME-14
#[test]
fn one_lane_is_enough_on_the_way_back_and_the_others_join_the_round() {
    let mut session = state_after("suspended in round 0");
    for step in [resuming(), settled(0, 0)].into_iter().chain(set_up(3)) {
        let _ = feed(&mut session, step, NOW);
    }
    let words = say(&mut session, joined_again(2, 1), NOW);
    assert_eq!(words, ["admit 2.1", "start 0", "READY 1", "LANDED 0:"]);
    let words = say(&mut session, joined_again(0, 1), NOW);
    assert_eq!(words, ["admit 0.1 within 0"]);
    // The fence waits for those that are here, and for no other.
    assert!(say(&mut session, arrived_again(2, 1, 0, false), NOW).is_empty());
    let words = say(&mut session, arrived_again(0, 1, 0, false), NOW);
    assert_eq!(words, ["close 0"]);
    let words = say(&mut session, closed(0), NOW);
    assert_eq!(words, ["ROUND_CLOSED 0", "open 1"]);
    let words = say(&mut session, joined_again(1, 1), NOW);
    assert_eq!(words, ["admit 1.1 within 1"]);
}

/// SPEC: SEC-8
#[test]
fn a_session_gives_way_only_before_ready_while_it_waits_for_its_source_and_if_it_was_set_so() {
    let waits_on = Config::builder()
        .after_failed_setup(AfterFailedSetup::WaitOn)
        .build()
        .unwrap();
    for (state, followed, way) in [
        ("set-up, tables and a lane", true, false),
        ("rounds", false, false),
    ] {
        let mut session = state_after(state);
        assert!(!session.may_be_followed(), "{state}: it was not set so");
        session.config = waits_on.clone();
        let may = |session: &Session| (session.may_be_followed(), session.may_give_way());
        assert_eq!(may(&session), (followed, way), "{state}");
        let _ = feed(&mut session, lost(), NOW);
        assert_eq!(may(&session), (followed, followed), "{state}, lost");
    }
}

/// SPEC: RESUME-13
#[test]
fn a_set_up_that_was_lost_before_ready_is_made_with_all_lanes() {
    let mut session = state_after("set-up, tables and a lane");
    let steps = [lost(), resuming(), settled(0, 0)]
        .into_iter()
        .chain(set_up(2))
        .chain([Step::Event(Event::MachineReady), joined_again(1, 1)]);
    for step in steps {
        let words = say(&mut session, step, NOW);
        assert!(!words.contains(&"READY 2".to_owned()), "{words:?}");
    }
    let words = say(&mut session, joined_again(0, 1), NOW);
    assert_eq!(words, ["admit 0.1", "start 0", "READY 2", "LANDED 0:"]);
}

/// SPEC: RESUME-5
#[test]
fn a_source_that_comes_back_has_to_describe_the_same_machine() {
    let back = || {
        let mut session = state_after("suspended in round 0");
        for step in [resuming(), settled(0, 0)] {
            let _ = feed(&mut session, step, NOW);
        }
        session
    };
    for (steps, what) in [
        (vec![say_config(b"other")], "a configuration"),
        (vec![Step::Frame(Say::Regions(9))], "a memory layout"),
        (
            vec![
                Step::Frame(Say::Regions(PAGES)),
                Step::Frame(Say::Devices(1)),
            ],
            "a table of devices",
        ),
    ] {
        let mut session = back();
        let mut words = Vec::new();
        let is_config = what == "a configuration";
        for step in steps {
            words.extend(say(&mut session, step, NOW));
        }
        if is_config {
            for step in tables(2, 1) {
                words.extend(say(&mut session, step, NOW));
            }
        }
        let end = "finish: failed, receiver.misbehaved.setup-changed".to_owned();
        assert!(words.contains(&end), "{what}: {words:?}");
    }
}

#[test]
fn what_is_suspended_is_freed_at_the_deadline_and_not_before() {
    let mut session = state_after("suspended in round 0");
    let until = session.next_deadline();
    assert_eq!(until, MS + Config::default().suspend());
    assert!(say(&mut session, tick(), until - MS).is_empty());
    let words = say(&mut session, tick(), until);
    assert_eq!(words[..2], ["discard", "finish: failed, receiver.timeout"]);
}

#[test]
fn whoever_was_told_not_committed_is_never_run_here() {
    for (state, _) in states() {
        let mut session = state_after(state);
        let answers = feed(&mut session, Step::Event(Event::Asked), NOW);
        if count(&answers, |e| {
            matches!(e, Effect::Answer(OutcomeState::NotCommitted))
        }) == 0
        {
            assert!(["owning", "over"].contains(&state), "{state}");
            continue;
        }
        for (name, step, at) in all_steps() {
            let effects = feed(&mut session, step, at);
            let runs = count(&effects, |e| {
                matches!(
                    e,
                    Effect::Resume(_) | Effect::AcceptResume | Effect::Admit { .. }
                )
            });
            assert_eq!(runs, 0, "{state}, asked, {name}");
        }
    }
}

/// SPEC: ASK-4, RUNNING-2
#[test]
fn it_answers_after_the_end_until_the_source_knows() {
    let kept = Config::default().suspend();
    let mut session = state_after("over");
    assert_eq!(session.remembers_until(), Some(MS + kept));
    let words = say(&mut session, Step::Event(Event::Asked), NOW);
    assert_eq!(words, ["answer 3"]);
    let _ = feed(
        &mut session,
        Step::Event(Event::Answered(OutcomeState::Running)),
        NOW,
    );
    assert_eq!(session.remembers_until(), None);
    // Or it read RUNNING, and said so.
    let mut session = state_after("over");
    let _ = feed(&mut session, Step::Frame(Say::KeepAlive(9, 1)), NOW);
    assert!(session.remembers_until().is_some(), "another stamp");
    let _ = feed(&mut session, Step::Frame(Say::KeepAlive(9, 1000)), NOW);
    assert_eq!(session.remembers_until(), None);
    // Before PREPARED it can't have committed.
    let mut session = state_after("rounds");
    let _ = feed(&mut session, Step::Event(Event::Cancel), NOW);
    assert_eq!(session.remembers_until(), None);
    let mut session = state_after("prepared");
    let _ = feed(&mut session, Step::Event(Event::Cancel), NOW);
    assert_eq!(session.remembers_until(), Some(NOW + kept));
}

/// SPEC: FEAT-5, GRANT-3
#[test]
fn a_session_is_kept_only_if_both_sides_want_it() {
    use crate::destination::set_up::offered;
    let none = Config::builder().suspend(Duration::ZERO).build().unwrap();
    assert!(!offered(&none).contains(Features::RESUME));
    assert!(offered(&Config::default()).contains(Features::RESUME));
}

/// What was loaded for a switchover that is void counts no more, whatever came of it.
#[test]
fn a_load_that_is_void_counts_for_nothing() {
    let mut session = state_after("suspended while loading");
    let refusal = Fault::Vmm {
        step: "load",
        source: VmmError::new("no"),
    };
    let void = Step::Event(Event::Loaded(Err(refusal)));
    assert!(say(&mut session, void, NOW).is_empty());
    assert!(matches!(session.state, State::Suspended { .. }));
}

#[test]
fn a_lane_begins_where_the_rounds_are() {
    let mut session = state_after("rounds");
    let _ = feed(&mut session, ended(0), NOW);
    let effects = feed(&mut session, joined_again(0, 1), NOW);
    let within = Some(Begins::Within(Round::new(0)));
    assert!(matches!(&effects[..], [Effect::Admit { begins, .. }] if *begins == within));
}
