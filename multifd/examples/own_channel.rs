//! A channel of one's own: messages of the standard library's queues. A kind over a socket would send the spans without copying them.
//!
//! `cargo run --release -p multifd --example own_channel`
#![allow(clippy::print_stdout)] // an example shows what happens

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use multifd::transport::{Channel, ChannelError, Closer, IoSource, ReceiveHalf, SendHalf, Span};

struct Queues(SyncSender<Vec<u8>>, Receiver<Vec<u8>>);

fn pair() -> (Box<dyn Channel>, Box<dyn Channel>) {
    let ((to, from_us), (back, from_them)) = (sync_channel(64), sync_channel(64));
    (
        Box::new(Queues(to, from_them)),
        Box::new(Queues(back, from_us)),
    )
}

impl Channel for Queues {
    fn split(self: Box<Self>) -> (Box<dyn SendHalf>, Box<dyn ReceiveHalf>, Closer) {
        let shut = Arc::new(AtomicBool::new(false));
        let receiving = Receiving {
            queue: self.1,
            shut: Arc::clone(&shut),
            left: Vec::new(),
            until: None,
        };
        let closer = Closer::new(move || shut.store(true, SeqCst));
        (Box::new(Sending(Some(self.0))), Box::new(receiving), closer)
    }

    fn describe(&self) -> String {
        "a pair of queues".into()
    }
}

struct Sending(Option<SyncSender<Vec<u8>>>);

impl SendHalf for Sending {
    fn send(&mut self, head: &[u8], body: &[IoSource<'_>]) -> Result<(), ChannelError> {
        let mut message = head.to_vec();
        for piece in body {
            let at = message.len();
            message.resize(at + piece.len(), 0);
            match piece {
                IoSource::Bytes(bytes) => message[at..].copy_from_slice(bytes),
                IoSource::Guest(span) => span.copy_to(&mut message[at..]),
            }
        }
        let queue = self.0.as_ref().ok_or(ChannelError::ShutDown)?;
        queue.send(message).map_err(|_| ChannelError::Closed)
    }

    fn finish(&mut self) -> Result<(), ChannelError> {
        self.0.take().map(drop).ok_or(ChannelError::ShutDown)
    }

    fn set_deadline(&mut self, _: Option<Instant>) {}

    fn set_stall(&mut self, _: Option<Duration>) {}

    fn describe(&self) -> String {
        "a queue".into()
    }
}

struct Receiving {
    queue: Receiver<Vec<u8>>,
    shut: Arc<AtomicBool>,
    left: Vec<u8>,
    until: Option<Instant>,
}

impl Receiving {
    /// The next bytes of the stream, so many, or why they do not come.
    fn take(&mut self, wanted: usize) -> Result<Vec<u8>, ChannelError> {
        while self.left.len() < wanted {
            match self.queue.recv_timeout(Duration::from_millis(10)) {
                Ok(message) => self.left.extend(message),
                Err(RecvTimeoutError::Disconnected) => return Err(ChannelError::Closed),
                Err(_) if self.shut.load(SeqCst) => return Err(ChannelError::ShutDown),
                Err(_) if self.until.is_some_and(|until| until <= Instant::now()) => {
                    return Err(ChannelError::Deadline { bytes_done: 0 });
                }
                Err(_) => {}
            }
        }
        Ok(self.left.drain(..wanted).collect())
    }
}

impl ReceiveHalf for Receiving {
    fn receive(&mut self, into: &mut [u8]) -> Result<(), ChannelError> {
        into.copy_from_slice(&self.take(into.len())?);
        Ok(())
    }

    fn receive_into(&mut self, spans: &[Span<'_>]) -> Result<(), ChannelError> {
        for span in spans {
            span.copy_from(&self.take(span.len())?);
        }
        Ok(())
    }

    fn drain(&mut self, bytes_max: u64) -> Result<u64, ChannelError> {
        let mut gone = 0;
        while gone < bytes_max && self.take(1).is_ok() {
            gone += 1 + std::mem::take(&mut self.left).len() as u64;
        }
        Ok(gone)
    }

    fn buffered(&self) -> usize {
        self.left.len()
    }

    fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.until = deadline;
    }

    fn set_stall(&mut self, _: Option<Duration>) {}

    fn describe(&self) -> String {
        "a queue".into()
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let moved = support::migrate(pair, Vec::new(), None)?;
    println!("moved over queues: {} bytes", moved.report.sent_bytes);
    Ok(())
}
