//! The guest of the simulator: a little memory that is written while the guest runs, and the two machine monitors around it.
//!
//! Writes are noted in a list of their own first, as a kernel's ring notes them, and come into the dirty set when they are
//! collected. What the destination's memory must hold when the guest is started there is what the source's memory holds at
//! that moment; the comparison is made there and then.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_tracking::{
    CollectPhase, Collection, DirtySet, Error as TrackingError, Figures, Run, Source,
};
use multifd_transport::memory::RegionLayout;
use multifd_transport::{GuestMemory, Span};
use multifd_wire::frame::Device;
use multifd_wire::{Layout, PAGE_BYTES, PAGE_BYTES_U64};

use super::devices;
use super::faults::Side;
use super::schedule;
use super::troubles::Troubles;
use super::world::{Step, World};
use crate::model::{BLOB_KIND, Random, differing_page};

/// What the model machine's configuration says.
const CONFIGURATION: &[u8] = b"simulated machine";

/// Memory is mapped once for each shape and then used again: mapping costs more than a whole small migration.
static POOL: Mutex<Vec<(Vec<u64>, GuestMemory)>> = Mutex::new(Vec::new());

/// Zero-filled memory with regions of so many pages, from the pool.
fn take_memory(shape: &[u64]) -> GuestMemory {
    let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    let found = pool.iter().position(|(known, _)| known == shape);
    let memory = match found {
        Some(at) => pool.swap_remove(at).1,
        None => {
            let mut address = 0;
            let layouts: Vec<RegionLayout> = shape
                .iter()
                .map(|pages| {
                    let guest_address = address;
                    address += pages * PAGE_BYTES_U64 + (1 << 30);
                    RegionLayout {
                        guest_address,
                        bytes: pages * PAGE_BYTES_U64,
                    }
                })
                .collect();
            GuestMemory::anonymous(&layouts).expect("a few pages of memory")
        }
    };
    drop(pool);
    for (region, pages) in (0..).zip(shape) {
        memory
            .span(region, 0, pages * PAGE_BYTES_U64)
            .expect("inside")
            .fill_zero();
    }
    memory
}

/// Gives memory back to the pool.
fn leave_memory(shape: &[u64], memory: GuestMemory) {
    POOL.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push((shape.to_vec(), memory));
}

/// How the guest writes.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Time between two writes, in ns.
    pub period_ns: u64,
    /// Pages of each region that it writes.
    pub hot_pages: u64,
}

/// After a long time in which nobody looked the guest has written many pages more than once: not each write is made.
const BURST_MAX: u64 = 40;

struct State {
    random: Random,
    next_write: u64,
    /// Runs, as the machine knows it.
    running: bool,
    set: Option<DirtySet>,
    /// Written, and not yet in the dirty set.
    noted: Vec<(u32, u64)>,
    writes: u64,
    destination: Option<GuestMemory>,
    /// Memory of programs that died: their ghosts may still write it.
    buried: Vec<GuestMemory>,
    /// What `save` gave last.
    saved: Vec<u8>,
    loaded: Option<Vec<u8>>,
}

/// The guest and its memory.
pub struct Machine {
    shape: Vec<u64>,
    memory: GuestMemory,
    template: Box<[u8; PAGE_BYTES]>,
    pace: Pace,
    state: Mutex<State>,
}

impl Drop for Machine {
    fn drop(&mut self) {
        leave_memory(&self.shape, self.memory.clone());
        let mut state = self.lock();
        let buried = std::mem::take(&mut state.buried);
        for memory in state.destination.take().into_iter().chain(buried) {
            leave_memory(&self.shape, memory);
        }
    }
}

