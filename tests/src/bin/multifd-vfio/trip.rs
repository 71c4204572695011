//! The guest with its devices, and an attempt to migrate it.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use multifd_guest::vfio::{Door, Host, HostDevice};
use multifd_receiver as rx;
use multifd_receiver::vfio::VfioSink;
use multifd_sender as tx;
use multifd_sender::vfio::VfioSource;
use multifd_tests::model::{SourceMachine, fill, memory};
use multifd_tests::vfio_machine::{Destination, NotedSink, NotedSource, WithDevices};
use multifd_tracking::Source;
use multifd_tracking::vfio::{
    DmaDevice, DmaGroup, DmaMap, DmaMemory, DmaOptions, MigrationDevice, MigrationState,
    Translation, choose,
};
use multifd_transport::rdma::{RdmaOptions, Registration};
use multifd_transport::{ChannelOptions, GuestMemory, Listener};
use multifd_wire::frame::DeviceFlags;

use crate::args::{Args, Injection, Side};
use crate::history::{History, Watched};
use crate::lab_device::{Place, Work};

/// One side's devices, open.
pub(crate) struct Opened {
    // Devices are closed before the host.
    pub(crate) devices: Vec<HostDevice>,
    host: Host,
}

impl Opened {
    fn new(door: Door, places: &[Place], injections: &[Injection], side: Side) -> Result<Self> {
        let mut host = Host::open(door).context("the host's side of VFIO")?;
        let mut devices = Vec::new();
        for (pair, place) in places.iter().enumerate() {
            let device = host.open_device(place.path());
            devices.push(device.with_context(|| place.path().display().to_string())?);
            let due = |injection: &&Injection| {
                injection.side == side && injection.pair == pair && injection.state.is_none()
            };
            for injection in injections.iter().filter(due) {
                place.set(&injection.register, injection.value)?;
            }
        }
        Ok(Self { devices, host })
    }

    fn migration_device(&self, pair: usize) -> Result<MigrationDevice> {
        let device = self.devices.get(pair).context("a device for each pair")?;
        let mut device = MigrationDevice::new(device.as_fd())?;
        if device.state() != MigrationState::Running {
            // Left so by the run before: not every driver begins anew when a device is opened.
            device.reset()?;
        }
        Ok(device)
    }
}

fn map(host: &mut Host, memory: &GuestMemory) -> std::io::Result<()> {
    (0..)
        .zip(memory.layouts())
        .try_for_each(|(region, layout)| {
            host.map(memory, region, 0, layout.bytes, layout.guest_address)
        })
}

/// The source: the guest, and what an attempt takes and gives back.
pub(crate) struct Guest {
    pub(crate) memory: GuestMemory,
    pub(crate) opened: Opened,
    pub(crate) running: Arc<AtomicBool>,
    pub(crate) writes: Box<dyn Fn() -> u64 + Send>,
    pub(crate) flags: Vec<DeviceFlags>,
    machine: Option<Box<dyn tx::Vmm>>,
    devices: Vec<Box<dyn tx::DeviceSource>>,
    sources: Vec<Box<dyn Source>>,
}

/// What came of an attempt.
pub(crate) struct Ended {
    pub(crate) sent: tx::Report,
    pub(crate) sent_error: Option<String>,
    /// The source's devices, in the order of pairs.
    pub(crate) device_states: Vec<multifd_wire::DeviceState>,
    pub(crate) received: rx::Report,
    pub(crate) received_error: Option<String>,
    /// Memory as it arrived, before any device ran.
    pub(crate) arrived: Vec<Vec<u8>>,
    /// The destination's devices, and its memory if it came so far.
    pub(crate) there: There,
    // Its devices run until this goes.
    _machine: rx::Finished,
}

/// Shared with the machine at the destination.
pub(crate) type There = Arc<Mutex<(Opened, Option<GuestMemory>)>>;

impl Guest {
    /// A running guest with its devices at work.
    pub(crate) fn start(args: &Args, places: &[Place], history: &History) -> Result<Self> {
        let mut opened = Opened::new(args.door.into(), places, &args.inject, Side::Source)?;
        let memory = memory(args.memory << 20);
        fill(&memory, 7, 4);
        map(&mut opened.host, &memory).context("mapping guest memory for the source's devices")?;
        let machine = SourceMachine::start(memory.clone(), 1, 2000, 7);
        let (running, writes) = (Arc::clone(&machine.running), machine.write_counter());
        let mut guest = Self {
            memory,
            opened,
            running,
            writes,
            flags: Vec::new(),
            sources: vec![machine.source()],
            machine: Some(Box::new(Watched::new(machine, history))),
            devices: Vec::new(),
        };
        let names: Vec<String> = (0..places.len()).map(name).collect();
        let mut stopped = guest.track(&names)?;
        for (pair, place) in places.iter().enumerate() {
            let device = guest.opened.migration_device(pair)?;
            let mut device =
                VfioSource::new(&name(pair), device).with_flags(DeviceFlags::SWITCHOVER_ACK);
            if let Some(stopped) = stopped.remove(&name(pair)) {
                device = device.with_stopped(stopped);
            }
            guest.flags.push(tx::DeviceSource::traits(&device).flags);
            let reinit = args.reinit.map(|kib| kib << 10);
            let seen = history.of_source(pair, place, reinit);
            guest.devices.push(Box::new(NotedSource::new(device, seen)));
        }
        Ok(guest)
    }

