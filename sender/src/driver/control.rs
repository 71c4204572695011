//! The control thread of the source: feeds events to the session machine and carries out its effects.

mod devices;
mod lanes;
mod resume;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use multifd_tracking::{CollectPhase, Source};
use multifd_transport::{ChannelError, Closer, Spawner};
use multifd_wire::frame::{
    Abort, Asks, Commit, Config as ConfigFrame, Devices, Final, Grant, LaneDown, LaneMark,
    RawRegion, RawRun, Ready, Regions, SetupEnd, Switchover, VmState, blob_parts,
};
use multifd_wire::limits::{BLOBS_MAX, TEXT_BYTES_MAX};
use multifd_wire::negotiate::Agreement;
use multifd_wire::{
    ChannelRef, Features, Frame, Hello, Incarnation, Kind, LaneId, Misbehaved, Phase, Pulse,
    Reason, Round, Sequence, SessionId, Text, Token,
};

use super::ask::AskTicket;
use super::device::{Fleet, Order};
use super::first::first_contact;
use super::first_round::{Unused, mark_populated};
use super::lane::LaneCommand;
use super::link::{ControlSender, Inbound, failed};
use super::mismatch::{Judged, Mismatches};
use super::redial::{Attempt, Purpose, Redial, lane_life};
use super::work::{RoundWork, tracked};
use super::{Dial, Finished, LaneState, Loads, Note, Shared, lock, scan, thread_cpu};
use crate::config::DirtyScan;
use crate::error::{Error, Fault};
use crate::report::{Report, Timeline};
use crate::session::{Counted, Effect, Event, Outcome, Session};
use crate::speed::LaneCount;
use crate::vmm::{Blob, Vmm, VmmError};

/// How long the end of a migration waits for the destination to close the control channel, so that a farewell is read.
const FAREWELL: Duration = Duration::from_secs(1);

/// A lost lane is settled when the destination has read what the other lanes' sockets hold of the round before; this many
/// times the longest silence of a channel is more than that takes.
const SETTLE_STALLS: u32 = 3;

/// One lane, as the control thread sees it.
struct Slot {
    state: Arc<LaneState>,
    incarnation: Incarnation,
    /// Dropped when the lane is to end.
    commands: Option<Sender<LaneCommand>>,
    closer: Option<Closer>,
    life: Life,
    /// While its life is [`Life::Dying`] because this side lost it.
    dying_since: Option<Duration>,
    encoded: Option<Round>,
    thread: Option<JoinHandle<()>>,
    /// While it is lost and to be dialled again.
    redial: Option<Redial>,
    /// How often it was lost.
    losses: u32,
    /// It was lost with all the others, and has not come back: the report counts that as one suspension.
    with_all: bool,
    watch: lanes::Watch,
    /// Why this side gave it up, until its thread has ended.
    doomed: Option<Fault>,
    /// While a resume is under way: the connection that was lost, which LANDED settles.
    before: Option<Arc<LaneState>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    Dialling,
    Alive,
    /// The channel failed; what the destination has of it is not known yet.
    Dying,
    /// Settled. It may be dialled again.
    Dead,
    /// It was lost, and a new connection is being made.
    Redialling,
}

/// The thread of one connection of a lane, and what leads to it.
struct Spawned {
    state: Arc<LaneState>,
    commands: Sender<LaneCommand>,
    thread: JoinHandle<()>,
}

/// The round that is under way.
struct Open {
    work: Arc<RoundWork>,
    round: Round,
    pages: u64,
    last: bool,
    told: bool,
    octets_before: u64,
}

pub(super) struct Control {
    shared: Arc<Shared>,
    vmm: Box<dyn Vmm>,
    sources: Vec<Box<dyn Source>>,
    tracking: bool,
    /// Its devices are read, and its memory is in round 0, for the destination that there is now.
    begun: bool,
    fleet: Fleet,
    dial: Arc<dyn Dial>,
    spawner: Arc<dyn Spawner>,
    notes: Sender<Note>,
    inbox: Receiver<Note>,
    session: Session,
    id: SessionId,
    blobs: Vec<Blob>,
    states: u32,
    control: Option<ControlSender>,
    control_closer: Option<Closer>,
    control_lost: bool,
    reader: Option<JoinHandle<()>>,
    agreement: Option<Agreement>,
    grant: Option<Grant>,
    destination_ready: Option<Ready>,
    lanes: Vec<Slot>,
    open: Option<Open>,
    /// How many rounds the destination is known to have closed.
    rounds_closed: u32,
    /// The first round with the guest paused.
    paused_from: Option<Round>,
    /// Since when no lane lives.
    alone_since: Option<Duration>,
    watch_due: Duration,
    /// The newest round that was opened since the destination last said how many it has closed, or ever.
    last_opened: Option<Round>,
    /// Counts the control channels.
    epoch: u32,
    /// What a resume or a question has to show.
    secret: Option<Token>,
    /// While the destination is dialled again.
    back: Option<resume::Back>,
    /// Counts the attempts.
    attempt: u32,
    /// While a resume is under way.
    resumed: Option<resume::Resumed>,
    /// Threads of channels that were given up; they end by themselves.
    stragglers: Vec<JoinHandle<()>>,
    /// Notes of devices that came while something else was waited for.
    later: VecDeque<Note>,
    /// Pages that the VMM says nobody needs.
    unused: Arc<Unused>,
    mismatches: Mismatches,
    timeline: Timeline,
    outcome: Option<Outcome>,
    /// Stamps and echoes on this control channel.
    pulse: Pulse,
    keep_alive_due: Duration,
    cpu: Duration,
}

impl Control {
    pub(super) fn new(
        shared: Arc<Shared>,
        vmm: Box<dyn Vmm>,
        sources: Vec<Box<dyn Source>>,
        dial: Arc<dyn Dial>,
        spawner: Arc<dyn Spawner>,
        notes: Sender<Note>,
        inbox: Receiver<Note>,
    ) -> Self {
        let session = Session::new(
            shared.config.clone(),
            shared.layout.pages_total().value(),
            Duration::ZERO,
        );
        Self {
            unused: Arc::default(),
            mismatches: Mismatches::new(&shared.dirty),
            shared,
            vmm,
            sources,
            tracking: false,
            begun: false,
            fleet: Fleet::default(),
            dial,
            spawner,
            notes,
            inbox,
            session,
            id: SessionId::new([0; 16]),
            blobs: Vec::new(),
            states: 0,
            control: None,
            control_closer: None,
            control_lost: false,
            reader: None,
            agreement: None,
            grant: None,
            destination_ready: None,
            lanes: Vec::new(),
            open: None,
            rounds_closed: 0,
            paused_from: None,
            alone_since: None,
            watch_due: Duration::ZERO,
            last_opened: None,
            epoch: 0,
            secret: None,
            back: None,
            attempt: 0,
            resumed: None,
            stragglers: Vec::new(),
            later: VecDeque::new(),
            timeline: Timeline::default(),
            outcome: None,
            pulse: Pulse::new(Duration::MAX),
            keep_alive_due: Duration::ZERO,
            cpu: Duration::ZERO,
        }
    }

