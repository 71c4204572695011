//! Both roles in one thread, joined by encoded frames over a made-up network, on made-up time.
//!
//! Memory is a number per page; the guest writes some while it runs. Channels keep their order, each has a delay of its own, and all of
//! them can be cut; what is on its way then is lost. A page's body can be changed on its way. A seed says everything, so it replays.
//!
//! What must hold: never two owners, and none without COMMIT; a guest that runs at the destination has the memory that it had when it was
//! paused; one that stays at the source runs there; no honest side accuses the other; what nothing happened to succeeds; it ends.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::time::Duration;

use multifd_wire::digest::page_value;
use multifd_wire::frame::{
    Abort, Commit, Devices, Final, LaneMark, OutcomeState, Pages, RawRegion, RawRun, Regions,
    SetupEnd, Switchover, VmState, blob_parts,
};
use multifd_wire::{
    Body, ChannelRef, Digest, Features, Frame, HEADER_BYTES, Header, Incarnation, LaneId, Layout,
    PAGE_BYTES_U64, PageIndex, PageRun, PageValues, Phase, Region, RegionId, Round, Sequence,
    Token,
};
use zerocopy::byteorder::little_endian::U32;

use crate::common::ChannelFault;
use crate::destination::lane::{Begins, Lane as Landed, Mark};
use crate::{destination as rx, source as tx};

const FEATURES: Features = Features::DEVICE_STATE.union(Features::RESUME);
const MS: Duration = Duration::from_millis(1);

/// A migration that takes more steps than this never ends.
const STEPS_MAX: u32 = 200_000;

/// How one migration went.
#[derive(Debug)]
pub struct Run {
    /// How the source says that it ended.
    pub outcome: &'static str,
    /// Faults that happened.
    pub faults: u32,
    /// What must not be.
    pub violations: Vec<String>,
}

/// Migrates once, with what the seed says.
#[must_use]
pub fn pair(seed: u64) -> Run {
    let mut pair = Pair::new(seed);
    pair.run();
    pair.judge()
}

/// Numbers that follow from a seed (splitmix64).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, most: u64) -> u64 {
        self.next() % most.max(1)
    }

    fn one_in(&mut self, many: u64) -> bool {
        self.below(many) == 0
    }

    fn ms(&mut self, most: u64) -> Duration {
        Duration::from_micros(1 + self.below(most * 1000))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Control,
    Lane(LaneId, Incarnation),
}

/// One connection.
struct Channel {
    kind: Kind,
    delay: Duration,
    open: bool,
    /// When what was sent last arrives, forth and back: order is kept.
    arrives: [Duration; 2],
}

/// A frame on its way: the bytes of its head, and its body (for PAGES one number per page).
#[derive(Debug, Clone)]
struct Message {
    head: Vec<u8>,
    body: Vec<u8>,
    pages: Vec<u64>,
}

#[derive(Debug)]
enum What {
    Forth(usize, Message),
    Back(usize, Message),
    /// This side sees that the channel is cut.
    SourceSeesEnd(usize),
    DestinationSeesEnd(usize),
    /// A hello arrives at the destination, or its answer at the source.
    LaneHello(usize),
    LaneAccepted(usize),
    LaneRefused(usize),
    Resume,
    ResumeAccepted(usize),
    Ask,
    Answered(OutcomeState),
    Refused,
    Source(tx::event::Event),
    Destination(rx::Event),
    Write,
    Fault,
}

struct Timed(Duration, u64, What);

