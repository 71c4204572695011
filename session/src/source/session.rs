//! The control plane at the source, as a machine without I/O: events and the time in, effects out.
//!
//! ```text
//!  Setup ──ready──► Sending(0) ──encoded──► Deciding ──► Sending(k+1)
//!                                            │ ▲│ fits the limit, or the rounds are used up
//!                       Draining ◄───────────┘ ││
//!                           └────── closed ────┘▼
//!                     Pausing ─(devices: Quiescing ► Stopping)─► Collecting ──► Last(k) ──prepared──► Committed ──running──► Over
//!                                                  │ damaged, lost or late pages
//!                                                  └──► Last(k+1)
//! ```
//! What follows when the channels are lost is in `session/resume.rs`. Every state before `Committed` can fail or be cancelled; the guest then belongs to the source, and the machine says so
//! with an [`Effect::Reclaim`]. From `Committed` on no effect gives the guest back (SPEC: COMMIT-3), unless the channel
//! was gone before it took anything of the COMMIT. Which event is
//! legal in which state is the one table in [`Session::handle`]; `the_table_of_states_and_events` prints it.

mod end;
mod frames;
mod lanes;
mod resume;
mod rounds;
mod set_up;
mod steer;
mod switchover;
mod time;

use std::time::Duration;

use multifd_wire::frame::GuestState;
use multifd_wire::{ChannelRef, Features, Phase, Round};

use crate::source::commit::{Guest, Last};
use crate::source::config::Config;
use crate::source::control::Control;
use crate::source::deadlines::Deadlines;
use crate::source::devices::Devices;
use crate::source::error::{Error, Fault};
use crate::source::hello::{Hellos, Purpose};
use crate::source::keep_alive::KeepAlive;
use crate::source::lanes::Lanes;
use crate::source::rounds::Rounds;
use crate::source::set_up::SetUp;
use crate::source::speed::Speeds;
use crate::source::throttle::Throttle;
use end::Parting;

pub use crate::source::commit::Reclaimed;
pub use crate::source::event::{DeviceOutlook, Effect, Event, Outcome};
pub use crate::source::rounds::Counted;
pub use resume::{DAMAGES_MAX, SUSPENSIONS_MAX};
pub use switchover::REPAIR_ROUNDS_MAX;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Without a control channel yet: it is dialled for the first time.
    Hello,
    Setup {
        granted: bool,
    },
    Sending {
        round: Round,
        since: Duration,
    },
    Deciding {
        round: Round,
        since: Duration,
        encoded: Duration,
    },
    /// Hardly anything is dirty, but too much is on its way still: a further round would be empty and end at once.
    Draining {
        round: Round,
        since: Duration,
        until: Duration,
    },
    /// The guest could be paused, but for devices whose initial bytes are not loaded at the destination (SPEC: SWACK-2). It runs on.
    Waiting {
        round: Round,
        since: Duration,
        /// When to look again at what is dirty meanwhile.
        again: Duration,
    },
    Pausing {
        round: Round,
    },
    /// The guest is paused, and the devices are led to their P2P-quiescent states.
    Quiescing {
        round: Round,
    },
    /// All are quiescent, and stop.
    Stopping {
        round: Round,
    },
    Collecting {
        round: Round,
    },
    Last(Last),
    Committed {
        since: Duration,
        /// What it was before.
        last: Last,
    },
    /// Without channels; the guest runs here.
    Suspended {
        until: Duration,
    },
    /// A new control channel is open; the set-up is made again.
    Rejoining {
        granted: bool,
        until: Duration,
        since: Duration,
    },
    /// Before the first round after a resume.
    Reopening {
        round: Round,
        until: Duration,
    },
    /// The commit was sent and the channels were lost.
    Asking {
        until: Duration,
    },
    /// It is known how it ends, and the destination is told, if that can be done until then.
    Parting(Parting),
    Over,
}

