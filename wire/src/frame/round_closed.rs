//! ROUND_CLOSED: every lane has ended a round and all that it carried was handled.
//!
//! ```text
//!        0               4               8              12              16
//!       +---------------+---------------+-------------------------------+
//!     0 | round         | reserved      | pages                         |
//!       +---------------+---------------+-------------------------------+
//!    16 | zero_pages                    | digest                        |
//!       +-------------------------------+-------------------------------+
//!    32 | elapsed_us                    | damaged_pages                 |
//!       +-------------------------------+-------------------------------+
//! ```

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::table::Fixed;
use crate::codec;
use crate::digest::Digest;
use crate::error::Malformed;
use crate::header::Header;
use crate::id::Round;
use crate::kind::Kind;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Raw {
    round: U32,
    reserved_a: U32,
    pages: U64,
    zero_pages: U64,
    digest: U64,
    elapsed_us: U64,
    damaged_pages: U64,
}

const _: () = assert!(size_of::<Raw>() == 48);

/// A round is over at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundClosed {
    /// The round.
    pub round: Round,
    /// Pages with content that landed since the round before was closed.
    pub pages: u64,
    /// Zero pages since then.
    pub zero_pages: u64,
    /// The destination's digest of memory at this moment.
    pub digest: Digest,
    /// Microseconds from the round's first frame to this one.
    pub elapsed_us: u64,
    /// Pages whose newest arrival failed its checksum and that have not landed well since: the source owes them.
    pub damaged_pages: u64,
}

impl Fixed for RoundClosed {
    type Raw = Raw;
    const KIND: Kind = Kind::RoundClosed;

    // SPEC: CLOSED-1
    fn from_raw(raw: &Raw, _: &Header) -> Result<Self, Malformed> {
        codec::reserved("round_closed.reserved", u64::from(raw.reserved_a.get()))?;
        codec::pages("round_closed.pages", raw.pages.get())?;
        codec::pages("round_closed.zero_pages", raw.zero_pages.get())?;
        codec::pages("round_closed.damaged_pages", raw.damaged_pages.get())?;
        Ok(Self {
            round: codec::round("round_closed.round", raw.round.get())?,
            pages: raw.pages.get(),
            zero_pages: raw.zero_pages.get(),
            digest: Digest::new(raw.digest.get()),
            elapsed_us: raw.elapsed_us.get(),
            damaged_pages: raw.damaged_pages.get(),
        })
    }

    fn to_raw(&self) -> Raw {
        Raw {
            round: U32::new(self.round.value()),
            reserved_a: U32::ZERO,
            pages: U64::new(self.pages),
            zero_pages: U64::new(self.zero_pages),
            digest: U64::new(self.digest.value()),
            elapsed_us: U64::new(self.elapsed_us),
            damaged_pages: U64::new(self.damaged_pages),
        }
    }
}
