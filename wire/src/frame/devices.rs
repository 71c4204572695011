//! DEVICES: the table of devices whose state travels.
//!
//! ```text
//!        0               4               8                              16
//!       +---------------+---------------+
//!     0 | count         | reserved      |
//!       +---------------+---------------+-------------------------------+
//!     8 | id            | flags         | initial_bytes                 |   once per device
//!       +---------------+---------------+-------------------------------+
//!    24 | state_bytes                   | chunk_bytes_max               |
//!       +-------+-----------------------+-------------------------------+
//!    40 | name_b| reserved              | name, 64 octets ...           |
//!       +-------+-----------------------+-------------------------------+
//!   112 | reserved                      |
//!       +-------------------------------+
//! ```

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::table::{self, Table};
use crate::codec;
use crate::error::{Malformed, Misuse};
use crate::header::Header;
use crate::id::DeviceId;
use crate::kind::Kind;
use crate::limits::{BODY_BYTES_MAX_U64, DEVICE_NAME_BYTES_MAX, DEVICES_MAX};
use crate::text::Text;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    count: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<Raw>() == 8);

/// The octets of one device. Source: SPEC, section "DEVICES".
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RawDevice {
    /// The device's number.
    pub id: U32,
    /// See [`DeviceFlags`].
    pub flags: U32,
    /// The estimated size of its initial bytes.
    pub initial_bytes: U64,
    /// The estimated size of its whole state.
    pub state_bytes: U64,
    /// The longest chunk that it will send.
    pub chunk_bytes_max: U64,
    /// The size of its name.
    pub name_bytes: U16,
    /// Reserved, zero.
    pub reserved_a: [u8; 6],
    /// Its name, then zeros.
    pub name: [u8; DEVICE_NAME_BYTES_MAX],
    /// Reserved, zero.
    pub reserved_b: U64,
}

const _: () = assert!(size_of::<RawDevice>() == 112);

/// What a device can and wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DeviceFlags(u32);

impl DeviceFlags {
    /// None of them.
    pub const NONE: Self = Self(0);
    /// Its state can be streamed while the guest runs.
    pub const PRE_COPY: Self = Self(1);
    /// It has the peer-to-peer quiescent state.
    pub const P2P: Self = Self(2);
    /// The guest may be paused only after its initial bytes were loaded.
    pub const SWITCHOVER_ACK: Self = Self(4);
    /// Its configuration is loaded only after all memory has landed.
    pub const CONFIG_AFTER_MEMORY: Self = Self(8);
    /// All flags of version 1.
    pub const KNOWN: Self = Self(15);

    /// The flags that bits stand for; `None` when a reserved bit is set.
    #[must_use]
    pub const fn new(bits: u32) -> Option<Self> {
        if bits & !Self::KNOWN.0 == 0 {
            Some(Self(bits))
        } else {
            None
        }
    }

    /// The bits as they travel.
    #[must_use]
    pub const fn value(self) -> u32 {
        self.0
    }

    /// Whether all flags of `other` are set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The flags of both.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// One device whose state travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its number: the 0-based place in the table.
    pub id: DeviceId,
    /// What it can and wants.
    pub flags: DeviceFlags,
    /// The estimated size of its initial bytes; 0 without [`DeviceFlags::PRE_COPY`].
    pub initial_bytes: u64,
    /// The estimated size of its whole state.
    pub state_bytes: u64,
    /// The longest chunk that it will send, 1 octet to 1 MiB.
    pub chunk_bytes_max: u64,
    /// Its name, 1 to 64 octets, the same on both sides and of no other device.
    pub name: Text<DEVICE_NAME_BYTES_MAX>,
}

