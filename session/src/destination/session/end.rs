//! How the destination's session ends: what the source is told, and whose the guest is.
//!
//! The rule it keeps: before COMMIT every end takes the machine down; after it only this side's own failure ends it, and says that the
//! guest is loaded and could not be run. That is said of a guest only once nobody can run it any more: of a VMM that does not come back
//! it is not known.

use std::time::Duration;

use multifd_wire::frame::{Abort, OutcomeState, Running};
use multifd_wire::limits::TEXT_BYTES_MAX;
use multifd_wire::{Frame, Phase, Text};

use super::{Done, Session, State, micros};
use crate::destination::error::{Error, Fault};
use crate::destination::event::{Counts, Effect, Outcome};

impl Session {
    /// Puts a frame on the control channel.
    pub(super) fn send<'a>(&mut self, frame: impl Into<Frame<'a>>, out: &mut Vec<Effect>) -> Done {
        out.push(Effect::Send(self.control.encode(&frame.into())?));
        Ok(())
    }

    /// The VMM runs the guest.
    pub(super) fn running(
        &mut self,
        took: Duration,
        counts: Counts,
        now: Duration,
        out: &mut Vec<Effect>,
    ) -> Done {
        self.state = State::Over;
        self.remembered.ended(OutcomeState::Running, now);
        // The guest runs whether the source hears of it or not (SPEC: COMMIT-4).
        out.push(Effect::Finish(Outcome::Running));
        self.send(
            Running {
                resume_us: micros(took),
                cpu_us: micros(counts.cpu),
                landed_bytes: counts.landed_bytes(),
            },
            out,
        )?;
        // SPEC: RUNNING-2
        let question = self.pulse.ask(now);
        self.remembered.stamp(question.stamp_us);
        self.send(question, out)
    }

    /// The VMM was told to run the guest and does not answer. It may do so yet, so nobody is told that it failed: who asks hears that the
    /// guest is here and does not run (SPEC: ASK-3).
    pub(super) fn may_run_yet(&mut self, fault: Fault, now: Duration, out: &mut Vec<Effect>) {
        let error = Error::new(self.phase(), fault);
        self.state = State::Over;
        self.remembered
            .ended(OutcomeState::CommittedNotRunning, now);
        out.push(Effect::Finish(Outcome::Stranded(error)));
    }

    /// It did so after all.
    pub(super) fn runs_after_all(&mut self, now: Duration, out: &mut Vec<Effect>) {
        if self.remembered.state() == Some(OutcomeState::CommittedNotRunning) {
            self.remembered.ended(OutcomeState::Running, now);
            out.push(Effect::Finish(Outcome::Running));
        }
    }

    /// Nor will it ever.
    pub(super) fn fails_after_all(&mut self, fault: Fault, now: Duration, out: &mut Vec<Effect>) {
        if self.remembered.state() == Some(OutcomeState::CommittedNotRunning) {
            self.remembered.ended(OutcomeState::FailedAfterCommit, now);
            let error = Error::new(Phase::Commit, fault);
            out.push(Effect::Finish(Outcome::Stranded(error)));
        }
    }

    /// It can't go on.
    pub(super) fn fail(&mut self, error: Error, now: Duration, out: &mut Vec<Effect>) {
        let owning = matches!(self.state, State::Owning { .. });
        // The source can vanish now: the guest is ours and starts all the same.
        if matches!(self.state, State::Over) || owning && !is_our_own(error.fault()) {
            return;
        }
        // An ABORT is not answered (SPEC: ABORT-2).
        let says_why = !matches!(error.fault(), Fault::PeerAborted { .. });
        let text = Text::<TEXT_BYTES_MAX>::clip(&error.fault().to_string());
        let abort = Abort {
            reason: error.reason(),
            phase: error.phase(),
            channel: error.channel(),
            text: text.as_str(),
        };
        self.state = State::Over;
        if owning {
            self.remembered.ended(OutcomeState::FailedAfterCommit, now);
            out.push(Effect::Finish(Outcome::Stranded(error)));
        } else {
            self.remembered.ended(OutcomeState::NotCommitted, now);
            out.push(Effect::Discard);
            out.push(Effect::Finish(Outcome::Failed(error)));
        }
        if says_why && let Ok(abort) = self.control.encode(&abort.into()) {
            out.push(Effect::Send(abort));
        }
    }
}

/// What keeps this side from running a guest that it owns.
fn is_our_own(fault: &Fault) -> bool {
    matches!(
        fault,
        Fault::Vmm { .. }
            | Fault::Device { .. }
            | Fault::Devices { .. }
            | Fault::DeviceStuck { .. }
            | Fault::ThreadStuck { .. }
    )
}
