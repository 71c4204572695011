//! The devices as the lanes and the control channel's reader see them: their streams by number, and the queue of their items.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use multifd_wire::{DeviceId, Misbehaved};

use super::queue::ItemQueue;
use super::stream::DeviceStream;
use crate::device::stream::Item;

/// What lanes and the control channel's reader see of the devices.
pub(crate) struct DeviceTable {
    pub(crate) queue: ItemQueue,
    pub(super) streams: OnceLock<Vec<Arc<DeviceStream>>>,
}

impl DeviceTable {
    pub(crate) fn new() -> Self {
        Self {
            queue: ItemQueue::new(),
            streams: OnceLock::new(),
        }
    }

    pub(crate) fn streams(&self) -> &[Arc<DeviceStream>] {
        self.streams.get().map_or(&[], Vec::as_slice)
    }

    /// The destination speaks of a device.
    pub(crate) fn stream(&self, device: DeviceId) -> Result<&Arc<DeviceStream>, Misbehaved> {
        self.streams()
            .get(device.value() as usize)
            .ok_or(Misbehaved::UnknownDevice {
                device: device.value(),
            })
    }

    /// The destination has these: each comes here once, since it is acknowledged or sent again.
    pub(crate) fn arrived<'i>(&self, items: impl Iterator<Item = &'i Arc<Item>>) {
        for item in items {
            if let Ok(stream) = self.stream(item.device()) {
                stream.note(|stats| stats.arrived(item));
            }
        }
    }

    /// A lane handed an item to its channel.
    pub(crate) fn sent(&self, item: &Item) {
        if item.is_last()
            && let Ok(stream) = self.stream(item.device())
        {
            stream.note(|stats| stats.sent_at = Some(Instant::now()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // SPEC: CREDIT-1, SWACK-1, LOADED-1
    #[test]
    fn a_device_that_is_not_in_the_table_is_nobodys() {
        let table = DeviceTable::new();
        let unknown = |device| {
            let found = table.stream(DeviceId::new(device)).err();
            found == Some(Misbehaved::UnknownDevice { device })
        };
        assert!(unknown(0), "there is none yet");
        let stream = Arc::new(DeviceStream::sample());
        let _ = table.streams.set(vec![stream]);
        assert!(table.stream(DeviceId::new(0)).is_ok() && unknown(1));
    }
}
