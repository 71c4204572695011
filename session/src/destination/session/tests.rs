//! The table of states and events, printed and compared with `table.txt`; what must hold of it; traces, bounds, random walks.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::common::VmmError;

const MS: Duration = Duration::from_millis(1);
const STALL: Duration = Duration::from_secs(10);
const NOW: Duration = Duration::from_millis(80);
const DIGEST: Digest = Digest::new(0xd1);
const OTHER_DIGEST: Digest = Digest::new(0xd2);

fn lost_channel() -> Error {
    Error::new(
        Phase::Rounds,
        Fault::AllLanesLost {
            last: "a test".into(),
        },
    )
}

fn vmm_failure() -> Error {
    Error::new(
        Phase::Commit,
        Fault::Vmm {
            step: "run the guest",
            source: VmmError::new("no processor"),
        },
    )
}

fn lost() -> Event {
    let fault = Fault::Timeout { what: "anything" };
    Event::Lost(Error::new(Phase::Rounds, fault))
}

fn arrived(lane: u32, round: u32, last: bool) -> Event {
    Event::LaneArrived {
        lane: LaneId::new(lane),
        round: Round::new(round),
        last,
    }
}

fn joined(lane: u32) -> Event {
    Event::LaneJoined {
        lane: LaneId::new(lane),
    }
}

fn ended(lane: u32) -> Event {
    Event::LaneEnded {
        lane: LaneId::new(lane),
    }
}

fn closed(damaged: u64) -> Event {
    Event::Closed {
        digest: DIGEST,
        damaged,
        incomplete: None,
    }
}

/// All pages are here, and item 7 of device 2 is not.
fn closed_without_device() -> Event {
    Event::Closed {
        digest: DIGEST,
        damaged: 0,
        incomplete: Some(Incomplete {
            device: DeviceId::new(2),
            name: "nic0".into(),
            index: 7,
        }),
    }
}

fn switchover(round: u32) -> Event {
    Event::Switchover {
        round: Round::new(round),
    }
}

fn final_of(round: u32, digest: Digest) -> Event {
    Event::Final {
        round: Round::new(round),
        states: 1,
        digest,
    }
}

/// A migration over two lanes: round 0 live, round 1 paused.
fn happy_path() -> Vec<Event> {
    vec![
        Event::SetupEnd { lanes: 2 },
        Event::MachineReady,
        joined(0),
        joined(1),
        arrived(0, 0, false),
        arrived(1, 0, false),
        closed(0),
        switchover(1),
        arrived(0, 1, true),
        arrived(1, 1, true),
        closed(0),
        final_of(1, DIGEST),
        Event::Loaded,
        Event::Commit { digest: DIGEST },
        Event::Resumed,
    ]
}

/// With devices whose state travels.
fn after_with_devices(events: impl IntoIterator<Item = Event>) -> Session {
    let mut session = Session::new(Config::default(), Duration::ZERO);
    session.expect_devices();
    session.keep();
    for event in events {
        let _ = session.handle(event, MS);
    }
    session
}

fn after(events: impl IntoIterator<Item = Event>) -> Session {
    let mut session = Session::new(Config::default(), Duration::ZERO);
    session.keep();
    for event in events {
        let _ = session.handle(event, MS);
    }
    session
}

/// Each state by name, and the events that lead to it.
fn states() -> Vec<(&'static str, Vec<Event>)> {
    let path = |steps| happy_path().into_iter().take(steps).collect::<Vec<_>>();
    let with = |steps, more: Vec<Event>| path(steps).into_iter().chain(more).collect::<Vec<_>>();
    vec![
        ("set-up", path(0)),
        ("set-up, tables", path(1)),
        ("set-up, machine and a lane", path(3)),
        ("rounds", path(4)),
        ("rounds, lane 0 at the fence", path(5)),
        ("rounds, closing", path(6)),
        ("rounds, paused", path(8)),
        (
            "rounds, paused, FINAL early",
            with(8, vec![final_of(1, DIGEST)]),
        ),
        ("rounds, paused, closing", path(10)),
        ("fenced", path(11)),
        (
            "fenced before SWITCHOVER",
            with(7, vec![arrived(0, 1, true), arrived(1, 1, true), closed(0)]),
        ),
        (
            "fenced, damaged, FINAL",
            with(10, vec![closed(3), final_of(1, DIGEST)]),
        ),
        (
            "fenced, lane lost, FINAL differs",
            with(
                8,
                vec![
                    arrived(0, 1, true),
                    ended(1),
                    closed(0),
                    final_of(1, OTHER_DIGEST),
                ],
            ),
        ),
        ("loading", path(12)),
        ("devices: rounds", path(4)),
        ("devices: loading", path(12)),
        ("devices: loading, state loaded", path(13)),
        (
            "devices: loading, devices loaded",
            with(12, vec![Event::DevicesLoaded]),
        ),
        (
            "devices: suspended",
            with(12, vec![Event::DevicesLoaded, lost()]),
        ),
        (
            "devices: resumed, tables",
            with(
                12,
                vec![
                    Event::DevicesLoaded,
                    lost(),
                    Event::Resuming,
                    Event::SetupEnd { lanes: 2 },
                ],
            ),
        ),
        ("prepared", path(13)),
        ("suspended in round 0", with(5, vec![lost()])),
        ("suspended after PREPARED", with(13, vec![lost()])),
        (
            "resumed, tables",
            with(
                13,
                vec![lost(), Event::Resuming, Event::SetupEnd { lanes: 2 }],
            ),
        ),
        ("owning", path(14)),
        ("over", path(15)),
    ]
}

