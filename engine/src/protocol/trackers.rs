//! How dirty pages are found, in the answer to TRACKERS.
//!
//! ```text
//!   count u32 | 0 u32 | count × { kind u32 | descriptor u32 | region u32 | 0 u32 | first page u64 | address u64 | pages u64 }
//! ```
//! An entry of kind 1 is a run of a region's pages as it lies in the VMM's address space; `descriptor` is the VMM's userfaultfd and
//! `descriptor + 1` its page map. Entries with the same descriptor are one tracker. An entry of kind 2 is a bitmap of all pages, which
//! the VMM writes when it is asked to (COLLECT); its other fields are zero.

use super::memory::check_descriptor;
use super::{Malformed, Reader, Writer};

/// The most entries: one fills 40 bytes of a message.
pub(super) const TRACKERS_MAX: usize = 1536;

/// How.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum TrackerKind {
    /// By the VMM's userfaultfd and page map.
    Process = 1,
    /// By a bitmap that the VMM writes.
    Bitmap = 2,
}

/// One entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrackerEntry {
    /// How.
    pub kind: TrackerKind,
    /// Which of the descriptors of the message.
    pub descriptor: u32,
    /// Index of the region.
    pub region: u32,
    /// The page of the region that lies at `address`.
    pub first_page: u64,
    /// Address in the VMM.
    pub address: u64,
    /// The pages.
    pub pages: u64,
}

/// Writes entries.
#[must_use]
pub fn write_trackers(entries: &[TrackerEntry]) -> Vec<u8> {
    let mut out = Writer::default();
    out.count(entries.len());
    for entry in entries {
        out.u32(entry.kind as u32);
        out.u32(entry.descriptor);
        out.u32(entry.region);
        out.u32(0);
        out.u64(entry.first_page);
        out.u64(entry.address);
        out.u64(entry.pages);
    }
    out.finish()
}

/// Reads entries, of a message with so many descriptors.
///
/// # Errors
/// They are none.
pub fn read_trackers(body: &[u8], descriptors: usize) -> Result<Vec<TrackerEntry>, Malformed> {
    let mut reader = Reader::new("a list of trackers", body);
    let count = reader.count("trackers", TRACKERS_MAX)?;
    let mut entries = Vec::new();
    for _ in 0..count {
        let kind = reader.u32()?;
        let kind = match kind {
            1 => TrackerKind::Process,
            2 => TrackerKind::Bitmap,
            other => {
                return Err(Malformed::Value {
                    what: "the kind of a tracker",
                    value: other.into(),
                });
            }
        };
        let (descriptor, region) = (reader.u32()?, reader.u32()?);
        reader.zero()?;
        let entry = TrackerEntry {
            kind,
            descriptor,
            region,
            first_page: reader.u64()?,
            address: reader.u64()?,
            pages: reader.u64()?,
        };
        check_descriptor(descriptor, descriptors)?;
        match kind {
            // Its page map comes behind it.
            TrackerKind::Process => {
                check_descriptor(descriptor.saturating_add(1), descriptors)?;
            }
            TrackerKind::Bitmap => {
                for value in [region.into(), entry.first_page, entry.address, entry.pages] {
                    if value != 0 {
                        return Err(Malformed::Value {
                            what: "a field that a bitmap has not",
                            value,
                        });
                    }
                }
            }
        }
        entries.push(entry);
    }
    reader.end()?;
    Ok(entries)
}
