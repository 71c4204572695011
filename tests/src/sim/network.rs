//! The simulated network: channels whose bytes take simulated time, and can be lost, damaged, held up or cut.
//!
//! ```text
//!   send ──► gather (guest memory is read here) ──► [segment at t1][segment at t2]… ──► receive, when its time has come
//!              ▲ the frame is shown to the world,       capacity, bytes a second, latency; frozen, silent, reset
//!              │ which may cut, flip or forge it
//! ```
//! It keeps the contract of `transport::Channel` (the conformance kit runs over it, on simulated time). Bytes arrive in order
//! on one channel and at different times on different ones. It must never lose, change or make up a byte without a fault of the
//! plan.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use multifd_transport::{Channel, ChannelError, Closer, IoSource, ReceiveHalf, SendHalf, Span};
use multifd_wire::ChannelRef;

use super::faults::{FrameFate, FrameSeen, Side};
use super::schedule::{self, Key};
use super::world::World;

/// Receives up to this size are all or nothing with regard to time, as the contract has it.
const SMALL: usize = multifd_transport::READ_AHEAD_BYTES;

/// The most that is gathered from memory at once: a guest that runs can write between two pieces.
const PIECE: usize = 16 << 10;

/// How a link carries bytes.
#[derive(Debug, Clone, Copy)]
pub struct Quality {
    /// Bytes that may be under way in one direction.
    pub capacity: usize,
    /// Time that one byte takes, in ps.
    pub ps_per_octet: u64,
    /// Time until a byte that was sent arrives, in ns.
    pub latency_ns: u64,
}

/// How one end of a direction is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Open,
    /// Dropped or finished.
    Gone,
    /// Shut down by its own side.
    ShutDown,
}

struct Segment {
    at: u64,
    octets: Vec<u8>,
    read: usize,
    /// Flipped bits that can be found out once the byte at this place was read, by their number.
    marks: Vec<(usize, usize)>,
}

struct State {
    quality: Quality,
    segments: VecDeque<Segment>,
    queued: usize,
    free_at: u64,
    newest: u64,
    frozen_until: u64,
    /// Bytes go in and never come out; neither does the end of the stream.
    silent: bool,
    reset: bool,
    sender: End,
    receiver: End,
    /// When the end of the stream arrives.
    end_at: u64,
}

/// One direction of a link.
struct Pipe {
    octets: Key,
    room: Key,
    state: Mutex<State>,
}

