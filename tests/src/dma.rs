//! A model device that writes guest memory by DMA, and tells one of the fake kernels what it wrote, as hardware would.
//!
//! ```text
//!   engine thread: draw an I/O address that is mapped ─► write the memory behind it ─► the fake's log gets the page
//!   guest thread (with an IOMMU in the guest): unmap a range through the tracking ─► map other pages there
//! ```
//! The memory is written before the log, under one lock with the stop, so that a device that stands still has logged everything.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use multifd_sender as tx;
use multifd_tracking::Run;
use multifd_tracking::fake::{FakeContainer, FakeDevice, FakeIommufd};
use multifd_tracking::vfio::{DmaRange, Stopped, Unmapper};
use multifd_transport::GuestMemory;

use crate::model::{Random, SourceMachine};

/// Who logs what the device writes.
#[derive(Clone)]
pub enum Wiring {
    /// The device itself.
    Device(FakeDevice),
    /// The type 1 container that it is in.
    Container(FakeContainer),
    /// The page table of an iommufd to which it is attached.
    PageTable(FakeIommufd, u32),
    /// Nobody.
    Nobody,
}

impl Wiring {
    /// Writes and logs; false if the device stands still by itself.
    fn dma(&self, iova: u64, bytes: u64, write: impl FnOnce()) -> bool {
        match self {
            Self::Device(device) => return device.dma(iova, bytes, write),
            Self::Container(container) => {
                write();
                container.wrote(iova, bytes);
            }
            Self::PageTable(iommufd, table) => {
                write();
                iommufd.wrote(*table, iova, bytes);
            }
            Self::Nobody => write(),
        }
        true
    }

    fn map(&self, range: &DmaRange) {
        match self {
            Self::Container(container) => container.map(range.iova, range.bytes()),
            Self::PageTable(iommufd, _) => iommufd.map(range.iova, range.bytes()),
            Self::Device(_) | Self::Nobody => {}
        }
    }
}

struct Engine {
    memory: GuestMemory,
    wiring: Wiring,
    state: Mutex<State>,
    /// Held by the guest's driver while it changes the mappings.
    driver: Mutex<Option<Unmapper>>,
    over: AtomicBool,
    writes: AtomicU64,
    remaps: AtomicU64,
}

struct State {
    running: bool,
    ranges: Vec<DmaRange>,
}

/// The device. Cloning gives another handle to the same one; its threads end with the last of them.
#[derive(Clone)]
pub struct ModelDma {
    engine: Arc<Engine>,
    threads: Arc<Threads>,
}

struct Threads {
    engine: Arc<Engine>,
    joins: Mutex<Vec<JoinHandle<()>>>,
}

impl ModelDma {
    /// A device that runs and writes `pages_per_second` pages of the ranges, which are mapped here. Seeded.
    #[must_use]
    pub fn start(
        memory: GuestMemory,
        ranges: Vec<DmaRange>,
        wiring: Wiring,
        pages_per_second: u64,
        seed: u64,
    ) -> Self {
        ranges.iter().for_each(|range| wiring.map(range));
        let engine = Arc::new(Engine {
            memory,
            wiring,
            state: Mutex::new(State {
                running: true,
                ranges,
            }),
            driver: Mutex::new(None),
            over: AtomicBool::new(false),
            writes: AtomicU64::new(0),
            remaps: AtomicU64::new(0),
        });
        let worker = Arc::clone(&engine);
        let join = std::thread::spawn(move || worker.write_for_ever(pages_per_second, seed));
        Self {
            threads: Arc::new(Threads {
                engine: Arc::clone(&engine),
                joins: Mutex::new(vec![join]),
            }),
            engine,
        }
    }

