//! The table of a lane's lives and events, printed and compared with `table.txt`; and what must hold of all lanes together.

use multifd_wire::frame::LaneDown;
use multifd_wire::{Incompatible, Phase, Reason, Token};

use super::watch::{FIRST_ACK, PAUSED_ALONE_MAX, WATCH_PERIOD};
use super::*;
use crate::common::ChannelFault;
use crate::source::control::Timing;
use crate::source::hello::{Hellos, Lasts, NotOpened};

const MS: Duration = Duration::from_millis(1);
const STALL: Duration = Duration::from_secs(2);
const RECONNECT: Duration = Duration::from_secs(5);
const HELLO: Duration = Duration::from_secs(3);
const ONE: LaneId = LaneId::new(0);
const OTHER: LaneId = LaneId::new(1);

fn view() -> View {
    View {
        phase: Phase::Rounds,
        needs_lanes: true,
        rejoining: false,
        begun: true,
        kept: true,
        committed: false,
        rounds_closed: 0,
        paused_from: None,
        bandwidth: Some(1e9),
        body_bytes: 262_144.0,
        reconnect: RECONNECT,
        stall: STALL,
        hellos: Hellos::new(Token::NONE, RECONNECT),
        timing: Timing {
            hello: HELLO,
            round_trip: None,
        },
    }
}

fn first() -> Incarnation {
    Incarnation::new(0)
}

fn reset() -> Option<Fault> {
    let fault = ChannelFault::new("channel-reset", false, "the connection was reset");
    Some(Fault::Channel(fault))
}

fn refused(lasts: Lasts) -> NotOpened {
    NotOpened::unconnected("connection refused".into(), lasts)
}

fn first_set_up() -> View {
    View {
        phase: Phase::Setup,
        begun: false,
        ..view()
    }
}

fn down(incarnation: Incarnation) -> LaneDown {
    LaneDown {
        lane: ONE,
        incarnation,
        reason: Reason::ChannelsLost,
    }
}

/// So many lanes, open, in round 0.
fn open(count: u32) -> Lanes {
    let mut lanes = Lanes::default();
    let dialled = lanes.dial(count, &view(), Duration::ZERO);
    assert_eq!(dialled.len(), count as usize);
    for lane in (0..count).map(LaneId::new) {
        let steps = lanes.up(lane, first(), &view(), Duration::ZERO);
        assert!(steps.effects.is_empty() && steps.end.is_none());
    }
    lanes.opened(Round::new(0));
    lanes
}

/// Loses lane 0 here, and lets the destination settle it.
fn lose(lanes: &mut Lanes, incarnation: Incarnation, now: Duration) {
    let _ = lanes.ended(ONE, incarnation, reset(), &view(), now);
    let _ = lanes.down(down(incarnation), &view(), now).unwrap();
}

/// Dials lane 0 again, which is due, and opens it.
fn again(lanes: &mut Lanes, now: Duration) -> Incarnation {
    let steps = lanes.tick(&view(), now);
    let dialled = steps.effects.iter().find_map(|effect| match effect {
        Effect::DialLane { incarnation, .. } => Some(*incarnation),
        _ => None,
    });
    let incarnation = dialled.expect("it is due");
    let _ = lanes.up(ONE, incarnation, &view(), now);
    incarnation
}

fn unacked(lane: LaneId, bytes: u64) -> Seen {
    Seen {
        lane,
        acked: 0,
        oldest: Some(Round::new(0)),
        unacked_bytes: bytes,
    }
}

fn words(steps: &Steps) -> String {
    let mut words: Vec<String> = steps.effects.iter().map(word).collect();
    match &steps.end {
        Some(End::Lost(error)) => words.push(format!("all lost, {}", error.code())),
        Some(End::Failed(error)) => words.push(format!("failed, {}", error.code())),
        None => {}
    }
    if words.is_empty() {
        words.push("ignored".into());
    }
    words.join("; ")
}

fn word(effect: &Effect) -> String {
    match effect {
        Effect::DialLane {
            lane, incarnation, ..
        } => format!("dial {lane}.{incarnation}"),
        Effect::LaneBack { behind, .. } => format!("enter, {} rounds behind", behind.len()),
        Effect::CloseLane { .. } => "close".into(),
        Effect::LaneGone { .. } => "gone".into(),
        Effect::SettleLane { .. } => "settle".into(),
        Effect::Send(frame) => frame.kind().name().into(),
        Effect::LookAtLanes => "look".into(),
        other => format!("{other:?}"),
    }
}

