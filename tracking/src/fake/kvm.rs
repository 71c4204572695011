//! A fake VM with dirty ring and dirty log, as `linux/kvm.h` and `Documentation/virt/kvm/api.rst` describe them.
//!
//! The numbers here are written out as the C preprocessor gives them for the header, on purpose apart from the ones that
//! the crate computes. A "guest write" marks a page; if the page is armed it is reported, and disarmed until it is reset
//! or cleared. So a source that reads a page before it re-armed it loses the write here just as it would with KVM.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{FakeFd, FakeKernel, FakeObject, refused, structure, structure_with, u32_at, u64_at};
use crate::kernel::{Parts, Request, RingEntry, RingMemory};

const KVM_CHECK_EXTENSION: u32 = 0xae03;
const KVM_ENABLE_CAP: u32 = 0x4068_aea3;
const KVM_GET_DIRTY_LOG: u32 = 0x4010_ae42;
const KVM_CLEAR_DIRTY_LOG: u32 = 0xc018_aec0;
const KVM_RESET_DIRTY_RINGS: u32 = 0xaec7;

const KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: u32 = 168;
const KVM_CAP_DIRTY_LOG_RING: u32 = 192;
const KVM_CAP_DIRTY_LOG_RING_ACQ_REL: u32 = 223;

/// Entries that KVM keeps free for what the processor adds after it decided to exit.
const RESERVED: u64 = 64;

/// A slot of a fake VM.
#[derive(Clone, Copy, Debug)]
pub struct FakeSlot {
    /// `address space << 16 | slot`.
    pub id: u32,
    /// The slot's pages.
    pub pages: u64,
}

/// A fake VM. Cloning gives another handle to the same one.
#[derive(Clone)]
pub struct FakeVm {
    state: Arc<Mutex<VmState>>,
}

struct VmState {
    capabilities: HashMap<u32, i32>,
    ring_entries: u64,
    manual: u64,
    /// Entries after which the next resets end early, as a pending signal ends them.
    reset_limits: VecDeque<i32>,
    /// Pages that vCPU 0 writes to slot 0 while a reset runs, after that many entries.
    during_reset: Option<(i32, Range<u64>)>,
    vcpus: Vec<FakeRing>,
    slots: BTreeMap<u32, SlotState>,
}

struct SlotState {
    pages: u64,
    logging: bool,
    /// Pages whose next write is not reported: they are reported already.
    disarmed: BTreeSet<u64>,
    /// The log's bitmap.
    dirty: BTreeSet<u64>,
}

#[derive(Clone)]
struct FakeRing {
    entries: Arc<Vec<RingEntry>>,
    /// Where the kernel writes next, and where it resets next.
    filled: u64,
    reset: u64,
}

impl RingMemory for FakeRing {
    fn entries(&self) -> &[RingEntry] {
        &self.entries
    }
}

/// What a write of a fake guest led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a vCPU whose ring is full must call its handler"]
pub enum Wrote {
    /// The guest goes on.
    GoesOn,
    /// `KVM_RUN` returns with `KVM_EXIT_DIRTY_RING_FULL`.
    RingFull,
}

impl FakeVm {
    /// A VM with these slots. `capabilities` are pairs of number and what `KVM_CHECK_EXTENSION` answers.
    pub fn new(slots: &[FakeSlot], capabilities: &[(u32, i32)]) -> Self {
        let slots = slots
            .iter()
            .map(|slot| {
                let state = SlotState {
                    pages: slot.pages,
                    logging: false,
                    disarmed: BTreeSet::new(),
                    dirty: BTreeSet::new(),
                };
                (slot.id, state)
            })
            .collect();
        let state = VmState {
            capabilities: capabilities.iter().copied().collect(),
            ring_entries: 0,
            manual: 0,
            reset_limits: VecDeque::new(),
            during_reset: None,
            vcpus: Vec::new(),
            slots,
        };
        Self {
            state: Arc::new(Mutex::new(state)),
        }
    }

    /// A VM with everything that Linux 6.18 on x86 offers.
    pub fn with_everything(slots: &[FakeSlot]) -> Self {
        let ring_bytes = 1 << 20;
        Self::new(
            slots,
            &[
                (KVM_CAP_DIRTY_LOG_RING, ring_bytes),
                (KVM_CAP_DIRTY_LOG_RING_ACQ_REL, ring_bytes),
                (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 3),
            ],
        )
    }

    /// The VM's descriptor.
    pub fn open(&self, kernel: &FakeKernel) -> FakeFd {
        kernel.open(VmObject {
            state: Arc::clone(&self.state),
        })
    }

    /// A new vCPU's descriptor.
    pub fn create_vcpu(&self, kernel: &FakeKernel) -> FakeFd {
        let mut state = self.locked();
        let entries = Arc::new(
            (0..state.ring_entries)
                .map(|_| RingEntry::default())
                .collect(),
        );
        state.vcpus.push(FakeRing {
            entries,
            filled: 0,
            reset: 0,
        });
        kernel.open(VcpuObject {
            state: Arc::clone(&self.state),
            index: state.vcpus.len() - 1,
        })
    }

