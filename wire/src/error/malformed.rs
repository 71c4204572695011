//! The peer's octets, or the link, are at fault: octets that no correct peer sends.

use super::LayoutError;
use crate::code::Reason;
use crate::kind::Kind;

/// Octets that the format does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// The first octets are not the magic: the peer speaks something else.
    #[error("{structure} does not begin with the magic of this protocol")]
    Magic {
        /// The structure that was expected.
        structure: &'static str,
    },
    /// The checksum of a hello or its reply does not match.
    #[error("{structure}: checksum {found:#010x} where the octets give {computed:#010x}")]
    HelloCrc {
        /// Hello or reply.
        structure: &'static str,
        /// What the octets say.
        found: u32,
        /// What was computed over them.
        computed: u32,
    },
    /// The checksum of a frame's header does not match; no field of it may be used.
    #[error("frame header: checksum {found:#010x} where the octets give {computed:#010x}")]
    HeaderCrc {
        /// What the octets say.
        found: u32,
        /// What was computed over them.
        computed: u32,
    },
    /// The checksum of a frame's table does not match.
    #[error("{kind} table: checksum {found:#010x} where the octets give {computed:#010x}")]
    TableCrc {
        /// The frame's kind.
        kind: Kind,
        /// What the header says.
        found: u32,
        /// What was computed over the table.
        computed: u32,
    },
    /// The checksum of a frame's body does not match.
    #[error("{kind} body: checksum {found:#010x} where the octets give {computed:#010x}")]
    BodyCrc {
        /// The frame's kind.
        kind: Kind,
        /// What the header says.
        found: u32,
        /// What was computed over the body.
        computed: u32,
    },
    /// A reserved field or bit is not zero.
    #[error("{field} is reserved and must be zero")]
    Reserved {
        /// Structure and field.
        field: &'static str,
    },
    /// A mandatory frame kind that this version does not know.
    #[error("frame kind {code:#06x} is not known and is not marked optional")]
    UnknownKind {
        /// The kind's code.
        code: u16,
    },
    /// The table is shorter or longer than its kind allows.
    #[error("{kind}: a table of {bytes} octets is not between {min} and {max} in steps of {step}")]
    TableBytes {
        /// The frame's kind.
        kind: Kind,
        /// Octets that were declared or given.
        bytes: usize,
        /// The shortest table of this kind.
        min: usize,
        /// The longest table of this kind.
        max: usize,
        /// Lengths of this kind differ by multiples of this.
        step: usize,
    },
    /// The body is shorter or longer than its kind, or its own table, allows.
    #[error("{kind}: a body of {bytes} octets is not between {min} and {max}")]
    BodyBytes {
        /// The frame's kind.
        kind: Kind,
        /// Octets that were declared or given.
        bytes: usize,
        /// The shortest body here.
        min: usize,
        /// The longest body here.
        max: usize,
    },
    /// A field has a value that is not allowed.
    #[error("{field} may not be {value:#x}")]
    Value {
        /// Structure and field.
        field: &'static str,
        /// What the octets say.
        value: u64,
    },
    /// Two statements about the same number disagree.
    #[error("{field} is {declared}, but the frame holds {found}")]
    Count {
        /// Structure and field.
        field: &'static str,
        /// What the field says.
        declared: u64,
        /// What the rest of the frame gives.
        found: u64,
    },
    /// A text is not UTF-8, holds a control character, or is not followed by zeros.
    #[error("{field} is not clean text")]
    Text {
        /// Structure and field.
        field: &'static str,
    },
    /// A region table that does not describe memory.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

impl Malformed {
    /// A stable name for logs, reports and test vectors.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Magic { .. } => "wire.malformed.magic",
            Self::HelloCrc { .. } => "wire.malformed.hello-crc",
            Self::HeaderCrc { .. } => "wire.malformed.header-crc",
            Self::TableCrc { .. } => "wire.malformed.table-crc",
            Self::BodyCrc { .. } => "wire.malformed.body-crc",
            Self::Reserved { .. } => "wire.malformed.reserved",
            Self::UnknownKind { .. } => "wire.malformed.unknown-kind",
            Self::TableBytes { .. } => "wire.malformed.table-bytes",
            Self::BodyBytes { .. } => "wire.malformed.body-bytes",
            Self::Value { .. } => "wire.malformed.value",
            Self::Count { .. } => "wire.malformed.count",
            Self::Text { .. } => "wire.malformed.text",
            Self::Layout(error) => error.code(),
        }
    }

    /// What a checksum or the magic found to be other octets than were sent, by name: a frame's kind; `header` where
    /// the kind itself can't be trusted; a hello or its reply. `None` if the octets are as they were sent, as far as can be told.
    #[must_use]
    pub const fn damaged(&self) -> Option<&'static str> {
        match self {
            Self::Magic { structure } | Self::HelloCrc { structure, .. } => Some(structure),
            Self::HeaderCrc { .. } => Some("header"),
            Self::TableCrc { kind, .. } | Self::BodyCrc { kind, .. } => Some(kind.name()),
            _ => None,
        }
    }

    /// What the peer is told.
    // SPEC: ERR-2
    #[must_use]
    pub const fn reason(&self) -> Reason {
        match self {
            Self::HelloCrc { .. }
            | Self::HeaderCrc { .. }
            | Self::TableCrc { .. }
            | Self::BodyCrc { .. } => Reason::Corruption,
            Self::UnknownKind { .. } => Reason::Incompatible,
            _ => Reason::Malformed,
        }
    }
}
