//! DEVICE_CHUNK: a numbered piece of one device's stream; the body is the piece.
//!
//! ```text
//!        0               4               8              12              16
//!       +---------------+---------------+-------------------------------+
//!     0 | device        | section       | index                         |
//!       +---------------+---------------+-------------------------------+
//!    16 | offset                        | reserved                      |
//!       +-------------------------------+-------------------------------+
//! ```

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::table::Fixed;
use crate::codec;
use crate::error::Malformed;
use crate::header::Header;
use crate::id::DeviceId;
use crate::kind::Kind;
use crate::limits::DEVICE_STREAM_BYTES_MAX;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Raw {
    device: U32,
    section: U32,
    index: U64,
    offset: U64,
    reserved: U64,
}

const _: () = assert!(size_of::<Raw>() == 32);

/// Which part of a device's state octets are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Section {
    /// The data stream (code 0).
    Data,
    /// The configuration, loaded after the data (code 1).
    Config,
}

impl Section {
    /// The section that a code stands for.
    #[must_use]
    pub const fn from_u32(code: u32) -> Option<Self> {
        match code {
            0 => Some(Self::Data),
            1 => Some(Self::Config),
            _ => None,
        }
    }

    /// The code on the wire.
    #[must_use]
    pub const fn as_u32(self) -> u32 {
        match self {
            Self::Data => 0,
            Self::Config => 1,
        }
    }
}

/// Where a piece belongs in its device's stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceChunk {
    /// The device.
    pub device: DeviceId,
    /// What the octets are.
    pub section: Section,
    /// The 0-based place among the device's chunks and marks.
    pub index: u64,
    /// Octets of the device's stream before this piece.
    pub offset: u64,
}

impl Fixed for DeviceChunk {
    type Raw = Raw;
    const KIND: Kind = Kind::DeviceChunk;

    // SPEC: DEVSTREAM-2, LIMIT-17
    fn from_raw(raw: &Raw, header: &Header) -> Result<Self, Malformed> {
        codec::reserved("device_chunk.reserved", raw.reserved.get())?;
        let end = raw
            .offset
            .get()
            .saturating_add(codec::wide(header.body_bytes()));
        codec::between("device_chunk.offset", end, 1, DEVICE_STREAM_BYTES_MAX)?;
        Ok(Self {
            device: codec::device("device_chunk.device", raw.device.get())?,
            section: Section::from_u32(raw.section.get()).ok_or(Malformed::Value {
                field: "device_chunk.section",
                value: u64::from(raw.section.get()),
            })?,
            index: raw.index.get(),
            offset: raw.offset.get(),
        })
    }

    fn to_raw(&self) -> Raw {
        Raw {
            device: U32::new(self.device.value()),
            section: U32::new(self.section.as_u32()),
            index: U64::new(self.index),
            offset: U64::new(self.offset),
            reserved: U64::ZERO,
        }
    }
}
