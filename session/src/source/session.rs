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

mod deadlines;
mod frames;
mod resume;
mod rounds;
mod set_up;
mod switchover;

use std::time::Duration;

use multifd_wire::{ChannelRef, Phase, Round};

use crate::source::config::{Config, WhenAckLate};
use crate::source::error::{Error, Fault};
use crate::source::forecast::Observation;
use crate::source::keep_alive::KeepAlive;
use crate::source::lanes::Lanes;
use crate::source::speed::Speeds;

pub use crate::source::event::{DeviceOutlook, Effect, Event, Outcome};
pub use resume::{DAMAGES_MAX, SUSPENSIONS_MAX};
pub use rounds::Counted;
pub use switchover::REPAIR_ROUNDS_MAX;

/// Proof that the guest belongs to the source: no commit left for the destination in the pause that it ends, or the destination
/// gave its word that it has read none and will take none any more (SPEC: ASK-3).
///
/// Only the session can make it: its field is private to this module. It is consumed by the VMM's `resume`.
#[derive(Debug)]
#[must_use = "the guest stays paused until the VMM is shown this"]
pub struct Reclaimed(());

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
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
    Over,
}

/// A round with the guest paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Last {
    round: Round,
    encoded: bool,
    saved: bool,
    /// The collection after the save was made.
    collected: bool,
    /// Pages that this round does not bring (dirtied by the save, damaged, lost with a lane): they need a further one.
    missing: u64,
    /// The newest round in which items of devices were lost with a lane: until a later one is closed the devices lack them.
    items_lost: Option<Round>,
    /// FINAL was sent for this round, and nothing has gone missing since.
    final_sent: bool,
    /// The destination closed this round with nothing damaged: what its lanes carried is there.
    closed: bool,
    /// The digest of the newest FINAL. With the guest paused every FINAL has the same.
    digest: Option<u64>,
}

/// The machine of one migration at the source.
#[derive(Debug)]
pub struct Session {
    config: Config,
    memory_pages: u64,
    state: State,
    began: Duration,
    heard: Duration,
    /// When the destination last took something, or a step of ours was done. Signs of life are none.
    progress: Duration,
    paused_at: Option<Duration>,
    observed: Vec<Observation>,
    /// When the first round began.
    sending_since: Duration,
    /// How far the present round is, and when to ask the sources inside it.
    counted: Counted,
    look_due: Duration,
    /// What each lane's acknowledgements say.
    speeds: Speeds,
    /// While the rounds say that no number of them will do.
    diverging: Option<rounds::Diverging>,
    bandwidth: Option<f64>,
    /// What the newest round had, if it was a small one that took long.
    crawl: Option<f64>,
    /// The shortest seen: longer ones say how busy the two programs are, not how long the way is.
    round_trip: Option<Duration>,
    unacked_octets: u64,
    /// There are devices, and what is known of them.
    devices: Option<DeviceOutlook>,
    /// They were all read to their end; also true when there are none.
    devices_saved: bool,
    /// Since when acknowledgements were the only thing missing.
    waiting_since: Option<Duration>,
    /// Rounds that were made while waiting: they do not count as used up.
    rounds_waited: u32,
    /// When the last of them was begun.
    round_waited_at: Duration,
    /// The newest round that the destination closed: nothing of it is on its way any more.
    closed: Option<Round>,
    polished: u32,
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
    /// Why a lane could not be opened on the way back: if none can, that is what it was.
    hindrance: Option<Error>,
    set_up: set_up::SetUp,
    lanes: Lanes,
    keep_alive: KeepAlive,
    /// The newest round that was opened since the destination last said how many it has closed, or ever.
    last_opened: Option<Round>,
    /// The first round with the guest paused, since the same moment.
    paused_from: Option<Round>,
}

impl Session {
    /// A session whose hello was accepted at `now`.
    #[must_use]
    pub fn new(config: Config, memory_pages: u64, now: Duration) -> Self {
        let keep_alive = KeepAlive::new(config.keep_alive, now);
        Self {
            config,
            memory_pages,
            state: State::Setup { granted: false },
            began: now,
            heard: now,
            progress: now,
            paused_at: None,
            observed: Vec::new(),
            sending_since: now,
            counted: Counted::default(),
            look_due: now,
            speeds: Speeds::default(),
            diverging: None,
            bandwidth: None,
            crawl: None,
            round_trip: None,
            unacked_octets: 0,
            devices: None,
            devices_saved: true,
            waiting_since: None,
            rounds_waited: 0,
            round_waited_at: Duration::ZERO,
            closed: None,
            polished: 0,
            at_once: false,
            repairs: 0,
            predicted: None,
            kept: None,
            suspensions: 0,
            damages: 0,
            unready: true,
            doubt: None,
            hindrance: None,
            set_up: set_up::SetUp::default(),
            lanes: Lanes::default(),
            keep_alive,
            last_opened: None,
            paused_from: None,
        }
    }