impl PartialEq for Timed {
    fn eq(&self, other: &Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}
impl Eq for Timed {}
impl PartialOrd for Timed {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Timed {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

/// A lane as the source's thread would have it.
struct Sending {
    machine: tx::lane::Lane,
    channel: usize,
    up: bool,
    /// When it says that it has encoded what it was given last: a thread says such things in order.
    encoded_at: Duration,
}

struct Source {
    session: tx::Session,
    memory: Vec<u64>,
    /// Written since the last collection; and dirty.
    written: BTreeSet<u64>,
    dirty: BTreeSet<u64>,
    values: PageValues,
    digest: Digest,
    lanes: BTreeMap<LaneId, Sending>,
    before: BTreeMap<LaneId, tx::lane::Lane>,
    /// The round that is under way, and its pages that no lane has taken.
    open: Option<(Round, bool, VecDeque<u64>)>,
    sent_bytes: u64,
    control: Option<usize>,
    next: Sequence,
    heard: Sequence,
    ticket: Token,
    runs: bool,
    committed: bool,
    outcome: Option<(&'static str, Option<&'static str>)>,
}

/// A lane as the destination's thread would have it.
struct Receiving {
    incarnation: Incarnation,
    channel: usize,
    machine: Option<Landed>,
    begins: Option<Begins>,
    /// It waits at the gate for this round.
    waits: Option<Round>,
    inbox: VecDeque<Message>,
    handled: u64,
}

struct Destination {
    session: rx::Session,
    memory: Vec<u64>,
    values: PageValues,
    digest: Digest,
    damaged: BTreeSet<u64>,
    lanes: BTreeMap<LaneId, Receiving>,
    joining: BTreeMap<(LaneId, Incarnation), usize>,
    /// How far lanes were handled that have ended since the channels were settled last.
    ended: BTreeMap<LaneId, LaneMark>,
    gate: Round,
    counts: rx::Counts,
    control: Option<usize>,
    heard: Sequence,
    returning: Option<usize>,
    asked: bool,
    tickets: u8,
    runs: bool,
    gone: bool,
    outcome: Option<(&'static str, Option<&'static str>)>,
}

struct Pair {
    dice: Dice,
    now: Duration,
    number: u64,
    queue: BinaryHeap<Reverse<Timed>>,
    channels: Vec<Channel>,
    layout: Layout,
    source: Source,
    destination: Destination,
    faults: u32,
    /// One of them that a migration may fail of.
    grave: bool,
    flips: u32,
    violations: Vec<String>,
}

impl Pair {
    fn new(seed: u64) -> Self {
        let mut dice = Dice(seed);
        let pages = 4 + dice.below(20);
        let layout = Layout::new([Region {
            id: RegionId::new(0),
            guest_address: 0,
            bytes: pages * PAGE_BYTES_U64,
        }])
        .unwrap();
        let config = tx::Config::builder()
            .channels(1 + dice.below(3) as u32)
            .downtime_limit(Duration::from_secs(30))
            .build()
            .unwrap();
        let values = || PageValues::new(&layout).unwrap();
        let source = Source {
            session: tx::Session::new(config, pages, Duration::ZERO),
            memory: (0..pages).map(|page| page + 1).collect(),
            written: BTreeSet::new(),
            dirty: BTreeSet::new(),
            values: values(),
            digest: Digest::EMPTY,
            lanes: BTreeMap::new(),
            before: BTreeMap::new(),
            open: None,
            sent_bytes: 0,
            control: None,
            next: Sequence::FIRST,
            heard: Sequence::FIRST,
            ticket: Token::NONE,
            runs: true,
            committed: false,
            outcome: None,
        };
        let destination = Destination {
            session: rx::Session::new(rx::Config::default(), FEATURES, Duration::ZERO),
            memory: vec![0; pages as usize],
            values: values(),
            digest: Digest::EMPTY,
            damaged: BTreeSet::new(),
            lanes: BTreeMap::new(),
            joining: BTreeMap::new(),
            ended: BTreeMap::new(),
            gate: Round::new(0),
            counts: rx::Counts::default(),
            control: None,
            heard: Sequence::FIRST,
            returning: None,
            asked: false,
            tickets: 0,
            runs: false,
            gone: false,
            outcome: None,
        };
        let mut pair = Self {
            dice,
            now: Duration::ZERO,
            number: 0,
            queue: BinaryHeap::new(),
            channels: Vec::new(),
            layout,
            source,
            destination,
            faults: 0,
            grave: false,
            flips: 0,
            violations: Vec::new(),
        };
        for _ in 0..pair.dice.below(4) {
            let at = pair.dice.ms(400);
            pair.later(at, What::Fault);
        }
        for _ in 0..pair.dice.below(30) {
            let at = pair.dice.ms(300);
            pair.later(at, What::Write);
        }
        pair
    }

    fn later(&mut self, wait: Duration, what: What) {
        self.number += 1;
        self.queue
            .push(Reverse(Timed(self.now + wait, self.number, what)));
    }

    fn violation(&mut self, text: impl Into<String>) {
        self.violations.push(text.into());
    }

    fn run(&mut self) {
        let control = self.connect(Kind::Control);
        self.source.control = Some(control);
        self.destination.control = Some(control);
        self.source
            .session
            .connected(FEATURES, Duration::MAX, self.now);
        let secrets = self.secrets();
        self.tell_destination(rx::Event::Opened(secrets));
        for step in 0.. {
            let source_over = self.source.outcome.is_some();
            let destination_over = self.destination.outcome.is_some() || self.destination.gone;
            if source_over && destination_over || !self.violations.is_empty() {
                return;
            }
            if step > STEPS_MAX {
                return self.violation(format!("it does not end (at {:?})", self.now));
            }
            self.step(source_over, destination_over);
        }
    }

    fn step(&mut self, source_over: bool, destination_over: bool) {
        let next = self.queue.peek().map_or(Duration::MAX, |next| next.0.0);
        let source_due = if source_over {
            Duration::MAX
        } else {
            self.source.session.due()
        };
        let destination_due = if destination_over {
            Duration::MAX
        } else {
            self.destination.session.next_deadline()
        };
        let due = source_due.min(destination_due);
        if next == Duration::MAX && due == Duration::MAX {
            return self.violation("everybody waits for another");
        }
        if next > due {
            self.now = self.now.max(due);
            if source_due <= destination_due {
                let effects = self.source.session.tick(self.now);
                self.source_does(effects);
            } else {
                let counts = self.destination.counts;
                self.tell_destination(rx::Event::Tick(counts));
            }
            return;
        }
        if let Some(Reverse(Timed(at, _, what))) = self.queue.pop() {
            self.now = self.now.max(at);
            self.happen(what);
        }
    }

    // ── the network ──────────────────────────────────────────────────────────────────────────────────────────────────

    fn connect(&mut self, kind: Kind) -> usize {
        let delay = self.dice.ms(5);
        self.channels.push(Channel {
            kind,
            delay,
            open: true,
            arrives: [Duration::ZERO; 2],
        });
        self.channels.len() - 1
    }

    /// How long a message takes from now, so that it arrives after the one before.
    fn transit(&mut self, channel: usize, back: usize) -> Duration {
        let stall = if self.dice.one_in(40) {
            self.dice.ms(60)
        } else {
            Duration::ZERO
        };
        let channel = &mut self.channels[channel];
        let at = (self.now + channel.delay + stall).max(channel.arrives[back]);
        channel.arrives[back] = at;
        at - self.now
    }

