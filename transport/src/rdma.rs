//! The RDMA kind: InfiniBand, RoCE and iWARP by verbs, connected by the connection manager (rdma_cm).
//!
//! Heads and small pieces go as messages into buffers that the receiver posted. Bodies are written, straight from registered guest
//! memory, into the receiver's *landing*: slots of the channel's own, whose key it gave away, and out of which it copies what was admitted to
//! where it belongs. Messages and slots are used only with credit. See `docs/decisions/0020-rdma-channels.md` for why the landing is not
//! guest memory itself.
//!
//! Rule: a key covers the channel's own buffers and nothing else, and is withdrawn when its half ends. Libraries are opened when they are
//! first needed; a host without them, or without a device, is told what is missing and runs everything else.

mod channel;
mod link;
mod receive;
mod registrar;
mod send;
mod sys;
mod wire;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use self::channel::{DialError, RdmaChannel};
use self::registrar::Registrar;
pub use self::registrar::{CHUNK_BYTES, Registration};
use self::sys::{Events, Happened, Id};
use crate::address::HostPort;
use crate::channel::Channel;
use crate::error::{ConnectAttempt, ConnectError, Unavailable};
use crate::memory::GuestMemory;
use crate::tcp;

/// What RDMA channels need; clones share registered memory.
#[derive(Clone, Default)]
pub struct RdmaOptions {
    registrar: Option<Arc<Registrar>>,
}

impl RdmaOptions {
    /// Sends `memory` from where it lies. Without this, everything is copied into the channel's own buffers first.
    #[must_use]
    pub fn with_memory(memory: GuestMemory, registration: Registration) -> Self {
        Self {
            registrar: Some(Arc::new(Registrar::new(memory, registration))),
        }
    }
}

impl fmt::Debug for RdmaOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RdmaOptions").finish_non_exhaustive()
    }
}

/// Whether this host can do RDMA: the libraries are there, and a device.
///
/// # Errors
/// [`Unavailable::Host`], which says what is missing and what to do.
pub fn available() -> Result<(), Unavailable> {
    sys::available().map_err(Unavailable::Host)
}

/// Connects by RDMA to a host and port of the connection manager.
///
/// # Errors
/// [`ConnectError`]; [`ConnectError::Unavailable`] if this host lacks a library or a device.
pub fn connect(
    target: &HostPort,
    options: &RdmaOptions,
    deadline: Instant,
) -> Result<Box<dyn Channel>, ConnectError> {
    available().map_err(|source| ConnectError::Unavailable {
        target: format!("rdma:{target}"),
        source,
    })?;
    let mut attempts = Vec::new();
    for address in tcp::resolve(target, deadline)? {
        match RdmaChannel::dial(address, options.registrar.clone(), deadline) {
            Ok(channel) => return Ok(Box::new(channel)),
            Err(DialError::Io(source)) => attempts.push(ConnectAttempt {
                address: address.to_string(),
                source,
            }),
            Err(DialError::Deadline) => {
                return Err(ConnectError::Deadline {
                    target: target.to_string(),
                    attempts,
                });
            }
            Err(DialError::Establish(source)) => {
                return Err(ConnectError::Establish {
                    target: target.to_string(),
                    source,
                });
            }
        }
    }
    Err(ConnectError::Refused {
        target: target.to_string(),
        attempts,
    })
}

/// Takes connection requests.
pub(crate) struct Listening {
    id: Id,
}

impl Listening {
    pub(crate) fn bind(address: SocketAddr, backlog: i32) -> io::Result<Self> {
        let id = Id::new(Arc::new(Events::new()?))?;
        id.bind_and_listen(address, backlog)?;
        Ok(Self { id })
    }

    /// Where it listens, with the port that was chosen.
    pub(crate) fn address(&self) -> Option<SocketAddr> {
        self.id.addresses().0
    }

    /// The next request, if one waits.
    pub(crate) fn next(&self) -> io::Result<Option<Box<dyn Channel>>> {
        while let Some(event) = self.id.events().next()? {
            // Other events are of requests that were given up meanwhile.
            if event.happened == Happened::Request
                && let Some(channel) = RdmaChannel::requested(event)
            {
                return Ok(Some(Box::new(channel)));
            }
        }
        Ok(None)
    }
}

impl AsFd for Listening {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.id.events().as_fd()
    }
}
