//! The control plane at the destination, as a machine without I/O: events and the time in, effects out.
//!
//! ```text
//!  Setup ──tables, machine, lanes──► Rounds(k) ──every living lane at the fence──► Rounds(k+1)
//!                                       │ fence of a round with the guest paused
//!                                       ▼
//!                                    Fenced(k) ──FINAL(k), digests equal──► Loading ──► Prepared ──COMMIT──► Owning ──► Over
//!                                       └── SWITCHOVER(k+1): pages are missing, the gate opens once more
//! ```
//! The rules it keeps: the gate to a round opens only when every living lane stands at the fence (SPEC: ROUND-3); only a
//! [`Ready`] leads to PREPARED; only COMMIT on top of it gives [`Ownership`] (SPEC: COMMIT-1). In every state before, the
//! guest can't run here. Which event is legal in which state is the one table in [`Session::handle`].

mod resume;

pub use resume::DAMAGES_MAX;

use std::time::Duration;

use multifd_wire::frame::OutcomeState;
use multifd_wire::{ChannelRef, DeviceId, Digest, LaneId, Misbehaved, Phase, Reason, Round};

use crate::destination::config::Config;
use crate::destination::error::{Error, Fault};

/// A device of whose stream items are missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incomplete {
    /// Its number.
    pub device: DeviceId,
    /// Its name.
    pub name: String,
    /// The lowest index that is missing.
    pub index: u64,
}

impl From<Incomplete> for Fault {
    fn from(incomplete: Incomplete) -> Self {
        Self::DeviceMisbehaved {
            device: incomplete.name,
            source: Misbehaved::DeviceStream {
                device: incomplete.device.value(),
                index: incomplete.index,
                rule: "DEVSTREAM-7, it did not come before the end of the last round",
            },
        }
    }
}

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// All tables are here and the VMM is to build this machine; the source will open this many lanes.
    SetupEnd {
        /// Data channels.
        lanes: u32,
    },
    /// The VMM built the machine.
    MachineReady,
    /// A lane said hello and was let in.
    LaneJoined {
        /// Which.
        lane: LaneId,
    },
    /// A lane stands at the fence of a round.
    LaneArrived {
        /// Which.
        lane: LaneId,
        /// Of which round.
        round: Round,
        /// The mark said that the guest is paused in this round.
        last: bool,
    },
    /// A lane's thread has ended; nothing of it will land any more.
    LaneEnded {
        /// Which.
        lane: LaneId,
    },
    /// Answer to [`Effect::CloseRound`]: what is in memory at the fence.
    Closed {
        /// The digest over all pages as landed.
        digest: Digest,
        /// Pages that are damaged.
        damaged: u64,
        /// A device of whose stream items are missing.
        incomplete: Option<Incomplete>,
    },
    /// SWITCHOVER: the guest is paused and this round is begun.
    Switchover {
        /// The round.
        round: Round,
    },
    /// FINAL.
    Final {
        /// The last round.
        round: Round,
        /// Blobs of VM state that belong to it.
        states: u32,
        /// The digest over all pages as last sent.
        digest: Digest,
    },
    /// The VMM loaded the VM state.
    Loaded,
    /// Every device has loaded everything and stands still.
    DevicesLoaded,
    /// A device's stream begins anew: what it had loaded is void.
    DeviceRestarted,
    /// COMMIT.
    Commit {
        /// The digest that the source commits to.
        digest: Digest,
    },
    /// The VMM runs the guest.
    Resumed,
    /// The channels are lost: the link failed, or nothing was heard for too long. What was said on them is worth nothing now.
    Lost(Error),
    /// The source opened a new control channel for this session, and showed its secret.
    Resuming,
    /// The source asks how the session ended, and showed its secret.
    Asked,
    /// Something failed: a channel, the VMM, the source said no.
    Failed(Error),
    /// Only the time has gone on.
    Tick,
}

