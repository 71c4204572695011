//! The conformance suite over the sources for what devices write, on fakes of the three kernels.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use multifd_tracking::conformance::{Harness, Precision, Writer};
use multifd_tracking::fake::{
    FakeContainer, FakeDevice, FakeDeviceConfig, FakeIommufd, FakeKernel,
};
use multifd_tracking::vfio::{DmaMap, DmaOptions, DmaSource, Pinned, Reach, Stopped, Tracking};
use multifd_tracking::{
    CollectPhase, Collection, DirtySet, Error, Figures, Run, Source, source_conformance_tests,
};

const PAGE: u64 = 4096;
/// Pages of the regions, and the I/O address of each.
const REGIONS: [(u64, u64); 2] = [(0, 1024), (1 << 30, 80)];
const TABLES: [u32; 2] = [7, 8];

/// Memory as counters.
type Memory = Arc<Vec<Vec<AtomicU64>>>;

struct Dma {
    memory: Memory,
    source: Option<Box<dyn Source>>,
    logs: Vec<Log>,
    precision: Precision,
}

/// How a device's log is told of a write.
type Log = Box<dyn FnMut(u64) + Send>;

struct Engine {
    memory: Memory,
    log: Log,
}

impl Writer for Engine {
    fn write(&mut self, region: u32, page: u64) {
        self.memory[region as usize][page as usize].fetch_add(1, Ordering::SeqCst);
        (self.log)(REGIONS[region as usize].0 + page * PAGE);
    }
}

impl Harness for Dma {
    fn regions(&self) -> Vec<u64> {
        REGIONS.map(|(_, pages)| pages).to_vec()
    }

    fn source(&mut self) -> Box<dyn Source> {
        self.source.take().expect("asked for once")
    }

    fn writers(&mut self) -> Vec<Box<dyn Writer>> {
        let engine = |log| -> Box<dyn Writer> {
            Box::new(Engine {
                memory: Arc::clone(&self.memory),
                log,
            })
        };
        std::mem::take(&mut self.logs)
            .into_iter()
            .map(engine)
            .collect()
    }

    fn value(&self, region: u32, page: u64) -> u64 {
        self.memory[region as usize][page as usize].load(Ordering::SeqCst)
    }

    fn precision(&self) -> Precision {
        self.precision
    }
}

/// A VMM that stops its devices when it saves, and says so: at the second final collection they stand still.
struct StopsAtSave {
    source: DmaSource,
    stopped: Stopped,
    finals: u32,
}

impl Source for StopsAtSave {
    fn name(&self) -> &str {
        self.source.name()
    }

    fn start(&mut self, set: &DirtySet) -> Result<(), Error> {
        self.stopped.running();
        self.finals = 0;
        self.source.start(set)
    }

    fn collect(&mut self, set: &DirtySet, phase: CollectPhase) -> Result<Collection, Error> {
        if phase == CollectPhase::Final {
            self.finals += 1;
            if self.finals == 2 {
                self.stopped.stopped();
            }
        }
        self.source.collect(set, phase)
    }

    fn stop(&mut self) -> Result<(), Error> {
        self.source.stop()
    }

    fn figures(&self) -> Figures {
        self.source.figures()
    }
}

fn map() -> DmaMap {
    DmaMap::identity(REGIONS).unwrap()
}

fn harness(
    kernel: &FakeKernel,
    tracking: Tracking<'_>,
    reach: Reach,
    logs: Vec<Log>,
    precision: Precision,
) -> Option<Box<dyn Harness>> {
    let source = DmaSource::with_kernel(
        Arc::new(kernel.clone()),
        "d0",
        tracking,
        reach,
        DmaOptions::default(),
    )
    .unwrap();
    let source: Box<dyn Source> = if precision == Precision::Everything {
        let stopped = source.stopped_handle();
        Box::new(StopsAtSave {
            source,
            stopped,
            finals: 0,
        })
    } else {
        Box::new(source)
    };
    let pages = |(_, pages): (u64, u64)| (0..pages).map(|_| AtomicU64::new(0)).collect();
    Some(Box::new(Dma {
        memory: Arc::new(REGIONS.map(pages).into()),
        source: Some(source),
        logs,
        precision,
    }))
}

