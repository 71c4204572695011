//! The adapters of real VFIO devices against a real kernel: the kernel's sample device moves, and the lab's device fails at every state.
//!
//! They need devices of the lab (tests/lab/README.md): two of `mtty`, two of `labdev` without an IOMMU. Without these each test says that it was
//! skipped; with `MULTIFD_REQUIRE_VFIO=device` it fails instead.
#![allow(clippy::print_stderr)] // A skipped test says so.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use multifd_guest::vfio::{Door, Host, HostDevice};
use multifd_receiver::device::DeviceSink;
use multifd_receiver::vfio::VfioSink;
use multifd_sender::device::{DeviceError, DeviceSource, Read};
use multifd_sender::vfio::VfioSource;
use multifd_tracking::vfio::MigrationDevice;
use multifd_wire::DeviceState;

/// Registers of `labdev` that are used here, by their numbers in `tests/lab/module/labdev.h`.
const TOUCH: u64 = 10;
const CRC: u64 = 12;
const FAULT_ERROR: u64 = 15;
const FAULT_REFUSE: u64 = 16;

/// The scratch register of the sample device's serial port.
const SCRATCH: u64 = 7;

/// The devices of a kind are one resource.
static DEVICES: Mutex<()> = Mutex::new(());

fn with_devices(name: &str, paths: [&str; 2], test: impl FnOnce([PathBuf; 2])) {
    let _one_at_a_time = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    let paths = paths.map(PathBuf::from);
    let iommu = std::fs::read_to_string("/sys/module/labdev/parameters/iommu");
    let plain = !iommu.is_ok_and(|value| value.trim() == "Y");
    if plain && paths.iter().all(|path| path.exists()) {
        return test(paths);
    }
    let required = std::env::var("MULTIFD_REQUIRE_VFIO");
    assert!(
        required.as_deref() != Ok("device"),
        "{name} needs {paths:?}"
    );
    eprintln!("SKIPPED {name}: no {paths:?}, or they are behind an IOMMU");
}

const MTTY: [&str; 2] = [
    "/sys/bus/mdev/devices/00000000-0000-4000-8000-000000000001",
    "/sys/bus/mdev/devices/00000000-0000-4000-8000-000000000002",
];
const LABDEV: [&str; 2] = [
    "/sys/bus/platform/devices/labdev.0",
    "/sys/bus/platform/devices/labdev.1",
];

/// A device at each side, opened by `door`, and the descriptors to look at them.
struct Pair {
    _host: Host,
    a: HostDevice,
    b: HostDevice,
    source: VfioSource,
    sink: VfioSink,
}

impl Pair {
    fn open(door: Door, paths: &[PathBuf; 2]) -> Self {
        let mut host = Host::open(door).unwrap();
        let [a, b] = [&paths[0], &paths[1]].map(|path| host.open_device(path).unwrap());
        // A driver may keep the state that the last program left.
        let device = |at: &HostDevice| {
            let mut device = MigrationDevice::new(at.as_fd()).unwrap();
            device.reset().unwrap();
            device
        };
        let (source, sink) = (
            VfioSource::new("disk", device(&a)),
            VfioSink::new("disk", device(&b)),
        );
        Self {
            _host: host,
            a,
            b,
            source,
            sink,
        }
    }

    /// Takes the source one arc at a time, and returns the states it was seen in.
    fn take_source(&mut self, to: DeviceState) -> Result<Vec<DeviceState>, DeviceError> {
        let flags = self.source.traits().flags;
        let mut seen = Vec::new();
        while let Some(next) = self.source.state().step_to(to, flags) {
            self.source.set_state(next)?;
            seen.push(self.source.state());
        }
        Ok(seen)
    }

    fn take_sink(&mut self, to: DeviceState) -> Result<(), DeviceError> {
        let flags = self.sink.flags();
        while let Some(next) = self.sink.state().step_to(to, flags) {
            self.sink.set_state(next)?;
        }
        Ok(())
    }

