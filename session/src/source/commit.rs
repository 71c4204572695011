//! The way to the commit at the source: what the round with the guest paused still needs, and whose the guest is.
//!
//! ```text
//!   guest paused ──round encoded, state and devices saved, collected──► nothing missing: FINAL ──PREPARED, same digest──► given: COMMIT
//!                                                        └──pages missing: a further round
//! ```
//! The rule it keeps: once the guest is given away, nothing here takes it back but that no byte of COMMIT left, or the destination's own
//! word (SPEC: COMMIT-3, ASK-3). [`Reclaimed`] is made in this file and nowhere else.

use multifd_wire::Round;
use multifd_wire::frame::OutcomeState;

use super::error::Fault;

/// Proof that the guest belongs to the source: no commit left for the destination in the pause that it ends, or the destination
/// gave its word that it has read none and will take none any more (SPEC: ASK-3).
///
/// Only `Guest` can make it: its field is private to this module. It is consumed by the VMM's `resume`.
#[derive(Debug)]
#[must_use = "the guest stays paused until the VMM is shown this"]
pub struct Reclaimed(());

/// Whose the guest is.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum Guest {
    /// The source's.
    #[default]
    Ours,
    /// The destination's, from before the first byte of COMMIT.
    Given,
}

impl Guest {
    /// COMMIT is about to be sent.
    pub(super) fn give(&mut self) {
        *self = Self::Given;
    }

    /// The channel was gone before it took anything of COMMIT: nobody can have read it.
    pub(super) fn not_sent(&mut self) {
        *self = Self::Ours;
    }

    /// The destination says how it stands: that it has read no COMMIT and takes none any more makes the guest the source's again.
    pub(super) fn answered(&mut self, state: OutcomeState) {
        if state == OutcomeState::NotCommitted {
            *self = Self::Ours;
        }
    }

    /// The proof that the guest is the source's, if it is.
    pub(super) fn reclaim(self) -> Option<Reclaimed> {
        (self == Self::Ours).then_some(Reclaimed(()))
    }
}

/// A round with the guest paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Last {
    pub(super) round: Round,
    pub(super) encoded: bool,
    pub(super) saved: bool,
    /// The collection after the save was made.
    pub(super) collected: bool,
    /// Pages that this round does not bring (dirtied by the save, damaged, lost with a lane): they need a further one.
    pub(super) missing: u64,
    /// The newest round in which items of devices were lost with a lane: until a later one is closed the devices lack them.
    pub(super) items_lost: Option<Round>,
    /// FINAL was sent for this round, and nothing has gone missing since.
    pub(super) final_sent: bool,
    /// The destination closed this round with nothing damaged: what its lanes carried is there.
    pub(super) closed: bool,
    /// The digest of the newest FINAL. With the guest paused every FINAL has the same.
    pub(super) digest: Option<u64>,
}

/// What the round still needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Needs {
    /// More of what is under way, or nothing at all.
    Time,
    /// FINAL.
    Final,
    /// A further round.
    Round,
}

impl Last {
    pub(super) const fn new(round: Round) -> Self {
        Self {
            round,
            encoded: false,
            saved: false,
            collected: false,
            missing: 0,
            items_lost: None,
            final_sent: false,
            closed: false,
            digest: None,
        }
    }

    /// A further round, for what is missing.
    pub(super) const fn further(self, round: Round) -> Self {
        Self {
            round,
            encoded: false,
            missing: 0,
            closed: false,
            ..self
        }
    }

    /// A lane was lost, and so much with it. Items of devices are missing like pages are: they need a round that is open.
    pub(super) fn lost(&mut self, pages: u64, items: u64) {
        self.missing += pages + items;
        self.final_sent &= pages + items == 0;
        if items > 0 {
            self.items_lost = Some(self.round);
        }
    }

    /// The destination closed this round. It knows best whether a damaged page is still missing there: one that landed again is
    /// counted off.
    pub(super) fn closed(&mut self, damaged: u64) {
        self.missing += damaged;
        self.final_sent &= damaged == 0;
        self.closed = damaged == 0;
    }

