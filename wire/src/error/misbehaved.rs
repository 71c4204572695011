//! The peer is at fault: a legal frame at the wrong moment or about the wrong thing.

use crate::code::{Phase, Reason};
use crate::id::{ChannelRef, Round};
use crate::kind::{ChannelKind, Kind, Role};

/// A legal frame at a moment when, or about a thing of which, it is not allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Misbehaved {
    /// A frame came from a side or on a kind of channel where its kind does not travel.
    #[error("{kind} does not travel from the {from} on a {on} channel")]
    Direction {
        /// The frame's kind.
        kind: Kind,
        /// Who sent it.
        from: Role,
        /// What it came on.
        on: ChannelKind,
    },
    /// A frame's kind is not allowed in this phase.
    #[error("{kind} is not allowed in phase {phase}")]
    Phase {
        /// The frame's kind.
        kind: Kind,
        /// Where the session is.
        phase: Phase,
    },
    /// A kind that belongs to a feature that was not agreed on.
    #[error("{kind} needs a feature that was not agreed on")]
    Feature {
        /// The frame's kind.
        kind: Kind,
    },
    /// A frame is missing, doubled or out of order on its channel.
    #[error("frame {found} came where frame {expected} was due")]
    Sequence {
        /// The number that was due.
        expected: u64,
        /// The number in the header.
        found: u64,
    },
    /// A kind came twice, or before one that must precede it.
    #[error("{kind} is out of order")]
    Order {
        /// The frame's kind.
        kind: Kind,
    },
    /// A run names a region that the table does not have.
    #[error("a run names region {region}, which is not in the table")]
    UnknownRegion {
        /// The number in the run.
        region: u32,
    },
    /// A run reaches past its region's end.
    #[error("a run of {count} pages from page {first} reaches past the end of region {region}")]
    RunPastRegion {
        /// The run's region.
        region: u32,
        /// The run's first page.
        first: u64,
        /// The run's pages.
        count: u32,
    },
    /// A run without pages.
    #[error("a run in region {region} has no pages")]
    EmptyRun {
        /// The run's region.
        region: u32,
    },
    /// A frame belongs to a round that is over or has not begun.
    #[error("a frame of round {found} came in round {expected}")]
    Round {
        /// The round that is open on this lane.
        expected: Round,
        /// The round that the frame names.
        found: Round,
    },
    /// A frame names a lane, or an incarnation of one, that the session does not have.
    #[error("{channel} of incarnation {incarnation} is not known")]
    Lane {
        /// The lane.
        channel: ChannelRef,
        /// The incarnation that the frame names.
        incarnation: u32,
    },
    /// A frame names a device that the table does not have.
    #[error("device {device} is not in the table")]
    UnknownDevice {
        /// The number in the frame.
        device: u32,
    },
    /// A device's stream has a wrong index, offset, section or mark.
    #[error("device {device}: item {index} does not fit its stream: {rule}")]
    DeviceStream {
        /// The device.
        device: u32,
        /// The item's index in the device's stream.
        index: u64,
        /// The rule of SPEC.md that it breaks, and how.
        rule: &'static str,
    },
    /// A device chunk goes past the granted window.
    #[error("device {device}: octets up to {end} where {offset_max} were granted")]
    Credit {
        /// The device.
        device: u32,
        /// Where the chunk would end in the device's stream.
        end: u64,
        /// The end of what was granted.
        offset_max: u64,
    },
    /// An acknowledgement, give-back or count that does not match what was sent.
    #[error("{field} says {found} where {expected} is possible at most or was agreed on")]
    Amount {
        /// Structure and field.
        field: &'static str,
        /// What was agreed on or is possible.
        expected: u64,
        /// What the peer says.
        found: u64,
    },
    /// A set-up that is repeated on resume differs from the first.
    #[error("{kind} differs from the set-up that this session began with")]
    SetUpChanged {
        /// The kind of the frame that differs.
        kind: Kind,
    },
}

impl Misbehaved {
    /// A stable name for logs and reports.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Direction { .. } => "wire.misbehaved.direction",
            Self::Phase { .. } => "wire.misbehaved.phase",
            Self::Feature { .. } => "wire.misbehaved.feature",
            Self::Sequence { .. } => "wire.misbehaved.sequence",
            Self::Order { .. } => "wire.misbehaved.order",
            Self::UnknownRegion { .. } => "wire.misbehaved.unknown-region",
            Self::RunPastRegion { .. } => "wire.misbehaved.run-past-region",
            Self::EmptyRun { .. } => "wire.misbehaved.empty-run",
            Self::Round { .. } => "wire.misbehaved.round",
            Self::Lane { .. } => "wire.misbehaved.lane",
            Self::UnknownDevice { .. } => "wire.misbehaved.unknown-device",
            Self::DeviceStream { .. } => "wire.misbehaved.device-stream",
            Self::Credit { .. } => "wire.misbehaved.credit",
            Self::Amount { .. } => "wire.misbehaved.amount",
            Self::SetUpChanged { .. } => "wire.misbehaved.set-up-changed",
        }
    }

    /// What the peer is told.
    // SPEC: ERR-3
    #[must_use]
    pub const fn reason(&self) -> Reason {
        Reason::Misbehaved
    }
}
