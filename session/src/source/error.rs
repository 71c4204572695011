//! What can end a migration at the source, sorted by whose fault it is, with where it happened and what to do.

use std::time::Duration;

use multifd_wire::error::LayoutError;
use multifd_wire::{Incompatible, Malformed, Misbehaved, Misuse, Reason};

use crate::common::{ChannelFault, DeviceError, Failure, VmmError};
use crate::source::forecast::Forecast;

/// Why a migration ended at the source, when, and on which channel.
pub type Error = crate::common::Error<Fault>;

/// What went wrong, sorted by whose fault it is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The peer's bytes do not parse.
    #[error("the destination sent bytes that do not parse as a frame: {0}")]
    Malformed(#[from] Malformed),
    /// Valid bytes at the wrong moment, or about things that do not exist.
    #[error("the destination broke the protocol: {0}")]
    Misbehaved(#[from] Misbehaved),
    /// The peer said something in a state that does not know it.
    #[error("the destination broke the protocol: unexpected {what}")]
    OutOfTurn {
        /// The event.
        what: String,
    },
    /// A bug of ours: an event that the session did not ask for, or two of our own that disagree.
    #[error("internal error: {what}; this is a bug of the source, not of its peer")]
    Internal {
        /// What.
        what: String,
    },
    /// A thread of this side does not come back: it is stuck in the embedder's code or in guest memory, or was killed.
    #[error(
        "{thread} did not come back within {waited_ms} ms: it is left alone, and what it has stays with it"
    )]
    ThreadStuck {
        /// Which one, and what it was to do.
        thread: String,
        /// How long it was waited for, in milliseconds.
        waited_ms: u128,
    },
    /// No version or feature in common.
    #[error("no protocol version or feature set in common: {0}")]
    Incompatible(#[from] Incompatible),
    /// Our caller asked for something that can't be encoded.
    #[error("the request can't be put on the wire: {0}")]
    Misuse(#[from] Misuse),
    /// The link failed.
    #[error("{0}")]
    Channel(#[from] ChannelFault),
    /// No connection could be made.
    #[error("could not connect: {0}")]
    Dial(String),
    /// Somebody takes connections there, and says nothing that a destination says.
    #[error("no multifd-receive answers at {at}: {why}{}", perhaps(why))]
    NoAnswer {
        /// The channel.
        at: String,
        /// What came instead of an answer.
        why: Box<Fault>,
    },
    /// The guest's memory is none that can be moved: our caller's regions.
    #[error("this guest's memory can't be moved: {0}")]
    Memory(LayoutError),
    /// Every data channel is gone.
    #[error("all data channels are lost; the last one failed with: {last}")]
    AllLanesLost {
        /// Why the last one died.
        last: String,
    },
    /// The destination closed a data channel.
    #[error("the destination closed the data channel: {reason}")]
    LaneDown {
        /// Its reason code.
        reason: Reason,
    },
    /// Channels are opened again and again, and nothing of what is sent on them is acknowledged.
    #[error(
        "nothing was acknowledged for {waited_ms} ms although the channels were opened again {losses} times ({last}): small packets pass \
         and large ones do not, which is what a path does whose MTU is smaller than the hosts believe; check the MTU and whether ICMP is filtered"
    )]
    NothingTaken {
        /// For how long, in milliseconds.
        waited_ms: u128,
        /// Channels that were lost meanwhile.
        losses: u32,
        /// What happened last.
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
    /// A device did not give its state, or did not get into the state of its own that was due.
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
    /// The devices cannot be moved together.
    #[error("the devices can't be moved: {text}")]
    Devices {
        /// Why not.
        text: String,
    },
    /// Devices did not have their initial bytes loaded in time, and the user chose to give up then.
    #[error(
        "waited {waited_ms} ms for the destination to load the initial bytes of {devices}: give it more time, or let it go on without"
    )]
    AckDeadline {
        /// Their names.
        devices: String,
        /// How long, in milliseconds.
        waited_ms: u128,
    },
    /// A source of dirty pages failed.
    #[error("dirty tracking failed: {0}")]
    Tracking(String),
    /// The debug scan found memory that differs from what was sent although no source of dirty pages reported a write.
    #[error(
        "memory was written behind the sources of dirty pages: {0}. Whoever writes guest memory has to mark it, after the \
         write (multifd_tracking::VmmMarker), or be tracked by a source"
    )]
    Unreported(String),
    /// The destination refused the connection.
    #[error("the destination refused: {reason}: {text}")]
    Refused {
        /// Its reason code.
        reason: Reason,
        /// Its words.
        text: String,
    },
    /// The destination ended the migration.
    #[error("the destination ended it: {reason}: {text}")]
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
    /// The guest shut down or crashed at the source: there is nothing to move any more.
    #[error("the guest has shut down or crashed at the source")]
    GuestGone,
    /// The user stopped it.
    #[error("cancelled")]
    Cancelled,
    /// The guest dirties memory faster than it can be moved.
    #[error(
        "not converging after {rounds} rounds: the downtime would be {predicted_ms} ms, the limit is {limit_ms} ms; {advice}"
    )]
    NotConverging {
        /// Live rounds made.
        rounds: u32,
        /// What a switchover now would cost, in milliseconds.
        predicted_ms: u128,
        /// The user's limit, in milliseconds.
        limit_ms: u128,
        /// What would help.
        advice: String,
    },
    /// The two sides do not have the same memory content. The guest was not started at the destination.
    #[error("memory differs: digest {ours:016x} here, {theirs:016x} at the destination")]
    DigestMismatch {
        /// The digest over all pages as last sent.
        ours: u64,
        /// The digest over all pages as landed.
        theirs: u64,
    },
    /// Pages keep being damaged or lost on the way.
    #[error("{pages} pages still missing after {rounds} repair rounds: the link damages data")]
    Unrepairable {
        /// Pages still missing.
        pages: u64,
        /// Repairs tried.
        rounds: u32,
    },
    /// The link did not come back in time.
    #[error(
        "the destination could not be reached again within {within_ms} ms; the link was lost because: {why}"
    )]
    NotReconnected {
        /// How long it was tried, in milliseconds.
        within_ms: u128,
        /// Why the link was lost.
        why: String,
    },
    /// The destination answers, but does not know this migration: its process was restarted, or it had waited long enough.
    #[error(
        "the destination no longer has this migration ({reason}: {text}); it has to begin again from the start"
    )]
    DestinationLost {
        /// Its reason code.
        reason: Reason,
        /// Its words.
        text: String,
    },
    /// The commit was sent, and the destination did not say in time what came of it.
    #[error("outcome unknown ({why}): check the destination before resuming the guest anywhere")]
    OutcomeUnknown {
        /// Why nothing more was heard.
        why: String,
    },
    /// The commit did not arrive, and the destination takes none any more.
    #[error(
        "the destination was not committed and never will be; the link was lost because: {why}"
    )]
    NotCommitted {
        /// Why the link was lost.
        why: String,
    },
    /// The destination owns the guest and could not run it.
    #[error(
        "the destination took the guest over and could not run it: it is loaded there and paused"
    )]
    FailedAfterCommit,
    /// What was lost with a data channel is missing in what the destination loaded.
    #[error(
        "the destination prepared the guest before what a lost data channel had carried of a device's state came again"
    )]
    PreparedTooEarly,
    /// The operating system refused something: a thread, memory, random numbers.
    #[error("{step}: {source}")]
    System {
        /// What was asked of it.
        step: &'static str,
        /// Its answer.
        source: std::io::Error,
    },
}