/// What the driver must do.
#[derive(Debug)]
pub enum Effect {
    /// Let the VMM build the machine.
    Prepare,
    /// Close every channel; memory and what is known of it stay.
    Suspend,
    /// Send LANDED, and give back every page that is damaged.
    SendLanded,
    /// Answer the question.
    Answer(OutcomeState),
    /// Send READY.
    SendReady,
    /// Every living lane stands at the fence: acknowledge all, send ROUND_CLOSED, answer with [`Event::Closed`].
    CloseRound {
        /// The round.
        round: Round,
    },
    /// Let the lanes go on into this round.
    OpenGate {
        /// The round.
        round: Round,
    },
    /// Let the VMM load this many blobs of VM state.
    Load {
        /// How many.
        states: u32,
    },
    /// Send PREPARED.
    SendPrepared {
        /// The digest that both sides have.
        digest: Digest,
    },
    /// Let the VMM run the guest.
    Resume(Ownership),
    /// Send RUNNING.
    SendRunning,
    /// Tell the source why it ends.
    Abort {
        /// The code.
        reason: Reason,
        /// The phase in which it ended.
        phase: Phase,
        /// The channel that it is about.
        channel: ChannelRef,
        /// The text.
        text: String,
    },
    /// Take the machine down: the guest is the source's.
    Discard,
    /// It is over.
    Finish(Outcome),
}

/// How it ended.
#[derive(Debug)]
pub enum Outcome {
    /// The guest runs here.
    Running,
    /// The guest is the source's.
    Failed(Error),
    /// The source gave the guest away, and it could not be run here: it is loaded and paused.
    Stranded(Error),
}

/// Proof that this side has everything: the last round closed, nothing damaged, digests equal, the state and every device
/// loaded.
#[derive(Debug)]
#[must_use = "without it the guest can't be taken over"]
pub struct Ready {
    digest: Digest,
}

/// Proof that the guest belongs to this side: everything is here, verified and loaded, and the source has committed.
///
/// Only the session can make it, from a [`Ready`], on COMMIT: its field is private to this module.
#[derive(Debug)]
#[must_use = "the guest runs nowhere until the VMM is shown this"]
pub struct Ownership {
    _ready: Ready,
}

#[derive(Debug)]
enum State {
    Setup(Setup),
    Rounds,
    /// At the fence of a round with the guest paused, the gate closed.
    Fenced {
        round: Round,
        digest: Digest,
        damaged: u64,
        incomplete: Option<Incomplete>,
        /// Since when FINAL is here and pages are missing: the source has to begin a further round.
        short_since: Option<Duration>,
    },
    Loading {
        digest: Digest,
        /// The VM state is loaded.
        loaded: bool,
    },
    Prepared(Ready),
    /// Without channels, until this time.
    Suspended {
        until: Duration,
    },
    Owning,
    Over,
}

#[derive(Debug, Default)]
struct Setup {
    lanes: Option<u32>,
    machine: bool,
    /// It is made again, over new channels.
    resumed: bool,
}

#[derive(Debug, Clone, Copy)]
struct Final {
    round: Round,
    states: u32,
    digest: Digest,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Expected,
    InRound,
    AtFence { last: bool },
    Ended,
}

/// The machine of one migration at the destination.
#[derive(Debug)]
pub struct Session {
    config: Config,
    state: State,
    round: Round,
    lanes: Vec<Fate>,
    /// The first and the newest SWITCHOVER, and FINAL; they may come before the lanes reach the fence.
    paused_from: Option<Round>,
    switchover: Option<Round>,
    verdict: Option<Final>,
    closing: bool,
    /// A lane died: what it lost may be missing when FINAL comes, without anybody's fault.
    lane_lost: bool,
    /// Since when no lane lives although one is needed: the source is dialling (SPEC: LANE-6).
    alone_since: Option<Duration>,
    /// Whether it outlives its channels.
    kept: bool,
    /// How often the control channel was lost by wrong checksums.
    damages: u32,
    /// The VMM has built the machine.
    machine: bool,
    /// READY was sent once: on the way back one lane is enough (SPEC: RESUME-14).
    begun: bool,
    /// There are devices.
    devices: bool,
    /// Every device has everything; also true when there are none.
    devices_loaded: bool,
    began: Duration,
    heard: Duration,
    /// When something last went on: pages landed, a decision came. Signs of life are none.
    progress: Duration,
}

