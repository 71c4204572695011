//! One thread at a time, on simulated time: the scheduler below the simulator.
//!
//! ```text
//!             wake, timer                      picked (by the seed)
//!   Blocked ──────────────► Ready ───────────────────────────────► Running (holds the baton)
//!      ▲                      ▲           yield                        │  │
//!      │                      └────────────────────────────────────────┘  │
//!      └───────────────────────────── block ──────────────────────────────┘
//! ```
//! The programs under test keep their threads; but only the holder of the baton runs, and it goes on until it waits for something.
//! Who is next among those that could run is drawn from the seed. When nobody can run, the clock jumps to the next timer. So a
//! run is a function of its seed. The rule it keeps: no thread of a simulation ever waits in the kernel for anything but its
//! baton. What makes an ordinary thread wait here instead of in the kernel is `interpose.rs`, which only the simulating
//! programs link.

use std::cell::Cell;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use rustix::thread::futex;

use crate::model::Random;

/// What a look at the clock costs, in ns: time passes, even for somebody who only looks at it.
const LOOK_NS: u64 = 40;

/// A thread that looks at the clock so often without ever waiting does not wait for anything: it spins.
const LOOKS_MAX: u32 = 50_000;

/// A simulation in which the baton goes round so often has threads that keep each other busy for nothing. One with all its
/// deadlines needs some ten thousand.
const SWITCHES_MAX: u64 = 1_000_000;

/// Simulated threads that may exist in one simulation: far more than a migration has (a leak of threads is found by it).
const THREADS_MAX: usize = 512;

/// In the place of a thread's number: a group goes on.
const THAW: u32 = u32::MAX;

/// How a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wake {
    /// Somebody woke it.
    Woken,
    /// Its time was up.
    TimedOut,
}

/// What waits are about: the address of a word, or something of the simulator's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    /// A futex.
    Word(usize),
    /// The end of a simulated thread.
    End(u32),
    /// The end of any thread.
    AnyEnd,
    /// Bytes that arrive in a pipe of the simulated network.
    Octets(u64),
    /// Room in a pipe of the simulated network.
    Room(u64),
    /// The end of the simulated world.
    WorldEnd,
    /// Nothing but time.
    Time,
}

/// Whose thread it is: a program can stand still, with all its threads. A thread belongs to the program whose thread started it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// The simulator's own.
    Nobody,
    /// The source's.
    Source,
    /// The destination's.
    Destination,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Ready,
    Running,
    Blocked(Key),
    Done,
}

#[derive(Debug)]
struct Thread {
    state: State,
    /// Counts its waits, so that an old timer does not end a new wait.
    waits: u64,
    wake: Wake,
    handle: u64,
    joined: bool,
    group: Group,
}

/// The token that makes a thread run.
#[derive(Debug)]
struct Baton(AtomicU32);

static BATONS: [Baton; THREADS_MAX] = [const { Baton(AtomicU32::new(0)) }; THREADS_MAX];

#[derive(Debug)]
struct Scheduler {
    now: u64,
    limit: u64,
    random: Random,
    threads: Vec<Thread>,
    ready: Vec<u32>,
    /// Until when the threads of a group stand still, and those that could run otherwise.
    still: [u64; 3],
    stopped: Vec<u32>,
    timers: BinaryHeap<Reverse<(u64, u64, u32, u64)>>,
    timer_count: u64,
    switches: u64,
    looks: u32,
    fingerprint: u64,
    seed: u64,
    /// The command that runs it again.
    replay: String,
}

static SCHEDULER: Mutex<Option<Scheduler>> = Mutex::new(None);

/// Only one simulation at a time in a process.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

thread_local! {
    /// The number of this thread in the simulation, and one more; 0 outside.
    static ME: Cell<u32> = const { Cell::new(0) };
}

/// Figures of a finished simulation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Figures {
    /// How long it was, in simulated ns.
    pub ns: u64,
    /// How often the baton went to another thread.
    pub switches: u64,
    /// Threads that there were.
    pub threads: usize,
    /// A number that two runs share only if they took the same way.
    pub fingerprint: u64,
}

