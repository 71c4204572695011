//! COMMIT: the guest is the destination's; the source never runs it again by itself.
//!
//! ```text
//!        0               4               8              12              16
//!       +-------------------------------+
//!     0 | digest                        |
//!       +-------------------------------+
//! ```

use zerocopy::byteorder::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::table::Fixed;
use crate::digest::Digest;
use crate::error::Malformed;
use crate::header::Header;
use crate::kind::Kind;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Raw {
    digest: U64,
}

const _: () = assert!(size_of::<Raw>() == 8);

/// The guest changes hands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    /// The digest that both sides agreed on.
    pub digest: Digest,
}

impl Fixed for Commit {
    type Raw = Raw;
    const KIND: Kind = Kind::Commit;

    // SPEC: COMMIT-1
    fn from_raw(raw: &Raw, _: &Header) -> Result<Self, Malformed> {
        Ok(Self {
            digest: Digest::new(raw.digest.get()),
        })
    }

    fn to_raw(&self) -> Raw {
        Raw {
            digest: U64::new(self.digest.value()),
        }
    }
}
