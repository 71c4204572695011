//! STREAM_OPEN: a machine monitor connected at the source; its connection is carried as a stream.
//!
//! ```text
//!        0               4               8              12              16
//!       +---------------+---------------+-------------------------------+
//!     0 | stream        | reserved      | reserved                      |
//!       +---------------+---------------+-------------------------------+
//! ```

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::table::Fixed;
use crate::codec;
use crate::error::Malformed;
use crate::header::Header;
use crate::id::StreamId;
use crate::kind::Kind;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Raw {
    stream: U32,
    reserved: U32,
    reserved_too: U64,
}

const _: () = assert!(size_of::<Raw>() == 16);

/// A stream begins, and every stream with a lower number has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamOpen {
    /// The number of the connection: the 0-based place in the order in which the source accepted them.
    pub stream: StreamId,
}

impl Fixed for StreamOpen {
    type Raw = Raw;
    const KIND: Kind = Kind::StreamOpen;

    // SPEC: CARRY-4
    fn from_raw(raw: &Raw, _: &Header) -> Result<Self, Malformed> {
        codec::reserved("stream_open.reserved", u64::from(raw.reserved.get()))?;
        codec::reserved("stream_open.reserved", raw.reserved_too.get())?;
        Ok(Self {
            stream: codec::stream("stream_open.stream", raw.stream.get())?,
        })
    }

    fn to_raw(&self) -> Raw {
        Raw {
            stream: U32::new(self.stream.value()),
            reserved: U32::ZERO,
            reserved_too: U64::ZERO,
        }
    }
}
