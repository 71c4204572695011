//! All devices of a reception, as the control thread has them.

use std::sync::Arc;
use std::time::Duration;

use multifd_session::destination::Incomplete;
use multifd_wire::frame::Device;

use super::table::DeviceTable;
use super::thread::LoaderThread;
use crate::driver::Shared;
use crate::driver::vmm::Sinks;
use crate::error::Fault;

/// The devices of the machine.
#[derive(Default)]
pub(in crate::driver) struct DeviceSet {
    table: Vec<Device>,
    /// Where lanes leave what belongs to them; `None` if the feature was not agreed on.
    streams: Option<Arc<DeviceTable>>,
    /// Those that are not with a loader or the VMM.
    sinks: Sinks,
    loaders: Vec<LoaderThread>,
    /// Names of those that stay with a thread that does not come back.
    pub(in crate::driver) left: Vec<String>,
}

impl DeviceSet {
    /// The table of the session; with the window of each if devices were agreed on.
    pub(in crate::driver) fn announce(&mut self, table: &[Device], window: Option<u64>) {
        self.table = table.to_vec();
        self.streams = window.map(|window| Arc::new(DeviceTable::new(table, window)));
    }

    pub(in crate::driver) fn take(&mut self, sinks: Sinks) {
        self.sinks = sinks;
    }

    /// Starts the loaders; a resume finds them at work.
    pub(in crate::driver) fn start(
        &mut self,
        shared: &Arc<Shared>,
    ) -> Result<Option<Arc<DeviceTable>>, Fault> {
        if let Some(streams) = &self.streams
            && self.loaders.is_empty()
        {
            let sinks = std::mem::take(&mut self.sinks);
            self.loaders = LoaderThread::start_all(streams, &self.table, sinks, shared)?;
        }
        Ok(self.streams.clone())
    }

    pub(in crate::driver) fn incomplete(&self) -> Option<Incomplete> {
        self.streams.as_ref()?.incomplete()
    }

    pub(in crate::driver) fn restarts(&self) -> Vec<u32> {
        let streams = self.streams.as_ref();
        streams.map_or_else(Vec::new, |streams| streams.restarts())
    }

    pub(in crate::driver) fn memory_landed(&self) {
        if let Some(streams) = &self.streams {
            streams.memory_landed();
        }
    }

    pub(in crate::driver) fn break_off(&self) {
        if let Some(streams) = &self.streams {
            streams.break_off();
        }
    }

    pub(in crate::driver) fn memory_moves_on(&self) {
        if let Some(streams) = &self.streams {
            streams.memory_moves_on();
        }
    }

    /// Devices that are led somewhere together stay together with the one whose code does not return.
    pub(in crate::driver) fn note_left(&mut self, fault: Option<&Fault>) {
        if let Some(Fault::DeviceStuck { .. }) = fault {
            let names = self
                .table
                .iter()
                .map(|device| device.name.as_str().to_owned());
            self.left.extend(names);
        }
    }

    /// The first call of a device's own code that has not returned for so long.
    pub(in crate::driver) fn stuck(&self, limit: Duration) -> Option<Fault> {
        self.loaders.iter().find_map(|loader| loader.stuck(limit))
    }

    /// Ends the loaders and gives the devices back, but for those whose own code does not return. Meanwhile the queue of notes must
    /// not stay full: `make_room`.
    pub(in crate::driver) fn end(&mut self, limit: Duration, make_room: impl Fn()) -> Sinks {
        let mut sinks = std::mem::take(&mut self.sinks);
        if let Some(streams) = &self.streams {
            streams.end();
        }
        for loader in std::mem::take(&mut self.loaders) {
            let name = loader.name.clone();
            let back = loader.join(limit, &make_room);
            if back.is_none() {
                tracing::error!(device = %name, "a device is not given back: its code does not return");
                self.left.push(name);
            }
            sinks.extend(back);
        }
        sinks
    }
}