/// Where a lane that joins now has to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// It waits for READY, like all lanes.
    Setup,
    /// In the round that is open (SPEC: ROUND-6).
    Round(Round),
    /// Behind the fence that is shut: in this round, once the gate opens.
    BehindFence(Round),
    /// Nowhere: no lane is needed any more, or this one still lives or never was.
    Refused,
}

impl Session {
    /// A session whose hello was accepted at `now`.
    #[must_use]
    pub fn new(config: Config, now: Duration) -> Self {
        Self {
            config,
            state: State::Setup(Setup::default()),
            round: Round::new(0),
            lanes: Vec::new(),
            paused_from: None,
            switchover: None,
            verdict: None,
            closing: false,
            lane_lost: false,
            alone_since: None,
            kept: false,
            damages: 0,
            machine: false,
            begun: false,
            devices: false,
            devices_loaded: true,
            began: now,
            heard: now,
            progress: now,
        }
    }

    /// Where in its life, in the words of SPEC.
    #[must_use]
    pub fn phase(&self) -> Phase {
        match self.state {
            State::Setup(_) => Phase::Setup,
            State::Rounds if self.switchover.is_none() => Phase::Rounds,
            State::Rounds | State::Fenced { .. } | State::Loading { .. } => Phase::Switchover,
            State::Prepared(_) | State::Owning => Phase::Commit,
            State::Suspended { .. } => Phase::Suspended,
            State::Over => Phase::Done,
        }
    }

    /// The round that is open.
    #[must_use]
    pub fn round(&self) -> Round {
        self.round
    }

    /// Whether the source has given the guest to this side.
    #[must_use]
    pub fn is_owner(&self) -> bool {
        matches!(self.state, State::Owning)
    }

    /// There are devices: without [`Event::DevicesLoaded`] there is no [`Ready`].
    pub fn expect_devices(&mut self) {
        (self.devices, self.devices_loaded) = (true, false);
    }

    /// The source was heard on the control channel.
    pub fn heard(&mut self, now: Duration) {
        self.heard = now;
    }

    /// Pages landed, or a decision of the source came.
    pub fn progressed(&mut self, now: Duration) {
        self.progress = now;
    }

    /// Whether this lane was lost, or has not come back after a resume.
    #[must_use]
    pub fn is_lost(&self, lane: LaneId) -> bool {
        self.lanes.get(lane.value() as usize) == Some(&Fate::Ended)
    }

    /// Where a lane that was lost has to begin if it joins again now.
    #[must_use]
    pub fn entry(&self, lane: LaneId) -> Entry {
        let lost = self.is_lost(lane);
        match &self.state {
            State::Setup(_) => Entry::Setup,
            State::Rounds if lost && !self.closing => Entry::Round(self.round),
            State::Fenced { round, .. } if lost => {
                round.next().map_or(Entry::Refused, Entry::BehindFence)
            }
            _ => Entry::Refused,
        }
    }

    /// When [`Event::Tick`] is due at the latest.
    #[must_use]
    pub fn next_deadline(&self) -> Duration {
        self.deadline().0
    }

