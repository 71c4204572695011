//! Whole migrations of VFIO devices by their kernel interface, on the fake kernel: states in their order, and every failure ends with
//! the guest and its devices running at the source.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use multifd_receiver as rx;
use multifd_receiver::vfio::VfioSink;
use multifd_sender as tx;
use multifd_sender::vfio::VfioSource;
use multifd_tests::dma::{ModelDma, Wiring};
use multifd_tests::model::{SourceMachine, fill, memory};
use multifd_tests::vfio_machine::{Destination, NotedSink, NotedSource, Seen, WithDevices, octets};
use multifd_tracking::Source;
use multifd_tracking::fake::{FakeDevice, FakeDeviceConfig, FakeKernel};
use multifd_tracking::vfio::{DmaMap, DmaOptions, DmaSource, MigrationDevice, Reach, Tracking};
use multifd_transport::{GuestMemory, Listener, TcpOptions};
use multifd_wire::DeviceState::{
    PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy,
};
use multifd_wire::frame::DeviceFlags;

/// `VFIO_DEVICE_STATE_RUNNING`.
const KERNEL_RUNNING: u32 = 2;

/// One device on either side, each on a kernel of its own so that one can be made to fail.
struct Pair {
    kernels: [FakeKernel; 2],
    devices: [FakeDevice; 2],
    seen: [Seen; 2],
    dma: ModelDma,
}

struct Done {
    sent: tx::Finished,
    received: rx::Finished,
    same: bool,
    guest_runs: bool,
}

fn pair(memory: &GuestMemory, config: FakeDeviceConfig) -> Pair {
    let kernels = [FakeKernel::new(), FakeKernel::new()];
    let devices = [0, 1].map(|side: usize| FakeDevice::new(&kernels[side], config));
    let ranges = map(memory).ranges().to_vec();
    let wiring = Wiring::Device(devices[0].clone());
    Pair {
        dma: ModelDma::start(memory.clone(), ranges, wiring, 10_000, 9),
        seen: [Seen::default(), Seen::default()],
        kernels,
        devices,
    }
}

fn map(memory: &GuestMemory) -> DmaMap {
    let regions = memory
        .layouts()
        .map(|region| (region.guest_address, region.bytes / 4096));
    DmaMap::identity(regions).unwrap()
}

/// Migrates a machine with these devices.
fn migrate(memory: &GuestMemory, pairs: &[Pair]) -> Done {
    fill(memory, 21, 4);
    let machine = SourceMachine::start(memory.clone(), 1, 2000, 21);
    let running = Arc::clone(&machine.running);
    let mut sources: Vec<Box<dyn Source>> = vec![machine.source()];
    let mut devices: Vec<Box<dyn tx::DeviceSource>> = Vec::new();
    let mut sinks: Vec<Box<dyn rx::DeviceSink>> = Vec::new();
    for (pair, index) in pairs.iter().zip(0..) {
        let name = format!("nic{index}");
        let fds = [pair.devices[0].open(), pair.devices[1].open()];
        let kernel = |side: usize| Arc::new(pair.kernels[side].clone());
        let tracking = Tracking::DeviceLog {
            device: fds[0].as_fd(),
        };
        let reach = Reach::Fixed(map(memory));
        let dirty =
            DmaSource::with_kernel(kernel(0), &name, tracking, reach, DmaOptions::default())
                .unwrap();
        let raw = [0, 1]
            .map(|side| MigrationDevice::with_kernel(kernel(side), fds[side].as_fd()).unwrap());
        let [from, to] = raw;
        let device = VfioSource::new(&name, from)
            .with_flags(DeviceFlags::SWITCHOVER_ACK)
            .with_stopped(dirty.stopped_handle());
        devices.push(Box::new(NotedSource::new(device, pair.seen[0].clone())));
        let sink = VfioSink::new(&name, to);
        sinks.push(Box::new(NotedSink::new(sink, pair.seen[1].clone())));
        sources.push(Box::new(dirty));
    }
    let vmm = Destination::new(sinks, Box::new(|_| Ok(())));
    let arrived = vmm.arrived();
    let options = TcpOptions::default();
    let listener = Listener::bind(&"127.0.0.1:0".parse().unwrap(), &options).unwrap();
    let address = listener.local_address().clone();
    let reception = rx::Reception::start(rx::Parts {
        vmm: Box::new(vmm),
        listeners: vec![listener],
        config: rx::Config::default(),
        spawner: None,
    })
    .unwrap();
    let config = tx::Config::builder()
        .bandwidth(Some(64 << 20))
        .build()
        .unwrap();
    let sent = tx::Migration::start(tx::Parts {
        vmm: Box::new(WithDevices::new(Box::new(machine), devices)),
        memory: memory.clone(),
        sources,
        dial: Box::new(tx::Dialer {
            address,
            options: options.into(),
        }),
        config,
        spawner: None,
    })
    .unwrap()
    .wait();
    if sent.error.is_some() {
        // It may never have been dialled.
        reception.handle().cancel();
    }
    let received = reception.wait();
    // Read while `sent` still holds the machine or its devices.
    let guest_runs = running.load(Ordering::SeqCst);
    let same = sent.error.is_none() && *arrived.lock().unwrap() == octets(memory);
    Done {
        sent,
        received,
        same,
        guest_runs,
    }
}

