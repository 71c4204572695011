//! STREAM_END: one direction of a carried stream ends, cleanly at an offset or at once.
//!
//! ```text
//!        0               4               8              12              16
//!       +---------------+---------------+-------------------------------+
//!     0 | stream        | how           | offset                        |
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
use crate::limits::STREAM_BYTES_MAX;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Raw {
    stream: U32,
    how: U32,
    offset: U64,
}

const _: () = assert!(size_of::<Raw>() == 16);

/// How a direction of a stream ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StreamEndKind {
    /// The machine monitor ended it, and everything up to the offset belongs to it (code 1).
    Clean,
    /// The connection broke, or is to be broken: nothing more of it matters, in either direction (code 2).
    Reset,
}

impl StreamEndKind {
    /// The end that a code stands for.
    #[must_use]
    pub const fn from_u32(code: u32) -> Option<Self> {
        match code {
            1 => Some(Self::Clean),
            2 => Some(Self::Reset),
            _ => None,
        }
    }

    /// The code on the wire.
    #[must_use]
    pub const fn as_u32(self) -> u32 {
        match self {
            Self::Clean => 1,
            Self::Reset => 2,
        }
    }
}

/// The end of one direction of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamEnd {
    /// The stream.
    pub stream: StreamId,
    /// How it ends.
    pub how: StreamEndKind,
    /// Octets of the stream in this direction.
    pub offset: u64,
}

impl Fixed for StreamEnd {
    type Raw = Raw;
    const KIND: Kind = Kind::StreamEnd;

    // SPEC: CARRY-8
    fn from_raw(raw: &Raw, _: &Header) -> Result<Self, Malformed> {
        codec::between("stream_end.offset", raw.offset.get(), 0, STREAM_BYTES_MAX)?;
        Ok(Self {
            stream: codec::stream("stream_end.stream", raw.stream.get())?,
            how: StreamEndKind::from_u32(raw.how.get()).ok_or(Malformed::Value {
                field: "stream_end.how",
                value: u64::from(raw.how.get()),
            })?,
            offset: raw.offset.get(),
        })
    }

    fn to_raw(&self) -> Raw {
        Raw {
            stream: U32::new(self.stream.value()),
            how: U32::new(self.how.as_u32()),
            offset: U64::new(self.offset),
        }
    }
}
