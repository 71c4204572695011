//! The control thread of the destination: feeds events to the session machine and carries out its effects.

mod rejoin;
mod resume;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use multifd_session::destination::blobs::Assembler;
use multifd_transport::{Closer, GuestMemory, SendHalf};
use multifd_wire::frame::{
    Abort, Acks, Credit, Credits, Device, DeviceLoaded, GiveBack, GiveBackReason, KeepAlive,
    LaneDown, LaneMark, OutcomeState, Prepared, Progress, RawCredit, RawLaneMark, RawRun, Ready,
    RoundClosed, Running, SwitchoverAck,
};
use multifd_wire::limits::TEXT_BYTES_MAX;
use multifd_wire::{
    ChannelRef, DeviceId, Features, Frame, Incarnation, Kind, LaneId, Layout, Misbehaved,
    PAGE_BYTES_U64, PageRun, Phase, Reason, Round, Sequence, Text, Token,
};

use super::accept::Acceptor;
use super::device::{DeviceNote, Inventory, LoaderThread, check_table, open, start, with_all};
use super::gate::Gate;
use super::greet::{Joined, Opened};
use super::lane::{Begins, LaneThread};
use super::link::{ControlSender, Inbound};
use super::{Finished, Note, Shared, thread_cpu};
use crate::device::DeviceSink;
use crate::error::{Error, Fault};
use crate::landing::{Landing, LandingError};
use crate::report::{Report, Timeline};
use crate::session::{Effect, Event, Outcome, Session};
use crate::vmm::{Blob, Ownership, Vmm, VmmError};

/// How long the end of a migration waits for the source to close the control channel, so that a farewell is read.
const FAREWELL: Duration = Duration::from_secs(1);

/// What the VMM thread is asked for.
enum VmmTask {
    Prepare(Vec<Blob>, Layout, Vec<Device>),
    Load(Vec<Blob>),
    Resume(Ownership, Sinks),
    Discard,
}

/// What the VMM thread answers, with how long it took.
pub(super) enum VmmDone {
    Prepared(Result<(GuestMemory, Sinks), Fault>, Duration),
    Loaded(Result<(), VmmError>, Duration),
    Resumed(Result<(), Fault>, Duration, Sinks),
}

type Sinks = Vec<Box<dyn DeviceSink>>;

/// One lane, as the control thread sees it.
struct Slot {
    id: LaneId,
    incarnation: Incarnation,
    closer: Closer,
    /// Kept so that the connection is not half closed under the source.
    _tx: Box<dyn SendHalf>,
    /// Until the lane's thread takes it, when the machine is ready.
    rx: Option<Box<dyn multifd_transport::ReceiveHalf>>,
    handled: Arc<AtomicU64>,
    given_up: Arc<AtomicBool>,
    acked: u64,
    ended: bool,
    thread: Option<JoinHandle<()>>,
}

impl Slot {
    fn new(joined: Joined) -> Self {
        Self {
            id: joined.lane,
            incarnation: joined.incarnation,
            closer: joined.closer,
            _tx: joined.tx,
            rx: Some(joined.rx),
            handled: Arc::new(AtomicU64::new(0)),
            given_up: Arc::new(AtomicBool::new(false)),
            acked: 0,
            ended: false,
            thread: None,
        }
    }

    /// Starts the lane's thread, unless it has one.
    fn start(
        &mut self,
        shared: &Arc<Shared>,
        landing: &Arc<Landing>,
        gate: &Arc<Gate>,
        inventory: Option<&Arc<Inventory>>,
        begins: Begins,
    ) -> Result<(), Error> {
        let Some(rx) = self.rx.take() else {
            return Ok(());
        };
        let (id, incarnation, notes) = (self.id, self.incarnation, shared.notes.clone());
        let thread = LaneThread {
            id,
            incarnation,
            begins,
            shared: Arc::clone(shared),
            landing: Arc::clone(landing),
            gate: Arc::clone(gate),
            inventory: inventory.cloned(),
            handled: Arc::clone(&self.handled),
            given_up: Arc::clone(&self.given_up),
            notes: notes.clone(),
        };
        let inventory = inventory.cloned();
        let body = Box::new(move || {
            let fault = thread.run(rx);
            if let Some(inventory) = inventory {
                inventory.lane_lost();
            }
            let _ = notes.send(Note::LaneEnded {
                lane: id,
                incarnation,
                fault,
            });
        });
        let started = shared.spawner.spawn(&format!("mfd-lane{id}"), body);
        self.thread = Some(started.map_err(|source| {
            Error::new(
                Phase::Setup,
                Fault::System {
                    step: "start a thread",
                    source,
                },
            )
        })?);
        Ok(())
    }

    /// How far its frames were handled.
    fn mark(&self) -> LaneMark {
        LaneMark {
            lane: self.id,
            incarnation: self.incarnation,
            frames: self.handled.load(Ordering::Acquire),
        }
    }

    /// Ends the channel; its thread ends with what it has read whole, also if it waits at the gate.
    fn give_up(&self, gate: &Gate) {
        self.given_up.store(true, Ordering::Relaxed);
        self.closer.shutdown();
        gate.nudge();
    }
}

