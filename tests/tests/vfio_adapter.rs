//! Real VFIO devices as devices of a migration, against the fake kernel: every step by hand, every refusal by its text.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use multifd_receiver as rx;
use multifd_receiver::DeviceSink;
use multifd_receiver::vfio::VfioSink;
use multifd_sender as tx;
use multifd_sender::vfio::VfioSource;
use multifd_sender::{DeviceSource, Read};
use multifd_tracking::fake::{FakeDevice, FakeDeviceConfig, FakeKernel};
use multifd_tracking::vfio::{DmaMap, DmaOptions, DmaSource, MigrationDevice, Reach, Tracking};
use multifd_tracking::{CollectPhase, DirtySet, Source};
use multifd_wire::DeviceState::{
    self, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy,
};
use multifd_wire::frame::DeviceFlags;

fn device(kernel: &FakeKernel, migration_flags: u64) -> (FakeDevice, MigrationDevice) {
    let config = FakeDeviceConfig {
        migration_flags,
        ..FakeDeviceConfig::default()
    };
    let device = FakeDevice::new(kernel, config);
    let fd = device.open();
    let migration = MigrationDevice::with_kernel(Arc::new(kernel.clone()), fd.as_fd()).unwrap();
    (device, migration)
}

/// Steps along the table's arcs, as a migration does.
fn source_to(source: &mut VfioSource, to: DeviceState) {
    let flags = source.traits().flags;
    while let Some(next) = source.state().step_to(to, flags) {
        source.set_state(next).unwrap();
    }
    assert_eq!(source.state(), to);
}

fn sink_to(sink: &mut VfioSink, to: DeviceState) {
    while let Some(next) = sink.state().step_to(to, sink.flags()) {
        sink.set_state(next).unwrap();
    }
    assert_eq!(sink.state(), to);
}

/// Moves what there is; whether the stream has ended.
fn pump(source: &mut VfioSource, sink: &mut VfioSink) -> bool {
    let mut buffer = vec![0; 5000];
    loop {
        match source.read(&mut buffer).unwrap() {
            Read::Bytes(count) => sink.write(&buffer[..count]).unwrap(),
            Read::NothingNow => return false,
            Read::End => return true,
        }
    }
}

#[test]
fn a_device_moves_along_the_arcs_of_the_table_whatever_it_can() {
    // STOP_COPY; with P2P; with PRE_COPY; with both.
    for migration_flags in [1, 3, 5, 7] {
        let kernel = FakeKernel::new();
        let (from, source) = device(&kernel, migration_flags);
        let (to, sink) = device(&kernel, migration_flags);
        let (mut source, mut sink) = (VfioSource::new("nic0", source), VfioSink::new("nic0", sink));
        let traits = source.traits();
        let pre_copy = traits.flags.contains(DeviceFlags::PRE_COPY);
        assert_eq!(
            (traits.flags.contains(DeviceFlags::P2P), pre_copy),
            (migration_flags & 2 != 0, migration_flags & 4 != 0)
        );
        assert_eq!(traits.flags, sink.flags());
        assert_eq!(traits.initial_bytes > 0, pre_copy);
        assert_eq!((traits.name.as_str(), sink.name()), ("nic0", "nic0"));
        sink_to(&mut sink, Resuming);
        if pre_copy {
            source_to(&mut source, PreCopy);
            assert!(source.pre_copy_info().unwrap().initial_bytes > 0);
            assert!(!pump(&mut source, &mut sink));
            sink.initial_end().unwrap();
            from.touch(2);
            assert_eq!(source.pre_copy_info().unwrap().dirty_bytes, 528);
        }
        source_to(&mut source, StopCopy);
        assert!(source.stop_copy_bytes().unwrap() > 0);
        assert!(pump(&mut source, &mut sink));
        assert_eq!(source.config().unwrap(), Bytes::new());
        sink_to(&mut sink, Running);
        source_to(&mut source, Stop);
        assert_eq!(from.checksum(), to.checksum(), "flags {migration_flags}");
    }
}

#[test]
fn wishes_are_taken_and_abilities_are_the_kernels() {
    let kernel = FakeKernel::new();
    let all = DeviceFlags::KNOWN;
    let flags = |migration_flags| {
        VfioSource::new("nic0", device(&kernel, migration_flags).1)
            .with_flags(all)
            .traits()
            .flags
    };
    assert_eq!(flags(7), all);
    assert_eq!(flags(1), DeviceFlags::CONFIG_AFTER_MEMORY);
}

#[test]
fn new_initial_bytes_reach_the_migration() {
    let kernel = FakeKernel::new();
    let (from, source) = device(&kernel, 7);
    let mut source = VfioSource::new("nic0", source);
    source_to(&mut source, PreCopy);
    let first = source.pre_copy_info().unwrap();
    assert!(!first.reinit);
    from.reinit();
    let again = source.pre_copy_info().unwrap();
    assert!(again.reinit && again.initial_bytes > 0);
}

