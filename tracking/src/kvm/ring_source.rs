//! The dirty rings of a VM's vCPUs as a source.
//!
//! Two kinds of thread harvest: the collector all rings, and each vCPU's own thread its own ring when that is full. A
//! ring's lock is held from the harvest until the pages are in the set, so a collection that returned has seen every
//! entry harvested before it, by whomever. The collector takes the locks in the order of the vCPUs; a vCPU's thread takes
//! one; so they cannot wait for each other in a circle.
//!
//! `KVM_RESET_DIRTY_RINGS` resets what was harvested in *all* rings, under a lock of the kernel. Whoever marked entries as
//! harvested makes a call of its own afterwards, and the pages are protected when that call has returned, whichever
//! call did it.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kvm_ioctls::{VcpuFd, VmFd};

use super::ring::{Harvest, Ring, RingConfig};
use super::slots::Slots;
use super::{SlotControl, abi, require_host_page};
use crate::kernel::{Kernel, Linux, Payload, duplicate};
use crate::source::Counters;
use crate::{CollectPhase, Collected, Collection, DirtySet, Error, Figures, RearmFailed, Source};

/// What the vCPUs wrote, from their dirty rings.
pub struct RingSource {
    shared: Arc<Shared>,
    control: Box<dyn SlotControl>,
    logging: bool,
}

struct Shared {
    kernel: Arc<dyn Kernel>,
    vm: OwnedFd,
    slots: Slots,
    vcpus: Vec<Vcpu>,
    /// What was harvested when a reset failed. It goes first into the next harvest.
    kept: Mutex<Collected>,
    counters: Counters,
}

struct Vcpu {
    ring: Mutex<Ring>,
    entries: AtomicU64,
    ring_full: AtomicU64,
}

/// What one vCPU's ring brought since the source was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpuFigures {
    /// Entries harvested: pages written, duplicates included.
    pub entries: u64,
    /// Exits because the ring was nearly full.
    pub ring_full: u64,
}

impl RingSource {
    /// The rings of all of the VM's vCPUs; a vCPU's index is its place in the iterator. [`enable`](super::enable) was
    /// called before they were created, with the same `config`.
    ///
    /// # Errors
    /// [`Error::Misuse`] for a bad size or no vCPU, [`Error::Unsupported`] on a host without 4096-octet pages,
    /// [`Error::Kernel`] if a ring cannot be mapped.
    pub fn new<'a>(
        vm: &VmFd,
        vcpus: impl IntoIterator<Item = &'a VcpuFd>,
        config: RingConfig,
        slots: Slots,
        control: Box<dyn SlotControl>,
    ) -> Result<Self, Error> {
        require_host_page()?;
        Self::with_kernel(Arc::new(Linux), vm, vcpus, config, slots, control)
    }

    /// As [`RingSource::new`], with another kernel and any descriptors that it knows.
    ///
    /// # Errors
    /// As [`RingSource::new`].
    pub fn with_kernel<'a, V: AsRawFd + 'a>(
        kernel: Arc<dyn Kernel>,
        vm: &impl AsRawFd,
        vcpus: impl IntoIterator<Item = &'a V>,
        config: RingConfig,
        slots: Slots,
        control: Box<dyn SlotControl>,
    ) -> Result<Self, Error> {
        config.check_entries()?;
        let vm = duplicate(vm).map_err(|error| Error::Kernel {
            call: "dup of the VM",
            error,
        })?;
        let vcpus = vcpus
            .into_iter()
            .map(|vcpu| {
                let fd = duplicate(vcpu).map_err(|error| Error::Kernel {
                    call: "dup of a vCPU",
                    error,
                })?;
                let memory = kernel
                    .map_ring(fd.as_fd(), config.entries)
                    .map_err(|error| Error::Kernel {
                        call: "mmap of a vCPU's dirty ring",
                        error,
                    })?;
                let ring = Mutex::new(Ring::new(memory));
                Ok(Vcpu {
                    ring,
                    entries: AtomicU64::new(0),
                    ring_full: AtomicU64::new(0),
                })
            })
            .collect::<Result<Vec<_>, Error>>()?;
        if vcpus.is_empty() {
            return Err(Error::Misuse {
                what: "a ring source needs at least one vCPU".into(),
            });
        }
        let shared = Shared {
            kernel,
            vm,
            slots,
            vcpus,
            kept: Mutex::new(Collected::new()),
            counters: Counters::default(),
        };
        Ok(Self {
            shared: Arc::new(shared),
            control,
            logging: false,
        })
    }

    /// A handle for the vCPUs' threads.
    pub fn handle(&self) -> RingFullHandle {
        RingFullHandle {
            shared: Arc::clone(&self.shared),
        }
    }

    /// What each vCPU's ring brought, in the order of the vCPUs.
    pub fn vcpu_figures(&self) -> Vec<VcpuFigures> {
        self.shared
            .vcpus
            .iter()
            .map(|vcpu| VcpuFigures {
                entries: vcpu.entries.load(Ordering::Relaxed),
                ring_full: vcpu.ring_full.load(Ordering::Relaxed),
            })
            .collect()
    }
}

impl Source for RingSource {
    fn name(&self) -> &str {
        "kvm-ring"
    }

    fn start(&mut self, set: &DirtySet) -> Result<(), Error> {
        self.shared.slots.check(set)?;
        // What an earlier migration left in the rings is taken out first, so that the rings start empty.
        self.shared.collect_all(set)?;
        self.control.set_logging(true).map_err(|error| Error::Vmm {
            what: "switch dirty logging on",
            error,
        })?;
        self.logging = true;
        Ok(())
    }

