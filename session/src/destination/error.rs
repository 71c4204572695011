//! What can end a migration at the destination, sorted by whose fault it is, with where it happened.

use multifd_wire::{Malformed, Misbehaved, Misuse, Reason};

use crate::common::{ChannelFault, DeviceError, Failure, VmmError};

/// Why a migration ended at the destination, when, and on which channel.
pub type Error = crate::common::Error<Fault>;

/// What went wrong, sorted by whose fault it is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The peer's bytes do not parse.
    #[error("the source sent bytes that do not parse as a frame: {0}")]
    Malformed(#[from] Malformed),
    /// Valid bytes at the wrong moment, or about things that do not exist.
    #[error("the source broke the protocol: {0}")]
    Misbehaved(#[from] Misbehaved),
    /// The source said something in a state that does not know it.
    #[error("the source broke the protocol: unexpected {what}")]
    OutOfTurn {
        /// What it said.
        what: String,
    },
    /// This program is at fault, and not the source.
    #[error("an error of this program: {what}; please report it")]
    Internal {
        /// What happened that can't.
        what: String,
    },
    /// A thread of this side does not come back: it is stuck in the embedder's code or in guest memory, or was killed.
    #[error("{thread} did not come back within {waited_ms} ms: it is abandoned")]
    ThreadStuck {
        /// Which one, and what it was to do.
        thread: String,
        /// How long it was waited for, in milliseconds.
        waited_ms: u128,
    },
    /// We tried to send what the format can't carry.
    #[error("the answer can't be put on the wire: {0}")]
    Misuse(#[from] Misuse),
    /// The link failed.
    #[error("{0}")]
    Channel(#[from] ChannelFault),
    /// Every data channel is gone.
    #[error("all data channels are lost; the last one failed with: {last}")]
    AllLanesLost {
        /// Why the last one died.
        last: String,
    },
    /// The embedder said no.
    #[error("the VMM could not {step}: {source}")]
    Vmm {
        /// What it was asked for.
        step: &'static str,
        /// Its reason.
        source: VmmError,
    },
    /// A device did not take its state, or did not get into the state of its own that was due.
    #[error("device {device} could not {step}: {source}")]
    Device {
        /// Its name.
        device: String,
        /// What it was asked for.
        step: &'static str,
        /// Its reason.
        source: DeviceError,
    },
    /// A device's own code does not return.
    #[error(
        "device {device} timed out after {waited_ms} ms when it was to {step}: it is abandoned; check its driver, or give it more time"
    )]
    DeviceStuck {
        /// Its name.
        device: String,
        /// What it was asked for.
        step: &'static str,
        /// How long ago, in milliseconds.
        waited_ms: u128,
    },
    /// The source broke the rules of a device's stream.
    #[error("the source broke the protocol: device {device}: {source}")]
    DeviceMisbehaved {
        /// Its name.
        device: String,
        /// Which rule, with the device's number and the item's.
        source: Misbehaved,
    },
    /// The source sends more of a device than this side is set to hold.
    #[error("device {device}: {what}: {wanted} exceeds the limit of {most}")]
    DeviceLimit {
        /// Its name.
        device: String,
        /// What.
        what: &'static str,
        /// How much the source wants.
        wanted: u64,
        /// The bound.
        most: u64,
    },
    /// The devices cannot be moved together, or are not the source's.
    #[error("the devices of the source can't be taken: {text}")]
    Devices {
        /// Why not.
        text: String,
    },
    /// The machine that the VMM built does not have the memory that the source described.
    #[error("the VMM built other memory than the source has: {text}")]
    MemoryDiffers {
        /// In what.
        text: String,
    },
    /// The machine's memory can't all be backed by pages.
    #[error("there is no room for the guest's memory: {text}")]
    NoRoom {
        /// What is short, and by how much.
        text: String,
    },
    /// The source wants more than this side is set to give.
    #[error("{what}: {wanted} exceeds the limit of {most}")]
    Limit {
        /// What.
        what: &'static str,
        /// How much the source wants.
        wanted: u64,
        /// The setting.
        most: u64,
    },
    /// The source ended the migration.
    #[error("the source ended it: {reason}: {text}")]
    PeerAborted {
        /// Its reason code.
        reason: Reason,
        /// Its words.
        text: String,
    },
    /// Nothing came in time.
    #[error("waited too long for {what}")]
    Timeout {
        /// For what.
        what: &'static str,
    },
    /// The user stopped it.
    #[error("cancelled")]
    Cancelled,
    /// The two sides do not have the same memory content. The guest was not started here.
    #[error("memory differs: digest {ours:016x} here, {theirs:016x} at the source")]
    DigestMismatch {
        /// The digest over all pages as landed.
        ours: u64,
        /// The digest over all pages as last sent.
        theirs: u64,
    },
    /// A source that came back described another machine than before.
    #[error("the source came back with {what} that differs from what it had")]
    SetupChanged {
        /// Which part of the set-up.
        what: &'static str,
    },
    /// The source lost contact after it sent its commit, which had not arrived when it asked: it takes the guest back.
    #[error("outcome queried before commit: the migration is aborted, the source keeps the guest")]
    AskedBeforeCommit,
    /// The operating system refused something: a thread, memory, random numbers.
    #[error("{step}: {source}")]
    System {
        /// What was asked of it.
        step: &'static str,
        /// Its answer.
        source: std::io::Error,
    },
}

impl Failure for Fault {
    fn code(&self) -> &'static str {
        match self {
            Self::Malformed(e) => e.code(),
            Self::Misbehaved(e) | Self::DeviceMisbehaved { source: e, .. } => e.code(),
            Self::OutOfTurn { .. } => "receiver.misbehaved.out-of-turn",
            Self::Internal { .. } => "receiver.internal",
            Self::ThreadStuck { .. } => "receiver.thread-stuck",
            Self::Misuse(e) => e.code(),
            Self::Channel(e) => e.code(),
            Self::AllLanesLost { .. } => "receiver.channel.all-lanes-lost",
            Self::Vmm { .. } => "receiver.vmm.refused",
            Self::MemoryDiffers { .. } => "receiver.vmm.memory-differs",
            Self::NoRoom { .. } => "receiver.no-room",
            Self::Device { .. } => "receiver.device.failed",
            Self::DeviceStuck { .. } => "receiver.device.stuck",
            Self::Devices { .. } => "receiver.device.refused",
            Self::Limit { .. } | Self::DeviceLimit { .. } => "receiver.limit",
            Self::PeerAborted { .. } => "receiver.peer.aborted",
            Self::Timeout { .. } => "receiver.timeout",
            Self::Cancelled => "receiver.cancelled",
            Self::DigestMismatch { .. } => "receiver.digest-mismatch",
            Self::SetupChanged { .. } => "receiver.misbehaved.setup-changed",
            Self::AskedBeforeCommit => "receiver.asked-before-commit",
            Self::System { .. } => "receiver.system",
        }
    }

    fn reason(&self) -> Reason {
        match self {
            Self::Malformed(e) => e.reason(),
            Self::Misbehaved(e) | Self::DeviceMisbehaved { source: e, .. } => e.reason(),
            Self::OutOfTurn { .. } => Reason::Misbehaved,
            Self::Misuse(e) => e.reason(),
            Self::Channel(_) | Self::AllLanesLost { .. } => Reason::ChannelsLost,
            Self::Vmm { .. } => Reason::VmmRefused,
            Self::MemoryDiffers { .. } => Reason::MemoryMismatch,
            Self::Device { .. } | Self::DeviceStuck { .. } | Self::Devices { .. } => {
                Reason::DeviceRefused
            }
            Self::Limit { .. } | Self::DeviceLimit { .. } | Self::NoRoom { .. } => {
                Reason::ResourceLimit
            }
            Self::PeerAborted { reason, .. } => *reason,
            Self::Timeout { .. } => Reason::Timeout,
            Self::Cancelled => Reason::Cancelled,
            Self::DigestMismatch { .. } => Reason::DigestMismatch,
            // SPEC: RESUME-5
            Self::SetupChanged { .. } => Reason::Misbehaved,
            Self::AskedBeforeCommit => Reason::ChannelsLost,
            Self::System { .. } | Self::Internal { .. } | Self::ThreadStuck { .. } => {
                Reason::Internal
            }
        }
    }

    fn malformed(&self) -> Option<&Malformed> {
        match self {
            Self::Malformed(error) => Some(error),
            _ => None,
        }
    }

    fn is_channel(&self) -> bool {
        matches!(self, Self::Channel(_))
    }
}
