//! The source on a kernel that checks every byte, and what it says when the kernel says no.

use std::io;
use std::sync::Arc;

use super::source::{not_offered, not_opened};
use super::{MappedRange, ProcessSource};
use crate::fake::{FakeKernel, FakeProcess};
use crate::{CollectPhase, DirtySet, Error, Run, Source as _};

const BASE: u64 = 0x7000_0000;

/// Two pieces of region 1, which lie the other way round in the process, and a hole between them.
const RANGES: [MappedRange; 2] = [
    MappedRange {
        region: 1,
        first: 0,
        address: BASE + (2000 << 12),
        pages: 1000,
    },
    MappedRange {
        region: 1,
        first: 1000,
        address: BASE,
        pages: 1000,
    },
];

struct Bench {
    kernel: FakeKernel,
    process: FakeProcess,
    source: ProcessSource,
    set: DirtySet,
}

fn source(
    kernel: &FakeKernel,
    process: &FakeProcess,
    ranges: &[MappedRange],
) -> Result<ProcessSource, Error> {
    let (faults, pagemap) = process.open(kernel);
    ProcessSource::with_kernel(Arc::new(kernel.clone()), &faults, &pagemap, ranges.to_vec())
}

fn bench() -> Bench {
    let (kernel, process) = (FakeKernel::new(), FakeProcess::new());
    let source = source(&kernel, &process, &RANGES).unwrap();
    Bench {
        kernel,
        process,
        source,
        set: DirtySet::new(&[10, 2000]),
    }
}

fn taken(set: &DirtySet) -> Vec<Run> {
    let mut round = set.take_round();
    std::iter::from_fn(|| round.next_run(4096)).collect()
}

fn run(first: u64, count: u64) -> Run {
    Run {
        region: 1,
        first,
        count,
    }
}

#[test]
fn addresses_become_pages_of_their_region() {
    let mut bench = bench();
    bench.process.write(BASE);
    bench.source.start(&bench.set).unwrap();
    assert_eq!(
        bench.process.protected_pages(),
        1,
        "what was there is protected, the rest is not touched"
    );
    for page in [0, 999, 2000, 2001, 2002] {
        bench.process.write(BASE + (page << 12) + 8);
    }
    let collection = bench
        .source
        .collect(&bench.set, CollectPhase::PreCopy)
        .unwrap();
    assert_eq!((collection.pages, collection.reported), (5, 5));
    assert_eq!(taken(&bench.set), [run(0, 3), run(1000, 1), run(1999, 1)]);
    assert_eq!(
        bench
            .source
            .collect(&bench.set, CollectPhase::PreCopy)
            .unwrap()
            .reported,
        0
    );
    bench.source.stop().unwrap();
    assert_eq!(bench.process.protected_pages(), 0);
}

#[test]
fn a_scan_that_stops_early_is_continued() {
    let mut bench = bench();
    bench.source.start(&bench.set).unwrap();
    bench.process.stop_scans_after(2);
    let before = bench.kernel.calls_of("PAGEMAP_SCAN");
    for page in (0..20).step_by(2) {
        bench.process.write(BASE + (page << 12));
    }
    let collection = bench
        .source
        .collect(&bench.set, CollectPhase::PreCopy)
        .unwrap();
    assert_eq!(collection.pages, 10);
    assert_eq!(bench.kernel.calls_of("PAGEMAP_SCAN") - before, 1 + 5);
}

#[test]
fn a_failed_scan_dirties_its_range_and_the_others_are_collected() {
    let mut bench = bench();
    bench.source.start(&bench.set).unwrap();
    bench.process.write(BASE + (7 << 12));
    bench.kernel.fail_next("PAGEMAP_SCAN", libc::EFAULT);
    let error = bench
        .source
        .collect(&bench.set, CollectPhase::PreCopy)
        .unwrap_err();
    assert_eq!(error.to_string(), "PAGEMAP_SCAN: Bad address (os error 14)");
    assert_eq!(taken(&bench.set), [run(0, 1000), run(1007, 1)]);
    let figures = bench.source.figures();
    assert_eq!((figures.errors, figures.all_dirty), (1, 1));
}

