//! A machine with VFIO devices, for whole migrations of devices by their kernel interface, real or fake.
//!
//! Each device notes the states that it is led through, so that a test can compare them with what they must be, and tells who watches it
//! at that very moment.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use multifd_receiver as rx;
use multifd_receiver::vfio::VfioSink;
use multifd_sender as tx;
use multifd_sender::vfio::VfioSource;
use multifd_transport::GuestMemory;
use multifd_transport::memory::RegionLayout;
use multifd_wire::frame::{Device, DeviceFlags};
use multifd_wire::{DeviceState, Layout};

/// Something that happened to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// It was led to a state, or failed to be: this is where it is.
    State(DeviceState),
    /// Source: all initial bytes that it has announced were read. So many bytes of its stream are out.
    InitialRead(u64),
    /// Destination: the initial bytes that were announced are loaded. So many bytes of its stream were written to the device.
    InitialLoaded(u64),
}

/// Called when something happens to a device, on the thread that made it happen, before it goes on.
pub type Watch = Arc<dyn Fn(Step) + Send + Sync>;

/// The states that a device was led to, oldest first; shared with who wants to look.
#[derive(Clone, Default)]
pub struct Seen {
    states: Arc<Mutex<Vec<DeviceState>>>,
    watch: Option<Watch>,
}

impl Seen {
    /// Also tells `watch` of each step.
    #[must_use]
    pub fn watched(watch: Watch) -> Self {
        Self {
            watch: Some(watch),
            ..Self::default()
        }
    }

    fn push(&self, state: DeviceState) {
        self.states
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(state);
        self.tell(Step::State(state));
    }

    fn tell(&self, step: Step) {
        if let Some(watch) = &self.watch {
            watch(step);
        }
    }

    /// The states so far.
    #[must_use]
    pub fn states(&self) -> Vec<DeviceState> {
        self.states
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Forgets them, before another migration of the same device.
    pub fn clear(&self) {
        self.states
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }
}

/// A source's device that notes its states.
#[derive(Debug)]
pub struct NotedSource {
    device: VfioSource,
    seen: Seen,
    /// Bytes of the stream that were read, and whether the initial ones among them were told.
    read: u64,
    told: bool,
}

impl std::fmt::Debug for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = self.states().iter().map(|state| state.name()).collect();
        f.write_str(&names.join(" "))
    }
}

impl NotedSource {
    /// Notes the states of `device` in `seen`.
    #[must_use]
    pub fn new(device: VfioSource, seen: Seen) -> Self {
        Self {
            device,
            seen,
            read: 0,
            told: false,
        }
    }
}

impl tx::DeviceSource for NotedSource {
    fn traits(&self) -> tx::DeviceTraits {
        self.device.traits()
    }

    fn state(&self) -> DeviceState {
        self.device.state()
    }

    fn set_state(&mut self, to: DeviceState) -> Result<(), tx::DeviceError> {
        if to == DeviceState::PreCopy {
            (self.read, self.told) = (0, false);
        }
        let answer = self.device.set_state(to);
        self.seen.push(self.device.state());
        answer
    }

    fn pre_copy_info(&mut self) -> Result<tx::PreCopyInfo, tx::DeviceError> {
        let info = self.device.pre_copy_info()?;
        self.told &= !info.reinit;
        if info.initial_bytes == 0 && !self.told {
            self.told = true;
            self.seen.tell(Step::InitialRead(self.read));
        }
        Ok(info)
    }

    fn read(&mut self, into: &mut [u8]) -> Result<tx::Read, tx::DeviceError> {
        let read = self.device.read(into)?;
        if let tx::Read::Bytes(count) = read {
            self.read += count as u64;
        }
        Ok(read)
    }

    fn stop_copy_bytes(&mut self) -> Result<u64, tx::DeviceError> {
        self.device.stop_copy_bytes()
    }

    fn config(&mut self) -> Result<Bytes, tx::DeviceError> {
        self.device.config()
    }

    fn reset(&mut self) -> Result<(), tx::DeviceError> {
        let answer = self.device.reset();
        self.seen.push(self.device.state());
        answer
    }
}

/// A destination's device that notes its states.
#[derive(Debug)]
pub struct NotedSink {
    device: VfioSink,
    seen: Seen,
    /// Bytes of the stream that were written.
    written: u64,
}

impl NotedSink {
    /// Notes the states of `device` in `seen`.
    #[must_use]
    pub fn new(device: VfioSink, seen: Seen) -> Self {
        Self {
            device,
            seen,
            written: 0,
        }
    }
}

impl rx::DeviceSink for NotedSink {
    fn name(&self) -> &str {
        self.device.name()
    }

    fn flags(&self) -> DeviceFlags {
        self.device.flags()
    }

    fn state(&self) -> DeviceState {
        self.device.state()
    }

