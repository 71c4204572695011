//! Carries the migration of an unmodified machine monitor (QEMU, Cloud Hypervisor) over multifd's channels.
//!
//! ```text
//!   source host                                                              destination host
//!   QEMU ── any number of connections ──> Source ══ lanes, sums, resume ══> Destination ──> QEMU -incoming
//!        <── return path ───────────────         ═══════════════════════                <──
//! ```
//!
//! [`source::run`] listens where the monitor is told to migrate to; [`destination::run`] connects to the one that waits. Neither monitor knows
//! of it. SPEC.md section 22 is what they say to each other.
//!
//! What it keeps, beside every byte in its place:
//! - A link that dies is dialled again, and nothing is lost that a monitor was told is sent.
//! - What is held between the monitors is a small time of the link's rate, so that their own estimates of downtime hold.
//! - The guest is never run twice by what the bridge does: from the moment at which the destination may run it, the source's monitor hears
//!   nothing but the outcome.
#![forbid(unsafe_code)]

#[cfg(feature = "cli")]
pub mod cli;
mod config;
pub mod destination;
mod driver;
pub mod keeper;
pub mod machine;
mod monitor;
pub mod piece;
mod report;
pub mod source;
pub mod tap;

pub use config::Config;
pub use monitor::MonitorAddress;
pub use report::{Ended, Report};
