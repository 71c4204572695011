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
use multifd_transport::{Closer, LOOK_MAX, Pulse, Silence, Spawner, join_within};
use multifd_wire::frame::{
    Abort, Commit, Config as ConfigFrame, Devices, Final, RawRegion, RawRun, Regions, SetupEnd,
    VmState, blob_parts,
};
use multifd_wire::limits::{BLOBS_MAX, TEXT_BYTES_MAX};
use multifd_wire::{
    ChannelRef, Frame, Incarnation, LaneId, Misbehaved, Phase, Reason, Round, Sequence, SessionId,
    Text,
};

use super::device::{DeviceCommand, DeviceSet};
use super::first_round::{Unused, mark_populated};
use super::lane::LaneCommand;
use super::link::ControlSender;
use super::mismatch::{Judged, Mismatches};
use super::work::{RoundWork, tracked};
use super::{Dial, Finished, Loads, Note, Shared, lock, scan, thread_cpu};
use crate::AskTicket;
use crate::config::DirtyScan;
use crate::error::{Error, Fault};
use crate::report::{Report, Timeline};
use crate::session::{Counted, Effect, Event, Outcome, Session};
use crate::vmm::{Blob, Throttled, Vmm, VmmError};

/// How long the end of a migration waits for the destination to close the control channel, so that a farewell is read.
pub(super) const FAREWELL: Duration = Duration::from_secs(1);

/// The round that is under way.
struct Open {
    work: Arc<RoundWork>,
    round: Round,
    pages: u64,
    last: bool,
    octets_before: u64,
}

