//! The dirty rings of a VM's vCPUs as a source.
//!
//! Three kinds of thread harvest: the collector all rings at the end of a round; each vCPU's own thread its own ring
//! when that is full; and between the two a reaper all rings, so often that they do not get full ([`Pace`]). One lock is
//! held from the harvest until the pages are in the set, so a collection that returned has everything that was harvested
//! before it, by whomever.
//!
//! `KVM_RESET_DIRTY_RINGS` resets what was harvested in all rings and says how many entries that were. Fewer than were
//! harvested means that some pages are not protected again, because a signal ended the call early (Linux 6.16 and later
//! then return what is done) or because the ring overflowed. So it is called until the number is right.
//!
//! After an overflow pages are missing and stay unprotected: they would never be reported again. The next collection
//! then switches logging off and on, which protects every page, and marks everything.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuFd, VmFd};

use super::pace::Pace;
use super::ring::{Harvest, Ring, RingConfig};
use super::slots::Slots;
use super::{SlotControl, abi, require_host_page};
use crate::kernel::{Kernel, Linux, Payload, duplicate};
use crate::source::Counters;
use crate::{CollectPhase, Collected, Collection, DirtySet, Error, Figures, RearmFailed, Source};

/// Resets in a row that reset nothing before it is believed that there is nothing left to reset.
const IDLE_RESETS_MAX: u32 = 2;

/// Times that rings are taken anew because their vCPUs write on beyond the end. A vCPU that KVM runs so leaves within some
/// hundred instructions, far less than so many resets take.
const RECOVERIES_MAX: u32 = 10_000;

/// How long a vCPU with a full ring stays out when there was nothing to take: tracking is being switched off, or somebody else was quicker.
const FULL_RETRY: Duration = Duration::from_millis(1);

/// What the vCPUs wrote, from their dirty rings.
pub struct RingSource {
    shared: Arc<Shared>,
    reaping: bool,
    reaper: Option<Reaper>,
    /// What was counted at the last collection.
    told: Collection,
}

struct Shared {
    kernel: Arc<dyn Kernel>,
    vm: OwnedFd,
    slots: Slots,
    control: Box<dyn SlotControl>,
    config: RingConfig,
    rings: Mutex<Rings>,
    vcpus: Vec<Vcpu>,
    logging: AtomicBool,
    /// The set of the migration under way, for the vCPUs' own threads. A harvest holds it, so that none is left over from an earlier
    /// migration when the next one begins.
    set: RwLock<Option<DirtySet>>,
    /// A ring overflowed since the last collection.
    overflowed: AtomicBool,
    counters: Counters,
}

struct Rings {
    rings: Vec<Ring>,
    /// What was harvested when a reset failed. It goes into the next harvest.
    kept: Collected,
}

#[derive(Default)]
struct Vcpu {
    entries: AtomicU64,
    ring_full: AtomicU64,
    entries_per_s: AtomicU64,
}

/// What one vCPU's ring brought since the source was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpuFigures {
    /// Entries harvested: pages written, duplicates included.
    pub entries: u64,
    /// Exits because the ring was nearly full.
    pub ring_full: u64,
    /// Entries a second, as the reaper saw it last. 0 without a reaper.
    pub entries_per_s: u64,
}

