//! RUNNING: the guest runs at the destination.
//!
//! ```text
//!        0               4               8              12              16
//!       +-------------------------------+-------------------------------+
//!     0 | resume_us                     | cpu_us                        |
//!       +-------------------------------+-------------------------------+
//!    16 | landed_bytes                  | reserved                      |
//!       +-------------------------------+-------------------------------+
//! ```

use zerocopy::byteorder::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::table::Fixed;
use crate::codec;
use crate::error::Malformed;
use crate::header::Header;
use crate::kind::Kind;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Raw {
    resume_us: U64,
    cpu_us: U64,
    landed_bytes: U64,
    reserved: U64,
}

const _: () = assert!(size_of::<Raw>() == 32);

/// The guest runs at the destination; the session is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Running {
    /// Microseconds from the commit to the guest's first instruction.
    pub resume_us: u64,
    /// Processor time that the destination used, in microseconds.
    pub cpu_us: u64,
    /// Octets of pages that landed.
    pub landed_bytes: u64,
}

impl Fixed for Running {
    type Raw = Raw;
    const KIND: Kind = Kind::Running;

    // SPEC: RUNNING-1
    fn from_raw(raw: &Raw, _: &Header) -> Result<Self, Malformed> {
        codec::reserved("running.reserved", raw.reserved.get())?;

        Ok(Self {
            resume_us: raw.resume_us.get(),
            cpu_us: raw.cpu_us.get(),
            landed_bytes: raw.landed_bytes.get(),
        })
    }

    fn to_raw(&self) -> Raw {
        Raw {
            resume_us: U64::new(self.resume_us),
            cpu_us: U64::new(self.cpu_us),
            landed_bytes: U64::new(self.landed_bytes),
            reserved: U64::ZERO,
        }
    }
}
