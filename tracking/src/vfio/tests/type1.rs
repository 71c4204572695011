//! A type 1 container.

use super::*;

const START: &str = "VFIO_IOMMU_DIRTY_PAGES start";
const GET: &str = "VFIO_IOMMU_DIRTY_PAGES get bitmap";
const UNMAP: &str = "VFIO_IOMMU_UNMAP_DMA";

fn mapped(container: FakeContainer) -> FakeContainer {
    for range in map().ranges() {
        container.map(range.iova, range.bytes());
    }
    container
}

fn contained(kernel: &FakeKernel, container: &FakeContainer, reach: Reach) -> DmaSource {
    let fd = container.open(kernel);
    let tracking = Tracking::Type1 {
        container: fd.as_fd(),
    };
    source(kernel, tracking, reach, DmaOptions::default()).unwrap()
}

#[test]
fn a_container_reports_what_its_devices_wrote_once() {
    let kernel = FakeKernel::new();
    let set = set();
    let container = mapped(FakeContainer::new(PAGE));
    let mut source = contained(&kernel, &container, Reach::Fixed(map()));
    assert_eq!(source.name(), "vfio-type1 d0");
    container.wrote(at(0, 5), 1);
    source.start(&set).unwrap();
    assert!(container.is_logging());
    container.wrote(at(0, 6), 1);
    container.wrote(at(1, 99), 1);
    let want = BTreeSet::from([(0, 6), (1, 99)]);
    assert_eq!(pre_copy(&mut source, &set), want);
    assert_eq!(pre_copy(&mut source, &set), BTreeSet::new());
    container.wrote(at(1, 98), 1);
    assert_eq!(finally(&mut source, &set), BTreeSet::from([(1, 98)]));
    source.stop().unwrap();
    assert!(!container.is_logging());
    assert_eq!(kernel.calls_of(GET), 2 * 3, "a question for each mapping");
}

#[test]
fn a_container_without_hardware_log_reports_all_that_is_mapped() {
    let kernel = FakeKernel::new();
    let set = set();
    let container = mapped(FakeContainer::new(PAGE).reporting_all());
    let mut source = contained(&kernel, &container, Reach::Fixed(map()));
    source.start(&set).unwrap();
    for _ in 0..2 {
        assert_eq!(pre_copy(&mut source, &set).len(), ALL);
    }
    assert_eq!(source.figures().all_dirty, 0, "the kernel said so");
}

#[test]
fn bigger_pages_of_the_iommu_mark_all_that_they_cover() {
    let kernel = FakeKernel::new();
    let set = DirtySet::new(&[64]);
    let container = FakeContainer::new(16 * PAGE);
    container.map(0, 64 * PAGE);
    let map = DmaMap::identity([(0, 64)]).unwrap();
    let mut source = contained(&kernel, &container, Reach::Fixed(map));
    source.start(&set).unwrap();
    container.wrote(17 * PAGE, 1);
    let want: BTreeSet<_> = (16..32).map(|page| (0, page)).collect();
    assert_eq!(pre_copy(&mut source, &set), want);
}

#[test]
fn a_question_that_fails_means_everything() {
    let kernel = FakeKernel::new();
    let set = set();
    let container = mapped(FakeContainer::new(PAGE));
    let mut source = contained(&kernel, &container, Reach::Fixed(map()));
    source.start(&set).unwrap();
    kernel.fail_next(GET, libc::ENOMEM);
    assert_eq!(pre_copy(&mut source, &set).len(), ALL);
    assert_eq!(source.figures().last_errno, libc::ENOMEM);
    container.wrote(at(0, 6), 1);
    assert_eq!(pre_copy(&mut source, &set), BTreeSet::from([(0, 6)]));
}

#[test]
fn ranges_that_are_not_the_mappings_make_everything_dirty_instead_of_nothing() {
    let kernel = FakeKernel::new();
    let set = set();
    let container = mapped(FakeContainer::new(PAGE));
    // The first mapping cut in two, with a gap: the kernel refuses a part of a mapping.
    let map = DmaMap::new(vec![
        DmaRange {
            iova: at(0, 0),
            run: Run {
                region: 0,
                first: 0,
                count: 50,
            },
        },
        DmaRange {
            iova: at(0, 51),
            run: Run {
                region: 0,
                first: 51,
                count: 149,
            },
        },
    ])
    .unwrap();
    let mut source = contained(&kernel, &container, Reach::Fixed(map));
    source.start(&set).unwrap();
    container.wrote(at(0, 3), 1);
    assert_eq!(pre_copy(&mut source, &set).len(), 199);
    assert_eq!(source.figures().last_errno, libc::EINVAL);
}

