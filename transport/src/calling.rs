//! A listener that dials: the destination calls its source, and gives out each connection once the source has spoken on it.
//!
//! ```text
//!   dial ──► wait for the peer's first bytes ──► queue, bell ──► try_accept
//!     ▲                                             │
//!     └─────────────────────────────────────────────┘ the next one
//! ```
//! Rule: one connection is ready at a time, so that a source that opens many channels never waits for more than a connection's making, and
//! one that is not there is not flooded.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use socket2::SockRef;

use crate::address::Address;
use crate::channel::Channel;
use crate::error::{ConnectError, ListenError, Unavailable};
use crate::listener::{Accepted, Listen};
use crate::options::{ChannelOptions, connect_with};
use crate::sys::{self, Ready};

/// How long one attempt to connect may take. The thread outlives its listener by no more than this.
const DIAL_MAX: Duration = Duration::from_secs(2);

/// The pause after the first attempt that failed, or a connection that ended before anything was said; each further one is twice as
/// long, up to [`PAUSE_MAX`].
const PAUSE_FIRST: Duration = Duration::from_millis(20);

/// The longest pause: a source that comes up is found out within this.
const PAUSE_MAX: Duration = Duration::from_millis(250);

/// Connections on which the peer has spoken and that nobody took. Dialling goes on when there is room again.
const READY_MAX: usize = 16;

/// How late the thread notices that its listener is gone.
const TICK: Duration = Duration::from_millis(250);

/// Fewer bytes than this are no hello: an end, or an alert of TLS that says why this side is refused.
const WORDS_BYTES: usize = 64;

pub(crate) struct Calling {
    shared: Arc<Shared>,
    address: Address,
    /// Readable while something is ready, or for good once it is over.
    bell: UnixStream,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    ring: UnixStream,
}

#[derive(Default)]
struct State {
    ready: VecDeque<Accepted>,
    over: bool,
}

impl Calling {
    pub(crate) fn start(address: &Address, options: &ChannelOptions) -> Result<Self, ListenError> {
        if matches!(address, Address::Rdma(_)) {
            return Err(ListenError::Unavailable {
                address: address.to_string(),
                cause: Unavailable::Host(
                    "a destination can't dial its source by RDMA: dial by tcp: or tls:, or let the source dial"
                        .to_owned(),
                ),
            });
        }
        let (bell, ring) = UnixStream::pair().map_err(ListenError::Io)?;
        bell.set_nonblocking(true).map_err(ListenError::Io)?;
        ring.set_nonblocking(true).map_err(ListenError::Io)?;
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            ring,
        });
        let (theirs, target, own) = (Arc::clone(&shared), address.clone(), options.clone());
        let body = Box::new(move || call(&theirs, &target, &own));
        let spawned = options.resolver.spawner().spawn("mfd-call", body);
        // It is not waited for: at the end it may be in the middle of an attempt.
        drop(spawned.map_err(ListenError::Io)?);
        Ok(Self {
            shared,
            address: address.clone(),
            bell,
        })
    }
}

impl Drop for Calling {
    fn drop(&mut self) {
        self.shared.end();
    }
}

impl Listen for Calling {
    fn try_accept(&self) -> Result<Option<Accepted>, ListenError> {
        // The bell first: whoever is queued after this rings again.
        while matches!((&self.bell).read(&mut [0; 64]), Ok(1..)) {}
        let mut state = self.shared.lock();
        let next = state.ready.pop_front();
        if !state.ready.is_empty() {
            self.shared.ring();
        }
        drop(state);
        self.shared.changed.notify_all();
        Ok(next)
    }

    fn local_address(&self) -> &Address {
        &self.address
    }

    fn poll_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    fn shutdown(&self) {
        self.shared.end();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self) {
        // A bell that is full rings already.
        let _ = (&self.ring).write(&[1]);
    }

    fn end(&self) {
        self.lock().over = true;
        self.changed.notify_all();
        self.ring();
    }

    fn is_over(&self) -> bool {
        self.lock().over
    }

    /// Sleeps for this long, or until it is over.
    fn pause(&self, time: Duration) {
        let state = self.lock();
        let _ = self
            .changed
            .wait_timeout_while(state, time, |state| !state.over);
    }

    /// Queues a connection when there is room; not any more if it is over.
    fn put(&self, accepted: Accepted) {
        let state = self.lock();
        let full = |state: &mut State| !state.over && state.ready.len() >= READY_MAX;
        let mut state = self
            .changed
            .wait_while(state, full)
            .unwrap_or_else(PoisonError::into_inner);
        if !state.over {
            state.ready.push_back(accepted);
            self.ring();
        }
    }
}

/// The life of the thread.
fn call(shared: &Shared, address: &Address, options: &ChannelOptions) {
    let mut pause = PAUSE_FIRST;
    while !shared.is_over() {
        let (spoken, words) = match connect_with(address, options, Instant::now() + DIAL_MAX) {
            Ok(channel) => match wait_for_words(shared, &*channel) {
                Ok(words) => (words.is_some().then_some(channel), words.unwrap_or(0)),
                Err(_) => (None, 0),
            },
            Err(error) => {
                note(address, &error);
                (None, 0)
            }
        };
        if let Some(channel) = spoken {
            shared.put((channel, address.to_string()));
        }
        // Whoever takes the channel finds out what it is. A peer that goes on so is not dialled in a circle.
        if words < WORDS_BYTES {
            shared.pause(pause);
            pause = (2 * pause).min(PAUSE_MAX);
        } else {
            pause = PAUSE_FIRST;
        }
    }
}

/// Waits until the peer says something or the connection ends; gives how much it said at first, or nothing if the listener ended first.
fn wait_for_words(shared: &Shared, channel: &dyn Channel) -> io::Result<Option<usize>> {
    let Some(fd) = channel.poll_fd() else {
        return Ok(Some(WORDS_BYTES));
    };
    while !shared.is_over() {
        if sys::wait(fd, Ready::Receive, Some(TICK))? {
            let mut octets = [MaybeUninit::uninit(); WORDS_BYTES];
            // An end that is an error is the taker's to find out.
            return Ok(Some(SockRef::from(&fd).peek(&mut octets).unwrap_or(0)));
        }
    }
    Ok(None)
}

fn note(address: &Address, error: &ConnectError) {
    if error.may_retry() {
        tracing::debug!(%address, %error, "the source can't be reached yet");
    } else {
        tracing::warn!(%address, %error, "the source can't be reached; trying on");
    }
}
