//! GRANT: what the destination hands out when it accepts a control channel.
//!
//! ```text
//!        0               4               8              12              16
//!       +---------------------------------------------------------------+
//!     0 | ticket                                                        |
//!       +---------------------------------------------------------------+
//!    16 | resume_secret                                                 |
//!       +---------------+---------------+-------------------------------+
//!    32 | lanes_max     | suspend_ms    | device_window_bytes           |
//!       +---------------+---------------+-------------------------------+
//!    48 | reserved                                                      |
//!       +---------------------------------------------------------------+
//! ```

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::table::Fixed;
use crate::codec;
use crate::error::Malformed;
use crate::header::Header;
use crate::id::Token;
use crate::kind::Kind;
use crate::limits::LANES_MAX;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Raw {
    ticket: [u8; 16],
    resume_secret: [u8; 16],
    lanes_max: U32,
    suspend_ms: U32,
    device_window_bytes: U64,
    reserved: [u8; 16],
}

const _: () = assert!(size_of::<Raw>() == 64);

/// What the source needs to open data channels and to come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// What every data channel of this session must show; never none.
    pub ticket: Token,
    /// What a resume or a question about the outcome must show; never none.
    pub resume_secret: Token,
    /// The most data channels that the destination takes, 1 to [`LANES_MAX`].
    pub lanes_max: u32,
    /// How long the destination holds a session that lost its channels; 0 when it does not.
    pub suspend_ms: u32,
    /// The window that each device's stream begins with.
    pub device_window_bytes: u64,
}

impl Fixed for Grant {
    type Raw = Raw;
    const KIND: Kind = Kind::Grant;

    // SPEC: GRANT-1, GRANT-2
    fn from_raw(raw: &Raw, _: &Header) -> Result<Self, Malformed> {
        codec::reserved_octets("grant.reserved", &raw.reserved)?;
        codec::count("grant.lanes_max", raw.lanes_max.get(), 1, LANES_MAX)?;
        Ok(Self {
            ticket: token("grant.ticket", raw.ticket)?,
            resume_secret: token("grant.resume_secret", raw.resume_secret)?,
            lanes_max: raw.lanes_max.get(),
            suspend_ms: raw.suspend_ms.get(),
            device_window_bytes: raw.device_window_bytes.get(),
        })
    }

    fn to_raw(&self) -> Raw {
        Raw {
            ticket: self.ticket.value(),
            resume_secret: self.resume_secret.value(),
            lanes_max: U32::new(self.lanes_max),
            suspend_ms: U32::new(self.suspend_ms),
            device_window_bytes: U64::new(self.device_window_bytes),
            reserved: [0; 16],
        }
    }
}

/// A token that was really drawn.
fn token(field: &'static str, octets: [u8; 16]) -> Result<Token, Malformed> {
    let token = Token::new(octets);
    if token.is_none() {
        Err(Malformed::Value { field, value: 0 })
    } else {
        Ok(token)
    }
}
