//! What both sides do with threads and sockets. All of them block; they meet at one lock, which nobody holds while moving bytes.
//!
//! ```text
//!   brg-vmm<n>-in   reads a monitor's connection, as far as there is credit      brg-lane<n>     sends pieces
//!   brg-vmm<n>-out  writes to it what came, in order                             brg-lane<n>-in  receives pieces
//!   brg-control     says credit, ends, outcome, signs of life                    brg-control-in  reads them
//! ```

pub(crate) mod connection;
pub(crate) mod control;
pub(crate) mod core;
pub(crate) mod frames;
pub(crate) mod lane;
pub(crate) mod wind_up;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use multifd_wire::Role;

use self::core::Core;
use crate::config::Config;
use crate::keeper::MakeKeeper;
use crate::piece::Pool;

/// What the threads of one side share.
pub(crate) struct Shared {
    pub(crate) role: Role,
    pub(crate) config: Config,
    pub(crate) began: Instant,
    pub(crate) pool: Arc<Pool>,
    /// How a keeper is started, at a source that wants one.
    pub(crate) make_keeper: Option<MakeKeeper>,
    core: Mutex<Core>,
    /// A lane may have something to send.
    pub(crate) lanes: Condvar,
    /// The control channel may have something to say.
    pub(crate) control: Condvar,
    /// The state changed: for whoever waits for the end, or for a stream to become ready.
    pub(crate) changed: Condvar,
}

impl Shared {
    pub(crate) fn new(
        role: Role,
        config: Config,
        core: Core,
        make_keeper: Option<MakeKeeper>,
    ) -> Arc<Self> {
        Arc::new(Self {
            role,
            config,
            began: Instant::now(),
            pool: Arc::default(),
            make_keeper,
            core: Mutex::new(core),
            lanes: Condvar::new(),
            control: Condvar::new(),
            changed: Condvar::new(),
        })
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The time, as the machines count it.
    pub(crate) fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Something happened that anybody may wait for.
    pub(crate) fn wake_all(&self) {
        self.lanes.notify_all();
        self.control.notify_all();
        self.changed.notify_all();
    }
}

/// Waits on a condition for at most `time`.
pub(crate) fn wait<'a>(
    condition: &Condvar,
    core: MutexGuard<'a, Core>,
    time: Duration,
) -> MutexGuard<'a, Core> {
    condition
        .wait_timeout(core, time)
        .unwrap_or_else(PoisonError::into_inner)
        .0
}

/// Starts a thread with a name of at most 15 bytes.
pub(crate) fn spawn(name: &str, body: impl FnOnce() + Send + 'static) {
    let started = std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(body);
    if let Err(error) = started {
        // The session then stands still and ends by its own deadlines.
        tracing::error!(name, %error, "no thread");
    }
}
