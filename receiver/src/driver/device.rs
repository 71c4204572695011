//! The devices at the destination: where lanes leave their items, and one loader thread for each.
//!
//! The loader begins with the first chunk. It alone calls its device until everything is loaded; after that, and before
//! the rounds, the VMM's thread does. What it must never do: keep a lane waiting, or start a device.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use multifd_session::destination::Incomplete;
use multifd_transport::{ReceiveHalf, join_within};
use multifd_wire::frame::{Device, DeviceChunk, DeviceFlags, DeviceMark};
use multifd_wire::limits::BLOB_BYTES_MAX;
use multifd_wire::{DeviceId, DeviceState, Generation, Header, Misbehaved};

use super::link::{failed, skip_body};
use super::{Note, Shared, lock, thread_cpu};
use crate::device::assembler::{Assembler, Came, Item};
use crate::device::handover::{Body, Handover, Waited};
use crate::device::{DeviceError, DeviceSink};
use crate::error::Fault;

/// What a loader tells the control thread.
#[derive(Debug)]
pub(super) enum DeviceNote {
    /// The initial bytes of a generation are loaded.
    InitialLoaded {
        device: DeviceId,
        generation: Generation,
        bytes: u64,
        took: Duration,
    },
    /// The source may send up to here.
    Credit { device: DeviceId, offset_max: u64 },
    /// Everything of it is here, and not all is loaded.
    Arrived { device: DeviceId },
    /// Everything is loaded, and the device stands still.
    Loaded(LoadedDevice),
    /// What was loaded is void.
    Restarted { device: DeviceId },
    /// The device failed.
    Failed(Fault),
}

/// A device that has everything, and how long that took.
#[derive(Debug, Clone)]
pub(crate) struct LoadedDevice {
    pub(crate) device: DeviceId,
    pub(crate) name: String,
    pub(crate) bytes: u64,
    pub(crate) load: Duration,
    pub(crate) config: Duration,
    /// How often its stream had begun anew.
    pub(crate) restarts: u32,
}

/// Where lanes leave what belongs to devices. Shared by all lanes.
pub(super) struct Inventory {
    devices: Vec<Arc<Handover>>,
    names: Vec<String>,
}

impl Inventory {
    /// Places for the devices of the table, each with a window of so many octets.
    pub(super) fn new(table: &[Device], window: u64) -> Self {
        let place = |device: &Device| {
            let assembler = Assembler::new(device.id, device.chunk_bytes_max, window);
            Arc::new(Handover::new(assembler, device.chunk_bytes_max, window))
        };
        let name = |device: &Device| device.name.as_str().to_owned();
        Self {
            devices: table.iter().map(place).collect(),
            names: table.iter().map(name).collect(),
        }
    }

    fn place(&self, device: DeviceId) -> Result<&Handover, Misbehaved> {
        self.devices
            .get(device.value() as usize)
            .map(Arc::as_ref)
            .ok_or(Misbehaved::UnknownDevice {
                device: device.value(),
            })
    }

    /// A chunk's head came on a lane: reads its body to where it belongs.
    pub(super) fn chunk(
        &self,
        rx: &mut dyn ReceiveHalf,
        chunk: &DeviceChunk,
        header: &Header,
    ) -> Result<Came, Fault> {
        let place = self.place(chunk.device)?;
        let named = |fault| self.named(chunk.device, fault);
        match place
            .admit(chunk, header.body_bytes(), header.body_crc())
            .map_err(named)?
        {
            Body::Have => {
                skip_body(rx, header.body_bytes()).map_err(failed)?;
                Ok(Came::More)
            }
            Body::Take(mut octets) => {
                // SPEC: ERR-4
                let read = rx
                    .receive(&mut octets)
                    .map_err(failed)
                    .and_then(|()| Ok(header.check_body(&octets)?));
                if let Err(fault) = read {
                    place.give_up(chunk.index);
                    return Err(fault);
                }
                let arrived = place.arrived(chunk.index, octets);
                arrived.map_err(|misbehaved| named(misbehaved.into()))
            }
        }
    }