/// Runs `body` as the first thread of a simulation that may last `limit_ns`, and then waits until every other thread has ended.
/// A simulation in which nobody can go on, or which lasts too long, ends the process with the seed in the message: threads that
/// hang cannot be taken down. So does a panic in any of its threads.
pub fn simulate<T>(
    seed: u64,
    limit_ns: u64,
    replay: &str,
    body: impl FnOnce() -> T,
) -> (T, Figures) {
    let one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    *lock() = Some(Scheduler {
        now: 1_000_000_000,
        limit: 1_000_000_000 + limit_ns,
        random: Random::new(seed ^ 0x5ced_u64),
        threads: Vec::new(),
        ready: Vec::new(),
        still: [0; 3],
        stopped: Vec::new(),
        timers: BinaryHeap::new(),
        timer_count: 0,
        switches: 0,
        looks: 0,
        fingerprint: 0,
        seed,
        replay: replay.to_owned(),
    });
    let me = announce();
    with(|s| {
        s.ready.clear();
        s.threads[me as usize].state = State::Running;
    });
    ME.set(me + 1);
    watch_for_panics();
    let result = catch_unwind(AssertUnwindSafe(body));
    let Ok(result) = result else {
        panicked(seed, replay)
    };
    while with(|s| s.threads.iter().skip(1).any(|t| t.state != State::Done)) {
        block(Key::AnyEnd, None);
    }
    ME.set(0);
    let figures = with(|s| Figures {
        ns: s.now - 1_000_000_000,
        switches: s.switches,
        threads: s.threads.len(),
        fingerprint: s.fingerprint,
    });
    *lock() = None;
    drop(one);
    if PANICKED.load(Ordering::Relaxed) {
        panicked(seed, replay);
    }
    (result, figures)
}

/// A thread of a simulation panicked.
static PANICKED: AtomicBool = AtomicBool::new(false);

/// Notes panics of simulated threads, of those too for which nobody waits.
fn watch_for_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if is_simulated() {
                PANICKED.store(true, Ordering::Relaxed);
            }
            before(info);
        }));
    });
}