pub(super) struct Control {
    shared: Arc<Shared>,
    inbox: Receiver<Note>,
    acceptor: Option<Acceptor>,
    vmm: Option<(Sender<VmmTask>, JoinHandle<()>)>,
    vmm_back: Receiver<Box<dyn Vmm>>,
    session: Option<Session>,
    began: Instant,
    control: Option<ControlSender>,
    closer: Option<Closer>,
    control_lost: bool,
    reader: Option<JoinHandle<()>>,
    layout: Option<Layout>,
    /// What of the set-up came on this control channel.
    seen: Seen,
    /// The VMM was asked to build the machine.
    preparing: bool,
    /// The configuration as it came first: a source that comes back has to have the same.
    first_configs: Vec<Blob>,
    /// The table of DEVICES, once it was read.
    devices: Option<Vec<Device>>,
    features: Features,
    sinks: Sinks,
    inventory: Option<Arc<Inventory>>,
    loaders: Vec<LoaderThread>,
    /// Devices that were loaded, and how often each had begun anew before.
    devices_loaded: BTreeMap<DeviceId, u32>,
    /// The newest acknowledgement of each device.
    device_acks: BTreeMap<DeviceId, SwitchoverAck>,
    configs: Assembler,
    states: Assembler,
    early: Vec<Joined>,
    lanes: Vec<Slot>,
    /// Incarnations that the source gave up before they joined: their hello may still come.
    given_up: BTreeMap<LaneId, Incarnation>,
    landing: Option<Arc<Landing>>,
    gate: Arc<Gate>,
    round_began: Instant,
    closed_pages: (u64, u64),
    fenced_at: Option<Instant>,
    verify: Duration,
    timeline: Timeline,
    outcome: Option<Outcome>,
    keep_alive_due: Duration,
    ack_due: Duration,
    /// Frames that had come on data channels when it was last looked at.
    frames_seen: u64,
    /// Counts the control channels.
    epoch: u32,
    /// What lanes of the control channel that there is now have to show.
    ticket: Option<Token>,
    /// Threads of channels that were given up; they end by themselves.
    stragglers: Vec<JoinHandle<()>>,
    /// How far the frames of lanes before the last resume were handled.
    landed: BTreeMap<LaneId, LaneMark>,
    /// Notes that came while something else was waited for.
    later: VecDeque<Note>,
    /// Loads that the VMM has not finished, and how many of them are void.
    loads: u32,
    void_loads: u32,
    /// PREPARED was sent: from then on the source may have committed.
    prepared: bool,
    /// Who waits for an answer, and whether one got it.
    asking: Option<Sender<OutcomeState>>,
    answered: bool,
    said_goodbye: bool,
    /// The stamp that was sent behind RUNNING.
    goodbye_us: Option<u64>,
    cpu: Duration,
}

/// What of the set-up came on a control channel.
#[derive(Debug, Default)]
struct Seen {
    regions: bool,
    devices: bool,
    end: bool,
}

impl Control {
    pub(super) fn new(
        shared: Arc<Shared>,
        inbox: Receiver<Note>,
        vmm: Box<dyn Vmm>,
        acceptor: Acceptor,
    ) -> Result<Self, Error> {
        let (tasks, orders) = crossbeam_channel::bounded(2);
        let (back, vmm_back) = crossbeam_channel::bounded(1);
        let theirs = Arc::clone(&shared);
        let body = Box::new(move || {
            let vmm = vmm_life(vmm, &orders, &theirs);
            let _ = back.send(vmm);
        });
        let thread = shared.spawner.spawn("mfd-vmm", body).map_err(|source| {
            Error::new(
                Phase::Hello,
                Fault::System {
                    step: "start a thread",
                    source,
                },
            )
        })?;
        let blob_bytes_max = shared.config.blob_bytes_max();
        Ok(Self {
            shared,
            inbox,
            acceptor: Some(acceptor),
            vmm: Some((tasks, thread)),
            vmm_back,
            session: None,
            began: Instant::now(),
            control: None,
            closer: None,
            control_lost: false,
            reader: None,
            layout: None,
            seen: Seen::default(),
            preparing: false,
            first_configs: Vec::new(),
            devices: None,
            features: Features::NONE,
            sinks: Vec::new(),
            inventory: None,
            loaders: Vec::new(),
            devices_loaded: BTreeMap::new(),
            device_acks: BTreeMap::new(),
            configs: Assembler::new(Kind::Config, blob_bytes_max),
            states: Assembler::new(Kind::VmState, blob_bytes_max),
            early: Vec::new(),
            lanes: Vec::new(),
            given_up: BTreeMap::new(),
            landing: None,
            gate: Arc::new(Gate::new()),
            round_began: Instant::now(),
            closed_pages: (0, 0),
            fenced_at: None,
            verify: Duration::ZERO,
            timeline: Timeline::default(),
            outcome: None,
            keep_alive_due: Duration::ZERO,
            ack_due: Duration::ZERO,
            frames_seen: 0,
            epoch: 0,
            ticket: None,
            stragglers: Vec::new(),
            landed: BTreeMap::new(),
            later: VecDeque::new(),
            loads: 0,
            void_loads: 0,
            prepared: false,
            asking: None,
            answered: false,
            said_goodbye: false,
            goodbye_us: None,
            cpu: Duration::ZERO,
        })
    }

    /// From waiting for a source to the end.
    pub(super) fn run(mut self) -> Finished {
        while self.outcome.is_none() {
            if self.shared.cancelled.load(Ordering::Relaxed) {
                self.cancel();
            } else {
                self.step();
            }
        }
        self.wind_up()
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn phase(&self) -> Phase {
        self.session.as_ref().map_or(Phase::Hello, Session::phase)
    }

    fn cancel(&mut self) {
        match &self.session {
            None => {
                self.outcome = Some(Outcome::Failed(Error::new(Phase::Hello, Fault::Cancelled)))
            }
            // The guest is this side's: there is no way back, and the end is near.
            Some(session) if session.is_owner() => self.step(),
            Some(session) => {
                let error = Error::new(session.phase(), Fault::Cancelled);
                self.drive(Event::Failed(error));
            }
        }
    }

    /// Waits for the next note or timer, and handles it.
    fn step(&mut self) {
        if let Some(note) = self.later.pop_front() {
            return self.note(note);
        }
        let Some(session) = &self.session else {
            // Nobody has come yet: nothing is due.
            match self.inbox.recv_timeout(Duration::from_millis(200)) {
                Ok(note) => self.note(note),
                Err(_) => return,
            }
            return;
        };
        let until = session
            .next_deadline()
            .min(self.keep_alive_due)
            .min(self.ack_due);
        match self.inbox.recv_timeout(until.saturating_sub(self.now())) {
            Ok(note) => self.note(note),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                unreachable!("this thread's shared state holds a sender")
            }
        }
        if self.outcome.is_some() {
            return;
        }
        let now = self.now();
        self.note_progress(now);
        if now >= self.ack_due {
            self.ack_due = now + self.shared.config.ack_period();
            self.acknowledge();
        }
        if now >= self.keep_alive_due {
            self.keep_alive_due = now + self.shared.config.keep_alive();
            self.say_alive();
        }
        self.shared.counters.add_cpu(thread_cpu(&mut self.cpu));
        self.watch_devices();
        self.drive(Event::Tick);
    }

