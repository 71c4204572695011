//! FINAL: all that belongs to the guest has been sent; what it must amount to.
//!
//! ```text
//!        0               4               8              12              16
//!       +---------------+---------------+-------------------------------+
//!     0 | final_round   | states        | digest                        |
//!       +---------------+---------------+-------------------------------+
//!    16 | memory_pages                  | reserved                      |
//!       +-------------------------------+-------------------------------+
//!    32 | reserved                      |
//!       +-------------------------------+
//! ```

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::table::Fixed;
use crate::codec;
use crate::digest::Digest;
use crate::error::Malformed;
use crate::header::Header;
use crate::id::Round;
use crate::kind::Kind;
use crate::limits::{BLOBS_MAX, MEMORY_PAGES_MAX};

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Raw {
    final_round: U32,
    states: U32,
    digest: U64,
    memory_pages: U64,
    reserved_a: U64,
    reserved_b: U64,
}

const _: () = assert!(size_of::<Raw>() == 40);

/// What the destination must hold before it may be prepared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Final {
    /// The last round, that of the newest SWITCHOVER.
    pub final_round: Round,
    /// VM_STATE blobs sent.
    pub states: u32,
    /// The source's digest of memory.
    pub digest: Digest,
    /// Pages in all regions, at least 1.
    pub memory_pages: u64,
}

impl Fixed for Final {
    type Raw = Raw;
    const KIND: Kind = Kind::Final;

    // SPEC: FINAL-1
    fn from_raw(raw: &Raw, _: &Header) -> Result<Self, Malformed> {
        codec::count("final.states", raw.states.get(), 0, BLOBS_MAX)?;
        codec::between(
            "final.memory_pages",
            raw.memory_pages.get(),
            1,
            MEMORY_PAGES_MAX,
        )?;
        codec::reserved("final.reserved", raw.reserved_a.get())?;
        codec::reserved("final.reserved", raw.reserved_b.get())?;

        Ok(Self {
            final_round: codec::round("final.final_round", raw.final_round.get())?,
            states: raw.states.get(),
            digest: Digest::new(raw.digest.get()),
            memory_pages: raw.memory_pages.get(),
        })
    }

    fn to_raw(&self) -> Raw {
        Raw {
            final_round: U32::new(self.final_round.value()),
            states: U32::new(self.states),
            digest: U64::new(self.digest.value()),
            memory_pages: U64::new(self.memory_pages),
            reserved_a: U64::ZERO,
            reserved_b: U64::ZERO,
        }
    }
}
