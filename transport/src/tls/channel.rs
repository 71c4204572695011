//! The channel and what its halves share.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustls::{Connection, ServerConnection};
use socket2::Socket;

use super::config::TlsServer;
use super::handshake::{self, Step};
use super::receive::TlsReceive;
use super::send::TlsSend;
use crate::channel::{Approach, BINDING_BYTES, Channel, Closer, ReceiveHalf, SendHalf};
use crate::error::{ChannelError, EstablishError};
use crate::stream::Link;

/// Bytes that are sealed, or read from the socket, at a time: four records. It bounds what a half holds besides a record.
pub(super) const CHUNK_BYTES: usize = 64 << 10;

/// A connected socket and the state of TLS above it.
pub(crate) struct TlsChannel {
    connection: Connection,
    socket: Socket,
    name: Arc<str>,
    /// What went wrong while it was only looked at, for `establish` to say, here and to the peer.
    failed: Option<EstablishError>,
}

/// The channel for an accepted socket, before its handshake.
pub(crate) fn accepted(
    socket: Socket,
    name: &str,
    server: &TlsServer,
) -> io::Result<Box<dyn Channel>> {
    socket.set_nonblocking(true)?;
    let connection = ServerConnection::new(server.config()).map_err(io::Error::other)?;
    let connection = Connection::Server(connection);
    Ok(Box::new(TlsChannel::new(connection, socket, name)))
}

impl TlsChannel {
    pub(super) fn new(mut connection: Connection, socket: Socket, name: &str) -> Self {
        // Sending is bounded by CHUNK_BYTES here: no chunk is sealed before the one before has left.
        connection.set_buffer_limit(None);
        Self {
            connection,
            socket,
            name: name.into(),
            failed: None,
        }
    }
}

impl Channel for TlsChannel {
    fn approach(&mut self, bytes: usize) -> Approach<'_> {
        if self.failed.is_some() {
            return Approach::Here;
        }
        match handshake::advance(&mut self.connection, &self.socket, bytes) {
            Ok(Step::Done) => Approach::Here,
            Ok(Step::Wait(_)) => Approach::Waiting(self.socket.as_fd()),
            Err(EstablishError::Channel(_)) => Approach::Gone,
            Err(error) => {
                self.failed = Some(error);
                Approach::Here
            }
        }
    }

    fn establish(&mut self, deadline: Instant) -> Result<(), EstablishError> {
        match self.failed.take() {
            Some(error) => {
                handshake::refuse(&mut self.connection, &self.socket, &error, deadline);
                Err(error)
            }
            None => handshake::run(&mut self.connection, &self.socket, deadline),
        }
    }

    fn split(self: Box<Self>) -> (Box<dyn SendHalf>, Box<dyn ReceiveHalf>, Closer) {
        let link = Arc::new(TlsLink {
            stream: Link::new(self.socket, self.name),
            connection: Mutex::new(self.connection),
        });
        let weak = Arc::downgrade(&link);
        let closer = Closer::new(move || {
            if let Some(link) = weak.upgrade() {
                link.stream.shutdown();
            }
        });
        let send = TlsSend::new(Arc::clone(&link));
        let receive = TlsReceive::new(link);
        (Box::new(send), Box::new(receive), closer)
    }

    fn describe(&self) -> String {
        self.name.to_string()
    }

    fn binding(&self) -> Option<[u8; BINDING_BYTES]> {
        // RFC 9266 section 2: this label, no context, 32 bytes.
        let label = b"EXPORTER-Channel-Binding";
        self.connection
            .export_keying_material([0; BINDING_BYTES], label, None)
            .ok()
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.socket.as_fd())
    }
}

/// What both halves share.
pub(super) struct TlsLink {
    pub(super) stream: Link,
    connection: Mutex<Connection>,
}

/// What became of the records that wait to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flushed {
    /// The socket has them all.
    All,
    /// The socket has no room for the rest; it took this many bytes.
    Some(usize),
}

impl TlsLink {
    /// The state of TLS. Held for computing and for calls that do not wait.
    pub(super) fn lock(&self) -> MutexGuard<'_, Connection> {
        // A panic inside rustls is a bug there; the other half then goes on with whatever state it left, which seals or opens
        // nothing wrongly, since each record carries its number.
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the socket what it takes of the records that wait.
    pub(super) fn flush(&self, connection: &mut Connection) -> io::Result<Flushed> {
        flush(connection, &self.stream.socket)
    }

    /// Refuses an operation on a half that is finished, or on a channel whose handshake was not done.
    pub(super) fn check(&self, failed: Option<&ChannelError>) -> Result<(), ChannelError> {
        self.stream.check(failed)
    }
}

/// As [`TlsLink::flush`].
pub(super) fn flush(connection: &mut Connection, socket: &Socket) -> io::Result<Flushed> {
    let mut taken = 0;
    while connection.wants_write() {
        match connection.write_tls(&mut Unsleeping(socket)) {
            Ok(count) => taken += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Ok(Flushed::Some(taken));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Flushed::All)
}

/// Writes to a nonblocking socket, without the signal that a closed one causes.
struct Unsleeping<'s>(&'s Socket);

impl io::Write for Unsleeping<'_> {
    fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        self.0.send_with_flags(octets, libc::MSG_NOSIGNAL)
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.send_vectored_with_flags(pieces, libc::MSG_NOSIGNAL)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