    fn cut(&mut self, channel: usize) {
        if std::mem::replace(&mut self.channels[channel].open, false) {
            let (here, there) = (self.dice.ms(20), self.dice.ms(20));
            self.later(here, What::SourceSeesEnd(channel));
            self.later(there, What::DestinationSeesEnd(channel));
        }
    }

    fn secrets(&mut self) -> rx::Secrets {
        self.destination.tickets += 1;
        let ticket = Token::new([self.destination.tickets; 16]);
        rx::Secrets {
            ticket,
            resume: Token::new([0xaa; 16]),
        }
    }

    fn happen(&mut self, what: What) {
        let destination_gone = self.destination.gone;
        match what {
            What::Forth(channel, message) if self.channels[channel].open => {
                if !destination_gone {
                    self.arrive_forth(channel, message);
                }
            }
            What::Back(channel, message) if self.channels[channel].open => {
                self.arrive_back(channel, &message);
            }
            What::Forth(..) | What::Back(..) => {}
            What::SourceSeesEnd(channel) => self.source_sees_end(channel),
            What::DestinationSeesEnd(channel) => self.destination_sees_end(channel),
            What::LaneHello(channel) => {
                if let Kind::Lane(lane, incarnation) = self.channels[channel].kind
                    && self.channels[channel].open
                {
                    let ticket = self.source.ticket;
                    self.destination
                        .joining
                        .insert((lane, incarnation), channel);
                    self.tell_destination(rx::Event::LaneJoined {
                        lane,
                        incarnation,
                        ticket,
                    });
                }
            }
            What::LaneAccepted(channel) => {
                if let Kind::Lane(lane, incarnation) = self.channels[channel].kind
                    && let Some(sending) = self.source.lanes.get_mut(&lane)
                    && sending.channel == channel
                    && self.channels[channel].open
                {
                    sending.up = true;
                    self.tell_source(tx::event::Event::LaneUp { lane, incarnation });
                }
            }
            What::LaneRefused(channel) => self.cut(channel),
            What::Resume => {
                if destination_gone {
                    return self.later(MS, What::Refused);
                }
                let channel = self.connect(Kind::Control);
                self.destination.returning = Some(channel);
                let secrets = self.secrets();
                self.tell_destination(rx::Event::Resuming(secrets));
            }
            What::ResumeAccepted(channel) => {
                if self.source.session.phase() != Phase::Suspended {
                    return;
                }
                if !self.channels[channel].open {
                    // Lost again on the way: it tries once more.
                    self.later(20 * MS, What::Resume);
                } else if self.source.outcome.is_none() {
                    self.source.control = Some(channel);
                    (self.source.next, self.source.heard) = (Sequence::FIRST, Sequence::FIRST);
                    self.source
                        .session
                        .connected(FEATURES, Duration::MAX, self.now);
                    self.tell_source(tx::event::Event::Reconnected);
                }
            }
            What::Ask => {
                if destination_gone {
                    return self.later(MS, What::Refused);
                }
                self.destination.asked = true;
                self.tell_destination(rx::Event::Asked);
                if std::mem::take(&mut self.destination.asked) {
                    self.later(MS, What::Refused);
                }
            }
            What::Answered(state) => {
                self.tell_source(tx::event::Event::Answered(state));
                if self.source.outcome.is_none() && state == OutcomeState::CommittedNotRunning {
                    self.later(10 * MS, What::Ask);
                }
            }
            What::Refused => {
                let fault = tx::Fault::DestinationLost {
                    reason: multifd_wire::Reason::WrongSession,
                    text: "it is over there".into(),
                };
                let error = tx::Error::new(Phase::Suspended, fault);
                self.tell_source(tx::event::Event::Forgotten(error));
            }
            What::Source(event) => self.tell_source(event),
            What::Destination(event) => self.tell_destination(event),
            What::Write => {
                if self.source.runs {
                    let page = self.dice.below(self.source.memory.len() as u64);
                    self.source.memory[page as usize] = self.dice.next();
                    self.source.written.insert(page);
                }
            }
            What::Fault => self.strike(),
        }
    }

    fn strike(&mut self) {
        self.faults += 1;
        // Before GRANT nothing is kept, and a loss is the end.
        self.grave |= self.source.ticket == Token::NONE;
        let open: Vec<usize> = (0..self.channels.len())
            .filter(|channel| self.channels[*channel].open)
            .collect();
        match self.dice.below(8) {
            0 | 1 => {
                let lanes: Vec<usize> = open
                    .into_iter()
                    .filter(|channel| self.channels[*channel].kind != Kind::Control)
                    .collect();
                if !lanes.is_empty() {
                    let which = self.dice.below(lanes.len() as u64) as usize;
                    self.cut(lanes[which]);
                }
            }
            2 | 3 => open.into_iter().for_each(|channel| self.cut(channel)),
            4 => {
                for channel in open {
                    if self.channels[channel].kind == Kind::Control {
                        self.cut(channel);
                    }
                }
            }
            5 => self.flips += 1,
            6 => {
                self.grave = true;
                if self.dice.one_in(2) {
                    self.tell_source(tx::event::Event::Cancel);
                } else {
                    self.tell_destination(rx::Event::Cancel);
                }
            }
            _ if self.dice.one_in(2) => {
                // The destination's program dies.
                self.grave = true;
                self.destination.gone = true;
                open.into_iter().for_each(|channel| self.cut(channel));
            }
            _ => self.source.written.extend([0]),
        }
    }

