//! KVM's tracking for a VMM on rust-vmm's crates: its memory as slots, and the choice between ring and log.
//!
//! ```text
//!   VcpuWrites::enable(vm)   before the first vCPU: the ring cannot be had later
//!   create the vCPUs
//!   MemorySlots::new(vm, memory)
//!   VcpuWrites::source(vm, vcpus, slots) ──► the source, and what a vCPU's thread calls when its ring is full
//! ```
#![allow(unsafe_code)] // KVM_SET_USER_MEMORY_REGION

use std::io;
use std::sync::Arc;

use ::vm_memory::{Address as _, GuestMemoryBackend, GuestMemoryRegion as _, MemoryRegionAddress};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuFd, VmFd};

use super::{
    LogSource, Method, Protect, RingConfig, RingFullHandle, RingSource, Slot, SlotControl, Slots,
    enable, probe,
};
use crate::{Error, PAGE_BYTES, Source};

/// The memory slots of a VM: region n of its memory, by guest address, is slot n. The flag that makes KVM log writes is set only while
/// somebody tracks, because a slot that is logged is mapped in 4 KiB pages.
///
/// It holds the memory, so that KVM never knows of memory that is gone.
pub struct MemorySlots<M> {
    vm: Arc<VmFd>,
    _memory: Arc<M>,
    slots: Vec<kvm_userspace_memory_region>,
}

impl<M: GuestMemoryBackend + Send + Sync> MemorySlots<M> {
    /// Gives `memory` to the VM, unlogged.
    ///
    /// # Errors
    /// [`Error::Misuse`] for a region that is not mapped into this process as a whole; [`Error::Kernel`] if KVM refuses one.
    pub fn new(vm: &Arc<VmFd>, memory: &Arc<M>) -> Result<Self, Error> {
        let unmapped = |slot| Error::Misuse {
            what: format!("region {slot} is not mapped as a whole"),
        };
        let mut slots = Vec::new();
        for (region, slot) in memory.iter().zip(0..) {
            let bytes = usize::try_from(region.len()).map_err(|_| unmapped(slot))?;
            let slice = region.get_slice(MemoryRegionAddress(0), bytes);
            let slice = slice.ok().filter(|slice| slice.len() == bytes);
            let base = slice.ok_or_else(|| unmapped(slot))?.ptr_guard_mut();
            slots.push(kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: base.as_ptr().expose_provenance() as u64,
            });
        }
        let slots = Self {
            vm: Arc::clone(vm),
            _memory: Arc::clone(memory),
            slots,
        };
        slots.set(false).map_err(|error| Error::Kernel {
            call: "KVM_SET_USER_MEMORY_REGION",
            error,
        })?;
        Ok(slots)
    }

    fn tracked(&self) -> Result<Slots, Error> {
        let slot = |slot: &kvm_userspace_memory_region| Slot {
            id: slot.slot,
            region: slot.slot,
            first: 0,
            pages: slot.memory_size / PAGE_BYTES,
        };
        Slots::new(self.slots.iter().map(slot).collect())
    }
}

impl<M> MemorySlots<M> {
    fn set(&self, logged: bool) -> io::Result<()> {
        self.slots
            .iter()
            .try_for_each(|slot| self.set_one(*slot, logged))
    }

    fn set_one(&self, mut slot: kvm_userspace_memory_region, logged: bool) -> io::Result<()> {
        slot.flags = if logged { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        // SAFETY: the range is a region of vm-memory's as a whole, which `_memory` keeps mapped, and of which vm-memory's rule
        // is that nobody forms a reference to it, so that the guest may write it at any time. Should the VM's descriptor outlive the
        // mapping, the kernel drops what it knew of it with the mapping.
        let answer = unsafe { self.vm.set_user_memory_region(slot) };
        answer.map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }
}

impl<M: Send + Sync> SlotControl for MemorySlots<M> {
    fn set_logging(&self, on: bool) -> io::Result<()> {
        for (index, slot) in self.slots.iter().enumerate() {
            if let Err(error) = self.set_one(*slot, on) {
                let changed = &self.slots[..index];
                changed
                    .iter()
                    .try_for_each(|slot| self.set_one(*slot, !on))?;
                return Err(error);
            }
        }
        Ok(())
    }
}

/// How the vCPUs' writes are going to be learnt: decided before there is a vCPU.
#[derive(Clone, Copy, Debug)]
pub struct VcpuWrites {
    method: Method,
}

impl VcpuWrites {
    /// Decides, and switches the ring on if it is the one. `None`: the ring where it is offered, else the log. To be called before the
    /// VM's first vCPU is made.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if what is wanted is not offered, [`Error::Kernel`] if the kernel refuses.
    pub fn enable(vm: &VmFd, wanted: Option<Method>) -> Result<Self, Error> {
        let method = match wanted {
            Some(method) => method,
            None => probe(vm)?.method(),
        };
        if method == Method::Ring {
            enable(vm, RingConfig::default())?;
        }
        Ok(Self { method })
    }

    /// What it came to.
    #[must_use]
    pub fn method(self) -> Method {
        self.method
    }

    /// The source, for vCPUs that have not run. With the ring there is a handle too, and each vCPU's thread calls
    /// [`RingFullHandle::on_full`] when KVM_RUN returns with [`EXIT_DIRTY_RING_FULL`](super::EXIT_DIRTY_RING_FULL). The source is for the
    /// life of the VM: it goes into one migration after the other.
    ///
    /// # Errors
    /// As [`RingSource::new`] and [`LogSource::new`].
    pub fn source<'a, M: GuestMemoryBackend + Send + Sync + 'static>(
        self,
        vm: &VmFd,
        vcpus: impl IntoIterator<Item = &'a VcpuFd>,
        slots: MemorySlots<M>,
    ) -> Result<(Box<dyn Source>, Option<RingFullHandle>), Error> {
        let (tracked, control) = (slots.tracked()?, Box::new(slots));
        Ok(match self.method {
            Method::Ring => {
                let source = RingSource::new(vm, vcpus, RingConfig::default(), tracked, control)?;
                let handle = source.handle();
                (Box::new(source), Some(handle))
            }
            Method::Log => {
                let source = LogSource::new(vm, Protect::ManualInitiallySet, tracked, control)?;
                (Box::new(source), None)
            }
        })
    }
}
