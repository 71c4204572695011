//! Time to find and take 1,000 dirty pages in guests from 1 GiB to 1 TiB, for the set itself and for each source; and where
//! KVM's log overtakes its ring when much is written.
//!
//! ```text
//! cargo bench -p multifd-tracking --bench dirty -- [set] [sources] [heavy] [lanes] [--rounds N]
//! ```
//! Guests are sparse mappings: only what is written is there. A KVM guest's 1,000 pages are written by its vCPU, in 64-bit
//! mode through page tables that map just these pages: strewn over all of its memory, or over the last GiB of it, which
//! tells what follows the size of memory from what follows how far apart the pages lie. The time of a source is that of its
//! collection, of taking the round and of handing all of it out; the log that is cleared late is cleared while the round is
//! handed out. Of the ring, the time inside the kernel's reset is told apart. Sizes take turns, and each figure is the median
//! of the rounds, of which each is the fastest of several tries.
#![allow(unsafe_code)] // Justification: mapping guest memory and giving it to KVM has no safe way.
#![allow(clippy::print_stdout, clippy::print_stderr)] // a program's business

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use multifd_tracking::kernel::{Kernel, Linux, Payload, Request, RingMemory};
use multifd_tracking::kvm::{
    self, LogSource, Protect, RingConfig, RingFullHandle, RingSource, Slot, SlotControl, Slots,
};
use multifd_tracking::process::{MappedRange, ProcessSource};
use multifd_tracking::vhost_log::{GuestRange, VhostUserLog};
use multifd_tracking::vm_memory::AtomicBitmaps;
use multifd_tracking::{CollectPhase, DirtySet, Round, Source, VmmWrites};
use vm_memory::bitmap::AtomicBitmap;

const PAGE: u64 = 4096;
const GIB: [u64; 5] = [1, 16, 64, 256, 1024];
const WRITTEN: u64 = 1000;

fn main() {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|text| text != "--bench")
        .collect();
    let rounds = arguments
        .iter()
        .position(|text| text == "--rounds")
        .and_then(|at| arguments.get(at + 1))
        .map_or(15, |text| text.parse().expect("--rounds takes a number"));
    let all = !arguments
        .iter()
        .any(|text| ["set", "sources", "heavy", "lanes"].contains(&text.as_str()));
    let wanted = |part: &str| all || arguments.iter().any(|text| text == part);
    if wanted("set") {
        set(rounds);
    }
    if wanted("sources") {
        sources(rounds);
    }
    if wanted("heavy") {
        heavy(rounds.min(5));
    }
    if wanted("lanes") {
        lanes(rounds);
    }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn us(since: Instant) -> f64 {
    since.elapsed().as_nanos() as f64 / 1000.0
}

fn hand_out(mut round: Round) -> u64 {
    let mut pages = 0;
    while let Some(run) = round.next_run(256) {
        pages += run.count;
    }
    pages
}

// ── the set ──────────────────────────────────────────────────────────────────────────────────────────────────────────

/// Which pages are written from one try to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pattern {
    /// The same ones, as a guest's working set is.
    Same,
    /// Always others.
    Other,
}

/// Marks, takes and hands out 1,000 scattered pages; the fastest of some tries.
fn scattered(set: &DirtySet, pages: u64, pattern: Pattern) -> [f64; 3] {
    let stride = pages / WRITTEN;
    let mut best = [f64::MAX; 3];
    for attempt in 0..20 {
        // A twentieth of the way to the next page: another word, and in a large guest another line and summary word.
        let shift = match pattern {
            Pattern::Same => 0,
            Pattern::Other => attempt * (stride / 20),
        };
        let begun = Instant::now();
        for at in 0..WRITTEN {
            set.mark_page(0, at * stride + shift);
        }
        let mark = us(begun);
        let begun = Instant::now();
        let round = set.take_round();
        let take = us(begun);
        let begun = Instant::now();
        assert_eq!(hand_out(round), WRITTEN);
        for (best, time) in best.iter_mut().zip([mark, take, us(begun)]) {
            *best = best.min(time);
        }
    }
    best
}

