//! The engine's end of the socket: calls to the VMM, one at a time, and what the VMM says without being asked.
//!
//! ```text
//!   ask ──► question, serial n ──► VMM ──► answer, serial n ──► reader's thread ──► ask
//!                                      └─► CANCEL, SWITCH_OVER, GUEST_GONE ──► Said
//! ```
//! The rule it keeps: a VMM that does not answer, answers something that can't be, or closes the socket, is an error of that call, within
//! a deadline.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use multifd::{Blob, VmmError};

use crate::protocol::{
    self, Ended, Header, Hello, Kind, Malformed, Reader, Role, Status, Welcome, Writer,
};
use crate::socket::{Packet, ReceiveError, Socket};

/// Answers that nobody waits for any more may lie here until the next call.
const ANSWERS_MAX: usize = 16;

/// Why a call to the VMM came to nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The VMM closed the socket, or died.
    #[error("the VMM has closed its socket ({kind} was not answered)")]
    Closed {
        /// What was asked.
        kind: Kind,
    },
    /// It did not answer in time.
    #[error("the VMM has not answered {kind} for {} ms", waited.as_millis())]
    Silent {
        /// What was asked.
        kind: Kind,
        /// How long it was waited for.
        waited: Duration,
    },
    /// It said no.
    #[error("the VMM refuses {kind} ({status:?}): {text}")]
    Refused {
        /// What was asked.
        kind: Kind,
        /// Why.
        status: Status,
        /// In its words.
        text: String,
    },
    /// Its answer can't be.
    #[error("the VMM's answer to {kind} is wrong: {source}")]
    Malformed {
        /// What was asked.
        kind: Kind,
        /// How.
        source: Malformed,
    },
    /// It could not be asked.
    #[error("the VMM can't be asked for {kind}: {source}")]
    System {
        /// What was to be asked.
        kind: Kind,
        /// What the system said.
        source: io::Error,
    },
}

impl From<LinkError> for VmmError {
    fn from(error: LinkError) -> Self {
        Self::new(error)
    }
}

/// What the VMM said by itself.
#[derive(Debug, Default)]
pub struct Said {
    cancel: AtomicBool,
    switch_over: AtomicBool,
    guest_gone: AtomicBool,
    closed: AtomicBool,
}

impl Said {
    /// It asked for the end, or closed the socket.
    #[must_use]
    pub fn wants_end(&self) -> bool {
        self.cancel.load(Ordering::Relaxed) || self.is_closed()
    }

    /// The socket is closed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// It wants a switchover now; said once.
    pub fn take_switch_over(&self) -> bool {
        self.switch_over.swap(false, Ordering::Relaxed)
    }

    /// The guest is no more; said once.
    pub fn take_guest_gone(&self) -> bool {
        self.guest_gone.swap(false, Ordering::Relaxed)
    }
}

/// An answer: its body and its descriptors.
#[derive(Debug)]
pub struct Answer {
    /// The body.
    pub body: Vec<u8>,
    /// The descriptors.
    pub descriptors: Vec<OwnedFd>,
}

/// Calls to a VMM, from any thread, one at a time.
#[derive(Debug)]
pub struct Link {
    socket: Arc<Socket>,
    said: Arc<Said>,
    calls: Mutex<Calls>,
    deadline: Duration,
}

#[derive(Debug)]
struct Calls {
    serial: u32,
    answers: Receiver<(Header, Answer)>,
}

impl Link {
    /// Over a connected socket; each call may take `deadline`. Starts a thread that ends with the socket.
    ///
    /// # Errors
    /// No thread.
    pub fn new(socket: Socket, deadline: Duration) -> io::Result<Self> {
        socket.set_send_limit(Some(deadline))?;
        let socket = Arc::new(socket);
        let said = Arc::<Said>::default();
        let (found, answers) = sync_channel(ANSWERS_MAX);
        let (theirs, their_said) = (Arc::clone(&socket), Arc::clone(&said));
        std::thread::Builder::new()
            .name("engine-reader".into())
            .spawn(move || read(&theirs, &their_said, &found))?;
        Ok(Self {
            socket,
            said,
            calls: Mutex::new(Calls { serial: 0, answers }),
            deadline,
        })
    }

