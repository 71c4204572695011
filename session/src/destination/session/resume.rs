//! What the destination's session does when its channels are lost: wait for the source to come back, and answer its question.
//!
//! ```text
//!  Rounds, Fenced, Loading, Prepared ──lost──► Suspended ──resumed──► Setup ──lanes──► Rounds(first round not closed)
//!                                                 ▲  │ deadline          │ lost
//!                                                 │  └──► over: discarded│
//!                                                 └──────────────────────┘
//!  anything before COMMIT ──asked──► "not committed", over: discarded      Owning ──asked──► "committed"
//! ```
//! The rules it keeps: LANDED is said only when no lane of the old channels can land anything any more; and once "not committed" was
//! said there is no state from which the guest could be run (SPEC: ASK-3).

use std::time::Duration;

use multifd_wire::frame::{
    Credits, GiveBack, GiveBackReason, Grant, Landed, LaneMark, OutcomeState, RawLaneMark, RawRun,
};
use multifd_wire::limits::{PAGES_PER_FRAME_MAX, RUNS_PER_GIVE_BACK_MAX};
use multifd_wire::{ChannelRef, Kind, PageRun, Reason, Sequence};

use super::{Done, Session, State};
use crate::common::Encoder;
use crate::destination::blobs::BlobAssembler;
use crate::destination::config::AfterFailedSetup;
use crate::destination::error::{Error, Fault};
use crate::destination::event::{Effect, Secrets};

/// A control channel on which checksums are wrong more often than this is no accident, and the migration is given up.
pub const DAMAGES_MAX: u32 = 16;

impl Session {
    /// How often the control channel was lost by wrong checksums.
    #[must_use]
    pub fn damages(&self) -> u32 {
        self.damages
    }

    /// Whether the next source is waited for when this session has failed: its set-up never came to its end, so READY was never
    /// sent, and the reception is set to wait on (SPEC: SEC-8).
    #[must_use]
    pub fn may_be_followed(&self) -> bool {
        !self.begun && self.config.after_failed_setup() == AfterFailedSetup::WaitOn
    }

    /// Whether another source that begins may take its place now: it waits for its own to come back (SPEC: SEC-8).
    #[must_use]
    pub fn may_give_way(&self) -> bool {
        self.may_be_followed() && matches!(self.state, State::Suspended { .. })
    }

    /// Whether a source that shows the secret may resume the session now.
    fn may_be_resumed(&self) -> bool {
        self.kept && !matches!(self.state, State::Owning { .. } | State::Over)
    }

    /// A control channel is open: it begins with GRANT (SPEC: SETUP-1).
    pub(super) fn opened(
        &mut self,
        secrets: Secrets,
        now: Duration,
        out: &mut Vec<Effect>,
    ) -> Done {
        self.control = Encoder::default();
        self.pulse = multifd_wire::Pulse::new(Duration::MAX);
        self.secrets = Some(secrets);
        self.deadlines.opened(&self.config, now);
        // SPEC: GRANT-3
        let kept = if self.kept {
            self.config.suspend()
        } else {
            Duration::ZERO
        };
        self.send(
            Grant {
                ticket: secrets.ticket,
                resume_secret: secrets.resume,
                lanes_max: self.config.lanes_max(),
                suspend_ms: u32::try_from(kept.as_millis()).unwrap_or(u32::MAX),
                device_window_bytes: self.config.device_window_bytes(),
            },
            out,
        )
    }

    /// The control channel failed, or what came on it can't be read. One whose link failed may be replaced.
    pub(super) fn control_lost(
        &mut self,
        fault: Fault,
        now: Duration,
        out: &mut Vec<Effect>,
    ) -> Done {
        let error = Error::new(self.phase(), fault).at(ChannelRef::Control);
        match self.state {
            // The guest is ours: no loss changes that any more.
            State::Owning { .. } => {}
            _ if error.loses_control() => self.lost(error, now, out),
            _ => self.fail(error, now, out),
        }
        Ok(())
    }

    /// The channels are lost, or worth nothing.
    pub(super) fn lost(&mut self, error: Error, now: Duration, out: &mut Vec<Effect>) {
        // SPEC: ERR-2
        self.damages += u32::from(error.is_damage());
        match &self.state {
            State::Suspended { .. } | State::Over => {}
            _ if self.damages <= DAMAGES_MAX && self.may_be_resumed() => self.suspend(now, out),
            _ => self.fail(error, now, out),
        }
    }

