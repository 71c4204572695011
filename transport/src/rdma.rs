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
use std::time::{Duration, Instant};

use self::channel::{DialError, RdmaChannel};
use self::registrar::Registrar;
pub use self::registrar::{CHUNK_BYTES, Registration};
use self::sys::{Events, Happened, Id};
use crate::address::{Address, HostPort};
use crate::channel::Channel;
use crate::error::{ConnectAttempt, ConnectError, ListenError, Unavailable};
use crate::listener::{Accepted, BACKLOG, Listen, RESOLVE_MAX};
use crate::memory::GuestMemory;
use crate::options::ChannelOptions;

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
    let options = ChannelOptions {
        rdma: options.clone(),
        ..ChannelOptions::default()
    };
    connect_with(target, &options, deadline)
}

/// As [`connect`], with the address that worked last first. One address is tried after the other, each with an even share of the time
/// that is left.
pub(crate) fn connect_with(
    target: &HostPort,
    options: &ChannelOptions,
    deadline: Instant,
) -> Result<Box<dyn Channel>, ConnectError> {
    available().map_err(|cause| ConnectError::Unavailable {
        target: format!("rdma:{target}"),
        cause,
    })?;
    let addresses = options.resolver.resolve(target, deadline)?;
    let (mut attempts, mut silent) = (Vec::new(), false);
    for (index, address) in addresses.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / u32::try_from(addresses.len() - index).unwrap_or(u32::MAX);
        let registrar = options.rdma.registrar.clone();
        let cause = match RdmaChannel::dial(*address, registrar, Instant::now() + share) {
            Ok(channel) => {
                options.resolver.worked(target, *address);
                return Ok(Box::new(channel));
            }
            Err(DialError::Io(cause)) => cause,
            Err(DialError::Deadline) => {
                silent = true;
                io::Error::new(io::ErrorKind::TimedOut, "no answer")
            }
            Err(DialError::Establish(cause)) => {
                return Err(ConnectError::Establish {
                    target: target.to_string(),
                    cause,
                });
            }
        };
        attempts.push(ConnectAttempt {
            address: address.to_string(),
            cause,
        });
    }
    let target = target.to_string();
    Err(if silent {
        ConnectError::Deadline { target, attempts }
    } else {
        ConnectError::Refused { target, attempts }
    })
}

/// Takes connection requests.
pub(crate) struct Listening {
    id: Id,
    address: Address,
}

/// How long accepting sleeps before it looks whether it was shut down, which wakes nobody here.
const TICK: Duration = Duration::from_millis(100);

impl Listening {
    /// Listens at the first address of the host that can be bound.
    pub(crate) fn bind(target: &HostPort, options: &ChannelOptions) -> Result<Self, ListenError> {
        let failed = |cause| ListenError::Bind {
            address: format!("rdma:{target}"),
            cause,
        };
        let addresses = options
            .resolver
            .resolve(target, Instant::now() + RESOLVE_MAX)
            .map_err(|error| failed(io::Error::other(error)))?;
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for candidate in addresses {
            match Self::bind_one(candidate) {
                Ok(listening) => return Ok(listening),
                Err(error) => last = error,
            }
        }
        Err(failed(last))
    }

    fn bind_one(candidate: SocketAddr) -> io::Result<Self> {
        let id = Id::new(Arc::new(Events::new()?))?;
        id.bind_and_listen(candidate, BACKLOG)?;
        let bound = id.addresses().0.unwrap_or(candidate);
        let address = match Address::from(bound) {
            Address::Tcp(bound) => Address::Rdma(bound),
            other => other,
        };
        Ok(Self { id, address })
    }
}

impl Listen for Listening {
    fn try_accept(&self) -> Result<Option<Accepted>, ListenError> {
        while let Some(event) = self.id.events().next().map_err(ListenError::Io)? {
            // Other events are of requests that were given up meanwhile.
            if event.happened == Happened::Request
                && let Some(channel) = RdmaChannel::requested(event)
            {
                let name = channel.describe();
                return Ok(Some((Box::new(channel), name)));
            }
        }
        Ok(None)
    }

    fn local_address(&self) -> &Address {
        &self.address
    }

    fn poll_fd(&self) -> BorrowedFd<'_> {
        self.id.events().as_fd()
    }

    fn shutdown(&self) {}

    fn wait_max(&self) -> Option<Duration> {
        Some(TICK)
    }
}
