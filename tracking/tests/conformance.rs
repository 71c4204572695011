//! The conformance suite over every source of this crate: on fake kernels, on the real one, and on plain memory.
//!
//! Without /dev/kvm the checks of the real KVM say that they were skipped; with `MULTIFD_REQUIRE_KVM=1` they fail instead.
#![allow(clippy::print_stderr)] // A skipped test says so.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use kvm_ioctls::VcpuFd;
use multifd_tracking::conformance::{Harness, Writer};
use multifd_tracking::fake::{FakeFd, FakeKernel, FakeProcess, FakeSlot, FakeVm, Wrote};
use multifd_tracking::kvm::{
    LogSource, Protect, RingConfig, RingFullHandle, RingSource, Slot, SlotControl, Slots,
    enable_with,
};
use multifd_tracking::process::{MappedRange, ProcessSource};
use multifd_tracking::vhost_log::{GuestRange, VhostUserLog};
use multifd_tracking::vm_memory::{AtomicBitmaps, MarkerBitmap, bind_all};
use multifd_tracking::{Run, Source, VmmMarker, VmmWrites, source_conformance_tests};
use vm_memory::bitmap::{AtomicBitmap, NewBitmap};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

mod machine;

use machine::{Machine, Memory, PAGE};

/// Pages of the regions of most harnesses: the second begins in the middle of a word of a log.
const REGIONS: [u64; 2] = [1000, 70];

/// Memory as counters: what a fake machine writes.
#[derive(Clone)]
struct Model(Arc<Vec<Vec<AtomicU64>>>);

impl Model {
    fn new(regions: &[u64]) -> Self {
        let pages = |&pages: &u64| (0..pages).map(|_| AtomicU64::new(0)).collect();
        Self(Arc::new(regions.iter().map(pages).collect()))
    }

    fn write(&self, region: u32, page: u64) {
        self.0[region as usize][page as usize].fetch_add(1, Ordering::SeqCst);
    }

    fn value(&self, region: u32, page: u64) -> u64 {
        self.0[region as usize][page as usize].load(Ordering::SeqCst)
    }
}

/// A writer made of a closure.
struct Writes<F>(F);

impl<F: FnMut(u32, u64) + Send> Writer for Writes<F> {
    fn write(&mut self, region: u32, page: u64) {
        (self.0)(region, page);
    }
}

fn writer(write: impl FnMut(u32, u64) + Send + 'static) -> Box<dyn Writer> {
    Box::new(Writes(write))
}

/// What most harnesses are: a source, two writers, and a way to read.
struct Plain {
    regions: Vec<u64>,
    source: Option<Box<dyn Source>>,
    writers: Vec<Box<dyn Writer>>,
    value: Box<dyn Fn(u32, u64) -> u64>,
    storm_writes: u64,
}

impl Plain {
    fn over(
        regions: &[u64],
        source: impl Source + 'static,
        writers: Vec<Box<dyn Writer>>,
        value: impl Fn(u32, u64) -> u64 + 'static,
    ) -> Self {
        Self {
            regions: regions.to_vec(),
            source: Some(Box::new(source)),
            writers,
            value: Box::new(value),
            storm_writes: 100_000,
        }
    }

    fn boxed(self) -> Option<Box<dyn Harness>> {
        Some(Box::new(self))
    }
}

impl Harness for Plain {
    fn regions(&self) -> Vec<u64> {
        self.regions.clone()
    }

    fn source(&mut self) -> Box<dyn Source> {
        self.source.take().expect("asked for once")
    }

    fn writers(&mut self) -> Vec<Box<dyn Writer>> {
        std::mem::take(&mut self.writers)
    }

    fn value(&self, region: u32, page: u64) -> u64 {
        (self.value)(region, page)
    }

    fn storm_writes(&self) -> u64 {
        self.storm_writes
    }
}

// ── the VMM's own writes ─────────────────────────────────────────────────────────────────────────────────────────────