    fn send<'a>(&mut self, frame: impl Into<Frame<'a>>) {
        if let Err(error) = self.try_send(frame) {
            self.drive(failure(error));
        }
    }

    fn try_send<'a>(&mut self, frame: impl Into<Frame<'a>>) -> Result<(), Error> {
        let phase = self.phase();
        let Some(control) = &mut self.control else {
            return Ok(());
        };
        control
            .send(frame)
            .map_err(|fault| Error::new(phase, fault).at(ChannelRef::Control))
    }

    /// Passes an event to the machine and carries out what it wants, until it wants nothing more.
    fn drive(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let now = self.now();
            let Some(session) = &mut self.session else {
                return;
            };
            let effects = session.handle(event, now);
            self.shared.counters.set_phase(session.phase());
            self.shared
                .counters
                .round
                .store(session.round().value(), Ordering::Relaxed);
            for effect in effects {
                match self.apply(effect) {
                    Ok(next) => events.extend(next),
                    Err(error) => {
                        events.clear();
                        events.push_back(failure(error));
                        break;
                    }
                }
            }
        }
    }

    fn apply(&mut self, effect: Effect) -> Result<Option<Event>, Error> {
        match effect {
            Effect::Prepare => self.prepare().map(|()| None),
            Effect::SendReady => self.send_ready().map(|()| None),
            Effect::SendLanded => self.send_landed().map(|()| None),
            Effect::Suspend => {
                self.suspend();
                Ok(None)
            }
            Effect::Answer(state) => {
                if let Some(answer) = self.asking.take() {
                    self.answered =
                        answer.send(state).is_ok() && state != OutcomeState::CommittedNotRunning;
                }
                Ok(None)
            }
            Effect::CloseRound { round } => self.close_round(round).map(Some),
            Effect::OpenGate { round } => {
                self.gate.open(round);
                Ok(None)
            }
            Effect::Load { states } => self.load(states),
            Effect::SendPrepared { digest } => {
                self.prepared = true;
                self.timeline.digest = Some(digest.value());
                let wait_us = self.fenced_at.map_or(0, |at| micros(at.elapsed()));
                let load_us = (self.timeline.load_ms * 1e3) as u64;
                self.try_send(Prepared {
                    digest,
                    wait_us,
                    load_us,
                    verify_us: micros(self.verify),
                })
                .map(|()| None)
            }
            Effect::Resume(proof) => {
                let sinks = self.sinks_home();
                self.ask_vmm(VmmTask::Resume(proof, sinks));
                Ok(None)
            }
            Effect::SendRunning => {
                self.shared.counters.add_cpu(thread_cpu(&mut self.cpu));
                let end = self.shared.counters.snapshot();
                let running = Running {
                    resume_us: (self.timeline.resume_ms * 1e3) as u64,
                    cpu_us: micros(end.cpu),
                    landed_bytes: (end.pages + end.zero_pages) * PAGE_BYTES_U64,
                };
                // The guest runs whether the source hears of it or not (SPEC: COMMIT-4).
                if let Err(error) = self.try_send(running).and_then(|()| self.ask_for_goodbye()) {
                    tracing::warn!(%error, "the source could not be told that the guest runs here");
                }
                Ok(None)
            }
            Effect::Abort {
                reason,
                phase,
                channel,
                text,
            } => {
                self.abort(reason, phase, channel, &text);
                Ok(None)
            }
            Effect::Discard => {
                self.ask_vmm(VmmTask::Discard);
                Ok(None)
            }
            Effect::Finish(outcome) => {
                self.outcome = Some(outcome);
                Ok(None)
            }
        }
    }

    // ── effects ──────────────────────────────────────────────────────────────────────────────────────────────────────

    fn ask_vmm(&self, task: VmmTask) {
        if let Some((tasks, _)) = &self.vmm {
            // The machine asks for one thing at a time; a Discard may come while it is at work on another.
            let _ = tasks.send(task);
        }
    }

    fn prepare(&mut self) -> Result<(), Error> {
        let Some(layout) = self.layout.clone() else {
            return Err(Error::new(
                Phase::Setup,
                Misbehaved::Order {
                    kind: Kind::SetupEnd,
                },
            ));
        };
        if self.landing.is_some() || self.preparing {
            self.same_configs()?;
        } else {
            self.preparing = true;
            let blobs = self
                .configs
                .take(self.configs.count())
                .map_err(|e| Error::new(Phase::Setup, e))?;
            // Their octets are shared.
            self.first_configs.clone_from(&blobs);
            let devices = self.devices.clone().unwrap_or_default();
            self.ask_vmm(VmmTask::Prepare(blobs, layout, devices));
        }
        self.seen.end = true;
        for joined in std::mem::take(&mut self.early) {
            self.joined(joined);
        }
        Ok(())
    }

    fn send_ready(&mut self) -> Result<(), Error> {
        let Some(landing) = self.landing.clone() else {
            return Err(Error::new(
                Phase::Setup,
                Fault::OutOfTurn {
                    what: "lanes before memory".into(),
                },
            ));
        };
        self.start_loaders()?;
        let begins = Begins::With(self.session.as_ref().map_or(Round::new(0), Session::round));
        for slot in &mut self.lanes {
            slot.start(
                &self.shared,
                &landing,
                &self.gate,
                self.inventory.as_ref(),
                begins,
            )?;
        }
        self.count_lanes();
        self.round_began = Instant::now();
        let lanes = u32::try_from(self.lanes.len()).unwrap_or(u32::MAX);
        self.try_send(Ready {
            lanes,
            prepare_us: (self.timeline.prepare_ms * 1e3) as u64,
        })
    }

    /// Every living lane stands at the fence: what came of this round is settled.
    fn close_round(&mut self, round: Round) -> Result<Event, Error> {
        let began = Instant::now();
        self.fenced_at = Some(began);
        // Give-backs that lanes reported before they arrived at the fence were handled before, in the order of the queue.
        self.send_acks(&self.handled())?;
        let Some(landing) = &self.landing else {
            return Err(Error::new(
                self.phase(),
                Fault::OutOfTurn {
                    what: "a round before memory".into(),
                },
            ));
        };
        let (digest, damaged) = (landing.digest(), landing.damaged_pages());
        let counted = self.shared.counters.snapshot();
        let (pages, zero_pages) = (
            counted.pages - self.closed_pages.0,
            counted.zero_pages - self.closed_pages.1,
        );
        self.closed_pages = (counted.pages, counted.zero_pages);
        let closed = RoundClosed {
            round,
            pages,
            zero_pages,
            digest,
            elapsed_us: micros(self.round_began.elapsed()),
            damaged_pages: damaged,
        };
        self.round_began = Instant::now();
        self.timeline.rounds += 1;
        tracing::debug!(%round, pages, zero_pages, damaged, %digest, "round closed");
        self.try_send(closed)?;
        self.verify = began.elapsed();
        // All lanes are at their marks: what is not here now does not come in this round (SPEC: DEVSTREAM-7).
        let incomplete = self.inventory.as_ref().and_then(|all| all.incomplete());
        Ok(Event::Closed {
            digest,
            damaged,
            incomplete,
        })
    }

    fn load(&mut self, states: u32) -> Result<Option<Event>, Error> {
        let blobs = self
            .states
            .take(states)
            .map_err(|e| Error::new(Phase::Switchover, e).at(ChannelRef::Control))?;
        self.loads += 1;
        self.ask_vmm(VmmTask::Load(blobs));
        if let Some(inventory) = &self.inventory {
            inventory.memory_landed();
        }
        // Everything of every device is here, also a new beginning that its loader has not got to yet.
        Ok((!self.all_loaded()).then_some(Event::DeviceRestarted))
    }

    fn abort(&mut self, reason: Reason, phase: Phase, channel: ChannelRef, text: &str) {
        let text = Text::<TEXT_BYTES_MAX>::clip(text);
        if let Some(control) = &mut self.control {
            control.half().set_deadline(Some(Instant::now() + FAREWELL));
            let frame = Abort {
                reason,
                phase,
                channel,
                text: text.as_str(),
            };
            if let Err(fault) = control.send(frame) {
                tracing::debug!(%fault, "the source could not be told");
            }
        }
    }

    // ── acknowledgements ─────────────────────────────────────────────────────────────────────────────────────────────

    fn handled(&self) -> Vec<LaneMark> {
        self.lanes.iter().map(Slot::mark).collect()
    }

    /// Acknowledges what was handled by now. Notes that are in the queue at this moment are handled first: a give-back for one
    /// of these frames may be among them, and has to go before the acknowledgement (SPEC: BACK-2).
    fn acknowledge(&mut self) {
        let handled = self.handled();
        for _ in 0..self.inbox.len() {
            match self.inbox.try_recv() {
                Ok(note) => self.note(note),
                Err(_) => break,
            }
            if self.outcome.is_some() {
                return;
            }
        }
        if let Err(error) = self.send_acks(&handled) {
            self.drive(failure(error));
        }
    }

    fn send_acks(&mut self, handled: &[LaneMark]) -> Result<(), Error> {
        let mut marks = Vec::new();
        for mark in handled {
            // A lane may have been replaced since.
            let newest = self
                .lanes
                .iter_mut()
                .find(|slot| (slot.id, slot.incarnation) == (mark.lane, mark.incarnation));
            if let Some(slot) = newest.filter(|slot| mark.frames > slot.acked) {
                slot.acked = mark.frames;
                marks.push(RawLaneMark::from(*mark));
            }
        }
        if marks.is_empty() {
            Ok(())
        } else {
            self.try_send(Acks { lanes: &marks })
        }
    }

    fn say_alive(&mut self) {
        let end = self.shared.counters.snapshot();
        let stamp_us = micros(self.now()).max(1);
        self.send(KeepAlive {
            stamp_us,
            echo_us: 0,
        });
        // SPEC: KIND-2, PROGRESS has no place in set-up.
        if self.phase() < Phase::Rounds {
            return;
        }
        self.send(Progress {
            landed_bytes: (end.pages + end.zero_pages) * PAGE_BYTES_U64,
            zero_pages: end.zero_pages,
            frames: end.frames,
            cpu_us: micros(end.cpu),
            round: Round::new(end.round),
            lanes: end.lanes,
        });
    }

    // ── notes ────────────────────────────────────────────────────────────────────────────────────────────────────────

    fn note(&mut self, note: Note) {
        let phase = self.phase();
        match note {
            Note::Opened(opened) => self.opened(opened),
            Note::LaneJoined(joined) => {
                // Of a set-up that was lost meanwhile: the source dials it again (SPEC: RESUME-13).
                let late = phase == Phase::Suspended || self.ticket != Some(joined.ticket);
                if joined.reply.is_none() && late {
                    tracing::debug!(lane = %joined.lane, "a lane came too late");
                    return;
                }
                tracing::info!(channel = %joined.description, lane = %joined.lane, "lane open");
                // A lane may be faster than the SETUP_END that announces it.
                if self.seen.end {
                    self.joined(joined)
                } else {
                    self.early.push(joined)
                }
            }
            Note::Inbound { epoch, .. } | Note::ControlLost { epoch, .. }
                if epoch != self.epoch => {}
            Note::Resuming(opened) => self.resuming(opened),
            Note::Asked { answer } => self.asked(answer),
            Note::Inbound { inbound, .. } => {
                let now = self.now();
                if let Some(session) = &mut self.session {
                    session.heard(now);
                    if !matches!(inbound, Inbound::KeepAlive { .. } | Inbound::Other) {
                        session.progressed(now);
                    }
                }
                if let Err(error) = self.inbound(inbound) {
                    self.drive(Event::Failed(error.at(ChannelRef::Control)));
                }
            }
            Note::ControlLost { error, .. } => {
                self.control_lost = true;
                self.drive(failure(error.in_phase(phase)));
            }
            Note::LaneArrived {
                lane,
                incarnation,
                round,
                last,
            } => {
                if self.is_newest(lane, incarnation) {
                    self.drive(Event::LaneArrived { lane, round, last });
                }
            }
            Note::LaneEnded {
                lane,
                incarnation,
                fault,
            } => {
                if self.is_newest(lane, incarnation) {
                    self.lane_ended(lane, fault);
                }
            }
            Note::Damaged {
                lane,
                incarnation,
                sequence,
                runs,
            } => self.damaged(lane, incarnation, sequence, &runs),
            Note::Vmm(done) => self.vmm_done(done),
            Note::Device(note) => self.device(note),
            Note::Cancel => self.cancel(),
        }
    }

    fn opened(&mut self, opened: Opened) {
        tracing::info!(channel = %opened.description, session = ?opened.session, "control channel open");
        let now = self.now();
        let mut session = Session::new(self.shared.config.clone(), now);
        if opened.kept {
            session.keep();
        }
        self.session = Some(session);
        self.features = opened.features;
        self.shared.counters.set_phase(Phase::Setup);
        self.take_control(opened);
    }

    fn joined(&mut self, joined: Joined) {
        // A lane that is dialled again comes with its answer unsent (SPEC: LANE-5).
        if joined.reply.is_some() {
            return self.rejoined(joined);
        }
        let lane = joined.lane;
        self.lanes.push(Slot::new(joined));
        self.lanes.sort_by_key(|slot| slot.id);
        self.drive(Event::LaneJoined { lane });
    }

    fn inbound(&mut self, inbound: Inbound) -> Result<(), Error> {
        let phase = self.phase();
        let fail = |misbehaved: Misbehaved| Error::new(phase, misbehaved);
        let in_setup = |kind: Kind| {
            if phase == Phase::Setup {
                Ok(())
            } else {
                Err(fail(Misbehaved::Phase { kind, phase }))
            }
        };
        match inbound {
            Inbound::Config(part, body) => {
                in_setup(Kind::Config)?;
                // SPEC: SETUP-1
                if self.seen.regions {
                    return Err(fail(Misbehaved::Order { kind: Kind::Config }));
                }
                self.configs
                    .part(part, &body)
                    .map_err(|fault| Error::new(phase, fault))?;
            }
            Inbound::Regions(layout) => {
                in_setup(Kind::Regions)?;
                if self.seen.regions {
                    return Err(fail(Misbehaved::Order {
                        kind: Kind::Regions,
                    }));
                }
                self.seen.regions = true;
                if self.layout.is_some() {
                    self.same_layout(&layout)?;
                } else {
                    self.regions(layout)?;
                }
            }
            Inbound::Devices(table) => {
                in_setup(Kind::Devices)?;
                if !self.seen.regions || self.seen.devices {
                    return Err(fail(Misbehaved::Order {
                        kind: Kind::Devices,
                    }));
                }
                self.device_table(table)?;
                self.seen.devices = true;
            }
            Inbound::SetupEnd(end) => {
                in_setup(Kind::SetupEnd)?;
                self.setup_end(&end)?;
            }
            Inbound::KeepAlive {
                stamp_us,
                echo_us: 0,
            } => {
                let ours = micros(self.now()).max(1);
                self.send(KeepAlive {
                    stamp_us: ours,
                    echo_us: stamp_us,
                });
            }
            Inbound::KeepAlive { .. } | Inbound::Other => {}
            Inbound::LaneDown {
                lane,
                incarnation,
                reason,
            } => {
                self.lane_down(lane, incarnation, reason).map_err(fail)?;
            }
            Inbound::Switchover(switchover) => self.drive(Event::Switchover {
                round: switchover.final_round,
            }),
            Inbound::VmState(part, body) => {
                if phase != Phase::Switchover {
                    return Err(fail(Misbehaved::Phase {
                        kind: Kind::VmState,
                        phase,
                    }));
                }
                self.states
                    .part(part, &body)
                    .map_err(|fault| Error::new(phase, fault))?;
            }
            Inbound::Final(last) => {
                let (expected, found) = (
                    self.layout
                        .as_ref()
                        .map_or(0, |layout| layout.pages_total().value()),
                    last.memory_pages,
                );
                if expected != found {
                    return Err(fail(Misbehaved::Amount {
                        field: "final.memory_pages",
                        expected,
                        found,
                    }));
                }
                self.drive(Event::Final {
                    round: last.final_round,
                    states: last.states,
                    digest: last.digest,
                });
            }
            Inbound::Commit(commit) => self.drive(Event::Commit {
                digest: commit.digest,
            }),
            Inbound::Abort { reason, text } => {
                return Err(Error::new(phase, Fault::PeerAborted { reason, text }));
            }
        }
        Ok(())
    }

    fn regions(&mut self, layout: Layout) -> Result<(), Error> {
        let wanted = layout.pages_total().value() * PAGE_BYTES_U64;
        if let Some(most) = self
            .shared
            .config
            .memory_bytes_max()
            .filter(|most| wanted > *most)
        {
            return Err(Error::new(
                Phase::Setup,
                Fault::Limit {
                    what: "octets of guest memory",
                    wanted,
                    most,
                },
            ));
        }
        self.shared
            .counters
            .memory_pages
            .store(layout.pages_total().value(), Ordering::Relaxed);
        self.layout = Some(layout);
        Ok(())
    }

    fn setup_end(&mut self, end: &multifd_wire::frame::SetupEnd) -> Result<(), Error> {
        let fail = |misbehaved: Misbehaved| Error::new(Phase::Setup, misbehaved);
        let agree = |field, expected: u64, found: u64| {
            if expected == found {
                Ok(())
            } else {
                Err(fail(Misbehaved::Amount {
                    field,
                    expected,
                    found,
                }))
            }
        };
        let tables = self.layout.as_ref().zip(self.devices.as_ref());
        let Some((layout, devices)) = tables.filter(|_| self.seen.devices) else {
            return Err(fail(Misbehaved::Order {
                kind: Kind::SetupEnd,
            }));
        };
        agree(
            "setup_end.configs",
            self.configs.count().into(),
            end.configs.into(),
        )?;
        agree(
            "setup_end.regions",
            layout.regions().len() as u64,
            end.regions.into(),
        )?;
        agree(
            "setup_end.devices",
            devices.len() as u64,
            end.devices.into(),
        )?;
        agree(
            "setup_end.memory_bytes",
            layout.pages_total().value() * PAGE_BYTES_U64,
            end.memory_bytes,
        )?;
        if end.lanes == 0 || end.lanes > self.shared.config.lanes_max() {
            return Err(fail(Misbehaved::Amount {
                field: "setup_end.lanes",
                expected: self.shared.config.lanes_max().into(),
                found: end.lanes.into(),
            }));
        }
        self.drive(Event::SetupEnd { lanes: end.lanes });
        Ok(())
    }

    fn lane_ended(&mut self, id: LaneId, fault: Fault) {
        let phase = self.phase();
        let Some(slot) = self.lanes.iter_mut().find(|slot| slot.id == id) else {
            return;
        };
        let mark = slot.mark();
        let (incarnation, frames) = (mark.incarnation, mark.frames);
        slot.ended = true;
        slot.closer.shutdown();
        let unacked = frames > slot.acked;
        slot.acked = frames;
        self.count_lanes();
        // Octets that were changed on the way cost the lane (SPEC: ERR-2); if it can't be dialled again, everything.
        let damaged = matches!(&fault, Fault::Malformed(e) if e.reason() == Reason::Corruption)
            && !self.shared.config.suspend().is_zero();
        let reason = if damaged {
            Reason::Corruption
        } else {
            Reason::ChannelsLost
        };
        // Octets that make no sense, or break the protocol, are not a matter of one lane: the source can't be trusted.
        if !damaged
            && matches!(
                fault,
                Fault::Malformed(_)
                    | Fault::Misbehaved(_)
                    | Fault::DeviceMisbehaved { .. }
                    | Fault::DeviceLimit { .. }
                    | Fault::Limit { .. }
                    | Fault::OutOfTurn { .. }
            )
        {
            return self.drive(Event::Failed(
                Error::new(phase, fault).at(ChannelRef::Lane(id)),
            ));
        }
        if phase < Phase::Commit {
            tracing::warn!(lane = %id, %fault, "lane lost");
            if unacked {
                self.send(Acks {
                    lanes: &[RawLaneMark::from(mark)],
                });
            }
            self.send(LaneDown {
                lane: id,
                incarnation,
                reason,
            });
        }
        self.drive(Event::LaneEnded { lane: id });
    }

    fn damaged(
        &mut self,
        lane: LaneId,
        incarnation: Incarnation,
        sequence: Sequence,
        runs: &[PageRun],
    ) {
        // The last words of a lane that was lost. What is damaged then is given back before LANDED (SPEC: RESUME-10).
        if self.phase() == Phase::Setup {
            return;
        }
        tracing::debug!(%lane, %sequence, pages = runs.len(), "pages failed their checksum and go back to the source");
        let raw: Vec<RawRun> = runs.iter().copied().map(RawRun::from).collect();
        self.send(GiveBack {
            lane,
            incarnation,
            sequence,
            reason: GiveBackReason::Checksum,
            runs: &raw,
        });
    }

    fn vmm_done(&mut self, done: VmmDone) {
        let phase = self.phase();
        let refused = |step| move |source| Error::new(phase, Fault::Vmm { step, source });
        let event = match done {
            VmmDone::Prepared(result, took) => {
                self.note_left(result.as_ref().err());
                self.timeline.prepare_ms = ms(took);
                result
                    .map_err(|fault| Error::new(phase, fault))
                    .and_then(|(memory, sinks)| {
                        self.sinks = sinks;
                        self.machine_ready(memory)
                    })
            }
            VmmDone::Loaded(..) if self.void_loads > 0 => {
                self.loads = self.loads.saturating_sub(1);
                self.void_loads -= 1;
                return;
            }
            VmmDone::Loaded(result, took) => {
                self.loads = self.loads.saturating_sub(1);
                self.timeline.load_ms = ms(took);
                result
                    .map_err(refused("load the VM state"))
                    .map(|()| Event::Loaded)
            }
            VmmDone::Resumed(result, took, sinks) => {
                self.note_left(result.as_ref().err());
                self.timeline.resume_ms = ms(took);
                self.sinks = sinks;
                result
                    .map_err(|fault| Error::new(phase, fault))
                    .map(|()| Event::Resumed)
            }
        };
        self.drive(event.unwrap_or_else(Event::Failed));
    }

    /// Devices that are led somewhere together stay together with the one whose code does not return.
    fn note_left(&mut self, fault: Option<&Fault>) {
        if let (Some(Fault::DeviceStuck { .. }), Some(table)) = (fault, &self.devices) {
            let names = table.iter().map(|device| device.name.as_str().to_owned());
            self.timeline.devices_left.extend(names);
        }
    }

    fn machine_ready(&mut self, memory: GuestMemory) -> Result<Event, Error> {
        let fail = |fault| Error::new(Phase::Setup, fault);
        let Some(layout) = self.layout.clone() else {
            return Err(fail(Fault::OutOfTurn {
                what: "a machine before its layout".into(),
            }));
        };
        let landing = Landing::new(layout, memory).map_err(|e| match e {
            LandingError::Differs(text) => fail(Fault::MemoryDiffers { text }),
            LandingError::NoRoom => fail(Fault::System {
                step: "memory for page checksums",
                source: std::io::ErrorKind::OutOfMemory.into(),
            }),
        })?;
        self.landing = Some(Arc::new(landing));
        Ok(Event::MachineReady)
    }

    // ── devices ──────────────────────────────────────────────────────────────────────────────────────────────────────

    /// SPEC: FEAT-4, DEVICE-3, SETUP-3
    fn device_table(&mut self, table: Vec<Device>) -> Result<(), Error> {
        let fail = |fault: Fault| Error::new(Phase::Setup, fault);
        let agreed = self.features.contains(Features::DEVICE_STATE);
        if !table.is_empty() && !agreed {
            let kind = Kind::Devices;
            return Err(fail(Misbehaved::Feature { kind }.into()));
        }
        let config = &self.shared.config;
        check_table(
            &table,
            config.device_window_bytes(),
            config.device_bytes_max(),
        )
        .map_err(fail)?;
        if let Some(first) = &self.devices {
            return self.same_devices(first, &table);
        }
        if agreed {
            let inventory = Inventory::new(&table, config.device_window_bytes());
            self.inventory = Some(Arc::new(inventory));
        }
        let count = u32::try_from(table.len()).unwrap_or(u32::MAX);
        self.shared.counters.devices.store(count, Ordering::Relaxed);
        if let Some(session) = self.session.as_mut().filter(|_| !table.is_empty()) {
            session.expect_devices();
        }
        self.devices = Some(table);
        Ok(())
    }

    fn start_loaders(&mut self) -> Result<(), Error> {
        // A resume finds them at work.
        if !self.loaders.is_empty() {
            return Ok(());
        }
        if let Some((inventory, table)) = self.inventory.as_ref().zip(self.devices.as_ref()) {
            let sinks = std::mem::take(&mut self.sinks);
            let loaders = inventory.start(table, sinks, &self.shared);
            self.loaders = loaders.map_err(|fault| Error::new(Phase::Setup, fault))?;
        }
        Ok(())
    }

    /// Whether what was loaded of each device is its newest stream.
    fn all_loaded(&self) -> bool {
        let (Some(table), Some(inventory)) = (&self.devices, &self.inventory) else {
            return true;
        };
        table.iter().all(|device| {
            let loaded = self.devices_loaded.get(&device.id).copied();
            loaded.is_some() && loaded == inventory.restarts(device.id)
        })
    }

    fn device(&mut self, note: DeviceNote) {
        let now = self.now();
        // Without channels, or before LANDED, there is nobody to be told; LANDED is followed by all that counts.
        let tells = self.phase() >= Phase::Rounds && self.phase() != Phase::Suspended;
        if let Some(session) = &mut self.session {
            session.progressed(now);
        }
        match note {
            DeviceNote::Credit { device, offset_max } => {
                let credits = [RawCredit::from(Credit { device, offset_max })];
                if tells {
                    self.send(Credits { credits: &credits });
                }
                // What was loaded was handled: the source can let go of it, and read on.
                self.ack_due = self.now();
            }
            DeviceNote::Arrived { device } => {
                tracing::debug!(%device, "all of its state is here");
                self.ack_due = self.now();
            }
            DeviceNote::InitialLoaded {
                device,
                generation,
                bytes,
                took,
            } => {
                let ack = SwitchoverAck {
                    device,
                    generation,
                    bytes,
                    load_us: micros(took),
                };
                self.device_acks.insert(device, ack);
                if tells {
                    self.send(ack);
                }
            }
            DeviceNote::Loaded(loaded) => {
                if tells {
                    self.send(DeviceLoaded {
                        device: loaded.device,
                        bytes: loaded.bytes,
                        load_us: micros(loaded.load),
                        config_us: micros(loaded.config),
                    });
                }
                self.timeline.device_loaded(&loaded);
                self.devices_loaded.insert(loaded.device, loaded.restarts);
                self.count_devices();
                if self.all_loaded() {
                    self.drive(Event::DevicesLoaded);
                }
            }
            DeviceNote::Restarted { device } => {
                self.timeline.device_restarted(device);
                if self.devices_loaded.remove(&device).is_some() {
                    self.count_devices();
                    self.drive(Event::DeviceRestarted);
                }
            }
            DeviceNote::Failed(fault) => {
                let error = Error::new(self.phase(), fault);
                self.drive(Event::Failed(error));
            }
        }
    }

    /// A device's own code may not return: then neither does its loader, and the migration ends without it.
    fn watch_devices(&mut self) {
        let limit = self.shared.config.device_deadline();
        if let Some(fault) = self.loaders.iter().find_map(|loader| loader.stuck(limit)) {
            let error = Error::new(self.phase(), fault);
            self.drive(Event::Failed(error));
        }
    }

    /// Ends the loaders and takes their devices back; notes are read meanwhile so that none blocks on them.
    fn sinks_home(&mut self) -> Sinks {
        let Some(inventory) = &self.inventory else {
            return std::mem::take(&mut self.sinks);
        };
        inventory.end();
        let patience = self.shared.config.device_deadline();
        let mut sinks = std::mem::take(&mut self.sinks);
        for loader in std::mem::take(&mut self.loaders) {
            let name = loader.name.clone();
            let home = loader.home(patience, || {
                if self.inbox.is_full() {
                    let _ = self.inbox.try_recv();
                }
            });
            if home.is_none() {
                tracing::error!(device = %name, "a device is not given back: its code does not return");
                self.timeline.devices_left.push(name);
            }
            sinks.extend(home);
        }
        sinks
    }

    fn count_devices(&self) {
        let loaded = u32::try_from(self.devices_loaded.len()).unwrap_or(u32::MAX);
        let counters = &self.shared.counters;
        counters.devices_loaded.store(loaded, Ordering::Relaxed);
    }

    fn count_lanes(&self) {
        let alive = self.lanes.iter().filter(|slot| !slot.ended).count();
        self.shared
            .counters
            .lanes
            .store(u32::try_from(alive).unwrap_or(u32::MAX), Ordering::Relaxed);
    }

    // ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────

    fn wind_up(mut self) -> Finished {
        let outcome = match self.outcome.take() {
            Some(outcome) => outcome,
            None => unreachable!("run() ends with an outcome"),
        };
        self.timeline.total_ms = ms(self.now());
        self.timeline.control_damaged = self.session.as_ref().map_or(0, Session::damages);
        // The control channel first: if the lanes went first, the source would see lost lanes before it read why.
        if let Some(control) = &mut self.control {
            let _ = control.half().finish();
        }
        self.hear_the_farewell();
        self.linger(&outcome);
        self.gate.end();
        for slot in &self.lanes {
            slot.give_up(&self.gate);
        }
        self.early.clear();
        self.join_lanes();
        self.join_stragglers();
        self.later.clear();
        let sinks = self.sinks_home();
        // Dropping it stops the accept thread and closes the listeners.
        self.acceptor = None;
        let vmm = self.vmm_home();
        let devices = sinks;
        self.shared.counters.add_cpu(thread_cpu(&mut self.cpu));
        let mut report = Report::new(&self.timeline, &outcome, &self.shared.counters.snapshot());
        report.damaged = self
            .shared
            .counters
            .damaged()
            .iter()
            .map(Into::into)
            .collect();
        let error = match outcome {
            Outcome::Running => None,
            Outcome::Failed(error) | Outcome::Stranded(error) => Some(error),
        };
        // A queue keeps what nobody reads until its last sender is gone, and every handle has one: a channel in it would stay open, and
        // guest memory mapped, for as long as somebody holds a handle.
        self.inbox.try_iter().for_each(drop);
        Finished {
            report,
            error,
            vmm,
            devices,
        }
    }

    fn join_lanes(&mut self) {
        for slot in &mut self.lanes {
            while slot
                .thread
                .as_ref()
                .is_some_and(|thread| !thread.is_finished())
            {
                let _ = self.inbox.recv_timeout(Duration::from_millis(1));
            }
            if let Some(thread) = slot.thread.take() {
                let _ = thread.join();
            }
        }
    }

    /// Waits a moment for the source to close, so that what it was told is not destroyed by our own close.
    fn hear_the_farewell(&mut self) {
        let until = Instant::now() + FAREWELL;
        while self.reader.is_some() && !self.control_lost && Instant::now() < until {
            match self.inbox.recv_deadline(until) {
                Ok(Note::ControlLost { epoch, .. }) if epoch == self.epoch => {
                    self.control_lost = true;
                }
                Ok(Note::Inbound {
                    epoch,
                    inbound: Inbound::KeepAlive { echo_us, .. },
                }) if epoch == self.epoch => self.note_goodbye(echo_us),
                Err(_) => self.control_lost = true,
                Ok(note @ (Note::Asked { .. } | Note::Resuming(_))) => self.later.push_back(note),
                Ok(_) => {}
            }
        }
        if let Some(closer) = &self.closer {
            closer.shutdown();
        }
        // The reader may be waiting for room in the queue.
        while let Some(reader) = &self.reader {
            if reader.is_finished() {
                let _ = self.reader.take().map(JoinHandle::join);
            } else if let Ok(note @ (Note::Asked { .. } | Note::Resuming(_))) =
                self.inbox.recv_timeout(Duration::from_millis(1))
            {
                self.later.push_back(note);
            }
        }
    }

    /// Ends the VMM thread and takes the machine back. It may be at work: that is waited for, its notes are read meanwhile.
    fn vmm_home(&mut self) -> Box<dyn Vmm> {
        if let Some((tasks, thread)) = self.vmm.take() {
            drop(tasks);
            loop {
                if let Ok(vmm) = self.vmm_back.recv_timeout(Duration::from_millis(1)) {
                    let _ = thread.join();
                    return vmm;
                }
                let _ = self.inbox.try_recv();
                if thread.is_finished() && self.vmm_back.is_empty() {
                    if let Err(panic) = thread.join() {
                        std::panic::resume_unwind(panic);
                    }
                    break;
                }
            }
        }
        unreachable!("the VMM thread gives the machine back or panics")
    }
}

