//! A machine without a processor: memory, threads that write it, and a little state.
//!
//! The source's writers mark what they write themselves, after the write, like a VMM's back end does. At the destination nothing
//! writes: after a migration the two memories must be equal, which [`differing_page`] checks.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_tracking::{Source, VmmMarker, VmmWrites};
use multifd_transport::GuestMemory;
use multifd_transport::memory::RegionLayout;
use multifd_wire::{Layout, PAGE_BYTES_U64};

/// The kind number of the model machine's blobs.
pub const BLOB_KIND: u32 = 0x6d6f_6465;

/// Guest memory in two regions, as a PC has it.
#[must_use]
pub fn memory(bytes: u64) -> GuestMemory {
    let low = bytes / 4096 / 3 * 4096;
    let regions = [
        RegionLayout {
            guest_address: 0,
            bytes: low,
        },
        RegionLayout {
            guest_address: 1 << 32,
            bytes: bytes - low,
        },
    ];
    GuestMemory::anonymous(&regions).expect("memory for a test")
}

/// A pseudo-random sequence (xorshift64*), so that every test can be repeated from its seed.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// A sequence for each seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64() % bound.max(1)
    }
}

/// Fills memory: every `zero_every`-th page is left zero (0: none), the others are incompressible.
pub fn fill(memory: &GuestMemory, seed: u64, zero_every: u64) {
    let mut random = Random::new(seed);
    let mut page = vec![0u8; 4096];
    let mut number = 0u64;
    for (region, layout) in (0..).zip(memory.layouts()) {
        for index in 0..layout.bytes / PAGE_BYTES_U64 {
            number += 1;
            if zero_every > 0 && number.is_multiple_of(zero_every) {
                continue;
            }
            for word in page.chunks_exact_mut(8) {
                word.copy_from_slice(&random.next_u64().to_le_bytes());
            }
            memory
                .span(region, index * PAGE_BYTES_U64, PAGE_BYTES_U64)
                .expect("inside")
                .copy_from(&page);
        }
    }
}

/// The first page in which two memories differ, as (region, page).
#[must_use]
pub fn differing_page(a: &GuestMemory, b: &GuestMemory) -> Option<(u32, u64)> {
    let (mut x, mut y) = (vec![0u8; 4096], vec![0u8; 4096]);
    for (region, layout) in (0..).zip(a.layouts()) {
        for page in 0..layout.bytes / PAGE_BYTES_U64 {
            let span = |m: &GuestMemory, to: &mut [u8]| {
                m.span(region, page * PAGE_BYTES_U64, PAGE_BYTES_U64)
                    .expect("inside")
                    .copy_to(to)
            };
            span(a, &mut x);
            span(b, &mut y);
            if x != y {
                return Some((region, page));
            }
        }
    }
    None
}

/// The writers of a model machine.
#[derive(Debug)]
struct Engine {
    memory: GuestMemory,
    marker: VmmMarker,
    paused: Mutex<(bool, usize)>,
    changed: Condvar,
    stop: AtomicBool,
    writes: AtomicU64,
    pages_per_second: u64,
    writers: usize,
    /// Held back of their time, in percent.
    throttle: Arc<AtomicU8>,
}

