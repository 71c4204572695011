//! The table of states and events, printed and compared with `table.txt`; what must hold of it; traces, bounds, random walks.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::time::DEAD_LANE_STALLS;
use super::*;
use crate::common::ChannelFault;
use crate::source::config::{WhenAckLate, WhenDestinationLost, WhenNotConverging};
use crate::source::speed::LaneCount;
use crate::source::steer::{Sending, Steer};
use crate::source::{Lasts, NotOpened};
use multifd_wire::frame::{Asks, Grant, KeepAlive, OutcomeState};
use multifd_wire::{ChannelRef, Features, Frame, Incompatible, Reason, SessionId, Token};

const MS: Duration = Duration::from_millis(1);
const STALL: Duration = Duration::from_secs(10);
const COMMIT_DEADLINE: Duration = Duration::from_secs(30);
const DIGEST: u64 = 0xd1;
const OTHER_DIGEST: u64 = 0xd2;

/// Lost is lost. See [`kept`] for the others.
fn config() -> Config {
    Config::builder()
        .reconnect_deadline(Duration::ZERO)
        .build()
        .unwrap()
}

fn keeping(choice: WhenDestinationLost) -> Config {
    Config::builder()
        .reconnect_deadline(KEPT)
        .when_destination_lost(choice)
        .build()
        .unwrap()
}

fn failure() -> Event {
    Event::Failed(Error::new(
        Phase::Rounds,
        Fault::Tracking("the ring overflowed".into()),
    ))
}

/// A session at time zero that was led along the happy path by so many of its steps.
fn after(steps: usize) -> Session {
    match steps {
        DRAINING => draining(),
        HELLO => dialling(config()),
        LAST_WORD => kept(6, vec![lost(), Event::Cancel]),
        OVER => {
            let mut session = led(config(), 13);
            let _ = session.handle(Event::Tick, NOW);
            session
        }
        SUSPENDED => kept(6, vec![lost()]),
        REJOINING => kept(3, vec![lost(), connected(), Event::Granted]),
        ASKING => kept(12, vec![lost()]),
        WAITING => with_devices(5),
        DEVICES_PAUSING => with_devices(7),
        QUIESCING => with_devices(8),
        STOPPING => with_devices(9),
        DEVICES_COLLECTING => with_devices(10),
        DEVICES_LAST => with_devices(11),
        DEVICES_SAVED => with_devices(12),
        DEVICES_SUSPENDED => devices_kept(11, vec![lost()]),
        DEVICES_REJOINING => devices_kept(11, vec![lost(), connected(), Event::Granted]),
        _ => led(config(), steps),
    }
}

fn connected() -> Event {
    Event::Connected {
        agreed: Features::RESUME.union(Features::DEVICE_STATE),
        round_trip: MS,
    }
}

fn not_connected(lasts: Lasts) -> Event {
    Event::NotConnected {
        number: 1,
        why: NotOpened::unconnected("nobody listens".into(), lasts),
    }
}

/// A session that dials for the first time.
fn dialling(config: Config) -> Session {
    let mut session = Session::new(config, 1 << 20, Duration::ZERO);
    let _ = session.handle(event("named").0, Duration::ZERO);
    dials(&mut session, Duration::ZERO);
    session
}

/// Makes the attempt to connect that is due, if one is.
fn dials(session: &mut Session, now: Duration) {
    let timing = session.timing();
    let effect = session.control.tick(&session.hellos, &timing, now);
    let phase = session.phase();
    assert!(
        effect.is_none_or(|effect| match effect {
            Effect::DialControl { purpose, .. } => match phase {
                Phase::Hello => purpose == Purpose::Start,
                Phase::Suspended | Phase::Done => purpose == Purpose::Resume,
                _ => purpose == Purpose::Ask,
            },
            _ => false,
        }),
        "{phase:?}"
    );
}

/// A session that is open, with what a grant brings.
fn opened(config: Config, devices: bool) -> Session {
    let mut session = Session::new(config, 1 << 20, Duration::ZERO);
    if devices {
        session.expect_devices();
    }
    let _ = session.handle(connected(), Duration::ZERO);
    let _ = session.hellos.granted(&Grant {
        ticket: Token::new([1; 16]),
        resume_secret: Token::new([2; 16]),
        lanes_max: 256,
        suspend_ms: 60_000,
        device_window_bytes: 1 << 20,
    });
    session
}

fn led(config: Config, steps: usize) -> Session {
    let mut session = opened(config, false);
    for (event, at) in happy_path().into_iter().take(steps) {
        let _ = session.handle(event, at);
    }
    session
}

/// A session that the destination keeps without channels, after so many steps and these events.
fn kept(steps: usize, events: Vec<Event>) -> Session {
    let mut session = led(keeping(WhenDestinationLost::Fail), steps);
    session.kept_for(Some(KEPT));
    for event in events {
        let _ = session.handle(event, 80 * MS);
        dials(&mut session, 80 * MS);
    }
    session
}

fn lost() -> Event {
    let fault = Fault::Timeout { what: "anything" };
    Event::Lost(Error::new(Phase::Rounds, fault))
}

const KEPT: Duration = Duration::from_secs(20);

/// Stands for "not on the happy path" where a number of its steps is expected: see [`draining`].
const DRAINING: usize = usize::MAX;
const SUSPENDED: usize = usize::MAX - 1;
const REJOINING: usize = usize::MAX - 2;
const ASKING: usize = usize::MAX - 3;

const WAITING: usize = usize::MAX - 4;
const DEVICES_PAUSING: usize = usize::MAX - 5;
const QUIESCING: usize = usize::MAX - 6;
const STOPPING: usize = usize::MAX - 7;
const DEVICES_COLLECTING: usize = usize::MAX - 8;
const DEVICES_LAST: usize = usize::MAX - 9;
const DEVICES_SAVED: usize = usize::MAX - 10;
const DEVICES_SUSPENDED: usize = usize::MAX - 11;
const DEVICES_REJOINING: usize = usize::MAX - 12;
const HELLO: usize = usize::MAX - 13;
const LAST_WORD: usize = usize::MAX - 14;
const OVER: usize = usize::MAX - 15;

fn outlook(unacked: &[&str]) -> Event {
    Event::Devices(DeviceOutlook {
        stop_bytes: 1 << 20,
        read: Duration::ZERO,
        load: MS,
        unacked: unacked.iter().map(|name| (*name).to_owned()).collect(),
    })
}

/// A session with devices, after so many steps of its own path.
fn with_devices(steps: usize) -> Session {
    devices_with(config(), steps)
}

fn devices_with(config: Config, steps: usize) -> Session {
    let mut session = opened(config, true);
    for (event, at) in device_path().into_iter().take(steps) {
        let _ = session.handle(event, at);
    }
    session
}

/// As [`kept`], with devices.
fn devices_kept(steps: usize, events: Vec<Event>) -> Session {
    let mut session = devices_with(keeping(WhenDestinationLost::Fail), steps);
    session.kept_for(Some(KEPT));
    for event in events {
        let _ = session.handle(event, 80 * MS);
        dials(&mut session, 80 * MS);
    }
    session
}

/// As [`happy_path`], with a device that is acknowledged late.
fn device_path() -> Vec<(Event, Duration)> {
    let mut path: Vec<_> = happy_path().into_iter().take(3).collect();
    path.insert(2, (outlook(&["nic"]), 60 * MS));
    path.extend([
        // Waiting, then acknowledged: back to the decision and on.
        (Event::Collected { pages: 10 }, 67 * MS),
        (outlook(&[]), 67 * MS),
        (Event::Collected { pages: 10 }, 67 * MS),
        (Event::Paused, 68 * MS),
        (Event::DevicesQuiesced, 68 * MS),
        (Event::DevicesStopped, 68 * MS),
        (Event::Collected { pages: 12 }, 69 * MS),
        (Event::DevicesSaved, 70 * MS),
    ]);
    path
}

/// A session of an almost idle guest whose link was slow for a while: far more is on its way than fits the downtime limit.
fn draining() -> Session {
    let mut session = after(2);
    let encoded = Event::Encoded {
        octets: 64 << 20,
        unacked_octets: 60 << 20,
    };
    let _ = session.handle(encoded, 66 * MS + Duration::from_secs(1));
    let _ = session.handle(
        Event::Collected { pages: 10 },
        67 * MS + Duration::from_secs(1),
    );
    session
}