fn set(rounds: usize) {
    for pattern in [Pattern::Same, Pattern::Other] {
        set_of(pattern, rounds);
    }
}

fn set_of(pattern: Pattern, rounds: usize) {
    let which = match pattern {
        Pattern::Same => "the same pages each time",
        Pattern::Other => "other pages each time",
    };
    println!("\nset: {WRITTEN} scattered pages, {which}, microseconds, median of {rounds} rounds");
    println!("| guest GiB | mark | take | hand out | take + hand out | together |");
    let sets: Vec<(u64, DirtySet)> = GIB
        .iter()
        .map(|gib| {
            let set = DirtySet::new(&[(gib << 30) / PAGE]);
            // As a migration begins: all of the set is there.
            set.mark_all();
            hand_out(set.take_round());
            (*gib, set)
        })
        .collect();
    let mut times: Vec<Vec<[f64; 3]>> = vec![Vec::new(); sets.len()];
    for _ in 0..rounds {
        for ((gib, set), times) in sets.iter().zip(&mut times) {
            times.push(scattered(set, (gib << 30) / PAGE, pattern));
        }
    }
    let mut first = None;
    for ((gib, _), times) in sets.iter().zip(times) {
        let of = |part: fn(&[f64; 3]) -> f64| median(times.iter().map(part).collect());
        let (taken, all) = (of(|t| t[1] + t[2]), of(|t| t.iter().sum()));
        let (taken_first, all_first) = *first.get_or_insert((taken, all));
        println!(
            "| {gib} | {:.1} | {:.1} | {:.1} | {taken:.1} ({:.2}) | {all:.1} ({:.2}) |",
            of(|t| t[0]),
            of(|t| t[1]),
            of(|t| t[2]),
            taken / taken_first,
            all / all_first
        );
    }
}

// ── KVM guests ───────────────────────────────────────────────────────────────────────────────────────────────────────

/// A sparse mapping.
struct Sparse {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the memory is reached by volatile word accesses and by KVM only.
unsafe impl Send for Sparse {}
// SAFETY: as above.
unsafe impl Sync for Sparse {}

impl Sparse {
    fn new(bytes: u64) -> std::io::Result<Self> {
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        );
        let bytes = bytes as usize;
        // SAFETY: a new mapping of nobody's address.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).expect("not at address 0");
        Ok(Self { start, bytes })
    }

    /// Reads a page, a word at a time.
    fn read(&self, at: u64) {
        for word in (0..PAGE).step_by(8) {
            // SAFETY: inside the mapping, which lives as long as `self`, and aligned.
            let place = unsafe { self.start.add((at + word) as usize) };
            // SAFETY: as above; mapped and readable.
            let _ = unsafe { place.cast::<u64>().read_volatile() };
        }
    }

    fn write(&self, at: u64, word: u64) {
        assert!(at.is_multiple_of(8) && (at as usize) < self.bytes);
        // SAFETY: inside the mapping, as just asserted.
        let place = unsafe { self.start.as_ptr().add(at as usize) };
        // SAFETY: aligned and inside the mapping; a guest may access it at the same time, hence volatile.
        unsafe { place.cast::<u64>().write_volatile(word) };
    }
}

