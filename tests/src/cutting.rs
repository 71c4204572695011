//! A channel that is cut after so many octets, in the middle of a frame.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use multifd_transport::{Channel, ChannelError, Closer, IoSource, ReceiveHalf, SendHalf, Span};

/// Which side loses it first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The side that sends: the other finds a frame that ends too soon.
    Sending,
    /// The side that receives: the other finds nobody who reads.
    Receiving,
}

/// The channel.
pub struct Cutting {
    inner: Box<dyn Channel>,
    side: Side,
    octets: Arc<AtomicU64>,
}

/// Nothing is cut any more.
const ENDLESS: u64 = u64::MAX;

impl Cutting {
    /// Lets `octets` pass in one direction.
    #[must_use]
    pub fn after(octets: u64, side: Side, inner: Box<dyn Channel>) -> Box<dyn Channel> {
        Self::shared(Arc::new(AtomicU64::new(octets)), side, inner)
    }

    /// One of several channels that let `octets` pass together, in one direction. The one that goes beyond them is cut, and the
    /// others go on.
    #[must_use]
    pub fn shared(octets: Arc<AtomicU64>, side: Side, inner: Box<dyn Channel>) -> Box<dyn Channel> {
        Box::new(Self {
            inner,
            side,
            octets,
        })
    }
}

impl Channel for Cutting {
    fn split(self: Box<Self>) -> (Box<dyn SendHalf>, Box<dyn ReceiveHalf>, Closer) {
        let (tx, rx, closer) = self.inner.split();
        let left = |side| {
            if self.side == side {
                Arc::clone(&self.octets)
            } else {
                Arc::new(AtomicU64::new(ENDLESS))
            }
        };
        let send = Half {
            inner: tx,
            left: left(Side::Sending),
            closer: closer.clone(),
        };
        let receive = Half {
            inner: rx,
            left: left(Side::Receiving),
            closer: closer.clone(),
        };
        (Box::new(send), Box::new(receive), closer)
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

struct Half<H> {
    inner: H,
    left: Arc<AtomicU64>,
    closer: Closer,
}

impl<H> Half<H> {
    /// Whether so many octets still pass.
    fn passes(&self, octets: usize) -> bool {
        let spend = |left: u64| match left {
            ENDLESS => Some(ENDLESS),
            left => Some(left.checked_sub(octets as u64).unwrap_or(ENDLESS)),
        };
        let before = self
            .left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, spend);
        before.is_ok_and(|left| left == ENDLESS || left >= octets as u64)
    }
}

impl SendHalf for Half<Box<dyn SendHalf>> {
    fn send(&mut self, head: &[u8], body: &[IoSource<'_>]) -> Result<(), ChannelError> {
        let octets = head.len() + body.iter().map(IoSource::len).sum::<usize>();
        if !self.passes(octets) {
            // Some of the frame still arrives.
            let _ = self.inner.send(head, &[]);
            self.closer.shutdown();
        }
        self.inner.send(head, body)
    }

    fn finish(&mut self) -> Result<(), ChannelError> {
        self.inner.finish()
    }

    fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.inner.set_deadline(deadline);
    }

    fn set_stall(&mut self, stall: Option<Duration>) {
        self.inner.set_stall(stall);
    }

    fn set_more(&mut self, more: bool) {
        self.inner.set_more(more);
    }

    fn wait_for_room(&mut self) -> Result<(), ChannelError> {
        self.inner.wait_for_room()
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.poll_fd()
    }
}

impl ReceiveHalf for Half<Box<dyn ReceiveHalf>> {
    fn receive(&mut self, buf: &mut [u8]) -> Result<(), ChannelError> {
        if !self.passes(buf.len()) {
            self.closer.shutdown();
        }
        self.inner.receive(buf)
    }

    fn receive_into(&mut self, spans: &[Span<'_>]) -> Result<(), ChannelError> {
        if !self.passes(spans.iter().map(Span::len).sum()) {
            self.closer.shutdown();
        }
        self.inner.receive_into(spans)
    }

    fn drain(&mut self, bytes_max: u64) -> Result<u64, ChannelError> {
        self.inner.drain(bytes_max)
    }

    fn buffered(&self) -> usize {
        self.inner.buffered()
    }

    fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.inner.set_deadline(deadline);
    }

    fn set_stall(&mut self, stall: Option<Duration>) {
        self.inner.set_stall(stall);
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.poll_fd()
    }
}
