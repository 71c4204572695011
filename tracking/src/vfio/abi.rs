//! The requests and structures of `linux/vfio.h` and `linux/iommufd.h` that this module needs, as bytes.
//!
//! `vfio-bindings` and `iommufd-bindings` are generated from those headers and give the numbers. Their structures hold
//! pointers and flexible arrays and cannot be turned into bytes safely, so the ones that are passed to the kernel are
//! written down here; size and places are compared with the bindings' at compile time.

use std::mem::offset_of;

use iommufd_bindings as iommufd;
use vfio_bindings::bindings::vfio;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::kernel::{Request, io_none};

/// `_IO(VFIO_TYPE, VFIO_BASE + index)`.
const fn vfio_request(index: u32, name: &'static str) -> Request {
    Request::new(
        io_none(vfio::VFIO_TYPE, (vfio::VFIO_BASE + index) as u8),
        name,
    )
}

/// `_IO(IOMMUFD_TYPE, command)`.
const fn iommufd_request(command: u32, name: &'static str) -> Request {
    Request::new(io_none(iommufd::IOMMUFD_TYPE, command as u8), name)
}

pub(crate) const DEVICE_RESET: Request = vfio_request(11, "VFIO_DEVICE_RESET");
pub(crate) const IOMMU_GET_INFO: Request = vfio_request(12, "VFIO_IOMMU_GET_INFO");
pub(crate) const IOMMU_UNMAP_DMA: Request = vfio_request(14, "VFIO_IOMMU_UNMAP_DMA");
pub(crate) const DIRTY_PAGES_START: Request = vfio_request(17, "VFIO_IOMMU_DIRTY_PAGES start");
pub(crate) const DIRTY_PAGES_STOP: Request = vfio_request(17, "VFIO_IOMMU_DIRTY_PAGES stop");
pub(crate) const DIRTY_PAGES_GET: Request = vfio_request(17, "VFIO_IOMMU_DIRTY_PAGES get bitmap");
pub(crate) const PRECOPY_INFO: Request = vfio_request(21, "VFIO_MIG_GET_PRECOPY_INFO");

/// `VFIO_DEVICE_FEATURE` has the same number as `VFIO_IOMMU_DIRTY_PAGES`: the object decides. A name for each feature
/// tells them apart in errors and in tests.
const fn feature_request(name: &'static str) -> Request {
    vfio_request(17, name)
}

pub(crate) const FEATURE_PROBE: Request = feature_request("VFIO_DEVICE_FEATURE probe");
pub(crate) const FEATURE_MIGRATION: Request = feature_request("VFIO_DEVICE_FEATURE_MIGRATION");
pub(crate) const FEATURE_STATE_GET: Request =
    feature_request("VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE get");
pub(crate) const FEATURE_STATE_SET: Request =
    feature_request("VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE set");
pub(crate) const FEATURE_DATA_SIZE: Request = feature_request("VFIO_DEVICE_FEATURE_MIG_DATA_SIZE");
pub(crate) const FEATURE_PRECOPY_V2: Request =
    feature_request("VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2");
pub(crate) const FEATURE_LOG_START: Request =
    feature_request("VFIO_DEVICE_FEATURE_DMA_LOGGING_START");
pub(crate) const FEATURE_LOG_STOP: Request =
    feature_request("VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP");
pub(crate) const FEATURE_LOG_REPORT: Request =
    feature_request("VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT");

pub(crate) const HWPT_SET_DIRTY_TRACKING: Request = iommufd_request(
    iommufd::IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING,
    "IOMMU_HWPT_SET_DIRTY_TRACKING",
);
pub(crate) const HWPT_GET_DIRTY_BITMAP: Request = iommufd_request(
    iommufd::IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP,
    "IOMMU_HWPT_GET_DIRTY_BITMAP",
);
pub(crate) const IOAS_UNMAP: Request =
    iommufd_request(iommufd::IOMMUFD_CMD_IOAS_UNMAP, "IOMMU_IOAS_UNMAP");
pub(crate) const GET_HW_INFO: Request =
    iommufd_request(iommufd::IOMMUFD_CMD_GET_HW_INFO, "IOMMU_GET_HW_INFO");

