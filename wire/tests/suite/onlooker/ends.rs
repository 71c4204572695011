//! The switchover, the commit, and how a session ends.

use multifd_wire::frame::{Final, GuestState, OutcomeState};
use multifd_wire::{Digest, Features, Phase, Role};

use super::{Kept, Onlooker, keep};

impl Onlooker {
    pub(super) fn switchover(&mut self, round: u32) -> Kept {
        // What crosses with PREPARED says nothing (SPEC: PREP-2).
        if self.prepared.is_some() {
            return Ok(());
        }
        // SPEC: SWITCH-1, SWITCH-2
        let follows = match self.switchovers.last() {
            Some(newest) => round == newest + 1,
            None => round >= self.closed,
        };
        keep(follows, "SWITCH-1")?;
        // SPEC: SWACK-2
        let lacks = self.devices.iter().any(|stream| stream.lacks_ack());
        keep(!lacks, "SWACK-2")?;
        self.switchovers.push(round);
        self.last = None;
        self.both(Phase::Switchover);
        Ok(())
    }

    pub(super) fn last(&mut self, last: Final) -> Kept {
        if self.prepared.is_some() {
            return Ok(());
        }
        // SPEC: FINAL-1
        let round = last.final_round.value();
        keep(self.switchovers.last() == Some(&round), "FINAL-1")?;
        keep(last.digest == self.memory.digest_sent(), "FINAL-1")?;
        // SPEC: FINAL-5
        let pages = self.layout.as_ref().unwrap().pages_total().value();
        let counted = (last.states, last.memory_pages) == (self.states.count, pages);
        keep(counted && self.states.is_whole(), "FINAL-5")?;
        let runs = last.guest == GuestState::Running;
        keep(runs || self.features.contains(Features::PAUSED), "FINAL-6")?;
        // SPEC: FINAL-2, DEVSTREAM-8
        let whole = self.devices.iter().all(|stream| stream.is_complete());
        keep(whole, "FINAL-2")?;
        self.last = Some(last);
        Ok(())
    }

    pub(super) fn prepared(&mut self, digest: Digest) -> Kept {
        // SPEC: PREP-1, FINAL-3
        let effective = self
            .last
            .filter(|last| last.final_round.value() < self.closed);
        let last = effective.ok_or("PREP-1")?;
        keep(digest == self.memory.digest(), "PREP-1")?;
        // SPEC: FINAL-4, COMMIT-2
        let whole = self.memory.damaged.is_empty() && digest == last.digest;
        keep(whole, "PREP-1")?;
        self.prepared = Some(digest);
        self.both(Phase::Commit);
        Ok(())
    }

    pub(super) fn commit(&mut self, digest: Digest) -> Kept {
        // SPEC: COMMIT-1
        keep(self.prepared == Some(digest), "COMMIT-1")?;
        self.is_committed = true;
        Ok(())
    }

    pub(super) fn running(&mut self) -> Kept {
        // SPEC: RUNNING-1
        keep(self.is_committed, "RUNNING-1")?;
        self.runs = true;
        self.both(Phase::Done);
        Ok(())
    }

    pub(super) fn abort(&mut self, side: Role, name: &str, phase: Phase) -> Kept {
        // SPEC: COMMIT-5
        keep(side == Role::Destination || !self.is_committed, "COMMIT-5")?;
        // SPEC: ABORT-1
        let own = self.phases().unwrap()[super::place(side)];
        keep(phase == own, "ABORT-1")?;
        self.channels.get_mut(name).unwrap().has_aborted = true;
        self.both(Phase::Done);
        Ok(())
    }

    pub(super) fn outcome(&mut self, name: &str, state: OutcomeState) -> Kept {
        // SPEC: ASK-2
        let not_committed = state == OutcomeState::NotCommitted;
        keep(not_committed != self.is_committed, "ASK-2")?;
        self.channels.get_mut(name).unwrap().was_answered = true;
        self.both(Phase::Done);
        Ok(())
    }
}
