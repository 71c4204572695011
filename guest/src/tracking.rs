//! How the machine's writes are learnt: KVM's ring or log, made with the machine and lent to one migration at a time.
//!
//! The kernel counts the entries of a vCPU's ring from the vCPU's creation on, so whoever harvests must have harvested
//! from the beginning: there is one source for the life of the machine, and [`KvmTracking::source`] lends it. A guest
//! that migrates to and fro two hundred times is a new machine, with a new source, each time it arrives.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use kvm_ioctls::{VcpuFd, VmFd};
use multifd_tracking::kvm::{
    self, LogSource, Method, Protect, RingConfig, RingFullHandle, RingSource,
};
use multifd_tracking::{
    CollectPhase, Collection, DirtySet, Error as TrackingError, Figures, Source,
};

use crate::config::Tracking;
use crate::error::{Error, Result};
use crate::memory::Memory;
use crate::slots::MemorySlots;

/// The dirty rings of a machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rings {
    /// The size of each vCPU's.
    config: RingConfig,
    reaping: Reaping,
}

/// Who empties the rings between two collections, before they are full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reaping {
    /// A thread of the source.
    BySource,
    /// Nobody, so that they get full: for the test of what happens then.
    #[cfg(test)]
    ByNobody,
}

impl Default for Rings {
    /// The largest rings. Emulated stores push a page again and again; 65,536 entries take 1 MiB for each vCPU and last
    /// for a quarter of a second of the fastest writer seen.
    fn default() -> Self {
        Self {
            config: RingConfig {
                entries: RingConfig::ENTRIES_MAX,
            },
            reaping: Reaping::BySource,
        }
    }
}

#[cfg(test)]
impl Rings {
    /// The smallest rings, which only the vCPUs' own threads empty.
    pub(crate) fn that_run_full() -> Self {
        Self {
            config: RingConfig {
                entries: RingConfig::ENTRIES_MIN,
            },
            reaping: Reaping::ByNobody,
        }
    }
}

/// The way of tracking that a machine was given before its first vCPU.
#[derive(Debug)]
pub(crate) struct TrackingChoice {
    method: Method,
    reason: &'static str,
    rings: Rings,
}

/// A machine's one source, and who has it.
#[derive(Clone, Debug)]
pub(crate) struct KvmTracking {
    shared: Arc<Shared>,
}

struct Shared {
    method: Method,
    reason: &'static str,
    source: Mutex<Box<dyn Source>>,
    lent: AtomicBool,
    ring_full: RingFull,
}

/// What a vCPU thread does when its ring is full.
#[derive(Clone)]
pub(crate) struct RingFull {
    handle: Option<RingFullHandle>,
}

impl TrackingChoice {
    /// Decides, and switches the ring on if it is the one. To be called before the first vCPU is made.
    ///
    /// # Errors
    /// [`Error::Tracking`] if what is demanded is not offered.
    pub(crate) fn enable(vm: &VmFd, wanted: Tracking, rings: Rings) -> Result<Self> {
        let (method, reason) = match wanted {
            Tracking::Ring => (Method::Ring, "the user asked for KVM's dirty ring"),
            Tracking::Log => (Method::Log, "the user asked for KVM's dirty log"),
            Tracking::Auto
            | Tracking::Kvm
            | Tracking::Process
            | Tracking::Userfault
            | Tracking::Marks => match kvm::probe(vm)?.method() {
                Method::Ring => (Method::Ring, "KVM offers its dirty ring"),
                Method::Log => (Method::Log, "KVM offers no dirty ring, so its log is used"),
            },
        };
        if method == Method::Ring {
            kvm::enable(vm, rings.config)?;
        }
        Ok(Self {
            method,
            reason,
            rings,
        })
    }

