//! What the source's session does when its channels are lost: run the guest, come back, or ask.
//!
//! ```text
//!  rounds, switchover ──lost──► Suspended ──reconnected──► Rejoining ──LANDED──► Reopening ──collected──► Sending(k)
//!    (the guest runs again)       ▲  │ forgotten              │ lost
//!                                 └──┼────────────────────────┘
//!                                    └──► Setup, if told to start afresh
//!  committed ──lost──► Asking ──running──► over: migrated
//!                        │ └──not committed──► over: failed, the guest is the source's again
//!                        └──failed there, forgotten, deadline──► over: stranded, or unknown; the guest stays paused
//! ```
//! The rule it keeps: after COMMIT the guest comes back only by the destination's own word that it took none and never will
//! (SPEC: ASK-3, ASK-5). Every wait here has a deadline, and each loss counts towards [`SUSPENSIONS_MAX`].

use std::time::Duration;

use multifd_wire::frame::OutcomeState;
use multifd_wire::{ChannelRef, Phase, Round};

use super::end::Reclaim;
use super::{Effect, Event, Outcome, Session, State};
use crate::source::config::WhenDestinationLost;
use crate::source::control::Failed;
use crate::source::deadlines::Deadlines;
use crate::source::error::{Error, Fault};
use crate::source::hello::{NotOpened, Purpose};
use crate::source::lanes::Lanes;

/// A migration that is interrupted more often than this is not worth its link.
pub const SUSPENSIONS_MAX: u32 = 1000;

/// A control channel on which checksums are wrong more often than this is no accident, and the migration is given up.
pub const DAMAGES_MAX: u32 = 16;

/// With the guest paused a silent destination is given up after this, or eight round trips: the guest runs on meanwhile.
const PAUSED_SILENCE: Duration = Duration::from_secs(1);

/// Round trips that [`PAUSED_SILENCE`] has at least.
const PAUSED_ROUND_TRIPS: u32 = 8;

impl Session {
    /// The destination keeps the migration for this long when all channels are lost. Without this, what is lost is lost.
    pub(super) fn kept_for(&mut self, time: Option<Duration>) {
        self.kept = time.map(|time| time.min(self.config.reconnect));
    }

