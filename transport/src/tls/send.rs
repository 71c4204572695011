//! The sending half: pieces are copied into a chunk, the chunk is sealed, the records go to the socket.
//!
//! Rule: what was sealed is sent, in order, since the peer could not open what follows without it. A limit that ends a send leaves
//! at most one chunk sealed and not sent; it goes before the next send, or when the half is dropped.

use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::channel::{CHUNK_BYTES, Flushed, TlsLink};
use crate::channel::{IoSource, SendHalf};
use crate::error::{ChannelError, remember};
use crate::patience::{Pace, Patience, Wait};
use crate::sys::{self, Ready};

/// How long a half that is dropped waits for a peer that does not read, to announce the end.
const LINGER_MAX: Duration = Duration::from_millis(200);

/// How much larger the socket's buffer is made for the announcement to fit in without waiting.
const LINGER_BYTES: usize = 2 * CHUNK_BYTES;

pub(super) struct TlsSend {
    link: Arc<TlsLink>,
    chunk: Box<[u8]>,
    patience: Patience,
    failed: Option<ChannelError>,
}

impl SendHalf for TlsSend {
    fn send(&mut self, head: &[u8], body: &[IoSource<'_>]) -> Result<(), ChannelError> {
        self.link.check(self.failed.as_ref())?;
        let result = self.send_all(head, body);
        remember(&mut self.failed, result)
    }

    fn finish(&mut self) -> Result<(), ChannelError> {
        self.link.check(self.failed.as_ref())?;
        self.link.lock().send_close_notify();
        let mut job = Job {
            bytes_done: 0,
            bytes_wanted: 0,
            wait: self.patience.start(),
        };
        let result = job.flush(&self.link).and_then(|()| {
            self.link
                .stream
                .socket
                .shutdown(Shutdown::Write)
                .map_err(|error| self.link.stream.error(error, 0, 0))
        });
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

    fn describe(&self) -> String {
        self.link.stream.name.to_string()
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.link.stream.socket.as_fd())
    }
}

impl TlsSend {
    pub(super) fn new(link: Arc<TlsLink>) -> Self {
        Self {
            link,
            chunk: vec![0; CHUNK_BYTES].into_boxed_slice(),
            patience: Patience::default(),
            failed: None,
        }
    }

    fn send_all(&mut self, head: &[u8], body: &[IoSource<'_>]) -> Result<(), ChannelError> {
        let mut job = Job {
            bytes_done: 0,
            bytes_wanted: head.len() as u64
                + body.iter().map(|piece| piece.len() as u64).sum::<u64>(),
            wait: self.patience.start(),
        };
        let mut pieces = Pieces {
            now: Some(IoSource::Bytes(head)),
            rest: body.iter(),
            at: 0,
        };
        while job.bytes_done < job.bytes_wanted {
            // What a limit left of the send before, or the other half: an answer of TLS itself.
            job.flush(&self.link)?;
            // While the peer is slow the last byte is sealed after the others have left, so that a limit leaves something undone
            // and is told, instead of a whole frame that waits here.
            let left = job.bytes_wanted - job.bytes_done;
            let held_back = u64::from(left > 1 && self.is_crowded()?);
            let room =
                usize::try_from(left - held_back).map_or(CHUNK_BYTES, |room| room.min(CHUNK_BYTES));
            let filled = pieces.copy_to(&mut self.chunk[..room]);
            job.seal(&self.link, &self.chunk[..filled])?;
            let flushed = job.flush(&self.link);
            match flushed {
                // All of it was taken: this is no less sent than what a socket holds.
                Err(
                    ChannelError::Deadline { bytes_done }
                    | ChannelError::Stalled { bytes_done, .. },
                ) if bytes_done == job.bytes_wanted => return Ok(()),
                other => other?,
            }
        }
        Ok(())
    }

    /// Whether the socket's buffer is so full that a chunk may not fit.
    fn is_crowded(&self) -> Result<bool, ChannelError> {
        let socket = self.link.stream.socket.as_fd();
        sys::wait(socket, Ready::Send, Some(Duration::ZERO))
            .map(|ready| !ready)
            .map_err(|error| ChannelError::Io(Arc::new(error)))
    }

    /// Announces the end, as far as that is possible without waiting for long.
    fn announce_end(&self) -> std::io::Result<()> {
        let socket = &self.link.stream.socket;
        let mut connection = self.link.lock();
        connection.send_close_notify();
        if self.link.flush(&mut connection)? == Flushed::All {
            return Ok(());
        }
        // The peer has not read what fills the buffer. The kernel counts twice what it is asked for.
        socket.set_send_buffer_size(socket.send_buffer_size()? / 2 + LINGER_BYTES)?;
        let until = Instant::now() + LINGER_MAX;
        while self.link.flush(&mut connection)? != Flushed::All {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            sys::wait(socket.as_fd(), Ready::Send, Some(left))?;
        }
        Ok(())
    }
}

impl Drop for TlsSend {
    fn drop(&mut self) {
        // The peer must see the end even while the receiving half lives on. If the socket is gone there is nobody to tell.
        if !self.link.stream.is_shut() {
            let _ = self.announce_end();
        }
        let _ = self.link.stream.socket.shutdown(Shutdown::Write);
    }
}

/// One operation: how much of it is sealed, and how long it may wait.
struct Job {
    bytes_done: u64,
    bytes_wanted: u64,
    wait: Wait,
}

impl Job {
    /// Seals a chunk; the records wait in memory.
    fn seal(&mut self, link: &TlsLink, chunk: &[u8]) -> Result<(), ChannelError> {
        use std::io::Write;
        let sealed = link.lock().writer().write_all(chunk);
        sealed.map_err(|error| link.stream.error(error, self.bytes_done, self.bytes_wanted))?;
        self.bytes_done += chunk.len() as u64;
        Ok(())
    }

