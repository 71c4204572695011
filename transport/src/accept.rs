//! Taking connections from a listening stream socket: what its kinds have in common.
//!
//! Rule: an error that belongs to one connection in the queue is not the listener's.

use std::io;
use std::net::Shutdown;

use socket2::{SockAddr, Socket};

use crate::error::ListenError;

/// The next connection in the queue of a nonblocking socket, if there is one.
pub(crate) fn next(socket: &Socket) -> Result<Option<(Socket, SockAddr)>, ListenError> {
    loop {
        match socket.accept() {
            Ok(accepted) => return Ok(Some(accepted)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            // A connection that died in the queue says nothing about the next one (accept(2), "Error handling").
            Err(error) if dies_in_queue(&error) => {}
            Err(error) if is_exhausted(&error) => return Err(ListenError::Exhausted(error)),
            Err(error) => return Err(ListenError::Io(error)),
        }
    }
}

/// Makes a listening socket ready for good. It cannot fail otherwise than by having been shut down before.
pub(crate) fn shutdown(socket: &Socket) {
    let _ = socket.shutdown(Shutdown::Both);
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
