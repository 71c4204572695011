//! The built-in guest as the destination's VMM.

use std::sync::{Arc, Mutex, PoisonError};

use multifd_guest::{Config, DEVICES_BLOB_KIND, DeviceConfig, Guest, ModelDevice};
use multifd_receiver::{Blob, DeviceSink, Ownership, Vmm, VmmError};
use multifd_transport::GuestMemory;
use multifd_wire::frame::Device;
use multifd_wire::limits::DEVICES_MAX;
use multifd_wire::{Layout, PAGE_BYTES_U64};

use crate::hold::{Hold, Moment};

/// The guest, once there is one: shared with the program, which looks after it when the migration is over.
#[derive(Clone, Default)]
pub(crate) struct GuestHandle(Arc<Mutex<Option<Arc<Guest>>>>);

impl GuestHandle {
    /// The guest that was built.
    pub(crate) fn get(&self) -> Option<Arc<Guest>> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set(&self, guest: Option<Arc<Guest>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = guest;
    }
}

/// Builds the guest that the source describes.
pub(crate) struct Machine {
    guest: GuestHandle,
    devices: Vec<DeviceConfig>,
    hold: Option<Hold>,
    /// What guest and devices may need together.
    ceiling: u64,
}

impl Machine {
    /// A machine for a guest that is put into `guest`; `hold`: where a test wants it to stand still.
    pub(crate) fn new(guest: GuestHandle, hold: Option<Hold>, ceiling: u64) -> Self {
        Self {
            ceiling,
            guest,
            devices: Vec::new(),
            hold,
        }
    }

    fn reached(&mut self, moment: Moment) {
        if let Some(hold) = &mut self.hold {
            hold.reached(moment);
        }
    }

    fn guest(&self) -> Result<Arc<Guest>, VmmError> {
        self.guest
            .get()
            .ok_or_else(|| VmmError::new("there is no machine yet"))
    }
}

impl Vmm for Machine {
    fn prepare(&mut self, configs: Vec<Blob>, layout: &Layout) -> Result<GuestMemory, VmmError> {
        self.reached(Moment::Prepare);
        let (blob, devices) = match &configs[..] {
            [blob] => (blob, None),
            [blob, devices] => (blob, Some(devices)),
            _ => {
                return Err(VmmError::new(format!(
                    "{} configuration blobs, and the built-in guest has one, and one for its devices",
                    configs.len()
                )));
            }
        };
        self.devices = devices.map_or(Ok(Vec::new()), described)?;
        if blob.kind != multifd_guest::BLOB_KIND {
            return Err(VmmError::new(
                "the source does not send the built-in guest: use the destination of its own VMM",
            ));
        }
        let config = Config::from_blob(&blob.bytes).map_err(VmmError::new)?;
        // Before anything is built of it: the layout was checked against what is to be had, and the blob was not.
        let said = layout.pages_total().value().saturating_mul(PAGE_BYTES_U64);
        if config.memory_bytes != said {
            return Err(VmmError::new(format!(
                "the configuration is of a guest with {} bytes of memory, and the table of regions of one with {said}",
                config.memory_bytes
            )));
        }
        let sizes = self.devices.iter().map(DeviceConfig::bookkeeping_bytes);
        let wanted = sizes.fold(said, u64::saturating_add);
        if wanted > self.ceiling {
            return Err(VmmError::new(format!(
                "the guest and the state of its {} devices need {wanted} bytes of memory here, and {} are to be had",
                self.devices.len(),
                self.ceiling
            )));
        }
        let guest = Arc::new(Guest::create_empty(&config).map_err(VmmError::new)?);
        let memory = guest.memory().to_channels();
        self.guest.set(Some(guest));
        Ok(memory)
    }

    fn devices(&mut self, table: &[Device]) -> Result<Vec<Box<dyn DeviceSink>>, VmmError> {
        let make = |entry: &Device| {
            let config = self
                .devices
                .iter()
                .find(|config| config.name == entry.name.as_str())
                .ok_or_else(|| VmmError::new(format!("device {} is not described", entry.name)))?;
            let device = ModelDevice::new(config.clone()).map_err(VmmError::new)?;
            Ok(Box::new(device) as Box<dyn DeviceSink>)
        };
        table.iter().map(make).collect()
    }

