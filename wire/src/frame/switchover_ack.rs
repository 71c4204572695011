//! SWITCHOVER_ACK: a device's initial bytes are loaded.
//!
//! ```text
//!        0               4               8              12              16
//!       +---------------+---------------+-------------------------------+
//!     0 | device        | generation    | bytes                         |
//!       +---------------+---------------+-------------------------------+
//!    16 | load_us                       |
//!       +-------------------------------+
//! ```

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::table::Fixed;
use crate::codec;
use crate::error::Malformed;
use crate::header::Header;
use crate::id::{DeviceId, Generation};
use crate::kind::Kind;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Raw {
    device: U32,
    generation: U32,
    bytes: U64,
    load_us: U64,
}

const _: () = assert!(size_of::<Raw>() == 24);

/// The initial bytes of one generation of one device are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SwitchoverAck {
    /// The device.
    pub device: DeviceId,
    /// The generation, from 1.
    pub generation: Generation,
    /// Octets loaded for it.
    pub bytes: u64,
    /// Microseconds that the device took to load them.
    pub load_us: u64,
}

impl Fixed for SwitchoverAck {
    type Raw = Raw;
    const KIND: Kind = Kind::SwitchoverAck;

    // SPEC: SWACK-1
    fn from_raw(raw: &Raw, _: &Header) -> Result<Self, Malformed> {
        codec::between(
            "switchover_ack.generation",
            u64::from(raw.generation.get()),
            1,
            u64::from(u32::MAX),
        )?;

        Ok(Self {
            device: codec::device("switchover_ack.device", raw.device.get())?,
            generation: Generation::new(raw.generation.get()),
            bytes: raw.bytes.get(),
            load_us: raw.load_us.get(),
        })
    }

    fn to_raw(&self) -> Raw {
        Raw {
            device: U32::new(self.device.value()),
            generation: U32::new(self.generation.value()),
            bytes: U64::new(self.bytes),
            load_us: U64::new(self.load_us),
        }
    }
}
