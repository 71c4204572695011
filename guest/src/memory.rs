//! The guest's memory on the host: one private anonymous mapping, described as regions.
//!
//! ```text
//!   guest-physical   0 ─────── region 0 ─────── 3 GiB      4 GiB ──── region 1 ────
//!   host             base ───────────────────── base + 3 GiB ──────────────────────   one mapping, 2 MiB aligned
//! ```
//!
//! The rules that this file keeps:
//! - No reference to the memory is ever made but to an atomic word: the guest writes it while we look. Words are read
//!   and written relaxed, which is also what makes the threads of a process guest well-defined.
//! - The mapping lives as long as any clone of [`Memory`]; whoever holds a region's pointer must hold a clone.
//! - After a guest's start nobody on this side writes the memory, except that a destination loads what arrived
//!   before it runs. Such a write would not be seen by KVM's tracking.
#![allow(unsafe_code)] // maps memory, and reads and writes it through pointers

use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::config::PAGE_BYTES;
use crate::error::{Error, Result};
use crate::layout::{self, PageWords};

/// What a transparent huge page covers; regions are aligned to it so that huge pages can back both sides.
const HUGE_PAGE_BYTES: usize = 2 << 20;

const WORD_BYTES: u64 = 8;

/// A guest's memory. Clones are the same memory.
#[derive(Clone, Debug)]
pub struct Memory(Arc<Mapping>);

/// A contiguous piece of a guest's memory.
///
/// `host` may be read and written for `bytes` bytes as long as a clone of the [`Memory`] it came from lives, by
/// pointer only: a reference to memory that a running guest writes is undefined behaviour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRegion {
    /// Guest-physical address of the first byte, page aligned.
    pub guest_address: u64,
    /// Where the host has it, aligned to 2 MiB in region 0 and 1.
    pub host: NonNull<u8>,
    /// Length in bytes, a multiple of 4,096.
    pub bytes: u64,
}

// SAFETY: a region is an address and a length; whoever uses the pointer owes the rules above, on any thread.
unsafe impl Send for MemoryRegion {}
// SAFETY: as for Send; shared access to the three fields reads them only.
unsafe impl Sync for MemoryRegion {}

#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
    regions: Vec<MemoryRegion>,
}

// SAFETY: the mapping belongs to no thread, and every access in this file is an atomic one.
unsafe impl Send for Mapping {}
// SAFETY: as for Send.
unsafe impl Sync for Mapping {}

impl Memory {
    /// The same memory as the channels know it: regions in the same order, kept alive by it.
    #[must_use]
    pub fn to_channels(&self) -> multifd_transport::GuestMemory {
        let raw = |region: &MemoryRegion| multifd_transport::memory::RawRegion {
            layout: multifd_transport::memory::RegionLayout {
                guest_address: region.guest_address,
                bytes: region.bytes,
            },
            base: region.host,
            owner: Arc::clone(&self.0) as Arc<dyn std::any::Any + Send + Sync>,
        };
        let regions = self.regions().iter().map(raw).collect();
        // SAFETY: each region is a mapping of `bytes` bytes at `host`, readable and writable, that lives as long as the
        // `Mapping` behind `owner`; this crate reaches it by pointers only, never by references; and it is guest memory,
        // which the receiver is meant to write.
        unsafe { multifd_transport::GuestMemory::from_raw(regions) }
    }

