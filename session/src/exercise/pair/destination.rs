//! The destination as its driver would have it: one program after another, what the effects of its session do, and what is told of them.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use multifd_wire::frame::{LaneMark, OutcomeState};
use multifd_wire::{
    ChannelKind, Features, Frame, HEADER_BYTES, Header, Incarnation, LaneId, Misbehaved, PageIndex,
    Reason, RegionId, Role, Round, Sequence, Token,
};

use super::back::{Hello, Purpose, Reached};
use super::guest::Memory;
use super::loading::Loader;
use super::network::{Carries, Message};
use super::oracle::{End, Says};
use super::receiving::Receiving;
use super::source::closed;
use super::{MS, Pair, What};
use crate::common::VmmError;
use crate::destination::{Closed, Counts, Effect, Event, Fault, Outcome, Secrets, Session};

/// How long the end waits for the source to close the control channel, so that it reads why.
const CLOSE_MAX: Duration = Duration::from_secs(1);

pub(super) struct Destination {
    /// How often a program was begun here.
    pub(super) program: u32,
    pub(super) session: Option<Session>,
    pub(super) memory: Memory,
    pub(super) damaged: std::collections::BTreeSet<u64>,
    pub(super) slots: BTreeMap<LaneId, Receiving>,
    joining: BTreeMap<(LaneId, Incarnation), usize>,
    pub(super) gate: Round,
    pub(super) counts: Counts,
    pub(super) loaders: Vec<Loader>,
    /// What its threads have said and the control thread has not read.
    notes: VecDeque<Event>,
    events: VecDeque<Event>,
    /// How far frames were handled, which is about to be said.
    counting: Option<Vec<LaneMark>>,
    control: Option<usize>,
    deaf: bool,
    heard: Sequence,
    returning: Option<Hello>,
    asking: Option<Hello>,
    secrets: u8,
    /// The VMM's thread does one thing after another.
    vmm_until: Duration,
    pub(super) vmm_refuses: bool,
    /// It does not answer any more.
    pub(super) vmm_hangs: bool,
    loaded_state: Vec<u8>,
    pub(super) runs: bool,
    pub(super) outcome: Option<End>,
}

impl Destination {
    pub(super) fn new(program: u32, memory: Memory) -> Self {
        Self {
            program,
            session: None,
            memory,
            damaged: std::collections::BTreeSet::new(),
            slots: BTreeMap::new(),
            joining: BTreeMap::new(),
            gate: Round::new(0),
            counts: Counts::default(),
            loaders: Vec::new(),
            notes: VecDeque::new(),
            events: VecDeque::new(),
            counting: None,
            control: None,
            deaf: false,
            heard: Sequence::FIRST,
            returning: None,
            asking: None,
            secrets: 0,
            vmm_until: Duration::ZERO,
            vmm_refuses: false,
            vmm_hangs: false,
            loaded_state: Vec::new(),
            runs: false,
            outcome: None,
        }
    }
}

impl Pair {
    pub(super) fn tell_destination(&mut self, event: Event) {
        if self.hosts[1].gone {
            return;
        }
        if let Some(session) = &mut self.destination.session {
            let effects = session.handle(event, self.now);
            self.destination_does(effects);
        }
    }

    /// Carries effects out. Before it is said how far frames were handled, everything that is in the queue goes first: a give-back for
    /// one of them may be among it (SPEC: BACK-2).
    pub(super) fn destination_does(&mut self, effects: Vec<Effect>) {
        self.carry_out(effects);
        while let Some(marks) = self.destination.counting.take() {
            for _ in 0..self.destination.notes.len() {
                let note = self.destination.notes.pop_front();
                if let (Some(event), Some(session)) = (note, &mut self.destination.session) {
                    let effects = session.handle(event, self.now);
                    self.carry_out(effects);
                }
            }
            if let Some(session) = &mut self.destination.session {
                let effects = session.handle(Event::Handled(marks), self.now);
                self.carry_out(effects);
            }
        }
    }

