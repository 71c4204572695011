//! The TLS kind: TCP with TLS 1.3 above it, so that nobody on the way reads or changes what is sent (SPEC: SEC-3).
//!
//! Rule: a channel that exists is one that may be trusted. The handshake is part of connecting and of
//! [`establish`](crate::Channel::establish); the peer's certificate is checked against the authority (CA) that this side was given, never
//! against the host's list, and the accepting side's name against the address that was dialled. An end that the peer did not
//! announce is an error and never looks like the clean end of a stream.
//!
//! ```text
//!   guest memory ─ copy ─► chunk of 64 KiB ─ seal ─► records of 16 KiB ─► socket
//!   guest memory ◄─ copy ─ plaintext ◄─ open ─ records ◄─ chunk of 64 KiB ◄─ socket
//! ```
//! Both halves share one connection's state behind a lock, which is held while records are made or opened, never while waiting. The copy
//! out of guest memory is the moment after which the guest can no longer change the bytes: what is sealed is what is sent.

mod channel;
mod config;
mod files;
mod handshake;
mod peers;
mod pem;
mod receive;
mod send;

use std::time::Instant;

use rustls::{ClientConnection, Connection};
use socket2::Socket;

use self::channel::TlsChannel;
use crate::address::HostPort;
use crate::channel::Channel;
use crate::error::{ConnectError, EstablishError};
use crate::options::ChannelOptions;
use crate::tcp::{self, TcpOptions};

pub(crate) use self::channel::accepted;
pub use self::config::{TlsClient, TlsServer};
pub use self::files::{TlsFiles, TlsSide};
pub use self::peers::{Clients, PeerName};
pub use self::pem::{TlsConfigError, TlsPem};

/// Connects and does the handshake; `target`'s host is the name that the peer's certificate must be for, unless
/// [`TlsClient::with_server_name`] or [`TlsClient::with_peers`] gave others.
///
/// # Errors
/// [`ConnectError`]; [`ConnectError::Establish`] for whatever TLS refuses. If this side's own certificate is what the peer refuses,
/// that may also show as [`ChannelError::Tls`](crate::ChannelError::Tls) at the first receive, since a TLS 1.3 handshake is over for
/// the dialling side before the peer has looked at it.
pub fn connect(
    target: &HostPort,
    client: &TlsClient,
    options: &TcpOptions,
    deadline: Instant,
) -> Result<Box<dyn Channel>, ConnectError> {
    connect_with(target, client, &options.clone().into(), deadline)
}

/// As [`connect`], with the address that worked last first.
pub(crate) fn connect_with(
    target: &HostPort,
    client: &TlsClient,
    options: &ChannelOptions,
    deadline: Instant,
) -> Result<Box<dyn Channel>, ConnectError> {
    let failed = |cause| ConnectError::Establish {
        target: target.to_string(),
        cause,
    };
    let connection = connection(client, target.host()).map_err(failed)?;
    let (tcp, resolver) = (&options.tcp, &options.resolver);
    let (socket, named) = tcp::connect_with(target, tcp, resolver, deadline, |socket| {
        let named = tcp::name("tls", &socket)?;
        socket.set_nonblocking(true)?;
        Ok((socket, named))
    })?;
    let mut channel = TlsChannel::new(connection, socket, &named);
    channel.establish(deadline).map_err(failed)?;
    Ok(Box::new(channel))
}

/// The channel for a connected socket on which this side acts as the one that dialled `host`, before its handshake.
pub(crate) fn dialled(
    socket: Socket,
    name: &str,
    client: &TlsClient,
    host: &str,
) -> Result<Box<dyn Channel>, EstablishError> {
    let connection = connection(client, host)?;
    socket
        .set_nonblocking(true)
        .map_err(|error| EstablishError::Channel(crate::ChannelError::Io(error.into())))?;
    Ok(Box::new(TlsChannel::new(connection, socket, name)))
}

fn connection(client: &TlsClient, host: &str) -> Result<Connection, EstablishError> {
    let protocol = |text: String| EstablishError::Protocol {
        protocol: "TLS",
        text,
    };
    let name = client.name_for(host).map_err(protocol)?;
    let connection = ClientConnection::new(client.config(), name)
        .map_err(|error| protocol(error.to_string()))?;
    Ok(Connection::Client(connection))
}
