//! The rounds: which one is open, what SWITCHOVER and FINAL said, and what follows when every lane has reached a round's end.
//!
//! The rules it keeps: with the guest running the gate to the next round opens at once; with the guest paused it stays shut
//! until the source says which it is, FINAL of this round or a further one (SPEC: SWITCH-3). Only equal digests over memory
//! without damage make a [`Verified`] (SPEC: FINAL-3).

use std::time::Duration;

use multifd_wire::frame::{Final, GuestState};
use multifd_wire::{Digest, Round};

use super::error::Fault;
use super::event::{Closed, Counts, Incomplete};

/// Proof that memory is complete: its digest is that of FINAL, no page is damaged, every device's stream is whole.
#[derive(Debug)]
pub(super) struct Verified {
    digest: Digest,
    guest: GuestState,
}

impl Verified {
    pub(super) fn digest(&self) -> Digest {
        self.digest
    }

    /// Whether the guest runs once it has arrived.
    pub(super) fn guest(&self) -> GuestState {
        self.guest
    }
}

/// What is in memory at the end of a round with the guest paused, the gate shut.
#[derive(Debug)]
pub(super) struct Fence {
    pub(super) round: Round,
    digest: Digest,
    damaged: u64,
    incomplete: Option<Incomplete>,
    /// Since when FINAL is here and pages are missing: the source has to begin a further round.
    short_since: Option<Duration>,
    /// When the source had answered a question that was asked after that: it has read what was said of lanes and pages.
    known_since: Option<Duration>,
}

impl Fence {
    /// Since when something is missing although FINAL is here.
    pub(super) fn short_since(&self) -> Option<Duration> {
        self.short_since
    }

    /// Since when the source knows that.
    pub(super) fn missed_since(&self) -> Option<Duration> {
        self.known_since
    }

    /// A sign of life of the source came, of which it can be asked whether it shows that a question of this time or later was read.
    pub(super) fn echo(&mut self, now: Duration, has_read: impl Fn(Duration) -> bool) {
        if self.short_since.is_some_and(has_read) {
            self.known_since.get_or_insert(now);
        }
    }
}

/// What follows at a shut gate.
#[derive(Debug)]
pub(super) enum Next {
    /// The source has not said it yet.
    Wait,
    /// A further round.
    Open,
    /// Memory is complete; so many blobs of VM state belong to it.
    Load(Verified, u32),
    /// It can't be completed.
    Fail(Fault),
}

/// Where the rounds are.
#[derive(Debug)]
pub(super) struct Rounds {
    round: Round,
    /// The first and the newest SWITCHOVER, and FINAL; they may come before the lanes reach the end of the round.
    paused_from: Option<Round>,
    switchover: Option<Round>,
    last: Option<(Final, Duration)>,
    /// Since when what is in memory is being counted.
    closing: Option<Duration>,
    /// A lane died: what it lost may be missing when FINAL comes, without anybody's fault.
    lane_lost: bool,
    began: Duration,
    /// What was counted when the last round was closed.
    counted: Counts,
    /// How long the newest count took.
    verify: Duration,
}

impl Rounds {
    pub(super) fn new() -> Self {
        Self {
            round: Round::new(0),
            paused_from: None,
            switchover: None,
            last: None,
            closing: None,
            lane_lost: false,
            began: Duration::ZERO,
            counted: Counts::default(),
            verify: Duration::ZERO,
        }
    }

    pub(super) fn round(&self) -> Round {
        self.round
    }

    pub(super) fn is_switching(&self) -> bool {
        self.switchover.is_some()
    }

    #[cfg(test)]
    pub(super) fn newest_switchover(&self) -> Option<Round> {
        self.switchover
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing.is_some()
    }

    /// The first round after READY begins.
    pub(super) fn begin(&mut self, now: Duration) {
        self.began = now;
    }

    /// A lane was lost: what it carried may be missing without anybody's fault.
    pub(super) fn lane_lost(&mut self) {
        self.lane_lost = true;
    }

    /// Every lane has reached the end: it is being counted what is in memory.
    pub(super) fn close(&mut self, now: Duration) {
        self.closing = Some(now);
    }

    /// It was counted: how long the round took, and what came of it.
    pub(super) fn closed(&mut self, counts: Counts, now: Duration) -> (Duration, Counts) {
        let since = self.closing.take().unwrap_or(now);
        self.verify = now.saturating_sub(since);
        let took = now.saturating_sub(self.began);
        self.began = now;
        let before = std::mem::replace(&mut self.counted, counts);
        let of_round = Counts {
            pages: counts.pages.saturating_sub(before.pages),
            zero_pages: counts.zero_pages.saturating_sub(before.zero_pages),
            ..counts
        };
        (took, of_round)
    }