    fn load(&mut self, states: Vec<Blob>) -> Result<(), VmmError> {
        self.reached(Moment::Load);
        let [state] = &states[..] else {
            return Err(VmmError::new(format!(
                "{} state blobs, and the built-in guest has one",
                states.len()
            )));
        };
        self.guest()?
            .load_state(&state.bytes)
            .map_err(VmmError::new)
    }

    fn resume(&mut self, _: Ownership) -> Result<(), VmmError> {
        self.reached(Moment::Resume);
        // Before it runs, so that a log without this line is the proof that it never did.
        tracing::info!("the guest is started here");
        self.guest()?.run().map_err(VmmError::new)?;
        self.reached(Moment::Running);
        Ok(())
    }

    fn take_over(&mut self, _: Ownership) -> Result<(), VmmError> {
        self.reached(Moment::Resume);
        tracing::info!("the guest is here, paused as it was at the source");
        self.reached(Moment::Running);
        Ok(())
    }

    fn discard(&mut self) {
        self.guest.set(None);
    }
}

/// The devices of the source's machine, a line each.
fn described(blob: &Blob) -> Result<Vec<DeviceConfig>, VmmError> {
    if blob.kind != DEVICES_BLOB_KIND {
        return Err(VmmError::new("the second blob does not describe devices"));
    }
    let text = std::str::from_utf8(&blob.bytes).map_err(VmmError::new)?;
    if text.lines().nth(DEVICES_MAX).is_some() {
        return Err(VmmError::new(format!(
            "more than {DEVICES_MAX} devices are described"
        )));
    }
    text.lines()
        .map(|line| DeviceConfig::from_peer(line).map_err(VmmError::new))
        .collect()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use multifd_guest::Tracking;
    use multifd_wire::{Region, RegionId};

    use super::*;

    const GUEST_BYTES: u64 = 64 << 20;

    fn blob(kind: u32, octets: impl Into<Bytes>) -> Blob {
        Blob {
            kind,
            version: 1,
            bytes: octets.into(),
        }
    }

    /// What comes of this description of devices, beside a small guest.
    fn prepared(devices: &str, memory_bytes: u64) -> Result<GuestMemory, VmmError> {
        let config = Config {
            memory_bytes: GUEST_BYTES,
            working_set_bytes: 1 << 20,
            vcpus: 1,
            tracking: Tracking::Marks,
            ..Config::default()
        };
        let guest = Guest::create_empty(&config).unwrap();
        let blobs = vec![
            blob(multifd_guest::BLOB_KIND, guest.config_blob()),
            blob(DEVICES_BLOB_KIND, devices.to_owned()),
        ];
        let region = Region {
            id: RegionId::new(0),
            guest_address: 0,
            bytes: memory_bytes,
        };
        let layout = Layout::new([region]).unwrap();
        let handle = GuestHandle::default();
        let result = Machine::new(handle.clone(), None, 1 << 30).prepare(blobs, &layout);
        assert_eq!(handle.get().is_some(), result.is_ok(), "nothing was built");
        result
    }

    #[test]
    fn no_number_of_a_peer_becomes_memory_beyond_the_ceiling() {
        let says = |devices: &str, memory_bytes| match prepared(devices, memory_bytes) {
            Ok(_) => "taken".to_owned(),
            Err(error) => error.to_string(),
        };
        assert_eq!(says("model:name=d0,size=1G", GUEST_BYTES), "taken");
        let small_blocks = says("model:name=d0,size=1024G,block=1K", GUEST_BYTES);
        assert!(small_blocks.contains("are to be had"), "{small_blocks}");
        let failure = says("model:name=d0,size=1M,fail=finish", GUEST_BYTES);
        assert!(failure.contains("only this side"), "{failure}");
        let many = says(&"model:size=4K\n".repeat(DEVICES_MAX + 1), GUEST_BYTES);
        assert!(many.contains("more than"), "{many}");
        let other = says("", GUEST_BYTES / 2);
        assert!(other.contains("table of regions"), "{other}");
    }
}
