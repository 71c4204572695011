//! The destination: the guest arrives here.
//!
//! ```text
//!   Parts ──Reception::start──► Reception ──wait──► Finished        the VMM comes back with its type, whatever happened
//!                 └── StartError: with the VMM                      handle(): progress, offer a channel, cancel
//! ```

use std::os::fd::BorrowedFd;

pub use multifd_receiver::device::DeviceSink;
pub use multifd_receiver::progress::Snapshot;
pub use multifd_receiver::report::{DamageReport, DeviceReport, ErrorReport, OutcomeKind, Report};
#[cfg(feature = "vfio")]
pub use multifd_receiver::vfio;
pub use multifd_receiver::{
    AfterFailedSetup, Answered, AskTicket, Config, ConfigBuilder, ConfigError, Error, Fault,
    Handle, OfferError, OutcomeState, Overcommit, Ownership, Vmm, answer,
};

pub use multifd_wire::frame::GuestState;

use crate::source::ours;
use crate::transport::{Listener, Spawner};

/// Everything that a reception works on.
#[non_exhaustive]
pub struct Parts<V> {
    /// The machine.
    pub vmm: V,
    /// Where the source dials. May be empty if every channel is handed over by [`Handle::offer`].
    pub listeners: Vec<Listener>,
    /// The settings.
    pub config: Config,
    /// How threads are started; `None` starts plain ones.
    pub spawner: Option<Box<dyn Spawner>>,
}

impl<V: Vmm> Parts<V> {
    /// With default settings, plain threads, and no listener yet.
    pub fn new(vmm: V) -> Self {
        Self {
            vmm,
            listeners: Vec::new(),
            config: Config::default(),
            spawner: None,
        }
    }

    /// One more place where the source can dial.
    #[must_use]
    pub fn listener(mut self, listener: Listener) -> Self {
        self.listeners.push(listener);
        self
    }

    /// With these settings.
    #[must_use]
    pub fn config(mut self, config: Config) -> Self {
        self.config = config;
        self
    }

    /// With threads started by this.
    #[must_use]
    pub fn spawner(mut self, spawner: impl Spawner + 'static) -> Self {
        self.spawner = Some(Box::new(spawner));
        self
    }
}

/// A destination that waits for a migration, or has one under way.
pub struct Reception<V> {
    inner: multifd_receiver::Reception,
    vmm: std::marker::PhantomData<fn() -> V>,
}

impl<V: Vmm> Reception<V> {
    /// Begins to wait for a source.
    ///
    /// # Errors
    /// No thread or no event queue could be had. The VMM comes back; listeners are closed.
    pub fn start(parts: Parts<V>) -> Result<Self, Box<StartError<V>>> {
        let parts = multifd_receiver::Parts {
            vmm: Box::new(parts.vmm),
            listeners: parts.listeners,
            config: parts.config,
            spawner: parts.spawner,
        };
        match multifd_receiver::Reception::start(parts) {
            Ok(inner) => Ok(Self {
                inner,
                vmm: std::marker::PhantomData,
            }),
            Err(failed) => Err(Box::new(failed.map(|vmm| ours(vmm)))),
        }
    }

    /// For progress, connections and cancellation, from any thread.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.inner.handle()
    }

    /// Whether [`wait`](Self::wait) would return at once.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.inner.is_finished()
    }

    /// An event descriptor that becomes readable, and stays so, when the reception is over: for `epoll`. It is not to be read.
    #[must_use]
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.inner.ended()
    }

    /// Waits for the end.
    ///
    /// # Panics
    /// If the control thread panicked, which is a bug; with the same words.
    #[must_use]
    pub fn wait(self) -> Finished<V> {
        let finished = self.inner.wait();
        Finished {
            report: finished.report,
            error: finished.error,
            vmm: finished.vmm.map(|vmm| ours(vmm)),
            devices: finished.devices,
        }
    }
}

/// What is left when a reception is over.
#[non_exhaustive]
pub struct Finished<V> {
    /// How it went.
    pub report: Report,
    /// Why it failed, if it did.
    pub error: Option<Error>,
    /// The machine. It runs if, and only if, the report says so. `None` if its thread did not come back within the device deadline
    /// of the end: it is left alone then.
    pub vmm: Option<V>,
    /// Its devices, in the order of the table; one whose own code panicked is missing. They run if the machine does.
    pub devices: Vec<Box<dyn DeviceSink>>,
}

/// A reception that could not begin, with the machine, untouched.
pub type StartError<V> = crate::StartError<Fault, V>;
