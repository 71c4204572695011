//! Our own caller is at fault.

use super::Malformed;
use crate::code::Reason;
use crate::kind::Kind;

/// Our own caller asked for something that the format does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Misuse {
    /// The peer would refuse the octets.
    #[error("the peer would refuse this: {0}")]
    WouldBeRefused(#[from] Malformed),
    /// A list is longer than a frame of this kind holds.
    #[error("{kind}: {count} entries where {max} fit")]
    TooMany {
        /// The frame's kind.
        kind: Kind,
        /// Entries given.
        count: usize,
        /// Entries that fit.
        max: usize,
    },
    /// The body given does not belong to this kind of frame.
    #[error("{kind} does not take this kind of body")]
    Body {
        /// The frame's kind.
        kind: Kind,
    },
    /// A skipped frame cannot be encoded: its table is not known.
    #[error("a skipped frame cannot be encoded")]
    Skipped,
    /// A run outside the layout that it was asked of.
    #[error("a run of {count} pages from page {first} does not lie in region {region}")]
    Run {
        /// The region asked for.
        region: u32,
        /// The first page asked for.
        first: u64,
        /// The pages asked for.
        count: u32,
    },
    /// A text that is too long or holds control characters.
    #[error("a text of {bytes} octets is over {max} or holds control characters")]
    Text {
        /// Octets given.
        bytes: usize,
        /// Octets that fit.
        max: usize,
    },
    /// A blob that is too long.
    #[error("a blob of {bytes} octets is over {}", crate::limits::BLOB_BYTES_MAX)]
    Blob {
        /// Octets given.
        bytes: usize,
    },
}

impl Misuse {
    /// A stable name for logs and reports.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::WouldBeRefused(_) => "wire.misuse.would-be-refused",
            Self::TooMany { .. } => "wire.misuse.too-many",
            Self::Body { .. } => "wire.misuse.body",
            Self::Skipped => "wire.misuse.skipped",
            Self::Run { .. } => "wire.misuse.run",
            Self::Text { .. } => "wire.misuse.text",
            Self::Blob { .. } => "wire.misuse.blob",
        }
    }

    /// What the peer is told when the session has to end over it.
    #[must_use]
    pub const fn reason(&self) -> Reason {
        Reason::Internal
    }
}
