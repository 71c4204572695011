//! The DMA sources against a real kernel's VFIO and iommufd: a copy of the memory is kept from what a source reports, and must be equal
//! in the end.
//!
//! They need two of the lab's devices (`labdev`, see tests/lab/README.md), for page tables with `iommu=1`. Without these each test says that
//! it was skipped; with `MULTIFD_REQUIRE_VFIO=device` or `MULTIFD_REQUIRE_VFIO=iommu` those that can run with such devices fail instead.
#![allow(clippy::print_stderr)] // A skipped test says so.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use multifd_guest::vfio::{Door, Host, HostDevice};
use multifd_tracking::vfio::{
    DmaDevice, DmaGroup, DmaMap, DmaMemory, DmaOptions, DmaRange, DmaSource, MigrationDevice,
    MigrationState, Reach, StreamRead, Tracking, Translation, choose,
};
use multifd_tracking::{CollectPhase, DirtySet, Run, Source};
use multifd_transport::GuestMemory;
use multifd_transport::memory::RegionLayout;

const PAGE: u64 = 4096;
const PAGES: u64 = 4096;
const IOVA: u64 = 0x4000_0000;

/// The lab device's registers of 64 bits, by their numbers in `tests/lab/module/labdev.h`.
#[derive(Clone, Copy)]
enum Register {
    DmaIova = 2,
    DmaBytes = 3,
    DmaSeed = 4,
    DmaStart = 5,
    DmaRate = 6,
    DmaPages = 7,
    DmaErrors = 8,
    Touch = 10,
    Touches = 11,
    Crc = 12,
    Reinit = 14,
    FaultLog = 19,
    Trace = 22,
    Logging = 26,
}

fn read(device: &HostDevice, register: Register) -> u64 {
    device.read_u64(register as u64 * 8).unwrap()
}

fn write(device: &HostDevice, register: Register, value: u64) {
    device.write_u64(register as u64 * 8, value).unwrap();
}

/// The two devices are one resource.
static DEVICES: Mutex<()> = Mutex::new(());

/// What a test needs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Needs {
    /// Two devices without an IOMMU behind them.
    Device,
    /// Two devices behind an IOMMU with dirty bits.
    Iommu,
}

/// Lets `test` run with the lab's devices, or says why not.
fn with_devices(name: &str, needs: Needs, test: impl FnOnce([PathBuf; 2])) {
    let _one_at_a_time = DEVICES
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let paths = [0, 1].map(|n| PathBuf::from(format!("/sys/bus/platform/devices/labdev.{n}")));
    let iommu = std::fs::read_to_string("/sys/module/labdev/parameters/iommu");
    let has_iommu = iommu.is_ok_and(|value| !matches!(value.trim(), "0" | "N"));
    if paths.iter().all(|path| path.exists()) && has_iommu == (needs == Needs::Iommu) {
        return test(paths);
    }
    let (word, missing) = match needs {
        Needs::Device => ("device", "labdev.0 and labdev.1 without IOMMU"),
        Needs::Iommu => ("iommu", "labdev.0 and labdev.1 with iommu=1"),
    };
    let required = std::env::var("MULTIFD_REQUIRE_VFIO");
    assert!(required.as_deref() != Ok(word), "{name} needs {missing}");
    eprintln!("SKIPPED {name}: no {missing}");
}

fn memory() -> GuestMemory {
    let layout = RegionLayout {
        guest_address: IOVA,
        bytes: PAGES * PAGE,
    };
    let memory = GuestMemory::anonymous(&[layout]).unwrap();
    // Real before it is pinned.
    memory.span(0, 0, PAGES * PAGE).unwrap().fill_zero();
    memory
}

fn map() -> DmaMap {
    DmaMap::identity([(IOVA, PAGES)]).unwrap()
}

/// What a destination would have: each page as it was when it was reported last.
struct Copy<'m> {
    memory: &'m GuestMemory,
    pages: Vec<Vec<u8>>,
    set: DirtySet,
}