    /// The one table: what each event means in each state.
    #[must_use]
    pub fn handle(&mut self, event: Event, now: Duration) -> Vec<Effect> {
        let follows = matches!(&event, Event::Switchover { round } if self.may_follow(*round));
        let may_be_resumed = self.may_be_resumed();
        let admits =
            matches!(&event, Event::LaneJoined { lane } if self.entry(*lane) != Entry::Refused);
        match (&mut self.state, event) {
            (State::Over, _) => Vec::new(),
            // The guest is ours: no loss changes that any more.
            (State::Owning, Event::Lost(_)) => Vec::new(),
            (_, Event::Lost(error)) => self.lost(error, now),
            (_, Event::Resuming) if may_be_resumed => self.resuming(now),
            (_, Event::Asked) => self.asked(),
            (_, Event::Failed(error)) => self.fail(error),
            (_, Event::Tick) => self.tick(now),
            (State::Setup(setup), Event::SetupEnd { lanes }) if setup.lanes.is_none() => {
                setup.lanes = Some(lanes);
                // SPEC: RESUME-14
                let fate = if self.begun {
                    Fate::Ended
                } else {
                    Fate::Expected
                };
                self.lanes = vec![fate; lanes as usize];
                vec![Effect::Prepare]
            }
            (State::Setup(setup), Event::MachineReady) => {
                setup.machine = true;
                self.machine = true;
                self.begin()
            }
            // The VMM was at it when the channels were lost (SPEC: RESUME-13).
            (State::Suspended { .. }, Event::MachineReady) if !self.machine => {
                self.machine = true;
                Vec::new()
            }
            (State::Setup(_), Event::LaneJoined { lane }) => self.joined(lane),
            // SPEC: LANE-5
            (State::Rounds | State::Fenced { .. }, Event::LaneJoined { lane }) if admits => {
                self.rejoined(lane);
                Vec::new()
            }
            (State::Rounds, Event::LaneArrived { lane, round, last }) => {
                self.arrived(lane, round, last)
            }
            // Loaders go on with what they have while the channels are lost; what is void then begins anew before the next fence.
            (
                State::Suspended { .. } | State::Setup(Setup { resumed: true, .. }),
                Event::DevicesLoaded | Event::DeviceRestarted,
            ) => Vec::new(),
            // It had read its mark whole when the channels were lost; the round is opened again (SPEC: RESUME-2, RESUME-7).
            (State::Suspended { .. }, Event::LaneArrived { .. }) => Vec::new(),
            (_, Event::LaneEnded { lane }) => self.ended(lane, now),
            (
                State::Rounds,
                Event::Closed {
                    digest,
                    damaged,
                    incomplete,
                },
            ) if self.closing => self.closed(digest, damaged, incomplete, now),
            (State::Rounds | State::Fenced { .. }, Event::Switchover { round }) if follows => {
                self.paused_from.get_or_insert(round);
                self.switchover = Some(round);
                self.verdict = None;
                self.conclude(now)
            }
            // SPEC: FINAL-1
            (
                State::Rounds | State::Fenced { .. },
                Event::Final {
                    round,
                    states,
                    digest,
                },
            ) if self.switchover == Some(round) => {
                self.verdict = Some(Final {
                    round,
                    states,
                    digest,
                });
                self.conclude(now)
            }
            // A lane of the source died after everything had landed here; both sides agree on the content already.
            (
                State::Loading { .. } | State::Prepared(_),
                Event::Switchover { .. } | Event::Final { .. },
            ) => Vec::new(),
            (State::Loading { loaded, .. }, Event::Loaded) if !*loaded => {
                *loaded = true;
                self.prepared()
            }
            (
                State::Rounds | State::Fenced { .. } | State::Loading { .. },
                Event::DevicesLoaded,
            ) if !self.devices_loaded => {
                self.devices_loaded = true;
                self.prepared()
            }
            (
                State::Rounds | State::Fenced { .. } | State::Loading { .. },
                Event::DeviceRestarted,
            ) => {
                self.devices_loaded = false;
                Vec::new()
            }
            (State::Prepared(ready), Event::Commit { digest }) => {
                let ours = ready.digest;
                if digest != ours {
                    return self.fail(Error::new(
                        Phase::Commit,
                        Fault::DigestMismatch {
                            ours: ours.value(),
                            theirs: digest.value(),
                        },
                    ));
                }
                match std::mem::replace(&mut self.state, State::Owning) {
                    State::Prepared(ready) => vec![Effect::Resume(Ownership { _ready: ready })],
                    _ => unreachable!("matched above"),
                }
            }
            (State::Owning, Event::Resumed) => {
                self.state = State::Over;
                vec![Effect::SendRunning, Effect::Finish(Outcome::Running)]
            }
            (_, event) => {
                let what = format!("{event:?}");
                self.fail(Error::new(self.phase(), Fault::OutOfTurn { what }))
            }
        }
    }

