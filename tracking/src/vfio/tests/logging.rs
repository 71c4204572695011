//! A device's own log.

use super::*;

const START: &str = "VFIO_DEVICE_FEATURE_DMA_LOGGING_START";
const REPORT: &str = "VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT";
const STOP: &str = "VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP";

fn logged(
    kernel: &FakeKernel,
    config: FakeDeviceConfig,
    map: DmaMap,
    options: DmaOptions,
) -> (FakeDevice, DmaSource) {
    let (device, fd) = device(kernel, config);
    let tracking = Tracking::DeviceLog { device: fd.as_fd() };
    let source = source(kernel, tracking, Reach::Fixed(map), options).unwrap();
    (device, source)
}

#[test]
fn a_log_reports_what_was_written_once_and_again_when_written_again() {
    let kernel = FakeKernel::new();
    let set = set();
    let (device, mut source) = logged(
        &kernel,
        FakeDeviceConfig::default(),
        map(),
        DmaOptions::default(),
    );
    assert_eq!(source.name(), "vfio-dma-logging d0");
    source.start(&set).unwrap();
    assert_eq!(
        device.logged_ranges().unwrap(),
        [(1 << 20, 200 * PAGE), (GIB, 100 * PAGE)]
    );
    device.wrote(at(0, 199), 1);
    device.wrote(at(1, 0) + 100, PAGE);
    let want = BTreeSet::from([(0, 199), (1, 0), (1, 1)]);
    assert_eq!(pre_copy(&mut source, &set), want);
    assert_eq!(pre_copy(&mut source, &set), BTreeSet::new());
    device.wrote(at(0, 199), 8);
    assert_eq!(finally(&mut source, &set), BTreeSet::from([(0, 199)]));
    source.stop().unwrap();
    assert_eq!(device.logged_ranges(), None);
    source.stop().unwrap();
    assert_eq!(kernel.calls_of(STOP), 1);
    let figures = source.figures();
    assert_eq!(
        (
            figures.pages,
            figures.reported,
            figures.errors,
            figures.last_errno
        ),
        (4, 4, 0, 0)
    );
}

/// As many single pages, each far from the next.
fn scattered(count: u64) -> DmaMap {
    let ranges = (0..count)
        .map(|page| DmaRange {
            iova: page * 16 * PAGE,
            run: Run {
                region: 0,
                first: page,
                count: 1,
            },
        })
        .collect();
    DmaMap::new(ranges).unwrap()
}

#[test]
fn ranges_are_joined_until_kernel_and_device_take_them() {
    for (ranges, device_takes, want, starts) in [
        (256, 256, 256, 1),
        // One more than the kernel's core promises to take.
        (257, 256, 256, 1),
        (300, 64, 64, 3),
        (65, 64, 32, 2),
        (100, 1, 1, 7),
    ] {
        let kernel = FakeKernel::new();
        let set = DirtySet::new(&[ranges]);
        let config = FakeDeviceConfig {
            log_ranges_max: device_takes,
            ..FakeDeviceConfig::default()
        };
        let (device, mut source) =
            logged(&kernel, config, scattered(ranges), DmaOptions::default());
        source.start(&set).unwrap();
        assert_eq!(
            device.logged_ranges().unwrap().len(),
            want,
            "{ranges} {device_takes}"
        );
        assert_eq!(kernel.calls_of(START), starts, "{ranges} {device_takes}");
        // A gap that is logged now holds no page of the guest.
        device.wrote((ranges - 1) * 16 * PAGE, 1);
        device.wrote(5 * PAGE, 1);
        assert_eq!(
            pre_copy(&mut source, &set),
            BTreeSet::from([(0, ranges - 1)])
        );
    }
}

#[test]
fn a_device_that_logs_by_bigger_pages_gets_ranges_rounded_out_to_them() {
    let kernel = FakeKernel::new();
    let set = DirtySet::new(&[20, 20]);
    let config = FakeDeviceConfig {
        log_page_bytes: 16 * PAGE,
        ..FakeDeviceConfig::default()
    };
    // Both ranges lie in one unit of 16 pages, and end in the middle of one.
    let map = DmaMap::identity([(2 * PAGE, 4), (8 * PAGE, 20)]).unwrap();
    let (device, mut source) = logged(&kernel, config, map, DmaOptions::default());
    source.start(&set).unwrap();
    assert_eq!(
        device.logged_ranges().unwrap(),
        [(0, 32 * PAGE)],
        "rounded out, and joined"
    );
    assert_eq!((kernel.calls_of(START), kernel.calls_of(STOP)), (2, 1));
    // The unit covers pages of both ranges; a report of one must not clear it for the other.
    device.wrote(9 * PAGE, 1);
    let first_unit: BTreeSet<_> = (0..4)
        .map(|p| (0, p))
        .chain((0..8).map(|p| (1, p)))
        .collect();
    assert_eq!(pre_copy(&mut source, &set), first_unit);
    device.wrote(27 * PAGE, 1);
    let second_unit: BTreeSet<_> = (8..20).map(|page| (1, page)).collect();
    assert_eq!(pre_copy(&mut source, &set), second_unit);
    assert_eq!(pre_copy(&mut source, &set), BTreeSet::new());
}

