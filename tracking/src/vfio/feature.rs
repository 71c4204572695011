//! `VFIO_DEVICE_FEATURE` on a borrowed device descriptor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use zerocopy::IntoBytes;

use super::abi::{self, Feature};
use crate::kernel::{Kernel, Payload, Request};

/// A VFIO device of the embedder, as far as this crate talks to it.
///
/// The descriptor is duplicated, because a source outlives the borrow. The kernel closes the device when the last
/// duplicate is gone: whoever wants to close it drops this crate's sources and devices first.
#[derive(Clone)]
pub(crate) struct Device {
    pub(crate) kernel: Arc<dyn Kernel>,
    pub(crate) fd: Arc<OwnedFd>,
}

impl Device {
    pub(crate) fn new(kernel: Arc<dyn Kernel>, fd: BorrowedFd<'_>) -> io::Result<Self> {
        Ok(Self {
            kernel,
            fd: Arc::new(fd.try_clone_to_owned()?),
        })
    }

    /// One call with a structure that begins with `struct vfio_device_feature`.
    pub(crate) fn call(&self, request: Request, structure: &mut [u8]) -> io::Result<()> {
        self.kernel
            .ioctl(self.fd.as_fd(), request, Payload::bytes(structure))
            .map(|_| ())
    }

    /// As [`Device::call`], with memory whose address the structure holds at byte `pointer_at`.
    pub(crate) fn call_with(
        &self,
        request: Request,
        structure: &mut [u8],
        pointer_at: usize,
        words: &mut [u64],
    ) -> io::Result<()> {
        let payload = Payload::attached(structure, pointer_at, words);
        self.kernel
            .ioctl(self.fd.as_fd(), request, payload)
            .map(|_| ())
    }

    /// Whether the device has a feature with these methods (`GET`, `SET`). Any refusal counts as no.
    pub(crate) fn has(&self, feature: u32, methods: u32) -> bool {
        let mut probe = Feature {
            argsz: size_of::<Feature>() as u32,
            flags: abi::PROBE | methods | feature,
        };
        self.call(abi::FEATURE_PROBE, probe.as_mut_bytes()).is_ok()
    }
}

/// The front of a feature's structure.
pub(crate) fn header<T>(method: u32, feature: u32) -> (u32, u32) {
    (size_of::<T>() as u32, method | feature)
}