/// What happens in a migration of an idle guest, and when.
fn happy_path() -> Vec<(Event, Duration)> {
    vec![
        (Event::Granted, MS),
        (Event::Ready, 2 * MS),
        (
            Event::Encoded {
                octets: 64 << 20,
                unacked_octets: 0,
            },
            66 * MS,
        ),
        (Event::Collected { pages: 10 }, 67 * MS),
        (Event::Paused, 68 * MS),
        (Event::Collected { pages: 12 }, 69 * MS),
        (Event::Saved, 70 * MS),
        (Event::Collected { pages: 0 }, 71 * MS),
        (
            Event::Encoded {
                octets: 48 << 10,
                unacked_octets: 0,
            },
            72 * MS,
        ),
        (Event::FinalSent { digest: DIGEST }, 73 * MS),
        (
            Event::Closed {
                round: Round::new(1),
                damaged: 0,
            },
            74 * MS,
        ),
        (Event::Prepared { digest: DIGEST }, 75 * MS),
        (Event::Running, 76 * MS),
    ]
}

const NOW: Duration = Duration::from_millis(1080);

/// Each state by name, with the steps of the happy path that lead to it.
const STATES: [(&str, usize); 27] = [
    ("hello", HELLO),
    ("set-up", 0),
    ("set-up, granted", 1),
    ("sending", 2),
    ("deciding", 3),
    ("draining", DRAINING),
    ("pausing", 4),
    ("collecting", 5),
    ("last", 6),
    ("last, final sent", 10),
    ("last, no lane needed", 11),
    ("committed", 12),
    ("suspended", SUSPENDED),
    ("rejoining", REJOINING),
    ("asking", ASKING),
    ("parting: goodbye", 13),
    ("parting: last word", LAST_WORD),
    ("over", OVER),
    ("devices: waiting", WAITING),
    ("devices: pausing", DEVICES_PAUSING),
    ("devices: quiescing", QUIESCING),
    ("devices: stopping", STOPPING),
    ("devices: collecting", DEVICES_COLLECTING),
    ("devices: last", DEVICES_LAST),
    ("devices: last, devices saved", DEVICES_SAVED),
    ("devices: suspended", DEVICES_SUSPENDED),
    ("devices: rejoining", DEVICES_REJOINING),
];

/// Those in which the newest FINAL was sent and nothing has gone missing since.
const FINAL_SENT: [&str; 2] = ["last, final sent", "last, no lane needed"];

const EVENTS: [&str; 45] = [
    "granted",
    "ready",
    "encoded",
    "collected 0",
    "collected 5",
    "paused",
    "saved",
    "devices, acknowledged",
    "devices, one not acknowledged",
    "acknowledgements missing",
    "devices quiesced",
    "devices stopped",
    "devices saved",
    "final sent",
    "closed, whole",
    "closed, damaged",
    "closed, an older",
    "lane lost, 0 pages",
    "lane lost, 7 pages",
    "prepared",
    "prepared, other digest",
    "commit unsent",
    "running",
    "lost",
    "named",
    "connected",
    "not connected, may pass",
    "not connected, for good",
    "landed",
    "forgotten",
    "answered: not committed",
    "answered: committed",
    "answered: running",
    "answered: failed",
    "round trip",
    "cancel",
    "switch over now",
    "downtime limit 2 s",
    "sending is held",
    "not throttled",
    "guest gone",
    "failed",
    "tick",
    "tick, late",
    "tick, later still",
];

fn event(name: &str) -> (Event, Duration) {
    let event = match name {
        "granted" => Event::Granted,
        "ready" => Event::Ready,
        "encoded" => Event::Encoded {
            octets: 1 << 20,
            unacked_octets: 0,
        },
        "collected 0" => Event::Collected { pages: 0 },
        "collected 5" => Event::Collected { pages: 5 },
        "paused" => Event::Paused,
        "saved" => Event::Saved,
        "devices, acknowledged" => outlook(&[]),
        "devices, one not acknowledged" => outlook(&["nic"]),
        "acknowledgements missing" => Event::AcksMissing,
        "devices quiesced" => Event::DevicesQuiesced,
        "devices stopped" => Event::DevicesStopped,
        "devices saved" => Event::DevicesSaved,
        "final sent" => Event::FinalSent { digest: DIGEST },
        "closed, whole" => Event::Closed {
            round: Round::new(1),
            damaged: 0,
        },
        "closed, damaged" => Event::Closed {
            round: Round::new(1),
            damaged: 3,
        },
        "closed, an older" => Event::Closed {
            round: Round::new(0),
            damaged: 3,
        },
        "lane lost, 0 pages" => Event::LaneLost { pages: 0, items: 0 },
        "lane lost, 7 pages" => Event::LaneLost { pages: 7, items: 0 },
        "prepared" => Event::Prepared { digest: DIGEST },
        "prepared, other digest" => Event::Prepared {
            digest: OTHER_DIGEST,
        },
        "commit unsent" => Event::CommitUnsent(Error::new(
            Phase::Commit,
            Fault::Channel(ChannelFault::new("channel-closed", true, "closed")),
        )),
        "running" => Event::Running,
        "lost" => lost(),
        "named" => Event::Named(SessionId::new([1; 16])),
        "connected" => connected(),
        "not connected, may pass" => not_connected(Lasts::MayPass),
        "not connected, for good" => not_connected(Lasts::ForGood),
        "landed" => Event::Landed { rounds_closed: 1 },
        "forgotten" => Event::NotConnected {
            number: 1,
            why: Incompatible::Refused {
                reason: Reason::WrongSession,
                text: "who?".into(),
            }
            .into(),
        },
        "answered: not committed" => Event::Answered(OutcomeState::NotCommitted),
        "answered: committed" => Event::Answered(OutcomeState::CommittedNotRunning),
        "answered: running" => Event::Answered(OutcomeState::Running),
        "answered: failed" => Event::Answered(OutcomeState::FailedAfterCommit),
        "round trip" => Event::RoundTrip(MS),
        "cancel" => Event::Cancel,
        "switch over now" => Event::SwitchOverNow,
        "downtime limit 2 s" => Event::Steer(Steer::DowntimeLimit(Duration::from_secs(2))),
        "sending is held" => Event::Steer(Steer::Sending(Sending::Held)),
        "not throttled" => Event::NotThrottled,
        "guest gone" => Event::GuestGone,
        "failed" => failure(),
        "tick" => Event::Tick,
        "tick, late" => return (Event::Tick, STALL + NOW),
        "tick, later still" => return (Event::Tick, COMMIT_DEADLINE * 10),
        other => panic!("no event {other}"),
    };
    (event, NOW)
}

fn state_name(session: &Session) -> String {
    match session.state {
        State::Hello => "hello".into(),
        State::Parting(Parting::Goodbye { .. }) => "parting: goodbye".into(),
        State::Parting(Parting::LastWord { .. }) => "parting: last word".into(),
        State::Setup { granted: false } => "set-up".into(),
        State::Setup { granted: true } => "set-up, granted".into(),
        State::Sending { round, .. } => format!("sending {round}"),
        State::Deciding { round, .. } => format!("deciding {round}"),
        State::Draining { round, .. } => format!("draining {round}"),
        State::Waiting { round, .. } => format!("waiting {round}"),
        State::Pausing { round } => format!("pausing {round}"),
        State::Quiescing { round } => format!("quiescing {round}"),
        State::Stopping { round } => format!("stopping {round}"),
        State::Collecting { round } => format!("collecting {round}"),
        State::Last(last) if session.needs_lanes() => format!("last {}", last.round),
        State::Last(last) => format!("last {}, no lane needed", last.round),
        State::Committed { .. } => "committed".into(),
        State::Suspended { .. } => "suspended".into(),
        State::Rejoining { granted: false, .. } => "rejoining".into(),
        State::Rejoining { granted: true, .. } => "rejoining, granted".into(),
        State::Reopening { round, .. } => format!("reopening {round}"),
        State::Asking { .. } => "asking".into(),
        State::Over => "over".into(),
    }
}