    /// Passes on what comes of effects, until the session wants nothing more.
    fn carry_out(&mut self, mut effects: Vec<Effect>) {
        loop {
            for effect in effects {
                self.note(|| format!("destination: {effect:?}"));
                self.destination_effect(effect);
            }
            let next = self.destination.events.pop_front();
            let (Some(event), Some(session)) = (next, &mut self.destination.session) else {
                return;
            };
            effects = session.handle(event, self.now);
        }
    }

    /// A thread of the destination says something to the control thread, which reads it in its own time.
    pub(super) fn destination_note(&mut self, event: Event) {
        self.destination.notes.push_back(event);
        let wait = Duration::from_micros(1 + self.dice.below(400));
        self.later(wait, What::Note(self.destination.program));
    }

    pub(super) fn read_note(&mut self, program: u32) {
        if program == self.destination.program
            && let Some(event) = self.destination.notes.pop_front()
        {
            self.tell_destination(event);
        }
    }

    // ── who comes ────────────────────────────────────────────────────────────────────────────────────────────────────

    /// What both sides agree on.
    pub(super) fn features(&self) -> Features {
        let offered = crate::destination::set_up::offered(&self.plan.destination);
        if self.plan.source.reconnect().is_zero() {
            Features::DEVICE_STATE
        } else {
            offered
        }
    }

    /// The first control channel of a session, whose hello is answered.
    pub(super) fn open_session(&mut self, channel: usize) {
        let features = self.features();
        let session = Session::new(self.plan.destination.clone(), features, self.now);
        self.destination.session = Some(session);
        self.take_control(channel);
        let secrets = self.secrets();
        self.tell_destination(Event::Opened(secrets));
    }

    fn take_control(&mut self, channel: usize) {
        self.watch.heard(Role::Destination, self.now);
        self.watch.sets_up();
        let it = &mut self.destination;
        (it.control, it.deaf, it.heard) = (Some(channel), false, Sequence::FIRST);
    }

    fn secrets(&mut self) -> Secrets {
        self.destination.secrets += 1;
        let it = &self.destination;
        let mut ticket = [it.secrets; 16];
        ticket[0] = it.program as u8;
        Secrets {
            ticket: Token::new(ticket),
            resume: Token::new([0xaa; 16]),
        }
    }

    /// A hello on a new control channel.
    pub(super) fn greet(&mut self, hello: Hello) {
        if !self.network.is_open(hello.channel) {
            return;
        }
        if self.hosts[1].gone {
            return self.answer(hello, Reached::Nothing);
        }
        let known = self.destination.session.is_some() && hello.program == self.destination.program;
        match hello.purpose {
            Purpose::Start if self.destination.session.is_some() => {
                self.answer(hello, Reached::Refused(Reason::Busy));
            }
            Purpose::Start => {
                let features = self.features();
                self.answer(hello, Reached::Control(hello.channel, features));
                self.open_session(hello.channel);
            }
            _ if !known => self.answer(hello, Reached::Refused(Reason::WrongSession)),
            Purpose::Resume => {
                self.destination.returning = Some(hello);
                let secrets = self.secrets();
                self.tell_destination(Event::Resuming(secrets));
            }
            Purpose::Ask => {
                self.destination.asking = Some(hello);
                self.tell_destination(Event::Asked);
                self.destination.asking = None;
            }
        }
    }

    /// A lane's hello.
    pub(super) fn lane_hello(&mut self, channel: usize) {
        let Carries::Lane(lane, incarnation) = self.network.channels[channel].carries else {
            return;
        };
        if !self.network.is_open(channel) {
            return;
        }
        if self.hosts[1].gone || self.destination.session.is_none() {
            return self.cut(channel);
        }
        let ticket = self.source.ticket;
        let key = (lane, incarnation);
        self.destination.joining.insert(key, channel);
        self.tell_destination(Event::LaneJoined {
            lane,
            incarnation,
            ticket,
        });
    }