    /// Moves what there is; whether that was the end of the stream.
    fn pump(&mut self) -> Result<bool, DeviceError> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            match self.source.read(&mut buffer)? {
                Read::Octets(count) => self.sink.write(&buffer[..count])?,
                Read::NothingNow => return Ok(false),
                Read::End => return Ok(true),
            }
        }
    }

    /// A whole migration of the device, ending with the destination running.
    fn migrate(&mut self) -> Result<Vec<DeviceState>, DeviceError> {
        self.take_sink(DeviceState::Resuming)?;
        let mut seen = self.take_source(DeviceState::PreCopy)?;
        // What pre-copy ends with is not the end of the stream, whatever the driver says.
        self.pump()?;
        seen.extend(self.take_source(DeviceState::PreCopyP2p)?);
        seen.extend(self.take_source(DeviceState::StopCopy)?);
        assert!(
            self.pump()?,
            "the stream has an end once the device is stopped"
        );
        self.take_sink(DeviceState::Running)?;
        Ok(seen)
    }
}

#[test]
fn the_kernels_sample_device_moves_with_its_state() {
    with_devices(
        "the_kernels_sample_device_moves_with_its_state",
        MTTY,
        |paths| {
            for door in [Door::Group, Door::Cdev] {
                let mut pair = Pair::open(door, &paths);
                pair.a.write_at(&[0x5a], SCRATCH).unwrap();
                pair.b.write_at(&[0], SCRATCH).unwrap();
                let seen = pair.migrate().unwrap();
                assert_eq!(
                    seen,
                    [
                        DeviceState::PreCopy,
                        DeviceState::PreCopyP2p,
                        DeviceState::StopCopy
                    ]
                );
                let mut scratch = [0];
                pair.b.read_at(&mut scratch, SCRATCH).unwrap();
                assert_eq!(scratch, [0x5a], "by {door:?}");
                assert_eq!(pair.sink.state(), DeviceState::Running);
            }
        },
    );
}

#[test]
fn a_device_that_breaks_at_any_state_runs_again_and_migrates_after_all() {
    with_devices(
        "a_device_that_breaks_at_any_state_runs_again_and_migrates_after_all",
        LABDEV,
        |paths| {
            let mut pair = Pair::open(Door::Cdev, &paths);
            // By `enum vfio_device_mig_state`.
            for (number, state) in [
                (6, DeviceState::PreCopy),
                (7, DeviceState::PreCopyP2p),
                (3, DeviceState::StopCopy),
            ] {
                pair.a.write_u64(FAULT_ERROR * 8, 1 << number).unwrap();
                let error = pair.migrate().unwrap_err().to_string();
                assert!(error.contains("disk"), "{state:?}: {error}");
                assert_eq!(
                    pair.source.state(),
                    DeviceState::Error,
                    "{state:?}: {error}"
                );
                pair.source.reset().unwrap();
                assert_eq!(pair.source.state(), DeviceState::Running);
                pair.sink.restart().unwrap();
            }
            for (number, state) in [(7, DeviceState::PreCopyP2p), (3, DeviceState::StopCopy)] {
                pair.a.write_u64(FAULT_REFUSE * 8, 1 << number).unwrap();
                let error = pair.migrate().unwrap_err().to_string();
                assert_ne!(
                    pair.source.state(),
                    DeviceState::Error,
                    "{state:?}: {error}"
                );
                pair.take_source(DeviceState::Running).unwrap();
                assert_eq!(pair.source.state(), DeviceState::Running, "without a reset");
                pair.sink.restart().unwrap();
            }
            pair.a.write_u64(TOUCH * 8, 50).unwrap();
            pair.migrate().unwrap();
            assert_eq!(
                pair.a.read_u64(CRC * 8).unwrap(),
                pair.b.read_u64(CRC * 8).unwrap()
            );
        },
    );
}
