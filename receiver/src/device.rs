//! What a device at the destination gives to a migration: its states, and a way in for its stream.
//!
//! Shaped by the VFIO migration interface, version 2 (`linux/vfio.h`), and free of it. The arcs between states are
//! [`DeviceState::may_become`], and nobody asks for another.
//!
//! ```text
//!   set_state … Resuming ─► write … write ─► load_config ─► set_state(Stop)       everything is in, and checked by the device
//!   after the commit: set_state(RunningP2p) on all devices, then set_state(Running)
//! ```
//! `device/` has what the destination does with it: the assembler of its stream, and the stream in which lanes hand it to the loader.
//! The mirror image at the source is `multifd_sender::device::DeviceSource`.

#[cfg(feature = "model")]
mod model;
#[cfg(test)]
mod shuttled;
pub(crate) mod stream;

use std::any::Any;

use multifd_wire::DeviceState;
use multifd_wire::frame::DeviceFlags;

pub use multifd_session::common::DeviceError;
pub use multifd_session::destination::assembler;

/// What [`stream`] waits with.
mod sync {
    pub(super) use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
}

/// A device at the destination, which takes in the state of the source's device of the same name.
///
/// Before the rounds and after the commit the calls come from the VMM's thread; in between from one thread of the device's own,
/// its loader, one at a time. What it is given comes from the peer: untrusted until the device has checked it.
pub trait DeviceSink: Any + Send {
    /// Its name: that of the source's device.
    fn name(&self) -> &str;

    /// What it can: of these only [`DeviceFlags::PRE_COPY`] and [`DeviceFlags::P2P`] matter here.
    fn flags(&self) -> DeviceFlags;

    /// What it is doing. A step that failed may have left it where it was, or in [`DeviceState::Error`].
    fn state(&self) -> DeviceState;

    /// Makes one step of the arc table. Out of [`DeviceState::Resuming`] into [`DeviceState::Stop`] it finishes taking the
    /// stream in, and checks it.
    ///
    /// # Errors
    /// The device could not, or what it was given is not sound; [`DeviceSink::state`] says where it is now.
    fn set_state(&mut self, to: DeviceState) -> Result<(), DeviceError>;

    /// Takes the next bytes of the stream, all of them, in [`DeviceState::Resuming`]. Borders between calls mean nothing.
    ///
    /// # Errors
    /// The device refuses them.
    fn write(&mut self, bytes: &[u8]) -> Result<(), DeviceError>;

    /// The end of the initial bytes was reached: they are to be loaded when this returns (SPEC: SWACK-1). Most devices load
    /// as they are written to and need nothing here.
    ///
    /// # Errors
    /// The device refuses them.
    fn initial_end(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Takes its configuration, once, after all of the stream, in [`DeviceState::Resuming`]. Not called when it is empty; refused
    /// by default.
    ///
    /// # Errors
    /// The device refuses it.
    fn load_config(&mut self, bytes: &[u8]) -> Result<(), DeviceError> {
        let text = format!(
            "{} has no configuration, and {} bytes of one came",
            self.name(),
            bytes.len()
        );
        Err(DeviceError::new(text))
    }

    /// Everything that it was given is void: the source's device runs again and will be read anew (SPEC: DEVSTREAM-3). It ends
    /// in [`DeviceState::Resuming`], empty; a device that cannot go back is reset and led there again.
    ///
    /// # Errors
    /// The device could not.
    fn restart(&mut self) -> Result<(), DeviceError>;
}
