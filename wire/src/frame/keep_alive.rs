//! KEEP_ALIVE: a sign of life on a control channel that has nothing else to say, and what measures its round trip.
//!
//! ```text
//!        0               4               8              12              16
//!       +-------------------------------+-------------------------------+
//!     0 | stamp_us                      | echo_us                       |
//!       +-------------------------------+---------------+---------------+
//!    16 | held_us                       | flags         | reserved      |
//!       +-------------------------------+---------------+---------------+
//! ```
//!
//! Who sends which, and what is made of an echo, is [`Pulse`](crate::Pulse)'s work.

use zerocopy::byteorder::little_endian::{U32, U64};
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
    held_us: U64,
    flags: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<Raw>() == 32);

/// Bit 0 of flags: the reader answers at once.
const ASKS: u32 = 1;

/// A sign of life, with what is needed to measure the round trip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeepAlive {
    /// The sender's own clock in microseconds, not 0; means nothing to the reader.
    pub stamp_us: u64,
    /// The newest stamp that was read from the peer on this channel; 0 when there was none.
    pub echo_us: u64,
    /// How long ago that was; 0 when there was none.
    pub held_us: u64,
    /// Whether the reader is asked to answer.
    pub asks: Asks,
}

/// Whether a KEEP_ALIVE wants an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asks {
    /// The reader sends a KEEP_ALIVE at once, and that one asks nothing.
    Answer,
    /// It only says that the sender lives, or it is the answer.
    Nothing,
}

impl Fixed for KeepAlive {
    type Raw = Raw;
    const KIND: Kind = Kind::KeepAlive;

    // SPEC: ALIVE-1, ALIVE-4
    fn from_raw(raw: &Raw, _: &Header) -> Result<Self, Malformed> {
        codec::between("keep_alive.stamp_us", raw.stamp_us.get(), 1, u64::MAX)?;
        let held_max = if raw.echo_us.get() == 0 { 0 } else { u64::MAX };
        codec::between("keep_alive.held_us", raw.held_us.get(), 0, held_max)?;
        codec::reserved("keep_alive.flags", u64::from(raw.flags.get() & !ASKS))?;
        codec::reserved("keep_alive.reserved", u64::from(raw.reserved.get()))?;
        Ok(Self {
            stamp_us: raw.stamp_us.get(),
            echo_us: raw.echo_us.get(),
            held_us: raw.held_us.get(),
            asks: match raw.flags.get() & ASKS {
                0 => Asks::Nothing,
                _ => Asks::Answer,
            },
        })
    }

    fn to_raw(&self) -> Raw {
        Raw {
            stamp_us: U64::new(self.stamp_us),
            echo_us: U64::new(self.echo_us),
            held_us: U64::new(self.held_us),
            flags: U32::new(match self.asks {
                Asks::Answer => ASKS,
                Asks::Nothing => 0,
            }),
            reserved: U32::ZERO,
        }
    }
}