#[test]
fn a_mapping_too_big_for_the_kernels_bitmap_is_named() {
    let kernel = FakeKernel::new();
    let set = set();
    let container = mapped(FakeContainer::new(PAGE).with_bitmap_bytes_max(16));
    let fd = container.open(&kernel);
    let tracking = Tracking::Type1 {
        container: fd.as_fd(),
    };
    let refuse = options(PreCopyTracking::On, Untracked::Refuse);
    let mut source = source(&kernel, tracking, Reach::Fixed(map()), refuse).unwrap();
    assert_eq!(
        source.start(&set).unwrap_err().to_string(),
        "VFIO_IOMMU_DIRTY_PAGES start: the mapping at 0x100000 has 819200 octets, and the kernel reports at most 524288 at once: \
         map it in several pieces"
    );
}

#[test]
fn a_container_without_a_dirty_log_is_refused_with_the_reason() {
    let kernel = FakeKernel::new();
    let container = mapped(FakeContainer::new(PAGE).without_log());
    let fd = container.open(&kernel);
    let tracking = || Tracking::Type1 {
        container: fd.as_fd(),
    };
    let error = |tracking| {
        source(
            &kernel,
            tracking,
            Reach::Fixed(map()),
            DmaOptions::default(),
        )
        .unwrap_err()
    };
    assert_eq!(
        error(tracking()).to_string(),
        "not offered here: a dirty log of this type 1 container: the kernel names no migration capability"
    );
    kernel.fail_next("VFIO_IOMMU_GET_INFO", libc::ENOTTY);
    assert!(
        error(tracking())
            .to_string()
            .starts_with("VFIO_IOMMU_GET_INFO: ")
    );
    let small = FakeContainer::new(2048).open(&kernel);
    let tracking = Tracking::Type1 {
        container: small.as_fd(),
    };
    assert_eq!(
        error(tracking).to_string(),
        "not offered here: a dirty log of this type 1 container: it does not count in pages of 4096 bytes or more"
    );
}

/// The second mapping of [`map`].
fn second() -> DmaRange {
    map().ranges()[1]
}

#[test]
fn what_is_unmapped_hands_back_its_dirty_pages_first() {
    let kernel = FakeKernel::new();
    let set = set();
    let container = mapped(FakeContainer::new(PAGE));
    let mut source = contained(&kernel, &container, Reach::Fixed(map()));
    source.start(&set).unwrap();
    container.wrote(at(1, 42), 1);
    let unmapper = source.unmapper().unwrap();
    unmapper.unmap(second()).unwrap();
    assert_eq!(
        drain(&set),
        BTreeSet::from([(1, 42)]),
        "before any collection"
    );
    assert!(!container.is_mapped(at(1, 0)) && container.is_mapped(at(0, 0)));
    // The range is out of the map: nobody asks for it, and an error does not mark it.
    kernel.fail_next(GET, libc::EIO);
    assert_eq!(pre_copy(&mut source, &set).len(), 200);
    assert_eq!(source.figures().unmaps, 1);
    assert_eq!(kernel.calls_of(UNMAP), 1);
}

#[test]
fn an_unmap_whose_bitmap_is_lost_unmaps_and_marks_the_whole_range() {
    let kernel = FakeKernel::new();
    let set = set();
    let container = mapped(FakeContainer::new(PAGE));
    let mut source = contained(&kernel, &container, Reach::Fixed(map()));
    source.start(&set).unwrap();
    kernel.fail_next(UNMAP, libc::EFAULT);
    source.unmapper().unwrap().unmap(second()).unwrap();
    assert!(!container.is_mapped(at(1, 0)));
    assert_eq!(drain(&set).len(), 100);
    let figures = source.figures();
    assert_eq!((figures.errors, figures.last_errno), (1, libc::EFAULT));
}

#[test]
fn an_unmap_that_fails_is_told_and_marks_the_whole_range() {
    let kernel = FakeKernel::new();
    let set = set();
    let container = mapped(FakeContainer::new(PAGE));
    let mut source = contained(&kernel, &container, Reach::Fixed(map()));
    source.start(&set).unwrap();
    let part = DmaRange {
        iova: at(1, 0),
        run: Run {
            region: 1,
            first: 0,
            count: 10,
        },
    };
    let text = source
        .unmapper()
        .unwrap()
        .unmap(part)
        .unwrap_err()
        .to_string();
    assert!(text.starts_with("VFIO_IOMMU_UNMAP_DMA: "), "{text}");
    assert!(container.is_mapped(at(1, 0)));
    assert_eq!(drain(&set).len(), 10);
    let outside = DmaRange {
        iova: at(1, 0),
        run: Run {
            region: 1,
            first: 0,
            count: 101,
        },
    };
    let text = source
        .unmapper()
        .unwrap()
        .unmap(outside)
        .unwrap_err()
        .to_string();
    assert_eq!(text, "101 pages from page 0 are not inside region 1");
}

