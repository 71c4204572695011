//! The world around the two programs: who runs the guest, what was cut, and the list of what must never be.
//!
//! The ledger of owners is written by the two machine monitors and by the network, never by the programs under test. The rule:
//! whatever contradicts a promise is entered in `violations` at the moment at which it happens.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use multifd_guest::{DeviceConfig, DeviceFailure};
use multifd_transport::Span;
use multifd_wire::{ChannelRef, DeviceState, Hello, Kind, PAGE_BYTES_U64};

use super::claims::Times;
use super::devices::{self, Seen};
use super::faults::{Fault, Forgery, FrameFate, FrameSeen, Moment, Part, Plan, Planned, Side};
use super::machine::Machine;
use super::network::Link;
use super::schedule::{self, Key};
use crate::model::Random;

/// What the threads of the world itself wait for.
const END: Key = Key::WorldEnd;

/// A flipped bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flip {
    /// Who had sent the byte.
    pub from: Side,
    /// On which channel.
    pub channel: ChannelRef,
    /// Over which connection.
    pub link: u64,
    /// In which frame of it.
    pub number: u64,
    /// Of which kind it is; none for a hello.
    pub kind: Option<Kind>,
    /// In which part of it.
    pub part: Part,
    /// In which page of the body, for PAGES.
    pub page: u64,
    /// The other side has read so far that it can find it out.
    pub arrived: bool,
    /// What the frame brings may have been brought by an earlier one, over another channel: then nobody looks at it.
    pub repeated: bool,
}

impl Flip {
    /// By which name the reports must call it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match (self.part, self.kind) {
            (Part::Hello, _) => "hello",
            (Part::Reply, _) => "hello_reply",
            (Part::Header, _) => "header",
            (_, Some(kind)) => kind.name(),
            // The only frame that is sent together with a hello's answer.
            (_, None) => Kind::Outcome.name(),
        }
    }

    /// Whether it is in the content of a page, which is then sent again.
    #[must_use]
    pub fn is_in_page(&self) -> bool {
        self.part == Part::Body && self.kind == Some(Kind::Pages)
    }
}

/// A VMM's step that can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The destination builds the machine.
    Prepare,
    /// The destination loads the state.
    Load,
    /// The destination runs the guest.
    Resume,
    /// The source stops the guest.
    Pause,
    /// The source saves the state.
    Save,
}

/// Who runs the guest, and what was said about it.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    /// It runs at the source.
    pub source_runs: bool,
    /// It runs at the destination.
    pub destination_runs: bool,
    /// It ran at the destination at some time.
    pub destination_ran: bool,
    /// COMMIT was handed to the channel, and the destination has not answered that it takes it no more.
    pub commit_left: bool,
    /// The destination answered "not committed".
    pub disowned: bool,
    /// The program of this side died.
    pub source_crashed: bool,
    /// The program of this side died.
    pub destination_crashed: bool,
    /// The guest's host died while it ran there, or held it paused.
    pub guest_died: bool,
}

/// What a world is made of.
pub struct Scene {
    /// What goes wrong in it.
    pub plan: Plan,
    /// The guest.
    pub machine: Machine,
    /// Its devices.
    pub devices: Vec<DeviceConfig>,
    /// Data channels.
    pub lanes: u32,
    /// The sides' stall, in ns.
    pub stall_ns: u64,
    /// Whether both sides wait long enough for each other to come back.
    pub resumes: bool,
    /// Whether the source begins again when the destination has forgotten everything.
    pub starts_afresh: bool,
    /// Whether the guest writes pages while they are sent, so that they arrive torn.
    pub tears: bool,
    /// Whether everything that happens is printed.
    pub trace: bool,
}

/// A device as the world sees it.
#[derive(Debug, Clone)]
struct Apparatus {
    config: DeviceConfig,
    /// At the source.
    source: Seen,
    /// At the destination; none before it was made there.
    destination: Option<Seen>,
    /// Runs at the destination, with the state of the source's.
    taken: bool,
    /// The plan's failure, and whether it happened.
    failure: Option<(Side, DeviceFailure)>,
    failed: bool,
}

/// What a stranger does, by a number that was drawn and by the hello of the source, from which he knows the session.
pub type Act = Arc<dyn Fn(u64, Hello) + Send + Sync>;