fn word(effect: &Effect) -> String {
    match effect {
        Effect::Granted { ticket, .. } => format!("granted, first: {}", ticket.is_some()),
        Effect::Send(Frame::Switchover(last)) => format!("SWITCHOVER {}", last.final_round),
        Effect::Send(frame) => frame.kind().name().into(),
        Effect::DialControl { purpose, .. } => format!("dial: {purpose:?}"),
        Effect::SendSetup { .. } => "send set-up".into(),
        Effect::DialLane {
            lane, incarnation, ..
        } => format!("dial {lane}.{incarnation}"),
        Effect::LaneBack { lane, behind, .. } => {
            format!("{lane} enters, {} rounds behind", behind.len())
        }
        Effect::CloseLane { lane } => format!("close {lane}"),
        Effect::LaneGone { lane, .. } => format!("{lane} is gone"),
        Effect::SettleLane { lane } => format!("settle {lane}"),
        Effect::SettleBefore { lanes } => format!("settle {} lanes of before", lanes.len()),
        Effect::LookAtLanes => "look at lanes".into(),
        Effect::Acknowledged(marks) => format!("{} lanes acknowledged", marks.len()),
        Effect::GiveBack { lane, runs, .. } => format!("{} runs of {lane} back", runs.len()),
        Effect::DeviceAcked(_) => "device acknowledged".into(),
        Effect::DeviceLoaded(_) => "device loaded".into(),
        Effect::Resumed { rounds_closed } => format!("resumed after {rounds_closed} rounds"),
        Effect::Begin { .. } => "begin".into(),
        Effect::RoundEncoded => "round encoded".into(),
        Effect::OpenRound { round, last: false } => format!("open {round}"),
        Effect::OpenRound { round, last: true } => format!("open {round} (paused)"),
        Effect::Collect { last: false } => "collect".into(),
        Effect::Collect { last: true } => "collect (paused)".into(),
        Effect::Forecast(_) => "forecast".into(),
        Effect::Steered(_) => "steered".into(),
        Effect::Throttle { percent } => format!("throttle {percent}"),
        Effect::Pause => "pause".into(),
        Effect::AwaitDevices => "await devices".into(),
        Effect::Quiesce => "quiesce devices".into(),
        Effect::StopDevices => "stop devices".into(),
        Effect::Save => "save".into(),
        Effect::Disconnect => "disconnect".into(),
        Effect::StartAfresh => "start afresh".into(),
        Effect::Migrated => "migrated".into(),
        Effect::SendFinal { round } => format!("FINAL {round}"),
        Effect::Commit => "COMMIT".into(),
        Effect::Abort { reason, .. } => format!("ABORT {}", reason.as_u32()),
        Effect::Reclaim { paused: false, .. } => "reclaim".into(),
        Effect::Reclaim { paused: true, .. } => "reclaim and resume".into(),
        Effect::Finish(outcome) => match outcome {
            Outcome::Migrated => "finish: migrated".into(),
            Outcome::Failed(error) => format!("finish: failed, {}", error.code()),
            Outcome::Cancelled(_) => "finish: cancelled".into(),
            Outcome::Stranded(error) => format!("finish: stranded, {}", error.code()),
            Outcome::Unknown(error) => format!("finish: unknown, {}", error.code()),
            Outcome::Gone(error) => format!("finish: gone, {}", error.code()),
        },
    }
}

/// What an event does in a state: its effects, where they lead, or nothing.
fn cell(steps: usize, name: &str) -> String {
    let mut session = after(steps);
    let before = session.state;
    let (event, at) = event(name);
    let words: Vec<String> = session.handle(event, at).iter().map(word).collect();
    let mut text = words.join("; ");
    if session.state != before {
        let arrow = format!("-> {}", state_name(&session));
        text = if text.is_empty() {
            arrow
        } else {
            format!("{text} {arrow}")
        };
    }
    if text.is_empty() {
        text.push_str("ignored");
    }
    text
}