    /// Where in its life, in the words of SPEC.
    #[must_use]
    pub fn phase(&self) -> Phase {
        match self.state {
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
            State::Over => Phase::Done,
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
        let crawl = self.crawl.unwrap_or(f64::INFINITY);
        let measured = self.bandwidth.or(self.speeds.total());
        measured.map(|measured| measured.min(crawl))
    }

    /// How fast each lane is and what it has on its way, as of the newest acknowledgement.
    #[must_use]
    pub fn speeds(&self) -> &Speeds {
        &self.speeds
    }

    /// The shortest round trip that was seen.
    #[must_use]
    pub fn round_trip(&self) -> Option<Duration> {
        self.round_trip
    }

    /// There are devices: they are quiesced and stopped with the guest, and waited for.
    pub fn expect_devices(&mut self) {
        self.devices = Some(DeviceOutlook::default());
        self.devices_saved = false;
    }

    /// Whether the guest may be paused although acknowledgements of devices are missing: the user said so for now.
    #[must_use]
    pub fn acks_waived(&self, now: Duration) -> bool {
        self.config.when_ack_late == WhenAckLate::GoOn
            && self.ack_deadline().is_some_and(|deadline| now >= deadline)
    }

    /// The peer was heard on the control channel.
    fn heard(&mut self, now: Duration) {
        self.heard = now;
    }

    /// The destination took something.
    fn progressed(&mut self, now: Duration) {
        self.progress = now;
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
            State::Last(last) => !(last.final_sent && last.closed),
            State::Committed { .. } | State::Asking { .. } | State::Over => false,
            _ => true,
        }
    }

