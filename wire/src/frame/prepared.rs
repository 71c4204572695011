//! PREPARED: the destination holds the guest and could run it.
//!
//! ```text
//!        0               4               8              12              16
//!       +-------------------------------+-------------------------------+
//!     0 | digest                        | wait_us                       |
//!       +-------------------------------+-------------------------------+
//!    16 | load_us                       | verify_us                     |
//!       +-------------------------------+-------------------------------+
//!    32 | reserved                      |
//!       +-------------------------------+
//! ```

use zerocopy::byteorder::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::table::Fixed;
use crate::codec;
use crate::digest::Digest;
use crate::error::Malformed;
use crate::header::Header;
use crate::kind::Kind;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Raw {
    digest: U64,
    wait_us: U64,
    load_us: U64,
    verify_us: U64,
    reserved: U64,
}

const _: () = assert!(size_of::<Raw>() == 40);

/// Everything is loaded and verified; only the commit is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prepared {
    /// The destination's digest, equal to that of FINAL.
    pub digest: Digest,
    /// Microseconds waited for the last data after FINAL.
    pub wait_us: u64,
    /// Microseconds spent loading devices and machine state.
    pub load_us: u64,
    /// Microseconds spent comparing.
    pub verify_us: u64,
}

impl Fixed for Prepared {
    type Raw = Raw;
    const KIND: Kind = Kind::Prepared;

    // SPEC: PREP-1
    fn from_raw(raw: &Raw, _: &Header) -> Result<Self, Malformed> {
        codec::reserved("prepared.reserved", raw.reserved.get())?;

        Ok(Self {
            digest: Digest::new(raw.digest.get()),
            wait_us: raw.wait_us.get(),
            load_us: raw.load_us.get(),
            verify_us: raw.verify_us.get(),
        })
    }

    fn to_raw(&self) -> Raw {
        Raw {
            digest: U64::new(self.digest.value()),
            wait_us: U64::new(self.wait_us),
            load_us: U64::new(self.load_us),
            verify_us: U64::new(self.verify_us),
            reserved: U64::ZERO,
        }
    }
}
