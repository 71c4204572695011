//! Dialling again: when the next attempt is due, and what one attempt is.
//!
//! The rule it keeps: an attempt is short, and so is the pause after it, so that a link that is back is used at once; what is
//! bounded is how long it goes on and how often a lane is lost.

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use multifd_transport::Channel;
use multifd_wire::frame::OutcomeState;
use multifd_wire::{ChannelRef, Hello};

use super::lane::{LaneCommand, serve};
use super::link::{Open, open, read_outcome};
use super::tries::open_first;
use super::{Dial, LaneState, Note, Shared};
use crate::error::Fault;

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
    pub(super) due: Duration,
    pub(super) until: Duration,
    pub(super) attempts: u32,
}

impl Redial {
    /// Dials at once, and no longer than until `until`.
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

/// What follows a failed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Another one, after this pause.
    In(Duration),
    /// Nothing: the time is used up.
    GiveUp,
}

/// Makes a connection for a channel that was lost. `round_trip`: the shortest that was seen.
pub(super) fn dial_again(
    shared: &Shared,
    dial: &dyn Dial,
    channel: ChannelRef,
    round_trip: Option<Duration>,
) -> Result<Box<dyn Channel>, Fault> {
    let patience = CONNECT_BASE + round_trip.unwrap_or_default() * CONNECT_ROUND_TRIPS;
    let deadline = Instant::now() + patience.min(shared.config.hello_deadline());
    dial.dial(channel, deadline)
        .map_err(|e| Fault::Dial(e.to_string()))
}

/// What a new control channel is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To go on with the session.
    Resume,
    /// To ask how it ended.
    Ask,
    /// To begin another one.
    Start,
}

/// The destination was reached again.
pub(super) enum Reached {
    /// A control channel, accepted.
    Control(Open),
    /// An answer; the channel is closed again.
    Answer(OutcomeState),
}

/// One attempt to reach the destination again.
pub(super) fn reach(
    shared: &Shared,
    dial: &dyn Dial,
    purpose: Purpose,
    hello: &Hello,
    round_trip: Option<Duration>,
) -> Result<Reached, Fault> {
    let channel = dial_again(shared, dial, ChannelRef::Control, round_trip)?;
    shared.check_stop()?;
    let deadline = Instant::now() + shared.config.hello_deadline();
    let mut opened = open(channel, hello, deadline)?;
    if purpose == Purpose::Ask {
        opened.rx.set_deadline(Some(deadline));
        let state = read_outcome(&mut *opened.rx)?;
        return Ok(Reached::Answer(state));
    }
    Ok(Reached::Control(opened))
}

/// How the connection of a lane is made.
#[derive(Debug, Clone, Copy)]
pub(super) enum Attempt {
    /// For the first time: everything that is wrong is found here, so it may take its time.
    First,
    /// Again: it is one of many.
    Again {
        /// The shortest round trip that was seen.
        round_trip: Option<Duration>,
    },
}

/// The life of one lane's thread: dial, hello, serve.
pub(super) fn lane_life(
    shared: &Shared,
    dial: &dyn Dial,
    attempt: Attempt,
    hello: &Hello,
    state: &LaneState,
    orders: &Receiver<LaneCommand>,
    notes: &Sender<Note>,
) -> Result<(), Fault> {
    let at = ChannelRef::Lane(state.id);
    let opened = match attempt {
        Attempt::First => open_first(shared, dial, at, hello)?,
        Attempt::Again { round_trip } => {
            let deadline = Instant::now() + shared.config.hello_deadline();
            let channel = dial_again(shared, dial, at, round_trip)?;
            shared.check_stop()?;
            open(channel, hello, deadline)?
        }
    };
    let (mut tx, rx) = (opened.tx, opened.rx);
    tx.set_stall(Some(shared.config.stall()));
    let _ = notes.send(Note::LaneUp {
        lane: state.id,
        incarnation: state.incarnation,
        closer: opened.closer,
        description: opened.description,
    });
    let result = serve(shared, state, tx, orders, notes);
    // Kept until here: closing the receiving half earlier would reset the connection.
    drop(rx);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn a_link_that_is_back_is_found_out_within_a_second() {
        assert!(PAUSE_MAX + CONNECT_BASE < 1000 * MS);
    }
}