impl Drop for Sparse {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own; the VM that used it is dropped before it.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

const CODE: u64 = 0x1000;
const PAGE_MAP: u64 = 0x2000;
const POINTERS: u64 = 0x3000;
const DIRECTORY: u64 = 0x4000;
/// Page tables: the first maps the lowest 2 MiB onto themselves, the others the pages that are written.
const TABLES: u64 = 0x1_0000;
/// Where the written pages begin, for the program.
const WINDOW: u64 = 2 << 20;
/// First page that is written: behind the tables.
const FIRST: u64 = 1024;

/// `L: mov [rdi],rax ; add rdi,4096 ; dec rcx ; jnz L ; out 0x10,al`
const PROGRAM: [u8; 17] = [
    0x48, 0x89, 0x07, 0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, 0x48, 0xff, 0xc9, 0x75, 0xf1, 0xe6,
    0x10,
];

/// Field order is drop order: the vCPU and the VM go before their memory.
struct Guest {
    vcpu: VcpuFd,
    vm: Arc<VmFd>,
    memory: Arc<Sparse>,
    pages: u64,
}

impl Guest {
    /// A guest that can write `written` pages, evenly strewn.
    fn new(
        gib: u64,
        written: u64,
        strewn: Strewn,
        ring: Option<RingConfig>,
    ) -> std::io::Result<Self> {
        let errno = |error: kvm_ioctls::Error| std::io::Error::from_raw_os_error(error.errno());
        let bytes = gib << 30;
        let pages = bytes / PAGE;
        let kvm = Kvm::new().map_err(errno)?;
        let vm = kvm.create_vm().map_err(errno)?;
        if let Some(config) = ring {
            kvm::enable(&vm, config).map_err(std::io::Error::other)?;
        }
        let memory = Arc::new(Sparse::new(bytes)?);
        let vm = Arc::new(vm);
        set_slot(&vm, &memory, 0)?;
        for (at, chunk) in PROGRAM.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            memory.write(CODE + at as u64 * 8, u64::from_le_bytes(word));
        }
        memory.write(PAGE_MAP, POINTERS | 3);
        memory.write(POINTERS, DIRECTORY | 3);
        for table in 0..=written.div_ceil(512) {
            memory.write(DIRECTORY + table * 8, (TABLES + table * PAGE) | 3);
        }
        for page in 0..512 {
            memory.write(TABLES + page * 8, (page * PAGE) | 3);
        }
        let over = match strewn {
            Strewn::Everywhere => pages,
            Strewn::LastGib => (1 << 30) / PAGE,
        };
        let stride = (over - FIRST) / written;
        for at in 0..written {
            let page = pages - over + FIRST + at * stride;
            memory.write(TABLES + PAGE + at * 8, (page * PAGE) | 3);
        }
        let vcpu = vm.create_vcpu(0).map_err(errno)?;
        let known = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(errno)?;
        vcpu.set_cpuid2(&known).map_err(errno)?;
        let mut special = vcpu.get_sregs().map_err(errno)?;
        let code = kvm_segment {
            limit: u32::MAX,
            selector: 8,
            type_: 11,
            present: 1,
            s: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        let data = kvm_segment {
            selector: 16,
            type_: 3,
            l: 0,
            db: 1,
            ..code
        };
        (special.cs, special.ds, special.es, special.ss) = (code, data, data, data);
        special.cr3 = PAGE_MAP;
        special.cr4 = 1 << 5;
        special.cr0 = 1 << 31 | 1 << 5 | 1 << 4 | 1;
        special.efer = 1 << 10 | 1 << 8;
        vcpu.set_sregs(&special).map_err(errno)?;
        Ok(Self {
            vcpu,
            vm,
            memory,
            pages,
        })
    }

    fn slots(&self) -> Slots {
        let slot = Slot {
            id: 0,
            region: 0,
            first: 0,
            pages: self.pages,
        };
        Slots::new(vec![slot]).expect("one slot")
    }

    fn control(&self) -> Box<dyn SlotControl> {
        let (vm, memory) = (Arc::clone(&self.vm), Arc::clone(&self.memory));
        Box::new(move |on| set_slot(&vm, &memory, if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 }))
    }

    /// Has the vCPU write the first `count` of its pages.
    fn write(&mut self, count: u64, full: Option<&RingFullHandle>) {
        let registers = kvm_regs {
            rip: CODE,
            rflags: 2,
            rdi: WINDOW,
            rcx: count,
            ..Default::default()
        };
        self.vcpu.set_regs(&registers).expect("registers");
        loop {
            match self.vcpu.run().expect("KVM_RUN") {
                VcpuExit::IoOut(0x10, _) => return,
                VcpuExit::Unsupported(kvm::EXIT_DIRTY_RING_FULL) => {
                    let handle = full.expect("only a ring fills");
                    handle.on_full(0).expect("the ring is emptied");
                }
                VcpuExit::Intr => {}
                other => panic!("the program left by {other:?}"),
            }
        }
    }
}