#[test]
fn a_start_that_fails_leaves_nothing_registered() {
    for (pass, fail) in [
        (0, "UFFDIO_REGISTER"),
        (1, "UFFDIO_REGISTER"),
        (1, "PAGEMAP_SCAN"),
    ] {
        let mut bench = bench();
        bench.process.write(BASE);
        for _ in 0..pass {
            bench.kernel.pass_next(fail);
        }
        bench.kernel.fail_next(fail, libc::ENOMEM);
        let error = bench.source.start(&bench.set).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("{fail}: Cannot allocate memory (os error 12)")
        );
        assert_eq!(bench.process.protected_pages(), 0);
        assert!(
            bench
                .source
                .collect(&bench.set, CollectPhase::PreCopy)
                .is_err()
        );
        bench.source.start(&bench.set).unwrap();
        bench.process.write(BASE);
        assert_eq!(
            bench
                .source
                .collect(&bench.set, CollectPhase::PreCopy)
                .unwrap()
                .pages,
            1
        );
    }
}

#[test]
fn a_kernel_that_does_not_offer_it_is_named_with_what_would() {
    let (kernel, process) = (FakeKernel::new(), FakeProcess::new());
    process.offer_only((1 << 13) - 1);
    let text = source(&kernel, &process, &RANGES)
        .err()
        .unwrap()
        .to_string();
    assert_eq!(
        text,
        "not offered here: tracking a process by asynchronous write protection (UFFDIO_API: Invalid argument (os error \
         22)): Linux 6.7 or later with CONFIG_USERFAULTFD and CONFIG_PTE_MARKER_UFFD_WP has it"
    );
    let (kernel, process) = (FakeKernel::new(), FakeProcess::new());
    kernel.fail_next("PAGEMAP_SCAN", libc::ENOTTY);
    let error = source(&kernel, &process, &RANGES).err().unwrap();
    assert_eq!(error.code(), "tracking-unsupported");
    assert_eq!(
        error.to_string(),
        not_offered("PAGEMAP_SCAN", io::Error::from_raw_os_error(libc::ENOTTY)).to_string()
    );
}

#[test]
fn a_descriptor_that_is_not_permitted_says_what_to_do() {
    let text = |errno| not_opened(io::Error::from_raw_os_error(errno)).to_string();
    assert_eq!(
        text(libc::EPERM),
        "not offered here: tracking a process by userfaultfd (Operation not permitted (os error 1)): it is not permitted to \
         this process: allow the system call userfaultfd in the filter (seccomp) of the container or service; no capability \
         and no sysctl is needed since Linux 5.11"
    );
    assert!(text(libc::ENOSYS).contains("CONFIG_USERFAULTFD"));
}

#[test]
fn ranges_that_cannot_be_are_refused() {
    let refusal = |ranges: &[MappedRange]| {
        source(&FakeKernel::new(), &FakeProcess::new(), ranges)
            .err()
            .unwrap()
            .to_string()
    };
    let one = RANGES[0];
    assert!(refusal(&[MappedRange { pages: 0, ..one }]).contains("at least one page"));
    assert!(refusal(&[MappedRange { address: 12, ..one }]).contains("at a multiple of 4096"));
    assert!(
        refusal(&[MappedRange {
            address: u64::MAX - 4095,
            ..one
        }])
        .contains("pages at address")
    );
    let next = MappedRange {
        address: one.address + (999 << 12),
        ..one
    };
    assert_eq!(
        refusal(&[next, one]),
        "the ranges at 0x707d0000 and 0x70bb7000 overlap"
    );
    let mut bench = bench();
    let error = bench.source.start(&DirtySet::new(&[10, 1999])).unwrap_err();
    assert_eq!(
        error.to_string(),
        "1000 pages from page 1000 are not inside region 1"
    );
}
