//! The vsock kind: between a host and its virtual machines (vsock(7)), without a network in either.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::str::FromStr;
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};

use crate::accept;
use crate::address::{Address, VsockPlace};
use crate::channel::Channel;
use crate::error::{ConnectAttempt, ConnectError, ListenError};
use crate::listener::{Accepted, BACKLOG, Listen};
use crate::stream::StreamChannel;

/// Connects to a port of a virtual machine, or of the host (context 2).
///
/// # Errors
/// [`ConnectError::Refused`] with the one attempt, or [`ConnectError::Deadline`].
pub fn connect(target: VsockPlace, deadline: Instant) -> Result<Box<dyn Channel>, ConnectError> {
    let name = format!("vsock:{target}");
    connect_by(target, deadline).map_err(|cause| match cause.kind() {
        io::ErrorKind::TimedOut => ConnectError::Deadline {
            target: name.clone(),
            attempts: Vec::new(),
        },
        _ => ConnectError::Refused {
            target: name.clone(),
            attempts: vec![ConnectAttempt {
                address: name.clone(),
                cause,
            }],
        },
    })
}

fn connect_by(target: VsockPlace, deadline: Instant) -> io::Result<Box<dyn Channel>> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
    let address = SockAddr::vsock(target.context, target.port);
    socket.connect_timeout(&address, left.max(Duration::from_millis(1)))?;
    channel(socket)
}

/// The channel for a connected socket.
pub(crate) fn channel(socket: Socket) -> io::Result<Box<dyn Channel>> {
    let (ours, theirs) = (print(&socket.local_addr()?), print(&socket.peer_addr()?));
    let name = format!("vsock {ours} → {theirs}");
    Ok(Box::new(StreamChannel::new(socket, &name)?))
}

fn print(address: &SockAddr) -> String {
    place(address).map_or_else(|| "unknown".to_owned(), |place| place.to_string())
}

fn place(address: &SockAddr) -> Option<VsockPlace> {
    let (context, port) = address.as_vsock_address()?;
    Some(VsockPlace { context, port })
}

/// A listening socket.
pub(crate) struct VsockListening {
    socket: Socket,
    address: Address,
}

impl VsockListening {
    pub(crate) fn bind(target: VsockPlace) -> Result<Self, ListenError> {
        let listen = || {
            let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
            socket.bind(&SockAddr::vsock(target.context, target.port))?;
            socket.listen(BACKLOG)?;
            Self::over(socket)
        };
        listen().map_err(|cause| ListenError::Bind {
            address: Address::Vsock(target).to_string(),
            cause,
        })
    }

    /// Accepts on a socket that listens already.
    pub(crate) fn over(socket: Socket) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let place = place(&socket.local_addr()?).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self {
            socket,
            address: Address::Vsock(place),
        })
    }
}

impl Listen for VsockListening {
    fn try_accept(&self) -> Result<Option<Accepted>, ListenError> {
        let Some((socket, peer)) = accept::next(&self.socket)? else {
            return Ok(None);
        };
        let channel = channel(socket).map_err(ListenError::Io)?;
        Ok(Some((channel, print(&peer))))
    }

    fn local_address(&self) -> &Address {
        &self.address
    }

    fn poll_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn shutdown(&self) {
        accept::shutdown(&self.socket);
    }
}

/// `any`, the word for all contexts of this side.
const ANY: &str = "any";

impl fmt::Display for VsockPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.context == libc::VMADDR_CID_ANY {
            return write!(f, "{ANY}:{}", self.port);
        }
        write!(f, "{}:{}", self.context, self.port)
    }
}

impl FromStr for VsockPlace {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        let (context, port) = text.split_once(':').ok_or("the port is missing")?;
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|octet| octet.is_ascii_digit());
            digits.then(|| text.parse().ok()).flatten()
        };
        let context = match context {
            ANY => libc::VMADDR_CID_ANY,
            context => number(context).ok_or("the context is neither a number nor `any`")?,
        };
        let port = number(port).ok_or("the port is not a number of 32 bits")?;
        Ok(Self { context, port })
    }
}
