//! The dirty ring of one vCPU.
//!
//! ```text
//!            reset by the kernel    harvested by us          filled by the kernel
//!   entry:        00b        ──►  01b (dirty)  ──►  10b (reset me)  ──KVM_RESET_DIRTY_RINGS──►  00b
//! ```
//!
//! The kernel fills the entries in order, and they must be harvested in order and without a gap. What was harvested must
//! not be read before `KVM_RESET_DIRTY_RINGS`: only then are the pages write-protected again. A page may stand in the
//! ring several times. (`Documentation/virt/kvm/api.rst`, "KVM_CAP_DIRTY_LOG_RING".)

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;

use kvm_ioctls::VmFd;
use zerocopy::IntoBytes;

use super::abi::{self, EnableCap, GFN_DIRTY, GFN_RESET};
use super::slots::Slots;
use super::{RingVariant, Support, require_host_page, vm_fd};
use crate::kernel::{Kernel, Linux, Payload, RingEntry, RingMemory};
use crate::{Collected, Error};

/// The size of each vCPU's ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingConfig {
    /// Entries of 16 bytes; a power of two.
    pub entries: u32,
}

impl RingConfig {
    /// The fewest entries that are accepted: KVM keeps 64 in reserve, and up to 512 more for what the processor logs by
    /// itself; the next power of two leaves room to work.
    pub const ENTRIES_MIN: u32 = 1024;
    /// The most entries that KVM gives (KVM_DIRTY_RING_MAX_ENTRIES).
    pub const ENTRIES_MAX: u32 = 65_536;
}

impl Default for RingConfig {
    /// The most that KVM gives: 1 MiB per vCPU. A ring that overflows makes everything dirty, so memory is the better
    /// thing to spend.
    fn default() -> Self {
        Self {
            entries: Self::ENTRIES_MAX,
        }
    }
}

/// Switches the dirty ring on for a VM. To be called before the VM's first vCPU is created.
///
/// # Errors
/// [`Error::Misuse`] for a size that is no power of two or out of bounds, [`Error::Unsupported`] if there is no ring or
/// not of that size, [`Error::Kernel`] if the kernel refuses (`EINVAL` when a vCPU exists already).
pub fn enable(vm: &VmFd, config: RingConfig) -> Result<RingVariant, Error> {
    require_host_page()?;
    let vm = vm_fd(vm)?;
    enable_with(&Linux, vm.as_fd(), config)
}

/// As [`enable`], with another kernel and a descriptor that it knows.
///
/// # Errors
/// As [`enable`].
pub fn enable_with(
    kernel: &dyn Kernel,
    vm: BorrowedFd<'_>,
    config: RingConfig,
) -> Result<RingVariant, Error> {
    let ring = super::probe_with(kernel, vm)?;
    let variant = config.check(&ring)?;
    let capability = match variant {
        RingVariant::AcqRel => abi::CAP_DIRTY_LOG_RING_ACQ_REL,
        RingVariant::Plain => abi::CAP_DIRTY_LOG_RING,
    };
    let mut payload = EnableCap::new(capability, config.bytes());
    kernel
        .ioctl(vm, abi::ENABLE_CAP, Payload::bytes(payload.as_mut_bytes()))
        .map_err(|error| Error::Kernel {
            call: "KVM_ENABLE_CAP of the dirty ring",
            error,
        })?;
    Ok(variant)
}

impl RingConfig {
    fn bytes(self) -> u64 {
        u64::from(self.entries) * size_of::<RingEntry>() as u64
    }

    /// Refuses a size by itself.
    pub(crate) fn check_entries(self) -> Result<(), Error> {
        let bounds = Self::ENTRIES_MIN..=Self::ENTRIES_MAX;
        if self.entries.is_power_of_two() && bounds.contains(&self.entries) {
            return Ok(());
        }
        Err(Error::Misuse {
            what: format!(
                "a dirty ring of {} entries: a power of two from {} to {} is allowed",
                self.entries,
                Self::ENTRIES_MIN,
                Self::ENTRIES_MAX
            ),
        })
    }

