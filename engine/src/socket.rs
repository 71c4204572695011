//! A Unix socket of packets that carries messages with descriptors.
//!
//! The rule it keeps: what the kernel had to cut, bytes or descriptors, is refused as a whole; no descriptor that came is left open.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::io::{Errno, IoSlice, IoSliceMut};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix, SocketFlags,
    SocketType, sockopt,
};

use crate::protocol::{DESCRIPTORS_MAX, MESSAGE_BYTES_MAX, Malformed};

/// A connected socket.
#[derive(Debug)]
pub struct Socket(OwnedFd);

/// A socket that accepts engines.
#[derive(Debug)]
pub struct Listening(OwnedFd);

/// A message with its descriptors.
#[derive(Debug)]
pub struct Packet {
    /// The message.
    pub bytes: Vec<u8>,
    /// The descriptors.
    pub descriptors: Vec<OwnedFd>,
}

/// Why nothing could be received.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReceiveError {
    /// The packet is no message.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The socket.
    #[error(transparent)]
    System(#[from] io::Error),
}

impl Socket {
    /// To the socket at `path`.
    ///
    /// # Errors
    /// What the system said.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = new()?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(Self(socket))
    }

    /// A socket that is connected already: inherited, or accepted.
    ///
    /// # Errors
    /// It is none of packets.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let is_right = sockopt::socket_domain(&fd)? == AddressFamily::UNIX
            && sockopt::socket_type(&fd)? == SocketType::SEQPACKET;
        if is_right {
            return Ok(Self(fd));
        }
        let text = "it is no Unix socket of packets (AF_UNIX, SOCK_SEQPACKET)";
        Err(io::Error::new(io::ErrorKind::InvalidInput, text))
    }

    /// Two that are connected to each other.
    ///
    /// # Errors
    /// What the system said.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Self(one), Self(other)))
    }

    /// The descriptor, to be handed to a process that is started.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.0
    }

    /// How long sending and receiving may take; `None`: as long as it takes.
    ///
    /// # Errors
    /// What the system said.
    pub fn set_send_limit(&self, limit: Option<Duration>) -> io::Result<()> {
        Ok(sockopt::set_socket_timeout(
            &self.0,
            sockopt::Timeout::Send,
            limit,
        )?)
    }

    /// Whether the process at the other end may be trusted with what this one may do: it is root's or of the same user.
    ///
    /// # Errors
    /// It is another user's, or the system does not say.
    pub fn check_peer(&self) -> io::Result<()> {
        let peer = sockopt::socket_peercred(&self.0)?;
        if peer.uid.is_root() || peer.uid == rustix::process::geteuid() {
            return Ok(());
        }
        let text = format!(
            "the process at the other end is of user {}",
            peer.uid.as_raw()
        );
        Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
    }

    /// Sends one message.
    ///
    /// # Errors
    /// What the system said; `InvalidInput` for a message that is too long.
    pub fn send(&self, message: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        if message.len() > MESSAGE_BYTES_MAX || descriptors.len() > DESCRIPTORS_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, Malformed::Cut));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        loop {
            let parts = [IoSlice::new(message)];
            match rustix::net::sendmsg(&self.0, &parts, &mut control, SendFlags::NOSIGNAL) {
                // A packet goes as a whole.
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Receives one message; `None` when the other end is closed.
    ///
    /// # Errors
    /// [`ReceiveError`].
    pub fn receive(&self) -> Result<Option<Packet>, ReceiveError> {
        // One byte more than a message may have, which shows what is too long.
        let mut bytes = vec![0; MESSAGE_BYTES_MAX + 1];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = loop {
            let mut parts = [IoSliceMut::new(&mut bytes)];
            match rustix::net::recvmsg(&self.0, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(got) => break got,
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Ok(None),
                Err(error) => return Err(io::Error::from(error).into()),
            }
        };
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        if got.bytes == 0 {
            return Ok(None);
        }
        let cut = ReturnFlags::TRUNC | ReturnFlags::CTRUNC;
        // The buffer has a little room to spare.
        let too_many = descriptors.len() > DESCRIPTORS_MAX;
        if got.flags.intersects(cut) || got.bytes > MESSAGE_BYTES_MAX || too_many {
            return Err(Malformed::Cut.into());
        }
        bytes.truncate(got.bytes);
        Ok(Some(Packet { bytes, descriptors }))
    }

    /// Ends it for both, also for a thread that receives.
    pub fn shutdown(&self) {
        let _ = rustix::net::shutdown(&self.0, Shutdown::Both);
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Listening {
    /// At `path`, which must not be there yet.
    ///
    /// # Errors
    /// What the system said.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let socket = new()?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        rustix::net::listen(&socket, 4)?;
        Ok(Self(socket))
    }

    /// Waits for an engine.
    ///
    /// # Errors
    /// What the system said.
    pub fn accept(&self) -> io::Result<Socket> {
        loop {
            match rustix::net::accept_with(&self.0, SocketFlags::CLOEXEC) {
                Ok(socket) => return Ok(Socket(socket)),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Listening {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn new() -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_come_with_their_message() {
        let (here, there) = Socket::pair().unwrap();
        here.send(b"one", &[]).unwrap();
        here.send(b"two", &[there.as_fd(), here.as_fd()]).unwrap();
        let one = there.receive().unwrap().unwrap();
        assert_eq!((&one.bytes[..], one.descriptors.len()), (&b"one"[..], 0));
        let two = there.receive().unwrap().unwrap();
        assert_eq!((&two.bytes[..], two.descriptors.len()), (&b"two"[..], 2));
        drop((two, here));
        assert!(there.receive().unwrap().is_none());
    }

    #[test]
    fn the_longest_message_is_taken_and_one_byte_more_is_not() {
        let (here, there) = Socket::pair().unwrap();
        here.send(&vec![1; MESSAGE_BYTES_MAX], &[]).unwrap();
        assert_eq!(
            there.receive().unwrap().unwrap().bytes.len(),
            MESSAGE_BYTES_MAX
        );
        let too_long = vec![1; MESSAGE_BYTES_MAX + 1];
        here.send(&too_long, &[]).unwrap_err();
        // Another program may send it all the same.
        rustix::net::send(&here, &too_long, SendFlags::NOSIGNAL).unwrap();
        let error = there.receive().unwrap_err();
        assert!(matches!(error, ReceiveError::Malformed(Malformed::Cut)));
        // What comes after it is read.
        here.send(b"next", &[]).unwrap();
        assert_eq!(there.receive().unwrap().unwrap().bytes, b"next");
    }

    #[test]
    fn the_most_descriptors_are_taken_and_one_more_is_not() {
        let (here, there) = Socket::pair().unwrap();
        let most = vec![there.as_fd(); DESCRIPTORS_MAX];
        here.send(b"most", &most).unwrap();
        assert_eq!(
            there.receive().unwrap().unwrap().descriptors.len(),
            DESCRIPTORS_MAX
        );
        let more = vec![there.as_fd(); DESCRIPTORS_MAX + 1];
        here.send(b"more", &more).unwrap_err();
        let mut space =
            [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX + 1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&more)));
        let parts = [IoSlice::new(b"more")];
        rustix::net::sendmsg(&here, &parts, &mut control, SendFlags::NOSIGNAL).unwrap();
        let error = there.receive().unwrap_err();
        assert!(matches!(error, ReceiveError::Malformed(Malformed::Cut)));
    }

    #[test]
    fn a_socket_of_another_kind_is_refused() {
        let (stream, _) = std::os::unix::net::UnixStream::pair().unwrap();
        let error = Socket::from_fd(stream.into()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
