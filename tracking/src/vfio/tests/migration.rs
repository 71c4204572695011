//! The state of a device, moved by hand.

use super::*;
use MigrationState::{
    Error as Broken, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy,
};

const SET: &str = "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE set";

fn migratable(kernel: &FakeKernel, config: FakeDeviceConfig) -> (FakeDevice, MigrationDevice) {
    let (device, fd) = device(kernel, config);
    let migration = MigrationDevice::with_kernel(Arc::new(kernel.clone()), fd.as_fd()).unwrap();
    (device, migration)
}

/// Moves everything that there is now; whether the stream has ended.
fn pump(from: &mut MigrationDevice, to: &mut MigrationDevice) -> bool {
    let mut buffer = [0; 777];
    loop {
        match from.read(&mut buffer).unwrap() {
            StreamRead::Bytes(count) => to.write(&buffer[..count]).unwrap(),
            StreamRead::NothingNow => return false,
            StreamRead::End => return true,
        }
    }
}

#[test]
fn a_state_moves_through_pre_copy_and_the_quiescent_states() {
    let kernel = FakeKernel::new();
    let (source, mut from) = migratable(&kernel, FakeDeviceConfig::default());
    let (sink, mut to) = migratable(&kernel, FakeDeviceConfig::default());
    assert_eq!(
        from.support(),
        MigrationSupport {
            p2p: true,
            pre_copy: true,
            reinit: true,
            data_size: true
        }
    );
    for state in [RunningP2p, Stop, Resuming] {
        to.set_state(state).unwrap();
    }
    from.set_state(PreCopy).unwrap();
    let sizes = from.pre_copy_sizes().unwrap();
    assert_eq!((sizes.initial_bytes, sizes.dirty_bytes), (32 * 528, 0));
    assert!(!pump(&mut from, &mut to));
    source.touch(3);
    source.touch(9);
    let sizes = from.pre_copy_sizes().unwrap();
    assert_eq!((sizes.initial_bytes, sizes.dirty_bytes), (0, 2 * 528));
    assert_eq!(from.stop_copy_bytes().unwrap(), 2 * 528 + 24);
    from.set_state(PreCopyP2p).unwrap();
    assert!(!pump(&mut from, &mut to));
    source.touch(4);
    from.set_state(StopCopy).unwrap();
    assert!(pump(&mut from, &mut to), "the same stream, to its end");
    for state in [Stop, RunningP2p, Running] {
        to.set_state(state).unwrap();
    }
    from.set_state(Stop).unwrap();
    assert_eq!(source.checksum(), sink.checksum());
    assert_eq!(source.states_seen(), [2, 6, 7, 3, 1]);
    assert_eq!(sink.states_seen(), [2, 5, 1, 4, 1, 5, 2]);
    assert_eq!((from.state(), to.state()), (Stop, Running));
}

#[test]
fn a_device_with_stop_copy_only_moves_too() {
    let kernel = FakeKernel::new();
    let config = FakeDeviceConfig {
        migration_flags: 1,
        ..FakeDeviceConfig::default()
    };
    let (source, mut from) = migratable(&kernel, config);
    let (sink, mut to) = migratable(&kernel, config);
    assert!(!from.support().p2p && !from.support().pre_copy && !from.support().reinit);
    source.touch(1);
    to.set_state(Stop).unwrap();
    to.set_state(Resuming).unwrap();
    from.set_state(Stop).unwrap();
    from.set_state(StopCopy).unwrap();
    assert!(pump(&mut from, &mut to));
    to.set_state(Stop).unwrap();
    to.set_state(Running).unwrap();
    assert_eq!(source.checksum(), sink.checksum());
}

#[test]
fn new_initial_bytes_are_announced_with_version_2_only() {
    for version_2 in [true, false] {
        let kernel = FakeKernel::new();
        let config = FakeDeviceConfig {
            version_2,
            ..FakeDeviceConfig::default()
        };
        let (source, mut from) = migratable(&kernel, config);
        assert_eq!(from.support().reinit, version_2);
        let opt_ins = kernel.calls_of("VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2");
        assert_eq!(opt_ins, usize::from(version_2));
        from.set_state(PreCopy).unwrap();
        let mut buffer = [0; 1 << 16];
        assert_eq!(from.read(&mut buffer).unwrap(), StreamRead::Bytes(32 * 528));
        assert_eq!(from.read(&mut buffer).unwrap(), StreamRead::NothingNow);
        source.reinit();
        let sizes = from.pre_copy_sizes().unwrap();
        assert_eq!((sizes.initial_bytes, sizes.reinit), (32 * 528, version_2));
        assert!(!from.pre_copy_sizes().unwrap().reinit, "told once");
    }
}

