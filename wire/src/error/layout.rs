//! A list of regions, from the peer or from our own side, that does not describe memory.

use crate::code::Reason;

/// Why a list of regions is not a guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// No region, or more than [`REGIONS_MAX`](crate::limits::REGIONS_MAX).
    #[error("{count} regions are not between 1 and {}", crate::limits::REGIONS_MAX)]
    Regions {
        /// How many there are, as far as they were counted.
        count: usize,
    },
    /// Region numbers do not count up from 0.
    #[error("region {found} stands where region {expected} belongs")]
    Order {
        /// The number that belongs here.
        expected: u32,
        /// The number that was found.
        found: u32,
    },
    /// A region's address or size is not a multiple of the page size, or its size is 0.
    #[error("region {region} is empty or not aligned to pages")]
    Alignment {
        /// The region.
        region: u32,
    },
    /// A region reaches past the end of the address space.
    #[error("region {region} wraps around the end of the address space")]
    Wraps {
        /// The region.
        region: u32,
    },
    /// Two regions share addresses.
    #[error("region {region} overlaps another region")]
    Overlap {
        /// The region with the higher address.
        region: u32,
    },
    /// More pages than [`MEMORY_PAGES_MAX`](crate::limits::MEMORY_PAGES_MAX).
    #[error("more than {} pages of memory", crate::limits::MEMORY_PAGES_MAX)]
    Pages,
}

impl LayoutError {
    /// A stable name for logs, reports and test vectors.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Regions { .. } => "wire.layout.regions",
            Self::Order { .. } => "wire.layout.order",
            Self::Alignment { .. } => "wire.layout.alignment",
            Self::Wraps { .. } => "wire.layout.wraps",
            Self::Overlap { .. } => "wire.layout.overlap",
            Self::Pages => "wire.layout.pages",
        }
    }

    /// What the peer is told.
    #[must_use]
    pub const fn reason(&self) -> Reason {
        match self {
            Self::Pages => Reason::ResourceLimit,
            _ => Reason::Malformed,
        }
    }
}
