//! Which pages changed: one dirty set, and the sources that feed it.
//!
//! The [`DirtySet`] holds the pages whose newest content is not yet proven to be at the destination. A [`Round`] takes
//! what it held at one moment; whatever is not sent comes back to the set. [`Source`]s tell the set what was written:
//! the vCPUs through KVM ([`kvm`]), and everything else that writes a guest's memory.
//!
//! ```text
//!   kernel ──► Collected ──rearm──► Rearmed ──merge──► DirtySet ──take_round──► Round ──next_run──► Run ──► a lane
//!              (seen, must not       (a later write     ▲                         │
//!               be read yet)          is seen again)    └──── give_back ◄─────────┘ dropped, lane lost, cancelled
//! ```
//!
//! The rule that the types keep: **no page is read before the kernel was told to report the next write to it.** A page
//! read first and re-armed afterwards loses the write in between, and no later round would find it.
//!
//! The crate knows nothing of frames, sockets or sessions, and holds no guest memory: pages are numbers here.

mod collected;
#[cfg(feature = "conformance")]
pub mod conformance;
mod error;
#[cfg(any(test, feature = "fake-kernel"))]
pub mod fake;
// Each feature uses a part of it.
#[cfg_attr(not(all(feature = "kvm", feature = "vfio")), allow(dead_code))]
pub mod kernel;
#[cfg(feature = "kvm")]
pub mod kvm;
mod levels;
pub mod process;
mod round;
pub mod scan;
mod set;
mod source;
#[cfg(feature = "vfio")]
pub mod vfio;
pub mod vhost_log;
#[cfg(feature = "vm-memory")]
pub mod vm_memory;
mod vmm_writes;

pub use collected::{Collected, RearmFailed, Rearmed};
pub use error::Error;
pub use round::{Round, TakenPages, Unarmed};
pub use set::{DirtySet, LateRearm, SetFigures};
pub use source::{CollectPhase, Collection, Figures, Source};
pub use vmm_writes::{VmmMarker, VmmWrites};

/// The bytes of one page, of the set and of the wire, whatever the host's page size is.
pub const PAGE_BYTES: u64 = 4096;

/// Neighbouring pages of one region: `count` pages from page `first`.
///
/// `region` is the 0-based index of the region in the order in which the set was given its regions. `first` is a page
/// index inside that region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Run {
    /// Index of the region.
    pub region: u32,
    /// First page, counted from the region's start.
    pub first: u64,
    /// Number of pages; a run handed out by this crate is never empty.
    pub count: u64,
}