impl Machine {
    /// A machine whose memory has some content and some pages of zeros.
    #[must_use]
    pub fn new(mut random: Random, shape: &[u64], pace: Pace) -> Self {
        let memory = take_memory(shape);
        let mut template = Box::new([0u8; PAGE_BYTES]);
        for word in template.chunks_exact_mut(8) {
            word.copy_from_slice(&random.next_u64().to_le_bytes());
        }
        let zero_of_8 = random.below(6);
        let machine = Self {
            shape: shape.to_vec(),
            memory,
            template,
            pace,
            state: Mutex::new(State {
                random,
                next_write: 0,
                running: true,
                set: None,
                noted: Vec::new(),
                writes: 0,
                destination: None,
                buried: Vec::new(),
                saved: Vec::new(),
                loaded: None,
            }),
        };
        for (region, pages) in (0..).zip(shape) {
            for page in 0..*pages {
                if machine.lock().random.below(8) >= zero_of_8 {
                    machine.fill(region, page);
                }
            }
        }
        machine
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The source's memory.
    #[must_use]
    pub fn memory(&self) -> GuestMemory {
        self.memory.clone()
    }

    /// Pages in all.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.shape.iter().sum()
    }

    pub(super) fn set_running(&self, running: bool) {
        self.lock().running = running;
    }

    /// Makes a page unlike any other page and any earlier version of it.
    fn fill(&self, region: u32, page: u64) {
        let mut octets = *self.template;
        let version = {
            let mut state = self.lock();
            state.writes += 1;
            state.writes
        };
        let mark = (u64::from(region) << 32 | page).to_le_bytes();
        octets[..8].copy_from_slice(&mark);
        octets[8..16].copy_from_slice(&version.to_le_bytes());
        octets[4088..].copy_from_slice(&version.to_le_bytes());
        self.page(region, page).copy_from(&octets);
    }

    fn page(&self, region: u32, page: u64) -> Span<'_> {
        self.memory
            .span(region, page * PAGE_BYTES_U64, PAGE_BYTES_U64)
            .expect("inside")
    }

    /// The guest writes a page: all of it, a word of it, or zeros.
    fn write(&self, region: u32, page: u64) {
        let (how, at, word) = {
            let mut state = self.lock();
            if !state.running {
                return;
            }
            (
                state.random.below(8),
                state.random.below(511) as usize,
                state.random.next_u64(),
            )
        };
        match how {
            0 => self.page(region, page).fill_zero(),
            1..3 => self.fill(region, page),
            _ => {
                if let Ok(span) = self.page(region, page).subspan(at * 8, 8) {
                    span.copy_from(&word.to_le_bytes());
                }
            }
        }
        self.note(region, page);
    }

    fn note(&self, region: u32, page: u64) {
        let mut state = self.lock();
        state.writes += 1;
        if state.set.is_some() {
            state.noted.push((region, page));
        }
    }

    /// The guest writes just what is about to be sent.
    pub(super) fn write_in(&self, span: Span<'_>) {
        if let Some(place) = self.memory.locate(span) {
            let pages = span.len() as u64 / PAGE_BYTES_U64;
            let at = self.lock().random.below(pages.max(1));
            self.write(place.region_index, place.offset / PAGE_BYTES_U64 + at);
        }
    }

    /// The guest writes what it has written by now. It is asked whenever somebody looks at its memory or at what it wrote:
    /// in between nobody could tell.
    pub(super) fn catch_up(&self) {
        let now = schedule::now();
        let due = {
            let mut state = self.lock();
            if state.next_write == 0 || !state.running {
                state.next_write = now;
            }
            let due = (now.saturating_sub(state.next_write) / self.pace.period_ns).min(BURST_MAX);
            if due > 0 {
                state.next_write = now;
            }
            due
        };
        for _ in 0..due {
            let (region, page) = {
                let mut state = self.lock();
                let region = state.random.below(self.shape.len() as u64) as u32;
                let pages = self.shape[region as usize].min(self.pace.hot_pages);
                (region, state.random.below(pages))
            };
            self.write(region, page);
        }
    }

    /// The first page that the destination has not as the source has it.
    pub(super) fn differing_page(&self) -> Option<(u32, u64)> {
        let destination = self.lock().destination.clone();
        match destination {
            Some(memory) => differing_page(&self.memory, &memory),
            None => Some((0, 0)),
        }
    }

    /// Whether the destination loaded what the source saved.
    pub(super) fn state_is_equal(&self) -> bool {
        let state = self.lock();
        state.loaded.as_ref() == Some(&state.saved)
    }

    /// A page that differs at the destination and that the dirty set does not know of: the set would have lied.
    /// Only after a migration that failed has given everything back.
    pub(super) fn forgotten_page(&self) -> Option<(u32, u64)> {
        let (set, destination) = {
            let mut state = self.lock();
            let set = state.set.clone()?;
            for (region, page) in std::mem::take(&mut state.noted) {
                set.mark_page(region, page);
            }
            (set, state.destination.clone()?)
        };
        // The round's own record of what was dirty: taken, looked at, and given back when it is dropped.
        let mut dirty = std::collections::BTreeSet::new();
        let mut round = set.take_round();
        while let Some(run) = round.next_run(u64::MAX) {
            for page in run.first..run.first + run.count {
                dirty.insert((run.region, page));
            }
            set.give_back(Run { ..run });
        }
        let mut ours = [0u8; PAGE_BYTES];
        let mut theirs = [0u8; PAGE_BYTES];
        for (region, pages) in (0..).zip(&self.shape) {
            for page in 0..*pages {
                if dirty.contains(&(region, page)) {
                    continue;
                }
                self.page(region, page).copy_to(&mut ours);
                let Ok(span) = destination.span(region, page * PAGE_BYTES_U64, PAGE_BYTES_U64)
                else {
                    return Some((region, page));
                };
                span.copy_to(&mut theirs);
                if ours != theirs {
                    return Some((region, page));
                }
            }
        }
        None
    }

    /// The destination's program died.
    pub(super) fn bury_destination(&self) {
        let mut state = self.lock();
        state.loaded = None;
        let memory = state.destination.take();
        state.buried.extend(memory);
    }

    /// The memory of a destination that is no more goes back to the pool.
    pub(super) fn forget_destination(&self) {
        let mut state = self.lock();
        state.loaded = None;
        if let Some(memory) = state.destination.take() {
            leave_memory(&self.shape, memory);
        }
    }
}

