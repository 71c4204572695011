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
use crate::sys::{self, Blocking, LandingList, Ready, Scratch};

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
        let mut low_water = LowWater::new(link.socket.as_fd());
        // First what is there; then sleep until the rest is.
        let mut empty = false;
        while self.bytes_done < self.bytes_wanted {
            let pace = self.wait.pace().check(self.bytes_done)?;
            let how = if empty {
                low_water.raise(self.bytes_wanted - self.bytes_done);
                blocking(pace)
            } else {
                Blocking::No
            };
            match list.receive(link.socket.as_fd(), how) {
                Ok(0) => return Err(link.end(self.bytes_done, self.bytes_wanted)),
                Ok(count) => {
                    empty = false;
                    self.bytes_done += count as u64;
                    list.advance(count);
                    self.wait.moved();
                    if list.is_done() {
                        list.clear();
                        fill_landing(list, spans, &mut room);
                    }
                }
                Err(error) if is_try_again(&error) && !empty => empty = true,
                Err(error) if is_try_again(&error) => link.wait(pace, Ready::Receive)?,
                Err(error) => return Err(link.error(error, self.bytes_done, self.bytes_wanted)),
            }
        }
        // At most the length of `room`, which is a usize.
        Ok((self.bytes_done - self.bytes_wanted) as usize)
    }
}

/// The socket's low-water mark while a body is awaited: the kernel then wakes the thread once for the rest of it, not for each
/// packet. Whatever happens it is back at one octet afterwards, since a head must wake at once.
struct LowWater<'l> {
    socket: BorrowedFd<'l>,
    raised: bool,
}

impl<'l> LowWater<'l> {
    /// Less than this is not worth two system calls.
    const BYTES_MIN: u64 = 16 << 10;
    /// A body has no more; the kernel lowers it further to half of its buffer.
    const BYTES_MAX: u64 = 1 << 20;

    fn new(socket: BorrowedFd<'l>) -> Self {
        Self {
            socket,
            raised: false,
        }
    }

    fn raise(&mut self, bytes_missing: u64) {
        if bytes_missing >= Self::BYTES_MIN {
            sys::set_low_water(self.socket, bytes_missing.min(Self::BYTES_MAX) as i32);
            self.raised = true;
        }
    }
}

impl Drop for LowWater<'_> {
    fn drop(&mut self) {
        if self.raised {
            sys::set_low_water(self.socket, 1);
        }
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

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::memory::{GuestMemory, RegionLayout};
    use crate::{Listener, TcpOptions, tcp};

    static HALF: [u8; 128 << 10] = [7; 128 << 10];

    /// A connection over the loopback interface: its sending socket's half and its receiving half.
    fn connection() -> (Box<dyn crate::SendHalf>, Box<dyn ReceiveHalf>) {
        let options = TcpOptions::default();
        let listener = Listener::bind(&"127.0.0.1:0".parse().unwrap(), &options).unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        let crate::Address::Tcp(address) = listener.local_address().clone() else {
            unreachable!("a TCP listener");
        };
        let dialled = tcp::connect(&address, &options, deadline).unwrap();
        let (accepted, _) = listener.accept(Some(deadline)).unwrap();
        (dialled.split().0, accepted.split().1)
    }

    fn low_water(receive: &dyn ReceiveHalf) -> i32 {
        sys::low_water(receive.poll_fd().unwrap())
    }

    #[test]
    fn a_body_that_comes_in_halves_leaves_the_mark_down_whether_it_is_completed_or_not() {
        let memory = GuestMemory::anonymous(&[RegionLayout {
            guest_address: 0,
            bytes: 2 * HALF.len() as u64,
        }])
        .unwrap();
        let span = memory.span(0, 0, 2 * HALF.len() as u64).unwrap();

        let (mut send, mut receive) = connection();
        send.send(&HALF, &[]).unwrap();
        receive.set_deadline(Some(Instant::now() + Duration::from_millis(300)));
        let late = receive.receive_into(&[span]);
        assert!(
            matches!(late, Err(ChannelError::Deadline { bytes_done }) if bytes_done == HALF.len() as u64),
            "what came is counted although the mark was higher: {late:?}"
        );
        assert_eq!(low_water(&*receive), 1);

        let (mut send, mut receive) = connection();
        let sender = thread::spawn(move || {
            send.send(&HALF, &[]).unwrap();
            thread::sleep(Duration::from_millis(50));
            send.send(&HALF, &[]).unwrap();
            send
        });
        receive.receive_into(&[span]).unwrap();
        assert_eq!(low_water(&*receive), 1);
        sender.join().unwrap();
    }

    #[test]
    fn a_raised_mark_reaches_the_kernel_and_falls_when_dropped() {
        let (_send, receive) = connection();
        let socket = receive.poll_fd().unwrap();
        let mut mark = LowWater::new(socket);
        mark.raise(LowWater::BYTES_MIN - 1);
        assert_eq!(sys::low_water(socket), 1, "not worth it");
        mark.raise(100_000);
        assert_eq!(sys::low_water(socket), 100_000);
        drop(mark);
        assert_eq!(sys::low_water(socket), 1);
    }
}