/// Events by name; round numbers are those of the paused round 1 of the happy path.
fn events() -> Vec<(&'static str, Event, Duration)> {
    let at_once = [
        ("set-up end", Event::SetupEnd { lanes: 2 }),
        ("machine ready", Event::MachineReady),
        ("lane 0 joined", joined(0)),
        ("lane 1 joined", joined(1)),
        ("lane 9 joined", joined(9)),
        ("lane 0 ended", ended(0)),
        ("lane 1 ended", ended(1)),
        ("lane 9 ended", ended(9)),
        ("lane 0 at 0", arrived(0, 0, false)),
        ("lane 1 at 0", arrived(1, 0, false)),
        ("lane 0 at 1, paused", arrived(0, 1, true)),
        ("lane 1 at 1, paused", arrived(1, 1, true)),
        ("lane 9 at 0", arrived(9, 0, false)),
        ("closed, whole", closed(0)),
        ("closed, damaged", closed(3)),
        ("SWITCHOVER 0", switchover(0)),
        ("SWITCHOVER 1", switchover(1)),
        ("SWITCHOVER 2", switchover(2)),
        ("SWITCHOVER 3", switchover(3)),
        ("FINAL 1", final_of(1, DIGEST)),
        ("FINAL 1, other digest", final_of(1, OTHER_DIGEST)),
        ("FINAL 2", final_of(2, DIGEST)),
        ("loaded", Event::Loaded),
        ("devices loaded", Event::DevicesLoaded),
        ("device restarted", Event::DeviceRestarted),
        ("COMMIT", Event::Commit { digest: DIGEST }),
        (
            "COMMIT, other digest",
            Event::Commit {
                digest: OTHER_DIGEST,
            },
        ),
        ("resumed", Event::Resumed),
        ("lost", lost()),
        ("resuming", Event::Resuming),
        ("asked", Event::Asked),
        ("failed, channel", Event::Failed(lost_channel())),
        ("failed, VMM", Event::Failed(vmm_failure())),
        ("tick", Event::Tick),
    ];
    let now = at_once.into_iter().map(|(name, event)| (name, event, NOW));
    now.chain([("tick, late", Event::Tick, STALL + NOW)])
        .collect()
}

fn state_name(session: &Session) -> String {
    match &session.state {
        State::Setup(setup) => format!(
            "set-up ({:?} lanes, machine {}{})",
            setup.lanes,
            setup.machine,
            if setup.resumed { ", resumed" } else { "" }
        ),
        State::Rounds if session.closing => format!("round {}, closing", session.round),
        State::Rounds => format!("round {}", session.round),
        State::Fenced {
            round,
            short_since: None,
            ..
        } => format!("fenced {round}"),
        State::Fenced { round, .. } => format!("fenced {round}, pages missing"),
        State::Loading { loaded, .. } => format!(
            "loading ({}{})",
            if *loaded { "state loaded" } else { "state" },
            if session.devices_loaded {
                ""
            } else {
                ", devices"
            }
        ),
        State::Prepared(_) => "prepared".into(),
        State::Suspended { .. } => "suspended".into(),
        State::Owning => "owning".into(),
        State::Over => "over".into(),
    }
}

