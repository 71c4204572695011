//! The TCP kind: its options, and the channel over a connected socket.
//!
//! Rule: an option that was asked for and cannot be set is an error, never a silent difference.

mod connect;
mod listen;

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, SockAddr, Socket, TcpKeepalive, Type};

use crate::address::HostPort;
use crate::channel::Channel;
use crate::error::ConnectError;
use crate::resolve::Resolver;
use crate::stream::StreamChannel;

pub(crate) use self::connect::connect_with;
pub(crate) use self::listen::TcpListening;

/// Socket options of a TCP channel; both sides choose their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpOptions {
    /// `TCP_NODELAY`: a frame leaves when it is sent, instead of waiting for the acknowledgement of the one before.
    pub no_delay: bool,
    /// `SO_KEEPALIVE`: finds out that an idle peer is gone. `None` turns it off.
    pub keep_alive: Option<KeepAlive>,
    /// `TCP_USER_TIMEOUT`: how long sent bytes may stay unacknowledged before the kernel gives the connection up. `None` leaves
    /// it to the kernel, which takes about a quarter of an hour. Rounded to milliseconds.
    pub user_timeout: Option<Duration>,
    /// `SO_SNDBUF` in bytes; `None` leaves it to the kernel, which adapts it, except to a peer on this host (1 MiB). The kernel doubles the value for its own
    /// book-keeping and cuts it to `net.core.wmem_max` without an error.
    pub send_buffer: Option<usize>,
    /// `SO_RCVBUF` in bytes; as `send_buffer`, with `net.core.rmem_max`.
    pub receive_buffer: Option<usize>,
    /// `TCP_CONGESTION`: the name of a congestion control that the kernel offers; `None` takes the system's default, except to a
    /// peer on this host (`reno`, where it may be had).
    pub congestion: Option<String>,
}

/// When the kernel probes an idle connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeepAlive {
    /// Idle time before the first probe. Whole seconds.
    pub idle: Duration,
    /// Time between probes. Whole seconds.
    pub interval: Duration,
    /// Probes without an answer after which the connection is lost.
    pub count: u32,
}

impl Default for TcpOptions {
    fn default() -> Self {
        Self {
            no_delay: true,
            keep_alive: Some(KeepAlive {
                idle: Duration::from_secs(5),
                interval: Duration::from_secs(5),
                count: 3,
            }),
            user_timeout: Some(Duration::from_secs(20)),
            send_buffer: None,
            receive_buffer: None,
            congestion: None,
        }
    }
}

/// An option that could not be set: its name in [`TcpOptions`] and the kernel's answer.
pub(crate) struct OptionRefused {
    pub(crate) option: &'static str,
    pub(crate) source: io::Error,
}

impl TcpOptions {
    /// Sets the options; to be called before connecting or listening, since the buffers' sizes decide what window a connection
    /// can ever offer.
    pub(crate) fn apply(&self, socket: &Socket) -> Result<(), OptionRefused> {
        socket
            .set_tcp_nodelay(self.no_delay)
            .map_err(named("no_delay"))?;
        socket
            .set_keepalive(self.keep_alive.is_some())
            .map_err(named("keep_alive"))?;
        if let Some(keep_alive) = self.keep_alive {
            let probes = TcpKeepalive::new()
                .with_time(keep_alive.idle)
                .with_interval(keep_alive.interval)
                .with_retries(keep_alive.count);
            socket
                .set_tcp_keepalive(&probes)
                .map_err(named("keep_alive"))?;
        }
        if self.user_timeout.is_some() {
            socket
                .set_tcp_user_timeout(self.user_timeout)
                .map_err(named("user_timeout"))?;
        }
        if let Some(bytes) = self.send_buffer {
            socket
                .set_send_buffer_size(bytes)
                .map_err(named("send_buffer"))?;
        }
        if let Some(bytes) = self.receive_buffer {
            socket
                .set_recv_buffer_size(bytes)
                .map_err(named("receive_buffer"))?;
        }
        if let Some(name) = &self.congestion {
            socket
                .set_tcp_congestion(name.as_bytes())
                .map_err(named("congestion"))?;
        }
        Ok(())
    }

    /// Once the peer is known: to one on this host, what was left to the kernel is set to [`NEAR_BUFFER_BYTES`] and
    /// [`NEAR_CONGESTION`].
    pub(crate) fn fit(&self, socket: &Socket) -> Result<(), OptionRefused> {
        let peer = socket.peer_addr().ok().and_then(|peer| peer.as_socket());
        if !peer.is_some_and(|peer| peer.ip().is_loopback()) {
            return Ok(());
        }
        if self.send_buffer.is_none() {
            socket
                .set_send_buffer_size(NEAR_BUFFER_BYTES)
                .map_err(named("send_buffer"))?;
        }
        if self.receive_buffer.is_none() {
            socket
                .set_recv_buffer_size(NEAR_BUFFER_BYTES)
                .map_err(named("receive_buffer"))?;
        }
        if self.congestion.is_none() {
            // Nobody asked for it, so a kernel without it is no error.
            let _ = socket.set_tcp_congestion(NEAR_CONGESTION);
        }
        Ok(())
    }
}

/// Turns the system's no into ours.
fn named(option: &'static str) -> impl Fn(io::Error) -> OptionRefused {
    move |source| OptionRefused { option, source }
}

/// Buffers of a connection that does not leave this host. The kernel lets them grow to many megabytes, which only a long way
/// needs; here that is memory for nothing. No size was clearly faster (docs/measurements/stream.md).
const NEAR_BUFFER_BYTES: usize = 1 << 20;

/// Congestion control of a connection that does not leave this host: there is no bottleneck to find and nothing to lose, so that
/// pacing and probing (bbr, the default of many hosts) cost time only. The kernel lets every user choose this one.
const NEAR_CONGESTION: &[u8] = b"reno";

/// Connects to a host and port: to the addresses of the host until one takes the connection, the next one a quarter of a second
/// after the one before if that has not answered by then.
///
/// Remembers nothing; [`connect_with`](crate::connect_with) tries the address first that worked last.
///
/// # Errors
/// [`ConnectError`].
pub fn connect(
    target: &HostPort,
    options: &TcpOptions,
    deadline: Instant,
) -> Result<Box<dyn Channel>, ConnectError> {
    connect_with(target, options, &Resolver::default(), deadline, channel)
}

/// A TCP socket of the right family, neither connected nor bound.
pub(crate) fn socket(address: SocketAddr) -> io::Result<Socket> {
    Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )
}

/// The channel for a connected socket.
pub(crate) fn channel(socket: Socket) -> io::Result<Box<dyn Channel>> {
    let name = name("tcp", &socket)?;
    Ok(Box::new(StreamChannel::new(socket, &name)?))
}

/// The name of a channel of this kind over this socket.
pub(crate) fn name(kind: &str, socket: &Socket) -> io::Result<String> {
    let (ours, theirs) = (socket.local_addr()?, socket.peer_addr()?);
    Ok(format!("{kind} {} → {}", print(&ours), print(&theirs)))
}

/// An internet address as text.
pub(crate) fn print(address: &SockAddr) -> String {
    address
        .as_socket()
        .map_or_else(|| "unknown".to_owned(), |address| address.to_string())
}
