//! A virtio device that gives random numbers, at fixed addresses (virtio-mmio), with a thread of its own that writes guest memory.
//!
//! ```text
//!   vCPU ── QueueNotify ──► the thread: takes buffers, writes them, gives them back, raises the line
//! ```
//! What the thread writes goes through vm-memory, whose bitmap marks it for the migration after each write. The rule it keeps: when
//! [`Rng::rest`] returns the thread writes nothing, and does not before [`Rng::go`].
//!
//! Source: Virtual I/O Device (VIRTIO) 1.2, sections 2, 4.2 and 5.4.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState, QueueT as _};
use vm_memory::Bytes as _;
use vm_superio::Trigger as _;

use crate::devices::Line;
use crate::machine::Memory;

/// Where its registers are, behind all memory.
pub(crate) const VIRTIO: u64 = 0xd000_0000;
pub(crate) const VIRTIO_BYTES: u64 = 0x1000;
pub(crate) const VIRTIO_IRQ: u32 = 5;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const ENTROPY_DEVICE: u32 = 4;
/// The upper half of the features has VIRTIO_F_VERSION_1, the only one.
const VERSION_1: [u32; 2] = [0, 1];
const QUEUE_SIZE: u16 = 64;
/// A buffer was given back.
const USED: u32 = 1;
/// Bytes that are given for one descriptor.
const GIVEN_MAX: usize = 4096;

/// The device.
pub(crate) struct Rng {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    memory: Arc<Memory>,
    line: Line,
    inner: Mutex<Inner>,
    changed: Condvar,
}

struct Inner {
    registers: Registers,
    queue: Queue,
    /// The guest has put buffers into the queue.
    notified: bool,
    resting: bool,
    ending: bool,
}

#[derive(Clone, Copy, Default, Serialize, Deserialize)]
struct Registers {
    status: u32,
    interrupt: u32,
    device_features_half: u32,
    driver_features_half: u32,
    driver_features: [u32; 2],
    queue: u32,
}

/// Its state.
#[derive(Serialize, Deserialize)]
pub(crate) struct RngState {
    registers: Registers,
    notified: bool,
    /// The fields of [`QueueState`], in its order.
    queue: (u16, u16, u16, bool, u16, bool, u64, u64, u64),
}

impl Rng {
    /// A device that rests.
    pub(crate) fn new(memory: &Arc<Memory>, line: Line) -> Result<Self> {
        let inner = Inner {
            registers: Registers::default(),
            queue: Queue::new(QUEUE_SIZE).context("the size of the queue")?,
            notified: false,
            resting: true,
            ending: false,
        };
        let shared = Arc::new(Shared {
            memory: Arc::clone(memory),
            line,
            inner: Mutex::new(inner),
            changed: Condvar::new(),
        });
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("rng".into());
        Ok(Self {
            shared,
            thread: Some(thread.spawn(move || theirs.serve())?),
        })
    }

    /// Has its thread write nothing from here on.
    pub(crate) fn rest(&self) {
        // The thread holds the lock while it works.
        self.shared.inner().resting = true;
    }

    pub(crate) fn go(&self) {
        self.shared.inner().resting = false;
        self.shared.changed.notify_all();
    }

    /// What a register says.
    pub(crate) fn read(&self, offset: u64) -> u32 {
        let inner = self.shared.inner();
        let registers = &inner.registers;
        match offset {
            0x000 => MAGIC,
            0x004 => 2, // the version without legacy
            0x008 => ENTROPY_DEVICE,
            0x010 => half(&VERSION_1, registers.device_features_half),
            0x034 if registers.queue == 0 => QUEUE_SIZE.into(),
            0x044 if registers.queue == 0 => inner.queue.ready().into(),
            0x060 => registers.interrupt,
            0x070 => registers.status,
            _ => 0,
        }
    }