#[test]
fn the_table_of_lives_and_events() {
    use std::fmt::Write as _;
    type Make = fn() -> Lanes;
    let dialling: Make = || {
        let mut lanes = Lanes::default();
        let _ = lanes.dial(2, &view(), Duration::ZERO);
        lanes
    };
    let dying: Make = || {
        let mut lanes = open(2);
        let _ = lanes.ended(ONE, first(), reset(), &view(), MS);
        lanes
    };
    let dead: Make = || {
        let mut lanes = open(2);
        lose(&mut lanes, first(), MS);
        lanes
    };
    let redialling: Make = || {
        let mut lanes = open(2);
        lose(&mut lanes, first(), MS);
        let _ = lanes.tick(&view(), 2 * MS);
        lanes
    };
    let last_alive: Make = || open(1);
    let due: Make = || {
        let mut lanes = Lanes::default();
        let _ = lanes.dial(2, &view(), Duration::ZERO);
        let _ = lanes.unopened(ONE, first(), refused(Lasts::MayPass), &first_set_up(), MS);
        lanes
    };
    let states: [(&str, Make); 7] = [
        ("dialling", dialling),
        ("dialled in vain", due),
        ("alive", || open(2)),
        ("alive, the last", last_alive),
        ("dying", dying),
        ("dead", dead),
        ("redialling", redialling),
    ];
    let mut table = String::new();
    for (name, make) in states {
        writeln!(table, "{name}").unwrap();
        for (situation, view) in [
            ("rounds", view()),
            (
                "set-up",
                View {
                    phase: Phase::Setup,
                    begun: false,
                    ..view()
                },
            ),
            (
                "coming back",
                View {
                    phase: Phase::Setup,
                    rejoining: true,
                    ..view()
                },
            ),
            (
                "rounds, no reconnecting",
                View {
                    reconnect: Duration::ZERO,
                    ..view()
                },
            ),
        ] {
            writeln!(table, "    {situation}").unwrap();
            let newest = |lanes: &mut Lanes| lanes.get(ONE).unwrap().incarnation;
            let mut print = |event: &str, steps: Steps, lanes: &mut Lanes| {
                let life = format!("{:?}", lanes.get(ONE).unwrap().life);
                let life = life.split([' ', '{']).next().unwrap_or_default().to_owned();
                writeln!(table, "        {event:12} {} -> {life}", words(&steps)).unwrap();
            };
            let now = 30 * MS;
            let mut lanes = make();
            let incarnation = newest(&mut lanes);
            let steps = lanes.up(ONE, incarnation, &view, now);
            print("open", steps, &mut lanes);
            let mut lanes = make();
            let steps = lanes.ended(ONE, incarnation, reset(), &view, now);
            print("failed", steps, &mut lanes);
            let mut lanes = make();
            let steps = lanes.ended(ONE, incarnation, None, &view, now);
            print("ended", steps, &mut lanes);
            for (name, lasts) in [("vain", Lasts::MayPass), ("vain, good", Lasts::ForGood)] {
                let mut lanes = make();
                let steps = lanes.unopened(ONE, incarnation, refused(lasts), &view, now);
                print(name, steps, &mut lanes);
            }
            let mut lanes = make();
            let steps = lanes.down(down(incarnation), &view, now).unwrap();
            print("LANE_DOWN", steps, &mut lanes);
            let mut lanes = make();
            let steps = lanes.tick(&view, now);
            print("tick", steps, &mut lanes);
        }
    }
    assert_eq!(table, include_str!("table.txt"));
}

#[test]
fn a_lane_that_does_not_exist_or_a_connection_to_come_is_the_destinations_fault() {
    let mut lanes = open(1);
    assert!(lanes.known(ONE, first()).is_ok());
    assert!(lanes.known(OTHER, first()).is_err());
    assert!(lanes.known(ONE, Incarnation::new(1)).is_err());
    assert!(lanes.was_known(ONE, Incarnation::new(1)).is_err());
    assert!(lanes.down(down(Incarnation::new(1)), &view(), MS).is_err());
    lose(&mut lanes, first(), MS);
    let second = again(&mut lanes, 2 * MS);
    assert!(lanes.known(ONE, first()).is_err());
    assert!(lanes.was_known(ONE, first()).is_ok());
    // Old news of a connection that was settled.
    let steps = lanes.down(down(first()), &view(), 3 * MS).unwrap();
    assert_eq!(words(&steps), "ignored");
    assert!(lanes.known(ONE, second).is_ok());
}

#[test]
fn a_round_is_encoded_when_each_living_lane_says_so_and_no_lost_one_is_unsettled() {
    let mut lanes = open(2);
    lanes.encoded(ONE, first(), Round::new(0));
    assert!(lanes.check_encoded().is_none());
    let _ = lanes.ended(OTHER, first(), reset(), &view(), MS);
    assert!(
        lanes.check_encoded().is_none(),
        "what it carried may come back"
    );
    let settled = LaneDown {
        lane: OTHER,
        ..down(first())
    };
    let _ = lanes.down(settled, &view(), MS).unwrap();
    assert!(lanes.check_encoded().is_some());
    assert!(lanes.check_encoded().is_none(), "it is said once");
}