impl Fault {
    /// The destination does not know the ticket that a channel showed.
    pub(super) fn is_bad_ticket(&self) -> bool {
        matches!(self, Self::Refused { reason, .. } if *reason == Reason::BadTicket)
    }

    /// Of a frame that could not be sent: whether the destination can have none of it.
    pub fn sent_nothing(&self) -> bool {
        matches!(self, Self::Channel(error) if error.sent_nothing())
    }

    pub(super) fn not_converging(
        rounds: u32,
        predicted: Duration,
        limit: Duration,
        outlook: Option<Forecast>,
    ) -> Self {
        let advice = match outlook {
            Some(Forecast::Diverges {
                bandwidth_needed,
                throttle_percent,
                downtime,
            }) => {
                let bandwidth = bandwidth_needed.map(|needed| {
                    format!(
                        "{} MiB/s would make it converge, or ",
                        needed.div_ceil(1 << 20)
                    )
                });
                let throttle = throttle_percent
                    .map(|percent| format!("holding back {percent} % of the guest's writes, or "));
                let (bandwidth, throttle) =
                    (bandwidth.unwrap_or_default(), throttle.unwrap_or_default());
                format!(
                    "{bandwidth}{throttle}a limit of {} ms",
                    downtime.as_millis() + 1
                )
            }
            Some(Forecast::Converges { rounds, within, .. }) => {
                format!(
                    "{rounds} more rounds ({:.1} s) are expected to be enough: raise the number of rounds",
                    within.as_secs_f64()
                )
            }
            None => "raise the number of rounds or the limit".to_owned(),
        };
        Self::NotConverging {
            rounds,
            predicted_ms: predicted.as_millis(),
            limit_ms: limit.as_millis(),
            advice,
        }
    }
}

