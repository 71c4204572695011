//! Whole migrations of a machine with a device that writes memory by DMA, through each way of tracking it: the memory is the same
//! at the end, every time.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_tests::dma::{DmaMachine, ModelDma, StopsDevice, Wiring};
use multifd_tests::model::{DestinationMachine, SourceMachine, differing_page, fill, memory};
use multifd_tracking::fake::{
    FakeContainer, FakeDevice, FakeDeviceConfig, FakeIommufd, FakeKernel,
};
use multifd_tracking::vfio::{
    DmaMap, DmaOptions, DmaRange, DmaSource, PreCopyTracking, Reach, Tracking, Untracked,
};
use multifd_tracking::{Figures, Run, Source};
use multifd_transport::{GuestMemory, Listener, TcpOptions};

const MEMORY_BYTES: u64 = 24 << 20;
const TABLE: u32 = 4;
const DMA_PAGES_PER_SECOND: u64 = 20_000;

/// The device can write all memory, at its guest addresses.
fn everywhere(memory: &GuestMemory) -> DmaMap {
    DmaMap::identity(
        memory
            .layouts()
            .map(|region| (region.guest_address, region.bytes / 4096)),
    )
    .unwrap()
}

/// What one migration left behind.
struct Done {
    report: tx::Report,
    differs: Option<(u32, u64)>,
    dma: Figures,
    writes: u64,
    device: ModelDma,
}

/// Keeps a source's figures when the migration has taken it.
struct Watched {
    source: DmaSource,
    figures: Arc<std::sync::Mutex<Figures>>,
}

impl Source for Watched {
    fn name(&self) -> &str {
        self.source.name()
    }

    fn start(&mut self, set: &multifd_tracking::DirtySet) -> Result<(), multifd_tracking::Error> {
        self.source.start(set)
    }

    fn collect(
        &mut self,
        set: &multifd_tracking::DirtySet,
        phase: multifd_tracking::CollectPhase,
    ) -> Result<multifd_tracking::Collection, multifd_tracking::Error> {
        let answer = self.source.collect(set, phase);
        *self.figures.lock().unwrap() = self.source.figures();
        answer
    }

    fn stop(&mut self) -> Result<(), multifd_tracking::Error> {
        self.source.stop()
    }

    fn figures(&self) -> Figures {
        self.source.figures()
    }
}

