//! Threads, queues and sockets of the source: what carries out the effects of [`Session`](crate::session::Session).
//!
//! ```text
//!   control thread ── commands ──► lane 0 … lane n-1 ──► data channels
//!        ▲  ▲  └─────────────────────────────────────► control channel (sending)
//!        │  └── notes ── lanes (up, encoded, ended)
//!        ├───── notes ── reader of each device ── items ──► any lane
//!        └───── notes ── control reader ◄──────────── control channel (receiving)
//! ```
//! The control thread alone talks to the VMM and to the sources of dirty pages. Queues are bounded: at most one command per
//! lane is under way, and [`NOTES_MAX`] notes.

mod ask;
mod attempt;
mod control;
mod device;
mod dial;
mod first_round;
mod lane;
mod link;
mod mismatch;
mod permits;
mod scan;
mod watch;
mod work;

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use multifd_session::source::NotOpened;
use multifd_tracking::{DirtySet, Source};
use multifd_transport::{
    EndGuard, Ended, GuestMemory, Pulse, Running, Spawner, StdSpawner, ended, thread_cpu,
};
use multifd_wire::{
    Digest, Incarnation, LaneId, Layout, PageValues, Phase, Region, RegionId, Round,
};

pub use self::ask::ask;
pub use self::dial::{CalledDialer, Dial, Dialer, SpreadDialer};
use crate::config::{Config, ConfigError};
use crate::device::DeviceSource;
use crate::error::{Error, Fault};
use crate::pacer::Pacer;
use crate::progress::{Counters, Snapshot};
use crate::report::{Report, Timeline};
use crate::session::Outcome;
use crate::speed::LaneLoad;
use crate::steer::Steer;
use crate::vmm::Vmm;
use permits::LanePermits;
use watch::{Fate, Watch};

/// Notes to the control thread that may wait: enough that lanes and the control reader never stand still for it while it
/// pauses the guest or writes to the control channel.
const NOTES_MAX: usize = 1024;

/// Everything that a migration works on.
pub struct Parts {
    /// The machine.
    pub vmm: Box<dyn Vmm>,
    /// Its memory. Every writer of it is either stopped by [`Vmm::pause`] or seen by one of the sources.
    pub memory: GuestMemory,
    /// Who reports what was written.
    pub sources: Vec<Box<dyn Source>>,
    /// The way to the destination.
    pub dial: Box<dyn Dial>,
    /// The settings.
    pub config: Config,
    /// How threads are started; `None` starts plain ones.
    pub spawner: Option<Box<dyn Spawner>>,
}

/// What is left when a migration is over.
#[non_exhaustive]
pub struct Finished {
    /// How it went.
    pub report: Report,
    /// Why it failed, if it did.
    pub error: Option<Error>,
    /// The machine. If it migrated it must not run again. `None` if its own code does not return, or the thread that ran it was killed:
    /// it is with that thread, as are the sources and the devices, and whether the guest is paused is for the embedder to see.
    pub vmm: Option<Box<dyn Vmm>>,
    /// The sources, stopped.
    pub sources: Vec<Box<dyn Source>>,
    /// The devices; one whose own code panicked is missing. They run if the guest runs here.
    pub devices: Vec<Box<dyn DeviceSource>>,
}

/// A migration under way.
pub struct Migration {
    handle: Handle,
    shared: Arc<Shared>,
    running: Running<Finished>,
}

/// A migration that could not begin: the guest was not touched, and everything that was to be part of it can be used again.
pub type StartError = multifd_session::common::StartError<Fault, Parts>;

fn start_error(fault: Fault, parts: Parts) -> Box<StartError> {
    let error = Error::new(Phase::Hello, fault);
    Box::new(StartError::new(error, parts))
}

/// What can fail before anything is begun.
struct Prepared {
    layout: Layout,
    values: PageValues,
    ends: (Ended, EndGuard),
}