    pub(super) fn final_sent(&mut self, digest: u64) {
        self.final_sent = true;
        self.digest = Some(digest);
    }

    pub(super) const fn needs(&self) -> Needs {
        if !(self.encoded && self.saved && self.collected) || self.final_sent {
            Needs::Time
        } else if self.missing == 0 {
            Needs::Final
        } else {
            Needs::Round
        }
    }

    /// Whether anything may still have to travel on a lane (SPEC: LANE-9).
    pub(super) const fn needs_lanes(&self) -> bool {
        !(self.final_sent && self.closed)
    }

    /// Judges PREPARED. `closed`: the newest round that the destination closed.
    ///
    /// # Errors
    /// [`Fault::OutOfTurn`] before FINAL, [`Fault::DigestMismatch`] when the two sides do not have the same memory,
    /// [`Fault::PreparedTooEarly`] while items of devices are missing there.
    pub(super) fn prepared(&self, theirs: u64, closed: Option<Round>) -> Result<(), Fault> {
        let Some(ours) = self.digest else {
            let what = "PREPARED before FINAL".into();
            return Err(Fault::OutOfTurn { what });
        };
        if theirs != ours {
            return Err(Fault::DigestMismatch { ours, theirs });
        }
        // The digest is that of memory. A stream that was whole before it began anew looks whole to a destination that has lost
        // the RESTART with a lane (SPEC: PREP-3).
        if self.items_lost.is_some_and(|round| closed <= Some(round)) {
            return Err(Fault::PreparedTooEarly);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SPEC: COMMIT-3, ASK-3
    #[test]
    fn a_guest_that_was_given_comes_back_only_unsent_or_by_the_destinations_word() {
        let mut guest = Guest::default();
        assert!(guest.reclaim().is_some());
        guest.give();
        assert!(guest.reclaim().is_none());
        for state in [
            OutcomeState::CommittedNotRunning,
            OutcomeState::Running,
            OutcomeState::FailedAfterCommit,
        ] {
            guest.answered(state);
            assert!(guest.reclaim().is_none(), "{state:?}");
        }
        guest.answered(OutcomeState::NotCommitted);
        assert!(guest.reclaim().is_some());
        guest.give();
        guest.not_sent();
        assert!(guest.reclaim().is_some());
    }

    #[test]
    fn final_is_due_once_all_is_there_and_a_further_round_when_something_is_missing() {
        let mut last = Last::new(Round::new(3));
        assert_eq!(last.needs(), Needs::Time);
        (last.encoded, last.saved) = (true, true);
        assert_eq!(
            last.needs(),
            Needs::Time,
            "what the save wrote is not known"
        );
        last.collected = true;
        assert_eq!(last.needs(), Needs::Final);
        last.final_sent(7);
        assert_eq!(last.needs(), Needs::Time);
        assert!(last.needs_lanes());
        last.closed(0);
        assert!(!last.needs_lanes());
        last.lost(2, 0);
        assert!(last.needs_lanes());
        assert_eq!(last.needs(), Needs::Round);
        let mut further = last.further(Round::new(4));
        assert_eq!(further.needs(), Needs::Time);
        further.encoded = true;
        assert_eq!(further.needs(), Needs::Final, "the state is saved once");
    }

    #[test]
    fn prepared_needs_a_final_with_the_same_digest() {
        let mut last = Last::new(Round::new(1));
        assert!(matches!(
            last.prepared(7, None),
            Err(Fault::OutOfTurn { .. })
        ));
        last.final_sent(7);
        assert!(last.prepared(7, None).is_ok());
        let differs = last.prepared(8, None);
        assert!(matches!(differs, Err(Fault::DigestMismatch { .. })));
        last.lost(0, 1);
        let early = last.prepared(7, Some(Round::new(1)));
        assert!(matches!(early, Err(Fault::PreparedTooEarly)));
        assert!(last.prepared(7, Some(Round::new(2))).is_ok());
    }
}