pub(crate) use vfio::{
    VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT as LOGGING_REPORT,
    VFIO_DEVICE_FEATURE_DMA_LOGGING_START as LOGGING_START,
    VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP as LOGGING_STOP, VFIO_DEVICE_FEATURE_GET as GET,
    VFIO_DEVICE_FEATURE_MIG_DATA_SIZE as MIG_DATA_SIZE,
    VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE as MIG_DEVICE_STATE,
    VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 as MIG_PRECOPY_INFO_V2,
    VFIO_DEVICE_FEATURE_MIGRATION as MIGRATION, VFIO_DEVICE_FEATURE_PROBE as PROBE,
    VFIO_DEVICE_FEATURE_SET as SET, VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP as UNMAP_GET_BITMAP,
    VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP as DIRTY_GET,
    VFIO_IOMMU_DIRTY_PAGES_FLAG_START as DIRTY_START,
    VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP as DIRTY_STOP, VFIO_IOMMU_INFO_CAPS as INFO_CAPS,
    VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION as INFO_CAP_MIGRATION, VFIO_MIGRATION_P2P as MIGRATION_P2P,
    VFIO_MIGRATION_PRE_COPY as MIGRATION_PRE_COPY, VFIO_MIGRATION_STOP_COPY as MIGRATION_STOP_COPY,
    VFIO_PRECOPY_INFO_REINIT as PRECOPY_REINIT,
};

/// `IOMMU_HWPT_DIRTY_TRACKING_ENABLE`.
pub(crate) const TRACKING_ENABLE: u32 =
    iommufd::iommufd_hwpt_set_dirty_tracking_flags_IOMMU_HWPT_DIRTY_TRACKING_ENABLE;
/// `IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR`.
pub(crate) const BITMAP_NO_CLEAR: u32 =
    iommufd::iommufd_hwpt_get_dirty_bitmap_flags_IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR;
/// `IOMMU_HW_CAP_DIRTY_TRACKING`.
pub(crate) const HW_CAP_DIRTY_TRACKING: u64 =
    iommufd::iommufd_hw_capabilities_IOMMU_HW_CAP_DIRTY_TRACKING as u64;

/// A structure that is passed to the kernel: plain integers without padding.
macro_rules! octets {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $kind:ty),+ $(,)? } = $size:expr) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, IntoBytes, FromBytes, Immutable, KnownLayout)]
        pub(crate) struct $name { $(pub(crate) $field: $kind),+ }
        const _: () = assert!(size_of::<$name>() == $size);
    };
}

