//! Guest memory as this crate sees it: mapped regions, and spans of them that can be sent from and received into.
//!
//! Rule: guest memory is never behind a Rust reference. A guest, its devices and other processes write it at any moment, so it
//! is reached by pointer and length only: volatile loads, copies between it and private memory, and the kernel.
//! A [`Span`] can be made only by [`GuestMemory::span`], which checks it against a region, and it borrows the
//! [`GuestMemory`], which keeps the mapping alive: safe code cannot make one that dangles.
#![allow(unsafe_code)] // The one place, besides `sys`, where memory is reached through raw pointers.

mod backing;
mod cgroup;
mod checksum;
mod map;
mod pagemap;
mod populated;
mod span;
mod vma;
mod zero;

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;

pub use crate::in_memory::{PAIR_CAPACITY_DEFAULT, pair};
pub use backing::BackingError;
pub use map::MapError;
pub use populated::Unknown;
pub use span::Span;

/// The memory of one guest: a list of mapped regions, in the order in which both sides agreed on them.
///
/// Cloning it is cheap; the mappings live until the last clone is gone.
#[derive(Clone)]
pub struct GuestMemory {
    regions: Arc<[Region]>,
}

/// Where a region lies in the guest's physical address space, and how large it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionLayout {
    /// Guest-physical address of its first byte.
    pub guest_address: u64,
    /// Size in bytes.
    pub bytes: u64,
}

/// A mapping made elsewhere, for [`GuestMemory::from_raw`].
pub struct RawRegion {
    /// Where it lies for the guest, and its size.
    pub layout: RegionLayout,
    /// Where it lies in this process.
    pub base: NonNull<u8>,
    /// Whatever keeps the mapping alive; dropped with the last clone of the [`GuestMemory`].
    pub owner: Arc<dyn Any + Send + Sync>,
}

/// A part of a file that is a region of guest memory, for [`GuestMemory::from_files`].
#[derive(Clone, Copy, Debug)]
pub struct FileRegion<'f> {
    /// Where it lies for the guest, and its size.
    pub layout: RegionLayout,
    /// The file, open for reading and writing.
    pub file: BorrowedFd<'f>,
    /// Where in the file the region begins: at a multiple of its page size.
    pub offset: u64,
}

/// A place in guest memory, as `(region, offset)` with names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index of the region.
    pub region_index: u32,
    /// Bytes from the region's start.
    pub offset: u64,
}

/// Why a span was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SpanError {
    /// There is no such region.
    #[error("there is no region {region_index}: guest memory has {region_count}")]
    RegionUnknown {
        /// The index asked for.
        region_index: u32,
        /// How many regions there are.
        region_count: usize,
    },
    /// The span does not lie inside its region.
    #[error(
        "{bytes} bytes at offset {offset} do not lie inside region {region_index} of {region_bytes} bytes"
    )]
    OutOfRange {
        /// The region asked for.
        region_index: u32,
        /// The offset asked for.
        offset: u64,
        /// The length asked for.
        bytes: u64,
        /// The region's size.
        region_bytes: u64,
    },
    /// The part does not lie inside the span it was asked of.
    #[error("{bytes} bytes at offset {offset} do not lie inside a span of {span_bytes} bytes")]
    OutsideSpan {
        /// The offset asked for.
        offset: usize,
        /// The length asked for.
        bytes: usize,
        /// The span's size.
        span_bytes: usize,
    },
}

impl GuestMemory {
    /// Wraps mappings that the caller made.
    ///
    /// # Safety
    /// For every region, for as long as its `owner` is alive:
    /// - `base` points to `layout.bytes` bytes mapped readable and writable in this process, and they stay mapped there;
    /// - no Rust reference (`&` or `&mut`) to any of these bytes exists or is made, except to atomics; and they are not the
    ///   memory of any Rust object: they come from `mmap` or the like;
    /// - writing any byte to any of them is acceptable to whoever else uses the memory: this crate's users may write it
    ///   through safe code.
    #[must_use]
    pub unsafe fn from_raw(regions: Vec<RawRegion>) -> Self {
        let regions = regions
            .into_iter()
            .map(|raw| Region {
                layout: raw.layout,
                base: raw.base,
                _owner: raw.owner,
            })
            .collect();
        Self { regions }
    }