fn marker(_: &str) -> Option<Box<dyn Harness>> {
    let (source, model) = (VmmWrites::new(), Model::new(&REGIONS));
    let write = |marker: VmmMarker, model: Model| {
        writer(move |region, page| {
            model.write(region, page);
            marker.mark(Run {
                region,
                first: page,
                count: 1,
            });
        })
    };
    let writers = vec![
        write(source.marker(), model.clone()),
        write(source.marker(), model.clone()),
    ];
    Plain::over(&REGIONS, source, writers, move |region, page| {
        model.value(region, page)
    })
    .boxed()
}

fn guest_memory<B: NewBitmap>() -> Arc<GuestMemoryMmap<B>> {
    let ranges = [
        (GuestAddress(0), 1000 * PAGE),
        (GuestAddress(1 << 32), 70 * PAGE),
    ];
    Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
}

fn address(region: u32, page: u64) -> GuestAddress {
    GuestAddress((u64::from(region) << 32) + page * PAGE as u64 + 16)
}

/// Writes and reads through vm-memory, which marks its bitmap.
fn over_vm_memory<B: NewBitmap + Send + Sync + 'static>(
    memory: &Arc<GuestMemoryMmap<B>>,
    source: impl Source + 'static,
) -> Option<Box<dyn Harness>> {
    let numbers = Arc::new(AtomicU64::new(1));
    let write = || {
        let (memory, numbers) = (Arc::clone(memory), Arc::clone(&numbers));
        writer(move |region, page| {
            let number = numbers.fetch_add(1, Ordering::SeqCst);
            memory
                .store(number, address(region, page), Ordering::SeqCst)
                .unwrap();
        })
    };
    let read = Arc::clone(memory);
    let value = move |region, page| read.load(address(region, page), Ordering::SeqCst).unwrap();
    Plain::over(&REGIONS, source, vec![write(), write()], value).boxed()
}

fn marker_bitmap(_: &str) -> Option<Box<dyn Harness>> {
    let (memory, source) = (guest_memory::<MarkerBitmap>(), VmmWrites::named("rust-vmm"));
    bind_all(&memory, &source);
    over_vm_memory(&memory, source)
}

fn atomic_bitmap(_: &str) -> Option<Box<dyn Harness>> {
    let memory = guest_memory::<AtomicBitmap>();
    over_vm_memory(&memory, AtomicBitmaps::new(Arc::clone(&memory)))
}

// ── vhost-user ───────────────────────────────────────────────────────────────────────────────────────────────────────

fn vhost_log(_: &str) -> Option<Box<dyn Harness>> {
    let range = |region: u32, pages| GuestRange {
        region,
        guest_address: u64::from(region) * 1000 * PAGE as u64,
        pages,
    };
    let log = VhostUserLog::allocate(&[range(0, REGIONS[0]), range(1, REGIONS[1])]).unwrap();
    let model = Model::new(&REGIONS);
    // A back end in another process maps the file; here the bytes are written through it, under a lock in the place of
    // the atomic or.
    let file = Arc::new(Mutex::new(File::from(
        log.base().file.try_clone_to_owned().unwrap(),
    )));
    let shared = Arc::new(machine_log(&file.lock().unwrap(), log.base().bytes));
    let write = || {
        let (model, shared) = (model.clone(), Arc::clone(&shared));
        writer(move |region, page| {
            model.write(region, page);
            shared.or(u64::from(region) * 1000 + page);
        })
    };
    let writers = vec![write(), write()];
    let read = model.clone();
    Plain::over(&REGIONS, log, writers, move |region, page| {
        read.value(region, page)
    })
    .boxed()
}

/// The log as a back end has it.
fn machine_log(file: &File, bytes: u64) -> machine::SharedLog {
    let mut first = [0];
    file.read_exact_at(&mut first, bytes - 1)
        .expect("the file is as long as its log");
    machine::SharedLog::map(file.as_fd(), bytes as usize)
}

// ── KVM, fake ────────────────────────────────────────────────────────────────────────────────────────────────────────

/// Region 0 is slot 0, region 1 slot 3.
fn fake_slots() -> Vec<Slot> {
    REGIONS
        .iter()
        .zip([(0, 0), (3, 1)])
        .map(|(&pages, (id, region))| Slot {
            id,
            region,
            first: 0,
            pages,
        })
        .collect()
}