octets! {
    /// `struct vfio_device_feature` without its data.
    Feature { argsz: u32, flags: u32 } = size_of::<vfio::vfio_device_feature>()
}
octets! {
    /// `struct vfio_device_feature` with `vfio_device_feature_migration` or `vfio_device_feature_mig_data_size`.
    FeatureNumber { argsz: u32, flags: u32, number: u64 }
        = size_of::<Feature>() + size_of::<vfio::vfio_device_feature_migration>()
}
const _: () = assert!(size_of::<vfio::vfio_device_feature_mig_data_size>() == 8);
octets! {
    /// `struct vfio_device_feature` with `vfio_device_feature_mig_state`.
    FeatureState { argsz: u32, flags: u32, device_state: u32, data_fd: i32 }
        = size_of::<Feature>() + size_of::<vfio::vfio_device_feature_mig_state>()
}
octets! {
    /// `struct vfio_device_feature` with `vfio_device_feature_dma_logging_control`.
    FeatureLogStart { argsz: u32, flags: u32, page_size: u64, num_ranges: u32, reserved: u32, ranges: u64 }
        = size_of::<Feature>() + size_of::<vfio::vfio_device_feature_dma_logging_control>()
}
/// Where the address of the ranges stands.
pub(crate) const LOG_START_RANGES_AT: usize = offset_of!(FeatureLogStart, ranges);
const _: () = assert!(
    LOG_START_RANGES_AT
        == size_of::<Feature>() + offset_of!(vfio::vfio_device_feature_dma_logging_control, ranges)
);
/// Words of one `struct vfio_device_feature_dma_logging_range`: IOVA and length.
pub(crate) const LOG_RANGE_WORDS: usize = 2;
const _: () = assert!(
    size_of::<vfio::vfio_device_feature_dma_logging_range>() == LOG_RANGE_WORDS * 8
        && offset_of!(vfio::vfio_device_feature_dma_logging_range, iova) == 0
);
octets! {
    /// `struct vfio_device_feature` with `vfio_device_feature_dma_logging_report`.
    FeatureLogReport { argsz: u32, flags: u32, iova: u64, length: u64, page_size: u64, bitmap: u64 }
        = size_of::<Feature>() + size_of::<vfio::vfio_device_feature_dma_logging_report>()
}
/// Where the address of the bitmap stands.
pub(crate) const LOG_REPORT_BITMAP_AT: usize = offset_of!(FeatureLogReport, bitmap);
const _: () = assert!(
    LOG_REPORT_BITMAP_AT
        == size_of::<Feature>() + offset_of!(vfio::vfio_device_feature_dma_logging_report, bitmap)
);
octets! {
    /// `struct vfio_precopy_info`.
    PrecopyInfoArg { argsz: u32, flags: u32, initial_bytes: u64, dirty_bytes: u64 }
        = size_of::<vfio::vfio_precopy_info>()
}
octets! {
    /// `struct vfio_iommu_type1_dirty_bitmap` alone, for start and stop.
    DirtyPages { argsz: u32, flags: u32 } = size_of::<vfio::vfio_iommu_type1_dirty_bitmap>()
}
octets! {
    /// `struct vfio_iommu_type1_dirty_bitmap` with `vfio_iommu_type1_dirty_bitmap_get` and its `vfio_bitmap`.
    DirtyPagesGet { argsz: u32, flags: u32, iova: u64, size: u64, bitmap_pgsize: u64, bitmap_size: u64, bitmap_data: u64 }
        = size_of::<DirtyPages>() + size_of::<vfio::vfio_iommu_type1_dirty_bitmap_get>()
}
/// Where the address of the bitmap stands.
pub(crate) const DIRTY_PAGES_BITMAP_AT: usize = offset_of!(DirtyPagesGet, bitmap_data);
const _: () = assert!(
    DIRTY_PAGES_BITMAP_AT
        == size_of::<DirtyPages>()
            + offset_of!(vfio::vfio_iommu_type1_dirty_bitmap_get, bitmap)
            + offset_of!(vfio::vfio_bitmap, data)
);
octets! {
    /// `struct vfio_iommu_type1_dma_unmap` without a bitmap.
    UnmapDma { argsz: u32, flags: u32, iova: u64, size: u64 }
        = size_of::<vfio::vfio_iommu_type1_dma_unmap>()
}
octets! {
    /// `struct vfio_iommu_type1_dma_unmap` with its `vfio_bitmap`.
    UnmapDmaBitmap { argsz: u32, flags: u32, iova: u64, size: u64, bitmap_pgsize: u64, bitmap_size: u64, bitmap_data: u64 }
        = size_of::<UnmapDma>() + size_of::<vfio::vfio_bitmap>()
}
/// Where the address of the bitmap stands.
pub(crate) const UNMAP_BITMAP_AT: usize = offset_of!(UnmapDmaBitmap, bitmap_data);
octets! {
    /// The front of `struct vfio_iommu_type1_info`; newer headers have a padding word at its end.
    Type1Info { argsz: u32, flags: u32, iova_pgsizes: u64, cap_offset: u32, pad: u32 } = 24
}
const _: () = assert!(
    offset_of!(Type1Info, cap_offset) == offset_of!(vfio::vfio_iommu_type1_info, cap_offset)
);
octets! {
    /// `struct vfio_iommu_type1_info_cap_migration`, the header (id, version, next) and the padding included.
    Type1CapMigration { id: u16, version: u16, next: u32, flags: u32, pad: u32, pgsize_bitmap: u64, max_dirty_bitmap_size: u64 }
        = size_of::<vfio::vfio_iommu_type1_info_cap_migration>()
}
const _: () = assert!(
    offset_of!(Type1CapMigration, pgsize_bitmap)
        == offset_of!(vfio::vfio_iommu_type1_info_cap_migration, pgsize_bitmap)
);
octets! {
    /// `struct iommu_hwpt_set_dirty_tracking`.
    SetDirtyTracking { size: u32, flags: u32, hwpt_id: u32, reserved: u32 }
        = size_of::<iommufd::iommu_hwpt_set_dirty_tracking>()
}
octets! {
    /// `struct iommu_hwpt_get_dirty_bitmap`.
    GetDirtyBitmap { size: u32, hwpt_id: u32, flags: u32, reserved: u32, iova: u64, length: u64, page_size: u64, data: u64 }
        = size_of::<iommufd::iommu_hwpt_get_dirty_bitmap>()
}
/// Where the address of the bitmap stands.
pub(crate) const GET_DIRTY_BITMAP_AT: usize = offset_of!(GetDirtyBitmap, data);
const _: () = assert!(
    GET_DIRTY_BITMAP_AT == offset_of!(iommufd::iommu_hwpt_get_dirty_bitmap, data)
        && offset_of!(GetDirtyBitmap, hwpt_id)
            == offset_of!(iommufd::iommu_hwpt_get_dirty_bitmap, hwpt_id)
);
octets! {
    /// `struct iommu_ioas_unmap`.
    IoasUnmap { size: u32, ioas_id: u32, iova: u64, length: u64 }
        = size_of::<iommufd::iommu_ioas_unmap>()
}
octets! {
    /// `struct iommu_hw_info` as Linux 6.7 and later take it.
    HwInfo { size: u32, flags: u32, dev_id: u32, data_len: u32, data_uptr: u64, out_data_type: u32, reserved: u32, out_capabilities: u64 }
        = 40
}
const _: () = assert!(
    offset_of!(HwInfo, out_capabilities) == offset_of!(iommufd::iommu_hw_info, out_capabilities)
);