struct State {
    random: Random,
    plan: Plan,
    devices: Vec<Apparatus>,
    ledger: Ledger,
    links: Vec<Arc<Link>>,
    links_made: u64,
    /// Chunks and marks of devices that were sent, by device and index.
    items: BTreeSet<(u32, u64)>,
    happened: Vec<(u64, Fault, String)>,
    times: Times,
    later: Vec<(u64, usize, Option<Arc<Link>>)>,
    flips: Vec<Flip>,
    refuses: Option<Step>,
    violations: Vec<String>,
    began: u64,
    over: bool,
    must_succeed: bool,
    lanes: u32,
    lanes_lost: Vec<ChannelRef>,
    /// Pages were sent, and the guest was not paused yet: a lost control channel costs time only.
    in_rounds: bool,
    resumes: bool,
    forged: bool,
    stall_ns: u64,
    kinds_seen: BTreeMap<u16, u64>,
    trace: bool,
    /// The destination's programs that died and were replaced.
    life: u32,
    /// When the first pages were moved.
    moving_since: Option<u64>,
    /// When the next one is started.
    restart_at: Option<u64>,
    restart: Option<Box<dyn FnOnce() + Send>>,
    /// The source is told to begin again when the destination has forgotten everything.
    starts_afresh: bool,
    /// Nothing but a restart of the destination happened in the rounds: the source has to say that.
    must_say_lost: bool,
    /// Dials the destination as somebody else.
    stranger: Option<Act>,
    /// The source's newest hello on a control channel.
    hello: Option<Hello>,
    /// When the source's program died, and when the destination's VMM took the machine down.
    source_died_at: Option<u64>,
    discarded_at: Option<u64>,
    cancel: [Option<Box<dyn Fn() + Send>>; 2],
}

/// Everything that the two programs share without knowing it.
pub struct World {
    state: Mutex<State>,
    /// The guest and its memory at the source.
    pub machine: Machine,
    tears: bool,
}

/// What a finished world knows.
#[derive(Debug, Clone)]
pub struct Summary {
    /// Who runs the guest.
    pub ledger: Ledger,
    /// When what happened to the guest.
    pub times: Times,
    /// Faults that happened, with the time in ns and a word on where.
    pub happened: Vec<(u64, Fault, String)>,
    /// Bits that were flipped.
    pub flips: Vec<Flip>,
    /// What must never be.
    pub violations: Vec<String>,
    /// Nothing happened that a migration may fail of.
    pub must_succeed: bool,
    /// Devices that run at the destination with their state.
    pub devices_moved: u64,
    /// Programs of the destination that died and were replaced.
    pub restarts: u32,
    /// The source has to say that the destination has forgotten everything.
    pub must_say_lost: bool,
    /// How long after the death of the source's program the destination's VMM took the machine down, in ns.
    pub held_ns: Option<u64>,
    /// A frame was forged: a program may call the other one a liar.
    pub forged: bool,
}