    // ── the source ───────────────────────────────────────────────────────────────────────────────────────────────────

    fn tell_source(&mut self, event: tx::event::Event) {
        if self.source.outcome.is_none() {
            let effects = self.source.session.handle(event, self.now);
            self.source_does(effects);
        }
    }

    fn source_does(&mut self, effects: Vec<tx::event::Effect>) {
        for effect in effects {
            self.source_effect(effect);
        }
    }

    fn arrive_back(&mut self, channel: usize, message: &Message) {
        if self.source.control != Some(channel) || self.source.outcome.is_some() {
            return;
        }
        let (header, table) = message.head.split_first_chunk::<HEADER_BYTES>().unwrap();
        let header = Header::decode(header).unwrap();
        if header.check_sequence(self.source.heard).is_err() {
            return self.violation("the destination's frames are not in order");
        }
        self.source.heard = self.source.heard.next();
        let frame = Frame::decode(&header, table).unwrap();
        let effects = self
            .source
            .session
            .frame(ChannelRef::Control, &frame, self.now);
        self.source_does(effects);
    }

    fn source_sees_end(&mut self, channel: usize) {
        match self.channels[channel].kind {
            Kind::Control if self.source.control == Some(channel) => {
                let phase = self.source.session.phase();
                let error = tx::Error::new(phase, tx::Fault::Channel(closed()));
                let lost = tx::event::Event::Lost(error.at(ChannelRef::Control));
                self.tell_source(lost);
            }
            Kind::Lane(lane, incarnation)
                if self
                    .source
                    .lanes
                    .get(&lane)
                    .is_some_and(|it| it.channel == channel) =>
            {
                self.tell_source(tx::event::Event::LaneEnded {
                    lane,
                    incarnation,
                    fault: Some(tx::Fault::Channel(closed())),
                });
            }
            _ => {}
        }
    }

    fn say<'a>(&mut self, frame: impl Into<Frame<'a>>, body: &[u8]) {
        let Some(channel) = self.source.control else {
            return;
        };
        let with = if body.is_empty() {
            Body::None
        } else {
            Body::Octets(body)
        };
        let mut head = Vec::new();
        frame
            .into()
            .encode(self.source.next, with, &mut head)
            .unwrap();
        self.source.next = self.source.next.next();
        let wait = self.transit(channel, 0);
        let message = Message {
            head,
            body: body.to_vec(),
            pages: Vec::new(),
        };
        self.later(wait, What::Forth(channel, message));
    }

