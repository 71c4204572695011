//! OUTCOME: how a session stands at the destination; the answer to a question.
//!
//! ```text
//!        0               4               8              12              16
//!       +---------------+---------------+-------------------------------+
//!     0 | state         | reserved      | reserved                      |
//!       +---------------+---------------+-------------------------------+
//! ```

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
    state: U32,
    reserved_a: U32,
    reserved_b: U64,
}

const _: () = assert!(size_of::<Raw>() == 16);

/// Where the guest is, as the destination knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OutcomeState {
    /// No commit has come, and from now on none is taken (code 1).
    NotCommitted,
    /// The commit has come; the guest does not run yet (code 2).
    CommittedNotRunning,
    /// The guest runs here (code 3).
    Running,
    /// The commit has come, but the guest could not be run (code 4).
    FailedAfterCommit,
}

impl OutcomeState {
    /// Every state, in the order of the codes.
    pub const ALL: &'static [Self] = &[
        Self::NotCommitted,
        Self::CommittedNotRunning,
        Self::Running,
        Self::FailedAfterCommit,
    ];

    /// The state that a code stands for.
    #[must_use]
    pub const fn from_u32(code: u32) -> Option<Self> {
        match code {
            1 => Some(Self::NotCommitted),
            2 => Some(Self::CommittedNotRunning),
            3 => Some(Self::Running),
            4 => Some(Self::FailedAfterCommit),
            _ => None,
        }
    }

    /// The code on the wire.
    #[must_use]
    pub const fn as_u32(self) -> u32 {
        match self {
            Self::NotCommitted => 1,
            Self::CommittedNotRunning => 2,
            Self::Running => 3,
            Self::FailedAfterCommit => 4,
        }
    }
}

/// How a session stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Where the guest is.
    pub state: OutcomeState,
}

impl Fixed for Outcome {
    type Raw = Raw;
    const KIND: Kind = Kind::Outcome;

    // SPEC: ASK-2
    fn from_raw(raw: &Raw, _: &Header) -> Result<Self, Malformed> {
        codec::reserved("outcome.reserved", u64::from(raw.reserved_a.get()))?;
        codec::reserved("outcome.reserved", raw.reserved_b.get())?;

        Ok(Self {
            state: OutcomeState::from_u32(raw.state.get()).ok_or(Malformed::Value {
                field: "outcome.state",
                value: u64::from(raw.state.get()),
            })?,
        })
    }

    fn to_raw(&self) -> Raw {
        Raw {
            state: U32::new(self.state.as_u32()),
            reserved_a: U32::ZERO,
            reserved_b: U64::ZERO,
        }
    }
}