fn fake_vm() -> FakeVm {
    let slots: Vec<FakeSlot> = fake_slots()
        .iter()
        .map(|slot| FakeSlot {
            id: slot.id,
            pages: slot.pages,
        })
        .collect();
    FakeVm::with_everything(&slots)
}

fn fake_control(vm: &FakeVm) -> Box<dyn SlotControl> {
    let vm = vm.clone();
    Box::new(move |on| {
        vm.set_logging(on);
        Ok(())
    })
}

fn fake_writer(
    vm: &FakeVm,
    vcpu: usize,
    model: &Model,
    ring: Option<RingFullHandle>,
) -> Box<dyn Writer> {
    let (vm, model) = (vm.clone(), model.clone());
    writer(move |region, page| {
        model.write(region, page);
        let slot = if region == 0 { 0 } else { 3 };
        if vm.write(vcpu, slot, page) == Wrote::RingFull
            && let Some(handle) = &ring
        {
            handle.on_full(vcpu).unwrap();
        }
    })
}

fn fake_ring(_: &str) -> Option<Box<dyn Harness>> {
    let (kernel, vm, model) = (FakeKernel::new(), fake_vm(), Model::new(&REGIONS));
    let fd = vm.open(&kernel);
    let config = RingConfig {
        entries: RingConfig::ENTRIES_MIN,
    };
    enable_with(&kernel, fd.as_fd(), config).unwrap();
    let vcpus: Vec<FakeFd> = (0..2).map(|_| vm.create_vcpu(&kernel)).collect();
    let slots = Slots::new(fake_slots()).unwrap();
    let source = RingSource::with_kernel(
        Arc::new(kernel),
        &fd,
        &vcpus,
        config,
        slots,
        fake_control(&vm),
    )
    .unwrap();
    let writers = (0..2)
        .map(|vcpu| fake_writer(&vm, vcpu, &model, Some(source.handle())))
        .collect();
    Plain::over(&REGIONS, source, writers, move |region, page| {
        model.value(region, page)
    })
    .boxed()
}

fn fake_log(protect: Protect) -> Option<Box<dyn Harness>> {
    let (kernel, vm, model) = (FakeKernel::new(), fake_vm(), Model::new(&REGIONS));
    let fd = vm.open(&kernel);
    let slots = Slots::new(fake_slots()).unwrap();
    let source =
        LogSource::with_kernel(Arc::new(kernel), &fd, protect, slots, fake_control(&vm)).unwrap();
    let writers = (0..2)
        .map(|vcpu| fake_writer(&vm, vcpu, &model, None))
        .collect();
    Plain::over(&REGIONS, source, writers, move |region, page| {
        model.value(region, page)
    })
    .boxed()
}

// ── KVM, real ────────────────────────────────────────────────────────────────────────────────────────────────────────

const KVM_PAGES: u32 = 1024;

/// The word of a page that is written: page 1 holds the program at its beginning.
const KVM_WORD: u64 = 0x800;

fn kvm_writer(mut vcpu: VcpuFd, index: usize, ring: Option<RingFullHandle>) -> Box<dyn Writer> {
    writer(move |region, page| {
        assert_eq!(region, 0);
        let address = page * PAGE as u64 + KVM_WORD;
        machine::touch(&mut vcpu, index, address, ring.as_ref());
    })
}

fn over_kvm(
    machine: &mut Machine,
    source: impl Source + 'static,
    handle: Option<RingFullHandle>,
) -> Option<Box<dyn Harness>> {
    let memory = Arc::clone(&machine.memory);
    memory.write(machine::TOUCH_AT as usize, &machine::TOUCH);
    let writers = std::mem::take(&mut machine.vcpus)
        .into_iter()
        .zip(0..)
        .map(|(vcpu, index)| kvm_writer(vcpu, index, handle.clone()))
        .collect();
    let regions = [machine.total_pages()];
    let value = move |_, page: u64| memory.read((page * PAGE as u64 + KVM_WORD) as usize);
    let mut plain = Plain::over(&regions, source, writers, value);
    plain.storm_writes = 30_000;
    plain.boxed()
}