    fn source_effect(&mut self, effect: tx::event::Effect) {
        use tx::event::{Effect, Event};
        match effect {
            Effect::Granted { grant, .. } => self.source.ticket = grant.ticket,
            Effect::SendSetup { lanes } => {
                let pages = self.source.memory.len() as u64;
                let regions = [RawRegion::from(Region {
                    id: RegionId::new(0),
                    guest_address: 0,
                    bytes: pages * PAGE_BYTES_U64,
                })];
                self.say(Regions { regions: &regions }, &[]);
                self.say(Devices { devices: &[] }, &[]);
                let end = SetupEnd {
                    configs: 0,
                    regions: 1,
                    devices: 0,
                    lanes,
                    memory_bytes: pages * PAGE_BYTES_U64,
                };
                self.say(end, &[]);
            }
            Effect::SendKeepAlive(alive) => self.say(alive, &[]),
            Effect::SendLaneDown(down) => self.say(down, &[]),
            Effect::DialLane {
                lane, incarnation, ..
            } => {
                let channel = self.connect(Kind::Lane(lane, incarnation));
                let machine = tx::lane::Lane::new(lane, incarnation);
                let sending = Sending {
                    machine,
                    channel,
                    up: false,
                    encoded_at: Duration::ZERO,
                };
                self.source.lanes.insert(lane, sending);
                let wait = self.transit(channel, 0);
                self.later(wait, What::LaneHello(channel));
            }
            Effect::LaneBack { lane, behind, .. } => self.lane_back(lane, &behind),
            Effect::CloseLane { lane } | Effect::LaneGone { lane, .. } => {
                if let Some(channel) = self.source.lanes.get(&lane).map(|it| it.channel) {
                    self.cut(channel);
                }
            }
            Effect::SettleLane { lane } => {
                if let Some(sending) = self.source.lanes.remove(&lane) {
                    self.cut(sending.channel);
                    let pages = self.give_back(sending.machine.die());
                    self.tell_source(Event::LaneLost { pages });
                }
            }
            Effect::SettleBefore { lanes } => {
                for (lane, frames) in lanes {
                    if let Some(machine) = self.source.before.get_mut(&lane)
                        && let Err(error) = machine.acked(frames)
                    {
                        let of = machine.incarnation();
                        self.violation(format!("LANDED, lane {lane}.{of}: {error}"));
                    }
                }
                for (_, machine) in std::mem::take(&mut self.source.before) {
                    let _ = self.give_back(machine.die());
                }
            }
            Effect::LookAtLanes => {
                let lanes = self.source.lanes.iter().filter(|(_, it)| it.up);
                let seen = lanes.map(|(lane, it)| tx::Seen {
                    lane: *lane,
                    acked: it.machine.acked_frames(),
                    oldest: it.machine.oldest_round(),
                    unacked_bytes: it.machine.unacked_octets(),
                });
                let seen = Event::LanesSeen(seen.collect());
                self.tell_source(seen);
            }
            Effect::Acknowledged(marks) => {
                let mut bytes = 0;
                for mark in marks {
                    let sending = self.source.lanes.get_mut(&mark.lane);
                    let newest = |it: &&mut Sending| it.machine.incarnation() == mark.incarnation;
                    if let Some(sending) = sending.filter(newest) {
                        match sending.machine.acked(mark.frames) {
                            Ok(settled) => bytes += settled.octets,
                            Err(error) => self.violation(format!("ACK: {error}")),
                        }
                    }
                }
                self.tell_source(Event::Acked { bytes });
            }
            Effect::GiveBack { runs, .. } => {
                for run in runs {
                    let run = self.layout.admit(&run).unwrap();
                    self.source.dirty.extend(pages_of(run));
                }
            }
            Effect::Begin { .. } => {
                self.source.dirty = (0..self.source.memory.len() as u64).collect();
                self.tell_source(Event::Begun);
            }
            Effect::RoundEncoded => {
                let lanes = self.source.lanes.values();
                let unacked_octets = lanes.map(|it| it.machine.unacked_octets()).sum();
                let octets = std::mem::take(&mut self.source.sent_bytes);
                self.tell_source(Event::Encoded {
                    octets,
                    unacked_octets,
                });
            }
            Effect::OpenRound { round, last } => self.open_round(round, last),
            Effect::Collect { .. } => {
                let written = std::mem::take(&mut self.source.written);
                self.source.dirty.extend(written);
                let pages = self.source.dirty.len() as u64;
                self.tell_source(Event::Collected { pages });
            }
            Effect::Pause => {
                self.source.runs = false;
                self.tell_source(Event::Paused);
            }
            Effect::AnnounceSwitchover { round } => {
                self.say(Switchover { final_round: round }, &[])
            }
            Effect::Save => {
                let body = b"state";
                let blob = blob_parts(1, 1, 0, body).unwrap().next().unwrap().0;
                self.say(VmState { blob }, body);
                self.tell_source(Event::Saved);
            }
            Effect::SendFinal { round } => {
                let digest = self.source.digest;
                let last = Final {
                    final_round: round,
                    states: 1,
                    digest,
                    memory_pages: self.source.memory.len() as u64,
                };
                self.say(last, &[]);
                self.tell_source(Event::FinalSent {
                    digest: digest.value(),
                });
            }
            Effect::Commit => {
                self.source.committed = true;
                let digest = self.source.digest;
                self.say(Commit { digest }, &[]);
            }
            Effect::Disconnect => self.disconnect(),
            Effect::Reconnect { .. } => {
                let wait = self.dice.ms(30);
                self.later(wait, What::Resume);
            }
            Effect::Ask { .. } => {
                let wait = self.dice.ms(30);
                self.later(wait, What::Ask);
            }
            Effect::Abort {
                reason,
                phase,
                channel,
                text,
            } => {
                let text =
                    multifd_wire::Text::<{ multifd_wire::limits::TEXT_BYTES_MAX }>::clip(&text);
                let abort = Abort {
                    reason,
                    phase,
                    channel,
                    text: text.as_str(),
                };
                self.say(abort, &[]);
            }
            Effect::Reclaim { .. } => {
                if self.destination.runs {
                    self.violation("the guest is taken back although it runs at the destination");
                }
                self.source.runs = true;
            }
            Effect::Finish(outcome) => {
                use tx::event::Outcome;
                self.source.outcome = Some(match outcome {
                    Outcome::Migrated => ("migrated", None),
                    Outcome::Failed(error) => ("failed", Some(error.code())),
                    Outcome::Cancelled(error) => ("cancelled", Some(error.code())),
                    Outcome::Stranded(error) => ("stranded", Some(error.code())),
                    Outcome::Unknown(error) => ("unknown", Some(error.code())),
                });
                if let Some(channel) = self.source.control {
                    // What was said last still arrives.
                    let wait = self.transit(channel, 0) + 50 * MS;
                    self.later(wait, What::DestinationSeesEnd(channel));
                }
            }
            _ => {}
        }
    }

    /// Puts pages back into the dirty set, and says how many it has then.
    fn give_back(&mut self, runs: Vec<PageRun>) -> u64 {
        let before = self.source.dirty.len();
        for run in runs {
            self.source.dirty.extend(pages_of(run));
        }
        (self.source.dirty.len() - before) as u64
    }

    fn disconnect(&mut self) {
        if let Some(control) = self.source.control.take() {
            self.cut(control);
        }
        for (lane, sending) in std::mem::take(&mut self.source.lanes) {
            self.cut(sending.channel);
            // Before LANDED nothing is sent on the lanes of a resume (SPEC: RESUME-11): what counts is the one before, and that may have
            // been settled by LANE_DOWN, so that no ledger is left.
            if sending.machine.unacked_frames() > 0 || sending.machine.acked_frames() > 0 {
                self.source.before.insert(lane, sending.machine);
            }
        }
        if let Some((_, _, pages)) = self.source.open.take() {
            self.source.dirty.extend(pages);
        }
    }