impl Failure for Fault {
    fn code(&self) -> &'static str {
        match self {
            Self::Malformed(e) => e.code(),
            Self::Misbehaved(e) => e.code(),
            Self::OutOfTurn { .. } => "sender.misbehaved.out-of-turn",
            Self::Internal { .. } => "sender.internal",
            Self::ThreadStuck { .. } => "sender.thread-stuck",
            Self::Incompatible(e) => e.code(),
            Self::Misuse(e) => e.code(),
            Self::Channel(e) => e.code(),
            Self::Dial(_) => "sender.channel.dial",
            Self::NoAnswer { why, .. } => why.code(),
            Self::Memory(_) => "sender.misuse.memory",
            Self::AllLanesLost { .. } => "sender.channel.all-lanes-lost",
            Self::LaneDown { .. } => "sender.channel.lane-down",
            Self::NothingTaken { .. } => "sender.channel.nothing-taken",
            Self::Vmm { .. } => "sender.vmm.refused",
            Self::Device { .. } => "sender.device.failed",
            Self::DeviceStuck { .. } => "sender.device.stuck",
            Self::Devices { .. } => "sender.device.refused",
            Self::AckDeadline { .. } => "sender.device.ack-deadline",
            Self::Tracking(_) => "sender.tracking.failed",
            Self::Unreported(_) => "sender.tracking.unreported",
            Self::Refused { .. } => "sender.peer.refused",
            Self::PeerAborted { .. } => "sender.peer.aborted",
            Self::Timeout { .. } => "sender.timeout",
            Self::Cancelled => "sender.cancelled",
            Self::GuestGone => "sender.guest-gone",
            Self::NotConverging { .. } => "sender.not-converging",
            Self::DigestMismatch { .. } => "sender.digest-mismatch",
            Self::Unrepairable { .. } => "sender.unrepairable",
            Self::NotReconnected { .. } => "sender.channel.not-reconnected",
            Self::DestinationLost { .. } => "sender.peer.session-lost",
            Self::OutcomeUnknown { .. } => "sender.outcome-unknown",
            Self::NotCommitted { .. } => "sender.not-committed",
            Self::FailedAfterCommit => "sender.peer.failed-after-commit",
            Self::PreparedTooEarly => "sender.peer.prepared-too-early",
            Self::System { .. } => "sender.system",
        }
    }

    fn reason(&self) -> Reason {
        match self {
            Self::Malformed(e) => e.reason(),
            Self::Misbehaved(e) => e.reason(),
            Self::OutOfTurn { .. } => Reason::Misbehaved,
            Self::Incompatible(e) => e.reason(),
            Self::Misuse(e) => e.reason(),
            Self::Channel(_)
            | Self::Dial(_)
            | Self::AllLanesLost { .. }
            | Self::LaneDown { .. }
            | Self::NothingTaken { .. } => Reason::ChannelsLost,
            Self::Internal { .. } | Self::ThreadStuck { .. } => Reason::Internal,
            Self::NoAnswer { why, .. } => why.reason(),
            Self::Vmm { .. } => Reason::VmmRefused,
            Self::Memory(_) | Self::Tracking(_) | Self::Unreported(_) | Self::System { .. } => {
                Reason::Internal
            }
            Self::Refused { reason, .. } | Self::PeerAborted { reason, .. } => *reason,
            Self::Device { .. } | Self::DeviceStuck { .. } | Self::Devices { .. } => {
                Reason::DeviceRefused
            }
            Self::Timeout { .. } | Self::AckDeadline { .. } => Reason::Timeout,
            Self::Cancelled | Self::GuestGone => Reason::Cancelled,
            Self::NotConverging { .. } => Reason::CannotConverge,
            Self::DigestMismatch { .. } => Reason::DigestMismatch,
            Self::Unrepairable { .. } => Reason::Corruption,
            Self::NotReconnected { .. } => Reason::ChannelsLost,
            Self::DestinationLost { reason, .. } => *reason,
            Self::OutcomeUnknown { .. } => Reason::Timeout,
            Self::NotCommitted { .. } => Reason::ChannelsLost,
            Self::FailedAfterCommit => Reason::VmmRefused,
            Self::PreparedTooEarly => Reason::ChannelsLost,
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

/// What an answer that did not come may mean, where nothing came that tells.
fn perhaps(why: &Fault) -> &'static str {
    if [ChannelFault::STRANGER, ChannelFault::TLS].contains(&why.code()) {
        return "";
    }
    ". Perhaps it is busy with others, or another service listens there, or only one of the two sides uses TLS"
}
