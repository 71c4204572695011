//! What a device at the source gives to a migration: its states, its stream, and what it knows about both.
//!
//! Shaped by the VFIO migration interface, version 2 (`linux/vfio.h`), and free of it: a device of the VMM's own implements the
//! same trait. The arcs between states are [`DeviceState::may_become`], and nobody asks for another.
//!
//! ```text
//!   pre_copy_info ─► read … read ─► (initial bytes out) ─► read as it gets dirty …        Running ► PreCopy
//!   set_state(PreCopyP2p) on all devices, then set_state(StopCopy) ─► read … End ─► config
//!   back, if it failed: set_state(RunningP2p) on all devices, then set_state(Running)
//! ```
//! `device/` has what the source does with it: the machine of its stream.
//! The mirror image at the destination is `multifd_receiver::device::DeviceSink`.

#[cfg(feature = "model")]
mod model;

use std::any::Any;

use bytes::Bytes;
use multifd_wire::DeviceState;
use multifd_wire::frame::DeviceFlags;

pub use multifd_session::common::DeviceError;
pub use multifd_session::source::stream;

/// What a device is and wants, fixed for a migration. It becomes the device's entry in the table of DEVICES.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceTraits {
    /// Its name, 1 to `wire::limits::DEVICE_NAME_BYTES_MAX` bytes, of no other device: the destination finds its own by it.
    pub name: String,
    /// What it can and wants (SPEC: DEVICES).
    pub flags: DeviceFlags,
    /// Estimate of its initial bytes; 0 without [`DeviceFlags::PRE_COPY`].
    pub initial_bytes: u64,
    /// Estimate of its whole state, in bytes.
    pub state_bytes: u64,
}

impl DeviceTraits {
    /// A device of this name that can do nothing but be stopped, and of whose size nothing is known.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            flags: DeviceFlags::NONE,
            initial_bytes: 0,
            state_bytes: 0,
        }
    }

    /// What it can and wants.
    #[must_use]
    pub fn with_flags(self, flags: DeviceFlags) -> Self {
        Self { flags, ..self }
    }

    /// An estimate of its initial bytes.
    #[must_use]
    pub fn with_initial_bytes(self, initial_bytes: u64) -> Self {
        Self {
            initial_bytes,
            ..self
        }
    }

    /// An estimate of its whole state.
    #[must_use]
    pub fn with_state_bytes(self, state_bytes: u64) -> Self {
        Self {
            state_bytes,
            ..self
        }
    }
}

/// What a device in a pre-copy state has to give. Source: `struct vfio_precopy_info`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct PreCopyInfo {
    /// Bytes left of the initial bytes. They come first out of [`DeviceSource::read`], before any other.
    pub initial_bytes: u64,
    /// Estimate of the bytes that changed since they were read, beyond the initial ones.
    pub dirty_bytes: u64,
    /// The device has announced new initial bytes since the last call (`VFIO_PRECOPY_INFO_REINIT`, with the second version of
    /// the pre-copy information): `initial_bytes` are of a new generation, and what was dirty is among them.
    pub reinit: bool,
}

impl PreCopyInfo {
    /// So many initial bytes are left, and so many changed; none of them are of a new generation.
    #[must_use]
    pub fn new(initial_bytes: u64, dirty_bytes: u64) -> Self {
        Self {
            initial_bytes,
            dirty_bytes,
            reinit: false,
        }
    }

    /// The initial bytes are of a new generation.
    #[must_use]
    pub fn with_reinit(self) -> Self {
        Self {
            reinit: true,
            ..self
        }
    }
}

/// What came of a [`DeviceSource::read`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// So many bytes of the stream, at least 1, at the start of the buffer.
    Bytes(usize),
    /// In a pre-copy state: nothing now, but there may be later (`ENOMSG`).
    NothingNow,
    /// In [`DeviceState::StopCopy`]: the stream has ended.
    End,
}

/// A device at the source.
///
/// All calls come from one thread of the device's own, its reader, one at a time; devices do not wait for one another
/// there. A call may block as long as the device needs, but the migration can neither go on nor give up meanwhile.
pub trait DeviceSource: Any + Send {
    /// What it is. Always the same.
    fn traits(&self) -> DeviceTraits;

    /// What it is doing. A step that failed may have left it where it was, or in [`DeviceState::Error`].
    fn state(&self) -> DeviceState;

    /// Makes one step of the arc table. Into a pre-copy state or [`DeviceState::StopCopy`] it begins or goes on with the
    /// stream; leaving them for another ends the stream.
    ///
    /// # Errors
    /// The device could not; [`DeviceSource::state`] says where it is now.
    fn set_state(&mut self, to: DeviceState) -> Result<(), DeviceError>;

    /// What there is to read, in a pre-copy state. Nothing is there by default: a device without pre-copy is not asked.
    ///
    /// # Errors
    /// The device could not say.
    fn pre_copy_info(&mut self) -> Result<PreCopyInfo, DeviceError> {
        Ok(PreCopyInfo::default())
    }

    /// The next bytes of the stream, in a pre-copy state or [`DeviceState::StopCopy`]. It may give fewer than there is
    /// room for.
    ///
    /// # Errors
    /// The device could not; nothing was read.
    fn read(&mut self, into: &mut [u8]) -> Result<Read, DeviceError>;

    /// Estimate of the bytes that it would give in [`DeviceState::StopCopy`] if it were stopped now, in any state
    /// (`VFIO_DEVICE_FEATURE_MIG_DATA_SIZE`).
    ///
    /// # Errors
    /// The device could not say; the estimate of its traits is used instead.
    fn stop_copy_bytes(&mut self) -> Result<u64, DeviceError>;

    /// Its configuration, which is loaded after its data: registers and the like that are not in the stream. Called once, in
    /// [`DeviceState::StopCopy`], after the stream has ended. Empty, as it is by default, if it has none; at most
    /// `wire::limits::BLOB_BYTES_MAX` bytes.
    ///
    /// # Errors
    /// The device could not.
    fn config(&mut self) -> Result<Bytes, DeviceError> {
        Ok(Bytes::new())
    }

    /// Out of [`DeviceState::Error`] into [`DeviceState::Running`], with the loss of its state. Only called when a migration
    /// has failed and the guest is to run on with what there is; the report says that it was.
    ///
    /// # Errors
    /// The device stays broken.
    fn reset(&mut self) -> Result<(), DeviceError>;
}
