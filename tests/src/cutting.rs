//! A channel that is cut after so many bytes, in the middle of a frame.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use multifd_transport::{Channel, ChannelError, Closer, IoSource, ReceiveHalf, SendHalf, Span};

use crate::tapped::{Tap, Tapped};

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
        let budget = |side| Budget {
            left: left(side),
            closer: closer.clone(),
        };
        let send = Tapped::new(tx, budget(Side::Sending));
        let receive = Receiving {
            inner: rx,
            budget: budget(Side::Receiving),
        };
        (Box::new(send), Box::new(receive), closer)
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

/// What a direction still lets pass.
struct Budget {
    left: Arc<AtomicU64>,
    closer: Closer,
}

impl Budget {
    /// Whether so many bytes still pass.
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

impl Tap for Budget {
    fn send(
        &mut self,
        half: &mut dyn SendHalf,
        head: &[u8],
        body: &[IoSource<'_>],
    ) -> Result<(), ChannelError> {
        let octets = head.len() + body.iter().map(IoSource::len).sum::<usize>();
        if !self.passes(octets) {
            // Some of the frame still arrives.
            let _ = half.send(head, &[]);
            self.closer.shutdown();
        }
        half.send(head, body)
    }
}

struct Receiving {
    inner: Box<dyn ReceiveHalf>,
    budget: Budget,
}

impl ReceiveHalf for Receiving {
    fn receive(&mut self, buf: &mut [u8]) -> Result<(), ChannelError> {
        if !self.budget.passes(buf.len()) {
            self.budget.closer.shutdown();
        }
        self.inner.receive(buf)
    }

    fn receive_into(&mut self, spans: &[Span<'_>]) -> Result<(), ChannelError> {
        if !self.budget.passes(spans.iter().map(Span::len).sum()) {
            self.budget.closer.shutdown();
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
