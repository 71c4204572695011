//! SETUP_END: the set-up is complete; what it must have held.
//!
//! ```text
//!        0               4               8              12              16
//!       +---------------+---------------+---------------+---------------+
//!     0 | configs       | regions       | devices       | lanes         |
//!       +---------------+---------------+---------------+---------------+
//!    16 | memory_bytes                  | reserved                      |
//!       +-------------------------------+-------------------------------+
//! ```

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::table::Fixed;
use crate::PAGE_BYTES_U64;
use crate::codec;
use crate::error::Malformed;
use crate::header::Header;
use crate::kind::Kind;
use crate::limits::{BLOBS_MAX, DEVICES_MAX, LANES_MAX, MEMORY_PAGES_MAX, REGIONS_MAX};

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Raw {
    configs: U32,
    regions: U32,
    devices: U32,
    lanes: U32,
    memory_bytes: U64,
    reserved: U64,
}

const _: () = assert!(size_of::<Raw>() == 32);

/// What the set-up holds, so that nothing of it can be missing unseen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetupEnd {
    /// CONFIG blobs sent.
    pub configs: u32,
    /// Regions in the table.
    pub regions: u32,
    /// Devices in the table.
    pub devices: u32,
    /// Data channels that the source is going to open.
    pub lanes: u32,
    /// Octets in all regions together.
    pub memory_bytes: u64,
}

impl Fixed for SetupEnd {
    type Raw = Raw;
    const KIND: Kind = Kind::SetupEnd;

    // SPEC: SETUP-2
    fn from_raw(raw: &Raw, _: &Header) -> Result<Self, Malformed> {
        codec::count("setup_end.configs", raw.configs.get(), 0, BLOBS_MAX)?;
        codec::count("setup_end.regions", raw.regions.get(), 1, REGIONS_MAX)?;
        codec::count("setup_end.devices", raw.devices.get(), 0, DEVICES_MAX)?;
        codec::count("setup_end.lanes", raw.lanes.get(), 1, LANES_MAX)?;
        check_memory(raw.memory_bytes.get())?;
        codec::reserved("setup_end.reserved", raw.reserved.get())?;

        Ok(Self {
            configs: raw.configs.get(),
            regions: raw.regions.get(),
            devices: raw.devices.get(),
            lanes: raw.lanes.get(),
            memory_bytes: raw.memory_bytes.get(),
        })
    }

    fn to_raw(&self) -> Raw {
        Raw {
            configs: U32::new(self.configs),
            regions: U32::new(self.regions),
            devices: U32::new(self.devices),
            lanes: U32::new(self.lanes),
            memory_bytes: U64::new(self.memory_bytes),
            reserved: U64::ZERO,
        }
    }
}

/// Memory is whole pages, at least one, and no more than there can be.
// SPEC: LIMIT-15
fn check_memory(bytes: u64) -> Result<(), Malformed> {
    let field = "setup_end.memory_bytes";
    let max = MEMORY_PAGES_MAX.saturating_mul(PAGE_BYTES_U64);
    codec::between(field, bytes, PAGE_BYTES_U64, max)?;
    match bytes.checked_rem(PAGE_BYTES_U64) {
        Some(0) => Ok(()),
        _ => Err(Malformed::Value {
            field,
            value: bytes,
        }),
    }
}
