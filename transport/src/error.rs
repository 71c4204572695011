//! What can go wrong on a channel, sorted by what the caller can do about it.
//!
//! Rule: a variant has one meaning for every kind of channel, a stable code for reports, and, where part of an operation
//! was done, says how much. Errors can be cloned, since a channel repeats the error that ended it to every later caller.
//!
//! A text is complete: it has its cause in it. So no error here has a [`source`](std::error::Error::source), which would be printed a
//! second time by everybody who prints chains; the cause is a field of the variant.

use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Why an operation on a channel did not finish.
///
/// `bytes_done` is what this operation had moved when it ended. A [`Deadline`](Self::Deadline) or
/// [`Stalled`](Self::Stalled) with `bytes_done` 0 took nothing from the stream and put nothing in: the half goes on
/// working and the operation may be tried again. After any other error the half is finished: each later call on it returns
/// the same error.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The peer closed its side between two operations: the clean end of a stream.
    #[error("the peer closed the channel")]
    Closed,
    /// The peer closed its side while it still owed bytes of this operation, or would not take them any more.
    #[error("the peer closed the channel after {bytes_done} of {bytes_wanted} bytes")]
    ClosedMidway {
        /// Bytes moved before the end.
        bytes_done: u64,
        /// Bytes that the operation was to move.
        bytes_wanted: u64,
    },
    /// The connection was reset: the peer's process died, or it closed with our bytes unread.
    #[error("the connection was reset after {bytes_done} bytes")]
    Reset {
        /// Bytes of this operation moved before the reset.
        bytes_done: u64,
    },
    /// The operation was not finished at the deadline set with `set_deadline`.
    #[error("the deadline passed after {bytes_done} bytes")]
    Deadline {
        /// Bytes moved before the deadline.
        bytes_done: u64,
    },
    /// Not one byte moved for as long as `set_stall` allows.
    #[error("nothing moved for {} ms, after {bytes_done} bytes", stall.as_millis())]
    Stalled {
        /// Bytes of this operation moved before the silence began.
        bytes_done: u64,
        /// The silence that was allowed.
        stall: Duration,
    },
    /// Somebody on this side called [`Closer::shutdown`](crate::Closer::shutdown).
    #[error("the channel was shut down on this side")]
    ShutDown,
    /// The kernel gave the connection up: keep-alive or user timeout ran out, or the route is gone.
    #[error("the connection was lost: {0}")]
    Lost(Arc<io::Error>),
    /// What protects the channel failed: a byte was changed on the way, or the peer refused us after the handshake.
    #[error("TLS: {0}")]
    Tls(Arc<str>),
    /// Any other error of the operating system.
    #[error("input or output failed: {0}")]
    Io(Arc<io::Error>),
}

impl ChannelError {
    /// A short name that never changes, for reports and for programs that react to it.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Closed => "channel-closed",
            Self::ClosedMidway { .. } => "channel-closed-midway",
            Self::Reset { .. } => "channel-reset",
            Self::Deadline { .. } => "channel-deadline",
            Self::Stalled { .. } => "channel-stalled",
            Self::ShutDown => "channel-shut-down",
            Self::Lost(_) => "channel-lost",
            Self::Tls(_) => "channel-tls",
            Self::Io(_) => "channel-io",
        }
    }

    /// Bytes that the operation had moved, where the error knows it; 0 otherwise.
    #[must_use]
    pub fn bytes_done(&self) -> u64 {
        match *self {
            Self::ClosedMidway { bytes_done, .. }
            | Self::Reset { bytes_done }
            | Self::Deadline { bytes_done }
            | Self::Stalled { bytes_done, .. } => bytes_done,
            Self::Closed | Self::ShutDown | Self::Lost(_) | Self::Tls(_) | Self::Io(_) => 0,
        }
    }

    /// The peer's close, as it looks to an operation that had moved this much.
    pub(crate) fn closed(bytes_done: u64, bytes_wanted: u64) -> Self {
        if bytes_done == 0 {
            Self::Closed
        } else {
            Self::ClosedMidway {
                bytes_done,
                bytes_wanted,
            }
        }
    }

    /// Of a send that failed: whether the channel certainly took nothing of it, so that the peer can have none of it.
    #[must_use]
    pub fn sent_nothing(&self) -> bool {
        self.may_retry() || matches!(self, Self::Closed | Self::Reset { bytes_done: 0 })
    }

    /// Whether the half can still be used: time ran out before anything was taken from or put into the stream.
    #[must_use]
    pub fn may_retry(&self) -> bool {
        matches!(
            self,
            Self::Deadline { bytes_done: 0 } | Self::Stalled { bytes_done: 0, .. }
        )
    }
}

/// Keeps the error that ends a half, so that every later call can repeat it.
pub(crate) fn remember<T>(
    failed: &mut Option<ChannelError>,
    result: Result<T, ChannelError>,
) -> Result<T, ChannelError> {
    if let Err(error) = &result
        && !error.may_retry()
    {
        *failed = Some(error.clone());
    }
    result
}

