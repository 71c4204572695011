//! The source side of a live migration: shards a running guest's dirty pages over many channels, and switches over.
//!
//! A VMM implements [`Vmm`], hands over its [`GuestMemory`](multifd_transport::GuestMemory), its sources of dirty pages
//! ([`multifd_tracking::Source`]) and a way to dial the destination, and starts a [`Migration`]. Progress is read from a
//! [`Handle`] at any time; the end is a [`Finished`] with the [`Report`].
//!
//! ```text
//!   session       the control plane as a machine without I/O     lane      one data channel, likewise
//!   forecast      when will it end                               driver/   threads, queues, sockets
//!   vmm.rs        what the embedder gives                        report.rs, progress.rs  what the user sees
//! ```
//! The promise: whatever fails before the commit leaves the guest running here, and after it never (see [`vmm::Reclaimed`]).
#![forbid(unsafe_code)]

pub mod device;
mod driver;
pub mod progress;
pub mod report;
#[cfg(feature = "vfio")]
pub mod vfio;
pub mod vmm;

pub use multifd_session::source::ask::AskTicket;
pub use multifd_session::source::{config, error, forecast, lane, pacer, session, speed, steer};

pub use config::{
    Config, ConfigBuilder, ConfigError, DirtyScan, WhenAckLate, WhenDestinationLost,
    WhenNotConverging,
};
pub use device::{DeviceError, DeviceSource, DeviceTraits, PreCopyInfo, Read};
pub use driver::{
    CalledDialer, Dial, Dialer, Finished, Handle, Migration, Parts, SpreadDialer, StartError, ask,
};
pub use error::{Error, Fault};
pub use multifd_wire::frame::GuestState;
pub use progress::{Snapshot, SourceProgress};
pub use report::{DamageReport, OutcomeKind, Report};
pub use steer::{Limits, Sending, Steer};
pub use vmm::{Blob, Reclaimed, Throttled, Vmm, VmmError};
