//! The Unix-socket kind: two processes on one host.
//!
//! A path that begins with `@` is a name in the abstract namespace of the kernel (unix(7)), as other programs write it: no file, no
//! permissions, gone with its last socket.

mod listen;

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};

use crate::address::Address;
use crate::channel::Channel;
use crate::error::{ConnectAttempt, ConnectError};
use crate::stream::StreamChannel;

pub(crate) use self::listen::UnixListening;
pub use self::listen::{OwnPath, listen};

/// Settings of a Unix listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnixOptions {
    /// Who may connect: the permission bits of the socket's path. To connect takes the right to write.
    pub mode: u32,
}

impl Default for UnixOptions {
    /// This user only.
    fn default() -> Self {
        Self { mode: 0o600 }
    }
}

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
    connect_by(path, deadline).map_err(|cause| match cause.kind() {
        io::ErrorKind::TimedOut => ConnectError::Deadline {
            target: target(),
            attempts: Vec::new(),
        },
        _ => ConnectError::Refused {
            target: target(),
            attempts: vec![ConnectAttempt {
                address: target(),
                cause,
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
        .connect(&address(path)?)
        .map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
            _ => error,
        })?;
    dialled(socket, &path.display().to_string())
}

/// The channel for a connected socket, on the connecting side.
pub(crate) fn dialled(socket: Socket, to: &str) -> io::Result<Box<dyn Channel>> {
    Ok(Box::new(StreamChannel::new(
        socket,
        &format!("unix → {to}"),
    )?))
}

/// The channel for a connection accepted at `address`.
pub(crate) fn accepted(socket: Socket, address: &Address) -> io::Result<Box<dyn Channel>> {
    Ok(Box::new(StreamChannel::new(
        socket,
        &format!("{address} ← accepted"),
    )?))
}

/// Whether the path is a name in the abstract namespace.
fn is_abstract(path: &Path) -> bool {
    path.as_os_str().as_bytes().starts_with(b"@")
}

/// The path as the kernel wants it.
fn address(path: &Path) -> io::Result<SockAddr> {
    if !is_abstract(path) {
        return SockAddr::unix(path);
    }
    let mut name = path.as_os_str().as_bytes().to_vec();
    if let Some(first) = name.first_mut() {
        *first = 0;
    }
    SockAddr::unix(OsString::from_vec(name))
}
