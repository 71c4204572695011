//! The in-memory kind: two bounded buffers in this process, no descriptor, no kernel.
//!
//! For tests, the simulator and two sides in one process. Rule: it behaves as the socket kinds do, limits and errors
//! included, so that what works over it works over them.

mod ring;

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use self::ring::Ring;
use crate::channel::{Channel, Closer, IoSource, READ_AHEAD_BYTES, ReceiveHalf, SendHalf};
use crate::error::{ChannelError, remember};
use crate::memory::Span;
use crate::patience::{Pace, Patience};
use crate::read_ahead::ReadAhead;

/// A capacity for [`pair`] that lets both sides work without waiting for each other at every frame.
pub const PAIR_CAPACITY_DEFAULT: usize = 1 << 20;

/// Two connected in-memory channels; `capacity` bytes (at least 1) fit into each direction.
#[must_use]
pub fn pair(capacity: usize) -> (Box<dyn Channel>, Box<dyn Channel>) {
    let there = Arc::new(Pipe::new(capacity));
    let back = Arc::new(Pipe::new(capacity));
    let left = MemoryChannel {
        outlet: Outlet(Arc::clone(&there)),
        inlet: Inlet(Arc::clone(&back)),
        name: "memory left → right",
    };
    let right = MemoryChannel {
        outlet: Outlet(back),
        inlet: Inlet(there),
        name: "memory right → left",
    };
    (Box::new(left), Box::new(right))
}

struct MemoryChannel {
    outlet: Outlet,
    inlet: Inlet,
    name: &'static str,
}

impl Channel for MemoryChannel {
    fn split(self: Box<Self>) -> (Box<dyn SendHalf>, Box<dyn ReceiveHalf>, Closer) {
        let Self {
            outlet,
            inlet,
            name,
        } = *self;
        let (out, into) = (Arc::downgrade(&outlet.0), Arc::downgrade(&inlet.0));
        let closer = Closer::new(move || {
            if let Some(pipe) = out.upgrade() {
                pipe.end(|state| state.sender = End::ShutDown);
            }
            if let Some(pipe) = into.upgrade() {
                pipe.end(|state| state.receiver = End::ShutDown);
            }
        });
        let send = MemorySend {
            outlet,
            name,
            patience: Patience::default(),
            failed: None,
        };
        let receive = MemoryReceive {
            inlet,
            name,
            ahead: ReadAhead::new(),
            patience: Patience::default(),
            failed: None,
        };
        (Box::new(send), Box::new(receive), closer)
    }

    fn describe(&self) -> String {
        self.name.to_owned()
    }
}

/// One direction.
struct Pipe {
    state: Mutex<PipeState>,
    changed: Condvar,
}

struct PipeState {
    ring: Ring,
    sender: End,
    receiver: End,
}

/// How one end of a direction is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Open,
    /// Dropped or finished.
    Gone,
    /// Shut down by its own side.
    ShutDown,
}

/// The sending end of a pipe; its drop ends the stream.
struct Outlet(Arc<Pipe>);

/// The receiving end of a pipe; its drop refuses what is still sent.
struct Inlet(Arc<Pipe>);

impl Drop for Outlet {
    fn drop(&mut self) {
        self.0.end(|state| state.sender.leave());
    }
}

impl Drop for Inlet {
    fn drop(&mut self) {
        self.0.end(|state| state.receiver.leave());
    }
}

impl End {
    fn leave(&mut self) {
        if *self == Self::Open {
            *self = Self::Gone;
        }
    }
}

