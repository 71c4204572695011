//! STREAM_DATA: a piece of a carried stream; the body is the piece, and who sends it says in which direction it goes.
//!
//! ```text
//!        0               4               8              12              16
//!       +---------------+---------------+-------------------------------+
//!     0 | stream        | reserved      | offset                        |
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
    reserved: U32,
    offset: U64,
}

const _: () = assert!(size_of::<Raw>() == 16);

/// Where a piece belongs in its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamData {
    /// The stream.
    pub stream: StreamId,
    /// Octets of the stream, in this direction, before this piece.
    pub offset: u64,
}

impl Fixed for StreamData {
    type Raw = Raw;
    const KIND: Kind = Kind::StreamData;

    // SPEC: CARRY-5, LIMIT-19
    fn from_raw(raw: &Raw, header: &Header) -> Result<Self, Malformed> {
        codec::reserved("stream_data.reserved", u64::from(raw.reserved.get()))?;
        let end = raw
            .offset
            .get()
            .saturating_add(codec::wide(header.body_bytes()));
        codec::between("stream_data.offset", end, 1, STREAM_BYTES_MAX)?;
        Ok(Self {
            stream: codec::stream("stream_data.stream", raw.stream.get())?,
            offset: raw.offset.get(),
        })
    }

    fn to_raw(&self) -> Raw {
        Raw {
            stream: U32::new(self.stream.value()),
            reserved: U32::ZERO,
            offset: U64::new(self.offset),
        }
    }
}
