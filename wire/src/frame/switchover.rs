//! SWITCHOVER: the guest at the source is paused, and a round begins that may be the last.
//!
//! ```text
//!        0               4               8              12              16
//!       +---------------+---------------+-------------------------------+
//!     0 | final_round   | reserved      | reserved                      |
//!       +---------------+---------------+-------------------------------+
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
    final_round: U32,
    reserved_a: U32,
    reserved_b: U64,
}

const _: () = assert!(size_of::<Raw>() == 16);

/// The guest is paused; what is left follows in this round. Sent once for each round with the guest paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Switchover {
    /// The round that begins now.
    pub final_round: Round,
}

impl Fixed for Switchover {
    type Raw = Raw;
    const KIND: Kind = Kind::Switchover;

    // SPEC: SWITCH-1
    fn from_raw(raw: &Raw, _: &Header) -> Result<Self, Malformed> {
        codec::reserved("switchover.reserved", u64::from(raw.reserved_a.get()))?;
        codec::reserved("switchover.reserved", raw.reserved_b.get())?;

        Ok(Self {
            final_round: codec::round("switchover.final_round", raw.final_round.get())?,
        })
    }

    fn to_raw(&self) -> Raw {
        Raw {
            final_round: U32::new(self.final_round.value()),
            reserved_a: U32::ZERO,
            reserved_b: U64::ZERO,
        }
    }
}
