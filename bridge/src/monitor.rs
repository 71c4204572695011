//! The machine monitor's side: a Unix or TCP socket on which it connects to us, or where it waits for us.

use std::fmt;
use std::io;
use std::net::{Shutdown, ToSocketAddrs};
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use multifd_transport::Address;
use socket2::{Domain, SockAddr, Socket, Type};

/// Connections of a monitor that may wait to be accepted: as many channels as QEMU can have, and some.
const BACKLOG: i32 = 300;

/// The pause between two attempts to reach a monitor that is not there yet, or whose queue is full.
const PAUSE: Duration = Duration::from_millis(20);

/// Where a monitor is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MonitorAddress {
    /// A Unix socket.
    Unix(PathBuf),
    /// TCP: host and port.
    Tcp(String, u16),
}

impl TryFrom<&Address> for MonitorAddress {
    type Error = String;

    fn try_from(address: &Address) -> Result<Self, String> {
        match address {
            Address::Unix(path) => Ok(Self::Unix(path.clone())),
            Address::Tcp(target) => Ok(Self::Tcp(target.host().to_owned(), target.port())),
            other => Err(format!(
                "{other}: a machine monitor is at a unix: or a tcp: address"
            )),
        }
    }
}

impl fmt::Display for MonitorAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(host, port) if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp(host, port) => write!(f, "tcp:{host}:{port}"),
        }
    }
}

impl MonitorAddress {
    /// The socket addresses that it stands for.
    fn resolve(&self) -> io::Result<Vec<(Domain, SockAddr)>> {
        match self {
            Self::Unix(path) => Ok(vec![(Domain::UNIX, SockAddr::unix(path)?)]),
            Self::Tcp(host, port) => {
                let found = (host.as_str(), *port).to_socket_addrs()?;
                Ok(found.map(|a| (Domain::for_address(a), a.into())).collect())
            }
        }
    }

    fn first(&self) -> io::Result<(Domain, SockAddr)> {
        let found = self.resolve()?.into_iter().next();
        found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the name has no address"))
    }

    /// Connects, and tries again while nobody listens there or its queue is full. Gives up at the deadline, or when `go_on` says so.
    pub(crate) fn connect(
        &self,
        deadline: Instant,
        go_on: impl Fn() -> bool,
    ) -> io::Result<Socket> {
        loop {
            let error = match self.connect_once() {
                Ok(socket) => return Ok(socket),
                Err(error) => error,
            };
            let may_come = matches!(
                error.kind(),
                io::ErrorKind::NotFound
                    | io::ErrorKind::ConnectionRefused
                    | io::ErrorKind::WouldBlock
            );
            if !may_come || Instant::now() >= deadline || !go_on() {
                return Err(error);
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn connect_once(&self) -> io::Result<Socket> {
        let (domain, address) = self.first()?;
        let socket = Socket::new(domain, Type::STREAM, None)?;
        if domain == Domain::UNIX {
            // A full queue is an error then instead of a wait.
            socket.set_nonblocking(true)?;
            socket.connect(&address)?;
            socket.set_nonblocking(false)?;
        } else {
            socket.connect_timeout(&address, Duration::from_secs(3))?;
            socket.set_tcp_nodelay(true)?;
        }
        Ok(socket)
    }

    /// Listens there. A Unix socket on which nobody listens any more is replaced.
    pub(crate) fn listen(&self) -> io::Result<Socket> {
        let (domain, address) = self.first()?;
        if let Self::Unix(path) = self {
            let is_socket =
                std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
            let refused = |error: &io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
            if is_socket && self.connect_once().is_err_and(|error| refused(&error)) {
                std::fs::remove_file(path)?;
            }
        }
        let socket = Socket::new(domain, Type::STREAM, None)?;
        if domain != Domain::UNIX {
            socket.set_reuse_address(true)?;
        }
        socket.bind(&address)?;
        socket.listen(BACKLOG)?;
        Ok(socket)
    }

    /// Removes what [`listen`](Self::listen) left in the file system.
    pub(crate) fn unlisten(&self) {
        if let Self::Unix(path) = self {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Ends a connection at once, in a way that a monitor can't take for a clean end where its kind of socket can say so.
pub(crate) fn break_off(socket: &Socket) {
    if socket.local_addr().is_ok_and(|address| !address.is_unix()) {
        let _ = socket.set_linger(Some(Duration::ZERO));
    }
    let _ = socket.shutdown(Shutdown::Both);
}
