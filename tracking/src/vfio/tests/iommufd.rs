//! Page tables of an iommufd.

use super::*;

const SET: &str = "IOMMU_HWPT_SET_DIRTY_TRACKING";
const GET: &str = "IOMMU_HWPT_GET_DIRTY_BITMAP";

fn mapped(unit_bytes: u64, tables: &[u32]) -> FakeIommufd {
    let iommufd = FakeIommufd::new(unit_bytes, tables);
    for range in map().ranges() {
        iommufd.map(range.iova, range.bytes());
    }
    iommufd
}

fn tracked(kernel: &FakeKernel, iommufd: &FakeIommufd, tables: &[u32], reach: Reach) -> DmaSource {
    let fd = iommufd.open(kernel);
    let tracking = Tracking::Iommufd {
        iommufd: fd.as_fd(),
        tables: tables.to_vec(),
        ioas: FakeIommufd::IOAS,
    };
    source(kernel, tracking, reach, DmaOptions::default()).unwrap()
}

#[test]
fn page_tables_report_what_was_written_once() {
    let kernel = FakeKernel::new();
    let set = set();
    let iommufd = mapped(PAGE, &[8, 9]);
    let mut source = tracked(&kernel, &iommufd, &[8, 9], Reach::Fixed(map()));
    assert_eq!(source.name(), "iommufd d0");
    source.start(&set).unwrap();
    assert!(iommufd.is_tracking(8) && iommufd.is_tracking(9));
    iommufd.wrote(8, at(0, 1), 1);
    iommufd.wrote(9, at(0, 2), 1);
    iommufd.wrote(9, at(1, 3), PAGE);
    let want = BTreeSet::from([(0, 1), (0, 2), (1, 3)]);
    assert_eq!(pre_copy(&mut source, &set), want);
    assert_eq!(pre_copy(&mut source, &set), BTreeSet::new());
    iommufd.wrote(8, at(0, 1), 1);
    assert_eq!(finally(&mut source, &set), BTreeSet::from([(0, 1)]));
    assert_eq!(finally(&mut source, &set), BTreeSet::new());
    assert_eq!(iommufd.no_clear_reads(), 0, "the devices may still write");
    source.stop().unwrap();
    assert!(!iommufd.is_tracking(8) && !iommufd.is_tracking(9));
}

#[test]
fn the_last_pass_over_devices_that_stand_still_does_not_clear() {
    let kernel = FakeKernel::new();
    let set = set();
    let iommufd = mapped(PAGE, &[8]);
    let mut source = tracked(&kernel, &iommufd, &[8], Reach::Fixed(map()));
    source.start(&set).unwrap();
    iommufd.wrote(8, at(0, 1), 1);
    let stopped = source.stopped_handle();
    stopped.stopped();
    assert_eq!(finally(&mut source, &set), BTreeSet::from([(0, 1)]));
    assert_eq!(iommufd.no_clear_reads(), 2, "one for each mapping");
    assert_eq!(finally(&mut source, &set), BTreeSet::new());
    assert_eq!(iommufd.no_clear_reads(), 2);
    // Cancelled: the bit is still there and is reported again, which is too much and not too little.
    stopped.running();
    iommufd.wrote(8, at(0, 2), 1);
    let want = BTreeSet::from([(0, 1), (0, 2)]);
    assert_eq!(pre_copy(&mut source, &set), want);
}

#[test]
fn one_bit_over_many_pages_is_never_asked_for_in_parts() {
    let kernel = FakeKernel::new();
    let set = DirtySet::new(&[512, 512, 512]);
    let iommufd = FakeIommufd::new(512 * PAGE, &[1]);
    // Two mappings side by side and one apart.
    let map = DmaMap::identity([(0, 512), (512 * PAGE, 512), (4096 * PAGE, 512)]).unwrap();
    for range in map.ranges() {
        iommufd.map(range.iova, range.bytes());
    }
    let mut source = tracked(&kernel, &iommufd, &[1], Reach::Fixed(map));
    source.start(&set).unwrap();
    iommufd.wrote(1, 700 * PAGE, 1);
    let got = pre_copy(&mut source, &set);
    assert_eq!(got.len(), 512);
    assert!(got.iter().all(|(region, _)| *region == 1));
    assert_eq!(kernel.calls_of(GET), 2, "neighbours in one question");
    assert_eq!(pre_copy(&mut source, &set), BTreeSet::new());
}