fn set_slot(vm: &VmFd, memory: &Sparse, flags: u32) -> std::io::Result<()> {
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags,
        guest_phys_addr: 0,
        memory_size: memory.bytes as u64,
        userspace_addr: memory.start.as_ptr() as u64,
    };
    // SAFETY: the range is the whole mapping, which outlives the VM; there is no other slot.
    unsafe { vm.set_user_memory_region(region) }
        .map_err(|error| std::io::Error::from_raw_os_error(error.errno()))
}

/// Where the written pages lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Strewn {
    /// Over all memory: in a large guest each has its own lines and pages of the kernel's tables.
    Everywhere,
    /// Over the last GiB.
    LastGib,
}

/// Linux, with the time inside its calls.
#[derive(Default)]
struct Timed {
    ns: AtomicU64,
}

impl Kernel for Timed {
    fn ioctl(&self, fd: BorrowedFd<'_>, request: Request, payload: Payload<'_>) -> io::Result<i32> {
        let begun = Instant::now();
        let answer = Linux.ioctl(fd, request, payload);
        self.ns
            .fetch_add(begun.elapsed().as_nanos() as u64, Ordering::Relaxed);
        answer
    }

    fn map_ring(&self, vcpu: BorrowedFd<'_>, entries: u32) -> io::Result<Box<dyn RingMemory>> {
        Linux.map_ring(vcpu, entries)
    }

    fn read(&self, fd: BorrowedFd<'_>, octets: &mut [u8]) -> io::Result<usize> {
        Linux.read(fd, octets)
    }

    fn write(&self, fd: BorrowedFd<'_>, octets: &[u8]) -> io::Result<usize> {
        Linux.write(fd, octets)
    }
}

/// A guest with its source started, and the set that it reports into.
struct Tracked {
    guest: Guest,
    source: Box<dyn Source>,
    full: Option<RingFullHandle>,
    kernel: Arc<Timed>,
    set: DirtySet,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Ring,
    Log(Protect),
}

impl Way {
    const ALL: [Self; 3] = [
        Self::Ring,
        Self::Log(Protect::Plain),
        Self::Log(Protect::ManualInitiallySet),
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Ring => "KVM ring",
            Self::Log(Protect::Plain) => "KVM log, plain",
            Self::Log(_) => "KVM log, cleared late",
        }
    }

    fn track(self, gib: u64, written: u64, strewn: Strewn) -> std::io::Result<Tracked> {
        let config = RingConfig {
            entries: RingConfig::ENTRIES_MAX,
        };
        let guest = Guest::new(gib, written, strewn, (self == Self::Ring).then_some(config))?;
        let (slots, control) = (guest.slots(), guest.control());
        let other = |error| std::io::Error::other(error);
        let mut full = None;
        let kernel = Arc::new(Timed::default());
        let mut source: Box<dyn Source> = match self {
            Self::Ring => {
                let vcpus = [&guest.vcpu];
                let kernel = Arc::clone(&kernel) as Arc<dyn Kernel>;
                let source =
                    RingSource::with_kernel(kernel, &guest.vm, vcpus, config, slots, control)
                        .map_err(other)?;
                full = Some(source.handle());
                Box::new(source.without_reaper())
            }
            Self::Log(protect) => {
                Box::new(LogSource::new(&guest.vm, protect, slots, control).map_err(other)?)
            }
        };
        let set = DirtySet::new(&[guest.pages]);
        source.start(&set).map_err(other)?;
        // As a migration begins: everything is sent once.
        set.mark_all();
        hand_out(set.take_round());
        let mut tracked = Tracked {
            guest,
            source,
            full,
            kernel,
            set,
        };
        tracked.guest.write(written, tracked.full.as_ref());
        tracked.collect();
        Ok(tracked)
    }
}