    /// The one table: what each event means in each state.
    #[must_use]
    pub fn handle(&mut self, event: Event, now: Duration) -> Vec<Effect> {
        if self.state != State::Over
            && matches!(
                event,
                Event::LaneUp { .. }
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
                    | Event::SwitchOverNow
            )
        {
            self.progress = now;
        }
        if let Event::Closed { round, .. } = event {
            self.closed = self.closed.max(Some(round));
        }
        match (self.state, event) {
            (State::Over, _) => Vec::new(),
            (_, Event::Lost(error)) => self.lost(error, now),
            // Nobody can have read it: the channel was lost, and nothing else.
            (State::Committed { last, .. }, Event::CommitUnsent(error)) => {
                self.state = State::Last(last);
                self.lost(error, now)
            }
            // SPEC: COMMIT-5
            (State::Committed { .. }, Event::Failed(error)) => self.doubt(error, now),
            (_, Event::Failed(error)) => self.fail(error),
            // The user does not want to wait for the answer.
            (State::Asking { .. }, Event::Cancel) => {
                let error = self.gave_up("the answer");
                self.fail(error)
            }
            // Too late to stop: the guest is the destination's (SPEC: COMMIT-3).
            (State::Committed { .. }, Event::Cancel) => Vec::new(),
            (_, Event::Cancel) => self.fail(Error::new(self.phase(), Fault::Cancelled)),
            // A guest that was given away is the destination's, whatever became of it here.
            (State::Committed { .. } | State::Asking { .. }, Event::GuestGone) => Vec::new(),
            (_, Event::GuestGone) => self.fail(Error::new(self.phase(), Fault::GuestGone)),
            (_, Event::SwitchOverNow) => self.wants_switchover(now),
            (_, Event::Tick) => self.deadlines(now),
            (_, Event::Counted { round, lanes }) => {
                self.counted(round, &lanes, now);
                Vec::new()
            }
            (_, Event::RoundTrip(time)) => {
                self.round_trip = Some(self.round_trip.map_or(time, |shortest| shortest.min(time)));
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
                self.sending_since = now;
                self.open(Round::new(0), now)
            }
            (
                State::Sending { round, since },
                Event::Encoded {
                    octets,
                    unacked_octets,
                },
            ) => {
                self.measure(octets, now.saturating_sub(since));
                self.unacked_octets = unacked_octets;
                self.state = State::Deciding {
                    round,
                    since,
                    encoded: now,
                };
                vec![Effect::Collect { last: false }]
            }
            (State::Sending { since, .. }, Event::Collected { pages }) => {
                self.look(pages, since, now)
            }
            (
                State::Deciding {
                    round,
                    since,
                    encoded,
                },
                Event::Collected { pages },
            ) => {
                // What was collected was dirtied from the round's begin to now.
                self.observed.push(Observation {
                    pages,
                    over: now.saturating_sub(since).max(encoded.saturating_sub(since)),
                });
                self.decide(round, pages, since, now)
            }
            (State::Draining { round, since, .. }, Event::Closed { round: closed, .. })
                if closed >= round =>
            {
                self.state = State::Deciding {
                    round,
                    since,
                    encoded: now,
                };
                vec![Effect::Collect { last: false }]
            }
            (
                State::Sending { .. }
                | State::Deciding { .. }
                | State::Draining { .. }
                | State::Waiting { .. },
                Event::Devices(outlook),
            ) if self.devices.is_some() => {
                let ready = outlook.unacked.is_empty();
                self.devices = Some(outlook);
                if ready {
                    self.look_again(now)
                } else {
                    Vec::new()
                }
            }
            // Old news: the guest is on its way already.
            (_, Event::Devices(_)) if self.devices.is_some() => Vec::new(),
            (State::Pausing { round }, Event::AcksMissing) if self.devices.is_some() => {
                self.paused_at = None;
                let live = Round::new(round.value().saturating_sub(1));
                self.wait_for_devices(live, now, now)
            }
            (State::Pausing { round }, Event::Paused) if self.devices.is_some() => {
                self.state = State::Quiescing { round };
                vec![Effect::Quiesce]
            }
            (State::Quiescing { round }, Event::DevicesQuiesced) => {
                self.state = State::Stopping { round };
                vec![Effect::StopDevices]
            }
            (State::Stopping { .. } | State::Collecting { .. }, Event::DevicesSaved)
                if !self.devices_saved =>
            {
                self.devices_saved = true;
                Vec::new()
            }
            (State::Pausing { round }, Event::Paused)
            | (State::Stopping { round }, Event::DevicesStopped) => {
                self.state = State::Collecting { round };
                vec![Effect::Collect { last: true }]
            }
            (State::Collecting { round }, Event::Collected { .. }) => {
                self.state = State::Last(Last {
                    round,
                    encoded: false,
                    saved: false,
                    collected: false,
                    missing: 0,
                    items_lost: None,
                    final_sent: false,
                    closed: false,
                    digest: None,
                });
                vec![
                    Effect::AnnounceSwitchover { round },
                    self.open_round(round, true),
                    Effect::Save,
                ]
            }
            (State::Last(last), event) => self.handle_last(last, event, now),
            (State::Committed { .. }, Event::Running) => {
                self.state = State::Over;
                vec![Effect::Finish(Outcome::Migrated)]
            }
            // Old news: rounds close and pages come back while the next round is long under way.
            (
                State::Sending { .. }
                | State::Deciding { .. }
                | State::Draining { .. }
                | State::Waiting { .. }
                | State::Pausing { .. }
                | State::Quiescing { .. }
                | State::Stopping { .. }
                | State::Collecting { .. },
                Event::Closed { .. } | Event::LaneLost { .. },
            )
            | (
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

    fn fail(&mut self, error: Error) -> Vec<Effect> {
        let committed = self.is_committed();
        let paused = matches!(
            self.state,
            State::Pausing { .. }
                | State::Quiescing { .. }
                | State::Stopping { .. }
                | State::Collecting { .. }
                | State::Last(_)
        );
        self.state = State::Over;
        if committed {
            return vec![Effect::Finish(Outcome::Unknown(error))];
        }
        let reclaim = Effect::Reclaim {
            paused,
            proof: Reclaimed(()),
        };
        // An ABORT is not answered (SPEC: ABORT-2).
        let abort = (!matches!(error.fault(), Fault::PeerAborted { .. })).then(|| Effect::Abort {
            reason: error.reason(),
            phase: error.phase(),
            channel: error.channel(),
            text: error.fault().to_string(),
        });
        let outcome = match error.fault() {
            Fault::Cancelled => Outcome::Cancelled(error),
            Fault::GuestGone => Outcome::Gone(error),
            _ => Outcome::Failed(error),
        };
        // The guest first: telling the peer may take as long as a dead link takes.
        let mut effects = vec![reclaim];
        effects.extend(abort);
        effects.push(Effect::Finish(outcome));
        effects
    }
}

#[cfg(test)]
mod tests;