impl<'m> Copy<'m> {
    fn new(memory: &'m GuestMemory) -> Self {
        let mut copy = Self {
            memory,
            pages: vec![vec![0; PAGE as usize]; PAGES as usize],
            set: DirtySet::new(&[PAGES]),
        };
        copy.set.mark_all();
        copy.take();
        copy
    }

    /// Copies what is in the set, and returns which pages these were.
    fn take(&mut self) -> BTreeSet<u64> {
        let mut taken = BTreeSet::new();
        let mut round = self.set.take_round();
        while let Some(run) = round.next_run(u64::MAX) {
            for page in run.first..run.first + run.count {
                let span = self.memory.span(0, page * PAGE, PAGE).unwrap();
                span.copy_to(&mut self.pages[page as usize]);
                taken.insert(page);
            }
        }
        taken
    }

    fn collect(&mut self, source: &mut DmaSource, phase: CollectPhase) -> BTreeSet<u64> {
        source.collect(&self.set, phase).unwrap();
        self.take()
    }

    fn assert_equal(&self) {
        let mut now = vec![0; PAGE as usize];
        for (page, copy) in (0..).zip(&self.pages) {
            self.memory
                .span(0, page * PAGE, PAGE)
                .unwrap()
                .copy_to(&mut now);
            assert!(now == *copy, "page {page} was written and not reported");
        }
    }
}

/// Lets the device fill so many pages.
fn fill(device: &HostDevice, iova: u64, pages: u64) {
    write(device, Register::DmaIova, iova);
    write(device, Register::DmaBytes, pages * PAGE);
    write(
        device,
        Register::DmaSeed,
        read(device, Register::DmaPages) + 1,
    );
    write(device, Register::DmaStart, 1);
}

/// Some pages by order, then a storm; everything that is written must be reported.
fn storm(source: &mut DmaSource, device: &HostDevice, memory: &GuestMemory) {
    let mut copy = Copy::new(memory);
    source.start(&copy.set).unwrap();
    let before = read(device, Register::DmaPages);
    // The device counts since it was loaded, and others may have used it.
    let errors = read(device, Register::DmaErrors);
    fill(device, IOVA + 100 * PAGE, 7);
    let want: BTreeSet<u64> = (100..107).collect();
    assert_eq!(copy.collect(source, CollectPhase::PreCopy), want);
    assert_eq!(copy.collect(source, CollectPhase::PreCopy), BTreeSet::new());
    copy.assert_equal();
    write(device, Register::DmaIova, IOVA);
    write(device, Register::DmaBytes, PAGES * PAGE);
    write(device, Register::DmaRate, 20_000);
    let until = Instant::now() + Duration::from_millis(1500);
    let mut reported = 0;
    while Instant::now() < until {
        reported += copy.collect(source, CollectPhase::PreCopy).len();
        std::thread::sleep(Duration::from_millis(20));
    }
    write(device, Register::DmaRate, 0);
    reported += copy.collect(source, CollectPhase::Final).len();
    assert_eq!(copy.collect(source, CollectPhase::Final), BTreeSet::new());
    copy.assert_equal();
    assert_eq!(read(device, Register::DmaErrors), errors);
    let written = read(device, Register::DmaPages) - before;
    let figures = source.figures();
    eprintln!(
        "{}: {written} pages written, {reported} reported, {figures:?}",
        source.name()
    );
    assert!(reported > 500 && written > 500);
    assert_eq!((figures.errors, figures.all_dirty), (0, 0));
    source.stop().unwrap();
}

fn chosen(host: &Host, device: &HostDevice, map: DmaMap) -> (DmaSource, String) {
    let translation = host.container().map(Translation::Container);
    let group = DmaGroup {
        name: "lab",
        translation,
        devices: vec![DmaDevice {
            name: "labdev.0",
            device: Some(device.as_fd()),
            options: DmaOptions::default(),
            pinned: None,
        }],
        memory: DmaMemory::Fixed(map),
    };
    let mut chosen = choose(group).unwrap();
    assert_eq!(chosen.len(), 1);
    let one = chosen.remove(0);
    (one.source, one.reason)
}

