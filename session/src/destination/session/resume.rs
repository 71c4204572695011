//! What the destination's session does when its channels are lost: wait for the source to come back, and answer its question.
//!
//! ```text
//!  Rounds, Fenced, Loading, Prepared ──lost──► Suspended ──resumed──► Setup ──lanes──► Rounds(first round not closed)
//!                                                 ▲  │ deadline          │ lost
//!                                                 │  └──► over: discarded│
//!                                                 └──────────────────────┘
//!  anything before COMMIT ──asked──► "not committed", over: discarded      Owning ──asked──► "committed"
//! ```
//! The rule it keeps: once "not committed" was said there is no state from which the guest could be run (SPEC: ASK-3).

use std::time::Duration;

use multifd_wire::frame::OutcomeState;
use multifd_wire::{ChannelRef, Phase, Reason};

use super::{Effect, Outcome, Session, Setup, State};
use crate::destination::error::{Error, Fault};

/// A control channel on which checksums are wrong more often than this is no accident, and the migration is given up.
pub const DAMAGES_MAX: u32 = 16;

impl Session {
    /// How often the control channel was lost by wrong checksums.
    #[must_use]
    pub fn damages(&self) -> u32 {
        self.damages
    }

    /// The source may come back when its channels are lost: the feature was agreed on (SPEC: FEAT-5).
    pub fn keep(&mut self) {
        self.kept = !self.config.suspend.is_zero();
    }

    /// Whether a source that shows the secret may resume the session now.
    #[must_use]
    pub fn may_be_resumed(&self) -> bool {
        self.kept && !matches!(&self.state, State::Owning | State::Over)
    }

    /// The channels are lost, or worth nothing.
    pub(super) fn lost(&mut self, error: Error, now: Duration) -> Vec<Effect> {
        // SPEC: ERR-2
        self.damages += u32::from(error.is_damage());
        match &self.state {
            State::Suspended { .. } | State::Over => Vec::new(),
            _ if self.damages > DAMAGES_MAX => self.fail(error),
            _ if self.may_be_resumed() => self.suspend(now),
            _ => self.fail(error),
        }
    }

    fn suspend(&mut self, now: Duration) -> Vec<Effect> {
        // With the gate shut the open round is the next one (SPEC: RESUME-7); also when the channel was lost in the middle of saying
        // so, since the source may have read it.
        let shut = matches!(
            self.state,
            State::Fenced { .. } | State::Loading { .. } | State::Prepared(_)
        );
        if (shut || self.closing)
            && let Some(next) = self.round.next()
        {
            self.round = next;
        }
        self.state = State::Suspended {
            until: now + self.config.suspend,
        };
        self.lanes.clear();
        // SPEC: RESUME-8
        (self.paused_from, self.switchover, self.verdict) = (None, None, None);
        // A device that had everything begins anew, since the source's runs again.
        self.devices_loaded = !self.devices;
        (self.closing, self.alone_since) = (false, None);
        self.lane_lost = true;
        vec![Effect::Suspend]
    }

    /// A right resume proves that the old channels are dead (SPEC: RESUME-4).
    pub(super) fn resuming(&mut self, now: Duration) -> Vec<Effect> {
        let mut effects = Vec::new();
        if !matches!(self.state, State::Suspended { .. }) {
            effects = self.suspend(now);
        }
        (self.began, self.heard, self.progress) = (now, now, now);
        self.state = State::Setup(Setup {
            lanes: None,
            machine: self.machine,
            resumed: true,
        });
        effects
    }

    pub(super) fn asked(&mut self) -> Vec<Effect> {
        match self.state {
            State::Owning => vec![Effect::Answer(OutcomeState::CommittedNotRunning)],
            // What came of it is the driver's to remember.
            State::Over => Vec::new(),
            _ => {
                let error = Error::new(self.phase(), Fault::AskedBeforeCommit);
                self.state = State::Over;
                vec![
                    Effect::Answer(OutcomeState::NotCommitted),
                    // For a control channel that may still be open.
                    Effect::Abort {
                        reason: Reason::ChannelsLost,
                        phase: Phase::Done,
                        channel: ChannelRef::None,
                        text: error.fault().to_string(),
                    },
                    Effect::Discard,
                    Effect::Finish(Outcome::Failed(error)),
                ]
            }
        }
    }
}