/// Why no connection was made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The host's name has no address, or nobody answered for it.
    #[error("cannot resolve {host}: {cause}")]
    Resolve {
        /// The name as given.
        host: String,
        /// The resolver's error.
        cause: io::Error,
    },
    /// Each address of the name was tried and none took the connection.
    #[error("cannot connect to {target}: {}", list(attempts))]
    Refused {
        /// The address as given.
        target: String,
        /// Every address tried, in order, and why it failed. Never empty.
        attempts: Vec<ConnectAttempt>,
    },
    /// The deadline passed before a connection stood.
    #[error("no connection to {target} by the deadline{}", list_after(attempts))]
    Deadline {
        /// The address as given.
        target: String,
        /// The addresses that had failed by then; may be empty.
        attempts: Vec<ConnectAttempt>,
    },
    /// A connection stood, but what has to follow before it is a channel failed: the handshake of TLS or of RDMA.
    #[error("connected to {target}, but {cause}")]
    Establish {
        /// The address as given.
        target: String,
        /// Why it is no channel.
        cause: EstablishError,
    },
    /// This kind of channel cannot be used here, whoever listens.
    #[error("cannot connect to {target}: {cause}")]
    Unavailable {
        /// The address as given.
        target: String,
        /// What is missing.
        cause: Unavailable,
    },
    /// The connection stood, but an option that was asked for could not be set on it.
    #[error("cannot set {option} on the connection to {target}: {cause}")]
    Option {
        /// The address as given.
        target: String,
        /// The option's name in [`TcpOptions`](crate::tcp::TcpOptions).
        option: &'static str,
        /// The kernel's answer.
        cause: io::Error,
    },
}

impl ConnectError {
    /// Whether another try may end otherwise: nobody listened, or not yet, or had no time. A peer that is not who it should be, or
    /// something that this side lacks, stays so.
    #[must_use]
    pub fn may_retry(&self) -> bool {
        match self {
            Self::Resolve { .. } | Self::Refused { .. } | Self::Deadline { .. } => true,
            Self::Establish { cause, .. } => cause.may_retry(),
            Self::Unavailable { .. } | Self::Option { .. } => false,
        }
    }

    /// A short name that never changes.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Resolve { .. } => "connect-resolve",
            Self::Refused { .. } => "connect-refused",
            Self::Deadline { .. } => "connect-deadline",
            Self::Establish { cause, .. } => cause.code(),
            Self::Unavailable { .. } => "connect-unavailable",
            Self::Option { .. } => "connect-option",
        }
    }
}

/// One address that was tried.
#[derive(Debug, thiserror::Error)]
#[error("{address}: {cause}")]
pub struct ConnectAttempt {
    /// The address, printed.
    pub address: String,
    /// Why it failed.
    pub cause: io::Error,
}

/// Why a connection that stood did not become a channel (see [`Channel::establish`](crate::Channel::establish)).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EstablishError {
    /// The peer did not prove who it is: the text says what is wrong with its certificate.
    #[error("its certificate is not accepted here: {0}")]
    Certificate(String),
    /// The peer refused us: the text says why, as far as it told.
    #[error("it refused: {0}")]
    Refused(String),
    /// The peer does not speak what it should.
    #[error("it does not speak {protocol} as it should: {text}")]
    Protocol {
        /// `TLS` or `RDMA`.
        protocol: &'static str,
        /// What was wrong.
        text: String,
    },
    /// It was not finished by the deadline.
    #[error("it did not finish the handshake by the deadline")]
    Deadline,
    /// The connection ended first.
    #[error("the connection ended in the handshake: {0}")]
    Channel(ChannelError),
}

impl EstablishError {
    /// Whether another try may end otherwise: the connection ended, as those of a peer do that is busy with others or starts anew.
    #[must_use]
    pub fn may_retry(&self) -> bool {
        matches!(self, Self::Deadline | Self::Channel(_))
    }

    /// A short name that never changes.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Certificate(_) => "establish-certificate",
            Self::Refused(_) => "establish-refused",
            Self::Protocol { .. } => "establish-protocol",
            Self::Deadline => "establish-deadline",
            Self::Channel(_) => "establish-channel",
        }
    }
}

/// Why a descriptor did not become a channel.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdoptError {
    /// It is not what a channel can be made of.
    #[error("{0}")]
    Kind(&'static str),
    /// This kind of channel cannot be used here.
    #[error("{0}")]
    Unavailable(Unavailable),
    /// It is a connection, and not one that can become a channel.
    #[error("{0}")]
    Establish(EstablishError),
    /// An option could not be set on it.
    #[error("cannot set {option} on the socket: {cause}")]
    Option {
        /// The option's name in [`TcpOptions`](crate::tcp::TcpOptions).
        option: &'static str,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// The kernel's answer to a question about it: it is not connected, for example.
    #[error("the socket cannot be used: {0}")]
    Io(io::Error),
}

impl From<io::Error> for AdoptError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Unavailable> for AdoptError {
    fn from(missing: Unavailable) -> Self {
        Self::Unavailable(missing)
    }
}

/// What a kind of channel lacks on this side.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Unavailable {
    /// The kind was left out when the program was built.
    #[error("this program was built without {kind} (feature `{feature}`)")]
    NotBuilt {
        /// The kind.
        kind: &'static str,
        /// The cargo feature of this crate.
        feature: &'static str,
    },
    /// The kind needs settings that were not given.
    #[error("{kind} needs {what}")]
    NotConfigured {
        /// The kind.
        kind: &'static str,
        /// What is missing.
        what: &'static str,
    },
    /// The host lacks a library or a device; the text names it and says what to do.
    #[error("{0}")]
    Host(String),
}