    /// Wraps the memory of a VMM that is built on rust-vmm, whatever its regions are made of.
    ///
    /// Regions keep the order of `memory`, which is by guest address. What is received goes past `memory`'s own dirty bitmap.
    ///
    /// # Errors
    /// [`MapError::NoAddress`] for a region that is not mapped into this process as a whole.
    #[cfg(feature = "vm-memory")]
    pub fn from_vm_memory<M>(memory: Arc<M>) -> Result<Self, MapError>
    where
        M: vm_memory::GuestMemoryBackend + Send + Sync + 'static,
    {
        use vm_memory::{Address, GuestMemoryRegion, MemoryRegionAddress};
        let regions = memory
            .iter()
            .zip(0..)
            .map(|(region, region_index)| {
                let unmapped = || MapError::NoAddress { region_index };
                let len = usize::try_from(region.len()).map_err(|_| unmapped())?;
                let slice = region.get_slice(MemoryRegionAddress(0), len);
                let slice = slice.ok().filter(|slice| slice.len() == len);
                let base = slice.and_then(|slice| NonNull::new(slice.ptr_guard_mut().as_ptr()));
                Ok(RawRegion {
                    layout: RegionLayout {
                        guest_address: region.start_addr().raw_value(),
                        bytes: region.len(),
                    },
                    base: base.ok_or_else(unmapped)?,
                    owner: Arc::clone(&memory) as Arc<dyn Any + Send + Sync>,
                })
            })
            .collect::<Result<_, MapError>>()?;
        // SAFETY: whoever made a region's slice promised that its bytes are mapped for as long as the region is borrowed
        // (`VolatileSlice::new`), which may be as long as `memory` lives, which `owner` sees to. vm-memory has the same rule as this
        // module: it forms no references to guest memory.
        Ok(unsafe { Self::from_raw(regions) })
    }

    /// Maps parts of files, shared with whoever else has them: a memfd, a file in tmpfs or hugetlbfs. The descriptors are not needed
    /// any longer afterwards.
    ///
    /// A file that somebody makes shorter later kills whoever reaches for what is gone (SIGBUS); a memfd can be sealed against it.
    ///
    /// # Errors
    /// [`MapError`] with the region; [`MapError::File`] for a file that is too short now.
    pub fn from_files(regions: &[FileRegion<'_>]) -> Result<Self, MapError> {
        let regions = regions
            .iter()
            .zip(0..)
            .map(|(region, region_index)| {
                let mapping = map::Mapping::of_file(region_index, region)?;
                Ok(Region {
                    layout: region.layout,
                    base: mapping.base(),
                    _owner: Arc::new(mapping),
                })
            })
            .collect::<Result<Arc<[_]>, MapError>>()?;
        Ok(Self { regions })
    }

    /// Maps fresh private memory, one mapping per entry of `layouts`: all zero, not yet backed by pages, huge pages advised and
    /// aligned for. Swap space is not reserved.
    ///
    /// # Errors
    /// [`MapError`] with the region that could not be mapped.
    pub fn anonymous(layouts: &[RegionLayout]) -> Result<Self, MapError> {
        let regions = layouts
            .iter()
            .zip(0..)
            .map(|(layout, region_index)| {
                let mapping = map::Mapping::anonymous(region_index, layout.bytes)?;
                Ok(Region {
                    layout: *layout,
                    base: mapping.base(),
                    _owner: Arc::new(mapping),
                })
            })
            .collect::<Result<Arc<[_]>, MapError>>()?;
        let memory = Self { regions };
        memory.advise_huge()?;
        Ok(memory)
    }

    /// Maps a file (a memfd, a file of tmpfs or hugetlbfs), shared: one region behind the other from the file's first byte on. What
    /// the file holds is what the memory holds. A file that is shortened later ends this process at the next access.
    ///
    /// # Errors
    /// [`MapError`] with the region that could not be mapped.
    pub fn shared_file(file: &File, layouts: &[RegionLayout]) -> Result<Self, MapError> {
        let mut offset = 0;
        let regions = layouts
            .iter()
            .zip(0..)
            .map(|(layout, region_index)| {
                let region = FileRegion {
                    layout: *layout,
                    file: file.as_fd(),
                    offset,
                };
                let mapping = map::Mapping::of_file(region_index, &region)?;
                offset += layout.bytes;
                Ok(Region {
                    layout: *layout,
                    base: mapping.base(),
                    _owner: Arc::new(mapping),
                })
            })
            .collect::<Result<Arc<[_]>, MapError>>()?;
        Ok(Self { regions })
    }

    /// Number of regions.
    #[must_use]
    pub fn region_count(&self) -> usize {
        self.regions.len()
    }

    /// All regions' places and sizes, in order of their index.
    pub fn layouts(&self) -> impl ExactSizeIterator<Item = RegionLayout> + '_ {
        self.regions.iter().map(|region| region.layout)
    }