impl From<Device> for RawDevice {
    fn from(device: Device) -> Self {
        Self {
            id: U32::new(device.id.value()),
            flags: U32::new(device.flags.value()),
            initial_bytes: U64::new(device.initial_bytes),
            state_bytes: U64::new(device.state_bytes),
            chunk_bytes_max: U64::new(device.chunk_bytes_max),
            name_bytes: U16::new(u16::try_from(device.name.bytes()).unwrap_or(0)),
            reserved_a: [0; 6],
            name: *device.name.field(),
            reserved_b: U64::ZERO,
        }
    }
}

impl TryFrom<&RawDevice> for Device {
    type Error = Malformed;

    // SPEC: DEVICE-2, DEVICE-3, DEVICE-4, DEVICE-5
    fn try_from(raw: &RawDevice) -> Result<Self, Malformed> {
        codec::reserved_octets("device.reserved", &raw.reserved_a)?;
        codec::reserved("device.reserved", raw.reserved_b.get())?;
        let flags = DeviceFlags::new(raw.flags.get()).ok_or(Malformed::Reserved {
            field: "device.flags",
        })?;
        let pre_copy = flags.contains(DeviceFlags::PRE_COPY);
        if flags.contains(DeviceFlags::SWITCHOVER_ACK) && !pre_copy {
            return Err(Malformed::Value {
                field: "device.flags",
                value: u64::from(flags.value()),
            });
        }
        if !pre_copy {
            codec::between("device.initial_bytes", raw.initial_bytes.get(), 0, 0)?;
        }
        let chunk_bytes_max = raw.chunk_bytes_max.get();
        codec::between(
            "device.chunk_bytes_max",
            chunk_bytes_max,
            1,
            BODY_BYTES_MAX_U64,
        )?;
        codec::between("device.name_bytes", u64::from(raw.name_bytes.get()), 1, 64)?;
        let bytes = usize::from(raw.name_bytes.get());
        Ok(Self {
            id: codec::device("device.id", raw.id.get())?,
            flags,
            initial_bytes: raw.initial_bytes.get(),
            state_bytes: raw.state_bytes.get(),
            chunk_bytes_max,
            name: Text::from_field("device.name", &raw.name, bytes)?,
        })
    }
}

/// The device table as it travels, at most [`DEVICES_MAX`] entries, possibly none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Devices<'a> {
    /// The devices, in the order of their numbers.
    pub devices: &'a [RawDevice],
}

impl<'a> Devices<'a> {
    /// The devices as they are meant. Those of a decoded frame are all `Ok`.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Result<Device, Malformed>> + use<'a> {
        self.devices.iter().map(Device::try_from)
    }
}

impl<'a> Table<'a> for Devices<'a> {
    // SPEC: DEVICE-1, DEVICE-4
    fn read(_: &Header, table: &'a [u8]) -> Result<Self, Malformed> {
        let (raw, rest) = codec::prefix::<Raw>(Kind::Devices, table)?;
        codec::reserved("devices.reserved", u64::from(raw.reserved.get()))?;
        let devices: &[RawDevice] = codec::entries("devices.count", rest, raw.count.get())?;
        for (index, device) in devices.iter().enumerate() {
            let id = Device::try_from(device)?.id.value();
            if id != codec::narrow(index) {
                return Err(Malformed::Value {
                    field: "device.id",
                    value: u64::from(id),
                });
            }
            if devices
                .iter()
                .take(index)
                .any(|other| other.name == device.name)
            {
                return Err(Malformed::Value {
                    field: "device.name",
                    value: u64::from(id),
                });
            }
        }
        Ok(Self { devices })
    }

    fn bytes(&self) -> usize {
        size_of::<Raw>().saturating_add(size_of_val(self.devices))
    }

    fn write(&self, out: &mut Vec<u8>) -> Result<(), Misuse> {
        let count = table::count(Kind::Devices, self.devices.len(), DEVICES_MAX)?;
        out.extend_from_slice(
            Raw {
                count: U32::new(count),
                reserved: U32::ZERO,
            }
            .as_bytes(),
        );
        out.extend_from_slice(self.devices.as_bytes());
        Ok(())
    }
}
