//! The built-in guest as the source's VMM.

use std::sync::Arc;

use bytes::Bytes;
use multifd_guest::{DEVICES_BLOB_KIND, DeviceConfig, Guest, ModelDevice};
use multifd_sender::{
    AskTicket, Blob, DeviceSource, GuestState, Reclaimed, Throttled, Vmm, VmmError,
};

use crate::state_file::StateFile;

/// The encoding of the guest's blobs; the guest checks its own version inside.
const BLOB_VERSION: u32 = 1;

/// The guest that leaves. The program keeps a handle of its own, for what comes after.
pub(crate) struct Machine {
    pub(crate) guest: Arc<Guest>,
    pub(crate) devices: Vec<DeviceConfig>,
    pub(crate) state_file: Option<StateFile>,
    /// Whether its user has paused it.
    pub(crate) state: GuestState,
}

impl Vmm for Machine {
    fn config(&mut self) -> Result<Vec<Blob>, VmmError> {
        let mut blobs = vec![Blob {
            kind: multifd_guest::BLOB_KIND,
            version: BLOB_VERSION,
            bytes: Bytes::from(self.guest.config_blob()),
        }];
        if !self.devices.is_empty() {
            let lines: Vec<String> = self
                .devices
                .iter()
                .map(|device| device.for_peer().to_string())
                .collect();
            blobs.push(Blob {
                kind: DEVICES_BLOB_KIND,
                version: BLOB_VERSION,
                bytes: Bytes::from(lines.join("\n")),
            });
        }
        Ok(blobs)
    }

    fn guest(&mut self) -> GuestState {
        self.state
    }

    fn devices(&mut self) -> Result<Vec<Box<dyn DeviceSource>>, VmmError> {
        let make = |config: &DeviceConfig| {
            let device = ModelDevice::new(config.clone()).map_err(VmmError::new)?;
            Ok(Box::new(device) as Box<dyn DeviceSource>)
        };
        self.devices.iter().map(make).collect()
    }

    fn granted(&mut self, ticket: &AskTicket) -> Result<(), VmmError> {
        match &self.state_file {
            Some(file) => file
                .write(ticket)
                .map_err(|error| VmmError::new(format!("{error:#}"))),
            None => Ok(()),
        }
    }

    fn throttle(&mut self, percent: u8) -> Result<Throttled, VmmError> {
        self.guest.throttle(percent);
        Ok(Throttled::Done)
    }

    fn pause(&mut self) -> Result<(), VmmError> {
        tracing::info!("the guest is paused for the switchover");
        self.guest.pause().map_err(VmmError::new)
    }

    fn save(&mut self) -> Result<Vec<Blob>, VmmError> {
        let state = self.guest.save_state().map_err(VmmError::new)?;
        Ok(vec![Blob {
            kind: multifd_guest::BLOB_KIND,
            version: BLOB_VERSION,
            bytes: Bytes::from(state),
        }])
    }

    fn resume(&mut self, _: Reclaimed) -> Result<(), VmmError> {
        if self.state == GuestState::Paused {
            tracing::info!("the guest stays paused here");
            return Ok(());
        }
        tracing::info!("the guest runs on here");
        self.guest.run().map_err(VmmError::new)
    }
}
