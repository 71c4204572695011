//! A door: waits on all listeners and on all connections that have not said hello yet, and hands each connection whose hello is
//! here to a greeter.
//!
//! Rule: it never waits for one peer, and takes only so many new connections before it looks at those that it has. A connection that
//! says nothing costs a descriptor and no thread; who comes in a crowd gives way to who comes alone.

mod log_limit;
mod pending;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub use log_limit::LogLimit;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
pub use pending::PENDING_MAX;
use pending::{Origin, Pending, PendingHellos, Seen};

use crate::{Channel, ListenError, Listener, Spawner};

/// Who is behind a door.
pub trait Host: Send + Sync + 'static {
    /// So many bytes are a hello.
    fn hello_bytes(&self) -> usize;

    /// How long a connection may take to say it.
    fn hello_deadline(&self) -> Duration;

    /// Whether a greeter is free for a connection of a kind that can't be looked at: it may be silent for as long as it is given.
    fn may_greet_unknown(&self) -> bool;

    /// Gives a connection to a greeter.
    ///
    /// # Errors
    /// The connection, if none is free now.
    fn greet(&self, channel: Box<dyn Channel>) -> Result<(), Box<dyn Channel>>;

    /// Says no to a connection of which nothing was read, without waiting: others need its place.
    fn turn_away(&self, channel: Box<dyn Channel>);

    /// Lets a connection go that did not say hello in time.
    fn too_late(&self, channel: Box<dyn Channel>);

    /// Bounds what strangers may write into the log.
    fn log_limit(&self) -> &LogLimit;
}

/// The waker's token.
const WAKE: Token = Token(usize::MAX);

/// The first token of the listeners; lower ones are connections.
const LISTENERS: usize = (usize::MAX >> 1) + 1;

/// Without descriptors or memory a connection stays in the kernel's queue, and no further event tells of it: it is tried again
/// this often.
const AGAIN: Duration = Duration::from_millis(50);

/// While all greeters are at work it is seen this often whether one is free.
const GREETER_AGAIN: Duration = Duration::from_millis(5);

/// So many connections are accepted before those that are here are looked at.
const ACCEPTED_AT_ONCE: usize = 64;

/// Accepts until it is dropped.
#[must_use = "a door that is dropped is shut"]
pub struct Door {
    running: Option<(Waker, JoinHandle<()>)>,
}

impl std::fmt::Debug for Door {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Door").finish_non_exhaustive()
    }
}

impl Door {
    /// Starts a thread called `name`; without listeners there is none.
    ///
    /// # Errors
    /// What the system said.
    pub fn open<H: Host>(
        host: Arc<H>,
        listeners: Vec<Listener>,
        spawner: &dyn Spawner,
        name: &str,
    ) -> io::Result<Self> {
        if listeners.is_empty() {
            return Ok(Self { running: None });
        }
        let poll = Poll::new()?;
        let waker = Waker::new(poll.registry(), WAKE)?;
        for (index, listener) in listeners.iter().enumerate() {
            poll.registry().register(
                &mut SourceFd(&listener.as_raw_fd()),
                Token(LISTENERS + index),
                Interest::READABLE,
            )?;
        }
        let accepting = AcceptLoop {
            host,
            poll,
            listeners,
            hellos: PendingHellos::default(),
            due: BTreeSet::new(),
            short: BTreeSet::new(),
            crowded: false,
        };
        let thread = spawner.spawn(name, Box::new(move || accepting.run()))?;
        Ok(Self {
            running: Some((waker, thread)),
        })
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        if let Some((waker, thread)) = self.running.take()
            && waker.wake().is_ok()
        {
            let _ = thread.join();
        }
    }
}

struct AcceptLoop<H> {
    host: Arc<H>,
    poll: Poll,
    listeners: Vec<Listener>,
    hellos: PendingHellos,
    /// Listeners at which a connection may wait.
    due: BTreeSet<usize>,
    /// Of which: those where one could not be taken.
    short: BTreeSet<usize>,
    /// Connections wait for a greeter.
    crowded: bool,
}