/// Not through `println`, which a test's harness keeps to itself.
fn last_words(text: &str) {
    let mut out = std::io::stdout();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// The end of the process: a program that panicked may have left anything behind.
fn panicked(seed: u64, replay: &str) -> ! {
    last_words(&format!(
        "VIOLATION seed {seed}: a thread panicked\n{replay}"
    ));
    std::process::exit(71)
}

/// Whether the calling thread belongs to a simulation.
#[must_use]
pub fn is_simulated() -> bool {
    ME.get() != 0
}

/// The simulated time in ns. Only in a simulation.
#[must_use]
pub fn now() -> u64 {
    with(|s| {
        s.now += LOOK_NS;
        s.looks += 1;
        if s.looks > LOOKS_MAX {
            s.stuck("a thread spins");
        }
        s.now
    })
}

/// The simulated time in ns, for traces: looking costs nothing, so that a traced run takes the same way.
#[must_use]
pub fn peek() -> u64 {
    with(|s| s.now)
}

/// The number of the calling thread, for traces.
#[must_use]
pub fn me() -> u32 {
    ME.get().saturating_sub(1)
}

/// Waits until somebody wakes `key`, or until `deadline` (in simulated ns).
pub fn block(key: Key, deadline: Option<u64>) -> Wake {
    let me = me();
    let next = with(|s| {
        let thread = &mut s.threads[me as usize];
        thread.state = State::Blocked(key);
        thread.waits += 1;
        let waits = thread.waits;
        if let Some(deadline) = deadline {
            s.timer_count += 1;
            s.timers.push(Reverse((deadline, s.timer_count, me, waits)));
        }
        s.pick()
    });
    pass(me, next);
    with(|s| s.threads[me as usize].wake)
}

/// Lets others run, if the seed says so.
pub fn yield_now() {
    let me = me();
    let next = with(|s| {
        let thread = &mut s.threads[me as usize];
        thread.state = State::Ready;
        thread.wake = Wake::Woken;
        s.ready.push(me);
        s.pick()
    });
    pass(me, next);
}

/// Waits for a time.
pub fn sleep(ns: u64) {
    let until = now() + ns;
    while now() < until {
        block(Key::Time, Some(until));
    }
}

/// Wakes up to `count` threads that wait for `key`; how many there were.
pub fn wake(key: Key, count: usize) -> usize {
    with(|s| s.wake(key, count))
}

/// Wakes the threads that wait for `key` at an instant, if nothing wakes them before.
pub fn wake_at(key: Key, at: u64) {
    with(|s| {
        for id in 0..s.threads.len() {
            let thread = &s.threads[id];
            if thread.state == State::Blocked(key) {
                s.timer_count += 1;
                let number = u32::try_from(id).unwrap_or(u32::MAX);
                s.timers
                    .push(Reverse((at, s.timer_count, number, thread.waits)));
            }
        }
    });
}

/// From now on the calling thread, and what it starts, belongs to this group.
pub fn belongs_to(group: Group) {
    let me = me();
    with(|s| s.threads[me as usize].group = group);
}

/// The threads of a group stand still until an instant, as those of a stopped process do: timers and wakes wait for it.
pub fn stop(group: Group, until: u64) {
    with(|s| {
        let still = &mut s.still[group as usize];
        *still = (*still).max(until);
        s.timer_count += 1;
        s.timers.push(Reverse((until, s.timer_count, THAW, 0)));
    });
}

/// Enters a thread that is about to be started; it can be picked from now on.
#[must_use]
pub fn announce() -> u32 {
    let creator = ME.get().checked_sub(1);
    with(|s| {
        let id = u32::try_from(s.threads.len()).unwrap_or(u32::MAX);
        let group = creator.map_or(Group::Nobody, |id| s.threads[id as usize].group);
        assert!(
            (id as usize) < THREADS_MAX,
            "more than {THREADS_MAX} threads in one simulation"
        );
        BATONS[id as usize].0.store(0, Ordering::Relaxed);
        s.threads.push(Thread {
            state: State::Ready,
            waits: 0,
            wake: Wake::Woken,
            handle: 0,
            joined: false,
            group,
        });
        s.ready.push(id);
        id
    })
}

/// The announced thread could not be started after all.
pub fn withdraw(id: u32) {
    with(|s| {
        s.ready.retain(|ready| *ready != id);
        s.threads[id as usize].state = State::Done;
    });
}

/// Notes by which number the system knows a thread.
pub fn known_as(id: u32, handle: u64) {
    with(|s| s.threads[id as usize].handle = handle);
}

/// First call of a started thread: waits for its turn.
pub fn enter(id: u32) {
    ME.set(id + 1);
    await_baton(id);
}

/// Last call of a thread.
pub fn leave() {
    let me = me();
    let next = with(|s| {
        s.threads[me as usize].state = State::Done;
        s.wake(Key::End(me), usize::MAX);
        s.wake(Key::AnyEnd, usize::MAX);
        s.pick()
    });
    ME.set(0);
    hand_to(next);
}

/// Waits for the end of the thread that the system knows as `handle`; false if it is none of this simulation.
#[must_use]
pub fn join(handle: u64) -> bool {
    let found = with(|s| {
        let found = s
            .threads
            .iter()
            // The newest: the system gives the handle of a detached thread that has ended to another one.
            .rposition(|t| t.handle == handle && !t.joined);
        if let Some(at) = found {
            s.threads[at].joined = true;
        }
        found
    });
    let Some(at) = found else { return false };
    let id = u32::try_from(at).unwrap_or(u32::MAX);
    while with(|s| s.threads[at].state != State::Done) {
        block(Key::End(id), None);
    }
    true
}

/// A number from the scheduler's own sequence: for the randomness that the system would give.
#[must_use]
pub fn random_u64() -> u64 {
    with(|s| s.random.next_u64())
}

impl Scheduler {
    fn wake(&mut self, key: Key, count: usize) -> usize {
        let mut woken = 0;
        for (id, thread) in (0..).zip(&mut self.threads) {
            if woken == count {
                break;
            }
            if thread.state == State::Blocked(key) {
                thread.state = State::Ready;
                thread.wake = Wake::Woken;
                self.ready.push(id);
                woken += 1;
            }
        }
        woken
    }

    /// Who runs next.
    fn pick(&mut self) -> u32 {
        if self.switches > SWITCHES_MAX {
            self.stuck("threads keep each other busy without end");
        }
        while let Some(Reverse((when, _, id, waits))) = self.timers.peek().copied()
            && when <= self.now
        {
            self.timers.pop();
            self.due(id, waits);
        }
        let id = loop {
            if self.ready.is_empty() {
                self.next_timer();
                continue;
            }
            let at = self.random.below(self.ready.len() as u64) as usize;
            let id = self.ready.swap_remove(at);
            if self.stands_still(id) {
                self.stopped.push(id);
            } else {
                break id;
            }
        };
        self.threads[id as usize].state = State::Running;
        self.looks = 0;
        self.fingerprint = (self.fingerprint ^ (u64::from(id) << 48 ^ self.now))
            .wrapping_mul(0x9E37_79B9_7F4A_7C15)
            .rotate_left(23);
        id
    }

    fn stands_still(&self, id: u32) -> bool {
        let group = self.threads[id as usize].group;
        self.still[group as usize] > self.now
    }

    /// A timer is due: a wait is over, or a group goes on. False if the wait was over before.
    fn due(&mut self, id: u32, waits: u64) -> bool {
        if id == THAW {
            self.ready.append(&mut self.stopped);
            return true;
        }
        let thread = &mut self.threads[id as usize];
        let waits = thread.waits == waits && matches!(thread.state, State::Blocked(_));
        if waits {
            thread.state = State::Ready;
            thread.wake = Wake::TimedOut;
            self.ready.push(id);
        }
        waits
    }

    /// Nobody can run: the clock jumps to the next timer.
    fn next_timer(&mut self) {
        while let Some(Reverse((when, _, id, waits))) = self.timers.pop() {
            let before = self.now;
            self.now = self.now.max(when);
            if self.due(id, waits) {
                if self.now > self.limit {
                    self.stuck("the simulation lasts too long");
                }
                return;
            }
            self.now = before;
        }
        self.stuck("every thread waits for another")
    }

    /// The end of the process: what hangs can't be taken down.
    fn stuck(&self, what: &str) -> ! {
        let mut text = format!(
            "VIOLATION seed {}: {what} (at {} ms)\n",
            self.seed,
            (self.now - 1_000_000_000) / 1_000_000
        );
        for (id, thread) in self.threads.iter().enumerate() {
            if thread.state != State::Done {
                text += &format!("  thread {id}: {:?}\n", thread.state);
            }
        }
        last_words(&(text + &self.replay));
        std::process::exit(70)
    }
}

fn lock() -> MutexGuard<'static, Option<Scheduler>> {
    SCHEDULER.lock().unwrap_or_else(PoisonError::into_inner)
}

fn with<T>(f: impl FnOnce(&mut Scheduler) -> T) -> T {
    match lock().as_mut() {
        Some(scheduler) => f(scheduler),
        None => unreachable!("only threads of a simulation come here, and they end before it"),
    }
}

/// Gives the baton to `next` and waits until it comes back.
fn pass(me: u32, next: u32) {
    if me != next {
        hand_to(next);
        await_baton(me);
    }
}

fn hand_to(next: u32) {
    with_quietly(|s| s.switches += 1);
    let baton = &BATONS[next as usize].0;
    baton.store(1, Ordering::Release);
    let _ = futex::wake(baton, futex::Flags::PRIVATE, 1);
}

fn with_quietly(f: impl FnOnce(&mut Scheduler)) {
    if let Some(scheduler) = lock().as_mut() {
        f(scheduler);
    }
}

fn await_baton(me: u32) {
    let baton = &BATONS[me as usize].0;
    while baton.swap(0, Ordering::Acquire) == 0 {
        let _ = futex::wait(baton, futex::Flags::PRIVATE, 0, None);
    }
}
