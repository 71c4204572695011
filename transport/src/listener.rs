//! Accepting connections: what every kind of listener has ([`Listen`]), and the handle around it ([`Listener`]).
//!
//! Rule: accepting never sleeps in the kernel without a way to wake it, and a listener can be one of many descriptors in a poll
//! loop. A kind is one implementation of [`Listen`], in the file or folder of that kind.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::address::Address;
use crate::adopt::{self, Protection};
use crate::calling::Calling;
use crate::channel::{Channel, Closer};
use crate::error::{ListenError, Unavailable};
use crate::options::ChannelOptions;
#[cfg(not(feature = "rdma"))]
use crate::options::NO_RDMA;
#[cfg(not(feature = "tls"))]
use crate::options::NO_TLS;
use crate::sys::{self, Ready};
use crate::tcp::{TcpListening, TcpOptions};
use crate::unix::UnixListening;
use crate::vsock::VsockListening;

/// How long a peer may take for its handshake when [`Listener::accept`] was given no deadline.
const ESTABLISH_MAX: Duration = Duration::from_secs(10);

/// How long the lookup of a host name to listen on may take.
pub(crate) const RESOLVE_MAX: Duration = Duration::from_secs(10);

/// Connections that may wait to be accepted. More than `LANES_MAX` of the wire format, so that all lanes of a migration can
/// dial at once; the kernel cuts it to `net.core.somaxconn`.
pub(crate) const BACKLOG: i32 = 1024;

/// A connection, and the peer's address as text.
pub type Accepted = (Box<dyn Channel>, String);

/// One kind of listener.
pub trait Listen: Send + Sync {
    /// The next connection if one waits; never waits itself. The channel need not be [established](Channel::establish) yet.
    ///
    /// # Errors
    /// [`ListenError`].
    fn try_accept(&self) -> Result<Option<Accepted>, ListenError>;

    /// Where it listens, with what was left to it to choose.
    fn local_address(&self) -> &Address;

    /// The descriptor that is readable when a connection waits.
    fn poll_fd(&self) -> BorrowedFd<'_>;

    /// Makes the descriptor readable for good, if the kind can; called at most a few times, from any thread.
    fn shutdown(&self);

    /// How long a wait for the descriptor may be, for a kind whose [`shutdown`](Self::shutdown) wakes nobody.
    fn wait_max(&self) -> Option<Duration> {
        None
    }
}

/// Accepts channels.
pub struct Listener {
    inner: Arc<Inner>,
}

struct Inner {
    kind: Box<dyn Listen>,
    shut: AtomicBool,
}

impl Listener {
    /// Listens at `address`; `options` are for the accepted TCP connections.
    ///
    /// A host name is listened on at its first address that can be bound; port 0 takes a free one, see
    /// [`local_address`](Self::local_address). A Unix socket's path must not exist, except as a socket on which nobody listens any
    /// more, which is replaced; the path is removed when the listener is dropped, and only this user may connect
    /// ([`UnixOptions`](crate::unix::UnixOptions)).
    ///
    /// TLS and RDMA need more than this: see [`bind_with`](Self::bind_with).
    ///
    /// # Errors
    /// [`ListenError::Bind`], [`ListenError::Option`], [`ListenError::Unavailable`].
    pub fn bind(address: &Address, options: &TcpOptions) -> Result<Self, ListenError> {
        Self::bind_with(address, &options.clone().into())
    }

    /// As [`bind`](Self::bind), for every kind.
    ///
    /// # Errors
    /// As [`bind`](Self::bind).
    pub fn bind_with(address: &Address, options: &ChannelOptions) -> Result<Self, ListenError> {
        let unavailable = |cause| ListenError::Unavailable {
            address: address.to_string(),
            cause,
        };
        match address {
            Address::Tcp(target) => TcpListening::bind(target, address, options).map(Self::new),
            #[cfg(feature = "tls")]
            Address::Tls(target) => {
                protection(Protection::Tls, options).map_err(unavailable)?;
                TcpListening::bind(target, address, options).map(Self::new)
            }
            #[cfg(not(feature = "tls"))]
            Address::Tls(_) => Err(unavailable(NO_TLS)),
            #[cfg(feature = "rdma")]
            Address::Rdma(target) => {
                crate::rdma::available().map_err(unavailable)?;
                crate::rdma::Listening::bind(target, options).map(Self::new)
            }
            #[cfg(not(feature = "rdma"))]
            Address::Rdma(_) => Err(unavailable(NO_RDMA)),
            Address::Unix(path) => UnixListening::bind(path, address, &options.unix).map(Self::new),
            Address::Vsock(place) => VsockListening::bind(*place).map(Self::new),
        }
    }