    /// Whether marks that say this of the guest contradict SWITCHOVER: it is paused in every round from the first one's on,
    /// and in none before (SPEC: SWITCH-1, SWITCH-2).
    pub(super) fn contradicts(&self, paused: bool) -> bool {
        self.paused_from
            .is_some_and(|from| paused != (self.round >= from))
    }

    /// The gate stays shut.
    pub(super) fn fence(&self, closed: Closed) -> Fence {
        Fence {
            round: self.round,
            digest: closed.digest,
            damaged: closed.damaged,
            incomplete: closed.incomplete,
            short_since: None,
            known_since: None,
        }
    }

    /// The next round is open; `None` if there is none.
    pub(super) fn next(&mut self) -> Option<Round> {
        self.round = self.round.next()?;
        Some(self.round)
    }

    /// Whether a SWITCHOVER may name this round now: the first names the round that is open or a later one, each further one
    /// the next (SPEC: SWITCH-1, SWITCH-2).
    pub(super) fn may_follow(&self, round: Round, fence: Option<&Fence>) -> bool {
        match (self.switchover, fence) {
            (Some(newest), _) => newest.next() == Some(round),
            (None, Some(fence)) => fence.round == round,
            (None, None) => round >= self.round,
        }
    }

    pub(super) fn switchover(&mut self, round: Round) {
        self.paused_from.get_or_insert(round);
        self.switchover = Some(round);
        self.last = None;
    }

    /// SPEC: FINAL-1
    pub(super) fn may_be_final(&self, last: &Final) -> bool {
        self.switchover == Some(last.final_round)
    }

    pub(super) fn last(&mut self, last: Final, now: Duration) {
        self.last = Some((last, now));
    }

    /// With the gate shut: what follows.
    pub(super) fn conclude(&self, fence: &mut Fence, now: Duration) -> Next {
        // Several rounds may have been announced while this one was still being read.
        if self.switchover > Some(fence.round) {
            return Next::Open;
        }
        let Some(last) = self.last_of(fence.round) else {
            return Next::Wait;
        };
        let whole = last.digest == fence.digest && fence.damaged == 0;
        if whole && fence.incomplete.is_none() {
            let verified = Verified {
                digest: fence.digest,
                guest: last.guest,
            };
            return Next::Load(verified, last.states);
        }
        if fence.damaged > 0 || self.lane_lost {
            // The source knows from ROUND_CLOSED, or from our LANE_DOWN, and begins a further round (SPEC: FINAL-4).
            fence.short_since.get_or_insert(now);
            return Next::Wait;
        }
        Next::Fail(self.shortage(fence, last))
    }

    /// What is missing at the fence, if FINAL is here, no page of it is known to be damaged, and the source knows: it had its time to
    /// send it.
    pub(super) fn missing(&self, fence: &Fence) -> Option<Fault> {
        let last = self.last.filter(|_| fence.damaged == 0)?.0;
        fence.known_since?;
        Some(self.shortage(fence, last))
    }

    fn last_of(&self, round: Round) -> Option<Final> {
        let (last, _) = self.last?;
        (last.final_round == round).then_some(last)
    }

    fn shortage(&self, fence: &Fence, last: Final) -> Fault {
        let device = fence
            .incomplete
            .clone()
            .filter(|_| last.digest == fence.digest);
        device.map_or_else(
            || Fault::DigestMismatch {
                ours: fence.digest.value(),
                theirs: last.digest.value(),
            },
            Fault::from,
        )
    }

    /// How long the last data was waited for after FINAL, and how long it took to compare.
    pub(super) fn waited(&self, loading_since: Duration) -> (Duration, Duration) {
        let said = self.last.map_or(loading_since, |(_, at)| at);
        (loading_since.saturating_sub(said), self.verify)
    }

    /// The channels are lost. `shut`: the gate was, so that the open round is the next one (SPEC: RESUME-7); also when the channel was
    /// lost in the middle of saying so, since the source may have read it.
    pub(super) fn suspend(&mut self, shut: bool) {
        if (shut || self.closing.is_some())
            && let Some(next) = self.round.next()
        {
            self.round = next;
        }
        // SPEC: RESUME-8
        (self.paused_from, self.switchover, self.last) = (None, None, None);
        self.closing = None;
        self.lane_lost = true;
    }
}
