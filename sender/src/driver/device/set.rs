//! All devices of a migration, as the control thread has them.
//!
//! The rule it keeps: every device is quiescent before any is stopped, and before any is run again; and a device comes back to
//! running only where the guest does, for which a [`Reclaimed`] has to be shown.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use multifd_transport::Spawner;
use multifd_wire::frame::{Device, DeviceFlags, RawDevice};
use multifd_wire::limits::{DEVICE_NAME_BYTES_MAX, DEVICES_MAX};
use multifd_wire::{DeviceId, Text};

use super::stream::{DeviceStream, Stuck};
use super::table::DeviceTable;
use super::thread::{DeviceReader, Mode};
use super::{DeviceCommand, DeviceNote};
use crate::device::{DeviceError, DeviceSource, DeviceTraits};
use crate::driver::Note;
use crate::error::Fault;
use crate::session::{DeviceOutlook, Event};
use crate::vmm::Reclaimed;

/// The devices, from the VMM's hands and back into them.
#[derive(Default)]
pub(crate) struct DeviceSet {
    /// Before their readers are started, and after those have ended.
    pub(crate) sources: Vec<Box<dyn DeviceSource>>,
    traits: Vec<DeviceTraits>,
    chunk: u64,
    readers: Vec<ReaderThread>,
    /// The command that is being carried out, and by how many it was.
    command: Option<(DeviceCommand, usize)>,
    saved: usize,
}

struct ReaderThread {
    stream: Arc<DeviceStream>,
    thread: JoinHandle<()>,
    back: Receiver<Box<dyn DeviceSource>>,
}

impl DeviceSet {
    /// Devices that can be moved together (SPEC: DEVICE-4).
    ///
    /// # Errors
    /// [`Fault::Devices`], before anything was sent.
    pub(crate) fn take(
        &mut self,
        sources: Vec<Box<dyn DeviceSource>>,
        chunk: u64,
    ) -> Result<(), Fault> {
        let refuse = |text| Err(Fault::Devices { text });
        // Whatever comes of it, they are given back in the end.
        self.sources = sources;
        let traits: Vec<_> = self.sources.iter().map(|source| source.traits()).collect();
        if traits.len() > DEVICES_MAX {
            return refuse(format!("{} are more than {DEVICES_MAX}", traits.len()));
        }
        for (index, device) in traits.iter().enumerate() {
            let name = &device.name;
            if name.is_empty() || name.len() > DEVICE_NAME_BYTES_MAX {
                return refuse(format!(
                    "the name `{name}` must have 1 to {DEVICE_NAME_BYTES_MAX} bytes"
                ));
            }
            if traits.iter().take(index).any(|other| other.name == *name) {
                return refuse(format!("two have the name {name}"));
            }
            if !device.flags.contains(DeviceFlags::P2P) && traits.len() > 1 {
                return refuse(format!(
                    "{name} has no P2P-quiescent state, so it can only be moved alone"
                ));
            }
        }
        (self.traits, self.chunk) = (traits, chunk);
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.traits.is_empty()
    }

    /// The table of DEVICES.
    pub(crate) fn table(&self) -> Vec<RawDevice> {
        let entry = |(id, device): (u32, &DeviceTraits)| {
            let pre_copy = device.flags.contains(DeviceFlags::PRE_COPY);
            RawDevice::from(Device {
                id: DeviceId::new(id),
                flags: device.flags,
                initial_bytes: if pre_copy { device.initial_bytes } else { 0 },
                state_bytes: device.state_bytes,
                chunk_bytes_max: self.chunk,
                name: Text::name(&device.name),
            })
        };
        (0..).zip(&self.traits).map(entry).collect()
    }