    /// What the VMM does to its slots' log flag.
    pub fn set_logging(&self, on: bool) {
        let state = &mut *self.locked();
        for slot in state.slots.values_mut() {
            slot.logging = on;
            slot.dirty.clear();
            slot.disarmed.clear();
            if on && state.manual == 3 {
                slot.dirty.extend(0..slot.pages);
                slot.disarmed.extend(0..slot.pages);
            }
        }
    }

    /// A guest's write by vCPU `vcpu`.
    pub fn write(&self, vcpu: usize, slot: u32, page: u64) -> Wrote {
        self.locked().write(vcpu, slot, page, false)
    }

    /// A write of which KVM makes another entry although the page was reported already, as it may.
    pub fn write_duplicate(&self, vcpu: usize, slot: u32, page: u64) -> Wrote {
        self.locked().write(vcpu, slot, page, true)
    }

    /// Ends the next reset after `entries`, as a pending signal does.
    pub fn interrupt_next_reset(&self, entries: i32) {
        self.locked().reset_limits.push_back(entries);
    }

    /// Lets vCPU 0 write these pages of slot 0 while the next reset runs, after it reset `entries`.
    pub fn write_during_next_reset(&self, entries: i32, pages: Range<u64>) {
        self.locked().during_reset = Some((entries, pages));
    }

    /// Whether `KVM_RUN` would return at once because the vCPU's ring is nearly full.
    pub fn is_full(&self, vcpu: usize) -> bool {
        let state = self.locked();
        state.is_full(&state.vcpus[vcpu])
    }

    /// An entry that names whatever is wanted, such as a slot that does not exist.
    pub fn push_entry(&self, vcpu: usize, slot: u32, offset: u64) {
        self.locked().vcpus[vcpu].push(slot, offset);
    }

    fn locked(&self) -> MutexGuard<'_, VmState> {
        locked(&self.state)
    }
}

impl VmState {
    fn write(&mut self, vcpu: usize, id: u32, page: u64, duplicate: bool) -> Wrote {
        let slot = self
            .slots
            .get_mut(&id)
            .expect("the guest writes where it has memory");
        assert!(page < slot.pages);
        let newly = slot.logging && slot.disarmed.insert(page);
        if !(newly || duplicate) {
            return Wrote::GoesOn;
        }
        if self.ring_entries == 0 {
            slot.dirty.insert(page);
            return Wrote::GoesOn;
        }
        let ring = &mut self.vcpus[vcpu];
        ring.push(id, page);
        if self.is_full(&self.vcpus[vcpu]) {
            Wrote::RingFull
        } else {
            Wrote::GoesOn
        }
    }

    fn is_full(&self, ring: &FakeRing) -> bool {
        // As in the kernel: unsigned, so a reset that runs ahead of the writing looks like a full ring.
        ring.filled.wrapping_sub(ring.reset) >= self.ring_entries - RESERVED
    }

    fn check_extension(&self, parts: Parts<'_>) -> i32 {
        let Parts::Value(capability) = parts else {
            panic!("KVM_CHECK_EXTENSION takes a number, not {parts:?}")
        };
        let capability = u32::try_from(capability).expect("a capability is a u32");
        self.capabilities.get(&capability).copied().unwrap_or(0)
    }

    fn enable_cap(&mut self, octets: &[u8]) -> io::Result<i32> {
        assert_eq!(u32_at(octets, 4), 0, "flags are zero");
        assert!(
            octets[16..].iter().all(|&octet| octet == 0),
            "unused arguments and padding are zero"
        );
        let (capability, argument) = (u32_at(octets, 0), u64_at(octets, 8));
        let offer = u64::from(
            self.capabilities
                .get(&capability)
                .copied()
                .unwrap_or(0)
                .unsigned_abs(),
        );
        match capability {
            KVM_CAP_DIRTY_LOG_RING | KVM_CAP_DIRTY_LOG_RING_ACQ_REL => {
                if offer == 0
                    || !argument.is_power_of_two()
                    || argument < 4096
                    || !self.vcpus.is_empty()
                {
                    return refused(libc::EINVAL);
                }
                if argument > offer {
                    return refused(libc::E2BIG);
                }
                self.ring_entries = argument / 16;
            }
            KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 => {
                if argument & !offer != 0 || argument == 2 {
                    return refused(libc::EINVAL);
                }
                self.manual = argument;
            }
            other => panic!("capability {other} is none of dirty tracking"),
        }
        Ok(0)
    }

    fn get_dirty_log(&mut self, octets: &[u8], bitmap: &mut [u64]) -> io::Result<i32> {
        assert_eq!(u32_at(octets, 4), 0, "padding is zero");
        if self.ring_entries != 0 {
            return refused(libc::ENXIO);
        }
        let manual = self.manual != 0;
        let Some(slot) = self.slots.get_mut(&u32_at(octets, 0)) else {
            return refused(libc::ENOENT);
        };
        if !slot.logging {
            return refused(libc::ENOENT);
        }
        assert!(
            bitmap.len() as u64 >= slot.pages.div_ceil(64),
            "the bitmap holds the whole slot"
        );
        bitmap.fill(0);
        for &page in &slot.dirty {
            bitmap[(page / 64) as usize] |= 1 << (page % 64);
        }
        if !manual {
            slot.dirty.clear();
            slot.disarmed.clear();
        }
        Ok(0)
    }

