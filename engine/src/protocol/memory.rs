//! Guest memory in messages: where its regions lie for the guest, and in which files.
//!
//! ```text
//!   count u32 | 0 u32 | count × { guest address u64 | bytes u64 | offset in the file u64 | descriptor u32 | 0 u32 }
//! ```
//! A descriptor is the index of one that came with the message; regions may share one.

use super::{Malformed, Reader, Writer};

/// The most regions, which is also the stream's limit.
pub(super) const REGIONS_MAX: usize = 1024;

/// A region and its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionEntry {
    /// Where it lies for the guest.
    pub guest_address: u64,
    /// Its size.
    pub bytes: u64,
    /// Where it begins in the file.
    pub offset: u64,
    /// Which of the descriptors of the message.
    pub descriptor: u32,
}

/// Writes regions with their files.
#[must_use]
pub fn write_regions(regions: &[RegionEntry]) -> Vec<u8> {
    let mut out = Writer::default();
    out.count(regions.len());
    for region in regions {
        out.u64(region.guest_address);
        out.u64(region.bytes);
        out.u64(region.offset);
        out.u32(region.descriptor);
        out.u32(0);
    }
    out.finish()
}

/// Reads regions with their files, of a message with so many descriptors.
///
/// # Errors
/// They are none.
pub fn read_regions(body: &[u8], descriptors: usize) -> Result<Vec<RegionEntry>, Malformed> {
    let mut reader = Reader::new("a list of regions", body);
    let count = reader.count("regions", REGIONS_MAX)?;
    let mut regions = Vec::new();
    for _ in 0..count {
        let region = RegionEntry {
            guest_address: reader.u64()?,
            bytes: reader.u64()?,
            offset: reader.u64()?,
            descriptor: reader.u32()?,
        };
        reader.zero()?;
        check_descriptor(region.descriptor, descriptors)?;
        regions.push(region);
    }
    reader.end()?;
    Ok(regions)
}

/// Writes where regions lie for the guest, in a body that goes on.
pub fn write_layout(out: &mut Writer, regions: &[(u64, u64)]) {
    out.count(regions.len());
    for (guest_address, bytes) in regions {
        out.u64(*guest_address);
        out.u64(*bytes);
    }
}

/// Reads where regions lie for the guest, and their sizes.
///
/// # Errors
/// They are none.
pub fn read_layout(reader: &mut Reader<'_>) -> Result<Vec<(u64, u64)>, Malformed> {
    let count = reader.count("regions", REGIONS_MAX)?;
    let mut regions = Vec::new();
    for _ in 0..count {
        regions.push((reader.u64()?, reader.u64()?));
    }
    Ok(regions)
}

/// Whether a descriptor came with the message.
pub(super) fn check_descriptor(index: u32, count: usize) -> Result<(), Malformed> {
    let came = usize::try_from(index).is_ok_and(|place| place < count);
    if came {
        Ok(())
    } else {
        Err(Malformed::Descriptor { index, count })
    }
}