#[test]
fn the_vmms_part_of_the_state_goes_along() {
    let kernel = FakeKernel::new();
    let mut source = VfioSource::new("nic0", device(&kernel, 7).1)
        .with_config(Box::new(|| Ok(Bytes::from_static(b"config space"))));
    let taken = Arc::new(Mutex::new(Vec::new()));
    let into = Arc::clone(&taken);
    let mut sink =
        VfioSink::new("nic0", device(&kernel, 7).1).with_config(Box::new(move |octets| {
            into.lock().unwrap().extend_from_slice(octets);
            Ok(())
        }));
    sink.load_config(&source.config().unwrap()).unwrap();
    assert_eq!(*taken.lock().unwrap(), b"config space");
    let mut plain = VfioSink::new("nic1", device(&kernel, 7).1);
    assert_eq!(
        plain.load_config(b"surprise").unwrap_err().to_string(),
        "nic1: the source sent 8 bytes of configuration, and nothing here takes them"
    );
}

#[test]
fn a_sink_begins_anew_when_what_it_was_given_is_void() {
    let kernel = FakeKernel::new();
    let (from, source) = device(&kernel, 7);
    let (to, sink) = device(&kernel, 7);
    let (mut source, mut sink) = (VfioSource::new("nic0", source), VfioSink::new("nic0", sink));
    sink_to(&mut sink, Resuming);
    source_to(&mut source, PreCopy);
    pump(&mut source, &mut sink);
    source_to(&mut source, Running);
    sink.restart().unwrap();
    assert_eq!(sink.state(), Resuming);
    from.touch(7);
    source_to(&mut source, StopCopy);
    assert!(pump(&mut source, &mut sink));
    sink_to(&mut sink, Running);
    assert_eq!(from.checksum(), to.checksum());
}

#[test]
fn every_failure_names_the_device_the_step_and_the_answer() {
    let kernel = FakeKernel::new();
    let (from, source) = device(&kernel, 7);
    let (to, sink) = device(&kernel, 7);
    let (mut source, mut sink) = (VfioSource::new("nic0", source), VfioSink::new("nic0", sink));
    source_to(&mut source, PreCopy);
    kernel.fail_next("read", libc::EIO);
    assert_eq!(
        source.read(&mut [0; 9]).unwrap_err().to_string(),
        "nic0: read of the data stream in PRE_COPY: Input/output error (os error 5)"
    );
    kernel.fail_next("VFIO_DEVICE_FEATURE_MIG_DATA_SIZE", libc::ENOTTY);
    let text = source.stop_copy_bytes().unwrap_err().to_string();
    assert!(
        text.starts_with("nic0: VFIO_DEVICE_FEATURE_MIG_DATA_SIZE in PRE_COPY: "),
        "{text}"
    );
    from.break_next();
    assert_eq!(
        source.set_state(PreCopyP2p).unwrap_err().to_string(),
        "nic0: from PRE_COPY to PRE_COPY_P2P, now in ERROR: Input/output error (os error 5)"
    );
    assert_eq!(source.state(), DeviceState::Error);
    assert_eq!(
        source.pre_copy_info().unwrap_err().to_string(),
        "nic0: there is no data stream in ERROR"
    );
    source.reset().unwrap();
    assert_eq!(source.state(), Running);

    sink_to(&mut sink, Resuming);
    assert_eq!(
        sink.write(b"this is no state of a device")
            .unwrap_err()
            .to_string(),
        "nic0: write of the data stream in RESUMING: Invalid argument (os error 22)"
    );
    assert_eq!(
        sink.set_state(Stop).unwrap_err().to_string(),
        "nic0: from RESUMING to STOP, now in ERROR: Invalid argument (os error 22)"
    );
    sink.restart().unwrap();
    to.break_next();
    let text = sink.restart();
    // A reset does not go through a change of state; the next step does.
    assert_eq!(
        text.unwrap_err().to_string(),
        "nic0: from RUNNING to RUNNING_P2P, now in ERROR: Input/output error (os error 5)"
    );
    let _: &dyn rx::DeviceSink = &sink;
    let _: &dyn tx::DeviceSource = &source;
}

#[test]
fn the_devices_own_dirty_log_is_told_when_it_stands_still() {
    let kernel = FakeKernel::new();
    let fake = FakeDevice::new(&kernel, FakeDeviceConfig::default());
    let fd = fake.open();
    let tracking = Tracking::DeviceLog { device: fd.as_fd() };
    let reach = Reach::Fixed(DmaMap::identity([(0, 64)]).unwrap());
    let mut dirty = DmaSource::with_kernel(
        Arc::new(kernel.clone()),
        "nic0",
        tracking,
        reach,
        DmaOptions::default(),
    )
    .unwrap();
    let migration = MigrationDevice::with_kernel(Arc::new(kernel.clone()), fd.as_fd()).unwrap();
    let mut source = VfioSource::new("nic0", migration).with_stopped(dirty.stopped_handle());
    let set = DirtySet::new(&[64]);
    dirty.start(&set).unwrap();
    let mut pages = || dirty.collect(&set, CollectPhase::Final).unwrap().pages;
    source_to(&mut source, PreCopyP2p);
    fake.wrote(4096, 1);
    assert_eq!(pages(), 1, "it may still write");
    fake.wrote(8192, 1);
    source_to(&mut source, StopCopy);
    assert_eq!(pages(), 1);
    let calls = kernel.calls().len();
    assert_eq!(pages(), 0);
    assert_eq!(kernel.calls().len(), calls, "nobody is asked any more");
    // The migration failed: the device runs on and writes.
    source_to(&mut source, RunningP2p);
    source_to(&mut source, Running);
    fake.wrote(0, 1);
    assert_eq!(pages(), 1);
}