    /// Starts the readers, with the credit of the grant, and lets them begin pre-copy.
    pub(crate) fn start(
        &mut self,
        window: u64,
        table: &Arc<DeviceTable>,
        spawner: &dyn Spawner,
        notes: &Sender<Note>,
    ) -> Result<(), Fault> {
        // A set-up whose channels were lost held it, with or without readers.
        table.queue.hold(false);
        if !self.readers.is_empty() {
            // Begun again, for a destination that has nothing.
            for reader in &self.readers {
                // A window is more than none.
                let _ = reader.stream.grant(u32::MAX, window);
            }
            self.command(DeviceCommand::PreCopy);
            return Ok(());
        }
        let streams: Vec<_> = (0..)
            .zip(&self.traits)
            .map(|(id, traits)| {
                Arc::new(DeviceStream::new(
                    DeviceId::new(id),
                    traits,
                    window,
                    self.chunk,
                ))
            })
            .collect();
        table.queue.open(streams.len());
        let _ = table.streams.set(streams.clone());
        for (stream, source) in streams.into_iter().zip(std::mem::take(&mut self.sources)) {
            let (give, back) = crossbeam_channel::bounded(1);
            let reader = DeviceReader {
                stream: Arc::clone(&stream),
                source,
                table: Arc::clone(table),
                notes: notes.clone(),
                chunk: usize::try_from(self.chunk).unwrap_or(usize::MAX),
                mode: Mode::Idle,
                pending: None,
                initial_left: 0,
                initial_marked: false,
                linger: None,
                config: None,
            };
            let body = Box::new(move || {
                let _ = give.send(reader.run());
            });
            let name = format!("mfd-dev{}", stream.id);
            let thread = spawner.spawn(&name, body).map_err(|source| Fault::System {
                step: "start a thread",
                source,
            })?;
            self.readers.push(ReaderThread {
                stream,
                thread,
                back,
            });
        }
        self.command(DeviceCommand::PreCopy);
        Ok(())
    }

    /// Gives a command to all.
    pub(crate) fn command(&mut self, command: DeviceCommand) {
        self.command = Some((command, 0));
        for reader in &self.readers {
            reader.stream.command(command);
        }
    }

    /// A reader said something; gives what that means when it was the last to say so.
    pub(crate) fn note(&mut self, note: DeviceNote) -> Result<Option<Event>, Fault> {
        match note {
            DeviceNote::Failed(fault) => Err(fault),
            DeviceNote::Saved { device } => {
                tracing::debug!(%device, "read to its end");
                self.saved += 1;
                // One that was read for a switchover that was broken off says so late.
                let stops = matches!(self.command, Some((DeviceCommand::Stop, _)));
                Ok((stops && self.saved == self.readers.len()).then_some(Event::DevicesSaved))
            }
            DeviceNote::Done { device, command } => {
                tracing::debug!(%device, ?command, "device");
                let Some((open, done)) = self.command.as_mut().filter(|(open, _)| *open == command)
                else {
                    return Ok(None);
                };
                *done += 1;
                if *done < self.readers.len() {
                    return Ok(None);
                }
                Ok(match open {
                    DeviceCommand::Quiesce => Some(Event::DevicesQuiesced),
                    DeviceCommand::Stop => Some(Event::DevicesStopped),
                    _ => None,
                })
            }
        }
    }

    /// No device announces anything any more: the guest is about to be paused. Gives those that are not acknowledged.
    pub(crate) fn close(&self) -> Vec<String> {
        for reader in &self.readers {
            reader.stream.lock().closed = true;
        }
        self.unacked()
    }

    /// The guest runs on after all.
    pub(crate) fn reopen(&self) {
        for reader in &self.readers {
            reader.stream.lock().closed = false;
        }
    }

    /// Names of those whose newest initial bytes are not acknowledged.
    pub(crate) fn unacked(&self) -> Vec<String> {
        let readers = self.readers.iter();
        let unacked = readers.filter(|reader| reader.stream.stats().is_unacked());
        unacked.map(|reader| reader.stream.name.clone()).collect()
    }

    /// What the devices would add to the downtime.
    pub(crate) fn outlook(&self, table: &DeviceTable) -> DeviceOutlook {
        let mut outlook = DeviceOutlook {
            stop_bytes: table.queue.octets(),
            ..DeviceOutlook::default()
        };
        for reader in &self.readers {
            let stats = reader.stream.stats();
            outlook.stop_bytes += stats.stop_bytes;
            let takes = |bytes: u64, time: Duration| {
                let share = stats.stop_bytes as f64 / bytes.max(1) as f64;
                Duration::try_from_secs_f64(time.as_secs_f64() * share).unwrap_or(Duration::MAX)
            };
            let load = takes(stats.loaded_bytes, stats.loaded_time);
            outlook.load = outlook.load.max(load);
            let read = takes(stats.read_bytes, stats.read_time);
            outlook.read = outlook.read.max(read);
            if stats.is_unacked() {
                outlook.unacked.push(reader.stream.name.clone());
            }
        }
        outlook
    }

    /// All devices stop, the one with most left is sent first.
    pub(crate) fn stop(&mut self, table: &DeviceTable) {
        let left: Vec<u64> = self
            .readers
            .iter()
            .map(|reader| reader.stream.stats().stop_bytes)
            .collect();
        table
            .queue
            .pause(|index| left.get(index).copied().unwrap_or(0));
        self.saved = 0;
        self.command(DeviceCommand::Stop);
    }

    /// The channels are lost, and the migration is kept: what lanes carried waits in their ledgers, and nothing more goes out.
    pub(crate) fn suspend(&self, table: &DeviceTable) {
        table.queue.hold(true);
    }

