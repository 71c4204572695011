//! Mapping fresh memory and giving the kernel advice about memory: the system calls below [`GuestMemory`](super::GuestMemory).
//!
//! Rule: a mapping is unmapped by its owner's drop and by nothing else.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};

use super::{FileRegion, Span, SpanError};

/// Why memory could not be mapped or prepared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// The region has no bytes, or more than this process can address.
    #[error("region {region_index} cannot have {bytes} bytes")]
    Size {
        /// The region.
        region_index: u32,
        /// The size asked for.
        bytes: u64,
    },
    /// The kernel refused the mapping.
    #[error("cannot map {bytes} bytes for region {region_index}: {cause}")]
    Map {
        /// The region.
        region_index: u32,
        /// The size asked for.
        bytes: u64,
        /// The kernel's reason.
        cause: io::Error,
    },
    /// The file does not have the region's bytes: to reach for them would kill the process.
    #[error(
        "region {region_index} is to be bytes {offset} to {end} of a file that has {file_bytes}: make the file that long first"
    )]
    File {
        /// The region.
        region_index: u32,
        /// Where it begins in the file.
        offset: u64,
        /// Where it ends in the file.
        end: u64,
        /// The file's size.
        file_bytes: u64,
    },
    /// A region of vm-memory has no address in this process.
    #[error("region {region_index} is not mapped into this process as a whole")]
    NoAddress {
        /// The region.
        region_index: u32,
    },
    /// The kernel refused the advice.
    #[error("{advice} was refused for region {region_index}: {cause}")]
    Advice {
        /// The region.
        region_index: u32,
        /// The kernel's name of the advice.
        advice: &'static str,
        /// The kernel's reason.
        cause: io::Error,
    },
    /// The range does not lie inside a region.
    #[error(transparent)]
    Span(#[from] SpanError),
}

/// Advice to the kernel that never changes what the memory holds.
#[derive(Clone, Copy)]
pub(super) enum Advice {
    /// Back it with writable pages now.
    PopulateWrite,
    /// Back it with huge pages when it is backed.
    Huge,
}

/// Huge pages of 2 MiB: x86-64, and aarch64 with pages of 4 KiB. Elsewhere the alignment is only not needed.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// A mapping of our own, unmapped on drop.
pub(super) struct Mapping {
    /// What `mmap` gave: the region and the slack that aligning it needed.
    whole: NonNull<u8>,
    whole_bytes: usize,
    base: NonNull<u8>,
}

// SAFETY: a mapping belongs to the process, not to a thread; this value is only its address and unmaps it once.
unsafe impl Send for Mapping {}
// SAFETY: a shared Mapping can only be asked for its address.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `bytes` bytes aligned for huge pages.
    pub(super) fn anonymous(region_index: u32, bytes: u64) -> Result<Self, MapError> {
        let size = || MapError::Size {
            region_index,
            bytes,
        };
        let len = usize::try_from(bytes)
            .ok()
            .filter(|&len| len > 0)
            .ok_or_else(size)?;
        let whole_bytes = len.checked_add(HUGE_PAGE_BYTES).ok_or_else(size)?;
        // SAFETY: a new private mapping at an address of the kernel's choice touches no memory that exists.
        let whole = unsafe {
            libc::mmap(
                ptr::null_mut(),
                whole_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        let failed = || MapError::Map {
            region_index,
            bytes,
            cause: io::Error::last_os_error(),
        };
        if whole == libc::MAP_FAILED {
            return Err(failed());
        }
        let whole = NonNull::new(whole.cast::<u8>()).ok_or_else(failed)?;
        let skip = whole.as_ptr().align_offset(HUGE_PAGE_BYTES);
        // SAFETY: skip < HUGE_PAGE_BYTES, so skip + len stays inside the mapping of len + HUGE_PAGE_BYTES.
        let base = unsafe { whole.add(skip) };
        Ok(Self {
            whole,
            whole_bytes,
            base,
        })
    }

    /// Maps a part of a file, shared.
    pub(super) fn of_file(region_index: u32, region: &FileRegion<'_>) -> Result<Self, MapError> {
        let bytes = region.layout.bytes;
        let size = || MapError::Size {
            region_index,
            bytes,
        };
        let failed = |cause| MapError::Map {
            region_index,
            bytes,
            cause,
        };
        let len = usize::try_from(bytes)
            .ok()
            .filter(|&len| len > 0)
            .ok_or_else(size)?;
        let end = region.offset.checked_add(bytes).ok_or_else(size)?;
        let offset = libc::off_t::try_from(region.offset).map_err(|_| size())?;
        let file = region.file.try_clone_to_owned().map(File::from);
        let file_bytes = file.and_then(|file| file.metadata()).map_err(failed)?.len();
        if end > file_bytes {
            return Err(MapError::File {
                region_index,
                offset: region.offset,
                end,
                file_bytes,
            });
        }
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that exists, and the descriptor is borrowed.
        let whole = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                region.file.as_raw_fd(),
                offset,
            )
        };
        let error = || failed(io::Error::last_os_error());
        if whole == libc::MAP_FAILED {
            return Err(error());
        }
        let whole = NonNull::new(whole.cast::<u8>()).ok_or_else(error)?;
        Ok(Self {
            whole,
            whole_bytes: len,
            base: whole,
        })
    }

    pub(super) fn base(&self) -> NonNull<u8> {
        self.base
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly what `mmap` returned, unmapped once. No span is alive: each borrows the GuestMemory
        // that owns this value.
        let result = unsafe { libc::munmap(self.whole.as_ptr().cast(), self.whole_bytes) };
        debug_assert_eq!(result, 0, "munmap of our own mapping");
    }
}

/// Gives advice about the host pages that `span` touches.
pub(super) fn advise(region_index: u32, span: Span<'_>, advice: Advice) -> Result<(), MapError> {
    if span.is_empty() {
        return Ok(());
    }
    let (number, name) = match advice {
        Advice::PopulateWrite => (libc::MADV_POPULATE_WRITE, "MADV_POPULATE_WRITE"),
        Advice::Huge => (libc::MADV_HUGEPAGE, "MADV_HUGEPAGE"),
    };
    let before = span.as_ptr() as usize % host_page_bytes();
    let start = span.as_ptr().wrapping_sub(before);
    loop {
        // SAFETY: neither advice changes contents or mappings, so any address range is harmless: the kernel refuses what is
        // not mapped.
        let result = unsafe { libc::madvise(start.cast(), span.len() + before, number) };
        if result == 0 {
            return Ok(());
        }
        let cause = io::Error::last_os_error();
        if cause.kind() != io::ErrorKind::Interrupted {
            return Err(MapError::Advice {
                region_index,
                advice: name,
                cause,
            });
        }
    }
}

pub(super) fn host_page_bytes() -> usize {
    // SAFETY: sysconf reads a constant of the system.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(bytes).unwrap_or(4096)
}
