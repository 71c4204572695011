//! A Unix socket as zlink wants it, without an executor: every call blocks, so that every future is ready when it is asked.
//!
//! The rule it keeps: a message that is longer than [`MESSAGE_BYTES_MAX`], and a client that does not take what it asked for, end the
//! connection. Descriptors that a client passes along are never received, so the kernel closes them.

use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use zlink_core::connection::socket::{ReadHalf, ReadResult, Socket, WriteHalf};

/// The longest message that is read: many times the longest call.
pub const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// How often a wait looks whether it is over.
const LOOK: Duration = Duration::from_millis(50);

/// How long a client may take for what it asked for, or for another call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    pub(crate) write: Duration,
    pub(crate) idle: Duration,
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Stream {
    stream: UnixStream,
    /// It is to end, whatever is waited for.
    closing: Arc<AtomicBool>,
    idle: Duration,
}

impl Stream {
    pub(crate) fn new(
        stream: UnixStream,
        closing: Arc<AtomicBool>,
        patience: Patience,
    ) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(LOOK))?;
        stream.set_write_timeout(Some(patience.write))?;
        Ok(Self {
            stream,
            closing,
            idle: patience.idle,
        })
    }
}

/// What is read.
#[derive(Debug)]
pub(crate) struct Reading {
    stream: Arc<UnixStream>,
    closing: Arc<AtomicBool>,
    idle: Duration,
    /// Bytes of the message that is not whole yet.
    pending: usize,
}

/// What is written.
#[derive(Debug)]
pub(crate) struct Writing(Arc<UnixStream>);

impl Socket for Stream {
    type ReadHalf = Reading;
    type WriteHalf = Writing;

    fn split(self) -> (Reading, Writing) {
        let stream = Arc::new(self.stream);
        let reading = Reading {
            stream: Arc::clone(&stream),
            closing: self.closing,
            idle: self.idle,
            pending: 0,
        };
        (reading, Writing(stream))
    }
}

impl Reading {
    fn read_some(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let began = Instant::now();
        loop {
            match (&*self.stream).read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.closing.load(Ordering::Relaxed) || began.elapsed() > self.idle {
                        return Ok(0);
                    }
                }
                other => return other,
            }
        }
    }
}

impl ReadHalf for Reading {
    async fn read(&mut self, buffer: &mut [u8]) -> zlink_core::Result<ReadResult> {
        let count = self.read_some(buffer)?;
        let read = buffer.get(..count).unwrap_or_default();
        self.pending = match read.iter().rposition(|byte| *byte == 0) {
            Some(end) => count - end - 1,
            None => self.pending + count,
        };
        if self.pending > MESSAGE_BYTES_MAX {
            return Err(zlink_core::Error::BufferOverflow);
        }
        Ok(ReadResult::new(count))
    }
}

impl WriteHalf for Writing {
    async fn write(
        &mut self,
        bytes: &[u8],
        _: &[impl AsFd],
        _: Option<&zlink_core::connection::PassedCredentials>,
    ) -> zlink_core::Result<()> {
        (&*self.0).write_all(bytes)?;
        Ok(())
    }
}

/// What a future of these sockets gives: it never waits for anything but inside of a call.
pub(crate) fn now<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => unreachable!("a blocking socket is always ready"),
    }
}
