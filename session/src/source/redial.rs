//! When a lost channel is dialled again.
//!
//! The rule it keeps: an attempt is short, and so is the pause after it, so that a link that is back is used at once; what is
//! bounded is how long it goes on.

use std::time::Duration;

use super::hello::{Lasts, NotOpened};

/// The pause after the first attempt that failed; each further one is twice as long, up to [`PAUSE_MAX`].
const PAUSE_FIRST: Duration = Duration::from_millis(20);

/// The longest pause between two attempts. A link that comes back is found out within this and [`CONNECT_BASE`].
const PAUSE_MAX: Duration = Duration::from_millis(250);

/// A connection that is not made within this and some round trips is tried anew: a kernel repeats a lost first packet only
/// after a second, then two, then four, and a link may come back meanwhile.
const CONNECT_BASE: Duration = Duration::from_millis(400);

/// Round trips that a connection may take beside [`CONNECT_BASE`].
const CONNECT_ROUND_TRIPS: u32 = 4;

/// When to dial next, and when to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Redial {
    /// When the next attempt is due.
    pub(super) due: Duration,
    /// When to stop.
    pub(super) until: Duration,
    attempts: u32,
}

impl Redial {
    /// Dials at once, and no longer than until `until`.
    #[must_use]
    pub(super) fn at_once(now: Duration, until: Duration) -> Self {
        Self {
            due: now,
            until,
            attempts: 0,
        }
    }

    /// An attempt failed: when the next one is due, or that there is none.
    pub(super) fn failed(&mut self, now: Duration) -> Next {
        if now >= self.until {
            return Next::GiveUp;
        }
        let pause = PAUSE_FIRST
            .saturating_mul(1 << self.attempts.min(16))
            .min(PAUSE_MAX);
        self.attempts = self.attempts.saturating_add(1);
        self.due = (now + pause).min(self.until);
        Next::In(self.due.saturating_sub(now))
    }
}

impl Redial {
    /// An attempt to open a channel for the first time failed. What is wrong for good ends it at once; what may pass is tried again
    /// as long as there is time for more than to fail once more.
    pub(super) fn first_failed(&mut self, why: &NotOpened, now: Duration) -> First {
        if why.lasts == Lasts::ForGood {
            return First::Over;
        }
        if why.is_out_of_time() {
            return First::OutOfTime;
        }
        match self.failed(now) {
            Next::In(_) if self.due < self.until => First::Again,
            Next::In(_) | Next::GiveUp => First::Over,
        }
    }
}

/// What follows a failed attempt to open a channel for the first time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum First {
    /// Another one.
    Again,
    /// Nothing: the time ran out, which says less than what ended the attempt before.
    OutOfTime,
    /// Nothing, for this reason.
    Over,
}

/// What follows a failed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Another one, after this pause.
    In(Duration),
    /// Nothing: the time is used up.
    GiveUp,
}

/// How long one attempt to connect may take. `round_trip`: the shortest that was seen.
#[must_use]
pub(super) fn connect_timeout(round_trip: Option<Duration>) -> Duration {
    CONNECT_BASE + round_trip.unwrap_or_default() * CONNECT_ROUND_TRIPS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::ChannelFault;
    use crate::source::error::Fault;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn pauses_grow_to_their_bound_and_end_at_the_deadline() {
        let mut redial = Redial::at_once(Duration::ZERO, 2000 * MS);
        let mut now = Duration::ZERO;
        let mut pauses = Vec::new();
        while let Next::In(pause) = redial.failed(now) {
            pauses.push(pause);
            now += pause;
        }
        assert_eq!(pauses[..5], [20 * MS, 40 * MS, 80 * MS, 160 * MS, 250 * MS]);
        assert!(pauses.iter().all(|pause| *pause <= PAUSE_MAX));
        assert_eq!(now, 2000 * MS, "the last attempt is made at the deadline");
    }

    #[test]
    fn a_first_connection_is_tried_again_for_what_may_pass_and_not_in_the_last_moment() {
        let refused = |lasts| NotOpened::unconnected("refused".into(), lasts);
        let mut redial = Redial::at_once(Duration::ZERO, 100 * MS);
        let mut now = Duration::ZERO;
        let mut tries = 0;
        while redial.first_failed(&refused(Lasts::MayPass), now) == First::Again {
            tries += 1;
            now = redial.due;
        }
        assert_eq!(
            (tries, now),
            (2, 60 * MS),
            "after 20 and 40 ms, and not after 80"
        );
        let mut redial = Redial::at_once(Duration::ZERO, 100 * MS);
        let over = redial.first_failed(&refused(Lasts::ForGood), Duration::ZERO);
        assert_eq!(over, First::Over);
        let late = ChannelFault::new("channel-deadline", false, "late");
        let late = NotOpened::unanswered("tcp:a:1".into(), Fault::Channel(late));
        assert_eq!(redial.first_failed(&late, 50 * MS), First::OutOfTime);
    }

    #[test]
    fn a_link_that_is_back_is_found_out_within_a_second() {
        assert!(PAUSE_MAX + CONNECT_BASE < 1000 * MS);
    }
}