    /// What the VMM said by itself.
    #[must_use]
    pub fn said(&self) -> Arc<Said> {
        Arc::clone(&self.said)
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn ask(
        &self,
        kind: Kind,
        body: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Answer, LinkError> {
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        calls.serial = calls.serial.wrapping_add(1).max(1);
        let question = Header {
            kind,
            is_answer: false,
            serial: calls.serial,
            status: Status::Done,
        };
        let until = Instant::now() + self.deadline;
        let sent = self.socket.send(&question.encode(body), descriptors);
        sent.map_err(|source| match source.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                LinkError::Closed { kind }
            }
            _ => LinkError::System { kind, source },
        })?;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let (header, answer) = match calls.answers.recv_timeout(left) {
                Ok(answer) => answer,
                Err(RecvTimeoutError::Disconnected) => return Err(LinkError::Closed { kind }),
                Err(RecvTimeoutError::Timeout) => {
                    let waited = self.deadline;
                    return Err(LinkError::Silent { kind, waited });
                }
            };
            // An answer to a question that was given up.
            if header.serial != question.serial {
                continue;
            }
            if header.kind != kind {
                let source = Malformed::Value {
                    what: "the kind of an answer",
                    value: header.kind.value().into(),
                };
                return Err(LinkError::Malformed { kind, source });
            }
            return match header.status {
                Status::Done => Ok(answer),
                status => Err(LinkError::Refused {
                    kind,
                    status,
                    text: protocol::text(&answer.body)
                        .unwrap_or_else(|error| format!("(a text that can't be read: {error})")),
                }),
            };
        }
    }

    /// Asks for something that has no answer but that it was done.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn tell(&self, kind: Kind, body: &[u8]) -> Result<(), LinkError> {
        let answer = self.ask(kind, body, &[])?;
        wrong(
            kind,
            protocol::read_nothing("an empty answer", &answer.body),
        )
    }

    /// Says who this is; gives what the VMM knows.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn hello(&self, role: Role) -> Result<Welcome, LinkError> {
        let kind = Kind::Hello;
        let answer = self.ask(kind, &Hello::of(role).encode(), &[])?;
        wrong(kind, Welcome::decode(&answer.body))
    }

    /// Asks for blobs.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn blobs(&self, kind: Kind) -> Result<Vec<Blob>, LinkError> {
        let mut answer = self.ask(kind, &[], &[])?;
        let reader = Reader::new("a list of blobs", &answer.body);
        wrong(kind, protocol::read_blobs(reader, &mut answer.descriptors))
    }

    /// Asks with blobs behind what the body has already.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn ask_with(
        &self,
        kind: Kind,
        mut body: Writer,
        blobs: &[Blob],
    ) -> Result<Answer, LinkError> {
        let file = protocol::write_blobs(&mut body, blobs)
            .map_err(|source| LinkError::System { kind, source })?;
        let descriptors: Vec<_> = file.iter().map(AsFd::as_fd).collect();
        self.ask(kind, &body.finish(), &descriptors)
    }

    /// The last word.
    pub fn ended(&self, ended: &Ended) {
        let message = Header {
            kind: Kind::Ended,
            is_answer: false,
            serial: 0,
            status: Status::Done,
        };
        // A VMM that is gone needs none.
        let _ = self.socket.send(&message.encode(&ended.encode()), &[]);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.socket.shutdown();
    }
}

/// An answer that could not be read is an error of its call.
pub(crate) fn wrong<T>(kind: Kind, read: Result<T, Malformed>) -> Result<T, LinkError> {
    read.map_err(|source| LinkError::Malformed { kind, source })
}

fn read(socket: &Socket, said: &Said, answers: &SyncSender<(Header, Answer)>) {
    loop {
        match socket.receive() {
            Ok(Some(packet)) => match take(packet, said, answers) {
                Ok(()) => {}
                Err(error) => {
                    tracing::error!(%error, "the VMM said what can't be: its socket is closed");
                    break;
                }
            },
            Ok(None) => break,
            Err(ReceiveError::Malformed(error)) => {
                tracing::error!(%error, "the VMM said what can't be: its socket is closed");
                break;
            }
            Err(error) => {
                tracing::error!(%error, "the VMM's socket can't be read");
                break;
            }
        }
    }
    said.closed.store(true, Ordering::Relaxed);
    socket.shutdown();
}

fn take(
    packet: Packet,
    said: &Said,
    answers: &SyncSender<(Header, Answer)>,
) -> Result<(), Malformed> {
    let (header, body) = Header::decode(&packet.bytes)?;
    if header.is_answer {
        let answer = Answer {
            body: body.to_vec(),
            descriptors: packet.descriptors,
        };
        // Full only of answers that nobody waits for.
        let _ = answers.try_send((header, answer));
        return Ok(());
    }
    protocol::read_nothing("what the VMM says", body)?;
    let flag = match header.kind {
        Kind::Cancel => &said.cancel,
        Kind::SwitchOver => &said.switch_over,
        Kind::GuestGone => &said.guest_gone,
        other => {
            return Err(Malformed::Value {
                what: "what a VMM says by itself",
                value: other.value().into(),
            });
        }
    };
    flag.store(true, Ordering::Relaxed);
    Ok(())
}

#[cfg(test)]
mod tests;
