//! A VFIO device's migration state, version 2 of the kernel's interface: states, the data stream, pre-copy information.
//!
//! It wraps the calls on a borrowed device descriptor and keeps what they return; it decides nothing. Which step comes when is its
//! caller's business, who asks for one arc at a time.
//!
//! ```text
//!   RUNNING ──► PRE_COPY ──► PRE_COPY_P2P ──► STOP_COPY ──► STOP        a data descriptor from PRE_COPY (or STOP_COPY) on
//!   STOP ──► RESUMING ──► STOP ──► RUNNING_P2P ──► RUNNING              one from RESUMING on
//!   any ──► ERROR ──VFIO_DEVICE_RESET──► RUNNING
//! ```
//!
//! It stands in this crate and not beside the built-in guest because an embedder with real devices needs it without that guest, and because the
//! replaceable kernel is here.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use vfio_bindings::bindings::vfio;
use zerocopy::IntoBytes;

use super::abi::{self, Feature, FeatureNumber, FeatureState, PrecopyInfoArg};
use super::feature::{Device, header};
use crate::kernel::{Kernel, Linux, Payload, adopt};

/// `enum vfio_device_mig_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum MigrationState {
    /// Broken; only a reset helps.
    Error = vfio::vfio_device_mig_state_VFIO_DEVICE_STATE_ERROR,
    /// Stands still.
    Stop = vfio::vfio_device_mig_state_VFIO_DEVICE_STATE_STOP,
    /// Works.
    Running = vfio::vfio_device_mig_state_VFIO_DEVICE_STATE_RUNNING,
    /// Stands still and can be read to its end.
    StopCopy = vfio::vfio_device_mig_state_VFIO_DEVICE_STATE_STOP_COPY,
    /// Stands still and takes a state in.
    Resuming = vfio::vfio_device_mig_state_VFIO_DEVICE_STATE_RESUMING,
    /// Works, without transfers from device to device.
    RunningP2p = vfio::vfio_device_mig_state_VFIO_DEVICE_STATE_RUNNING_P2P,
    /// Works and can be read.
    PreCopy = vfio::vfio_device_mig_state_VFIO_DEVICE_STATE_PRE_COPY,
    /// Works without transfers from device to device, and can be read.
    PreCopyP2p = vfio::vfio_device_mig_state_VFIO_DEVICE_STATE_PRE_COPY_P2P,
}

impl MigrationState {
    /// All states by their numbers in the header.
    pub const ALL: [Self; 8] = [
        Self::Error,
        Self::Stop,
        Self::Running,
        Self::StopCopy,
        Self::Resuming,
        Self::RunningP2p,
        Self::PreCopy,
        Self::PreCopyP2p,
    ];

    /// The state with that number.
    fn of(number: u32) -> Option<Self> {
        Self::ALL.get(number as usize).copied()
    }

    /// Its name in the header, without the prefix.
    pub fn name(self) -> &'static str {
        match self {
            Self::Error => "ERROR",
            Self::Stop => "STOP",
            Self::Running => "RUNNING",
            Self::StopCopy => "STOP_COPY",
            Self::Resuming => "RESUMING",
            Self::RunningP2p => "RUNNING_P2P",
            Self::PreCopy => "PRE_COPY",
            Self::PreCopyP2p => "PRE_COPY_P2P",
        }
    }

    /// Whether a data stream belongs to it.
    fn streams(self) -> bool {
        matches!(
            self,
            Self::StopCopy | Self::Resuming | Self::PreCopy | Self::PreCopyP2p
        )
    }
}

impl std::fmt::Display for MigrationState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What a device can do for a migration (`VFIO_DEVICE_FEATURE_MIGRATION`). Every one of them can STOP_COPY.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MigrationSupport {
    /// `VFIO_MIGRATION_P2P`.
    pub p2p: bool,
    /// `VFIO_MIGRATION_PRE_COPY`.
    pub pre_copy: bool,
    /// `VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2` was there and is switched on: new initial bytes are announced.
    pub reinit: bool,
    /// `VFIO_DEVICE_FEATURE_MIG_DATA_SIZE`.
    pub data_size: bool,
}

