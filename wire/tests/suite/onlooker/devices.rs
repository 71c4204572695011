//! The devices' streams: indices, offsets, generations and credit, whatever order the lanes bring items in.

use std::collections::BTreeMap;

use multifd_wire::frame::{
    Credit, Device, DeviceFlags, DeviceLoaded, Mark, Section, SwitchoverAck,
};
use multifd_wire::{DeviceId, Frame};

use super::{Id, Kept, Onlooker, keep};

#[derive(Clone, PartialEq)]
enum What {
    Chunk(Section, Vec<u8>),
    Mark(Mark, u32),
}

/// An item, and the lane that carried it last.
struct Item {
    offset: u64,
    what: What,
    lane: Id,
}

pub(super) struct Stream {
    device: Device,
    items: BTreeMap<u64, Item>,
    credit: u64,
    acked: u32,
}

/// What is known of a stream up to its first gap.
#[derive(Default)]
struct Read {
    offset: u64,
    generation: u32,
    in_configuration: bool,
    is_complete: bool,
}

impl Stream {
    pub(super) fn new(device: Device, window: u64) -> Self {
        Self {
            device,
            items: BTreeMap::new(),
            credit: window,
            acked: 0,
        }
    }

    fn wants(&self, flag: DeviceFlags) -> bool {
        self.device.flags.contains(flag)
    }

    /// Reads the stream to its first gap.
    fn read(&self) -> Kept<Read> {
        let mut read = Read::default();
        for ((index, item), due) in self.items.iter().zip(0..) {
            if *index != due {
                break;
            }
            // SPEC: DEVSTREAM-2, DEVSTREAM-3
            let rule = match item.what {
                What::Chunk(..) => "DEVSTREAM-2",
                What::Mark(..) => "DEVSTREAM-3",
            };
            keep(item.offset == read.offset, rule)?;
            let of_turn = match &item.what {
                What::Chunk(section, octets) => {
                    read.offset += octets.len() as u64;
                    read.in_configuration == (*section == Section::Config) && !read.is_complete
                }
                What::Mark(Mark::Restart, _) => {
                    (read.in_configuration, read.is_complete) = (false, false);
                    true
                }
                What::Mark(Mark::ConfigEnd, _) => {
                    let of_turn = read.in_configuration && !read.is_complete;
                    read.is_complete = true;
                    of_turn
                }
                What::Mark(mark, _) => {
                    let of_turn = !read.in_configuration;
                    read.in_configuration = *mark == Mark::DataEnd;
                    of_turn
                }
            };
            keep(of_turn, "DEVSTREAM-3")?;
            // SPEC: DEVSTREAM-4
            if let What::Mark(mark, generation) = &item.what {
                read.generation += u32::from(*mark == Mark::InitialEnd);
                keep(*generation == read.generation, "DEVSTREAM-4")?;
            }
        }
        Ok(read)
    }

    pub(super) fn is_complete(&self) -> bool {
        let to_the_end = |read: Read| read.is_complete && self.items.len() as u64 > 0;
        let contiguous = self.items.keys().copied().eq(0..self.items.len() as u64);
        contiguous && self.read().is_ok_and(to_the_end)
    }

    /// Whether it waits for an acknowledgement of its initial bytes (SPEC: SWACK-2).
    pub(super) fn lacks_ack(&self) -> bool {
        let newest = self.read().map_or(0, |read| read.generation);
        self.wants(DeviceFlags::SWITCHOVER_ACK) && (newest == 0 || self.acked != newest)
    }
}

impl Onlooker {
    fn stream(&mut self, device: DeviceId, rule: &'static str) -> Kept<&mut Stream> {
        self.devices.get_mut(device.value() as usize).ok_or(rule)
    }

    pub(super) fn item(&mut self, lane: Id, frame: &Frame<'_>, body: &[u8]) -> Kept {
        let (device, index, offset, what) = match frame {
            Frame::DeviceChunk(chunk) => {
                let what = What::Chunk(chunk.section, body.to_vec());
                (chunk.device, chunk.index, chunk.offset, what)
            }
            Frame::DeviceMark(mark) => {
                let what = What::Mark(mark.mark, mark.generation.value());
                (mark.device, mark.index, mark.offset, what)
            }
            other => panic!("{other:?}"),
        };
        let rule = match what {
            What::Chunk(..) => "DEVSTREAM-2",
            What::Mark(..) => "DEVSTREAM-3",
        };
        let carried = self
            .stream(device, rule)?
            .items
            .get(&index)
            .map(|item| (item.lane, item.what == what));
        // SPEC: DEVSTREAM-1
        if let Some((before, is_same)) = carried {
            keep(is_same && !self.is_living(before), "DEVSTREAM-1")?;
        }
        let stream = self.stream(device, rule)?;
        let bytes = body.len() as u64;
        keep(bytes <= stream.device.chunk_bytes_max, "DEVSTREAM-2")?;
        // SPEC: CREDIT-3
        let fits = bytes == 0 || offset + bytes <= stream.credit;
        keep(fits, "CREDIT-3")?;
        // SPEC: DEVSTREAM-10
        let initial = matches!(what, What::Mark(Mark::InitialEnd, _));
        keep(
            !initial || stream.wants(DeviceFlags::PRE_COPY),
            "DEVSTREAM-10",
        )?;
        let item = Item { offset, what, lane };
        stream.items.insert(index, item);
        stream.read().map(drop)
    }

    pub(super) fn credit(&mut self, credit: Credit) -> Kept {
        // SPEC: CREDIT-1, CREDIT-2
        let stream = self.stream(credit.device, "CREDIT-1")?;
        keep(credit.offset_max >= stream.credit, "CREDIT-2")?;
        stream.credit = credit.offset_max;
        Ok(())
    }

    pub(super) fn switchover_ack(&mut self, ack: SwitchoverAck) -> Kept {
        // SPEC: SWACK-1
        let stream = self.stream(ack.device, "SWACK-1")?;
        let announced = stream.read()?.generation;
        let generation = ack.generation.value();
        let is_new = generation > stream.acked && generation <= announced;
        keep(is_new, "SWACK-1")?;
        stream.acked = generation;
        Ok(())
    }

    pub(super) fn device_loaded(&mut self, loaded: DeviceLoaded) -> Kept {
        // SPEC: LOADED-1
        let stream = self.stream(loaded.device, "LOADED-1")?;
        keep(stream.is_complete(), "LOADED-1")
    }
}
