//! The control thread of the destination: passes frames and events to the session, and carries its effects out.
//!
//! It decides nothing: what is legal, due or lost is the session's to know. The exceptions are about threads and queues, which the
//! session does not have: what was known before frames were counted is passed on before they are acknowledged (SPEC: BACK-2), and no
//! lane of old channels is settled before its thread has ended (SPEC: RESUME-6).

mod channel;
mod devices;
mod end;
mod lanes;
mod next_source;
mod notes;

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use multifd_session::common::Encoded;
use multifd_session::destination::{Closed, Counts, Effect, Event, Outcome, Session};
use multifd_transport::door::Door;
use multifd_wire::frame::OutcomeState;
use multifd_wire::{Features, Kind, Phase, Round, Token};

use self::channel::Link;
use self::lanes::Lanes;
use super::device::DeviceSet;
use super::greet::{Opened, turn_away};
use super::vmm::{VmmTask, VmmThread};
use super::{Finished, Note, Shared, thread_cpu};
use crate::error::{Error, Fault};
use crate::landing::Landing;
use crate::report::Timeline;
use crate::vmm::{AskTicket, Vmm};

/// How long the end of a migration waits for the source to close the control channel, so that what it was told last is read; and how
/// long telling it may take.
const CLOSE_MAX: Duration = Duration::from_secs(1);

/// An acceptance is 256 bytes on a channel that has carried nothing: it never waits, unless the channel is lost.
const ANSWER_MAX: Duration = Duration::from_secs(1);

/// How often it is looked for a cancellation while nobody has come yet.
const IDLE_POLL: Duration = Duration::from_millis(200);

pub(super) struct Control {
    shared: Arc<Shared>,
    inbox: Receiver<Note>,
    /// Notes that came while threads were waited for.
    later: VecDeque<Note>,
    door: Option<Door>,
    session: Option<Session>,
    /// What whoever comes back to the session, or asks for it, has shown.
    secret: Option<Token>,
    ticket: Option<AskTicket>,
    features: Features,
    began: Instant,
    link: Link,
    /// The source that came back, until the session has it accepted or turned away.
    returning: Option<Opened>,
    lanes: Lanes,
    devices: DeviceSet,
    vmm: Option<VmmThread>,
    landing: Option<Arc<Landing>>,
    /// Who waits for an answer.
    asking: Option<Sender<OutcomeState>>,
    /// What happened by carrying effects out; the session is told of it next.
    events: VecDeque<Event>,
    /// Frames are to be counted for an acknowledgement.
    counting: bool,
    /// Threads of channels that were given up; they end by themselves.
    detached: Vec<JoinHandle<()>>,
    timeline: Timeline,
    outcome: Option<Outcome>,
    cpu: Duration,
}

impl Control {
    pub(super) fn new(
        shared: Arc<Shared>,
        inbox: Receiver<Note>,
        vmm: Box<dyn Vmm>,
        door: Door,
    ) -> Result<Self, (std::io::Error, Box<dyn Vmm>)> {
        let vmm = VmmThread::start(&shared, vmm)?;
        Ok(Self {
            shared,
            inbox,
            later: VecDeque::new(),
            door: Some(door),
            session: None,
            secret: None,
            ticket: None,
            features: Features::NONE,
            began: Instant::now(),
            link: Link::default(),
            returning: None,
            lanes: Lanes::default(),
            devices: DeviceSet::default(),
            vmm: Some(vmm),
            landing: None,
            asking: None,
            events: VecDeque::new(),
            counting: false,
            detached: Vec::new(),
            timeline: Timeline::default(),
            outcome: None,
            cpu: Duration::ZERO,
        })
    }

    /// The machine, if this never ran.
    pub(super) fn into_vmm(mut self) -> Box<dyn Vmm> {
        match self.vmm.take().and_then(VmmThread::at_once) {
            Some(vmm) => vmm,
            None => unreachable!("its thread was asked for nothing, so it gives the machine back"),
        }
    }

