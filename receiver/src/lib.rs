//! The destination side of a live migration: lands pages from many channels straight in guest memory, verifies them, and
//! takes the guest over.
//!
//! A VMM implements [`Vmm`] and starts a [`Reception`] with the listeners that the source will dial. The end is a [`Finished`]
//! with the [`Report`].
//!
//! ```text
//!   session.rs   the control plane as a machine without I/O     lane.rs   one data channel, likewise
//!   landing.rs   what is in memory: checks, digest, damage      driver/   threads, queues, sockets
//!   vmm.rs       what the embedder gives                        report.rs, progress.rs, error.rs  what the user sees
//! ```
//! The promise: the guest runs here only with everything landed, verified and loaded, and only after the source committed
//! (see [`vmm::Ownership`]). Whatever the peer sends costs bounded memory and time.
#![forbid(unsafe_code)]

mod bits;
mod blobs;
pub mod config;
pub mod device;
mod driver;
pub mod error;
mod landing;
pub mod lane;
pub mod progress;
pub mod report;
pub mod session;
#[cfg(feature = "vfio")]
pub mod vfio;
pub mod vmm;

pub use config::{Config, ConfigBuilder, ConfigError};
pub use device::{DeviceError, DeviceSink};
pub use driver::{Finished, Handle, OfferError, Parts, Reception};
pub use error::{Error, Fault};
pub use progress::Snapshot;
pub use report::{DamageReport, OutcomeKind, Report};
pub use vmm::{Blob, Ownership, Vmm, VmmError};
