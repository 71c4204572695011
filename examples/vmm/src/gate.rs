//! Where the vCPUs' threads wait until they may run.
//!
//! The rule it keeps: when [`Gate::pause`] returns, no thread is in KVM_RUN or in a device, and none gets there before [`Gate::run`].

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Signals are sent again after this long: one that came between a thread's look at the gate and KVM_RUN interrupted nothing.
const AGAIN: Duration = Duration::from_millis(1);

/// What a thread is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Run,
    End,
}

/// How the guest came to an end of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It shut down or rebooted.
    Down,
    /// It did what this VMM cannot carry out.
    Failed(String),
}

#[derive(Default)]
pub(crate) struct Gate {
    /// Looked at before each KVM_RUN; changes with `state` only.
    open: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    ending: bool,
    resting: usize,
    end: Option<End>,
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a thread may enter KVM_RUN once more.
    pub(crate) fn is_open(&self) -> bool {
        self.open.load(Ordering::SeqCst)
    }

    /// For a thread that does not run: waits for its next order.
    pub(crate) fn rest(&self) -> Order {
        let mut state = self.state();
        state.resting += 1;
        self.changed.notify_all();
        while !state.ending && !self.is_open() {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.ending {
            return Order::End;
        }
        state.resting -= 1;
        Order::Run
    }

    /// Lets the threads run, unless the guest has ended.
    pub(crate) fn run(&self) {
        let state = self.state();
        self.open.store(state.end.is_none(), Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Returns when all `threads` of them rest. `kick` interrupts those in KVM_RUN.
    pub(crate) fn pause(&self, threads: usize, kick: impl Fn()) {
        let mut state = self.state();
        self.open.store(false, Ordering::SeqCst);
        while state.resting < threads {
            kick();
            let waited = self.changed.wait_timeout(state, AGAIN);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The guest has come to its end; the first reason counts.
    pub(crate) fn end(&self, end: End) {
        self.state().end.get_or_insert(end);
        self.open.store(false, Ordering::SeqCst);
    }

    /// How the guest ended, if it did.
    pub(crate) fn ended(&self) -> Option<End> {
        self.state().end.clone()
    }

    /// Has threads that rest end.
    pub(crate) fn close(&self) {
        self.state().ending = true;
        self.changed.notify_all();
    }
}