impl Engine {
    fn write_for_ever(&self, seed: u64) {
        let mut random = Random::new(seed);
        let regions: Vec<RegionLayout> = self.memory.layouts().collect();
        while !self.stop.load(Ordering::Relaxed) {
            {
                let mut paused = self.paused.lock().expect("no panics");
                if paused.0 {
                    paused.1 += 1;
                    self.changed.notify_all();
                    while paused.0 && !self.stop.load(Ordering::Relaxed) {
                        paused = self
                            .changed
                            .wait_timeout(paused, Duration::from_millis(50))
                            .expect("no panics")
                            .0;
                    }
                    paused.1 -= 1;
                    continue;
                }
            }
            let batch = (self.pages_per_second / 1000).clamp(1, 1000);
            for _ in 0..batch {
                let region = random.below(regions.len() as u64) as u32;
                let page = random.below(regions[region as usize].bytes / PAGE_BYTES_U64);
                let offset = page * PAGE_BYTES_U64 + random.below(511) * 8;
                // One write in eight makes a page zero again.
                let span = |offset, bytes| self.memory.span(region, offset, bytes).expect("inside");
                if random.below(8) == 0 {
                    span(page * PAGE_BYTES_U64, PAGE_BYTES_U64).fill_zero();
                } else {
                    span(offset, 8).copy_from(&random.next_u64().to_le_bytes());
                }
                self.writes.fetch_add(1, Ordering::Relaxed);
                self.marker
                    .mark_bytes(region, page * PAGE_BYTES_U64, PAGE_BYTES_U64);
            }
            let rest = 100 - u64::from(self.throttle.load(Ordering::Relaxed).min(99));
            std::thread::sleep(Duration::from_nanos(
                1_000_000_000 * batch / self.pages_per_second.max(1) * 100 / rest,
            ));
        }
    }
}

/// The source's machine. Stops its writers when dropped.
#[derive(Debug)]
pub struct SourceMachine {
    engine: Arc<Engine>,
    tracked: Mutex<Option<VmmWrites>>,
    threads: Vec<JoinHandle<()>>,
    /// What `save` gives.
    pub state: Vec<u8>,
    /// Whether the guest runs here, for anybody to ask.
    pub running: Arc<AtomicBool>,
    /// Times that it was resumed.
    pub resumed: Arc<AtomicU64>,
    /// How much of its writers' time is held back, in percent.
    pub throttle: Arc<AtomicU8>,
}

impl SourceMachine {
    /// A running machine with `writers` threads that write `pages_per_second` pages each; 0 writers are an idle guest.
    #[must_use]
    pub fn start(memory: GuestMemory, writers: usize, pages_per_second: u64, seed: u64) -> Self {
        let tracked = VmmWrites::named("model writers");
        let engine = Arc::new(Engine {
            memory,
            marker: tracked.marker(),
            paused: Mutex::new((false, 0)),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
            writes: AtomicU64::new(0),
            pages_per_second,
            writers,
            throttle: Arc::default(),
        });
        let threads = (0..writers as u64)
            .map(|index| {
                let engine = Arc::clone(&engine);
                std::thread::spawn(move || engine.write_for_ever(seed.wrapping_add(index * 7919)))
            })
            .collect();
        Self {
            throttle: Arc::clone(&engine.throttle),
            engine,
            tracked: Mutex::new(Some(tracked)),
            threads,
            state: seed.to_le_bytes().repeat(100),
            running: Arc::new(AtomicBool::new(true)),
            resumed: Arc::new(AtomicU64::new(0)),
        }
    }

    /// Writes made so far.
    #[must_use]
    pub fn writes(&self) -> u64 {
        self.engine.writes.load(Ordering::Relaxed)
    }

    /// A probe that outlives the machine's move into a migration.
    #[must_use]
    pub fn write_counter(&self) -> Box<dyn Fn() -> u64 + Send> {
        let engine = Arc::clone(&self.engine);
        Box::new(move || engine.writes.load(Ordering::Relaxed))
    }

    /// The source of dirty pages of this machine, which there is once.
    ///
    /// # Panics
    /// The second time.
    #[must_use]
    pub fn source(&self) -> Box<dyn Source> {
        let tracked = self.tracked.lock().expect("no panics").take();
        Box::new(tracked.expect("asked for once"))
    }

    fn set_paused(&self, paused: bool) {
        let mut state = self.engine.paused.lock().expect("no panics");
        state.0 = paused;
        self.engine.changed.notify_all();
        while paused && state.1 < self.engine.writers {
            state = self.engine.changed.wait(state).expect("no panics");
        }
        self.running.store(!paused, Ordering::SeqCst);
    }
}

