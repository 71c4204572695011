//! The model machine with model devices, on both sides, and whole migrations of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use multifd_guest::{DeviceConfig, DeviceProbe, Dma, ModelDevice};
use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_transport::{GuestMemory, Listener, TcpOptions};
use multifd_wire::frame::Device;
use multifd_wire::{DeviceState, Layout, Phase};

use crate::links::Links;
use crate::model::{DestinationMachine, SourceMachine, fill, memory};

/// The first page of region 1 that a device with DMA writes. The guest writes there as well, so a plan with such a device has an idle one.
pub const DMA_FIRST: u64 = 16;

/// The source's machine with its devices.
pub struct Source {
    machine: SourceMachine,
    devices: Vec<ModelDevice>,
}

impl tx::Vmm for Source {
    fn config(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        self.machine.config()
    }

    fn devices(&mut self) -> Result<Vec<Box<dyn tx::DeviceSource>>, tx::VmmError> {
        let devices = std::mem::take(&mut self.devices).into_iter();
        Ok(devices
            .map(|device| Box::new(device) as Box<dyn tx::DeviceSource>)
            .collect())
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

/// The destination's machine with its devices.
pub struct Destination {
    machine: DestinationMachine,
    devices: Vec<DeviceConfig>,
    probes: Vec<DeviceProbe>,
    made: Vec<ModelDevice>,
    memory: Option<GuestMemory>,
}

impl Destination {
    fn new(machine: DestinationMachine, devices: &[DeviceConfig]) -> Self {
        let made: Vec<_> = devices
            .iter()
            .map(|config| ModelDevice::new(config.clone()).expect("a device of a test"))
            .collect();
        Self {
            machine,
            devices: devices.to_vec(),
            probes: made.iter().map(ModelDevice::probe).collect(),
            made,
            memory: None,
        }
    }
}

impl rx::Vmm for Destination {
    fn prepare(
        &mut self,
        configs: Vec<rx::Blob>,
        layout: &Layout,
    ) -> Result<GuestMemory, rx::VmmError> {
        let memory = self.machine.prepare(configs, layout)?;
        self.memory = Some(memory.clone());
        Ok(memory)
    }

    fn devices(&mut self, table: &[Device]) -> Result<Vec<Box<dyn rx::DeviceSink>>, rx::VmmError> {
        let mut sinks = Vec::new();
        for entry in table {
            let place = self
                .made
                .iter()
                .position(|device| device.config().name == entry.name.as_str())
                .ok_or_else(|| rx::VmmError::new(format!("no device {}", entry.name)))?;
            let mut device = self.made.remove(place);
            if device.config().dma > 0
                && let Some(memory) = &self.memory
            {
                let pages = device.config().dma / 4096;
                let dma =
                    Dma::new(memory.clone(), 1, DMA_FIRST, pages).map_err(rx::VmmError::new)?;
                device = device.with_dma(dma);
            }
            sinks.push(Box::new(device) as Box<dyn rx::DeviceSink>);
        }
        Ok(sinks)
    }

    fn load(&mut self, states: Vec<rx::Blob>) -> Result<(), rx::VmmError> {
        self.machine.load(states)
    }

    fn resume(&mut self, proof: rx::Ownership) -> Result<(), rx::VmmError> {
        for (config, probe) in self.devices.iter().zip(&self.probes) {
            assert_eq!(
                probe.state(),
                DeviceState::Running,
                "{} runs before the guest does",
                config.name
            );
        }
        self.machine.resume(proof)
    }
}

/// A whole migration with devices.
pub struct Plan {
    /// The devices at the source.
    pub source: Vec<DeviceConfig>,
    /// The devices at the destination; the same as at the source unless one is to fail there.
    pub destination: Vec<DeviceConfig>,
    /// The source's settings.
    pub config: tx::Config,
    /// The destination's settings.
    pub receiver: rx::Config,
    /// Guest memory.
    pub memory_bytes: u64,
    /// Pages that the guest writes a second; 0: it is idle.
    pub writes: u64,
    /// Makes the dialer from the address: to cut channels, for example.
    #[allow(clippy::type_complexity)]
    pub dial: Option<Box<dyn FnOnce(tx::Dialer) -> Box<dyn tx::Dial>>>,
    /// Called with the source's handle as soon as it has begun.
    #[allow(clippy::type_complexity)]
    pub meanwhile: Option<Box<dyn FnOnce(tx::Handle, Vec<DeviceProbe>)>>,
    /// Goes over links that can be cut, and does so in a thread of its own.
    #[allow(clippy::type_complexity)]
    pub disturb: Option<Box<dyn FnOnce(Links, Watch) + Send>>,
    /// With [`disturb`](Self::disturb): over TCP instead of in memory.
    pub over_tcp: bool,
    /// A listener to use instead of one on the loopback interface, and the address that is dialled.
    pub listener: Option<Listener>,
}

impl Plan {
    /// These devices on both sides, 16 MiB of idle memory, default settings but for the downtime limit, which leaves slow devices
    /// and busy hosts their time.
    #[must_use]
    pub fn new(devices: &[&str]) -> Self {
        let devices: Vec<DeviceConfig> = devices
            .iter()
            .map(|text| text.parse().expect("a device of a test"))
            .collect();
        Self {
            source: devices.clone(),
            destination: devices,
            config: tx::Config::builder()
                .downtime_limit(Duration::from_secs(60))
                .build()
                .expect("within limits"),
            receiver: rx::Config::default(),
            memory_bytes: 16 << 20,
            writes: 0,
            dial: None,
            meanwhile: None,
            disturb: None,
            over_tcp: false,
            listener: None,
        }
    }

    /// Runs it to its end.
    ///
    /// # Panics
    /// If it can't even begin.
    #[must_use]
    pub fn run(self) -> Done {
        let source_memory = memory(self.memory_bytes);
        fill(&source_memory, 3, 3);
        let machine = SourceMachine::start(
            source_memory.clone(),
            usize::from(self.writes > 0),
            self.writes,
            5,
        );
        let source_running = Arc::clone(&machine.running);
        let mut sources = vec![machine.source()];
        let mut devices = Vec::new();
        for config in &self.source {
            let mut device = ModelDevice::new(config.clone()).expect("a device of a test");
            if config.dma > 0 {
                let dma = Dma::new(source_memory.clone(), 1, DMA_FIRST, config.dma / 4096)
                    .expect("an area inside");
                sources.push(dma.source());
                device = device.with_dma(dma);
            }
            devices.push(device);
        }
        let source_probes: Vec<_> = devices.iter().map(ModelDevice::probe).collect();
        let listener = self.listener.unwrap_or_else(|| {
            let address = "127.0.0.1:0".parse().expect("an address");
            Listener::bind(&address, &TcpOptions::default()).expect("a port")
        });
        let address = listener.local_address().clone();
        let inner = DestinationMachine::default();
        let destination_running = Arc::clone(&inner.running);
        let destination_memory = Arc::clone(&inner.memory);
        let destination = Destination::new(inner, &self.destination);
        let destination_probes = destination.probes.clone();
        let reception = rx::Reception::start(rx::Parts {
            vmm: Box::new(destination),
            listeners: vec![listener],
            config: self.receiver,
            spawner: None,
        })
        .expect("a destination");
        let dialer = tx::Dialer {
            address,
            options: TcpOptions::default().into(),
        };
        let links = if self.over_tcp {
            Links::over_tcp(reception.handle(), dialer.address.clone())
        } else {
            Links::to(reception.handle())
        };
        let dial = match self.dial {
            Some(make) => make(dialer),
            None if self.disturb.is_some() => links.dial(),
            None => Box::new(dialer),
        };
        let migration = tx::Migration::start(tx::Parts {
            vmm: Box::new(Source { machine, devices }),
            memory: source_memory.clone(),
            sources,
            dial,
            config: self.config,
            spawner: None,
        })
        .expect("a source");
        if let Some(meanwhile) = self.meanwhile {
            meanwhile(migration.handle(), source_probes.clone());
        }
        let disturber = self.disturb.map(|disturb| {
            let watch = Watch {
                source: migration.handle(),
                destination: reception.handle(),
                source_probes: source_probes.clone(),
                destination_probes: destination_probes.clone(),
            };
            std::thread::spawn(move || disturb(links, watch))
        });
        let sent = migration.wait();
        if let Some(disturber) = disturber {
            disturber.join().expect("no panic");
        }
        // A source that failed before it dialled leaves the destination waiting.
        reception.handle().cancel();
        let received = reception.wait();
        let destination_memory = destination_memory.lock().expect("no panics").clone();
        Done {
            sent,
            received,
            source_memory,
            destination_memory,
            source_running,
            destination_running,
            source_probes,
            destination_probes,
        }
    }
}

/// What a disturber sees of a migration.
pub struct Watch {
    /// The source.
    pub source: tx::Handle,
    /// The destination.
    pub destination: rx::Handle,
    /// The devices at the source.
    pub source_probes: Vec<DeviceProbe>,
    /// The devices at the destination.
    pub destination_probes: Vec<DeviceProbe>,
}

impl Watch {
    /// Waits until something holds, or the migration is over; says whether it holds.
    #[must_use]
    pub fn until(&self, holds: impl Fn(&Self) -> bool) -> bool {
        loop {
            if holds(self) {
                return true;
            }
            if self.source.progress().phase == Phase::Done {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// What it left behind.
pub struct Done {
    /// The source.
    pub sent: tx::Finished,
    /// The destination.
    pub received: rx::Finished,
    /// Memory at the source.
    pub source_memory: GuestMemory,
    /// Memory at the destination, if it got that far.
    pub destination_memory: Option<GuestMemory>,
    /// Whether the guest runs at the source.
    pub source_running: Arc<AtomicBool>,
    /// Whether it runs at the destination.
    pub destination_running: Arc<AtomicBool>,
    /// The devices at the source.
    pub source_probes: Vec<DeviceProbe>,
    /// The devices at the destination.
    pub destination_probes: Vec<DeviceProbe>,
}

impl Done {
    /// It migrated, with everything: memory, devices, and nobody runs twice.
    ///
    /// # Panics
    /// If not.
    pub fn assert_migrated(&self) {
        let error = self.sent.error.as_ref().map(ToString::to_string);
        let theirs = self.received.error.as_ref().map(ToString::to_string);
        assert_eq!((error, theirs), (None, None), "{:#?}", self.sent.report);
        assert!(!self.source_running.load(Ordering::SeqCst));
        assert!(self.destination_running.load(Ordering::SeqCst));
        let there = self.destination_memory.as_ref().expect("memory there");
        assert_eq!(
            crate::model::differing_page(&self.source_memory, there),
            None
        );
        for (here, there) in self.source_probes.iter().zip(&self.destination_probes) {
            assert_eq!(here.state(), DeviceState::Stop);
            assert_eq!(there.state(), DeviceState::Running);
            assert!(there.operations() >= here.operations());
        }
        assert_eq!(self.received.devices.len(), self.destination_probes.len());
    }

    /// It failed: guest and devices run at the source and nothing runs at the destination. Gives the report's error as
    /// `code: text`.
    ///
    /// # Panics
    /// If not.
    #[must_use]
    pub fn assert_failed(&self) -> String {
        assert!(self.source_running.load(Ordering::SeqCst), "the guest");
        assert!(!self.destination_running.load(Ordering::SeqCst));
        for (device, probe) in self.source_probes.iter().enumerate() {
            assert_eq!(probe.state(), DeviceState::Running, "device {device}");
        }
        for probe in &self.destination_probes {
            assert_ne!(probe.state(), DeviceState::RunningP2p);
        }
        assert_eq!(self.sent.devices.len(), self.source_probes.len());
        let error = self.sent.report.error.as_ref().expect("it failed");
        format!("{}, {}: {}", error.code, error.phase, error.text)
    }
}