    /// Ready, once state and devices are loaded over memory that is verified (SPEC: PREP-1).
    fn prepared(&mut self) -> Vec<Effect> {
        let State::Loading {
            digest,
            loaded: true,
        } = self.state
        else {
            return Vec::new();
        };
        if !self.devices_loaded {
            return Vec::new();
        }
        self.state = State::Prepared(Ready { digest });
        vec![Effect::SendPrepared { digest }]
    }

    fn begin(&mut self) -> Vec<Effect> {
        let State::Setup(Setup {
            lanes: Some(_),
            machine: true,
            resumed,
        }) = self.state
        else {
            return Vec::new();
        };
        if self.lanes.contains(&Fate::Expected) || !self.lanes.contains(&Fate::InRound) {
            return Vec::new();
        }
        self.state = State::Rounds;
        self.begun = true;
        if resumed {
            // SPEC: RESUME-6
            vec![Effect::SendReady, Effect::SendLanded]
        } else {
            vec![Effect::SendReady]
        }
    }

    fn joined(&mut self, lane: LaneId) -> Vec<Effect> {
        match self.lanes.get_mut(lane.value() as usize) {
            // In a first set-up no lane has ended: that would have been its end.
            Some(fate @ (Fate::Expected | Fate::Ended)) => {
                *fate = Fate::InRound;
                self.begin()
            }
            _ => self.fail(Error::new(
                Phase::Setup,
                Fault::OutOfTurn {
                    what: format!("lane {lane}"),
                },
            )),
        }
    }

    /// A lane that was lost is back: the fence waits for it again, as it does for every living lane.
    fn rejoined(&mut self, lane: LaneId) {
        let fate = match self.state {
            State::Fenced { .. } => Fate::AtFence { last: true },
            _ => Fate::InRound,
        };
        if let Some(slot) = self.lanes.get_mut(lane.value() as usize) {
            *slot = fate;
        }
        self.alone_since = None;
    }

    fn arrived(&mut self, lane: LaneId, round: Round, last: bool) -> Vec<Effect> {
        match self.lanes.get_mut(lane.value() as usize) {
            Some(fate @ Fate::InRound) if round == self.round => {
                *fate = Fate::AtFence { last };
                self.check_fence()
            }
            _ => self.fail(Error::new(
                self.phase(),
                Fault::OutOfTurn {
                    what: format!("lane {lane} at the fence of round {round}"),
                },
            )),
        }
    }

    fn ended(&mut self, lane: LaneId, now: Duration) -> Vec<Effect> {
        let Some(fate) = self.lanes.get_mut(lane.value() as usize) else {
            return Vec::new();
        };
        if *fate == Fate::Ended {
            return Vec::new();
        }
        *fate = Fate::Ended;
        self.lane_lost = true;
        let nobody = self.lanes.iter().all(|fate| *fate == Fate::Ended);
        match self.state {
            // The first set-up is made with all lanes, or again from the start.
            State::Setup(Setup { resumed: true, .. }) => {
                let last = format!("lane {lane} closed");
                self.lost(Error::new(Phase::Setup, Fault::AllLanesLost { last }), now)
            }
            // Without channels there are no lanes.
            State::Suspended { .. } => Vec::new(),
            // Once the memory is verified no lane is needed any more.
            State::Loading { .. } | State::Prepared(_) | State::Owning | State::Over => Vec::new(),
            State::Rounds | State::Fenced { .. } if nobody && !self.config.suspend.is_zero() => {
                // SPEC: LANE-6
                self.alone_since = Some(now);
                Vec::new()
            }
            _ if nobody => self.fail(Error::new(
                self.phase(),
                Fault::AllLanesLost {
                    last: format!("lane {lane} closed"),
                },
            )),
            State::Setup(_) => self.fail(Error::new(
                Phase::Setup,
                Fault::AllLanesLost {
                    last: format!("lane {lane} closed during set-up"),
                },
            )),
            State::Rounds => self.check_fence(),
            State::Fenced { .. } => Vec::new(),
        }
    }

