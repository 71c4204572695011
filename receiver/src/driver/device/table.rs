//! The devices as the lanes see them: their streams by number, where each lane leaves what belongs to a device.
//!
//! What it must never do: keep a lane waiting for a device.

use std::sync::Arc;

use multifd_session::destination::Incomplete;
use multifd_transport::ReceiveHalf;
use multifd_wire::frame::{Device, DeviceChunk, DeviceMark};
use multifd_wire::{DeviceId, Header, Misbehaved};

use crate::device::assembler::{Assembler, Came};
use crate::device::stream::{Body, DeviceStream};
use crate::driver::link::{failed, skip_body};
use crate::error::Fault;

/// Where lanes leave what belongs to devices. Shared by all lanes.
pub(in crate::driver) struct DeviceTable {
    pub(super) streams: Vec<Arc<DeviceStream>>,
    names: Vec<String>,
}

impl DeviceTable {
    /// Streams of the devices of the table, each with a window of so many bytes.
    pub(in crate::driver) fn new(table: &[Device], window: u64) -> Self {
        let stream = |device: &Device| {
            let assembler = Assembler::new(device.id, device.chunk_bytes_max, window);
            Arc::new(DeviceStream::new(assembler, device.chunk_bytes_max, window))
        };
        let name = |device: &Device| device.name.as_str().to_owned();
        Self {
            streams: table.iter().map(stream).collect(),
            names: table.iter().map(name).collect(),
        }
    }

    fn stream(&self, device: DeviceId) -> Result<&DeviceStream, Misbehaved> {
        self.streams
            .get(device.value() as usize)
            .map(Arc::as_ref)
            .ok_or(Misbehaved::UnknownDevice {
                device: device.value(),
            })
    }

    /// A chunk's head came on a lane: reads its body to where it belongs.
    pub(in crate::driver) fn chunk(
        &self,
        rx: &mut dyn ReceiveHalf,
        chunk: &DeviceChunk,
        header: &Header,
    ) -> Result<Came, Fault> {
        let stream = self.stream(chunk.device)?;
        let named = |fault| self.named(chunk.device, fault);
        match stream
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
                    stream.give_up(chunk.index);
                    return Err(fault);
                }
                let arrived = stream.arrived(chunk.index, octets);
                arrived.map_err(|misbehaved| named(misbehaved.into()))
            }
        }
    }

    /// A mark came on a lane.
    pub(in crate::driver) fn mark(&self, mark: &DeviceMark) -> Result<Came, Fault> {
        let came = self.stream(mark.device)?.mark(mark);
        came.map_err(|fault| self.named(mark.device, fault))
    }

    /// A lane was lost: what it carried may come again.
    pub(in crate::driver) fn lane_lost(&self) {
        self.streams.iter().for_each(|stream| stream.lane_lost());
    }

    /// A device of whose stream items are missing, if there is one.
    pub(in crate::driver) fn incomplete(&self) -> Option<Incomplete> {
        let streams = (0..).zip(self.streams.iter().zip(&self.names));
        let mut missing = streams.filter_map(|(id, (stream, name))| {
            Some(Incomplete {
                device: DeviceId::new(id),
                name: name.clone(),
                index: stream.missing()?,
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
    pub(in crate::driver) fn memory_landed(&self) {
        self.streams
            .iter()
            .for_each(|stream| stream.memory_landed());
    }

    /// Nothing of the old channels can come any more: streams that are complete begin anew.
    pub(in crate::driver) fn break_off(&self) {
        self.streams.iter().for_each(|stream| stream.break_off());
    }

    /// The switchover was broken off.
    pub(in crate::driver) fn memory_moves_on(&self) {
        self.streams
            .iter()
            .for_each(|stream| stream.memory_moves_on());
    }

    /// How often each device's stream began anew, going by what came.
    pub(in crate::driver) fn restarts(&self) -> Vec<u32> {
        self.streams
            .iter()
            .map(|stream| stream.restarts())
            .collect()
    }

    /// Ends the loaders.
    pub(in crate::driver) fn end(&self) {
        self.streams.iter().for_each(|stream| stream.end());
    }
}