    /// Whether the migration outlives its channels.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.kept.is_some_and(|time| !time.is_zero())
    }

    /// How often the control channel was lost by wrong checksums.
    #[must_use]
    pub fn damages(&self) -> u32 {
        self.damages
    }

    /// Whether a new control channel is open and the rounds do not go on yet.
    #[must_use]
    pub fn is_rejoining(&self) -> bool {
        matches!(self.state, State::Rejoining { .. })
    }

    /// A channel could not be opened on the way back. Nothing follows as long as others can be, or another try is left (SPEC:
    /// RESUME-14); the last one is told if it comes to nothing.
    pub(super) fn hindered(&mut self, error: Error) {
        if matches!(
            self.state,
            State::Hello | State::Suspended { .. } | State::Asking { .. } | State::Rejoining { .. }
        ) {
            self.hindrance = Some(error);
        }
    }

    /// How long the destination may be silent.
    pub(super) fn silence_max(&self) -> Duration {
        if self.is_paused() && self.is_kept() {
            let trips = self.round_trip.unwrap_or_default() * PAUSED_ROUND_TRIPS;
            PAUSED_SILENCE.max(trips).min(self.config.stall)
        } else {
            self.config.stall
        }
    }

    /// All channels are lost, or worth nothing.
    pub(super) fn lost(&mut self, error: Error, now: Duration) -> Vec<Effect> {
        // SPEC: ERR-2
        self.damages += u32::from(error.is_damage());
        let until = match self.state {
            State::Hello
            | State::Suspended { .. }
            | State::Asking { .. }
            | State::Parting(_)
            | State::Over => return Vec::new(),
            State::Committed { .. } => return self.doubt(error, now),
            _ if self.damages > DAMAGES_MAX => return self.fail(error),
            State::Rejoining { until, .. } | State::Reopening { until, .. } => until,
            // SPEC: RESUME-13. Within the time that set-up may take, as if nothing had happened.
            State::Setup { granted: true } if self.unready && self.is_kept() => {
                let kept = now + self.kept.unwrap_or_default();
                kept.min(self.deadlines.began + self.config.setup_deadline)
            }
            State::Setup { .. } => return self.fail(error),
            _ if !self.is_kept() || self.suspensions >= SUSPENSIONS_MAX => return self.fail(error),
            _ => match self.lanes.starves_at(&self.view()) {
                // Channels that are opened again and lost again are no progress, and do not begin the time anew.
                Some(at) if at <= now => {
                    let last = error.fault().to_string();
                    let starved = self.lanes.starved(&self.view(), now, last);
                    return self.fail(starved);
                }
                Some(at) => at.min(now + self.kept.unwrap_or_default()),
                None => now + self.kept.unwrap_or_default(),
            },
        };
        let mut effects = Vec::new();
        // The guest first: it stood still for a switchover that does not happen now (SPEC: RESUME-8).
        if self.is_paused() {
            effects.extend(self.reclaim(Reclaim::Paused));
        }
        // It does not wait at half its speed for a link that may never come back.
        effects.extend(self.release());
        self.suspensions += 1;
        self.channels_gone();
        self.state = State::Suspended { until };
        self.doubt = Some(error);
        self.deadlines.paused_at = None;
        self.devices.run_again();
        self.rounds.broken_off();
        self.repairs = 0;
        self.control.dial(Purpose::Resume, now, until);
        effects.push(Effect::Disconnect);
        effects
    }

    /// An attempt to open a control channel came to nothing.
    pub(super) fn not_connected(
        &mut self,
        number: u32,
        why: NotOpened,
        now: Duration,
    ) -> Vec<Effect> {
        let phase = match self.state {
            State::Hello => Phase::Hello,
            _ => Phase::Suspended,
        };
        let error = |fault| Error::new(phase, fault).at(ChannelRef::Control);
        match self.control.failed(number, why, now) {
            Failed::Old => Vec::new(),
            Failed::Again(fault) => {
                self.hindered(error(fault));
                Vec::new()
            }
            // That time ran out says less than what ended the attempt before.
            Failed::OutOfTime(fault) => {
                let last = self.hindrance.take();
                self.fail(last.unwrap_or_else(|| error(fault)))
            }
            Failed::Over(fault) => self.fail(error(fault)),
            Failed::Forgotten(fault) => {
                let error = Error::new(self.phase(), fault).at(ChannelRef::Control);
                match self.state {
                    State::Asking { .. } => self.fail(error),
                    _ => self.forgotten(error, now),
                }
            }
        }
    }

    fn channels_gone(&mut self) {
        self.lanes.disconnect();
        self.set_up.disconnected();
        self.keep_alive.disconnected();
        self.control.rest();
    }

    /// The commit was sent, and now nothing more will be heard of it: the destination is asked.
    pub(super) fn doubt(&mut self, error: Error, now: Duration) -> Vec<Effect> {
        if self.config.reconnect.is_zero() {
            return self.fail(error);
        }
        let until = now + self.config.reconnect;
        self.channels_gone();
        self.state = State::Asking { until };
        self.doubt = Some(error);
        self.control.dial(Purpose::Ask, now, until);
        vec![Effect::Disconnect]
    }

    /// What the events of this file mean.
    pub(super) fn handle_resume(&mut self, event: Event, now: Duration) -> Vec<Effect> {
        match (self.state, event) {
            (State::Suspended { until }, Event::Connected { agreed, round_trip }) => {
                self.connected(agreed, round_trip, now);
                self.set_up.resumes();
                self.hindrance = None;
                self.state = State::Rejoining {
                    granted: false,
                    until,
                    since: now,
                };
                Vec::new()
            }
            (
                State::Rejoining {
                    granted: false,
                    until,
                    since,
                },
                Event::Granted,
            ) => {
                self.state = State::Rejoining {
                    granted: true,
                    until,
                    since,
                };
                vec![Effect::SendSetup {
                    lanes: self.lanes_named(),
                }]
            }
            (
                State::Rejoining {
                    granted: true,
                    until,
                    ..
                },
                Event::Landed { rounds_closed },
            ) => {
                (self.doubt, self.hindrance) = (None, None);
                self.unready = false;
                self.closed = rounds_closed.checked_sub(1).map(Round::new);
                self.state = State::Reopening {
                    round: Round::new(rounds_closed),
                    until,
                };
                // What was written meanwhile goes into this round, and says nothing about how fast the guest writes.
                vec![Effect::Collect { last: false }]
            }
            (State::Reopening { round, .. }, Event::Collected { .. }) => self.open(round, now),
            // The decision that asks for them is still to come.
            (_, Event::Devices(outlook)) if self.devices.are_there() => {
                self.devices.known(outlook);
                Vec::new()
            }
            // Nothing was sent on it yet (SPEC: RESUME-14).
            (State::Rejoining { granted: true, .. }, Event::LaneLost { .. }) => Vec::new(),
            (State::Asking { .. }, Event::Answered(state)) => {
                self.control.answered(now);
                self.answered(state, now)
            }
            // Old news of the channels that were lost.
            (
                State::Suspended { .. } | State::Asking { .. },
                Event::Encoded { .. }
                | Event::Closed { .. }
                | Event::LaneLost { .. }
                | Event::Prepared { .. }
                | Event::Running
                | Event::DevicesQuiesced
                | Event::DevicesStopped
                | Event::DevicesSaved,
            ) => Vec::new(),
            (_, event) => self.unexpected(&event),
        }
    }

    /// The destination does not know the migration any more.
    fn forgotten(&mut self, error: Error, now: Duration) -> Vec<Effect> {
        if self.config.when_destination_lost == WhenDestinationLost::Fail {
            return self.fail(error);
        }
        self.kept = None;
        self.state = State::Hello;
        self.deadlines = Deadlines::new(now);
        self.closed = None;
        self.unready = true;
        self.rounds.begin_again();
        self.channels_gone();
        self.lanes = Lanes::default();
        (self.last_opened, self.paused_from) = (None, None);
        vec![Effect::Disconnect, Effect::StartAfresh]
    }

    fn answered(&mut self, state: OutcomeState, now: Duration) -> Vec<Effect> {
        self.guest.answered(state);
        let error = self.doubt.take();
        let why = error.map_or_else(String::new, |error| error.fault().to_string());
        match state {
            // It will run, or not: the next answer says.
            OutcomeState::CommittedNotRunning => {
                let fault = Fault::OutcomeUnknown { why };
                self.doubt = Some(Error::new(Phase::Commit, fault));
                Vec::new()
            }
            OutcomeState::Running => {
                let mut effects = self.take_leave(now);
                effects.extend(self.finish());
                effects
            }
            OutcomeState::NotCommitted => {
                self.state = State::Over;
                let error = Error::new(Phase::Commit, Fault::NotCommitted { why });
                let reclaim = self.reclaim(Reclaim::Paused);
                let mut effects: Vec<Effect> = reclaim.into_iter().chain(self.release()).collect();
                effects.push(Effect::Finish(Outcome::Failed(error)));
                effects
            }
            OutcomeState::FailedAfterCommit => {
                self.state = State::Over;
                let error = Error::new(Phase::Commit, Fault::FailedAfterCommit);
                vec![Effect::Finish(Outcome::Stranded(error))]
            }
        }
    }

    /// The error of a wait of this file whose deadline passed.
    pub(super) fn gave_up(&mut self, what: &'static str) -> Error {
        let doubt = self.doubt.take();
        // The channel is that of the first error: what came of it is not about another one.
        let at = doubt.as_ref().map_or(ChannelRef::None, Error::channel);
        // What stood in the way last: an end of TLS, say, which the first error knows nothing of.
        let last = self.hindrance.take().map(|error| error.fault().to_string());
        let why = doubt.map(|error| match (error.fault().to_string(), last) {
            (why, Some(last)) if last != why => {
                format!("{why}; the last attempt to come back ended with: {last}")
            }
            (why, _) => why,
        });
        let error = match (self.state, why) {
            (State::Suspended { .. } | State::Rejoining { .. }, Some(why)) => Error::new(
                Phase::Suspended,
                Fault::NotReconnected {
                    within_ms: self.kept.unwrap_or_default().as_millis(),
                    why,
                },
            ),
            (State::Asking { .. }, Some(why)) => {
                Error::new(Phase::Commit, Fault::OutcomeUnknown { why })
            }
            _ => Error::new(self.phase(), Fault::Timeout { what }),
        };
        error.at(at)
    }
}