#[test]
fn devices_that_cannot_be_migrated_are_refused_with_the_reason() {
    let refusal = |flags, failing: Option<(&'static str, i32)>| {
        let kernel = FakeKernel::new();
        let config = FakeDeviceConfig {
            migration_flags: flags,
            ..FakeDeviceConfig::default()
        };
        let (_, fd) = device(&kernel, config);
        if let Some((name, errno)) = failing {
            kernel.fail_next(name, errno);
        }
        let error = MigrationDevice::with_kernel(Arc::new(kernel.clone()), fd.as_fd()).unwrap_err();
        (error.code(), error.to_string())
    };
    assert_eq!(
        refusal(0, None),
        (
            "vfio-unsupported",
            "the device cannot be migrated: Inappropriate ioctl for device (os error 25) to VFIO_DEVICE_FEATURE_MIGRATION; its \
             driver has no migration interface of version 2"
                .to_owned()
        )
    );
    assert_eq!(
        refusal(6, None).1,
        "the device cannot be migrated: flags 0x6 are without STOP_COPY"
    );
    let get = "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE get";
    let (code, text) = refusal(7, Some((get, libc::EIO)));
    assert_eq!(code, "vfio-kernel");
    assert!(text.starts_with(get), "{text}");
}

#[test]
fn a_step_that_fails_says_where_the_device_is_now() {
    let kernel = FakeKernel::new();
    let (source, mut device) = migratable(&kernel, FakeDeviceConfig::default());
    // Refused, and nothing moved.
    kernel.fail_next(SET, libc::EBUSY);
    let error = device.set_state(PreCopy).unwrap_err();
    assert_eq!(
        error.to_string(),
        "from RUNNING to PRE_COPY, now in RUNNING: Device or resource busy (os error 16)"
    );
    // Broken on the way.
    device.set_state(PreCopy).unwrap();
    source.break_next();
    let error = device.set_state(PreCopyP2p).unwrap_err();
    assert_eq!(
        (error.code(), error.to_string().as_str()),
        (
            "vfio-step",
            "from PRE_COPY to PRE_COPY_P2P, now in ERROR: Input/output error (os error 5)"
        )
    );
    assert_eq!(device.state(), Broken);
    assert_eq!(
        device.read(&mut [0; 8]).unwrap_err().to_string(),
        "there is no data stream in ERROR"
    );
    device.reset().unwrap();
    assert_eq!(device.state(), Running);
    device.set_state(PreCopy).unwrap();
}

#[test]
fn reads_and_writes_that_fail_are_named_with_the_state() {
    let kernel = FakeKernel::new();
    let (_, mut device) = migratable(&kernel, FakeDeviceConfig::default());
    device.set_state(PreCopy).unwrap();
    kernel.fail_next("read", libc::EIO);
    assert_eq!(
        device.read(&mut [0; 8]).unwrap_err().to_string(),
        "read of the data stream in PRE_COPY: Input/output error (os error 5)"
    );
    kernel.fail_next("read", libc::EINTR);
    assert_eq!(device.read(&mut [0; 8]).unwrap(), StreamRead::Bytes(8));
    kernel.fail_next("VFIO_MIG_GET_PRECOPY_INFO", libc::EINVAL);
    let text = device.pre_copy_sizes().unwrap_err().to_string();
    assert!(
        text.starts_with("VFIO_MIG_GET_PRECOPY_INFO in PRE_COPY: "),
        "{text}"
    );
    for state in [Running, RunningP2p, Stop, Resuming] {
        device.set_state(state).unwrap();
    }
    kernel.fail_next("write", libc::ENOSPC);
    let text = device.write(&[0; 8]).unwrap_err().to_string();
    assert!(
        text.starts_with("write of the data stream in RESUMING: "),
        "{text}"
    );
    let text = device.write(&[7; 64]).unwrap_err().to_string();
    assert!(text.contains("Invalid argument"), "garbage: {text}");
}

#[test]
fn a_state_that_was_not_written_to_its_end_is_not_taken() {
    let kernel = FakeKernel::new();
    let (_, mut from) = migratable(&kernel, FakeDeviceConfig::default());
    let (_, mut to) = migratable(&kernel, FakeDeviceConfig::default());
    for state in [RunningP2p, Stop, Resuming] {
        to.set_state(state).unwrap();
    }
    from.set_state(PreCopy).unwrap();
    pump(&mut from, &mut to);
    let error = to.set_state(Stop).unwrap_err();
    assert_eq!(
        error.to_string(),
        "from RESUMING to STOP, now in ERROR: Invalid argument (os error 22)"
    );
    to.reset().unwrap();
}
