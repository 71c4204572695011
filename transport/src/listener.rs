//! Accepting connections, TCP and Unix alike.
//!
//! Rule: accepting never sleeps in the kernel without a way to wake it, and the socket is nonblocking, so that a listener can
//! also be one of many descriptors in a poll loop.

use std::fs;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use socket2::{Domain, SockAddr, Socket, Type};

use crate::address::{Address, HostPort};
use crate::channel::{Channel, Closer};
use crate::error::{ConnectError, ListenError, Unavailable};
use crate::options::ChannelOptions;
#[cfg(not(feature = "rdma"))]
use crate::options::NO_RDMA;
#[cfg(not(feature = "tls"))]
use crate::options::NO_TLS;
#[cfg(feature = "rdma")]
use crate::rdma::Listening;
use crate::sys::{self, Ready};
use crate::tcp::{self, OptionRefused, TcpOptions};
use crate::unix;

/// Connections that may wait to be accepted. More than `LANES_MAX` of the wire format, so that all lanes of a migration can
/// dial at once; the kernel cuts it to `net.core.somaxconn`.
const BACKLOG: i32 = 1024;

/// How long a peer may take for its handshake when [`Listener::accept`] was given no deadline.
const ESTABLISH_MAX: std::time::Duration = std::time::Duration::from_secs(10);

/// How long the lookup of a host name to listen on may take.
const RESOLVE_MAX: std::time::Duration = std::time::Duration::from_secs(10);

/// A socket that accepts channels.
pub struct Listener {
    inner: Arc<Inner>,
    options: ChannelOptions,
    address: Address,
    /// Removes the path of a Unix socket when the listener is dropped.
    _path: Option<OwnPath>,
}

struct Inner {
    source: Requests,
    shut: AtomicBool,
}

/// Where connections come from.
enum Requests {
    Socket(Socket),
    #[cfg(feature = "rdma")]
    Rdma(Listening),
}

/// How long accepting by RDMA sleeps before it looks whether it was shut down, which wakes nobody there.
#[cfg(feature = "rdma")]
const TICK: std::time::Duration = std::time::Duration::from_millis(100);

