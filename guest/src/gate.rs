//! Where the vCPU threads wait, and how they are told to run, to rest and to end.
//!
//! ```text
//!            run                    rest
//!   resting ─────► running ──(sees the wish between two stores or exits)──► resting        end, from anywhere
//!      └─(failed for good: counts as resting, and its thread has ended)
//! ```
//!
//! The wish is set under the lock and mirrored in an atomic that running threads read without it. A thread counts as
//! resting from the moment when it entered [`Gate::rest`] until it takes up the wish to run, so that a pause right
//! after a run never waits for a thread that has not even woken up.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// What the threads are wanted to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Wish {
    Rest = 0,
    Run = 1,
    End = 2,
}

/// What a thread that rested shall do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Run,
    End,
}

/// Whether everybody came to rest in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rested {
    All,
    /// The first thread that still runs.
    NotYet {
        index: u32,
    },
}

/// Why a thread will not run again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) index: u32,
    pub(crate) detail: String,
}

/// The gate of one crew of threads.
#[derive(Debug)]
pub(crate) struct Gate {
    wish: AtomicU8,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// For each thread, whether it rests.
    resting: Vec<bool>,
    failure: Option<Failure>,
}

impl Gate {
    /// A gate for `threads` threads that all count as resting, whether they exist yet or not.
    pub(crate) fn new(threads: u32) -> Self {
        Self {
            wish: AtomicU8::new(Wish::Rest as u8),
            state: Mutex::new(State {
                resting: vec![true; threads as usize],
                failure: None,
            }),
            changed: Condvar::new(),
        }
    }

    /// Lets everybody run.
    pub(crate) fn ask_run(&self) {
        self.ask(Wish::Run);
    }

    /// Asks everybody to rest; [`wait_rested`](Self::wait_rested) tells when they do.
    pub(crate) fn ask_rest(&self) {
        self.ask(Wish::Rest);
    }

    /// Asks everybody to leave for good.
    pub(crate) fn ask_end(&self) {
        self.ask(Wish::End);
    }

    /// Waits at most `patience` until all threads rest.
    pub(crate) fn wait_rested(&self, patience: Duration) -> Rested {
        let (state, _) = self
            .changed
            .wait_timeout_while(self.lock(), patience, |state| {
                state.resting.contains(&false)
            })
            .unwrap_or_else(|poison| poison.into_inner());
        match state.resting.iter().position(|resting| !resting) {
            None => Rested::All,
            Some(index) => Rested::NotYet {
                index: index as u32,
            },
        }
    }

    /// The first failure of a thread.
    pub(crate) fn failure(&self) -> Option<Failure> {
        self.lock().failure.clone()
    }

    /// For thread `index`: rests until there is something to do.
    pub(crate) fn rest(&self, index: u32) -> Order {
        let mut state = self.lock();
        self.set_resting(&mut state, index, true);
        loop {
            match self.wish() {
                Wish::End => return Order::End,
                Wish::Run => {
                    self.set_resting(&mut state, index, false);
                    return Order::Run;
                }
                Wish::Rest => {
                    state = self
                        .changed
                        .wait(state)
                        .unwrap_or_else(|poison| poison.into_inner());
                }
            }
        }
    }

    /// For thread `index`, which cannot go on and ends now: says so. It counts as resting from here on.
    pub(crate) fn fail(&self, index: u32, detail: String) {
        let mut state = self.lock();
        state.failure.get_or_insert(Failure { index, detail });
        self.set_resting(&mut state, index, true);
    }

    /// For a running thread: whether it may go on.
    #[inline]
    pub(crate) fn may_run(&self) -> bool {
        self.wish() == Wish::Run
    }

    /// For a running thread: waits until `due`, or until it is wanted to do something else.
    pub(crate) fn wait_until(&self, due: Instant) {
        let mut state = None;
        while self.may_run() {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            // The wish is looked at once more under the lock, or a change of it could be missed.
            let Some(held) = state.take() else {
                state = Some(self.lock());
                continue;
            };
            let (held, _) = self
                .changed
                .wait_timeout(held, left)
                .unwrap_or_else(|poison| poison.into_inner());
            state = Some(held);
        }
    }

