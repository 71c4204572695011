//! A machine with VFIO devices, for whole migrations of devices by their kernel interface, real or fake.
//!
//! Each device notes the states that it is led through, so that a test can compare them with what they must be.

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

/// The states that a device was led to, oldest first; shared with who wants to look.
#[derive(Clone, Default)]
pub struct Seen(Arc<Mutex<Vec<DeviceState>>>);

impl Seen {
    fn push(&self, state: DeviceState) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(state);
    }

    /// The states so far.
    #[must_use]
    pub fn states(&self) -> Vec<DeviceState> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// A source's device that notes its states.
#[derive(Debug)]
pub struct NotedSource {
    device: VfioSource,
    seen: Seen,
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
        Self { device, seen }
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
        let answer = self.device.set_state(to);
        self.seen.push(self.device.state());
        answer
    }

    fn pre_copy_info(&mut self) -> Result<tx::PreCopyInfo, tx::DeviceError> {
        self.device.pre_copy_info()
    }

    fn read(&mut self, into: &mut [u8]) -> Result<tx::Read, tx::DeviceError> {
        self.device.read(into)
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
}

impl NotedSink {
    /// Notes the states of `device` in `seen`.
    #[must_use]
    pub fn new(device: VfioSink, seen: Seen) -> Self {
        Self { device, seen }
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
        self.device.write(octets)
    }

    fn load_config(&mut self, octets: &[u8]) -> Result<(), rx::DeviceError> {
        self.device.load_config(octets)
    }

    fn restart(&mut self) -> Result<(), rx::DeviceError> {
        self.device.restart()
    }
}

/// Any source's machine, and devices.
pub struct WithDevices<M> {
    machine: M,
    devices: Vec<Box<dyn tx::DeviceSource>>,
}

impl<M: tx::Vmm> WithDevices<M> {
    /// Puts them together.
    #[must_use]
    pub fn new(machine: M, devices: Vec<Box<dyn tx::DeviceSource>>) -> Self {
        Self { machine, devices }
    }
}

impl<M: tx::Vmm> tx::Vmm for WithDevices<M> {
    fn config(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        self.machine.config()
    }

    fn devices(&mut self) -> Result<Vec<Box<dyn tx::DeviceSource>>, tx::VmmError> {
        Ok(std::mem::take(&mut self.devices))
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

    /// The octets of each region as they had arrived, before any device ran.
    #[must_use]
    pub fn arrived(&self) -> Arc<Mutex<Vec<Vec<u8>>>> {
        Arc::clone(&self.arrived)
    }
}

/// The octets of each region.
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
