//! The devices at the destination: what lanes bring is put in order, and each device's loader takes it up.

use multifd_wire::frame::{
    Credit, Device, DeviceChunk, DeviceFlags, DeviceLoaded, DeviceMark, SwitchoverAck,
};
use multifd_wire::{DeviceId, Header, Kind, Misbehaved};

use super::{Pair, What};
use crate::destination::assembler::{Admit, Assembler, Came, Item};
use crate::destination::{DeviceEvent, Event, Fault, Incomplete};

/// One device, and what of it is loaded.
pub(super) struct Loader {
    device: Device,
    assembler: Assembler,
    /// Loaded since the stream began anew: data, and configuration.
    loaded: [Vec<u8>; 2],
    generation_bytes: u64,
    /// Of the configuration, whose room is not free yet.
    config_bytes: u64,
    restarts: u32,
    memory_landed: bool,
    /// It has everything and waits for memory.
    waits: bool,
    woken: bool,
    started: bool,
}

impl Loader {
    fn new(device: Device, window: u64) -> Self {
        Self {
            device,
            assembler: Assembler::new(device.id, device.chunk_bytes_max, window),
            loaded: Default::default(),
            generation_bytes: 0,
            config_bytes: 0,
            restarts: 0,
            memory_landed: false,
            waits: false,
            woken: false,
            started: false,
        }
    }

    fn named(&self, fault: Fault) -> Fault {
        let device = self.device.name.as_str().to_owned();
        match fault {
            Fault::Misbehaved(source) => Fault::DeviceMisbehaved { device, source },
            Fault::Limit { what, wanted, most } => Fault::DeviceLimit {
                device,
                what,
                wanted,
                most,
            },
            other => other,
        }
    }

    /// What comes of an item, with the credit that it frees.
    fn load(&mut self, item: Item) -> Vec<DeviceEvent> {
        let device = self.device.id;
        let mut events = Vec::new();
        match item {
            Item::Data(octets) => {
                self.loaded[0].extend(&octets);
                self.generation_bytes += octets.len() as u64;
                self.assembler.loaded(octets.len() as u64);
            }
            Item::Config(octets) => {
                self.config_bytes += octets.len() as u64;
                self.loaded[1].extend(&octets);
            }
            Item::InitialEnd(generation) => {
                events.push(DeviceEvent::InitialLoaded(SwitchoverAck {
                    device,
                    generation,
                    bytes: std::mem::take(&mut self.generation_bytes),
                    load_us: 1,
                }));
            }
            Item::DataEnd => {}
            Item::ConfigEnd => {
                self.waits = true;
                events.extend(self.finish());
            }
            Item::Restart => {
                self.restarts += 1;
                let config = std::mem::take(&mut self.config_bytes);
                self.assembler.loaded(config);
                self.loaded = Default::default();
                self.generation_bytes = 0;
                events.push(DeviceEvent::Restarted(device));
            }
        }
        events.extend(self.credit());
        events
    }

    fn credit(&mut self) -> Option<DeviceEvent> {
        let (device, offset_max) = (self.device.id, self.assembler.credit()?);
        Some(DeviceEvent::Credit(Credit { device, offset_max }))
    }

    /// Everything is here: it is finished, if memory is there where it has to be.
    fn finish(&mut self) -> Vec<DeviceEvent> {
        let late = self.device.flags.contains(DeviceFlags::CONFIG_AFTER_MEMORY);
        if late && self.assembler.has_more() {
            // It begins anew.
            self.waits = false;
        }
        if !self.waits || late && !self.memory_landed {
            return Vec::new();
        }
        self.waits = false;
        // It stays for the comparison; the room that it held is free.
        let config = std::mem::take(&mut self.config_bytes);
        self.assembler.loaded(config);
        let loaded = DeviceEvent::Loaded {
            loaded: DeviceLoaded {
                device: self.device.id,
                bytes: self.loaded[0].len() as u64,
                load_us: 1,
                config_us: 1,
            },
            restarts: self.restarts,
        };
        let mut events: Vec<DeviceEvent> = self.credit().into_iter().collect();
        events.push(loaded);
        events
    }
}

impl Pair {
    /// The machine is built: its devices are known.
    pub(super) fn expect_devices(&mut self, devices: &[Device]) {
        let window = self.plan.destination.device_window_bytes();
        let loader = |device: &Device| Loader::new(*device, window);
        self.destination.loaders = devices.iter().map(loader).collect();
    }

    pub(super) fn start_loaders(&mut self) {
        for place in 0..self.destination.loaders.len() {
            self.destination.loaders[place].started = true;
            self.wake_loader(place);
        }
    }