    /// What it was made of, if it never ran.
    pub(super) fn into_parts(self) -> (Box<dyn Vmm>, Vec<Box<dyn Source>>) {
        (self.vmm, self.sources)
    }

    /// From the hello to the end.
    pub(super) fn run(mut self) -> Finished {
        self.timeline.begin();
        if let Err(error) = self.connect() {
            // What failed because the user did not want to wait any longer is a cancellation.
            let cancelled = self.shared.cancelled.load(Relaxed);
            self.drive(if cancelled {
                Event::Cancel
            } else {
                Event::Failed(error)
            });
        }
        while self.outcome.is_none() {
            if self.shared.cancelled.load(Relaxed) {
                self.drive(Event::Cancel);
            }
            // Once there is an outcome, what is still under way (a dial, say) belongs to the last word.
            if self.outcome.is_none() {
                self.step();
            }
        }
        self.wind_up()
    }

    /// Configuration first (the VMM may say no before anything is sent), then the hello on the control channel.
    fn connect(&mut self) -> Result<(), Error> {
        let hello_error = |fault: Fault| Error::new(Phase::Hello, fault).at(ChannelRef::Control);
        self.blobs = self.vmm.config().map_err(|source| {
            Error::new(
                Phase::Hello,
                Fault::Vmm {
                    step: "describe the machine",
                    source,
                },
            )
        })?;
        let features = self.take_devices()?;
        let mut id = [0u8; 16];
        getrandom::fill(&mut id).map_err(|e| {
            hello_error(Fault::System {
                step: "random numbers",
                source: std::io::Error::other(e),
            })
        })?;
        self.id = SessionId::new(id);
        let hello =
            Hello::start(self.id, features, self.wanted()).with_pass(self.shared.config.pass());
        let opened = first_contact(&self.shared, &self.dial, &*self.spawner, &self.inbox, hello)
            .inspect_err(|fault| self.shared.counters.note_fault(ChannelRef::Control, fault))
            .map_err(hello_error)?;
        self.take_control(opened)?;
        let now = self.shared.now();
        self.session = Session::new(
            self.shared.config.clone(),
            self.shared.layout.pages_total().value(),
            now,
        );
        if !self.fleet.is_empty() {
            self.session.expect_devices();
        }
        Ok(())
    }

