//! A real VFIO device as a device at the source.
//!
//! It translates between [`DeviceSource`] and [`MigrationDevice`], one call for one call, and decides nothing. Every error names the
//! device, the step and what the kernel answered. The device's source of dirty pages, if it has one of its own, is told when the device
//! stands still, and before it is let go.
//!
//! The mirror image at the destination is `multifd_receiver::vfio`.

use bytes::Bytes;
use multifd_tracking::vfio::{
    MigrationDevice, MigrationError, MigrationState, Stopped, StreamRead,
};
use multifd_wire::DeviceState;
use multifd_wire::frame::DeviceFlags;

use crate::device::{DeviceError, DeviceSource, DeviceTraits, PreCopyInfo, Read};

/// Reads what the device's own stream does not hold: registers that the VMM emulates, interrupts and the like.
pub type SaveConfig = Box<dyn FnMut() -> Result<Bytes, DeviceError> + Send>;

/// A VFIO device of the embedder's.
pub struct VfioSource {
    traits: DeviceTraits,
    device: MigrationDevice,
    config: Option<SaveConfig>,
    stopped: Vec<Stopped>,
}

impl VfioSource {
    /// The device under that name. It is asked how big its state is; a kernel that does not say leaves 0, and the stream is as long as it
    /// is.
    #[must_use]
    pub fn new(name: &str, device: MigrationDevice) -> Self {
        let support = device.support();
        let with =
            |flags: DeviceFlags, has: bool, flag| if has { flags.union(flag) } else { flags };
        let flags = with(DeviceFlags::NONE, support.p2p, DeviceFlags::P2P);
        let flags = with(flags, support.pre_copy, DeviceFlags::PRE_COPY);
        // The kernel tells the initial bytes in PRE_COPY only: until then all of the state may be.
        let state_bytes = device.stop_copy_bytes().unwrap_or(0);
        Self {
            traits: DeviceTraits {
                name: name.to_owned(),
                flags,
                initial_bytes: if support.pre_copy { state_bytes } else { 0 },
                state_bytes,
            },
            device,
            config: None,
            stopped: Vec::new(),
        }
    }

    /// Adds wishes: [`DeviceFlags::SWITCHOVER_ACK`], [`DeviceFlags::CONFIG_AFTER_MEMORY`]. What the device can is not changed; without
    /// pre-copy there are no initial bytes to wait for.
    #[must_use]
    pub fn with_flags(mut self, flags: DeviceFlags) -> Self {
        let mut wishes = vec![DeviceFlags::CONFIG_AFTER_MEMORY];
        if self.device.support().pre_copy {
            wishes.push(DeviceFlags::SWITCHOVER_ACK);
        }
        for wish in wishes {
            if flags.contains(wish) {
                self.traits.flags = self.traits.flags.union(wish);
            }
        }
        self
    }

    /// Adds the part of its state that the VMM holds.
    #[must_use]
    pub fn with_config(mut self, config: SaveConfig) -> Self {
        self.config = Some(config);
        self
    }

    /// Tells a source of dirty pages when the device stands still. The source of a container gives a handle to each of its devices.
    #[must_use]
    pub fn with_stopped(mut self, stopped: Stopped) -> Self {
        self.stopped.push(stopped);
        self
    }

    /// The device itself, to look at.
    #[must_use]
    pub fn device(&self) -> &MigrationDevice {
        &self.device
    }

    fn failed(&self, error: MigrationError) -> DeviceError {
        DeviceError::new(format!("{}: {error}", self.traits.name))
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

impl DeviceSource for VfioSource {
    fn traits(&self) -> DeviceTraits {
        self.traits.clone()
    }

    fn state(&self) -> DeviceState {
        ours(self.device.state())
    }

    fn set_state(&mut self, to: DeviceState) -> Result<(), DeviceError> {
        if to.is_running() {
            self.stopped.iter().for_each(Stopped::running);
        }
        let answer = self.device.set_state(kernels(to));
        if matches!(to, DeviceState::StopCopy | DeviceState::Stop) && answer.is_ok() {
            self.stopped.iter().for_each(Stopped::stopped);
        }
        answer.map_err(|error| self.failed(error))
    }

    fn pre_copy_info(&mut self) -> Result<PreCopyInfo, DeviceError> {
        let sizes = self
            .device
            .pre_copy_sizes()
            .map_err(|error| self.failed(error))?;
        Ok(PreCopyInfo {
            initial_bytes: sizes.initial_bytes,
            dirty_bytes: sizes.dirty_bytes,
            reinit: sizes.reinit,
        })
    }

    fn read(&mut self, into: &mut [u8]) -> Result<Read, DeviceError> {
        match self.device.read(into) {
            Ok(StreamRead::Bytes(count)) => Ok(Read::Bytes(count)),
            Ok(StreamRead::NothingNow) => Ok(Read::NothingNow),
            Ok(StreamRead::End) => Ok(Read::End),
            Err(error) => Err(self.failed(error)),
        }
    }

    fn stop_copy_bytes(&mut self) -> Result<u64, DeviceError> {
        self.device
            .stop_copy_bytes()
            .map_err(|error| self.failed(error))
    }

    fn config(&mut self) -> Result<Bytes, DeviceError> {
        self.config
            .as_mut()
            .map_or_else(|| Ok(Bytes::new()), |save| save())
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        self.stopped.iter().for_each(Stopped::running);
        self.device.reset().map_err(|error| self.failed(error))
    }
}

impl std::fmt::Debug for VfioSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VfioSource")
            .field("traits", &self.traits)
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}