impl Tracked {
    fn collect(&mut self) -> u64 {
        self.source
            .collect(&self.set, CollectPhase::PreCopy)
            .expect("a collection");
        hand_out(self.set.take_round())
    }

    /// The fastest of three: the first one brings the guest's pages back into the caches that its neighbours had.
    fn fastest(&mut self, written: u64) -> Taken {
        let tries = (0..3).map(|_| self.measure(written));
        tries
            .min_by(|one, other| one.all.total_cmp(&other.all))
            .expect("three tries")
    }

    /// Writes, and returns the time of finding and taking what was written, harvests of a full ring included.
    fn measure(&mut self, written: u64) -> Taken {
        let before = self.source.figures().harvest_ns;
        let in_kernel = self.kernel.ns.load(Ordering::Relaxed);
        self.guest.write(written, self.full.as_ref());
        let on_full = (self.source.figures().harvest_ns - before) as f64 / 1000.0;
        let begun = Instant::now();
        let found = self.collect();
        let time = us(begun) + on_full;
        // Page tables count as written on some processors.
        assert!(
            found >= written && found < written + written / 100 + 64,
            "{found} pages found of {written}"
        );
        let in_kernel = self.kernel.ns.load(Ordering::Relaxed) - in_kernel;
        Taken {
            all: time,
            kernel: in_kernel as f64 / 1000.0,
        }
    }
}

/// Microseconds of finding and taking pages.
#[derive(Clone, Copy)]
struct Taken {
    all: f64,
    /// Inside the kernel's reset of the rings.
    kernel: f64,
}

fn sources(rounds: usize) {
    println!("\nsources: find and take {WRITTEN} pages, microseconds, median of {rounds} rounds");
    println!(
        "| source | {} | 1 TiB to 1 GiB |",
        GIB.map(|gib| format!("{gib} GiB")).join(" | ")
    );
    let rows = Way::ALL.map(|way| (way, Strewn::Everywhere));
    for (way, strewn) in [(Way::Ring, Strewn::LastGib)].into_iter().chain(rows) {
        let name = match strewn {
            Strewn::Everywhere => way.name().to_owned(),
            Strewn::LastGib => format!("{}, pages in the last GiB", way.name()),
        };
        let tracked: std::io::Result<Vec<Tracked>> = GIB
            .iter()
            .map(|gib| way.track(*gib, WRITTEN, strewn))
            .collect();
        let mut tracked = match tracked {
            Ok(tracked) => tracked,
            Err(error) => {
                println!("| {name} | not here: {error} |");
                continue;
            }
        };
        let mut times = vec![Vec::new(); GIB.len()];
        for _ in 0..rounds {
            for (tracked, times) in tracked.iter_mut().zip(&mut times) {
                times.push(tracked.fastest(WRITTEN));
            }
        }
        let part = |part: fn(&Taken) -> f64| {
            times
                .iter()
                .map(|times| times.iter().map(part).collect())
                .collect()
        };
        row(&name, part(|taken| taken.all));
        if way == Way::Ring {
            row("… of it the kernel's reset", part(|taken| taken.kernel));
            row("… of it ours", part(|taken| taken.all - taken.kernel));
        }
    }
    others(rounds);
}

fn row(name: &str, times: Vec<Vec<f64>>) {
    let medians: Vec<f64> = times.into_iter().map(median).collect();
    let cells: Vec<String> = medians.iter().map(|time| format!("{time:.0}")).collect();
    println!(
        "| {name} | {} | {:.2} |",
        cells.join(" | "),
        medians[4] / medians[0]
    );
}

/// A source and something that writes 1,000 pages where it looks.
type Other = (Box<dyn Source>, Box<dyn Fn()>);