    fn suspend(&mut self, now: Duration, out: &mut Vec<Effect>) {
        // With the gate shut the open round is the next one (SPEC: RESUME-7).
        let shut = matches!(
            self.state,
            State::Fenced(_) | State::Loading(_) | State::Prepared(_)
        );
        self.state = State::Suspended {
            until: now + self.config.suspend(),
        };
        self.rounds.suspend(shut);
        self.lanes.clear();
        self.early.clear();
        self.devices.suspend();
        self.loads.void();
        self.damaged.clear();
        (self.secrets, self.deadlines.alone_since) = (None, None);
        out.push(Effect::Suspend);
    }

    /// A right resume proves that the old channels are dead (SPEC: RESUME-4).
    pub(super) fn resuming(
        &mut self,
        secrets: Secrets,
        now: Duration,
        out: &mut Vec<Effect>,
    ) -> Done {
        if !self.may_be_resumed() {
            let (reason, text) = match self.state {
                State::Over => (Reason::ShuttingDown, "the migration is over: ask"),
                _ => (Reason::WrongSession, "this migration can't be resumed now"),
            };
            out.push(Effect::RefuseResume { reason, text });
            return Ok(());
        }
        if !matches!(self.state, State::Suspended { .. }) {
            self.suspend(now, out);
        }
        self.secrets = Some(secrets);
        out.push(Effect::SettleLanes);
        Ok(())
    }

    /// No lane of the old channels can land anything any more: the set-up is made again.
    pub(super) fn settled(
        &mut self,
        marks: &[LaneMark],
        damaged: Vec<PageRun>,
        now: Duration,
        out: &mut Vec<Effect>,
    ) -> Done {
        let (State::Suspended { .. }, Some(secrets)) = (&self.state, self.secrets) else {
            return Err(super::internal("lanes that were not to be settled"));
        };
        self.lanes.settle(marks);
        self.damaged = damaged;
        self.state = State::Setup;
        self.resumed = true;
        self.set_up.again(&self.config);
        self.states = BlobAssembler::new(Kind::VmState, self.config.blob_bytes_max());
        out.push(Effect::AcceptResume);
        self.opened(secrets, now, out)
    }

    /// SPEC: RESUME-6
    pub(super) fn landed(&mut self, out: &mut Vec<Effect>) -> Done {
        self.give_back_damaged(out)?;
        let marks: Vec<RawLaneMark> = self.lanes.landed().map(RawLaneMark::from).collect();
        self.send(
            Landed {
                rounds_closed: self.rounds.round().value(),
                lanes: &marks,
            },
            out,
        )?;
        // Lanes that both sides had given up are not named, and yet what came on them was answered (SPEC: RESUME-12).
        if marks.is_empty() && !self.devices.something_was_said() {
            return Ok(());
        }
        let (credits, acks) = self.devices.repeat();
        if !credits.is_empty() {
            self.send(Credits { credits: &credits }, out)?;
        }
        acks.into_iter().try_for_each(|ack| self.send(ack, out))
    }

    /// What was said of damaged pages on the old channel may be lost. The source has to know of them before it acts on LANDED, which
    /// covers their frames (SPEC: RESUME-10).
    fn give_back_damaged(&mut self, out: &mut Vec<Effect>) -> Done {
        let damaged = std::mem::take(&mut self.damaged);
        // Any frame that LANDED covers will do.
        let Some(mark) = self.lanes.landed().next() else {
            return Ok(());
        };
        let mut rest = damaged.as_slice();
        while !rest.is_empty() {
            let (mut runs, mut pages) = (Vec::new(), 0);
            while let Some((run, more)) = rest.split_first()
                && runs.len() < RUNS_PER_GIVE_BACK_MAX
                && pages + run.pages() <= PAGES_PER_FRAME_MAX
            {
                pages += run.pages();
                runs.push(RawRun::from(*run));
                rest = more;
            }
            if runs.is_empty() {
                return Err(super::internal("a damaged run that no frame can hold"));
            }
            self.send(
                GiveBack {
                    lane: mark.lane,
                    incarnation: mark.incarnation,
                    sequence: Sequence::new(mark.frames.saturating_sub(1)),
                    reason: GiveBackReason::Checksum,
                    runs: &runs,
                },
                out,
            )?;
        }
        Ok(())
    }

    /// The source asks how it stands.
    pub(super) fn asked(&mut self, now: Duration, out: &mut Vec<Effect>) -> Done {
        let state = match self.state {
            State::Over => self.remembered.state(),
            State::Owning { .. } => Some(OutcomeState::CommittedNotRunning),
            _ => Some(OutcomeState::NotCommitted),
        };
        out.extend(state.map(Effect::Answer));
        if !matches!(self.state, State::Over | State::Owning { .. }) {
            let error = Error::new(self.phase(), Fault::AskedBeforeCommit);
            self.fail(error, now, out);
        }
        Ok(())
    }
}