#[test]
fn a_lane_that_comes_back_ends_the_rounds_that_may_not_be_closed_and_says_in_which_the_guest_was_paused()
 {
    let mut lanes = open(2);
    lose(&mut lanes, first(), MS);
    lanes.opened(Round::new(3));
    let view = View {
        rounds_closed: 1,
        paused_from: Some(Round::new(2)),
        ..view()
    };
    let _ = lanes.tick(&view, 2 * MS);
    let steps = lanes.up(ONE, Incarnation::new(1), &view, 3 * MS);
    let Some(Effect::LaneBack { behind, .. }) = steps.effects.first() else {
        panic!("{steps:?}");
    };
    assert_eq!(*behind, [(Round::new(1), false), (Round::new(2), true)]);
}

#[test]
fn a_lane_is_lost_however_often_as_long_as_bytes_are_acknowledged_between_the_losses() {
    let (mut lanes, mut incarnation, mut now) = (open(1), first(), Duration::ZERO);
    // Ten times a second, for two minutes.
    for _ in 0..1200 {
        now += 50 * MS;
        let _ = lanes.seen(&[unacked(ONE, 1 << 20)], &view(), now);
        lanes.took();
        lose(&mut lanes, incarnation, now);
        now += 50 * MS;
        incarnation = again(&mut lanes, now);
        let steps = lanes.tick(&view(), now);
        assert!(steps.end.is_none(), "{}", words(&steps));
    }
}

#[test]
fn lanes_that_open_and_carry_nothing_end_within_the_stall_and_the_reconnect_time() {
    let (mut lanes, mut incarnation, mut now) = (open(1), first(), Duration::ZERO);
    let bound = STALL + RECONNECT + FIRST_ACK + WATCH_PERIOD;
    let end = loop {
        now += 100 * MS;
        assert!(now < bound + 100 * MS, "still going on after {now:?}");
        let _ = lanes.seen(&[unacked(ONE, 1 << 20)], &view(), now);
        let steps = lanes.tick(&view(), now);
        if let Some(end) = steps.end {
            break end;
        }
        // Each connection takes its hello and nothing more.
        if now.as_millis().is_multiple_of(2000) {
            lose(&mut lanes, incarnation, now);
            incarnation = again(&mut lanes, now);
        }
    };
    assert!(now >= STALL + RECONNECT);
    let End::Failed(error) = end else {
        panic!("{end:?}");
    };
    assert_eq!(error.code(), "sender.channel.nothing-taken");
    assert!(error.to_string().contains("MTU"), "{error}");
}

#[test]
fn a_lane_that_is_silent_while_nothing_is_lost_is_given_up_after_a_stall_and_not_the_migration() {
    let mut lanes = open(2);
    let both = [unacked(ONE, 9), unacked(OTHER, 9)];
    let _ = lanes.seen(&both, &view(), Duration::ZERO);
    assert!(lanes.seen(&both, &view(), STALL).is_empty());
    let closed = lanes.seen(&both, &view(), STALL + MS);
    assert_eq!(closed.len(), 2, "dead, both");
    assert!(lanes.starves_at(&view()).is_none(), "none is lost yet");
}

#[test]
fn a_slow_lane_is_no_dead_one() {
    let mut lanes = open(2);
    for step in 0..100u64 {
        let moves = Seen {
            acked: step,
            ..unacked(ONE, 9)
        };
        let now = MS * 500 * u32::try_from(step).unwrap();
        assert!(lanes.seen(&[moves], &view(), now).is_empty());
    }
}

#[test]
fn landed_settles_the_connection_before_and_no_other() {
    let mut lanes = open(2);
    lanes.disconnect();
    let view = View {
        phase: Phase::Setup,
        rejoining: true,
        ..view()
    };
    assert_eq!(lanes.dial_all_again(&view, MS).len(), 2);
    let newer = lanes.landed(|_| Some((Incarnation::new(1), 5)));
    assert!(newer.is_err(), "nothing was sent on that connection");
    let settled = lanes.landed(|lane| (lane == ONE).then_some((first(), 5)));
    assert_eq!(settled.unwrap(), [(ONE, 5), (OTHER, 0)]);
    assert_eq!(lanes.landed(|_| None).unwrap(), [], "once");
}