/// `struct vfio_precopy_info`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PreCopySizes {
    /// Bytes left of the initial bytes.
    pub initial_bytes: u64,
    /// Estimate of what changed since it was read.
    pub dirty_bytes: u64,
    /// `VFIO_PRECOPY_INFO_REINIT`. Never set without version 2, where the field means nothing.
    pub reinit: bool,
}

/// What came of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamRead {
    /// So many bytes, at least 1.
    Bytes(usize),
    /// Nothing now (`ENOMSG`): only before STOP_COPY.
    NothingNow,
    /// The stream has ended.
    End,
}

/// A step, a read or a write of a device failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MigrationError {
    /// The device has no migration interface of version 2, or none that can stop and copy.
    #[error("the device cannot be migrated: {what}")]
    Unsupported {
        /// What is missing.
        what: String,
    },
    /// The kernel refused a call.
    #[error("{call} in {state}: {error}")]
    Kernel {
        /// The call, by its name in the headers.
        call: &'static str,
        /// In which state the device was.
        state: MigrationState,
        /// What the kernel answered.
        #[source]
        error: io::Error,
    },
    /// A step of the device's states failed.
    #[error("from {from} to {to}, now in {now}: {error}")]
    Step {
        /// Where it was.
        from: MigrationState,
        /// Where it was to go.
        to: MigrationState,
        /// Where it is, as the kernel says.
        now: MigrationState,
        /// What the kernel answered.
        #[source]
        error: io::Error,
    },
    /// There is no data stream in this state.
    #[error("there is no data stream in {state}")]
    NoStream {
        /// The state.
        state: MigrationState,
    },
}

impl MigrationError {
    /// A short name that stays the same over versions.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unsupported { .. } => "vfio-unsupported",
            Self::Kernel { .. } => "vfio-kernel",
            Self::Step { .. } => "vfio-step",
            Self::NoStream { .. } => "vfio-no-stream",
        }
    }
}

/// A VFIO device that can be migrated, on a descriptor of the embedder's.
///
/// The descriptor is duplicated; the kernel closes the device only after this value is dropped too.
pub struct MigrationDevice {
    device: Device,
    support: MigrationSupport,
    state: MigrationState,
    stream: Option<OwnedFd>,
}

impl MigrationDevice {
    /// Asks the device what it can, and where it is.
    ///
    /// # Errors
    /// [`MigrationError::Unsupported`] with what is missing; [`MigrationError::Kernel`] if it does not say in which state it is.
    pub fn new(device: BorrowedFd<'_>) -> Result<Self, MigrationError> {
        Self::with_kernel(Arc::new(Linux), device)
    }

    /// As [`MigrationDevice::new`], with another kernel and a descriptor that it knows.
    ///
    /// # Errors
    /// As [`MigrationDevice::new`].
    pub fn with_kernel(
        kernel: Arc<dyn Kernel>,
        device: BorrowedFd<'_>,
    ) -> Result<Self, MigrationError> {
        let unsupported = |what: String| MigrationError::Unsupported { what };
        let device = Device::new(kernel, device).map_err(|error| {
            unsupported(format!("its descriptor cannot be duplicated: {error}"))
        })?;
        let flags = number(&device, abi::FEATURE_MIGRATION, abi::MIGRATION).map_err(|error| {
            unsupported(format!(
                "{error} to VFIO_DEVICE_FEATURE_MIGRATION; its driver has no migration interface of version 2"
            ))
        })?;
        let flag = |bit: u32| flags & u64::from(bit) != 0;
        if !flag(abi::MIGRATION_STOP_COPY) {
            return Err(unsupported(format!(
                "flags {flags:#x} are without STOP_COPY"
            )));
        }
        let pre_copy = flag(abi::MIGRATION_PRE_COPY);
        let support = MigrationSupport {
            p2p: flag(abi::MIGRATION_P2P),
            pre_copy,
            reinit: pre_copy && enable_version_2(&device),
            data_size: device.has(abi::MIG_DATA_SIZE, abi::GET),
        };
        let state = current(&device).map_err(|error| MigrationError::Kernel {
            call: abi::FEATURE_STATE_GET.name(),
            state: MigrationState::Error,
            error,
        })?;
        Ok(Self {
            device,
            support,
            state,
            stream: None,
        })
    }