    /// `bytes` of memory, all zero and none of it populated. `bytes` is a multiple of a page.
    ///
    /// # Errors
    /// [`Error::Kernel`] if the address space cannot be had.
    pub(crate) fn new(bytes: u64) -> Result<Self> {
        let bytes = usize::try_from(bytes).expect("64-bit hosts only: the crate is x86-64");
        let base = map_aligned(bytes)?;
        // Refused where huge pages are not built in; then there are none, and nothing else changes.
        // SAFETY: [base, base + bytes) is our own mapping, and the advice changes no content.
        unsafe { libc::madvise(base.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
        // The source forks nothing, but an embedder might: a copy-on-write of the guest helps nobody.
        // SAFETY: as above.
        unsafe { libc::madvise(base.as_ptr().cast(), bytes, libc::MADV_DONTFORK) };
        let mut regions = Vec::new();
        let mut offset = 0;
        for (guest_address, region_bytes) in layout::regions(bytes as u64) {
            // SAFETY: the regions' lengths add up to `bytes`, so the offset stays inside the mapping.
            let host = unsafe { base.add(offset) };
            regions.push(MemoryRegion {
                guest_address,
                host,
                bytes: region_bytes,
            });
            offset += region_bytes as usize;
        }
        Ok(Self(Arc::new(Mapping {
            base,
            bytes,
            regions,
        })))
    }

    /// The regions, by rising guest address. There are one or two.
    pub fn regions(&self) -> &[MemoryRegion] {
        &self.0.regions
    }

    /// Bytes of all regions.
    pub fn bytes(&self) -> u64 {
        self.0.bytes as u64
    }

    /// Pages of all regions.
    pub(crate) fn pages(&self) -> u64 {
        self.bytes() / PAGE_BYTES
    }

    /// Copies 64-bit words out of the guest, from guest-physical address `guest_address` on.
    ///
    /// The address is a multiple of 8. Words of a running guest are each whole, but not of one moment.
    ///
    /// # Errors
    /// [`Error::Misuse`] if the words are not inside one region, or the address is not aligned.
    pub fn read_words(&self, guest_address: u64, words: &mut [u64]) -> Result<()> {
        let offset = self.offset_of(guest_address, words.len())?;
        self.copy_out(offset, words);
        Ok(())
    }

    /// Copies 64-bit words into the guest, to guest-physical address `guest_address` and on.
    ///
    /// For loading a guest that does not run: tracking does not see these writes.
    ///
    /// # Errors
    /// [`Error::Misuse`] if the words are not inside one region, or the address is not aligned.
    pub fn write_words(&self, guest_address: u64, words: &[u64]) -> Result<()> {
        let offset = self.offset_of(guest_address, words.len())?;
        for (word, index) in words.iter().zip(0..) {
            self.word_at(offset + index * WORD_BYTES)
                .store(*word, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Copies page `page` out.
    pub(crate) fn read_page(&self, page: u64, words: &mut PageWords) {
        self.copy_out(page * PAGE_BYTES, words);
    }

    /// Writes page `page`.
    pub(crate) fn write_page(&self, page: u64, words: &PageWords) {
        for (word, index) in words.iter().zip(0..) {
            self.word_at(page * PAGE_BYTES + index * WORD_BYTES)
                .store(*word, Ordering::Relaxed);
        }
    }

    /// The word `word` of page `page` and what follows.
    pub(crate) fn word(&self, page: u64, word: u64) -> &AtomicU64 {
        self.word_at(page * PAGE_BYTES + word * WORD_BYTES)
    }

    /// Asks the kernel to back `pages` pages from `first_page` on, without changing their content.
    ///
    /// # Errors
    /// [`Error::Kernel`]: no memory left, or a kernel older than 5.14.
    pub(crate) fn populate(&self, first_page: u64, pages: u64) -> Result<()> {
        let offset = (first_page * PAGE_BYTES) as usize;
        let bytes = (pages * PAGE_BYTES) as usize;
        assert!(
            offset <= self.0.bytes && bytes <= self.0.bytes - offset,
            "page {first_page} + {pages}"
        );
        // SAFETY: the range was just found to be inside the mapping.
        let start = unsafe { self.0.base.add(offset) };
        // SAFETY: the range is our own mapping; populating for write changes no content, whoever writes meanwhile.
        let answer =
            unsafe { libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_POPULATE_WRITE) };
        if answer == 0 {
            Ok(())
        } else {
            Err(Error::last_os("madvise(MADV_POPULATE_WRITE)"))
        }
    }

    fn copy_out(&self, offset: u64, words: &mut [u64]) {
        for (word, index) in words.iter_mut().zip(0..) {
            *word = self
                .word_at(offset + index * WORD_BYTES)
                .load(Ordering::Relaxed);
        }
    }

    /// The word at `offset` bytes from the start of the mapping.
    #[inline]
    fn word_at(&self, offset: u64) -> &AtomicU64 {
        let offset = offset as usize;
        assert!(
            offset < self.0.bytes && offset.is_multiple_of(8),
            "offset {offset}"
        );
        // SAFETY: the offset is inside the mapping, as was just checked.
        let word = unsafe { self.0.base.add(offset) };
        // SAFETY: aligned to 8 (the base is aligned to 2 MiB), eight bytes inside the mapping (its length is a
        // multiple of 4,096), which lives as long as `self`. Inside this process the words are accessed as atomics
        // only; the guest and the kernel are outside of what the language describes.
        unsafe { AtomicU64::from_ptr(word.as_ptr().cast()) }
    }

    /// The offset of `words` words at `guest_address`, if they are inside one region.
    fn offset_of(&self, guest_address: u64, words: usize) -> Result<u64> {
        let outside = Error::Misuse {
            advice: "address words inside one region, aligned to 8 bytes",
        };
        if !guest_address.is_multiple_of(WORD_BYTES) {
            return Err(outside);
        }
        let bytes = words as u64 * WORD_BYTES;
        let mut region_offset = 0;
        for region in self.regions() {
            let inside = guest_address.checked_sub(region.guest_address);
            if let Some(inside) = inside.filter(|inside| *inside < region.bytes) {
                return if bytes <= region.bytes - inside {
                    Ok(region_offset + inside)
                } else {
                    Err(outside)
                };
            }
            region_offset += region.bytes;
        }
        Err(outside)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is the mapping that `map_aligned` made, and no clone of `Memory` is left to use it.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

/// Whether the kernel may back private memory with transparent huge pages.
pub(crate) fn huge_pages_offered() -> bool {
    let setting = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    setting.is_ok_and(|setting| !setting.contains("[never]"))
}

/// Bytes of memory that this host has.
pub(crate) fn host_bytes() -> u64 {
    // SAFETY: asks for a number.
    let pages = unsafe { libc::sysconf(libc::_SC_PHYS_PAGES) };
    // SAFETY: as above.
    let page_bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    // A host that does not say is not refused.
    u64::try_from(pages)
        .unwrap_or(u64::MAX)
        .saturating_mul(u64::try_from(page_bytes).unwrap_or(1))
}

/// A fresh mapping of `bytes` bytes whose start is aligned to a huge page.
fn map_aligned(bytes: usize) -> Result<NonNull<u8>> {
    let reserved = bytes + HUGE_PAGE_BYTES;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    let start = unsafe { libc::mmap(ptr::null_mut(), reserved, protection, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(Error::last_os("mmap(guest memory)"));
    }
    let start: *mut u8 = start.cast();
    let lead = start.align_offset(HUGE_PAGE_BYTES);
    // SAFETY: lead < HUGE_PAGE_BYTES, so this is inside what was reserved.
    let base = unsafe { start.add(lead) };
    // SAFETY: lead + bytes <= reserved, so this is inside what was reserved or one past it.
    let end = unsafe { base.add(bytes) };
    unmap_part(start, lead);
    unmap_part(end, reserved - lead - bytes);
    NonNull::new(base).ok_or_else(|| Error::last_os("mmap(guest memory)"))
}

/// Gives back the part of a reservation that alignment left over.
fn unmap_part(start: *mut u8, bytes: usize) {
    // An unaligned rest (memory that is no multiple of a page) cannot be: all lengths are multiples of 4,096.
    if bytes > 0 {
        // SAFETY: the part was mapped by our caller a moment ago and nothing points to it.
        unsafe { libc::munmap(start.cast(), bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_memory_is_zero_aligned_and_unpopulated() {
        let memory = Memory::new((64 << 20) + PAGE_BYTES).unwrap();
        assert!(
            memory.regions()[0]
                .host
                .addr()
                .get()
                .is_multiple_of(HUGE_PAGE_BYTES)
        );
        let mut words = [1; layout::PAGE_WORDS];
        memory.read_page(memory.pages() - 1, &mut words);
        assert_eq!(words, [0; layout::PAGE_WORDS]);
    }

    #[test]
    fn words_go_to_both_regions_and_come_back() {
        let memory = Memory::new(4 << 30).unwrap();
        let addresses: Vec<u64> = memory
            .regions()
            .iter()
            .flat_map(|region| {
                [
                    region.guest_address,
                    region.guest_address + region.bytes - 16,
                ]
            })
            .collect();
        assert_eq!(addresses, [0, (3 << 30) - 16, 4 << 30, (5 << 30) - 16]);
        for address in &addresses {
            memory
                .write_words(*address, &[*address + 1, *address + 2])
                .unwrap();
        }
        for address in addresses {
            let mut words = [0; 2];
            memory.read_words(address, &mut words).unwrap();
            assert_eq!(words, [address + 1, address + 2]);
        }
    }

    #[test]
    fn refuses_words_in_the_hole_past_the_end_across_regions_and_unaligned() {
        let memory = Memory::new(4 << 30).unwrap();
        let mut words = [0; 2];
        for address in [
            3 << 30,
            5 << 30,
            u64::MAX - 7,
            (3 << 30) - 8,
            (5 << 30) - 8,
            4,
        ] {
            assert_eq!(
                memory.read_words(address, &mut words).unwrap_err().code(),
                "guest-misuse"
            );
            assert_eq!(
                memory.write_words(address, &words).unwrap_err().code(),
                "guest-misuse"
            );
        }
    }

    #[test]
    fn populating_keeps_the_content() {
        let memory = Memory::new(64 << 20).unwrap();
        memory.write_words(4096, &[7]).unwrap();
        memory.populate(0, memory.pages()).unwrap();
        assert_eq!(memory.word(1, 0).load(Ordering::Relaxed), 7);
    }
}
