//! Signs of life: when this side gives one, what it answers to the destination's, and the round trip.
//!
//! ```text
//!   every period     ──► KEEP_ALIVE that asks
//!   one that asks    ──► KEEP_ALIVE that asks nothing        one that echoes a stamp of ours ──► a round trip
//! ```
//! What is stamped and echoed, and what an echo may say, is [`Pulse`]'s work.

use std::time::Duration;

use multifd_wire::Pulse;
use multifd_wire::frame::{Asks, KeepAlive as Frame};

/// With the guest paused this side says that it lives this often, and is answered: a link that is lost then is found soon.
const PAUSED_PERIOD: Duration = Duration::from_millis(200);

/// What follows a sign of life of the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Heard {
    /// It asks: this is the answer.
    pub(super) answer: Option<Frame>,
    /// It answers what was asked so long ago.
    pub(super) round_trip: Option<Duration>,
}

/// When the next sign of life is due, and the stamps of the present control channel.
#[derive(Debug)]
pub(super) struct KeepAlive {
    period: Duration,
    due: Duration,
    pulse: Pulse,
}

impl KeepAlive {
    pub(super) fn new(period: Duration) -> Self {
        Self {
            period,
            due: Duration::MAX,
            pulse: Pulse::new(Duration::MAX),
        }
    }

    /// A new control channel is open. `hello`: the time from its hello to the reply.
    pub(super) fn connected(&mut self, hello: Duration, now: Duration) {
        self.due = now + self.period;
        self.pulse = Pulse::new(hello);
    }

    /// There is no control channel any more.
    pub(super) fn disconnected(&mut self) {
        self.due = Duration::MAX;
    }

    pub(super) fn due(&self) -> Duration {
        self.due
    }

    /// The question, if one is due.
    pub(super) fn tick(&mut self, paused: bool, now: Duration) -> Option<Frame> {
        if now < self.due {
            return None;
        }
        let period = if paused {
            self.period.min(PAUSED_PERIOD)
        } else {
            self.period
        };
        self.due = now + period;
        Some(self.asks(now))
    }

    /// A sign of life that asks for one.
    pub(super) fn asks(&mut self, now: Duration) -> Frame {
        self.pulse.ask(now)
    }

    pub(super) fn heard(&mut self, frame: &Frame, now: Duration) -> Heard {
        let heard = self.pulse.heard(frame, now);
        Heard {
            answer: (heard.asks == Asks::Answer).then(|| self.pulse.answer(now)),
            round_trip: heard.round_trip,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn asks_once_a_period_and_more_often_while_the_guest_is_paused() {
        let mut alive = KeepAlive::new(1000 * MS);
        assert_eq!(alive.due(), Duration::MAX, "there is no channel");
        alive.connected(MS, Duration::ZERO);
        assert_eq!(alive.tick(false, 999 * MS), None);
        let asked = alive.tick(false, 1000 * MS).unwrap();
        assert_eq!(
            (asked.stamp_us, asked.echo_us, asked.asks),
            (1_000_000, 0, Asks::Answer)
        );
        assert_eq!(alive.due(), 2000 * MS);
        assert!(alive.tick(true, 2000 * MS).is_some());
        assert_eq!(alive.due(), 2200 * MS);
        alive.connected(MS, 5000 * MS);
        assert_eq!(alive.tick(true, 5999 * MS), None);
    }

    #[test]
    fn a_question_is_answered_with_its_stamp_and_an_answer_gives_the_round_trip() {
        let mut alive = KeepAlive::new(1000 * MS);
        alive.connected(100 * MS, Duration::ZERO);
        let asks = Frame {
            stamp_us: 77,
            echo_us: 0,
            held_us: 0,
            asks: Asks::Answer,
        };
        let heard = alive.heard(&asks, 3 * MS);
        let answer = heard.answer.unwrap();
        assert_eq!((answer.echo_us, answer.asks), (77, Asks::Nothing));
        assert_eq!(heard.round_trip, None);
        let asked = alive.tick(false, 1000 * MS).unwrap();
        let echo = |echo_us| Frame {
            stamp_us: 78,
            echo_us,
            held_us: 0,
            asks: Asks::Nothing,
        };
        let heard = alive.heard(&echo(asked.stamp_us), 1003 * MS);
        assert_eq!((heard.answer, heard.round_trip), (None, Some(3 * MS)));
        let late = alive.heard(&echo(asked.stamp_us), 9000 * MS);
        assert_eq!(
            late.round_trip,
            Some(100 * MS),
            "no longer than the hello's"
        );
        assert_eq!(alive.heard(&echo(u64::MAX), 9001 * MS).round_trip, None);
        alive.connected(100 * MS, 9002 * MS);
        let before = alive.heard(&echo(asked.stamp_us), 9003 * MS);
        assert_eq!(before.round_trip, None, "of another channel");
    }
}
