//! The receiving half of a stream socket: bodies straight to where they belong, heads from what was read ahead.
//!
//! Rule: a receive never asks the kernel for more than its own octets and [`READ_AHEAD_BYTES`], and what it got beyond its own
//! is kept for the next. Only what was read ahead is ever copied.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Link, blocking, is_try_again};
use crate::channel::{READ_AHEAD_BYTES, ReceiveHalf};
use crate::error::{ChannelError, remember};
use crate::memory::Span;
use crate::patience::{Patience, Wait};
use crate::read_ahead::ReadAhead;
use crate::sys::{LandingList, Ready, Scratch};

pub(super) struct StreamReceive {
    link: Arc<Link>,
    scratch: Scratch,
    ahead: ReadAhead,
    patience: Patience,
    failed: Option<ChannelError>,
}

impl ReceiveHalf for StreamReceive {
    fn receive(&mut self, buf: &mut [u8]) -> Result<(), ChannelError> {
        self.link.check(self.failed.as_ref())?;
        let result = if buf.len() <= READ_AHEAD_BYTES {
            self.receive_small(buf)
        } else {
            self.receive_large(buf)
        };
        remember(&mut self.failed, result)
    }

    fn receive_into(&mut self, spans: &[Span<'_>]) -> Result<(), ChannelError> {
        self.link.check(self.failed.as_ref())?;
        let result = self.receive_spans(spans);
        remember(&mut self.failed, result)
    }

    fn drain(&mut self, bytes_max: u64) -> Result<u64, ChannelError> {
        self.link.check(self.failed.as_ref())?;
        let mut bytes_done = self.ahead.discard() as u64;
        while bytes_done < bytes_max {
            match self.read_ahead(1) {
                Ok(()) => bytes_done += self.ahead.discard() as u64,
                Err(ChannelError::Closed) => break,
                Err(error) => return remember(&mut self.failed, Err(error)),
            }
        }
        Ok(bytes_done)
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
        Some(self.link.socket.as_fd())
    }
}

impl StreamReceive {
    pub(super) fn new(link: Arc<Link>) -> Self {
        Self {
            link,
            scratch: Scratch::new(),
            ahead: ReadAhead::new(),
            patience: Patience::default(),
            failed: None,
        }
    }

    fn receive_small(&mut self, buf: &mut [u8]) -> Result<(), ChannelError> {
        if self.ahead.len() < buf.len() {
            self.read_ahead(buf.len())?;
        }
        self.ahead.take(buf);
        Ok(())
    }

    /// Reads until at least `count` octets are held, `count` ≤ [`READ_AHEAD_BYTES`]. What came stays held whatever happens.
    fn read_ahead(&mut self, count: usize) -> Result<(), ChannelError> {
        let mut wait = self.patience.start();
        while self.ahead.len() < count {
            let pace = wait.pace().check(0)?;
            let held = self.ahead.len() as u64;
            let mut list = self.scratch.landing_list();
            list.push_octets(self.ahead.room());
            match list.receive(self.link.socket.as_fd(), blocking(pace)) {
                Ok(0) => return Err(self.link.end(held, count as u64)),
                Ok(more) => {
                    self.ahead.filled(more);
                    wait.moved();
                }
                Err(error) if is_try_again(&error) => self.link.wait(pace, Ready::Receive)?,
                Err(error) => return Err(self.link.error(error, held, count as u64)),
            }
        }
        Ok(())
    }

    fn receive_large(&mut self, buf: &mut [u8]) -> Result<(), ChannelError> {
        let bytes_wanted = buf.len() as u64;
        let drained = self.ahead.drain(buf);
        let Some((_, rest)) = buf.split_at_mut_checked(drained) else {
            return Ok(());
        };
        let mut bulk = Bulk {
            bytes_done: drained as u64,
            bytes_wanted,
            wait: self.patience.start(),
        };
        let mut list = self.scratch.landing_list();
        list.push_octets(rest);
        let beyond = bulk.receive(&self.link, &mut list, &mut [].iter(), self.ahead.room())?;
        self.ahead.filled(beyond);
        Ok(())
    }

    fn receive_spans(&mut self, spans: &[Span<'_>]) -> Result<(), ChannelError> {
        let bytes_wanted = spans.iter().map(|span| span.len() as u64).sum();
        let mut bulk = Bulk {
            bytes_done: 0,
            bytes_wanted,
            wait: self.patience.start(),
        };
        let mut spans = spans.iter();
        let mut list = self.scratch.landing_list();
        while self.ahead.len() > 0
            && let Some(span) = spans.next()
        {
            let count = self.ahead.drain_into(*span);
            bulk.bytes_done += count as u64;
            if let Ok(rest) = span.subspan(count, span.len() - count) {
                list.push_span(rest);
            }
        }
        let beyond = bulk.receive(&self.link, &mut list, &mut spans, self.ahead.room())?;
        self.ahead.filled(beyond);
        Ok(())
    }
}

/// A receive of more than the read-ahead holds.
struct Bulk {
    bytes_done: u64,
    bytes_wanted: u64,
    wait: Wait,
}

impl Bulk {
    /// Fills what `list` holds and then `spans`. Whatever follows the last octet wanted and comes with it lands in `room`, the
    /// room of the read-ahead; returns how many octets that was.
    fn receive<'d>(
        &mut self,
        link: &Link,
        list: &mut LandingList<'_, 'd>,
        spans: &mut std::slice::Iter<'_, Span<'d>>,
        room: &'d mut [u8],
    ) -> Result<usize, ChannelError> {
        let mut room = Some(room);
        fill_landing(list, spans, &mut room);
        while self.bytes_done < self.bytes_wanted {
            let pace = self.wait.pace().check(self.bytes_done)?;
            match list.receive(link.socket.as_fd(), blocking(pace)) {
                Ok(0) => return Err(link.end(self.bytes_done, self.bytes_wanted)),
                Ok(count) => {
                    self.bytes_done += count as u64;
                    list.advance(count);
                    self.wait.moved();
                    if list.is_done() {
                        list.clear();
                        fill_landing(list, spans, &mut room);
                    }
                }
                Err(error) if is_try_again(&error) => link.wait(pace, Ready::Receive)?,
                Err(error) => return Err(link.error(error, self.bytes_done, self.bytes_wanted)),
            }
        }
        // At most the length of `room`, which is a usize.
        Ok((self.bytes_done - self.bytes_wanted) as usize)
    }
}

/// Puts as many spans into the list as it takes, and the room of the read-ahead behind the last one.
fn fill_landing<'d>(
    list: &mut LandingList<'_, 'd>,
    spans: &mut std::slice::Iter<'_, Span<'d>>,
    room: &mut Option<&'d mut [u8]>,
) {
    while !list.is_full() {
        if let Some(span) = spans.next() {
            list.push_span(*span);
        } else if let Some(room) = room.take() {
            list.push_octets(room);
        } else {
            return;
        }
    }
}
