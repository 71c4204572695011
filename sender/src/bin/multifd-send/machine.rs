//! The built-in guest as the source's VMM.

use std::sync::Arc;

use bytes::Bytes;
use multifd_guest::Guest;
use multifd_sender::{Blob, Reclaimed, Vmm, VmmError};

/// The encoding of the guest's blobs; the guest checks its own version inside.
const BLOB_VERSION: u32 = 1;

/// The guest that leaves. The program keeps a handle of its own, for what comes after.
pub(crate) struct Machine(pub(crate) Arc<Guest>);

impl Vmm for Machine {
    fn config(&mut self) -> Result<Vec<Blob>, VmmError> {
        Ok(vec![Blob {
            kind: multifd_guest::BLOB_KIND,
            version: BLOB_VERSION,
            octets: Bytes::from(self.0.config_blob()),
        }])
    }

    fn pause(&mut self) -> Result<(), VmmError> {
        tracing::info!("the guest is paused for the switchover");
        self.0.pause().map_err(VmmError::new)
    }

    fn save(&mut self) -> Result<Vec<Blob>, VmmError> {
        let state = self.0.save_state().map_err(VmmError::new)?;
        Ok(vec![Blob {
            kind: multifd_guest::BLOB_KIND,
            version: BLOB_VERSION,
            octets: Bytes::from(state),
        }])
    }

    fn resume(&mut self, _: Reclaimed) -> Result<(), VmmError> {
        tracing::info!("the guest runs on here");
        self.0.run().map_err(VmmError::new)
    }
}