fn assert_migrated(done: &Done) {
    if let Some(error) = &done.sent.error {
        panic!("the source: {error}");
    }
    if let Some(error) = &done.received.error {
        panic!("the destination: {error}");
    }
    assert!(done.same, "memory that arrived is the source's");
    assert!(!done.guest_runs);
}

#[test]
fn devices_that_can_everything_go_through_every_state_in_order() {
    let memory = memory(24 << 20);
    let pairs = [0, 1].map(|_| pair(&memory, FakeDeviceConfig::default()));
    let done = migrate(&memory, &pairs);
    assert_migrated(&done);
    for pair in &pairs {
        let [from, to] = [pair.seen[0].states(), pair.seen[1].states()];
        assert!(
            from.starts_with(&[PreCopy, PreCopyP2p, StopCopy]),
            "{from:?}"
        );
        assert_eq!(to, [RunningP2p, Stop, Resuming, Stop, RunningP2p, Running]);
        assert_eq!(pair.devices[0].checksum(), pair.devices[1].checksum());
        assert_eq!(pair.devices[1].states_seen().last(), Some(&KERNEL_RUNNING));
        assert!(!pair.devices[0].runs());
        assert!(pair.dma.writes() > 50, "{}", pair.dma.writes());
    }
}

#[test]
fn a_device_that_can_only_stop_and_copy_moves_alone() {
    let memory = memory(16 << 20);
    let config = FakeDeviceConfig {
        migration_flags: 1,
        ..FakeDeviceConfig::default()
    };
    let pairs = [pair(&memory, config)];
    let done = migrate(&memory, &pairs);
    assert_migrated(&done);
    assert!(pairs[0].seen[0].states().starts_with(&[Stop, StopCopy]));
    assert_eq!(pairs[0].seen[1].states(), [Stop, Resuming, Stop, Running]);
    assert_eq!(
        pairs[0].devices[0].checksum(),
        pairs[0].devices[1].checksum()
    );
}

/// The migration failed; the guest and its devices run at the source, and the error says `what`.
fn assert_runs_on(done: &Done, pairs: &[Pair], what: &str) {
    let error = done
        .sent
        .error
        .as_ref()
        .expect("the migration fails")
        .to_string();
    assert!(error.contains(what), "{error}");
    assert!(done.guest_runs, "{error}");
    for pair in pairs {
        assert_eq!(
            pair.devices[0].states_seen().last(),
            Some(&KERNEL_RUNNING),
            "{:?}",
            pair.seen[0]
        );
        let before = pair.dma.writes();
        std::thread::sleep(Duration::from_millis(100));
        assert!(pair.dma.writes() > before, "the device works again");
    }
}

