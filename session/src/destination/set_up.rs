//! The set-up: what was agreed on, the order of its frames, and that a source that comes back describes the same machine.
//!
//! ```text
//!   CONFIG …  ──►  REGIONS  ──►  DEVICES  ──►  SETUP_END          (SPEC: SETUP-1)
//! ```
//! The rule it keeps: the VMM is asked to build a machine once, from tables that agree with each other and with the bounds of this side;
//! a set-up that comes again has to be the same (SPEC: RESUME-5).

use std::time::Duration;

use multifd_wire::frame::{BlobPart, Device, Devices as DevicesFrame, Regions, SetupEnd};
use multifd_wire::{Features, Kind, Layout, Malformed, Misbehaved, PAGE_BYTES_U64};

use super::blobs::BlobAssembler;
use super::config::Config;
use super::devices::Devices;
use super::error::Fault;
use crate::common::Blob;

/// The features that this side offers to a session that is begun.
#[must_use]
pub fn offered(config: &Config) -> Features {
    let always = Features::DEVICE_STATE.union(Features::PAUSED);
    // SPEC: FEAT-5
    if config.suspend().is_zero() {
        always
    } else {
        always.union(Features::RESUME)
    }
}

/// What the VMM is to build.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) configs: Vec<Blob>,
    pub(super) layout: Layout,
    pub(super) devices: Vec<Device>,
}

/// What came of the set-up.
#[derive(Debug)]
pub(super) struct SetUp {
    /// Which tables came on this control channel.
    regions: bool,
    devices: bool,
    /// When SETUP_END came on it.
    end: Option<Duration>,
    configs: BlobAssembler,
    /// The memory, once it was described.
    layout: Option<Layout>,
    /// The configuration as it came first.
    first_configs: Option<Vec<Blob>>,
    /// The VMM has built the machine.
    machine: bool,
}

impl SetUp {
    pub(super) fn new(config: &Config) -> Self {
        Self {
            regions: false,
            devices: false,
            end: None,
            configs: BlobAssembler::new(Kind::Config, config.blob_bytes_max()),
            layout: None,
            first_configs: None,
            machine: false,
        }
    }

    /// A new control channel: everything comes again.
    pub(super) fn again(&mut self, config: &Config) {
        (self.regions, self.devices, self.end) = (false, false, None);
        self.configs = BlobAssembler::new(Kind::Config, config.blob_bytes_max());
    }

    pub(super) fn layout(&self) -> Option<&Layout> {
        self.layout.as_ref()
    }

    /// Whether SETUP_END came on this control channel, and the machine is built.
    pub(super) fn is_complete(&self) -> bool {
        self.end.is_some() && self.machine
    }

    pub(super) fn has_ended(&self) -> bool {
        self.end.is_some()
    }

    /// How many tables came on this control channel.
    #[cfg(test)]
    pub(super) fn tables(&self) -> usize {
        usize::from(self.regions) + usize::from(self.devices) + usize::from(self.has_ended())
    }

    #[cfg(test)]
    pub(super) fn has_machine(&self) -> bool {
        self.machine
    }

    /// How long ago SETUP_END came.
    pub(super) fn since_end(&self, now: Duration) -> Duration {
        now.saturating_sub(self.end.unwrap_or(now))
    }

    /// The VMM has built the machine. False if it was not asked to, or had done so before.
    pub(super) fn machine_ready(&mut self) -> bool {
        self.first_configs.is_some() && !std::mem::replace(&mut self.machine, true)
    }

    pub(super) fn config(&mut self, part: BlobPart, body: &[u8]) -> Result<(), Fault> {
        if self.regions {
            return Err(out_of_order(Kind::Config));
        }
        self.configs.part(part, body)
    }

    pub(super) fn regions(&mut self, regions: &Regions<'_>, config: &Config) -> Result<(), Fault> {
        if self.regions {
            return Err(out_of_order(Kind::Regions));
        }
        let layout = Layout::from_frame(regions).map_err(Malformed::from)?;
        self.regions = true;
        if let Some(first) = &self.layout {
            return same("a memory layout", *first == layout);
        }
        let wanted = layout.pages_total().value().saturating_mul(PAGE_BYTES_U64);
        if let Some(most) = config.memory_bytes_max().filter(|most| wanted > *most) {
            let what = "bytes of guest memory";
            return Err(Fault::Limit { what, wanted, most });
        }
        self.layout = Some(layout);
        Ok(())
    }

    pub(super) fn devices(
        &mut self,
        table: &DevicesFrame<'_>,
        devices: &mut Devices,
        config: &Config,
    ) -> Result<(), Fault> {
        if !self.regions || self.devices {
            return Err(out_of_order(Kind::Devices));
        }
        let table = table.iter().collect::<Result<Vec<_>, _>>()?;
        let is_same = devices.take_table(table, config)?;
        self.devices = true;
        same("a table of devices", is_same)
    }

    /// SETUP_END: the plan, if the VMM was not asked before.
    pub(super) fn end(
        &mut self,
        end: &SetupEnd,
        devices: &Devices,
        config: &Config,
        now: Duration,
    ) -> Result<Option<Plan>, Fault> {
        let tables = self.layout.as_ref().zip(devices.table());
        let Some((layout, table)) = tables.filter(|_| self.devices) else {
            return Err(out_of_order(Kind::SetupEnd));
        };
        if self.end.is_some() {
            let what = "SETUP_END".into();
            return Err(Fault::OutOfTurn { what });
        }
        // SPEC: SETUP-2
        let memory = layout.pages_total().value().saturating_mul(PAGE_BYTES_U64);
        let configs = u64::from(self.configs.count());
        agree("setup_end.configs", configs, end.configs.into())?;
        let regions = layout.regions().len() as u64;
        agree("setup_end.regions", regions, end.regions.into())?;
        agree("setup_end.devices", table.len() as u64, end.devices.into())?;
        agree("setup_end.memory_bytes", memory, end.memory_bytes)?;
        if end.lanes == 0 || end.lanes > config.lanes_max() {
            return Err(Misbehaved::Amount {
                field: "setup_end.lanes",
                expected: config.lanes_max().into(),
                found: end.lanes.into(),
            }
            .into());
        }
        let configs = self.configs.take(self.configs.count())?;
        self.end = Some(now);
        if let Some(first) = &self.first_configs {
            same("a configuration", *first == configs)?;
            return Ok(None);
        }
        self.first_configs = Some(configs.clone());
        Ok(Some(Plan {
            configs,
            layout: layout.clone(),
            devices: table.to_vec(),
        }))
    }
}

fn out_of_order(kind: Kind) -> Fault {
    Misbehaved::Order { kind }.into()
}

fn same(what: &'static str, is_same: bool) -> Result<(), Fault> {
    if is_same {
        Ok(())
    } else {
        Err(Fault::SetupChanged { what })
    }
}

fn agree(field: &'static str, expected: u64, found: u64) -> Result<(), Fault> {
    if expected == found {
        return Ok(());
    }
    Err(Misbehaved::Amount {
        field,
        expected,
        found,
    }
    .into())
}
