//! STREAM_CREDIT: what came of carried streams, and how far they may go; cumulative, several streams at once.
//!
//! ```text
//!        0               4               8                              16
//!       +---------------+---------------+
//!     0 | count         | reserved      |
//!       +---------------+---------------+-------------------------------+
//!     8 | stream        | reserved      | received                      |   once per stream
//!       +---------------+---------------+-------------------------------+
//!    24 | offset_max                    |
//!       +-------------------------------+
//! ```

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::table::{self, Table};
use crate::codec;
use crate::error::{Malformed, Misuse};
use crate::header::Header;
use crate::id::StreamId;
use crate::kind::Kind;
use crate::limits::{STREAM_BYTES_MAX, STREAM_CREDITS_MAX};

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    count: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<Raw>() == 8);

/// The octets of one stream's credit. Source: SPEC, section "STREAM_CREDIT".
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RawStreamCredit {
    /// The stream's number.
    pub stream: U32,
    /// Reserved, zero.
    pub reserved: U32,
    /// Everything before this offset has come.
    pub received: U64,
    /// No piece may end past this offset.
    pub offset_max: U64,
}

const _: () = assert!(size_of::<RawStreamCredit>() == 24);

/// What came of one stream, and how far it may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamCredit {
    /// The stream.
    pub stream: StreamId,
    /// Everything before this offset has come and is never asked for again.
    pub received: u64,
    /// No piece may end past this offset.
    pub offset_max: u64,
}

impl From<StreamCredit> for RawStreamCredit {
    fn from(credit: StreamCredit) -> Self {
        Self {
            stream: U32::new(credit.stream.value()),
            reserved: U32::ZERO,
            received: U64::new(credit.received),
            offset_max: U64::new(credit.offset_max),
        }
    }
}

impl From<&RawStreamCredit> for StreamCredit {
    fn from(raw: &RawStreamCredit) -> Self {
        Self {
            stream: StreamId::new(raw.stream.get()),
            received: raw.received.get(),
            offset_max: raw.offset_max.get(),
        }
    }
}

/// Credits of 1 to [`STREAM_CREDITS_MAX`] streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamCredits<'a> {
    /// One credit per stream that is spoken of.
    pub credits: &'a [RawStreamCredit],
}

impl<'a> StreamCredits<'a> {
    /// The credits as they are meant.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = StreamCredit> + use<'a> {
        self.credits.iter().map(StreamCredit::from)
    }
}

impl<'a> Table<'a> for StreamCredits<'a> {
    // SPEC: CARRY-6
    fn read(_: &Header, table: &'a [u8]) -> Result<Self, Malformed> {
        let (raw, rest) = codec::prefix::<Raw>(Kind::StreamCredit, table)?;
        codec::reserved("stream_credit.reserved", u64::from(raw.reserved.get()))?;
        let credits: &[RawStreamCredit] =
            codec::entries("stream_credit.count", rest, raw.count.get())?;
        for credit in credits {
            codec::reserved("stream_credit.reserved", u64::from(credit.reserved.get()))?;
            codec::stream("stream_credit.stream", credit.stream.get())?;
            let (received, most) = (credit.received.get(), credit.offset_max.get());
            codec::between("stream_credit.offset_max", most, 0, STREAM_BYTES_MAX)?;
            codec::between("stream_credit.received", received, 0, most)?;
        }
        Ok(Self { credits })
    }

    fn bytes(&self) -> usize {
        size_of::<Raw>().saturating_add(size_of_val(self.credits))
    }

    fn write(&self, out: &mut Vec<u8>) -> Result<(), Misuse> {
        let count = table::count(Kind::StreamCredit, self.credits.len(), STREAM_CREDITS_MAX)?;
        out.extend_from_slice(
            Raw {
                count: U32::new(count),
                reserved: U32::ZERO,
            }
            .as_bytes(),
        );
        out.extend_from_slice(self.credits.as_bytes());
        Ok(())
    }
}
