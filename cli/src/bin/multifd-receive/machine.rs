//! The built-in guest as the destination's VMM.

use std::sync::{Arc, Mutex, PoisonError};

use multifd_guest::{Config, DEVICES_BLOB_KIND, DeviceConfig, Guest, ModelDevice};
use multifd_receiver::{Blob, DeviceSink, Ownership, Vmm, VmmError};
use multifd_transport::GuestMemory;
use multifd_wire::Layout;
use multifd_wire::frame::Device;

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
}

impl Machine {
    /// A machine for a guest that is put into `guest`; `hold`: where a test wants it to stand still.
    pub(crate) fn new(guest: GuestHandle, hold: Option<Hold>) -> Self {
        Self {
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
    fn prepare(&mut self, configs: Vec<Blob>, _: &Layout) -> Result<GuestMemory, VmmError> {
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
        if let Some(devices) = devices {
            self.devices = described(devices)?;
        }
        if blob.kind != multifd_guest::BLOB_KIND {
            return Err(VmmError::new(
                "the source does not send the built-in guest: use the destination of its own VMM",
            ));
        }
        let config = Config::from_blob(&blob.octets).map_err(VmmError::new)?;
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
            .load_state(&state.octets)
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

    fn discard(&mut self) {
        self.guest.set(None);
    }
}

/// The devices of the source's machine, a line each.
fn described(blob: &Blob) -> Result<Vec<DeviceConfig>, VmmError> {
    if blob.kind != DEVICES_BLOB_KIND {
        return Err(VmmError::new("the second blob does not describe devices"));
    }
    let text = std::str::from_utf8(&blob.octets).map_err(VmmError::new)?;
    text.lines()
        .map(|line| line.parse().map_err(VmmError::new))
        .collect()
}