    /// A mark came on a lane.
    pub(super) fn mark(&self, mark: &DeviceMark) -> Result<Came, Fault> {
        let came = self.place(mark.device)?.mark(mark);
        came.map_err(|fault| self.named(mark.device, fault))
    }

    /// A lane was lost: what it carried may come again.
    pub(super) fn lane_lost(&self) {
        self.devices.iter().for_each(|place| place.lane_lost());
    }

    /// A device of whose stream items are missing, if there is one.
    pub(super) fn incomplete(&self) -> Option<Incomplete> {
        let places = (0..).zip(self.devices.iter().zip(&self.names));
        let mut missing = places.filter_map(|(id, (place, name))| {
            Some(Incomplete {
                device: DeviceId::new(id),
                name: name.clone(),
                index: place.missing()?,
            })
        });
        missing.next()
    }

    /// With the device's name, which says more to the user than its number.
    fn named(&self, device: DeviceId, fault: Fault) -> Fault {
        let device = self
            .names
            .get(device.value() as usize)
            .cloned()
            .unwrap_or_default();
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

    /// Memory is complete: configurations that had to wait for it are loaded now (SPEC: DEVSTREAM-6).
    pub(super) fn memory_landed(&self) {
        self.devices.iter().for_each(|place| place.memory_landed());
    }

    /// The switchover was broken off.
    pub(super) fn memory_moves_on(&self) {
        self.devices
            .iter()
            .for_each(|place| place.memory_moves_on());
    }

    /// How often each device's stream began anew, going by what came.
    pub(super) fn restarts(&self) -> Vec<u32> {
        self.devices.iter().map(|place| place.restarts()).collect()
    }

    /// Sends the loaders home.
    pub(super) fn end(&self) {
        self.devices.iter().for_each(|place| place.end());
    }

    /// Starts a loader for each device.
    pub(super) fn start(
        &self,
        table: &[Device],
        sinks: Vec<Box<dyn DeviceSink>>,
        shared: &Arc<Shared>,
    ) -> Result<Vec<LoaderThread>, Fault> {
        let mut threads = Vec::new();
        for ((device, sink), place) in table.iter().zip(sinks).zip(&self.devices) {
            let (give, back) = crossbeam_channel::bounded(1);
            let loader = Loader {
                device: *device,
                name: device.name.as_str().to_owned(),
                sink,
                place: Arc::clone(place),
                shared: Arc::clone(shared),
                config: Vec::new(),
                bytes: 0,
                load: Duration::ZERO,
                generation_bytes: 0,
                generation_load: Duration::ZERO,
                restarts: 0,
                busy: Arc::default(),
            };
            let (name, busy) = (loader.name.clone(), Arc::clone(&loader.busy));
            let body = Box::new(move || {
                let _ = give.send(loader.run());
            });
            let thread_name = format!("mfd-dev{}", device.id);
            let thread =
                shared
                    .spawner
                    .spawn(&thread_name, body)
                    .map_err(|source| Fault::System {
                        step: "start a thread",
                        source,
                    })?;
            threads.push(LoaderThread {
                name,
                busy,
                thread,
                back,
            });
        }
        Ok(threads)
    }
}

/// A loader at work. It gives its device back when it has everything, or when it is sent home.
pub(super) struct LoaderThread {
    pub(super) name: String,
    busy: Arc<Busy>,
    thread: JoinHandle<()>,
    back: Receiver<Box<dyn DeviceSink>>,
}

impl LoaderThread {
    /// The call that does not return, if there is one.
    pub(super) fn stuck(&self, limit: Duration) -> Option<Fault> {
        self.busy.stuck(limit)
    }

