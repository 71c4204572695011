//! A channel of one's own: messages of the standard library's queues. A kind over a socket would send the spans without copying them.
//!
//! `cargo run --release -p multifd --example own_channel`
#![allow(clippy::print_stdout)] // an example shows what happens

mod support;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use multifd::source;
use multifd::transport::{Channel, ChannelError, Closer, IoSource, ReceiveHalf, SendHalf, Span};
use support::{Arriving, Leaving};

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
                IoSource::Octets(bytes) => message[at..].copy_from_slice(bytes),
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

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

struct Receiving {
    queue: Receiver<Vec<u8>>,
    shut: Arc<AtomicBool>,
    left: Vec<u8>,
    until: Option<Instant>,
}

impl Receiving {
    /// Has at least so many bytes in `left`, or says why not.
    fn fill(&mut self, wanted: usize) -> Result<(), ChannelError> {
        while self.left.len() < wanted {
            match self.queue.recv_timeout(Duration::from_millis(10)) {
                Ok(message) => self.left.extend(message),
                Err(RecvTimeoutError::Disconnected) => return Err(ChannelError::Closed),
                Err(RecvTimeoutError::Timeout) if self.shut.load(SeqCst) => {
                    return Err(ChannelError::ShutDown);
                }
                Err(RecvTimeoutError::Timeout)
                    if self.until.is_some_and(|until| Instant::now() >= until) =>
                {
                    return Err(ChannelError::Deadline { bytes_done: 0 });
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        Ok(())
    }
}

impl ReceiveHalf for Receiving {
    fn receive(&mut self, into: &mut [u8]) -> Result<(), ChannelError> {
        self.fill(into.len())?;
        into.copy_from_slice(&self.left[..into.len()]);
        self.left.drain(..into.len());
        Ok(())
    }

    fn receive_into(&mut self, spans: &[Span<'_>]) -> Result<(), ChannelError> {
        for span in spans {
            let bytes = span.len();
            self.fill(bytes)?;
            span.copy_from(&self.left[..bytes]);
            self.left.drain(..bytes);
        }
        Ok(())
    }

    fn drain(&mut self, bytes_max: u64) -> Result<u64, ChannelError> {
        let mut gone = std::mem::take(&mut self.left).len() as u64;
        while gone < bytes_max && self.fill(1).is_ok() {
            gone += std::mem::take(&mut self.left).len() as u64;
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

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (reception, dial) = support::arrival(Arriving::default(), pair)?;
    let memory = support::memory();
    let (machine, writes) = Leaving::start(&memory);
    let left = source::Migration::start(
        source::Parts::new(machine, memory, dial)
            .source(writes)
            .config(support::settings().build()?),
    )?
    .wait();
    let arrived = reception.wait();
    if let Some(error) = left.error {
        return Err(error.into());
    }
    let machine = arrived.vmm.ok_or("it did not come back")?;
    assert!(machine.runs && machine.is_right());
    println!("moved over queues: {} bytes", left.report.sent_bytes);
    Ok(())
}
