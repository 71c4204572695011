//! The set-up at the source, made for the first time or again: what has come of it, and when the rounds may begin.
//!
//! ```text
//!   connected ──GRANT──► the tables are sent, lanes are dialled ──READY──► (again: LANDED) ──every lane, or one, is open──► the rounds
//! ```
//! The rule it keeps: the rounds begin when the destination is ready *and* the lanes have read their acceptance, which may be later.

use multifd_wire::frame::{Grant, Ready};
use multifd_wire::{Kind, Misbehaved};

/// What the destination has said in this set-up.
#[derive(Debug, Default)]
pub(super) struct SetUp {
    grant: Option<Grant>,
    ready: Option<Ready>,
    /// The session is resumed: LANDED follows.
    resuming: bool,
    /// Rounds that LANDED says are closed.
    landed: Option<u32>,
    /// While the sources of dirty pages are started: what follows then.
    beginning: Option<Beginning>,
}

/// How the rounds begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Beginning {
    First,
    Resumed { rounds_closed: u32 },
}

impl SetUp {
    /// Channels were lost: what was said on them is void.
    pub(super) fn disconnected(&mut self) {
        *self = Self {
            grant: self.grant,
            ..Self::default()
        };
    }

    pub(super) fn resumes(&mut self) {
        self.resuming = true;
    }

    pub(super) fn is_resuming(&self) -> bool {
        self.resuming
    }

    pub(super) fn granted(&mut self, grant: Grant) {
        self.grant = Some(grant);
    }

    /// How many lanes the set-up names: those that there are, or as many as are wanted and granted.
    pub(super) fn lanes_named(&self, there_are: u32, wanted: u32) -> u32 {
        // A first set-up that was lost early has none yet.
        if self.resuming && there_are > 0 {
            return there_are;
        }
        let granted = self.grant.map_or(u32::MAX, |grant| grant.lanes_max);
        wanted.min(granted)
    }

    /// READY came, with so many lanes dialled here.
    pub(super) fn ready(&mut self, ready: Ready, lanes: u32) -> Result<(), Misbehaved> {
        if self.grant.is_none() {
            return Err(Misbehaved::Order { kind: Kind::Ready });
        }
        // SPEC: READY-1, RESUME-14. A destination may have sent a READY that was lost, and need no more than one lane now.
        let fits = if self.resuming {
            (1..=lanes).contains(&ready.lanes)
        } else {
            ready.lanes == lanes
        };
        if !fits {
            return Err(Misbehaved::Amount {
                field: "ready.lanes",
                expected: lanes.into(),
                found: ready.lanes.into(),
            });
        }
        self.ready = Some(ready);
        Ok(())
    }

    /// READY came, and the rounds have not begun.
    pub(super) fn is_ready(&self) -> bool {
        self.ready.is_some()
    }

    /// Whether LANDED may come: once, behind READY, if the session is resumed (SPEC: RESUME-6).
    pub(super) fn landed_is_due(&self) -> bool {
        self.resuming && self.landed.is_none() && self.is_ready()
    }

    pub(super) fn landed(&mut self, rounds_closed: u32) {
        self.landed = Some(rounds_closed);
    }

    /// What the destination has to say is complete: how the rounds begin, and how long it took to get ready, in microseconds. Said once.
    pub(super) fn completes(&mut self) -> Option<(Beginning, u64)> {
        let ready = self.ready?;
        let beginning = if self.resuming {
            let rounds_closed = self.landed?;
            Beginning::Resumed { rounds_closed }
        } else {
            Beginning::First
        };
        (self.ready, self.resuming) = (None, false);
        self.beginning = Some(beginning);
        Some((beginning, ready.prepare_us))
    }

    /// The sources of dirty pages are started.
    pub(super) fn begun(&mut self) -> Option<Beginning> {
        self.beginning.take()
    }
}

#[cfg(test)]
mod tests {
    use multifd_wire::Token;

    use super::*;

    fn grant() -> Grant {
        Grant {
            ticket: Token::new([1; 16]),
            resume_secret: Token::new([2; 16]),
            lanes_max: 4,
            suspend_ms: 1000,
            device_window_bytes: 0,
        }
    }

    fn ready(lanes: u32) -> Ready {
        let prepare_us = 5;
        Ready { lanes, prepare_us }
    }

    #[test]
    fn a_first_set_up_is_complete_with_ready_and_all_lanes_in_it() {
        let mut set_up = SetUp::default();
        assert!(set_up.ready(ready(4), 4).is_err(), "before GRANT");
        set_up.granted(grant());
        assert_eq!((set_up.lanes_named(0, 8), set_up.lanes_named(0, 3)), (4, 3));
        assert!(set_up.ready(ready(3), 4).is_err());
        assert_eq!(set_up.completes(), None);
        set_up.ready(ready(4), 4).unwrap();
        assert!(!set_up.landed_is_due(), "nothing is resumed");
        assert_eq!(set_up.completes(), Some((Beginning::First, 5)));
        assert_eq!(set_up.completes(), None, "once");
        assert_eq!(set_up.begun(), Some(Beginning::First));
        assert_eq!(set_up.begun(), None);
    }

    /// SPEC: RESUME-6, RESUME-14
    #[test]
    fn one_that_is_made_again_names_the_lanes_there_are_and_waits_for_landed() {
        let mut set_up = SetUp::default();
        set_up.granted(grant());
        set_up.resumes();
        assert_eq!((set_up.lanes_named(2, 8), set_up.lanes_named(0, 8)), (2, 4));
        assert!(!set_up.landed_is_due());
        assert!(set_up.ready(ready(0), 2).is_err());
        set_up.ready(ready(1), 2).unwrap();
        assert_eq!(set_up.completes(), None);
        assert!(set_up.landed_is_due());
        set_up.landed(7);
        assert!(!set_up.landed_is_due(), "once");
        let resumed = Beginning::Resumed { rounds_closed: 7 };
        assert_eq!(set_up.completes(), Some((resumed, 5)));
        set_up.resumes();
        set_up.disconnected();
        assert!(!set_up.is_resuming() && !set_up.is_ready());
        assert!(set_up.ready(ready(4), 4).is_ok(), "the grant is known");
    }
}
