//! The devices' loaders, and what they tell: watched and ended.

use std::time::Duration;

use multifd_session::destination::{DeviceEvent, Event};
use multifd_wire::frame::{Credit, DeviceLoaded, SwitchoverAck};

use super::Control;
use crate::driver::device::DeviceNote;
use crate::driver::vmm::Sinks;

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
        if let Some(fault) = self.devices.stuck(limit) {
            self.drive(Event::Failed(fault));
        }
    }

    /// Ends the loaders and takes their devices back; notes are read meanwhile so that none blocks on them.
    pub(super) fn take_devices_back(&mut self) -> Sinks {
        let limit = self.shared.config.device_deadline();
        self.devices.end(limit, || {
            if self.inbox.is_full() {
                let _ = self.inbox.try_recv();
            }
            std::thread::sleep(Duration::from_micros(200));
        })
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
