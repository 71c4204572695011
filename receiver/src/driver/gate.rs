//! The gate between rounds: lanes at the fence wait here until the control thread opens it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use multifd_wire::Round;

use super::lock;

/// Open up to and including one round; closed for good once it has ended.
#[derive(Debug)]
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    open: Round,
    ended: bool,
}

impl Gate {
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::new(State {
                open: Round::new(0),
                ended: false,
            }),
            changed: Condvar::new(),
        }
    }

    /// Lets lanes into `round`.
    pub(super) fn open(&self, round: Round) {
        lock(&self.state).open = round;
        self.changed.notify_all();
    }

    /// Ends the wait of every lane.
    pub(super) fn end(&self) {
        lock(&self.state).ended = true;
        self.changed.notify_all();
    }

    /// Lets lanes that were given up while they wait see it.
    pub(super) fn nudge(&self) {
        // Under the lock: a lane has either not looked yet, or waits already.
        let _state = lock(&self.state);
        self.changed.notify_all();
    }

    /// Waits until `round` is open; false if the migration ended or the lane was given up instead.
    pub(super) fn wait_for(&self, round: Round, given_up: &AtomicBool) -> bool {
        let shut = |state: &mut State| {
            state.open < round && !state.ended && !given_up.load(Ordering::Relaxed)
        };
        let state = self
            .changed
            .wait_while(lock(&self.state), shut)
            .unwrap_or_else(PoisonError::into_inner);
        !state.ended && state.open >= round
    }
}