fn kvm_ring(check: &str) -> Option<Box<dyn Harness>> {
    let config = RingConfig { entries: 4096 };
    let mut machine = Machine::new(&format!("kvm_ring::{check}"), 2, KVM_PAGES, Some(config))?;
    let source = machine.ring(config);
    let handle = source.handle();
    over_kvm(&mut machine, source, Some(handle))
}

fn kvm_log(name: &str, check: &str, protect: Protect) -> Option<Box<dyn Harness>> {
    let mut machine = Machine::new(&format!("{name}::{check}"), 2, KVM_PAGES, None)?;
    let source = machine.log(protect);
    over_kvm(&mut machine, source, None)
}

// ── process memory ───────────────────────────────────────────────────────────────────────────────────────────────────

fn process(kind: i32) -> Option<Box<dyn Harness>> {
    let memories: Vec<Arc<Memory>> = REGIONS
        .iter()
        .map(|&pages| Arc::new(Memory::mapped(pages as usize * PAGE, kind)))
        .collect();
    let ranges = memories
        .iter()
        .zip(0..)
        .map(|(memory, region)| MappedRange {
            region,
            first: 0,
            address: memory.start.as_ptr() as u64,
            pages: (memory.bytes / PAGE) as u64,
        })
        .collect();
    let source = ProcessSource::new(ranges).unwrap();
    let write = || {
        let memories = memories.clone();
        writer(move |region, page| memories[region as usize].increment(page as usize * PAGE))
    };
    let writers = vec![write(), write()];
    let value = move |region: u32, page: u64| memories[region as usize].read(page as usize * PAGE);
    Plain::over(&REGIONS, source, writers, value).boxed()
}

fn fake_process(_: &str) -> Option<Box<dyn Harness>> {
    let (kernel, process, model) = (FakeKernel::new(), FakeProcess::new(), Model::new(&REGIONS));
    let (faults, pagemap) = process.open(&kernel);
    let base = |region: u32| (1 + u64::from(region)) << 30;
    let ranges = REGIONS
        .iter()
        .zip(0..)
        .map(|(&pages, region)| MappedRange {
            region,
            first: 0,
            address: base(region),
            pages,
        })
        .collect();
    let source = ProcessSource::with_kernel(Arc::new(kernel), &faults, &pagemap, ranges).unwrap();
    let write = || {
        let (process, model) = (process.clone(), model.clone());
        writer(move |region, page| {
            model.write(region, page);
            process.write(base(region) + page * PAGE as u64);
        })
    };
    let writers = vec![write(), write()];
    let read = model.clone();
    Plain::over(&REGIONS, source, writers, move |region, page| {
        read.value(region, page)
    })
    .boxed()
}

source_conformance_tests!(vmm_marker, marker);
source_conformance_tests!(vm_memory_marker, marker_bitmap);
source_conformance_tests!(vm_memory_atomic, atomic_bitmap);
source_conformance_tests!(vhost_user, vhost_log);
source_conformance_tests!(ring_on_fake_kernel, fake_ring);
source_conformance_tests!(log_plain_on_fake_kernel, |_| fake_log(Protect::Plain));
source_conformance_tests!(log_manual_on_fake_kernel, |_| fake_log(Protect::Manual));
source_conformance_tests!(log_initially_set_on_fake_kernel, |_| fake_log(
    Protect::ManualInitiallySet
));
source_conformance_tests!(ring_on_kvm, kvm_ring);
source_conformance_tests!(log_plain_on_kvm, |check| kvm_log(
    "log_plain_on_kvm",
    check,
    Protect::Plain
));
source_conformance_tests!(log_manual_on_kvm, |check| kvm_log(
    "log_manual_on_kvm",
    check,
    Protect::Manual
));
source_conformance_tests!(log_initially_set_on_kvm, |check| kvm_log(
    "log_initially_set_on_kvm",
    check,
    Protect::ManualInitiallySet
));
source_conformance_tests!(process_private, |_| process(libc::MAP_PRIVATE));
source_conformance_tests!(process_shared, |_| process(libc::MAP_SHARED));
source_conformance_tests!(process_on_fake_kernel, fake_process);