    /// From waiting for a source to the end.
    pub(super) fn run(self) -> Finished {
        let mut control = Box::new(self);
        loop {
            let outcome = control.wait_for_outcome();
            match control.wind_up(outcome) {
                ControlFlow::Continue(next) => control = next,
                ControlFlow::Break(finished) => return finished,
            }
        }
    }

    /// From waiting for a source to the end of its session.
    fn wait_for_outcome(&mut self) -> Outcome {
        loop {
            if let Some(outcome) = self.outcome.take() {
                return outcome;
            }
            if self.shared.cancelled.load(Ordering::Relaxed) {
                self.cancel();
            }
            if self.outcome.is_none() {
                self.step();
            }
        }
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn cancel(&mut self) {
        if self.session.is_some() {
            self.drive(Event::Cancel);
        } else {
            let error = Error::new(Phase::Hello, Fault::Cancelled);
            self.outcome = Some(Outcome::Failed(error));
        }
    }

    /// Waits for the next note or timer, and handles it.
    fn step(&mut self) {
        if let Some(note) = self.later.pop_front() {
            return self.note(note);
        }
        let longest = match &self.session {
            Some(session) => session.next_deadline().saturating_sub(self.now()),
            // Nobody has come yet: nothing is due.
            None => IDLE_POLL,
        };
        match self.inbox.recv_timeout(longest) {
            Ok(note) => self.note(note),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                unreachable!("this thread's shared state holds a sender")
            }
        }
        if self.outcome.is_some() || self.session.is_none() {
            return;
        }
        self.shared.counters.add_cpu(thread_cpu(&mut self.cpu));
        self.watch_devices();
        self.drive(Event::Tick(self.counts()));
        if std::mem::take(&mut self.counting) {
            self.count_handled();
        }
    }

    /// What was counted on data channels.
    fn counts(&self) -> Counts {
        let counted = self.shared.counters.snapshot();
        Counts {
            pages: counted.content_pages,
            zero_pages: counted.zero_pages,
            frames: counted.frames,
            cpu: counted.cpu,
        }
    }

    /// Counts what was handled by now. Notes that are in the queue at this moment go first: a give-back for one of these frames may be
    /// among them (SPEC: BACK-2).
    fn count_handled(&mut self) {
        let handled = self.lanes.handled();
        let waiting = self.later.len() + self.inbox.len();
        for _ in 0..waiting {
            let note = self.later.pop_front();
            let Some(note) = note.or_else(|| self.inbox.try_recv().ok()) else {
                break;
            };
            self.note(note);
            if self.outcome.is_some() {
                return;
            }
        }
        self.drive(Event::Handled(handled));
    }

    /// Passes an event to the session and carries out what it wants, until it wants nothing more.
    fn drive(&mut self, event: Event) {
        let now = self.now();
        if let Some(session) = &mut self.session {
            let effects = session.handle(event, now);
            self.carry_out(effects);
        }
    }

    fn carry_out(&mut self, effects: Vec<Effect>) {
        let mut effects = VecDeque::from(effects);
        loop {
            self.publish();
            // Also those behind one that could not be carried out: the end may be among them.
            while let Some(effect) = effects.pop_front() {
                self.apply(effect);
            }
            let now = self.now();
            let (Some(event), Some(session)) = (self.events.pop_front(), &mut self.session) else {
                return;
            };
            effects.extend(session.handle(event, now));
        }
    }

    /// For those who read the progress.
    fn publish(&self) {
        let (Some(session), counters) = (&self.session, &self.shared.counters) else {
            return;
        };
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let (devices, loaded) = session.devices();
        counters.set_phase(session.phase());
        for (counter, value) in [
            (&counters.round, session.round().value()),
            (&counters.lanes, session.lanes_alive()),
            (&counters.devices, count(devices)),
            (&counters.devices_loaded, count(loaded)),
        ] {
            counter.store(value, Ordering::Relaxed);
        }
        if let Some(layout) = session.layout() {
            let pages = layout.pages_total().value();
            counters.memory_pages.store(pages, Ordering::Relaxed);
        }
    }