#[test]
fn a_real_device_log_through_both_doors() {
    with_devices(
        "a_real_device_log_through_both_doors",
        Needs::Device,
        |[path, _]| {
            for door in [Door::Group, Door::Cdev] {
                let memory = memory();
                let mut host = Host::open(door).unwrap();
                let device = host.open_device(&path).unwrap();
                host.map(&memory, 0, 0, PAGES * PAGE, IOVA).unwrap();
                let (mut source, reason) = chosen(&host, &device, map());
                assert_eq!(reason, "labdev.0: the device has a log of its own");
                storm(&mut source, &device, &memory);
                // A second migration.
                storm(&mut source, &device, &memory);
            }
        },
    );
}

#[test]
fn a_real_device_takes_64_ranges_and_gets_no_more() {
    with_devices(
        "a_real_device_takes_64_ranges_and_gets_no_more",
        Needs::Device,
        |[path, _]| {
            let memory = memory();
            let mut host = Host::open(Door::Group).unwrap();
            let device = host.open_device(&path).unwrap();
            host.map(&memory, 0, 0, PAGES * PAGE, IOVA).unwrap();
            // Every second page, 300 of them: the kernel's core takes 256 ranges, this device 64.
            let ranges = (0..300)
                .map(|index| DmaRange {
                    iova: IOVA + index * 2 * PAGE,
                    run: Run {
                        region: 0,
                        first: index * 2,
                        count: 1,
                    },
                })
                .collect();
            let (mut source, _) = chosen(&host, &device, DmaMap::new(ranges).unwrap());
            let mut copy = Copy::new(&memory);
            source.start(&copy.set).unwrap();
            fill(&device, IOVA, 600);
            let want: BTreeSet<u64> = (0..300).map(|index| index * 2).collect();
            assert_eq!(copy.collect(&mut source, CollectPhase::PreCopy), want);
            assert_eq!(source.figures().errors, 0);
        },
    );
}

#[test]
fn a_real_type_1_container_and_what_it_unmaps() {
    with_devices(
        "a_real_type_1_container_and_what_it_unmaps",
        Needs::Device,
        |[path, other]| {
            let memory = memory();
            let mut host = Host::open(Door::Group).unwrap();
            let device = host.open_device(&path).unwrap();
            let second = host.open_device(&other).unwrap();
            // Two mappings of the same memory: the second is unmapped under way.
            host.map(&memory, 0, 0, PAGES * PAGE, IOVA).unwrap();
            let alias = DmaRange {
                iova: 0x8000_0000,
                run: Run {
                    region: 0,
                    first: 0,
                    count: 512,
                },
            };
            host.map(&memory, 0, 0, alias.bytes(), alias.iova).unwrap();
            let ranges = [map().ranges(), &[alias]].concat();
            let tracking = || Tracking::Type1 {
                container: host.container().unwrap(),
            };
            let reach = Reach::Fixed(DmaMap::new(ranges).unwrap());
            let mut source =
                DmaSource::new("container", tracking(), reach, DmaOptions::default()).unwrap();
            storm(&mut source, &device, &memory);
            // The other device of the container is in the same log.
            storm(&mut source, &second, &memory);
            let mut copy = Copy::new(&memory);
            source.start(&copy.set).unwrap();
            fill(&device, alias.iova + 30 * PAGE, 3);
            source.unmapper().unwrap().unmap(alias).unwrap();
            assert_eq!(
                copy.take(),
                BTreeSet::from([30, 31, 32]),
                "before any collection"
            );
            fill(&device, IOVA, 3);
            let got = copy.collect(&mut source, CollectPhase::Final);
            assert_eq!(got, BTreeSet::from([0, 1, 2]));
            copy.assert_equal();
            // Nothing is mapped there any more.
            let errors = read(&device, Register::DmaErrors);
            write(&device, Register::DmaIova, alias.iova);
            let _ = device.write_u64(Register::DmaStart as u64 * 8, 1);
            assert!(read(&device, Register::DmaErrors) > errors);
        },
    );
}

