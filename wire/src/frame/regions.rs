//! REGIONS: the table of guest memory.
//!
//! ```text
//!        0               4               8                              16
//!       +---------------+---------------+
//!     0 | count         | reserved      |
//!       +---------------+---------------+-------------------------------+
//!     8 | id            | flags (rsvd)  | guest_address                 |   once per region
//!       +---------------+---------------+-------------------------------+
//!    24 | bytes                         | reserved                      |
//!       +-------------------------------+-------------------------------+
//! ```
//!
//! Here only the octets are checked; whether the regions make a memory is [`Layout::from_frame`](crate::Layout::from_frame)'s work.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::table::{self, Table};
use crate::codec;
use crate::error::{Malformed, Misuse};
use crate::header::Header;
use crate::id::RegionId;
use crate::kind::Kind;
use crate::layout::Region;
use crate::limits::REGIONS_MAX;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    count: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<Raw>() == 8);

/// The octets of one region. Source: SPEC, section "REGIONS".
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RawRegion {
    /// The region's number.
    pub id: U32,
    /// Reserved, zero.
    pub flags: U32,
    /// The first guest-physical address.
    pub guest_address: U64,
    /// The size in octets.
    pub bytes: U64,
    /// Reserved, zero.
    pub reserved: U64,
}

const _: () = assert!(size_of::<RawRegion>() == 32);

impl From<Region> for RawRegion {
    fn from(region: Region) -> Self {
        Self {
            id: U32::new(region.id.value()),
            flags: U32::ZERO,
            guest_address: U64::new(region.guest_address),
            bytes: U64::new(region.bytes),
            reserved: U64::ZERO,
        }
    }
}

impl From<&RawRegion> for Region {
    fn from(raw: &RawRegion) -> Self {
        Self {
            id: RegionId::new(raw.id.get()),
            guest_address: raw.guest_address.get(),
            bytes: raw.bytes.get(),
        }
    }
}

/// The region table as it travels, 1 to [`REGIONS_MAX`] entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Regions<'a> {
    /// The regions, in the order of their numbers.
    pub regions: &'a [RawRegion],
}

impl<'a> Regions<'a> {
    /// The regions as they are meant.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Region> + use<'a> {
        self.regions.iter().map(Region::from)
    }
}

impl<'a> Table<'a> for Regions<'a> {
    // SPEC: REGION-1, REGION-5
    fn read(_: &Header, table: &'a [u8]) -> Result<Self, Malformed> {
        let (raw, rest) = codec::prefix::<Raw>(Kind::Regions, table)?;
        codec::reserved("regions.reserved", u64::from(raw.reserved.get()))?;
        let regions: &[RawRegion] = codec::entries("regions.count", rest, raw.count.get())?;
        for region in regions {
            codec::reserved("region.flags", u64::from(region.flags.get()))?;
            codec::reserved("region.reserved", region.reserved.get())?;
        }
        Ok(Self { regions })
    }

    fn bytes(&self) -> usize {
        size_of::<Raw>().saturating_add(size_of_val(self.regions))
    }

    fn write(&self, out: &mut Vec<u8>) -> Result<(), Misuse> {
        let count = table::count(Kind::Regions, self.regions.len(), REGIONS_MAX)?;
        out.extend_from_slice(
            Raw {
                count: U32::new(count),
                reserved: U32::ZERO,
            }
            .as_bytes(),
        );
        out.extend_from_slice(self.regions.as_bytes());
        Ok(())
    }
}
