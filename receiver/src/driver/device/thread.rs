//! The loader of one device: a thread that takes the items of its stream in order and writes them to the device.
//!
//! It begins with the first chunk, and alone calls its device until everything is loaded. What it must never do: start a device.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use multifd_transport::{join_within, thread_cpu};
use multifd_wire::DeviceState;
use multifd_wire::frame::{Device, DeviceFlags};
use multifd_wire::limits::BLOB_BYTES_MAX;

use super::DeviceNote;
use super::call::CallWatch;
use super::states::lead;
use super::table::DeviceTable;
use crate::device::assembler::Item;
use crate::device::stream::{DeviceStream, Waited};
use crate::device::{DeviceError, DeviceSink};
use crate::driver::{Note, Shared};
use crate::error::Fault;
use crate::report::LoadedDevice;

/// A loader at work. It gives its device back when it has everything, or when it is told to end.
pub(in crate::driver) struct LoaderThread {
    pub(super) name: String,
    watch: Arc<CallWatch>,
    thread: JoinHandle<()>,
    back: Receiver<Box<dyn DeviceSink>>,
}

impl LoaderThread {
    /// The call that does not return, if there is one.
    pub(in crate::driver) fn stuck(&self, limit: Duration) -> Option<Fault> {
        self.watch.stuck(limit)
    }

    /// Its device; `None` if the device's own code panicked, or does not return: then its thread is left behind, and ends when that
    /// does. Meanwhile the queue of notes must not stay full: `make_room`.
    pub(in crate::driver) fn join(
        self,
        limit: Duration,
        make_room: impl Fn(),
    ) -> Option<Box<dyn DeviceSink>> {
        let began = Instant::now();
        let sink = loop {
            match self.back.recv_timeout(Duration::from_millis(1)) {
                Ok(sink) => break sink,
                // One that is in no call of its device's code was killed, or is stuck in memory.
                Err(RecvTimeoutError::Timeout)
                    if self.stuck(limit).is_some()
                        || self.watch.is_idle() && began.elapsed() >= limit =>
                {
                    return None;
                }
                Err(RecvTimeoutError::Timeout) => make_room(),
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        };
        let _ = join_within(self.thread, limit, make_room);
        Some(sink)
    }
}

impl LoaderThread {
    /// Starts one for each device.
    pub(in crate::driver) fn start_all(
        devices: &DeviceTable,
        table: &[Device],
        sinks: Vec<Box<dyn DeviceSink>>,
        shared: &Arc<Shared>,
    ) -> Result<Vec<LoaderThread>, Fault> {
        let mut threads = Vec::new();
        for ((device, sink), stream) in table.iter().zip(sinks).zip(&devices.streams) {
            let (give, back) = crossbeam_channel::bounded(1);
            let loader = Loader {
                device: *device,
                name: device.name.as_str().to_owned(),
                sink,
                stream: Arc::clone(stream),
                shared: Arc::clone(shared),
                config: Vec::new(),
                bytes: 0,
                load: Duration::ZERO,
                generation_bytes: 0,
                generation_load: Duration::ZERO,
                restarts: 0,
                watch: Arc::default(),
            };
            let (name, watch) = (loader.name.clone(), Arc::clone(&loader.watch));
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
                watch,
                thread,
                back,
            });
        }
        Ok(threads)
    }
}

struct Loader {
    watch: Arc<CallWatch>,
    device: Device,
    name: String,
    sink: Box<dyn DeviceSink>,
    stream: Arc<DeviceStream>,
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
        while let Some(item) = self.stream.next() {
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
                let credit = self.stream.loaded(octets);
                self.give_credit(credit);
            }
            Item::Config(octets) => {
                let wanted = self.config.len() as u64 + octets.len() as u64;
                if wanted > BLOB_BYTES_MAX {
                    return Err(Fault::DeviceLimit {
                        device: self.name.clone(),
                        what: "bytes of its configuration",
                        wanted,
                        most: BLOB_BYTES_MAX,
                    });
                }
                // Room for what is here and no more: it may grow to the window.
                self.config.reserve_exact(octets.len());
                self.config.extend_from_slice(&octets);
                let credit = self.stream.put_together(octets);
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
                    lead(&mut *self.sink, DeviceState::Resuming, &self.watch)?;
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
        if self.device.flags.contains(late) && self.stream.wait_for_memory() != Waited::Landed {
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
        let credit = self.stream.let_go(bytes);
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
        self.watch.call(&mut *self.sink, step, ask)
    }
}