fn word(effect: &Effect) -> String {
    match effect {
        Effect::Prepare => "prepare".into(),
        Effect::Suspend => "suspend".into(),
        Effect::SendLanded => "LANDED".into(),
        Effect::Answer(state) => format!("answer {}", state.as_u32()),
        Effect::SendReady => "READY".into(),
        Effect::CloseRound { round } => format!("close {round}"),
        Effect::OpenGate { round } => format!("open {round}"),
        Effect::Load { states } => format!("load {states}"),
        Effect::SendPrepared { .. } => "PREPARED".into(),
        Effect::Resume(_) => "resume".into(),
        Effect::SendRunning => "RUNNING".into(),
        Effect::Abort { reason, .. } => format!("ABORT {}", reason.as_u32()),
        Effect::Discard => "discard".into(),
        Effect::Finish(Outcome::Running) => "finish: running".into(),
        Effect::Finish(Outcome::Failed(error)) => format!("finish: failed, {}", error.code()),
        Effect::Finish(Outcome::Stranded(error)) => format!("finish: stranded, {}", error.code()),
    }
}

/// The table: for each state the events, those with the same meaning together.
fn table() -> String {
    let mut out = String::new();
    for (state, _) in states() {
        out.push_str(&format!("{state}\n"));
        let mut same: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        let mut order = Vec::new();
        for (name, event, at) in events() {
            let mut session = state_after(state);
            let before = state_name(&session);
            let words: Vec<String> = session.handle(event, at).iter().map(word).collect();
            let now = state_name(&session);
            let mut text = words.join("; ");
            if now != before {
                text = format!("{text} -> {now}").trim_start().to_owned();
            }
            if text.is_empty() {
                text.push_str("no effect");
            }
            if !same.contains_key(&text) {
                order.push(text.clone());
            }
            same.entry(text).or_default().push(name);
        }
        for text in order {
            out.push_str(&format!(
                "    {}\n        {text}\n",
                same[&text].join(" | ")
            ));
        }
    }
    out
}

fn state_after(wanted: &str) -> Session {
    let found = states().into_iter().find(|(name, _)| *name == wanted);
    let events = found.expect("a state of the list").1;
    if wanted.starts_with("devices") {
        return after_with_devices(events);
    }
    after(events)
}

#[test]
#[allow(clippy::print_stdout)] // To be read: this is the machine.
fn the_table_of_states_and_events() {
    let table = table();
    println!("{table}");
    assert_eq!(
        table,
        include_str!("table.txt"),
        "table.txt is what was agreed on; if the machine was changed on purpose, it changes in the same commit"
    );
}

/// Every state with every event, and what came of it.
fn each_cell(mut check: impl FnMut(&str, &str, &Session, &[Effect])) {
    for (state, _) in states() {
        for (name, event, at) in events() {
            let mut session = state_after(state);
            let effects = session.handle(event, at);
            check(state, name, &session, &effects);
        }
    }
}

fn count(effects: &[Effect], wanted: impl Fn(&Effect) -> bool) -> usize {
    effects.iter().filter(|effect| wanted(effect)).count()
}

fn finishes(effects: &[Effect]) -> usize {
    count(effects, |e| matches!(e, Effect::Finish(_)))
}

#[test]
fn the_guest_runs_only_on_a_commit_with_the_prepared_digest() {
    each_cell(|state, event, _, effects| {
        let resumes = count(effects, |e| matches!(e, Effect::Resume(_)));
        let due = (state, event) == ("prepared", "COMMIT");
        assert_eq!(resumes, usize::from(due), "{state} × {event}");
    });
}

#[test]
fn prepared_is_said_only_when_the_state_was_loaded_on_equal_digests() {
    each_cell(|state, event, _, effects| {
        let said = count(effects, |e| matches!(e, Effect::SendPrepared { .. }));
        assert_eq!(
            said == 1,
            matches!(
                (state, event),
                ("loading" | "devices: loading, devices loaded", "loaded")
                    | ("devices: loading, state loaded", "devices loaded")
            ),
            "{state} × {event}"
        );
        if count(effects, |e| matches!(e, Effect::Load { .. })) == 1 {
            let due = matches!(
                (state, event),
                ("fenced" | "fenced, lane lost, FINAL differs", "FINAL 1")
            );
            assert!(due, "{state} × {event}");
        }
    });
}

#[test]
fn a_guest_that_is_ours_is_never_discarded() {
    each_cell(|state, event, _, effects| {
        if ["owning", "over"].contains(&state) {
            assert_eq!(
                count(effects, |e| matches!(e, Effect::Discard)),
                0,
                "{state} × {event}"
            );
        }
    });
}