/// The machine of one migration at the source.
#[derive(Debug)]
pub struct Session {
    config: Config,
    state: State,
    guest: Guest,
    hellos: Hellos,
    control: Control,
    set_up: SetUp,
    lanes: Lanes,
    keep_alive: KeepAlive,
    deadlines: Deadlines,
    rounds: Rounds,
    throttle: Throttle,
    devices: Devices,
    /// The shortest seen: longer ones say how busy the two programs are, not how long the way is.
    round_trip: Option<Duration>,
    /// The newest round that the destination closed: nothing of it is on its way any more.
    closed: Option<Round>,
    /// The newest round that was opened since the destination last said how many it has closed, or ever.
    last_opened: Option<Round>,
    /// The first round with the guest paused, since the same moment.
    paused_from: Option<Round>,
    /// The embedder wants the switchover at the end of the round under way, whatever the forecast says.
    at_once: bool,
    repairs: u32,
    predicted: Option<Duration>,
    /// How long the destination keeps the session without channels, and this side tries to come back.
    kept: Option<Duration>,
    suspensions: u32,
    /// How often the control channel was lost by wrong checksums.
    damages: u32,
    /// The destination has not been ready yet: nothing was moved, and nothing was promised.
    unready: bool,
    /// Why the channels were lost.
    doubt: Option<Error>,
    /// Why a channel could not be opened last: if none can, that is what it was.
    hindrance: Option<Error>,
    /// How it ends, while [`State::Parting`].
    ending: Option<Outcome>,
}

impl Session {
    /// A session that has no control channel and no name yet.
    #[must_use]
    pub fn new(config: Config, memory_pages: u64, now: Duration) -> Self {
        let keep_alive = KeepAlive::new(config.keep_alive);
        let hellos = Hellos::new(config.pass, config.reconnect);
        let rounds = Rounds::new(memory_pages, &config.limits, now);
        Self {
            config,
            state: State::Hello,
            guest: Guest::default(),
            hellos,
            control: Control::default(),
            set_up: SetUp::default(),
            lanes: Lanes::default(),
            keep_alive,
            deadlines: Deadlines::new(now),
            rounds,
            throttle: Throttle::default(),
            devices: Devices::default(),
            round_trip: None,
            closed: None,
            last_opened: None,
            paused_from: None,
            at_once: false,
            repairs: 0,
            predicted: None,
            kept: None,
            suspensions: 0,
            damages: 0,
            unready: true,
            doubt: None,
            hindrance: None,
            ending: None,
        }
    }

    /// Where in its life, in the words of SPEC.
    #[must_use]
    pub fn phase(&self) -> Phase {
        match self.state {
            State::Hello => Phase::Hello,
            State::Setup { .. } | State::Rejoining { .. } | State::Reopening { .. } => Phase::Setup,
            State::Suspended { .. } => Phase::Suspended,
            State::Sending { .. }
            | State::Deciding { .. }
            | State::Draining { .. }
            | State::Waiting { .. } => Phase::Rounds,
            State::Pausing { .. }
            | State::Quiescing { .. }
            | State::Stopping { .. }
            | State::Collecting { .. }
            | State::Last(_) => Phase::Switchover,
            State::Committed { .. } | State::Asking { .. } => Phase::Commit,
            State::Parting(_) | State::Over => Phase::Done,
        }
    }

    /// Whether the commit was made: from then on the guest is the destination's.
    #[must_use]
    pub fn is_committed(&self) -> bool {
        matches!(self.state, State::Committed { .. } | State::Asking { .. })
    }

    /// The downtime that was predicted when the switchover was decided.
    #[must_use]
    pub fn predicted_downtime(&self) -> Option<Duration> {
        self.predicted
    }

    /// The measured octets a second, once a round was long enough.
    #[must_use]
    pub fn bandwidth(&self) -> Option<f64> {
        self.rounds.bandwidth()
    }

    /// How fast each lane is and what it has on its way, as of the newest acknowledgement.
    #[must_use]
    pub fn speeds(&self) -> &Speeds {
        self.rounds.speeds()
    }

    /// The shortest round trip that was seen.
    #[must_use]
    pub fn round_trip(&self) -> Option<Duration> {
        self.round_trip
    }

    /// The guest runs, or stands still and is to stand still at the destination.
    pub fn expect_guest(&mut self, guest: GuestState) {
        self.hellos.guest(guest);
    }

    /// How a guest that is like this here arrives: as it is, if both sides can say so (SPEC: FINAL-6).
    #[must_use]
    pub fn arrives(&self, guest: GuestState) -> GuestState {
        if self.hellos.have(Features::PAUSED) {
            guest
        } else {
            GuestState::Running
        }
    }