impl RingSource {
    /// The rings of all of the VM's vCPUs; a vCPU's index is its place in the iterator. [`enable`](super::enable) was
    /// called before they were created, with the same `config`.
    ///
    /// # Errors
    /// [`Error::Misuse`] for a bad size or no vCPU, [`Error::Unsupported`] on a host without 4096-byte pages,
    /// [`Error::Kernel`] if a ring cannot be mapped (also if it was not enabled, or smaller than `config` says).
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
        let map = |vcpu: &V| {
            let fd = duplicate(vcpu).map_err(|error| Error::Kernel {
                call: "dup of a vCPU",
                error,
            })?;
            let memory = kernel.map_ring(fd.as_fd(), config.entries);
            memory.map(Ring::new).map_err(|error| Error::Kernel {
                call: "mmap of a vCPU's dirty ring",
                error,
            })
        };
        let rings = vcpus
            .into_iter()
            .map(map)
            .collect::<Result<Vec<_>, Error>>()?;
        if rings.is_empty() {
            return Err(Error::Misuse {
                what: "a ring source needs at least one vCPU".into(),
            });
        }
        let shared = Shared {
            kernel,
            vm,
            slots,
            control,
            config,
            vcpus: rings.iter().map(|_| Vcpu::default()).collect(),
            rings: Mutex::new(Rings {
                rings,
                kept: Collected::new(),
            }),
            logging: AtomicBool::new(false),
            set: RwLock::new(None),
            overflowed: AtomicBool::new(false),
            counters: Counters::default(),
        };
        Ok(Self {
            shared: Arc::new(shared),
            reaping: true,
            reaper: None,
            told: Collection::default(),
        })
    }

    /// Without the thread that empties the rings between collections. For an embedder that calls
    /// [`RingFullHandle::reap`] from a thread of its own.
    #[must_use]
    pub fn without_reaper(mut self) -> Self {
        self.reaping = false;
        self
    }

    /// A handle for the vCPUs' threads.
    pub fn handle(&self) -> RingFullHandle {
        RingFullHandle {
            shared: Arc::clone(&self.shared),
        }
    }

    /// What each vCPU's ring brought, in the order of the vCPUs.
    pub fn vcpu_figures(&self) -> Vec<VcpuFigures> {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let figures = |vcpu: &Vcpu| VcpuFigures {
            entries: read(&vcpu.entries),
            ring_full: read(&vcpu.ring_full),
            entries_per_s: read(&vcpu.entries_per_s),
        };
        self.shared.vcpus.iter().map(figures).collect()
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
        // A ring may be full as soon as logging is on.
        self.shared.serve(Some(set.clone()));
        if let Err(error) = self.shared.set_logging(true) {
            self.shared.serve(None);
            return Err(error);
        }
        self.shared.overflowed.store(false, Ordering::SeqCst);
        if self.reaping && self.reaper.is_none() {
            match Reaper::spawn(Arc::clone(&self.shared), set.clone()) {
                Ok(reaper) => self.reaper = Some(reaper),
                Err(error) => {
                    self.shared.serve(None);
                    self.shared.set_logging(false)?;
                    return Err(Error::Kernel {
                        call: "spawn of the reaper's thread",
                        error,
                    });
                }
            }
        }
        self.told = self.shared.counters.collection();
        Ok(())
    }

    /// What it returns covers the vCPUs' and the reaper's harvests since the last collection too.
    fn collect(&mut self, set: &DirtySet, _phase: CollectPhase) -> Result<Collection, Error> {
        if !self.shared.logging.load(Ordering::SeqCst) {
            return Err(Error::Misuse {
                what: "the ring source collects only between start and stop".into(),
            });
        }
        self.shared.collect_all(set)?;
        self.shared.heal(set)?;
        let now = self.shared.counters.collection();
        let told = std::mem::replace(&mut self.told, now);
        Ok(Collection {
            pages: now.pages - told.pages,
            reported: now.reported - told.reported,
        })
    }

    fn stop(&mut self) -> Result<(), Error> {
        drop(self.reaper.take());
        // From here on a full ring waits for `discard`, which empties all of them when logging is off.
        self.shared.serve(None);
        if !self.shared.logging.load(Ordering::SeqCst) {
            return Ok(());
        }
        let switched = self.shared.set_logging(false);
        let emptied = self.shared.discard();
        switched.and(emptied)
    }

    fn figures(&self) -> Figures {
        self.shared.counters.figures()
    }
}

/// Lets a vCPU's thread empty that vCPU's own ring.
#[derive(Clone)]
pub struct RingFullHandle {
    shared: Arc<Shared>,
}

impl RingFullHandle {
    /// To be called by the thread of vCPU `vcpu` when `KVM_RUN` returned with `KVM_EXIT_DIRTY_RING_FULL`: takes what the
    /// ring holds, has KVM report those pages' next writes, and merges them into the set of the migration under way. The vCPU may
    /// then re-enter, also after an error: if the ring is still full, KVM exits again. It takes a millisecond if there was nothing to
    /// take, as when tracking is being switched off.
    ///
    /// # Errors
    /// [`Error::Misuse`] if there is no such vCPU; [`Error::Kernel`] if the reset failed. Nothing is lost: the pages
    /// go into the next harvest.
    pub fn on_full(&self, vcpu: usize) -> Result<Collection, Error> {
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
        let taken = {
            let set = self
                .shared
                .set
                .read()
                .unwrap_or_else(PoisonError::into_inner);
            set.as_ref().map_or(Ok(Collection::default()), |set| {
                self.shared.collect(vcpu..vcpu + 1, set)
            })
        };
        if !taken.as_ref().is_ok_and(|taken| taken.reported > 0) {
            std::thread::sleep(FULL_RETRY);
        }
        taken
    }