#[test]
fn every_failure_before_the_commit_discards_the_machine_and_finishes_once() {
    each_cell(|state, event, session, effects| {
        let over = matches!(session.state, State::Over);
        assert_eq!(
            finishes(effects) == 1,
            over && state != "over",
            "{state} × {event}"
        );
        if finishes(effects) == 1 && state != "owning" {
            assert_eq!(
                count(effects, |e| matches!(e, Effect::Discard)),
                1,
                "{state} × {event}"
            );
        }
    });
    for (state, _) in states() {
        let mut session = state_after(state);
        let effects = session.handle(Event::Failed(lost_channel()), NOW);
        // The guest is this side's and starts, whatever becomes of the channels (SPEC: COMMIT-4).
        let goes_on = ["owning", "over"].contains(&state);
        assert_eq!(finishes(&effects), usize::from(!goes_on), "{state}");
        if !goes_on {
            for (name, event, at) in events() {
                assert!(
                    session.handle(event, at).is_empty(),
                    "{state}, failed, then {name}"
                );
            }
        }
    }
}

#[test]
fn every_state_has_a_deadline_until_the_guest_is_ours() {
    for (state, _) in states() {
        let mut session = state_after(state);
        let deadline = session.next_deadline();
        if state == "owning" {
            // Only the VMM is waited for, and no silence of the source changes what it has to do.
            assert_eq!(deadline, Duration::MAX);
            assert!(session.handle(Event::Tick, STALL * 100).is_empty());
            continue;
        }
        let suspended = state.contains("suspended");
        let most = if suspended {
            Config::default().suspend
        } else {
            STALL
        };
        assert!(deadline <= most + NOW, "{state}: {deadline:?}");
        assert!(
            session.handle(Event::Tick, deadline - MS).is_empty(),
            "{state}: too early"
        );
        let mut effects = session.handle(Event::Tick, deadline);
        if matches!(session.state, State::Suspended { .. }) {
            // A silent source may come back, but not for ever.
            let until = session.next_deadline();
            effects = session.handle(Event::Tick, until);
        }
        assert_eq!(finishes(&effects), usize::from(state != "over"), "{state}");
    }
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
        session.heard(STALL);
        assert!(
            session.handle(Event::Tick, STALL).is_empty(),
            "{state}: too early"
        );
        let words: Vec<String> = session
            .handle(Event::Tick, STALL + MS)
            .iter()
            .map(word)
            .collect();
        assert_eq!(
            words.last(),
            Some(&format!("finish: failed, {code}")),
            "{state}"
        );
    }
}

#[test]
fn the_peer_is_told_the_reason_phase_and_channel_unless_it_said_so_itself() {
    let mut session = state_after("rounds");
    let error = lost_channel().at(ChannelRef::Lane(LaneId::new(1)));
    let told = session.handle(Event::Failed(error), NOW);
    assert!(matches!(
        told.first(),
        Some(Effect::Abort {
            reason: Reason::ChannelsLost,
            phase: Phase::Rounds,
            channel: ChannelRef::Lane(_),
            ..
        })
    ));
    let mut session = state_after("rounds");
    let abort = Fault::PeerAborted {
        reason: Reason::Cancelled,
        text: "no".into(),
    };
    let told = session.handle(Event::Failed(Error::new(Phase::Rounds, abort)), NOW);
    assert_eq!(count(&told, |e| matches!(e, Effect::Abort { .. })), 0);
}

fn trace(events: impl IntoIterator<Item = Event>) -> Vec<String> {
    let mut session = Session::new(Config::default(), Duration::ZERO);
    events
        .into_iter()
        .flat_map(|event| session.handle(event, MS))
        .map(|effect| word(&effect))
        .collect()
}

const HAPPY: [&str; 10] = [
    "prepare",
    "READY",
    "close 0",
    "open 1",
    "close 1",
    "load 1",
    "PREPARED",
    "resume",
    "RUNNING",
    "finish: running",
];

#[test]
fn a_migration_goes_through_its_states_in_order() {
    assert_eq!(trace(happy_path()), HAPPY);
}

#[test]
fn nothing_is_prepared_before_both_the_state_and_every_device_are_loaded() {
    for both in [
        [Event::Loaded, Event::DevicesLoaded],
        [Event::DevicesLoaded, Event::Loaded],
    ] {
        let mut session = state_after("devices: loading");
        let [first, second] = both;
        assert!(session.handle(first, NOW).is_empty());
        let words: Vec<String> = session.handle(second, NOW).iter().map(word).collect();
        assert_eq!(words, ["PREPARED"]);
    }
    // Devices that were loaded early, and one of them again.
    let mut session = state_after("devices: rounds");
    assert!(session.handle(Event::DevicesLoaded, NOW).is_empty());
    assert!(session.handle(Event::DeviceRestarted, NOW).is_empty());
    for event in happy_path().into_iter().skip(4).take(9) {
        let words: Vec<String> = session.handle(event, NOW).iter().map(word).collect();
        assert!(!words.contains(&"PREPARED".to_owned()));
    }
    let words: Vec<String> = session
        .handle(Event::DevicesLoaded, NOW)
        .iter()
        .map(word)
        .collect();
    assert_eq!(words, ["PREPARED"]);
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
    let words: Vec<String> = session
        .handle(Event::Failed(Error::new(Phase::Commit, fault)), NOW)
        .iter()
        .map(word)
        .collect();
    assert_eq!(
        words,
        ["ABORT 9", "finish: stranded, receiver.device.failed"]
    );
}

