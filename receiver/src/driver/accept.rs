//! The accept thread: waits on all listeners at once, and hands each connection to a greeter.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use multifd_transport::{ListenError, Listener};

use super::{Shared, greet};

/// The waker's token; listeners have their index.
const WAKE: Token = Token(usize::MAX);

/// Without descriptors or memory a connection stays in the kernel's queue, and no further event tells of it: it is tried again
/// this often.
const AGAIN: Duration = Duration::from_millis(50);

/// Accepts until it is dropped.
pub(super) struct Acceptor {
    running: Option<(Waker, JoinHandle<()>)>,
}

impl Acceptor {
    /// Starts the thread; without listeners there is none.
    pub(super) fn start(shared: &Arc<Shared>, listeners: Vec<Listener>) -> io::Result<Self> {
        if listeners.is_empty() {
            return Ok(Self { running: None });
        }
        let poll = Poll::new()?;
        let waker = Waker::new(poll.registry(), WAKE)?;
        for (index, listener) in listeners.iter().enumerate() {
            poll.registry().register(
                &mut SourceFd(&listener.as_raw_fd()),
                Token(index),
                Interest::READABLE,
            )?;
        }
        let theirs = Arc::clone(shared);
        let thread = shared.spawner.spawn(
            "mfd-accept",
            Box::new(move || accept(&theirs, poll, &listeners)),
        )?;
        Ok(Self {
            running: Some((waker, thread)),
        })
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        if let Some((waker, thread)) = self.running.take()
            && waker.wake().is_ok()
        {
            let _ = thread.join();
        }
    }
}

fn accept(shared: &Arc<Shared>, mut poll: Poll, listeners: &[Listener]) {
    let mut events = Events::with_capacity(64);
    // Listeners at which a connection may wait that could not be taken.
    let mut behind = Vec::new();
    loop {
        let longest = (!behind.is_empty()).then_some(AGAIN);
        if let Err(error) = poll.poll(&mut events, longest) {
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            tracing::error!(%error, "no longer accepting connections");
            return;
        }
        let was_behind = std::mem::take(&mut behind);
        for event in &events {
            if event.token() == WAKE {
                return;
            }
        }
        for (index, listener) in listeners.iter().enumerate() {
            let tried_again = was_behind.contains(&index);
            if !tried_again && !events.iter().any(|event| event.token().0 == index) {
                continue;
            }
            if let Err(error) = accept_all(shared, listener) {
                // Once, and not each time that it is tried again.
                if !tried_again {
                    tracing::warn!(%error, "a connection could not be accepted");
                }
                if !matches!(error, ListenError::ShutDown) {
                    behind.push(index);
                }
            }
        }
    }
}

/// Takes every connection that waits: the event will not come again for those (edge-triggered).
fn accept_all(shared: &Arc<Shared>, listener: &Listener) -> Result<(), ListenError> {
    while let Some((channel, peer)) = listener.try_accept()? {
        if let Err(error) = greet::offer(shared, channel) {
            tracing::warn!(%peer, %error, "connection refused");
        }
    }
    Ok(())
}