impl Listener {
    /// Listens at `address`; `options` are for the accepted TCP connections.
    ///
    /// A host name is listened on at its first address that can be bound; port 0 takes a free one, see
    /// [`local_address`](Self::local_address). A Unix socket's path must not exist, except as a socket on which nobody listens any
    /// more, which is replaced; the path is removed when the listener is dropped.
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
        available(address, options).map_err(|source| ListenError::Unavailable {
            address: address.to_string(),
            source,
        })?;
        let failed = |source| ListenError::Bind {
            address: address.to_string(),
            source,
        };
        #[cfg(feature = "rdma")]
        if let Address::Rdma(target) = address {
            return bind_rdma(target, options).map_err(failed);
        }
        let (socket, bound, path) = match address {
            Address::Tcp(target) | Address::Tls(target) | Address::Rdma(target) => {
                let socket = bind_tcp(target, &options.tcp, address)?;
                let bound = socket.local_addr().map_err(failed)?.as_socket();
                let bound = match (address, bound.map(Address::from)) {
                    (Address::Tls(_), Some(Address::Tcp(bound))) => Address::Tls(bound),
                    (_, bound) => bound.unwrap_or_else(|| address.clone()),
                };
                (socket, bound, None)
            }
            Address::Unix(path) => {
                let (socket, path) = bind_unix(path).map_err(failed)?;
                (socket, address.clone(), Some(path))
            }
        };
        socket.set_nonblocking(true).map_err(failed)?;
        let inner = Arc::new(Inner {
            source: Requests::Socket(socket),
            shut: AtomicBool::new(false),
        });
        Ok(Self {
            inner,
            options: options.clone(),
            address: bound,
            _path: path,
        })
    }

    /// Where it listens, with the port that was chosen.
    #[must_use]
    pub fn local_address(&self) -> &Address {
        &self.address
    }

    /// Waits for the next connection, without end if `deadline` is `None`, and [establishes](Channel::establish) it. Returns it
    /// and the peer's address as text. For one peer at a time: who serves strangers takes [`try_accept`](Self::try_accept).
    ///
    /// # Errors
    /// [`ListenError`]. After [`ListenError::Deadline`], [`ListenError::Exhausted`], [`ListenError::Option`] and
    /// [`ListenError::Establish`] accepting may go on; after `Exhausted` better not at once.
    pub fn accept(
        &self,
        deadline: Option<Instant>,
    ) -> Result<(Box<dyn Channel>, String), ListenError> {
        loop {
            if let Some((mut channel, peer)) = self.try_accept()? {
                let until = deadline.unwrap_or_else(|| Instant::now() + ESTABLISH_MAX);
                return match channel.establish(until) {
                    Ok(()) => Ok((channel, peer)),
                    Err(source) => Err(ListenError::Establish { peer, source }),
                };
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(ListenError::Deadline);
            }
            let left = match &self.inner.source {
                Requests::Socket(_) => left,
                #[cfg(feature = "rdma")]
                Requests::Rdma(_) => Some(left.unwrap_or(TICK).min(TICK)),
            };
            sys::wait(self.as_fd(), Ready::Receive, left).map_err(ListenError::Io)?;
        }
    }

    /// The next connection if one waits; `None` if none does. For poll loops: ask until it is `None`. The channel is not
    /// [established](Channel::establish) yet, which may take a while and is for another thread.
    ///
    /// # Errors
    /// As [`accept`](Self::accept), without the deadline.
    #[expect(clippy::type_complexity, reason = "the pair of `accept`, or nothing")]
    pub fn try_accept(&self) -> Result<Option<(Box<dyn Channel>, String)>, ListenError> {
        loop {
            if self.inner.shut.load(Ordering::SeqCst) {
                return Err(ListenError::ShutDown);
            }
            // Without RDMA there is one kind of source only.
            #[cfg_attr(not(feature = "rdma"), allow(clippy::infallible_destructuring_match))]
            let socket = match &self.inner.source {
                Requests::Socket(socket) => socket,
                #[cfg(feature = "rdma")]
                Requests::Rdma(listening) => {
                    let next = listening.next().map_err(ListenError::Io)?;
                    return Ok(next.map(|channel| {
                        let name = channel.describe();
                        (channel, name)
                    }));
                }
            };
            match socket.accept() {
                Ok((socket, peer)) => return self.channel(socket, &peer),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                // A connection that died in the queue says nothing about the next one (accept(2), "Error handling").
                Err(error) if dies_in_queue(&error) => {}
                Err(_) if self.inner.shut.load(Ordering::SeqCst) => {
                    return Err(ListenError::ShutDown);
                }
                Err(error) if is_exhausted(&error) => return Err(ListenError::Exhausted(error)),
                Err(error) => return Err(ListenError::Io(error)),
            }
        }
    }

    /// Ends accepting from any thread: a waiting [`accept`](Self::accept) returns [`ListenError::ShutDown`] at once.
    #[must_use]
    pub fn closer(&self) -> Closer {
        let inner = Arc::downgrade(&self.inner);
        Closer::new(move || {
            if let Some(inner) = inner.upgrade() {
                inner.shut.store(true, Ordering::SeqCst);
                match &inner.source {
                    // A listening socket that is shut down becomes ready and stays so; it cannot fail otherwise than by being
                    // shut down.
                    Requests::Socket(socket) => drop(socket.shutdown(Shutdown::Both)),
                    #[cfg(feature = "rdma")]
                    Requests::Rdma(_) => {}
                }
            }
        })
    }

    #[expect(clippy::type_complexity, reason = "as `try_accept`")]
    fn channel(
        &self,
        socket: Socket,
        peer: &SockAddr,
    ) -> Result<Option<(Box<dyn Channel>, String)>, ListenError> {
        if matches!(self.address, Address::Unix(_)) {
            let channel = unix::accepted(socket, &self.address).map_err(ListenError::Io)?;
            return Ok(Some((channel, self.address.to_string())));
        }
        let peer = tcp::print(peer);
        let options = &self.options.tcp;
        options
            .apply(&socket)
            .and_then(|()| options.fit(&socket))
            .map_err(|refused| option_error(refused, &peer))?;
        match self.over_tcp(socket) {
            Ok(channel) => Ok(Some((channel, peer))),
            // Reset between being accepted and being asked for its address: as if it had died in the queue.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => self.try_accept(),
            Err(error) => Err(ListenError::Io(error)),
        }
    }

    fn over_tcp(&self, socket: Socket) -> io::Result<Box<dyn Channel>> {
        #[cfg(feature = "tls")]
        if let (Address::Tls(_), Some(server)) = (&self.address, &self.options.tls_server) {
            let name = tcp::name("tls", &socket)?;
            return crate::tls::accepted(socket, &name, server);
        }
        tcp::channel(socket)
    }
}

