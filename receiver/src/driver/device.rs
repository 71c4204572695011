//! The devices at the destination: where lanes leave their items, and one loader thread for each.
//!
//! ```text
//!   lanes ── chunks, marks ──► stream of a device ── items, in order ──► its loader ──► the device
//!
//!   set      all devices, as the control thread has them       thread   the loader
//!   table    all devices, as lanes see them                    call     calls of a device's own code, which may not return
//!   states   where devices are led together
//! ```
//! Before the rounds and after the last byte the VMM's thread calls the devices. The source has the same cut: `set`, `table`, `thread`,
//! `states`, and the stream, which is in [`crate::device::stream`] since its lock is put to the test by a model.

mod call;
mod set;
mod states;
mod table;
mod thread;

use std::time::Duration;

use multifd_wire::{DeviceId, Generation};

use crate::error::Fault;
use crate::report::LoadedDevice;

pub(super) use call::with_all;
pub(super) use set::DeviceSet;
pub(super) use states::{open, start};
pub(super) use table::DeviceTable;

/// What a loader tells the control thread.
#[derive(Debug)]
pub(super) enum DeviceNote {
    /// The initial bytes of a generation are loaded.
    InitialLoaded {
        device: DeviceId,
        generation: Generation,
        bytes: u64,
        took: Duration,
    },
    /// The source may send up to here.
    Credit { device: DeviceId, offset_max: u64 },
    /// Everything of it is here, and not all is loaded.
    Arrived { device: DeviceId },
    /// Everything is loaded, and the device stands still.
    Loaded(LoadedDevice),
    /// What was loaded is void.
    Restarted { device: DeviceId },
    /// The device failed.
    Failed(Fault),
}
