//! The shape that every kind of channel has: a connection that splits into a sending half, a receiving half and a closer.
//!
//! Rule: calls are per frame, never per page, so that a virtual call costs nothing that could be measured. A half belongs to
//! one thread at a time; the closer belongs to whoever may have to end the channel.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{ChannelError, EstablishError};
use crate::memory::Span;

/// How far a new connection has come.
#[derive(Debug)]
pub enum Approach<'c> {
    /// What was asked for is here, or it failed and [`Channel::establish`] says why.
    Here,
    /// It can't be known without waiting.
    Unknown,
    /// Not yet: to be asked again when this descriptor can be read, or written.
    Waiting(BorrowedFd<'c>),
    /// The peer is gone.
    Gone,
}

/// A connection to a peer, both directions, before it is split.
pub trait Channel: Send {
    /// Looks, without waiting and without taking anything, whether the first `bytes` bytes of the peer are here; does what can be
    /// done without waiting of what [`establish`](Self::establish) does. So one thread can look after any number of connections
    /// until their peers have shown what they come for.
    ///
    /// A kind that can't tell says [`Approach::Unknown`].
    fn approach(&mut self, bytes: usize) -> Approach<'_> {
        let _ = bytes;
        Approach::Unknown
    }

    /// Finishes what accepting began, for kinds that exchange something before they are a channel (TLS, RDMA): to be called once,
    /// before [`split`](Self::split), on a channel that [`Listener::try_accept`](crate::Listener::try_accept) gave. It may wait for
    /// the peer, so it is for a thread that may stand still. Other kinds, and channels from elsewhere, are complete already.
    ///
    /// # Errors
    /// [`EstablishError`]; the channel is then good for nothing but being dropped.
    fn establish(&mut self, deadline: Instant) -> Result<(), EstablishError> {
        let _ = deadline;
        Ok(())
    }

    /// Splits the channel so that one thread can send while another receives.
    fn split(self: Box<Self>) -> (Box<dyn SendHalf>, Box<dyn ReceiveHalf>, Closer);

    /// The kind and both ends, for people: `tcp 127.0.0.1:4000 → 127.0.0.1:5000` (ours first).
    fn describe(&self) -> String;

    /// A secret that both ends of this connection know and nobody else: what is sent together with it, or a proof made of it, is worth
    /// nothing on another connection. `None` for a kind without keys, and before it is [established](Self::establish).
    ///
    /// TLS gives its exporter value (RFC 9266).
    fn binding(&self) -> Option<[u8; BINDING_BYTES]> {
        None
    }

    /// The descriptor to watch for the peer's first bytes; `None` for a kind that has none.
    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Size of [`Channel::binding`].
pub const BINDING_BYTES: usize = 32;

/// Where one piece of a frame's body comes from.
#[derive(Clone, Copy, Debug)]
pub enum IoSource<'a> {
    /// Bytes of this process that nobody changes meanwhile.
    Bytes(&'a [u8]),
    /// Guest memory, read by the kernel (or the device) from where it lies. The guest may write it at the same time: what is
    /// sent is then some mixture of old and new bytes.
    Guest(Span<'a>),
}

impl IoSource<'_> {
    /// Size in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Bytes(octets) => octets.len(),
            Self::Guest(span) => span.len(),
        }
    }

    /// Whether there is nothing to send.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The sending half of a channel.