    /// Waits for the next note or timer, and handles it.
    fn step(&mut self) {
        let settle = self.settle_deadline();
        let until = self
            .session
            .next_deadline()
            .min(self.keep_alive_due)
            .min(self.lanes_due())
            .min(self.back_due())
            .min(settle.unwrap_or(Duration::MAX));
        let left = until.saturating_sub(self.shared.now());
        let note = match self.later.pop_front() {
            Some(note) => Ok(note),
            None => self.inbox.recv_timeout(left),
        };
        match note {
            Ok(note) => self.note(note),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                unreachable!("this thread holds a sender itself")
            }
        }
        if self.outcome.is_some() {
            return;
        }
        let now = self.shared.now();
        if now >= self.keep_alive_due {
            let period = self.shared.config.keep_alive();
            self.keep_alive_due = now
                + if self.session.is_paused() {
                    period.min(resume::PAUSED_KEEP_ALIVE)
                } else {
                    period
                };
            let alive = self.pulse.ask(now);
            self.send(alive);
        }
        if self.settle_deadline().is_some_and(|due| now >= due) {
            let what = "the destination to say what it has of a lost lane";
            self.drive(Event::Lost(Error::new(
                self.session.phase(),
                Fault::Timeout { what },
            )));
        }
        self.tend_lanes(now);
        self.tend_back(now);
        self.watch_devices();
        self.drive(Event::Tick);
        self.shared.counters.add_cpu(thread_cpu(&mut self.cpu));
    }

    /// Sends on the control channel; a failure becomes an event.
    fn send<'a>(&mut self, frame: impl Into<Frame<'a>>) {
        if let Err(error) = self.try_send(frame) {
            self.drive(failure(error));
        }
    }

    fn try_send<'a>(&mut self, frame: impl Into<Frame<'a>>) -> Result<(), Error> {
        let phase = self.session.phase();
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
            let effects = self.session.handle(event, self.shared.now());
            self.shared.counters.set_phase(self.session.phase());
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
            Effect::SendSetup => self.send_setup().map(|()| None),
            Effect::OpenRound { round, last } => {
                self.open_round(round, last);
                Ok(None)
            }
            Effect::Collect { last } => {
                self.count();
                self.collect(last).map(Some)
            }
            Effect::Forecast(outlook) => {
                self.shared.counters.set_outlook(outlook);
                self.timeline.forecast(outlook);
                Ok(None)
            }
            Effect::AwaitDevices => {
                self.await_devices();
                Ok(None)
            }
            Effect::Pause => self.pause().map(Some),
            Effect::Quiesce => {
                self.fleet.order(Order::Quiesce);
                Ok(None)
            }
            Effect::StopDevices => {
                self.timeline.quiesced();
                let depot = Arc::clone(&self.shared.depot);
                self.fleet.stop(&depot);
                Ok(None)
            }
            Effect::AnnounceSwitchover { round } => {
                self.paused_from.get_or_insert(round);
                self.try_send(Switchover { final_round: round })
                    .map(|()| None)
            }
            Effect::Save => self.save().map(Some),
            Effect::SendFinal { round } => self.send_final(round).map(Some),
            Effect::Commit => {
                let digest = self.shared.digest.value();
                match self.try_send(Commit { digest }) {
                    Err(error) if error.fault().sent_nothing() => {
                        Ok(Some(Event::CommitUnsent(error)))
                    }
                    sent => {
                        self.timeline.committed();
                        sent.map(|()| None)
                    }
                }
            }
            Effect::Reclaim { paused, proof } => {
                // A switchover that is broken off, or the end.
                let devices = if self.session.phase() == Phase::Suspended {
                    self.go_on_with_devices(&proof)
                } else {
                    self.reclaim_devices(&proof);
                    Ok(())
                };
                if paused {
                    self.timeline.reclaimed();
                    if let Err(source) = self.vmm.resume(proof) {
                        // The machine is over already: this can only be told.
                        tracing::error!(error = %source, "the VMM could not resume the guest at the source: it is paused");
                        self.timeline.resume_failed = Some(source.to_string());
                    }
                }
                devices.map(|()| None)
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
            Effect::Disconnect => {
                self.disconnect();
                Ok(None)
            }
            Effect::Reconnect { until } => {
                self.go_back(Purpose::Resume, until);
                Ok(None)
            }
            Effect::Ask { until } => {
                self.go_back(Purpose::Ask, until);
                Ok(None)
            }
            Effect::StartAfresh => self.start_afresh().map(|()| None),
            Effect::Finish(outcome) => {
                self.outcome = Some(outcome);
                Ok(None)
            }
        }
    }

    // ── effects ──────────────────────────────────────────────────────────────────────────────────────────────────────

    fn send_setup(&mut self) -> Result<(), Error> {
        let shared = Arc::clone(&self.shared);
        // Kept: a resume sends them again. Their octets are shared.
        let blobs = self.blobs.clone();
        let configs = self.send_blobs(&blobs, |blob| Frame::Config(ConfigFrame { blob }))?;
        let regions: Vec<RawRegion> = shared.layout.regions().map(RawRegion::from).collect();
        self.try_send(Regions { regions: &regions })?;
        let granted = self
            .grant
            .as_ref()
            .map_or(u32::MAX, |grant| grant.lanes_max);
        // A first set-up that was lost early has none yet.
        let again = self.resumed.is_some() && !self.lanes.is_empty();
        let lanes = if again {
            u32::try_from(self.lanes.len()).unwrap_or(u32::MAX)
        } else {
            shared.config.channels().min(granted)
        };
        let memory_bytes = shared.layout.pages_total().value() * multifd_wire::PAGE_BYTES_U64;
        let devices = self.fleet.table();
        self.try_send(Devices { devices: &devices })?;
        self.try_send(SetupEnd {
            configs,
            regions: u32::try_from(regions.len()).unwrap_or(u32::MAX),
            devices: u32::try_from(devices.len()).unwrap_or(u32::MAX),
            lanes,
            memory_bytes,
        })?;
        if again {
            return self.dial_all_again();
        }
        for id in 0..lanes {
            self.start_lane(LaneId::new(id), Incarnation::new(0))?;
        }
        Ok(())
    }

    fn send_blobs(
        &mut self,
        blobs: &[Blob],
        frame: impl Fn(multifd_wire::frame::BlobPart) -> Frame<'static>,
    ) -> Result<u32, Error> {
        let phase = self.session.phase();
        let fail = |fault: Fault| Error::new(phase, fault).at(ChannelRef::Control);
        if blobs.len() > BLOBS_MAX {
            let source = VmmError::new(format!(
                "{} blobs, and the format carries {BLOBS_MAX}",
                blobs.len()
            ));
            return Err(fail(Fault::Vmm {
                step: "describe the machine",
                source,
            }));
        }
        for (blob, index) in blobs.iter().zip(0..) {
            for (part, body) in blob_parts(blob.kind, blob.version, index, &blob.octets)
                .map_err(|e| fail(e.into()))?
            {
                if let Some(control) = &mut self.control {
                    control.send_with(frame(part), body).map_err(fail)?;
                }
            }
        }
        Ok(u32::try_from(blobs.len()).unwrap_or(u32::MAX))
    }

    fn start_lane(&mut self, id: LaneId, incarnation: Incarnation) -> Result<(), Error> {
        let Spawned {
            state,
            commands,
            thread,
        } = self.spawn_lane(id, incarnation, Attempt::First)?;
        self.lanes.push(Slot {
            state,
            incarnation,
            commands: Some(commands),
            closer: None,
            life: Life::Dialling,
            dying_since: None,
            encoded: None,
            thread: Some(thread),
            redial: None,
            losses: 0,
            with_all: false,
            watch: lanes::Watch::default(),
            doomed: None,
            before: None,
        });
        Ok(())
    }

    /// Starts the thread of one connection of a lane.
    fn spawn_lane(
        &self,
        id: LaneId,
        incarnation: Incarnation,
        attempt: Attempt,
    ) -> Result<Spawned, Error> {
        let fail = |fault: Fault| Error::new(self.session.phase(), fault).at(ChannelRef::Lane(id));
        let (Some(grant), Some(agreement)) = (self.grant, self.agreement) else {
            return Err(fail(Fault::OutOfTurn {
                what: "a lane before the grant".into(),
            }));
        };
        let state = Arc::new(LaneState {
            id,
            incarnation,
            given_up: std::sync::atomic::AtomicBool::new(false),
            lane: std::sync::Mutex::new(Some(crate::lane::Lane::new(id, incarnation))),
        });
        let (commands, orders) = crossbeam_channel::bounded(2);
        let hello = Hello::join(self.id, grant.ticket, agreement.features, id, incarnation);
        let (shared, dial, notes, lane) = (
            Arc::clone(&self.shared),
            Arc::clone(&self.dial),
            self.notes.clone(),
            Arc::clone(&state),
        );
        let body = Box::new(move || {
            let fault = lane_life(&shared, &*dial, attempt, &hello, &lane, &orders, &notes).err();
            if let Some(fault) = &fault {
                shared.counters.note_fault(ChannelRef::Lane(id), fault);
            }
            let _ = notes.send(Note::LaneEnded {
                lane: id,
                incarnation,
                fault,
            });
        });
        let thread = self
            .spawner
            .spawn(&format!("mfd-lane{id}"), body)
            .map_err(|source| {
                fail(Fault::System {
                    step: "start a thread",
                    source,
                })
            })?;
        Ok(Spawned {
            state,
            commands,
            thread,
        })
    }

    fn open_round(&mut self, round: Round, last: bool) {
        self.last_opened = Some(round);
        self.judge_mismatches();
        let taken = self.shared.dirty.take_round();
        self.mismatches.took(round, taken.taken());
        let pages = taken.pages();
        let counters = &self.shared.counters;
        counters.round.store(round.value(), Relaxed);
        counters.round_pages_left.store(pages, Relaxed);
        let octets_before = counters.sent_bytes.load(Relaxed);
        self.timeline.round_opened(round, pages, self.shared.now());
        let work = Arc::new(RoundWork::new(taken, self.shared.config.body_pages()));
        for slot in self.lanes.iter().filter(|slot| slot.life == Life::Alive) {
            if let Some(commands) = &slot.commands {
                // There is room: a lane gets its next round only after it said that it encoded the one before.
                let _ = commands.try_send(LaneCommand::Round {
                    work: Arc::clone(&work),
                    round,
                    last,
                    behind: Vec::new(),
                });
            }
        }
        self.open = Some(Open {
            work,
            round,
            last,
            told: false,
            octets_before,
            pages,
        });
    }

    fn collect(&mut self, last: bool) -> Result<Event, Error> {
        let phase = if last {
            CollectPhase::Final
        } else {
            CollectPhase::PreCopy
        };
        let began = Instant::now();
        for source in &mut self.sources {
            if let Err(error) = source.collect(&self.shared.dirty, phase) {
                let text = format!("{}: {error}", source.name());
                return Err(Error::new(self.session.phase(), Fault::Tracking(text)));
            }
        }
        self.shared.counters.note_sources(&self.sources);
        self.judge_mismatches();
        let pages = self.shared.dirty.dirty_pages();
        if !last {
            self.shared.counters.dirty_pages.store(pages, Relaxed);
            self.look_at_devices();
        }
        self.timeline.collected(pages, last, began.elapsed());
        Ok(Event::Collected { pages })
    }

    /// After a collection: decides of the pages that did not match whether the guest wrote them, and has them come again.
    fn judge_mismatches(&mut self) {
        let judged = self.mismatches.collected(&self.shared.dirty);
        self.count_judged(judged);
    }

    fn count_judged(&self, judged: Judged) {
        let counters = &self.shared.counters;
        counters.pages_torn.fetch_add(judged.torn, Relaxed);
        counters.pages_damaged.fetch_add(judged.damaged, Relaxed);
    }

    fn pause(&mut self) -> Result<Event, Error> {
        if !self.devices_allow_pause() {
            return Ok(Event::AcksMissing);
        }
        self.timeline.pausing(self.session.predicted_downtime());
        self.vmm.pause().map_err(|source| {
            Error::new(
                Phase::Switchover,
                Fault::Vmm {
                    step: "pause the guest",
                    source,
                },
            )
        })?;
        self.timeline.paused();
        Ok(Event::Paused)
    }

    fn save(&mut self) -> Result<Event, Error> {
        let blobs = self.vmm.save().map_err(|source| {
            Error::new(
                Phase::Switchover,
                Fault::Vmm {
                    step: "save its state",
                    source,
                },
            )
        })?;
        self.states = self.send_blobs(&blobs, |blob| Frame::VmState(VmState { blob }))?;
        self.timeline.saved();
        Ok(Event::Saved)
    }

    fn send_final(&mut self, round: Round) -> Result<Event, Error> {
        if self.shared.config.dirty_scan() == DirtyScan::AtSwitchover {
            self.scan_for_unreported()?;
        }
        let digest = self.shared.digest.value();
        let memory_pages = self.shared.layout.pages_total().value();
        self.try_send(Final {
            final_round: round,
            states: self.states,
            digest,
            memory_pages,
        })?;
        self.timeline.final_sent();
        Ok(Event::FinalSent {
            digest: digest.value(),
        })
    }

    /// Compares all of memory with what was sent, on a thread of its own: this one goes on saying that it lives.
    fn scan_for_unreported(&mut self) -> Result<(), Error> {
        let began = Instant::now();
        let (shared, unused) = (Arc::clone(&self.shared), Arc::clone(&self.unused));
        let found = self.aside("mfd-scan", "the scan for unreported writes", move || {
            scan::unreported(&shared, &unused)
        });
        self.timeline.dirty_scan = Some(began.elapsed());
        match found? {
            found if found.is_empty() => Ok(()),
            found => Err(Error::new(
                Phase::Switchover,
                Fault::Unreported(found.to_string()),
            )),
        }
    }

    /// Tells the peer why; as well as it can be told.
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
                tracing::debug!(%fault, "the destination could not be told");
            }
        }
    }

    // ── notes ────────────────────────────────────────────────────────────────────────────────────────────────────────

    fn note(&mut self, note: Note) {
        match note {
            Note::Inbound { epoch, .. } | Note::ControlLost { epoch, .. }
                if epoch != self.epoch => {}
            Note::Reached { attempt, result } => self.reached(attempt, result),
            Note::Inbound { inbound, .. } => {
                self.session.heard(self.shared.now());
                if let Err(error) = self.inbound(inbound) {
                    self.drive(Event::Failed(error.at(ChannelRef::Control)));
                }
            }
            Note::ControlLost { error, .. } => {
                self.control_lost = true;
                let phase = self.session.phase();
                self.drive(failure(error.in_phase(phase)));
            }
            Note::LaneUp {
                lane,
                incarnation,
                closer,
                description,
            } => {
                tracing::info!(channel = %description, %lane, "lane open");
                let newest = self
                    .slot(lane)
                    .filter(|slot| slot.incarnation == incarnation);
                match newest {
                    Some(slot) if slot.life == Life::Dialling => {
                        slot.closer = Some(closer);
                        slot.life = Life::Alive;
                    }
                    // The destination has lost it since.
                    Some(slot)
                        if slot.life == Life::Redialling && slot.state.given_up.load(Relaxed) =>
                    {
                        closer.shutdown();
                        self.redial_failed(lane, failed(ChannelError::ShutDown));
                    }
                    Some(slot) if slot.life == Life::Redialling => {
                        slot.closer = Some(closer);
                        slot.life = Life::Alive;
                        self.rejoined(lane);
                    }
                    // The destination gave it up before this note was read.
                    _ => closer.shutdown(),
                }
                self.count_lanes();
                if let Err(error) = self.begin_rounds() {
                    self.drive(Event::Failed(error));
                }
            }
            Note::LaneEncoded {
                lane,
                incarnation,
                round,
            } => {
                if let Some(slot) = self.slot(lane)
                    && slot.incarnation == incarnation
                {
                    slot.encoded = Some(round);
                }
                self.check_encoded();
            }
            Note::LaneEnded {
                lane,
                incarnation,
                fault,
            } => {
                if self
                    .slot(lane)
                    .is_some_and(|slot| slot.incarnation == incarnation)
                {
                    self.lane_ended(lane, fault);
                }
            }
            Note::Device(note) => self.device(note),
            Note::Cancel => self.drive(Event::Cancel),
        }
    }

    fn inbound(&mut self, inbound: Inbound) -> Result<(), Error> {
        let fail = |phase: Phase, misbehaved: Misbehaved| Error::new(phase, misbehaved);
        let phase = self.session.phase();
        match inbound {
            Inbound::Granted(grant) => {
                self.grant = Some(grant);
                if self.resumed.is_none() {
                    self.tell_ticket(grant.resume_secret)?;
                }
                self.secret = Some(grant.resume_secret);
                let resume = self
                    .agreement
                    .is_some_and(|agreement| agreement.features.contains(Features::RESUME));
                let kept = Duration::from_millis(grant.suspend_ms.into());
                // SPEC: FEAT-5
                self.session.kept_for(resume.then_some(kept));
                self.drive(Event::Granted);
            }
            Inbound::Ready(ready) => {
                if phase != Phase::Setup || self.grant.is_none() {
                    return Err(fail(phase, Misbehaved::Order { kind: Kind::Ready }));
                }
                let lanes = self.lanes.len() as u64;
                // SPEC: READY-1, RESUME-14. A destination may have sent a READY that was lost, and need no more than one lane now.
                let fits = match u64::from(ready.lanes) {
                    some if self.resumed.is_some() => (1..=lanes).contains(&some),
                    all => all == lanes,
                };
                if !fits {
                    return Err(fail(
                        phase,
                        Misbehaved::Amount {
                            field: "ready.lanes",
                            expected: lanes,
                            found: u64::from(ready.lanes),
                        },
                    ));
                }
                self.destination_ready = Some(ready);
                self.begin_rounds()?;
            }
            Inbound::Acks(marks) => {
                marks
                    .iter()
                    .try_for_each(|mark| self.acked(mark))
                    .map_err(|m| fail(phase, m))?;
                self.count();
            }
            Inbound::GiveBack {
                lane,
                incarnation,
                sequence,
                runs,
            } => self
                .given_back(lane, incarnation, sequence, &runs)
                .map_err(|m| fail(phase, m))?,
            Inbound::Closed(closed) => {
                if let Some(open) = self.open.as_ref().filter(|open| closed.round > open.round) {
                    let (expected, found) = (open.round, closed.round);
                    return Err(fail(phase, Misbehaved::Round { expected, found }));
                }
                self.rounds_closed = self
                    .rounds_closed
                    .max(closed.round.value().saturating_add(1));
                self.timeline.round_closed(&closed, self.shared.now());
                self.drive(Event::Closed {
                    round: closed.round,
                    damaged: closed.damaged_pages,
                });
            }
            Inbound::Acked(ack) => self.device_acked(&ack).map_err(|m| fail(phase, m))?,
            Inbound::Loaded(loaded) => {
                self.device_loaded(&loaded).map_err(|m| fail(phase, m))?;
            }
            Inbound::Prepared(prepared) => {
                self.timeline.prepared(&prepared);
                self.drive(Event::Prepared {
                    digest: prepared.digest.value(),
                });
            }
            Inbound::Running(running) => {
                self.timeline.running(&running);
                self.drive(Event::Running);
            }
            Inbound::KeepAlive(alive) => {
                let now = self.shared.now();
                let heard = self.pulse.heard(&alive, now);
                if heard.asks == Asks::Answer {
                    let answer = self.pulse.answer(now);
                    self.send(answer);
                }
                if let Some(time) = heard.round_trip {
                    self.drive(Event::RoundTrip(time));
                }
            }
            Inbound::LaneDown {
                lane,
                incarnation,
                reason,
            } => self
                .lane_down(lane, incarnation, reason)
                .map_err(|m| fail(phase, m))?,
            Inbound::Abort { reason, text } => {
                return Err(Error::new(phase, Fault::PeerAborted { reason, text }));
            }
            Inbound::Landed {
                rounds_closed,
                marks,
            } => {
                let kind = Kind::Landed;
                let resume = self
                    .agreement
                    .is_some_and(|agreement| agreement.features.contains(Features::RESUME));
                if !resume {
                    return Err(fail(phase, Misbehaved::Feature { kind }));
                }
                // SPEC: RESUME-6
                if self.destination_ready.is_none() {
                    return Err(fail(phase, Misbehaved::Order { kind }));
                }
                self.landed(rounds_closed, &marks)
                    .map_err(|m| fail(phase, m))?;
                self.begin_rounds()?;
            }
            // It answers a question, and none was asked on this channel.
            Inbound::Outcome(_) => {
                let kind = Kind::Outcome;
                return Err(fail(phase, Misbehaved::Feature { kind }));
            }
            Inbound::Other => {}
        }
        Ok(())
    }

    /// Whoever wants to ask for the outcome later, even from another process, has to know how.
    fn tell_ticket(&mut self, secret: Token) -> Result<(), Error> {
        let ticket = AskTicket::new(self.id.value(), secret.value());
        self.vmm.granted(&ticket).map_err(|source| {
            let step = "keep what is needed to ask for the outcome";
            Error::new(Phase::Setup, Fault::Vmm { step, source })
        })
    }

    /// Once the destination is ready *and* every lane, or on the way back one, has read its acceptance, which may be later than READY.
    fn begin_rounds(&mut self) -> Result<(), Error> {
        if self.lanes.iter().any(|slot| slot.life == Life::Dialling) {
            return Ok(());
        }
        if self.comes_back() && !self.lanes.iter().any(|slot| slot.life == Life::Alive) {
            return Ok(());
        }
        if self.resume_rounds() {
            return Ok(());
        }
        let Some(ready) = self.destination_ready.take() else {
            return Ok(());
        };
        self.begin_tracking(ready.prepare_us)?;
        self.drive(Event::Ready);
        Ok(())
    }

    /// Once the destination is ready for the first time.
    fn begin_tracking(&mut self, prepare_us: u64) -> Result<(), Error> {
        self.begun = true;
        self.start_tracking()?;
        self.timeline.ready(self.shared.now(), prepare_us);
        self.start_devices()
    }

    fn start_tracking(&mut self) -> Result<(), Error> {
        let on = std::mem::replace(&mut self.tracking, true);
        for source in self.sources.iter_mut().filter(|_| !on) {
            if let Err(error) = source.start(&self.shared.dirty) {
                let text = format!("{}: {error}", source.name());
                return Err(Error::new(Phase::Setup, Fault::Tracking(text)));
            }
        }
        self.mark_first_round()
    }

    /// Puts into the dirty set what round 0 has to move. Only when all sources report: what is written from here on comes by them.
    pub(super) fn mark_first_round(&mut self) -> Result<(), Error> {
        let fail = |fault: Fault| Error::new(Phase::Setup, fault);
        let runs = self.vmm.unused_pages().map_err(|source| {
            fail(Fault::Vmm {
                step: "say which pages are unused",
                source,
            })
        })?;
        let unused = Unused::new(runs, &self.shared.dirty).map_err(|error| {
            fail(Fault::Vmm {
                step: "say which pages are unused",
                source: VmmError::new(error),
            })
        })?;
        self.unused = Arc::new(unused);
        let (shared, unused) = (Arc::clone(&self.shared), Arc::clone(&self.unused));
        let unknown = self.aside("mfd-scan", "look which pages are populated", move || {
            mark_populated(&shared, &unused)
        })?;
        for region in unknown {
            let (region, reason) = (region.region_index, region.reason);
            tracing::warn!(region, %reason, "which pages are populated is not known: all are read");
        }
        let pages = self.shared.layout.pages_total().value();
        let left_out = pages.saturating_sub(self.shared.dirty.dirty_pages());
        self.shared.counters.left_out_pages.store(left_out, Relaxed);
        Ok(())
    }

    /// Does something long on a thread of its own; this one goes on saying that it lives.
    fn aside<T: Send + 'static>(
        &mut self,
        name: &str,
        step: &'static str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        let phase = self.session.phase();
        let fail = |source| Error::new(phase, Fault::System { step, source });
        let (tell, told) = crossbeam_channel::bounded(1);
        let body = Box::new(move || {
            // The control thread may have given up.
            let _ = tell.send(work());
        });
        let thread = self.spawner.spawn(name, body).map_err(fail)?;
        let done = loop {
            match told.recv_timeout(self.shared.config.keep_alive()) {
                Ok(done) => break Some(done),
                Err(RecvTimeoutError::Timeout) if self.control.is_some() => {
                    let alive = self.pulse.ask(self.shared.now());
                    self.try_send(alive)?;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break None,
            }
        };
        let _ = thread.join();
        done.ok_or_else(|| fail(std::io::Error::other("its thread panicked")))
    }

    fn acked(&mut self, mark: &LaneMark) -> Result<(), Misbehaved> {
        let slot = self.known(mark.lane, mark.incarnation)?;
        let state = Arc::clone(&slot.state);
        let settled = match lock(&state.lane).as_mut() {
            Some(lane) => {
                self.shared.depot.arrived(lane.items_below(mark.frames));
                lane.acked(mark.frames)?
            }
            None => return Ok(()),
        };
        self.shared
            .counters
            .acked_bytes
            .fetch_add(settled.octets, Relaxed);
        if settled.frames > 0 {
            self.timeline.taken();
            self.session.progressed(self.shared.now());
        }
        Ok(())
    }

    fn given_back(
        &mut self,
        lane: LaneId,
        incarnation: Incarnation,
        sequence: Sequence,
        runs: &[RawRun],
    ) -> Result<(), Misbehaved> {
        // In a set-up only for a session that comes back, between READY and LANDED (SPEC: RESUME-10).
        let resumes = self.comes_back() && self.destination_ready.is_some();
        if self.session.phase() == Phase::Setup && !resumes {
            let kind = Kind::GiveBack;
            return Err(Misbehaved::Order { kind });
        }
        // Of a connection that was lost as well: a page that was damaged on it is owed all the same.
        if self
            .slot(lane)
            .is_none_or(|slot| incarnation > slot.incarnation)
        {
            return Err(Misbehaved::Lane {
                channel: ChannelRef::Lane(lane),
                incarnation: incarnation.value(),
            });
        }
        let mut admitted = Vec::with_capacity(runs.len());
        for raw in runs {
            admitted.push(tracked(self.shared.layout.admit(raw)?));
        }
        let pages = admitted.iter().map(|run| run.count).sum();
        let slot = self
            .slot(lane)
            .filter(|slot| slot.incarnation == incarnation);
        let round = slot.and_then(|slot| lock(&slot.state.lane).as_ref()?.round_of(sequence));
        let shared = Arc::clone(&self.shared);
        let judged = self.mismatches.came(round, &admitted, &shared.dirty);
        self.count_judged(judged);
        let counters = &self.shared.counters;
        counters.pages_given_back.fetch_add(pages, Relaxed);
        counters.pages_mismatched.fetch_add(pages, Relaxed);
        tracing::debug!(%lane, %incarnation, pages, ?judged, "pages came back: they did not match their checksum at the destination");
        Ok(())
    }

    fn lane_down(
        &mut self,
        lane: LaneId,
        incarnation: Incarnation,
        reason: Reason,
    ) -> Result<(), Misbehaved> {
        // About a connection before this one: it was settled before the lane was dialled again.
        if self
            .slot(lane)
            .is_some_and(|slot| incarnation < slot.incarnation)
        {
            return Ok(());
        }
        if self.session.is_rejoining() && !self.begun {
            // The first set-up is made with all lanes at once, or again from the start.
            self.known(lane, incarnation)?;
            let last = "closed by the destination".to_owned();
            let error = Error::new(self.session.phase(), Fault::AllLanesLost { last });
            self.drive(Event::Lost(error.at(ChannelRef::Lane(lane))));
            return Ok(());
        }
        let slot = self.known(lane, incarnation)?;
        match slot.life {
            // It was let in, and lost before this side knew.
            Life::Redialling => slot.state.given_up.store(true, Relaxed),
            // Both sides know: what the destination has of it was acknowledged before this frame, the rest comes back.
            Life::Dying => self.bury(lane),
            Life::Dead => {}
            Life::Dialling | Life::Alive => {
                tracing::warn!(%lane, %reason, "the destination lost a lane");
                if let Some(closer) = &slot.closer {
                    closer.shutdown();
                }
                slot.commands = None;
                slot.doomed = None;
                slot.life = Life::Dying;
                // Its thread ends now and says so; the destination has said its part already.
                slot.encoded = None;
                slot.state.given_up.store(true, Relaxed);
                if let Some(thread) = slot.thread.take() {
                    let _ = thread.join();
                }
                // SPEC: LANE-2
                self.timeline.lane_lost();
                self.send(LaneDown {
                    lane,
                    incarnation,
                    reason,
                });
                self.bury(lane);
            }
        }
        Ok(())
    }

    fn lane_ended(&mut self, id: LaneId, fault: Option<Fault>) {
        let (phase, now) = (self.session.phase(), self.shared.now());
        // Once the destination has everything no lane is needed any more (SPEC: LANE-9).
        let needed = self.session.needs_lanes();
        let dials_again = self.dials_again();
        let begins_anew = self.session.is_rejoining() && !self.begun;
        let Some(slot) = self.slot(id) else { return };
        let doomed = slot.doomed.take();
        let Some(fault) = doomed.or(fault) else {
            return;
        };
        match slot.life {
            Life::Dying | Life::Dead => {}
            Life::Redialling => self.redial_failed(id, fault),
            // The first set-up is made with all lanes at once, or again from the start.
            Life::Dialling | Life::Alive if begins_anew => {
                let error = Error::new(phase, fault).at(ChannelRef::Lane(id));
                self.drive(Event::Lost(error));
            }
            // Lost like the control channel may be: the set-up is made again, if it can be.
            Life::Dialling if matches!(fault, Fault::Channel(_)) => {
                let error = Error::new(phase, fault).at(ChannelRef::Lane(id));
                self.drive(Event::Lost(error));
            }
            // A migration begins with all its lanes or not at all: what is wrong is found in the first second.
            Life::Dialling => self.drive(Event::Failed(
                Error::new(phase, fault).at(ChannelRef::Lane(id)),
            )),
            Life::Alive => {
                tracing::warn!(lane = %id, %fault, "lane lost");
                slot.life = Life::Dying;
                slot.dying_since = Some(now);
                slot.commands = None;
                if let Some(closer) = &slot.closer {
                    closer.shutdown();
                }
                let incarnation = slot.incarnation;
                self.timeline.lane_lost();
                self.count_lanes();
                if needed && !dials_again && self.lanes.iter().all(|slot| slot.life != Life::Alive)
                {
                    let all = Fault::AllLanesLost {
                        last: fault.to_string(),
                    };
                    self.drive(Event::Failed(
                        Error::new(phase, all).at(ChannelRef::Lane(id)),
                    ));
                    return;
                }
                self.send(LaneDown {
                    lane: id,
                    incarnation,
                    reason: Reason::ChannelsLost,
                });
                self.check_alone(now);
            }
        }
    }

    /// What the destination has of a lost lane is settled: everything else of it comes back.
    fn bury(&mut self, id: LaneId) {
        let Some(slot) = self.slot(id) else { return };
        slot.life = Life::Dead;
        slot.dying_since = None;
        let state = Arc::clone(&slot.state);
        let items = self.give_back_ledger(&state);
        self.count_lanes();
        // The control channel was lost meanwhile, perhaps by answering: the way back begins with dialling all lanes.
        if self.session.phase() == Phase::Suspended {
            return;
        }
        if self.session.needs_lanes()
            && !self.dials_again()
            && self
                .lanes
                .iter()
                .all(|slot| matches!(slot.life, Life::Dead | Life::Dying))
        {
            let error = Error::new(
                self.session.phase(),
                Fault::AllLanesLost {
                    last: "closed by the destination".into(),
                },
            );
            self.drive(Event::Failed(error.at(ChannelRef::Lane(id))));
            return;
        }
        self.schedule_redial(id);
        if self.outcome.is_some() {
            return;
        }
        // Items of devices are missing like pages are: with the guest paused they need a round that is open.
        self.drive(Event::LaneLost {
            pages: self.shared.dirty.dirty_pages() + items,
        });
        self.check_encoded();
    }

    /// Everything of a lane's connection that is not acknowledged comes back. Gives how many items of devices that is.
    fn give_back_ledger(&mut self, state: &LaneState) -> u64 {
        let Some(mut lane) = lock(&state.lane).take() else {
            return 0;
        };
        // Some of these may have been lost with the lane as well, and are about to be in the set for that.
        self.mismatches.leave_open(&self.shared.dirty);
        let items = self.shared.depot.outbox.again(lane.take_items());
        let counters = &self.shared.counters;
        // What is under way at the end is lost, and not sent again.
        if self.outcome.is_none() {
            counters
                .sent_again_bytes
                .fetch_add(lane.unacked_octets(), Relaxed);
        }
        let mut pages = 0;
        for run in lane.die() {
            pages += u64::from(run.count());
            self.shared.dirty.give_back(tracked(run));
        }
        counters.pages_given_back.fetch_add(pages, Relaxed);
        items
    }

    /// Tells the machine once that the present round is encoded: by every living lane, with no lane's fate unsettled.
    fn check_encoded(&mut self) {
        let Some(open) = self.open.as_mut().filter(|open| !open.told) else {
            return;
        };
        let done = |slot: &Slot| match slot.life {
            Life::Alive => slot.encoded == Some(open.round),
            Life::Dying | Life::Dialling => false,
            Life::Dead | Life::Redialling => true,
        };
        // Without any lane the round stays open: the next one ends it.
        let one = self.lanes.iter().any(|slot| slot.life == Life::Alive);
        if !one || !self.lanes.iter().all(done) {
            return;
        }
        open.told = true;
        let octets = self.shared.counters.sent_bytes.load(Relaxed) - open.octets_before;
        let (round, last) = (open.round, open.last);
        let unacked = |slot: &Slot| {
            lock(&slot.state.lane)
                .as_ref()
                .map_or(0, crate::lane::Lane::unacked_octets)
        };
        let unacked_octets = self.lanes.iter().map(unacked).sum();
        self.timeline.round_encoded(octets, self.shared.now());
        tracing::debug!(%round, last, octets, unacked_octets, "round encoded");
        self.drive(Event::Encoded {
            octets,
            unacked_octets,
        });
        if let Some(bandwidth) = self.session.bandwidth() {
            self.shared
                .counters
                .bandwidth
                .store(bandwidth as u64, Relaxed);
        }
    }

    /// Tells the session how far the round and each lane is, and the lanes how fast each of them is.
    fn count(&mut self) {
        let counters = &self.shared.counters;
        let lane_count = |slot: &Slot| {
            let state = lock(&slot.state.lane);
            state.as_ref().map(|lane| LaneCount {
                lane: lane.id(),
                incarnation: lane.incarnation(),
                acked_bytes: lane.acked_octets(),
                unacked_bytes: lane.unacked_octets(),
            })
        };
        let alive = self.lanes.iter().filter(|slot| slot.life == Life::Alive);
        let lanes: Vec<LaneCount> = alive.filter_map(lane_count).collect();
        let mut round = Counted {
            unacked_bytes: lanes.iter().map(|lane| lane.unacked_bytes).sum(),
            ..Counted::default()
        };
        if let Some(open) = &self.open {
            round.pages = open.pages;
            round.pages_left = counters.round_pages_left.load(Relaxed);
            round.sent_bytes = counters.sent_bytes.load(Relaxed) - open.octets_before;
        }
        self.drive(Event::Counted { round, lanes });
        let (lanes, all) = self.session.speeds().known().unzip();
        *lock(&self.shared.loads) = Loads { lanes, all };
    }

    fn slot(&mut self, lane: LaneId) -> Option<&mut Slot> {
        self.lanes.get_mut(lane.value() as usize)
    }

    /// The lane that the destination speaks of.
    fn known(&mut self, lane: LaneId, incarnation: Incarnation) -> Result<&mut Slot, Misbehaved> {
        self.slot(lane)
            .filter(|slot| slot.incarnation == incarnation)
            .ok_or(Misbehaved::Lane {
                channel: ChannelRef::Lane(lane),
                incarnation: incarnation.value(),
            })
    }

    /// When the destination must have said at the latest what it has of a lost lane.
    fn settle_deadline(&self) -> Option<Duration> {
        // It does not say so once it has said PREPARED (SPEC: PREP-2).
        if self.session.is_committed() {
            return None;
        }
        let first = self
            .lanes
            .iter()
            .filter_map(|slot| slot.dying_since)
            .min()?;
        Some(first + self.shared.config.stall() * SETTLE_STALLS)
    }

    fn count_lanes(&self) {
        let alive = self
            .lanes
            .iter()
            .filter(|slot| slot.life == Life::Alive)
            .count();
        self.shared
            .counters
            .lanes
            .store(u32::try_from(alive).unwrap_or(u32::MAX), Relaxed);
    }

    // ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────

    /// Ends every thread, gives back what no one acknowledged, stops tracking, and writes the report.
    fn wind_up(mut self) -> Finished {
        let outcome = match self.outcome.take() {
            Some(outcome) => outcome,
            None => unreachable!("run() ends with an outcome"),
        };
        let migrated = matches!(outcome, Outcome::Migrated);
        if migrated {
            self.vmm.migrated();
        }
        self.timeline.ended(self.shared.now());
        self.timeline.control_damaged = self.session.damages();
        if migrated {
            self.say_goodbye();
        }
        // The control channel first: if the lanes went first, the destination would see lost lanes before it read why.
        if let Some(control) = &mut self.control {
            let _ = control.half().finish();
        }
        self.hear_the_farewell();
        if let Outcome::Failed(error) | Outcome::Cancelled(error) = &outcome {
            self.last_word(error);
        }
        self.shared.stop.store(true, Relaxed);
        self.open = None;
        for slot in &mut self.lanes {
            slot.commands = None;
            if !migrated && let Some(closer) = &slot.closer {
                closer.shutdown();
            }
        }
        self.join_lanes();
        self.join_stragglers();
        let states: Vec<_> = self
            .lanes
            .iter()
            .flat_map(|slot| std::iter::once(&slot.state).chain(&slot.before))
            .map(Arc::clone)
            .collect();
        for state in states {
            self.give_back_ledger(&state);
        }
        if self.tracking {
            for source in &mut self.sources {
                if let Err(error) = source.stop() {
                    tracing::warn!(source = source.name(), %error, "dirty tracking could not be stopped");
                }
            }
        }
        let gone = matches!(outcome, Outcome::Migrated | Outcome::Unknown(_));
        let devices = self.end_devices(gone);
        self.shared.counters.add_cpu(thread_cpu(&mut self.cpu));
        self.shared.counters.note_sources(&self.sources);
        let mut report = Report::new(
            &self.timeline,
            &outcome,
            &self.shared.counters.snapshot(),
            &self.shared.config,
            &self.sources,
            devices,
        );
        report.damaged = self
            .shared
            .counters
            .damaged()
            .iter()
            .map(Into::into)
            .collect();
        let error = match outcome {
            Outcome::Migrated => None,
            Outcome::Failed(error)
            | Outcome::Cancelled(error)
            | Outcome::Stranded(error)
            | Outcome::Unknown(error) => Some(error),
        };
        // A queue keeps what nobody reads until its last sender is gone, and every handle has one: a channel in it would stay open for as
        // long as somebody holds a handle.
        self.inbox.try_iter().for_each(drop);
        Finished {
            report,
            error,
            vmm: self.vmm,
            sources: self.sources,
            devices: self.fleet.sources,
        }
    }

    /// Lanes end when their command queue and their channel are closed; notes are read meanwhile so that none blocks on them.
    fn join_lanes(&mut self) {
        let began = Instant::now();
        for slot in &mut self.lanes {
            // One that dials has taken nothing, and is not waited for any longer than a moment.
            let dials = slot.closer.is_none();
            while slot
                .thread
                .as_ref()
                .is_some_and(|thread| !thread.is_finished())
                && !(dials && began.elapsed() > resume::STRAGGLERS_MAX)
            {
                // A lane that was still dialling when it ended.
                if let Ok(Note::LaneUp { closer, .. }) =
                    self.inbox.recv_timeout(Duration::from_millis(1))
                {
                    closer.shutdown();
                }
            }
            if let Some(thread) = slot.thread.take().filter(JoinHandle::is_finished) {
                let _ = thread.join();
            }
        }
    }

    /// Waits a moment for the destination to close, so that what it was told is not destroyed by our own close.
    fn hear_the_farewell(&mut self) {
        let until = Instant::now() + FAREWELL;
        while self.reader.is_some() && !self.control_lost && Instant::now() < until {
            match self.inbox.recv_deadline(until) {
                Ok(Note::ControlLost { epoch, .. }) if epoch == self.epoch => {
                    self.control_lost = true;
                }
                Err(_) => self.control_lost = true,
                Ok(Note::LaneUp { closer, .. }) => closer.shutdown(),
                Ok(_) => {}
            }
        }
        if let Some(closer) = &self.control_closer {
            closer.shutdown();
        }
        // The reader may be waiting for room in the queue.
        while let Some(reader) = &self.reader {
            if reader.is_finished() {
                let _ = self.reader.take().map(JoinHandle::join);
            } else {
                let _ = self.inbox.recv_timeout(Duration::from_millis(1));
            }
        }
    }
}

/// What a failure means: a control channel whose link failed may be replaced.
fn failure(error: Error) -> Event {
    if error.loses_control() {
        Event::Lost(error)
    } else {
        Event::Failed(error)
    }
}