    fn wish(&self) -> Wish {
        match self.wish.load(Ordering::Acquire) {
            0 => Wish::Rest,
            1 => Wish::Run,
            _ => Wish::End,
        }
    }

    fn ask(&self, wish: Wish) {
        let _state = self.lock();
        self.wish.store(wish as u8, Ordering::Release);
        self.changed.notify_all();
    }

    fn set_resting(&self, state: &mut State, index: u32, resting: bool) {
        state.resting[index as usize] = resting;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;
    use std::thread;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn threads_run_only_between_run_and_rest() {
        let gate = Gate::new(2);
        let steps = AtomicU64::new(0);
        thread::scope(|scope| {
            for index in 0..2 {
                let (gate, steps) = (&gate, &steps);
                scope.spawn(move || {
                    while gate.rest(index) == Order::Run {
                        while gate.may_run() {
                            steps.fetch_add(1, Ordering::Relaxed);
                            gate.wait_until(Instant::now() + Duration::from_millis(1));
                        }
                    }
                });
            }
            for _ in 0..20 {
                let before = steps.load(Ordering::Relaxed);
                gate.ask_run();
                while steps.load(Ordering::Relaxed) < before + 4 {
                    thread::yield_now();
                }
                gate.ask_rest();
                assert_eq!(gate.wait_rested(SECOND), Rested::All);
                let at_rest = steps.load(Ordering::Relaxed);
                thread::sleep(Duration::from_millis(2));
                assert_eq!(steps.load(Ordering::Relaxed), at_rest);
            }
            gate.ask_end();
        });
    }

    #[test]
    fn a_pause_right_after_a_run_does_not_wait_for_threads_that_have_not_woken() {
        let gate = Gate::new(1);
        for _ in 0..1000 {
            gate.ask_run();
            gate.ask_rest();
            assert_eq!(gate.wait_rested(Duration::ZERO), Rested::All);
        }
    }

    #[test]
    fn a_wait_for_a_far_time_ends_with_the_wish_to_rest() {
        let gate = Gate::new(1);
        thread::scope(|scope| {
            scope.spawn(|| {
                while gate.rest(0) == Order::Run {
                    gate.wait_until(Instant::now() + 1000 * SECOND);
                }
            });
            gate.ask_run();
            while gate.wait_rested(Duration::ZERO) == Rested::All {
                thread::yield_now();
            }
            gate.ask_rest();
            assert_eq!(gate.wait_rested(10 * SECOND), Rested::All);
            gate.ask_end();
        });
    }

    #[test]
    fn a_failed_thread_rests_for_good_and_is_named() {
        let gate = Gate::new(2);
        thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(gate.rest(1), Order::Run);
                gate.fail(1, "broken".to_owned());
            });
            gate.ask_run();
            while gate.failure().is_none() {
                thread::yield_now();
            }
            assert_eq!(gate.wait_rested(SECOND), Rested::All);
            gate.ask_run();
            assert_eq!(gate.wait_rested(SECOND), Rested::All);
            assert_eq!(
                gate.failure(),
                Some(Failure {
                    index: 1,
                    detail: "broken".to_owned()
                })
            );
            gate.ask_end();
        });
    }

    #[test]
    fn a_thread_that_does_not_rest_is_named() {
        let gate = Gate::new(2);
        thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(gate.rest(1), Order::Run);
                while gate.may_run() {
                    thread::yield_now();
                }
                thread::sleep(Duration::from_millis(100));
                gate.rest(1)
            });
            gate.ask_run();
            while gate.wait_rested(Duration::ZERO) == Rested::All {
                thread::yield_now();
            }
            gate.ask_rest();
            assert_eq!(
                gate.wait_rested(Duration::from_millis(10)),
                Rested::NotYet { index: 1 }
            );
            gate.ask_end();
        });
    }
}