    /// Empties all rings into the set, as the source's own reaper does. For embedders whose threads are their own.
    ///
    /// # Errors
    /// [`Error::Kernel`] if the reset failed; the pages go into the next harvest.
    pub fn reap(&self, set: &DirtySet) -> Result<Collection, Error> {
        self.shared.collect_all(set)
    }
}

impl Shared {
    fn locked(&self) -> MutexGuard<'_, Rings> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, set: Option<DirtySet>) {
        *self.set.write().unwrap_or_else(PoisonError::into_inner) = set;
    }

    fn set_logging(&self, on: bool) -> Result<(), Error> {
        self.logging.store(on, Ordering::SeqCst);
        self.control.set_logging(on).map_err(|error| {
            self.logging.store(false, Ordering::SeqCst);
            let what = if on {
                "switch dirty logging on"
            } else {
                "switch dirty logging off"
            };
            Error::Vmm { what, error }
        })
    }

    fn collect_all(&self, set: &DirtySet) -> Result<Collection, Error> {
        self.collect(0..self.vcpus.len(), set)
    }

    /// Harvests the rings of `vcpus`, resets and merges.
    fn collect(&self, vcpus: Range<usize>, set: &DirtySet) -> Result<Collection, Error> {
        let begun = Instant::now();
        let mut rings = self.locked();
        let rings = &mut *rings;
        let mut collected = self.harvest(rings, vcpus);
        let missing = self.reset_and_recover(rings, &mut collected);
        let reported = collected.pages();
        let rearmed = collected.rearm(|| match missing? {
            0 => Ok(()),
            missing => Err(io::Error::other(format!(
                "{missing} harvested entries were not reset"
            ))),
        });
        let merged = match rearmed {
            Ok(rearmed) => Ok(set.merge(rearmed)),
            Err(RearmFailed { collected, error }) => {
                self.counters.errors.fetch_add(1, Ordering::Relaxed);
                rings.kept.append(collected);
                Err(Error::Kernel {
                    call: abi::RESET_DIRTY_RINGS.name(),
                    error,
                })
            }
        };
        let pages = *merged.as_ref().unwrap_or(&0);
        self.counters.harvested(
            begun,
            Collection {
                pages,
                reported: if merged.is_ok() { reported } else { 0 },
            },
        );
        merged.map(|pages| Collection { pages, reported })
    }

    /// What is in the rings of `vcpus`, and what an earlier harvest had to keep.
    fn harvest(&self, rings: &mut Rings, vcpus: Range<usize>) -> Collected {
        let mut collected = std::mem::take(&mut rings.kept);
        for (vcpu, ring) in self.vcpus[vcpus.clone()]
            .iter()
            .zip(&mut rings.rings[vcpus])
        {
            let harvest = ring.harvest(&self.slots, &mut collected);
            self.judge(vcpu, harvest);
        }
        collected
    }

    /// Resets, and takes what is in rings that the kernel wrote over, until all is reset. Returns how much is not.
    fn reset_and_recover(&self, rings: &mut Rings, collected: &mut Collected) -> io::Result<u64> {
        let mut missing = self.reset(rings)?;
        for _ in 0..RECOVERIES_MAX {
            if missing == 0 || !self.recover(rings, collected)? {
                break;
            }
            missing = self.reset(rings)?;
        }
        Ok(missing)
    }

    /// Takes what is in rings that the kernel wrote over. False if there is none.
    fn recover(&self, rings: &mut Rings, collected: &mut Collected) -> io::Result<bool> {
        let mut any = false;
        for (vcpu, ring) in self.vcpus.iter().zip(&mut rings.rings) {
            let mut harvest = Harvest::default();
            let recovered =
                ring.recover(&self.slots, collected, &mut harvest, || self.reset_once());
            self.judge(vcpu, harvest);
            any |= recovered?;
        }
        Ok(any)
    }

    fn reset_once(&self) -> io::Result<u32> {
        self.counters.resets.fetch_add(1, Ordering::Relaxed);
        let answer = self
            .kernel
            .ioctl(self.vm.as_fd(), abi::RESET_DIRTY_RINGS, Payload::none())?;
        Ok(answer.unsigned_abs())
    }

    fn judge(&self, vcpu: &Vcpu, harvest: Harvest) {
        vcpu.entries.fetch_add(harvest.entries, Ordering::Relaxed);
        if harvest.unknown > 0 {
            self.counters
                .entries_unknown
                .fetch_add(harvest.unknown, Ordering::Relaxed);
            self.counters.all_dirty.fetch_add(1, Ordering::Relaxed);
        }
        if harvest.overflowed {
            self.counters.ring_full_hard.fetch_add(1, Ordering::Relaxed);
            self.overflowed.store(true, Ordering::SeqCst);
        }
    }

    /// Has KVM reset what was harvested; returns how many entries it left. Nothing is asked for nothing.
    fn reset(&self, rings: &mut Rings) -> io::Result<u64> {
        let mut missing: u64 = rings.rings.iter().map(Ring::outstanding).sum();
        let mut idle = 0;
        while missing > 0 && idle < IDLE_RESETS_MAX {
            let reset = self.reset_once()?;
            idle = if reset == 0 { idle + 1 } else { 0 };
            missing = missing.saturating_sub(reset.into());
        }
        if missing == 0 {
            rings.rings.iter_mut().for_each(Ring::reset_done);
        }
        Ok(missing)
    }

    /// After an overflow: has every page protected again, then marks every page.
    fn heal(&self, set: &DirtySet) -> Result<(), Error> {
        if !self.overflowed.swap(false, Ordering::SeqCst) {
            return Ok(());
        }
        let mut everything = Collected::new();
        self.slots
            .iter()
            .for_each(|slot| everything.push_run(slot.run()));
        let protect = || {
            self.control
                .set_logging(false)
                .and_then(|()| self.control.set_logging(true))
        };
        match everything.rearm(protect) {
            Ok(rearmed) => {
                let reported = rearmed.pages();
                let pages = set.merge(rearmed);
                self.counters.all_dirty.fetch_add(1, Ordering::Relaxed);
                self.counters.add(Collection { pages, reported });
                Ok(())
            }
            Err(RearmFailed { error, .. }) => {
                self.overflowed.store(true, Ordering::SeqCst);
                Err(Error::Vmm {
                    what: "switch dirty logging off and on after a ring overflowed",
                    error,
                })
            }
        }
    }

    /// Empties the rings when nobody wants their content any more; a full ring would stop its vCPU for ever.
    fn discard(&self) -> Result<(), Error> {
        let mut rings = self.locked();
        drop(self.harvest(&mut rings, 0..self.vcpus.len()));
        self.reset(&mut rings)
            .map(|_| ())
            .map_err(|error| Error::Kernel {
                call: abi::RESET_DIRTY_RINGS.name(),
                error,
            })
    }
}