    /// Refuses a size that this kernel does not give.
    fn check(self, support: &Support) -> Result<RingVariant, Error> {
        self.check_entries()?;
        let Some(ring) = support.ring else {
            return Err(Error::Unsupported {
                what: "the KVM dirty ring; use the dirty log".into(),
            });
        };
        if self.bytes() > ring.ring_bytes_max.into() {
            return Err(Error::Unsupported {
                what: format!(
                    "a dirty ring of {} bytes; this kernel gives at most {}",
                    self.bytes(),
                    ring.ring_bytes_max
                ),
            });
        }
        Ok(ring.variant)
    }
}

/// One vCPU's ring.
///
/// Three places matter, all counted on for ever and taken modulo the ring's size. The kernel's two are not visible:
///
/// ```text
///    base ............ next ............ where the kernel writes next
///    │  harvested, not  │  dirty, not      │  empty, up to base + size
///    │  known to be     │  harvested       │
///    │  reset           │                  │
/// ```
///
/// **Overflow.** KVM leaves the guest when 64 entries are left, and promises that this is enough. A software KVM that runs
/// some hundred instructions between two looks breaks the promise, at every ring size. The kernel then writes over the
/// oldest entries, and goes on from there, so two things are wrong afterwards: pages are missing, and stay
/// unprotected; and the kernel writes some entries further on than where its own reset stands. The first is the
/// source's to mend (it marks everything, after it switched logging off and on). The second is mended here: the
/// entries of the gap are handed to the reset as if they had been harvested, or the vCPU would never enter again.
pub(crate) struct Ring {
    memory: Box<dyn RingMemory>,
    base: u32,
    next: u32,
    /// The ring overflowed, and the kernel may write some entries further on than `next`.
    resync: bool,
}

/// What one pass over a ring brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Harvest {
    /// Entries taken.
    pub(crate) entries: u64,
    /// Entries that named no known memory.
    pub(crate) unknown: u64,
    /// The ring was full to the last entry: entries may be missing.
    pub(crate) overflowed: bool,
}

impl Ring {
    pub(crate) fn new(memory: Box<dyn RingMemory>) -> Self {
        Self {
            memory,
            base: 0,
            next: 0,
            resync: false,
        }
    }

    /// Entries marked as harvested and not known to be reset.
    pub(crate) fn outstanding(&self) -> u64 {
        self.next.wrapping_sub(self.base).into()
    }

    /// The kernel reset everything that was outstanding.
    pub(crate) fn reset_done(&mut self) {
        self.base = self.next;
    }

    /// Takes all entries that are dirty, at most once around: what the vCPU adds meanwhile is found by the next pass.
    pub(crate) fn harvest(&mut self, slots: &Slots, collected: &mut Collected) -> Harvest {
        let mut harvest = Harvest::default();
        while self.next.wrapping_sub(self.base) < self.size() {
            let taken = self.take_entry(self.next, slots, collected, &mut harvest);
            let passed = taken || (self.resync && self.skip_gap());
            if !passed {
                break;
            }
            self.next = self.next.wrapping_add(1);
        }
        harvest.overflowed = harvest.entries >= self.size().into();
        // Less than the whole ring, and up to where the kernel writes: the two are in step again.
        if harvest.entries > 0 {
            self.resync = self.next.wrapping_sub(self.base) == self.size();
        }
        harvest
    }

