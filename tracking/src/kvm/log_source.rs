//! The dirty log of a VM's memory slots as a source: the fall-back where there is no ring, and the better way when very
//! much is written.
//!
//! Plain: `KVM_GET_DIRTY_LOG` hands out a slot's bitmap, clears it and write-protects the pages again, all at once.
//!
//! Manual (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`): the same call only fetches. `KVM_CLEAR_DIRTY_LOG` clears and protects,
//! for a range of 64-page words. That is put off until just before the pages are read ([`LateRearm`]): a write between
//! the fetch and the clear is part of what is sent, instead of a page that must be sent again.
//!
//! ```text
//!   GET ──► fetched (not to be read) ──► set ──► Round::next_run ──► CLEAR of the run's words ──► may be read
//! ```
//!
//! A page that was fetched and not cleared is in the set or in a round; the kernel goes on to show its bit, which is
//! therefore no news until it was cleared.
//!
//! Initially set: when logging begins, the kernel shows every page as dirty and protects none, which saves the vCPUs the
//! faults on pages that were not sent yet. So does this source: after `start` all slots are fetched and in the set.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kvm_ioctls::VmFd;
use zerocopy::IntoBytes;

use super::abi::{self, ClearDirtyLog, DirtyLog, EnableCap};
use super::slots::{Slot, Slots};
use super::{SlotControl, require_host_page};
use crate::kernel::{GuardedWords, Kernel, Linux, Payload, duplicate};
use crate::levels::WORD_BITS;
use crate::set::LateRearm;
use crate::source::Counters;
use crate::{CollectPhase, Collected, Collection, DirtySet, Error, Figures, Run, Source};

/// How much of the manual protection to use. What a kernel does not offer is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protect {
    /// Fetch, clear and protect in one call.
    Plain,
    /// Clear and protect just before pages are read.
    Manual,
    /// As `Manual`, and begin with every page dirty and none protected.
    ManualInitiallySet,
}

/// Words of a bitmap that are merged into the set at a time, so that a slot of a TiB needs no list of all its words.
const MERGE_WORDS: usize = 1 << 16;

/// What the vCPUs wrote, from the dirty log.
pub struct LogSource {
    shared: Arc<Shared>,
    control: Box<dyn SlotControl>,
    protect: Protect,
    logging: bool,
    /// The set to which this source is attached for late re-arming.
    attached: Option<DirtySet>,
}

struct Shared {
    kernel: Arc<dyn Kernel>,
    vm: OwnedFd,
    slots: Vec<LogSlot>,
    logging: AtomicBool,
    /// The first failure of a clear since the last collection, which is the one to tell of it.
    failed: Mutex<Option<io::Error>>,
    counters: Counters,
}

struct LogSlot {
    slot: Slot,
    state: Mutex<State>,
}

struct State {
    /// What the kernel writes into.
    bitmap: GuardedWords,
    /// Pages that were fetched and not yet cleared. Empty if protection is plain.
    fetched: Vec<u64>,
}

impl LogSource {
    /// The dirty log of these slots. Manual protection is switched on for the VM here, as far as `protect` wants it and
    /// the kernel offers it; it stays on, which does not disturb other users of this crate, but would others.
    ///
    /// # Errors
    /// [`Error::Unsupported`] on a host without 4096-byte pages, [`Error::Kernel`] if KVM refuses or memory for the
    /// bitmaps (one bit per page) cannot be had.
    pub fn new(
        vm: &VmFd,
        protect: Protect,
        slots: Slots,
        control: Box<dyn SlotControl>,
    ) -> Result<Self, Error> {
        require_host_page()?;
        Self::with_kernel(Arc::new(Linux), vm, protect, slots, control)
    }

    /// As [`LogSource::new`], with another kernel and any descriptor that it knows.
    ///
    /// # Errors
    /// As [`LogSource::new`].
    pub fn with_kernel(
        kernel: Arc<dyn Kernel>,
        vm: &impl AsRawFd,
        protect: Protect,
        slots: Slots,
        control: Box<dyn SlotControl>,
    ) -> Result<Self, Error> {
        let vm = duplicate(vm).map_err(|error| Error::Kernel {
            call: "dup of the VM",
            error,
        })?;
        let protect = offered(&*kernel, &vm, protect)?;
        let slots = slots
            .iter()
            .map(|&slot| LogSlot::new(slot, protect))
            .collect::<Result<_, Error>>()?;
        let shared = Shared {
            kernel,
            vm,
            slots,
            logging: AtomicBool::new(false),
            failed: Mutex::new(None),
            counters: Counters::default(),
        };
        Ok(Self {
            shared: Arc::new(shared),
            control,
            protect,
            logging: false,
            attached: None,
        })
    }

    /// The protection in use.
    pub fn protect(&self) -> Protect {
        self.protect
    }

    fn late(&self) -> Arc<dyn LateRearm> {
        Arc::clone(&self.shared) as Arc<dyn LateRearm>
    }

    fn detach(&mut self) {
        self.shared.logging.store(false, Ordering::SeqCst);
        if let Some(set) = self.attached.take() {
            set.detach_late(&self.late());
        }
    }
}