#[test]
fn a_read_that_fails_leaves_everything_running_at_the_source() {
    let memory = memory(16 << 20);
    let pairs = [0, 1].map(|_| pair(&memory, FakeDeviceConfig::default()));
    pairs[1].kernels[0].fail_next("read", libc::EIO);
    let done = migrate(&memory, &pairs);
    assert_runs_on(
        &done,
        &pairs,
        "nic1: read of the data stream in PRE_COPY: Input/output error",
    );
}

#[test]
fn a_write_that_fails_leaves_everything_running_at_the_source() {
    let memory = memory(16 << 20);
    let pairs = [0, 1].map(|_| pair(&memory, FakeDeviceConfig::default()));
    pairs[0].kernels[1].fail_next("write", libc::EIO);
    let done = migrate(&memory, &pairs);
    let told = done
        .received
        .error
        .as_ref()
        .expect("it failed there")
        .to_string();
    assert!(
        told.contains("nic0: write of the data stream in RESUMING: Input/output error"),
        "{told}"
    );
    assert_runs_on(&done, &pairs, "nic0");
}

#[test]
fn a_refused_or_breaking_step_leaves_everything_running_at_the_source() {
    const SET: &str = "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE set";
    // The steps of a source's device: PRE_COPY, PRE_COPY_P2P, STOP_COPY.
    for (step, text) in [
        (0, "nic0: from RUNNING to PRE_COPY"),
        (1, "nic0: from PRE_COPY to PRE_COPY_P2P"),
        (2, "nic0: from PRE_COPY_P2P to STOP_COPY"),
    ] {
        let memory = memory(8 << 20);
        let pairs = [0, 1].map(|_| pair(&memory, FakeDeviceConfig::default()));
        for _ in 0..step {
            pairs[0].kernels[0].pass_next(SET);
        }
        pairs[0].kernels[0].fail_next(SET, libc::EBUSY);
        let done = migrate(&memory, &pairs);
        assert_runs_on(&done, &pairs, text);
    }
}

#[test]
fn a_device_that_breaks_by_itself_is_reset_and_runs_at_the_source() {
    const PRE_COPY: u32 = 6;
    let memory = memory(8 << 20);
    let pairs = [0, 1].map(|_| pair(&memory, FakeDeviceConfig::default()));
    let device = pairs[0].devices[0].clone();
    let breaker = std::thread::spawn(move || {
        while !device.states_seen().contains(&PRE_COPY) {
            std::thread::sleep(Duration::from_millis(1));
        }
        device.break_now();
    });
    let done = migrate(&memory, &pairs);
    breaker.join().unwrap();
    assert_runs_on(&done, &pairs, "nic0");
    let broken = &done.sent.report.devices[0];
    assert!(broken.was_reset, "{broken:?}");
    assert!(!done.sent.report.devices[1].was_reset);
}

#[test]
fn a_destination_device_that_refuses_its_state_is_named() {
    const SET: &str = "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE set";
    let memory = memory(8 << 20);
    let pairs = [pair(&memory, FakeDeviceConfig::default())];
    // RUNNING_P2P, STOP, RESUMING, and then STOP with everything loaded.
    for _ in 0..3 {
        pairs[0].kernels[1].pass_next(SET);
    }
    pairs[0].kernels[1].fail_next(SET, libc::EINVAL);
    let done = migrate(&memory, &pairs);
    assert_runs_on(&done, &pairs, "nic0");
    let told = done
        .received
        .error
        .as_ref()
        .expect("it failed there")
        .to_string();
    assert!(told.contains("nic0: from RESUMING to STOP"), "{told}");
}

#[test]
fn two_devices_without_the_quiescent_state_are_refused() {
    let memory = memory(8 << 20);
    let config = FakeDeviceConfig {
        migration_flags: 5,
        ..FakeDeviceConfig::default()
    };
    let pairs = [0, 1].map(|_| pair(&memory, config));
    let done = migrate(&memory, &pairs);
    let error = done.sent.error.as_ref().expect("refused").to_string();
    assert!(
        error.contains("nic0 has no P2P-quiescent state, so it can only be moved alone"),
        "{error}"
    );
    assert!(done.guest_runs);
    for pair in &pairs {
        assert_eq!(
            pair.devices[0].states_seen(),
            [KERNEL_RUNNING],
            "nothing was touched"
        );
    }
}
