//! What devices write into guest memory by DMA: a device's own log, a type 1 container, iommufd, or nothing at all.
//!
//! The VMM owns its devices, containers and mappings; this module borrows descriptors and never maps anything. It makes one
//! [`Source`](crate::Source) for each log there is ([`choose`], or [`DmaSource`] by hand):
//!
//! | interface | asked | granularity | header |
//! |---|---|---|---|
//! | `VFIO_DEVICE_FEATURE_DMA_LOGGING_*` | each device | device's choice, reported in 4096 bytes | `linux/vfio.h` |
//! | `VFIO_IOMMU_DIRTY_PAGES` | each container | the IOMMU's smallest page | `linux/vfio.h` |
//! | `IOMMU_HWPT_*_DIRTY_*` | each page table | the IOMMU's | `linux/iommufd.h` |
//! | none | - | everything, or what the driver pins | - |
//!
//! A VMM does this: [`choose`] before the migration; hands the sources to the migration; unmaps through
//! [`DmaSource::unmapper`] while it runs; says [`Stopped::stopped`] when its devices stand still, so that the last bits are
//! read once.
//!
//! The state of devices, the other half of VFIO's migration interface, is in [`MigrationDevice`].

mod abi;
mod choose;
mod feature;
mod iommufd;
mod logging;
mod map;
mod migration;
mod reach;
mod source;
mod tracker;
mod type1;

pub use choose::{Chosen, DmaDevice, DmaGroup, DmaMemory, Translation, choose, choose_with};
pub use logging::RANGES_MAX;
pub use map::{DmaMap, DmaRange};
pub use migration::{
    MigrationDevice, MigrationError, MigrationState, MigrationSupport, PreCopySizes, StreamRead,
};
pub use reach::{Pinned, Reach, Viommu};
pub use source::{
    DmaOptions, DmaSource, PreCopyTracking, RESTARTS_MAX, Stopped, Tracking, Unmapper, Untracked,
};

#[cfg(test)]
mod tests;
