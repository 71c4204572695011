//! LANE_DOWN: one incarnation of a lane is given up.
//!
//! ```text
//!        0               4               8              12              16
//!       +---------------+---------------+---------------+---------------+
//!     0 | lane          | incarnation   | reason        | reserved      |
//!       +---------------+---------------+---------------+---------------+
//! ```

use zerocopy::byteorder::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::table::Fixed;
use crate::code::Reason;
use crate::codec;
use crate::error::Malformed;
use crate::header::Header;
use crate::id::{Incarnation, LaneId};
use crate::kind::Kind;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Raw {
    lane: U32,
    incarnation: U32,
    reason: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<Raw>() == 16);

/// An incarnation of a lane is given up; the session goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneDown {
    /// The lane.
    pub lane: LaneId,
    /// Its incarnation.
    pub incarnation: Incarnation,
    /// Why.
    pub reason: Reason,
}

impl Fixed for LaneDown {
    type Raw = Raw;
    const KIND: Kind = Kind::LaneDown;

    // SPEC: LANE-1
    fn from_raw(raw: &Raw, _: &Header) -> Result<Self, Malformed> {
        codec::reserved("lane_down.reserved", u64::from(raw.reserved.get()))?;

        Ok(Self {
            lane: codec::lane("lane_down.lane", raw.lane.get())?,
            incarnation: Incarnation::new(raw.incarnation.get()),
            reason: Reason::from_u32(raw.reason.get()).ok_or(Malformed::Value {
                field: "lane_down.reason",
                value: 0,
            })?,
        })
    }

    fn to_raw(&self) -> Raw {
        Raw {
            lane: U32::new(self.lane.value()),
            incarnation: U32::new(self.incarnation.value()),
            reason: U32::new(self.reason.as_u32()),
            reserved: U32::ZERO,
        }
    }
}