#[test]
fn switchover_and_final_may_come_before_the_lanes_or_after_them() {
    let tail = || {
        [
            Event::Loaded,
            Event::Commit { digest: DIGEST },
            Event::Resumed,
        ]
    };
    let lanes = || [arrived(0, 1, true), arrived(1, 1, true), closed(0)];
    let head = || happy_path().into_iter().take(7);
    let orders: [Vec<Event>; 3] = [
        [switchover(1), final_of(1, DIGEST)]
            .into_iter()
            .chain(lanes())
            .collect(),
        lanes()
            .into_iter()
            .chain([switchover(1), final_of(1, DIGEST)])
            .collect(),
        [switchover(1)]
            .into_iter()
            .chain(lanes())
            .chain([final_of(1, DIGEST)])
            .collect(),
    ];
    for order in orders {
        assert_eq!(trace(head().chain(order).chain(tail())), HAPPY);
    }
    // Even before the live round is closed: the source does not wait for it.
    let early = happy_path()
        .into_iter()
        .take(4)
        .chain([switchover(1), final_of(1, DIGEST)]);
    let rest = [arrived(0, 0, false), arrived(1, 0, false), closed(0)];
    assert_eq!(trace(early.chain(rest).chain(lanes()).chain(tail())), HAPPY);
}

#[test]
fn the_gate_to_a_further_round_opens_with_its_switchover_and_not_before() {
    let mut session = state_after("fenced, damaged, FINAL");
    let words: Vec<String> = session
        .handle(switchover(2), NOW)
        .iter()
        .map(word)
        .collect();
    assert_eq!(words, ["open 2"]);
    // Two rounds were announced while the first was still being read.
    let mut session = state_after("rounds, paused, closing");
    assert!(session.handle(switchover(2), NOW).is_empty());
    assert!(session.handle(switchover(3), NOW).is_empty());
    let words: Vec<String> = session.handle(closed(1), NOW).iter().map(word).collect();
    assert_eq!(words, ["open 2"]);
    let _ = session.handle(arrived(0, 2, true), NOW);
    let _ = session.handle(arrived(1, 2, true), NOW);
    let words: Vec<String> = session.handle(closed(0), NOW).iter().map(word).collect();
    assert_eq!(words, ["open 3"]);
}

/// SPEC: RESUME-7. Of a ROUND_CLOSED that could not be sent nobody knows how much was read.
#[test]
fn a_round_that_was_being_closed_when_the_channel_was_lost_is_closed() {
    for (name, open) in [("rounds", 0), ("rounds, closing", 1), ("fenced", 2)] {
        let mut session = state_after(name);
        let _ = session.handle(lost(), NOW);
        assert_eq!(session.round(), Round::new(open), "{name}");
    }
}

#[test]
fn an_end_mark_that_contradicts_switchover_ends_it() {
    // Round 1 was announced as paused, but its marks say live.
    let live = [arrived(0, 1, false), arrived(1, 1, false), closed(0)];
    let words = trace(happy_path().into_iter().take(8).chain(live));
    assert_eq!(
        words.last().unwrap(),
        "finish: failed, receiver.misbehaved.out-of-turn"
    );
    // Round 2 was announced, but already round 1 says paused.
    let early = [
        switchover(2),
        arrived(0, 1, true),
        arrived(1, 1, true),
        closed(0),
    ];
    let words = trace(happy_path().into_iter().take(7).chain(early));
    assert_eq!(
        words.last().unwrap(),
        "finish: failed, receiver.misbehaved.out-of-turn"
    );
    // The lanes disagree.
    let split = [arrived(0, 1, true), arrived(1, 1, false), closed(0)];
    let words = trace(happy_path().into_iter().take(8).chain(split));
    assert_eq!(
        words.last().unwrap(),
        "finish: failed, receiver.misbehaved.out-of-turn"
    );
}

