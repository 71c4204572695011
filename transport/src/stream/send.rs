//! The sending half of a stream socket: a head and many pieces in as few `sendmsg` calls as the kernel allows.
//!
//! Rule: nothing is copied and nothing allocated here; a partial send goes on where it stopped.

use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Link, TICK, blocking, is_try_again};
use crate::channel::{IoSource, SendHalf};
use crate::error::{ChannelError, remember};
use crate::patience::{Pace, Patience};
use crate::sys::{self, Ready, Scratch, SendList};

pub(super) struct StreamSend {
    link: Arc<Link>,
    scratch: Scratch,
    patience: Patience,
    more: bool,
    failed: Option<ChannelError>,
}

impl SendHalf for StreamSend {
    fn send(&mut self, head: &[u8], body: &[IoSource<'_>]) -> Result<(), ChannelError> {
        self.link.check(self.failed.as_ref())?;
        let result = self.send_all(head, body);
        remember(&mut self.failed, result)
    }

    fn finish(&mut self) -> Result<(), ChannelError> {
        self.link.check(self.failed.as_ref())?;
        let result = self
            .link
            .socket
            .shutdown(Shutdown::Write)
            .map_err(|error| self.link.error(error, 0, 0));
        self.failed = Some(
            result
                .as_ref()
                .err()
                .cloned()
                .unwrap_or(ChannelError::ShutDown),
        );
        result
    }

    fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.patience.deadline = deadline;
    }

    fn set_stall(&mut self, stall: Option<Duration>) {
        self.patience.stall = stall;
    }

    fn set_more(&mut self, more: bool) {
        self.more = more;
    }

    fn wait_for_room(&mut self) -> Result<(), ChannelError> {
        self.link.check(self.failed.as_ref())?;
        let mut wait = self.patience.start();
        loop {
            let time = match wait.pace().check(0)? {
                Pace::Forever => TICK,
                Pace::AtMost(time) => time.min(TICK),
                _ => Duration::ZERO,
            };
            // Errors of the socket count as room: the send that follows finds out which.
            match sys::wait(self.link.socket.as_fd(), Ready::Send, Some(time)) {
                Ok(true) => return Ok(()),
                Ok(false) => self.link.check(None)?,
                Err(error) => return Err(ChannelError::Io(Arc::new(error))),
            }
        }
    }

    fn describe(&self) -> String {
        self.link.name.to_string()
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.link.socket.as_fd())
    }
}

impl StreamSend {
    pub(super) fn new(link: Arc<Link>) -> Self {
        Self {
            link,
            scratch: Scratch::new(),
            patience: Patience::default(),
            more: false,
            failed: None,
        }
    }

    fn send_all(&mut self, head: &[u8], body: &[IoSource<'_>]) -> Result<(), ChannelError> {
        let mut list = self.scratch.send_list();
        list.push_octets(head);
        let mut body = body.iter();
        fill_send(&mut list, &mut body);
        let mut bytes_done = 0;
        let mut wait = self.patience.start();
        while !list.is_done() {
            let pace = wait.pace().check(bytes_done)?;
            match list.send(self.link.socket.as_fd(), blocking(pace), self.more) {
                Ok(count) => {
                    bytes_done += count as u64;
                    list.advance(count);
                    if list.is_done() {
                        list.clear();
                        fill_send(&mut list, &mut body);
                    }
                    if !list.is_done() {
                        wait.moved();
                    }
                }
                Err(error) if is_try_again(&error) => self.link.wait(pace, Ready::Send)?,
                Err(error) => {
                    let rest = body.map(|piece| piece.len() as u64).sum::<u64>();
                    return Err(self.link.error(
                        error,
                        bytes_done,
                        bytes_done + list.bytes() + rest,
                    ));
                }
            }
        }
        Ok(())
    }
}

impl Drop for StreamSend {
    fn drop(&mut self) {
        // The peer must see the end even while the receiving half lives on. If the socket is gone there is nobody to tell.
        let _ = self.link.socket.shutdown(Shutdown::Write);
    }
}

/// Puts as many pieces into the list as it takes.
fn fill_send<'d>(list: &mut SendList<'_, 'd>, body: &mut std::slice::Iter<'_, IoSource<'d>>) {
    while !list.is_full()
        && let Some(piece) = body.next()
    {
        match *piece {
            IoSource::Bytes(octets) => list.push_octets(octets),
            IoSource::Guest(span) => list.push_span(span),
        }
    }
}