    fn wake_loader(&mut self, place: usize) {
        let program = self.destination.program;
        if let Some(loader) = self.destination.loaders.get_mut(place)
            && loader.started
            && !std::mem::replace(&mut loader.woken, true)
        {
            let wait = self.dice.ms(2);
            self.later(wait, What::Loads(place, program));
        }
    }

    /// A loader's thread goes on: one item.
    pub(super) fn loads(&mut self, place: usize, program: u32) {
        if program != self.destination.program || self.hosts[1].gone {
            return;
        }
        let Some(loader) = self.destination.loaders.get_mut(place) else {
            return;
        };
        loader.woken = false;
        let mut events = loader.finish();
        let mut more = false;
        if !loader.waits
            && let Some(item) = loader.assembler.pop()
        {
            events.extend(loader.load(item));
            more = true;
        }
        for event in events {
            self.destination_note(Event::Device(event));
        }
        if more {
            self.wake_loader(place);
        }
    }

    fn loader(&mut self, device: DeviceId, kind: Kind) -> Result<&mut Loader, Misbehaved> {
        let device = device.value();
        if self.destination.session.is_none() {
            return Err(Misbehaved::Feature { kind });
        }
        self.destination
            .loaders
            .get_mut(device as usize)
            .ok_or(Misbehaved::UnknownDevice { device })
    }

    pub(super) fn device_chunk(
        &mut self,
        chunk: &DeviceChunk,
        header: &Header,
        body: &[u8],
    ) -> Result<(), Fault> {
        let loader = self.loader(chunk.device, header.kind())?;
        let (bytes, crc) = (header.body_bytes() as u64, header.body_crc());
        let admitted = loader.assembler.admit(chunk, bytes, crc);
        if admitted.map_err(|fault| loader.named(fault))? == Admit::Have {
            return Ok(());
        }
        if let Err(malformed) = header.check_body(body) {
            loader.assembler.give_up(chunk.index);
            return Err(malformed.into());
        }
        let before = loader.assembler.restarts();
        let arrived = loader.assembler.arrived(chunk.index, body.to_vec());
        let came = arrived.map_err(|fault| loader.named(fault.into()))?;
        loader.memory_landed &= loader.assembler.restarts() == before;
        self.device_came(chunk.device, came);
        Ok(())
    }

    pub(super) fn device_mark(&mut self, mark: &DeviceMark) -> Result<(), Fault> {
        let loader = self.loader(mark.device, Kind::DeviceMark)?;
        let before = loader.assembler.restarts();
        let came = loader.assembler.mark(mark);
        let came = came.map_err(|fault| loader.named(fault))?;
        loader.memory_landed &= loader.assembler.restarts() == before;
        self.device_came(mark.device, came);
        Ok(())
    }

    fn device_came(&mut self, device: DeviceId, came: Came) {
        self.wake_loader(device.value() as usize);
        if came == Came::All {
            self.destination_note(Event::Device(DeviceEvent::Arrived));
        }
    }

    pub(super) fn lane_of_devices_lost(&mut self) {
        let loaders = self.destination.loaders.iter_mut();
        loaders.for_each(|loader| loader.assembler.lane_lost());
    }

    pub(super) fn break_streams_off(&mut self) {
        let loaders = self.destination.loaders.iter_mut();
        loaders.for_each(|loader| loader.assembler.break_off());
    }

    pub(super) fn memory_landed(&mut self) {
        for place in 0..self.destination.loaders.len() {
            self.destination.loaders[place].memory_landed = true;
            self.wake_loader(place);
        }
    }

    pub(super) fn memory_moves_on(&mut self) {
        let loaders = self.destination.loaders.iter_mut();
        loaders.for_each(|loader| loader.memory_landed = false);
    }

    pub(super) fn incomplete(&self) -> Option<Incomplete> {
        let loaders = self.destination.loaders.iter();
        let mut missing = loaders.filter(|loader| !loader.assembler.is_over());
        missing.next().map(|loader| Incomplete {
            device: loader.device.id,
            name: loader.device.name.as_str().to_owned(),
            index: loader.assembler.missing(),
        })
    }

    pub(super) fn restarts(&self) -> Vec<u32> {
        let loaders = self.destination.loaders.iter();
        loaders.map(|loader| loader.assembler.restarts()).collect()
    }

    /// A guest runs here: its devices have what those of the source had when they stood still.
    pub(super) fn compare_devices(&mut self) {
        let (loaders, readers) = (&self.destination.loaders, self.source.readers.all());
        let same = loaders.iter().map(|loader| &loader.loaded);
        let same = same.eq(readers.iter().map(|reader| &reader.record));
        if !same {
            self.violation("a device at the destination has another state");
        }
    }
}
