//! The set-up: the order of its frames, and that it is the same again after a resume.

use multifd_wire::frame::{BlobPart, Device, Grant, Landed, LaneMark, Ready, SetupEnd};
use multifd_wire::{Features, Frame, Layout, Phase, Role};

use super::{Id, Kept, Onlooker, Stream, keep};

/// The blobs of a kind, part by part.
#[derive(Default)]
pub(super) struct Blobs {
    open: Option<BlobPart>,
    pub(super) count: u32,
}

impl Blobs {
    pub(super) fn part(&mut self, part: BlobPart) -> Kept {
        match self.open.take() {
            // SPEC: BLOB-2
            None => keep((part.part, part.index) == (0, self.count), "BLOB-2")?,
            // SPEC: BLOB-4
            Some(before) => {
                keep(part.part == before.part + 1, "BLOB-2")?;
                let same = BlobPart {
                    part: before.part,
                    ..part
                };
                keep(same == before, "BLOB-4")?;
            }
        }
        if part.is_last() {
            self.count += 1;
        } else {
            self.open = Some(part);
        }
        Ok(())
    }

    pub(super) fn is_whole(&self) -> bool {
        self.open.is_none()
    }
}

/// How far a set-up is.
#[derive(Default)]
pub(super) struct SetUp {
    was_granted: bool,
    configs: Blobs,
    /// CONFIG frames, REGIONS and DEVICES as they came, on this control channel and on the first.
    tables: Vec<Vec<u8>>,
    first: Vec<Vec<u8>>,
    regions: bool,
    devices: bool,
    pub(super) lanes: Option<u32>,
    is_ready: bool,
}

impl SetUp {
    /// On a new control channel.
    pub(super) fn again(&mut self) {
        let tables = std::mem::take(&mut self.tables);
        let first = std::mem::take(&mut self.first);
        *self = Self {
            first: if first.is_empty() { tables } else { first },
            ..Self::default()
        };
    }

    pub(super) fn is_resumed_and_ready(&self) -> bool {
        self.is_ready && !self.first.is_empty()
    }
}

impl Onlooker {
    pub(super) fn grant(&mut self, grant: Grant) -> Kept {
        // SPEC: SETUP-1
        keep(!self.set_up.was_granted, "SETUP-1")?;
        self.set_up.was_granted = true;
        // SPEC: FEAT-5
        let is_kept = self.features.contains(Features::RESUME);
        keep(is_kept || grant.suspend_ms == 0, "FEAT-5")?;
        if let Some(before) = self.grants.last() {
            // SPEC: GRANT-1, GRANT-5
            let renewed =
                before.ticket != grant.ticket && before.resume_secret == grant.resume_secret;
            keep(renewed, "GRANT-1")?;
            let ticket = grant.ticket;
            keep(grant == Grant { ticket, ..*before }, "GRANT-5")?;
        }
        self.grants.push(grant);
        Ok(())
    }

    pub(super) fn set_up_table(&mut self, frame: &Frame<'_>, table: &[u8]) -> Kept {
        let set_up = &mut self.set_up;
        keep(set_up.was_granted && set_up.lanes.is_none(), "SETUP-1")?;
        // SPEC: RESUME-5
        let due = set_up.first.get(set_up.tables.len());
        keep(due.is_none_or(|due| due == table), "RESUME-5")?;
        set_up.tables.push(table.to_vec());
        match frame {
            Frame::Config(config) => {
                keep(!set_up.regions, "SETUP-1")?;
                set_up.configs.part(config.blob)
            }
            Frame::Regions(regions) => {
                keep(!set_up.regions && set_up.configs.is_whole(), "SETUP-1")?;
                set_up.regions = true;
                self.layout = Some(Layout::from_frame(regions).unwrap());
                Ok(())
            }
            Frame::Devices(devices) => {
                keep(set_up.regions && !set_up.devices, "SETUP-1")?;
                set_up.devices = true;
                let table: Vec<Device> = devices.iter().map(Result::unwrap).collect();
                // SPEC: FEAT-4
                keep(self.has_devices() || table.is_empty(), "FEAT-4")?;
                let window = self.grants[0].device_window_bytes;
                // SPEC: DEVICE-3
                let fit = table.iter().all(|device| device.chunk_bytes_max <= window);
                keep(fit, "DEVICE-3")?;
                if !self.is_resumed {
                    self.devices = table
                        .into_iter()
                        .map(|device| Stream::new(device, window))
                        .collect();
                }
                Ok(())
            }
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn set_up_end(&mut self, end: &SetupEnd) -> Kept {
        let set_up = &mut self.set_up;
        keep(set_up.devices && set_up.lanes.is_none(), "SETUP-1")?;
        set_up.lanes = Some(end.lanes);
        let layout = self.layout.as_ref().unwrap();
        // SPEC: SETUP-2
        let agrees = end.configs == set_up.configs.count
            && end.regions as usize == layout.regions().len()
            && end.devices as usize == self.devices.len()
            && end.memory_bytes == layout.pages_total().value() * 4096
            && end.lanes <= self.grants[0].lanes_max;
        keep(agrees, "SETUP-2")
    }

    pub(super) fn ready(&mut self, ready: Ready) -> Kept {
        keep(
            self.set_up.lanes.is_some() && !self.set_up.is_ready,
            "SETUP-1",
        )?;
        self.set_up.is_ready = true;
        // SPEC: READY-1, RESUME-14
        let joined = u32::try_from(self.living().count()).unwrap();
        keep(ready.lanes == joined && joined > 0, "READY-1")?;
        if !self.is_resumed {
            keep(Some(joined) == self.set_up.lanes, "READY-1")?;
            self.both(Phase::Rounds);
        }
        Ok(())
    }

    pub(super) fn landed(&mut self, landed: &Landed<'_>) -> Kept {
        // SPEC: RESUME-6
        keep(self.set_up.is_resumed_and_ready(), "RESUME-6")?;
        // SPEC: LANDED-1
        keep(landed.rounds_closed == self.closed, "LANDED-1")?;
        let mut handled: Vec<(Id, u64)> = Vec::new();
        for (id, lane) in self.lanes.iter().filter(|(_, lane)| lane.read > 0) {
            handled.retain(|((lane, _), _)| *lane != id.0);
            handled.push((*id, lane.read as u64));
        }
        let says = |mark: LaneMark| ((mark.lane.value(), mark.incarnation.value()), mark.frames);
        keep(landed.iter().map(says).eq(handled), "LANDED-1")?;
        // SPEC: RESUME-7, RESUME-8
        self.memory.begin_again();
        self.paused.retain(|round, _| *round < self.closed);
        self.switchovers.clear();
        (self.states, self.last) = (Blobs::default(), None);
        self.set_phase(Role::Source, Phase::Rounds);
        self.set_phase(Role::Destination, Phase::Rounds);
        Ok(())
    }
}
