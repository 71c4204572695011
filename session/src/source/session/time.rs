//! What the source's session does as time goes on: dials, says that it lives, and gives up what does not come.

use std::time::Duration;

use multifd_wire::{ChannelRef, Phase};

use super::{Effect, Event, Session, State};
use crate::source::error::{Error, Fault};
use crate::source::steer::Sending;

/// A lane may turn out to be dead while its round is waited for: it is given up after one stall, and what the destination has
/// of it is known after three more at the latest.
pub(super) const DEAD_LANE_STALLS: u32 = 4;

impl Session {
    /// Does what is due: the control channel, signs of life, lanes, and the deadlines of [`Event::Tick`].
    #[must_use]
    pub fn tick(&mut self, now: Duration) -> Vec<Effect> {
        if self.state == State::Over {
            return Vec::new();
        }
        let timing = self.timing();
        let dial = self.control.tick(&self.hellos, &timing, now);
        let mut effects: Vec<Effect> = dial.into_iter().collect();
        if matches!(self.state, State::Parting(_)) {
            effects.extend(self.handle(Event::Tick, now));
            return effects;
        }
        let alive = self.keep_alive.tick(self.is_paused(), now);
        effects.extend(alive.map(|alive| Effect::Send(alive.into())));
        // Nothing can be taken meanwhile, or is to be.
        if self.lanes.alone_since().is_some() || self.sending() == Sending::Held {
            self.progressed(now);
        }
        let steps = self.lanes.tick(&self.view(), now);
        effects.extend(self.carry(steps, now));
        effects.extend(self.handle(Event::Tick, now));
        effects
    }

    /// When [`Session::tick`] is due at the latest.
    #[must_use]
    pub fn due(&self) -> Duration {
        let due = self.next_deadline().min(self.control.due());
        if matches!(self.state, State::Parting(_) | State::Over) {
            return due;
        }
        due.min(self.keep_alive.due())
            .min(self.lanes.due(&self.view()))
    }

    /// When [`Event::Tick`](super::Event::Tick) is due at the latest.
    #[must_use]
    pub(super) fn next_deadline(&self) -> Duration {
        let deadline = self.deadline().0;
        match self.state {
            State::Waiting { again, .. } => deadline.min(again),
            State::Sending { .. } => deadline.min(self.rounds.look_due()),
            _ => deadline,
        }
    }

    /// The next instant at which waiting any longer is an error, and which one.
    pub(super) fn deadline(&self) -> (Duration, &'static str) {
        let silence = (
            self.deadlines.heard + self.silence_max(),
            "a sign of life from the destination",
        );
        let own = match self.state {
            State::Hello => {
                // Whoever dials keeps its deadline, and says what it ended with; one that does not return has a moment more.
                let until = self.control.until();
                let at = until.map_or(Duration::MAX, |until| until + self.config.device_deadline);
                return (at, "the destination to answer the hello");
            }
            State::Parting(parting) => return (parting.until(), "the last word"),
            State::Over => return (Duration::MAX, "nothing"),
            State::Setup { .. } => (
                self.deadlines.began + self.config.setup_deadline,
                "the destination to get ready",
            ),
            State::Draining { until, .. } => (
                until.max(self.deadlines.progress + self.config.stall * DEAD_LANE_STALLS),
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
            _ => match self.deadlines.paused_at {
                // The user was told, or accepts, that it takes so long.
                Some(at) => (
                    at + self.predicted.unwrap_or_default() + self.config.commit_deadline,
                    "the destination to take the paused guest over",
                ),
                None => (
                    self.deadlines.progress + self.config.progress_deadline,
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
                State::Sending { .. } if now >= self.rounds.look_due() => {
                    self.rounds.looks();
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
            // It is in code of the embedder's, or was killed.
            State::Hello => {
                let fault = Fault::ThreadStuck {
                    thread: "mfd-dial, which was to reach the destination".to_owned(),
                    waited_ms: (self.config.hello_deadline + self.config.device_deadline)
                        .as_millis(),
                };
                self.fail(Error::new(Phase::Hello, fault).at(ChannelRef::Control))
            }
            // A destination that is silent may be there again later; one that lives and does nothing is no better then.
            _ if now >= self.deadlines.heard + self.silence_max() => {
                self.lost(Error::new(self.phase(), Fault::Timeout { what }), now)
            }
            _ => self.fail(Error::new(self.phase(), Fault::Timeout { what })),
        }
    }
}
