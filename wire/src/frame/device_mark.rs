//! DEVICE_MARK: a point in one device's stream that means something.
//!
//! ```text
//!        0               4               8              12              16
//!       +---------------+---------------+---------------+---------------+
//!     0 | device        | mark          | generation    | reserved      |
//!       +---------------+---------------+---------------+---------------+
//!    16 | index                         | offset                        |
//!       +-------------------------------+-------------------------------+
//! ```

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::table::Fixed;
use crate::codec;
use crate::error::Malformed;
use crate::header::Header;
use crate::id::{DeviceId, Generation};
use crate::kind::Kind;
use crate::limits::DEVICE_STREAM_BYTES_MAX;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Raw {
    device: U32,
    mark: U32,
    generation: U32,
    reserved_a: U32,
    index: U64,
    offset: U64,
}

const _: () = assert!(size_of::<Raw>() == 32);

/// What a point in a device's stream means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mark {
    /// The initial bytes of a generation end here (code 1).
    InitialEnd,
    /// The data section ends here (code 2).
    DataEnd,
    /// The configuration ends here, and with it the stream (code 3).
    ConfigEnd,
    /// Everything before this point is void: the device at the source runs again (code 4).
    Restart,
}

impl Mark {
    /// The mark that a code stands for.
    #[must_use]
    pub const fn from_u32(code: u32) -> Option<Self> {
        match code {
            1 => Some(Self::InitialEnd),
            2 => Some(Self::DataEnd),
            3 => Some(Self::ConfigEnd),
            4 => Some(Self::Restart),
            _ => None,
        }
    }

    /// The code on the wire.
    #[must_use]
    pub const fn as_u32(self) -> u32 {
        match self {
            Self::InitialEnd => 1,
            Self::DataEnd => 2,
            Self::ConfigEnd => 3,
            Self::Restart => 4,
        }
    }
}

/// A point in a device's stream. It uses up an index, so that it has its place among the chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMark {
    /// The device.
    pub device: DeviceId,
    /// What the point means.
    pub mark: Mark,
    /// For [`Mark::InitialEnd`] the batch that ends here, from 1; for the others the newest batch that ended, 0 if none did.
    pub generation: Generation,
    /// The 0-based place among the device's chunks and marks.
    pub index: u64,
    /// Octets of the device's stream before this point.
    pub offset: u64,
}

impl Fixed for DeviceMark {
    type Raw = Raw;
    const KIND: Kind = Kind::DeviceMark;

    // SPEC: DEVSTREAM-3, DEVSTREAM-4, LIMIT-17
    fn from_raw(raw: &Raw, _: &Header) -> Result<Self, Malformed> {
        codec::reserved("device_mark.reserved", u64::from(raw.reserved_a.get()))?;
        codec::between(
            "device_mark.offset",
            raw.offset.get(),
            0,
            DEVICE_STREAM_BYTES_MAX,
        )?;
        if raw.mark.get() == Mark::InitialEnd.as_u32() {
            codec::between(
                "device_mark.generation",
                u64::from(raw.generation.get()),
                1,
                u64::from(u32::MAX),
            )?;
        }
        Ok(Self {
            device: codec::device("device_mark.device", raw.device.get())?,
            mark: Mark::from_u32(raw.mark.get()).ok_or(Malformed::Value {
                field: "device_mark.mark",
                value: u64::from(raw.mark.get()),
            })?,
            generation: Generation::new(raw.generation.get()),
            index: raw.index.get(),
            offset: raw.offset.get(),
        })
    }

    fn to_raw(&self) -> Raw {
        Raw {
            device: U32::new(self.device.value()),
            mark: U32::new(self.mark.as_u32()),
            generation: U32::new(self.generation.value()),
            reserved_a: U32::ZERO,
            index: U64::new(self.index),
            offset: U64::new(self.offset),
        }
    }
}
