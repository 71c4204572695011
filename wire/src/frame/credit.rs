//! CREDIT: how far each device's stream may go; cumulative, several devices at once.
//!
//! ```text
//!        0               4               8                              16
//!       +---------------+---------------+
//!     0 | count         | reserved      |
//!       +---------------+---------------+-------------------------------+
//!     8 | device        | reserved      | offset_max                    |   once per device
//!       +---------------+---------------+-------------------------------+
//! ```

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::table::{self, Table};
use crate::codec;
use crate::error::{Malformed, Misuse};
use crate::header::Header;
use crate::id::DeviceId;
use crate::kind::Kind;
use crate::limits::DEVICES_MAX;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    count: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<Raw>() == 8);

/// The octets of one device's credit. Source: SPEC, section "CREDIT".
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RawCredit {
    /// The device's number.
    pub device: U32,
    /// Reserved, zero.
    pub reserved: U32,
    /// No chunk may end past this offset of the device's stream.
    pub offset_max: U64,
}

const _: () = assert!(size_of::<RawCredit>() == 16);

/// How far one device's stream may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credit {
    /// The device.
    pub device: DeviceId,
    /// No chunk may end past this offset of the device's stream.
    pub offset_max: u64,
}

impl From<Credit> for RawCredit {
    fn from(credit: Credit) -> Self {
        Self {
            device: U32::new(credit.device.value()),
            reserved: U32::ZERO,
            offset_max: U64::new(credit.offset_max),
        }
    }
}

impl From<&RawCredit> for Credit {
    fn from(raw: &RawCredit) -> Self {
        Self {
            device: DeviceId::new(raw.device.get()),
            offset_max: raw.offset_max.get(),
        }
    }
}

/// Credits of 1 to [`DEVICES_MAX`] devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credits<'a> {
    /// One credit per device that is spoken of.
    pub credits: &'a [RawCredit],
}

impl<'a> Credits<'a> {
    /// The credits as they are meant.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Credit> + use<'a> {
        self.credits.iter().map(Credit::from)
    }
}

impl<'a> Table<'a> for Credits<'a> {
    // SPEC: CREDIT-1
    fn read(_: &Header, table: &'a [u8]) -> Result<Self, Malformed> {
        let (raw, rest) = codec::prefix::<Raw>(Kind::Credit, table)?;
        codec::reserved("credit.reserved", u64::from(raw.reserved.get()))?;
        let credits: &[RawCredit] = codec::entries("credit.count", rest, raw.count.get())?;
        for credit in credits {
            codec::reserved("credit.reserved", u64::from(credit.reserved.get()))?;
            codec::device("credit.device", credit.device.get())?;
        }
        Ok(Self { credits })
    }

    fn bytes(&self) -> usize {
        size_of::<Raw>().saturating_add(size_of_val(self.credits))
    }

    fn write(&self, out: &mut Vec<u8>) -> Result<(), Misuse> {
        let count = table::count(Kind::Credit, self.credits.len(), DEVICES_MAX)?;
        out.extend_from_slice(
            Raw {
                count: U32::new(count),
                reserved: U32::ZERO,
            }
            .as_bytes(),
        );
        out.extend_from_slice(self.credits.as_bytes());
        Ok(())
    }
}
