//! How long each state may last, and what follows when its time is over.

use std::time::Duration;

use super::{Effect, Session, State};
use crate::source::error::{Error, Fault};

/// A lane may turn out to be dead while its round is waited for: it is given up after one stall, and what the destination has
/// of it is known after three more at the latest.
pub(super) const DEAD_LANE_STALLS: u32 = 4;

impl Session {
    /// When [`Event::Tick`](super::Event::Tick) is due at the latest.
    #[must_use]
    pub(super) fn next_deadline(&self) -> Duration {
        let deadline = self.deadline().0;
        match self.state {
            State::Waiting { again, .. } => deadline.min(again),
            State::Sending { .. } => deadline.min(self.look_due),
            _ => deadline,
        }
    }

    /// The next instant at which waiting any longer is an error, and which one.
    pub(super) fn deadline(&self) -> (Duration, &'static str) {
        let silence = (
            self.heard + self.silence_max(),
            "a sign of life from the destination",
        );
        let own = match self.state {
            State::Setup { .. } => (
                self.began + self.config.setup_deadline,
                "the destination to get ready",
            ),
            State::Draining { until, .. } => (
                until.max(self.progress + self.config.stall * DEAD_LANE_STALLS),
                "the destination to close a round",
            ),
            State::Suspended { until } | State::Asking { until } => {
                return (until, "the destination to answer again");
            }
            State::Rejoining { until, since, .. } => (
                until.min(since + self.config.setup_deadline),
                "the destination to take the migration up again",
            ),
            State::Committed { since, .. } => (
                since + self.config.commit_deadline,
                "the destination to say that the guest runs",
            ),
            _ => match self.paused_at {
                // The user was told, or accepts, that it takes so long.
                Some(at) => (
                    at + self.predicted.unwrap_or_default() + self.config.commit_deadline,
                    "the destination to take the paused guest over",
                ),
                None => (
                    self.progress + self.config.progress_deadline,
                    "the destination to take anything; it only says that it lives",
                ),
            },
        };
        if own.0 < silence.0 { own } else { silence }
    }

    pub(super) fn deadlines(&mut self, now: Duration) -> Vec<Effect> {
        let (deadline, what) = self.deadline();
        if now < deadline {
            return match self.state {
                State::Waiting { again, .. } if now >= again => self.look_again(now),
                State::Sending { .. } if now >= self.look_due => {
                    self.look_due = Duration::MAX;
                    vec![Effect::Collect { last: false }]
                }
                _ => Vec::new(),
            };
        }
        match self.state {
            State::Suspended { .. } | State::Asking { .. } => {
                let error = self.gave_up(what);
                self.fail(error)
            }
            State::Rejoining { until, .. } if now >= until => {
                self.doubt = self.hindrance.take().or(self.doubt.take());
                let error = self.gave_up(what);
                self.fail(error)
            }
            State::Rejoining { .. } | State::Committed { .. } => {
                let late = Error::new(self.phase(), Fault::Timeout { what });
                let error = self.hindrance.take().unwrap_or(late);
                self.lost(error, now)
            }
            // A destination that is silent may be there again later; one that lives and does nothing is no better then.
            _ if now >= self.heard + self.silence_max() => {
                self.lost(Error::new(self.phase(), Fault::Timeout { what }), now)
            }
            _ => self.fail(Error::new(self.phase(), Fault::Timeout { what })),
        }
    }
}
