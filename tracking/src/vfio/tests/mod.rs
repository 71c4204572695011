//! The DMA sources against fake kernels: what is reported, what an error leads to, what is refused and how.

mod choose;
mod iommufd;
mod logging;
mod migration;
mod type1;

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::sync::Arc;

use super::*;
use crate::fake::{FakeContainer, FakeDevice, FakeDeviceConfig, FakeFd, FakeIommufd, FakeKernel};
use crate::{CollectPhase, DirtySet, Error, Run, Source};

const PAGE: u64 = 4096;
const GIB: u64 = 1 << 30;

/// Two regions: 200 pages from 1 MiB, 100 pages from 1 GiB.
fn map() -> DmaMap {
    DmaMap::identity([(1 << 20, 200), (GIB, 100)]).unwrap()
}

fn set() -> DirtySet {
    DirtySet::new(&[200, 100])
}

/// The I/O address of a page of [`map`].
fn at(region: u32, page: u64) -> u64 {
    [1 << 20, GIB][region as usize] + page * PAGE
}

/// Everything in the set, taken out.
fn drain(set: &DirtySet) -> BTreeSet<(u32, u64)> {
    let mut round = set.take_round();
    let mut pages = BTreeSet::new();
    while let Some(run) = round.next_run(u64::MAX) {
        pages.extend((run.first..run.first + run.count).map(|page| (run.region, page)));
    }
    pages
}

fn collect(source: &mut DmaSource, set: &DirtySet, phase: CollectPhase) -> BTreeSet<(u32, u64)> {
    source.collect(set, phase).unwrap();
    drain(set)
}

fn pre_copy(source: &mut DmaSource, set: &DirtySet) -> BTreeSet<(u32, u64)> {
    collect(source, set, CollectPhase::PreCopy)
}

fn finally(source: &mut DmaSource, set: &DirtySet) -> BTreeSet<(u32, u64)> {
    collect(source, set, CollectPhase::Final)
}

fn options(pre_copy: PreCopyTracking, untracked: Untracked) -> DmaOptions {
    DmaOptions {
        pre_copy,
        untracked,
    }
}

/// A source on the fake kernel.
fn source(
    kernel: &FakeKernel,
    tracking: Tracking<'_>,
    reach: Reach,
    options: DmaOptions,
) -> Result<DmaSource, Error> {
    DmaSource::with_kernel(Arc::new(kernel.clone()), "d0", tracking, reach, options)
}

fn device(kernel: &FakeKernel, config: FakeDeviceConfig) -> (FakeDevice, FakeFd) {
    let device = FakeDevice::new(kernel, config);
    let fd = device.open();
    (device, fd)
}

/// All pages of [`set`].
const ALL: usize = 300;

#[test]
fn without_tracking_everything_is_dirty_at_each_collection_until_the_device_stands_still() {
    let kernel = FakeKernel::new();
    let set = set();
    let mut source = source(
        &kernel,
        Tracking::None,
        Reach::Fixed(map()),
        DmaOptions::default(),
    )
    .unwrap();
    assert_eq!(source.name(), "all-dirty d0");
    source.start(&set).unwrap();
    for _ in 0..3 {
        assert_eq!(pre_copy(&mut source, &set).len(), ALL);
    }
    assert_eq!(finally(&mut source, &set).len(), ALL);
    assert_eq!(finally(&mut source, &set).len(), ALL, "it may still write");
    let stopped = source.stopped_handle();
    stopped.stopped();
    assert_eq!(finally(&mut source, &set).len(), ALL, "its last writes");
    assert_eq!(finally(&mut source, &set).len(), 0, "it stands still");
    // Cancelled: the devices run again, and stop again without a collection between.
    stopped.running();
    stopped.stopped();
    assert_eq!(finally(&mut source, &set).len(), ALL);
    assert_eq!(finally(&mut source, &set).len(), 0);
    assert_eq!(source.figures().all_dirty, 7);
    assert!(kernel.calls().is_empty());
    assert!(source.unmapper().is_none());
}

#[test]
fn a_source_of_several_devices_is_done_when_the_last_of_them_stands_still() {
    let kernel = FakeKernel::new();
    let set = set();
    let mut source = source(
        &kernel,
        Tracking::None,
        Reach::Fixed(map()),
        DmaOptions::default(),
    )
    .unwrap();
    source.start(&set).unwrap();
    let (one, other) = (source.stopped_handle(), source.stopped_handle());
    one.stopped();
    one.clone().stopped();
    for _ in 0..2 {
        assert_eq!(
            finally(&mut source, &set).len(),
            ALL,
            "the other still writes"
        );
    }
    other.stopped();
    assert_eq!(finally(&mut source, &set).len(), ALL);
    assert_eq!(finally(&mut source, &set).len(), 0);
    other.running();
    assert_eq!(finally(&mut source, &set).len(), ALL);
}