impl<H: Host> AcceptLoop<H> {
    fn run(mut self) {
        let mut events = Events::with_capacity(256);
        loop {
            if let Err(error) = self.poll.poll(&mut events, self.longest()) {
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                tracing::error!(%error, "no longer accepting connections");
                return;
            }
            for event in &events {
                match event.token() {
                    WAKE => return,
                    Token(listener) if listener >= LISTENERS => {
                        self.due.insert(listener - LISTENERS);
                    }
                    Token(id) => drop(self.hellos.look(id, self.host.hello_bytes())),
                }
            }
            for index in std::mem::take(&mut self.due) {
                self.accept_at(index);
            }
            self.greet_ready();
            self.let_go();
        }
    }

    /// How long nothing happens of which no event tells.
    fn longest(&self) -> Option<Duration> {
        if self.due.difference(&self.short).next().is_some() {
            return Some(Duration::ZERO);
        }
        let now = Instant::now();
        let ends = self.hellos.next_end(self.host.hello_deadline());
        [
            ends.map(|end| end.saturating_duration_since(now)),
            self.crowded.then_some(GREETER_AGAIN),
            (!self.short.is_empty()).then_some(AGAIN),
        ]
        .into_iter()
        .flatten()
        .min()
        // The poll counts whole milliseconds.
        .map(|time| time + Duration::from_millis(1))
    }

    fn accept_at(&mut self, index: usize) {
        let was_short = self.short.remove(&index);
        match self.accept_some(index) {
            // There may be more: the event will not come again for those (edge-triggered).
            Ok(true) => drop(self.due.insert(index)),
            Ok(false) | Err(ListenError::ShutDown) => {}
            Err(error) => {
                // Once, and not each time that it is tried again.
                if !was_short && let Some(unsaid) = self.host.log_limit().allow() {
                    tracing::warn!(%error, unsaid, "a connection could not be accepted");
                }
                // Who stands about has to make room for who comes.
                let exhausted = matches!(error, ListenError::Exhausted(_));
                if exhausted && let Some(channel) = self.hellos.evict() {
                    self.host.turn_away(channel);
                } else {
                    self.short.insert(index);
                }
                self.due.insert(index);
            }
        }
    }

    /// Takes connections that wait, and says whether there may be more.
    fn accept_some(&mut self, index: usize) -> Result<bool, ListenError> {
        for _ in 0..ACCEPTED_AT_ONCE {
            let Some(listener) = self.listeners.get(index) else {
                return Ok(false);
            };
            let Some((channel, peer)) = listener.try_accept()? else {
                return Ok(false);
            };
            self.enter(channel, Origin::of(&peer));
        }
        Ok(true)
    }

    fn enter(&mut self, channel: Box<dyn Channel>, origin: Origin) {
        let (id, evicted) = self.hellos.admit(channel, origin, Instant::now());
        if let Some(evicted) = evicted {
            self.host.turn_away(evicted);
        }
        // Closing its descriptor takes it out of the poll again.
        if let Seen::Waits(socket) = self.hellos.look(id, self.host.hello_bytes())
            && let Err(error) = self.poll.registry().register(
                &mut SourceFd(&socket),
                Token(id),
                Interest::READABLE | Interest::WRITABLE,
            )
        {
            tracing::warn!(%error, "a connection can't be waited for");
            self.hellos.forget(id);
        }
    }

    /// Gives greeters to those whose hello is here, as long as there are any.
    fn greet_ready(&mut self) {
        loop {
            let unknown = self.host.may_greet_unknown();
            let Some((id, mut pending)) = self.hellos.take_ready(unknown) else {
                break;
            };
            if let Some(socket) = pending.watched.take() {
                // What it receives from now on is no event here. It can't fail: it was registered.
                let _ = self.poll.registry().deregister(&mut SourceFd(&socket));
            }
            let Pending { channel, .. } = pending;
            if let Err(channel) = self.host.greet(channel) {
                pending.channel = channel;
                self.hellos.put_back(id, pending);
                break;
            }
        }
        self.crowded = self.hellos.is_anybody_ready();
    }

    /// Closes those whose time is over.
    fn let_go(&mut self) {
        let (limit, now) = (self.host.hello_deadline(), Instant::now());
        while let Some(channel) = self.hellos.expired(limit, now) {
            self.host.too_late(channel);
        }
    }
}