impl Pipe {
    fn new(quality: Quality) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self {
            octets: Key::Octets(number),
            room: Key::Room(number),
            state: Mutex::new(State {
                quality,
                segments: VecDeque::new(),
                queued: 0,
                free_at: 0,
                newest: 0,
                frozen_until: 0,
                silent: false,
                reset: false,
                sender: End::Open,
                receiver: End::Open,
                end_at: 0,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        if schedule::is_simulated() {
            schedule::wake(self.octets, usize::MAX);
            schedule::wake(self.room, usize::MAX);
        }
    }

    fn leave(&self, end: impl FnOnce(&mut State) -> &mut End, how: End) {
        let now = if schedule::is_simulated() {
            schedule::now()
        } else {
            0
        };
        self.change(|state| {
            state.end_at = state.newest.max(now + state.quality.latency_ns);
            let end = end(state);
            if *end == End::Open || how == End::ShutDown {
                *end = how;
            }
        });
    }
}

/// A connection of the simulated network, as the faults see it.
pub struct Link {
    /// What the source dialled it for.
    pub channel: ChannelRef,
    /// Its number among all.
    pub number: u64,
    /// Which of the destination's programs it leads to.
    pub life: u32,
    /// Source to destination.
    forth: Arc<Pipe>,
    /// Destination to source.
    back: Arc<Pipe>,
}

impl Link {
    fn both(&self, change: impl Fn(&mut State)) {
        self.forth.change(&change);
        self.back.change(&change);
    }

    /// Both ends find the connection reset; what was under way is gone.
    pub fn reset(&self) {
        self.both(|state| {
            state.reset = true;
            state.segments.clear();
        });
    }

    /// From now on nothing arrives, in either direction, and nobody is told.
    pub fn silence(&self) {
        self.both(|state| state.silent = true);
    }

    /// The bytes of both directions are held up until an instant.
    pub fn freeze(&self, until: u64) {
        self.both(|state| state.frozen_until = state.frozen_until.max(until));
    }

    /// From now on a byte takes so many times as long, and so much longer to arrive.
    pub fn worsen(&self, factor: u64, latency_ns: u64) {
        self.both(|state| {
            state.quality.ps_per_octet *= factor;
            state.quality.latency_ns += latency_ns;
        });
    }
}

/// Connects source and destination: the source's end, the destination's end, and the link for faults.
pub fn connect(
    world: &Arc<World>,
    channel: ChannelRef,
    quality: Quality,
) -> (Box<dyn Channel>, Box<dyn Channel>, Arc<Link>) {
    let link = Arc::new(Link {
        channel,
        number: world.count_link(),
        life: world.life(),
        forth: Arc::new(Pipe::new(quality)),
        back: Arc::new(Pipe::new(quality)),
    });
    let end = |side, out: &Arc<Pipe>, into: &Arc<Pipe>| {
        Box::new(SimChannel {
            world: Arc::clone(world),
            side,
            channel,
            out: Arc::clone(out),
            into: Arc::clone(into),
            link: Arc::clone(&link),
        })
    };
    let source = end(Side::Source, &link.forth, &link.back);
    let destination = end(Side::Destination, &link.back, &link.forth);
    (source, destination, link)
}

struct SimChannel {
    world: Arc<World>,
    side: Side,
    channel: ChannelRef,
    out: Arc<Pipe>,
    into: Arc<Pipe>,
    link: Arc<Link>,
}

impl Channel for SimChannel {
    fn split(self: Box<Self>) -> (Box<dyn SendHalf>, Box<dyn ReceiveHalf>, Closer) {
        let (out, into) = (Arc::downgrade(&self.out), Arc::downgrade(&self.into));
        let closer = Closer::new(move || {
            if let Some(pipe) = out.upgrade() {
                pipe.leave(|state| &mut state.sender, End::ShutDown);
            }
            if let Some(pipe) = into.upgrade() {
                pipe.leave(|state| &mut state.receiver, End::ShutDown);
            }
        });
        let name = self.describe();
        let send = SimSend {
            world: Arc::clone(&self.world),
            side: self.side,
            channel: self.channel,
            link: self.link,
            outlet: Outlet(self.out),
            name: name.clone(),
            frames: 0,
            limits: Limits::default(),
            failed: None,
        };
        let receive = SimReceive {
            world: self.world,
            inlet: Inlet(self.into),
            name,
            limits: Limits::default(),
            failed: None,
        };
        (Box::new(send), Box::new(receive), closer)
    }

    fn describe(&self) -> String {
        format!("simulated {} at {:?}", self.channel, self.side)
    }
}

struct Outlet(Arc<Pipe>);
struct Inlet(Arc<Pipe>);

impl Drop for Outlet {
    fn drop(&mut self) {
        self.0.leave(|state| &mut state.sender, End::Gone);
    }
}

impl Drop for Inlet {
    fn drop(&mut self) {
        self.0.leave(|state| &mut state.receiver, End::Gone);
    }
}

/// What a half was told about waiting.
#[derive(Debug, Clone, Copy, Default)]
struct Limits {
    deadline: Option<Instant>,
    stall: Option<Duration>,
}

/// The waiting of one operation.
struct Wait {
    limits: Limits,
    moved: u64,
    first: bool,
}

impl Wait {
    fn new(limits: Limits) -> Self {
        Self {
            limits,
            moved: schedule::now(),
            first: true,
        }
    }

    fn moved(&mut self) {
        self.moved = schedule::now();
    }

    /// Waits for a change of the pipe, or until `other`, within the limits.
    fn wait(&mut self, key: Key, other: Option<u64>, bytes_done: u64) -> Result<(), ChannelError> {
        let now = schedule::now();
        let deadline = self
            .limits
            .deadline
            .map(|at| now + nanos(at.saturating_duration_since(Instant::now())));
        let stall = self.limits.stall.map(|stall| self.moved + nanos(stall));
        let first = std::mem::replace(&mut self.first, false);
        if !first && deadline.is_some_and(|at| at <= now) {
            return Err(ChannelError::Deadline { bytes_done });
        }
        if !first && stall.is_some_and(|at| at <= now) {
            return Err(ChannelError::Stalled {
                bytes_done,
                stall: self.limits.stall.unwrap_or_default(),
            });
        }
        let until = [deadline, stall, other].into_iter().flatten().min();
        if until.is_none_or(|until| until > now) {
            schedule::block(key, until);
        }
        Ok(())
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX / 4)
}

fn remember<T>(
    failed: &mut Option<ChannelError>,
    result: Result<T, ChannelError>,
) -> Result<T, ChannelError> {
    if let Err(error) = &result
        && !error.may_retry()
    {
        *failed = Some(error.clone());
    }
    result
}

struct SimSend {
    world: Arc<World>,
    side: Side,
    channel: ChannelRef,
    link: Arc<Link>,
    outlet: Outlet,
    name: String,
    frames: u64,
    limits: Limits,
    failed: Option<ChannelError>,
}

impl SimSend {
    fn check(&self, bytes_done: u64, bytes_wanted: u64) -> Result<(), ChannelError> {
        let state = self.outlet.0.lock();
        if state.sender == End::ShutDown {
            return Err(ChannelError::ShutDown);
        }
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        if state.reset {
            return Err(ChannelError::Reset { bytes_done });
        }
        if state.receiver != End::Open && !state.silent {
            return Err(if bytes_done == 0 {
                ChannelError::Closed
            } else {
                ChannelError::ClosedMidway {
                    bytes_done,
                    bytes_wanted,
                }
            });
        }
        Ok(())
    }

    fn frame(&mut self, head: &[u8], body: &[IoSource<'_>]) -> Result<(), ChannelError> {
        let wanted = (head.len() + body.iter().map(IoSource::len).sum::<usize>()) as u64;
        self.check(0, wanted)?;
        self.world.preempt();
        let seen = FrameSeen::new(self.side, self.channel, self.frames, head, wanted);
        if self.frames == 0 && self.side == Side::Source && self.channel == ChannelRef::Control {
            self.world.hello_seen(head);
        }
        self.frames += 1;
        let fate = self.world.frame_leaves(&seen, &self.link);
        let mut wait = Wait::new(self.limits);
        let mut done = 0;
        for head in fate.heads(head) {
            self.piece(
                head.into_octets().as_mut_slice(),
                &fate,
                &mut done,
                wanted,
                &mut wait,
            )?;
        }
        let mut done = head.len() as u64;
        for piece in body {
            if let IoSource::Guest(span) = piece {
                self.world.guest_memory_is_read(*span, &fate);
            }
            let mut at = 0;
            while at < piece.len() {
                let count = (piece.len() - at).min(PIECE);
                let mut octets = vec![0; count];
                match piece {
                    IoSource::Bytes(from) => octets.copy_from_slice(&from[at..at + count]),
                    IoSource::Guest(span) => {
                        if let Ok(part) = span.subspan(at, count) {
                            part.copy_to(&mut octets);
                        }
                    }
                }
                self.piece(&mut octets, &fate, &mut done, wanted, &mut wait)?;
                at += count;
            }
        }
        // Also one that a forger keeps back: the source was told that it is sent.
        if fate.commits {
            self.world.commit_leaves();
        }
        self.world.frame_left(&seen, &self.link);
        Ok(())
    }

    /// Puts bytes on the way, as the frame's fate has it.
    fn piece(
        &mut self,
        octets: &mut [u8],
        fate: &FrameFate,
        done: &mut u64,
        wanted: u64,
        wait: &mut Wait,
    ) -> Result<(), ChannelError> {
        let begin = *done;
        fate.damage(begin, octets);
        let mut octets = &octets[..];
        if let Some(cut) = fate.cut_at {
            let left = usize::try_from(cut.saturating_sub(begin)).unwrap_or(usize::MAX);
            if left < octets.len() {
                octets = &octets[..left];
            }
        }
        while !octets.is_empty() {
            self.check(*done, wanted)?;
            let now = schedule::now();
            let (room, at) = {
                let mut state = self.outlet.0.lock();
                let room = state
                    .quality
                    .capacity
                    .saturating_sub(state.queued)
                    .min(octets.len());
                if room > 0 {
                    let (now_octets, rest) = octets.split_at(room);
                    octets = rest;
                    state.put(now_octets, now, fate.marks_in(*done, room));
                }
                (room, state.newest.max(state.frozen_until))
            };
            if room == 0 {
                wait.wait(self.outlet.0.room, None, *done)?;
            } else {
                if fate.commits {
                    self.world.commit_leaves();
                }
                schedule::wake_at(self.outlet.0.octets, at);
                *done += room as u64;
                wait.moved();
            }
        }
        if fate.cut_at.is_some_and(|cut| *done >= cut) {
            fate.cut(&self.link, || {
                self.outlet.0.leave(|state| &mut state.sender, End::Gone);
            });
            return Err(ChannelError::Reset { bytes_done: *done });
        }
        Ok(())
    }
}

impl State {
    fn put(&mut self, octets: &[u8], now: u64, marks: Vec<(usize, usize)>) {
        let begin = self.free_at.max(now);
        self.free_at = begin + octets.len() as u64 * self.quality.ps_per_octet / 1000;
        self.newest = self.newest.max(self.free_at + self.quality.latency_ns);
        self.queued += octets.len();
        self.segments.push_back(Segment {
            at: self.newest,
            octets: octets.to_vec(),
            read: 0,
            marks,
        });
    }

    /// Bytes that have arrived, and when more will have.
    fn arrived(&self, now: u64) -> (usize, Option<u64>) {
        if self.silent {
            return (0, None);
        }
        let mut count = 0;
        for segment in &self.segments {
            let at = segment.at.max(self.frozen_until);
            if at > now {
                return (count, Some(at));
            }
            count += segment.octets.len() - segment.read;
        }
        (count, None)
    }

    /// Copies what has arrived and was not taken; how much it is.
    fn look(&self, now: u64, to: &mut [u8]) -> usize {
        let (there, _) = self.arrived(now);
        let mut left = there.min(to.len());
        let mut at = 0;
        for segment in &self.segments {
            let from = &segment.octets[segment.read..];
            let count = from.len().min(left);
            to[at..at + count].copy_from_slice(&from[..count]);
            at += count;
            left -= count;
        }
        at
    }

    /// Gives the flipped bits that can be found out now.
    fn take(&mut self, to: &mut [u8]) -> Vec<usize> {
        let (mut at, mut found) = (0, Vec::new());
        while at < to.len()
            && let Some(segment) = self.segments.front_mut()
        {
            let from = &segment.octets[segment.read..];
            let count = from.len().min(to.len() - at);
            to[at..at + count].copy_from_slice(&from[..count]);
            segment.read += count;
            at += count;
            if !segment.marks.is_empty() {
                let read = segment.read;
                found.extend(
                    segment
                        .marks
                        .extract_if(.., |(place, _)| *place < read)
                        .map(|(_, flip)| flip),
                );
            }
            if segment.read == segment.octets.len() {
                self.segments.pop_front();
            }
        }
        self.queued -= at;
        found
    }

    /// The end of the stream, if it has arrived; otherwise when it will have.
    fn ended(&self, now: u64) -> Result<bool, u64> {
        if self.sender == End::Open || self.silent {
            return Ok(false);
        }
        let at = self.end_at.max(self.frozen_until);
        if at <= now { Ok(true) } else { Err(at) }
    }
}

impl SendHalf for SimSend {
    fn send(&mut self, head: &[u8], body: &[IoSource<'_>]) -> Result<(), ChannelError> {
        let result = self.frame(head, body);
        remember(&mut self.failed, result)
    }

    fn finish(&mut self) -> Result<(), ChannelError> {
        self.check(0, 0)?;
        self.outlet.0.leave(|state| &mut state.sender, End::Gone);
        self.failed = Some(ChannelError::ShutDown);
        Ok(())
    }

    fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.limits.deadline = deadline;
    }

    fn set_stall(&mut self, stall: Option<Duration>) {
        self.limits.stall = stall;
    }

    fn wait_for_room(&mut self) -> Result<(), ChannelError> {
        self.check(0, 0)
    }

    fn describe(&self) -> String {
        self.name.clone()
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

struct SimReceive {
    world: Arc<World>,
    inlet: Inlet,
    name: String,
    limits: Limits,
    failed: Option<ChannelError>,
}

impl SimReceive {
    /// Waits until at least `least` bytes are there; how many there are.
    fn await_octets(
        &self,
        least: usize,
        wait: &mut Wait,
        bytes_done: u64,
        bytes_wanted: u64,
    ) -> Result<usize, ChannelError> {
        loop {
            let now = schedule::now();
            let next = {
                let state = self.inlet.0.lock();
                if state.receiver == End::ShutDown {
                    return Err(ChannelError::ShutDown);
                }
                if let Some(error) = &self.failed {
                    return Err(error.clone());
                }
                if state.reset {
                    return Err(ChannelError::Reset { bytes_done });
                }
                let (count, next) = state.arrived(now);
                if count >= least {
                    return Ok(count);
                }
                match state.ended(now) {
                    Ok(true) if next.is_none() => {
                        let bytes_done = bytes_done + count as u64;
                        return Err(if bytes_done == 0 {
                            ChannelError::Closed
                        } else {
                            ChannelError::ClosedMidway {
                                bytes_done,
                                bytes_wanted,
                            }
                        });
                    }
                    Ok(_) => next,
                    Err(at) => Some(next.map_or(at, |next| next.min(at))),
                }
            };
            wait.wait(self.inlet.0.octets, next, bytes_done)?;
        }
    }

    fn take(&self, to: &mut [u8]) {
        for flip in self.take_unread(to) {
            self.world.flip_arrived(flip);
        }
    }

    /// Takes bytes that nobody looks at.
    fn take_unread(&self, to: &mut [u8]) -> Vec<usize> {
        let (flips, half_empty) = {
            let mut state = self.inlet.0.lock();
            let flips = state.take(to);
            (flips, state.queued <= state.quality.capacity / 2)
        };
        if half_empty {
            schedule::wake(self.inlet.0.room, usize::MAX);
        }
        flips
    }

    fn small(&mut self, buf: &mut [u8]) -> Result<(), ChannelError> {
        let mut wait = Wait::new(self.limits);
        self.await_octets(buf.len(), &mut wait, 0, buf.len() as u64)?;
        self.take(buf);
        Ok(())
    }

    fn large(
        &mut self,
        wanted: usize,
        mut land: impl FnMut(&Self, usize) -> usize,
    ) -> Result<(), ChannelError> {
        let mut wait = Wait::new(self.limits);
        let mut done = 0;
        while done < wanted {
            // As a socket with a low-water mark: woken for much rather than for every piece.
            let much = self.inlet.0.lock().quality.capacity / 2;
            let least = much.min(wanted - done);
            let there = match self.await_octets(least, &mut wait, done as u64, wanted as u64) {
                Ok(there) => there,
                Err(error) => {
                    let (there, _) = self.inlet.0.lock().arrived(schedule::now());
                    if there == 0 {
                        return Err(error);
                    }
                    // Less than what it waited for, but not nothing.
                    match error {
                        ChannelError::Stalled { .. } => there,
                        ChannelError::Deadline { .. } => {
                            let mut left = there.min(wanted - done);
                            while left > 0 {
                                let landed = land(self, left);
                                left -= landed;
                                done += landed;
                            }
                            return Err(ChannelError::Deadline {
                                bytes_done: done as u64,
                            });
                        }
                        ChannelError::ClosedMidway { .. } => {
                            // The error counts them already.
                            let mut left = there.min(wanted - done);
                            while left > 0 {
                                left -= land(self, left);
                            }
                            return Err(error);
                        }
                        _ => return Err(error),
                    }
                }
            };
            done += land(self, there.min(wanted - done));
            wait.moved();
        }
        Ok(())
    }
}

impl ReceiveHalf for SimReceive {
    fn receive(&mut self, buf: &mut [u8]) -> Result<(), ChannelError> {
        let result = if buf.len() <= SMALL {
            self.small(buf)
        } else {
            let (wanted, mut at) = (buf.len(), 0);
            self.large(wanted, |half, count| {
                half.take(&mut buf[at..at + count]);
                at += count;
                count
            })
        };
        remember(&mut self.failed, result)
    }

    fn receive_into(&mut self, spans: &[Span<'_>]) -> Result<(), ChannelError> {
        let wanted = spans.iter().map(Span::len).sum();
        let mut spans = spans.iter().filter(|span| !span.is_empty());
        let mut span = spans.next();
        let mut at = 0;
        let result = self.large(wanted, |half, count| {
            let Some(now) = span else { return count };
            let count = count.min(now.len() - at);
            let mut octets = vec![0; count];
            half.take(&mut octets);
            if let Ok(part) = now.subspan(at, count) {
                part.copy_from(&octets);
            }
            at += count;
            if at == now.len() {
                span = spans.next();
                at = 0;
            }
            count
        });
        remember(&mut self.failed, result)
    }

    fn drain(&mut self, bytes_max: u64) -> Result<u64, ChannelError> {
        let mut wait = Wait::new(self.limits);
        let mut done = 0;
        while done < bytes_max {
            match self.await_octets(1, &mut wait, 0, 1) {
                Ok(count) => {
                    let count = count.min(usize::try_from(bytes_max - done).unwrap_or(usize::MAX));
                    let _ = self.take_unread(&mut vec![0; count]);
                    done += count as u64;
                    wait.moved();
                }
                Err(ChannelError::Closed) => break,
                Err(error) => return remember(&mut self.failed, Err(error)),
            }
        }
        Ok(done)
    }

    fn peek(&self, to: &mut [u8]) -> usize {
        self.inlet.0.lock().look(schedule::now(), to)
    }

    fn buffered(&self) -> usize {
        0
    }

    fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.limits.deadline = deadline;
    }

    fn set_stall(&mut self, stall: Option<Duration>) {
        self.limits.stall = stall;
    }

    fn describe(&self) -> String {
        self.name.clone()
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
