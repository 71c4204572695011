//! PAGES: runs of pages with their content. The hot path.
//!
//! ```text
//!        0               4               8              12              16
//!       +---------------+---------------+---------------+---------------+
//!     0 | round         | run_count     | page_count    | reserved      |
//!       +---------------+---------------+---------------+---------------+
//!    16 | runs, 16 octets each ...                                      |
//!       +---------------+---------------+---------------+---------------+
//!       | checksums, one CRC-32 per page, in the order of the runs ...  |
//!       +---------------------------------------------------------------+
//!  body | the pages, 4096 octets each, in the order of the runs         |
//!       +---------------------------------------------------------------+
//! ```
//!
//! The checksums are per page so that a page that was torn by the running guest, or damaged, is named and only that
//! page goes back. The receiver must never take a page whose checksum differs as landed.

use zerocopy::byteorder::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::run::{self, RawRun};
use super::table::{self, Table};
use crate::PAGE_BYTES;
use crate::codec;
use crate::error::{Malformed, Misuse};
use crate::header::Header;
use crate::id::Round;
use crate::kind::Kind;
use crate::limits::{PAGES_PER_FRAME_MAX, RUNS_PER_PAGES_MAX};

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    round: U32,
    run_count: U32,
    page_count: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<Raw>() == 16);

/// Runs of pages whose content is the body.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pages<'a> {
    /// The round that took the pages.
    pub round: Round,
    /// 1 to [`RUNS_PER_PAGES_MAX`] runs.
    pub runs: &'a [RawRun],
    /// The CRC-32 of each page, in the order of the runs; 1 to [`PAGES_PER_FRAME_MAX`].
    pub checksums: &'a [U32],
}

impl<'a> Table<'a> for Pages<'a> {
    // SPEC: PAGES-2, PAGES-3, PAGES-4
    fn read(header: &Header, table: &'a [u8]) -> Result<Self, Malformed> {
        let (raw, rest) = codec::prefix::<Raw>(Kind::Pages, table)?;
        codec::reserved("pages.reserved", u64::from(raw.reserved.get()))?;
        codec::count(
            "pages.run_count",
            raw.run_count.get(),
            1,
            RUNS_PER_PAGES_MAX,
        )?;
        codec::count(
            "pages.page_count",
            raw.page_count.get(),
            1,
            PAGES_PER_FRAME_MAX,
        )?;
        let (runs, rest) = split_runs(raw.run_count.get(), rest)?;
        let checksums = codec::entries("pages.page_count", rest, raw.page_count.get())?;
        let pages = Self {
            round: codec::round("pages.round", raw.round.get())?,
            runs,
            checksums,
        };
        pages.check(header)?;
        Ok(pages)
    }

    fn bytes(&self) -> usize {
        size_of::<Raw>()
            .saturating_add(size_of_val(self.runs))
            .saturating_add(size_of_val(self.checksums))
    }

    fn write(&self, out: &mut Vec<u8>) -> Result<(), Misuse> {
        let run_count = table::count(Kind::Pages, self.runs.len(), RUNS_PER_PAGES_MAX)?;
        let page_count = table::count(Kind::Pages, self.checksums.len(), PAGES_PER_FRAME_MAX)?;
        let raw = Raw {
            round: U32::new(self.round.value()),
            run_count: U32::new(run_count),
            page_count: U32::new(page_count),
            reserved: U32::ZERO,
        };
        out.extend_from_slice(raw.as_bytes());
        out.extend_from_slice(self.runs.as_bytes());
        out.extend_from_slice(self.checksums.as_bytes());
        Ok(())
    }
}

impl Pages<'_> {
    /// The runs, the checksums and the body speak of the same number of pages.
    // SPEC: PAGES-3
    fn check(&self, header: &Header) -> Result<(), Malformed> {
        let declared = codec::wide(self.checksums.len());
        let found = run::pages_of("pages.run", self.runs)?;
        if found != declared {
            return Err(Malformed::Count {
                field: "pages.page_count",
                declared,
                found,
            });
        }
        let bytes = self.checksums.len().saturating_mul(PAGE_BYTES);
        if header.body_bytes() != bytes {
            return Err(Kind::Pages.body_error(header.body_bytes(), bytes, bytes));
        }
        Ok(())
    }
}

/// The runs and what follows them.
fn split_runs(count: u32, octets: &[u8]) -> Result<(&[RawRun], &[u8]), Malformed> {
    <[RawRun]>::ref_from_prefix_with_elems(octets, codec::size(count)).map_err(|_| {
        Malformed::Count {
            field: "pages.run_count",
            declared: u64::from(count),
            found: codec::wide(octets.len().div_euclid(size_of::<RawRun>())),
        }
    })
}