/// The VMM thread: does one thing after another, so that the control thread never waits for the VMM.
fn vmm_life(mut vmm: Box<dyn Vmm>, orders: &Receiver<VmmTask>, shared: &Shared) -> Box<dyn Vmm> {
    for task in orders {
        let began = Instant::now();
        let done = match task {
            VmmTask::Prepare(configs, layout, devices) => VmmDone::Prepared(
                prepare_machine(&mut *vmm, configs, &layout, &devices, shared),
                began.elapsed(),
            ),
            VmmTask::Load(states) => VmmDone::Loaded(vmm.load(states), began.elapsed()),
            VmmTask::Resume(proof, sinks) => {
                let (started, sinks) = with_all(shared, sinks, start);
                let done = started.and_then(|()| {
                    let step = "run the guest";
                    vmm.resume(proof)
                        .map_err(|source| Fault::Vmm { step, source })
                });
                VmmDone::Resumed(done, began.elapsed(), sinks)
            }
            VmmTask::Discard => {
                vmm.discard();
                continue;
            }
        };
        if shared.notes.send(Note::Vmm(done)).is_err() {
            break;
        }
    }
    vmm
}

/// What a failure means: a control channel whose link failed may be replaced.
fn failure(error: Error) -> Event {
    if error.loses_control() {
        Event::Lost(error)
    } else {
        Event::Failed(error)
    }
}

/// The machine, its memory, and its devices where they can be written.
fn prepare_machine(
    vmm: &mut dyn Vmm,
    configs: Vec<Blob>,
    layout: &Layout,
    devices: &[Device],
    shared: &Shared,
) -> Result<(GuestMemory, Sinks), Fault> {
    let refused = |step| move |source| Fault::Vmm { step, source };
    let memory = vmm
        .prepare(configs, layout)
        .map_err(refused("build the machine"))?;
    let mut sinks = Vec::new();
    if !devices.is_empty() {
        sinks = vmm
            .devices(devices)
            .map_err(refused("give the machine's devices"))?;
        let table = devices.to_vec();
        let (opened, back) = with_all(shared, sinks, move |sinks, busy| open(&table, sinks, busy));
        sinks = back;
        opened?;
    }
    Ok((memory, sinks))
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}
