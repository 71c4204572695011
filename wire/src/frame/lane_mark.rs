//! The entry that ACK and LANDED share: how far one lane's frames were handled.
//!
//! ```text
//!        0               4               8                              16
//!       +---------------+---------------+-------------------------------+
//!       | lane          | incarnation   | frames                        |
//!       +---------------+---------------+-------------------------------+
//! ```

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::codec;
use crate::error::Malformed;
use crate::id::{Incarnation, LaneId};

/// The octets of a lane mark. Source: SPEC, section "ACK".
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RawLaneMark {
    /// The lane's number.
    pub lane: U32,
    /// The lane's incarnation.
    pub incarnation: U32,
    /// Every frame of that incarnation with a sequence below this was handled.
    pub frames: U64,
}

const _: () = assert!(size_of::<RawLaneMark>() == 16);

/// How far the frames of one incarnation of a lane were handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneMark {
    /// The lane.
    pub lane: LaneId,
    /// Its incarnation.
    pub incarnation: Incarnation,
    /// Every frame with a sequence below this was handled.
    pub frames: u64,
}

impl From<LaneMark> for RawLaneMark {
    fn from(mark: LaneMark) -> Self {
        Self {
            lane: U32::new(mark.lane.value()),
            incarnation: U32::new(mark.incarnation.value()),
            frames: U64::new(mark.frames),
        }
    }
}

impl From<&RawLaneMark> for LaneMark {
    fn from(raw: &RawLaneMark) -> Self {
        Self {
            lane: LaneId::new(raw.lane.get()),
            incarnation: Incarnation::new(raw.incarnation.get()),
            frames: raw.frames.get(),
        }
    }
}

/// Refuses marks of lanes that cannot exist.
// SPEC: LIMIT-9
pub(super) fn check(field: &'static str, marks: &[RawLaneMark]) -> Result<(), Malformed> {
    marks
        .iter()
        .try_for_each(|mark| codec::lane(field, mark.lane.get()).map(drop))
}