#[test]
fn a_read_that_fails_means_everything() {
    let kernel = FakeKernel::new();
    let set = set();
    let iommufd = mapped(PAGE, &[8]);
    let mut source = tracked(&kernel, &iommufd, &[8], Reach::Fixed(map()));
    source.start(&set).unwrap();
    kernel.fail_next(GET, libc::EOVERFLOW);
    assert_eq!(pre_copy(&mut source, &set).len(), ALL);
    assert_eq!(source.figures().last_errno, libc::EOVERFLOW);
    assert_eq!(kernel.calls_of(SET), 3, "on, off, on");
}

#[test]
fn a_map_with_an_unmapped_hole_makes_everything_dirty() {
    let kernel = FakeKernel::new();
    let set = set();
    let iommufd = FakeIommufd::new(PAGE, &[8]);
    iommufd.map(at(0, 0), 200 * PAGE);
    let mut source = tracked(&kernel, &iommufd, &[8], Reach::Fixed(map()));
    source.start(&set).unwrap();
    assert_eq!(pre_copy(&mut source, &set).len(), ALL);
    assert_eq!(source.figures().last_errno, libc::EINVAL);
}

#[test]
fn dirty_bits_are_read_before_the_range_is_unmapped() {
    let kernel = FakeKernel::new();
    let set = set();
    let iommufd = mapped(PAGE, &[8]);
    let mut source = tracked(&kernel, &iommufd, &[8], Reach::Fixed(map()));
    source.start(&set).unwrap();
    iommufd.wrote(8, at(1, 10), 1);
    source.unmapper().unwrap().unmap(map().ranges()[1]).unwrap();
    assert_eq!(drain(&set), BTreeSet::from([(1, 10)]));
    assert!(!iommufd.is_mapped(at(1, 0)));
    assert_eq!(iommufd.no_clear_reads(), 1);
    let calls = kernel.calls();
    assert_eq!(calls[calls.len() - 2..], [GET, "IOMMU_IOAS_UNMAP"]);
    // The next collection does not ask for it: the kernel would refuse.
    iommufd.wrote(8, at(0, 10), 1);
    assert_eq!(pre_copy(&mut source, &set), BTreeSet::from([(0, 10)]));
}

#[test]
fn an_unmap_whose_bits_are_lost_marks_the_whole_range() {
    let kernel = FakeKernel::new();
    let set = set();
    let iommufd = mapped(PAGE, &[8]);
    let mut source = tracked(&kernel, &iommufd, &[8], Reach::Fixed(map()));
    source.start(&set).unwrap();
    kernel.fail_next(GET, libc::EIO);
    source.unmapper().unwrap().unmap(map().ranges()[1]).unwrap();
    assert_eq!(drain(&set).len(), 100);
    assert!(!iommufd.is_mapped(at(1, 0)));
    kernel.fail_next("IOMMU_IOAS_UNMAP", libc::EBUSY);
    let text = source
        .unmapper()
        .unwrap()
        .unmap(map().ranges()[0])
        .unwrap_err()
        .to_string();
    assert!(text.starts_with("IOMMU_IOAS_UNMAP: "), "{text}");
    assert_eq!(drain(&set).len(), 200);
}

#[test]
fn an_iommufd_without_page_tables_is_refused() {
    let kernel = FakeKernel::new();
    let fd = FakeIommufd::new(PAGE, &[]).open(&kernel);
    let tracking = Tracking::Iommufd {
        iommufd: fd.as_fd(),
        tables: Vec::new(),
        ioas: FakeIommufd::IOAS,
    };
    let reach = Reach::Fixed(map());
    let error = source(&kernel, tracking, reach, DmaOptions::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "an iommufd source needs at least one hardware page table"
    );
}

#[test]
fn a_table_that_cannot_track_switches_the_others_off_again() {
    let kernel = FakeKernel::new();
    let set = set();
    let iommufd = mapped(PAGE, &[8]);
    let mut source = tracked(&kernel, &iommufd, &[8, 9], Reach::Fixed(map()));
    source.start(&set).unwrap();
    assert!(!iommufd.is_tracking(8), "table 9 does not exist");
    assert_eq!(pre_copy(&mut source, &set).len(), ALL);
    assert_eq!(source.figures().last_errno, libc::ENOENT);
}