/// The table: for each state the events, those with the same meaning on one line.
fn table() -> String {
    let mut out = String::new();
    for (state, steps) in STATES {
        out.push_str(&format!("{state}\n"));
        let mut same: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        let mut order = Vec::new();
        for name in EVENTS {
            let meaning = cell(steps, name);
            if !same.contains_key(&meaning) {
                order.push(meaning.clone());
            }
            same.entry(meaning).or_default().push(name);
        }
        for meaning in order {
            out.push_str(&format!(
                "    {}\n        {meaning}\n",
                same[&meaning].join(" | ")
            ));
        }
    }
    out
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
    for (state, steps) in STATES {
        for name in EVENTS {
            let mut session = after(steps);
            let (event, at) = event(name);
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

fn reclaims(effects: &[Effect]) -> usize {
    count(effects, |e| matches!(e, Effect::Reclaim { .. }))
}

fn spoken(effects: &[Effect]) -> Vec<String> {
    effects.iter().map(word).collect()
}

#[test]
fn without_an_acknowledgement_the_guest_runs_on_and_rounds_are_made_that_do_not_count() {
    let config = Config::builder().max_rounds(2).build().unwrap();
    let mut session = devices_with(config, 5);
    let mut at = 67 * MS;
    for round in 0..20 {
        let State::Waiting { again, .. } = session.state else {
            panic!("{round}: {:?}", session.state);
        };
        assert_eq!(session.next_deadline(), again);
        at = again;
        assert_eq!(spoken(&session.handle(Event::Tick, at)), ["collect"]);
        // Far too much is dirty by now: another live round.
        let dirty = Event::Collected { pages: 200_000 };
        let opens = spoken(&session.handle(dirty, at));
        assert!(opens.contains(&format!("open {}", round + 1)), "{opens:?}");
        at += 700 * MS;
        session.heard(at);
        let encoded = Event::Encoded {
            octets: 700 << 20,
            unacked_octets: 0,
        };
        let _ = session.handle(encoded, at);
        let waits = spoken(&session.handle(Event::Collected { pages: 10 }, at));
        assert!(waits.contains(&"await devices".to_owned()), "{waits:?}");
    }
    assert_eq!(spoken(&session.handle(outlook(&[]), at)), ["collect"]);
    let switches = spoken(&session.handle(Event::Collected { pages: 10 }, at));
    assert!(switches.contains(&"pause".to_owned()), "{switches:?}");
}

/// A session whose devices alone would keep the guest paused for longer than the limit, driven for so long: how many rounds it
/// made, and whether it ended.
fn rounds_of_a_heavy_device(unacked: &[&str], time: Duration) -> (u32, bool) {
    let mut session = devices_with(config(), 5);
    let heavy = Event::Devices(DeviceOutlook {
        stop_bytes: 1 << 40,
        load: Duration::ZERO,
        read: Duration::ZERO,
        unacked: unacked.iter().map(|name| (*name).to_owned()).collect(),
    });
    let (mut now, mut rounds) = (67 * MS, 0);
    let mut effects = session.handle(heavy, now);
    let until = now + time;
    while now < until && rounds < 1000 {
        session.heard(now);
        session.progressed(now);
        let words = spoken(&effects);
        let said = |word: &str| words.iter().any(|said| said.starts_with(word));
        if finishes(&effects) > 0 {
            return (rounds, true);
        }
        let event = if said("open") {
            rounds += 1;
            Event::Encoded {
                octets: 4096,
                unacked_octets: 0,
            }
        } else if said("collect") {
            Event::Collected { pages: 0 }
        } else {
            now = session.next_deadline().min(now + 100 * MS);
            Event::Tick
        };
        effects = session.handle(event, now);
    }
    (rounds, false)
}

#[test]
fn rounds_that_cannot_help_do_not_follow_one_another_without_end_while_devices_load() {
    let (rounds, ended) = rounds_of_a_heavy_device(&["nic"], 2000 * MS);
    assert!((1..=11).contains(&rounds), "{rounds} in two seconds");
    assert!(!ended);
}

#[test]
fn once_devices_are_loaded_rounds_count_again() {
    let (rounds, ended) = rounds_of_a_heavy_device(&[], 2000 * MS);
    assert!(!ended && rounds <= 11, "{rounds} in two seconds");
    let (rounds, ended) = rounds_of_a_heavy_device(&[], 10_000 * MS);
    assert!(ended && rounds <= 31, "{rounds}");
}

#[test]
fn past_the_acknowledgement_deadline_the_users_choice_decides() {
    let late = |choice| {
        let config = Config::builder()
            .ack_deadline(Some(100 * MS))
            .when_ack_late(choice);
        let mut session = devices_with(config.build().unwrap(), 5);
        assert_eq!(session.next_deadline(), 167 * MS);
        assert!(session.handle(Event::Tick, 166 * MS).is_empty());
        assert_eq!(spoken(&session.handle(Event::Tick, 167 * MS)), ["collect"]);
        spoken(&session.handle(Event::Collected { pages: 10 }, 167 * MS))
    };
    let fails = late(WhenAckLate::Fail);
    assert_eq!(
        fails.last().unwrap(),
        "finish: failed, sender.device.ack-deadline"
    );
    assert_eq!(late(WhenAckLate::GoOn).last().unwrap(), "pause");
}

// SPEC: FINAL-2
#[test]
fn the_last_collection_comes_after_the_state_and_every_device_were_saved() {
    for [first, second] in [["saved", "devices saved"], ["devices saved", "saved"]] {
        let mut session = after(DEVICES_LAST);
        assert!(session.handle(event(first).0, NOW).is_empty(), "{first}");
        let effects = session.handle(event(second).0, NOW);
        assert_eq!(spoken(&effects), ["collect (paused)"]);
    }
    // A device may be read to its end before the others even stand still.
    for early in [STOPPING, DEVICES_COLLECTING] {
        let mut session = after(early);
        assert!(session.handle(Event::DevicesSaved, NOW).is_empty());
        if early == STOPPING {
            let _ = session.handle(Event::DevicesStopped, NOW);
        }
        let _ = session.handle(Event::Collected { pages: 1 }, NOW);
        let effects = session.handle(Event::Saved, NOW);
        assert_eq!(spoken(&effects), ["collect (paused)"]);
    }
}

#[test]
fn what_devices_have_left_counts_for_the_downtime() {
    let decide = |stop_bytes: u64, load: Duration| {
        let mut session = with_devices(2);
        let event = Event::Devices(DeviceOutlook {
            read: Duration::ZERO,
            stop_bytes,
            load,
            unacked: Vec::new(),
        });
        let _ = session.handle(event, 60 * MS);
        let encoded = Event::Encoded {
            octets: 64 << 20,
            unacked_octets: 0,
        };
        let _ = session.handle(encoded, 66 * MS);
        let words = spoken(&session.handle(Event::Collected { pages: 10 }, 67 * MS));
        words.contains(&"pause".to_owned())
    };
    // 64 MiB took 64 ms, and the limit is 300 ms.
    assert!(decide(250 << 20, Duration::ZERO));
    assert!(!decide(330 << 20, Duration::ZERO));
    assert!(decide(250 << 20, 250 * MS), "loading overlaps the way");
    assert!(!decide(250 << 20, 400 * MS));
}

#[test]
fn the_guest_is_never_reclaimed_once_committed() {
    each_cell(|state, event, _, effects| {
        if ["committed", "asking", "over"].contains(&state) {
            // Only the destination's own word gives it back (SPEC: ASK-3), or a COMMIT of which nothing left (SPEC: COMMIT-3).
            let given = [
                ("asking", "answered: not committed"),
                ("committed", "commit unsent"),
            ]
            .contains(&(state, event));
            assert_eq!(reclaims(effects), usize::from(given), "{state} × {event}");
        }
    });
}

/// SPEC: LANE-9
#[test]
fn no_lane_is_needed_from_the_closed_round_of_final_on_until_something_is_missing() {
    let closed = |damaged| Event::Closed {
        round: Round::new(1),
        damaged,
    };
    // In either order; a round before it does not count.
    let final_sent = Event::FinalSent { digest: DIGEST };
    for events in [
        [final_sent, closed(0)],
        [closed(0), Event::FinalSent { digest: DIGEST }],
    ] {
        let mut session = after(9);
        let _ = session.handle(event("closed, an older").0, NOW);
        for event in events {
            assert!(session.needs_lanes());
            let _ = session.handle(event, NOW);
        }
        assert!(!session.needs_lanes());
        // A lane of which everything was acknowledged costs nothing.
        assert!(
            session
                .handle(Event::LaneLost { pages: 0, items: 0 }, NOW)
                .is_empty()
        );
        assert!(!session.needs_lanes());
        assert_eq!(
            session
                .handle(Event::LaneLost { pages: 1, items: 0 }, NOW)
                .len(),
            2
        );
        assert!(session.needs_lanes(), "a further round has begun");
    }
    let mut session = after(10);
    let _ = session.handle(closed(1), NOW);
    assert!(session.needs_lanes());
}

#[test]
fn the_commit_is_made_only_on_prepared_with_the_digest_of_final() {
    each_cell(|state, event, _, effects| {
        let commits = count(effects, |e| matches!(e, Effect::Commit));
        let due = FINAL_SENT.contains(&state) && event == "prepared";
        assert_eq!(commits, usize::from(due), "{state} × {event}");
    });
}

/// Makes the look at the sources that is due inside a round, without an answer yet: no further one is due then.
fn looked(session: &mut Session) {
    let due = session.next_deadline();
    let effects: Vec<String> = session.handle(Event::Tick, due).iter().map(word).collect();
    assert_eq!(effects, ["collect"]);
}

#[test]
fn every_state_has_a_deadline_and_passing_it_ends_the_migration() {
    // Waiting for devices ends by looking again, not by an error: see the tests about that.
    for (state, steps) in STATES
        .into_iter()
        .filter(|(state, _)| !["devices: waiting", "over"].contains(state))
    {
        let mut session = after(steps);
        if state == "sending" {
            looked(&mut session);
        }
        let deadline = session.next_deadline();
        assert!(
            deadline <= COMMIT_DEADLINE.max(STALL) + NOW,
            "{state}: {deadline:?}"
        );
        assert!(
            session.handle(Event::Tick, deadline - MS).is_empty(),
            "{state}: too early"
        );
        let effects = session.handle(Event::Tick, deadline);
        if state.ends_with("rejoining") {
            // It tries once more, until the deadline that it had.
            assert!(session.next_deadline() <= KEPT + NOW, "{state}");
            continue;
        }
        assert_eq!(finishes(&effects), 1, "{state}");
    }
}

#[test]
fn silence_ends_every_state_and_a_sign_of_life_puts_that_off() {
    let without_channels = [
        "over",
        "hello",
        "suspended",
        "rejoining",
        "asking",
        "parting: goodbye",
        "parting: last word",
    ];
    let has_channels = |state: &str| !without_channels.iter().any(|end| state.ends_with(end));
    for (state, steps) in STATES.iter().filter(|(state, _)| has_channels(state)) {
        let mut session = after(*steps);
        session.heard(NOW);
        if *state == "sending" {
            looked(&mut session);
        }
        let looks = session.handle(Event::Tick, STALL);
        assert!(looks.is_empty() || *state == "devices: waiting", "{state}");
        let effects = session.handle(Event::Tick, STALL + NOW);
        assert_eq!(finishes(&effects), 1, "{state}");
    }
}

#[test]
fn a_peer_that_only_says_that_it_lives_holds_a_paused_guest_no_longer_than_the_commit_deadline() {
    for (state, steps) in STATES {
        if ![
            "pausing",
            "collecting",
            "last",
            "last, final sent",
            "last, no lane needed",
            "committed",
        ]
        .contains(&state)
        {
            continue;
        }
        let mut session = after(steps);
        let mut now = NOW;
        let mut ended = 0;
        while ended == 0 {
            now += STALL / 2;
            session.heard(now);
            ended = finishes(&session.handle(Event::Tick, now));
            assert!(now < COMMIT_DEADLINE + 2 * STALL, "{state}");
        }
    }
}

#[test]
fn whatever_ends_it_ends_it_once_and_for_good() {
    each_cell(|state, event, session, effects| {
        assert!(finishes(effects) <= 1, "{state} × {event}");
        let over = matches!(session.state, State::Over);
        assert_eq!(
            finishes(effects) == 1,
            over && state != "over",
            "{state} × {event}"
        );
        // Before the commit the end always gives the guest back, and says so before anything that may take time.
        let ours = !["committed", "asking"].contains(&state) && !state.starts_with("parting");
        if finishes(effects) == 1 && ours {
            assert!(
                matches!(effects[0], Effect::Reclaim { .. }),
                "{state} × {event}"
            );
        }
    });
    for (state, steps) in STATES {
        for how in ["cancel", "failed"] {
            let mut session = after(steps);
            let (first, at) = event(how);
            let effects = session.handle(first, at);
            let (expected, reclaimed) = match (state, how) {
                ("over" | "parting: last word", _) => (0, 0),
                ("committed" | "parting: goodbye", "cancel") => (0, 0),
                ("committed" | "asking" | "parting: goodbye", _) => (1, 0),
                // There is no channel, and the destination is told on another.
                ("suspended" | "devices: suspended", _) => (0, 1),
                _ => (1, 1),
            };
            assert_eq!(finishes(&effects), expected, "{state} × {how}");
            assert_eq!(reclaims(&effects), reclaimed, "{state} × {how}");
            if expected == 1 {
                for name in EVENTS {
                    let (later, at) = event(name);
                    assert!(
                        session.handle(later, at).is_empty(),
                        "{state} × {how}, then {name}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_paused_guest_is_resumed_and_a_running_one_is_left_alone() {
    for (state, steps) in STATES {
        let mut session = after(steps);
        for effect in session.handle(failure(), NOW) {
            if let Effect::Reclaim { paused, .. } = effect {
                let runs = ["waiting", "suspended", "rejoining"];
                let was_paused = ["pausing", "collecting", "last"].contains(&state)
                    || FINAL_SENT.contains(&state)
                    || (state.starts_with("devices")
                        && !runs.iter().any(|end| state.ends_with(end)));
                assert_eq!(paused, was_paused, "{state}");
            }
        }
    }
}

#[test]
fn the_peer_is_told_the_reason_phase_and_channel_unless_it_said_so_itself() {
    let mut session = after(2);
    let error = Error::new(Phase::Rounds, Fault::Cancelled).at(ChannelRef::Control);
    let told = session.handle(Event::Failed(error), NOW);
    assert!(told.iter().any(|effect| matches!(
        effect,
        Effect::Abort {
            reason: Reason::Cancelled,
            phase: Phase::Rounds,
            channel: ChannelRef::Control,
            ..
        }
    )));
    let mut session = after(2);
    let abort = Fault::PeerAborted {
        reason: Reason::VmmRefused,
        text: "no".into(),
    };
    let told = session.handle(Event::Failed(Error::new(Phase::Rounds, abort)), NOW);
    assert_eq!(count(&told, |e| matches!(e, Effect::Abort { .. })), 0);
}

#[test]
fn an_idle_guest_takes_one_live_round_and_one_paused() {
    let mut session = opened(config(), false);
    let trace: Vec<String> = happy_path()
        .into_iter()
        .flat_map(|(event, at)| session.handle(event, at))
        .map(|effect| word(&effect))
        .collect();
    assert_eq!(
        trace,
        [
            "send set-up",
            "open 0",
            "collect",
            "forecast",
            "pause",
            "collect (paused)",
            "SWITCHOVER 1",
            "open 1 (paused)",
            "save",
            "collect (paused)",
            "FINAL 1",
            "COMMIT",
            "migrated",
        ]
    );
}

// SPEC: SWITCH-2
#[test]
fn pages_written_by_the_save_are_sent_in_a_further_round() {
    let mut session = after(7);
    assert!(
        session
            .handle(Event::Collected { pages: 2 }, NOW)
            .is_empty()
    );
    let words: Vec<String> = session
        .handle(
            Event::Encoded {
                octets: 1,
                unacked_octets: 0,
            },
            NOW,
        )
        .iter()
        .map(word)
        .collect();
    assert_eq!(words, ["SWITCHOVER 2", "open 2 (paused)"]);
}

#[test]
fn news_of_rounds_that_are_over_changes_nothing() {
    let mut session = after(11);
    let (old, at) = event("closed, an older");
    assert!(session.handle(old, at).is_empty());
    let (prepared, at) = event("prepared");
    assert!(matches!(session.handle(prepared, at)[..], [Effect::Commit]));
}

#[test]
fn prepared_that_crosses_a_further_round_still_commits() {
    // The destination had everything: the lane died after that (SPEC: PREP-2).
    let mut session = after(11);
    let effects = session.handle(Event::LaneLost { pages: 7, items: 0 }, NOW);
    assert_eq!(effects.len(), 2, "a further round: {effects:?}");
    let (prepared, at) = event("prepared");
    assert!(matches!(session.handle(prepared, at)[..], [Effect::Commit]));
}

#[test]
fn prepared_is_not_taken_for_right_before_lost_items_of_devices_have_come_again() {
    // SPEC: PREP-3. The digest is right, and what was lost with the lane may have been a RESTART.
    let prepared = || Event::Prepared { digest: DIGEST };
    let closed = |round| Event::Closed {
        round: Round::new(round),
        damaged: 0,
    };
    let sent_again = |session: &mut Session, round| {
        let encoded = Event::Encoded {
            octets: 1,
            unacked_octets: 0,
        };
        let _ = session.handle(encoded, NOW);
        let _ = session.handle(Event::FinalSent { digest: DIGEST }, NOW);
        let _ = session.handle(closed(round), NOW);
    };
    let after_the_loss = || {
        let mut session = kept(11, Vec::new());
        let _ = session.handle(closed(1), NOW);
        let lost = Event::LaneLost { pages: 0, items: 1 };
        let effects = session.handle(lost, NOW);
        assert_eq!(effects.len(), 2, "a further round: {effects:?}");
        session
    };
    let mut early = after_the_loss();
    assert_eq!(
        words(&mut early, prepared(), NOW),
        ["reclaim and resume", "disconnect"]
    );
    let mut in_time = after_the_loss();
    sent_again(&mut in_time, 2);
    assert!(matches!(
        in_time.handle(prepared(), NOW)[..],
        [Effect::Commit]
    ));
}

/// One repair: the last round turns out damaged.
fn damage(session: &mut Session, round: u32) -> Vec<Effect> {
    let _ = session.handle(
        Event::Encoded {
            octets: 1,
            unacked_octets: 0,
        },
        NOW,
    );
    let _ = session.handle(Event::FinalSent { digest: DIGEST }, NOW);
    session.handle(
        Event::Closed {
            round: Round::new(round),
            damaged: 1,
        },
        NOW,
    )
}

#[test]
fn repairs_as_often_as_allowed_and_not_once_more() {
    let mut session = after(8);
    for repair in 1..=REPAIR_ROUNDS_MAX {
        let words: Vec<String> = damage(&mut session, repair).iter().map(word).collect();
        let next = repair + 1;
        assert_eq!(
            words,
            [
                format!("SWITCHOVER {next}"),
                format!("open {next} (paused)")
            ]
        );
    }
    let effects = damage(&mut session, REPAIR_ROUNDS_MAX + 1);
    let words: Vec<String> = effects.iter().map(word).collect();
    assert_eq!(
        words,
        [
            "reclaim and resume",
            "ABORT 20",
            "finish: failed, sender.unrepairable"
        ]
    );
}

/// Rounds of 4 s each of a guest that writes faster than the link is, until the machine does something else than another round.
fn hopeless(choice: WhenNotConverging, rounds_max: u32) -> (u32, Vec<String>, Session) {
    let config = Config::builder()
        .max_rounds(rounds_max)
        .when_not_converging(choice)
        .build()
        .unwrap();
    let mut session = opened(config, false);
    let _ = session.handle(Event::Granted, Duration::ZERO);
    let _ = session.handle(Event::Ready, Duration::ZERO);
    let mut now = Duration::ZERO;
    for round in 1.. {
        now += Duration::from_secs(4);
        session.heard(now);
        let encoded = Event::Encoded {
            octets: 1 << 32,
            unacked_octets: 0,
        };
        let _ = session.handle(encoded, now);
        let words: Vec<String> = session
            .handle(Event::Collected { pages: 1 << 20 }, now)
            .iter()
            .map(word)
            .filter(|word| word != "forecast")
            .collect();
        if words != [format!("open {round}")] {
            return (round, words, session);
        }
    }
    unreachable!("rounds are bounded")
}

#[test]
fn rounds_end_at_their_bound_as_the_user_chose() {
    // Three rounds that are as hopeless as the one before are enough.
    for (rounds_max, made) in [(1, 1), (2, 2), (3, 3), (7, 3), (30, 3)] {
        let (rounds, words, _) = hopeless(WhenNotConverging::Fail, rounds_max);
        assert_eq!(rounds, made);
        assert_eq!(
            words,
            [
                "reclaim",
                "ABORT 21",
                "finish: failed, sender.not-converging"
            ]
        );
        let (rounds, words, _) = hopeless(WhenNotConverging::Switch, rounds_max);
        assert_eq!((rounds, words), (made, vec!["pause".to_owned()]));
    }
}

/// A link of 100 MB/s over two lanes, as their acknowledgements say it, at `now`.
fn counted(now: Duration, pages: u64, pages_left: u64) -> Event {
    let acked_bytes = now.as_millis() as u64 * 50_000;
    let lane = |lane| LaneCount {
        lane: multifd_wire::LaneId::new(lane),
        incarnation: multifd_wire::Incarnation::new(0),
        acked_bytes,
        unacked_bytes: 500_000,
    };
    Event::Counted {
        round: Counted {
            pages,
            pages_left,
            sent_bytes: (pages - pages_left) * 4096,
            unacked_bytes: 1_000_000,
        },
        lanes: vec![lane(0), lane(1)],
    }
}

#[test]
fn the_end_is_forecast_in_the_first_second_of_a_round_of_minutes() {
    // 64 GiB at 100 MB/s: eleven minutes and a half. The guest writes 2,000 other pages a second.
    let pages = 16 << 20;
    let mut session = Session::new(config(), pages, Duration::ZERO);
    let _ = session.handle(connected(), Duration::ZERO);
    let _ = session.handle(Event::Granted, Duration::ZERO);
    let _ = session.handle(Event::Ready, Duration::ZERO);
    let mut said = Vec::new();
    for step in 1..=150u64 {
        let now = 20 * MS * step as u32;
        session.heard(now);
        let sent = now.as_millis() as u64 * 100_000 / 4096;
        assert!(
            session
                .handle(counted(now, pages, pages - sent), now)
                .is_empty()
        );
        for effect in session.handle(Event::Tick, now) {
            assert_eq!(word(&effect), "collect");
            let dirty = now.as_millis() as u64 * 2;
            for effect in session.handle(Event::Collected { pages: dirty }, now) {
                let Effect::Forecast(outlook) = effect else {
                    panic!("{effect:?}")
                };
                said.push((now, outlook));
            }
        }
    }
    let (first, outlook) = said[0];
    assert!(first <= Duration::from_secs(1), "{first:?}");
    for (at, outlook) in &said {
        let end = outlook.end.unwrap();
        let likely = end.likely.as_secs_f64();
        // Twelve minutes for round 0, a minute for what was written meanwhile, five seconds for the next.
        assert!((740.0..800.0).contains(&likely), "{at:?}: {likely}");
        assert!(
            end.low < end.likely && Some(end.likely) < end.high,
            "{end:?}"
        );
    }
    let newest = said.last().unwrap().1.end.unwrap();
    let width = |end: crate::source::forecast::Interval| end.high.unwrap() - end.low;
    assert!(said.len() >= 3 && width(newest) < width(outlook.end.unwrap()));
}

#[test]
fn a_guess_about_the_pause_alone_keeps_no_idle_guest_from_switching_over() {
    let config = Config::builder().downtime_limit(MS).build().unwrap();
    let mut session = led(config, 2);
    let encoded = Event::Encoded {
        octets: 1 << 20,
        unacked_octets: 0,
    };
    let _ = session.handle(encoded, 50 * MS);
    let words: Vec<String> = session
        .handle(Event::Collected { pages: 0 }, 50 * MS)
        .iter()
        .map(word)
        .collect();
    assert_eq!(words, ["forecast", "pause"]);
    assert!(session.predicted_downtime() <= Some(MS));
}

/// 50 MB/s and 2 MB/s, of which the slow lane has 1 MB on its way: half a second of downtime, not 19 ms.
#[test]
fn a_slow_lane_is_waited_for_before_the_pause_and_not_in_it() {
    let mut session = led(config(), 2);
    let lane = |lane, speed: u64, now: Duration, unacked_bytes| LaneCount {
        lane: multifd_wire::LaneId::new(lane),
        incarnation: multifd_wire::Incarnation::new(0),
        acked_bytes: now.as_millis() as u64 * speed / 1000,
        unacked_bytes,
    };
    for step in 0..=50u32 {
        let now = 20 * MS * step;
        let lanes = vec![
            lane(0, 50_000_000, now, 1_000_000),
            lane(1, 2_000_000, now, 1_040_000),
        ];
        let round = Counted::default();
        let _ = session.handle(Event::Counted { round, lanes }, now);
    }
    let now = Duration::from_secs(1);
    let encoded = Event::Encoded {
        octets: 52_000_000,
        unacked_octets: 2_040_000,
    };
    let _ = session.handle(encoded, now);
    let words: Vec<String> = session
        .handle(Event::Collected { pages: 10 }, now)
        .iter()
        .map(word)
        .collect();
    assert_eq!(words, ["forecast"], "it waits");
    assert!(
        matches!(session.state, State::Draining { .. }),
        "{:?}",
        session.state
    );
}

#[test]
fn a_small_round_that_crawls_lowers_the_bandwidth_until_one_does_not() {
    let mut session = after(2);
    let mut now = 2 * MS;
    let mut round = |octets: u64, over: Duration| {
        now += over;
        session.heard(now);
        let encoded = Event::Encoded {
            octets,
            unacked_octets: 0,
        };
        let _ = session.handle(encoded, now);
        let bandwidth = session.bandwidth().unwrap();
        let effects = session.handle(Event::Collected { pages: 1 << 20 }, now);
        assert!(
            effects
                .iter()
                .any(|effect| word(effect).starts_with("open"))
        );
        bandwidth
    };
    // All of the first ones fit into buffers.
    let first = round(100 << 10, MS);
    assert!(round(100 << 10, 2 * MS) == first && first > 1e6, "{first}");
    let crawled = round(100 << 10, Duration::from_secs(1));
    assert!((crawled - 102_400.0).abs() < 1.0, "{crawled}");
    assert_eq!(round(100 << 10, MS), first);
    let measured = round(8 << 20, 500 * MS);
    assert!((measured - f64::from(16 << 20)).abs() < 1.0, "{measured}");
}

#[test]
fn a_guest_that_was_paused_whatever_the_downtime_is_waited_for_as_long_as_was_forecast() {
    let (rounds, _, mut session) = hopeless(WhenNotConverging::Switch, 3);
    let paused = Duration::from_secs(4) * rounds;
    let predicted = session.predicted_downtime().unwrap();
    assert!(predicted > Duration::from_secs(3), "{predicted:?}");
    let until = paused + predicted + Config::default().commit_deadline;
    for (now, ends) in [(until - MS, 0), (until, 1)] {
        session.heard(now);
        assert_eq!(finishes(&session.handle(Event::Tick, now)), ends, "{now:?}");
    }
}

#[test]
fn what_is_on_its_way_is_waited_for_and_not_followed_by_empty_rounds() {
    let mut session = draining();
    assert_eq!(state_name(&session), "draining 0");
    // What it says of other rounds, of lanes and of itself changes nothing.
    assert!(
        session
            .handle(Event::LaneLost { pages: 1, items: 0 }, NOW)
            .is_empty()
    );
    assert!(session.handle(Event::RoundTrip(MS), NOW).is_empty());
    let words = |session: &mut Session, event: Event| -> Vec<String> {
        session.handle(event, NOW).iter().map(word).collect()
    };
    let closed = Event::Closed {
        round: Round::new(0),
        damaged: 0,
    };
    assert_eq!(words(&mut session, closed), ["collect"]);
    let collected = Event::Collected { pages: 10 };
    assert_eq!(words(&mut session, collected), ["forecast", "pause"]);
    assert!(session.predicted_downtime().unwrap() < 50 * MS);
}

#[test]
fn a_round_that_was_closed_before_it_was_known_to_be_encoded_is_not_waited_for() {
    let mut session = after(2);
    let closed = Event::Closed {
        round: Round::new(0),
        damaged: 0,
    };
    assert!(session.handle(closed, NOW).is_empty());
    let encoded = Event::Encoded {
        octets: 64 << 20,
        unacked_octets: 60 << 20,
    };
    let _ = session.handle(encoded, NOW);
    let effects = session.handle(Event::Collected { pages: 10 }, NOW);
    assert_eq!(count(&effects, |e| matches!(e, Effect::Pause)), 1);
}

#[test]
fn too_much_to_send_is_sent_in_another_round_whatever_is_on_its_way() {
    let mut session = after(2);
    let encoded = Event::Encoded {
        octets: 64 << 20,
        unacked_octets: 60 << 20,
    };
    let _ = session.handle(encoded, NOW);
    let _ = session.handle(Event::Collected { pages: 1 << 16 }, NOW);
    assert_eq!(state_name(&session), "sending 1");
}

#[test]
fn a_destination_that_never_closes_a_round_is_waited_for_as_long_as_the_slow_link_may_need() {
    // 60 MiB at 60 MiB/s: twice that, and the stall time.
    let mut session = draining();
    let State::Draining { until: bound, .. } = session.state else {
        panic!("{}", state_name(&session))
    };
    let seconds = (bound - STALL).as_secs_f64();
    assert!((2.5..4.0).contains(&seconds), "{seconds}");
    let bound = bound.max(session.deadlines.progress + STALL * DEAD_LANE_STALLS);
    session.heard(bound - MS);
    assert!(session.handle(Event::Tick, bound - MS).is_empty());
    let effects = session.handle(Event::Tick, bound);
    assert_eq!(finishes(&effects), 1);
    assert_eq!(reclaims(&effects), 1);
}

#[test]
fn a_lane_that_turns_out_dead_is_given_up_before_the_wait_for_its_round_ends() {
    let mut session = draining();
    let State::Draining { until, .. } = session.state else {
        panic!("{}", state_name(&session))
    };
    // Something was taken a moment ago: from then on a dead lane has its stall and the time to be settled.
    session.progressed(until - MS);
    session.heard(until + STALL);
    let settled = until - MS + STALL * DEAD_LANE_STALLS;
    assert!(session.handle(Event::Tick, until + STALL).is_empty());
    session.heard(settled);
    assert_eq!(finishes(&session.handle(Event::Tick, settled)), 1);
}

/// The event that the driver would give next in this state, if all goes well.
fn expected(session: &Session) -> Event {
    match session.state {
        State::Hello if session.control.until().is_none() => event("named").0,
        State::Hello => connected(),
        State::Parting(Parting::LastWord { .. }) => connected(),
        State::Parting(Parting::Goodbye { .. }) => Event::Tick,
        State::Setup { granted: false } => Event::Granted,
        State::Setup { granted: true } => Event::Ready,
        State::Sending { .. } => Event::Encoded {
            octets: 64 << 20,
            unacked_octets: 0,
        },
        State::Deciding { .. } => Event::Collected { pages: 3 },
        State::Draining { round, .. } => Event::Closed { round, damaged: 0 },
        State::Waiting { .. } => outlook(&[]),
        State::Pausing { .. } => Event::Paused,
        State::Quiescing { .. } => Event::DevicesQuiesced,
        State::Stopping { .. } => Event::DevicesStopped,
        State::Last(_) if !session.devices.are_saved() => Event::DevicesSaved,
        State::Collecting { .. } => Event::Collected { pages: 3 },
        State::Last(last) if !last.saved => Event::Saved,
        State::Last(last) if !last.collected => Event::Collected { pages: 0 },
        State::Last(last) if !last.encoded => Event::Encoded {
            octets: 1,
            unacked_octets: 0,
        },
        State::Last(last) if !last.final_sent => Event::FinalSent { digest: DIGEST },
        State::Last(_) => Event::Prepared { digest: DIGEST },
        State::Suspended { .. } => connected(),
        State::Rejoining { granted: false, .. } => Event::Granted,
        State::Rejoining { .. } => Event::Landed { rounds_closed: 1 },
        State::Reopening { .. } => Event::Collected { pages: 3 },
        State::Asking { .. } => Event::Answered(OutcomeState::CommittedNotRunning),
        State::Committed { .. } | State::Over => Event::Running,
    }
}

proptest! {
    /// Whatever happens in whatever order: no panic, one end, no commit without the digest of FINAL, and no way back from it.
    #[test]
    fn no_order_of_events_makes_two_owners(
        walk in proptest::collection::vec((any::<bool>(), 0..EVENTS.len(), 0u64..3000), 1..80),
        is_kept in any::<bool>(),
        afresh in any::<bool>(),
        devices in any::<bool>(),
    ) {
        let choice = if afresh { WhenDestinationLost::StartAfresh } else { WhenDestinationLost::Fail };
        let mut session = Session::new(keeping(choice), 1 << 20, Duration::ZERO);
        if is_kept {
            session.kept_for(Some(KEPT));
        } else if devices {
            session.expect_devices();
        }
        let (mut now, mut final_digest, mut committed, mut ended) = (Duration::ZERO, None, false, 0);
        for (well, index, pause_ms) in walk {
            now += MS * u32::try_from(pause_ms / 10).unwrap();
            session.heard(now);
            let mut effects = session.tick(now);
            let event = if well { expected(&session) } else { event(EVENTS[index]).0 };
            let prepared = match &event {
                Event::FinalSent { digest } if matches!(session.state, State::Last(_)) => {
                    final_digest = Some(*digest);
                    None
                }
                Event::Prepared { digest } => Some(*digest),
                _ => None,
            };
            let refused = matches!(event, Event::Answered(OutcomeState::NotCommitted));
            if matches!((session.state, &event), (State::Committed { .. }, Event::CommitUnsent(_))) {
                committed = false;
            }
            effects.extend(session.handle(event, now));
            for effect in effects {
                match effect {
                    Effect::Commit => {
                        prop_assert!(!committed, "committed twice");
                        prop_assert!(prepared.is_some() && prepared == final_digest);
                        committed = true;
                    }
                    // The destination's own word that it will never start makes it undone.
                    Effect::Reclaim { .. } if refused => committed = false,
                    Effect::Reclaim { .. } => prop_assert!(!committed, "reclaimed after the commit"),
                    Effect::Abort { .. } => prop_assert!(!committed, "an ABORT after the commit"),
                    Effect::Finish(outcome) => {
                        ended += 1;
                        let fits = match outcome {
                            Outcome::Migrated | Outcome::Unknown(_) | Outcome::Stranded(_) => committed,
                            Outcome::Failed(_) | Outcome::Cancelled(_) | Outcome::Gone(_) => !committed,
                        };
                        prop_assert!(fits);
                    }
                    _ => prop_assert_eq!(ended, 0),
                }
            }
            prop_assert!(ended <= 1);
            prop_assert_eq!(ended == 1, matches!(session.state, State::Over));
        }
    }
}

fn words(session: &mut Session, event: Event, now: Duration) -> Vec<String> {
    session.handle(event, now).iter().map(word).collect()
}

#[test]
fn a_guest_that_was_paused_runs_again_before_anything_else_when_the_link_is_lost() {
    for (steps, paused) in [(2, false), (3, false), (4, true), (6, true), (11, true)] {
        let mut session = kept(steps, vec![]);
        let effects = words(&mut session, lost(), NOW);
        let expected: &[&str] = if paused {
            &["reclaim and resume", "disconnect"]
        } else {
            &["disconnect"]
        };
        assert_eq!(effects, expected, "{steps}");
        assert_eq!(session.phase(), Phase::Suspended);
    }
}

#[test]
fn the_rounds_go_on_with_what_the_destination_has_closed() {
    let mut session = kept(11, vec![lost(), connected()]);
    assert_eq!(words(&mut session, Event::Granted, NOW), ["send set-up"]);
    let landed = Event::Landed { rounds_closed: 1 };
    assert_eq!(words(&mut session, landed, NOW), ["collect"]);
    let collected = Event::Collected { pages: 1 << 18 };
    assert_eq!(words(&mut session, collected, NOW), ["open 1"]);
    assert_eq!(session.phase(), Phase::Rounds);
    // The second switchover pauses the guest again.
    let encoded = Event::Encoded {
        octets: 64 << 20,
        unacked_octets: 0,
    };
    let _ = session.handle(encoded, NOW + 60 * MS);
    let collected = Event::Collected { pages: 10 };
    assert_eq!(
        words(&mut session, collected, NOW + 61 * MS),
        ["forecast", "pause"]
    );
}

#[test]
fn a_lane_that_is_lost_on_the_way_back_ends_nothing_and_is_named_if_none_comes() {
    let mut session = kept(11, vec![lost(), connected(), Event::Granted]);
    assert!(words(&mut session, Event::LaneLost { pages: 7, items: 0 }, NOW).is_empty());
    assert!(session.is_rejoining());
    let lane = ChannelRef::Lane(multifd_wire::LaneId::new(2));
    session.hindered(Error::new(Phase::Setup, Fault::Dial("no way".into())).at(lane));
    let (due, until) = (session.next_deadline(), NOW + KEPT);
    assert!(due < until);
    assert_eq!(words(&mut session, Event::Tick, due), ["disconnect"]);
    let effects = session.handle(Event::Tick, until);
    let Some(Effect::Finish(Outcome::Failed(error))) = effects.last() else {
        panic!("{effects:?}");
    };
    assert_eq!(error.code(), "sender.channel.not-reconnected");
    assert_eq!(error.channel(), lane);
    assert!(error.to_string().contains("no way"), "{error}");
}

#[test]
fn what_stood_in_the_way_back_last_is_told_beside_why_the_link_was_lost() {
    let mut session = kept(11, vec![lost()]);
    let (early, late) = ("nobody listens", "TLS: its certificate has expired");
    for text in [early, late] {
        let error = Error::new(Phase::Suspended, Fault::Dial(text.into()));
        session.hindered(error.at(ChannelRef::Control));
    }
    let effects = session.handle(Event::Tick, NOW + KEPT);
    let Some(Effect::Finish(Outcome::Failed(error))) = effects.last() else {
        panic!("{effects:?}");
    };
    assert_eq!(error.code(), "sender.channel.not-reconnected");
    let text = error.to_string();
    assert!(text.contains(late) && !text.contains(early), "{text}");
    assert!(text.contains("the link was lost because"), "{text}");
}

#[test]
fn after_a_resume_devices_are_waited_for_stopped_and_saved_once_more() {
    // Everything of them had been saved when the link was lost.
    let mut session = devices_kept(12, vec![lost(), connected(), Event::Granted]);
    let landed = Event::Landed { rounds_closed: 1 };
    assert_eq!(words(&mut session, landed, NOW), ["collect"]);
    // Looked at by that very collection: new initial bytes are on their way.
    assert!(words(&mut session, outlook(&["nic"]), NOW).is_empty());
    assert_eq!(
        words(&mut session, Event::Collected { pages: 9 }, NOW),
        ["open 1"]
    );
    let encoded = Event::Encoded {
        octets: 64 << 20,
        unacked_octets: 0,
    };
    let _ = session.handle(encoded, NOW + 60 * MS);
    let collected = Event::Collected { pages: 10 };
    assert_eq!(
        words(&mut session, collected, NOW + 61 * MS),
        ["forecast", "await devices"]
    );
    let _ = session.handle(outlook(&[]), NOW + 62 * MS);
    let collected = Event::Collected { pages: 10 };
    assert_eq!(
        words(&mut session, collected, NOW + 63 * MS),
        ["forecast", "pause"]
    );
    assert_eq!(
        words(&mut session, Event::Paused, NOW + 64 * MS),
        ["quiesce devices"]
    );
    assert_eq!(
        words(&mut session, Event::DevicesQuiesced, NOW + 64 * MS),
        ["stop devices"]
    );
    let _ = session.handle(Event::DevicesStopped, NOW + 64 * MS);
    let _ = session.handle(Event::Collected { pages: 1 }, NOW + 64 * MS);
    // The state alone is not enough.
    assert!(words(&mut session, Event::Saved, NOW + 65 * MS).is_empty());
    assert_eq!(
        words(&mut session, Event::DevicesSaved, NOW + 66 * MS),
        ["collect (paused)"]
    );
}

#[test]
fn a_link_that_is_lost_on_the_way_back_does_not_prolong_the_deadline() {
    let mut session = kept(2, vec![lost()]);
    let until = session.next_deadline();
    let _ = session.handle(connected(), NOW + 100 * MS);
    assert_eq!(words(&mut session, lost(), NOW + 200 * MS), ["disconnect"]);
    assert_eq!(session.next_deadline(), until);
    let effects = words(&mut session, Event::Tick, until);
    let code = "finish: failed, sender.channel.not-reconnected";
    assert_eq!(effects.last().unwrap(), code);
}

#[test]
fn it_is_suspended_only_so_often() {
    let mut session = kept(2, vec![]);
    let mut times = 0;
    while words(&mut session, lost(), NOW) == ["disconnect"] {
        times += 1;
        for event in [
            connected(),
            Event::Granted,
            Event::Landed { rounds_closed: 0 },
            Event::Collected { pages: 1 },
        ] {
            let _ = session.handle(event, NOW);
        }
    }
    assert_eq!(times, SUSPENSIONS_MAX);
    assert!(matches!(session.state, State::Over));
}

#[test]
fn damage_on_the_control_channel_is_a_loss_of_it_but_not_for_ever() {
    let damage = || {
        let fault = Fault::Malformed(multifd_wire::Malformed::HeaderCrc {
            found: 1,
            computed: 2,
        });
        let error = Error::new(Phase::Rounds, fault).at(ChannelRef::Control);
        assert!(error.loses_control() && error.is_damage());
        Event::Lost(error)
    };
    let mut session = kept(2, vec![]);
    for times in 1..=DAMAGES_MAX {
        assert_eq!(words(&mut session, damage(), NOW), ["disconnect"]);
        assert_eq!(session.damages(), times);
        for event in [
            connected(),
            Event::Granted,
            Event::Landed { rounds_closed: 0 },
            Event::Collected { pages: 1 },
        ] {
            let _ = session.handle(event, NOW);
        }
    }
    let end = words(&mut session, damage(), NOW);
    assert_eq!(end[1], format!("ABORT {}", Reason::Corruption.as_u32()));
    assert!(matches!(session.state, State::Over));
}

#[test]
fn a_first_set_up_that_is_lost_is_made_again_within_its_own_deadline() {
    for (steps, kept_for) in [(0, Some(KEPT)), (1, None)] {
        let mut session = led(keeping(WhenDestinationLost::Fail), steps);
        session.kept_for(kept_for);
        // Without a grant there is nothing to show, and nothing to come back to.
        let _ = session.handle(lost(), NOW);
        assert!(matches!(session.state, State::Over), "{steps}");
    }
    let mut session = kept(1, vec![lost()]);
    assert_eq!(session.phase(), Phase::Suspended);
    assert!(session.next_deadline() <= config().setup_deadline.min(KEPT + NOW));
    assert!(words(&mut session, connected(), NOW).is_empty());
    assert_eq!(words(&mut session, Event::Granted, NOW), ["send set-up"]);
    let landed = Event::Landed { rounds_closed: 0 };
    assert_eq!(words(&mut session, landed, NOW), ["collect"]);
    assert_eq!(
        words(&mut session, Event::Collected { pages: 0 }, NOW),
        ["open 0"]
    );
}

#[test]
fn a_destination_that_forgot_is_begun_with_anew_only_if_told_to() {
    let forgotten = || event("forgotten").0;
    let mut session = kept(2, vec![lost()]);
    let end = words(&mut session, forgotten(), NOW);
    assert_eq!(
        end.last().unwrap(),
        "finish: failed, sender.peer.session-lost"
    );
    let mut session = led(keeping(WhenDestinationLost::StartAfresh), 2);
    session.kept_for(Some(KEPT));
    let _ = session.handle(lost(), NOW);
    dials(&mut session, NOW);
    assert_eq!(
        words(&mut session, forgotten(), NOW),
        ["disconnect", "start afresh"]
    );
    assert_eq!(session.phase(), Phase::Hello);
    for event in [event("named").0, connected()] {
        assert!(words(&mut session, event, NOW).is_empty());
    }
    assert_eq!(words(&mut session, Event::Granted, NOW), ["send set-up"]);
    assert_eq!(words(&mut session, Event::Ready, NOW), ["open 0"]);
}

#[test]
fn with_the_guest_paused_a_silent_destination_is_given_up_soon_if_it_keeps_the_migration() {
    for (is_kept, silence) in [(true, Duration::from_secs(1)), (false, STALL)] {
        let mut session = led(keeping(WhenDestinationLost::Fail), 6);
        session.kept_for(is_kept.then_some(KEPT));
        session.heard(NOW);
        assert_eq!(session.next_deadline(), NOW + silence);
    }
}

/// SPEC: RUNNING-2
#[test]
fn the_question_behind_running_is_answered_and_it_ends_whether_or_not_that_could_be_sent() {
    let asks = Frame::KeepAlive(KeepAlive {
        stamp_us: 7,
        echo_us: 0,
        held_us: 0,
        asks: Asks::Answer,
    });
    for sent in [true, false] {
        let mut session = led(config(), 13);
        assert!(session.due() > NOW / 2, "the question may take a moment");
        let answer = session.frame(ChannelRef::Control, &asks, 80 * MS);
        let [Effect::Send(Frame::KeepAlive(answer))] = answer[..] else {
            panic!("{answer:?}");
        };
        assert_eq!((answer.echo_us, answer.asks), (7, Asks::Nothing));
        assert!(session.due() <= 80 * MS);
        let end = if sent {
            session.tick(80 * MS)
        } else {
            session.handle(lost(), 80 * MS)
        };
        assert_eq!(spoken(&end), ["finish: migrated"], "sent: {sent}");
    }
}

#[test]
fn a_destination_that_keeps_a_session_nobody_comes_back_to_is_told_if_it_can_be_reached() {
    let mut session = kept(6, vec![lost(), Event::Cancel]);
    assert_eq!(session.phase(), Phase::Done);
    // The attempt that was under way counts.
    assert!(session.awaits(1));
    let again = session.handle(not_connected(Lasts::ForGood), NOW);
    assert!(again.is_empty() && session.due() < NOW + 100 * MS);
    let due = session.due();
    assert_eq!(spoken(&session.tick(due)), ["dial: Resume"]);
    let told = session.handle(connected(), due);
    assert_eq!(spoken(&told), ["ABORT 1", "finish: cancelled"]);
}

#[test]
fn each_answer_after_the_commit_has_its_end_and_silence_leaves_it_unknown() {
    let cases = [
        (OutcomeState::Running, "finish: migrated"),
        (
            OutcomeState::FailedAfterCommit,
            "finish: stranded, sender.peer.failed-after-commit",
        ),
        (
            OutcomeState::NotCommitted,
            "finish: failed, sender.not-committed",
        ),
    ];
    for (answer, end) in cases {
        let mut session = kept(12, vec![lost()]);
        let not_yet = Event::Answered(OutcomeState::CommittedNotRunning);
        assert!(session.handle(not_yet, NOW).is_empty());
        let last = words(&mut session, Event::Answered(answer), NOW);
        assert_eq!(last.last().unwrap(), end);
    }
    let mut session = kept(12, vec![lost()]);
    let until = session.next_deadline();
    let last = words(&mut session, Event::Tick, until);
    assert_eq!(last, ["finish: unknown, sender.outcome-unknown"]);
}