///
/// Dropping it ends the stream in this direction: the peer reads what was sent, then [`ChannelError::Closed`].
pub trait SendHalf: Send {
    /// Sends `head` and then every piece of `body`, in order, completely.
    ///
    /// Any number of pieces, each of any length, empty ones too. Nothing is copied on this side of the kernel by the socket
    /// kinds and nothing is allocated. `Ok` means that the channel has taken the bytes, not that the peer has them.
    ///
    /// # Errors
    /// See [`ChannelError`]; `bytes_done` counts over head and body together.
    fn send(&mut self, head: &[u8], body: &[IoSource<'_>]) -> Result<(), ChannelError>;

    /// Ends the stream in this direction now, after what was sent. Later sends fail with [`ChannelError::ShutDown`].
    ///
    /// # Errors
    /// [`ChannelError`] when the connection is already gone.
    fn finish(&mut self) -> Result<(), ChannelError>;

    /// Every operation that is not finished at this instant fails with [`ChannelError::Deadline`]; `None` waits without end.
    /// Stays set until changed. An operation that starts later than the deadline does what it can do without waiting.
    fn set_deadline(&mut self, deadline: Option<Instant>);

    /// An operation in which not one byte moved for this long fails with [`ChannelError::Stalled`]. Stays set until changed.
    fn set_stall(&mut self, stall: Option<Duration>);

    /// Says whether what is sent from now on will soon be followed by more: a channel may then hold a last piece back that fills
    /// no packet, which saves one small packet a frame. It goes out with what follows, or after a moment (TCP: 200 ms), so the
    /// last frame before a pause is sent with `false`. A kind to which this means nothing ignores it.
    fn set_more(&mut self, more: bool) {
        let _ = more;
    }

    /// Waits until the channel has room, so that the next send of a frame will rarely wait halfway.
    ///
    /// Called before guest memory is looked at: what is then sent was read a moment ago, so it is still in the cache, and the guest had
    /// little time to change it since its checksum was taken. A kind to which this means nothing returns at once.
    ///
    /// # Errors
    /// As [`send`](Self::send), with no bytes done.
    fn wait_for_room(&mut self) -> Result<(), ChannelError> {
        Ok(())
    }

    /// As [`Channel::describe`].
    fn describe(&self) -> String;

    /// The descriptor to watch for room to send; `None`, as by default, for a kind that has none.
    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// The receiving half of a channel.
pub trait ReceiveHalf: Send {
    /// Fills `buf` exactly.
    ///
    /// Meant for heads and other small things: the channel may read ahead, so that the next call usually finds its bytes in
    /// this process. Up to [`READ_AHEAD_BYTES`] bytes are all or nothing with regard to time: if they are not all there at the
    /// deadline, nothing was taken and the call can be repeated.
    ///
    /// # Errors
    /// See [`ChannelError`]. What `buf` holds after an error means nothing, except that after [`ChannelError::Deadline`]
    /// and [`ChannelError::Stalled`] its first `bytes_done` bytes are the stream's.
    fn receive(&mut self, buf: &mut [u8]) -> Result<(), ChannelError>;

    /// Fills every span exactly, in order, straight into guest memory.
    ///
    /// Any number of spans, each of any length, empty ones too; memory outside them is never written. Only what an earlier
    /// [`receive`](Self::receive) read ahead (less than [`READ_AHEAD_BYTES`]) is copied.
    ///
    /// # Errors
    /// See [`ChannelError`]. After an error, the first `bytes_done` bytes have landed and of the rest nothing is known.
    fn receive_into(&mut self, spans: &[Span<'_>]) -> Result<(), ChannelError>;

    /// Reads and forgets until the peer closes, but no more than `bytes_max` bytes. Returns how many there were.
    ///
    /// A side that gives up tells the peer why, calls [`SendHalf::finish`] and then this, with a deadline: to close a TCP
    /// connection while unread bytes wait resets it, and a reset can overtake the farewell and destroy it.
    ///
    /// # Errors
    /// See [`ChannelError`]; the peer's close is `Ok`.
    fn drain(&mut self, bytes_max: u64) -> Result<u64, ChannelError>;

    /// Copies bytes of the stream that are in this process and were not taken, without taking them: the first ones, as many as `to`
    /// has room for; returns how many. Works after an error too, so that one can say what came instead of what was expected. A
    /// kind that does not know gives none.
    fn peek(&self, to: &mut [u8]) -> usize {
        let _ = to;
        0
    }

    /// The peer has shown that it is no stranger: from now on the channel may keep for it what it needs. Until then it keeps little.
    /// To be called by the accepting side when it lets the peer in; a kind to which this means nothing ignores it.
    ///
    /// # Errors
    /// See [`ChannelError`]; the half is then finished.
    fn admit(&mut self) -> Result<(), ChannelError> {
        Ok(())
    }

    /// Bytes that were read ahead: a receive of at most this many needs no system call, and [`poll_fd`](Self::poll_fd) does
    /// not report them.
    fn buffered(&self) -> usize;

    /// As [`SendHalf::set_deadline`].
    fn set_deadline(&mut self, deadline: Option<Instant>);

    /// As [`SendHalf::set_stall`].
    fn set_stall(&mut self, stall: Option<Duration>);

    /// As [`Channel::describe`].
    fn describe(&self) -> String;

    /// The descriptor to watch for bytes to receive; `None`, as by default, for a kind that has none.
    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// The most that a receiving half reads beyond what it was asked for.
///
/// 2 KiB holds the head of a frame with 256 pages in a few runs, or of one with 64 scattered pages. What is read ahead of a body
/// is copied twice: this bounds it to one part in 128 of a body of 256 KiB.
pub const READ_AHEAD_BYTES: usize = 2 * 1024;

/// Ends a channel from any thread.
///
/// A closer does not keep the connection's descriptor open: that is closed when both halves are gone.
#[derive(Clone)]
pub struct Closer {
    shut: Arc<dyn Fn() + Send + Sync>,
}

impl Closer {
    /// A closer that calls `shut`, for kinds of channel made outside this crate. `shut` must not block, may be called many
    /// times and from any thread, and must wake both halves with [`ChannelError::ShutDown`].
    pub fn new(shut: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            shut: Arc::new(shut),
        }
    }

    /// Wakes both halves, whatever they wait for, with [`ChannelError::ShutDown`]; later operations fail the same way, even if
    /// bytes had been read ahead. Bytes that the kernel has already taken may still reach the peer. Never blocks.
    pub fn shutdown(&self) {
        (self.shut)();
    }
}

impl fmt::Debug for Closer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Closer").finish_non_exhaustive()
    }
}