    /// Carries one effect out.
    fn apply(&mut self, effect: Effect) {
        match effect {
            Effect::Send(frame) => self.send(&frame),
            Effect::Prepare {
                configs,
                layout,
                devices,
            } => {
                let window = self.shared.config.device_window_bytes();
                let agreed = self.features.contains(Features::DEVICE_STATE);
                self.devices.announce(&devices, agreed.then_some(window));
                match self.ticket.clone() {
                    Some(ticket) => {
                        self.ask_vmm(VmmTask::Prepare(ticket, configs, layout, devices));
                    }
                    None => self.internal("a machine before its session"),
                }
            }
            Effect::Admit {
                lane,
                incarnation,
                begins,
            } => self.admit(lane, incarnation, begins),
            Effect::TurnAway {
                lane,
                incarnation,
                reason,
                text,
            } => self.turn_lane_away(lane, incarnation, (reason, text)),
            Effect::CloseLane(lane) => self.lanes.close(lane),
            Effect::StartLanes(round) => {
                let started = self.start_lanes(round);
                self.events.extend(started.err().map(Event::Failed));
            }
            Effect::CountHandled => self.counting = true,
            Effect::CloseRound(round) => self.close_round(round),
            Effect::OpenGate(round) => self.lanes.gate.open(round),
            Effect::Load { states } => {
                self.ask_vmm(VmmTask::Load(states));
                self.devices.memory_landed();
            }
            Effect::Resume(proof) => {
                self.timeline.guest = Some(proof.guest());
                let sinks = self.take_devices_back();
                self.ask_vmm(VmmTask::Resume(proof, sinks));
            }
            Effect::Suspend => self.suspend(),
            Effect::SettleLanes => self.settle_lanes(),
            Effect::AcceptResume => self.accept_resume(),
            Effect::RefuseResume { reason, text } => {
                if let Some(opened) = self.returning.take() {
                    let halves = (opened.tx, opened.rx);
                    turn_away(&self.shared, halves, opened.reply, (reason, text));
                }
            }
            Effect::Answer(state) => {
                let answer = self.asking.take();
                let taken = answer.is_some_and(|answer| answer.send(state).is_ok());
                self.events.extend(taken.then_some(Event::Answered(state)));
            }
            Effect::Discard => self.ask_vmm(VmmTask::Discard),
            Effect::Finish(outcome) => self.outcome = Some(outcome),
        }
    }

    /// This program did what it can't.
    fn internal(&mut self, what: impl Into<String>) {
        let what = what.into();
        self.events
            .push_back(Event::Failed(Fault::Internal { what }));
    }

    fn send(&mut self, frame: &Encoded) {
        let kind = frame.kind();
        let Some(sender) = &mut self.link.sender else {
            return;
        };
        if kind == Kind::Abort {
            let until = Instant::now() + CLOSE_MAX;
            sender.half().set_deadline(Some(until));
        }
        if kind == Kind::Landed {
            self.timeline.resumed();
        }
        if let Err(fault) = sender.send(frame) {
            tracing::debug!(%kind, %fault, "the source could not be told");
            // Nothing more can be said on this channel.
            self.link.sender = None;
            self.events.push_back(Event::ControlLost(fault));
        }
    }

    fn ask_vmm(&self, task: VmmTask) {
        if let Some(vmm) = &self.vmm {
            vmm.ask(task);
        }
    }

    /// Every living lane is at the end of a round: what is in memory.
    fn close_round(&mut self, round: Round) {
        let Some(landing) = &self.landing else {
            return self.internal("a round before memory");
        };
        let (digest, damaged) = (landing.digest(), landing.damaged_pages());
        self.timeline.rounds += 1;
        tracing::debug!(%round, damaged, %digest, "round closed");
        let closed = Closed {
            handled: self.lanes.handled(),
            digest,
            damaged,
            // All lanes are at their marks: what is not here now does not come in this round (SPEC: DEVSTREAM-7).
            incomplete: self.devices.incomplete(),
            restarts: self.devices.restarts(),
            counts: self.counts(),
        };
        self.events.push_back(Event::Closed(closed));
    }
}

fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}
