//! A device with state of its own: the source's half gives it as a stream once it is stopped, the destination's takes it in.
//! A device that can be read while it runs says so in its flags, and the downtime is shorter.
//!
//! `cargo run --release -p multifd --example devices`
#![allow(clippy::print_stdout)] // an example shows what happens

mod support;

use multifd::source::{DeviceSource, DeviceTraits, PreCopyInfo, Read, Reclaimed};
use multifd::transport::{GuestMemory, pair};
use multifd::{
    Blob, Bytes, Device, DeviceError, DeviceFlags, DeviceState, Layout, VmmError, destination,
    source,
};
use support::{Arriving, Leaving};

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
        DeviceTraits {
            name: NAME.into(),
            flags: DeviceFlags::NONE,
            initial_bytes: 0,
            state_bytes: self.cache.len() as u64,
        }
    }

    fn state(&self) -> DeviceState {
        self.state
    }

    fn set_state(&mut self, to: DeviceState) -> Result<(), DeviceError> {
        (self.state, self.read) = (to, 0);
        Ok(())
    }

    fn pre_copy_info(&mut self) -> Result<PreCopyInfo, DeviceError> {
        Ok(PreCopyInfo::default())
    }

    fn read(&mut self, into: &mut [u8]) -> Result<Read, DeviceError> {
        let left = &self.cache[self.read..];
        let count = left.len().min(into.len());
        into[..count].copy_from_slice(&left[..count]);
        self.read += count;
        Ok(if count == 0 {
            Read::End
        } else {
            Read::Octets(count)
        })
    }

    fn stop_copy_bytes(&mut self) -> Result<u64, DeviceError> {
        Ok(self.cache.len() as u64)
    }

    fn config(&mut self) -> Result<Bytes, DeviceError> {
        Ok(Bytes::new())
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        // After a failure that left it broken: it runs again, with nothing in it.
        (self.state, self.cache) = (DeviceState::Running, Vec::new());
        Ok(())
    }
}

impl destination::DeviceSink for Disk {
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

    fn load_config(&mut self, _: &[u8]) -> Result<(), DeviceError> {
        Ok(())
    }

    fn restart(&mut self) -> Result<(), DeviceError> {
        self.cache.clear();
        self.state = DeviceState::Resuming;
        Ok(())
    }
}

/// The machines of the other examples, with the disk.
struct With<M>(M);

impl source::Vmm for With<Leaving> {
    fn config(&mut self) -> Result<Vec<Blob>, VmmError> {
        self.0.config()
    }

    fn devices(&mut self) -> Result<Vec<Box<dyn DeviceSource>>, VmmError> {
        let cache = b"not on the platters yet".repeat(10_000);
        Ok(vec![Box::new(Disk::new(DeviceState::Running, cache))])
    }

    fn pause(&mut self) -> Result<(), VmmError> {
        self.0.pause()
    }

    fn save(&mut self) -> Result<Vec<Blob>, VmmError> {
        self.0.save()
    }

    fn resume(&mut self, proof: Reclaimed) -> Result<(), VmmError> {
        self.0.resume(proof)
    }
}

impl destination::Vmm for With<Arriving> {
    fn prepare(&mut self, configs: Vec<Blob>, layout: &Layout) -> Result<GuestMemory, VmmError> {
        self.0.prepare(configs, layout)
    }

    fn devices(
        &mut self,
        table: &[Device],
    ) -> Result<Vec<Box<dyn destination::DeviceSink>>, VmmError> {
        let make = |entry: &Device| match entry.name.as_str() {
            NAME => Ok(Box::new(Disk::new(DeviceState::Stop, Vec::new()))
                as Box<dyn destination::DeviceSink>),
            other => Err(VmmError::new(format!("there is no device {other} here"))),
        };
        table.iter().map(make).collect()
    }

    fn load(&mut self, states: Vec<Blob>) -> Result<(), VmmError> {
        self.0.load(states)
    }

    fn resume(&mut self, proof: destination::Ownership) -> Result<(), VmmError> {
        self.0.resume(proof)
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (reception, dial) = support::arrival(With(Arriving::default()), || pair(1 << 20))?;
    let memory = support::memory();
    let (machine, writes) = Leaving::start(&memory);
    let left = source::Migration::start(
        source::Parts::new(With(machine), memory, dial)
            .source(writes)
            .config(support::settings().build()?),
    )?
    .wait();
    let arrived = reception.wait();
    assert_eq!(left.report.outcome, source::OutcomeKind::Migrated);
    // Devices come back in boxes, which know what is in them.
    let disk = arrived
        .devices
        .into_iter()
        .next()
        .ok_or("the disk is gone")?;
    let disk: Disk = source::downcast(disk).map_err(|_| "it is another device")?;
    println!(
        "the disk is {}, with {} bytes",
        disk.state,
        disk.cache.len()
    );
    assert!(
        disk.cache == b"not on the platters yet".repeat(10_000)
            && disk.state == DeviceState::Running
    );
    let machine = arrived.vmm.ok_or("it did not come back")?.0;
    assert!(machine.runs && machine.is_right());
    Ok(())
}
