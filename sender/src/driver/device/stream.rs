//! One device's stream at the source, as its reader, the lanes and the control thread share it: the command that is due, credit,
//! buffers, stats.
//!
//! The rule it keeps: whoever waits here, for a command, a buffer or credit, is woken by whatever may end the wait.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use multifd_wire::frame::{DeviceFlags, Section};
use multifd_wire::{DeviceId, Generation, Misbehaved};

use super::DeviceCommand;
use super::stats::DeviceStats;
use crate::device::DeviceTraits;
use crate::device::stream::{BufferPool, Item, Stream};
use crate::driver::lock;

/// What the reader of one device shares with the others.
pub(crate) struct DeviceStream {
    pub(crate) id: DeviceId,
    pub(crate) name: String,
    pub(crate) flags: DeviceFlags,
    /// What the destination holds of it at most.
    pub(super) window: u64,
    state: Mutex<StreamState>,
    changed: Condvar,
    began: Instant,
}

pub(super) struct StreamState {
    command: Option<DeviceCommand>,
    done: Option<DeviceCommand>,
    pub(super) machine: Stream,
    free: Vec<Vec<u8>>,
    /// Buffers that were made; no more than [`StreamState::buffers_max`].
    buffers: usize,
    buffers_max: usize,
    chunk: usize,
    /// From here on no new generation is announced: the guest is about to be paused.
    pub(super) closed: bool,
    /// The control channel from which on credit is for this stream.
    epoch: u32,
    /// The newest acknowledgement may be said once more: the migration was resumed (SPEC: RESUME-12).
    pub(super) repeats: bool,
    /// What the device is being asked for, and since when.
    pub(super) call: Option<(&'static str, Instant)>,
    /// When the command that waits was given.
    commanded: Option<Instant>,
    pub(super) stats: DeviceStats,
}

impl DeviceStream {
    pub(super) fn new(id: DeviceId, traits: &DeviceTraits, window: u64, chunk: u64) -> Self {
        let wants_ack = traits.flags.contains(DeviceFlags::SWITCHOVER_ACK);
        // One window on its way, one loaded and not acknowledged yet.
        let buffers_max = usize::try_from(window / chunk.max(1) * 2).unwrap_or(usize::MAX);
        Self {
            id,
            name: traits.name.clone(),
            flags: traits.flags,
            window,
            state: Mutex::new(StreamState {
                command: None,
                done: None,
                machine: Stream::new(id, window),
                free: Vec::new(),
                buffers: 0,
                buffers_max: buffers_max.max(2),
                chunk: usize::try_from(chunk).unwrap_or(usize::MAX),
                closed: false,
                epoch: 0,
                repeats: false,
                call: None,
                commanded: None,
                stats: DeviceStats {
                    stop_bytes: traits.state_bytes,
                    announced: u32::from(wants_ack),
                    ..DeviceStats::default()
                },
            }),
            changed: Condvar::new(),
            began: Instant::now(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, StreamState> {
        lock(&self.state)
    }

    pub(crate) fn stats(&self) -> DeviceStats {
        self.lock().stats.clone()
    }

    pub(super) fn note(&self, how: impl FnOnce(&mut DeviceStats)) {
        how(&mut self.lock().stats);
    }

    pub(super) fn command(&self, command: DeviceCommand) {
        let mut state = self.lock();
        (state.command, state.done) = (Some(command), None);
        state.commanded = Some(Instant::now());
        drop(state);
        self.changed.notify_all();
    }

    /// The next command, or none after so long.
    pub(super) fn take_command(&self, wait: Duration) -> Option<DeviceCommand> {
        let state = self.lock();
        let idle = |state: &mut StreamState| state.command.is_none();
        let (mut state, _) = self
            .changed
            .wait_timeout_while(state, wait, idle)
            .unwrap_or_else(PoisonError::into_inner);
        state.commanded = None;
        state.command.take()
    }

    pub(super) fn has_command(&self) -> bool {
        self.lock().command.is_some()
    }

    pub(super) fn answer(&self, command: DeviceCommand) {
        self.lock().done = Some(command);
        self.changed.notify_all();
    }

    /// What the device has been asked for since longer than `limit`, and since how long. Its own code does not return, or its thread
    /// does not even take the command.
    pub(super) fn stuck(&self, limit: Duration) -> Option<Stuck> {
        let state = self.lock();
        let waiting = || Some(("take a command", state.commanded?));
        let (step, since) = state.call.or_else(waiting)?;
        let waited = since.elapsed();
        (waited >= limit).then_some(Stuck { step, waited })
    }

    /// Waits until a command was carried out, as long as each call of the device returns within `limit`.
    pub(super) fn wait_for(&self, command: DeviceCommand, limit: Duration) -> bool {
        let mut state = self.lock();
        let began = Instant::now();
        loop {
            if state.done == Some(command) {
                return true;
            }
            // Between two calls the reader itself is at work, which takes no time.
            let since = state.call.map_or(began, |(_, since)| since);
            let left = limit.saturating_sub(since.elapsed());
            if left.is_zero() {
                return false;
            }
            (state, _) = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A buffer, unless a command comes first.
    pub(super) fn buffer(&self, bytes: usize) -> Option<Vec<u8>> {
        let mut state = self.lock();
        loop {
            if state.command.is_some() {
                return None;
            }
            if let Some(mut buffer) = state.free.pop() {
                buffer.resize(bytes, 0);
                return Some(buffer);
            }
            if state.buffers < state.buffers_max {
                state.buffers += 1;
                let mut buffer = Vec::with_capacity(state.chunk.max(bytes));
                buffer.resize(bytes, 0);
                return Some(buffer);
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A place for bytes that were read, as soon as the credit reaches so far; the bytes back if a command comes first.
    pub(super) fn place(
        self: &Arc<Self>,
        section: Section,
        octets: Vec<u8>,
    ) -> Result<Arc<Item>, Vec<u8>> {
        let mut state = self.lock();
        loop {
            if let Some(chunk) = state.machine.chunk(section, octets.len() as u64) {
                drop(state);
                return Ok(Item::chunk(
                    chunk,
                    octets,
                    Arc::clone(self) as Arc<dyn BufferPool>,
                ));
            }
            if state.command.is_some() {
                return Err(octets);
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// More credit, said on the control channel of this number.
    pub(crate) fn grant(&self, epoch: u32, offset_max: u64) -> Result<(), Misbehaved> {
        let mut state = self.lock();
        // A destination that has lost the migration spoke of the stream that it had.
        let result = if epoch < state.epoch {
            Ok(())
        } else {
            state.machine.grant(offset_max)
        };
        drop(state);
        self.changed.notify_all();
        result
    }

    /// For a destination that has nothing: an empty stream, to which the control channels from this number on speak.
    pub(super) fn reset(&self, epoch: u32) {
        let mut state = self.lock();
        // Its credit comes with the grant.
        state.machine = Stream::new(self.id, 0);
        (state.epoch, state.closed, state.repeats) = (epoch, false, false);
        let stats = &mut state.stats;
        stats.runs_again();
        (stats.items_arrived, stats.items) = (0, None);
        stats.announced = u32::from(self.flags.contains(DeviceFlags::SWITCHOVER_ACK));
        (stats.acked, stats.acked_load) = (0, Duration::ZERO);
        (stats.loaded_bytes, stats.loaded_time) = (0, Duration::ZERO);
    }

    /// The destination has loaded the initial bytes of a generation. Gives whether that was news.
    pub(crate) fn acked(
        &self,
        generation: Generation,
        bytes: u64,
        load: Duration,
    ) -> Result<(), Misbehaved> {
        let mut state = self.lock();
        let newest = state.machine.generation();
        if state.repeats && generation.value() == state.stats.acked {
            state.repeats = false;
            return Ok(());
        }
        if generation > newest || generation.value() <= state.stats.acked {
            return Err(Misbehaved::Amount {
                field: "switchover_ack.generation",
                expected: newest.value().into(),
                found: generation.value().into(),
            });
        }
        // The pause is as long as is forecast from these, at most: neither is believed further than what is known here.
        let known = state.machine.initial_bytes();
        let stats = &mut state.stats;
        stats.acked = generation.value();
        stats.acked_load = stats.acked_load.saturating_add(load);
        stats.loaded_bytes = if generation == newest {
            known
        } else {
            stats.loaded_bytes.saturating_add(bytes).min(known)
        };
        stats.loaded_time = (stats.loaded_time.saturating_add(load)).min(self.began.elapsed());
        Ok(())
    }
}

impl DeviceStream {
    /// The migration failed. If that was not this device's doing, and its state was on its way, the report says so.
    pub(crate) fn was_cut_off(&self) {
        let mut state = self.lock();
        let sent = state.machine.index();
        let arrived = state.stats.items_arrived;
        if sent > arrived {
            let name = &self.name;
            state.stats.trouble.get_or_insert_with(|| {
                format!(
                    "device {name} was cut off: of {sent} pieces of its state {arrived} had arrived"
                )
            });
        }
    }

    /// The destination has loaded everything of it.
    pub(crate) fn loaded(&self, load: Duration, config: Duration) {
        // For the report only: nothing is decided from it.
        self.note(|stats| {
            stats.loaded = Some((load, config));
            stats.loaded_at = Some(Instant::now());
        });
    }
}

/// A call of a device's that does not return.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stuck {
    /// What it was asked for.
    pub(super) step: &'static str,
    /// Since how long.
    pub(super) waited: Duration,
}

impl BufferPool for DeviceStream {
    fn take_back(&self, octets: Vec<u8>) {
        self.lock().free.push(octets);
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use multifd_wire::frame::Mark;

    use super::*;

    impl DeviceStream {
        /// One whose initial bytes are acknowledged.
        pub(crate) fn sample() -> Self {
            let traits = DeviceTraits {
                name: "net0".into(),
                flags: DeviceFlags::PRE_COPY.union(DeviceFlags::SWITCHOVER_ACK),
                initial_bytes: 1,
                state_bytes: 1,
            };
            Self::new(DeviceId::new(0), &traits, 1 << 20, 4096)
        }
    }

    // SPEC: SWACK-1, RESUME-12
    #[test]
    fn an_acknowledgement_that_is_no_news_is_refused_and_passed_over_once_after_a_resume() {
        let stream = DeviceStream::sample();
        let acked = |generation| stream.acked(Generation::new(generation), 1, Duration::ZERO);
        assert!(acked(1).is_err(), "nothing was announced");
        stream.lock().machine.mark(Mark::InitialEnd);
        assert!(acked(2).is_err(), "one too far");
        acked(1).unwrap();
        assert!(acked(1).is_err(), "said twice");
        stream.lock().repeats = true;
        acked(1).unwrap();
        assert!(acked(1).is_err(), "repeated twice");
    }
}