    /// SPEC: ROUND-3
    fn check_fence(&mut self) -> Vec<Effect> {
        let waiting = self
            .lanes
            .iter()
            .any(|fate| matches!(fate, Fate::Expected | Fate::InRound));
        // A round that no living lane has ended is not over: the source will dial one, and end the round on it.
        let nobody = self.lanes.iter().all(|fate| *fate == Fate::Ended);
        if waiting || nobody || self.closing {
            return Vec::new();
        }
        self.closing = true;
        vec![Effect::CloseRound { round: self.round }]
    }

    fn closed(
        &mut self,
        digest: Digest,
        damaged: u64,
        incomplete: Option<Incomplete>,
        now: Duration,
    ) -> Vec<Effect> {
        self.closing = false;
        let marks: Vec<bool> = self
            .lanes
            .iter()
            .filter_map(|fate| {
                if let Fate::AtFence { last } = fate {
                    Some(*last)
                } else {
                    None
                }
            })
            .collect();
        if marks.windows(2).any(|pair| pair[0] != pair[1]) {
            return self.fail(Error::new(
                self.phase(),
                Fault::OutOfTurn {
                    what: "lanes that disagree whether the round is the last".into(),
                },
            ));
        }
        let paused = marks.first() == Some(&true);
        // The guest is paused in every round from the first SWITCHOVER's on, and in none before (SPEC: SWITCH-1, SWITCH-2).
        if self
            .paused_from
            .is_some_and(|from| paused != (self.round >= from))
        {
            return self.fail(Error::new(
                self.phase(),
                Fault::OutOfTurn {
                    what: format!(
                        "an end mark of round {} that contradicts SWITCHOVER",
                        self.round
                    ),
                },
            ));
        }
        if !paused {
            return self.open_gate();
        }
        self.state = State::Fenced {
            round: self.round,
            digest,
            damaged,
            incomplete,
            short_since: None,
        };
        self.conclude(now)
    }

    /// Whether a SWITCHOVER may name this round now: the first names the round that is open or a later one, each further one
    /// the next (SPEC: SWITCH-1, SWITCH-2).
    fn may_follow(&self, round: Round) -> bool {
        match (self.switchover, &self.state) {
            (Some(newest), _) => newest.next() == Some(round),
            (None, State::Fenced { round: fenced, .. }) => *fenced == round,
            (None, _) => round >= self.round,
        }
    }

    /// With the guest paused the gate stays closed until the source says which it is: FINAL of this round, or a further one.
    fn conclude(&mut self, now: Duration) -> Vec<Effect> {
        let State::Fenced {
            round,
            digest,
            damaged,
            ref incomplete,
            ref mut short_since,
        } = self.state
        else {
            return Vec::new();
        };
        // Several rounds may have been announced while this one was still being read.
        if self.switchover > Some(round) {
            self.state = State::Rounds;
            return self.open_gate();
        }
        let Some(verdict) = self.verdict.filter(|verdict| verdict.round == round) else {
            return Vec::new();
        };
        let whole = verdict.digest == digest && damaged == 0;
        if whole && incomplete.is_none() {
            self.state = State::Loading {
                digest,
                loaded: false,
            };
            return vec![Effect::Load {
                states: verdict.states,
            }];
        }
        if damaged > 0 || self.lane_lost {
            // The source knows from ROUND_CLOSED, or from our LANE_DOWN, and begins a further round (SPEC: FINAL-4).
            short_since.get_or_insert(now);
            return Vec::new();
        }
        if let Some(incomplete) = incomplete.clone().filter(|_| whole) {
            return self.fail(Error::new(Phase::Switchover, Fault::from(incomplete)));
        }
        let fault = Fault::DigestMismatch {
            ours: digest.value(),
            theirs: verdict.digest.value(),
        };
        self.fail(Error::new(Phase::Switchover, fault))
    }