#[test]
fn a_report_that_fails_means_everything_and_is_counted_with_its_errno() {
    for errno in [libc::EOPNOTSUPP, libc::EIO, libc::EFAULT, libc::ENOMEM] {
        let kernel = FakeKernel::new();
        let set = set();
        let (device, mut source) = logged(
            &kernel,
            FakeDeviceConfig::default(),
            map(),
            DmaOptions::default(),
        );
        source.start(&set).unwrap();
        // The second of the two ranges fails, after the first was read and cleared.
        kernel.pass_next(REPORT);
        kernel.fail_next(REPORT, errno);
        device.wrote(at(0, 3), 1);
        assert_eq!(pre_copy(&mut source, &set).len(), ALL);
        let figures = source.figures();
        assert_eq!(
            (figures.errors, figures.last_errno, figures.all_dirty),
            (1, errno, 1)
        );
        // The log was begun again, and is good for the next collection.
        assert_eq!((kernel.calls_of(STOP), kernel.calls_of(START)), (1, 2));
        device.wrote(at(1, 3), 1);
        assert_eq!(pre_copy(&mut source, &set), BTreeSet::from([(1, 3)]));
    }
}

#[test]
fn the_log_runs_again_before_everything_is_marked() {
    // A write between the restart and the marking is in the log; the other order would lose it. Seen by the calls: after
    // a failed collection the log is on.
    let kernel = FakeKernel::new();
    let set = set();
    let (device, mut source) = logged(
        &kernel,
        FakeDeviceConfig::default(),
        map(),
        DmaOptions::default(),
    );
    source.start(&set).unwrap();
    kernel.fail_next(REPORT, libc::EIO);
    source.collect(&set, CollectPhase::PreCopy).unwrap();
    assert!(device.logged_ranges().is_some());
    assert_eq!(
        kernel.calls()[kernel.calls().len() - 3..],
        [REPORT, STOP, START]
    );
}

#[test]
fn a_device_whose_reports_always_fail_is_all_dirty_and_not_restarted_for_ever() {
    let kernel = FakeKernel::new();
    let set = set();
    let (_, mut source) = logged(
        &kernel,
        FakeDeviceConfig::default(),
        map(),
        DmaOptions::default(),
    );
    source.start(&set).unwrap();
    for _ in 0..10 {
        kernel.fail_next(REPORT, libc::EOPNOTSUPP);
        assert_eq!(pre_copy(&mut source, &set).len(), ALL);
    }
    assert_eq!(finally(&mut source, &set).len(), ALL);
    assert_eq!(kernel.calls_of(START), 1 + RESTARTS_MAX as usize);
    let figures = source.figures();
    assert_eq!(
        (figures.all_dirty, figures.last_errno),
        (11, libc::EOPNOTSUPP)
    );
    source.stop().unwrap();
}

#[test]
fn a_start_that_fails_leaves_everything_dirty_or_is_refused_as_the_user_wants() {
    for wanted in [Untracked::AllDirty, Untracked::Refuse] {
        let kernel = FakeKernel::new();
        let set = set();
        let (_, mut source) = logged(
            &kernel,
            FakeDeviceConfig::default(),
            map(),
            options(PreCopyTracking::On, wanted),
        );
        kernel.fail_next(START, libc::EBUSY);
        let answer = source.start(&set);
        if wanted == Untracked::Refuse {
            let text = answer.unwrap_err().to_string();
            assert!(
                text.starts_with("VFIO_DEVICE_FEATURE_DMA_LOGGING_START: ")
                    && text.contains("busy"),
                "{text}"
            );
            // It may be tried again.
            source.start(&set).unwrap();
            continue;
        }
        answer.unwrap();
        // The next collection begins the log and marks all; the one after it is exact again.
        assert_eq!(pre_copy(&mut source, &set).len(), ALL);
        assert_eq!(pre_copy(&mut source, &set).len(), 0);
        let figures = source.figures();
        assert_eq!((figures.errors, figures.last_errno), (1, libc::EBUSY));
    }
}

#[test]
fn the_last_collection_is_made_once_when_the_device_stands_still() {
    let kernel = FakeKernel::new();
    let set = set();
    let (device, mut source) = logged(
        &kernel,
        FakeDeviceConfig::default(),
        map(),
        DmaOptions::default(),
    );
    source.start(&set).unwrap();
    device.wrote(at(0, 1), 1);
    source.stopped_handle().stopped();
    assert_eq!(finally(&mut source, &set), BTreeSet::from([(0, 1)]));
    let calls = kernel.calls().len();
    assert_eq!(finally(&mut source, &set), BTreeSet::new());
    assert_eq!(kernel.calls().len(), calls, "the kernel is not asked again");
}

#[test]
fn a_stop_that_fails_is_told_and_counted() {
    let kernel = FakeKernel::new();
    let set = set();
    let (_, mut source) = logged(
        &kernel,
        FakeDeviceConfig::default(),
        map(),
        DmaOptions::default(),
    );
    source.start(&set).unwrap();
    kernel.fail_next(STOP, libc::EIO);
    let text = source.stop().unwrap_err().to_string();
    assert!(
        text.starts_with("VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP: "),
        "{text}"
    );
    assert_eq!(source.figures().last_errno, libc::EIO);
}

#[test]
fn big_memory_is_reported_in_bounded_pieces() {
    let kernel = FakeKernel::new();
    let pages = (33 * GIB) / PAGE;
    let set = DirtySet::new(&[pages]);
    let map = DmaMap::identity([(0, pages)]).unwrap();
    let (device, mut source) = logged(
        &kernel,
        FakeDeviceConfig::default(),
        map,
        DmaOptions::default(),
    );
    source.start(&set).unwrap();
    for page in [0, 16 * GIB / PAGE - 1, 16 * GIB / PAGE, pages - 1] {
        device.wrote(page * PAGE, 1);
    }
    assert_eq!(pre_copy(&mut source, &set).len(), 4);
    assert_eq!(kernel.calls_of(REPORT), 3);
}
