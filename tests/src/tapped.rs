//! A sending half with a tap on it: what a test loses, changes or cuts of what is sent. Everything else goes through.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use multifd_transport::{ChannelError, IoSource, SendHalf};

/// What becomes of what is sent.
pub trait Tap: Send {
    /// In place of the half's own `send`.
    ///
    /// # Errors
    /// As the half's own.
    fn send(
        &mut self,
        half: &mut dyn SendHalf,
        head: &[u8],
        body: &[IoSource<'_>],
    ) -> Result<(), ChannelError>;

    /// Nothing reaches the channel any more, so there is always room.
    fn swallows(&self) -> bool {
        false
    }
}

/// The half.
pub struct Tapped<T> {
    half: Box<dyn SendHalf>,
    tap: T,
}

impl<T: Tap> Tapped<T> {
    /// Puts the tap on.
    #[must_use]
    pub fn new(half: Box<dyn SendHalf>, tap: T) -> Self {
        Self { half, tap }
    }
}

impl<T: Tap> SendHalf for Tapped<T> {
    fn send(&mut self, head: &[u8], body: &[IoSource<'_>]) -> Result<(), ChannelError> {
        self.tap.send(&mut *self.half, head, body)
    }

    fn finish(&mut self) -> Result<(), ChannelError> {
        self.half.finish()
    }

    fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.half.set_deadline(deadline);
    }

    fn set_stall(&mut self, stall: Option<Duration>) {
        self.half.set_stall(stall);
    }

    fn set_more(&mut self, more: bool) {
        self.half.set_more(more);
    }

    fn wait_for_room(&mut self) -> Result<(), ChannelError> {
        if self.tap.swallows() {
            return Ok(());
        }
        self.half.wait_for_room()
    }

    fn describe(&self) -> String {
        self.half.describe()
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        self.half.poll_fd()
    }
}
