//! The table that CONFIG and VM_STATE share: one part of a blob that means something only to the machine monitor.
//!
//! ```text
//!        0               4               8              12              16
//!       +---------------+---------------+---------------+---------------+
//!     0 | blob_kind     | version       | index         | part          |
//!       +---------------+---------------+---------------+---------------+
//!    16 | blob_bytes                    | reserved                      |
//!       +-------------------------------+-------------------------------+
//! ```
//!
//! Every part but the last is as long as a body can be, so a part's place in its blob needs no field and a blob has one
//! encoding.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::codec;
use crate::error::{Malformed, Misuse};
use crate::header::Header;
use crate::limits::{BLOB_BYTES_MAX, BLOBS_MAX, BODY_BYTES_MAX, BODY_BYTES_MAX_U64};

/// The octets of the table.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Raw {
    blob_kind: U32,
    version: U32,
    index: U32,
    part: U32,
    blob_bytes: U64,
    reserved: U64,
}

const _: () = assert!(size_of::<Raw>() == 32);

/// Which part of which blob a body is. Source: SPEC, section "CONFIG".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlobPart {
    /// What the blob is; the machine monitor's own numbers.
    pub kind: u32,
    /// The version of the blob's inside; the machine monitor's own numbers.
    pub version: u32,
    /// The 0-based place of the blob among those of its frame kind.
    pub index: u32,
    /// The 0-based place of this part in its blob.
    pub part: u32,
    /// The size of the whole blob in octets.
    pub blob_bytes: u64,
}

impl BlobPart {
    /// Where this part begins in its blob.
    #[must_use]
    pub fn offset(&self) -> u64 {
        u64::from(self.part).saturating_mul(BODY_BYTES_MAX_U64)
    }

    /// The size of this part: a full body, or what is left of the blob.
    #[must_use]
    pub fn part_bytes(&self) -> u64 {
        self.blob_bytes
            .saturating_sub(self.offset())
            .min(BODY_BYTES_MAX_U64)
    }

    /// Whether this part is the last of its blob.
    #[must_use]
    pub fn is_last(&self) -> bool {
        self.offset().saturating_add(self.part_bytes()) >= self.blob_bytes
    }

    /// Checks the values and that the body is as long as this part is.
    // SPEC: BLOB-1, BLOB-2, BLOB-3
    pub(super) fn from_raw(raw: &Raw, header: &Header) -> Result<Self, Malformed> {
        codec::reserved("blob.reserved", raw.reserved.get())?;
        codec::count(
            "blob.index",
            raw.index.get(),
            0,
            BLOBS_MAX.saturating_sub(1),
        )?;
        codec::between("blob.blob_bytes", raw.blob_bytes.get(), 0, BLOB_BYTES_MAX)?;
        let part = Self {
            kind: raw.blob_kind.get(),
            version: raw.version.get(),
            index: raw.index.get(),
            part: raw.part.get(),
            blob_bytes: raw.blob_bytes.get(),
        };
        if part.part > 0 && part.part_bytes() == 0 {
            return Err(Malformed::Value {
                field: "blob.part",
                value: u64::from(part.part),
            });
        }
        let found = header.body_bytes();
        if codec::wide(found) != part.part_bytes() {
            let bytes = usize::try_from(part.part_bytes()).unwrap_or(BODY_BYTES_MAX);
            return Err(header.kind().body_error(found, bytes, bytes));
        }
        Ok(part)
    }

    /// The octets.
    pub(super) fn to_raw(self) -> Raw {
        Raw {
            blob_kind: U32::new(self.kind),
            version: U32::new(self.version),
            index: U32::new(self.index),
            part: U32::new(self.part),
            blob_bytes: U64::new(self.blob_bytes),
            reserved: U64::ZERO,
        }
    }
}

/// Cuts a blob into the parts that travel, each with its body; an empty blob has one part without octets.
///
/// # Errors
/// [`Misuse::Blob`] when the blob is longer than [`BLOB_BYTES_MAX`].
pub fn blob_parts(
    kind: u32,
    version: u32,
    index: u32,
    blob: &[u8],
) -> Result<impl Iterator<Item = (BlobPart, &[u8])>, Misuse> {
    let blob_bytes = codec::wide(blob.len());
    if blob_bytes > BLOB_BYTES_MAX {
        return Err(Misuse::Blob { bytes: blob.len() });
    }
    let empty = blob.is_empty().then_some(blob);
    let bodies = empty.into_iter().chain(blob.chunks(BODY_BYTES_MAX));
    Ok(bodies.zip(0_u32..).map(move |(body, part)| {
        (
            BlobPart {
                kind,
                version,
                index,
                part,
                blob_bytes,
            },
            body,
        )
    }))
}
