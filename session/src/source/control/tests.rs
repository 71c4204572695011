//! The table of what the control channel is dialled for and what happens, printed and compared with `table.txt`; its bounds.

use std::fmt::Write as _;

use multifd_wire::frame::Grant;
use multifd_wire::{Features, Incompatible, Reason, SessionId, Token};

use super::*;
use crate::common::{ChannelFault, Failure as _};
use crate::source::hello::Lasts;

const MS: Duration = Duration::from_millis(1);
const UNTIL: Duration = Duration::from_secs(5);
const TIMING: Timing = Timing {
    hello: Duration::from_secs(3),
    round_trip: Some(Duration::from_millis(10)),
};

fn hellos() -> Hellos {
    let mut hellos = Hellos::new(Token::NONE, UNTIL);
    hellos.begin(SessionId::new([1; 16]));
    hellos.accepted(Features::RESUME);
    let _ = hellos.granted(&Grant {
        ticket: Token::new([1; 16]),
        resume_secret: Token::new([2; 16]),
        lanes_max: 1,
        suspend_ms: 1000,
        device_window_bytes: 0,
    });
    hellos
}

fn refused(reason: Reason) -> NotOpened {
    let text = "no".into();
    Incompatible::Refused { reason, text }.into()
}

fn nobody(lasts: Lasts) -> NotOpened {
    NotOpened::unconnected("nobody listens".into(), lasts)
}

fn late() -> NotOpened {
    let late = ChannelFault::new("channel-deadline", false, "late");
    NotOpened::unanswered("tcp:a:1".into(), Fault::Channel(late))
}

/// Dials, and makes the first attempt.
fn dialling(purpose: Purpose) -> Control {
    let mut control = Control::default();
    control.dial(purpose, Duration::ZERO, UNTIL);
    assert!(control.tick(&hellos(), &TIMING, Duration::ZERO).is_some());
    control
}

fn state(control: &Control) -> String {
    match &control.way {
        None => "closed".into(),
        Some(way) if way.dialling => "dialling".into(),
        Some(way) => format!("due in {:?}", way.redial.due.saturating_sub(MS)),
    }
}

#[test]
fn the_table_of_purposes_and_events() {
    let mut table = String::new();
    type Fails = fn() -> NotOpened;
    let failures: [(&str, Fails); 6] = [
        ("may pass", || nobody(Lasts::MayPass)),
        ("for good", || nobody(Lasts::ForGood)),
        ("out of time", late),
        ("busy", || refused(Reason::Busy)),
        ("wrong session", || refused(Reason::WrongSession)),
        ("version", || refused(Reason::Version)),
    ];
    for purpose in [Purpose::Start, Purpose::Resume, Purpose::Ask] {
        writeln!(table, "{purpose:?}").unwrap();
        for (name, why) in failures {
            let mut control = dialling(purpose);
            let word = match control.failed(1, why(), MS) {
                Failed::Old => "old news".to_owned(),
                Failed::Again(_) => "again".to_owned(),
                Failed::OutOfTime(fault) => format!("out of time, {}", fault.code()),
                Failed::Over(fault) => format!("over, {}", fault.code()),
                Failed::Forgotten(fault) => format!("forgotten, {}", fault.code()),
            };
            writeln!(table, "    {name:14} {word} -> {}", state(&control)).unwrap();
        }
        let mut control = dialling(purpose);
        control.answered(MS);
        writeln!(table, "    {:14} -> {}", "answered", state(&control)).unwrap();
        control.rest();
        writeln!(table, "    {:14} -> {}", "open", state(&control)).unwrap();
    }
    assert_eq!(table, include_str!("table.txt"));
}

#[test]
fn one_attempt_at_a_time_and_only_the_newest_counts() {
    let mut control = dialling(Purpose::Resume);
    assert_eq!(control.due(), Duration::MAX);
    assert!(control.tick(&hellos(), &TIMING, UNTIL).is_none());
    assert!(matches!(control.failed(2, late(), MS), Failed::Old));
    assert!(matches!(control.failed(1, late(), MS), Failed::Again(_)));
    assert!(matches!(control.failed(1, late(), MS), Failed::Old));
    assert_eq!(control.due(), 21 * MS);
    assert!(control.tick(&hellos(), &TIMING, 20 * MS).is_none());
    assert!(control.tick(&hellos(), &TIMING, 21 * MS).is_some());
    assert!(control.awaits(2));
    // One that is under way for the same purpose is waited for.
    control.dial(Purpose::Resume, 30 * MS, UNTIL);
    assert!(control.awaits(2));
    control.dial(Purpose::Ask, 30 * MS, UNTIL);
    assert!(!control.awaits(2));
}

#[test]
fn a_first_attempt_may_take_all_of_the_time_and_others_are_short() {
    let take = |purpose| {
        let mut control = Control::default();
        control.dial(purpose, MS, UNTIL);
        match control.tick(&hellos(), &TIMING, MS) {
            Some(Effect::DialControl { attempt, .. }) => (attempt.connect_by, attempt.answer_by),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(take(Purpose::Start), (UNTIL, UNTIL));
    let connect = MS + connect_timeout(TIMING.round_trip);
    assert_eq!(take(Purpose::Resume), (connect, connect + TIMING.hello));
    assert_eq!(take(Purpose::Ask), take(Purpose::Resume));
}

#[test]
fn first_attempts_end_before_their_deadline_and_those_of_a_session_go_on() {
    for (purpose, ends) in [(Purpose::Start, true), (Purpose::Resume, false)] {
        let mut control = dialling(purpose);
        let (mut number, mut now) = (1, MS);
        let ended = loop {
            match control.failed(number, nobody(Lasts::MayPass), now) {
                Failed::Again(_) => {}
                Failed::Over(_) => break true,
                other => panic!("{other:?}"),
            }
            if now >= UNTIL {
                break false;
            }
            now = control.due();
            assert!(control.tick(&hellos(), &TIMING, now).is_some());
            number += 1;
        };
        assert_eq!(ended, ends, "{purpose:?} at {now:?}");
        assert!((20..30).contains(&number), "{number} attempts");
    }
}