/// Switches on what both sides want of the manual protection.
fn offered(kernel: &dyn Kernel, vm: &OwnedFd, wanted: Protect) -> Result<Protect, Error> {
    let offer = super::probe_with(kernel, vm.as_fd())?.manual_protect;
    let flags = match wanted {
        Protect::Plain => 0,
        Protect::Manual => abi::MANUAL_PROTECT_ENABLE & offer,
        Protect::ManualInitiallySet => (abi::MANUAL_PROTECT_ENABLE | abi::INITIALLY_SET) & offer,
    };
    // Initially set means nothing without manual protect.
    if flags & abi::MANUAL_PROTECT_ENABLE == 0 && offer == 0 {
        return Ok(Protect::Plain);
    }
    let flags = if flags & abi::MANUAL_PROTECT_ENABLE == 0 {
        0
    } else {
        flags
    };
    let mut payload = EnableCap::new(abi::CAP_MANUAL_DIRTY_LOG_PROTECT2, flags);
    kernel
        .ioctl(
            vm.as_fd(),
            abi::ENABLE_CAP,
            Payload::bytes(payload.as_mut_bytes()),
        )
        .map_err(|error| Error::Kernel {
            call: "KVM_ENABLE_CAP of the manual dirty log",
            error,
        })?;
    Ok(match flags {
        0 => Protect::Plain,
        abi::MANUAL_PROTECT_ENABLE => Protect::Manual,
        _ => Protect::ManualInitiallySet,
    })
}

impl Source for LogSource {
    fn name(&self) -> &str {
        "kvm-log"
    }

    fn start(&mut self, set: &DirtySet) -> Result<(), Error> {
        for log in &self.shared.slots {
            set.check(log.slot.run())?;
        }
        for log in &self.shared.slots {
            log.locked().fetched.fill(0);
        }
        self.control.set_logging(true).map_err(|error| Error::Vmm {
            what: "switch dirty logging on",
            error,
        })?;
        self.logging = true;
        self.shared.logging.store(true, Ordering::SeqCst);
        if self.protect != Protect::Plain {
            set.attach_late(self.late());
            self.attached = Some(set.clone());
        }
        if self.protect == Protect::ManualInitiallySet {
            for log in &self.shared.slots {
                log.fetch_all(set, &self.late());
            }
        }
        Ok(())
    }

    fn collect(&mut self, set: &DirtySet, _phase: CollectPhase) -> Result<Collection, Error> {
        if !self.logging {
            return Err(Error::Misuse {
                what: "the log source collects only between start and stop".into(),
            });
        }
        let begun = Instant::now();
        let late = (self.protect != Protect::Plain).then(|| self.late());
        let mut sum = Collection::default();
        let mut failed = locked(&self.shared.failed)
            .take()
            .map(|error| (abi::CLEAR_DIRTY_LOG.name(), error));
        for log in &self.shared.slots {
            match self.shared.collect_slot(log, set, late.as_ref()) {
                Ok(collection) => sum += collection,
                Err(error) => {
                    self.shared.counters.errors.fetch_add(1, Ordering::Relaxed);
                    self.shared
                        .counters
                        .all_dirty
                        .fetch_add(1, Ordering::Relaxed);
                    failed = failed.or(Some((abi::GET_DIRTY_LOG.name(), error)));
                }
            }
        }
        self.shared.counters.harvested(begun, sum);
        failed.map_or(Ok(sum), |(call, error)| Err(Error::Kernel { call, error }))
    }

    fn stop(&mut self) -> Result<(), Error> {
        if !std::mem::take(&mut self.logging) {
            return Ok(());
        }
        self.detach();
        self.control.set_logging(false).map_err(|error| Error::Vmm {
            what: "switch dirty logging off",
            error,
        })
    }

    fn figures(&self) -> Figures {
        self.shared.counters.figures()
    }
}

impl Drop for LogSource {
    fn drop(&mut self) {
        self.detach();
    }
}