#[test]
fn with_pre_copy_tracking_off_pages_come_with_the_final_collection_only() {
    let kernel = FakeKernel::new();
    let set = set();
    let off = options(PreCopyTracking::Off, Untracked::AllDirty);
    let mut all = source(&kernel, Tracking::None, Reach::Fixed(map()), off).unwrap();
    all.start(&set).unwrap();
    assert_eq!(pre_copy(&mut all, &set).len(), 0);
    assert_eq!(finally(&mut all, &set).len(), ALL);

    let (device, fd) = device(&kernel, FakeDeviceConfig::default());
    let tracking = Tracking::DeviceLog { device: fd.as_fd() };
    let mut logged = source(&kernel, tracking, Reach::Fixed(map()), off).unwrap();
    logged.start(&set).unwrap();
    device.wrote(at(0, 7), PAGE);
    assert_eq!(pre_copy(&mut logged, &set).len(), 0);
    device.wrote(at(1, 9), PAGE);
    let want = BTreeSet::from([(0, 7), (1, 9)]);
    assert_eq!(
        finally(&mut logged, &set),
        want,
        "what was written since the start, and no more"
    );
    assert_eq!(logged.figures().harvests, 1);
}

#[test]
fn only_the_pages_that_a_driver_pins_are_dirty_where_it_tells_of_them() {
    let kernel = FakeKernel::new();
    let set = set();
    let run = Run {
        region: 1,
        first: 10,
        count: 3,
    };
    let pinned = move |visit: &mut dyn FnMut(Run)| {
        visit(run);
        Ok(())
    };
    let reach = Reach::Pinned(Box::new(pinned));
    let mut told = source(&kernel, Tracking::None, reach, DmaOptions::default()).unwrap();
    told.start(&set).unwrap();
    let want = BTreeSet::from([(1, 10), (1, 11), (1, 12)]);
    assert_eq!(pre_copy(&mut told, &set), want);
    assert_eq!(pre_copy(&mut told, &set), want);

    // A driver that does not answer, or tells of pages that are not the guest's, means: everything.
    let broken = |_: &mut dyn FnMut(Run)| Err(std::io::Error::from_raw_os_error(libc::EIO));
    let wrong = |visit: &mut dyn FnMut(Run)| {
        visit(Run {
            region: 7,
            first: 0,
            count: 1,
        });
        Ok(())
    };
    let bad: [(Box<dyn Pinned>, i32); 2] = [(Box::new(broken), libc::EIO), (Box::new(wrong), 0)];
    for (pinned, errno) in bad {
        let reach = Reach::Pinned(pinned);
        let mut source = source(&kernel, Tracking::None, reach, DmaOptions::default()).unwrap();
        source.start(&set).unwrap();
        assert_eq!(pre_copy(&mut source, &set).len(), ALL);
        let figures = source.figures();
        assert_eq!((figures.errors, figures.last_errno), (1, errno));
    }
}

#[test]
fn what_cannot_work_is_refused_when_the_source_is_made() {
    let kernel = FakeKernel::new();
    let (_, fd) = device(&kernel, FakeDeviceConfig::default());
    let none = |_: &mut dyn FnMut(DmaRange)| Ok(());
    let pins = |_: &mut dyn FnMut(Run)| Ok(());
    let refusal = |tracking, reach| {
        let error = source(&kernel, tracking, reach, DmaOptions::default()).unwrap_err();
        (error.code(), error.to_string())
    };
    let log = || Tracking::DeviceLog { device: fd.as_fd() };
    let (code, text) = refusal(log(), Reach::Viommu(Box::new(none)));
    assert_eq!(code, "tracking-unsupported");
    assert_eq!(
        text,
        "not offered here: migration of d0 under the guest's own IOMMU: the device logs by I/O address ranges that are fixed \
         when logging begins, and the guest changes them. Let the host's IOMMU track it, or give the guest no IOMMU"
    );
    let (code, text) = refusal(log(), Reach::Pinned(Box::new(pins)));
    assert_eq!(
        (code, text.as_str()),
        (
            "tracking-misuse",
            "d0: pinned ranges are for a device that nothing tracks"
        )
    );
    let empty = DmaMap::new(Vec::new()).unwrap();
    assert_eq!(
        refusal(log(), Reach::Fixed(empty)).1,
        "d0: a device that can reach no memory needs no source"
    );
    assert!(kernel.calls().is_empty(), "before anything was tried");
}

#[test]
fn a_map_beyond_the_guests_memory_is_refused_at_the_start() {
    let kernel = FakeKernel::new();
    let mut source = source(
        &kernel,
        Tracking::None,
        Reach::Fixed(map()),
        DmaOptions::default(),
    )
    .unwrap();
    let small = DirtySet::new(&[200, 99]);
    assert_eq!(
        source.start(&small).unwrap_err().to_string(),
        "100 pages from page 0 are not inside region 1"
    );
    assert_eq!(
        source
            .collect(&small, CollectPhase::PreCopy)
            .unwrap_err()
            .to_string(),
        "all-dirty d0 collects only between start and stop"
    );
}
