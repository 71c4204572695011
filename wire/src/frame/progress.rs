//! PROGRESS: figures about the destination, for display only; a reader may skip it.
//!
//! ```text
//!        0               4               8              12              16
//!       +-------------------------------+-------------------------------+
//!     0 | landed_bytes                  | zero_pages                    |
//!       +-------------------------------+-------------------------------+
//!    16 | frames                        | cpu_us                        |
//!       +---------------+---------------+-------------------------------+
//!    32 | round         | lanes         | reserved                      |
//!       +---------------+---------------+-------------------------------+
//! ```

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::table::Fixed;
use crate::codec;
use crate::error::Malformed;
use crate::header::Header;
use crate::id::Round;
use crate::kind::Kind;
use crate::limits::LANES_MAX;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Raw {
    landed_bytes: U64,
    zero_pages: U64,
    frames: U64,
    cpu_us: U64,
    round: U32,
    lanes: U32,
    reserved: U64,
}

const _: () = assert!(size_of::<Raw>() == 48);

/// How far the destination is. Nothing is decided from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Octets of pages that landed.
    pub landed_bytes: u64,
    /// Zero pages that landed.
    pub zero_pages: u64,
    /// Frames handled on all data channels.
    pub frames: u64,
    /// Processor time that the destination has used, in microseconds.
    pub cpu_us: u64,
    /// The round that is open.
    pub round: Round,
    /// Data channels that are alive.
    pub lanes: u32,
}

impl Fixed for Progress {
    type Raw = Raw;
    const KIND: Kind = Kind::Progress;

    // SPEC: PROG-1
    fn from_raw(raw: &Raw, _: &Header) -> Result<Self, Malformed> {
        codec::count("progress.lanes", raw.lanes.get(), 0, LANES_MAX)?;
        codec::reserved("progress.reserved", raw.reserved.get())?;

        Ok(Self {
            landed_bytes: raw.landed_bytes.get(),
            zero_pages: raw.zero_pages.get(),
            frames: raw.frames.get(),
            cpu_us: raw.cpu_us.get(),
            round: codec::round("progress.round", raw.round.get())?,
            lanes: raw.lanes.get(),
        })
    }

    fn to_raw(&self) -> Raw {
        Raw {
            landed_bytes: U64::new(self.landed_bytes),
            zero_pages: U64::new(self.zero_pages),
            frames: U64::new(self.frames),
            cpu_us: U64::new(self.cpu_us),
            round: U32::new(self.round.value()),
            lanes: U32::new(self.lanes),
            reserved: U64::ZERO,
        }
    }
}