impl Drop for SourceMachine {
    fn drop(&mut self) {
        self.engine.stop.store(true, Ordering::Relaxed);
        self.engine.changed.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl tx::Vmm for SourceMachine {
    fn config(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        Ok(vec![tx::Blob {
            kind: BLOB_KIND,
            version: 1,
            bytes: Bytes::from_static(b"model machine"),
        }])
    }

    fn throttle(&mut self, percent: u8) -> Result<tx::Throttled, tx::VmmError> {
        self.throttle.store(percent, Ordering::SeqCst);
        Ok(tx::Throttled::Done)
    }

    fn pause(&mut self) -> Result<(), tx::VmmError> {
        self.set_paused(true);
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        // Saving may itself dirty memory: this one does.
        let region = self.engine.memory.region_count() as u32 - 1;
        self.engine
            .memory
            .span(region, 64, 8)
            .map_err(tx::VmmError::new)?
            .copy_from(&self.engine.writes.load(Ordering::Relaxed).to_le_bytes());
        self.engine.marker.mark_bytes(region, 64, 8);
        Ok(vec![tx::Blob {
            kind: BLOB_KIND,
            version: 2,
            bytes: Bytes::from(self.state.clone()),
        }])
    }

    fn resume(&mut self, _: tx::Reclaimed) -> Result<(), tx::VmmError> {
        self.resumed.fetch_add(1, Ordering::SeqCst);
        self.set_paused(false);
        Ok(())
    }
}

/// What the destination's machine is made to do wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Refuse {
    /// Nothing.
    #[default]
    Nothing,
    /// `prepare` fails.
    Prepare,
    /// `prepare` gives memory of another size.
    OtherMemory,
    /// `load` fails.
    Load,
    /// `resume` fails.
    Resume,
}

/// The destination's machine.
#[derive(Debug, Default)]
pub struct DestinationMachine {
    /// The memory that `prepare` made, for the test to look at.
    pub memory: Arc<Mutex<Option<GuestMemory>>>,
    /// The state that was loaded.
    pub state: Arc<Mutex<Option<Vec<u8>>>>,
    /// Whether the guest runs here.
    pub running: Arc<AtomicBool>,
    /// What it does wrong.
    pub refuse: Refuse,
    /// Memory that `prepare` gives instead of fresh one.
    pub given: Option<GuestMemory>,
}

impl rx::Vmm for DestinationMachine {
    fn prepare(
        &mut self,
        configs: Vec<rx::Blob>,
        layout: &Layout,
    ) -> Result<GuestMemory, rx::VmmError> {
        assert_eq!(configs.len(), 1, "one configuration blob was sent");
        assert_eq!(
            (configs[0].kind, configs[0].version, &configs[0].bytes[..]),
            (BLOB_KIND, 1, &b"model machine"[..])
        );
        if self.refuse == Refuse::Prepare {
            return Err(rx::VmmError::new("no room for this machine"));
        }
        if let Some(memory) = self.given.clone() {
            *self.memory.lock().expect("no panics") = Some(memory.clone());
            return Ok(memory);
        }
        let extra = if self.refuse == Refuse::OtherMemory {
            PAGE_BYTES_U64
        } else {
            0
        };
        let regions: Vec<RegionLayout> = layout
            .regions()
            .map(|region| RegionLayout {
                guest_address: region.guest_address,
                bytes: region.bytes + extra,
            })
            .collect();
        let memory = GuestMemory::anonymous(&regions).map_err(rx::VmmError::new)?;
        *self.memory.lock().expect("no panics") = Some(memory.clone());
        Ok(memory)
    }

    fn load(&mut self, states: Vec<rx::Blob>) -> Result<(), rx::VmmError> {
        if self.refuse == Refuse::Load {
            return Err(rx::VmmError::new("this state is of another version"));
        }
        assert_eq!(states.len(), 1, "one state blob was sent");
        *self.state.lock().expect("no panics") = Some(states[0].bytes.to_vec());
        Ok(())
    }

    fn resume(&mut self, _: rx::Ownership) -> Result<(), rx::VmmError> {
        if self.refuse == Refuse::Resume {
            return Err(rx::VmmError::new("no processor"));
        }
        self.running.store(true, Ordering::SeqCst);
        Ok(())
    }
}
