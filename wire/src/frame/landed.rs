//! LANDED: what had landed of a session before it lost its channels; the destination's word on a resume.
//!
//! ```text
//!        0               4               8                              16
//!       +---------------+---------------+-------------------------------+
//!     0 | rounds_closed | count         | reserved                      |
//!       +---------------+---------------+-------------------------------+
//!    16 | lane          | incarnation   | frames                        |   once per lane
//!       +---------------+---------------+-------------------------------+
//! ```

use zerocopy::byteorder::little_endian::{U32, U64};
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
    rounds_closed: U32,
    count: U32,
    reserved: U64,
}

const _: () = assert!(size_of::<Raw>() == 16);

/// How far each lane's last incarnation got before the channels were lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Landed<'a> {
    /// How many rounds were closed: rounds below this number are over.
    pub rounds_closed: u32,
    /// One mark per lane, lanes rising; a lane that is not named had no frame handled.
    pub lanes: &'a [RawLaneMark],
}

impl<'a> Landed<'a> {
    /// The marks as they are meant.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = LaneMark> + use<'a> {
        self.lanes.iter().map(LaneMark::from)
    }
}

impl<'a> Table<'a> for Landed<'a> {
    // SPEC: LANDED-1, LANDED-2
    fn read(_: &Header, table: &'a [u8]) -> Result<Self, Malformed> {
        let (raw, rest) = codec::prefix::<Raw>(Kind::Landed, table)?;
        codec::reserved("landed.reserved", raw.reserved.get())?;
        let lanes: &[RawLaneMark] = codec::entries("landed.count", rest, raw.count.get())?;
        lane_mark::check("landed.lane", lanes)?;
        let mut rising = lanes.iter().zip(lanes.iter().skip(1));
        if let Some((_, second)) = rising.find(|(a, b)| a.lane.get() >= b.lane.get()) {
            return Err(Malformed::Value {
                field: "landed.lane",
                value: u64::from(second.lane.get()),
            });
        }
        Ok(Self {
            rounds_closed: raw.rounds_closed.get(),
            lanes,
        })
    }

    fn bytes(&self) -> usize {
        size_of::<Raw>().saturating_add(size_of_val(self.lanes))
    }

    fn write(&self, out: &mut Vec<u8>) -> Result<(), Misuse> {
        let count = table::count(Kind::Landed, self.lanes.len(), LANES_MAX)?;
        let raw = Raw {
            rounds_closed: U32::new(self.rounds_closed),
            count: U32::new(count),
            reserved: U64::ZERO,
        };
        out.extend_from_slice(raw.as_bytes());
        out.extend_from_slice(self.lanes.as_bytes());
        Ok(())
    }
}