    fn clear_dirty_log(&mut self, octets: &[u8], bitmap: &[u64]) -> io::Result<i32> {
        assert!(
            self.manual != 0,
            "KVM_CLEAR_DIRTY_LOG needs manual protection"
        );
        let Some(slot) = self.slots.get_mut(&u32_at(octets, 0)) else {
            return refused(libc::ENOENT);
        };
        let (count, first) = (u64::from(u32_at(octets, 4)), u64_at(octets, 8));
        if first % 64 != 0 || first > slot.pages || count > slot.pages - first {
            return refused(libc::EINVAL);
        }
        if count % 64 != 0 && first + count != slot.pages {
            return refused(libc::EINVAL);
        }
        assert!(
            bitmap.len() as u64 >= count.div_ceil(64),
            "the bitmap holds the whole range"
        );
        for page in (0..count).filter(|page| bitmap[(page / 64) as usize] >> (page % 64) & 1 == 1) {
            slot.dirty.remove(&(first + page));
            slot.disarmed.remove(&(first + page));
        }
        Ok(0)
    }

    fn reset_dirty_rings(&mut self) -> io::Result<i32> {
        if self.ring_entries == 0 {
            return refused(libc::EINVAL);
        }
        let mut reset = 0;
        let limit = self.reset_limits.pop_front().unwrap_or(i32::MAX);
        for vcpu in 0..self.vcpus.len() {
            // The kernel does not compare with where it writes: it goes on while entries are marked.
            while reset < limit {
                if let Some((_, pages)) =
                    self.during_reset.take_if(|(entries, _)| *entries == reset)
                {
                    for page in pages {
                        let _ = self.write(0, 0, page, false);
                    }
                }
                let ring = &mut self.vcpus[vcpu];
                let entry = &ring.entries[(ring.reset % self.ring_entries) as usize];
                if entry.flags.load(Ordering::Acquire) & 2 == 0 {
                    break;
                }
                let (slot, page) = (
                    entry.slot.load(Ordering::Relaxed),
                    entry.offset.load(Ordering::Relaxed),
                );
                entry.flags.store(0, Ordering::Release);
                if let Some(slot) = self.slots.get_mut(&slot) {
                    slot.disarmed.remove(&page);
                }
                ring.reset += 1;
                reset += 1;
            }
        }
        Ok(reset)
    }
}

impl FakeRing {
    /// Adds an entry, over an old one if the ring is full: what KVM promises not to do, and what a ring that is too
    /// small for its processor suffers.
    fn push(&mut self, slot: u32, offset: u64) {
        let entry = &self.entries[(self.filled % self.entries.len() as u64) as usize];
        entry.slot.store(slot, Ordering::Relaxed);
        entry.offset.store(offset, Ordering::Relaxed);
        entry.flags.store(1, Ordering::Release);
        self.filled += 1;
    }
}

struct VmObject {
    state: Arc<Mutex<VmState>>,
}

impl FakeObject for VmObject {
    fn ioctl(&mut self, request: Request, parts: Parts<'_>) -> io::Result<i32> {
        let mut state = locked(&self.state);
        match request.number() {
            KVM_CHECK_EXTENSION => Ok(state.check_extension(parts)),
            KVM_ENABLE_CAP => state.enable_cap(structure(parts, 104)),
            KVM_GET_DIRTY_LOG => {
                let (octets, bitmap) = structure_with(parts, 16, 8);
                state.get_dirty_log(octets, bitmap)
            }
            KVM_CLEAR_DIRTY_LOG => {
                let (octets, bitmap) = structure_with(parts, 24, 16);
                state.clear_dirty_log(octets, bitmap)
            }
            KVM_RESET_DIRTY_RINGS => {
                assert!(
                    matches!(parts, Parts::Value(0)),
                    "KVM_RESET_DIRTY_RINGS takes nothing"
                );
                state.reset_dirty_rings()
            }
            other => panic!(
                "{} has number {other:#x}, which no VM knows",
                request.name()
            ),
        }
    }
}

struct VcpuObject {
    state: Arc<Mutex<VmState>>,
    index: usize,
}

impl FakeObject for VcpuObject {
    fn ioctl(&mut self, request: Request, _parts: Parts<'_>) -> io::Result<i32> {
        panic!("{} is no request for a vCPU", request.name())
    }

    fn map_ring(&mut self, entries: u32) -> io::Result<Box<dyn RingMemory>> {
        let state = locked(&self.state);
        if state.ring_entries == 0 || u64::from(entries) > state.ring_entries {
            return refused(libc::EINVAL);
        }
        assert_eq!(
            u64::from(entries),
            state.ring_entries,
            "the whole ring is mapped"
        );
        Ok(Box::new(state.vcpus[self.index].clone()))
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