    /// What it can.
    pub fn support(&self) -> MigrationSupport {
        self.support
    }

    /// Where it is, after the last call.
    pub fn state(&self) -> MigrationState {
        self.state
    }

    /// Goes to another state. The kernel would go several steps at once; a caller that wants to know where a device stopped asks for
    /// one arc at a time.
    ///
    /// # Errors
    /// [`MigrationError::Step`], with the state in which the kernel says that it is now. Its data stream is closed if that state
    /// has none.
    pub fn set_state(&mut self, to: MigrationState) -> Result<(), MigrationError> {
        let from = self.state;
        match self.ask(to) {
            Ok(stream) => {
                self.state = to;
                // PRE_COPY to STOP_COPY goes on with the stream and returns no new one.
                if stream.is_some() || !to.streams() {
                    self.stream = stream;
                }
                Ok(())
            }
            Err(error) => {
                self.state = current(&self.device).unwrap_or(MigrationState::Error);
                if !self.state.streams() {
                    self.stream = None;
                }
                Err(MigrationError::Step {
                    from,
                    to,
                    now: self.state,
                    error,
                })
            }
        }
    }

    fn ask(&self, to: MigrationState) -> io::Result<Option<OwnedFd>> {
        let (argsz, flags) = header::<FeatureState>(abi::SET, abi::MIG_DEVICE_STATE);
        let mut state = FeatureState {
            argsz,
            flags,
            device_state: to as u32,
            data_fd: -1,
        };
        self.device
            .call(abi::FEATURE_STATE_SET, state.as_mut_bytes())?;
        match state.data_fd {
            ..0 => Ok(None),
            fd => adopt(fd).map(Some),
        }
    }

    /// What there is to read, in PRE_COPY and PRE_COPY_P2P.
    ///
    /// # Errors
    /// [`MigrationError::NoStream`], or what the kernel answered.
    pub fn pre_copy_sizes(&self) -> Result<PreCopySizes, MigrationError> {
        let mut info = PrecopyInfoArg {
            argsz: size_of::<PrecopyInfoArg>() as u32,
            ..PrecopyInfoArg::default()
        };
        self.device
            .kernel
            .ioctl(
                self.stream()?,
                abi::PRECOPY_INFO,
                Payload::bytes(info.as_mut_bytes()),
            )
            .map_err(|error| self.failed(abi::PRECOPY_INFO.name(), error))?;
        Ok(PreCopySizes {
            initial_bytes: info.initial_bytes,
            dirty_bytes: info.dirty_bytes,
            reinit: self.support.reinit && info.flags & abi::PRECOPY_REINIT != 0,
        })
    }

    /// The kernel's estimate of what STOP_COPY would give now.
    ///
    /// # Errors
    /// What the kernel answered; `ENOTTY` on kernels without the feature.
    pub fn stop_copy_bytes(&self) -> Result<u64, MigrationError> {
        number(&self.device, abi::FEATURE_DATA_SIZE, abi::MIG_DATA_SIZE)
            .map_err(|error| self.failed(abi::FEATURE_DATA_SIZE.name(), error))
    }

    /// The next bytes of the state. Blocks as long as the device needs.
    ///
    /// # Errors
    /// [`MigrationError::NoStream`], [`MigrationError::Kernel`]. Nothing was read.
    pub fn read(&mut self, into: &mut [u8]) -> Result<StreamRead, MigrationError> {
        let stream = self.stream()?;
        let answer = retry(|| self.device.kernel.read(stream, into));
        match answer {
            Ok(0) if !into.is_empty() => Ok(StreamRead::End),
            Ok(count) => Ok(StreamRead::Bytes(count)),
            Err(error) if error.raw_os_error() == Some(libc::ENOMSG) => Ok(StreamRead::NothingNow),
            Err(error) => Err(self.failed("read of the data stream", error)),
        }
    }

