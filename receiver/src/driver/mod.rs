//! Threads, queues and sockets of the destination: what carries out the effects of [`Session`](crate::session::Session).
//!
//! ```text
//!   accept thread (mio, pending hellos) ──► greeters (one per hello, few, with a deadline) ── notes ──┐
//!   control reader ◄── control channel                            ── notes ──────────────────► control thread ──► control channel
//!   lane 0 … lane n-1 ◄── data channels, straight into memory     ── notes ──┘   │  ▲
//!                                                                                ▼  │
//!   loader of each device ◄── lanes (streams)                    ── notes ──┘  VMM thread
//! ```
//! Queues are bounded ([`NOTES_MAX`]), connections that have not said hello yet as well ([`multifd_transport::door::PENDING_MAX`]), and greeters
//! ([`GREETERS_MAX`]).

mod answer;
mod control;
mod device;
mod gate;
mod greet;
mod lane;
mod link;
mod vmm;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use multifd_session::destination::registry::Registry;
use multifd_transport::door::{Door, LogLimit};
use multifd_transport::{Channel, Listener, Running, Spawner, StdSpawner, ended, thread_cpu};
use multifd_wire::Phase;

pub use self::answer::{Answered, answer};
use crate::config::Config;
use crate::device::DeviceSink;
use crate::error::{Error, Fault};
use crate::progress::{Counters, Snapshot};
use crate::report::Report;
use crate::vmm::Vmm;

/// Notes to the control thread that may wait. Some hold a part of a blob (1 MiB at most), so this bounds memory too.
const NOTES_MAX: usize = 64;

/// Connections that may be saying hello at the same time: every lane of a large migration at once, and some strangers.
const GREETERS_MAX: usize = multifd_wire::limits::LANES_MAX + 64;

/// Of which for connections that can't be looked at before a greeter waits for them (RDMA).
const GREETERS_UNKNOWN_MAX: usize = GREETERS_MAX / 2;

/// How long a peer that was refused is given to read why.
const REFUSED_MAX: Duration = Duration::from_secs(1);

/// The same while a quarter of the greeters is at work.
const REFUSED_UNDER_PRESSURE: Duration = Duration::from_millis(100);

/// Everything that a reception works on.
pub struct Parts {
    /// The machine.
    pub vmm: Box<dyn Vmm>,
    /// Where the source dials. May be empty if every channel is handed over by [`Handle::offer`].
    pub listeners: Vec<Listener>,
    /// The settings.
    pub config: Config,
    /// How threads are started; `None` starts plain ones.
    pub spawner: Option<Box<dyn Spawner>>,
}

/// What is left when a reception is over.
#[non_exhaustive]
pub struct Finished {
    /// How it went.
    pub report: Report,
    /// Why it failed, if it did.
    pub error: Option<Error>,
    /// The machine. It runs if, and only if, the report says so. `None` if its thread did not come back within
    /// [`ConfigBuilder::device_deadline`](crate::ConfigBuilder::device_deadline) of the end: it is left alone then.
    pub vmm: Option<Box<dyn Vmm>>,
    /// Its devices, in the order of the table; one whose own code panicked is missing. They run if the machine does.
    pub devices: Vec<Box<dyn DeviceSink>>,
}

/// A destination that waits for a migration, or has one under way.
pub struct Reception {
    handle: Handle,
    running: Running<Finished>,
}

/// A reception that could not begin, with the machine, untouched.
pub type StartError = multifd_session::common::StartError<Fault, Box<dyn Vmm>>;

fn start_error(step: &'static str, source: io::Error, parts: Box<dyn Vmm>) -> Box<StartError> {
    let error = Error::new(Phase::Hello, Fault::System { step, source });
    Box::new(StartError::new(error, parts))
}

/// Reads the progress, hands over connections and cancels; cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct Handle {
    shared: Arc<Shared>,
}

/// A connection that was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OfferError {
    /// Too many connections are saying hello at this moment.
    #[error("{GREETERS_MAX} connections are saying hello already")]
    Busy,
    /// No thread could be started.
    #[error("no thread could be started for it")]
    NoThread,
}

impl Handle {
    /// How far it is. Lock-free.
    #[must_use]
    pub fn progress(&self) -> Snapshot {
        self.shared.counters.snapshot()
    }

    /// Gives up as soon as possible; the source is told and its guest runs on. Without effect once the guest is this side's.
    pub fn cancel(&self) {
        self.shared.cancelled.store(true, Ordering::Relaxed);
        let _ = self.shared.notes.try_send(Note::Cancel);
    }

    /// Hands over a connection that the embedder accepted itself. It is closed again if its hello is not acceptable.
    ///
    /// # Errors
    /// [`OfferError`]; the connection is then closed.
    pub fn offer(&self, channel: Box<dyn Channel>) -> Result<(), OfferError> {
        greet::offer(&self.shared, channel, GREETERS_MAX).map_err(|refused| refused.error)
    }
}

