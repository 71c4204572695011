//! The devices' loaders, and what they tell: started, watched and sent home.

use std::sync::Arc;
use std::time::Duration;

use multifd_session::destination::{DeviceEvent, Event, Incomplete};
use multifd_wire::frame::{Credit, Device, DeviceLoaded, SwitchoverAck};

use super::Control;
use crate::driver::Shared;
use crate::driver::device::{DeviceNote, Inventory, LoaderThread};
use crate::driver::vmm::Sinks;
use crate::error::Fault;

/// The devices of the machine.
#[derive(Default)]
pub(super) struct Devices {
    table: Vec<Device>,
    /// Where lanes leave what belongs to them; `None` if the feature was not agreed on.
    inventory: Option<Arc<Inventory>>,
    /// Those that are not with a loader or the VMM.
    sinks: Sinks,
    loaders: Vec<LoaderThread>,
    /// Names of those that stay with a thread that does not come back.
    pub(super) left: Vec<String>,
}

impl Devices {
    /// The table of the session; with the window of each if devices were agreed on.
    pub(super) fn announce(&mut self, table: &[Device], window: Option<u64>) {
        self.table = table.to_vec();
        self.inventory = window.map(|window| Arc::new(Inventory::new(table, window)));
    }

    pub(super) fn take(&mut self, sinks: Sinks) {
        self.sinks = sinks;
    }

    /// Starts the loaders; a resume finds them at work.
    pub(super) fn start(&mut self, shared: &Arc<Shared>) -> Result<Option<Arc<Inventory>>, Fault> {
        if let Some(inventory) = &self.inventory
            && self.loaders.is_empty()
        {
            let sinks = std::mem::take(&mut self.sinks);
            self.loaders = inventory.start(&self.table, sinks, shared)?;
        }
        Ok(self.inventory.clone())
    }

    pub(super) fn incomplete(&self) -> Option<Incomplete> {
        self.inventory.as_ref()?.incomplete()
    }

    pub(super) fn restarts(&self) -> Vec<u32> {
        let inventory = self.inventory.as_ref();
        inventory.map_or_else(Vec::new, |inventory| inventory.restarts())
    }

    pub(super) fn memory_landed(&self) {
        if let Some(inventory) = &self.inventory {
            inventory.memory_landed();
        }
    }

    pub(super) fn memory_moves_on(&self) {
        if let Some(inventory) = &self.inventory {
            inventory.memory_moves_on();
        }
    }

    /// Devices that are led somewhere together stay together with the one whose code does not return.
    pub(super) fn note_left(&mut self, fault: Option<&Fault>) {
        if let Some(Fault::DeviceStuck { .. }) = fault {
            let names = self
                .table
                .iter()
                .map(|device| device.name.as_str().to_owned());
            self.left.extend(names);
        }
    }
}

impl Control {
    pub(super) fn device(&mut self, note: DeviceNote) {
        let event = match note {
            DeviceNote::Credit { device, offset_max } => {
                DeviceEvent::Credit(Credit { device, offset_max })
            }
            DeviceNote::Arrived { device } => {
                tracing::debug!(%device, "all of its state is here");
                DeviceEvent::Arrived
            }
            DeviceNote::InitialLoaded {
                device,
                generation,
                bytes,
                took,
            } => DeviceEvent::InitialLoaded(SwitchoverAck {
                device,
                generation,
                bytes,
                load_us: micros(took),
            }),
            DeviceNote::Loaded(loaded) => {
                self.timeline.device_loaded(&loaded);
                DeviceEvent::Loaded {
                    loaded: DeviceLoaded {
                        device: loaded.device,
                        bytes: loaded.bytes,
                        load_us: micros(loaded.load),
                        config_us: micros(loaded.config),
                    },
                    restarts: loaded.restarts,
                }
            }
            DeviceNote::Restarted { device } => {
                self.timeline.device_restarted(device);
                DeviceEvent::Restarted(device)
            }
            DeviceNote::Failed(fault) => return self.drive(Event::Failed(fault)),
        };
        self.drive(Event::Device(event));
    }

    /// A device's own code may not return: then neither does its loader, and the migration ends without it.
    pub(super) fn watch_devices(&mut self) {
        let limit = self.shared.config.device_deadline();
        let loaders = &self.devices.loaders;
        if let Some(fault) = loaders.iter().find_map(|loader| loader.stuck(limit)) {
            self.drive(Event::Failed(fault));
        }
    }

    /// Ends the loaders and takes their devices back; notes are read meanwhile so that none blocks on them.
    pub(super) fn devices_home(&mut self) -> Sinks {
        let mut sinks = std::mem::take(&mut self.devices.sinks);
        if let Some(inventory) = &self.devices.inventory {
            inventory.end();
        }
        let patience = self.shared.config.device_deadline();
        for loader in std::mem::take(&mut self.devices.loaders) {
            let name = loader.name.clone();
            let home = loader.home(patience, || {
                if self.inbox.is_full() {
                    let _ = self.inbox.try_recv();
                }
                std::thread::sleep(Duration::from_micros(200));
            });
            if home.is_none() {
                tracing::error!(device = %name, "a device is not given back: its code does not return");
                self.devices.left.push(name);
            }
            sinks.extend(home);
        }
        sinks
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