    /// Gives the guest an IOMMU whose driver moves a mapping every millisecond: it unmaps through `unmapper` and maps the range at
    /// another I/O address.
    pub fn remap_for_ever(&self, unmapper: Unmapper, seed: u64) {
        *locked(&self.engine.driver) = Some(unmapper);
        let worker = Arc::clone(&self.engine);
        let join = std::thread::spawn(move || {
            let mut random = Random::new(seed);
            while !worker.over.load(Ordering::Relaxed) {
                worker.remap(&mut random);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        locked(&self.threads.joins).push(join);
    }

    /// The mappings of this moment, as an embedder's notifier tells of them.
    ///
    /// # Errors
    /// None; the shape is that of `vfio::Viommu`.
    pub fn walk(&self, visit: &mut dyn FnMut(DmaRange)) -> io::Result<()> {
        locked(&self.engine.state)
            .ranges
            .iter()
            .copied()
            .for_each(visit);
        Ok(())
    }

    /// The device stands still when this returns, and the guest's driver too.
    pub fn stop(&self) {
        *locked(&self.engine.driver) = None;
        locked(&self.engine.state).running = false;
    }

    /// The guest's driver stands still; the device goes on.
    pub fn stop_driver(&self) {
        *locked(&self.engine.driver) = None;
    }

    /// It works again.
    pub fn run(&self) {
        locked(&self.engine.state).running = true;
    }

    /// Pages that it wrote so far.
    #[must_use]
    pub fn writes(&self) -> u64 {
        self.engine.writes.load(Ordering::Relaxed)
    }

    /// Mappings that the guest moved so far.
    #[must_use]
    pub fn remaps(&self) -> u64 {
        self.engine.remaps.load(Ordering::Relaxed)
    }
}

impl Engine {
    fn write_for_ever(&self, pages_per_second: u64, seed: u64) {
        let mut random = Random::new(seed);
        let batch = (pages_per_second / 1000).clamp(1, 1000);
        while !self.over.load(Ordering::Relaxed) {
            {
                let state = locked(&self.state);
                for _ in 0..batch {
                    if state.running && !state.ranges.is_empty() {
                        self.write(&state.ranges, &mut random);
                    }
                }
            }
            std::thread::sleep(Duration::from_nanos(
                1_000_000_000 * batch / pages_per_second.max(1),
            ));
        }
    }

    fn write(&self, ranges: &[DmaRange], random: &mut Random) {
        let range = ranges[random.below(ranges.len() as u64) as usize];
        let page = random.below(range.run.count);
        let place = page * 4096 + random.below(511) * 8;
        let Run { region, first, .. } = range.run;
        let octets = random.next_u64().to_le_bytes();
        let written = self.wiring.dma(range.iova + place, 8, || {
            self.memory
                .span(region, first * 4096 + place, 8)
                .expect("inside the guest's memory")
                .copy_from(&octets);
        });
        self.writes.fetch_add(u64::from(written), Ordering::Relaxed);
    }

    fn remap(&self, random: &mut Random) {
        let driver = locked(&self.driver);
        let Some(unmapper) = &*driver else {
            return;
        };
        // The guest is done with the range before it unmaps it.
        let gone = {
            let mut state = locked(&self.state);
            let index = random.below(state.ranges.len() as u64) as usize;
            state.ranges.swap_remove(index)
        };
        unmapper.unmap(gone).expect("the range was mapped");
        let fresh = DmaRange {
            iova: (1 << 40) + self.remaps.fetch_add(1, Ordering::Relaxed) * (1 << 20),
            run: gone.run,
        };
        self.wiring.map(&fresh);
        locked(&self.state).ranges.push(fresh);
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.engine.over.store(true, Ordering::Relaxed);
        for join in locked(&self.joins).drain(..) {
            let _ = join.join();
        }
    }
}

/// When a machine stops its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopsDevice {
    /// With its vCPUs, and says so to the source.
    AtPause,
    /// Only when it is saved; nobody is told.
    AtSave,
}

/// A model machine with a model device.
pub struct DmaMachine {
    machine: SourceMachine,
    device: ModelDma,
    stops: StopsDevice,
    stopped: Vec<Stopped>,
}

impl DmaMachine {
    /// Puts the two together. `stopped`: the sources to tell.
    #[must_use]
    pub fn new(
        machine: SourceMachine,
        device: ModelDma,
        stops: StopsDevice,
        stopped: Vec<Stopped>,
    ) -> Self {
        Self {
            machine,
            device,
            stops,
            stopped,
        }
    }
}

impl tx::Vmm for DmaMachine {
    fn config(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        self.machine.config()
    }

    fn pause(&mut self) -> Result<(), tx::VmmError> {
        self.machine.pause()?;
        match self.stops {
            StopsDevice::AtPause => {
                self.device.stop();
                self.stopped.iter().for_each(Stopped::stopped);
            }
            StopsDevice::AtSave => self.device.stop_driver(),
        }
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        // Long enough for a device that still runs to write.
        std::thread::sleep(Duration::from_millis(20));
        self.device.stop();
        self.machine.save()
    }

    fn resume(&mut self, proof: tx::Reclaimed) -> Result<(), tx::VmmError> {
        self.stopped.iter().for_each(Stopped::running);
        self.device.run();
        self.machine.resume(proof)
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