#[test]
fn a_first_connection_that_is_lost_loses_the_set_up_and_not_the_migration() {
    let mut lanes = Lanes::default();
    let _ = lanes.dial(1, &view(), Duration::ZERO);
    let view = View {
        phase: Phase::Setup,
        begun: false,
        ..view()
    };
    let steps = lanes.ended(ONE, first(), reset(), &view, MS);
    assert!(matches!(steps.end, Some(End::Lost(_))), "{steps:?}");
    // The destination lost the control channel first, and with it the ticket (SPEC: RESUME-13).
    let stale = Some(Fault::Refused {
        reason: Reason::BadTicket,
        text: "not here".into(),
    });
    let steps = lanes.ended(ONE, first(), stale, &view, MS);
    assert!(matches!(steps.end, Some(End::Lost(_))), "{steps:?}");
    // It was tried for as long as a hello may take.
    let refused = Some(Fault::Dial("connection refused".into()));
    let steps = lanes.ended(ONE, first(), refused, &view, MS);
    assert!(matches!(steps.end, Some(End::Failed(_))), "{steps:?}");
}

#[test]
fn a_first_connection_is_tried_again_for_what_may_pass_until_the_deadline_and_then_ends_with_what_it_was()
 {
    let mut lanes = Lanes::default();
    let _ = lanes.dial(1, &first_set_up(), Duration::ZERO);
    let (mut now, mut tries, mut newest) = (MS, 1, first());
    let error = loop {
        let steps = lanes.unopened(ONE, newest, refused(Lasts::MayPass), &first_set_up(), now);
        match steps.end {
            Some(End::Failed(error)) => break error,
            end => assert!(end.is_none(), "{end:?}"),
        }
        assert!(lanes.dialling(), "it is still to be opened");
        now = lanes.due(&first_set_up());
        let steps = lanes.tick(&first_set_up(), now);
        let Some(Effect::DialLane {
            attempt,
            incarnation,
            ..
        }) = steps.effects.first()
        else {
            panic!("{steps:?}");
        };
        // SPEC: JOIN-3
        assert_eq!(incarnation.value(), newest.value() + 1);
        newest = *incarnation;
        assert_eq!((attempt.connect_by, attempt.answer_by), (HELLO, HELLO));
        tries += 1;
    };
    assert!(now < HELLO && tries > 10, "{tries} in {now:?}");
    assert_eq!(error.code(), "sender.channel.dial");
    // That time ran out says less than what was wrong before.
    let mut lanes = Lanes::default();
    let _ = lanes.dial(1, &first_set_up(), Duration::ZERO);
    let _ = lanes.unopened(ONE, first(), refused(Lasts::MayPass), &first_set_up(), MS);
    let _ = lanes.tick(&first_set_up(), 100 * MS);
    let late = ChannelFault::new("channel-deadline", false, "late");
    let late = NotOpened::unanswered("tcp:a:1".into(), Fault::Channel(late));
    let steps = lanes.unopened(ONE, Incarnation::new(1), late, &first_set_up(), HELLO);
    let Some(End::Failed(error)) = steps.end else {
        panic!("{steps:?}");
    };
    assert_eq!(error.code(), "sender.channel.dial");
}

#[test]
fn a_refusal_behind_an_answer_that_was_lost_loses_the_set_up_and_not_the_migration() {
    let no = || {
        let (reason, text) = (Reason::ShuttingDown, "not wanted now".into());
        NotOpened::from(Incompatible::Refused { reason, text })
    };
    let silence = || {
        let closed = ChannelFault::new("channel-closed", false, "closed");
        NotOpened::unanswered("tcp:a:1".into(), Fault::Channel(closed))
    };
    for (before, lost) in [(silence(), true), (refused(Lasts::MayPass), false)] {
        let mut lanes = Lanes::default();
        let _ = lanes.dial(1, &first_set_up(), Duration::ZERO);
        let steps = lanes.unopened(ONE, first(), before, &first_set_up(), MS);
        assert!(steps.end.is_none(), "{steps:?}");
        let _ = lanes.tick(&first_set_up(), 100 * MS);
        let steps = lanes.unopened(ONE, Incarnation::new(1), no(), &first_set_up(), 101 * MS);
        assert_eq!(matches!(steps.end, Some(End::Lost(_))), lost, "{steps:?}");
        assert_eq!(
            matches!(steps.end, Some(End::Failed(_))),
            !lost,
            "{steps:?}"
        );
    }
}

#[test]
fn with_the_guest_paused_and_no_lane_left_the_guest_runs_again_soon() {
    let paused = View {
        phase: Phase::Switchover,
        ..view()
    };
    let mut lanes = open(1);
    let _ = lanes.ended(ONE, first(), reset(), &paused, MS);
    assert!(lanes.due(&paused) <= MS + PAUSED_ALONE_MAX);
    assert!(lanes.tick(&paused, 300 * MS).end.is_none());
    let steps = lanes.tick(&paused, 301 * MS);
    assert!(matches!(steps.end, Some(End::Lost(_))), "{steps:?}");
}
