//! ROUND_END: a lane carries nothing more of a round.
//!
//! ```text
//!        0               4               8              12              16
//!       +---------------+---------------+-------------------------------+
//!     0 | round         | flags         | pages                         |
//!       +---------------+---------------+-------------------------------+
//!    16 | zero_pages                    | reserved                      |
//!       +-------------------------------+-------------------------------+
//! ```

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::table::Fixed;
use crate::codec;
use crate::error::Malformed;
use crate::header::Header;
use crate::id::Round;
use crate::kind::Kind;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Raw {
    round: U32,
    flags: U32,
    pages: U64,
    zero_pages: U64,
    reserved: U64,
}

const _: () = assert!(size_of::<Raw>() == 32);

/// The end of a round on one lane, and what the lane carried in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundEnd {
    /// The round that ends.
    pub round: Round,
    /// Whether the guest is paused in this round.
    pub final_round: bool,
    /// Pages in the PAGES frames of this lane's incarnation in this round.
    pub pages: u64,
    /// Pages in its ZEROS frames in this round.
    pub zero_pages: u64,
}

impl Fixed for RoundEnd {
    type Raw = Raw;
    const KIND: Kind = Kind::RoundEnd;

    // SPEC: ROUND-3, ROUND-4
    fn from_raw(raw: &Raw, _: &Header) -> Result<Self, Malformed> {
        codec::pages("round_end.pages", raw.pages.get())?;
        codec::pages("round_end.zero_pages", raw.zero_pages.get())?;
        codec::reserved("round_end.reserved", raw.reserved.get())?;

        Ok(Self {
            round: codec::round("round_end.round", raw.round.get())?,
            final_round: final_round(raw.flags.get())?,
            pages: raw.pages.get(),
            zero_pages: raw.zero_pages.get(),
        })
    }

    fn to_raw(&self) -> Raw {
        Raw {
            round: U32::new(self.round.value()),
            flags: U32::new(u32::from(self.final_round)),
            pages: U64::new(self.pages),
            zero_pages: U64::new(self.zero_pages),
            reserved: U64::ZERO,
        }
    }
}

/// Bit 0 of the flags; the others are reserved.
// SPEC: ROUND-4
const fn final_round(flags: u32) -> Result<bool, Malformed> {
    match flags {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Malformed::Reserved {
            field: "round_end.flags",
        }),
    }
}
