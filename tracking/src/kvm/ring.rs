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
    /// Entries of 16 octets; a power of two.
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
    /// 16,384 entries: 256 KiB per vCPU, 64 MiB of pages between two harvests.
    fn default() -> Self {
        Self { entries: 16_384 }
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

/// As [`enable`], with another kernel.
pub(crate) fn enable_with(
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
                    "a dirty ring of {} octets; this kernel gives at most {}",
                    self.bytes(),
                    ring.ring_bytes_max
                ),
            });
        }
        Ok(ring.variant)
    }
}

/// One vCPU's ring and the place up to which it was harvested.
pub(crate) struct Ring {
    memory: Box<dyn RingMemory>,
    /// Counts on for ever; the entry is this modulo the ring's size.
    next: u32,
}

/// What one pass over a ring brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Harvest {
    /// Entries taken.
    pub(crate) entries: u64,
    /// Entries that named no known memory.
    pub(crate) unknown: u64,
    /// The ring was found full to the last entry. KVM leaves the guest well before; if it did not, entries may be
    /// missing.
    pub(crate) brimful: bool,
}

impl Ring {
    pub(crate) fn new(memory: Box<dyn RingMemory>) -> Self {
        Self { memory, next: 0 }
    }

    /// Takes all entries that are dirty, at most once around: what the vCPU adds meanwhile is found by the next pass.
    pub(crate) fn harvest(&mut self, slots: &Slots, collected: &mut Collected) -> Harvest {
        let entries = self.memory.entries();
        let mut harvest = Harvest::default();
        for _ in 0..entries.len() {
            let entry = &entries[self.next as usize % entries.len()];
            // Acquire: the slot and the offset were stored before the flag.
            if entry.flags.load(Ordering::Acquire) & (GFN_DIRTY | GFN_RESET) != GFN_DIRTY {
                break;
            }
            let (slot, offset) = (
                entry.slot.load(Ordering::Relaxed),
                entry.offset.load(Ordering::Relaxed),
            );
            if !push_entry(slots, slot, offset, collected) {
                harvest.unknown += 1;
            }
            // Release: the kernel may reuse the entry once it sees the flag, so our loads come before it.
            entry.flags.store(GFN_RESET, Ordering::Release);
            self.next = self.next.wrapping_add(1);
            harvest.entries += 1;
        }
        harvest.brimful = harvest.entries == entries.len() as u64;
        harvest
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
