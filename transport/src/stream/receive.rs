//! The receiving half of a stream socket: bodies straight to where they belong, heads from what was read ahead.
//!
//! Rule: a receive never asks the kernel for more than its own bytes and [`READ_AHEAD_BYTES`], and what it got beyond its own
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

    /// Reads until at least `count` bytes are held, `count` ≤ [`READ_AHEAD_BYTES`]. What came stays held whatever happens.
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
        let mut bulk = Bulk::new(drained as u64, bytes_wanted, self.patience);
        let mut list = self.scratch.landing_list();
        list.push_octets(rest);
        let beyond = bulk.receive(&self.link, &mut list, &mut [].iter(), self.ahead.room())?;
        self.ahead.filled(beyond);
        Ok(())
    }

    fn receive_spans(&mut self, spans: &[Span<'_>]) -> Result<(), ChannelError> {
        let bytes_wanted = spans.iter().map(|span| span.len() as u64).sum();
        let mut bulk = Bulk::new(0, bytes_wanted, self.patience);
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
    /// The last call found nothing: the next one is made when the rest is there.
    dry: bool,
}

impl Bulk {
    fn new(bytes_done: u64, bytes_wanted: u64, patience: Patience) -> Self {
        Self {
            bytes_done,
            bytes_wanted,
            wait: patience.start(),
            dry: false,
        }
    }

    /// Fills what `list` holds and then `spans`. Whatever follows the last byte wanted and comes with it lands in `room`, the
    /// room of the read-ahead; returns how many bytes that was.
    ///
    /// The wait is a `ppoll` and never a receive that sleeps: `ppoll` compares the low-water mark with all that lies in the
    /// socket, whenever it came. A receive takes what lies there, and then sleeps until as much *again* has come as the mark says,
    /// which may be more than the peer still owes.
    fn receive<'d>(
        &mut self,
        link: &Link,
        list: &mut LandingList<'_, 'd>,
        spans: &mut std::slice::Iter<'_, Span<'d>>,
        room: &'d mut [u8],
    ) -> Result<usize, ChannelError> {
        let socket = link.socket.as_fd();
        let mut room = Some(room);
        fill_landing(list, spans, &mut room);
        let mut low_water = LowWater::new(socket);
        while self.bytes_done < self.bytes_wanted {
            let pace = self.wait.pace().check(self.bytes_done)?;
            if std::mem::take(&mut self.dry) {
                low_water.set(self.bytes_wanted - self.bytes_done);
                link.sleep(pace, Ready::Receive)?;
            }
            match list.receive(socket, Blocking::No) {
                Ok(0) => return Err(link.end(self.bytes_done, self.bytes_wanted)),
                Ok(count) => {
                    self.bytes_done += count as u64;
                    list.advance(count);
                    self.wait.moved();
                    // It gave less than it might have: it has no more.
                    self.dry = !list.is_done();
                    if list.is_done() {
                        list.clear();
                        fill_landing(list, spans, &mut room);
                    }
                }
                Err(error) if is_try_again(&error) => self.dry = true,
                Err(error) => return Err(link.error(error, self.bytes_done, self.bytes_wanted)),
            }
        }
        // At most the length of `room`, which is a usize.
        Ok((self.bytes_done - self.bytes_wanted) as usize)
    }
}

/// The socket's low-water mark while a body is awaited: the kernel then wakes the thread once for the rest of it, not for each
/// packet. Whatever happens it is back at one byte afterwards, since a head must wake at once.
struct LowWater<'l> {
    socket: BorrowedFd<'l>,
    mark: i32,
}

impl<'l> LowWater<'l> {
    /// Less than this is not worth a system call.
    const BYTES_MIN: u64 = 16 << 10;
    /// A body has no more; the kernel lowers it further to half of its buffer.
    const BYTES_MAX: u64 = 1 << 20;

    fn new(socket: BorrowedFd<'l>) -> Self {
        Self { socket, mark: 1 }
    }

