//! The devices at the source: one reader thread for each, and the queue from which lanes take what the readers put there.
//!
//! ```text
//!   control ── commands ──► reader of a device ── items ──► queue ──► whichever lane is free
//!      ▲                       │    ▲                                       │
//!      └─────── notes ─────────┘    └── credit, free buffers ◄── acknowledgements
//!
//!   set      all devices, as the control thread leads them       stream   what the threads share of one device
//!   table    all devices, as lanes see them, with the queue      thread   the reader      states  where it leads the device
//!                                                              stats    what the device did
//! ```
//! A reader numbers an item only when the credit reaches so far, so what is in the queue can be sent at once. The destination has
//! the same cut: `set`, `table`, `stream`, `thread`, `states`.

mod queue;
mod set;
mod states;
mod stats;
mod stream;
mod table;
mod thread;

use multifd_wire::DeviceId;

use crate::error::Fault;

pub(super) use set::DeviceSet;
pub(super) use stream::DeviceStream;
pub(super) use table::DeviceTable;

/// What the control thread wants of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DeviceCommand {
    /// Begin pre-copy, if it has it.
    PreCopy,
    /// Into the P2P-quiescent state, if it has one.
    Quiesce,
    /// Stand still, and be read to the end.
    Stop,
    /// The migration failed: back to where it runs, quiescent.
    Restore,
    /// Run.
    Run,
    /// The switchover was broken off, and another will follow: back to where it runs, quiescent, with its pre-copy if that stands.
    Hold,
    /// Run, and go on with pre-copy where it stands; otherwise begin the stream anew.
    Continue,
    /// The guest is gone: stand still for good.
    Retire,
    /// End: the reader gives its device back.
    End,
}

/// What a reader tells the control thread.
#[derive(Debug)]
pub(super) enum DeviceNote {
    /// A command was carried out.
    Done {
        device: DeviceId,
        command: DeviceCommand,
    },
    /// The device was read to its end.
    Saved { device: DeviceId },
    /// The device failed.
    Failed(Fault),
}