impl LogSlot {
    fn new(slot: Slot, protect: Protect) -> Result<Self, Error> {
        let words = slot.pages.div_ceil(WORD_BITS) as usize;
        let bitmap = GuardedWords::new(words).map_err(|error| Error::Kernel {
            call: "mmap of a dirty log's bitmap",
            error,
        })?;
        let fetched = if protect == Protect::Plain {
            Vec::new()
        } else {
            vec![0; words]
        };
        Ok(Self {
            slot,
            state: Mutex::new(State { bitmap, fetched }),
        })
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// Takes over what an initially set log shows: everything.
    fn fetch_all(&self, set: &DirtySet, late: &Arc<dyn LateRearm>) {
        let mut state = self.locked();
        state.fetched.fill(u64::MAX);
        let tail = self.slot.pages % WORD_BITS;
        if tail != 0
            && let Some(last) = state.fetched.last_mut()
        {
            *last = (1 << tail) - 1;
        }
        drop(state);
        let mut collected = Collected::new();
        collected.push_run(self.slot.run());
        set.merge_late(collected, late);
    }

    /// Adds 64 pages of the slot from page `word * 64`, wherever that lies in the region's words.
    fn push(&self, word: u64, bits: u64, collected: &mut Collected) {
        let page = self.slot.first + word * WORD_BITS;
        let (place, shift) = (page / WORD_BITS, page % WORD_BITS);
        collected.push_bits(self.slot.region, place, bits << shift);
        if shift != 0 {
            collected.push_bits(self.slot.region, place + 1, bits >> (WORD_BITS - shift));
        }
    }
}

impl Shared {
    /// Fetches one slot's bitmap and merges what is news. If that fails, the whole slot counts as dirty: the plain call
    /// may have cleared the kernel's bitmap before it failed.
    fn collect_slot(
        &self,
        log: &LogSlot,
        set: &DirtySet,
        late: Option<&Arc<dyn LateRearm>>,
    ) -> io::Result<Collection> {
        let mut state = log.locked();
        let state = &mut *state;
        if let Err(error) = self.fetch(log.slot.id, &mut state.bitmap) {
            set.mark(log.slot.run());
            return Err(error);
        }
        let tail = log.slot.pages % WORD_BITS;
        if tail != 0
            && let Some(last) = state.bitmap.last_mut()
        {
            *last &= (1 << tail) - 1;
        }
        let mut sum = Collection::default();
        for (chunk, words) in (0u64..).zip(state.bitmap.chunks(MERGE_WORDS)) {
            let mut collected = Collected::new();
            for (word, &bits) in (chunk * MERGE_WORDS as u64..).zip(words) {
                if bits == 0 {
                    continue;
                }
                let news = match state.fetched.get_mut(word as usize) {
                    Some(fetched) => bits & !std::mem::replace(fetched, *fetched | bits),
                    None => bits,
                };
                if news != 0 {
                    log.push(word, news, &mut collected);
                }
            }
            if collected.is_empty() {
                continue;
            }
            sum.reported += collected.pages();
            sum.pages += match late {
                Some(late) => set.merge_late(collected, late),
                // The plain call has protected the pages before it returned.
                None => set.merge(collected.rearmed_by_fetch()),
            };
        }
        Ok(sum)
    }

    fn fetch(&self, slot: u32, bitmap: &mut GuardedWords) -> io::Result<()> {
        let mut log = DirtyLog {
            slot,
            padding: 0,
            bitmap: 0,
        };
        let payload = Payload::attached(log.as_mut_bytes(), abi::DIRTY_LOG_BITMAP_AT, bitmap);
        self.kernel
            .ioctl(self.vm.as_fd(), abi::GET_DIRTY_LOG, payload)
            .map(|_| ())
    }

    /// Clears the fetched pages of words `low..=high` of a slot, one call per neighbouring words that hold any.
    fn clear(&self, log: &LogSlot, low: usize, high: usize) -> io::Result<()> {
        let mut state = log.locked();
        let fetched = &mut state.fetched[low..=high];
        let mut at = 0;
        while at < fetched.len() {
            let span = fetched[at..].iter().take_while(|&&bits| bits != 0).count();
            if span == 0 {
                at += 1;
                continue;
            }
            let first_page = (low + at) as u64 * WORD_BITS;
            let words = &mut fetched[at..at + span];
            self.clear_words(log.slot, first_page, words)?;
            words.fill(0);
            at += span;
        }
        Ok(())
    }

    fn clear_words(&self, slot: Slot, first_page: u64, words: &mut [u64]) -> io::Result<()> {
        // A whole number of 64 pages, or up to the slot's end.
        let num_pages = (words.len() as u64 * WORD_BITS).min(slot.pages - first_page) as u32;
        let mut clear = ClearDirtyLog {
            slot: slot.id,
            num_pages,
            first_page,
            bitmap: 0,
        };
        self.counters.resets.fetch_add(1, Ordering::Relaxed);
        let payload =
            Payload::attached(clear.as_mut_bytes(), abi::CLEAR_DIRTY_LOG_BITMAP_AT, words);
        self.kernel
            .ioctl(self.vm.as_fd(), abi::CLEAR_DIRTY_LOG, payload)
            .map(|_| ())
    }
}

impl LateRearm for Shared {
    fn rearm(&self, run: Run) -> io::Result<()> {
        if !self.logging.load(Ordering::SeqCst) {
            return Ok(());
        }
        for log in &self.slots {
            let slot = log.slot;
            let first = run.first.max(slot.first);
            let end = (run.first + run.count).min(slot.first + slot.pages);
            if slot.region != run.region || first >= end {
                continue;
            }
            let (low, high) = (
                (first - slot.first) / WORD_BITS,
                (end - 1 - slot.first) / WORD_BITS,
            );
            if let Err(error) = self.clear(log, low as usize, high as usize) {
                self.counters.errors.fetch_add(1, Ordering::Relaxed);
                let told = io::Error::new(error.kind(), error.to_string());
                locked(&self.failed).get_or_insert(told);
                return Err(error);
            }
        }
        Ok(())
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
