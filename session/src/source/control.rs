//! The life of the control channel: for what it is dialled, when, and what follows when an attempt comes to nothing.
//!
//! ```text
//!   closed ──dial──► due ──attempt──► dialling ──accepted──► open ──lost──► closed
//!                     ▲──may pass, time left──┘ └──for good, or out of time──► closed
//! ```
//! The rules it keeps: one attempt at a time, and one deadline for all of them together; a first connection ends with what is wrong for
//! good, while a session that comes back tries on whatever happened, unless the destination says that it has it no more.

use std::time::Duration;

use super::error::Fault;
use super::event::Effect;
use super::hello::{Attempt, Hellos, NotOpened, Purpose};
use super::redial::{First, Redial, connect_timeout};

/// How long attempts may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timing {
    /// For the answer to a hello.
    pub(super) hello: Duration,
    /// The shortest round trip that was seen.
    pub(super) round_trip: Option<Duration>,
}

impl Timing {
    /// When an attempt that is one of many must have a connection, and an answer.
    pub(super) fn short(&self, now: Duration) -> (Duration, Duration) {
        let connect_by = now + connect_timeout(self.round_trip).min(self.hello);
        (connect_by, connect_by + self.hello)
    }
}

/// The way to a control channel.
#[derive(Debug)]
struct Way {
    purpose: Purpose,
    redial: Redial,
    /// An attempt is under way.
    dialling: bool,
}

/// What follows an attempt that came to nothing.
#[derive(Debug)]
pub(super) enum Failed {
    /// Nobody waits for it any more.
    Old,
    /// There is another one; this one ended with that.
    Again(Fault),
    /// There is none: the time is over, and says less than what the attempt before ended with.
    OutOfTime(Fault),
    /// There is none, for this.
    Over(Fault),
    /// The destination does not have the session any more.
    Forgotten(Fault),
}

/// When the control channel is dialled.
#[derive(Debug, Default)]
pub(super) struct Control {
    way: Option<Way>,
    /// Counts the attempts, so that what comes of an old one is known as that.
    attempts: u32,
}

impl Control {
    /// Dials from now on, until `until`. An attempt for the same purpose that is under way counts.
    pub(super) fn dial(&mut self, purpose: Purpose, now: Duration, until: Duration) {
        let before = self.way.take().filter(|way| way.purpose == purpose);
        self.way = Some(Way {
            purpose,
            redial: Redial::at_once(now, until),
            dialling: before.is_some_and(|way| way.dialling),
        });
    }

    /// A channel is open, or none is wanted: what is under way is not waited for.
    pub(super) fn rest(&mut self) {
        self.way = None;
    }

    /// Whether this attempt is waited for.
    pub(super) fn awaits(&self, number: u32) -> bool {
        self.attempts == number && self.way.as_ref().is_some_and(|way| way.dialling)
    }

    /// When it gives up, if it dials.
    pub(super) fn until(&self) -> Option<Duration> {
        self.way.as_ref().map(|way| way.redial.until)
    }

    /// When [`Control::tick`] is due.
    pub(super) fn due(&self) -> Duration {
        match &self.way {
            Some(way) if !way.dialling => way.redial.due,
            _ => Duration::MAX,
        }
    }

    /// The next attempt, if it is due.
    pub(super) fn tick(
        &mut self,
        hellos: &Hellos,
        timing: &Timing,
        now: Duration,
    ) -> Option<Effect> {
        let way = self.way.as_mut()?;
        if way.dialling || now < way.redial.due {
            return None;
        }
        let hello = hellos.control(way.purpose)?;
        let (connect_by, answer_by) = match way.purpose {
            // Everything that is wrong is found here, so it may take its time.
            Purpose::Start => (way.redial.until, way.redial.until),
            Purpose::Resume | Purpose::Ask => timing.short(now),
        };
        way.dialling = true;
        self.attempts += 1;
        Some(Effect::DialControl {
            number: self.attempts,
            purpose: way.purpose,
            attempt: Attempt {
                hello,
                connect_by,
                answer_by,
            },
        })
    }

    /// An attempt came to nothing.
    pub(super) fn failed(&mut self, number: u32, why: NotOpened, now: Duration) -> Failed {
        if !self.awaits(number) {
            return Failed::Old;
        }
        let Some(way) = &mut self.way else {
            return Failed::Old;
        };
        way.dialling = false;
        if way.purpose != Purpose::Start {
            return match why.into_forgotten() {
                Ok(fault) => {
                    self.way = None;
                    Failed::Forgotten(fault)
                }
                Err(why) => {
                    // Once the time is over the session's own deadline ends it.
                    let _ = way.redial.failed(now);
                    Failed::Again(why.fault)
                }
            };
        }
        let next = way.redial.first_failed(&why, now);
        if next == First::Again {
            return Failed::Again(why.fault);
        }
        self.way = None;
        match next {
            First::OutOfTime => Failed::OutOfTime(why.fault),
            First::Again | First::Over => Failed::Over(why.fault),
        }
    }

    /// The question was answered; if that was not final, it is asked again.
    pub(super) fn answered(&mut self, now: Duration) {
        if let Some(way) = &mut self.way {
            way.dialling = false;
            let _ = way.redial.failed(now);
        }
    }
}

#[cfg(test)]
mod tests;
