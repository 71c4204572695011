//! The Unix-socket kind: two processes on one host.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};

use crate::address::Address;
use crate::channel::Channel;
use crate::error::{ConnectAttempt, ConnectError};
use crate::stream::StreamChannel;

/// Two connected channels over a socket pair of this process.
///
/// # Errors
/// The operating system's, such as too many open descriptors.
pub fn pair() -> io::Result<(Box<dyn Channel>, Box<dyn Channel>)> {
    let (left, right) = Socket::pair(Domain::UNIX, Type::STREAM, None)?;
    let left = StreamChannel::new(left, "unix pair left → right")?;
    let right = StreamChannel::new(right, "unix pair right → left")?;
    Ok((Box::new(left), Box::new(right)))
}

/// Connects to the socket at `path`.
///
/// # Errors
/// [`ConnectError::Refused`] with the one attempt, or [`ConnectError::Deadline`] if the listener's queue stays full.
pub fn connect(path: &Path, deadline: Instant) -> Result<Box<dyn Channel>, ConnectError> {
    let target = || format!("unix:{}", path.display());
    connect_by(path, deadline).map_err(|source| match source.kind() {
        io::ErrorKind::TimedOut => ConnectError::Deadline {
            target: target(),
            attempts: Vec::new(),
        },
        _ => ConnectError::Refused {
            target: target(),
            attempts: vec![ConnectAttempt {
                address: target(),
                source,
            }],
        },
    })
}

fn connect_by(path: &Path, deadline: Instant) -> io::Result<Box<dyn Channel>> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    // A Unix connect waits only while the listener's queue is full, and that wait obeys the send time limit, for which less than
    // a microsecond would be no limit at all.
    socket.set_write_timeout(Some(left.max(Duration::from_millis(1))))?;
    socket
        .connect(&SockAddr::unix(path)?)
        .map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
            _ => error,
        })?;
    channel(socket, path)
}

/// The channel for a connection to `path`, on the connecting side.
fn channel(socket: Socket, path: &Path) -> io::Result<Box<dyn Channel>> {
    Ok(Box::new(StreamChannel::new(
        socket,
        &format!("unix → {}", path.display()),
    )?))
}

/// The channel for a connection accepted at `address`.
pub(crate) fn accepted(socket: Socket, address: &Address) -> io::Result<Box<dyn Channel>> {
    Ok(Box::new(StreamChannel::new(
        socket,
        &format!("{address} ← accepted"),
    )?))
}