    pub(crate) fn write(&self, offset: u64, value: u32) {
        let mut inner = self.shared.inner();
        let Inner {
            registers, queue, ..
        } = &mut *inner;
        let (low, high) = (Some(value), Some(value));
        match offset {
            0x014 => registers.device_features_half = value,
            0x020 => {
                if let Some(half) = registers
                    .driver_features
                    .get_mut(registers.driver_features_half as usize)
                {
                    *half = value;
                }
            }
            0x024 => registers.driver_features_half = value,
            0x030 => registers.queue = value,
            0x050 => {
                inner.notified = true;
                self.shared.changed.notify_all();
            }
            0x064 => registers.interrupt &= !value,
            0x070 if value == 0 => {
                *registers = Registers::default();
                queue.reset();
                inner.notified = false;
            }
            0x070 => registers.status = value,
            // The rest is about the queue that was chosen, and there is one.
            _ if registers.queue != 0 => {}
            0x038 => queue.set_size(u16::try_from(value).unwrap_or(0)),
            0x044 => queue.set_ready(value == 1),
            0x080 => queue.set_desc_table_address(low, None),
            0x084 => queue.set_desc_table_address(None, high),
            0x090 => queue.set_avail_ring_address(low, None),
            0x094 => queue.set_avail_ring_address(None, high),
            0x0a0 => queue.set_used_ring_address(low, None),
            0x0a4 => queue.set_used_ring_address(None, high),
            _ => {}
        }
    }

    /// The state of a device that rests.
    pub(crate) fn save(&self) -> RngState {
        let inner = self.shared.inner();
        let queue = inner.queue.state();
        RngState {
            registers: inner.registers,
            notified: inner.notified,
            queue: (
                queue.max_size,
                queue.next_avail,
                queue.next_used,
                queue.event_idx_enabled,
                queue.size,
                queue.ready,
                queue.desc_table,
                queue.avail_ring,
                queue.used_ring,
            ),
        }
    }

    /// # Errors
    /// A state that no queue was ever in.
    pub(crate) fn load(&self, state: RngState) -> Result<()> {
        let (
            max_size,
            next_avail,
            next_used,
            event_idx_enabled,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        ) = state.queue;
        let queue = QueueState {
            max_size,
            next_avail,
            next_used,
            event_idx_enabled,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        };
        let mut inner = self.shared.inner();
        inner.queue = Queue::try_from(queue).context("the state of the virtio queue")?;
        inner.registers = state.registers;
        inner.notified = state.notified;
        Ok(())
    }
}

impl Drop for Rng {
    fn drop(&mut self) {
        self.shared.inner().ending = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // What a thread that panicked had to say, it has said.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread's body.
    fn serve(&self) {
        let mut inner = self.inner();
        while !inner.ending {
            if inner.resting || !inner.notified {
                inner = self
                    .changed
                    .wait(inner)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            inner.notified = false;
            if self.give(&mut inner.queue) {
                inner.registers.interrupt |= USED;
                // The line cannot refuse.
                let _ = self.line.trigger();
            }
        }
    }

    /// Fills the buffers that wait; says whether there were any. What a guest describes wrongly is given back empty.
    fn give(&self, queue: &mut Queue) -> bool {
        let memory = &*self.memory;
        if !queue.is_valid(memory) {
            return false;
        }
        let mut any = false;
        while let Some(chain) = queue.pop_descriptor_chain(memory) {
            let (head, mut given) = (chain.head_index(), 0);
            for buffer in chain.writable() {
                let mut bytes = [0; GIVEN_MAX];
                let some = &mut bytes[..GIVEN_MAX.min(buffer.len() as usize)];
                if getrandom::fill(some).is_err()
                    || memory.write_slice(some, buffer.addr()).is_err()
                {
                    break;
                }
                given += some.len() as u32;
            }
            any |= queue.add_used(memory, head, given).is_ok();
        }
        any
    }
}

/// One half of a 64-bit set of features.
fn half(features: &[u32; 2], half: u32) -> u32 {
    features.get(half as usize).copied().unwrap_or(0)
}