/// As many pages as that many bytes have.
fn granule(octets: u64) -> Precision {
    match octets / PAGE {
        1 => Precision::Exact,
        pages => Precision::Granule { pages },
    }
}

fn device_log(page_bytes: u64) -> Option<Box<dyn Harness>> {
    let kernel = FakeKernel::new();
    let config = FakeDeviceConfig {
        log_page_bytes: page_bytes,
        ..FakeDeviceConfig::default()
    };
    let device = FakeDevice::new(&kernel, config);
    let fd = device.open();
    let log = || -> Log {
        let device = device.clone();
        Box::new(move |iova| device.wrote(iova, 8))
    };
    let tracking = Tracking::DeviceLog { device: fd.as_fd() };
    harness(
        &kernel,
        tracking,
        Reach::Fixed(map()),
        vec![log(), log()],
        granule(page_bytes),
    )
}

fn container(container: FakeContainer, precision: Precision) -> Option<Box<dyn Harness>> {
    let kernel = FakeKernel::new();
    for range in map().ranges() {
        container.map(range.iova, range.bytes());
    }
    let fd = container.open(&kernel);
    // Two devices in one container.
    let log = || -> Log {
        let container = container.clone();
        Box::new(move |iova| container.wrote(iova, 8))
    };
    let tracking = Tracking::Type1 {
        container: fd.as_fd(),
    };
    harness(
        &kernel,
        tracking,
        Reach::Fixed(map()),
        vec![log(), log()],
        precision,
    )
}

fn page_tables(unit_bytes: u64) -> Option<Box<dyn Harness>> {
    let kernel = FakeKernel::new();
    let iommufd = FakeIommufd::new(unit_bytes, &TABLES);
    for range in map().ranges() {
        iommufd.map(range.iova, range.bytes());
    }
    let fd = iommufd.open(&kernel);
    let log = |table| -> Log {
        let iommufd = iommufd.clone();
        Box::new(move |iova| iommufd.wrote(table, iova, 8))
    };
    let tracking = Tracking::Iommufd {
        iommufd: fd.as_fd(),
        tables: TABLES.to_vec(),
        ioas: FakeIommufd::IOAS,
    };
    harness(
        &kernel,
        tracking,
        Reach::Fixed(map()),
        TABLES.map(log).into(),
        granule(unit_bytes),
    )
}

fn untracked(reach: Reach) -> Option<Box<dyn Harness>> {
    let nobody = || -> Log { Box::new(|_| {}) };
    harness(
        &FakeKernel::new(),
        Tracking::None,
        reach,
        vec![nobody(), nobody()],
        Precision::Everything,
    )
}

fn pinned() -> Box<dyn Pinned> {
    Box::new(|visit: &mut dyn FnMut(Run)| {
        for (region, (_, count)) in (0..).zip(REGIONS) {
            visit(Run {
                region,
                first: 0,
                count,
            });
        }
        Ok(())
    })
}

source_conformance_tests!(a_device_log, |_| device_log(4096));
source_conformance_tests!(a_device_log_by_16_pages, |_| device_log(65_536));
source_conformance_tests!(a_container, |_| container(
    FakeContainer::new(4096),
    Precision::Exact
));
source_conformance_tests!(a_container_by_16_pages, |_| container(
    FakeContainer::new(65_536),
    granule(65_536)
));
source_conformance_tests!(a_container_that_reports_all, |_| container(
    FakeContainer::new(4096).reporting_all(),
    Precision::Everything
));
source_conformance_tests!(page_tables_by_page, |_| page_tables(4096));
source_conformance_tests!(page_tables_by_16_pages, |_| page_tables(65_536));
source_conformance_tests!(nothing_tracks, |_| untracked(Reach::Fixed(map())));
source_conformance_tests!(a_driver_pins, |_| untracked(Reach::Pinned(pinned())));