    /// Waits until the socket has taken all records that there are.
    fn flush(&mut self, link: &TlsLink) -> Result<(), ChannelError> {
        loop {
            let flushed = link.flush(&mut link.lock());
            match flushed {
                Ok(Flushed::All) => return Ok(()),
                Ok(Flushed::Some(count)) if count > 0 => self.wait.moved(),
                Ok(Flushed::Some(_)) => {}
                Err(error) => {
                    return Err(link.stream.error(error, self.bytes_done, self.bytes_wanted));
                }
            }
            self.wait_for_room(link)?;
        }
    }

    /// Waits until the socket says that it has room, or is gone.
    fn wait_for_room(&mut self, link: &TlsLink) -> Result<(), ChannelError> {
        loop {
            if link.stream.is_shut() {
                return Err(ChannelError::ShutDown);
            }
            let pace = self.wait.pace().check(self.bytes_done)?;
            let at_most = match pace {
                Pace::Forever => None,
                Pace::AtMost(time) => Some(time),
                _ => Some(Duration::ZERO),
            };
            let socket = link.stream.socket.as_fd();
            match sys::wait(socket, Ready::Send, at_most) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) => return Err(ChannelError::Io(Arc::new(error))),
            }
        }
    }
}

/// What is left to copy out of a head and its body.
struct Pieces<'s, 'd> {
    now: Option<IoSource<'d>>,
    rest: std::slice::Iter<'s, IoSource<'d>>,
    /// Bytes of `now` that are done.
    at: usize,
}

impl Pieces<'_, '_> {
    /// Copies as much as fits; returns how much, which is less than `to` only at the end.
    fn copy_to(&mut self, to: &mut [u8]) -> usize {
        let mut filled = 0;
        while let Some(piece) = self.now
            && filled < to.len()
        {
            let count = (piece.len() - self.at).min(to.len() - filled);
            let room = &mut to[filled..filled + count];
            match piece {
                IoSource::Bytes(octets) => {
                    room.copy_from_slice(&octets[self.at..self.at + count]);
                }
                IoSource::Guest(span) => {
                    if let Ok(part) = span.subspan(self.at, count) {
                        part.copy_to(room);
                    }
                }
            }
            filled += count;
            self.at += count;
            if self.at == piece.len() {
                self.now = self.rest.next().copied();
                self.at = 0;
            }
        }
        filled
    }
}
