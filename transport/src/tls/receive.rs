//! The receiving half: chunks of the socket are opened record by record, and what they hold is copied to where it belongs.
//!
//! Rule: of what was opened nothing is lost: it waits for the next receive. At most one record of 16 KiB waits so, beside one chunk
//! that is not opened yet.

use std::io::{self, BufRead, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::Error;

use super::channel::{CHUNK_BYTES, TlsLink};
use super::handshake::explain;
use crate::channel::{READ_AHEAD_BYTES, ReceiveHalf};
use crate::error::{ChannelError, remember};
use crate::memory::Span;
use crate::patience::{Pace, Patience, Wait};
use crate::sys::{self, Ready};

pub(super) struct TlsReceive {
    link: Arc<TlsLink>,
    /// What came from the socket; `start..end` is not opened yet.
    chunk: Box<[u8]>,
    start: usize,
    end: usize,
    /// Bytes that are opened and not taken yet.
    held: usize,
    /// The peer announced the end of its stream.
    ended: bool,
    patience: Patience,
    failed: Option<ChannelError>,
}

impl ReceiveHalf for TlsReceive {
    fn receive(&mut self, buf: &mut [u8]) -> Result<(), ChannelError> {
        self.link.check(self.failed.as_ref())?;
        let mut wait = self.patience.start();
        let result = if buf.len() <= READ_AHEAD_BYTES {
            // All or nothing: it is not taken before it is all here.
            self.hold(buf.len(), 0, buf.len() as u64, &mut wait)
                .and_then(|()| self.fill(buf, &mut wait))
        } else {
            self.fill(buf, &mut wait)
        };
        remember(&mut self.failed, result)
    }

    fn receive_into(&mut self, spans: &[Span<'_>]) -> Result<(), ChannelError> {
        self.link.check(self.failed.as_ref())?;
        let mut wait = self.patience.start();
        let bytes_wanted = spans.iter().map(|span| span.len() as u64).sum();
        let mut done = 0;
        let result = spans.iter().try_for_each(|span| {
            let mut at = 0;
            while at < span.len() {
                self.hold(1, done, bytes_wanted, &mut wait)?;
                let count = self.take(span.len() - at, |octets| {
                    if let Ok(part) = span.subspan(at, octets.len()) {
                        part.copy_from(octets);
                    }
                });
                at += count;
                done += count as u64;
            }
            Ok(())
        });
        remember(&mut self.failed, result)
    }

    fn drain(&mut self, bytes_max: u64) -> Result<u64, ChannelError> {
        self.link.check(self.failed.as_ref())?;
        let mut bytes_done = 0;
        while bytes_done < bytes_max {
            let mut wait = self.patience.start();
            match self.hold(1, 0, 1, &mut wait) {
                Ok(()) => {
                    let left = usize::try_from(bytes_max - bytes_done).unwrap_or(usize::MAX);
                    bytes_done += self.take(left, |_| ()) as u64;
                }
                Err(ChannelError::Closed) => break,
                Err(error) => return remember(&mut self.failed, Err(error)),
            }
        }
        Ok(bytes_done)
    }

    fn peek(&self, to: &mut [u8]) -> usize {
        let mut connection = self.link.lock();
        connection.reader().fill_buf().map_or(0, |octets| {
            let count = octets.len().min(to.len());
            to[..count].copy_from_slice(&octets[..count]);
            count
        })
    }

    fn buffered(&self) -> usize {
        self.held
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

impl TlsReceive {
    pub(super) fn new(link: Arc<TlsLink>) -> Self {
        // What came behind the handshake's last bytes is opened already. An error repeats itself at the first receive.
        let (held, ended) = link
            .lock()
            .process_new_packets()
            .map_or((0, false), |state| {
                (state.plaintext_bytes_to_read(), state.peer_has_closed())
            });
        Self {
            link,
            chunk: vec![0; CHUNK_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            held,
            ended,
            patience: Patience::default(),
            failed: None,
        }
    }

    fn fill(&mut self, buf: &mut [u8], wait: &mut Wait) -> Result<(), ChannelError> {
        let bytes_wanted = buf.len() as u64;
        let mut at = 0;
        while at < buf.len() {
            self.hold(1, at as u64, bytes_wanted, wait)?;
            at += self.take(buf.len() - at, |octets| {
                buf[at..at + octets.len()].copy_from_slice(octets);
            });
        }
        Ok(())
    }

    /// Takes at most `count` bytes of what is held, as much as lies together; returns how many.
    fn take(&mut self, count: usize, to: impl FnOnce(&[u8])) -> usize {
        let mut connection = self.link.lock();
        let mut reader = connection.reader();
        let taken = match reader.fill_buf() {
            Ok(octets) => {
                let octets = octets.get(..count).unwrap_or(octets);
                to(octets);
                octets.len()
            }
            // Only asked when something is held.
            Err(_) => 0,
        };
        reader.consume(taken);
        self.held -= taken;
        taken
    }

    /// Waits until at least `count` bytes are held, of an operation that had `bytes_done` of `bytes_wanted`.
    fn hold(
        &mut self,
        count: usize,
        bytes_done: u64,
        bytes_wanted: u64,
        wait: &mut Wait,
    ) -> Result<(), ChannelError> {
        while self.held < count {
            if self.open()? {
                continue;
            }
            let done = bytes_done + self.held as u64;
            if self.ended {
                return Err(self.link.stream.end(done, bytes_wanted));
            }
            let pace = wait.pace().check(bytes_done)?;
            match (&self.link.stream.socket).read(&mut self.chunk) {
                Ok(0) => return Err(self.cut(done)),
                Ok(more) => {
                    (self.start, self.end) = (0, more);
                    wait.moved();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait(pace)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.link.stream.error(error, done, bytes_wanted)),
            }
        }
        Ok(())
    }

    /// Opens some of what came from the socket; says whether there was any.
    fn open(&mut self) -> Result<bool, ChannelError> {
        if self.start == self.end || self.ended {
            return Ok(false);
        }
        let mut connection = self.link.lock();
        let mut octets = &self.chunk[self.start..self.end];
        let before = octets.len();
        connection
            .read_tls(&mut octets)
            .map_err(|error| ChannelError::Io(Arc::new(error)))?;
        self.start += before - octets.len();
        let result = connection.process_new_packets();
        // An answer of TLS itself, or the alert that says what is wrong. What the socket does not take now goes with the next send.
        let _ = self.link.flush(&mut connection);
        drop(connection);
        match result {
            Ok(state) => {
                self.held = state.plaintext_bytes_to_read();
                self.ended = state.peer_has_closed();
                Ok(true)
            }
            Err(_) if self.link.stream.is_shut() => Err(ChannelError::ShutDown),
            Err(error) => Err(self.link.stream.lose(meaning(&error))),
        }
    }

    /// The connection ended though the peer had not announced it: its process died, or somebody cut the stream.
    fn cut(&self, bytes_done: u64) -> ChannelError {
        if self.link.stream.is_shut() {
            return ChannelError::ShutDown;
        }
        self.link.stream.lose(ChannelError::Reset { bytes_done })
    }

    fn wait(&self, pace: Pace) -> Result<(), ChannelError> {
        let at_most = match pace {
            Pace::Forever => None,
            Pace::AtMost(time) => Some(time),
            _ => return Ok(()),
        };
        let socket = self.link.stream.socket.as_fd();
        sys::wait(socket, Ready::Receive, at_most)
            .map_err(|error| ChannelError::Io(Arc::new(error)))?;
        if self.link.stream.is_shut() {
            return Err(ChannelError::ShutDown);
        }
        Ok(())
    }
}

fn meaning(error: &Error) -> ChannelError {
    ChannelError::Tls(match error {
        Error::AlertReceived(alert) => explain(*alert).into(),
        Error::DecryptError => "bytes were changed on the way".into(),
        other => other.to_string().into(),
    })
}
