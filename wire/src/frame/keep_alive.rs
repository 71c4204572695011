//! KEEP_ALIVE: a sign of life on a control channel that has nothing else to say.
//!
//! ```text
//!        0               4               8              12              16
//!       +-------------------------------+-------------------------------+
//!     0 | stamp_us                      | echo_us                       |
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
    stamp_us: U64,
    echo_us: U64,
}

const _: () = assert!(size_of::<Raw>() == 16);

/// A sign of life, with what is needed to measure the round trip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeepAlive {
    /// The sender's own clock in microseconds, not 0; means nothing to the reader.
    pub stamp_us: u64,
    /// The newest stamp that was received from the peer; 0 when there was none.
    pub echo_us: u64,
}

impl Fixed for KeepAlive {
    type Raw = Raw;
    const KIND: Kind = Kind::KeepAlive;

    // SPEC: ALIVE-1
    fn from_raw(raw: &Raw, _: &Header) -> Result<Self, Malformed> {
        codec::between("keep_alive.stamp_us", raw.stamp_us.get(), 1, u64::MAX)?;

        Ok(Self {
            stamp_us: raw.stamp_us.get(),
            echo_us: raw.echo_us.get(),
        })
    }

    fn to_raw(&self) -> Raw {
        Raw {
            stamp_us: U64::new(self.stamp_us),
            echo_us: U64::new(self.echo_us),
        }
    }
}
