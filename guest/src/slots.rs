//! The machine's memory slots: one for each region, and the flag that makes KVM log the writes to them.
//!
//! The slot's number is the region's index. The flag is set only while somebody tracks: a slot that is logged is mapped
//! in 4 KiB pages and each first write to one costs a fault.
#![allow(unsafe_code)] // KVM_SET_USER_MEMORY_REGION

use std::io;
use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use multifd_tracking::kvm::{Slot, SlotControl, Slots};

use crate::config::PAGE_BYTES;
use crate::error::{Error, Result};
use crate::memory::Memory;

/// The slots of a machine. Holds the memory, so that KVM never knows of memory that is gone.
#[derive(Debug)]
pub(crate) struct MemorySlots {
    vm: Arc<VmFd>,
    memory: Memory,
}

/// Whether KVM logs the writes to a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Logging {
    Off,
    On,
}

impl MemorySlots {
    /// Gives `memory` to `vm`, unlogged.
    ///
    /// # Errors
    /// [`Error::Kernel`] if KVM refuses a region.
    pub(crate) fn new(vm: &Arc<VmFd>, memory: &Memory) -> Result<Self> {
        let slots = Self {
            vm: Arc::clone(vm),
            memory: memory.clone(),
        };
        for slot in 0..memory.regions().len() {
            slots
                .set(slot, Logging::Off)
                .map_err(|source| Error::Kernel {
                    call: "KVM_SET_USER_MEMORY_REGION",
                    source,
                })?;
        }
        Ok(slots)
    }

    /// The slots as the tracking knows them.
    ///
    /// # Errors
    /// [`Error::Tracking`] for slots that it does not take.
    pub(crate) fn tracked(&self) -> Result<Slots> {
        let slots = (0..)
            .zip(self.memory.regions())
            .map(|(index, region)| Slot {
                id: index,
                region: index,
                first: 0,
                pages: region.bytes / PAGE_BYTES,
            });
        Ok(Slots::new(slots.collect())?)
    }

    fn set(&self, slot: usize, logging: Logging) -> io::Result<()> {
        let region = &self.memory.regions()[slot];
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: if logging == Logging::On {
                KVM_MEM_LOG_DIRTY_PAGES
            } else {
                0
            },
            guest_phys_addr: region.guest_address,
            memory_size: region.bytes,
            userspace_addr: region.host.as_ptr().expose_provenance() as u64,
        };
        // SAFETY: the range is a region of our own mapping, which `self.memory` keeps; regions do not overlap; and
        // this process accesses it by atomics or pointers only, so that the guest may write it at any time. Should the
        // machine's descriptors outlive the mapping, the kernel drops what it knew of it with the mapping.
        let answer = unsafe { self.vm.set_user_memory_region(region) };
        answer.map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }
}

impl SlotControl for MemorySlots {
    fn set_logging(&self, on: bool) -> io::Result<()> {
        let (wanted, before) = if on {
            (Logging::On, Logging::Off)
        } else {
            (Logging::Off, Logging::On)
        };
        for slot in 0..self.memory.regions().len() {
            if let Err(error) = self.set(slot, wanted) {
                for done in 0..slot {
                    self.set(done, before)?;
                }
                return Err(error);
            }
        }
        Ok(())
    }
}
