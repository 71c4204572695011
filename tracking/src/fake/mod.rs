//! A kernel for tests: it checks every request byte by byte against the headers, and answers what Linux may answer,
//! errors included.
//!
//! It knows its objects by descriptor. Each is the reading end of a pipe: a real descriptor, which can be duplicated and
//! which nothing else confuses with another, and on which no real ioctl of these would work.
//!
//! A request that breaks the interface's rules panics and says which one: such a request is a bug of the caller.

mod device_state;
mod iommufd;
mod kvm;
mod process;
mod type1;
mod vfio;

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use iommufd::FakeIommufd;
pub use kvm::{FakeSlot, FakeVm, Wrote};
pub use process::FakeProcess;
pub use type1::FakeContainer;
pub use vfio::{FakeDevice, FakeDeviceConfig};

use crate::kernel::{Kernel, Parts, Payload, Request, RingMemory};

/// The descriptor of an object of a [`FakeKernel`].
#[derive(Debug)]
pub struct FakeFd {
    pipe: io::PipeReader,
}

impl AsRawFd for FakeFd {
    fn as_raw_fd(&self) -> RawFd {
        self.pipe.as_raw_fd()
    }
}

impl From<FakeFd> for OwnedFd {
    fn from(fd: FakeFd) -> Self {
        fd.pipe.into()
    }
}

impl AsFd for FakeFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

/// Something that a descriptor of the fake kernel stands for.
pub trait FakeObject: Send {
    /// Checks and answers one request.
    ///
    /// # Errors
    /// What Linux would answer.
    fn ioctl(&mut self, request: Request, parts: Parts<'_>) -> io::Result<i32>;

    /// The dirty ring, if the object is a vCPU.
    ///
    /// # Errors
    /// `EINVAL` unless it is one.
    fn map_ring(&mut self, _entries: u32) -> io::Result<Box<dyn RingMemory>> {
        Err(io::Error::from_raw_os_error(libc::EINVAL))
    }

    /// What a reader gets, if the object is a stream.
    ///
    /// # Errors
    /// `EINVAL` unless it is one.
    fn read(&mut self, _octets: &mut [u8]) -> io::Result<usize> {
        refused(libc::EINVAL)
    }

    /// Takes what a writer wrote, if the object is a stream.
    ///
    /// # Errors
    /// `EINVAL` unless it is one.
    fn write(&mut self, _octets: &[u8]) -> io::Result<usize> {
        refused(libc::EINVAL)
    }
}

/// The fake kernel. Cloning gives another handle to the same one.
#[derive(Clone, Default)]
pub struct FakeKernel {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    objects: HashMap<u64, Arc<Mutex<dyn FakeObject>>>,
    failures: HashMap<&'static str, VecDeque<Option<i32>>>,
    calls: Vec<&'static str>,
}

impl FakeKernel {
    /// A kernel without objects.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an object and opens it.
    ///
    /// # Panics
    /// If the process has no descriptor left.
    pub fn open(&self, object: impl FakeObject + 'static) -> FakeFd {
        let (pipe, _) = io::pipe().expect("a pipe to stand for a kernel object");
        let fd = FakeFd { pipe };
        let identity = identity(fd.as_fd()).expect("a pipe has an inode");
        self.locked()
            .objects
            .insert(identity, Arc::new(Mutex::new(object)));
        fd
    }

    /// Lets the next request of that name (or `read` or `write`) fail with `errno`, after those for which this was asked before.
    pub fn fail_next(&self, request: &'static str, errno: i32) {
        self.locked()
            .failures
            .entry(request)
            .or_default()
            .push_back(Some(errno));
    }

    /// Lets a request of that name through before the failures that are asked for later.
    pub fn pass_next(&self, request: &'static str) {
        self.locked()
            .failures
            .entry(request)
            .or_default()
            .push_back(None);
    }

    /// The requests seen so far by their names, oldest first; failed ones included.
    pub fn calls(&self) -> Vec<&'static str> {
        self.locked().calls.clone()
    }

    /// How many requests of that name were seen.
    pub fn calls_of(&self, request: &str) -> usize {
        self.locked()
            .calls
            .iter()
            .filter(|name| **name == request)
            .count()
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a call, and fails it if that was asked for.
    fn fail(&self, name: &'static str) -> io::Result<()> {
        let mut state = self.locked();
        state.calls.push(name);
        let failure = state
            .failures
            .get_mut(name)
            .and_then(VecDeque::pop_front)
            .flatten();
        failure.map_or(Ok(()), refused)
    }

    fn object(&self, fd: BorrowedFd<'_>) -> io::Result<Arc<Mutex<dyn FakeObject>>> {
        let identity = identity(fd)?;
        self.locked()
            .objects
            .get(&identity)
            .cloned()
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOTTY))
    }
}

impl Kernel for FakeKernel {
    fn ioctl(&self, fd: BorrowedFd<'_>, request: Request, payload: Payload<'_>) -> io::Result<i32> {
        let object = self.object(fd)?;
        self.fail(request.name())?;
        let parts = payload.into_parts();
        object
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .ioctl(request, parts)
    }

    fn map_ring(&self, vcpu: BorrowedFd<'_>, entries: u32) -> io::Result<Box<dyn RingMemory>> {
        self.object(vcpu)?
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .map_ring(entries)
    }

    fn read(&self, fd: BorrowedFd<'_>, octets: &mut [u8]) -> io::Result<usize> {
        self.fail("read")?;
        self.object(fd)?
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .read(octets)
    }

    fn write(&self, fd: BorrowedFd<'_>, octets: &[u8]) -> io::Result<usize> {
        self.fail("write")?;
        self.object(fd)?
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(octets)
    }
}

/// What all duplicates of a descriptor have in common.
fn identity(fd: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(File::from(fd.try_clone_to_owned()?).metadata()?.ino())
}

/// The structure of a request, which must have exactly `bytes` bytes.
fn structure(parts: Parts<'_>, bytes: usize) -> &mut [u8] {
    match parts {
        Parts::Struct(octets, None) => {
            assert_eq!(octets.len(), bytes, "the structure's size");
            octets
        }
        other => panic!("a structure without an address was expected, not {other:?}"),
    }
}

/// The structure of a request and the memory whose address it holds at byte `pointer_at`.
fn structure_with(parts: Parts<'_>, bytes: usize, pointer_at: usize) -> (&mut [u8], &mut [u64]) {
    match parts {
        Parts::Struct(octets, Some((at, words))) => {
            assert_eq!(octets.len(), bytes, "the structure's size");
            assert_eq!(at, pointer_at, "where the address stands");
            (octets, words)
        }
        other => panic!("a structure with an address was expected, not {other:?}"),
    }
}

fn u32_at(octets: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(octets[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(octets: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(octets[at..at + 8].try_into().expect("eight bytes"))
}

fn refused<T>(errno: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(errno))
}
