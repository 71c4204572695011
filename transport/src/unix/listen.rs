//! Listening on a Unix socket: whose the path is, and who may connect.
//!
//! Rule: nothing is ever removed but a socket of which it is certain that nobody listens on it, and at no moment may more people
//! connect than were asked for. To listen on a path, and to look whether one is stale, is done under a lock on its directory, since a
//! socket between `bind` and `listen` looks like a stale one.

use std::fs::{self, File, Permissions, TryLockError};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

use super::{UnixOptions, accepted, address, is_abstract};
use crate::accept;
use crate::address::Address;
use crate::error::ListenError;
use crate::listener::{Accepted, BACKLOG, Listen};

/// How long to wait for another program that holds the lock on the directory. It is held for a few system calls.
const LOCK_MAX: Duration = Duration::from_secs(2);

/// A listening socket.
pub(crate) struct UnixListening {
    socket: Socket,
    address: Address,
    /// Removes the path when the listener is dropped.
    _path: Option<OwnPath>,
}

impl UnixListening {
    /// Listens at `path`; `at` is the same with its kind.
    pub(crate) fn bind(
        path: &Path,
        at: &Address,
        options: &UnixOptions,
    ) -> Result<Self, ListenError> {
        let failed = |cause| ListenError::Bind {
            address: at.to_string(),
            cause,
        };
        if is_abstract(path) {
            let socket = abstract_socket(path).map_err(failed)?;
            return Self::over(socket, at.clone(), None).map_err(failed);
        }
        let (socket, path) = bind(path, *options).map_err(failed)?;
        Self::over(socket, at.clone(), Some(path)).map_err(failed)
    }

    /// Accepts on a socket that listens already.
    pub(crate) fn over(
        socket: Socket,
        address: Address,
        path: Option<OwnPath>,
    ) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            address,
            _path: path,
        })
    }
}

impl Listen for UnixListening {
    fn try_accept(&self) -> Result<Option<Accepted>, ListenError> {
        let Some((socket, _)) = accept::next(&self.socket)? else {
            return Ok(None);
        };
        let channel = accepted(socket, &self.address).map_err(ListenError::Io)?;
        Ok(Some((channel, self.address.to_string())))
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

/// A listening socket at this path for something else than channels, for its owner only (mode 0600). A stale one is replaced. The path is
/// removed with what is returned beside it.
///
/// # Errors
/// Somebody listens there, something else is there, or the directory is not to be written.
pub fn listen(path: &Path) -> io::Result<(UnixListener, OwnPath)> {
    let (socket, path) = bind(path, UnixOptions::default())?;
    Ok((OwnedFd::from(socket).into(), path))
}

fn abstract_socket(path: &Path) -> io::Result<Socket> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&address(path)?)?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

fn bind(path: &Path, options: UnixOptions) -> io::Result<(Socket, OwnPath)> {
    let address = address(path)?;
    let wanted = Permissions::from_mode(options.mode & 0o777);
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // The path gets the mode of the socket, less what the umask takes away (net/unix/af_unix.c): never more than is wanted.
    let file = File::from(OwnedFd::from(socket));
    file.set_permissions(wanted.clone())?;
    let socket = Socket::from(OwnedFd::from(file));
    let _lock = lock(path)?;
    match socket.bind(&address) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            remove_stale(path)?;
            socket.bind(&address)?;
        }
        other => other?,
    }
    let own = OwnPath::new(path)?;
    // Nobody can connect before `listen`: what the umask took away is given back here.
    if own.mode & 0o777 != options.mode & 0o777 {
        fs::set_permissions(path, wanted)?;
    }
    socket.listen(BACKLOG)?;
    Ok((socket, own))
}

/// Keeps other listeners of this crate out of the directory, until it is dropped. A directory that cannot be opened, or a file
/// system without locks, has none.
fn lock(path: &Path) -> io::Result<Option<File>> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let Ok(directory) = File::open(directory) else {
        return Ok(None);
    };
    let until = Instant::now() + LOCK_MAX;
    loop {
        match directory.try_lock() {
            Ok(()) => return Ok(Some(directory)),
            Err(TryLockError::Error(_)) => return Ok(None),
            Err(TryLockError::WouldBlock) if Instant::now() >= until => {
                let text = "another program keeps the directory locked";
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
            }
            Err(TryLockError::WouldBlock) => thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Removes a socket on which nobody listens, and refuses everything else, saying what it is.
fn remove_stale(path: &Path) -> io::Result<()> {
    let in_use = |text: &str| Err(io::Error::new(io::ErrorKind::AddrInUse, text));
    let metadata = fs::symlink_metadata(path)?;
    if !metadata.file_type().is_socket() {
        return in_use(
            "there is a file that is no socket; it is left as it is: name another path, or move it away",
        );
    }
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    probe.set_nonblocking(true)?;
    match probe.connect(&address(path)?) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        // Somebody may listen; also who is asked and has a full queue, or is of another type.
        _ => in_use("another process listens there: name another path, or end it"),
    }
}

/// The path of a socket of ours, as it was when it was made. Dropping it removes that, if it is still there.
#[derive(Debug)]
pub struct OwnPath {
    path: PathBuf,
    device: u64,
    inode: u64,
    mode: u32,
}

impl OwnPath {
    fn new(path: &Path) -> io::Result<Self> {
        let metadata = fs::symlink_metadata(path)?;
        Ok(Self {
            path: path.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
            mode: metadata.mode(),
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