    /// One region's place and size; `None` if there is no such region.
    #[must_use]
    pub fn layout(&self, region_index: u32) -> Option<RegionLayout> {
        self.region(region_index).ok().map(|region| region.layout)
    }

    /// Size of all regions together, in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.layouts().map(|layout| layout.bytes).sum()
    }

    /// The bytes `offset..offset + bytes` of a region.
    ///
    /// # Errors
    /// [`SpanError`] if there is no such region or the bytes do not all lie inside it.
    pub fn span(&self, region_index: u32, offset: u64, bytes: u64) -> Result<Span<'_>, SpanError> {
        let region = self.region(region_index)?;
        let (start, len) = region.check(region_index, offset, bytes)?;
        // SAFETY: `check` found start + len inside the region, which is one mapping of that size (`from_raw`'s contract), so the
        // pointer stays inside the mapping or one past its end. The span borrows self, which owns the mapping.
        Ok(unsafe { Span::from_region(region.base, start, len) })
    }

    /// The place of a span's first byte: what a kind of channel that works by registered regions needs to know.
    ///
    /// `None` for a span of another guest's memory.
    #[must_use]
    pub fn locate(&self, span: Span<'_>) -> Option<Place> {
        let address = span.as_ptr() as u64;
        self.regions
            .iter()
            .zip(0..)
            .find_map(|(region, region_index)| {
                let offset = address.checked_sub(region.base.as_ptr() as u64)?;
                let end = offset.checked_add(span.len() as u64)?;
                (end <= region.layout.bytes).then_some(Place {
                    region_index,
                    offset,
                })
            })
    }

    /// Backs a part of a region with writable pages now (`MADV_POPULATE_WRITE`), so that landing there later takes no page
    /// faults. The range is rounded outwards to host pages. Contents do not change. To be called in steps where it must be
    /// possible to stop: a call cannot be interrupted, and takes up to about a second per GiB of small pages.
    ///
    /// # Errors
    /// [`MapError::Span`] for a range outside the region; [`MapError::Advice`] with the kernel's reason, such as a memory
    /// limit, or a kernel before 5.14 (`EINVAL`), without which everything still works, slower.
    pub fn populate(&self, region_index: u32, range: Range<u64>) -> Result<(), MapError> {
        self.advise(region_index, range, map::Advice::PopulateWrite)
    }

    /// Asks for huge pages in all regions (`MADV_HUGEPAGE`).
    ///
    /// # Errors
    /// [`MapError::Advice`] where the kernel was built without them.
    pub fn advise_huge(&self) -> Result<(), MapError> {
        for (layout, region_index) in self.layouts().zip(0..) {
            self.advise(region_index, 0..layout.bytes, map::Advice::Huge)?;
        }
        Ok(())
    }

    fn advise(
        &self,
        region_index: u32,
        range: Range<u64>,
        advice: map::Advice,
    ) -> Result<(), MapError> {
        let bytes = range.end.saturating_sub(range.start);
        let span = self.span(region_index, range.start, bytes)?;
        map::advise(region_index, span, advice)
    }

    fn region(&self, region_index: u32) -> Result<&Region, SpanError> {
        let unknown = SpanError::RegionUnknown {
            region_index,
            region_count: self.regions.len(),
        };
        usize::try_from(region_index)
            .ok()
            .and_then(|index| self.regions.get(index))
            .ok_or(unknown)
    }
}

impl fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.layouts()).finish()
    }
}

struct Region {
    layout: RegionLayout,
    base: NonNull<u8>,
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: `base` is the address of memory that any thread may reach while `_owner` lives (`from_raw`'s contract), and `_owner`
// is itself Send and Sync. A Region hands the pointer out only inside spans.
unsafe impl Send for Region {}
// SAFETY: as above; a shared Region is only read.
unsafe impl Sync for Region {}

impl Region {
    /// The bounds as offsets in this process, if they lie inside the region.
    fn check(
        &self,
        region_index: u32,
        offset: u64,
        bytes: u64,
    ) -> Result<(usize, usize), SpanError> {
        let inside = offset
            .checked_add(bytes)
            .is_some_and(|end| end <= self.layout.bytes);
        match (inside, usize::try_from(offset), usize::try_from(bytes)) {
            (true, Ok(start), Ok(len)) => Ok((start, len)),
            _ => Err(SpanError::OutOfRange {
                region_index,
                offset,
                bytes,
                region_bytes: self.layout.bytes,
            }),
        }
    }
}

#[cfg(test)]
mod holes_tests;
#[cfg(test)]
mod tests;
