//! What the source was told of the devices, and whether all of them are loaded.
//!
//! The rule it keeps: a device counts as loaded only with its newest stream. One that began anew has nothing until it was loaded
//! again (SPEC: DEVSTREAM-3).

use std::collections::BTreeMap;

use multifd_wire::frame::{Credit, Device, DeviceFlags, RawCredit, SwitchoverAck};
use multifd_wire::{DeviceId, Features, Kind, Misbehaved};

use super::config::Config;
use super::error::Fault;

/// The devices of one session.
#[derive(Debug)]
pub(super) struct Devices {
    /// The feature was agreed on.
    agreed: bool,
    table: Option<Vec<Device>>,
    /// Devices that have loaded everything, and how often each had begun anew before.
    loaded: BTreeMap<DeviceId, u32>,
    /// How often each stream began anew, going by what came.
    restarts: Vec<u32>,
    /// The newest acknowledgement of each.
    acks: BTreeMap<DeviceId, SwitchoverAck>,
    /// How far the source was told that it may send.
    granted: BTreeMap<DeviceId, u64>,
    window: u64,
}

impl Devices {
    pub(super) fn new(features: Features, window: u64) -> Self {
        Self {
            agreed: features.contains(Features::DEVICE_STATE),
            table: None,
            loaded: BTreeMap::new(),
            restarts: Vec::new(),
            acks: BTreeMap::new(),
            granted: BTreeMap::new(),
            window,
        }
    }

    pub(super) fn table(&self) -> Option<&[Device]> {
        self.table.as_deref()
    }

    /// A table came, for the first time or again. Gives false when it is not the one that came first.
    pub(super) fn take_table(
        &mut self,
        table: Vec<Device>,
        config: &Config,
    ) -> Result<bool, Fault> {
        // SPEC: FEAT-4
        if !table.is_empty() && !self.agreed {
            let kind = Kind::Devices;
            return Err(Misbehaved::Feature { kind }.into());
        }
        check_table(&table, config)?;
        let Some(first) = &self.table else {
            self.restarts = vec![0; table.len()];
            self.table = Some(table);
            return Ok(true);
        };
        // SPEC: RESUME-5. The same but for the estimates in it.
        let fixed = |device: &Device| Device {
            initial_bytes: 0,
            state_bytes: 0,
            ..*device
        };
        Ok(first.iter().map(fixed).eq(table.iter().map(fixed)))
    }

    /// Whether every device has loaded its newest stream.
    pub(super) fn all_loaded(&self) -> bool {
        let table = self.table.as_deref().unwrap_or_default();
        table.iter().zip(&self.restarts).all(|(device, restarts)| {
            self.loaded
                .get(&device.id)
                .is_some_and(|loaded| loaded >= restarts)
        })
    }

    pub(super) fn loaded_count(&self) -> usize {
        self.loaded.len()
    }

    pub(super) fn loaded(&mut self, device: DeviceId, restarts: u32) {
        self.loaded.insert(device, restarts);
    }

    pub(super) fn restarted(&mut self, device: DeviceId) {
        self.loaded.remove(&device);
    }

    pub(super) fn acknowledged(&mut self, ack: SwitchoverAck) {
        self.acks.insert(ack.device, ack);
    }

    pub(super) fn granted(&mut self, credit: Credit) {
        self.granted.insert(credit.device, credit.offset_max);
    }

    /// All lanes are at the end of a round: how often each stream had begun anew by then.
    pub(super) fn round_closed(&mut self, restarts: &[u32]) {
        // A device of which nothing is said counts as one that did not begin anew.
        for (known, newest) in self.restarts.iter_mut().zip(restarts) {
            *known = *newest;
        }
    }

    /// The switchover is void: a device that had everything begins anew, since the source's runs again (SPEC: RESUME-8).
    pub(super) fn suspend(&mut self) {
        self.loaded.clear();
    }

    /// Whether anything was said of one: then the source has begun its stream.
    pub(super) fn something_was_said(&self) -> bool {
        !self.granted.is_empty() || !self.acks.is_empty()
    }

    /// What was said of them on an old channel may be lost (SPEC: RESUME-12).
    pub(super) fn repeat(&self) -> (Vec<RawCredit>, Vec<SwitchoverAck>) {
        let table = self.table.as_deref().unwrap_or_default();
        let credit = |device: &Device| Credit {
            device: device.id,
            offset_max: self.granted.get(&device.id).copied().unwrap_or(self.window),
        };
        let credits = table.iter().map(credit).map(RawCredit::from).collect();
        (credits, self.acks.values().copied().collect())
    }
}

/// Refuses a table that is more than this side holds or can serve (SPEC: SETUP-3, DEVICE-3).
fn check_table(table: &[Device], config: &Config) -> Result<(), Fault> {
    let limit = |what, wanted, most| Err(Fault::Limit { what, wanted, most });
    let window = config.device_window_bytes();
    let wanted = window.saturating_mul(table.len() as u64);
    if wanted > config.device_bytes_max() {
        let what = "bytes for all devices' windows";
        return limit(what, wanted, config.device_bytes_max());
    }
    if let Some(device) = table.iter().find(|device| device.chunk_bytes_max > window) {
        let what = "bytes of a device's chunk";
        return limit(what, device.chunk_bytes_max, window);
    }
    let without = |device: &&Device| !device.flags.contains(DeviceFlags::P2P);
    if let Some(device) = table.iter().find(without).filter(|_| table.len() > 1) {
        return Err(Fault::Devices {
            text: format!(
                "{} has no P2P-quiescent state, so it can only be moved alone",
                device.name
            ),
        });
    }
    Ok(())
}
