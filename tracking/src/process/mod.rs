//! What was written to a process's memory, by whatever thread of it, without a hypervisor: userfaultfd's asynchronous
//! write protection, and `PAGEMAP_SCAN`.
//!
//! ```text
//!   start     register the ranges, protect what is there         (UFFDIO_REGISTER, PAGEMAP_SCAN)
//!   a write   the kernel lifts the page's protection and goes on; no fault reaches this process
//!   collect   "which pages are not protected? protect them"      one call, atomic for each page (PM_SCAN_WP_MATCHING)
//!   stop      unregister, which lifts all protection
//! ```
//!
//! A page that was never touched has no protection and is not reported; the first write makes it present and unprotected,
//! and so reported. The first *read* of a fresh page does too: a page of zeros may be sent that nobody wrote, and no page
//! is missed.
//!
//! **What it sees**: every write through this mapping by this process, system calls included (`recv` into it), and by a KVM
//! that maps it. **What it does not see**, and an embedder has to mark ([`VmmWrites`](crate::VmmWrites)): writes through
//! another mapping of the same shared memory, by another process or by a device to pinned pages; and memory that is
//! thrown away (`MADV_DONTNEED`, a hole punched into the file), which becomes zero without being written.
//!
//! The process can be another one, which passes its [`Permission`]: the kernel's calls are about the memory of the process that opened
//! the descriptors, whoever makes them.
//!
//! No privilege is needed: the descriptor is for faults of user mode only, and asynchronous protection makes no others.
//! Source: `Documentation/admin-guide/mm/{userfaultfd,pagemap}.rst`, `linux/userfaultfd.h`, `linux/fs.h`.

mod abi;
mod source;

use crate::{Error, PAGE_BYTES};

pub use source::{Permission, ProcessSource};

/// Where a run of a region's pages lies in the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedRange {
    /// Index of the region.
    pub region: u32,
    /// The page of the region that lies at `address`.
    pub first: u64,
    /// Address in that process, a multiple of 4096.
    pub address: u64,
    /// The pages.
    pub pages: u64,
}

impl MappedRange {
    fn bytes(&self) -> u64 {
        self.pages * PAGE_BYTES
    }

    fn end(&self) -> u64 {
        self.address + self.bytes()
    }

    fn run(&self) -> crate::Run {
        crate::Run {
            region: self.region,
            first: self.first,
            count: self.pages,
        }
    }

    fn check(&self) -> Result<(), Error> {
        let end = self
            .pages
            .checked_mul(PAGE_BYTES)
            .and_then(|bytes| bytes.checked_add(self.address));
        if self.pages > 0 && self.address.is_multiple_of(PAGE_BYTES) && end.is_some() {
            return Ok(());
        }
        Err(Error::Misuse {
            what: format!(
                "{} pages at address {:#x}: a range has at least one page, at a multiple of {PAGE_BYTES}",
                self.pages, self.address
            ),
        })
    }
}

#[cfg(test)]
mod tests;
