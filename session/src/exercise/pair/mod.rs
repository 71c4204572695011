//! Both roles in one thread, joined by encoded frames over a made-up network, on made-up time.
//!
//! ```text
//!   plan      what the seed says beforehand            source, sending, reading, back      the source's driver, as a model
//!   steers    limits that are changed on the way
//!   faults    what happens on the way                  destination, receiving, loading     the destination's
//!   liar      one side that says what it must not      guest, network                      what is moved, and over what
//!   oracle    what must hold                           dice                                numbers from the seed
//! ```
//! Memory is a number per page; the guest writes some while it runs. A seed says everything, so it replays.
//!
//! What must hold: never two owners, and none without COMMIT; a guest that runs at the destination has the memory, the state and the
//! devices that it had when it was paused; one that stays at the source runs there; no honest side accuses the other, and no error is
//! without a cause; what nothing happened to succeeds; nobody waits for longer than its deadlines say.

mod back;
mod destination;
mod dice;
mod faults;
mod guest;
mod liar;
mod loading;
mod network;
mod oracle;
mod plan;
mod reading;
mod receiving;
mod sending;
mod source;
mod steers;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use multifd_wire::{LaneId, Layout, PAGE_BYTES_U64, Reason, Region, RegionId, Role};

use self::back::{Hello, Reached};
use self::destination::Destination;
use self::dice::Dice;
use self::faults::{Done, Host};
use self::guest::{Guest, Memory};
use self::liar::Liar;
use self::network::{Carries, Message, Network};
use self::oracle::{End, Watch};
use self::plan::Plan;
use self::reading::Readers;
use self::source::Source;
use crate::{destination as rx, source as tx};

const MS: Duration = Duration::from_millis(1);

/// A migration that takes more steps than this never ends.
const STEPS_MAX: u32 = 400_000;

/// How one migration went.
#[derive(Debug)]
pub struct Run {
    /// How the source says that it ended.
    pub outcome: &'static str,
    /// Faults that happened, and lies that were told.
    pub faults: u32,
    /// The guest was slowed for a while.
    pub throttled: bool,
    /// What must not be.
    pub violations: Vec<String>,
    /// What happened, line by line, if that was wanted.
    pub trace: Vec<String>,
}

/// Migrates once, with what the seed says.
#[must_use]
pub fn pair(seed: u64) -> Run {
    run(seed, None)
}

/// The same, and writes down what happens.
#[must_use]
pub fn pair_traced(seed: u64) -> Run {
    run(seed, Some(Vec::new()))
}

fn run(seed: u64, trace: Option<Vec<String>>) -> Run {
    let mut pair = Pair::new(seed, trace);
    pair.run();
    pair.judge()
}

/// What happens at some time.
#[derive(Debug)]
enum What {
    /// A message arrives.
    Forth(usize, Message),
    Back(usize, Message),
    /// A side sees that the channel is cut.
    SourceSeesEnd(usize),
    DestinationSeesEnd(usize),
    /// A lane's hello arrives, is answered, or has waited for too long.
    LaneHello(usize),
    LaneAnswer(usize, Option<Reason>),
    LaneLate(usize),
    /// An attempt of the source to come back arrives, and has ended.
    Hello(Hello),
    Reached(u32, usize, Reached),
    /// A thread of the source says something, or goes on.
    Source(tx::event::Event),
    LaneWorks(LaneId, usize),
    Reads(usize),
    Devices(u32, tx::event::Event),
    /// The same at the destination, of one program there.
    Note(u32),
    Vmm(u32, rx::Event),
    Loads(usize, u32),
    DestinationEnds(u32),
    Write,
    Steers(tx::Steer),
    DeviceChanges,
    Fault,
    Asker,
    Restart(u32),
    LiarSpeaks,
}

/// When something happens, its number among those at that time, and its place in the list of what will.
type Timed = (Duration, u64, usize);

struct Pair {
    dice: Dice,
    /// Of some migrations, what their users change while they run: with numbers of its own, so that a seed is otherwise what it was.
    steers: Option<Dice>,
    plan: Plan,
    now: Duration,
    number: u64,
    queue: BinaryHeap<Reverse<Timed>>,
    to_come: Vec<Option<What>>,
    free: Vec<usize>,
    network: Network,
    layout: Layout,
    /// The source's, and the destination's.
    hosts: [Host; 2],
    source: Source,
    destination: Destination,
    liar: Liar,
    done: Done,
    watch: Watch,
    /// How programs of the destination ended that were there before.
    ends: Vec<End>,
    violations: Vec<String>,
    trace: Option<Vec<String>>,
}

impl Pair {
    fn new(seed: u64, trace: Option<Vec<String>>) -> Self {
        let mut dice = Dice::new(seed);
        let plan = Plan::new(&mut dice);
        let pages = plan.pages;
        let layout = Layout::new([Region {
            id: RegionId::new(0),
            guest_address: 0,
            bytes: pages * PAGE_BYTES_U64,
        }])
        .unwrap();
        let mut session = tx::Session::new(plan.source.clone(), pages, Duration::ZERO);
        if !plan.devices.is_empty() {
            session.expect_devices();
        }
        let guest = Guest::new(&layout, pages, &mut dice);
        let readers = Readers::new(plan.devices.clone());
        let memory = Memory::new(&layout, vec![0; pages as usize]);
        let mut pair = Self {
            dice,
            steers: seed.is_multiple_of(5).then(|| Dice::new(!seed)),
            plan,
            now: Duration::ZERO,
            number: 0,
            queue: BinaryHeap::new(),
            to_come: Vec::new(),
            free: Vec::new(),
            network: Network::default(),
            layout,
            hosts: [Host::default(); 2],
            source: Source::new(session, guest, readers),
            destination: Destination::new(0, memory),
            liar: Liar::default(),
            done: Done::default(),
            watch: Watch::default(),
            ends: Vec::new(),
            violations: Vec::new(),
            trace,
        };
        pair.plan_faults();
        pair.plan_steers();
        pair
    }