    fn set_state(&mut self, to: DeviceState) -> Result<(), rx::DeviceError> {
        let answer = self.device.set_state(to);
        self.seen.push(self.device.state());
        answer
    }

    fn write(&mut self, octets: &[u8]) -> Result<(), rx::DeviceError> {
        self.device.write(octets)?;
        self.written += octets.len() as u64;
        Ok(())
    }

    fn initial_end(&mut self) -> Result<(), rx::DeviceError> {
        self.device.initial_end()?;
        self.seen.tell(Step::InitialLoaded(self.written));
        Ok(())
    }

    fn load_config(&mut self, octets: &[u8]) -> Result<(), rx::DeviceError> {
        self.device.load_config(octets)
    }

    fn restart(&mut self) -> Result<(), rx::DeviceError> {
        self.written = 0;
        self.device.restart()
    }
}

/// Any source's machine, and devices: those that it did not make itself, or that came back from a migration.
pub struct WithDevices {
    machine: Box<dyn tx::Vmm>,
    devices: Vec<Box<dyn tx::DeviceSource>>,
}

impl WithDevices {
    /// Puts them together.
    #[must_use]
    pub fn new(machine: Box<dyn tx::Vmm>, devices: Vec<Box<dyn tx::DeviceSource>>) -> Self {
        Self { machine, devices }
    }
}

impl tx::Vmm for WithDevices {
    fn config(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        self.machine.config()
    }

    fn devices(&mut self) -> Result<Vec<Box<dyn tx::DeviceSource>>, tx::VmmError> {
        Ok(std::mem::take(&mut self.devices))
    }

    fn granted(&mut self, ticket: &tx::AskTicket) -> Result<(), tx::VmmError> {
        self.machine.granted(ticket)
    }

    fn pause(&mut self) -> Result<(), tx::VmmError> {
        self.machine.pause()
    }

    fn save(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        self.machine.save()
    }

    fn resume(&mut self, proof: tx::Reclaimed) -> Result<(), tx::VmmError> {
        self.machine.resume(proof)
    }

    fn migrated(&mut self) {
        self.machine.migrated();
    }
}

/// Called with the memory when it is made, to let devices write it.
pub type OnMemory = Box<dyn FnMut(&GuestMemory) -> std::io::Result<()> + Send>;

/// A destination's machine with devices. Its memory as it was before anything ran is kept.
pub struct Destination {
    sinks: Vec<Box<dyn rx::DeviceSink>>,
    on_memory: OnMemory,
    memory: Option<GuestMemory>,
    arrived: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Destination {
    /// A machine with these devices.
    #[must_use]
    pub fn new(sinks: Vec<Box<dyn rx::DeviceSink>>, on_memory: OnMemory) -> Self {
        Self {
            sinks,
            on_memory,
            memory: None,
            arrived: Arc::default(),
        }
    }

    /// The bytes of each region as they had arrived, before any device ran.
    #[must_use]
    pub fn arrived(&self) -> Arc<Mutex<Vec<Vec<u8>>>> {
        Arc::clone(&self.arrived)
    }
}

/// The bytes of each region.
#[must_use]
pub fn octets(memory: &GuestMemory) -> Vec<Vec<u8>> {
    (0..)
        .zip(memory.layouts())
        .map(|(region, layout)| {
            let mut octets = vec![0; layout.bytes as usize];
            memory
                .span(region, 0, layout.bytes)
                .expect("a whole region")
                .copy_to(&mut octets);
            octets
        })
        .collect()
}

impl rx::Vmm for Destination {
    fn prepare(&mut self, _: Vec<rx::Blob>, layout: &Layout) -> Result<GuestMemory, rx::VmmError> {
        let regions: Vec<RegionLayout> = layout
            .regions()
            .map(|region| RegionLayout {
                guest_address: region.guest_address,
                bytes: region.bytes,
            })
            .collect();
        let memory = GuestMemory::anonymous(&regions).map_err(rx::VmmError::new)?;
        (self.on_memory)(&memory).map_err(rx::VmmError::new)?;
        self.memory = Some(memory.clone());
        Ok(memory)
    }

    fn devices(&mut self, table: &[Device]) -> Result<Vec<Box<dyn rx::DeviceSink>>, rx::VmmError> {
        if table.len() != self.sinks.len() {
            return Err(rx::VmmError::new("another number of devices"));
        }
        Ok(std::mem::take(&mut self.sinks))
    }

    fn load(&mut self, _: Vec<rx::Blob>) -> Result<(), rx::VmmError> {
        let memory = self
            .memory
            .as_ref()
            .ok_or_else(|| rx::VmmError::new("no memory"))?;
        *self.arrived.lock().unwrap_or_else(PoisonError::into_inner) = octets(memory);
        Ok(())
    }

    fn resume(&mut self, _: rx::Ownership) -> Result<(), rx::VmmError> {
        Ok(())
    }
}