    // ── what comes ───────────────────────────────────────────────────────────────────────────────────────────────────

    pub(super) fn arrive_forth(&mut self, channel: usize, message: Message) {
        if self.hosts[1].gone {
            return;
        }
        if let Carries::Lane(lane, _) = self.network.channels[channel].carries {
            return self.arrive_on(lane, channel, message);
        }
        self.was_read(channel, message.bytes());
        if self.destination.control != Some(channel) || self.destination.deaf {
            return;
        }
        match self.read_forth(&message) {
            Ok(frame) => {
                self.note(|| format!("destination hears {frame:?}"));
                self.watch.heard(Role::Destination, self.now);
                let Some(session) = &mut self.destination.session else {
                    return;
                };
                let effects = session.frame(&frame, &message.body, self.now);
                self.destination_does(effects);
            }
            Err(fault) => {
                self.destination.deaf = true;
                self.tell_destination(Event::ControlLost(fault));
            }
        }
    }

    fn read_forth<'m>(&mut self, message: &'m Message) -> Result<Frame<'m>, Fault> {
        let (header, table) = message.head.split_first_chunk::<HEADER_BYTES>().unwrap();
        let header = Header::decode(header)?;
        header.check_sequence(self.destination.heard)?;
        let (kind, from, on) = (header.kind(), Role::Source, ChannelKind::Control);
        if !kind.may_travel(from, on) {
            return Err(Misbehaved::Direction { kind, from, on }.into());
        }
        self.destination.heard = self.destination.heard.next();
        let frame = Frame::decode(&header, table)?;
        header.check_body(&message.body)?;
        Ok(frame)
    }

    pub(super) fn destination_sees_end(&mut self, channel: usize) {
        if self.hosts[1].gone {
            return;
        }
        match self.network.channels[channel].carries {
            Carries::Control if self.destination.control == Some(channel) => {
                self.destination.deaf = true;
                self.tell_destination(Event::ControlLost(Fault::Channel(closed())));
            }
            Carries::Lane(lane, _) => {
                let slot = self.destination.slots.get(&lane);
                if slot.is_some_and(|slot| slot.channel == channel && !slot.ended) {
                    self.end_lane(lane, Fault::Channel(closed()));
                }
            }
            Carries::Control => {}
        }
    }

    // ── effects ──────────────────────────────────────────────────────────────────────────────────────────────────────

    pub(super) fn marks(&self) -> Vec<LaneMark> {
        let mark = |(lane, it): (&LaneId, &Receiving)| LaneMark {
            lane: *lane,
            incarnation: it.incarnation,
            frames: it.handled,
        };
        self.destination.slots.iter().map(mark).collect()
    }

    /// The VMM's thread does something, and says so when it is done; unless it refuses, or never comes back.
    fn ask_vmm(&mut self, step: &'static str, most_ms: u64, done: Event) {
        if std::mem::take(&mut self.destination.vmm_hangs) {
            self.done.vmm_hung = true;
            return;
        }
        let refuses = std::mem::take(&mut self.destination.vmm_refuses);
        self.done.vmm_refused |= refuses;
        let source = VmmError::new("no");
        let done = match done {
            Event::Loaded(_) if refuses => Event::Loaded(Err(Fault::Vmm { step, source })),
            _ if refuses => Event::Failed(Fault::Vmm { step, source }),
            done => done,
        };
        let at = self.now.max(self.destination.vmm_until) + self.dice.ms(most_ms);
        self.destination.vmm_until = at;
        let vmm = What::Vmm(self.destination.program, done);
        self.later(at.saturating_sub(self.now), vmm);
    }

    pub(super) fn vmm_did(&mut self, program: u32, event: Event) {
        if program == self.destination.program {
            // What was counted is what is counted when it says so.
            let event = match event {
                Event::Resumed(_) => Event::Resumed(self.destination.counts),
                event => event,
            };
            self.tell_destination(event);
        }
    }

    fn destination_effect(&mut self, effect: Effect) {
        match effect {
            Effect::Send(frame) => {
                self.check_counts(&frame);
                if let Some(channel) = self.destination.control {
                    let message = Message::head(frame.bytes().to_vec());
                    self.send(channel, Role::Destination, message);
                }
            }
            Effect::Prepare {
                layout, devices, ..
            } => {
                if layout != self.layout && self.is_honest() {
                    self.violation("the machine is another one than the source's");
                }
                self.expect_devices(&devices);
                self.ask_vmm("build the machine", 10, Event::MachineReady);
            }
            Effect::Admit {
                lane,
                incarnation,
                begins,
            } => {
                let Some(channel) = self.destination.joining.remove(&(lane, incarnation)) else {
                    return self.violation("a lane was let in that is not here");
                };
                if !self.network.is_open(channel) && self.dice.one_in(2) {
                    let unheard = Event::LaneUnheard { lane, incarnation };
                    return self.destination.events.push_back(unheard);
                }
                let slot = Receiving::new(incarnation, channel, begins);
                self.destination.slots.insert(lane, slot);
                let wait = self.transit(channel, Role::Destination, 256);
                self.later(wait, What::LaneAnswer(channel, None));
                self.read_lane(lane);
            }
            Effect::TurnAway {
                lane,
                incarnation,
                reason,
                ..
            } => {
                if let Some(channel) = self.destination.joining.remove(&(lane, incarnation)) {
                    let wait = self.transit(channel, Role::Destination, 256);
                    self.later(wait, What::LaneAnswer(channel, Some(reason)));
                }
            }
            Effect::CloseLane(lane) => {
                if let Some(channel) = self.destination.slots.get(&lane).map(|it| it.channel) {
                    self.cut(channel);
                    // Also when it was cut before. Some threads take their time, and the source may have given up the next attempt by then.
                    let wait = self.dice.ms(5);
                    let wait = wait
                        * if wait.as_micros().is_multiple_of(8) {
                            80
                        } else {
                            1
                        };
                    self.later(wait, What::DestinationSeesEnd(channel));
                }
            }
            Effect::StartLanes(round) => {
                self.start_loaders();
                let slots = self.destination.slots.values_mut();
                slots.for_each(|slot| slot.start(round));
                self.read_all();
            }
            Effect::CountHandled => self.destination.counting = Some(self.marks()),
            Effect::CloseRound(_) => self.close_round(),
            Effect::OpenGate(round) => {
                self.destination.gate = round;
                self.read_all();
            }
            Effect::Load { states } => {
                let octets = states.first().map(|state| state.bytes.to_vec());
                self.destination.loaded_state = octets.unwrap_or_default();
                self.ask_vmm("load its state", 5, Event::Loaded(Ok(())));
                self.memory_landed();
            }
            Effect::Resume(_) => self.run_guest(),
            Effect::Suspend => self.suspend(),
            Effect::SettleLanes => self.settle_lanes(),
            Effect::AcceptResume => {
                if let Some(hello) = self.destination.returning.take() {
                    self.take_control(hello.channel);
                    let features = self.features();
                    self.answer(hello, Reached::Control(hello.channel, features));
                }
            }
            Effect::RefuseResume { reason, .. } => {
                if let Some(hello) = self.destination.returning.take() {
                    self.answer(hello, Reached::Refused(reason));
                }
            }
            Effect::Answer(state) => self.answer_question(state),
            Effect::Discard => {}
            Effect::Finish(outcome) => {
                self.destination.outcome = Some(match outcome {
                    Outcome::Running => End::new(Says::Running, self.now),
                    Outcome::Failed(error) => End::of_destination(Says::Failed, &error, self.now),
                    Outcome::Stranded(error) => {
                        End::of_destination(Says::Stranded, &error, self.now)
                    }
                });
                self.later(MS, What::DestinationEnds(self.destination.program));
            }
        }
    }

    fn close_round(&mut self) {
        let closed = Closed {
            handled: self.marks(),
            digest: self.destination.memory.digest,
            damaged: self.destination.damaged.len() as u64,
            incomplete: self.incomplete(),
            restarts: self.restarts(),
            counts: self.destination.counts,
        };
        self.destination.events.push_back(Event::Closed(closed));
    }

    fn run_guest(&mut self) {
        if self.is_honest() {
            if self.source.guest.runs || !self.done.committed {
                self.violation("the destination runs what the source did not give away");
            }
            if self.done.answer == Some(OutcomeState::NotCommitted) {
                self.violation("the destination runs a guest after \"not committed\"");
            }
            if self.destination.memory.pages != self.source.guest.memory.pages {
                self.violation("the guest at the destination has another memory");
            }
            if self.destination.loaded_state != self.source.guest.saved {
                self.violation("the guest at the destination has another state");
            }
            self.compare_devices();
        }
        if !self.destination.damaged.is_empty() {
            self.violation("the destination runs a guest with damaged pages");
        }
        if self.destination.runs {
            self.violation("the destination runs a guest twice");
        }
        self.destination.runs = true;
        self.watch.owns(self.now);
        self.ask_vmm("run the guest", 5, Event::Resumed(Counts::default()));
    }

    fn suspend(&mut self) {
        if let Some(control) = self.destination.control.take() {
            self.cut(control);
        }
        let joining = std::mem::take(&mut self.destination.joining);
        let lanes = self.destination.slots.values().map(|it| it.channel);
        let channels: Vec<usize> = joining.into_values().chain(lanes).collect();
        channels.into_iter().for_each(|channel| self.cut(channel));
        self.memory_moves_on();
    }

    /// Every thread of a lane is waited for; what it has read whole still lands.
    fn settle_lanes(&mut self) {
        let lanes: Vec<LaneId> = self.destination.slots.keys().copied().collect();
        for lane in lanes {
            if !self.destination.slots[&lane].ended {
                self.end_lane(lane, Fault::Channel(closed()));
            }
        }
        let marks = self.marks();
        self.destination.slots.clear();
        self.break_streams_off();
        let damaged = self.destination.damaged.iter().map(|page| {
            let (region, first) = (RegionId::new(0), PageIndex::new(*page));
            self.layout.run(region, first, 1).unwrap()
        });
        let damaged = damaged.collect();
        let settled = Event::LanesSettled { marks, damaged };
        self.destination.events.push_back(settled);
    }

    fn answer_question(&mut self, state: OutcomeState) {
        let Some(hello) = self.destination.asking.take() else {
            return;
        };
        self.check_answer(state);
        self.answer(hello, Reached::Answer(state));
        self.destination.events.push_back(Event::Answered(state));
    }

    /// A program whose session is over goes on until the source has closed, and as long as it may have to ask.
    pub(super) fn destination_ends(&mut self, program: u32) {
        let Some(end) = self.destination.outcome.as_ref().map(|end| end.at) else {
            return;
        };
        if program != self.destination.program || self.hosts[1].gone {
            return;
        }
        let closes = (!self.destination.deaf && self.destination.control.is_some())
            .then_some(end + CLOSE_MAX);
        let session = self.destination.session.as_ref();
        let until = session.and_then(Session::remembers_until).max(closes);
        if let Some(until) = until.filter(|until| *until > self.now) {
            let wait = (until - self.now).min(100 * MS);
            return self.later(wait, What::DestinationEnds(program));
        }
        self.hosts[1].gone = true;
        let lanes = self.destination.slots.values().map(|it| it.channel);
        let lanes: Vec<usize> = lanes.collect();
        lanes.into_iter().for_each(|channel| self.cut(channel));
        if let Some(channel) = self.destination.control {
            // What was said last still arrives.
            let wait = self.transit(channel, Role::Destination, 1);
            self.later(wait, What::SourceSeesEnd(channel));
        }
    }
}