impl World {
    /// A world in which the guest runs at the source.
    #[must_use]
    pub fn new(mut random: Random, scene: Scene) -> Arc<Self> {
        let Scene {
            plan,
            machine,
            devices,
            lanes,
            stall_ns,
            resumes,
            starts_afresh,
            tears,
            trace,
        } = scene;
        let plans = |fault| plan.faults.iter().any(|planned| planned.fault == fault);
        let failing = (plans(Fault::DeviceFails) && !devices.is_empty()).then(|| {
            let index = random.below(devices.len() as u64) as usize;
            (index, devices::draw_failure(&mut random, &devices[index]))
        });
        let devices = devices.into_iter().enumerate();
        let devices = devices
            .map(|(index, config)| Apparatus {
                config,
                source: Seen {
                    state: DeviceState::Running,
                    operations: 0,
                },
                destination: None,
                taken: false,
                failure: failing
                    .filter(|(failing, _)| *failing == index)
                    .map(|(_, failure)| failure),
                failed: false,
            })
            .collect();
        let refuses = [
            Step::Prepare,
            Step::Load,
            Step::Resume,
            Step::Pause,
            Step::Save,
        ];
        let refuses = refuses[random.below(refuses.len() as u64) as usize];
        let refused = plans(Fault::VmmRefuses);
        Arc::new(Self {
            state: Mutex::new(State {
                random,
                plan,
                devices,
                ledger: Ledger {
                    source_runs: true,
                    ..Ledger::default()
                },
                links: Vec::new(),
                links_made: 0,
                items: BTreeSet::new(),
                happened: Vec::new(),
                times: Times::default(),
                later: Vec::new(),
                flips: Vec::new(),
                refuses: refused.then_some(refuses),
                violations: Vec::new(),
                began: schedule::now(),
                over: false,
                must_succeed: true,
                lanes,
                lanes_lost: Vec::new(),
                in_rounds: false,
                resumes,
                forged: false,
                stall_ns,
                kinds_seen: BTreeMap::new(),
                trace,
                life: 0,
                moving_since: None,
                restart_at: None,
                restart: None,
                starts_afresh,
                must_say_lost: false,
                stranger: None,
                hello: None,
                source_died_at: None,
                discarded_at: None,
                cancel: [None, None],
            }),
            machine,
            tears,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a side's user can do.
    pub fn set_cancel(&self, side: Side, cancel: impl Fn() + Send + 'static) {
        self.lock().cancel[side as usize] = Some(Box::new(cancel));
    }

    /// How another program is started in the place of the destination's.
    pub fn set_restart(&self, restart: impl FnOnce() + Send + 'static) {
        self.lock().restart = Some(Box::new(restart));
    }

    /// What a stranger does.
    pub fn set_stranger(&self, act: Act) {
        self.lock().stranger = Some(act);
    }

    /// Nobody is started any more, and nobody else comes: the source has said its last word. The destination's life.
    pub fn no_more_comers(&self) {
        let mut state = self.lock();
        (state.restart, state.stranger, state.restart_at) = (None, None, None);
    }

    /// The source said hello on a control channel.
    pub fn hello_seen(&self, octets: &[u8]) {
        if let Some(hello) = octets
            .first_chunk()
            .and_then(|octets| Hello::decode(octets).ok())
        {
            self.lock().hello = Some(hello);
        }
    }

    /// A stranger was let in.
    pub fn let_in(&self, what: &str) {
        self.violation(format!("a stranger was let in: {what}"));
    }

    /// Which of the destination's programs lives.
    #[must_use]
    pub fn life(&self) -> u32 {
        self.lock().life
    }

    /// The destination's VMM takes the machine down.
    pub fn discarded(&self) {
        let now = schedule::now();
        self.lock().discarded_at.get_or_insert(now);
    }

    /// The next program of the destination is started, if its time has come.
    fn restart_if_due(self: &Arc<Self>, now: u64) {
        let restart = {
            let mut state = self.lock();
            if state.restart_at.is_none_or(|at| at > now) {
                return;
            }
            state.restart_at = None;
            let Some(restart) = state.restart.take() else {
                return;
            };
            state.say("the destination's program is started again");
            state.life += 1;
            state.ledger.destination_crashed = false;
            state.kinds_seen.remove(&Kind::Grant.code());
            state.in_rounds = false;
            for device in &mut state.devices {
                // What ran there died with its host.
                (device.destination, device.taken) = (None, false);
            }
            restart
        };
        self.machine.bury_destination();
        restart();
    }

    /// Nothing goes wrong any more.
    pub fn calm_down(&self) {
        let mut state = self.lock();
        state.plan = Plan::none();
        state.ledger.disowned = false;
        state.later.clear();
        state.links.clear();
    }

    /// What happened.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let state = self.lock();
        Summary {
            ledger: state.ledger.clone(),
            times: state.times,
            happened: state.happened.clone(),
            flips: state.flips.clone(),
            violations: state.violations.clone(),
            must_succeed: state.must_succeed,
            devices_moved: state.devices.iter().filter(|device| device.taken).count() as u64,
            restarts: state.life,
            must_say_lost: state.must_say_lost,
            held_ns: state
                .source_died_at
                .zip(state.discarded_at)
                .map(|(died, discarded)| discarded.saturating_sub(died)),
            forged: state.forged,
        }
    }

    /// A program stands still for so long.
    pub(super) fn stopped(&self, side: Side, lasts: Duration) {
        let mut state = self.lock();
        state.must_succeed = false;
        let text = format!("{side:?} for {lasts:?}");
        state.note(Fault::Stopped, text.clone());
        drop(state);
        self.say(&format!("stands still: {text}"));
    }

    /// The VMM's thread at the destination does not come back before everything is over.
    pub(super) fn hangs(&self, step: Step) {
        let mut state = self.lock();
        state.must_succeed = false;
        let text = format!("{step:?}");
        state.note(Fault::ThreadHangs, text.clone());
        drop(state);
        self.say(&format!("hangs: {text}"));
        while !self.is_over() {
            schedule::block(END, None);
        }
    }

    /// Enters something that must never be.
    pub fn violation(&self, what: impl Into<String>) {
        let what = what.into();
        let mut state = self.lock();
        state.say(&format!("VIOLATION {what}"));
        state.violations.push(what);
    }

    /// A line of the trace.
    pub fn say(&self, what: &str) {
        self.lock().say(what);
    }

    /// Now and then somebody else goes on first.
    pub fn preempt(&self) {
        let other = self.lock().random.below(6) == 0;
        if other {
            schedule::yield_now();
        }
    }

    /// Whether the world's own threads are to end.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.lock().over
    }

    /// Whether a connection of this lane can't be made now, by a way that is closed from so long after the first pages on. A migration
    /// that begins with another program begins with all its lanes, so it finds the way open.
    pub(super) fn way_is_closed(&self, lane: ChannelRef, after_ns: u64, lasts_ns: u64) -> bool {
        let mut state = self.lock();
        let Some(since) = state.moving_since.filter(|_| state.life == 0) else {
            return false;
        };
        let (from, now) = (since + after_ns, schedule::now());
        let closed = now >= from && now - from < lasts_ns;
        if closed
            && !state
                .happened
                .iter()
                .any(|(_, fault, _)| *fault == Fault::WayClosed)
        {
            state.note(Fault::WayClosed, lane.to_string());
        }
        closed
    }

    /// A number for a new link.
    pub(super) fn count_link(&self) -> u64 {
        let mut state = self.lock();
        state.links_made += 1;
        state.links_made
    }

    /// A side has read enough to find a flipped bit out.
    pub(super) fn flip_arrived(&self, flip: usize) {
        if let Some(flip) = self.lock().flips.get_mut(flip) {
            flip.arrived = true;
        }
    }

    /// Ends the world's own threads.
    pub fn end(&self) {
        self.lock().over = true;
        schedule::wake(END, usize::MAX);
    }

    /// Whether the program that began as this one of its side is no ghost. The source has only one life.
    #[must_use]
    pub fn lives_as(&self, side: Side, life: u32) -> bool {
        let state = self.lock();
        match side {
            Side::Source => !state.ledger.source_crashed,
            Side::Destination => !state.ledger.destination_crashed && life == state.life,
        }
    }

    /// Whether a side's program still lives.
    #[must_use]
    pub fn lives(&self, side: Side) -> bool {
        let state = self.lock();
        match side {
            Side::Source => !state.ledger.source_crashed,
            Side::Destination => !state.ledger.destination_crashed,
        }
    }

    /// A link was made.
    pub fn connected(&self, link: Arc<Link>) {
        self.lock().links.push(link);
    }

    // ── owners ───────────────────────────────────────────────────────────────────────────────────────────────────────

    /// The source's VMM stopped the guest.
    pub fn source_paused(&self) {
        if self.lives(Side::Source) {
            let mut state = self.lock();
            state.ledger.source_runs = false;
            state.times.pauses(schedule::now());
        }
        self.machine.set_running(false);
    }

    /// The source's VMM runs the guest again.
    pub fn source_resumed(&self) {
        if !self.lives(Side::Source) {
            return;
        }
        let (committed, other) = {
            let mut state = self.lock();
            state.say("the guest runs at the source again");
            state.ledger.source_runs = true;
            state.times.runs_again(schedule::now());
            (state.ledger.commit_left, state.ledger.destination_ran)
        };
        if committed {
            self.violation("the source ran the guest after it had sent COMMIT (COMMIT-3)");
        }
        if other {
            self.violation(
                "two owners: the source resumed the guest, which ran at the destination",
            );
        }
        self.devices_run(Side::Source);
        self.machine.set_running(true);
    }

    /// The destination's VMM runs the guest.
    pub fn destination_resumed(&self) {
        if !self.lives(Side::Destination) {
            return;
        }
        let ledger = {
            let mut state = self.lock();
            state.say("the guest runs at the destination");
            state.ledger.destination_runs = true;
            state.ledger.destination_ran = true;
            state.times.runs_there(schedule::now());
            state.ledger.clone()
        };
        if ledger.source_runs {
            self.violation(
                "two owners: the guest runs at the source and was resumed at the destination",
            );
        }
        if ledger.disowned {
            self.violation(
                "the destination ran the guest after it had answered that it does not (ASK-3)",
            );
        } else if !ledger.commit_left {
            self.violation("the destination ran the guest without a COMMIT (COMMIT-1)");
        }
        self.devices_run(Side::Destination);
    }

    /// Whether a VMM's step is to fail now.
    pub fn refuses(&self, step: Step) -> bool {
        let mut state = self.lock();
        let refuses = state.refuses == Some(step);
        if refuses {
            state.must_succeed = false;
            state.note(Fault::VmmRefuses, format!("{step:?}"));
        }
        refuses
    }

    // ── devices ──────────────────────────────────────────────────────────────────────────────────────────────────────

    /// The configurations of one side's devices. A failure is of the first device that is made from them.
    pub(super) fn device_configs(&self, side: Side) -> Vec<DeviceConfig> {
        let mut state = self.lock();
        let devices = state.devices.iter_mut();
        devices
            .map(|device| {
                let mut config = device.config.clone();
                if let Some((at, failure)) = device.failure
                    && at == side
                    && !device.failed
                {
                    config.failure = Some(failure);
                }
                config
            })
            .collect()
    }

    /// A device is about to run with the state that it has now.
    pub(super) fn device_runs(&self, side: Side, index: usize) {
        let (ledger, device) = {
            let state = self.lock();
            (state.ledger.clone(), state.devices[index].clone())
        };
        let name = &device.config.name;
        match side {
            Side::Source => {
                if ledger.commit_left || device.taken {
                    self.violation(format!(
                        "{name} runs at the source after COMMIT (COMMIT-3): {ledger:?}"
                    ));
                }
            }
            Side::Destination => {
                if !ledger.commit_left {
                    self.violation(format!("{name} runs at the destination without a COMMIT"));
                }
                if device.source.state.is_running() {
                    self.violation(format!(
                        "two owners: {name} runs at the destination, and at the source it is {}",
                        device.source.state
                    ));
                }
                let loaded = device.destination.map(|seen| seen.operations);
                if loaded != Some(device.source.operations) {
                    self.violation(format!(
                        "{name} runs at the destination as it was after {loaded:?} operations, and the source's has done {}",
                        device.source.operations
                    ));
                }
                self.lock().devices[index].taken = true;
            }
        }
    }

    /// What came of a call to a device.
    pub(super) fn device_seen(&self, side: Side, index: usize, seen: Seen) {
        let mut state = self.lock();
        let now = seen.state;
        let device = &mut state.devices[index];
        let before = match side {
            Side::Source => Some(std::mem::replace(&mut device.source, seen)),
            Side::Destination => device.destination.replace(seen),
        };
        if state.trace && before.is_none_or(|before| before.state != now) {
            state.say(&format!("device {index} at {side:?} is {now}"));
        }
    }

    /// A device did not do what it was asked for.
    pub(super) fn device_failed(&self, side: Side, index: usize, text: &str) {
        let mut state = self.lock();
        let device = &mut state.devices[index];
        // Bytes that the source's device has wrong are refused by the destination's.
        let planned = device.failure.is_some();
        device.failed |= planned;
        if planned || state.forged {
            state.must_succeed = false;
            state.note(
                Fault::DeviceFails,
                format!("device {index} at {side:?}: {text}"),
            );
        } else {
            drop(state);
            self.violation(format!(
                "device {index} at {side:?} was given what is not its state: {text}"
            ));
        }
    }

    /// Every device runs at the side that runs the guest; but for those that failed.
    fn devices_run(&self, side: Side) {
        let devices = self.lock().devices.clone();
        for device in devices.iter().filter(|device| !device.failed) {
            let runs = match side {
                // A migration that goes on has devices in pre-copy.
                Side::Source => matches!(
                    device.source.state,
                    DeviceState::Running | DeviceState::PreCopy
                ),
                Side::Destination => {
                    let there = device.destination.as_ref();
                    device.taken && there.is_some_and(|seen| seen.state == DeviceState::Running)
                }
            };
            if !runs {
                self.violation(format!(
                    "the guest runs at {side:?} while {} is {:?} at the source and {:?} at the destination",
                    device.config.name, device.source, device.destination
                ));
            }
        }
    }

    /// No device runs at the source any more.
    pub(super) fn devices_stand_still(&self) {
        let devices = self.lock().devices.clone();
        for device in devices.iter().filter(|device| !device.failed) {
            if device.source.state.is_running() {
                self.violation(format!(
                    "{} runs at the source, which gave the guest away",
                    device.config.name
                ));
            }
        }
    }

    /// Every device runs at the source, and is read no more.
    pub(super) fn devices_are_home(&self) {
        let devices = self.lock().devices.clone();
        for device in devices.iter().filter(|device| !device.failed) {
            let state = device.source.state;
            if state != DeviceState::Running {
                let name = &device.config.name;
                self.violation(format!("{name} is {state} at the source after it failed"));
            }
        }
    }

    // ── frames ───────────────────────────────────────────────────────────────────────────────────────────────────────

    /// A frame is handed to a channel: what becomes of it.
    pub fn frame_leaves(self: &Arc<Self>, seen: &FrameSeen, link: &Arc<Link>) -> FrameFate {
        // Nothing is planned for strangers, and what a ghost says is heard by nobody.
        if seen.channel == ChannelRef::None || link.life != self.life() {
            return FrameFate::default();
        }
        let mut fate = FrameFate::default();
        let hit = {
            let mut state = self.lock();
            if let Some(kind) = seen.kind {
                *state.kinds_seen.entry(kind.code()).or_default() += 1;
            }
            if state.trace {
                let what = match seen.kind {
                    Some(kind) => format!(
                        "{:?} {} sends {kind:?}, {} bytes",
                        seen.from, seen.channel, seen.bytes
                    ),
                    None => format!("{:?} {} says hello", seen.from, seen.channel),
                };
                state.say(&what);
            }
            if matches!(seen.kind, Some(Kind::Pages | Kind::Zeros)) {
                state.moving_since.get_or_insert_with(schedule::now);
            }
            match seen.kind {
                Some(Kind::Pages | Kind::Zeros) if !state.ledger.commit_left => {
                    state.in_rounds = state.ledger.source_runs;
                }
                Some(Kind::Switchover) => state.in_rounds = false,
                _ => {}
            }
            if seen.outcome == Some(1) && !state.ledger.destination_crashed {
                state.ledger.disowned = true;
                state.ledger.commit_left = false;
            }
            if seen.kind == Some(Kind::Commit) && seen.from == Side::Source {
                fate.commits = !state.ledger.source_crashed;
                if state.happened.is_empty() && !state.plan.faults.is_empty() {
                    state.last_call();
                }
            }
            state.plan.triggered(seen, Moment::Before)
        };
        for index in hit {
            self.happens(index, Some((seen, link)), &mut fate);
        }
        let mut state = self.lock();
        let State { plan, random, .. } = &mut *state;
        let storm = plan.storm_over(seen, random);
        if !storm.is_empty() {
            state.note(
                Fault::FlipPage,
                format!("{} {} bits", seen.channel, storm.len()),
            );
        }
        for bit in storm {
            state.flip(seen, link, &mut fate, bit);
        }
        if let Some(item) = seen.item {
            state.items.insert(item);
        }
        drop(state);
        fate
    }

    /// The first byte of a COMMIT is on its way.
    pub fn commit_leaves(&self) {
        self.lock().ledger.commit_left = true;
    }

    /// A frame is on its way.
    pub fn frame_left(self: &Arc<Self>, seen: &FrameSeen, link: &Arc<Link>) {
        if seen.channel == ChannelRef::None || link.life != self.life() {
            return;
        }
        let hit = self.lock().plan.triggered(seen, Moment::After);
        for index in hit {
            let delay = self.lock().plan.faults[index].delay_ns;
            if delay == 0 {
                self.happens(index, Some((seen, link)), &mut FrameFate::default());
            } else {
                let at = schedule::now() + delay;
                self.lock().later.push((at, index, Some(Arc::clone(link))));
                schedule::wake(END, usize::MAX);
            }
        }
    }

    /// Whether pages may arrive torn.
    #[must_use]
    pub fn tears(&self) -> bool {
        self.tears
    }

    /// Guest memory is about to be read for a frame.
    pub fn guest_memory_is_read(&self, span: Span<'_>, fate: &FrameFate) {
        if self.tears {
            self.machine.catch_up();
        }
        if fate.torn {
            self.machine.write_in(span);
        }
    }

    /// The life of the thread that makes things happen at their time.
    pub fn fate_life(self: &Arc<Self>) {
        let began = self.lock().began;
        let mut times = self.lock().plan.times();
        times.reverse();
        loop {
            if self.is_over() {
                return;
            }
            let now = schedule::now();
            self.restart_if_due(now);
            let due = {
                let mut state = self.lock();
                state
                    .later
                    .iter()
                    .position(|(at, ..)| *at <= now)
                    .map(|index| state.later.swap_remove(index))
            };
            if let Some((_, index, link)) = due {
                self.happens_later(index, link);
                continue;
            }
            if let Some((at, index)) = times.last().copied()
                && began + at <= now
            {
                times.pop();
                self.lock().plan.faults[index].happened = true;
                self.happens_later(index, None);
                continue;
            }
            let next = {
                let state = self.lock();
                let later = state.later.iter().map(|(at, ..)| *at).min();
                let timed = times.last().map(|(at, _)| began + at);
                [later, timed, state.restart_at].into_iter().flatten().min()
            };
            schedule::block(END, next);
        }
    }

    fn happens_later(self: &Arc<Self>, index: usize, link: Option<Arc<Link>>) {
        let link = link.or_else(|| {
            let mut state = self.lock();
            let count = state.links.len() as u64;
            let at = state.random.below(count) as usize;
            state.links.get(at).cloned()
        });
        if let Some(link) = link {
            self.acts(index, &link);
        }
    }

    /// A planned fault happens to a frame, or because of it.
    fn happens(
        self: &Arc<Self>,
        index: usize,
        frame: Option<(&FrameSeen, &Arc<Link>)>,
        fate: &mut FrameFate,
    ) {
        let Some((seen, link)) = frame else { return };
        let fault = self.lock().plan.faults[index].fault;
        let mut state = self.lock();
        let where_ = match seen.kind {
            Some(kind) => format!("{} {kind:?}", seen.channel),
            None => format!("{} hello", seen.channel),
        };
        match fault {
            Fault::LaneTruncated | Fault::ControlTruncated => {
                if fault == Fault::ControlTruncated && matches!(seen.channel, ChannelRef::Lane(_)) {
                    drop(state);
                    return self.acts(index, link);
                }
                let at = state.random.below(seen.bytes + 1);
                fate.cut_at = Some(at);
                fate.reset = state.random.below(2) == 0;
                state.note(
                    fault,
                    format!("{where_} after {at} of {} bytes", seen.bytes),
                );
                let channel = seen.channel;
                state.channel_lost(channel, seen.number);
            }
            Fault::TornPages => {
                fate.torn = true;
                state.note(fault, where_);
            }
            Fault::FlipPage
            | Fault::FlipChunk
            | Fault::FlipLaneHead
            | Fault::FlipForth
            | Fault::FlipBack
            | Fault::FlipHello => {
                let (from, to) = match fault {
                    Fault::FlipPage | Fault::FlipChunk => (seen.head, seen.bytes),
                    Fault::FlipLaneHead => (0, seen.head),
                    _ => (0, seen.bytes),
                };
                let bit = from * 8 + state.random.below((to - from) * 8);
                state.flip(seen, link, fate, bit);
                state.must_succeed &= fault == Fault::FlipPage;
                state.note(fault, format!("{where_} bit {bit}"));
            }
            Fault::ForgeForth | Fault::ForgeBack => {
                let forgery = state.forgery(seen);
                fate.forgery = Some(forgery);
                state.must_succeed = false;
                state.forged = true;
                state.note(fault, format!("{where_} {forgery:?}"));
            }
            _ => {
                drop(state);
                self.acts(index, link);
            }
        }
    }

    /// A fault that is not about one frame.
    fn acts(self: &Arc<Self>, index: usize, link: &Arc<Link>) {
        let (fault, links, stall_ns, draw) = {
            let mut state = self.lock();
            let draw = state.random.next_u64() >> 8;
            (
                state.plan.faults[index].fault,
                state.links.clone(),
                state.stall_ns,
                draw,
            )
        };
        let control = links
            .iter()
            .rev()
            .find(|link| link.channel == ChannelRef::Control)
            .unwrap_or(link);
        let note = |what: String| self.lock().note(fault, what);
        match fault {
            Fault::LaneReset | Fault::LaneSilent | Fault::LaneTruncated => {
                note(format!("{}", link.channel));
                self.lock().channel_lost(link.channel, 1);
                if fault == Fault::LaneSilent {
                    link.silence();
                } else {
                    link.reset();
                }
            }
            Fault::ControlReset | Fault::ControlTruncated => {
                note(String::new());
                self.lock().control_lost();
                control.reset();
            }
            Fault::ControlSilent => {
                note(String::new());
                self.lock().control_lost();
                control.silence();
            }
            Fault::AllReset | Fault::AllSilent => {
                note(String::new());
                self.lock().control_lost();
                for link in &links {
                    if fault == Fault::AllReset {
                        link.reset();
                    } else {
                        link.silence();
                    }
                }
            }
            Fault::Stall | Fault::AllStall => {
                // From nothing to more than what is allowed.
                let ns = draw % (stall_ns * 3 / 2);
                note(format!("for {} ms", ns / 1_000_000));
                if ns > stall_ns / 4 {
                    self.lock().must_succeed = false;
                }
                let until = schedule::now() + ns;
                if fault == Fault::Stall {
                    link.freeze(until);
                } else {
                    for link in &links {
                        link.freeze(until);
                    }
                }
            }
            Fault::SlowLane => {
                note(format!("{}", link.channel));
                link.worsen(2 + draw % 20, 0);
            }
            Fault::LateLane => {
                note(format!("{}", link.channel));
                link.worsen(1, draw % 10_000_000);
            }
            Fault::CrashSource | Fault::CrashDestination => {
                note(String::new());
                let side = if fault == Fault::CrashSource {
                    Side::Source
                } else {
                    Side::Destination
                };
                self.crash(side, &links, draw % 3 == 0);
            }
            Fault::RestartDestination => {
                note(String::new());
                let (fine, at) = {
                    let state = self.lock();
                    // It is started again once, and the next time it stays away.
                    let again = state.restart.is_some();
                    let fine = state.must_succeed && state.resumes && state.in_rounds && again;
                    let at = schedule::now() + 1 + draw % 500_000_000;
                    (fine, at)
                };
                self.crash(Side::Destination, &links, draw % 3 == 0);
                let mut state = self.lock();
                // Whoever may start afresh has no other reason to fail.
                state.must_succeed = fine && state.starts_afresh;
                state.must_say_lost = fine && !state.starts_afresh;
                state.restart_at = Some(at);
                drop(state);
                schedule::wake(END, usize::MAX);
            }
            Fault::Stranger => {
                let stranger = {
                    let mut state = self.lock();
                    // Before anybody else has come, a stranger is as welcome as the source.
                    let granted = state.kinds_seen.contains_key(&Kind::Grant.code());
                    let act = state.stranger.clone();
                    let stranger = granted.then(|| act.zip(state.hello)).flatten();
                    if stranger.is_some() {
                        state.note(Fault::Stranger, format!("of kind {}", draw % 8));
                    }
                    stranger
                };
                if let Some((act, hello)) = stranger {
                    act(draw, hello);
                }
            }
            Fault::CancelSource | Fault::CancelDestination => {
                note(String::new());
                let side = if fault == Fault::CancelSource {
                    Side::Source
                } else {
                    Side::Destination
                };
                let mut state = self.lock();
                state.must_succeed = false;
                let cancel = state.cancel[side as usize].take();
                drop(state);
                if let Some(cancel) = cancel {
                    cancel();
                }
            }
            Fault::TornPages
            | Fault::FlipPage
            | Fault::FlipLaneHead
            | Fault::FlipForth
            | Fault::FlipBack
            | Fault::FlipHello
            | Fault::ForgeForth
            | Fault::ForgeBack
            | Fault::VmmRefuses
            | Fault::FlipChunk
            | Fault::DeviceFails
            | Fault::WayClosed
            | Fault::Stopped
            | Fault::ThreadHangs => {}
        }
    }

    /// A program dies. Its threads go on as ghosts: nothing that they do has an effect any more.
    fn crash(&self, side: Side, links: &[Arc<Link>], host: bool) {
        let mut state = self.lock();
        state.must_succeed = false;
        match side {
            Side::Source => {
                state.ledger.source_crashed = true;
                state.source_died_at = Some(schedule::now());
                state.ledger.guest_died |= !state.ledger.commit_left;
                state.ledger.source_runs = false;
            }
            Side::Destination => {
                state.ledger.destination_crashed = true;
                state.ledger.guest_died |= state.ledger.destination_runs;
                state.ledger.destination_runs = false;
            }
        }
        drop(state);
        if side == Side::Source {
            self.machine.set_running(false);
        }
        for link in links {
            if host {
                link.silence();
            } else {
                link.reset();
            }
        }
    }
}

impl State {
    /// Flips a bit of a frame. A bit that is flipped already stays so.
    fn flip(&mut self, seen: &FrameSeen, link: &Link, fate: &mut FrameFate, bit: u64) {
        if fate.flips.contains(&bit) {
            return;
        }
        let octet = bit / 8;
        let (part, last) = seen.part(octet);
        fate.flips.push(bit);
        fate.marks.push((last, self.flips.len()));
        let repeated = seen.item.is_some_and(|item| self.items.contains(&item));
        self.flips.push(Flip {
            from: seen.from,
            channel: seen.channel,
            link: link.number,
            number: seen.number,
            kind: seen.kind,
            part,
            page: octet.saturating_sub(seen.head) / PAGE_BYTES_U64,
            arrived: false,
            repeated,
        });
    }

