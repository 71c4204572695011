//! Channels over a connected stream socket: what Unix sockets and TCP have in common.
//!
//! Rule: body bytes are copied once, by the kernel. The usual frame costs one `sendmsg` on one side, and on the other only
//! `recvmsg` calls that move body bytes, because each of them also takes what follows into the read-ahead.
//!
//! Waiting: sockets block, with a kernel time limit of [`TICK`] set once. An operation whose own limit is further away than
//! that simply blocks, and looks at the clock only when the tick is over. An operation with less time left asks the kernel not
//! to block and waits with `ppoll`, which is exact; so does one that waits for more than one byte. So limits cost no system call
//! as long as bytes flow.

mod receive;
mod send;

use std::io;
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use socket2::Socket;

use self::receive::StreamReceive;
use self::send::StreamSend;
use crate::channel::{Approach, Channel, Closer, ReceiveHalf, SendHalf};
use crate::error::ChannelError;
use crate::patience::Pace;
use crate::sys::{self, Blocking, Ready};

/// The longest sleep inside one system call: how late a half notices a limit that was not near when the call began is bounded
/// by ending such sleeps, and an idle half wakes four times a second.
const TICK: Duration = Duration::from_millis(250);

/// More is not looked at before a channel is split.
const APPROACH_BYTES_MAX: usize = 256;

/// A connected stream socket.
pub(crate) struct StreamChannel {
    socket: Socket,
    name: Arc<str>,
}

impl StreamChannel {
    /// Takes a connected blocking socket and what to call it.
    pub(crate) fn new(socket: Socket, name: &str) -> io::Result<Self> {
        socket.set_nonblocking(false)?;
        socket.set_read_timeout(Some(TICK))?;
        socket.set_write_timeout(Some(TICK))?;
        Ok(Self {
            socket,
            name: name.into(),
        })
    }
}

impl Channel for StreamChannel {
    fn approach(&mut self, bytes: usize) -> Approach<'_> {
        let mut octets = [MaybeUninit::uninit(); APPROACH_BYTES_MAX];
        let bytes = bytes.min(APPROACH_BYTES_MAX);
        let Some(room) = octets.get_mut(..bytes) else {
            return Approach::Here;
        };
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        match self.socket.recv_with_flags(room, flags) {
            Ok(found) if found >= bytes => Approach::Here,
            Ok(0) => Approach::Gone,
            Ok(_) => Approach::Waiting(self.socket.as_fd()),
            Err(error) if is_try_again(&error) => Approach::Waiting(self.socket.as_fd()),
            Err(_) => Approach::Gone,
        }
    }

    fn split(self: Box<Self>) -> (Box<dyn SendHalf>, Box<dyn ReceiveHalf>, Closer) {
        let link = Arc::new(Link::new(self.socket, self.name));
        let weak = Arc::downgrade(&link);
        let closer = Closer::new(move || {
            if let Some(link) = weak.upgrade() {
                link.shutdown();
            }
        });
        let send = StreamSend::new(Arc::clone(&link));
        let receive = StreamReceive::new(link);
        (Box::new(send), Box::new(receive), closer)
    }

    fn describe(&self) -> String {
        self.name.to_string()
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.socket.as_fd())
    }
}

/// What both halves share, TLS's too. The socket is closed when the last half is gone.
pub(crate) struct Link {
    pub(crate) socket: Socket,
    shut: AtomicBool,
    /// How the connection was lost, if a half was told. The kernel tells only one of them; to the other it looks like a clean
    /// close.
    lost: OnceLock<ChannelError>,
    pub(crate) name: Arc<str>,
}

impl Link {
    pub(crate) fn new(socket: Socket, name: Arc<str>) -> Self {
        Self {
            socket,
            shut: AtomicBool::new(false),
            lost: OnceLock::new(),
            name,
        }
    }

    pub(crate) fn shutdown(&self) {
        // The flag first: whoever is woken by the shutdown must find it set.
        self.shut.store(true, Ordering::SeqCst);
        // A socket that is no longer connected has nobody to wake; its halves see the flag.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    pub(crate) fn is_shut(&self) -> bool {
        self.shut.load(Ordering::SeqCst)
    }

    /// Sleeps as `pace` says until the socket may be ready; to be called when a call would have blocked.
    fn wait(&self, pace: Pace, ready: Ready) -> Result<(), ChannelError> {
        match pace {
            Pace::AtMost(time) if time < TICK => sys::wait(self.socket.as_fd(), ready, Some(time))
                .map(drop)
                .map_err(|error| ChannelError::Io(Arc::new(error))),
            // The call itself slept for a tick, or was not to wait.
            _ => Ok(()),
        }
    }

    /// Sleeps until the socket is ready, at most a tick, and not at all if `pace` leaves no time. A condition that holds already
    /// is seen at once.
    fn sleep(&self, pace: Pace, ready: Ready) -> Result<(), ChannelError> {
        let at_most = match pace {
            Pace::Forever => TICK,
            Pace::AtMost(time) => time.min(TICK),
            Pace::Try | Pace::DeadlinePassed | Pace::Stalled(_) => return Ok(()),
        };
        sys::wait(self.socket.as_fd(), ready, Some(at_most))
            .map(drop)
            .map_err(|error| ChannelError::Io(Arc::new(error)))
    }

    /// What an error of the kernel means for an operation.
    pub(crate) fn error(
        &self,
        error: io::Error,
        bytes_done: u64,
        bytes_wanted: u64,
    ) -> ChannelError {
        if self.is_shut() {
            return ChannelError::ShutDown;
        }
        let lost = match error.raw_os_error() {
            Some(libc::EPIPE | libc::ENOTCONN) => return self.end(bytes_done, bytes_wanted),
            Some(libc::ECONNRESET | libc::ECONNABORTED) => ChannelError::Reset { bytes_done },
            Some(
                libc::ETIMEDOUT
                | libc::EHOSTUNREACH
                | libc::ENETUNREACH
                | libc::ENETDOWN
                | libc::EHOSTDOWN,
            ) => ChannelError::Lost(Arc::new(error)),
            _ => return ChannelError::Io(Arc::new(error)),
        };
        self.lose(lost)
    }

    /// Keeps how the connection was lost for the other half; the first to be told decides.
    pub(crate) fn lose(&self, lost: ChannelError) -> ChannelError {
        self.lost.get_or_init(|| lost.clone());
        lost
    }

    /// What it means for an operation that the peer's side is closed.
    pub(crate) fn end(&self, bytes_done: u64, bytes_wanted: u64) -> ChannelError {
        if self.is_shut() {
            return ChannelError::ShutDown;
        }
        match self.lost.get() {
            Some(ChannelError::Reset { .. }) => ChannelError::Reset { bytes_done },
            Some(lost) => lost.clone(),
            None => ChannelError::closed(bytes_done, bytes_wanted),
        }
    }

    /// Refuses an operation on a half that is finished.
    pub(crate) fn check(&self, failed: Option<&ChannelError>) -> Result<(), ChannelError> {
        if self.is_shut() {
            return Err(ChannelError::ShutDown);
        }
        failed.map_or(Ok(()), |error| Err(error.clone()))
    }
}

/// How to make a call at this pace.
fn blocking(pace: Pace) -> Blocking {
    match pace {
        Pace::Forever => Blocking::Yes,
        Pace::AtMost(time) if time >= TICK => Blocking::Yes,
        _ => Blocking::No,
    }
}

fn is_try_again(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
