//! A device with state of its own: the source's half gives it as a stream once it is stopped, the destination's takes it in.
//! A device that can be read while it runs says so in its flags, and the downtime is shorter.
//!
//! `cargo run --release -p multifd --example devices`
#![allow(clippy::print_stdout)] // an example shows what happens

mod support;

use multifd::destination::DeviceSink;
use multifd::source::{self, DeviceSource, DeviceTraits, Read};
use multifd::transport::pair;
use multifd::{Device, DeviceError, DeviceFlags, DeviceState, VmmError};

const NAME: &str = "disk0";

/// A disk's write cache. One type for both sides, as most devices are.
struct Disk {
    state: DeviceState,
    cache: Vec<u8>,
    read: usize,
}

impl Disk {
    fn new(state: DeviceState, cache: Vec<u8>) -> Self {
        Self {
            state,
            cache,
            read: 0,
        }
    }
}

impl DeviceSource for Disk {
    fn traits(&self) -> DeviceTraits {
        DeviceTraits::new(NAME).with_state_bytes(self.cache.len() as u64)
    }

    fn state(&self) -> DeviceState {
        self.state
    }

    fn set_state(&mut self, to: DeviceState) -> Result<(), DeviceError> {
        (self.state, self.read) = (to, 0);
        Ok(())
    }

    fn read(&mut self, into: &mut [u8]) -> Result<Read, DeviceError> {
        let left = &self.cache[self.read..];
        let count = left.len().min(into.len());
        into[..count].copy_from_slice(&left[..count]);
        self.read += count;
        Ok(if count == 0 {
            Read::End
        } else {
            Read::Bytes(count)
        })
    }

    fn stop_copy_bytes(&mut self) -> Result<u64, DeviceError> {
        Ok(self.cache.len() as u64)
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        // After a failure that left it broken: it runs again, with nothing in it.
        (self.state, self.cache) = (DeviceState::Running, Vec::new());
        Ok(())
    }
}

impl DeviceSink for Disk {
    fn name(&self) -> &str {
        NAME
    }

    fn flags(&self) -> DeviceFlags {
        DeviceFlags::NONE
    }

    fn state(&self) -> DeviceState {
        self.state
    }

    fn set_state(&mut self, to: DeviceState) -> Result<(), DeviceError> {
        self.state = to;
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), DeviceError> {
        self.cache.extend_from_slice(bytes);
        Ok(())
    }

    fn restart(&mut self) -> Result<(), DeviceError> {
        self.cache.clear();
        self.state = DeviceState::Resuming;
        Ok(())
    }
}

/// The destination's half, for an entry of the table that the source sent.
fn make(entry: &Device) -> Result<Box<dyn DeviceSink>, VmmError> {
    match entry.name.as_str() {
        NAME => Ok(Box::new(Disk::new(DeviceState::Stop, Vec::new()))),
        other => Err(VmmError::new(format!("there is no device {other} here"))),
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let cache = b"not on the platters yet".repeat(10_000);
    let disk = Disk::new(DeviceState::Running, cache.clone());
    let moved = support::migrate(|| pair(1 << 20), vec![Box::new(disk)], Some(make))?;
    // Devices come back in boxes, which know what is in them.
    let disk = moved.devices.into_iter().next().ok_or("the disk is gone")?;
    let disk: Disk = source::downcast(disk).map_err(|_| "it is another device")?;
    assert!(disk.cache == cache && disk.state == DeviceState::Running);
    println!("the disk is {}, with {} bytes", disk.state, cache.len());
    Ok(())
}