    fn open_round(&mut self, round: Round, last: bool) {
        let pages: VecDeque<u64> = std::mem::take(&mut self.source.dirty).into_iter().collect();
        self.source.open = Some((round, last, pages));
        let up: Vec<LaneId> = {
            let lanes = self.source.lanes.iter();
            let open = lanes.filter(|(_, it)| it.up && self.channels[it.channel].open);
            open.map(|(lane, _)| *lane).collect()
        };
        for (place, lane) in up.iter().enumerate() {
            let share = if place + 1 == up.len() { usize::MAX } else { 3 };
            self.send_round(*lane, share);
        }
    }

    fn lane_back(&mut self, lane: LaneId, behind: &[(Round, bool)]) {
        for (round, last) in behind {
            if let Some(sending) = self.source.lanes.get_mut(&lane) {
                let _ = sending.machine.begin_round(*round, *last);
                let (mark, sequence) = sending.machine.end_round().unwrap();
                self.send_on(lane, mark.into(), sequence, Vec::new());
            }
        }
        if self.source.open.is_some() {
            self.send_round(lane, usize::MAX);
        }
    }

    /// A lane takes its share of the open round, and ends it.
    fn send_round(&mut self, lane: LaneId, share: usize) {
        let Some((round, last, _)) = self.source.open else {
            return;
        };
        let Some(sending) = self.source.lanes.get_mut(&lane) else {
            return;
        };
        let incarnation = sending.machine.incarnation();
        if sending.machine.begin_round(round, last).is_err() {
            return self.violation("a lane that is still in a round");
        }
        let mut taken = 0;
        while taken < share
            && let Some((_, _, pages)) = &mut self.source.open
            && let Some(page) = pages.pop_front()
        {
            taken += 1;
            let value = self.source.memory[page as usize];
            let run = self
                .layout
                .run(RegionId::new(0), PageIndex::new(page), 1)
                .unwrap();
            let delta = self.source.values.replace(run, [page_value(sum(value))]);
            self.source.digest.merge(delta);
            let Some(sending) = self.source.lanes.get_mut(&lane) else {
                return;
            };
            let sequence = sending.machine.pages(vec![run], PAGE_BYTES_U64).unwrap();
            self.source.sent_bytes += PAGE_BYTES_U64;
            let frame = Pages {
                round,
                runs: &[RawRun::from(run)],
                checksums: &[U32::new(sum(value))],
            };
            self.send_on(lane, frame.into(), sequence, vec![value]);
        }
        if let Some(sending) = self.source.lanes.get_mut(&lane) {
            let (mark, sequence) = sending.machine.end_round().unwrap();
            self.send_on(lane, mark.into(), sequence, Vec::new());
        }
        let mut at = self.now + self.dice.ms(2);
        if let Some(sending) = self.source.lanes.get_mut(&lane) {
            at = at.max(sending.encoded_at);
            sending.encoded_at = at;
        }
        self.later(
            at - self.now,
            What::Source(tx::event::Event::LaneEncoded {
                lane,
                incarnation,
                round,
            }),
        );
    }

    fn send_on(&mut self, lane: LaneId, frame: Frame<'_>, sequence: Sequence, mut pages: Vec<u64>) {
        let Some(channel) = self.source.lanes.get(&lane).map(|it| it.channel) else {
            return;
        };
        let body = if pages.is_empty() {
            Body::None
        } else {
            Body::Pages
        };
        let mut head = Vec::new();
        frame.encode(sequence, body, &mut head).unwrap();
        if self.flips > 0 && !pages.is_empty() {
            self.flips -= 1;
            pages[0] ^= 1 << self.dice.below(31);
        }
        let wait = self.transit(channel, 0);
        let message = Message {
            head,
            body: Vec::new(),
            pages,
        };
        self.later(wait, What::Forth(channel, message));
    }

    // ── the destination ──────────────────────────────────────────────────────────────────────────────────────────────

    fn tell_destination(&mut self, event: rx::Event) {
        if !self.destination.gone {
            let effects = self.destination.session.handle(event, self.now);
            self.destination_does(effects);
        }
    }

    fn destination_does(&mut self, effects: Vec<rx::Effect>) {
        for effect in effects {
            self.destination_effect(effect);
        }
    }

    fn arrive_forth(&mut self, channel: usize, message: Message) {
        if let Kind::Lane(lane, _) = self.channels[channel].kind {
            if let Some(receiving) = self.destination.lanes.get_mut(&lane)
                && receiving.channel == channel
            {
                receiving.inbox.push_back(message);
                self.read_lane(lane);
            }
            return;
        }
        if self.destination.control != Some(channel) {
            return;
        }
        let (header, table) = message.head.split_first_chunk::<HEADER_BYTES>().unwrap();
        let header = Header::decode(header).unwrap();
        if header.check_sequence(self.destination.heard).is_err() {
            return self.violation("the source's frames are not in order");
        }
        self.destination.heard = self.destination.heard.next();
        let frame = Frame::decode(&header, table).unwrap();
        let effects = self
            .destination
            .session
            .frame(&frame, &message.body, self.now);
        self.destination_does(effects);
    }

    fn destination_sees_end(&mut self, channel: usize) {
        if self.destination.gone {
            return;
        }
        match self.channels[channel].kind {
            Kind::Control if self.destination.control == Some(channel) => {
                self.tell_destination(rx::Event::ControlLost(rx::Fault::Channel(closed())));
            }
            Kind::Lane(lane, incarnation) => {
                let here = self.destination.lanes.get(&lane);
                if here.is_some_and(|it| it.channel == channel) {
                    self.end_lane(lane, incarnation, rx::Fault::Channel(closed()));
                }
            }
            Kind::Control => {}
        }
    }

