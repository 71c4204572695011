//! The run entry that PAGES, ZEROS and GIVE_BACK share.
//!
//! ```text
//!        0               4               8                              16
//!       +---------------+---------------+-------------------------------+
//!       | region        | count         | first page                    |
//!       +---------------+---------------+-------------------------------+
//! ```
//!
//! A raw run says nothing about the receiver's memory: only [`Layout::admit`](crate::Layout::admit) makes it a
//! [`PageRun`].

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::codec;
use crate::error::Malformed;
use crate::layout::PageRun;
use crate::limits::{MEMORY_PAGES_MAX, REGIONS_MAX};

/// The octets of a run. Source: SPEC, section "Runs".
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RawRun {
    /// The region's number.
    pub region: U32,
    /// Pages in the run, at least 1.
    pub count: U32,
    /// The first page, counted from the region's start.
    pub first: U64,
}

const _: () = assert!(size_of::<RawRun>() == 16);

impl From<PageRun> for RawRun {
    fn from(run: PageRun) -> Self {
        Self {
            region: U32::new(run.region().value()),
            count: U32::new(run.count()),
            first: U64::new(run.first().value()),
        }
    }
}

/// Refuses runs that no layout could admit and gives the number of pages in all of them.
///
/// The sum cannot wrap: a frame has at most 2048 runs of less than 2^32 pages.
// SPEC: RUN-2, RUN-4
pub(super) fn pages_of(field: &'static str, runs: &[RawRun]) -> Result<u64, Malformed> {
    let mut pages = 0_u64;
    for run in runs {
        codec::between(
            field,
            u64::from(run.region.get()),
            0,
            codec::wide(REGIONS_MAX).saturating_sub(1),
        )?;
        codec::between(field, u64::from(run.count.get()), 1, u64::from(u32::MAX))?;
        codec::between(
            field,
            run.first.get(),
            0,
            MEMORY_PAGES_MAX.saturating_sub(1),
        )?;
        pages = pages.saturating_add(u64::from(run.count.get()));
    }
    Ok(pages)
}
