//! A real VFIO device as a device at the destination.
//!
//! It translates between [`DeviceSink`] and [`MigrationDevice`], one call for one call, and decides nothing. What it is given goes to the
//! kernel's driver as it came: that driver checks it, at the latest when it leaves RESUMING.
//!
//! The mirror image at the source is `multifd_sender::vfio`.

use multifd_tracking::vfio::{MigrationDevice, MigrationError, MigrationState};
use multifd_wire::DeviceState;
use multifd_wire::frame::DeviceFlags;

use crate::device::{DeviceError, DeviceSink};

/// Takes what the source's `SaveConfig` gave. It comes from the peer: untrusted.
pub type LoadConfig = Box<dyn FnMut(&[u8]) -> Result<(), DeviceError> + Send>;

/// A VFIO device of the embedder's.
pub struct VfioSink {
    name: String,
    flags: DeviceFlags,
    device: MigrationDevice,
    config: Option<LoadConfig>,
}

impl VfioSink {
    /// The device under the name that the source's has.
    #[must_use]
    pub fn new(name: &str, device: MigrationDevice) -> Self {
        let support = device.support();
        let mut flags = DeviceFlags::NONE;
        if support.p2p {
            flags = flags.union(DeviceFlags::P2P);
        }
        if support.pre_copy {
            flags = flags.union(DeviceFlags::PRE_COPY);
        }
        Self {
            name: name.to_owned(),
            flags,
            device,
            config: None,
        }
    }

    /// Adds what takes the part of the state that the VMM holds.
    #[must_use]
    pub fn with_config(mut self, config: LoadConfig) -> Self {
        self.config = Some(config);
        self
    }

    /// The device itself, to look at.
    #[must_use]
    pub fn device(&self) -> &MigrationDevice {
        &self.device
    }

    fn failed(&self, error: MigrationError) -> DeviceError {
        DeviceError::new(format!("{}: {error}", self.name))
    }
}

/// The same state in the kernel's words.
fn kernels(state: DeviceState) -> MigrationState {
    match state {
        DeviceState::Running => MigrationState::Running,
        DeviceState::PreCopy => MigrationState::PreCopy,
        DeviceState::RunningP2p => MigrationState::RunningP2p,
        DeviceState::PreCopyP2p => MigrationState::PreCopyP2p,
        DeviceState::StopCopy => MigrationState::StopCopy,
        DeviceState::Resuming => MigrationState::Resuming,
        DeviceState::Stop => MigrationState::Stop,
        DeviceState::Error => MigrationState::Error,
    }
}

/// The kernel's state in ours.
fn ours(state: MigrationState) -> DeviceState {
    match state {
        MigrationState::Running => DeviceState::Running,
        MigrationState::PreCopy => DeviceState::PreCopy,
        MigrationState::RunningP2p => DeviceState::RunningP2p,
        MigrationState::PreCopyP2p => DeviceState::PreCopyP2p,
        MigrationState::StopCopy => DeviceState::StopCopy,
        MigrationState::Resuming => DeviceState::Resuming,
        MigrationState::Stop => DeviceState::Stop,
        MigrationState::Error => DeviceState::Error,
    }
}

impl DeviceSink for VfioSink {
    fn name(&self) -> &str {
        &self.name
    }

    fn flags(&self) -> DeviceFlags {
        self.flags
    }

    fn state(&self) -> DeviceState {
        ours(self.device.state())
    }

    fn set_state(&mut self, to: DeviceState) -> Result<(), DeviceError> {
        self.device
            .set_state(kernels(to))
            .map_err(|error| self.failed(error))
    }

    fn write(&mut self, octets: &[u8]) -> Result<(), DeviceError> {
        self.device
            .write(octets)
            .map_err(|error| self.failed(error))
    }

    fn load_config(&mut self, octets: &[u8]) -> Result<(), DeviceError> {
        match &mut self.config {
            Some(load) => load(octets),
            None => Err(DeviceError::new(format!(
                "{}: the source sent {} bytes of configuration, and nothing here takes them",
                self.name,
                octets.len()
            ))),
        }
    }

    fn restart(&mut self) -> Result<(), DeviceError> {
        // "To abort a RESUMING session the device must be reset" (linux/vfio.h).
        self.device.reset().map_err(|error| self.failed(error))?;
        while let Some(next) = self.state().step_to(DeviceState::Resuming, self.flags) {
            self.set_state(next)?;
        }
        Ok(())
    }
}

impl std::fmt::Debug for VfioSink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VfioSink")
            .field("name", &self.name)
            .field("flags", &self.flags)
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}