    /// Wakes when `bytes_missing` bytes are there, or at once if they are few. Never leaves a mark that is higher than what is
    /// missing: it would be waited for in vain.
    fn set(&mut self, bytes_missing: u64) {
        let mark = if bytes_missing < Self::BYTES_MIN {
            1
        } else {
            bytes_missing.min(Self::BYTES_MAX) as i32
        };
        if mark != self.mark {
            sys::set_low_water(self.socket, mark);
            self.mark = mark;
        }
    }
}

impl Drop for LowWater<'_> {
    fn drop(&mut self) {
        self.set(0);
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
    use std::io::Write;
    use std::mem::MaybeUninit;
    use std::thread;

    use socket2::{SockRef, Socket};

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
    fn a_mark_reaches_the_kernel_follows_what_is_missing_and_falls_when_dropped() {
        let (_send, receive) = connection();
        let socket = receive.poll_fd().unwrap();
        let mut mark = LowWater::new(socket);
        mark.set(LowWater::BYTES_MIN - 1);
        assert_eq!(sys::low_water(socket), 1, "not worth it");
        mark.set(100_000);
        assert_eq!(sys::low_water(socket), 100_000);
        mark.set(20_000);
        assert_eq!(sys::low_water(socket), 20_000);
        mark.set(LowWater::BYTES_MIN - 1);
        assert_eq!(sys::low_water(socket), 1, "not what is no longer missing");
        mark.set(100_000);
        drop(mark);
        assert_eq!(sys::low_water(socket), 1);
    }

    /// Bytes that come after a call found nothing, and before the wait for the rest begins, count for that wait.
    #[test]
    fn a_wait_for_the_rest_counts_what_came_before_it_began() {
        const THERE: usize = 70_000;
        const LATER: usize = 130_000;
        static OCTETS: [u8; LATER] = [9; LATER];
        let memory = GuestMemory::anonymous(&[RegionLayout {
            guest_address: 0,
            bytes: (THERE + LATER) as u64,
        }])
        .unwrap();
        let kinds: [fn() -> (Socket, Socket); 2] = [tcp_sockets, || {
            Socket::pair(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap()
        }];
        for sockets in kinds {
            // A machine that is busy makes a run slow; the fault made every run take a whole tick.
            let shortest = (0..5).map(|_| {
                let (from, to) = sockets();
                let link = Link::new(to, "to".into());
                (&from).write_all(&OCTETS[..THERE]).unwrap();
                let mut seen = [MaybeUninit::uninit(); THERE];
                while SockRef::from(&link.socket).peek(&mut seen).unwrap() < THERE {
                    thread::yield_now();
                }
                let sender = thread::spawn(move || {
                    thread::sleep(Duration::from_millis(20));
                    (&from).write_all(&OCTETS).unwrap();
                    from
                });
                let mut scratch = Scratch::new();
                let mut list = scratch.landing_list();
                let span = memory.span(0, 0, (THERE + LATER) as u64).unwrap();
                let mut bulk = Bulk::new(0, (THERE + LATER) as u64, Patience::default());
                bulk.dry = true;
                let start = Instant::now();
                let beyond = bulk.receive(&link, &mut list, &mut [span].iter(), &mut []);
                let took = start.elapsed();
                assert_eq!(beyond.unwrap(), 0);
                sender.join().unwrap();
                took
            });
            let shortest = shortest.min().unwrap();
            assert!(shortest < super::super::TICK / 2, "{shortest:?}");
        }
    }

    /// As the channels' own: with the buffers of a connection on one host, and the limit on sleeping.
    fn tcp_sockets() -> (Socket, Socket) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let from = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let to = Socket::from(listener.accept().unwrap().0);
        assert!(TcpOptions::default().fit(&to).is_ok());
        to.set_read_timeout(Some(super::super::TICK)).unwrap();
        (from.into(), to)
    }
}
