//! Process memory on the real kernel: what is reported besides plain stores, what a huge page costs, and that a seeded
//! storm over many rounds loses nothing.

use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::sync::Arc;

use multifd_tracking::process::{MappedRange, ProcessSource};
use multifd_tracking::{CollectPhase, DirtySet, Source};

mod machine;

use machine::{Memory, PAGE};

const PAGES: u64 = 2048;

struct Bench {
    memory: Arc<Memory>,
    source: ProcessSource,
    set: DirtySet,
}

fn bench(kind: i32) -> Bench {
    let memory = Arc::new(Memory::mapped(PAGES as usize * PAGE, kind));
    let range = MappedRange {
        region: 0,
        first: 0,
        address: memory.start.as_ptr() as u64,
        pages: PAGES,
    };
    let source = ProcessSource::new(vec![range]).unwrap();
    Bench {
        memory,
        source,
        set: DirtySet::new(&[PAGES]),
    }
}

impl Bench {
    fn collected(&mut self) -> Vec<u64> {
        self.source
            .collect(&self.set, CollectPhase::PreCopy)
            .unwrap();
        let mut round = self.set.take_round();
        std::iter::from_fn(|| round.next_run(1))
            .map(|run| run.first)
            .collect()
    }
}

const KINDS: [i32; 2] = [libc::MAP_PRIVATE, libc::MAP_SHARED];

#[test]
fn a_thousand_pages_of_memory_that_is_full_are_exactly_a_thousand() {
    for kind in KINDS {
        let mut bench = bench(kind);
        (0..PAGES as usize).for_each(|page| bench.memory.increment(page * PAGE));
        bench.source.start(&bench.set).unwrap();
        assert_eq!(bench.collected(), [0; 0]);
        let written: Vec<u64> = (0..PAGES).step_by(2).take(1000).collect();
        for page in &written {
            bench.memory.increment(*page as usize * PAGE + 64);
        }
        assert_eq!(bench.collected(), written);
        assert_eq!(bench.collected(), [0; 0]);
    }
}

/// The descriptor is for faults of user mode only; a system call's write makes none, and is found all the same.
#[test]
fn system_calls_that_write_are_reported() {
    for kind in KINDS {
        let mut bench = bench(kind);
        bench.memory.increment(5 * PAGE);
        bench.source.start(&bench.set).unwrap();
        assert_eq!(bench.collected(), [0; 0]);
        bench.memory.fill_by_read(5 * PAGE + 100, b"five");
        bench.memory.fill_by_read(9 * PAGE, b"nine");
        assert_eq!(bench.collected(), [5, 9]);
        assert_eq!(
            bench.memory.read(9 * PAGE) as u32,
            u32::from_le_bytes(*b"nine")
        );
    }
}

#[test]
fn a_huge_page_is_reported_by_its_small_pages() {
    let memory = Arc::new(Memory::mapped(8 << 20, libc::MAP_PRIVATE));
    memory.advise_huge();
    (0..memory.bytes / PAGE).for_each(|page| memory.increment(page * PAGE));
    let range = MappedRange {
        region: 0,
        first: 0,
        address: memory.start.as_ptr() as u64,
        pages: (memory.bytes / PAGE) as u64,
    };
    let set = DirtySet::new(&[range.pages]);
    let source = ProcessSource::new(vec![range]).unwrap();
    let mut bench = Bench {
        memory,
        source,
        set,
    };
    bench.source.start(&bench.set).unwrap();
    for page in [700, 701, 1500] {
        bench.memory.increment(page * PAGE);
    }
    assert_eq!(bench.collected(), [700, 701, 1500]);
    bench.source.stop().unwrap();
}

#[test]
fn memory_that_is_no_mapping_is_refused_at_start() {
    // The second half mebibyte of the address space: the kernel gives nothing there out unasked.
    let range = MappedRange {
        region: 0,
        first: 0,
        address: 512 << 10,
        pages: 1,
    };
    let mut source = ProcessSource::new(vec![range]).unwrap();
    let error = source.start(&DirtySet::new(&[1])).unwrap_err();
    assert!(
        error.to_string().starts_with("UFFDIO_REGISTER: "),
        "{error}"
    );
}

/// A pipe is a descriptor, and no userfaultfd: the kernel says so, and so does the source.
#[test]
fn descriptors_that_are_no_userfaultfd_are_refused() {
    let (reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(b"x").unwrap();
    assert!(reader.as_raw_fd() >= 0);
    let kernel = Arc::new(multifd_tracking::kernel::Linux);
    let error = ProcessSource::with_kernel(kernel, &reader, &reader, Vec::new())
        .err()
        .unwrap();
    assert_eq!(error.code(), "tracking-unsupported");
    assert!(error.to_string().contains("UFFDIO_API"), "{error}");
}
