//! ABORT: the end of a session, with the reason, where it happened and a text for people.
//!
//! ```text
//!        0               4               8              12              16
//!       +---------------+---------------+---------------+---------------+
//!     0 | reason        | phase         | channel       | text_bytes    |
//!       +---------------+---------------+---------------+---------------+
//!    16 | text, text_bytes octets, not padded ...                       |
//!       +---------------------------------------------------------------+
//! ```

use zerocopy::byteorder::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::table::{self, Table};
use crate::code::{Phase, Reason};
use crate::codec;
use crate::error::{Malformed, Misuse};
use crate::header::Header;
use crate::id::ChannelRef;
use crate::kind::Kind;
use crate::limits::TEXT_BYTES_MAX;
use crate::text;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    reason: U32,
    phase: U32,
    channel: U32,
    text_bytes: U32,
}

const _: () = assert!(size_of::<Raw>() == 16);

/// Why and where a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abort<'a> {
    /// Why.
    pub reason: Reason,
    /// The phase that the sender of this frame was in.
    pub phase: Phase,
    /// The channel that it is about.
    pub channel: ChannelRef,
    /// More about it, at most [`TEXT_BYTES_MAX`] octets without control characters. [`Text::clip`](crate::Text::clip)
    /// makes one from any text.
    pub text: &'a str,
}

impl<'a> Table<'a> for Abort<'a> {
    // SPEC: ABORT-1, TEXT-1
    fn read(_: &Header, table: &'a [u8]) -> Result<Self, Malformed> {
        let (raw, octets) = codec::prefix::<Raw>(Kind::Abort, table)?;
        let (reason, phase, channel) = (raw.reason.get(), raw.phase.get(), raw.channel.get());
        let declared = u64::from(raw.text_bytes.get());
        let found = codec::wide(octets.len());
        if declared != found {
            return Err(Malformed::Count {
                field: "abort.text_bytes",
                declared,
                found,
            });
        }
        let refused = |field, value| Malformed::Value {
            field,
            value: u64::from(value),
        };
        Ok(Self {
            reason: Reason::from_u32(reason).ok_or(refused("abort.reason", reason))?,
            phase: Phase::from_u32(phase).ok_or(refused("abort.phase", phase))?,
            channel: ChannelRef::from_u32(channel).ok_or(refused("abort.channel", channel))?,
            text: text::read("abort.text", octets)?,
        })
    }

    fn bytes(&self) -> usize {
        size_of::<Raw>().saturating_add(self.text.len())
    }

    fn write(&self, out: &mut Vec<u8>) -> Result<(), Misuse> {
        let text_bytes = table::count(Kind::Abort, self.text.len(), TEXT_BYTES_MAX)?;
        let raw = Raw {
            reason: U32::new(self.reason.as_u32()),
            phase: U32::new(self.phase.as_u32()),
            channel: U32::new(self.channel.as_u32()),
            text_bytes: U32::new(text_bytes),
        };
        out.extend_from_slice(raw.as_bytes());
        out.extend_from_slice(self.text.as_bytes());
        Ok(())
    }
}