    /// The source, for vCPUs that have not run.
    ///
    /// # Errors
    /// [`Error::Tracking`], [`Error::Kernel`].
    pub(crate) fn attach(
        self,
        vm: &Arc<VmFd>,
        vcpus: &[VcpuFd],
        memory: &Memory,
    ) -> Result<KvmTracking> {
        let slots = MemorySlots::new(vm, memory)?;
        let tracked = slots.tracked()?;
        let mut handle = None;
        let source: Box<dyn Source> = match self.method {
            Method::Ring => {
                let Rings { config, reaping } = self.rings;
                let source = RingSource::new(vm, vcpus, config, tracked, Box::new(slots))?;
                handle = Some(source.handle());
                match reaping {
                    Reaping::BySource => Box::new(source),
                    #[cfg(test)]
                    Reaping::ByNobody => Box::new(source.without_reaper()),
                }
            }
            Method::Log => Box::new(LogSource::new(
                vm,
                Protect::ManualInitiallySet,
                tracked,
                Box::new(slots),
            )?),
        };
        let ring_full = RingFull { handle };
        let shared = Shared {
            method: self.method,
            reason: self.reason,
            source: Mutex::new(source),
            lent: AtomicBool::new(false),
            ring_full,
        };
        Ok(KvmTracking {
            shared: Arc::new(shared),
        })
    }
}

impl KvmTracking {
    /// What it came to.
    pub(crate) fn kind(&self) -> Tracking {
        match self.shared.method {
            Method::Ring => Tracking::Ring,
            Method::Log => Tracking::Log,
        }
    }

    /// For the vCPU threads.
    pub(crate) fn ring_full(&self) -> RingFull {
        self.shared.ring_full.clone()
    }

    /// Lends the source.
    ///
    /// # Errors
    /// [`Error::Misuse`] while another one has it.
    pub(crate) fn source(&self) -> Result<Box<dyn Source>> {
        if self.shared.lent.swap(true, Ordering::AcqRel) {
            return Err(Error::Misuse {
                advice: "drop the guest's other tracking source first: it has one",
            });
        }
        let before = self.shared.source().figures();
        let name = self.shared.source().name().to_owned();
        Ok(Box::new(Lent {
            shared: Arc::clone(&self.shared),
            name,
            before,
        }))
    }
}

impl Shared {
    fn source(&self) -> MutexGuard<'_, Box<dyn Source>> {
        self.source
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("method", &self.method)
            .field("lent", &self.lent)
            .finish_non_exhaustive()
    }
}

impl RingFull {
    /// Empties the ring of virtual CPU `vcpu`, on its own thread.
    pub(crate) fn harvest(&self, vcpu: u32) -> std::result::Result<(), String> {
        let Some(handle) = &self.handle else {
            return Err("a full dirty ring, and the machine has none".to_owned());
        };
        match handle.on_full(vcpu as usize) {
            Err(error @ TrackingError::Misuse { .. }) => Err(error.to_string()),
            // What the kernel refused the source counts and keeps for its next harvest, and the exit comes again if the ring is
            // still full.
            Ok(_) | Err(_) => Ok(()),
        }
    }
}

/// The machine's source in the hands of one migration. Dropping it ends the tracking and gives it back.
struct Lent {
    shared: Arc<Shared>,
    name: String,
    /// What the source had counted for earlier ones.
    before: Figures,
}

impl Source for Lent {
    fn name(&self) -> &str {
        &self.name
    }

    fn reason(&self) -> Option<String> {
        Some(self.shared.reason.to_owned())
    }

    fn start(&mut self, set: &DirtySet) -> std::result::Result<(), TrackingError> {
        self.shared.source().start(set)
    }

    fn collect(
        &mut self,
        set: &DirtySet,
        phase: CollectPhase,
    ) -> std::result::Result<Collection, TrackingError> {
        self.shared.source().collect(set, phase)
    }

    fn stop(&mut self) -> std::result::Result<(), TrackingError> {
        self.shared.source().stop()
    }

    fn figures(&self) -> Figures {
        self.shared.source().figures() - self.before
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        // Who drops a source that tracks has no use for the answer; the slots stay logged at worst.
        let _ = self.stop();
        self.shared.lent.store(false, Ordering::Release);
    }
}