#[test]
fn outside_a_migration_unmapping_only_unmaps() {
    let kernel = FakeKernel::new();
    let set = set();
    let container = mapped(FakeContainer::new(PAGE));
    let source = contained(&kernel, &container, Reach::Fixed(map()));
    source.unmapper().unwrap().unmap(second()).unwrap();
    assert!(!container.is_mapped(at(1, 0)));
    assert_eq!((set.dirty_pages(), source.figures().unmaps), (0, 0));
}

#[test]
fn under_the_guests_iommu_unmaps_hand_back_pages_and_the_stop_walks_what_is_mapped() {
    let kernel = FakeKernel::new();
    let set = set();
    let container = FakeContainer::new(PAGE);
    // I/O address 16 pages up is guest page 150, and so on: the guest's choice.
    let mapping = |slot: u64, first: u64, count: u64| DmaRange {
        iova: slot * 16 * PAGE,
        run: Run {
            region: 0,
            first,
            count,
        },
    };
    let mappings = Arc::new(std::sync::Mutex::new(vec![
        mapping(1, 150, 4),
        mapping(2, 20, 2),
    ]));
    for range in mappings.lock().unwrap().iter() {
        container.map(range.iova, range.bytes());
    }
    let seen = Arc::clone(&mappings);
    let walk = move |visit: &mut dyn FnMut(DmaRange)| {
        seen.lock().unwrap().iter().copied().for_each(visit);
        Ok(())
    };
    let mut source = contained(&kernel, &container, Reach::Viommu(Box::new(walk)));
    source.start(&set).unwrap();
    let unmapper = source.unmapper().unwrap();
    container.wrote(16 * PAGE, 2 * PAGE);
    container.wrote(33 * PAGE, 1);
    assert_eq!(
        pre_copy(&mut source, &set),
        BTreeSet::new(),
        "known at the stop"
    );
    // The guest unmaps the first and maps another page there.
    let gone = mappings.lock().unwrap().remove(0);
    unmapper.unmap(gone).unwrap();
    assert_eq!(drain(&set), BTreeSet::from([(0, 150), (0, 151)]));
    let fresh = mapping(1, 77, 1);
    container.map(fresh.iova, fresh.bytes());
    mappings.lock().unwrap().push(fresh);
    container.wrote(16 * PAGE, 1);
    let want = BTreeSet::from([(0, 21), (0, 77)]);
    assert_eq!(finally(&mut source, &set), want);
    assert_eq!(finally(&mut source, &set), BTreeSet::new());
}

#[test]
fn a_walk_of_the_guests_iommu_that_fails_makes_all_memory_dirty() {
    let outside = DmaRange {
        iova: 0,
        run: Run {
            region: 5,
            first: 0,
            count: 1,
        },
    };
    let broken: [Box<dyn Viommu>; 2] = [
        Box::new(|_: &mut dyn FnMut(DmaRange)| {
            Err(std::io::Error::from_raw_os_error(libc::EAGAIN))
        }),
        Box::new(move |visit: &mut dyn FnMut(DmaRange)| {
            visit(outside);
            Ok(())
        }),
    ];
    for viommu in broken {
        let kernel = FakeKernel::new();
        let set = set();
        let container = FakeContainer::new(PAGE);
        let mut source = contained(&kernel, &container, Reach::Viommu(viommu));
        source.start(&set).unwrap();
        assert_eq!(finally(&mut source, &set).len(), ALL);
        assert_eq!(source.figures().errors, 1);
    }
}

#[test]
fn a_start_that_failed_under_the_guests_iommu_makes_all_memory_dirty_each_time() {
    let kernel = FakeKernel::new();
    let set = set();
    let container = FakeContainer::new(PAGE);
    let none = |_: &mut dyn FnMut(DmaRange)| Ok(());
    let mut source = contained(&kernel, &container, Reach::Viommu(Box::new(none)));
    for _ in 0..1 + RESTARTS_MAX {
        kernel.fail_next(START, libc::ENOMEM);
    }
    source.start(&set).unwrap();
    for _ in 0..5 {
        assert_eq!(pre_copy(&mut source, &set).len(), ALL);
    }
    assert_eq!(finally(&mut source, &set).len(), ALL);
}