/// Why a listener could not be made, or gave no connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {cause}")]
    Bind {
        /// The address as given.
        address: String,
        /// The operating system's error.
        cause: io::Error,
    },
    /// This kind of channel cannot be used here.
    #[error("cannot listen on {address}: {cause}")]
    Unavailable {
        /// The address as given.
        address: String,
        /// What is missing.
        cause: Unavailable,
    },
    /// Somebody connected, but what has to follow before that is a channel failed; the connection was closed.
    #[error("{peer} connected, but {cause}")]
    Establish {
        /// The peer's address.
        peer: String,
        /// Why it is no channel.
        cause: EstablishError,
    },
    /// Nobody connected by the deadline.
    #[error("nobody connected by the deadline")]
    Deadline,
    /// The listener was shut down from this side.
    #[error("the listener was shut down")]
    ShutDown,
    /// This process or host is out of descriptors or memory: a connection waits and can be accepted when some are free.
    #[error("no descriptor or memory for a connection that waits: {0}")]
    Exhausted(io::Error),
    /// An option could not be set on an accepted connection, which was closed.
    #[error("cannot set {option} on the connection from {peer}: {cause}")]
    Option {
        /// The peer's address.
        peer: String,
        /// The option's name in [`TcpOptions`](crate::tcp::TcpOptions).
        option: &'static str,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// Any other error of the operating system.
    #[error("accepting failed: {0}")]
    Io(io::Error),
}

impl ListenError {
    /// A short name that never changes.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Bind { .. } => "listen-bind",
            Self::Unavailable { .. } => "listen-unavailable",
            Self::Establish { cause, .. } => cause.code(),
            Self::Deadline => "listen-deadline",
            Self::ShutDown => "listen-shut-down",
            Self::Exhausted(_) => "listen-exhausted",
            Self::Option { .. } => "listen-option",
            Self::Io(_) => "listen-io",
        }
    }
}

fn list(attempts: &[ConnectAttempt]) -> String {
    attempts
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("; ")
}

fn list_after(attempts: &[ConnectAttempt]) -> String {
    if attempts.is_empty() {
        String::new()
    } else {
        format!(" (tried {})", list(attempts))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn codes_are_these_and_each_is_its_own() {
        let io = || Arc::new(io::Error::from(io::ErrorKind::Other));
        let errors = [
            (ChannelError::Closed, "channel-closed"),
            (
                ChannelError::ClosedMidway {
                    bytes_done: 1,
                    bytes_wanted: 2,
                },
                "channel-closed-midway",
            ),
            (ChannelError::Reset { bytes_done: 1 }, "channel-reset"),
            (ChannelError::Deadline { bytes_done: 1 }, "channel-deadline"),
            (
                ChannelError::Stalled {
                    bytes_done: 1,
                    stall: Duration::ZERO,
                },
                "channel-stalled",
            ),
            (ChannelError::ShutDown, "channel-shut-down"),
            (ChannelError::Lost(io()), "channel-lost"),
            (ChannelError::Tls("x".into()), "channel-tls"),
            (ChannelError::Io(io()), "channel-io"),
        ];
        let codes: HashSet<_> = errors.iter().map(|(error, _)| error.code()).collect();
        assert_eq!(codes.len(), errors.len());
        for (error, code) in errors {
            assert_eq!(error.code(), code);
        }
    }

    #[test]
    fn only_time_that_ran_out_before_anything_moved_may_be_retried() {
        assert!(ChannelError::Deadline { bytes_done: 0 }.may_retry());
        assert!(
            ChannelError::Stalled {
                bytes_done: 0,
                stall: Duration::ZERO
            }
            .may_retry()
        );
        assert!(!ChannelError::Deadline { bytes_done: 1 }.may_retry());
        assert!(
            !ChannelError::Stalled {
                bytes_done: 1,
                stall: Duration::ZERO
            }
            .may_retry()
        );
        assert!(!ChannelError::Closed.may_retry());
        assert!(!ChannelError::ShutDown.may_retry());
    }

    #[test]
    fn only_errors_that_end_a_half_are_remembered() {
        let mut failed = None;
        let _ = remember::<()>(&mut failed, Err(ChannelError::Deadline { bytes_done: 0 }));
        let _ = remember(&mut failed, Ok(()));
        assert!(failed.is_none());
        let _ = remember::<()>(&mut failed, Err(ChannelError::Reset { bytes_done: 3 }));
        assert!(matches!(
            failed,
            Some(ChannelError::Reset { bytes_done: 3 })
        ));
    }
}