impl Prepared {
    fn new(memory: &GuestMemory) -> Result<Self, Fault> {
        let regions = memory.layouts().zip(0..).map(|(region, id)| Region {
            id: RegionId::new(id),
            guest_address: region.guest_address,
            bytes: region.bytes,
        });
        let layout = Layout::new(regions).map_err(Fault::Memory)?;
        let values = PageValues::new(&layout).map_err(|error| Fault::System {
            step: "checksums of pages",
            source: std::io::Error::other(error),
        })?;
        let ends = ended().map_err(|source| Fault::System {
            step: "an event descriptor",
            source,
        })?;
        Ok(Self {
            layout,
            values,
            ends,
        })
    }
}

/// Reads the progress and cancels; cheap to clone, usable from any thread, also after the end.
#[derive(Clone)]
pub struct Handle {
    counters: Arc<Counters>,
    notes: Sender<Note>,
    cancelled: Arc<AtomicBool>,
    wishes: Arc<Wishes>,
}

/// What the embedder has said of its guest and wants of the migration, until it was heeded.
#[derive(Debug, Default)]
struct Wishes {
    switch_over: AtomicBool,
    guest_gone: AtomicBool,
    /// The newest change of each limit, in their order.
    changes: Mutex<Vec<Steer>>,
}

impl Wishes {
    /// A change of a limit replaces an older one of the same limit that was not heeded yet: so they stay few.
    fn steer(&self, change: Steer) {
        let mut changes = lock(&self.changes);
        changes.retain(|older| std::mem::discriminant(older) != std::mem::discriminant(&change));
        changes.push(change);
    }
}

impl Handle {
    /// How far it is. Lock-free.
    #[must_use]
    pub fn progress(&self) -> Snapshot {
        self.counters.snapshot()
    }

    /// Stops the migration as soon as possible; the guest goes on running at the source. After the commit this has no effect,
    /// since the guest is then the destination's.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
        // If the queue is full the control thread is awake and sees the flag.
        let _ = self.notes.try_send(Note::Cancel);
    }

    /// Nobody would notice if the guest paused now: it is rebooting, or has said that it is quiet. Pre-copy ends with the round under
    /// way, whatever the forecast says, and the downtime limit does not hold for this switchover: the pause is as long as what is left
    /// takes. Initial bytes of devices are waited for as before, and a pause that gets much longer than was forecast ends as
    /// `commit_deadline` says. Counts for the next switchover; without channels, and before the first round, it is remembered.
    pub fn switch_over_now(&self) {
        self.wishes.switch_over.store(true, Ordering::Relaxed);
        let _ = self.notes.try_send(Note::Wish);
    }

    /// Changes a limit from now on; what is in force is in [`Snapshot::limits`]. It is heeded by the next decision, and the bandwidth cap
    /// at once. The ranges are those of [`ConfigBuilder`](crate::ConfigBuilder). After the commit it means nothing.
    ///
    /// # Errors
    /// It is out of its range; nothing was changed.
    pub fn steer(&self, change: Steer) -> Result<(), ConfigError> {
        change.check()?;
        self.wishes.steer(change);
        let _ = self.notes.try_send(Note::Wish);
        Ok(())
    }

    /// The guest has shut down or crashed: the migration ends as [`OutcomeKind::Gone`](crate::OutcomeKind::Gone), and the destination
    /// discards what it has. [`Vmm::resume`] is called all the same if it was paused for the switchover. After the commit this has no
    /// effect: the guest is the destination's.
    pub fn guest_gone(&self) {
        self.wishes.guest_gone.store(true, Ordering::Relaxed);
        let _ = self.notes.try_send(Note::Wish);
    }
}

