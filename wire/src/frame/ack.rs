//! ACK: how far the frames of data channels were handled; cumulative, several lanes at once.
//!
//! ```text
//!        0               4               8                              16
//!       +---------------+---------------+
//!     0 | count         | reserved      |
//!       +---------------+---------------+-------------------------------+
//!     8 | lane          | incarnation   | frames                        |   once per lane
//!       +---------------+---------------+-------------------------------+
//! ```

use zerocopy::byteorder::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::lane_mark::{self, LaneMark, RawLaneMark};
use super::table::{self, Table};
use crate::codec;
use crate::error::{Malformed, Misuse};
use crate::header::Header;
use crate::kind::Kind;
use crate::limits::LANES_MAX;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    count: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<Raw>() == 8);

/// Acknowledgements of 1 to [`LANES_MAX`] lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acks<'a> {
    /// One mark per lane that is spoken of.
    pub lanes: &'a [RawLaneMark],
}

impl<'a> Acks<'a> {
    /// The marks as they are meant.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = LaneMark> + use<'a> {
        self.lanes.iter().map(LaneMark::from)
    }
}

impl<'a> Table<'a> for Acks<'a> {
    // SPEC: ACK-1
    fn read(_: &Header, table: &'a [u8]) -> Result<Self, Malformed> {
        let (raw, rest) = codec::prefix::<Raw>(Kind::Ack, table)?;
        codec::reserved("ack.reserved", u64::from(raw.reserved.get()))?;
        let lanes = codec::entries("ack.count", rest, raw.count.get())?;
        lane_mark::check("ack.lane", lanes)?;
        Ok(Self { lanes })
    }

    fn bytes(&self) -> usize {
        size_of::<Raw>().saturating_add(size_of_val(self.lanes))
    }

    fn write(&self, out: &mut Vec<u8>) -> Result<(), Misuse> {
        let count = table::count(Kind::Ack, self.lanes.len(), LANES_MAX)?;
        out.extend_from_slice(
            Raw {
                count: U32::new(count),
                reserved: U32::ZERO,
            }
            .as_bytes(),
        );
        out.extend_from_slice(self.lanes.as_bytes());
        Ok(())
    }
}