pub(super) struct Control {
    shared: Arc<Shared>,
    vmm: Box<dyn Vmm>,
    sources: Vec<Box<dyn Source>>,
    tracking: bool,
    device_set: DeviceSet,
    dial: Arc<dyn Dial>,
    spawner: Arc<dyn Spawner>,
    notes: Sender<Note>,
    inbox: Receiver<Note>,
    session: Session,
    blobs: Vec<Blob>,
    states: u32,
    control: Option<ControlSender>,
    control_closer: Option<Closer>,
    control_lost: bool,
    reader: Option<JoinHandle<()>>,
    /// The credit that each device begins with.
    device_window: u64,
    lanes: Vec<lanes::Slot>,
    open: Option<Open>,
    /// Counts the control channels.
    epoch: u32,
    /// Threads of channels that were given up; they end by themselves.
    stragglers: Vec<JoinHandle<()>>,
    /// Notes that came while something else was waited for.
    later: VecDeque<Note>,
    /// Pages that the VMM says nobody needs.
    unused: Arc<Unused>,
    mismatches: Mismatches,
    timeline: Timeline,
    outcome: Option<Outcome>,
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
            device_set: DeviceSet::default(),
            dial,
            spawner,
            notes,
            inbox,
            session,
            blobs: Vec::new(),
            states: 0,
            control: None,
            control_closer: None,
            control_lost: false,
            reader: None,
            device_window: 0,
            lanes: Vec::new(),
            open: None,
            epoch: 0,
            stragglers: Vec::new(),
            later: VecDeque::new(),
            timeline: Timeline::default(),
            outcome: None,
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
        let begun = self.describe().and_then(|()| self.name());
        self.drive(begun.unwrap_or_else(Event::Failed));
        while self.outcome.is_none() {
            if self.shared.cancelled.load(Relaxed) {
                self.drive(Event::Cancel);
            }
            self.heed_wishes();
            if self.outcome.is_none() {
                self.step();
            }
        }
        self.wind_up()
    }

    /// The VMM may say no before anything is sent.
    fn describe(&mut self) -> Result<(), Error> {
        self.shared.watch.at("have the VMM describe the machine");
        self.blobs = self.vmm.config().map_err(|source| {
            let step = "describe the machine";
            Error::new(Phase::Hello, Fault::Vmm { step, source })
        })?;
        self.shared
            .watch
            .at("have the VMM say whether the guest runs");
        self.timeline.guest = self.vmm.guest();
        self.session.expect_guest(self.timeline.guest);
        if self.take_devices()? {
            self.session.expect_devices();
        }
        Ok(())
    }

    /// A name for a session: nobody else's, and none that can be guessed.
    fn name(&self) -> Result<Event, Error> {
        let mut id = [0u8; 16];
        getrandom::fill(&mut id).map_err(|error| {
            let step = "random numbers";
            let source = std::io::Error::other(error);
            Error::new(Phase::Hello, Fault::System { step, source }).at(ChannelRef::Control)
        })?;
        Ok(Event::Named(SessionId::new(id)))
    }

    /// What progress readers are told about the time that is left to reach the destination.
    fn count_down(&self) {
        if let Some(until) = self.session.dials_until() {
            let left = until.saturating_sub(self.shared.now());
            let ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
            self.shared.counters.gives_up_in_ms.store(ms, Relaxed);
        }
    }

    /// What the embedder has said of its guest, and wants, meanwhile.
    fn heed_wishes(&mut self) {
        if self.outcome.is_none() && self.shared.wishes.guest_gone.load(Relaxed) {
            self.drive(Event::GuestGone);
        }
        if self.outcome.is_none() && self.shared.wishes.switch_over.swap(false, Relaxed) {
            self.drive(Event::SwitchOverNow);
        }
        let changes = std::mem::take(&mut *lock(&self.shared.wishes.changes));
        for change in changes {
            if self.outcome.is_none() {
                self.drive(Event::Steer(change));
            }
        }
    }

    /// Waits for the next note or timer, and handles it.
    fn step(&mut self) {
        let until = self.session.due();
        let left = until.saturating_sub(self.shared.now());
        match self.next_note(left.min(LOOK_MAX)) {
            Ok(note) => self.note(note),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                unreachable!("this thread holds a sender itself")
            }
        }
        if self.outcome.is_some() {
            return;
        }
        self.watch_devices();
        self.watch_lanes();
        self.count_down();
        let effects = self.session.tick(self.shared.now());
        self.carry_out(effects);
        self.shared.counters.add_cpu(thread_cpu(&mut self.cpu));
    }

    /// The next note; those that came while something else was waited for are first.
    fn next_note(&mut self, wait: Duration) -> Result<Note, RecvTimeoutError> {
        self.shared.watch.at("wait for what comes next");
        match self.later.pop_front() {
            Some(note) => Ok(note),
            None => self.inbox.recv_timeout(wait),
        }
    }

    /// Sends on the control channel, if there is one.
    fn try_send<'a>(&mut self, frame: impl Into<Frame<'a>>) -> Result<(), Error> {
        let phase = self.session.phase();
        let Some(control) = &mut self.control else {
            return Ok(());
        };
        control
            .send(frame)
            .map_err(|fault| Error::new(phase, fault).at(ChannelRef::Control))
    }

    /// Passes an event to the session and carries out what it wants.
    fn drive(&mut self, event: Event) {
        let effects = self.session.handle(event, self.shared.now());
        self.carry_out(effects);
    }

    /// Carries effects out, and passes on what comes of them, until the session wants nothing more.
    fn carry_out(&mut self, effects: Vec<Effect>) {
        let (mut effects, mut events) = (effects, VecDeque::new());
        loop {
            self.shared.counters.set_phase(self.session.phase());
            let lanes = &self.shared.counters.lanes;
            lanes.store(self.session.lanes_alive(), Relaxed);
            if let Some(bandwidth) = self.session.bandwidth() {
                let counter = &self.shared.counters.bandwidth;
                counter.store(bandwidth as u64, Relaxed);
            }
            let cap = self.session.limits().bandwidth;
            let pacer = &self.shared.pacer;
            pacer.set(cap, self.session.sending());
            let mut failed = None;
            // Also those behind one that could not be carried out: that the guest comes back, or the end, may be among them.
            for effect in effects {
                match self.apply(effect) {
                    Ok(next) => events.extend(next),
                    Err(error) => failed = failed.or(Some(error)),
                }
            }
            if let Some(error) = failed {
                events.clear();
                events.push_back(failure(error));
            }
            let Some(event) = events.pop_front() else {
                return;
            };
            effects = self.session.handle(event, self.shared.now());
        }
    }

    fn apply(&mut self, effect: Effect) -> Result<Option<Event>, Error> {
        match effect {
            Effect::Send(frame) => self.try_send(frame).map(|()| None),
            Effect::DialControl {
                number,
                purpose,
                attempt,
            } => self.dial_control(number, purpose, attempt).map(|()| None),
            Effect::Granted { grant, ticket } => {
                self.device_window = grant.device_window_bytes;
                ticket.map_or(Ok(None), |ticket| self.tell_ticket(&ticket).map(|()| None))
            }
            Effect::SendSetup { lanes } => self.send_setup(lanes).map(|()| None),
            Effect::DialLane {
                lane,
                incarnation,
                attempt,
            } => self.dial_lane(lane, incarnation, attempt).map(|()| None),
            Effect::LaneBack {
                lane,
                behind,
                by_itself,
            } => {
                self.lane_back(lane, behind, by_itself);
                Ok(None)
            }
            Effect::CloseLane { lane } => {
                self.close_lane(lane);
                Ok(None)
            }
            Effect::LaneGone { lane, why } => {
                self.lane_gone(lane, &why);
                Ok(None)
            }
            Effect::SettleLane { lane } => Ok(self.settle_lane(lane)),
            Effect::SettleBefore { lanes } => self
                .settle_before(&lanes)
                .map(|()| None)
                .map_err(|misbehaved| self.misbehaved(misbehaved)),
            Effect::LookAtLanes => Ok(Some(self.look_at_lanes())),
            Effect::Acknowledged(marks) => {
                let acked = self
                    .acknowledged(&marks)
                    .map_err(|misbehaved| self.misbehaved(misbehaved))?;
                self.count();
                Ok(Some(acked))
            }
            Effect::GiveBack {
                lane,
                incarnation,
                sequence,
                runs,
            } => self
                .given_back(lane, incarnation, sequence, &runs)
                .map(|()| None)
                .map_err(|misbehaved| self.misbehaved(misbehaved)),
            Effect::DeviceAcked(ack) => self
                .device_acked(&ack)
                .map(Some)
                .map_err(|misbehaved| self.misbehaved(misbehaved)),
            Effect::DeviceLoaded(loaded) => self
                .device_loaded(&loaded)
                .map(|()| None)
                .map_err(|misbehaved| self.misbehaved(misbehaved)),
            Effect::Resumed { rounds_closed } => {
                self.timeline.resumed();
                tracing::info!(rounds_closed, "the migration goes on");
                Ok(None)
            }
            Effect::Begin { prepare_us } => {
                self.begin_tracking(prepare_us).map(|()| Some(Event::Begun))
            }
            Effect::RoundEncoded => Ok(self.round_encoded()),
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
            Effect::Throttle { percent } => Ok(self.throttle(percent)),
            Effect::Steered(change) => {
                tracing::info!(%change, "steered");
                let limits = self.session.limits();
                self.shared.counters.set_limits(limits);
                self.timeline.limits(limits, self.shared.now());
                Ok(None)
            }
            Effect::AwaitDevices => {
                self.await_devices();
                Ok(None)
            }
            Effect::Pause => self.pause().map(Some),
            Effect::Quiesce => {
                self.device_set.command(DeviceCommand::Quiesce);
                Ok(None)
            }
            Effect::StopDevices => {
                self.timeline.quiesced();
                let table = Arc::clone(&self.shared.devices);
                self.device_set.stop(&table);
                Ok(None)
            }
            Effect::Save => self.save().map(Some),
            Effect::SendFinal { round } => self.send_final(round).map(Some),
            Effect::Commit => {
                let digest = self.shared.digest.value();
                self.shared
                    .watch
                    .at("tell the VMM that the commit is about to be sent");
                if let Err(source) = self.vmm.committing() {
                    let step = "agree to the commit";
                    let error = Error::new(Phase::Switchover, Fault::Vmm { step, source });
                    return Ok(Some(Event::CommitUnsent(error)));
                }
                if !self.shared.watch.commit() {
                    // Whoever waited has been told that it failed.
                    let error = Error::new(Phase::Switchover, Fault::Cancelled);
                    return Ok(Some(Event::CommitUnsent(error)));
                }
                match self.try_send(Commit { digest }) {
                    Err(error) if error.fault().sent_nothing() => {
                        self.shared.watch.commit_unsent();
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
                if self.session.phase() == Phase::Done {
                    self.timeline.ended(self.shared.sent(), self.shared.now());
                }
                if paused {
                    self.timeline.reclaimed();
                    self.shared.watch.at("have the VMM run the guest again");
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
            Effect::Disconnect => Ok(self.disconnect().map(Event::Failed)),
            Effect::StartAfresh => self.start_afresh().map(Some),
            Effect::Migrated => {
                self.timeline.ended(self.shared.sent(), self.shared.now());
                self.shared.watch.migrated();
                self.shared.watch.at("hear that it has migrated");
                self.vmm.migrated();
                Ok(None)
            }
            Effect::Finish(outcome) => {
                self.outcome = Some(outcome);
                Ok(None)
            }
        }
    }

    // ── effects ──────────────────────────────────────────────────────────────────────────────────────────────────────

    fn misbehaved(&self, misbehaved: Misbehaved) -> Error {
        Error::new(self.session.phase(), misbehaved).at(ChannelRef::Control)
    }

    fn send_setup(&mut self, lanes: u32) -> Result<(), Error> {
        let shared = Arc::clone(&self.shared);
        // Kept: a resume sends them again. Their octets are shared.
        let blobs = self.blobs.clone();
        let configs = self.send_blobs(&blobs, |blob| Frame::Config(ConfigFrame { blob }))?;
        let regions: Vec<RawRegion> = shared.layout.regions().map(RawRegion::from).collect();
        self.try_send(Regions { regions: &regions })?;
        let memory_bytes = shared.layout.pages_total().value() * multifd_wire::PAGE_BYTES_U64;
        let devices = self.device_set.table();
        self.try_send(Devices { devices: &devices })?;
        self.try_send(SetupEnd {
            configs,
            regions: u32::try_from(regions.len()).unwrap_or(u32::MAX),
            devices: u32::try_from(devices.len()).unwrap_or(u32::MAX),
            lanes,
            memory_bytes,
        })
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
            for (part, body) in blob_parts(blob.kind, blob.version, index, &blob.bytes)
                .map_err(|e| fail(e.into()))?
            {
                if let Some(control) = &mut self.control {
                    control.send_with(frame(part), body).map_err(fail)?;
                }
            }
        }
        Ok(u32::try_from(blobs.len()).unwrap_or(u32::MAX))
    }

    fn open_round(&mut self, round: Round, last: bool) {
        self.judge_mismatches();
        let taken = self.shared.dirty.take_round();
        self.mismatches.took(round, taken.taken());
        let pages = taken.pages();
        let counters = &self.shared.counters;
        counters.round.store(round.value(), Relaxed);
        counters.round_pages_left.store(pages, Relaxed);
        let octets_before = counters.sent_bytes.load(Relaxed);
        self.timeline
            .round_opened(round, pages, self.shared.sent(), self.shared.now());
        let work = Arc::new(RoundWork::new(taken, self.shared.config.body_pages()));
        for slot in self.lanes.iter().filter(|slot| slot.closer.is_some()) {
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
            self.shared.watch.at("collect dirty pages");
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

    /// Whatever the VMM says, the migration goes on.
    fn throttle(&mut self, percent: u8) -> Option<Event> {
        self.shared.watch.at("have the VMM slow the guest");
        let done = self.vmm.throttle(percent);
        match (&done, percent) {
            (Ok(Throttled::Done), _) => {
                tracing::info!(percent, "held back of the guest's time");
                let counter = &self.shared.counters.throttle_percent;
                counter.store(percent, Relaxed);
                self.timeline.throttled(percent, self.shared.now());
                return None;
            }
            (Ok(Throttled::NotSupported), _) => {
                tracing::info!(percent, "this VMM does not slow its guest");
            }
            (Err(error), 0) => {
                tracing::error!(%error, "the VMM could not let the guest go on at its speed");
                self.timeline.throttle_error = Some(error.to_string());
            }
            (Err(error), _) => {
                tracing::warn!(%error, percent, "the VMM could not slow the guest");
                self.timeline.throttle_error = Some(error.to_string());
            }
        }
        (percent > 0).then_some(Event::NotThrottled)
    }

    fn pause(&mut self) -> Result<Event, Error> {
        if !self.devices_allow_pause() {
            return Ok(Event::AcksMissing);
        }
        let predicted = self.session.predicted_downtime();
        tracing::info!(?predicted, "the guest is paused now");
        self.timeline.pausing(predicted, self.shared.now());
        self.shared.watch.at("have the VMM pause the guest");
        self.timeline.guest = self.vmm.guest();
        self.session.expect_guest(self.timeline.guest);
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
        self.shared.watch.at("have the VMM save its state");
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
            guest: self.session.arrives(self.timeline.guest),
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
        let found = self.aside("mfd-scan", "the scan for unreported writes", move |pulse| {
            scan::unreported(&shared, &unused, pulse)
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
            Note::Frame { epoch, .. } | Note::ControlLost { epoch, .. } if epoch != self.epoch => {}
            Note::Reached { number, result } => self.reached(number, result),
            Note::LaneNotOpened {
                lane,
                incarnation,
                why,
            } => self.drive(Event::LaneNotOpened {
                lane,
                incarnation,
                why,
            }),
            Note::Frame { header, table, .. } => match Frame::decode(&header, &table) {
                Ok(frame) => {
                    self.report(&frame);
                    let now = self.shared.now();
                    let effects = self.session.frame(ChannelRef::Control, &frame, now);
                    self.carry_out(effects);
                }
                Err(malformed) => {
                    let error = Error::new(self.session.phase(), malformed);
                    self.drive(Event::Failed(error.at(ChannelRef::Control)));
                }
            },
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
            } => self.lane_up(lane, incarnation, closer, &description),
            Note::LaneEncoded {
                lane,
                incarnation,
                round,
            } => self.drive(Event::LaneEncoded {
                lane,
                incarnation,
                round,
            }),
            Note::LaneEnded {
                lane,
                incarnation,
                fault,
            } => self.drive(Event::LaneEnded {
                lane,
                incarnation,
                fault,
            }),
            Note::Device(note) => self.device(note),
            Note::Cancel => self.drive(Event::Cancel),
            Note::Wish => self.heed_wishes(),
        }
    }

    /// What the report says about a frame.
    fn report(&mut self, frame: &Frame<'_>) {
        match frame {
            Frame::RoundClosed(closed) => self.timeline.round_closed(closed, self.shared.now()),
            Frame::Prepared(prepared) => self.timeline.prepared(prepared),
            Frame::Running(running) => self.timeline.running(running),
            _ => {}
        }
    }

    /// Whoever wants to ask for the outcome later, even from another process, has to know how.
    fn tell_ticket(&mut self, ticket: &AskTicket) -> Result<(), Error> {
        self.shared
            .watch
            .at("have the VMM keep the session's ticket");
        self.vmm.granted(ticket).map_err(|source| {
            let step = "keep what is needed to ask for the outcome";
            Error::new(Phase::Setup, Fault::Vmm { step, source }).at(ChannelRef::Control)
        })
    }

    /// What was sent in the round that all lanes have encoded.
    fn round_encoded(&mut self) -> Option<Event> {
        let open = self.open.as_ref()?;
        let octets = self.shared.counters.sent_bytes.load(Relaxed) - open.octets_before;
        let (round, last) = (open.round, open.last);
        let unacked_octets = self.unacked_octets();
        self.timeline.round_encoded(octets, self.shared.now());
        tracing::debug!(%round, last, octets, unacked_octets, "round encoded");
        Some(Event::Encoded {
            octets,
            unacked_octets,
        })
    }

    /// Tells the session how far the round and each lane is, and the lanes how fast each of them is.
    fn count(&mut self) {
        let lanes = self.lane_counts();
        let mut round = Counted {
            unacked_bytes: lanes.iter().map(|lane| lane.unacked_bytes).sum(),
            ..Counted::default()
        };
        if let Some(open) = &self.open {
            let counters = &self.shared.counters;
            round.pages = open.pages;
            round.pages_left = counters.round_pages_left.load(Relaxed);
            round.sent_bytes = counters.sent_bytes.load(Relaxed) - open.octets_before;
        }
        self.drive(Event::Counted { round, lanes });
        let (lanes, all) = self.session.speeds().known().unzip();
        *lock(&self.shared.loads) = Loads { lanes, all };
    }

    /// Once the destination is ready for the first time.
    fn begin_tracking(&mut self, prepare_us: u64) -> Result<(), Error> {
        self.start_tracking()?;
        self.timeline.ready(self.shared.now(), prepare_us);
        self.start_devices()
    }

    fn start_tracking(&mut self) -> Result<(), Error> {
        let on = std::mem::replace(&mut self.tracking, true);
        for source in self.sources.iter_mut().filter(|_| !on) {
            self.shared.watch.at("start a source of dirty pages");
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
        self.shared
            .watch
            .at("have the VMM say which pages are unused");
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
        let unknown = self.aside("mfd-scan", "look which pages are populated", move |pulse| {
            mark_populated(&shared, &unused, pulse)
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

    /// Does something long on a thread of its own, which beats; this one goes on saying that it lives. The end may be wanted
    /// meanwhile, and the thread may not come back: it only reads.
    fn aside<T: Send + 'static>(
        &mut self,
        name: &str,
        step: &'static str,
        work: impl FnOnce(&Pulse) -> T + Send + 'static,
    ) -> Result<T, Error> {
        let phase = self.session.phase();
        let fail = |source| Error::new(phase, Fault::System { step, source });
        let (tell, told) = crossbeam_channel::bounded(1);
        let (pulse, mut silence) = (Arc::new(Pulse::default()), Silence::default());
        let theirs = Arc::clone(&pulse);
        let body = Box::new(move || {
            // The control thread may have given up.
            let _ = tell.send(work(&theirs));
        });
        let thread = self.spawner.spawn(name, body).map_err(fail)?;
        let keep_alive = self.shared.config.keep_alive();
        let mut said = Instant::now();
        let done = loop {
            self.shared.watch.at(step);
            match told.recv_timeout(keep_alive.min(LOOK_MAX)) {
                Ok(done) => break Some(done),
                Err(RecvTimeoutError::Disconnected) => break None,
                Err(RecvTimeoutError::Timeout) => {}
            }
            if self.shared.cancelled.load(Relaxed) {
                return Err(Error::new(phase, Fault::Cancelled));
            }
            let silent = silence.look(&pulse, Instant::now());
            if silent > self.shared.config.device_deadline() {
                return Err(self.stuck(format!("{name}, which was to {step}"), silent));
            }
            if self.control.is_some() && said.elapsed() >= keep_alive {
                said = Instant::now();
                let alive = self.session.asks(self.shared.now());
                self.try_send(alive)?;
            }
        };
        let _ = self.join(
            thread,
            Instant::now() + self.shared.config.device_deadline(),
        );
        done.ok_or_else(|| fail(std::io::Error::other("its thread panicked")))
    }

    /// A thread of ours does not come back.
    fn stuck(&mut self, thread: String, waited: Duration) -> Error {
        let waited_ms = waited.as_millis();
        Error::new(
            self.session.phase(),
            Fault::ThreadStuck { thread, waited_ms },
        )
    }

    /// Waits for a thread that has nothing more to do than to end, until then at most; its name if it does not. Notes are read
    /// meanwhile so that none waits for room, and what devices say is kept.
    fn join(&mut self, thread: JoinHandle<()>, until: Instant) -> Result<(), String> {
        let left = until.saturating_duration_since(Instant::now());
        let (inbox, later, watch) = (&self.inbox, &mut self.later, &self.shared.watch);
        let meanwhile = || {
            watch.at("wait for a thread");
            match inbox.recv_timeout(Duration::from_millis(1)) {
                Ok(Note::LaneUp { closer, .. }) => closer.shutdown(),
                Ok(note @ Note::Device(_)) => later.push_back(note),
                _ => {}
            }
        };
        join_within(thread, left, meanwhile).map_err(|thread| {
            let name = thread.thread().name().unwrap_or("a thread").to_owned();
            tracing::error!(thread = %name, "a thread does not end: it is left alone");
            name
        })
    }

    fn given_back(
        &mut self,
        lane: LaneId,
        incarnation: Incarnation,
        sequence: Sequence,
        runs: &[RawRun],
    ) -> Result<(), Misbehaved> {
        let mut admitted = Vec::with_capacity(runs.len());
        for raw in runs {
            admitted.push(tracked(self.shared.layout.admit(raw)?));
        }
        let pages = admitted.iter().map(|run| run.count).sum();
        let slot = self
            .slot(lane)
            .filter(|slot| slot.state.incarnation == incarnation);
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

    // ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────

    /// Ends every thread, gives back what no one acknowledged, stops tracking, and writes the report.
    fn wind_up(mut self) -> Finished {
        let outcome = match self.outcome.take() {
            Some(outcome) => outcome,
            None => unreachable!("run() ends with an outcome"),
        };
        let migrated = matches!(outcome, Outcome::Migrated);
        self.shared.watch.at("end");
        self.timeline.ended(self.shared.sent(), self.shared.now());
        self.timeline.control_damaged = self.session.damages();
        // The control channel first: if the lanes went first, the destination would see lost lanes before it read why.
        if let Some(control) = &mut self.control {
            let _ = control.half().finish();
        }
        self.hear_the_farewell();
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
                self.shared.watch.at("stop a source of dirty pages");
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
        // A queue keeps what nobody reads until its last sender is gone, and every handle has one: a channel in it would stay open for as
        // long as somebody holds a handle.
        self.inbox.try_iter().for_each(drop);
        Finished {
            report,
            error: outcome.into_error(),
            vmm: Some(self.vmm),
            sources: self.sources,
            devices: self.device_set.sources,
        }
    }

    /// Lanes end when their command queue and their channel are closed.
    fn join_lanes(&mut self) {
        let began = Instant::now();
        let until = began + self.shared.config.device_deadline();
        let threads: Vec<_> = self
            .lanes
            .iter_mut()
            .filter_map(|slot| Some((slot.closer.is_some(), slot.thread.take()?)))
            .collect();
        for (is_open, thread) in threads {
            // One that dials has taken nothing, and is not waited for any longer than a moment.
            let until = if is_open {
                until
            } else {
                began + resume::STRAGGLERS_MAX
            };
            if let Err(name) = self.join(thread, until)
                && is_open
            {
                self.timeline.threads_left.push(name);
            }
        }
    }

    /// Waits a moment for the destination to close, so that what it was told is not destroyed by our own close.
    fn hear_the_farewell(&mut self) {
        let until = Instant::now() + FAREWELL;
        while self.reader.is_some() && !self.control_lost && Instant::now() < until {
            match self.next_note(until.saturating_duration_since(Instant::now())) {
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
        let until = Instant::now() + self.shared.config.device_deadline();
        if let Some(Err(name)) = self.reader.take().map(|reader| self.join(reader, until)) {
            self.timeline.threads_left.push(name);
        }
    }
}

/// What a failure means: a control channel whose link failed may be replaced.
fn failure(error: Error) -> Event {
    if matches!(error.fault(), Fault::Cancelled) {
        Event::Cancel
    } else if error.loses_control() {
        Event::Lost(error)
    } else {
        Event::Failed(error)
    }
}