    fn open_gate(&mut self) -> Vec<Effect> {
        let Some(next) = self.round.next() else {
            return self.fail(Error::new(
                self.phase(),
                Fault::OutOfTurn {
                    what: "a round after the last round number".into(),
                },
            ));
        };
        self.round = next;
        for fate in &mut self.lanes {
            if matches!(fate, Fate::AtFence { .. }) {
                *fate = Fate::InRound;
            }
        }
        vec![Effect::OpenGate { round: next }]
    }

    fn deadline(&self) -> (Duration, &'static str) {
        let silence = (
            self.heard + self.config.stall,
            "a sign of life from the source",
        );
        let setup = (
            self.began + self.config.setup_deadline,
            "the source to finish set-up",
        );
        let idle = (
            self.progress + self.config.progress_deadline,
            "the source to go on; it only says that it lives",
        );
        if let Some(since) = self.alone_since
            && matches!(self.state, State::Rounds | State::Fenced { .. })
        {
            let alone = (
                since + self.config.suspend,
                "the source to open a data channel again",
            );
            return if alone.0 < silence.0 { alone } else { silence };
        }
        match self.state {
            State::Setup(_) if setup.0 < silence.0 => setup,
            State::Fenced {
                short_since: Some(since),
                ..
            } if since + self.config.stall < silence.0 => (
                since + self.config.stall,
                "the source to send what is missing",
            ),
            // The guest is ours: no silence of the source changes that any more.
            State::Owning => (Duration::MAX, ""),
            State::Suspended { until } => (until, "the source to come back"),
            State::Rounds | State::Fenced { .. } | State::Prepared(_) if idle.0 < silence.0 => idle,
            _ => silence,
        }
    }

    fn tick(&mut self, now: Duration) -> Vec<Effect> {
        let (deadline, what) = self.deadline();
        if now < deadline {
            return Vec::new();
        }
        if let Some(since) = self.alone_since
            && now >= since + self.config.suspend
            && now < self.heard + self.config.stall
        {
            let last = format!("none was opened again within {:?}", self.config.suspend);
            return self.fail(Error::new(self.phase(), Fault::AllLanesLost { last }));
        }
        if let (
            State::Fenced {
                digest,
                damaged: 0,
                incomplete,
                short_since: Some(_),
                ..
            },
            Some(verdict),
        ) = (&self.state, self.verdict)
            && now < self.heard + self.config.stall
        {
            let device = incomplete.clone().filter(|_| verdict.digest == *digest);
            let fault = device.map_or_else(
                || Fault::DigestMismatch {
                    ours: digest.value(),
                    theirs: verdict.digest.value(),
                },
                Fault::from,
            );
            return self.fail(Error::new(Phase::Switchover, fault));
        }
        let error = Error::new(self.phase(), Fault::Timeout { what });
        let silent = now >= self.heard + self.config.stall;
        let in_resume = matches!(self.state, State::Setup(Setup { resumed: true, .. }));
        if (silent || in_resume) && !matches!(self.state, State::Suspended { .. }) {
            return self.lost(error, now);
        }
        self.fail(error)
    }

    fn fail(&mut self, error: Error) -> Vec<Effect> {
        let mut effects = Vec::new();
        // An ABORT is not answered (SPEC: ABORT-2).
        if !matches!(error.fault(), Fault::PeerAborted { .. }) {
            effects.push(Effect::Abort {
                reason: error.reason(),
                phase: error.phase(),
                channel: error.channel(),
                text: error.fault().to_string(),
            });
        }
        match std::mem::replace(&mut self.state, State::Over) {
            State::Owning
                if matches!(
                    error.fault(),
                    Fault::Vmm { .. } | Fault::Device { .. } | Fault::DeviceStuck { .. }
                ) =>
            {
                effects.push(Effect::Finish(Outcome::Stranded(error)));
            }
            // The source can vanish now: the guest is ours and starts all the same.
            State::Owning => {
                self.state = State::Owning;
                effects.clear();
            }
            _ => {
                effects.push(Effect::Discard);
                effects.push(Effect::Finish(Outcome::Failed(error)));
            }
        }
        effects
    }
}

#[cfg(test)]
mod tests;