    /// To be called when the kernel reset fewer entries than were outstanding, for each ring. If that is because it had
    /// written over some of them, everything in the ring is taken and reset; true then. The vCPU may still be writing on,
    /// for the few instructions until it leaves: then something is outstanding again.
    ///
    /// The kernel's reset stands before an entry that it wrote anew, somewhere in what is outstanding; it does not say
    /// where, because the entries before that one may have been reset and written anew, too. So the entries are marked
    /// one by one, until `reset`, which is one call of the kernel's, goes on.
    ///
    /// # Errors
    /// What `reset` answered.
    pub(crate) fn recover(
        &mut self,
        slots: &Slots,
        collected: &mut Collected,
        harvest: &mut Harvest,
        mut reset: impl FnMut() -> io::Result<u32>,
    ) -> io::Result<bool> {
        while self.base != self.next && self.flags(self.base) == 0 {
            self.base = self.base.wrapping_add(1);
        }
        if self.base == self.next {
            return Ok(false);
        }
        let mut places =
            (0..self.next.wrapping_sub(self.base)).map(|at| self.base.wrapping_add(at));
        match places.find(|&place| self.flags(place) != GFN_DIRTY) {
            // The kernel stopped before an entry that it may well reset when it is asked again.
            Some(place) if place == self.base => return Ok(false),
            // All were reset, and the first ones were written anew in good order.
            Some(place) if self.flags(place) == 0 => {
                self.base = self.next;
                return Ok(false);
            }
            _ => {}
        }
        while self.base != self.next {
            self.take_entry(self.base, slots, collected, harvest);
            self.base = self.base.wrapping_add(1);
            let done = reset()?;
            if done > 0 {
                // The first of them is the entry just marked.
                self.base = self.base.wrapping_add(done - 1);
                break;
            }
        }
        // The reset stands at `base` now. From there on all is taken that was not taken yet.
        self.next = self.base;
        while self.next.wrapping_sub(self.base) < self.size() && self.flags(self.next) != 0 {
            self.take_entry(self.next, slots, collected, harvest);
            self.next = self.next.wrapping_add(1);
        }
        // And reset before another ring is looked at, or its reset would be taken for that one's.
        while self.base != self.next {
            match reset()? {
                0 => break,
                done => self.base = self.base.wrapping_add(done),
            }
        }
        self.resync = true;
        harvest.overflowed = true;
        Ok(true)
    }

    fn size(&self) -> u32 {
        self.memory.entries().len() as u32
    }

    fn entry(&self, place: u32) -> &RingEntry {
        let entries = self.memory.entries();
        &entries[place as usize % entries.len()]
    }

    fn flags(&self, place: u32) -> u32 {
        // Acquire: the slot and the offset were stored before the flag.
        self.entry(place).flags.load(Ordering::Acquire) & (GFN_DIRTY | GFN_RESET)
    }

    /// Takes the entry if it is dirty and not harvested.
    fn take_entry(
        &self,
        place: u32,
        slots: &Slots,
        collected: &mut Collected,
        harvest: &mut Harvest,
    ) -> bool {
        if self.flags(place) != GFN_DIRTY {
            return false;
        }
        let entry = self.entry(place);
        let (slot, offset) = (
            entry.slot.load(Ordering::Relaxed),
            entry.offset.load(Ordering::Relaxed),
        );
        if !push_entry(slots, slot, offset, collected) {
            harvest.unknown += 1;
        }
        // Release: the kernel may reuse the entry once it sees the flag, so our loads come before it.
        entry.flags.store(GFN_RESET, Ordering::Release);
        harvest.entries += 1;
        true
    }

    /// Hands the empty entry at `next` to the reset if the kernel has written further on, and so will not write it before
    /// it was around. False if it has not.
    fn skip_gap(&self) -> bool {
        let room = self.size() - self.next.wrapping_sub(self.base);
        let ahead = (1..room)
            .map(|at| self.flags(self.next.wrapping_add(at)))
            .find(|&flags| flags != 0);
        // The kernel writes in order: if a later entry is seen dirty, this one was written before or never will be.
        ahead == Some(GFN_DIRTY)
            && self
                .entry(self.next)
                .flags
                .compare_exchange(0, GFN_RESET, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
    }
}

/// Adds what an entry names. An entry that names no page of a known slot still means that *something* was written: the
/// whole slot counts as dirty, or all slots if the slot is unknown too. False in both cases.
fn push_entry(slots: &Slots, slot: u32, offset: u64, collected: &mut Collected) -> bool {
    match slots.find(slot) {
        Some(known) if offset < known.pages => {
            collected.push_page(known.region, known.first + offset);
            true
        }
        Some(known) => {
            collected.push_run(known.run());
            false
        }
        None => {
            slots.iter().for_each(|slot| collected.push_run(slot.run()));
            false
        }
    }
}
