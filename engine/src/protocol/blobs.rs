//! Configuration and state, as blobs: a table in the message, their bytes in a file that comes with it.
//!
//! ```text
//!   count u32 | 0 u32 | count × { kind u32 | version u32 | offset u64 | bytes u64 }      the last descriptor is the file, if count > 0
//! ```
//! In a file, because a state has megabytes and a message has not; a memfd as a rule.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;

use multifd::Blob;
use rustix::fs::{MemfdFlags, memfd_create};

use super::{Malformed, Reader, Writer};

/// The most blobs, which is also the stream's limit.
pub(super) const BLOBS_MAX: usize = 64;

/// The longest blob, which is also the stream's limit.
pub(super) const BLOB_BYTES_MAX: u64 = 16 << 20;

/// All of a message together: what a destination takes unless it is told otherwise.
pub(super) const BLOBS_BYTES_MAX: u64 = 64 << 20;

/// Where a blob is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobEntry {
    /// What it is, in the VMM's numbering.
    pub kind: u32,
    /// Which encoding of it, in the VMM's numbering.
    pub version: u32,
    /// Where it begins in the file.
    pub offset: u64,
    /// Its size.
    pub bytes: u64,
}

/// Writes the table, in a body that may have begun, and the file.
///
/// # Errors
/// No file could be made.
pub fn write_blobs(out: &mut Writer, blobs: &[Blob]) -> std::io::Result<Option<OwnedFd>> {
    out.count(blobs.len());
    if blobs.is_empty() {
        return Ok(None);
    }
    let file = memfd_create("multifd-blobs", MemfdFlags::CLOEXEC)?;
    let mut file = File::from(file);
    let mut offset = 0;
    for blob in blobs {
        let bytes = blob.bytes.len() as u64;
        out.u32(blob.kind);
        out.u32(blob.version);
        out.u64(offset);
        out.u64(bytes);
        offset += bytes;
        file.write_all(&blob.bytes)?;
    }
    Ok(Some(file.into()))
}

/// Reads the rest of a body as a table of blobs, and the blobs from the file.
///
/// # Errors
/// They are none, or the file is none.
pub fn read_blobs(
    mut reader: Reader<'_>,
    files: &mut Vec<OwnedFd>,
) -> Result<Vec<Blob>, Malformed> {
    let entries = read_table(&mut reader)?;
    reader.end()?;
    if entries.is_empty() {
        return Ok(Vec::new());
    }
    let file = files
        .pop()
        .ok_or(Malformed::Descriptor { index: 0, count: 0 })?;
    let file = File::from(file);
    let unusable = |error: std::io::Error| Malformed::File(error.to_string());
    let of = file.metadata().map_err(unusable)?;
    // Reading a pipe or a device could last for ever.
    if !of.is_file() {
        return Err(Malformed::File("blobs are in a regular file".to_owned()));
    }
    let mut blobs = Vec::new();
    for entry in entries {
        let BlobEntry { offset, bytes, .. } = entry;
        let end = offset.checked_add(bytes);
        if end.is_none_or(|end| end > of.len()) {
            let file_bytes = of.len();
            return Err(Malformed::OutsideFile {
                offset,
                bytes,
                file_bytes,
            });
        }
        // `read_table` has compared it with its limit.
        let mut content = vec![0; usize::try_from(bytes).unwrap_or(0)];
        file.read_exact_at(&mut content, offset).map_err(unusable)?;
        blobs.push(Blob::new(entry.kind, entry.version, content));
    }
    Ok(blobs)
}

fn read_table(reader: &mut Reader<'_>) -> Result<Vec<BlobEntry>, Malformed> {
    let count = reader.count("blobs", BLOBS_MAX)?;
    let mut entries = Vec::new();
    let mut sum = 0;
    for _ in 0..count {
        let entry = BlobEntry {
            kind: reader.u32()?,
            version: reader.u32()?,
            offset: reader.u64()?,
            bytes: reader.u64()?,
        };
        let too_many = |count, max| Malformed::Count {
            what: "bytes of blobs",
            count,
            max,
        };
        if entry.bytes > BLOB_BYTES_MAX {
            return Err(too_many(entry.bytes, BLOB_BYTES_MAX));
        }
        sum += entry.bytes;
        if sum > BLOBS_BYTES_MAX {
            return Err(too_many(sum, BLOBS_BYTES_MAX));
        }
        entries.push(entry);
    }
    Ok(entries)
}
