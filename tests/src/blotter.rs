//! A device at the destination that takes whatever comes, and may be kept from taking anything.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use multifd_receiver::{DeviceError, DeviceSink};
use multifd_wire::DeviceState;
use multifd_wire::frame::DeviceFlags;

/// The device.
pub struct Blotter {
    name: String,
    state: DeviceState,
    tap: Tap,
}

/// Whether it takes anything, and how much it took.
#[derive(Clone, Default)]
pub struct Tap(Arc<Inner>);

#[derive(Default)]
struct Inner {
    shut: Mutex<bool>,
    changed: Condvar,
    taken: AtomicU64,
}

impl Tap {
    /// One that is shut: what comes waits.
    #[must_use]
    pub fn shut() -> Self {
        let tap = Self::default();
        tap.set(true);
        tap
    }

    /// Lets everything through from here on.
    pub fn open(&self) {
        self.set(false);
    }

    /// Bytes that went through.
    #[must_use]
    pub fn taken(&self) -> u64 {
        self.0.taken.load(Ordering::SeqCst)
    }

    fn set(&self, shut: bool) {
        *self.0.shut.lock().unwrap_or_else(PoisonError::into_inner) = shut;
        self.0.changed.notify_all();
    }

    fn through(&self, bytes: usize) {
        let shut = self.0.shut.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.0.changed.wait_while(shut, |shut| *shut);
        drop(waited);
        self.0.taken.fetch_add(bytes as u64, Ordering::SeqCst);
    }
}

impl Blotter {
    /// A device of this name behind a tap.
    #[must_use]
    pub fn new(name: &str, tap: Tap) -> Self {
        Self {
            name: name.to_owned(),
            state: DeviceState::Running,
            tap,
        }
    }
}

impl DeviceSink for Blotter {
    fn name(&self) -> &str {
        &self.name
    }

    fn flags(&self) -> DeviceFlags {
        DeviceFlags::PRE_COPY.union(DeviceFlags::P2P)
    }

    fn state(&self) -> DeviceState {
        self.state
    }

    fn set_state(&mut self, to: DeviceState) -> Result<(), DeviceError> {
        self.state = to;
        Ok(())
    }

    fn write(&mut self, octets: &[u8]) -> Result<(), DeviceError> {
        self.tap.through(octets.len());
        Ok(())
    }

    fn load_config(&mut self, octets: &[u8]) -> Result<(), DeviceError> {
        self.tap.through(octets.len());
        Ok(())
    }

    fn restart(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
}
