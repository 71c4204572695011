//! GIVE_BACK: pages of one frame that did not land and have to be sent again.
//!
//! ```text
//!        0               4               8                              16
//!       +---------------+---------------+-------------------------------+
//!     0 | lane          | incarnation   | sequence                      |
//!       +---------------+---------------+-------------------------------+
//!    16 | count         | reason        | runs, 16 octets each ...      |
//!       +---------------+---------------+-------------------------------+
//! ```

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::run::{self, RawRun};
use super::table::{self, Table};
use crate::codec;
use crate::error::{Malformed, Misuse};
use crate::header::Header;
use crate::id::{Incarnation, LaneId, Sequence};
use crate::kind::Kind;
use crate::limits::{PAGES_PER_FRAME_MAX, RUNS_PER_GIVE_BACK_MAX};

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    lane: U32,
    incarnation: U32,
    sequence: U64,
    count: U32,
    reason: U32,
}

const _: () = assert!(size_of::<Raw>() == 24);

/// Why pages are given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GiveBackReason {
    /// The page's octets do not have the checksum in the table (code 1).
    Checksum,
}

impl GiveBackReason {
    /// The reason that a code stands for.
    #[must_use]
    pub const fn from_u32(code: u32) -> Option<Self> {
        match code {
            1 => Some(Self::Checksum),
            _ => None,
        }
    }

    /// The code on the wire.
    #[must_use]
    pub const fn as_u32(self) -> u32 {
        match self {
            Self::Checksum => 1,
        }
    }
}

/// Pages of one frame that did not land.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GiveBack<'a> {
    /// The lane that carried the frame.
    pub lane: LaneId,
    /// The lane's incarnation.
    pub incarnation: Incarnation,
    /// The frame's sequence.
    pub sequence: Sequence,
    /// Why.
    pub reason: GiveBackReason,
    /// 1 to [`RUNS_PER_GIVE_BACK_MAX`] runs, all of them of that frame.
    pub runs: &'a [RawRun],
}

impl<'a> Table<'a> for GiveBack<'a> {
    // SPEC: BACK-3
    fn read(_: &Header, table: &'a [u8]) -> Result<Self, Malformed> {
        let (raw, rest) = codec::prefix::<Raw>(Kind::GiveBack, table)?;
        let runs = codec::entries("give_back.count", rest, raw.count.get())?;
        let reason = raw.reason.get();
        let pages = run::pages_of("give_back.run", runs)?;
        codec::between(
            "give_back.pages",
            pages,
            1,
            codec::wide(PAGES_PER_FRAME_MAX),
        )?;
        Ok(Self {
            lane: codec::lane("give_back.lane", raw.lane.get())?,
            incarnation: Incarnation::new(raw.incarnation.get()),
            sequence: Sequence::new(raw.sequence.get()),
            reason: GiveBackReason::from_u32(reason).ok_or(Malformed::Value {
                field: "give_back.reason",
                value: u64::from(reason),
            })?,
            runs,
        })
    }

    fn bytes(&self) -> usize {
        size_of::<Raw>().saturating_add(size_of_val(self.runs))
    }

    fn write(&self, out: &mut Vec<u8>) -> Result<(), Misuse> {
        let count = table::count(Kind::GiveBack, self.runs.len(), RUNS_PER_GIVE_BACK_MAX)?;
        let raw = Raw {
            lane: U32::new(self.lane.value()),
            incarnation: U32::new(self.incarnation.value()),
            sequence: U64::new(self.sequence.value()),
            count: U32::new(count),
            reason: U32::new(self.reason.as_u32()),
        };
        out.extend_from_slice(raw.as_bytes());
        out.extend_from_slice(self.runs.as_bytes());
        Ok(())
    }
}