    fn collect(&mut self, set: &DirtySet, _phase: CollectPhase) -> Result<Collection, Error> {
        if !self.logging {
            return Err(Error::Misuse {
                what: "the ring source collects only between start and stop".into(),
            });
        }
        self.shared.collect_all(set)
    }

    fn stop(&mut self) -> Result<(), Error> {
        if !std::mem::take(&mut self.logging) {
            return Ok(());
        }
        let switched = self.control.set_logging(false).map_err(|error| Error::Vmm {
            what: "switch dirty logging off",
            error,
        });
        let emptied = self.shared.discard();
        switched.and(emptied)
    }

    fn figures(&self) -> Figures {
        self.shared.counters.figures()
    }
}

/// Lets a vCPU's thread empty that vCPU's own ring, so that no other vCPU waits for it.
#[derive(Clone)]
pub struct RingFullHandle {
    shared: Arc<Shared>,
}

impl RingFullHandle {
    /// To be called by the thread of vCPU `vcpu` when `KVM_RUN` returned with `KVM_EXIT_DIRTY_RING_FULL`: takes what the
    /// ring holds, has KVM report those pages' next writes, and merges them into the set. The vCPU may then re-enter,
    /// also after an error: if the ring is still full, KVM exits again.
    ///
    /// # Errors
    /// [`Error::Misuse`] if there is no such vCPU; [`Error::Kernel`] if the reset failed. Nothing is lost: the pages
    /// go into the next harvest.
    pub fn on_full(&self, vcpu: usize, set: &DirtySet) -> Result<Collection, Error> {
        let Some(own) = self.shared.vcpus.get(vcpu) else {
            let known = self.shared.vcpus.len();
            return Err(Error::Misuse {
                what: format!("vCPU {vcpu} of {known} has no dirty ring"),
            });
        };
        own.ring_full.fetch_add(1, Ordering::Relaxed);
        self.shared
            .counters
            .ring_full_soft
            .fetch_add(1, Ordering::Relaxed);
        self.shared.collect(std::slice::from_ref(own), set)
    }
}

impl Shared {
    fn collect_all(&self, set: &DirtySet) -> Result<Collection, Error> {
        self.collect(&self.vcpus, set)
    }

    /// Harvests the rings of `vcpus`, resets and merges.
    fn collect(&self, vcpus: &[Vcpu], set: &DirtySet) -> Result<Collection, Error> {
        let begun = Instant::now();
        let (collected, _locks) = self.harvest(vcpus);
        let reported = collected.pages();
        let merged = self
            .rearm(collected)
            .map(|rearmed| rearmed.map_or(0, |rearmed| set.merge(rearmed)));
        let pages = *merged.as_ref().unwrap_or(&0);
        self.counters
            .harvested(begun, Collection { pages, reported });
        merged.map(|pages| Collection { pages, reported })
    }

    /// What is in the rings, and the rings' locks, which are to be held until the pages are in the set.
    fn harvest<'a>(&self, vcpus: &'a [Vcpu]) -> (Collected, Vec<MutexGuard<'a, Ring>>) {
        let mut collected = Collected::new();
        let mut locks = Vec::with_capacity(vcpus.len());
        for vcpu in vcpus {
            let mut ring = locked(&vcpu.ring);
            let harvest = ring.harvest(&self.slots, &mut collected);
            locks.push(ring);
            vcpu.entries.fetch_add(harvest.entries, Ordering::Relaxed);
            self.judge(harvest, &mut collected);
        }
        collected.append(std::mem::take(&mut *locked(&self.kept)));
        (collected, locks)
    }

    /// Counts what was wrong with a ring, and adds everything if something may be missing.
    fn judge(&self, harvest: Harvest, collected: &mut Collected) {
        let counters = &self.counters;
        if harvest.unknown > 0 {
            counters
                .entries_unknown
                .fetch_add(harvest.unknown, Ordering::Relaxed);
            counters.all_dirty.fetch_add(1, Ordering::Relaxed);
        }
        if harvest.brimful {
            counters.ring_full_hard.fetch_add(1, Ordering::Relaxed);
            counters.all_dirty.fetch_add(1, Ordering::Relaxed);
            self.slots
                .iter()
                .for_each(|slot| collected.push_run(slot.run()));
        }
    }

    /// Has KVM report the next write to what was collected; keeps the pages if it refuses. Nothing is asked for nothing.
    fn rearm(&self, collected: Collected) -> Result<Option<crate::Rearmed>, Error> {
        if collected.is_empty() {
            return Ok(None);
        }
        match collected.rearm(|| self.reset()) {
            Ok(rearmed) => Ok(Some(rearmed)),
            Err(RearmFailed { collected, error }) => {
                self.counters.errors.fetch_add(1, Ordering::Relaxed);
                locked(&self.kept).append(collected);
                Err(Error::Kernel {
                    call: abi::RESET_DIRTY_RINGS.name(),
                    error,
                })
            }
        }
    }

    fn reset(&self) -> std::io::Result<()> {
        self.counters.resets.fetch_add(1, Ordering::Relaxed);
        self.kernel
            .ioctl(self.vm.as_fd(), abi::RESET_DIRTY_RINGS, Payload::none())
            .map(|_| ())
    }

    /// Empties the rings when nobody wants their content any more; a full ring would stop its vCPU for ever.
    fn discard(&self) -> Result<(), Error> {
        let (collected, _locks) = self.harvest(&self.vcpus);
        if collected.is_empty() {
            return Ok(());
        }
        drop(collected);
        self.reset().map_err(|error| Error::Kernel {
            call: abi::RESET_DIRTY_RINGS.name(),
            error,
        })
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
