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

use super::{Depot, Desk, DeviceNote, Mode, Order, Reader, Stuck};
use crate::device::{DeviceError, DeviceSource, DeviceTraits};
use crate::driver::Note;
use crate::error::Fault;
use crate::session::{DeviceOutlook, Event};
use crate::vmm::Reclaimed;

/// The devices, from the VMM's hands and back into them.
#[derive(Default)]
pub(crate) struct Fleet {
    /// Before their readers are started, and after those have ended.
    pub(crate) sources: Vec<Box<dyn DeviceSource>>,
    traits: Vec<DeviceTraits>,
    chunk: u64,
    readers: Vec<ReaderThread>,
    /// The order that is being carried out, and by how many it was.
    order: Option<(Order, usize)>,
    saved: usize,
}

struct ReaderThread {
    desk: Arc<Desk>,
    thread: JoinHandle<()>,
    back: Receiver<Box<dyn DeviceSource>>,
}

impl Fleet {
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
        // Whatever comes of it, they go home in the end.
        self.sources = sources;
        let traits: Vec<_> = self.sources.iter().map(|source| source.traits()).collect();
        if traits.len() > DEVICES_MAX {
            return refuse(format!("{} are more than {DEVICES_MAX}", traits.len()));
        }
        for (index, device) in traits.iter().enumerate() {
            let name = &device.name;
            if name.is_empty() || name.len() > DEVICE_NAME_BYTES_MAX {
                return refuse(format!(
                    "the name `{name}` must have 1 to {DEVICE_NAME_BYTES_MAX} octets"
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
        depot: &Arc<Depot>,
        spawner: &dyn Spawner,
        notes: &Sender<Note>,
    ) -> Result<(), Fault> {
        // A set-up whose channels were lost held it, with or without readers.
        depot.outbox.hold(false);
        if !self.readers.is_empty() {
            // Begun again, for a destination that has nothing.
            for reader in &self.readers {
                // A window is more than none.
                let _ = reader.desk.grant(u32::MAX, window);
            }
            self.order(Order::PreCopy);
            return Ok(());
        }
        let desks: Vec<_> = (0..)
            .zip(&self.traits)
            .map(|(id, traits)| Arc::new(Desk::new(DeviceId::new(id), traits, window, self.chunk)))
            .collect();
        depot.outbox.open(desks.len());
        let _ = depot.desks.set(desks.clone());
        for (desk, source) in desks.into_iter().zip(std::mem::take(&mut self.sources)) {
            let (give, back) = crossbeam_channel::bounded(1);
            let reader = Reader {
                desk: Arc::clone(&desk),
                source,
                depot: Arc::clone(depot),
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
            let name = format!("mfd-dev{}", desk.id);
            let thread = spawner.spawn(&name, body).map_err(|source| Fault::System {
                step: "start a thread",
                source,
            })?;
            self.readers.push(ReaderThread { desk, thread, back });
        }
        self.order(Order::PreCopy);
        Ok(())
    }

    /// Gives an order to all.
    pub(crate) fn order(&mut self, order: Order) {
        self.order = Some((order, 0));
        for reader in &self.readers {
            reader.desk.order(order);
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
                let stops = matches!(self.order, Some((Order::Stop, _)));
                Ok((stops && self.saved == self.readers.len()).then_some(Event::DevicesSaved))
            }
            DeviceNote::Done { device, order } => {
                tracing::debug!(%device, ?order, "device");
                let Some((open, done)) = self.order.as_mut().filter(|(open, _)| *open == order)
                else {
                    return Ok(None);
                };
                *done += 1;
                if *done < self.readers.len() {
                    return Ok(None);
                }
                Ok(match open {
                    Order::Quiesce => Some(Event::DevicesQuiesced),
                    Order::Stop => Some(Event::DevicesStopped),
                    _ => None,
                })
            }
        }
    }

    /// No device announces anything any more: the guest is about to be paused. Gives those that are not acknowledged.
    pub(crate) fn close(&self) -> Vec<String> {
        for reader in &self.readers {
            reader.desk.lock().closed = true;
        }
        self.unacked()
    }

    /// The guest runs on after all.
    pub(crate) fn reopen(&self) {
        for reader in &self.readers {
            reader.desk.lock().closed = false;
        }
    }

    /// Names of those whose newest initial bytes are not acknowledged.
    pub(crate) fn unacked(&self) -> Vec<String> {
        let readers = self.readers.iter();
        let unacked = readers.filter(|reader| reader.desk.figures().is_unacked());
        unacked.map(|reader| reader.desk.name.clone()).collect()
    }

    /// What the devices would add to the downtime.
    pub(crate) fn outlook(&self, depot: &Depot) -> DeviceOutlook {
        let mut outlook = DeviceOutlook {
            stop_bytes: depot.outbox.octets(),
            ..DeviceOutlook::default()
        };
        for reader in &self.readers {
            let figures = reader.desk.figures();
            outlook.stop_bytes += figures.stop_bytes;
            let takes = |bytes: u64, time: Duration| {
                let share = figures.stop_bytes as f64 / bytes.max(1) as f64;
                Duration::try_from_secs_f64(time.as_secs_f64() * share).unwrap_or(Duration::MAX)
            };
            let load = takes(figures.loaded_bytes, figures.loaded_time);
            outlook.load = outlook.load.max(load);
            let read = takes(figures.read_bytes, figures.read_time);
            outlook.read = outlook.read.max(read);
            if figures.is_unacked() {
                outlook.unacked.push(reader.desk.name.clone());
            }
        }
        outlook
    }

    /// All devices stop, the one with most left is sent first.
    pub(crate) fn stop(&mut self, depot: &Depot) {
        let left: Vec<u64> = self
            .readers
            .iter()
            .map(|reader| reader.desk.figures().stop_bytes)
            .collect();
        depot
            .outbox
            .pause(|index| left.get(index).copied().unwrap_or(0));
        self.saved = 0;
        self.order(Order::Stop);
    }

    /// The channels are lost, and the migration is kept: what lanes carried waits in their ledgers, and nothing more goes out.
    pub(crate) fn suspend(&self, depot: &Depot) {
        depot.outbox.hold(true);
    }

    /// The switchover was broken off: every device runs again, and is read further, or anew. Gives those that could not.
    pub(crate) fn go_on(
        &mut self,
        _: &Reclaimed,
        depot: &Depot,
        patience: Duration,
    ) -> Vec<String> {
        self.suspend(depot);
        depot.outbox.go_on();
        self.reopen();
        self.lead_back([Order::Hold, Order::GoOn], patience)
    }

    /// The destination said what landed: items go out again, and it repeats what it said of the devices (SPEC: RESUME-12).
    pub(crate) fn landed(&self, depot: &Depot) {
        for reader in &self.readers {
            reader.desk.lock().repeats = true;
        }
        depot.outbox.hold(false);
    }

    /// For a destination that has nothing, while the guest runs here: all that was read of the devices is void.
    pub(crate) fn begin_anew(
        &mut self,
        depot: &Depot,
        epoch: u32,
        patience: Duration,
    ) -> Vec<String> {
        let broken = self.lead_back([Order::Back, Order::Run], patience);
        depot.outbox.clear();
        for reader in &self.readers {
            reader.desk.begin_anew(epoch);
        }
        broken
    }

    /// Brings every device back to running: first all to where none disturbs another, then on. What stays broken is reported.
    pub(crate) fn reclaim(&mut self, _: &Reclaimed, patience: Duration) -> Vec<String> {
        self.lead_back([Order::Back, Order::Run], patience)
    }

    /// Two orders, the second only when all have carried out the first. Gives the devices that do not run.
    fn lead_back(&mut self, orders: [Order; 2], patience: Duration) -> Vec<String> {
        for order in orders {
            self.order(order);
            for reader in &self.readers {
                if !reader.desk.wait_for(order, patience) {
                    reader.gone(patience);
                }
            }
        }
        self.readers
            .iter()
            .filter(|reader| {
                let state = reader.desk.figures().state;
                !state.is_some_and(|state| state.is_running() && !state.is_quiescent())
            })
            .map(|reader| reader.desk.name.clone())
            .collect()
    }

    /// Stops every device for good: the guest is gone, or may be.
    pub(crate) fn retire(&mut self, patience: Duration) {
        self.order(Order::Retire);
        for reader in &self.readers {
            if !reader.desk.wait_for(Order::Retire, patience) {
                reader.gone(patience);
            }
        }
    }

    /// The first device whose call has not returned for so long, or whose code panicked.
    pub(crate) fn stuck(&self, limit: Duration) -> Option<Fault> {
        self.readers.iter().find_map(|reader| reader.stuck(limit))
    }

    /// Ends the readers and takes the devices back, but for those whose own code does not return: their threads are left behind
    /// and end when it does, and the devices with them. `make_room` keeps the queue of notes from filling up.
    pub(crate) fn end(&mut self, patience: Duration, make_room: impl Fn()) {
        self.order(Order::End);
        for reader in std::mem::take(&mut self.readers) {
            while !reader.thread.is_finished() && reader.stuck(patience).is_none() {
                make_room();
            }
            if !reader.thread.is_finished() {
                reader.gone(patience);
                tracing::error!(device = %reader.desk.name, "a device is not given back: its code does not return");
                continue;
            }
            let back = reader.back.try_recv().ok();
            reader
                .desk
                .note(|figures| figures.given_back = back.is_some());
            self.sources.extend(back);
            let _ = reader.thread.join();
        }
    }
}

impl ReaderThread {
    /// Why nothing more is to be expected of its device, if that is so.
    fn stuck(&self, limit: Duration) -> Option<Fault> {
        let device = self.desk.name.clone();
        if let Some(Stuck { step, waited }) = self.desk.stuck(limit) {
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

    /// It did not carry an order out.
    fn gone(&self, limit: Duration) {
        let name = &self.desk.name;
        let why = self.stuck(limit).map_or_else(
            || format!("device {name} does not answer"),
            |fault| fault.to_string(),
        );
        tracing::error!(device = %name, %why, "where a device stands is not known");
        self.desk.note(|figures| {
            figures.state = None;
            figures.trouble.get_or_insert(why);
        });
    }
}