    /// Accepts on a listening stream socket that somebody else made: a service manager, a jailer, a parent. TCP, Unix and vsock
    /// sockets are told apart by asking the kernel. What belongs to the socket (its path, its permissions) stays the maker's.
    ///
    /// # Errors
    /// [`ListenError::Bind`] for a descriptor that is no such socket; [`ListenError::Unavailable`].
    pub fn from_fd(
        fd: OwnedFd,
        protection: Protection,
        options: &ChannelOptions,
    ) -> Result<Self, ListenError> {
        adopt::listening(fd, protection, options).map(Self::of)
    }

    /// Dials `address` and gives out the connections on which the peer has begun to speak, so that a destination can dial its source:
    /// the source then takes what its listener accepts. One connection is always kept ready, and made anew when the peer begins to
    /// speak on it.
    ///
    /// Whoever answers at `address` is trusted with what a source says, which is its session's ticket. So this is for TLS, where the
    /// certificates say who that is, and for sockets that nobody else can reach.
    ///
    /// # Errors
    /// [`ListenError::Unavailable`] for RDMA; [`ListenError::Io`] without descriptors or a thread.
    pub fn calling(address: &Address, options: &ChannelOptions) -> Result<Self, ListenError> {
        Calling::start(address, options).map(Self::new)
    }

    /// A listener of a kind made outside this crate.
    #[must_use]
    pub fn new(kind: impl Listen + 'static) -> Self {
        Self::of(Box::new(kind))
    }

    fn of(kind: Box<dyn Listen>) -> Self {
        let shut = AtomicBool::new(false);
        Self {
            inner: Arc::new(Inner { kind, shut }),
        }
    }

    /// Where it listens, with the port that was chosen.
    #[must_use]
    pub fn local_address(&self) -> &Address {
        self.inner.kind.local_address()
    }

    /// Waits for the next connection, without end if `deadline` is `None`, and [establishes](Channel::establish) it. Returns it
    /// and the peer's address as text. For one peer at a time: who serves strangers takes [`try_accept`](Self::try_accept).
    ///
    /// # Errors
    /// [`ListenError`]. After [`ListenError::Deadline`], [`ListenError::Exhausted`], [`ListenError::Option`] and
    /// [`ListenError::Establish`] accepting may go on; after `Exhausted` better not at once.
    pub fn accept(&self, deadline: Option<Instant>) -> Result<Accepted, ListenError> {
        loop {
            if let Some((mut channel, peer)) = self.try_accept()? {
                let until = deadline.unwrap_or_else(|| Instant::now() + ESTABLISH_MAX);
                return match channel.establish(until) {
                    Ok(()) => Ok((channel, peer)),
                    Err(cause) => Err(ListenError::Establish { peer, cause }),
                };
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(ListenError::Deadline);
            }
            let at_most = match (left, self.inner.kind.wait_max()) {
                (Some(left), Some(max)) => Some(left.min(max)),
                (left, max) => left.or(max),
            };
            sys::wait(self.as_fd(), Ready::Receive, at_most).map_err(ListenError::Io)?;
        }
    }

    /// The next connection if one waits; `None` if none does. For poll loops: ask until it is `None`. The channel is not
    /// [established](Channel::establish) yet, which may take a while and is for another thread.
    ///
    /// # Errors
    /// As [`accept`](Self::accept), without the deadline.
    pub fn try_accept(&self) -> Result<Option<Accepted>, ListenError> {
        if self.inner.is_shut() {
            return Err(ListenError::ShutDown);
        }
        match self.inner.kind.try_accept() {
            Err(_) if self.inner.is_shut() => Err(ListenError::ShutDown),
            other => other,
        }
    }

    /// Ends accepting from any thread: a waiting [`accept`](Self::accept) returns [`ListenError::ShutDown`] at once.
    #[must_use]
    pub fn closer(&self) -> Closer {
        let inner = Arc::downgrade(&self.inner);
        Closer::new(move || {
            if let Some(inner) = inner.upgrade() {
                inner.shut.store(true, Ordering::SeqCst);
                inner.kind.shutdown();
            }
        })
    }
}

impl Inner {
    fn is_shut(&self) -> bool {
        self.shut.load(Ordering::SeqCst)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.kind.poll_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

/// Whether this side has what accepting with this protection needs.
pub(crate) fn protection(
    protection: Protection,
    options: &ChannelOptions,
) -> Result<(), Unavailable> {
    match protection {
        Protection::Plain => Ok(()),
        #[cfg(feature = "tls")]
        Protection::Tls if options.tls_server.is_none() => Err(Unavailable::NotConfigured {
            kind: "TLS",
            what: "this side's certificate and key",
        }),
        #[cfg(feature = "tls")]
        Protection::Tls => Ok(()),
        #[cfg(not(feature = "tls"))]
        Protection::Tls => {
            let _ = options;
            Err(NO_TLS)
        }
    }
}
