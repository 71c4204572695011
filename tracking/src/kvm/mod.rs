//! What the vCPUs wrote, from KVM: the dirty ring, and the dirty log where there is no ring.
//!
//! The VMM owns its VM and its memory slots. It tells this module which slots hold which regions ([`Slots`]), and how
//! logging is switched on and off for them ([`SlotControl`]). Source: `Documentation/virt/kvm/api.rst`, `linux/kvm.h`.
//!
//! A VMM that wants the ring calls, in this order: [`probe`], [`enable`] (before its first vCPU), creates its vCPUs,
//! [`RingSource::new`]; and each vCPU thread calls [`RingFullHandle::on_full`] when KVM_RUN returns with
//! `KVM_EXIT_DIRTY_RING_FULL` (31).

mod abi;
mod log_source;
mod pace;
mod ring;
mod ring_source;
mod slots;
#[cfg(feature = "vm-memory")]
mod vm_memory;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use kvm_ioctls::VmFd;

pub use log_source::{LogSource, Protect};
pub use pace::Pace;
pub use ring::{RingConfig, enable, enable_with};
pub use ring_source::{RingFullHandle, RingSource, VcpuFigures};
pub use slots::{Slot, Slots};
#[cfg(feature = "vm-memory")]
pub use vm_memory::{MemorySlots, VcpuWrites};

use crate::Error;
use crate::kernel::{Kernel, Linux, Payload, duplicate, host_page_bytes};

/// `KVM_EXIT_DIRTY_RING_FULL`: the exit reason that asks for [`RingFullHandle::on_full`].
pub const EXIT_DIRTY_RING_FULL: u32 = kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;

/// Switches `KVM_MEM_LOG_DIRTY_PAGES` on the VMM's slots. Only the VMM can: the flag goes with
/// `KVM_SET_USER_MEMORY_REGION`, which needs all that the slot was made with.
///
/// It must really switch: after a ring overflowed the ring source switches off and on, because that is what makes KVM
/// protect every page again. A call may come from any thread but a vCPU's.
///
/// A closure `Fn(bool) -> io::Result<()>` is one.
pub trait SlotControl: Send + Sync {
    /// Sets (`on`) or clears the flag on every slot that was named in the source's [`Slots`]. The vCPUs may run.
    ///
    /// # Errors
    /// What KVM answered. The VMM then has put the slots back as they were.
    fn set_logging(&self, on: bool) -> io::Result<()>;
}

impl<F: Fn(bool) -> io::Result<()> + Send + Sync> SlotControl for F {
    fn set_logging(&self, on: bool) -> io::Result<()> {
        self(on)
    }
}

/// Which of the two capabilities offers the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RingVariant {
    /// `KVM_CAP_DIRTY_LOG_RING`: on processors that keep the order of stores (x86).
    Plain,
    /// `KVM_CAP_DIRTY_LOG_RING_ACQ_REL`: entries are read with acquire and released with release order. This crate
    /// always does so, and therefore takes this one wherever it is offered.
    AcqRel,
}

/// The dirty ring that a kernel offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingSupport {
    /// By which capability.
    pub variant: RingVariant,
    /// The biggest ring of one vCPU, in bytes.
    pub ring_bytes_max: u32,
}

/// What a VM's kernel offers for dirty tracking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Support {
    /// The ring, if there is one.
    pub ring: Option<RingSupport>,
    /// `KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP`: writes outside any vCPU go to the log even with the ring on. Only
    /// architectures that make such writes need it (arm64 with a virtual ITS); x86 does not offer it.
    pub ring_with_bitmap: bool,
    /// The flags of `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`: 1 manual protect, 2 initially set. 0 if not offered.
    pub manual_protect: u64,
}

/// A way to learn what the vCPUs wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    /// The dirty ring.
    Ring,
    /// The dirty log.
    Log,
}

/// Pages of memory per page written between two harvests, below which the log is the cheaper way.
///
/// A harvest of the ring costs by the page written, one of the log by the page of memory. Measured on one machine with an
/// emulated KVM, medians in microseconds: 1,000 pages of 1 GiB and of 1 TiB, ring 30 to 100 and 116, log 27 to 90 and
/// 26,000; of 1 GiB, 10,000 pages ring 389, log 378; 30,000 pages 534 and 405; 50,000 pages 780 and 453. So the two
/// cross between one page in 26 and one in 150. 64 lies between: a page per word of the log.
const LOG_BELOW_PAGES_PER_WRITE: u64 = 64;

impl Support {
    /// The ring where it is offered, else the log.
    pub fn method(&self) -> Method {
        if self.ring.is_some() {
            Method::Ring
        } else {
            Method::Log
        }
    }

    /// The cheaper way for a guest of `memory_pages` that is expected to write `written_pages` between two harvests.
    ///
    /// The ring for big memory and little writing, the log for heavy writing: the log from one page in 64 on, and
    /// wherever there is no ring. To be asked before the first vCPU, because a ring cannot be had later.
    pub fn method_for(&self, memory_pages: u64, written_pages: u64) -> Method {
        if written_pages.saturating_mul(LOG_BELOW_PAGES_PER_WRITE) >= memory_pages {
            Method::Log
        } else {
            self.method()
        }
    }
}

/// Asks what the kernel offers for this VM.
///
/// # Errors
/// [`Error::Kernel`] if the descriptor is no VM's.
pub fn probe(vm: &VmFd) -> Result<Support, Error> {
    probe_with(&Linux, vm_fd(vm)?.as_fd())
}

/// As [`probe`], of another kernel.
///
/// # Errors
/// As [`probe`].
pub fn probe_with(kernel: &dyn Kernel, vm: BorrowedFd<'_>) -> Result<Support, Error> {
    let offered = |capability: u32| {
        kernel
            .ioctl(vm, abi::CHECK_EXTENSION, Payload::value(capability.into()))
            .map(|answer| answer.unsigned_abs())
            .map_err(|error| Error::Kernel {
                call: abi::CHECK_EXTENSION.name(),
                error,
            })
    };
    let variants = [
        (abi::CAP_DIRTY_LOG_RING_ACQ_REL, RingVariant::AcqRel),
        (abi::CAP_DIRTY_LOG_RING, RingVariant::Plain),
    ];
    let mut ring = None;
    for (capability, variant) in variants {
        let ring_bytes_max = offered(capability)?;
        if ring.is_none() && ring_bytes_max != 0 {
            ring = Some(RingSupport {
                variant,
                ring_bytes_max,
            });
        }
    }
    Ok(Support {
        ring,
        ring_with_bitmap: offered(abi::CAP_DIRTY_LOG_RING_WITH_BITMAP)? != 0,
        manual_protect: offered(abi::CAP_MANUAL_DIRTY_LOG_PROTECT2)?.into(),
    })
}

/// A descriptor of the VM of our own. It keeps the VM alive in the kernel until it is dropped.
fn vm_fd(vm: &VmFd) -> Result<std::os::fd::OwnedFd, Error> {
    duplicate(vm).map_err(|error| Error::Kernel {
        call: "dup of the VM",
        error,
    })
}

/// KVM counts in the host's pages; this crate counts in pages of 4096 bytes.
fn require_host_page() -> Result<(), Error> {
    let bytes = host_page_bytes();
    if bytes == crate::PAGE_BYTES {
        return Ok(());
    }
    Err(Error::Unsupported {
        what: format!("KVM dirty tracking on a host whose pages have {bytes} bytes, not 4096"),
    })
}

#[cfg(test)]
mod tests;
