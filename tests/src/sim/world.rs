//! The world around the two programs: who runs the guest, what was cut, and the list of what must never be.
//!
//! The ledger of owners is written by the two machine monitors and by the network, never by the programs under test. The rule:
//! whatever contradicts a promise is entered in `violations` at the moment at which it happens.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use multifd_transport::Span;
use multifd_wire::{ChannelRef, Kind};

use super::faults::{Fault, Forgery, FrameFate, FrameSeen, Moment, Plan, Planned, Side};
use super::machine::Machine;
use super::network::Link;
use super::schedule::{self, Key};
use crate::model::Random;

/// What the threads of the world itself wait for.
const END: Key = Key::WorldEnd;

/// A flipped bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flip {
    /// Who had sent the octet.
    pub from: Side,
    /// On which channel.
    pub channel: ChannelRef,
    /// Of which frame; none for a hello.
    pub kind: Option<Kind>,
    /// Whether it was in header or table, rather than in a body.
    pub in_head: bool,
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

struct State {
    random: Random,
    plan: Plan,
    ledger: Ledger,
    links: Vec<Arc<Link>>,
    happened: Vec<(u64, Fault, String)>,
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
    cancel: [Option<Box<dyn Fn() + Send>>; 2],
}

/// Everything that the two programs share without knowing it.
pub struct World {
    state: Mutex<State>,
    /// The guest and its memory at the source.
    pub machine: Machine,
}

/// What a finished world knows.
#[derive(Debug, Clone)]
pub struct Summary {
    /// Who runs the guest.
    pub ledger: Ledger,
    /// Faults that happened, with the time in ns and a word on where.
    pub happened: Vec<(u64, Fault, String)>,
    /// Bits that were flipped.
    pub flips: Vec<Flip>,
    /// What must never be.
    pub violations: Vec<String>,
    /// Nothing happened that a migration may fail of.
    pub must_succeed: bool,
    /// A frame was forged: a program may call the other one a liar.
    pub forged: bool,
}

impl World {
    /// A world in which the guest runs at the source.
    #[must_use]
    pub fn new(
        mut random: Random,
        plan: Plan,
        machine: Machine,
        lanes: u32,
        stall_ns: u64,
        resumes: bool,
        trace: bool,
    ) -> Arc<Self> {
        let refuses = [
            Step::Prepare,
            Step::Load,
            Step::Resume,
            Step::Pause,
            Step::Save,
        ];
        let refuses = refuses[random.below(refuses.len() as u64) as usize];
        let refused = plan
            .faults
            .iter()
            .any(|planned| planned.fault == Fault::VmmRefuses);
        Arc::new(Self {
            state: Mutex::new(State {
                random,
                plan,
                ledger: Ledger {
                    source_runs: true,
                    ..Ledger::default()
                },
                links: Vec::new(),
                happened: Vec::new(),
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
                cancel: [None, None],
            }),
            machine,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a side's user can do.
    pub fn set_cancel(&self, side: Side, cancel: impl Fn() + Send + 'static) {
        self.lock().cancel[side as usize] = Some(Box::new(cancel));
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
            happened: state.happened.clone(),
            flips: state.flips.clone(),
            violations: state.violations.clone(),
            must_succeed: state.must_succeed,
            forged: state.forged,
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

    /// Ends the world's own threads.
    pub fn end(&self) {
        self.lock().over = true;
        schedule::wake(END, usize::MAX);
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
            self.lock().ledger.source_runs = false;
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

    // ── frames ───────────────────────────────────────────────────────────────────────────────────────────────────────

    /// A frame is handed to a channel: what becomes of it.
    pub fn frame_leaves(self: &Arc<Self>, seen: &FrameSeen, link: &Arc<Link>) -> FrameFate {
        let hit = {
            let mut state = self.lock();
            if let Some(kind) = seen.kind {
                *state.kinds_seen.entry(kind.code()).or_default() += 1;
            }
            if state.trace {
                let what = match seen.kind {
                    Some(kind) => format!(
                        "{:?} {} sends {kind:?}, {} octets",
                        seen.from, seen.channel, seen.bytes
                    ),
                    None => format!("{:?} {} says hello", seen.from, seen.channel),
                };
                state.say(&what);
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
                if !state.ledger.source_crashed {
                    state.ledger.commit_left = true;
                }
                if state.happened.is_empty() && !state.plan.faults.is_empty() {
                    state.last_call();
                }
            }
            state.plan.triggered(seen, Moment::Before)
        };
        let mut fate = FrameFate::default();
        for index in hit {
            self.happens(index, Some((seen, link)), &mut fate);
        }
        fate
    }

    /// A frame is on its way.
    pub fn frame_left(self: &Arc<Self>, seen: &FrameSeen, link: &Arc<Link>) {
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

    /// Guest memory is about to be read for a frame.
    pub fn guest_memory_is_read(&self, span: Span<'_>, fate: &FrameFate) {
        self.machine.catch_up();
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
                [later, timed].into_iter().flatten().min()
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
                    format!("{where_} after {at} of {} octets", seen.bytes),
                );
                let channel = seen.channel;
                state.channel_lost(channel, seen.number);
            }
            Fault::TornPages => {
                fate.torn = true;
                state.note(fault, where_);
            }
            Fault::FlipPage
            | Fault::FlipLaneHead
            | Fault::FlipForth
            | Fault::FlipBack
            | Fault::FlipHello => {
                let (from, to) = match fault {
                    Fault::FlipPage => (seen.head, seen.bytes),
                    Fault::FlipLaneHead => (0, seen.head),
                    _ => (0, seen.bytes),
                };
                let bit = from * 8 + state.random.below((to - from) * 8);
                fate.flips.push(bit);
                state.flips.push(Flip {
                    from: seen.from,
                    channel: seen.channel,
                    kind: seen.kind,
                    in_head: bit / 8 < seen.head,
                });
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
        let is_lane = matches!(link.channel, ChannelRef::Lane(_));
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
            | Fault::VmmRefuses => {}
        }
        let _ = is_lane;
    }

    /// A program dies. Its threads go on as ghosts: nothing that they do has an effect any more.
    fn crash(&self, side: Side, links: &[Arc<Link>], host: bool) {
        let mut state = self.lock();
        state.must_succeed = false;
        match side {
            Side::Source => {
                state.ledger.source_crashed = true;
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