/// Whether this side has what the kind needs.
fn available(address: &Address, options: &ChannelOptions) -> Result<(), Unavailable> {
    match address {
        #[cfg(feature = "tls")]
        Address::Tls(_) if options.tls_server.is_none() => Err(Unavailable::NotConfigured {
            kind: "TLS",
            what: "this side's certificate and key",
        }),
        #[cfg(not(feature = "tls"))]
        Address::Tls(_) => Err(NO_TLS),
        #[cfg(feature = "rdma")]
        Address::Rdma(_) => crate::rdma::available(),
        #[cfg(not(feature = "rdma"))]
        Address::Rdma(_) => Err(NO_RDMA),
        _ => {
            let _ = options;
            Ok(())
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.inner.source {
            Requests::Socket(socket) => socket.as_fd(),
            #[cfg(feature = "rdma")]
            Requests::Rdma(listening) => listening.as_fd(),
        }
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

fn option_error(refused: OptionRefused, peer: &str) -> ListenError {
    ListenError::Option {
        peer: peer.to_owned(),
        option: refused.option,
        source: refused.source,
    }
}

fn dies_in_queue(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::EINTR
                | libc::ECONNABORTED
                | libc::EPROTO
                | libc::ENETDOWN
                | libc::ENETUNREACH
                | libc::EHOSTDOWN
                | libc::EHOSTUNREACH
                | libc::ENONET
                | libc::ENOPROTOOPT
                | libc::EOPNOTSUPP
        )
    )
}

fn is_exhausted(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)
    )
}

fn bind_tcp(
    target: &HostPort,
    options: &TcpOptions,
    address: &Address,
) -> Result<Socket, ListenError> {
    let failed = |source| ListenError::Bind {
        address: address.to_string(),
        source,
    };
    let addresses =
        tcp::resolve(target, Instant::now() + RESOLVE_MAX).map_err(|error| match error {
            ConnectError::Resolve { source, .. } => failed(source),
            other => failed(io::Error::other(other)),
        })?;
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for candidate in addresses {
        let socket = tcp::socket(candidate).map_err(failed)?;
        options
            .apply(&socket)
            .map_err(|refused| option_error(refused, "anybody"))?;
        // A new listener must not wait for the last minute's connections of the old one to be forgotten.
        socket.set_reuse_address(true).map_err(failed)?;
        match socket
            .bind(&candidate.into())
            .and_then(|()| socket.listen(BACKLOG))
        {
            Ok(()) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    Err(failed(last))
}

#[cfg(feature = "rdma")]
fn bind_rdma(target: &HostPort, options: &ChannelOptions) -> io::Result<Listener> {
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    let addresses = tcp::resolve(target, Instant::now() + RESOLVE_MAX).map_err(io::Error::other)?;
    for candidate in addresses {
        match Listening::bind(candidate, BACKLOG) {
            Ok(listening) => {
                let bound = listening.address().unwrap_or(candidate);
                let address = match Address::from(bound) {
                    Address::Tcp(bound) => Address::Rdma(bound),
                    other => other,
                };
                let inner = Arc::new(Inner {
                    source: Requests::Rdma(listening),
                    shut: AtomicBool::new(false),
                });
                return Ok(Listener {
                    inner,
                    options: options.clone(),
                    address,
                    _path: None,
                });
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn bind_unix(path: &Path) -> io::Result<(Socket, OwnPath)> {
    let address = SockAddr::unix(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    match socket.bind(&address) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_stale(path, &address) => {
            fs::remove_file(path)?;
            socket.bind(&address)?;
        }
        other => other?,
    }
    let own = OwnPath::new(path)?;
    socket.listen(BACKLOG)?;
    Ok((socket, own))
}

/// Whether the path is a socket on which nobody listens.
fn is_stale(path: &Path, address: &SockAddr) -> bool {
    let is_socket =
        fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    is_socket
        && Socket::new(Domain::UNIX, Type::STREAM, None)
            .and_then(|probe| {
                probe.set_nonblocking(true)?;
                probe.connect(address)
            })
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// The path of a socket of ours, as it was when it was made.
struct OwnPath {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl OwnPath {
    fn new(path: &Path) -> io::Result<Self> {
        let metadata = fs::symlink_metadata(path)?;
        Ok(Self {
            path: path.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }
}

impl Drop for OwnPath {
    fn drop(&mut self) {
        // Somebody may have replaced it; then it is theirs. A failure leaves a stale socket, which `bind` replaces.
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| metadata.dev() == self.device && metadata.ino() == self.inode);
        if ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}
