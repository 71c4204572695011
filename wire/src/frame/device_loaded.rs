//! DEVICE_LOADED: a device's whole state is loaded.
//!
//! ```text
//!        0               4               8              12              16
//!       +---------------+---------------+-------------------------------+
//!     0 | device        | reserved      | bytes                         |
//!       +---------------+---------------+-------------------------------+
//!    16 | load_us                       | config_us                     |
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

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Raw {
    device: U32,
    reserved: U32,
    bytes: U64,
    load_us: U64,
    config_us: U64,
}

const _: () = assert!(size_of::<Raw>() == 32);

/// A device's whole state is loaded, and how long that took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceLoaded {
    /// The device.
    pub device: DeviceId,
    /// Octets loaded.
    pub bytes: u64,
    /// Microseconds spent loading its data.
    pub load_us: u64,
    /// Microseconds spent loading its configuration.
    pub config_us: u64,
}

impl Fixed for DeviceLoaded {
    type Raw = Raw;
    const KIND: Kind = Kind::DeviceLoaded;

    // SPEC: LOADED-1
    fn from_raw(raw: &Raw, _: &Header) -> Result<Self, Malformed> {
        codec::reserved("device_loaded.reserved", u64::from(raw.reserved.get()))?;

        Ok(Self {
            device: codec::device("device_loaded.device", raw.device.get())?,
            bytes: raw.bytes.get(),
            load_us: raw.load_us.get(),
            config_us: raw.config_us.get(),
        })
    }

    fn to_raw(&self) -> Raw {
        Raw {
            device: U32::new(self.device.value()),
            reserved: U32::ZERO,
            bytes: U64::new(self.bytes),
            load_us: U64::new(self.load_us),
            config_us: U64::new(self.config_us),
        }
    }
}