    fn later(&mut self, wait: Duration, what: What) {
        self.number += 1;
        let place = self.free.pop().unwrap_or_else(|| {
            self.to_come.push(None);
            self.to_come.len() - 1
        });
        self.to_come[place] = Some(what);
        self.queue
            .push(Reverse((self.now + wait, self.number, place)));
    }

    fn violation(&mut self, text: impl Into<String>) {
        let text = text.into();
        self.note(|| format!("VIOLATION {text}"));
        self.violations.push(text);
    }

    fn note(&mut self, text: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:?} {}", self.now, text()));
        }
    }

    fn run(&mut self) {
        let control = self.connect(Carries::Control);
        self.open_session(control);
        let features = self.features();
        self.source_takes(control, features);
        for step in 0.. {
            let over = [self.source_is_over(), self.destination_is_over()];
            let judged = match self.plan.liar {
                None => over == [true; 2],
                // A liar may do what it likes for as long as it likes.
                Some(Role::Source) => over[1],
                Some(Role::Destination) => over[0],
            };
            if judged || !self.violations.is_empty() {
                return;
            }
            if step > STEPS_MAX {
                return self.violation(format!("it does not end (at {:?})", self.now));
            }
            self.step(over);
            if self.plan.liar.is_none() {
                self.check_deadlines();
            } else {
                self.check_end();
            }
        }
    }

    fn source_is_over(&self) -> bool {
        self.hosts[0].gone || self.source.outcome.is_some()
    }

    fn destination_is_over(&self) -> bool {
        let it = &self.destination;
        self.hosts[1].gone || it.outcome.is_some() || it.session.is_none()
    }

    fn step(&mut self, over: [bool; 2]) {
        let next = self.queue.peek().map_or(Duration::MAX, |next| next.0.0);
        let due = |who: usize, due: Duration| {
            if over[who] {
                Duration::MAX
            } else {
                due.max(self.hosts[who].frozen_until)
            }
        };
        let session = self.destination.session.as_ref();
        let destination = session.map_or(Duration::MAX, rx::Session::next_deadline);
        let dues = [due(0, self.source.session.due()), due(1, destination)];
        let first = dues[0].min(dues[1]);
        if next == Duration::MAX && first == Duration::MAX {
            return self.violation("everybody waits for another");
        }
        if next > first {
            self.now = self.now.max(first);
            if dues[0] <= dues[1] {
                let effects = self.source.session.tick(self.now);
                self.source_does(effects);
            } else {
                let counts = self.destination.counts;
                self.tell_destination(rx::Event::Tick(counts));
            }
            return;
        }
        let Some(Reverse((at, number, place))) = self.queue.pop() else {
            return;
        };
        // A program that stands still finds everything afterwards, in the order in which it came.
        if let Some(role) = self.to_come[place].as_ref().and_then(Self::host_of) {
            let until = self.hosts[usize::from(role == Role::Destination)].frozen_until;
            if at < until {
                return self.queue.push(Reverse((until, number, place)));
            }
        }
        self.now = self.now.max(at);
        self.free.push(place);
        if let Some(what) = self.to_come[place].take() {
            self.happen(what);
        }
    }

    fn happen(&mut self, what: What) {
        match what {
            What::Forth(channel, message) if self.network.is_open(channel) => {
                self.arrive_forth(channel, message);
            }
            What::Forth(channel, message) => {
                if !message.pages.is_empty() && self.dice.one_in(2) {
                    self.arrive_in_part(channel, &message);
                }
            }
            What::Back(channel, message) if self.network.is_open(channel) => {
                if !self.hosts[0].gone {
                    self.arrive_back(channel, &message);
                }
            }
            What::Back(..) => {}
            What::SourceSeesEnd(channel) => self.source_sees_end(channel),
            What::DestinationSeesEnd(channel) => self.destination_sees_end(channel),
            What::LaneHello(channel) => self.lane_hello(channel),
            What::LaneAnswer(channel, refused) => {
                self.lane_answered(channel, refused);
            }
            What::LaneLate(channel) => self.lane_late(channel),
            What::Hello(hello) => self.greet(hello),
            What::Reached(attempt, channel, reached) => self.reached(attempt, channel, reached),
            What::Source(event) => self.tell_source(event),
            What::LaneWorks(lane, channel) => self.lane_works(lane, channel),
            What::Reads(place) => self.reads(place),
            What::Devices(order, event) => self.devices_did(order, event),
            What::Note(program) => self.read_note(program),
            What::Vmm(program, event) => self.vmm_did(program, event),
            What::Loads(place, program) => self.loads(place, program),
            What::DestinationEnds(program) => self.destination_ends(program),
            What::Write => {
                if self.source.guest.runs {
                    self.source.guest.write(&mut self.dice);
                }
            }
            What::Steers(change) => self.tell_source(tx::event::Event::Steer(change)),
            What::DeviceChanges => self.device_changes(),
            What::Fault => self.strike(),
            What::Asker => self.ask_for_the_dead(),
            What::Restart(program) => self.restart_destination(program),
            What::LiarSpeaks => self.liar_speaks(),
        }
    }
}
