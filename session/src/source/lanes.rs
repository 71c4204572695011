//! The lanes: whether each is dialling, alive, dying, dead or dialled again, and what follows (SPEC: section 14, ROUND-6).
//!
//! ```text
//!   Dialling ──up──► Alive ──lost here──► Dying ──settled by LANE_DOWN──► Dead ──due──► Redialling ──up──► Alive
//!                      └──────────lost there, LANE_DOWN────────────────────►│ ◄──failed────┘
//! ```
//! The rules it keeps: a lane is dialled again only when both sides have settled what its last connection carried; it
//! takes part in the round that is open, after it has ended those that the destination may not have closed; and lanes that are lost
//! and opened again, however often, are no progress: only acknowledged bytes are.

mod dialling;
mod losing;
mod view;
mod watch;

use std::time::Duration;

use multifd_wire::{ChannelRef, Incarnation, LaneId, Misbehaved, Round};

use super::error::Fault;
use super::redial::Redial;
use super::session::Effect;

pub(super) use view::{End, Steps, View};
pub use watch::Seen;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    /// For the first time, or in a set-up that is made again.
    Dialling,
    /// An attempt to open it for the first time came to nothing that may pass: the next one follows.
    Due,
    Alive,
    /// The channel failed; what the destination has of it is not known yet.
    Dying {
        since: Duration,
    },
    /// Settled. It may be dialled again.
    Dead,
    /// It was lost, and a new connection is being made.
    Redialling {
        /// The destination has let it in and lost it again.
        given_up: bool,
    },
}

#[derive(Debug)]
struct Lane {
    incarnation: Incarnation,
    life: Life,
    /// The newest round that it has encoded.
    encoded: Option<Round>,
    /// While it is lost and to be dialled again.
    redial: Option<Redial>,
    /// What the first attempts to open it ended with.
    last: Option<Fault>,
    /// It was lost with all the others, and has not come back: that counts as one suspension.
    with_all: bool,
    /// How far it was acknowledged when that last changed, and when that was.
    acked: (u64, Duration),
    /// Why this side gave it up, until its thread has ended.
    failing: Option<Fault>,
    /// While a resume is under way: the connection that was lost, which LANDED settles.
    before: Option<Incarnation>,
}

/// All lanes of a session.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    lanes: Vec<Lane>,
    /// The round that is under way, as long as not all lanes have encoded it.
    open: Option<Round>,
    /// The round that was opened last.
    current: Option<Round>,
    /// Since when no lane lives.
    alone_since: Option<Duration>,
    /// When lanes are looked at next; none outside the rounds.
    watch_due: Option<Duration>,
    starving: Option<watch::Starving>,
    /// When a lane was opened last.
    up_at: Duration,
}

impl Lanes {
    pub(super) fn count(&self) -> u32 {
        u32::try_from(self.lanes.len()).unwrap_or(u32::MAX)
    }

    pub(super) fn alive(&self) -> u32 {
        let alive = self.lanes.iter().filter(|lane| lane.life == Life::Alive);
        u32::try_from(alive.count()).unwrap_or(u32::MAX)
    }

    /// Whether a first connection is still being made.
    pub(super) fn dialling(&self) -> bool {
        self.lanes
            .iter()
            .any(|lane| matches!(lane.life, Life::Dialling | Life::Due))
    }

    fn numbered(&self) -> impl Iterator<Item = (LaneId, &Lane)> {
        (0..).map(LaneId::new).zip(&self.lanes)
    }

    fn get(&mut self, id: LaneId) -> Option<&mut Lane> {
        self.lanes.get_mut(usize::try_from(id.value()).ok()?)
    }

    /// The lane that the destination speaks of.
    pub(super) fn known(&self, id: LaneId, incarnation: Incarnation) -> Result<(), Misbehaved> {
        let lane = usize::try_from(id.value())
            .ok()
            .and_then(|place| self.lanes.get(place));
        lane.filter(|lane| lane.incarnation == incarnation)
            .map(|_| ())
            .ok_or_else(|| unknown(id, incarnation))
    }

    /// This connection of the lane, or one before it.
    pub(super) fn was_known(
        &mut self,
        id: LaneId,
        incarnation: Incarnation,
    ) -> Result<(), Misbehaved> {
        match self.get(id) {
            Some(lane) if incarnation <= lane.incarnation => Ok(()),
            _ => Err(unknown(id, incarnation)),
        }
    }

    /// All living lanes are given this round.
    pub(super) fn opened(&mut self, round: Round) {
        self.open = Some(round);
        self.current = Some(round);
    }

    /// The newest round that a lane was given; none before the first and after a loss of all channels.
    pub(super) fn current(&self) -> Option<Round> {
        self.current
    }

    pub(super) fn encoded(&mut self, id: LaneId, incarnation: Incarnation, round: Round) {
        if let Some(lane) = self.get(id).filter(|lane| lane.incarnation == incarnation) {
            lane.encoded = Some(round);
        }
    }

    /// Says once that the present round is encoded: by every living lane, with no lane's fate unsettled.
    pub(super) fn check_encoded(&mut self) -> Option<Effect> {
        let round = self.open?;
        let done = |lane: &Lane| match lane.life {
            Life::Alive => lane.encoded == Some(round),
            Life::Dying { .. } | Life::Dialling | Life::Due => false,
            Life::Dead | Life::Redialling { .. } => true,
        };
        // Without any lane the round stays open: the next one ends it.
        if self.alive() == 0 || !self.lanes.iter().all(done) {
            return None;
        }
        self.open = None;
        Some(Effect::RoundEncoded)
    }
}

fn unknown(lane: LaneId, incarnation: Incarnation) -> Misbehaved {
    Misbehaved::Lane {
        channel: ChannelRef::Lane(lane),
        incarnation: incarnation.value(),
    }
}

#[cfg(test)]
mod tests;