impl Migration {
    /// Begins a migration; returns once its control thread runs.
    ///
    /// # Errors
    /// What can be found wrong before anything is sent: memory that the format can't describe, no memory for the dirty set's
    /// checksums, no thread. The guest was not touched, and the parts are in the error.
    pub fn start(parts: Parts) -> Result<Self, Box<StartError>> {
        let Prepared {
            layout,
            values,
            ends,
        } = match Prepared::new(&parts.memory) {
            Ok(prepared) => prepared,
            Err(fault) => return Err(start_error(fault, parts)),
        };
        let region_pages: Vec<u64> = layout
            .regions()
            .map(|region| region.bytes / multifd_wire::PAGE_BYTES_U64)
            .collect();
        let counters = Arc::new(Counters::new(&parts.sources, parts.config.limits()));
        counters
            .memory_pages
            .store(layout.pages_total().value(), Ordering::Relaxed);
        let (notes, inbox) = crossbeam_channel::bounded(NOTES_MAX);
        let handle = Handle {
            counters: Arc::clone(&counters),
            notes: notes.clone(),
            cancelled: Arc::new(AtomicBool::new(false)),
            wishes: Arc::default(),
        };
        let shared = Arc::new(Shared {
            dirty: DirtySet::new(&region_pages),
            values,
            layout,
            memory: parts.memory.clone(),
            digest: SharedDigest::default(),
            counters,
            pacer: Pacer::new(parts.config.bandwidth()),
            permits: LanePermits::new(parts.config.channels(), parts.config.lanes_at_work()),
            loads: Mutex::default(),
            began: Instant::now(),
            stop: AtomicBool::new(false),
            watch: Watch::new(),
            devices: Arc::new(device::DeviceTable::new()),
            cancelled: Arc::clone(&handle.cancelled),
            wishes: Arc::clone(&handle.wishes),
            config: parts.config.clone(),
        });
        let theirs: Option<Arc<dyn Spawner>> = parts.spawner.map(Arc::from);
        let spawner = theirs.clone().unwrap_or_else(|| Arc::new(StdSpawner));
        let dial: Arc<dyn Dial> = Arc::from(parts.dial);
        let control = control::Control::new(
            Arc::clone(&shared),
            parts.vmm,
            parts.sources,
            Arc::clone(&dial),
            Arc::clone(&spawner),
            notes,
            inbox,
        );
        match Running::start(
            &*spawner,
            "mfd-control",
            ends,
            control,
            control::Control::run,
        ) {
            Ok(running) => Ok(Self {
                handle,
                shared,
                running,
            }),
            Err((source, control)) => {
                let (vmm, sources) = control.into_parts();
                let step = "start a thread";
                let parts = Parts {
                    vmm,
                    sources,
                    memory: parts.memory,
                    dial: Box::new(dial),
                    config: parts.config,
                    spawner: theirs.map(|spawner| Box::new(spawner) as Box<dyn Spawner>),
                };
                Err(start_error(Fault::System { step, source }, parts))
            }
        }
    }

    /// For progress and cancellation.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Whether [`wait`](Self::wait) would return at once.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.running.is_finished()
    }

    /// An event descriptor that becomes readable, and stays so, when the migration is over. It is not to be read. If the control
    /// thread itself is killed nothing makes it readable: only [`wait`](Self::wait) finds that out.
    #[must_use]
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.running.ended()
    }

    /// Waits for the end. It comes also if the control thread does not come back: from the VMM's code, from a page fault that nobody
    /// serves, or because it was killed. That is seen within the longer one of device deadline and stall, and 2 s.
    ///
    /// # Panics
    /// If the control thread panicked, which is a bug; with the same words.
    #[must_use]
    pub fn wait(self) -> Finished {
        let Self {
            handle,
            shared,
            running,
        } = self;
        let limit = watch::silent_max(&shared.config);
        running
            .wait_while_it_beats(shared.watch.pulse(), limit)
            .unwrap_or_else(|silent| given_up(&handle, &shared, silent))
    }
}

/// The control thread does not come back. If it does so later, it finds that nobody waits for it, and commits nothing.
fn given_up(handle: &Handle, shared: &Shared, silent: Duration) -> Finished {
    let fate = shared.watch.give_up();
    shared.cancelled.store(true, Ordering::Relaxed);
    shared.stop.store(true, Ordering::Relaxed);
    let snapshot = handle.progress();
    let stuck = Fault::ThreadStuck {
        thread: format!("the control thread, which was to {}", shared.watch.step()),
        waited_ms: silent.as_millis(),
    };
    tracing::error!(fault = %stuck, "the migration is given up");
    let failed = |fault| Error::new(snapshot.phase, fault);
    let outcome = match fate {
        Fate::Open | Fate::GivenUp => Outcome::Failed(failed(stuck)),
        Fate::Committed => Outcome::Unknown(failed(Fault::OutcomeUnknown {
            why: stuck.to_string(),
        })),
        Fate::Migrated => Outcome::Migrated,
    };
    let mut timeline = Timeline::begun(shared.began);
    timeline.threads_left.push("mfd-control".to_owned());
    let config = &shared.config;
    let report = Report::new(&timeline, &outcome, &snapshot, config, &[], Vec::new());
    Finished {
        report,
        error: outcome.into_error(),
        vmm: None,
        sources: Vec::new(),
        devices: Vec::new(),
    }
}

