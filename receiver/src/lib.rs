//! The destination side of a live migration: lands pages from many channels straight in guest memory, verifies them, and
//! takes the guest over.
//!
//! A VMM implements [`Vmm`] and starts a [`Reception`] with the listeners that the source will dial. The end is a [`Finished`]
//! with the [`Report`].
//!
//! ```text
//!   session      the control plane as a machine without I/O     lane      one data channel, likewise
//!   prepared.rs  memory before the first page lands: room, zero
//!   landing.rs   what is in memory: checks, digest, damage      driver/   threads, queues, sockets
//!   vmm.rs       what the embedder gives                        report.rs, progress.rs  what the user sees
//! ```
//! The promise: the guest runs here only with everything landed, verified and loaded, and only after the source committed
//! (see [`vmm::Ownership`]). Whatever the peer sends costs bounded memory and time.
#![forbid(unsafe_code)]

mod bits;
mod ceiling;
pub mod device;
mod driver;
mod landing;
mod prepared;
pub mod progress;
pub mod report;
#[cfg(feature = "vfio")]
pub mod vfio;
pub mod vmm;

pub use multifd_session::destination::{config, error, lane, session};

pub use ceiling::memory_to_be_had;
pub use config::{AfterFailedSetup, Config, ConfigBuilder, ConfigError, Overcommit};
pub use device::{DeviceError, DeviceSink};
pub use driver::{Answered, Finished, Handle, OfferError, Parts, Reception, StartError, answer};
pub use error::{Error, Fault};
pub use multifd_wire::frame::OutcomeState;
pub use progress::Snapshot;
pub use report::{DamageReport, OutcomeKind, Report};
pub use vmm::{AskTicket, Blob, Ownership, Vmm, VmmError};
