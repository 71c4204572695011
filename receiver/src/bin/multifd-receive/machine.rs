//! The built-in guest as the destination's VMM.

use std::sync::{Arc, Mutex, PoisonError};

use multifd_guest::{Config, Guest};
use multifd_receiver::{Blob, Ownership, Vmm, VmmError};
use multifd_transport::GuestMemory;
use multifd_wire::Layout;

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
}

impl Machine {
    pub(crate) fn new(guest: GuestHandle) -> Self {
        Self { guest }
    }

    fn guest(&self) -> Result<Arc<Guest>, VmmError> {
        self.guest
            .get()
            .ok_or_else(|| VmmError::new("there is no machine yet"))
    }
}

impl Vmm for Machine {
    fn prepare(&mut self, configs: Vec<Blob>, _: &Layout) -> Result<GuestMemory, VmmError> {
        let [blob] = &configs[..] else {
            return Err(VmmError::new(format!(
                "{} configuration blobs, and the built-in guest has one",
                configs.len()
            )));
        };
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

    fn load(&mut self, states: Vec<Blob>) -> Result<(), VmmError> {
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
        // Before it runs, so that a log without this line is the proof that it never did.
        tracing::info!("the guest is started here");
        self.guest()?.run().map_err(VmmError::new)
    }

    fn discard(&mut self) {
        self.guest.set(None);
    }
}
