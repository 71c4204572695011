//! ZEROS: runs of pages that are all zero; there is no body.
//!
//! ```text
//!        0               4               8                              16
//!       +---------------+---------------+-------------------------------+
//!     0 | round         | run_count     | page_count                    |
//!       +---------------+---------------+-------------------------------+
//!    16 | runs, 16 octets each ...                                      |
//!       +---------------------------------------------------------------+
//! ```

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::run::{self, RawRun};
use super::table::{self, Table};
use crate::codec;
use crate::error::{Malformed, Misuse};
use crate::header::Header;
use crate::id::Round;
use crate::kind::Kind;
use crate::limits::{MEMORY_PAGES_MAX, RUNS_PER_ZEROS_MAX};

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    round: U32,
    run_count: U32,
    page_count: U64,
}

const _: () = assert!(size_of::<Raw>() == 16);

/// Runs of pages that are all zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zeros<'a> {
    /// The round that took the pages.
    pub round: Round,
    /// 1 to [`RUNS_PER_ZEROS_MAX`] runs.
    pub runs: &'a [RawRun],
}

impl Zeros<'_> {
    /// The pages in all runs together.
    #[must_use]
    pub fn page_count(&self) -> u64 {
        let counts = self.runs.iter().map(|run| u64::from(run.count.get()));
        counts.fold(0, u64::saturating_add)
    }
}

impl<'a> Table<'a> for Zeros<'a> {
    // SPEC: ZEROS-1, ZEROS-2, LIMIT-15
    fn read(_: &Header, table: &'a [u8]) -> Result<Self, Malformed> {
        let (raw, rest) = codec::prefix::<Raw>(Kind::Zeros, table)?;
        codec::count(
            "zeros.run_count",
            raw.run_count.get(),
            1,
            RUNS_PER_ZEROS_MAX,
        )?;
        let round = codec::round("zeros.round", raw.round.get())?;
        let runs = codec::entries("zeros.run_count", rest, raw.run_count.get())?;
        let declared = raw.page_count.get();
        let found = run::pages_of("zeros.run", runs)?;
        if found != declared {
            return Err(Malformed::Count {
                field: "zeros.page_count",
                declared,
                found,
            });
        }
        codec::between("zeros.page_count", declared, 1, MEMORY_PAGES_MAX)?;
        Ok(Self { round, runs })
    }

    fn bytes(&self) -> usize {
        size_of::<Raw>().saturating_add(size_of_val(self.runs))
    }

    fn write(&self, out: &mut Vec<u8>) -> Result<(), Misuse> {
        let run_count = table::count(Kind::Zeros, self.runs.len(), RUNS_PER_ZEROS_MAX)?;
        let raw = Raw {
            round: U32::new(self.round.value()),
            run_count: U32::new(run_count),
            page_count: U64::new(self.page_count()),
        };
        out.extend_from_slice(raw.as_bytes());
        out.extend_from_slice(self.runs.as_bytes());
        Ok(())
    }
}