    /// The switchover was broken off: every device runs again, and is read further, or anew. Gives those that could not.
    pub(crate) fn go_on(
        &mut self,
        _: &Reclaimed,
        table: &DeviceTable,
        limit: Duration,
    ) -> Vec<String> {
        self.suspend(table);
        table.queue.go_on();
        self.reopen();
        self.lead_back([DeviceCommand::Hold, DeviceCommand::Continue], limit)
    }

    /// The destination said what landed: items go out again, and it repeats what it said of the devices (SPEC: RESUME-12).
    pub(crate) fn landed(&self, table: &DeviceTable) {
        for reader in &self.readers {
            reader.stream.lock().repeats = true;
        }
        table.queue.hold(false);
    }

    /// For a destination that has nothing, while the guest runs here: all that was read of the devices is void.
    pub(crate) fn start_over(
        &mut self,
        table: &DeviceTable,
        epoch: u32,
        limit: Duration,
    ) -> Vec<String> {
        let broken = self.lead_back([DeviceCommand::Restore, DeviceCommand::Run], limit);
        table.queue.clear();
        for reader in &self.readers {
            reader.stream.reset(epoch);
        }
        broken
    }

    /// Brings every device back to running: first all to where none disturbs another, then on. What stays broken is reported.
    pub(crate) fn reclaim(&mut self, _: &Reclaimed, limit: Duration) -> Vec<String> {
        self.lead_back([DeviceCommand::Restore, DeviceCommand::Run], limit)
    }

    /// Two commands, the second only when all have carried out the first. Gives the devices that do not run.
    fn lead_back(&mut self, commands: [DeviceCommand; 2], limit: Duration) -> Vec<String> {
        for command in commands {
            self.command(command);
            for reader in &self.readers {
                if !reader.stream.wait_for(command, limit) {
                    reader.gone(limit);
                }
            }
        }
        self.readers
            .iter()
            .filter(|reader| {
                let state = reader.stream.stats().state;
                !state.is_some_and(|state| state.is_running() && !state.is_quiescent())
            })
            .map(|reader| reader.stream.name.clone())
            .collect()
    }

    /// Stops every device for good: the guest is gone, or may be.
    pub(crate) fn retire(&mut self, limit: Duration) {
        self.command(DeviceCommand::Retire);
        for reader in &self.readers {
            if !reader.stream.wait_for(DeviceCommand::Retire, limit) {
                reader.gone(limit);
            }
        }
    }

    /// The first device whose call has not returned for so long, or whose code panicked.
    pub(crate) fn stuck(&self, limit: Duration) -> Option<Fault> {
        self.readers.iter().find_map(|reader| reader.stuck(limit))
    }

    /// Ends the readers and takes the devices back, but for those whose own code does not return: their threads are left behind
    /// and end when it does, and the devices with them. `make_room` keeps the queue of notes from filling up.
    pub(crate) fn end(&mut self, limit: Duration, make_room: impl Fn()) {
        self.command(DeviceCommand::End);
        for reader in std::mem::take(&mut self.readers) {
            while !reader.thread.is_finished() && reader.stuck(limit).is_none() {
                make_room();
            }
            if !reader.thread.is_finished() {
                reader.gone(limit);
                tracing::error!(device = %reader.stream.name, "a device is not given back: its code does not return");
                continue;
            }
            let back = reader.back.try_recv().ok();
            reader
                .stream
                .note(|stats| stats.given_back = back.is_some());
            self.sources.extend(back);
            let _ = reader.thread.join();
        }
    }
}

impl ReaderThread {
    /// Why nothing more is to be expected of its device, if that is so.
    fn stuck(&self, limit: Duration) -> Option<Fault> {
        let device = self.stream.name.clone();
        if let Some(Stuck { step, waited }) = self.stream.stuck(limit) {
            let waited_ms = waited.as_millis();
            return Some(Fault::DeviceStuck {
                device,
                step,
                waited_ms,
            });
        }
        (self.thread.is_finished() && self.back.is_empty()).then(|| Fault::Device {
            device,
            step: "go on",
            source: DeviceError::new("its code panicked"),
        })
    }

    /// It did not carry a command out.
    fn gone(&self, limit: Duration) {
        let name = &self.stream.name;
        let why = self.stuck(limit).map_or_else(
            || format!("device {name} does not answer"),
            |fault| fault.to_string(),
        );
        tracing::error!(device = %name, %why, "where a device stands is not known");
        self.stream.note(|stats| {
            stats.state = None;
            stats.trouble.get_or_insert(why);
        });
    }
}
