//! Where lanes leave the items of one device and its loader takes them up: the assembler behind a lock, and its buffers.
//!
//! ```text
//!   lanes:   admit ─► (read the body) ─► arrived ──┐            loader:  next ─► write to the device ─► loaded ─► credit
//!            mark ─────────────────────────────────┴─► wakes ──►
//! ```
//! The rule it keeps: a lane never waits here for the loader, only for the lock. The loader waits, and an item that is there, or
//! the end, always wakes it. `sync` is `std::sync`; the model in the tests puts another in its place.

use multifd_wire::Misbehaved;
use multifd_wire::frame::{DeviceChunk, DeviceMark};

use super::assembler::{Admit, Assembler, Came, Item};
use super::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use crate::error::Fault;

/// The stream itself.
pub(crate) struct DeviceStream {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    assembler: Assembler,
    /// Buffers that were loaded, for the next chunks: fresh memory costs several times what filling it costs.
    free: Vec<Vec<u8>>,
    free_max: usize,
    chunk_bytes_max: usize,
    memory_landed: bool,
    ended: bool,
}

/// What came of waiting for memory.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Waited {
    /// All memory has landed.
    Landed,
    /// The stream begins anew: what it was waited for is void.
    Restarted,
    /// The migration has ended.
    Ended,
}

/// What a lane is to do with a chunk's body.
pub(crate) enum Body {
    /// Read it into this, which has its size, and bring it.
    Take(Vec<u8>),
    /// Read over it.
    Have,
}

impl DeviceStream {
    pub(crate) fn new(assembler: Assembler, chunk_bytes_max: u64, window: u64) -> Self {
        let chunks = window / chunk_bytes_max.max(1);
        Self {
            state: Mutex::new(State {
                assembler,
                free: Vec::new(),
                free_max: usize::try_from(chunks).unwrap_or(usize::MAX),
                chunk_bytes_max: usize::try_from(chunk_bytes_max).unwrap_or(usize::MAX),
                memory_landed: false,
                ended: false,
            }),
            changed: Condvar::new(),
        }
    }

    /// A chunk's head came.
    pub(crate) fn admit(&self, chunk: &DeviceChunk, bytes: usize, crc: u32) -> Result<Body, Fault> {
        let mut state = self.lock();
        match state.assembler.admit(chunk, bytes as u64, crc)? {
            Admit::Have => Ok(Body::Have),
            Admit::Take => Ok(Body::Take(state.buffer(bytes))),
        }
    }

    /// Its body is here.
    pub(crate) fn arrived(&self, index: u64, octets: Vec<u8>) -> Result<Came, Misbehaved> {
        let result = self
            .lock()
            .take_in(|assembler| assembler.arrived(index, octets));
        self.changed.notify_all();
        result
    }

    /// Its body will not come.
    pub(crate) fn give_up(&self, index: u64) {
        self.lock().assembler.give_up(index);
    }

    /// A mark came.
    pub(crate) fn mark(&self, mark: &DeviceMark) -> Result<Came, Fault> {
        let result = self.lock().take_in(|assembler| assembler.mark(mark));
        self.changed.notify_all();
        result
    }

    /// The channels were lost, and nothing of them can come any more: a stream that is complete begins anew.
    pub(crate) fn break_off(&self) {
        self.lock().assembler.break_off();
    }

    /// A lane was lost.
    pub(crate) fn lane_lost(&self) {
        self.lock().assembler.lane_lost();
    }

    /// The lowest index that is missing, unless everything is here up to the stream's end.
    pub(crate) fn missing(&self) -> Option<u64> {
        let state = self.lock();
        let assembler = &state.assembler;
        (!assembler.is_over()).then(|| assembler.missing())
    }

    /// Waits for the next item in order; `None` when the migration has ended.
    pub(crate) fn next(&self) -> Option<Item> {
        let mut state = self.lock();
        loop {
            if state.ended {
                return None;
            }
            if let Some(item) = state.assembler.pop() {
                return Some(item);
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The bytes of data are loaded. Gives the credit that the source is to be told of, if it is time.
    pub(crate) fn loaded(&self, octets: Vec<u8>) -> Option<u64> {
        let mut state = self.lock();
        state.assembler.loaded(octets.len() as u64);
        state.recycle(octets);
        state.assembler.credit()
    }

    /// The bytes of the configuration were copied to where it is put together. They are held there until all of it is loaded or
    /// void, and count against the window like everything that is held (SPEC: CREDIT-5).
    pub(crate) fn put_together(&self, octets: Vec<u8>) -> Option<u64> {
        let mut state = self.lock();
        state.recycle(octets);
        state.assembler.credit()
    }

    /// So many bytes of the configuration are held no longer.
    pub(crate) fn let_go(&self, bytes: u64) -> Option<u64> {
        let mut state = self.lock();
        state.assembler.loaded(bytes);
        state.assembler.credit()
    }

    /// Waits until all memory has landed.
    pub(crate) fn wait_for_memory(&self) -> Waited {
        let mut state = self.lock();
        loop {
            if state.ended {
                return Waited::Ended;
            }
            // After the end of a stream nothing comes but a new beginning; memory then is that of the next switchover.
            if state.assembler.has_more() {
                return Waited::Restarted;
            }
            if state.memory_landed {
                return Waited::Landed;
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// How often the stream began anew, going by what came: what was loaded before counts no more.
    pub(crate) fn restarts(&self) -> u32 {
        self.lock().assembler.restarts()
    }

    /// Up to where the source was told that it may send.
    #[cfg(test)]
    #[allow(dead_code)] // Only the model of this file asks.
    pub(crate) fn granted(&self) -> u64 {
        self.lock().assembler.granted()
    }

    /// The switchover was broken off: memory will have to land again.
    pub(crate) fn memory_moves_on(&self) {
        self.lock().memory_landed = false;
    }

    /// All memory has landed.
    pub(crate) fn memory_landed(&self) {
        self.lock().memory_landed = true;
        self.changed.notify_all();
    }

    /// The migration has ended: the loader ends.
    pub(crate) fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Passes something to the assembler. If the stream begins anew with it, memory will have to land again; this is noted here, and
    /// not when the loader gets to it, since memory may have landed by then.
    fn take_in<T>(&mut self, how: impl FnOnce(&mut Assembler) -> T) -> T {
        let before = self.assembler.restarts();
        let result = how(&mut self.assembler);
        self.memory_landed &= self.assembler.restarts() == before;
        result
    }

    /// A buffer of this size. One that is much smaller than the largest gets no more than it needs, so that what is held costs at most
    /// 8/7 of its bytes.
    fn buffer(&mut self, bytes: usize) -> Vec<u8> {
        let pooled = bytes >= self.chunk_bytes_max / 8 * 7;
        let kept = if pooled { self.free.pop() } else { None };
        self.trim();
        if !pooled {
            return vec![0; bytes];
        }
        let mut buffer = kept.unwrap_or_else(|| Vec::with_capacity(self.chunk_bytes_max));
        buffer.resize(bytes, 0);
        buffer
    }

    /// Keeps a buffer for later, if there is room for it.
    fn recycle(&mut self, octets: Vec<u8>) {
        if octets.capacity() >= self.chunk_bytes_max {
            self.free.push(octets);
        }
        self.trim();
    }

    /// What is held and what is kept for later are together no more than the window, in whole buffers.
    fn trim(&mut self) {
        let held = self.assembler.held_bytes();
        let held = held.div_ceil(self.chunk_bytes_max.max(1) as u64);
        let held = usize::try_from(held).unwrap_or(usize::MAX);
        self.free.truncate(self.free_max.saturating_sub(held));
    }
}