    /// Its device; `None` if the device's own code panicked, or does not return: then its thread is left behind, and ends when that
    /// does. Meanwhile the queue of notes must not stay full: `make_room`.
    pub(super) fn home(
        self,
        patience: Duration,
        make_room: impl Fn(),
    ) -> Option<Box<dyn DeviceSink>> {
        let began = Instant::now();
        let sink = loop {
            match self.back.recv_timeout(Duration::from_millis(1)) {
                Ok(sink) => break sink,
                // One that is in no call of its device's code was killed, or is stuck in memory.
                Err(RecvTimeoutError::Timeout)
                    if self.stuck(patience).is_some()
                        || self.busy.is_idle() && began.elapsed() >= patience =>
                {
                    return None;
                }
                Err(RecvTimeoutError::Timeout) => make_room(),
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        };
        let _ = join_within(self.thread, patience, make_room);
        Some(sink)
    }
}

/// What a device's own code is asked for, and since when. It may never return; whoever waits for it looks here.
#[derive(Debug, Default)]
pub(super) struct Busy(Mutex<Option<(String, &'static str, Instant)>>);

impl Busy {
    fn call<T>(
        &self,
        sink: &mut dyn DeviceSink,
        step: &'static str,
        ask: impl FnOnce(&mut dyn DeviceSink) -> Result<T, DeviceError>,
    ) -> Result<T, Fault> {
        let device = sink.name().to_owned();
        *lock(&self.0) = Some((device.clone(), step, Instant::now()));
        let answer = ask(sink);
        *lock(&self.0) = None;
        answer.map_err(|source| Fault::Device {
            device,
            step,
            source,
        })
    }

    fn is_idle(&self) -> bool {
        lock(&self.0).is_none()
    }

    fn stuck(&self, limit: Duration) -> Option<Fault> {
        let busy = lock(&self.0);
        let (device, step, since) = busy.as_ref()?;
        let waited = since.elapsed();
        (waited >= limit).then(|| Fault::DeviceStuck {
            device: device.clone(),
            step,
            waited_ms: waited.as_millis(),
        })
    }
}

/// Does something with all devices, in a thread of its own, so that one whose code does not return keeps nobody else. Without
/// an answer within the deadline of each call the devices stay with that thread.
pub(super) fn with_all(
    shared: &Shared,
    mut sinks: Vec<Box<dyn DeviceSink>>,
    how: impl FnOnce(&mut [Box<dyn DeviceSink>], &Busy) -> Result<(), Fault> + Send + 'static,
) -> (Result<(), Fault>, Vec<Box<dyn DeviceSink>>) {
    if sinks.is_empty() {
        return (how(&mut sinks, &Busy::default()), sinks);
    }
    let busy = Arc::new(Busy::default());
    let (give, back) = crossbeam_channel::bounded(1);
    let theirs = Arc::clone(&busy);
    let body = Box::new(move || {
        let done = how(&mut sinks, &theirs);
        let _ = give.send((done, sinks));
    });
    let spawned = shared.spawner.spawn("mfd-devices", body);
    let thread = match spawned {
        Ok(thread) => thread,
        Err(source) => {
            let step = "start a thread";
            return (Err(Fault::System { step, source }), Vec::new());
        }
    };
    let limit = shared.config.device_deadline();
    let mut idle_since = Instant::now();
    loop {
        match back.recv_timeout(limit.min(LOOK)) {
            Ok(done) => {
                let _ = join_within(thread, limit, || {
                    std::thread::sleep(Duration::from_millis(1))
                });
                return done;
            }
            Err(RecvTimeoutError::Timeout) => {
                if let Some(stuck) = busy.stuck(limit) {
                    return (Err(stuck), Vec::new());
                }
                if !busy.is_idle() {
                    idle_since = Instant::now();
                } else if idle_since.elapsed() >= limit {
                    let thread = "the thread that leads the devices".to_owned();
                    let waited_ms = limit.as_millis();
                    return (Err(Fault::ThreadStuck { thread, waited_ms }), Vec::new());
                }
            }
            Err(RecvTimeoutError::Disconnected) => {
                let text = "the code of one panicked".to_owned();
                return (Err(Fault::Devices { text }), Vec::new());
            }
        }
    }
}

/// How often it is looked whether a device's code is stuck.
const LOOK: Duration = Duration::from_millis(50);

struct Loader {
    busy: Arc<Busy>,
    device: Device,
    name: String,
    sink: Box<dyn DeviceSink>,
    place: Arc<Handover>,
    shared: Arc<Shared>,
    config: Vec<u8>,
    bytes: u64,
    load: Duration,
    /// Of the present generation of initial bytes.
    generation_bytes: u64,
    generation_load: Duration,
    restarts: u32,
}

impl Loader {
    fn run(mut self) -> Box<dyn DeviceSink> {
        let mut cpu = Duration::ZERO;
        // Also after the end of the stream: it may begin anew.
        while let Some(item) = self.place.next() {
            let done = self.item(item);
            self.shared.counters.add_cpu(thread_cpu(&mut cpu));
            if let Err(fault) = done {
                self.tell(DeviceNote::Failed(fault));
                break;
            }
        }
        self.sink
    }

    fn item(&mut self, item: Item) -> Result<(), Fault> {
        match item {
            Item::Data(octets) => {
                let began = Instant::now();
                self.call("take its state in", |sink| sink.write(&octets))?;
                let (took, bytes) = (began.elapsed(), octets.len() as u64);
                self.load += took;
                self.generation_load += took;
                self.bytes += bytes;
                self.generation_bytes += bytes;
                let counters = &self.shared.counters;
                counters.device_bytes.fetch_add(bytes, Ordering::Relaxed);
                let credit = self.place.loaded(octets);
                self.give_credit(credit);
            }
            Item::Config(octets) => {
                let wanted = self.config.len() as u64 + octets.len() as u64;
                if wanted > BLOB_BYTES_MAX {
                    return Err(Fault::DeviceLimit {
                        device: self.name.clone(),
                        what: "octets of its configuration",
                        wanted,
                        most: BLOB_BYTES_MAX,
                    });
                }
                // Room for what is here and no more: it may grow to the window.
                self.config.reserve_exact(octets.len());
                self.config.extend_from_slice(&octets);
                let credit = self.place.put_together(octets);
                self.give_credit(credit);
            }
            Item::InitialEnd(generation) => {
                let began = Instant::now();
                self.call("finish its initial bytes", |sink| sink.initial_end())?;
                self.load += began.elapsed();
                let took = self.generation_load + began.elapsed();
                self.tell(DeviceNote::InitialLoaded {
                    device: self.device.id,
                    generation,
                    bytes: self.generation_bytes,
                    took,
                });
                (self.generation_bytes, self.generation_load) = (0, Duration::ZERO);
            }
            Item::DataEnd => {}
            Item::ConfigEnd => self.finish()?,
            Item::Restart => {
                self.restarts += 1;
                // One that had everything stands still already.
                if self.sink.state() == DeviceState::Resuming {
                    self.call("begin anew", |sink| sink.restart())?;
                } else {
                    lead(&mut *self.sink, DeviceState::Resuming, &self.busy)?;
                }
                self.tell(DeviceNote::Restarted {
                    device: self.device.id,
                });
                let config = std::mem::take(&mut self.config);
                self.config_is_gone(config);
                (self.bytes, self.load) = (0, Duration::ZERO);
                (self.generation_bytes, self.generation_load) = (0, Duration::ZERO);
            }
        }
        Ok(())
    }

    /// The configuration, when its time has come, and the device's own check of it all.
    fn finish(&mut self) -> Result<(), Fault> {
        let late = DeviceFlags::CONFIG_AFTER_MEMORY;
        if self.device.flags.contains(late) && self.place.wait_for_memory() != Waited::Landed {
            return Ok(());
        }
        let began = Instant::now();
        if !self.config.is_empty() {
            let config = std::mem::take(&mut self.config);
            self.call("take its configuration in", |sink| {
                sink.load_config(&config)
            })?;
            self.config_is_gone(config);
        }
        self.call("finish its state", |sink| sink.set_state(DeviceState::Stop))?;
        self.tell(DeviceNote::Loaded(LoadedDevice {
            device: self.device.id,
            name: self.name.clone(),
            bytes: self.bytes,
            load: self.load,
            config: began.elapsed(),
            restarts: self.restarts,
        }));
        Ok(())
    }

    /// The configuration was loaded, or is void.
    fn config_is_gone(&self, config: Vec<u8>) {
        let bytes = config.len() as u64;
        drop(config);
        let credit = self.place.let_go(bytes);
        self.give_credit(credit);
    }

    fn give_credit(&self, offset_max: Option<u64>) {
        if let Some(offset_max) = offset_max {
            self.tell(DeviceNote::Credit {
                device: self.device.id,
                offset_max,
            });
        }
    }

    fn tell(&self, note: DeviceNote) {
        let _ = self.shared.notes.send(Note::Device(note));
    }

    fn call<T>(
        &mut self,
        step: &'static str,
        ask: impl FnOnce(&mut dyn DeviceSink) -> Result<T, DeviceError>,
    ) -> Result<T, Fault> {
        self.busy.call(&mut *self.sink, step, ask)
    }
}

/// Checks that these are the devices of the table and can be moved together, and leads each to where its state can be written.
pub(super) fn open(
    table: &[Device],
    sinks: &mut [Box<dyn DeviceSink>],
    busy: &Busy,
) -> Result<(), Fault> {
    let refuse = |text: String| Err(Fault::Devices { text });
    if sinks.len() != table.len() {
        return refuse(format!("the VMM gave {} for {}", sinks.len(), table.len()));
    }
    for (device, sink) in table.iter().zip(sinks.iter()) {
        if sink.name() != device.name.as_str() {
            return refuse(format!("the VMM gave {} for {}", sink.name(), device.name));
        }
    }
    let without = sinks
        .iter()
        .find(|sink| !sink.flags().contains(DeviceFlags::P2P));
    if let Some(sink) = without.filter(|_| sinks.len() > 1) {
        return refuse(format!(
            "{} has no P2P-quiescent state, so it can only be moved alone",
            sink.name()
        ));
    }
    for sink in sinks {
        lead(&mut **sink, DeviceState::Resuming, busy)?;
    }
    Ok(())
}

/// Starts all devices, which have all been loaded: first every one to where none disturbs another, then on.
pub(super) fn start(sinks: &mut [Box<dyn DeviceSink>], busy: &Busy) -> Result<(), Fault> {
    for sink in sinks.iter_mut() {
        if sink.flags().contains(DeviceFlags::P2P) {
            lead(&mut **sink, DeviceState::RunningP2p, busy)?;
        }
    }
    sinks
        .iter_mut()
        .try_for_each(|sink| lead(&mut **sink, DeviceState::Running, busy))
}

/// Step by step.
fn lead(sink: &mut dyn DeviceSink, to: DeviceState, busy: &Busy) -> Result<(), Fault> {
    while let Some(next) = sink.state().step_to(to, sink.flags()) {
        busy.call(sink, to_step(to), |sink| sink.set_state(next))?;
    }
    if sink.state() == to {
        return Ok(());
    }
    Err(Fault::Device {
        device: sink.name().to_owned(),
        step: to_step(to),
        source: DeviceError::new(format!("it is in {}", sink.state())),
    })
}

fn to_step(to: DeviceState) -> &'static str {
    match to {
        DeviceState::Resuming => "get ready for its state",
        DeviceState::RunningP2p => "start, quiescent",
        _ => "start",
    }
}