/// The thread that empties the rings between collections. Dropping it ends and joins the thread.
struct Reaper {
    /// Dropping it wakes the thread up.
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Reaper {
    fn spawn(shared: Arc<Shared>, set: DirtySet) -> io::Result<Self> {
        let (stop, stopped) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("multifd-reaper".into())
            .spawn(move || reap_until(&stopped, &shared, &set))?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A reaper that panicked has harvested nothing since; the collection does the same work.
            let _ = thread.join();
        }
    }
}

fn reap_until(stopped: &mpsc::Receiver<()>, shared: &Shared, set: &DirtySet) {
    let mut pace = Pace::new(shared.config.entries, shared.vcpus.len());
    let mut before = vec![0; shared.vcpus.len()];
    let mut pause = Duration::ZERO;
    while stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
        // What fails here was counted and kept, and fails again in the collection, which tells of it.
        let _ = shared.collect_all(set);
        let mut entries = Vec::with_capacity(before.len());
        for (vcpu, before) in shared.vcpus.iter().zip(&mut before) {
            let now = vcpu.entries.load(Ordering::Relaxed);
            entries.push(now - std::mem::replace(before, now));
        }
        pause = pace.next_pause(Instant::now(), &entries);
        for (vcpu, &rate) in shared.vcpus.iter().zip(pace.rates()) {
            vcpu.entries_per_s.store(rate, Ordering::Relaxed);
        }
    }
}