impl Pipe {
    fn new(capacity: usize) -> Self {
        let ring = Ring::new(capacity);
        Self {
            state: Mutex::new(PipeState {
                ring,
                sender: End::Open,
                receiver: End::Open,
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, PipeState> {
        // Nothing panics while it holds the lock; if it did, the ring would still be whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, change: impl FnOnce(&mut PipeState)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Sleeps until something changed, as long as `pace` says.
    fn wait<'g>(
        &'g self,
        state: MutexGuard<'g, PipeState>,
        pace: Pace,
    ) -> MutexGuard<'g, PipeState> {
        match pace {
            Pace::Forever => self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner),
            Pace::AtMost(time) => {
                self.changed
                    .wait_timeout(state, time)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0
            }
            Pace::Try | Pace::DeadlinePassed | Pace::Stalled(_) => state,
        }
    }
}

struct MemorySend {
    outlet: Outlet,
    name: &'static str,
    patience: Patience,
    failed: Option<ChannelError>,
}

impl SendHalf for MemorySend {
    fn send(&mut self, head: &[u8], body: &[IoSource<'_>]) -> Result<(), ChannelError> {
        let result = self.send_all(head, body);
        remember(&mut self.failed, result)
    }

    fn finish(&mut self) -> Result<(), ChannelError> {
        self.check(&self.outlet.0.lock())?;
        self.outlet.0.end(|state| state.sender.leave());
        self.failed = Some(ChannelError::ShutDown);
        Ok(())
    }

    fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.patience.deadline = deadline;
    }

    fn set_stall(&mut self, stall: Option<Duration>) {
        self.patience.stall = stall;
    }

    fn wait_for_room(&mut self) -> Result<(), ChannelError> {
        // Nothing is gained by waiting, but an end is told as by the other kinds.
        self.check(&self.outlet.0.lock())
    }

    fn describe(&self) -> String {
        self.name.to_owned()
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

impl MemorySend {
    fn check(&self, state: &PipeState) -> Result<(), ChannelError> {
        match (&self.failed, state.sender) {
            (_, End::ShutDown) => Err(ChannelError::ShutDown),
            (Some(error), _) => Err(error.clone()),
            (None, _) => Ok(()),
        }
    }

    fn send_all(&self, head: &[u8], body: &[IoSource<'_>]) -> Result<(), ChannelError> {
        let bytes_wanted =
            head.len() as u64 + body.iter().map(|piece| piece.len() as u64).sum::<u64>();
        let mut pieces = std::iter::once(IoSource::Bytes(head))
            .chain(body.iter().copied())
            .filter(|piece| !piece.is_empty());
        let mut piece = pieces.next();
        let mut bytes_done = 0;
        let mut wait = self.patience.start();
        let mut state = self.outlet.0.lock();
        self.check(&state)?;
        while let Some(now) = piece {
            self.check(&state)?;
            let pace = wait.pace().check(bytes_done)?;
            if state.receiver != End::Open {
                return Err(ChannelError::closed(bytes_done, bytes_wanted));
            }
            let count = state.ring.put(now);
            if count == 0 {
                state = self.outlet.0.wait(state, pace);
                continue;
            }
            self.outlet.0.changed.notify_all();
            wait.moved();
            bytes_done += count as u64;
            piece = rest(now, count).or_else(|| pieces.next());
        }
        Ok(())
    }
}

/// What is left of a piece after its first `count` bytes; `None` if nothing is.
fn rest(piece: IoSource<'_>, count: usize) -> Option<IoSource<'_>> {
    match piece {
        IoSource::Bytes(octets) => octets
            .get(count..)
            .filter(|rest| !rest.is_empty())
            .map(IoSource::Bytes),
        IoSource::Guest(span) => after(span, count).map(IoSource::Guest),
    }
}

struct MemoryReceive {
    inlet: Inlet,
    name: &'static str,
    ahead: ReadAhead,
    patience: Patience,
    failed: Option<ChannelError>,
}

impl ReceiveHalf for MemoryReceive {
    fn receive(&mut self, buf: &mut [u8]) -> Result<(), ChannelError> {
        let result = self.check().and_then(|()| {
            if buf.len() <= READ_AHEAD_BYTES {
                self.read_ahead(buf.len())?;
                self.ahead.take(buf);
                return Ok(());
            }
            let mut at = self.ahead.drain(buf);
            pull(
                &self.inlet.0,
                self.patience,
                at as u64,
                buf.len() as u64,
                |ring| {
                    let count = buf.get_mut(at..).map_or(0, |rest| ring.take(rest));
                    at += count;
                    count
                },
            )
        });
        remember(&mut self.failed, result)
    }

    fn receive_into(&mut self, spans: &[Span<'_>]) -> Result<(), ChannelError> {
        let result = self.check().and_then(|()| {
            let bytes_wanted = spans.iter().map(|span| span.len() as u64).sum();
            let mut spans = spans.iter().copied();
            let mut rest = None;
            let mut drained = 0;
            while self.ahead.len() > 0
                && let Some(span) = spans.next()
            {
                let count = self.ahead.drain_into(span);
                drained += count as u64;
                rest = after(span, count);
            }
            let mut spans = rest
                .into_iter()
                .chain(spans)
                .filter(|span| !span.is_empty());
            let mut landing = spans.next();
            pull(
                &self.inlet.0,
                self.patience,
                drained,
                bytes_wanted,
                |ring| {
                    let Some(span) = landing else { return 0 };
                    let count = ring.take_into(span);
                    landing = after(span, count).or_else(|| spans.next());
                    count
                },
            )
        });
        remember(&mut self.failed, result)
    }

    fn drain(&mut self, bytes_max: u64) -> Result<u64, ChannelError> {
        self.check()?;
        let mut bytes_done = self.ahead.discard() as u64;
        while bytes_done < bytes_max {
            match self.read_ahead(1) {
                Ok(()) => bytes_done += self.ahead.discard() as u64,
                Err(ChannelError::Closed) => break,
                Err(error) => return remember(&mut self.failed, Err(error)),
            }
        }
        Ok(bytes_done)
    }

    fn peek(&self, to: &mut [u8]) -> usize {
        self.ahead.peek(to)
    }

    fn buffered(&self) -> usize {
        self.ahead.len()
    }

    fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.patience.deadline = deadline;
    }

    fn set_stall(&mut self, stall: Option<Duration>) {
        self.patience.stall = stall;
    }

    fn describe(&self) -> String {
        self.name.to_owned()
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

impl MemoryReceive {
    fn check(&self) -> Result<(), ChannelError> {
        if self.inlet.0.lock().receiver == End::ShutDown {
            return Err(ChannelError::ShutDown);
        }
        self.failed
            .as_ref()
            .map_or(Ok(()), |error| Err(error.clone()))
    }

    /// Reads until at least `count` bytes are held, `count` ≤ [`READ_AHEAD_BYTES`]. What came stays held whatever happens.
    fn read_ahead(&mut self, count: usize) -> Result<(), ChannelError> {
        let ahead = &mut self.ahead;
        let result = pull(
            &self.inlet.0,
            self.patience,
            ahead.len() as u64,
            count as u64,
            |ring| {
                let more = ring.take(ahead.room());
                ahead.filled(more);
                more
            },
        );
        result.map_err(|error| match error {
            ChannelError::Deadline { .. } => ChannelError::Deadline { bytes_done: 0 },
            ChannelError::Stalled { stall, .. } => ChannelError::Stalled {
                bytes_done: 0,
                stall,
            },
            other => other,
        })
    }
}

/// Calls `take`, which moves what it can out of the ring, until `bytes_wanted` bytes are moved together with the `bytes_done`
/// before, and waits whenever it moved none.
fn pull(
    pipe: &Pipe,
    patience: Patience,
    mut bytes_done: u64,
    bytes_wanted: u64,
    mut take: impl FnMut(&mut Ring) -> usize,
) -> Result<(), ChannelError> {
    let mut wait = patience.start();
    let mut state = pipe.lock();
    while bytes_done < bytes_wanted {
        if state.receiver == End::ShutDown {
            return Err(ChannelError::ShutDown);
        }
        let pace = wait.pace().check(bytes_done)?;
        let count = take(&mut state.ring);
        if count > 0 {
            pipe.changed.notify_all();
            wait.moved();
            bytes_done += count as u64;
        } else if state.sender != End::Open {
            return Err(ChannelError::closed(bytes_done, bytes_wanted));
        } else {
            state = pipe.wait(state, pace);
        }
    }
    Ok(())
}

/// What is left of a span after its first `count` bytes; `None` if nothing is.
fn after(span: Span<'_>, count: usize) -> Option<Span<'_>> {
    span.subspan(count, span.len().checked_sub(count)?)
        .ok()
        .filter(|rest| !rest.is_empty())
}
