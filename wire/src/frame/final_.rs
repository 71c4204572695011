//! FINAL: all that belongs to the guest has been sent; what it must amount to.
//!
//! ```text
//!        0               4               8              12              16
//!       +---------------+---------------+-------------------------------+
//!     0 | final_round   | states        | digest                        |
//!       +---------------+---------------+-------------------------------+
//!    16 | memory_pages                  | reserved                      |
//!       +---------------+---------------+-------------------------------+
//!    32 | guest         | reserved      |
//!       +---------------+---------------+
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
    guest: U32,
    reserved_b: U32,
}

const _: () = assert!(size_of::<Raw>() == 40);

/// What the guest was at the source when the switchover began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum GuestState {
    /// It ran (code 0): it runs at the destination.
    #[default]
    Running,
    /// Its user had paused it (code 1): it arrives paused.
    Paused,
}

impl GuestState {
    /// The state that a code stands for.
    #[must_use]
    pub const fn from_u32(code: u32) -> Option<Self> {
        match code {
            0 => Some(Self::Running),
            1 => Some(Self::Paused),
            _ => None,
        }
    }

    /// The code on the wire.
    #[must_use]
    pub const fn as_u32(self) -> u32 {
        match self {
            Self::Running => 0,
            Self::Paused => 1,
        }
    }
}

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
    /// Whether the guest runs once it has arrived. [`GuestState::Paused`] only with [`Features::PAUSED`](crate::Features::PAUSED).
    pub guest: GuestState,
}

impl Fixed for Final {
    type Raw = Raw;
    const KIND: Kind = Kind::Final;

    // SPEC: FINAL-1, FINAL-6
    fn from_raw(raw: &Raw, _: &Header) -> Result<Self, Malformed> {
        codec::count("final.states", raw.states.get(), 0, BLOBS_MAX)?;
        codec::between(
            "final.memory_pages",
            raw.memory_pages.get(),
            1,
            MEMORY_PAGES_MAX,
        )?;
        codec::reserved("final.reserved", raw.reserved_a.get())?;
        codec::reserved("final.reserved", u64::from(raw.reserved_b.get()))?;

        Ok(Self {
            final_round: codec::round("final.final_round", raw.final_round.get())?,
            states: raw.states.get(),
            digest: Digest::new(raw.digest.get()),
            memory_pages: raw.memory_pages.get(),
            guest: GuestState::from_u32(raw.guest.get()).ok_or(Malformed::Value {
                field: "final.guest",
                value: u64::from(raw.guest.get()),
            })?,
        })
    }

    fn to_raw(&self) -> Raw {
        Raw {
            final_round: U32::new(self.final_round.value()),
            states: U32::new(self.states),
            digest: U64::new(self.digest.value()),
            memory_pages: U64::new(self.memory_pages),
            reserved_a: U64::ZERO,
            guest: U32::new(self.guest.as_u32()),
            reserved_b: U32::ZERO,
        }
    }
}
