//! The requests and structures of `linux/kvm.h` that dirty tracking needs, as bytes.
//!
//! Sizes are asserted; the fake kernel's tests hold the numbers against the values that the header gives.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::kernel::{Request, io_both, io_none, io_write};

/// `KVMIO`.
const KVMIO: u8 = 0xae;

pub(crate) const CHECK_EXTENSION: Request =
    Request::new(io_none(KVMIO, 0x03), "KVM_CHECK_EXTENSION");
pub(crate) const ENABLE_CAP: Request = Request::new(
    io_write(KVMIO, 0xa3, size_of::<EnableCap>()),
    "KVM_ENABLE_CAP",
);
pub(crate) const GET_DIRTY_LOG: Request = Request::new(
    io_write(KVMIO, 0x42, size_of::<DirtyLog>()),
    "KVM_GET_DIRTY_LOG",
);
pub(crate) const CLEAR_DIRTY_LOG: Request = Request::new(
    io_both(KVMIO, 0xc0, size_of::<ClearDirtyLog>()),
    "KVM_CLEAR_DIRTY_LOG",
);
pub(crate) const RESET_DIRTY_RINGS: Request =
    Request::new(io_none(KVMIO, 0xc7), "KVM_RESET_DIRTY_RINGS");

pub(crate) use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING as CAP_DIRTY_LOG_RING,
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL as CAP_DIRTY_LOG_RING_ACQ_REL,
    KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP as CAP_DIRTY_LOG_RING_WITH_BITMAP,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 as CAP_MANUAL_DIRTY_LOG_PROTECT2,
};

/// Flag of the manual protect capability: `KVM_GET_DIRTY_LOG` only fetches, `KVM_CLEAR_DIRTY_LOG` clears.
pub(crate) const MANUAL_PROTECT_ENABLE: u64 =
    kvm_bindings::KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE as u64;
/// Flag of the manual protect capability: a slot's log starts with every page dirty and nothing protected.
pub(crate) const INITIALLY_SET: u64 = kvm_bindings::KVM_DIRTY_LOG_INITIALLY_SET as u64;

/// The entry was written by the kernel and is to be harvested.
pub(crate) const GFN_DIRTY: u32 = 1;
/// The entry was harvested and is to be reset.
pub(crate) const GFN_RESET: u32 = 2;

/// `struct kvm_enable_cap`.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, FromBytes, Immutable, KnownLayout)]
pub(crate) struct EnableCap {
    pub(crate) cap: u32,
    pub(crate) flags: u32,
    pub(crate) args: [u64; 4],
    pub(crate) pad: [u8; 64],
}

const _: () = assert!(size_of::<EnableCap>() == 104);

impl EnableCap {
    pub(crate) fn new(cap: u32, argument: u64) -> Self {
        Self {
            cap,
            flags: 0,
            args: [argument, 0, 0, 0],
            pad: [0; 64],
        }
    }
}

/// `struct kvm_dirty_log`.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, FromBytes, Immutable, KnownLayout)]
pub(crate) struct DirtyLog {
    pub(crate) slot: u32,
    pub(crate) padding: u32,
    pub(crate) bitmap: u64,
}

const _: () = assert!(size_of::<DirtyLog>() == 16);
/// Where `struct kvm_dirty_log` holds the bitmap's address.
pub(crate) const DIRTY_LOG_BITMAP_AT: usize = std::mem::offset_of!(DirtyLog, bitmap);

/// `struct kvm_clear_dirty_log`.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, FromBytes, Immutable, KnownLayout)]
pub(crate) struct ClearDirtyLog {
    pub(crate) slot: u32,
    pub(crate) num_pages: u32,
    pub(crate) first_page: u64,
    pub(crate) bitmap: u64,
}

const _: () = assert!(size_of::<ClearDirtyLog>() == 24);
/// Where `struct kvm_clear_dirty_log` holds the bitmap's address.
pub(crate) const CLEAR_DIRTY_LOG_BITMAP_AT: usize = std::mem::offset_of!(ClearDirtyLog, bitmap);