/// A source without a hypervisor: its name, and what makes it for so many pages.
type Maker = (&'static str, fn(u64) -> Other);

/// The sources without a hypervisor.
fn others(rounds: usize) {
    let each: [Maker; 4] = [
        ("VMM marker", marker),
        ("process memory", process),
        ("vhost-user log", vhost_log),
        ("vm-memory bitmap", bitmap),
    ];
    for (name, make) in each {
        let mut tracked: Vec<(Other, DirtySet)> = GIB
            .iter()
            .map(|gib| {
                let pages = (gib << 30) / PAGE;
                let (mut other, set) = (make(pages), DirtySet::new(&[pages]));
                other.0.start(&set).expect("the source starts");
                set.mark_all();
                hand_out(set.take_round());
                other.1();
                other
                    .0
                    .collect(&set, CollectPhase::PreCopy)
                    .expect("a collection");
                hand_out(set.take_round());
                (other, set)
            })
            .collect();
        // A look at each page of a TiB takes a good part of a second.
        let rounds = if name == "vm-memory bitmap" {
            rounds.min(3)
        } else {
            rounds
        };
        let mut times = vec![Vec::new(); GIB.len()];
        for _ in 0..rounds {
            for (((source, write), set), times) in tracked.iter_mut().zip(&mut times) {
                let tries = (0..3).map(|_| {
                    write();
                    let begun = Instant::now();
                    source
                        .collect(set, CollectPhase::PreCopy)
                        .expect("a collection");
                    let found = hand_out(set.take_round());
                    let time = us(begun);
                    assert_eq!(found, WRITTEN, "{name}");
                    time
                });
                times.push(tries.fold(f64::MAX, f64::min));
            }
        }
        row(name, times);
    }
}

fn strewn(pages: u64) -> impl Iterator<Item = u64> {
    (0..WRITTEN).map(move |at| at * (pages / WRITTEN))
}

fn marker(pages: u64) -> Other {
    let source = VmmWrites::new();
    let marker = source.marker();
    (
        Box::new(source),
        Box::new(move || strewn(pages).for_each(|page| marker.mark_bytes(0, page * PAGE, 8))),
    )
}

fn process(pages: u64) -> Other {
    let memory = Sparse::new(pages * PAGE).expect("address space");
    let range = MappedRange {
        region: 0,
        first: 0,
        address: memory.start.as_ptr() as u64,
        pages,
    };
    let source = ProcessSource::new(vec![range]).expect("userfaultfd");
    (
        Box::new(source),
        Box::new(move || strewn(pages).for_each(|page| memory.write(page * PAGE, page))),
    )
}

fn vhost_log(pages: u64) -> Other {
    use std::os::unix::fs::FileExt as _;
    let range = GuestRange {
        region: 0,
        guest_address: 0,
        pages,
    };
    let log = VhostUserLog::allocate(&[range]).expect("a log");
    let file = std::fs::File::from(log.base().file.try_clone_to_owned().expect("a descriptor"));
    (
        Box::new(log),
        Box::new(move || {
            strewn(pages).for_each(|page| {
                let mut octet = [0];
                file.read_exact_at(&mut octet, page / 8).expect("the log");
                octet[0] |= 1 << (page % 8);
                file.write_all_at(&octet, page / 8).expect("the log");
            });
        }),
    )
}

fn bitmap(pages: u64) -> Other {
    let page = std::num::NonZeroUsize::new(PAGE as usize).expect("4096");
    let bitmap = Arc::new(AtomicBitmap::new((pages * PAGE) as usize, page));
    let marks = Arc::clone(&bitmap);
    (
        Box::new(AtomicBitmaps::new(vec![bitmap])),
        Box::new(move || strewn(pages).for_each(|page| marks.set_bit(page as usize))),
    )
}

// ── heavy dirtying ───────────────────────────────────────────────────────────────────────────────────────────────────

/// Where the log overtakes the ring, in a guest of 1 GiB and one of 16.
fn heavy(rounds: usize) {
    // A ring of 65,536 entries overflows beyond: the program writes without an exit at which KVM could ask for a harvest.
    const WRITES: [u64; 6] = [1_000, 4_000, 10_000, 20_000, 40_000, 60_000];
    for gib in [1u64, 16] {
        println!(
            "\nheavy: a guest of {gib} GiB, find and take what was written, microseconds, median of {rounds} rounds"
        );
        println!(
            "| pages written | one in | {} |",
            Way::ALL.map(Way::name).join(" | ")
        );
        let tracked: std::io::Result<Vec<Tracked>> = Way::ALL
            .iter()
            .map(|way| way.track(gib, 60_000, Strewn::Everywhere))
            .collect();
        let mut tracked = match tracked {
            Ok(tracked) => tracked,
            Err(error) => {
                println!("| not here: {error} |");
                return;
            }
        };
        for written in WRITES {
            let mut times = vec![Vec::new(); Way::ALL.len()];
            for _ in 0..rounds {
                for (tracked, times) in tracked.iter_mut().zip(&mut times) {
                    times.push(tracked.fastest(written).all);
                }
            }
            let cells: Vec<String> = times
                .into_iter()
                .map(|times| format!("{:.0}", median(times)))
                .collect();
            let of = ((gib << 30) / PAGE) as f64 / written as f64;
            println!("| {written} | {of:.1} | {} |", cells.join(" | "));
        }
    }
}

// ── several lanes ────────────────────────────────────────────────────────────────────────────────────────────────────

/// How long four lanes take to take all of a round from the log that is cleared late: with the clearing inside the lock that they
/// share, and outside of it. `work`: each lane reads what it took, as one that sends does.
fn lanes(rounds: usize) {
    const WRITES: u64 = 60_000;
    const LANES: usize = 4;
    println!(
        "\nlanes: {LANES} take {WRITES} pages of 1 GiB from the log that is cleared late, microseconds, median of {rounds}"
    );
    let way = Way::Log(Protect::ManualInitiallySet);
    let mut tracked = match way.track(1, WRITES, Strewn::Everywhere) {
        Ok(tracked) => tracked,
        Err(error) => return println!("not here: {error}"),
    };
    println!("| lanes do | cleared under the lock | cleared outside |");
    for work in [false, true] {
        let mut times = [Vec::new(), Vec::new()];
        for _ in 0..rounds {
            for (outside, times) in [false, true].into_iter().zip(&mut times) {
                tracked.guest.write(WRITES, None);
                tracked
                    .source
                    .collect(&tracked.set, CollectPhase::PreCopy)
                    .expect("a collection");
                times.push(take_by_lanes(&tracked, LANES, outside, work));
            }
        }
        let name = if work { "take and read" } else { "take" };
        let [under, outside] = times.map(median);
        println!("| {name} | {under:.0} | {outside:.0} |");
    }
}

fn take_by_lanes(tracked: &Tracked, lanes: usize, outside: bool, work: bool) -> f64 {
    const EXTENT: u64 = 256;
    let round = tracked.set.take_round();
    let pages = round.pages();
    let shared = std::sync::Mutex::new(round);
    let memory = &tracked.guest.memory;
    let begun = Instant::now();
    let taken: u64 = std::thread::scope(|scope| {
        let lane = || {
            let mut taken = 0;
            loop {
                let mut extent = Vec::new();
                let mut wanted = EXTENT;
                let mut round = shared.lock().expect("no panics");
                if outside {
                    let unarmed = round.take(EXTENT);
                    drop(round);
                    unarmed.rearm(&mut extent);
                } else {
                    while wanted > 0
                        && let Some(run) = round.next_run(wanted)
                    {
                        wanted -= run.count;
                        extent.push(run);
                    }
                    drop(round);
                }
                if extent.is_empty() {
                    return taken;
                }
                for run in extent {
                    taken += run.count;
                    if work {
                        (run.first..run.first + run.count)
                            .for_each(|page| memory.read(page * PAGE));
                    }
                }
            }
        };
        let threads: Vec<_> = (0..lanes).map(|_| scope.spawn(lane)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("no panics"))
            .sum()
    });
    assert_eq!(taken, pages);
    us(begun)
}
