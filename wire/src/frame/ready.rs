//! READY: memory, devices and all data channels are prepared; the rounds may begin.
//!
//! ```text
//!        0               4               8              12              16
//!       +---------------+---------------+-------------------------------+
//!     0 | lanes         | reserved      | prepare_us                    |
//!       +---------------+---------------+-------------------------------+
//! ```

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::table::Fixed;
use crate::codec;
use crate::error::Malformed;
use crate::header::Header;
use crate::kind::Kind;
use crate::limits::LANES_MAX;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Raw {
    lanes: U32,
    reserved: U32,
    prepare_us: U64,
}

const _: () = assert!(size_of::<Raw>() == 16);

/// The destination is prepared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready {
    /// Data channels that have joined.
    pub lanes: u32,
    /// Microseconds from the end of the set-up to this frame.
    pub prepare_us: u64,
}

impl Fixed for Ready {
    type Raw = Raw;
    const KIND: Kind = Kind::Ready;

    // SPEC: READY-1
    fn from_raw(raw: &Raw, _: &Header) -> Result<Self, Malformed> {
        codec::count("ready.lanes", raw.lanes.get(), 1, LANES_MAX)?;
        codec::reserved("ready.reserved", u64::from(raw.reserved.get()))?;

        Ok(Self {
            lanes: raw.lanes.get(),
            prepare_us: raw.prepare_us.get(),
        })
    }

    fn to_raw(&self) -> Raw {
        Raw {
            lanes: U32::new(self.lanes),
            reserved: U32::ZERO,
            prepare_us: U64::new(self.prepare_us),
        }
    }
}