#[test]
fn real_page_tables_of_an_iommufd() {
    with_devices(
        "real_page_tables_of_an_iommufd",
        Needs::Iommu,
        |[path, _]| {
            let memory = memory();
            let mut host = Host::open(Door::CdevTracked).unwrap();
            let device = host.open_device(&path).unwrap();
            host.map(&memory, 0, 0, PAGES * PAGE, IOVA).unwrap();
            let (iommufd, ioas) = host.address_space().unwrap();
            let translation = Translation::AddressSpace {
                iommufd,
                ioas,
                tables: vec![device.table().unwrap()],
                devices: vec![device.id().unwrap()],
            };
            let group = DmaGroup {
                name: "lab",
                translation: Some(translation),
                // Without its descriptor: so that it is not asked for its own log.
                devices: vec![DmaDevice {
                    name: "labdev.0",
                    device: None,
                    options: DmaOptions::default(),
                    pinned: None,
                }],
                memory: DmaMemory::Fixed(map()),
            };
            let mut chosen = choose(group).unwrap();
            assert_eq!(
                chosen[0].reason,
                "labdev.0: the IOMMU's page tables have dirty bits"
            );
            let source = &mut chosen[0].source;
            storm(source, &device, &memory);
            storm(source, &device, &memory);
            // The last pass keeps the bits, and after a cancellation they are there again.
            let mut copy = Copy::new(&memory);
            source.start(&copy.set).unwrap();
            fill(&device, IOVA + 40 * PAGE, 3);
            let want = BTreeSet::from([40, 41, 42]);
            let stopped = source.stopped_handle();
            stopped.stopped();
            assert_eq!(copy.collect(source, CollectPhase::Final), want);
            assert_eq!(copy.collect(source, CollectPhase::Final), BTreeSet::new());
            stopped.running();
            assert_eq!(copy.collect(source, CollectPhase::PreCopy), want);
            assert_eq!(copy.collect(source, CollectPhase::PreCopy), BTreeSet::new());
            // What is unmapped hands back its pages first.
            fill(&device, IOVA + 50 * PAGE, 2);
            source.unmapper().unwrap().unmap(map().ranges()[0]).unwrap();
            assert_eq!(copy.take(), BTreeSet::from([50, 51]));
            copy.assert_equal();
            assert_eq!(source.figures().errors, 0);
            source.stop().unwrap();
        },
    );
}

#[test]
fn a_real_log_that_fails_makes_everything_dirty_and_goes_on() {
    let name = "a_real_log_that_fails_makes_everything_dirty_and_goes_on";
    with_devices(name, Needs::Device, |[path, _]| {
        let memory = memory();
        let mut host = Host::open(Door::Group).unwrap();
        let device = host.open_device(&path).unwrap();
        host.map(&memory, 0, 0, PAGES * PAGE, IOVA).unwrap();
        let (mut source, _) = chosen(&host, &device, map());
        let mut copy = Copy::new(&memory);
        source.start(&copy.set).unwrap();
        fill(&device, IOVA + 9 * PAGE, 1);
        // The report fails, once.
        write(&device, Register::FaultLog, 2);
        let all = copy.collect(&mut source, CollectPhase::PreCopy);
        assert_eq!(all.len() as u64, PAGES);
        let figures = source.figures();
        assert_eq!(
            (figures.errors, figures.last_errno, figures.all_dirty),
            (1, libc::EIO, 1)
        );
        assert_eq!(read(&device, Register::Logging), 1, "begun again");
        fill(&device, IOVA + 11 * PAGE, 1);
        assert_eq!(
            copy.collect(&mut source, CollectPhase::Final),
            BTreeSet::from([11])
        );
        copy.assert_equal();
        source.stop().unwrap();
        assert_eq!(read(&device, Register::Logging), 0);
        // The start fails, once.
        write(&device, Register::FaultLog, 1);
        source.start(&copy.set).unwrap();
        assert_eq!(
            copy.collect(&mut source, CollectPhase::PreCopy).len() as u64,
            PAGES
        );
        assert_eq!(
            copy.collect(&mut source, CollectPhase::PreCopy),
            BTreeSet::new()
        );
        assert_eq!(source.figures().last_errno, libc::EIO);
    });
}

