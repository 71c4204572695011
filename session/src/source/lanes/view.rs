//! What the lanes are told of the rest of the session, and what they answer.

use std::time::Duration;

use multifd_wire::{Incarnation, LaneId, Phase, Round};

use super::Effect;
use crate::source::control::Timing;
use crate::source::error::Error;
use crate::source::hello::{Attempt, Hellos};

/// What the rest of the session says about this moment.
#[derive(Debug, Clone, Copy)]
pub(in crate::source) struct View {
    pub(in crate::source) phase: Phase,
    /// Something may still have to travel on a lane.
    pub(in crate::source) needs_lanes: bool,
    /// A new control channel is open, and the rounds do not go on yet.
    pub(in crate::source) rejoining: bool,
    /// The destination was ready once.
    pub(in crate::source) begun: bool,
    /// The session outlives its channels.
    pub(in crate::source) kept: bool,
    pub(in crate::source) committed: bool,
    pub(in crate::source) rounds_closed: u32,
    /// The first round with the guest paused.
    pub(in crate::source) paused_from: Option<Round>,
    pub(in crate::source) bandwidth: Option<f64>,
    pub(in crate::source) body_bytes: f64,
    pub(in crate::source) reconnect: Duration,
    pub(in crate::source) stall: Duration,
    pub(in crate::source) hellos: Hellos,
    pub(in crate::source) timing: Timing,
}

impl View {
    /// Whether lanes carry something that has to be taken.
    pub(super) fn in_rounds(&self) -> bool {
        matches!(self.phase, Phase::Rounds | Phase::Switchover)
    }

    /// Whether a session that was under way comes back, with whatever lanes there are (SPEC: RESUME-14).
    pub(in crate::source) fn comes_back(&self) -> bool {
        self.begun && self.rejoining
    }

    /// Whether the destination has not been ready yet.
    pub(super) fn first_set_up(&self) -> bool {
        self.phase == Phase::Setup && !self.begun
    }

    /// A first attempt, which may take until then: everything that is wrong is found by it.
    pub(super) fn first_attempt(
        &self,
        lane: LaneId,
        incarnation: Incarnation,
        until: Duration,
    ) -> Attempt {
        Attempt {
            hello: self.hellos.lane(lane, incarnation),
            connect_by: until,
            answer_by: until,
        }
    }

    /// One attempt of many.
    pub(super) fn another_attempt(
        &self,
        lane: LaneId,
        incarnation: Incarnation,
        now: Duration,
    ) -> Attempt {
        let (connect_by, answer_by) = self.timing.short(now);
        Attempt {
            hello: self.hellos.lane(lane, incarnation),
            connect_by,
            answer_by,
        }
    }

    /// Whether lanes that are lost are dialled again.
    pub(super) fn dials_again(&self) -> bool {
        !self.reconnect.is_zero() && (self.in_rounds() && self.needs_lanes || self.comes_back())
    }
}

/// What follows for the session as a whole.
#[derive(Debug)]
pub(in crate::source) enum End {
    /// All channels count as lost.
    Lost(Error),
    /// It is over.
    Failed(Error),
}

/// What the driver must do, and whether the session goes on.
#[derive(Debug, Default)]
pub(in crate::source) struct Steps {
    pub(in crate::source) effects: Vec<Effect>,
    pub(in crate::source) end: Option<End>,
    /// Why a lane could not be opened.
    pub(in crate::source) not_opened: Option<Error>,
}

impl Steps {
    pub(super) fn then(mut self, more: Self) -> Self {
        self.effects.extend(more.effects);
        self.end = self.end.or(more.end);
        self.not_opened = self.not_opened.or(more.not_opened);
        self
    }

    pub(super) fn lost(error: Error) -> Self {
        Self {
            end: Some(End::Lost(error)),
            ..Self::default()
        }
    }

    pub(super) fn failed(error: Error) -> Self {
        Self {
            end: Some(End::Failed(error)),
            ..Self::default()
        }
    }
}

impl<const N: usize> From<[Effect; N]> for Steps {
    fn from(effects: [Effect; N]) -> Self {
        Self {
            effects: effects.into(),
            ..Self::default()
        }
    }
}
