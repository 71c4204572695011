//! KEEP_ALIVE between two sides: late, early and made-up echoes measure nothing that is not so, and no answer is answered.

use std::time::Duration;

use multifd_wire::Pulse;
use multifd_wire::frame::{Asks, KeepAlive};

const MS: Duration = Duration::from_millis(1);

/// The hello was answered after 5 ms.
const HELLO: Duration = Duration::from_millis(5);

fn echo(echo_us: u64, held_us: u64) -> KeepAlive {
    KeepAlive {
        stamp_us: 77,
        echo_us,
        held_us,
        asks: Asks::Nothing,
    }
}

// SPEC: ALIVE-1, ALIVE-4, ALIVE-5, ALIVE-6
#[test]
fn a_question_is_answered_once_and_measures_the_round_trip() {
    let (mut source, mut destination) = (Pulse::new(HELLO), Pulse::new(HELLO));
    let question = source.ask(10 * MS);
    assert_eq!((question.echo_us, question.held_us), (0, 0));
    let heard = destination.heard(&question, 500 * MS);
    assert_eq!((heard.asks, heard.round_trip), (Asks::Answer, None));
    let answer = destination.answer(500 * MS);
    assert_eq!(answer.echo_us, question.stamp_us);
    let heard = source.heard(&answer, 12 * MS);
    assert_eq!(
        (heard.asks, heard.round_trip),
        (Asks::Nothing, Some(2 * MS))
    );
}

// SPEC: ALIVE-6
#[test]
fn an_echo_on_the_peers_own_timer_is_measured_without_the_time_that_the_peer_held_it() {
    let (mut source, mut destination) = (Pulse::new(HELLO), Pulse::new(HELLO));
    let question = source.ask(10 * MS);
    destination.heard(&question, 40 * MS);
    let late = destination.ask(840 * MS);
    assert_eq!((late.echo_us, late.held_us), (question.stamp_us, 800_000));
    let trip = source.heard(&late, 812 * MS).round_trip;
    assert_eq!(trip, Some(2 * MS));
}

// SPEC: ALIVE-6
#[test]
fn a_late_echo_that_says_nothing_of_it_is_no_longer_than_the_hello() {
    let mut source = Pulse::new(HELLO);
    let question = source.ask(10 * MS);
    let heard = source.heard(&echo(question.stamp_us, 0), 810 * MS);
    assert_eq!(heard.round_trip, Some(HELLO));
}

// SPEC: ALIVE-6
#[test]
fn stamps_that_were_never_sent_measure_nothing() {
    let mut source = Pulse::new(HELLO);
    let question = source.ask(10 * MS);
    for stamp in [0, 1, question.stamp_us + 1, u64::MAX] {
        let heard = source.heard(&echo(stamp, 0), 11 * MS);
        assert_eq!(heard.round_trip, None, "stamp {stamp}");
        assert!(!source.has_read(&echo(stamp, 0), 1), "stamp {stamp}");
    }
    let before_it_was_sent = source.heard(&echo(question.stamp_us, 0), 9 * MS);
    assert_eq!(before_it_was_sent.round_trip, None);
    let held_too_long = source.heard(&echo(question.stamp_us, 1_001), 11 * MS);
    assert_eq!(held_too_long.round_trip, None);
    let held_for_ever = source.heard(&echo(question.stamp_us, u64::MAX), 11 * MS);
    assert_eq!(held_for_ever.round_trip, None);
}

// SPEC: ALIVE-1
#[test]
fn each_stamp_is_above_the_one_before_also_when_the_clock_stands() {
    let mut side = Pulse::new(HELLO);
    let stamps: Vec<u64> = (0..100)
        .map(|_| side.ask(Duration::ZERO).stamp_us)
        .collect();
    assert!(stamps.is_sorted_by(|one, next| one < next), "{stamps:?}");
    assert!(stamps[0] > 0);
}

// SPEC: ALIVE-5
#[test]
fn two_sides_that_answer_every_question_say_no_more_than_that() {
    let mut sides = [Pulse::new(HELLO), Pulse::new(HELLO)];
    let mut under_way = vec![(0, sides[1].ask(MS)), (1, sides[0].ask(MS))];
    let mut said = 0;
    while let Some((to, frame)) = under_way.pop() {
        said += 1;
        assert!(said <= 4, "answers are answered");
        if sides[to].heard(&frame, 2 * MS).asks == Asks::Answer {
            under_way.push((1 - to, sides[to].answer(2 * MS)));
        }
    }
    assert_eq!(said, 4, "two questions, two answers");
}

// SPEC: RUNNING-2
#[test]
fn a_stamp_was_read_when_it_or_a_later_one_is_echoed() {
    let mut side = Pulse::new(HELLO);
    let (before, asked, after) = (side.ask(MS), side.ask(2 * MS), side.ask(3 * MS));
    assert!(!side.has_read(&echo(before.stamp_us, 0), asked.stamp_us));
    assert!(side.has_read(&echo(asked.stamp_us, 0), asked.stamp_us));
    assert!(side.has_read(&echo(after.stamp_us, 5), asked.stamp_us));
}