    /// Hands the device the next bytes of a state, all of them.
    ///
    /// # Errors
    /// [`MigrationError::NoStream`], [`MigrationError::Kernel`]. Some of the bytes may have been taken.
    pub fn write(&mut self, octets: &[u8]) -> Result<(), MigrationError> {
        let stream = self.stream()?;
        let mut rest = octets;
        while !rest.is_empty() {
            let answer = retry(|| self.device.kernel.write(stream, rest)).and_then(|count| {
                rest.get(count..)
                    .filter(|_| count > 0)
                    .ok_or_else(|| io::ErrorKind::WriteZero.into())
            });
            rest = answer.map_err(|error| self.failed("write of the data stream", error))?;
        }
        Ok(())
    }

    /// `VFIO_DEVICE_RESET`: into RUNNING from any state, with the loss of what the device held.
    ///
    /// # Errors
    /// What the kernel answered; the device is where it was, as far as the kernel says.
    pub fn reset(&mut self) -> Result<(), MigrationError> {
        let answer =
            self.device
                .kernel
                .ioctl(self.device.fd.as_fd(), abi::DEVICE_RESET, Payload::none());
        self.state = current(&self.device).unwrap_or(MigrationState::Error);
        if !self.state.streams() {
            self.stream = None;
        }
        answer
            .map(|_| ())
            .map_err(|error| self.failed(abi::DEVICE_RESET.name(), error))
    }

    fn stream(&self) -> Result<BorrowedFd<'_>, MigrationError> {
        self.stream
            .as_ref()
            .map(AsFd::as_fd)
            .ok_or(MigrationError::NoStream { state: self.state })
    }

    fn failed(&self, call: &'static str, error: io::Error) -> MigrationError {
        MigrationError::Kernel {
            call,
            state: self.state,
            error,
        }
    }
}

impl std::fmt::Debug for MigrationDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MigrationDevice")
            .field("state", &self.state)
            .field("support", &self.support)
            .field("stream", &self.stream.is_some())
            .finish_non_exhaustive()
    }
}

/// A feature whose data is one number.
fn number(device: &Device, request: crate::kernel::Request, feature: u32) -> io::Result<u64> {
    let (argsz, flags) = header::<FeatureNumber>(abi::GET, feature);
    let mut number = FeatureNumber {
        argsz,
        flags,
        number: 0,
    };
    device.call(request, number.as_mut_bytes())?;
    Ok(number.number)
}

/// Switches on version 2 of the pre-copy information, where the kernel has it: its flags mean something then.
fn enable_version_2(device: &Device) -> bool {
    let (argsz, flags) = header::<Feature>(abi::SET, abi::MIG_PRECOPY_INFO_V2);
    let mut enable = Feature { argsz, flags };
    device.has(abi::MIG_PRECOPY_INFO_V2, abi::SET)
        && device
            .call(abi::FEATURE_PRECOPY_V2, enable.as_mut_bytes())
            .is_ok()
}

/// Where the kernel says that the device is.
fn current(device: &Device) -> io::Result<MigrationState> {
    let (argsz, flags) = header::<FeatureState>(abi::GET, abi::MIG_DEVICE_STATE);
    let mut state = FeatureState {
        argsz,
        flags,
        device_state: 0,
        data_fd: -1,
    };
    device.call(abi::FEATURE_STATE_GET, state.as_mut_bytes())?;
    MigrationState::of(state.device_state).ok_or_else(|| {
        io::Error::other(format!(
            "state {} is none that this interface knows",
            state.device_state
        ))
    })
}

/// Repeats a call that a signal interrupted, within reason.
fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    for _ in 0..1000 {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            answer => return answer,
        }
    }
    Err(io::ErrorKind::Interrupted.into())
}
