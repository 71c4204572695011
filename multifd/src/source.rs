//! The source: the guest runs here, and leaves.
//!
//! ```text
//!   Parts ──Migration::start──► Migration ──wait──► Finished        the VMM comes back with its type, whatever happened
//!                 └── StartError: with the Parts                    handle(): progress, cancel      ended(): for an event loop
//! ```

use std::any::Any;
use std::os::fd::BorrowedFd;
use std::time::Instant;

pub use multifd_sender::device::{DeviceSource, DeviceTraits, PreCopyInfo, Read};
pub use multifd_sender::forecast::{Forecast, Interval, Outlook};
pub use multifd_sender::progress::{Reconnect, Snapshot, SourceProgress};
pub use multifd_sender::report::{
    DamageReport, DeviceDowntime, DeviceReport, Downtime, ErrorReport, ForecastReport,
    LimitsReport, OutcomeKind, Report, RoundReport, SourceReport, ThrottleReport,
};
#[cfg(feature = "vfio")]
pub use multifd_sender::vfio;
pub use multifd_sender::{
    AskTicket, CalledDialer, Config, ConfigBuilder, ConfigError, Dial, Dialer, DirtyScan, Error,
    Fault, Handle, Limits, Reclaimed, Sending, SpreadDialer, Steer, Throttled, Vmm, WhenAckLate,
    WhenDestinationLost, WhenNotConverging, ask,
};
pub use multifd_wire::frame::{GuestState, OutcomeState};

use crate::tracking::Source;
use crate::transport::{Channel, GuestMemory, Spawner};

/// Everything that a migration works on.
#[non_exhaustive]
pub struct Parts<V> {
    /// The machine.
    pub vmm: V,
    /// Its memory. Every writer of it is either stopped by [`Vmm::pause`] or seen by one of the sources.
    pub memory: GuestMemory,
    /// Who reports what was written. [`downcast`] gives them their types back.
    pub sources: Vec<Box<dyn Source>>,
    /// The way to the destination: a [`SpreadDialer`], or a closure that makes channels.
    pub dial: Box<dyn Dial>,
    /// The settings.
    pub config: Config,
    /// How threads are started; `None` starts plain ones.
    pub spawner: Option<Box<dyn Spawner>>,
}

impl<V: Vmm> Parts<V> {
    /// With default settings, plain threads, and no source of dirty pages yet.
    pub fn new(vmm: V, memory: GuestMemory, dial: impl Dial + 'static) -> Self {
        Self {
            vmm,
            memory,
            sources: Vec::new(),
            dial: Box::new(dial),
            config: Config::default(),
            spawner: None,
        }
    }

    /// One more source of dirty pages.
    #[must_use]
    pub fn source(mut self, source: impl Source) -> Self {
        self.sources.push(Box::new(source));
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

/// A way to the destination by a function that makes a channel, called again whenever one is to be replaced.
pub fn dial_by<F>(make: F) -> impl Dial
where
    F: Fn(
            crate::ChannelRef,
            Instant,
        ) -> Result<Box<dyn Channel>, Box<dyn std::error::Error + Send + Sync>>
        + Send
        + Sync,
{
    DialBy(make)
}

struct DialBy<F>(F);

impl<F> Dial for DialBy<F>
where
    F: Fn(
            crate::ChannelRef,
            Instant,
        ) -> Result<Box<dyn Channel>, Box<dyn std::error::Error + Send + Sync>>
        + Send
        + Sync,
{
    fn dial(
        &self,
        channel: crate::ChannelRef,
        deadline: Instant,
    ) -> Result<Box<dyn Channel>, Box<dyn std::error::Error + Send + Sync>> {
        (self.0)(channel, deadline)
    }
}

/// A migration under way.
pub struct Migration<V> {
    inner: multifd_sender::Migration,
    vmm: std::marker::PhantomData<fn() -> V>,
}

impl<V: Vmm> Migration<V> {
    /// Begins; returns once its control thread runs.
    ///
    /// # Errors
    /// What can be found wrong before anything is sent, with the parts: the guest was not touched, and they can be used again.
    pub fn start(parts: Parts<V>) -> Result<Self, Box<StartError<V>>> {
        let parts = multifd_sender::Parts {
            vmm: Box::new(parts.vmm),
            memory: parts.memory,
            sources: parts.sources,
            dial: parts.dial,
            config: parts.config,
            spawner: parts.spawner,
        };
        match multifd_sender::Migration::start(parts) {
            Ok(inner) => Ok(Self {
                inner,
                vmm: std::marker::PhantomData,
            }),
            Err(failed) => Err(Box::new(failed.map(|parts| Parts {
                vmm: ours(parts.vmm),
                memory: parts.memory,
                sources: parts.sources,
                dial: parts.dial,
                config: parts.config,
                spawner: parts.spawner,
            }))),
        }
    }

    /// For progress and cancellation, from any thread.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.inner.handle()
    }

    /// Whether [`wait`](Self::wait) would return at once.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.inner.is_finished()
    }

    /// An event descriptor that becomes readable, and stays so, when the migration is over: for `epoll`. It is not to be read.
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
            sources: finished.sources,
            devices: finished.devices,
        }
    }
}

/// What is left when a migration is over.
#[non_exhaustive]
pub struct Finished<V> {
    /// How it went.
    pub report: Report,
    /// Why it failed, if it did.
    pub error: Option<Error>,
    /// The machine. If it migrated it must not run again. `None` if its own code does not return: it is with the thread that called it,
    /// as are the sources and the devices.
    pub vmm: Option<V>,
    /// The sources, stopped, in their order. [`downcast`] gives them their types back.
    pub sources: Vec<Box<dyn Source>>,
    /// The devices; one whose own code panicked is missing. They run if the guest runs here.
    pub devices: Vec<Box<dyn DeviceSource>>,
}

/// A migration that could not begin, with everything that was to be part of it.
pub type StartError<V> = crate::StartError<Fault, Parts<V>>;

/// Gives a source, a device or a machine its type back.
///
/// # Errors
/// It is of another type; here it is again.
pub fn downcast<T: Any>(part: Box<dyn Any>) -> Result<T, Box<dyn Any>> {
    part.downcast().map(|part| *part)
}

/// The VMM that was handed over under its own type.
pub(crate) fn ours<V: Any>(vmm: Box<dyn Any>) -> V {
    match downcast(vmm) {
        Ok(vmm) => vmm,
        Err(_) => unreachable!("the library gives back the VMM that it was given"),
    }
}