/// The source's machine monitor.
pub(super) struct SourceVmm {
    pub(super) world: Arc<World>,
    /// The guest's devices, until a migration takes them.
    pub(super) devices: Vec<Box<dyn tx::DeviceSource>>,
}

impl tx::Vmm for SourceVmm {
    fn config(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        Ok(vec![tx::Blob {
            kind: BLOB_KIND,
            version: 1,
            bytes: Bytes::from_static(CONFIGURATION),
        }])
    }

    fn devices(&mut self) -> Result<Vec<Box<dyn tx::DeviceSource>>, tx::VmmError> {
        Ok(std::mem::take(&mut self.devices))
    }

    fn pause(&mut self) -> Result<(), tx::VmmError> {
        schedule::sleep(50_000);
        self.world.machine.catch_up();
        if self.world.refuses(Step::Pause) {
            return Err(tx::VmmError::new("a processor does not stop"));
        }
        self.world.source_paused();
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        schedule::sleep(100_000);
        if self.world.refuses(Step::Save) {
            return Err(tx::VmmError::new("a device cannot be saved"));
        }
        let machine = &self.world.machine;
        // Saving may itself write memory: this machine does.
        let region = machine.shape.len() as u32 - 1;
        if self.world.tears() {
            machine.fill(region, 0);
            machine.note(region, 0);
        }
        let octets = {
            let mut state = machine.lock();
            state.saved = state.writes.to_le_bytes().repeat(16);
            state.saved.clone()
        };
        Ok(vec![tx::Blob {
            kind: BLOB_KIND,
            version: 2,
            bytes: Bytes::from(octets),
        }])
    }

    fn resume(&mut self, _: tx::Reclaimed) -> Result<(), tx::VmmError> {
        self.world.source_resumed();
        Ok(())
    }
}

/// The source of dirty pages: gives what was noted to the set when it is asked.
pub(super) struct Notes(pub(super) Arc<World>);

