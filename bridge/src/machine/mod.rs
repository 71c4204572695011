//! The machine of carried streams: what is kept, sent again, put in order, and granted. No socket, thread, clock or lock.
//!
//! ```text
//!   monitor ──> Outgoing ── pieces, any lane, any order ──> Incoming ──> monitor        (and the same the other way)
//!               kept until     <── received, credit ──      in order again
//!               acknowledged                                window by measured rate
//! ```
//!
//! The rules it keeps: the credit of a stream is its own, so that no stream waits for another; what one side holds for the other is within
//! the credit that it granted; a piece is forgotten only when the other side has it.

mod incoming;
mod outgoing;
mod streams;
#[cfg(test)]
mod tests;
mod window;

pub use incoming::{Admit, Incoming};
pub use outgoing::{Outgoing, Via};
pub use streams::{Class, Held, Outbound, PeerEnd, Streams};
pub use window::{HORIZON_DEFAULT, WINDOW_BYTES_MAX, WINDOW_BYTES_MIN, Window};

use multifd_wire::StreamId;

/// Why the peer's words about streams can't be taken. All of it is the peer breaking the protocol (reason 3).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Wrong {
    /// A piece past what was granted.
    #[error("stream {stream}: bytes up to {end} although {granted} were granted")]
    PastCredit {
        /// The stream.
        stream: StreamId,
        /// Where the piece ends.
        end: u64,
        /// What was granted.
        granted: u64,
    },
    /// A piece that overlaps another in part.
    #[error("stream {stream}: a piece at {offset} overlaps another in part")]
    Overlap {
        /// The stream.
        stream: StreamId,
        /// Where the piece begins.
        offset: u64,
    },
    /// An acknowledgement of what was never sent.
    #[error("stream {stream}: {received} bytes acknowledged of {sent}")]
    NeverSent {
        /// The stream.
        stream: StreamId,
        /// What the peer says that it has.
        received: u64,
        /// What was sent.
        sent: u64,
    },
    /// An end that contradicts what came before it.
    #[error("stream {stream}: an end at {offset} contradicts what was said before")]
    End {
        /// The stream.
        stream: StreamId,
        /// Where the stream is to end.
        offset: u64,
    },
    /// Words about a stream that nobody opened.
    #[error("stream {stream} was not opened")]
    Unknown {
        /// The stream.
        stream: StreamId,
    },
}
