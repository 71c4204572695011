//! Sockets that somebody else made: inherited, passed over a Unix socket, accepted by the VMM itself.
//!
//! Rule: what a descriptor is, the kernel is asked; what protects it, the caller says. Nothing is ever done without TLS because a
//! descriptor cannot tell.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use socket2::{Domain, SockAddr, Socket, Type};

use crate::address::Address;
use crate::channel::Channel;
use crate::error::{AdoptError, ListenError};
use crate::listener::{Listen, protection as check};
use crate::options::ChannelOptions;
use crate::stream::StreamChannel;
use crate::tcp::{self, TcpListening};
use crate::unix::{self, UnixListening};
use crate::vsock::{self, VsockListening};

/// What protects the connections of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// Nothing but where the socket can be reached from.
    Plain,
    /// TLS, on a TCP socket.
    Tls,
}

/// Which part this side takes in a connection, which matters to TLS only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part<'n> {
    /// It dialled, or acts so: it checks that the peer's certificate is for this host name, unless its
    /// [`TlsClient`](crate::tls::TlsClient) asks for another.
    Dialled(&'n str),
    /// It accepted.
    Accepted,
}

/// The kinds of stream socket that there are channels over.
enum Family {
    Internet,
    Unix,
    Vsock,
}

/// A channel over a connected TCP, Unix or vsock stream socket. As after [`Listener::try_accept`](crate::Listener::try_accept), it is to be
/// [established](Channel::establish) before it is split.
///
/// The options of `options.tcp` are set on a TCP socket, except those that decide about buffers before a connection is made.
///
/// # Errors
/// [`AdoptError`]; the descriptor is then closed.
pub fn from_fd(
    fd: OwnedFd,
    protection: Protection,
    part: Part<'_>,
    options: &ChannelOptions,
) -> Result<Box<dyn Channel>, AdoptError> {
    let socket = Socket::from(fd);
    let family = family(&socket, Role::Connected)?;
    match (protection, family) {
        (Protection::Plain, Family::Internet) => {
            set_options(&socket, options)?;
            Ok(tcp::channel(socket)?)
        }
        (Protection::Plain, Family::Unix) => Ok(unix_channel(socket)?),
        (Protection::Plain, Family::Vsock) => Ok(vsock::channel(socket)?),
        (Protection::Tls, Family::Internet) => {
            set_options(&socket, options)?;
            tls_channel(socket, part, options)
        }
        (Protection::Tls, _) => Err(NO_TLS_OVER),
    }
}

const NO_TLS_OVER: AdoptError = AdoptError::Kind("TLS is spoken over TCP sockets only");

#[cfg(feature = "tls")]
fn tls_channel(
    socket: Socket,
    part: Part<'_>,
    options: &ChannelOptions,
) -> Result<Box<dyn Channel>, AdoptError> {
    let name = tcp::name("tls", &socket)?;
    match (part, &options.tls_client, &options.tls_server) {
        (Part::Accepted, _, Some(server)) => Ok(crate::tls::accepted(socket, &name, server)?),
        (Part::Dialled(host), Some(client), _) => {
            crate::tls::dialled(socket, &name, client, host).map_err(AdoptError::Establish)
        }
        (Part::Accepted, _, None) => {
            check(Protection::Tls, options)?;
            Err(NO_TLS_OVER)
        }
        (Part::Dialled(_), None, _) => Err(AdoptError::Unavailable(crate::options::NO_AUTHORITY)),
    }
}

#[cfg(not(feature = "tls"))]
fn tls_channel(
    _: Socket,
    _: Part<'_>,
    options: &ChannelOptions,
) -> Result<Box<dyn Channel>, AdoptError> {
    check(Protection::Tls, options)?;
    Err(NO_TLS_OVER)
}

/// As [`Listener::from_fd`](crate::Listener::from_fd).
pub(crate) fn listening(
    fd: OwnedFd,
    protection: Protection,
    options: &ChannelOptions,
) -> Result<Box<dyn Listen>, ListenError> {
    let address = format!("descriptor {}", fd.as_raw_fd());
    let unavailable = |cause| ListenError::Unavailable {
        address: address.clone(),
        cause,
    };
    check(protection, options).map_err(unavailable)?;
    let failed = |cause| ListenError::Bind {
        address: address.clone(),
        cause,
    };
    let other = |error: AdoptError| failed(io::Error::new(io::ErrorKind::InvalidInput, error));
    let socket = Socket::from(fd);
    let family = family(&socket, Role::Listening).map_err(other)?;
    match (protection, family) {
        (_, Family::Internet) => {
            let listening = TcpListening::over(socket, protection, options).map_err(failed)?;
            Ok(Box::new(listening))
        }
        (Protection::Tls, _) => Err(other(NO_TLS_OVER)),
        (Protection::Plain, Family::Unix) => {
            let at = socket.local_addr().map_err(failed)?;
            let at = unix_path(&at).unwrap_or_default();
            let listening = UnixListening::over(socket, Address::Unix(at), None).map_err(failed)?;
            Ok(Box::new(listening))
        }
        (Protection::Plain, Family::Vsock) => {
            Ok(Box::new(VsockListening::over(socket).map_err(failed)?))
        }
    }
}

/// What a socket is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Connected,
    Listening,
}

fn family(socket: &Socket, role: Role) -> Result<Family, AdoptError> {
    let kind = socket
        .r#type()
        .map_err(|error| match error.raw_os_error() {
            Some(libc::ENOTSOCK) => AdoptError::Kind("the descriptor is no socket"),
            _ => AdoptError::Io(error),
        })?;
    if kind != Type::STREAM {
        return Err(AdoptError::Kind("the socket is no stream socket"));
    }
    match (role, socket.is_listener()?) {
        (Role::Connected, true) => {
            return Err(AdoptError::Kind(
                "the socket listens and is not a connection: make a listener of it",
            ));
        }
        (Role::Listening, false) => {
            return Err(AdoptError::Kind(
                "the socket does not listen (listen(2) was not called)",
            ));
        }
        _ => {}
    }
    match socket.domain()? {
        Domain::IPV4 | Domain::IPV6 => Ok(Family::Internet),
        Domain::UNIX => Ok(Family::Unix),
        Domain::VSOCK => Ok(Family::Vsock),
        _ => Err(AdoptError::Kind(
            "the socket is of a family that there is no channel over: TCP, Unix and vsock are known",
        )),
    }
}

fn set_options(socket: &Socket, options: &ChannelOptions) -> Result<(), AdoptError> {
    let set = options
        .tcp
        .apply(socket)
        .and_then(|()| options.tcp.fit(socket));
    set.map_err(|refused| AdoptError::Option {
        option: refused.option,
        cause: refused.source,
    })
}

fn unix_channel(socket: Socket) -> io::Result<Box<dyn Channel>> {
    match unix_path(&socket.peer_addr()?) {
        Some(path) => unix::dialled(socket, &path.display().to_string()),
        None => Ok(Box::new(StreamChannel::new(socket, "unix ↔ passed in")?)),
    }
}

/// The path, or the abstract name behind `@`; a socket need not have any.
fn unix_path(address: &SockAddr) -> Option<PathBuf> {
    let path = address.as_pathname().map(PathBuf::from);
    path.or_else(|| {
        let name = String::from_utf8_lossy(address.as_abstract_namespace()?).into_owned();
        Some(format!("@{name}").into())
    })
}