/// Moves what there is now; whether the stream has ended, and how many bytes.
fn pump(from: &mut MigrationDevice, to: &mut MigrationDevice) -> (bool, u64) {
    let mut buffer = vec![0; 256 << 10];
    let mut moved = 0;
    loop {
        match from.read(&mut buffer).unwrap() {
            StreamRead::Bytes(count) => {
                to.write(&buffer[..count]).unwrap();
                moved += count as u64;
            }
            StreamRead::NothingNow => return (false, moved),
            StreamRead::End => return (true, moved),
        }
    }
}

#[test]
fn a_real_devices_state_moves_through_every_state() {
    use MigrationState::{PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
    with_devices(
        "a_real_devices_state_moves_through_every_state",
        Needs::Device,
        |[a, b]| {
            for door in [Door::Group, Door::Cdev] {
                let memory = memory();
                let mut host = Host::open(door).unwrap();
                let (a, b) = (host.open_device(&a).unwrap(), host.open_device(&b).unwrap());
                host.map(&memory, 0, 0, PAGES * PAGE, IOVA).unwrap();
                let mut from = MigrationDevice::new(a.as_fd()).unwrap();
                let mut to = MigrationDevice::new(b.as_fd()).unwrap();
                let support = from.support();
                assert!(
                    support.p2p && support.pre_copy && support.data_size,
                    "{support:?}"
                );
                for state in [RunningP2p, Stop, Resuming] {
                    to.set_state(state).unwrap();
                }
                assert!(support.reinit, "the lab's device answers feature 12");
                write(&a, Register::DmaSeed, 1234);
                write(&a, Register::Trace, 1);
                write(&b, Register::Trace, 1);
                from.set_state(PreCopy).unwrap();
                let sizes = from.pre_copy_sizes().unwrap();
                assert!(sizes.initial_bytes > 0 && !sizes.reinit, "{sizes:?}");
                let (ended, initial) = pump(&mut from, &mut to);
                assert!(!ended && initial >= sizes.initial_bytes, "{initial}");
                write(&a, Register::Touch, 20);
                assert!(from.pre_copy_sizes().unwrap().dirty_bytes > 0);
                write(&a, Register::Reinit, 8 << 12);
                let sizes = from.pre_copy_sizes().unwrap();
                assert!(sizes.reinit && sizes.initial_bytes > 0, "{sizes:?}");
                assert!(!from.pre_copy_sizes().unwrap().reinit, "told once");
                pump(&mut from, &mut to);
                from.set_state(PreCopyP2p).unwrap();
                write(&a, Register::Touch, 5);
                from.set_state(StopCopy).unwrap();
                let (ended, last) = pump(&mut from, &mut to);
                assert!(ended && last > 0);
                for state in [Stop, RunningP2p, Running] {
                    to.set_state(state).unwrap();
                }
                assert_eq!(read(&b, Register::DmaSeed), 1234);
                assert_eq!(read(&a, Register::Crc), read(&b, Register::Crc));
                assert_eq!(read(&a, Register::Touches), read(&b, Register::Touches));
                // PRE_COPY 6, PRE_COPY_P2P 7, STOP_COPY 3; STOP 1, RUNNING_P2P 5, RUNNING 2.
                assert_eq!(read(&a, Register::Trace) & 0xfff, 0x673);
                assert_eq!(read(&b, Register::Trace) & 0xfff, 0x152);
                from.set_state(Stop).unwrap();
                from.reset().unwrap();
                eprintln!("{door:?}: {initial} bytes of initial state, {last} at the stop");
            }
        },
    );
}
