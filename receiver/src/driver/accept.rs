//! The accept thread: waits on all listeners at once, and hands each connection to a greeter.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use multifd_transport::Listener;

use super::{Shared, greet};

/// The waker's token; listeners have their index.
const WAKE: Token = Token(usize::MAX);

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
    loop {
        if let Err(error) = poll.poll(&mut events, None) {
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            tracing::error!(%error, "no longer accepting connections");
            return;
        }
        for event in &events {
            if event.token() == WAKE {
                return;
            }
            if let Some(listener) = listeners.get(event.token().0) {
                accept_all(shared, listener);
            }
        }
    }
}

/// Takes every connection that waits: the event will not come again for those (edge-triggered).
fn accept_all(shared: &Arc<Shared>, listener: &Listener) {
    loop {
        match listener.try_accept() {
            Ok(Some((channel, peer))) => {
                if let Err(error) = greet::offer(shared, channel) {
                    tracing::warn!(%peer, %error, "connection refused");
                }
            }
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                return;
            }
        }
    }
}