#[test]
fn a_lost_lane_is_waited_for_no_longer_and_without_any_one_is_waited_for() {
    for (state, _) in states() {
        let mut session = state_after(state);
        let _ = session.handle(ended(1), NOW);
        let effects = session.handle(ended(0), NOW);
        let in_setup = ["set-up, tables", "set-up, machine and a lane"].contains(&state);
        assert_eq!(
            matches!(session.state, State::Over),
            in_setup || state == "over",
            "{state}: {effects:?}"
        );
        // The fence of a round without lanes does not fall by itself.
        let closes = count(&effects, |e| matches!(e, Effect::CloseRound { .. }));
        assert_eq!(closes, 0, "{state}");
    }
    let mut session = state_after("rounds, lane 0 at the fence");
    let words: Vec<String> = session.handle(ended(1), NOW).iter().map(word).collect();
    assert_eq!(words, ["close 0"]);
}

#[test]
fn without_any_lane_it_ends_at_once_if_nothing_is_kept_and_otherwise_at_the_deadline() {
    let config = |suspend| Config::builder().suspend(suspend).build().unwrap();
    let lost = |suspend| {
        let mut session = Session::new(config(suspend), Duration::ZERO);
        for event in happy_path().into_iter().take(4) {
            let _ = session.handle(event, MS);
        }
        let _ = session.handle(ended(1), NOW);
        let words = session.handle(ended(0), NOW).iter().map(word).collect();
        (session, words)
    };
    let (_, words): (_, Vec<String>) = lost(Duration::ZERO);
    let over = [
        "ABORT 18",
        "discard",
        "finish: failed, receiver.channel.all-lanes-lost",
    ];
    assert_eq!(words, over);
    let (mut session, words): (_, Vec<String>) = lost(2 * STALL);
    assert!(words.is_empty());
    session.heard(2 * STALL);
    assert_eq!(session.next_deadline(), NOW + 2 * STALL);
    let words: Vec<String> = session
        .handle(Event::Tick, NOW + 2 * STALL)
        .iter()
        .map(word)
        .collect();
    assert_eq!(words, over);
}

#[test]
fn a_lane_that_joins_again_is_waited_for_at_the_fence() {
    let mut session = state_after("rounds, lane 0 at the fence");
    assert_eq!(session.entry(LaneId::new(1)), Entry::Refused, "it lives");
    let _ = session.handle(ended(0), NOW);
    assert_eq!(
        session.entry(LaneId::new(0)),
        Entry::Round(Round::new(0)),
        "lost in round 0"
    );
    assert!(session.handle(joined(0), NOW).is_empty());
    assert!(session.handle(arrived(1, 0, false), NOW).is_empty());
    let words: Vec<String> = session
        .handle(arrived(0, 0, false), NOW)
        .iter()
        .map(word)
        .collect();
    assert_eq!(words, ["close 0"]);
    // With the gate shut it comes in behind the fence.
    let mut session = state_after("fenced");
    let _ = session.handle(ended(0), NOW);
    assert_eq!(
        session.entry(LaneId::new(0)),
        Entry::BehindFence(Round::new(2))
    );
    let _ = session.handle(joined(0), NOW);
    let _ = session.handle(switchover(2), NOW);
    assert!(session.handle(arrived(1, 2, true), NOW).is_empty());
    assert_eq!(session.handle(arrived(0, 2, true), NOW).len(), 1);
}

#[test]
fn signs_of_life_alone_are_not_enough() {
    for (state, _) in states() {
        let mut session = state_after(state);
        let late = Config::default().progress_deadline + MS;
        session.heard(late);
        let ends = finishes(&session.handle(Event::Tick, late)) == 1;
        assert_eq!(
            ends,
            !["loading", "owning", "over"].contains(&state)
                && !state.ends_with("resumed, tables")
                && !state.starts_with("devices: loading"),
            "{state}"
        );
    }
}

#[test]
fn digests_that_differ_end_it_at_once_unless_a_lane_was_lost() {
    let mut session = state_after("fenced");
    let words: Vec<String> = session
        .handle(final_of(1, OTHER_DIGEST), NOW)
        .iter()
        .map(word)
        .collect();
    assert_eq!(
        words,
        [
            "ABORT 7",
            "discard",
            "finish: failed, receiver.digest-mismatch"
        ]
    );
    // A lane that died before SWITCHOVER was read, but too late for the source to know when it sent FINAL.
    let events = happy_path().into_iter().take(7).chain([
        ended(1),
        switchover(1),
        arrived(0, 1, true),
        closed(0),
        final_of(1, OTHER_DIGEST),
    ]);
    let mut session = after(events);
    assert!(matches!(
        session.state,
        State::Fenced {
            short_since: Some(_),
            ..
        }
    ));
    let words: Vec<String> = session
        .handle(switchover(2), NOW)
        .iter()
        .map(word)
        .collect();
    assert_eq!(words, ["open 2"]);
}