    fn note(&mut self, fault: Fault, what: String) {
        self.say(&format!("FAULT {fault:?} {what}"));
        let at = schedule::now() - self.began;
        self.happened.push((at, fault, what));
    }

    #[expect(clippy::print_stdout, reason = "the trace is what was asked for")]
    fn say(&self, what: &str) {
        if self.trace {
            let us = (schedule::peek() - self.began) / 1000;
            println!(
                "{:>7}.{:03} ms  [{:>2}] {what}",
                us / 1000,
                us % 1000,
                schedule::me()
            );
        }
    }

    /// A session outlives its channels as long as the guest runs at the source.
    fn control_lost(&mut self) {
        self.must_succeed &= self.resumes && self.in_rounds;
    }

    /// A lane that is lost after it was let in costs nothing but time: it is dialled again, or another one lives.
    fn channel_lost(&mut self, channel: ChannelRef, number: u64) {
        if !self.lanes_lost.contains(&channel) {
            self.lanes_lost.push(channel);
        }
        let lane = matches!(channel, ChannelRef::Lane(_));
        let last = self.lanes_lost.len() >= self.lanes as usize && !self.resumes;
        if !lane || number == 0 || last {
            self.must_succeed = false;
        }
    }

    /// Nothing happened so far, and the COMMIT is about to be sent.
    fn last_call(&mut self) {
        let faults = [
            Fault::ControlReset,
            Fault::ControlSilent,
            Fault::ControlTruncated,
            Fault::AllSilent,
            Fault::CrashSource,
            Fault::CrashDestination,
        ];
        let fault = faults[self.random.below(faults.len() as u64) as usize];
        let at = schedule::now() + self.random.below(2_000_000);
        let mut planned = Planned::draw(fault, &mut self.random);
        planned.happened = true;
        self.plan.faults.push(planned);
        self.later.push((at, self.plan.faults.len() - 1, None));
        schedule::wake(END, usize::MAX);
    }

    fn forgery(&mut self, seen: &FrameSeen) -> Forgery {
        let bodiless = seen.bytes == seen.head;
        let table = multifd_wire::HEADER_BYTES as u64;
        match self.random.below(10) {
            0 => {
                let kinds = Kind::ALL;
                Forgery::Kind(kinds[self.random.below(kinds.len() as u64) as usize])
            }
            1 => Forgery::Sequence(self.random.below(40)),
            2 if bodiless => Forgery::Twice,
            3 if bodiless => Forgery::Never,
            _ => Forgery::Table {
                at: table + self.random.below(seen.head.saturating_sub(table).max(1)),
                value: self.random.next_u64() as u8,
            },
        }
    }
}
