//! The requests and structures of `linux/userfaultfd.h` and `linux/fs.h` (6.7 and later) that tracking a process needs.
//!
//! Sizes are asserted; the fake kernel holds the numbers against those of the headers.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::kernel::{Request, io_both, io_read};

/// `UFFDIO`.
const UFFDIO: u8 = 0xaa;

pub(crate) const UFFDIO_API: Request =
    Request::new(io_both(UFFDIO, 0x3f, size_of::<Api>()), "UFFDIO_API");
pub(crate) const UFFDIO_REGISTER: Request = Request::new(
    io_both(UFFDIO, 0x00, size_of::<Register>()),
    "UFFDIO_REGISTER",
);
pub(crate) const UFFDIO_UNREGISTER: Request = Request::new(
    io_read(UFFDIO, 0x01, size_of::<AddressRange>()),
    "UFFDIO_UNREGISTER",
);
pub(crate) const PAGEMAP_SCAN: Request = Request::new(
    io_both(b'f', 16, size_of::<ScanArguments>()),
    "PAGEMAP_SCAN",
);

/// `UFFD_API`: the one version of the interface.
pub(crate) const API_VERSION: u64 = 0xaa;
/// `UFFD_FEATURE_WP_HUGETLBFS_SHMEM`: write protection of shared memory too.
pub(crate) const FEATURE_WP_SHARED: u64 = 1 << 12;
/// `UFFD_FEATURE_WP_ASYNC`: the kernel lifts the protection by itself at the first write, and remembers that.
pub(crate) const FEATURE_WP_ASYNC: u64 = 1 << 15;
/// `UFFDIO_REGISTER_MODE_WP`.
pub(crate) const REGISTER_MODE_WP: u64 = 1 << 1;

/// `PM_SCAN_WP_MATCHING`: protect what is reported, in the same step.
pub(crate) const SCAN_WP_MATCHING: u64 = 1 << 0;
/// `PM_SCAN_CHECK_WPASYNC`: fail with `EPERM` where memory is not registered for asynchronous protection.
pub(crate) const SCAN_CHECK_WPASYNC: u64 = 1 << 1;
/// `PAGE_IS_WRITTEN`.
pub(crate) const PAGE_IS_WRITTEN: u64 = 1 << 1;

/// `struct uffdio_api`.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, FromBytes, Immutable, KnownLayout)]
pub(crate) struct Api {
    pub(crate) api: u64,
    pub(crate) features: u64,
    pub(crate) ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, FromBytes, Immutable, KnownLayout)]
pub(crate) struct AddressRange {
    pub(crate) start: u64,
    pub(crate) len: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, FromBytes, Immutable, KnownLayout)]
pub(crate) struct Register {
    pub(crate) range: AddressRange,
    pub(crate) mode: u64,
    pub(crate) ioctls: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, FromBytes, Immutable, KnownLayout)]
pub(crate) struct ScanArguments {
    pub(crate) size: u64,
    pub(crate) flags: u64,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) walk_end: u64,
    pub(crate) vec: u64,
    pub(crate) vec_len: u64,
    pub(crate) max_pages: u64,
    pub(crate) category_inverted: u64,
    pub(crate) category_mask: u64,
    pub(crate) category_anyof_mask: u64,
    pub(crate) return_mask: u64,
}

/// Where the address of the reported pieces stands in [`ScanArguments`].
pub(crate) const SCAN_VEC_AT: usize = 40;

/// Words of one reported piece, `struct page_region`: start, end (the first byte that is not in it), categories.
pub(crate) const PIECE_WORDS: usize = 3;

const _: () = assert!(size_of::<Api>() == 24 && size_of::<Register>() == 32);
const _: () = assert!(size_of::<AddressRange>() == 16 && size_of::<ScanArguments>() == 96);
const _: () = assert!(std::mem::offset_of!(ScanArguments, vec) == SCAN_VEC_AT);