/// What all threads of a migration share.
struct Shared {
    config: Config,
    layout: Layout,
    memory: GuestMemory,
    dirty: DirtySet,
    values: PageValues,
    digest: SharedDigest,
    counters: Arc<Counters>,
    pacer: Pacer,
    permits: LanePermits,
    loads: Mutex<Loads>,
    began: Instant,
    stop: AtomicBool,
    watch: Watch,
    devices: Arc<device::DeviceTable>,
    cancelled: Arc<AtomicBool>,
    wishes: Arc<Wishes>,
}

impl Shared {
    fn check_stop(&self) -> Result<(), Fault> {
        if self.stop.load(Ordering::Relaxed) {
            Err(Fault::Cancelled)
        } else {
            Ok(())
        }
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Bytes that were handed to data channels.
    fn sent(&self) -> u64 {
        self.counters.sent_bytes.load(Ordering::Relaxed)
    }
}

/// How fast each lane is, and what it had on its way when the destination last acknowledged something or the lane last asked for
/// pages: what the lanes share a round by.
#[derive(Debug, Default)]
struct Loads {
    lanes: Vec<LaneId>,
    all: Vec<LaneLoad>,
}

impl Loads {
    /// All lanes whose speed is known.
    fn all(&self) -> &[LaneLoad] {
        &self.all
    }

    /// Enters what a lane has on its way right now; its place among [`Self::all`], `None` while its speed is not known.
    fn now(&mut self, lane: LaneId, on_its_way: u64) -> Option<usize> {
        let place = self.lanes.iter().position(|known| *known == lane)?;
        self.all.get_mut(place)?.on_its_way = on_its_way as f64;
        Some(place)
    }
}

/// The digest over all pages as last sent, added to by every lane.
#[derive(Debug, Default)]
struct SharedDigest(AtomicU64);

impl SharedDigest {
    fn merge(&self, delta: Digest) {
        // Addition modulo 2^64, which is what merging is: the order does not matter.
        self.0.fetch_add(delta.value(), Ordering::Relaxed);
    }

    /// Complete once every lane has said that it encoded its round.
    fn value(&self) -> Digest {
        Digest::new(self.0.load(Ordering::Acquire))
    }
}

/// A lane as the control thread and the lane's thread share it. `None` when the lane is dead.
#[derive(Debug)]
struct LaneState {
    id: LaneId,
    incarnation: Incarnation,
    /// The control thread waits for the lane's thread to end.
    given_up: AtomicBool,
    /// The lane's thread is at work.
    pulse: Pulse,
    lane: Mutex<Option<crate::lane::Lane>>,
}

/// What the other threads tell the control thread.
enum Note {
    /// `epoch` counts the control channels of this migration: what an earlier one said is void.
    Frame {
        epoch: u32,
        header: multifd_wire::Header,
        table: Vec<u8>,
    },
    ControlLost {
        epoch: u32,
        error: Error,
    },
    /// An attempt to reach the destination has ended.
    Reached {
        number: u32,
        result: Result<attempt::Reached, NotOpened>,
    },
    LaneNotOpened {
        lane: LaneId,
        incarnation: Incarnation,
        why: NotOpened,
    },
    LaneUp {
        lane: LaneId,
        incarnation: Incarnation,
        closer: multifd_transport::Closer,
        description: String,
    },
    LaneEncoded {
        lane: LaneId,
        incarnation: Incarnation,
        round: Round,
    },
    LaneEnded {
        lane: LaneId,
        incarnation: Incarnation,
        fault: Option<Fault>,
    },
    Device(device::DeviceNote),
    Cancel,
    /// The embedder has said something of its guest ([`Wishes`]).
    Wish,
}

/// A poisoned lock means that another thread panicked; what it guards here is always left whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
