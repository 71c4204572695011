//! STREAM_OUTCOME: how the migration that is carried ended at the destination, and the source's word that it knows.
//!
//! ```text
//!        0               4               8              12              16
//!       +---------------+---------------+-------------------------------+
//!     0 | state         | reserved      | reserved                      |
//!       +---------------+---------------+-------------------------------+
//! ```

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::outcome::OutcomeState;
use super::table::Fixed;
use crate::codec;
use crate::error::Malformed;
use crate::header::Header;
use crate::kind::Kind;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Raw {
    state: U32,
    reserved: U32,
    reserved_too: U64,
}

const _: () = assert!(size_of::<Raw>() == 16);

/// How the carried migration ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamOutcome {
    /// What became of the guest at the destination.
    pub state: OutcomeState,
}

impl Fixed for StreamOutcome {
    type Raw = Raw;
    const KIND: Kind = Kind::StreamOutcome;

    // SPEC: CARRY-10
    fn from_raw(raw: &Raw, _: &Header) -> Result<Self, Malformed> {
        codec::reserved("stream_outcome.reserved", u64::from(raw.reserved.get()))?;
        codec::reserved("stream_outcome.reserved", raw.reserved_too.get())?;
        Ok(Self {
            state: OutcomeState::from_u32(raw.state.get()).ok_or(Malformed::Value {
                field: "stream_outcome.state",
                value: u64::from(raw.state.get()),
            })?,
        })
    }

    fn to_raw(&self) -> Raw {
        Raw {
            state: U32::new(self.state.as_u32()),
            reserved: U32::ZERO,
            reserved_too: U64::ZERO,
        }
    }
}