    fn end_lane(&mut self, lane: LaneId, incarnation: Incarnation, fault: rx::Fault) {
        if let Some(receiving) = self.destination.lanes.remove(&lane) {
            let mark = LaneMark {
                lane,
                incarnation,
                frames: receiving.handled,
            };
            self.destination.ended.insert(lane, mark);
            self.tell_destination(rx::Event::LaneEnded { mark, fault });
        }
    }

    /// A lane's thread handles what is there, until it waits at the gate.
    fn read_lane(&mut self, lane: LaneId) {
        while let Some(receiving) = self.destination.lanes.get_mut(&lane) {
            if let Some(round) = receiving.waits {
                if self.destination.gate < round {
                    return;
                }
                receiving.waits = None;
                match &mut receiving.machine {
                    Some(machine) => machine.gate_opened(round).unwrap(),
                    None => receiving.machine = Some(Landed::rejoined(round)),
                }
            }
            let incarnation = receiving.incarnation;
            let (Some(machine), Some(message)) =
                (&mut receiving.machine, receiving.inbox.pop_front())
            else {
                return;
            };
            let (header, table) = message.head.split_first_chunk::<HEADER_BYTES>().unwrap();
            let header = Header::decode(header).unwrap();
            if let Err(error) = machine.header(&header) {
                return self.violation(format!("lane {lane}: {error}"));
            }
            let mut arrived = None;
            let mut bad = Vec::new();
            let done = match Frame::decode(&header, table).unwrap() {
                Frame::Pages(pages) => {
                    let done = machine.pages(pages.round, pages.checksums.len() as u64);
                    for ((run, sum_said), value) in
                        pages.runs.iter().zip(pages.checksums).zip(&message.pages)
                    {
                        let run = self.layout.admit(run).unwrap();
                        let page = run.first().value();
                        self.destination.memory[page as usize] = *value;
                        let new = page_value(sum(*value));
                        let delta = self.destination.values.replace(run, [new]);
                        self.destination.digest.merge(delta);
                        self.destination.counts.pages += 1;
                        if sum_said.get() == sum(*value) {
                            self.destination.damaged.remove(&page);
                        } else {
                            self.destination.damaged.insert(page);
                            bad.push(run);
                        }
                    }
                    done
                }
                Frame::RoundEnd(mark) => match machine.round_end(&mark) {
                    Ok(Mark::Fence) => {
                        arrived = Some((machine.round(), mark.final_round));
                        receiving.waits = machine.round().next();
                        Ok(())
                    }
                    other => other.map(|_| ()),
                },
                other => return self.violation(format!("{} on a lane", other.kind())),
            };
            if let Err(error) = done {
                return self.violation(format!("lane {lane}: {error}"));
            }
            receiving.handled = machine.frames();
            self.destination.counts.frames += 1;
            if !bad.is_empty() {
                self.tell_destination(rx::Event::Damaged {
                    lane,
                    incarnation,
                    sequence: header.sequence(),
                    runs: bad,
                });
            }
            if let Some((round, last)) = arrived {
                self.tell_destination(rx::Event::LaneArrived {
                    lane,
                    incarnation,
                    round,
                    last,
                });
            }
        }
    }

    fn marks(&self) -> Vec<LaneMark> {
        let mark = |(lane, it): (&LaneId, &Receiving)| LaneMark {
            lane: *lane,
            incarnation: it.incarnation,
            frames: it.handled,
        };
        self.destination.lanes.iter().map(mark).collect()
    }

    fn read_all(&mut self) {
        let lanes: Vec<LaneId> = self.destination.lanes.keys().copied().collect();
        lanes.into_iter().for_each(|lane| self.read_lane(lane));
    }