#[test]
fn a_device_that_is_not_whole_at_the_end_is_named_or_waited_for_if_a_lane_was_lost() {
    let mut events = happy_path();
    events.truncate(4);
    events.extend([switchover(0), arrived(0, 0, true), arrived(1, 0, true)]);
    let mut session = after(events);
    let _ = session.handle(closed_without_device(), NOW);
    let words: Vec<String> = session
        .handle(final_of(0, DIGEST), NOW)
        .iter()
        .map(word)
        .collect();
    assert!(words[0].starts_with("ABORT 3"), "{words:?}");
    assert!(
        words
            .iter()
            .any(|word| word.contains("wire.misbehaved.device-stream")),
        "{words:?}"
    );
    // A lane that was lost may have carried it: the source begins a further round, or is told after a while.
    let mut events = happy_path();
    events.truncate(4);
    events.extend([ended(1), switchover(0), arrived(0, 0, true)]);
    let mut session = after(events);
    let _ = session.handle(closed_without_device(), NOW);
    assert!(session.handle(final_of(0, DIGEST), NOW).is_empty());
    let words: Vec<String> = session
        .handle(switchover(1), NOW)
        .iter()
        .map(word)
        .collect();
    assert_eq!(words, ["open 1"]);
}

/// What the driver or a good source would do next.
fn expected(session: &Session) -> Event {
    match &session.state {
        State::Setup(setup) if setup.lanes.is_none() => Event::SetupEnd { lanes: 2 },
        State::Setup(setup) if !setup.machine => Event::MachineReady,
        State::Setup(_) if session.lanes[0] == Fate::Expected => joined(0),
        State::Setup(_) => joined(1),
        State::Rounds if session.closing => closed(0),
        State::Rounds => {
            let round = session.round.value();
            let lane = u32::from(session.lanes[0] != Fate::InRound);
            arrived(
                lane,
                round,
                session
                    .paused_from
                    .is_some_and(|from| from <= session.round),
            )
        }
        State::Fenced { round, .. } => match session.switchover {
            Some(newest) if newest == *round => final_of(newest.value(), DIGEST),
            _ => switchover(round.value()),
        },
        State::Suspended { .. } => Event::Resuming,
        State::Loading { .. } => Event::Loaded,
        State::Prepared(_) => Event::Commit { digest: DIGEST },
        State::Owning | State::Over => Event::Resumed,
    }
}

proptest! {
    /// Whatever happens in whatever order: no panic, one end, no guest without PREPARED and a COMMIT of the same digest.
    #[test]
    fn no_order_of_events_starts_a_guest_that_is_not_ours(
        walk in proptest::collection::vec((0u8..4, any::<prop::sample::Index>(), 0u64..3000), 1..80),
        is_kept in any::<bool>(),
    ) {
        let mut session = Session::new(Config::default(), Duration::ZERO);
        if is_kept {
            session.keep();
        }
        let (mut now, mut prepared, mut resumed, mut ended) = (Duration::ZERO, None, false, 0);
        let mut refused = false;
        for (mood, index, pause_ms) in walk {
            now += MS * u32::try_from(pause_ms / 10).unwrap();
            session.heard(now);
            let mut choices = events();
            let event = if mood > 0 {
                expected(&session)
            } else {
                choices.swap_remove(index.index(choices.len())).1
            };
            let committed = if let Event::Commit { digest } = &event { Some(*digest) } else { None };
            for effect in session.handle(event, now) {
                match effect {
                    Effect::SendPrepared { digest } => {
                        prop_assert!(prepared.is_none(), "prepared twice");
                        prepared = Some(digest);
                    }
                    // What was prepared is void.
                    Effect::Suspend => prepared = None,
                    Effect::Answer(OutcomeState::NotCommitted) => {
                        prop_assert!(!resumed);
                        refused = true;
                    }
                    Effect::Resume(_) => {
                        prop_assert!(!refused, "run after it was said that it never will be");
                        prop_assert!(!resumed && prepared.is_some() && committed == prepared);
                        resumed = true;
                    }
                    Effect::Discard => prop_assert!(!resumed, "discarded a guest that is ours"),
                    Effect::Finish(outcome) => {
                        ended += 1;
                        prop_assert_eq!(resumed, !matches!(outcome, Outcome::Failed(_)));
                    }
                    _ => prop_assert_eq!(ended, 0),
                }
            }
            prop_assert!(ended <= 1);
            prop_assert_eq!(ended == 1, matches!(session.state, State::Over));
        }
    }
}

