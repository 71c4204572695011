//! The built-in guest on both sides of a migration, inside one process.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use multifd_guest::{BLOB_KIND, Config, Guest};
use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_transport::GuestMemory;
use multifd_wire::Layout;

/// Where an arriving guest is put.
#[derive(Clone, Debug, Default)]
pub struct Slot(Arc<Mutex<Option<Arc<Guest>>>>);

impl Slot {
    fn set(&self, guest: Option<Arc<Guest>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = guest;
    }

    /// The guest that arrived.
    ///
    /// # Errors
    /// If there is none.
    pub fn get(&self) -> Result<Arc<Guest>, rx::VmmError> {
        let guest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        guest
            .clone()
            .ok_or_else(|| rx::VmmError::new("there is no guest yet"))
    }
}

/// The built-in guest as the source's VMM.
#[derive(Debug)]
pub struct Leaving(pub Arc<Guest>);

impl tx::Vmm for Leaving {
    fn config(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        Ok(vec![blob(self.0.config_blob())])
    }

    fn throttle(&mut self, percent: u8) -> Result<tx::Throttled, tx::VmmError> {
        self.0.throttle(percent);
        Ok(tx::Throttled::Done)
    }

    fn pause(&mut self) -> Result<(), tx::VmmError> {
        self.0.pause().map_err(tx::VmmError::new)
    }

    fn save(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        Ok(vec![blob(self.0.save_state().map_err(tx::VmmError::new)?)])
    }

    fn resume(&mut self, _: tx::Reclaimed) -> Result<(), tx::VmmError> {
        self.0.run().map_err(tx::VmmError::new)
    }
}

fn blob(octets: Vec<u8>) -> tx::Blob {
    tx::Blob {
        kind: BLOB_KIND,
        version: 1,
        bytes: Bytes::from(octets),
    }
}

/// What to do with an arrived guest before it runs.
type BeforeRun = Box<dyn FnMut(&Guest) + Send>;

/// The built-in guest as the destination's VMM.
pub struct Arriving {
    slot: Slot,
    before_run: Option<BeforeRun>,
}

impl Arriving {
    /// A VMM that puts the guest into `slot`.
    #[must_use]
    pub fn new(slot: Slot) -> Self {
        Self {
            slot,
            before_run: None,
        }
    }

    /// Lets somebody look at the guest when all of it is here and it does not run yet.
    #[must_use]
    pub fn before_run(mut self, look: impl FnMut(&Guest) + Send + 'static) -> Self {
        self.before_run = Some(Box::new(look));
        self
    }
}

impl rx::Vmm for Arriving {
    fn prepare(&mut self, configs: Vec<rx::Blob>, _: &Layout) -> Result<GuestMemory, rx::VmmError> {
        let config = Config::from_blob(&only(&configs)?.bytes).map_err(rx::VmmError::new)?;
        let guest = Guest::create_empty(&config).map_err(rx::VmmError::new)?;
        let memory = guest.memory().to_channels();
        self.slot.set(Some(Arc::new(guest)));
        Ok(memory)
    }

    fn load(&mut self, states: Vec<rx::Blob>) -> Result<(), rx::VmmError> {
        let guest = self.slot.get()?;
        guest
            .load_state(&only(&states)?.bytes)
            .map_err(rx::VmmError::new)
    }

    fn resume(&mut self, _: rx::Ownership) -> Result<(), rx::VmmError> {
        let guest = self.slot.get()?;
        if let Some(look) = &mut self.before_run {
            look(&guest);
        }
        guest.run().map_err(rx::VmmError::new)
    }

    fn discard(&mut self) {
        self.slot.set(None);
    }
}

fn only(blobs: &[rx::Blob]) -> Result<&rx::Blob, rx::VmmError> {
    match blobs {
        [blob] if blob.kind == BLOB_KIND => Ok(blob),
        _ => Err(rx::VmmError::new("the built-in guest is one blob")),
    }
}