    fn destination_effect(&mut self, effect: rx::Effect) {
        use rx::{Effect, Event, Outcome};
        match effect {
            Effect::Send(frame) => {
                if let Some(channel) = self.destination.control {
                    let wait = self.transit(channel, 1);
                    let message = Message {
                        head: frame.bytes().to_vec(),
                        body: Vec::new(),
                        pages: Vec::new(),
                    };
                    self.later(wait, What::Back(channel, message));
                }
            }
            Effect::Prepare { .. } => {
                let wait = self.dice.ms(10);
                self.later(wait, What::Destination(Event::MachineReady));
            }
            Effect::Admit {
                lane,
                incarnation,
                begins,
            } => {
                let Some(channel) = self.destination.joining.remove(&(lane, incarnation)) else {
                    return self.violation("a lane was let in that is not here");
                };
                let machine = match begins {
                    Some(Begins::Within(round)) => Some(Landed::rejoined(round)),
                    _ => None,
                };
                let waits = match begins {
                    Some(Begins::Behind(round)) => Some(round),
                    _ => None,
                };
                let receiving = Receiving {
                    incarnation,
                    channel,
                    machine,
                    begins,
                    waits,
                    inbox: VecDeque::new(),
                    handled: 0,
                };
                self.destination.lanes.insert(lane, receiving);
                let wait = self.transit(channel, 1);
                self.later(wait, What::LaneAccepted(channel));
            }
            Effect::TurnAway {
                lane, incarnation, ..
            } => {
                if let Some(channel) = self.destination.joining.remove(&(lane, incarnation)) {
                    let wait = self.transit(channel, 1);
                    self.later(wait, What::LaneRefused(channel));
                }
            }
            Effect::CloseLane(lane) => {
                if let Some(channel) = self.destination.lanes.get(&lane).map(|it| it.channel) {
                    self.cut(channel);
                    let wait = self.dice.ms(5);
                    self.later(wait, What::DestinationSeesEnd(channel));
                }
            }
            Effect::StartLanes(round) => {
                for receiving in self.destination.lanes.values_mut() {
                    if receiving.begins.is_none() && receiving.machine.is_none() {
                        receiving.machine = Some(Landed::new(round));
                    }
                }
                self.read_all();
            }
            Effect::CountHandled => {
                let marks = self.marks();
                self.tell_destination(Event::Handled(marks));
            }
            Effect::CloseRound(_) => {
                let closed = rx::Closed {
                    handled: self.marks(),
                    digest: self.destination.digest,
                    damaged: self.destination.damaged.len() as u64,
                    incomplete: None,
                    restarts: Vec::new(),
                    counts: self.destination.counts,
                };
                self.tell_destination(Event::Closed(closed));
            }
            Effect::OpenGate(round) => {
                self.destination.gate = round;
                self.read_all();
            }
            Effect::Load { .. } => {
                let wait = self.dice.ms(5);
                self.later(wait, What::Destination(Event::Loaded(Ok(()))));
            }
            Effect::Resume(_) => {
                if self.source.runs || !self.source.committed {
                    self.violation("the destination runs what the source did not give away");
                }
                if self.destination.memory != self.source.memory {
                    self.violation("the guest at the destination has another memory");
                }
                self.destination.runs = true;
                let (wait, counts) = (self.dice.ms(5), self.destination.counts);
                self.later(wait, What::Destination(Event::Resumed(counts)));
            }
            Effect::Suspend => {
                if let Some(control) = self.destination.control.take() {
                    self.cut(control);
                }
                self.destination.joining.clear();
                let lanes: Vec<usize> = self
                    .destination
                    .lanes
                    .values()
                    .map(|it| it.channel)
                    .collect();
                lanes.into_iter().for_each(|channel| self.cut(channel));
            }
            Effect::SettleLanes => {
                let mut all = std::mem::take(&mut self.destination.ended);
                all.extend(self.marks().into_iter().map(|mark| (mark.lane, mark)));
                let marks = all.into_values().collect();
                self.destination.lanes.clear();
                let damaged = self.destination.damaged.iter().map(|page| {
                    let layout = &self.layout;
                    layout
                        .run(RegionId::new(0), PageIndex::new(*page), 1)
                        .unwrap()
                });
                let damaged = damaged.collect();
                self.tell_destination(Event::LanesSettled { marks, damaged });
            }
            Effect::AcceptResume => {
                if let Some(channel) = self.destination.returning.take() {
                    self.destination.control = Some(channel);
                    self.destination.heard = Sequence::FIRST;
                    let wait = self.transit(channel, 1);
                    self.later(wait, What::ResumeAccepted(channel));
                }
            }
            Effect::RefuseResume { .. } => self.later(MS, What::Refused),
            Effect::Answer(state) => {
                self.destination.asked = false;
                let wait = self.dice.ms(5);
                self.later(wait, What::Answered(state));
                self.tell_destination(Event::Answered(state));
            }
            Effect::Discard => {}
            Effect::Finish(outcome) => {
                self.destination.outcome = Some(match outcome {
                    Outcome::Running => ("running", None),
                    Outcome::Failed(error) => ("failed", Some(error.code())),
                    Outcome::Stranded(error) => ("stranded", Some(error.code())),
                });
            }
        }
    }

    // ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────

    fn judge(mut self) -> Run {
        let (outcome, code) = self.source.outcome.unwrap_or(("none", None));
        let theirs = self.destination.outcome.and_then(|(_, code)| code);
        if self.violations.is_empty() {
            if self.source.runs && self.destination.runs {
                self.violation("two owners");
            }
            match outcome {
                "migrated" if !self.destination.runs => {
                    self.violation("migrated, but it runs nowhere")
                }
                "failed" | "cancelled" if !self.source.runs => {
                    self.violation(format!("{outcome} with {code:?}, but it does not run"));
                }
                _ => {}
            }
            for code in [code, theirs].into_iter().flatten() {
                let accuses = ["misbehaved", "malformed", "digest", "internal"];
                if accuses.iter().any(|word| code.contains(word)) {
                    self.violation(format!("{code} between honest peers"));
                }
            }
            // A COMMIT that was lost on its way is as if it had not been sent, once the destination has said so.
            let undone = self.faults > 0 && code == Some("sender.not-committed");
            if !self.grave && !undone && outcome != "migrated" {
                self.violation(format!(
                    "{outcome} with {code:?} and {theirs:?}, without a reason"
                ));
            }
        }
        Run {
            outcome,
            faults: self.faults,
            violations: self.violations,
        }
    }
}

fn closed() -> ChannelFault {
    ChannelFault::new("channel.closed", false, "the connection was cut")
}

/// The checksum of a page: what stands for its 4096 bytes is a number.
fn sum(value: u64) -> u32 {
    (value ^ (value >> 32)) as u32
}

fn pages_of(run: PageRun) -> impl Iterator<Item = u64> {
    run.page_indices().map(PageIndex::value)
}