    /// Chooses how what the devices write is tracked.
    fn track(
        &mut self,
        names: &[String],
    ) -> Result<HashMap<String, multifd_tracking::vfio::Stopped>> {
        let Opened { devices, host } = &self.opened;
        let translation = match (host.container(), host.address_space()) {
            (Some(container), _) => Some(Translation::Container(container)),
            (None, Some((iommufd, ioas))) => Some(Translation::AddressSpace {
                iommufd,
                ioas,
                tables: devices.iter().filter_map(HostDevice::table).collect(),
                devices: devices.iter().filter_map(HostDevice::id).collect(),
            }),
            (None, None) => None,
        };
        let layouts = self.memory.layouts();
        let identity = layouts.map(|region| (region.guest_address, region.bytes / 4096));
        let group = DmaGroup {
            name: "lab",
            translation,
            devices: devices
                .iter()
                .zip(names)
                .map(|(device, name)| DmaDevice {
                    name,
                    device: Some(device.as_fd()),
                    options: DmaOptions::default(),
                    pinned: None,
                })
                .collect(),
            memory: DmaMemory::Fixed(DmaMap::identity(identity)?),
        };
        let mut stopped = HashMap::new();
        for chosen in choose(group)? {
            crate::say(&format!(
                "tracking: {} ({})",
                chosen.source.name(),
                chosen.reason
            ));
            for device in &chosen.devices {
                stopped.insert(device.clone(), chosen.source.stopped_handle());
            }
            self.sources.push(Box::new(chosen.source));
        }
        Ok(stopped)
    }

    /// Gives the devices something to do and to lose.
    pub(crate) fn begin(&self, places: &[Place], work: Work) -> Result<()> {
        for (device, place) in self.opened.devices.iter().zip(places) {
            place.begin(device, &self.memory, work)?;
        }
        Ok(())
    }

    /// One attempt to migrate, to the end, whatever it is.
    pub(crate) fn attempt(
        &mut self,
        args: &Args,
        to: &[Place],
        injections: &[Injection],
        history: &History,
    ) -> Result<Ended> {
        let there = Opened::new(args.door.into(), to, injections, Side::Destination)?;
        let mut sinks: Vec<Box<dyn rx::DeviceSink>> = Vec::new();
        for (pair, place) in to.iter().enumerate() {
            let sink = VfioSink::new(&name(pair), there.migration_device(pair)?);
            let seen = history.of_destination(pair, place);
            sinks.push(Box::new(NotedSink::new(sink, seen)));
            if place.is_labdev() {
                place.set("trace", 0)?;
            }
        }
        // Mapped for the devices when it is known, and kept to look at.
        let there = Arc::new(Mutex::new((there, None)));
        let mapper = Arc::clone(&there);
        let on_memory = move |memory: &GuestMemory| {
            let mut there = mapper.lock().unwrap_or_else(PoisonError::into_inner);
            there.1 = Some(memory.clone());
            map(&mut there.0.host, memory)
        };
        let vmm = Destination::new(sinks, Box::new(on_memory));
        let arrived = vmm.arrived();
        let listener = Listener::bind_with(&args.listen, &ChannelOptions::default())?;
        let control = listener.local_address().clone();
        let reception = rx::Reception::start(rx::Parts {
            vmm: Box::new(vmm),
            listeners: vec![listener],
            config: rx::Config::default(),
            spawner: None,
        })
        .map_err(|failed| failed.error)?;
        let mut options = ChannelOptions::default();
        options.rdma = RdmaOptions::with_memory(self.memory.clone(), Registration::default());
        let config = tx::Config::builder()
            .channels(args.channels)
            .bandwidth(Some(args.bandwidth << 20))
            .downtime_limit(Duration::from_secs(3))
            .build()?;
        let machine = self.machine.take().context("the machine came back")?;
        let finished = tx::Migration::start(tx::Parts {
            vmm: Box::new(WithDevices::new(machine, std::mem::take(&mut self.devices))),
            memory: self.memory.clone(),
            sources: std::mem::take(&mut self.sources),
            dial: Box::new(tx::SpreadDialer {
                control,
                data: Vec::new(),
                options,
            }),
            config,
            spawner: None,
        })
        .map_err(|failed| failed.error)?
        .wait();
        if finished.error.is_some() {
            // It may never have been dialled.
            reception.handle().cancel();
        }
        let received = reception.wait();
        let tx::Finished {
            report,
            error,
            vmm,
            sources,
            devices,
            ..
        } = finished;
        let device_states = devices.iter().map(|device| device.state()).collect();
        (self.machine, self.devices, self.sources) = (vmm, devices, sources);
        let arrived = std::mem::take(&mut *arrived.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(Ended {
            sent: report,
            sent_error: error.map(|error| error.to_string()),
            device_states,
            received: received.report.clone(),
            received_error: received.error.as_ref().map(ToString::to_string),
            arrived,
            there,
            _machine: received,
        })
    }
}

/// The name of a pair's device in the migration.
pub(crate) fn name(pair: usize) -> String {
    format!("device{pair}")
}