impl Source for Notes {
    fn name(&self) -> &str {
        "simulated guest"
    }

    fn start(&mut self, set: &DirtySet) -> Result<(), TrackingError> {
        let mut state = self.0.machine.lock();
        state.set = Some(set.clone());
        state.noted.clear();
        Ok(())
    }

    fn collect(&mut self, set: &DirtySet, _: CollectPhase) -> Result<Collection, TrackingError> {
        self.0.machine.catch_up();
        let noted = std::mem::take(&mut self.0.machine.lock().noted);
        for (region, page) in noted {
            set.mark_page(region, page);
        }
        Ok(Collection::default())
    }

    fn stop(&mut self) -> Result<(), TrackingError> {
        Ok(())
    }

    fn figures(&self) -> Figures {
        Figures::default()
    }
}

/// The destination's machine monitor.
pub(super) struct DestinationVmm {
    pub(super) world: Arc<World>,
    /// How long each step takes, in ns.
    pub(super) step_ns: u64,
    /// Which of the destination's programs it belongs to.
    pub(super) life: u32,
    pub(super) troubles: Troubles,
    /// The step from which it does not come back.
    pub(super) hangs: Option<Step>,
}

impl DestinationVmm {
    fn lives(&self) -> bool {
        self.world.lives_as(Side::Destination, self.life)
    }

    /// Waits until everything is over, if it hangs in this step.
    fn hangs(&self, step: Step) -> bool {
        if self.hangs == Some(step) {
            self.world.hangs(step);
        }
        self.hangs == Some(step)
    }
}

impl rx::Vmm for DestinationVmm {
    fn prepare(
        &mut self,
        configs: Vec<rx::Blob>,
        layout: &Layout,
    ) -> Result<GuestMemory, rx::VmmError> {
        schedule::sleep(self.step_ns);
        let machine = &self.world.machine;
        let same = layout
            .regions()
            .map(|region| region.bytes / PAGE_BYTES_U64)
            .eq(machine.shape.iter().copied());
        let expected = configs.len() == 1 && configs[0].bytes == CONFIGURATION;
        let hung = self.hangs(Step::Prepare);
        if hung || self.world.refuses(Step::Prepare) || !same || !expected {
            return Err(rx::VmmError::new("no such machine here"));
        }
        let memory = take_memory(&machine.shape);
        self.troubles.use_memory(&memory, &machine.shape);
        if self.lives() {
            machine.forget_destination();
            machine.lock().destination = Some(memory.clone());
        }
        Ok(memory)
    }

    fn devices(&mut self, table: &[Device]) -> Result<Vec<Box<dyn rx::DeviceSink>>, rx::VmmError> {
        devices::at_destination(&self.world, self.life, table)
    }

    fn load(&mut self, states: Vec<rx::Blob>) -> Result<(), rx::VmmError> {
        schedule::sleep(self.step_ns);
        if self.hangs(Step::Load) || self.world.refuses(Step::Load) {
            return Err(rx::VmmError::new("this state is of another version"));
        }
        if self.lives() {
            self.world.machine.lock().loaded = states.first().map(|blob| blob.bytes.to_vec());
        }
        Ok(())
    }

    fn discard(&mut self) {
        if self.lives() {
            self.world.discarded();
        }
    }

    fn resume(&mut self, _: rx::Ownership) -> Result<(), rx::VmmError> {
        schedule::sleep(self.step_ns);
        if self.hangs(Step::Resume) || self.world.refuses(Step::Resume) {
            return Err(rx::VmmError::new("no processor"));
        }
        if self.lives() {
            if let Some((region, page)) = self.world.machine.differing_page() {
                self.world.violation(format!(
                    "the guest was started at the destination with another page {page} of region {region}"
                ));
            }
            if !self.world.machine.state_is_equal() && !self.world.summary().forged {
                self.world
                    .violation("the guest was started at the destination with another state");
            }
            self.world.destination_resumed();
        }
        Ok(())
    }
}
