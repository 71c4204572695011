//! How the source's session ends, and what is still to be said then.
//!
//! ```text
//!   RUNNING ──► Parting: the destination's last question is answered ──────────────────────► over: migrated
//!   failed while no channel is open ──► Parting: it is dialled once more, and told why ────► over: failed
//!   failed otherwise ──► told why ─────────────────────────────────────────────────────────► over
//! ```
//! The rules it keeps: it ends once; the guest comes back before anything else; whoever keeps something for this side is told that it
//! need not, if it can be told soon, and what is left is its deadline.

use std::time::Duration;

use multifd_wire::Frame;

use super::{Effect, Event, Outcome, Session, State};
use crate::source::control::Failed;
use crate::source::error::{Error, Fault};
use crate::source::hello::Purpose;

/// What the destination sends behind RUNNING follows at once; one that sends nothing there is not waited for.
const GOODBYE_MAX: Duration = Duration::from_millis(500);

/// How long a destination that has no channel any more is tried to be told that it is over.
const LAST_WORD_MAX: Duration = Duration::from_secs(1);

/// What is still to be said, and until when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Parting {
    /// The echo of the stamp that follows RUNNING.
    Goodbye { until: Duration },
    /// ABORT, on a channel that is dialled for it.
    LastWord { until: Duration },
}

/// Whether the guest stood still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reclaim {
    Paused,
    Running,
}

impl Parting {
    pub(super) const fn until(self) -> Duration {
        match self {
            Self::Goodbye { until } | Self::LastWord { until } => until,
        }
    }
}

impl Session {
    /// It ends, and the guest is the source's, unless the commit was sent.
    pub(super) fn fail(&mut self, error: Error) -> Vec<Effect> {
        let how = if self.is_paused() {
            Reclaim::Paused
        } else {
            Reclaim::Running
        };
        self.state = State::Over;
        let release = self.release();
        let Some(reclaim) = self.reclaim(how) else {
            // Whoever finds out that it may run here again finds it as it was.
            let mut effects: Vec<Effect> = release.into_iter().collect();
            effects.push(Effect::Finish(Outcome::Unknown(error)));
            return effects;
        };
        // The guest first: telling the peer may take as long as a dead link takes.
        let mut effects = vec![reclaim];
        effects.extend(release);
        effects.extend(abort(&error));
        effects.push(Effect::Finish(outcome(error)));
        effects
    }

    /// It ends while there is no channel. The destination keeps the guest's memory for a source that will not come, and is told so if it
    /// can be reached at once; otherwise it frees everything after its own deadline (SPEC: RESUME-3).
    pub(super) fn fail_away(&mut self, error: Error, now: Duration) -> Vec<Effect> {
        if !self.is_kept() {
            return self.fail(error);
        }
        let until = now + LAST_WORD_MAX;
        self.control.dial(Purpose::Resume, now, until);
        self.ending = Some(outcome(error));
        self.state = State::Parting(Parting::LastWord { until });
        let reclaim = self.reclaim(Reclaim::Running);
        reclaim.into_iter().chain(self.release()).collect()
    }

    /// The guest is the source's again, if it is; none once it was given to the destination.
    pub(super) fn reclaim(&self, how: Reclaim) -> Option<Effect> {
        let paused = how == Reclaim::Paused;
        let proof = self.guest.reclaim()?;
        Some(Effect::Reclaim { paused, proof })
    }

    /// The guest runs at the destination, which asks whether that is known here (SPEC: RUNNING-2).
    pub(super) fn take_leave(&mut self, now: Duration) -> Vec<Effect> {
        let until = now + GOODBYE_MAX;
        self.ending = Some(Outcome::Migrated);
        self.state = State::Parting(Parting::Goodbye { until });
        vec![Effect::Migrated]
    }

    /// What happens once it is known how it ends.
    pub(super) fn part(&mut self, parting: Parting, event: Event, now: Duration) -> Vec<Effect> {
        match (parting, event) {
            (_, Event::Tick) if now >= parting.until() => self.finish(),
            (Parting::Goodbye { .. }, Event::Lost(_) | Event::Failed(_)) => self.finish(),
            (Parting::LastWord { .. }, Event::Connected { .. }) => {
                let error = self.ending.as_ref().and_then(Outcome::error);
                let mut effects: Vec<Effect> = error.and_then(abort).into_iter().collect();
                effects.extend(self.finish());
                effects
            }
            (Parting::LastWord { .. }, Event::NotConnected { number, why }) => {
                let refused = matches!(why.fault(), Fault::Refused { .. });
                match self.control.failed(number, why, now) {
                    Failed::Old => Vec::new(),
                    // It keeps nothing any more.
                    Failed::Again(_) if refused => self.finish(),
                    Failed::Again(_) => Vec::new(),
                    Failed::Forgotten(_) | Failed::OutOfTime(_) | Failed::Over(_) => self.finish(),
                }
            }
            _ => Vec::new(),
        }
    }

    /// The same of frames: all that is waited for is the destination's question.
    pub(super) fn part_frame(
        &mut self,
        parting: Parting,
        frame: &Frame<'_>,
        now: Duration,
    ) -> Vec<Effect> {
        let (Parting::Goodbye { .. }, Frame::KeepAlive(asked)) = (parting, frame) else {
            return Vec::new();
        };
        let Some(answer) = self.keep_alive.heard(asked, now).answer else {
            return Vec::new();
        };
        // It ends with the next tick, which is due now: the end is not to depend on whether this can be sent.
        self.state = State::Parting(Parting::Goodbye { until: now });
        vec![Effect::Send(answer.into())]
    }

    pub(super) fn finish(&mut self) -> Vec<Effect> {
        self.state = State::Over;
        self.control.rest();
        self.ending.take().map(Effect::Finish).into_iter().collect()
    }
}

fn outcome(error: Error) -> Outcome {
    match error.fault() {
        Fault::Cancelled => Outcome::Cancelled(error),
        Fault::GuestGone => Outcome::Gone(error),
        _ => Outcome::Failed(error),
    }
}

/// An ABORT is not answered (SPEC: ABORT-2).
fn abort(error: &Error) -> Option<Effect> {
    (!matches!(error.fault(), Fault::PeerAborted { .. })).then(|| Effect::Abort {
        reason: error.reason(),
        phase: error.phase(),
        channel: error.channel(),
        text: error.fault().to_string(),
    })
}