impl Reception {
    /// Begins to wait for a source.
    ///
    /// # Errors
    /// No thread, or no event queue for the listeners. The VMM is in the error.
    pub fn start(parts: Parts) -> Result<Self, Box<StartError>> {
        let ends = match ended() {
            Ok(ends) => ends,
            Err(source) => {
                return Err(start_error("an event descriptor", source, parts.vmm));
            }
        };
        let spawner: Arc<dyn Spawner> = parts
            .spawner
            .map_or_else(|| Arc::new(StdSpawner) as Arc<dyn Spawner>, Arc::from);
        let registry = Registry::new(&parts.config);
        let (shared, inbox) = Shared::new(parts.config, registry, Arc::clone(&spawner));
        let greeters = Arc::new(greet::Greeters(Arc::clone(&shared)));
        let door = match Door::open(greeters, parts.listeners, &*spawner, "mfd-accept") {
            Ok(door) => door,
            Err(source) => {
                return Err(start_error("wait on the listeners", source, parts.vmm));
            }
        };
        let no_thread = |(source, vmm)| start_error("start a thread", source, vmm);
        let control = control::Control::new(Arc::clone(&shared), inbox, parts.vmm, door)
            .map_err(no_thread)?;
        let running = Running::start(
            &*spawner,
            "mfd-control",
            ends,
            control,
            control::Control::run,
        )
        .map_err(|(source, control)| no_thread((source, control.into_vmm())))?;
        Ok(Self {
            handle: Handle { shared },
            running,
        })
    }

    /// For progress, connections and cancellation.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Whether [`wait`](Self::wait) would return at once.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.running.is_finished()
    }

    /// An event descriptor that becomes readable, and stays so, when the reception is over. It is not to be read.
    #[must_use]
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.running.ended()
    }

    /// Waits for the end.
    ///
    /// # Panics
    /// If the control thread panicked, which is a bug; with the same words.
    #[must_use]
    pub fn wait(self) -> Finished {
        self.running.wait()
    }
}

/// What all threads of a reception share.
struct Shared {
    config: Config,
    counters: Counters,
    notes: Sender<Note>,
    spawner: Arc<dyn Spawner>,
    registry: Mutex<Registry>,
    log_limit: LogLimit,
    greeters: AtomicUsize,
    cancelled: AtomicBool,
}

impl Shared {
    fn new(
        config: Config,
        registry: Registry,
        spawner: Arc<dyn Spawner>,
    ) -> (Arc<Self>, Receiver<Note>) {
        let (notes, inbox) = crossbeam_channel::bounded(NOTES_MAX);
        let shared = Arc::new(Self {
            config,
            counters: Counters::default(),
            notes,
            spawner,
            registry: Mutex::new(registry),
            log_limit: LogLimit::default(),
            greeters: AtomicUsize::new(0),
            cancelled: AtomicBool::new(false),
        });
        (shared, inbox)
    }

    /// How long a peer that was refused is given to read why.
    fn refused_limit(&self) -> Duration {
        let busy = self.greeters.load(std::sync::atomic::Ordering::Acquire) > GREETERS_MAX / 4;
        let limit = if busy {
            REFUSED_UNDER_PRESSURE
        } else {
            REFUSED_MAX
        };
        limit.min(self.config.hello_deadline())
    }
}

/// What the other threads tell the control thread.
enum Note {
    /// A source said hello on a control channel and was accepted.
    Opened(greet::Opened),
    /// A data channel was let in.
    LaneJoined(greet::Joined),
    /// A source that knows the session's secret wants to go on with it.
    Resuming(greet::Opened),
    /// A source that knows the session's secret asks how it ended.
    Asked {
        secret: multifd_wire::Token,
        answer: Sender<multifd_wire::frame::OutcomeState>,
    },
    /// Another source begins, and takes the place of a session that lost its control channel in set-up.
    GiveWay,
    /// `epoch` counts the control channels of this session: what an earlier one said is void.
    Inbound {
        epoch: u32,
        message: link::Message,
    },
    ControlLost {
        epoch: u32,
        fault: Fault,
    },
    LaneArrived {
        lane: multifd_wire::LaneId,
        incarnation: multifd_wire::Incarnation,
        round: multifd_wire::Round,
        last: bool,
    },
    LaneEnded {
        mark: multifd_wire::frame::LaneMark,
        fault: Fault,
    },
    Damaged {
        lane: multifd_wire::LaneId,
        incarnation: multifd_wire::Incarnation,
        sequence: multifd_wire::Sequence,
        runs: Vec<multifd_wire::PageRun>,
    },
    Vmm(vmm::VmmDone),
    Device(device::DeviceNote),
    Cancel,
}

/// A poisoned lock means that another thread panicked; what it guards here is always left whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