/// Migrates a machine of which `device` writes the memory and `source` (if any) tracks it; with what the destination has.
fn send(
    source_memory: &GuestMemory,
    device: &ModelDma,
    source: Option<DmaSource>,
    stops: StopsDevice,
    scan: tx::DirtyScan,
) -> (tx::Finished, rx::Finished, GuestMemory, Figures) {
    fill(source_memory, 11, 5);
    let machine = SourceMachine::start(source_memory.clone(), 1, 3000, 11);
    let figures = Arc::default();
    let mut sources = vec![machine.source()];
    let mut stopped = Vec::new();
    if let Some(source) = source {
        stopped.push(source.stopped_handle());
        sources.push(Box::new(Watched {
            source,
            figures: Arc::clone(&figures),
        }));
    }
    let destination = DestinationMachine::default();
    let moved = Arc::clone(&destination.memory);
    let options = TcpOptions::default();
    let listener = Listener::bind(&"127.0.0.1:0".parse().unwrap(), &options).unwrap();
    let address = listener.local_address().clone();
    let reception = rx::Reception::start(rx::Parts {
        vmm: Box::new(destination),
        listeners: vec![listener],
        config: rx::Config::default(),
        spawner: None,
    })
    .unwrap();
    // Slow enough for several rounds; a device that dirties everything each time converges nevertheless.
    let config = tx::Config::builder()
        .bandwidth(Some(64 << 20))
        .downtime_limit(Duration::from_millis(700))
        .dirty_scan(scan)
        .build()
        .unwrap();
    let sent = tx::Migration::start(tx::Parts {
        vmm: Box::new(DmaMachine::new(machine, device.clone(), stops, stopped)),
        memory: source_memory.clone(),
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
    let received = reception.wait();
    let moved = moved.lock().unwrap().clone().expect("memory was made");
    let figures = *figures.lock().unwrap();
    (sent, received, moved, figures)
}

/// As [`send`], where everything has to go well.
fn migrate(
    source_memory: &GuestMemory,
    device: ModelDma,
    source: Option<DmaSource>,
    stops: StopsDevice,
) -> Done {
    let (sent, received, moved, dma) =
        send(source_memory, &device, source, stops, tx::DirtyScan::Off);
    assert!(sent.error.is_none(), "{}", sent.error.unwrap());
    assert!(received.error.is_none(), "{}", received.error.unwrap());
    assert_eq!(sent.report.digest_equal, Some(true));
    Done {
        differs: differing_page(source_memory, &moved),
        report: sent.report,
        dma,
        writes: device.writes(),
        device,
    }
}

fn assert_same(done: &Done) {
    assert_eq!(done.differs, None, "region and page that differ");
    assert!(done.report.rounds >= 2, "{:?}", done.report.round_list);
    assert!(done.writes > 200, "{} pages written by DMA", done.writes);
}

fn options(pre_copy: PreCopyTracking) -> DmaOptions {
    DmaOptions {
        pre_copy,
        untracked: Untracked::AllDirty,
    }
}

fn source(
    kernel: &FakeKernel,
    tracking: Tracking<'_>,
    reach: Reach,
    pre_copy: PreCopyTracking,
) -> DmaSource {
    DmaSource::with_kernel(
        Arc::new(kernel.clone()),
        "model",
        tracking,
        reach,
        options(pre_copy),
    )
    .unwrap()
}

fn engine(memory: &GuestMemory, wiring: Wiring) -> ModelDma {
    ModelDma::start(
        memory.clone(),
        everywhere(memory).ranges().to_vec(),
        wiring,
        DMA_PAGES_PER_SECOND,
        3,
    )
}

fn by_log(
    kernel: &FakeKernel,
    memory: &GuestMemory,
    pre_copy: PreCopyTracking,
) -> (ModelDma, DmaSource) {
    let device = FakeDevice::new(kernel, FakeDeviceConfig::default());
    let fd = device.open();
    let tracking = Tracking::DeviceLog { device: fd.as_fd() };
    let reach = Reach::Fixed(everywhere(memory));
    let source = source(kernel, tracking, reach, pre_copy);
    (engine(memory, Wiring::Device(device)), source)
}

#[test]
fn a_device_that_logs_for_itself() {
    for stops in [StopsDevice::AtPause, StopsDevice::AtSave] {
        let (kernel, memory) = (FakeKernel::new(), memory(MEMORY_BYTES));
        let (device, source) = by_log(&kernel, &memory, PreCopyTracking::On);
        let done = migrate(&memory, device, Some(source), stops);
        assert_same(&done);
        assert!(
            done.dma.reported > 0 && done.dma.all_dirty == 0,
            "{:?}",
            done.dma
        );
        let told = done
            .report
            .sources
            .iter()
            .find(|s| s.name == "vfio-dma-logging model");
        assert!(
            told.is_some_and(|told| told.pages > 0),
            "{:?}",
            done.report.sources
        );
    }
}

#[test]
fn a_device_in_a_type_1_container() {
    for stops in [StopsDevice::AtPause, StopsDevice::AtSave] {
        let (kernel, memory) = (FakeKernel::new(), memory(MEMORY_BYTES));
        let container = FakeContainer::new(4096);
        let device = engine(&memory, Wiring::Container(container.clone()));
        let fd = container.open(&kernel);
        let tracking = Tracking::Type1 {
            container: fd.as_fd(),
        };
        let reach = Reach::Fixed(everywhere(&memory));
        let source = source(&kernel, tracking, reach, PreCopyTracking::On);
        let done = migrate(&memory, device, Some(source), stops);
        assert_same(&done);
        assert!(
            done.dma.reported > 0 && done.dma.all_dirty == 0,
            "{:?}",
            done.dma
        );
    }
}

#[test]
fn a_device_behind_page_tables_of_an_iommufd() {
    for (unit_bytes, stops) in [
        (4096, StopsDevice::AtPause),
        (4096, StopsDevice::AtSave),
        // One bit of the hardware for 16 pages.
        (65_536, StopsDevice::AtPause),
    ] {
        let (kernel, memory) = (FakeKernel::new(), memory(MEMORY_BYTES));
        let iommufd = FakeIommufd::new(unit_bytes, &[TABLE]);
        let device = engine(&memory, Wiring::PageTable(iommufd.clone(), TABLE));
        let fd = iommufd.open(&kernel);
        let tracking = Tracking::Iommufd {
            iommufd: fd.as_fd(),
            tables: vec![TABLE],
            ioas: FakeIommufd::IOAS,
        };
        let reach = Reach::Fixed(everywhere(&memory));
        let source = source(&kernel, tracking, reach, PreCopyTracking::On);
        let done = migrate(&memory, device, Some(source), stops);
        assert_same(&done);
        assert!(
            done.dma.reported > 0 && done.dma.all_dirty == 0,
            "{:?}",
            done.dma
        );
        let kept = iommufd.no_clear_reads() > 0;
        assert_eq!(
            kept,
            stops == StopsDevice::AtPause,
            "bits are kept in the last pass only"
        );
    }
}

#[test]
fn a_device_whose_pages_count_in_the_final_collection_only() {
    for stops in [StopsDevice::AtPause, StopsDevice::AtSave] {
        let (kernel, memory) = (FakeKernel::new(), memory(MEMORY_BYTES));
        let (device, source) = by_log(&kernel, &memory, PreCopyTracking::Off);
        let done = migrate(&memory, device, Some(source), stops);
        assert_same(&done);
        let finals = if stops == StopsDevice::AtPause { 1 } else { 2 };
        assert_eq!(done.dma.harvests, finals, "{:?}", done.dma);
    }
}

#[test]
fn a_device_that_nothing_tracks() {
    for (pre_copy, stops) in [
        (PreCopyTracking::On, StopsDevice::AtPause),
        (PreCopyTracking::Off, StopsDevice::AtSave),
    ] {
        let (kernel, memory) = (FakeKernel::new(), memory(MEMORY_BYTES / 4));
        let device = engine(&memory, Wiring::Nobody);
        let reach = Reach::Fixed(everywhere(&memory));
        let source = source(&kernel, Tracking::None, reach, pre_copy);
        let done = migrate(&memory, device, Some(source), stops);
        assert_eq!(done.differs, None, "region and page that differ");
        assert!(done.dma.all_dirty >= 1, "{:?}", done.dma);
    }
}

#[test]
fn a_device_whose_driver_tells_what_it_pins() {
    let (kernel, memory) = (FakeKernel::new(), memory(MEMORY_BYTES));
    let run = Run {
        region: 1,
        first: 100,
        count: 256,
    };
    let pinned = DmaRange { iova: 0, run };
    let device = ModelDma::start(
        memory.clone(),
        vec![pinned],
        Wiring::Nobody,
        DMA_PAGES_PER_SECOND,
        3,
    );
    let told = move |visit: &mut dyn FnMut(Run)| {
        visit(run);
        Ok(())
    };
    let reach = Reach::Pinned(Box::new(told));
    let source = source(&kernel, Tracking::None, reach, PreCopyTracking::On);
    let done = migrate(&memory, device, Some(source), StopsDevice::AtPause);
    assert_same(&done);
    assert_eq!(done.dma.reported % 256, 0, "{:?}", done.dma);
}

/// The guest has an IOMMU: ranges of 16 pages that its driver maps elsewhere every millisecond.
fn behind_a_viommu(
    kernel: &FakeKernel,
    memory: &GuestMemory,
    wiring: Wiring,
    tracking: Tracking<'_>,
) -> Done {
    let ranges = (0..64)
        .map(|index| DmaRange {
            iova: index << 20,
            run: Run {
                region: 1,
                first: index * 32,
                count: 16,
            },
        })
        .collect();
    let device = ModelDma::start(memory.clone(), ranges, wiring, DMA_PAGES_PER_SECOND, 3);
    let notifier = device.clone();
    let walk = move |visit: &mut dyn FnMut(DmaRange)| notifier.walk(visit);
    let reach = Reach::Viommu(Box::new(walk));
    let source = source(kernel, tracking, reach, PreCopyTracking::On);
    device.remap_for_ever(source.unmapper().unwrap(), 5);
    migrate(memory, device, Some(source), StopsDevice::AtPause)
}

#[test]
fn a_device_under_the_guests_iommu_in_a_container() {
    let (kernel, memory) = (FakeKernel::new(), memory(MEMORY_BYTES));
    let container = FakeContainer::new(4096);
    let fd = container.open(&kernel);
    let tracking = Tracking::Type1 {
        container: fd.as_fd(),
    };
    let done = behind_a_viommu(&kernel, &memory, Wiring::Container(container), tracking);
    assert_same(&done);
    assert!(
        done.dma.unmaps > 0 && done.dma.all_dirty == 0,
        "{:?}",
        done.dma
    );
    assert!(done.device.remaps() > 10);
}

#[test]
fn a_device_under_the_guests_iommu_behind_an_iommufd() {
    let (kernel, memory) = (FakeKernel::new(), memory(MEMORY_BYTES));
    let iommufd = FakeIommufd::new(4096, &[TABLE]);
    let fd = iommufd.open(&kernel);
    let tracking = Tracking::Iommufd {
        iommufd: fd.as_fd(),
        tables: vec![TABLE],
        ioas: FakeIommufd::IOAS,
    };
    let wiring = Wiring::PageTable(iommufd, TABLE);
    let done = behind_a_viommu(&kernel, &memory, wiring, tracking);
    assert_same(&done);
    assert!(
        done.dma.unmaps > 0 && done.dma.all_dirty == 0,
        "{:?}",
        done.dma
    );
}

#[test]
fn a_log_that_fails_in_the_middle_loses_nothing() {
    for errno in [libc::EIO, libc::EOPNOTSUPP] {
        let (kernel, memory) = (FakeKernel::new(), memory(MEMORY_BYTES));
        let (device, source) = by_log(&kernel, &memory, PreCopyTracking::On);
        let report = "VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT";
        // The first question of the second region, and later one of the first.
        kernel.pass_next(report);
        kernel.fail_next(report, errno);
        kernel.fail_next(report, errno);
        let done = migrate(&memory, device, Some(source), StopsDevice::AtSave);
        assert_eq!(done.differs, None, "region and page that differ");
        assert_eq!((done.dma.errors, done.dma.last_errno), (2, errno));
        assert_eq!(done.dma.all_dirty, 2);
    }
}

#[test]
fn a_device_that_nobody_tracks_at_all_is_caught_by_the_scan_and_lost_without() {
    // The digest cannot see it: it is over what was sent.
    let lost = memory(MEMORY_BYTES);
    let device = engine(&lost, Wiring::Nobody);
    let done = migrate(&lost, device, None, StopsDevice::AtPause);
    assert!(done.differs.is_some(), "a test of the other tests");

    let caught = memory(MEMORY_BYTES);
    let device = engine(&caught, Wiring::Nobody);
    let sent = send(
        &caught,
        &device,
        None,
        StopsDevice::AtPause,
        tx::DirtyScan::AtSwitchover,
    )
    .0;
    let error = sent.error.expect("the migration ends");
    assert_eq!(error.code(), "sender.tracking.unreported");
    let text = error.to_string();
    assert!(text.contains("changed and no source reported"), "{text}");

    // The same device, tracked: nothing to find.
    let (kernel, memory) = (FakeKernel::new(), memory(MEMORY_BYTES));
    let (device, source) = by_log(&kernel, &memory, PreCopyTracking::On);
    let scan = tx::DirtyScan::AtSwitchover;
    let sent = send(&memory, &device, Some(source), StopsDevice::AtPause, scan).0;
    assert!(sent.error.is_none(), "{}", sent.error.unwrap());
    assert!(sent.report.dirty_scan_ms.is_some_and(|ms| ms > 0.0));
}
