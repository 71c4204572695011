//! The receiving half: messages in order, each its inline bytes and then what landed in its slot.
//!
//! Rule: the landing is copied from, and a slot's credit is returned after that. So the peer never writes guest memory: not before a page was
//! admitted, not past the mark that ends a round, and not after its channel was given up.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::link::{Arrived, Link, Side};
use crate::channel::{READ_AHEAD_BYTES, ReceiveHalf};
use crate::error::{ChannelError, remember};
use crate::memory::Span;
use crate::patience::{Patience, Wait};
use crate::read_ahead::ReadAhead;

pub(super) struct RdmaReceive {
    link: Arc<Link>,
    ahead: ReadAhead,
    /// The message that is being taken.
    current: Option<Arrived>,
    patience: Patience,
    failed: Option<ChannelError>,
}

impl ReceiveHalf for RdmaReceive {
    fn receive(&mut self, buf: &mut [u8]) -> Result<(), ChannelError> {
        self.check()?;
        let mut wait = self.patience.start();
        let result = if buf.len() <= READ_AHEAD_BYTES {
            self.hold(buf.len(), &mut wait)
                .map(|()| self.ahead.take(buf))
        } else {
            self.fill(buf, &mut wait)
        };
        remember(&mut self.failed, result)
    }

    fn receive_into(&mut self, spans: &[Span<'_>]) -> Result<(), ChannelError> {
        self.check()?;
        let mut wait = self.patience.start();
        let result = self.fill_spans(spans, &mut wait);
        remember(&mut self.failed, result)
    }

    fn drain(&mut self, bytes_max: u64) -> Result<u64, ChannelError> {
        self.check()?;
        let mut bytes_done = self.ahead.discard() as u64;
        while bytes_done < bytes_max {
            let mut wait = self.patience.start();
            let left = usize::try_from(bytes_max - bytes_done).unwrap_or(usize::MAX);
            match self.part(left, 0, 1, &mut wait, |_| ()) {
                Ok(count) => bytes_done += count as u64,
                Err(ChannelError::Closed) => break,
                Err(error) => return remember(&mut self.failed, Err(error)),
            }
        }
        Ok(bytes_done)
    }

    fn peek(&self, to: &mut [u8]) -> usize {
        self.ahead.peek(to)
    }

    fn buffered(&self) -> usize {
        self.ahead.len()
    }

    fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.patience.deadline = deadline;
    }

    fn set_stall(&mut self, stall: Option<Duration>) {
        self.patience.stall = stall;
    }

    fn describe(&self) -> String {
        self.link.name.to_string()
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        // A completion channel is ready only once it was armed, which is this half's own business.
        None
    }
}

impl RdmaReceive {
    pub(super) fn new(link: Arc<Link>) -> Self {
        Self {
            link,
            ahead: ReadAhead::new(),
            current: None,
            patience: Patience::default(),
            failed: None,
        }
    }

    fn check(&self) -> Result<(), ChannelError> {
        if self.link.is_shut() {
            return Err(ChannelError::ShutDown);
        }
        self.failed
            .as_ref()
            .map_or(Ok(()), |error| Err(error.clone()))
    }

    /// Waits until at least `count` bytes are held, `count` ≤ [`READ_AHEAD_BYTES`].
    fn hold(&mut self, count: usize, wait: &mut Wait) -> Result<(), ChannelError> {
        while self.ahead.len() < count {
            let room = READ_AHEAD_BYTES - self.ahead.len();
            let held = self.ahead.len() as u64;
            let mut ahead = std::mem::replace(&mut self.ahead, ReadAhead::empty());
            let result = self.part(room, held, count as u64, wait, |part| {
                part.copy_to(&mut ahead.room()[..part.len()]);
                ahead.filled(part.len());
            });
            self.ahead = ahead;
            result.map_err(|error| match error {
                // What came stays held.
                ChannelError::Deadline { .. } => ChannelError::Deadline { bytes_done: 0 },
                ChannelError::Stalled { stall, .. } => ChannelError::Stalled {
                    bytes_done: 0,
                    stall,
                },
                other => other,
            })?;
        }
        Ok(())
    }

    fn fill(&mut self, buf: &mut [u8], wait: &mut Wait) -> Result<(), ChannelError> {
        let bytes_wanted = buf.len() as u64;
        let mut at = self.ahead.drain(buf);
        while at < buf.len() {
            let rest = &mut buf[at..];
            let left = rest.len();
            at += self.part(left, at as u64, bytes_wanted, wait, |part| {
                part.copy_to(&mut rest[..part.len()]);
            })?;
        }
        Ok(())
    }

    fn fill_spans(&mut self, spans: &[Span<'_>], wait: &mut Wait) -> Result<(), ChannelError> {
        let bytes_wanted = spans.iter().map(|span| span.len() as u64).sum();
        let mut bytes_done = 0;
        for span in spans {
            let mut at = self.ahead.drain_into(*span);
            bytes_done += at as u64;
            while at < span.len() {
                let count = self.part(span.len() - at, bytes_done, bytes_wanted, wait, |part| {
                    if let Ok(to) = span.subspan(at, part.len()) {
                        to.copy_from_span(part);
                    }
                })?;
                at += count;
                bytes_done += count as u64;
            }
        }
        Ok(())
    }

    /// Takes at most `count` bytes that lie together; returns how many, at least one.
    fn part(
        &mut self,
        count: usize,
        bytes_done: u64,
        bytes_wanted: u64,
        wait: &mut Wait,
        to: impl FnOnce(Span<'_>),
    ) -> Result<usize, ChannelError> {
        let mut arrived = match self.current {
            Some(arrived) => arrived,
            None => self.next(bytes_done, bytes_wanted, wait)?,
        };
        let buffers = &self.link.buffers;
        let taken = if arrived.inline_at < arrived.inline_end {
            let taken = count.min(arrived.inline_end - arrived.inline_at);
            to(buffers.message(arrived.buffer, arrived.inline_at, taken));
            arrived.inline_at += taken;
            taken
        } else {
            let taken = count.min(arrived.landed_end - arrived.landed_at);
            to(buffers.landed(arrived.slot, arrived.landed_at, taken));
            arrived.landed_at += taken;
            taken
        };
        if arrived.is_taken() {
            self.current = None;
            self.link.used(arrived)?;
        } else {
            self.current = Some(arrived);
        }
        Ok(taken)
    }

    /// The next message that holds anything.
    fn next(
        &mut self,
        bytes_done: u64,
        bytes_wanted: u64,
        wait: &mut Wait,
    ) -> Result<Arrived, ChannelError> {
        loop {
            let arrived =
                self.link.until(Side::Receive, wait, bytes_done, |state| {
                    match state.next_message() {
                        Some(arrived) => Ok(Some(arrived)),
                        None => state.check_receive(bytes_done, bytes_wanted).map(|()| None),
                    }
                })?;
            wait.moved();
            if !arrived.is_taken() {
                return Ok(arrived);
            }
            self.link.used(arrived)?;
        }
    }
}

impl Arrived {
    fn is_taken(&self) -> bool {
        self.inline_at == self.inline_end && self.landed_at == self.landed_end
    }
}

impl Drop for RdmaReceive {
    fn drop(&mut self) {
        // Nobody will take what the peer still writes.
        self.link.withdraw();
    }
}