    /// There are devices: they are quiesced and stopped with the guest, and waited for.
    pub fn expect_devices(&mut self) {
        self.hellos.needs_devices();
        self.devices.expected();
    }

    /// Whether the guest may be paused although acknowledgements of devices are missing: the user said so for now.
    #[must_use]
    pub fn acks_waived(&self, now: Duration) -> bool {
        self.devices.waived(&self.config, now)
    }

    /// The peer was heard on the control channel.
    fn heard(&mut self, now: Duration) {
        self.deadlines.heard = now;
    }

    /// The destination took something.
    fn progressed(&mut self, now: Duration) {
        self.deadlines.progress = now;
    }

    /// Whether the guest is paused for the switchover, and still this side's.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.phase() == Phase::Switchover
    }

    /// Whether anything may still have to travel on a lane. Nothing has to once the round of the newest FINAL is closed: what the
    /// destination then has is all that there is, and it only has to load it (SPEC: LANE-9).
    #[must_use]
    pub fn needs_lanes(&self) -> bool {
        match self.state {
            State::Last(last) => last.needs_lanes(),
            State::Committed { .. } | State::Asking { .. } | State::Parting(_) | State::Over => {
                false
            }
            _ => true,
        }
    }

    /// The one table: what each event means in each state.
    #[must_use]
    pub fn handle(&mut self, event: Event, now: Duration) -> Vec<Effect> {
        if let State::Parting(parting) = self.state {
            return self.part(parting, event, now);
        }
        if self.state != State::Over
            && matches!(
                event,
                Event::LaneUp { .. }
                    | Event::LaneNotOpened { .. }
                    | Event::LaneEncoded { .. }
                    | Event::LaneEnded { .. }
                    | Event::LanesSeen(_)
                    | Event::Acked { .. }
                    | Event::Begun
            )
        {
            return self.handle_lanes(event, now);
        }
        let settled = matches!(event, Event::LaneLost { .. });
        let mut effects = self.handle_session(event, now);
        if settled {
            effects.extend(self.lanes.check_encoded());
        }
        effects
    }

    fn handle_session(&mut self, event: Event, now: Duration) -> Vec<Effect> {
        // A look inside a round is no progress of the migration's.
        let looked = matches!(
            (self.state, &event),
            (State::Sending { .. }, Event::Collected { .. })
        );
        if !looked
            && !matches!(
                event,
                Event::Tick
                    | Event::RoundTrip(_)
                    | Event::Devices(_)
                    | Event::Counted { .. }
                    | Event::NotConnected { .. }
                    | Event::SwitchOverNow
                    | Event::Steer(_)
                    | Event::NotThrottled
            )
        {
            self.deadlines.progress = now;
        }
        if let Event::Closed { round, .. } = event {
            self.closed = self.closed.max(Some(round));
        }
        match (self.state, event) {
            (State::Over, _) => Vec::new(),
            (_, Event::Lost(error)) => self.lost(error, now),
            // Nobody can have read it: the channel was lost, and nothing else.
            (State::Committed { last, .. }, Event::CommitUnsent(error)) => {
                self.guest.not_sent();
                self.state = State::Last(last);
                // A channel can be opened again; what the embedder says is final.
                match error.fault() {
                    Fault::Vmm { .. } => self.fail(error),
                    _ => self.lost(error, now),
                }
            }
            // SPEC: COMMIT-5
            (State::Committed { .. }, Event::Failed(error)) => self.doubt(error, now),
            (State::Suspended { .. }, Event::Failed(error)) => self.fail_away(error, now),
            (_, Event::Failed(error)) => self.fail(error),
            // The user does not want to wait for the answer.
            (State::Asking { .. }, Event::Cancel) => {
                let error = self.gave_up("the answer");
                self.fail(error)
            }
            // Too late to stop: the guest is the destination's (SPEC: COMMIT-3).
            (State::Committed { .. }, Event::Cancel) => Vec::new(),
            (State::Suspended { .. }, Event::Cancel) => {
                let error = Error::new(self.phase(), Fault::Cancelled);
                self.fail_away(error, now)
            }
            (_, Event::Cancel) => self.fail(Error::new(self.phase(), Fault::Cancelled)),
            // A guest that was given away is the destination's, whatever became of it here.
            (State::Committed { .. } | State::Asking { .. }, Event::GuestGone) => Vec::new(),
            (State::Suspended { .. }, Event::GuestGone) => {
                let error = Error::new(self.phase(), Fault::GuestGone);
                self.fail_away(error, now)
            }
            (_, Event::GuestGone) => self.fail(Error::new(self.phase(), Fault::GuestGone)),
            (_, Event::SwitchOverNow) => self.wants_switchover(now),
            (_, Event::Steer(change)) => self.steer(change, now),
            (_, Event::NotThrottled) => {
                self.throttle.refused();
                self.rounds.throttled(self.throttle.percent());
                Vec::new()
            }
            (_, Event::Tick) => self.deadlines(now),
            (_, Event::Counted { round, lanes }) => {
                self.rounds.counted(round, &lanes, now);
                Vec::new()
            }
            (_, Event::RoundTrip(time)) => {
                self.round_trip = Some(self.round_trip.map_or(time, |shortest| shortest.min(time)));
                Vec::new()
            }
            (
                State::Hello | State::Suspended { .. } | State::Asking { .. },
                Event::NotConnected { number, why },
            ) => self.not_connected(number, why, now),
            // Of an attempt that nobody waits for any more.
            (_, Event::NotConnected { .. }) => Vec::new(),
            (State::Hello, Event::Named(id)) => {
                self.hellos.begin(id);
                let until = now + self.config.hello_deadline;
                self.control.dial(Purpose::Start, now, until);
                Vec::new()
            }
            (State::Hello, Event::Connected { agreed, round_trip }) => {
                self.connected(agreed, round_trip, now);
                self.deadlines = Deadlines::new(now);
                self.hindrance = None;
                self.state = State::Setup { granted: false };
                Vec::new()
            }
            (
                State::Suspended { .. }
                | State::Rejoining { .. }
                | State::Reopening { .. }
                | State::Asking { .. },
                event,
            ) => self.handle_resume(event, now),
            (State::Setup { granted: false }, Event::Granted) => {
                self.state = State::Setup { granted: true };
                vec![Effect::SendSetup {
                    lanes: self.lanes_named(),
                }]
            }
            (State::Setup { granted: true }, Event::Ready) => {
                self.unready = false;
                self.rounds.begin(now);
                self.open(Round::new(0), now)
            }
            (
                State::Sending { .. }
                | State::Deciding { .. }
                | State::Draining { .. }
                | State::Waiting { .. },
                event,
            ) => self.handle_round(event, now),
            (
                State::Pausing { .. }
                | State::Quiescing { .. }
                | State::Stopping { .. }
                | State::Collecting { .. },
                event,
            ) => self.handle_switchover(event, now),
            // Old news: the guest is on its way already.
            (_, Event::Devices(_)) if self.devices.are_there() => Vec::new(),
            (State::Last(last), event) => self.handle_last(last, event, now),
            (State::Committed { .. }, Event::Running) => self.take_leave(now),
            // Old news: all of it was on its way when the guest was given away.
            (
                State::Committed { .. },
                Event::Closed { .. } | Event::LaneLost { .. } | Event::Encoded { .. },
            ) => Vec::new(),
            (_, event) => self.unexpected(&event),
        }
    }

    /// An event that this state does not know. What the destination says out of turn is its fault, all else is ours.
    fn unexpected(&mut self, event: &Event) -> Vec<Effect> {
        let what = match event {
            Event::Granted => "GRANT",
            Event::Closed { .. } => "ROUND_CLOSED",
            Event::Prepared { .. } => "PREPARED",
            Event::Running => "RUNNING",
            Event::Landed { .. } => "LANDED",
            Event::Answered(_) => "OUTCOME",
            _ => {
                let what = format!("unexpected {event:?}");
                return self.fail(Error::new(self.phase(), Fault::Internal { what }));
            }
        };
        let what = what.to_owned();
        let error = Error::new(self.phase(), Fault::OutOfTurn { what });
        self.fail(error.at(ChannelRef::Control))
    }
}

#[cfg(test)]
mod tests;