#[test]
fn a_session_that_is_not_kept_ends_with_its_channels() {
    for (event, code) in [(lost(), "receiver.timeout")] {
        let mut session = Session::new(Config::default(), Duration::ZERO);
        for event in happy_path().into_iter().take(5) {
            let _ = session.handle(event, MS);
        }
        assert!(!session.may_be_resumed());
        let words: Vec<String> = session.handle(event, NOW).iter().map(word).collect();
        assert_eq!(words.last().unwrap(), &format!("finish: failed, {code}"));
    }
}

#[test]
fn a_resumed_session_goes_on_with_the_first_round_that_is_not_closed() {
    for (state, round) in [("suspended in round 0", 0), ("suspended after PREPARED", 2)] {
        let mut session = state_after(state);
        let mut words = Vec::new();
        for event in [
            Event::Resuming,
            Event::SetupEnd { lanes: 1 },
            joined(0),
            arrived(0, round, false),
            closed(0),
        ] {
            words.extend(session.handle(event, NOW).iter().map(word));
        }
        let [close, open] = [format!("close {round}"), format!("open {}", round + 1)];
        assert_eq!(
            words,
            ["prepare", "READY", "LANDED", &close, &open],
            "{state}"
        );
    }
}

#[test]
fn one_lane_is_enough_on_the_way_back_and_the_others_join_the_round() {
    let mut session = state_after("suspended in round 0");
    let mut words = |event| -> (Vec<String>, [Entry; 3]) {
        let words = session.handle(event, NOW).iter().map(word).collect();
        let entries = [0, 1, 2].map(|lane| session.entry(LaneId::new(lane)));
        (words, entries)
    };
    let _ = words(Event::Resuming);
    assert_eq!(
        words(Event::SetupEnd { lanes: 3 }),
        (vec!["prepare".to_owned()], [Entry::Setup; 3])
    );
    let (round, living) = (Entry::Round(Round::new(0)), Entry::Refused);
    assert_eq!(
        words(joined(2)),
        (
            vec!["READY".into(), "LANDED".into()],
            [round, round, living]
        )
    );
    assert_eq!(words(joined(0)), (vec![], [living, round, living]));
    // The fence waits for those that are here, and for no other.
    assert_eq!(words(arrived(2, 0, false)).0, Vec::<String>::new());
    assert_eq!(words(arrived(0, 0, false)).0, ["close 0"]);
    assert_eq!(words(closed(0)).0, ["open 1"]);
    let next = Entry::Round(Round::new(1));
    assert_eq!(words(joined(1)).1, [living; 3]);
    assert_eq!(words(ended(0)).1, [next, living, living]);
}

#[test]
fn a_set_up_that_was_lost_before_ready_is_made_with_all_lanes() {
    let mut session = Session::new(Config::default(), Duration::ZERO);
    session.keep();
    for event in [
        Event::SetupEnd { lanes: 2 },
        Event::MachineReady,
        joined(0),
        lost(),
        Event::Resuming,
        Event::SetupEnd { lanes: 2 },
        joined(1),
    ] {
        let words: Vec<String> = session.handle(event, NOW).iter().map(word).collect();
        assert!(!words.contains(&"READY".to_owned()), "{words:?}");
    }
    let words: Vec<String> = session.handle(joined(0), NOW).iter().map(word).collect();
    assert_eq!(words, ["READY", "LANDED"]);
}

#[test]
fn what_is_suspended_is_freed_at_the_deadline_and_not_before() {
    let mut session = state_after("suspended in round 0");
    let until = session.next_deadline();
    assert_eq!(until, MS + Config::default().suspend);
    assert!(session.handle(Event::Tick, until - MS).is_empty());
    let words: Vec<String> = session
        .handle(Event::Tick, until)
        .iter()
        .map(word)
        .collect();
    assert_eq!(words[1..], ["discard", "finish: failed, receiver.timeout"]);
}

#[test]
fn whoever_was_told_not_committed_is_never_run_here() {
    for (state, _) in states() {
        let mut session = state_after(state);
        let answers = session.handle(Event::Asked, NOW);
        if count(&answers, |e| {
            matches!(e, Effect::Answer(OutcomeState::NotCommitted))
        }) == 0
        {
            assert!(["owning", "over"].contains(&state), "{state}");
            continue;
        }
        for (name, event, at) in events() {
            assert!(
                session.handle(event, at).is_empty(),
                "{state}, asked, {name}"
            );
        }
    }
}
