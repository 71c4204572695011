//! The KVM sources on the fake kernel, which checks each request and takes a write for lost if the page was not re-armed.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::fake::{FakeFd, FakeKernel, FakeSlot, FakeVm, Wrote};
use crate::{CollectPhase, DirtySet, Run, Source};

const ENTRIES: u32 = 1024;
/// Slot 0 is all of region 0; slot 5 of address space 1 is the upper part of region 1, off the word grid.
const SLOTS: [Slot; 2] = [
    Slot {
        id: 0,
        region: 0,
        first: 0,
        pages: 4000,
    },
    Slot {
        id: 0x1_0005,
        region: 1,
        first: 100,
        pages: 1000,
    },
];

fn set() -> DirtySet {
    DirtySet::new(&[4000, 1100])
}

fn fake_vm() -> FakeVm {
    FakeVm::with_everything(&SLOTS.map(|slot| FakeSlot {
        id: slot.id,
        pages: slot.pages,
    }))
}

fn control(vm: &FakeVm) -> Box<dyn SlotControl> {
    let vm = vm.clone();
    Box::new(move |on| {
        vm.set_logging(on);
        Ok(())
    })
}

/// What the set holds, taken out of it.
fn take(set: &DirtySet) -> BTreeSet<(u32, u64)> {
    let mut round = set.take_round();
    let mut pages = BTreeSet::new();
    while let Some(run) = round.next_run(256) {
        pages.extend((run.first..run.first + run.count).map(|page| (run.region, page)));
    }
    pages
}

struct RingBench {
    kernel: FakeKernel,
    vm: FakeVm,
    _fds: Vec<FakeFd>,
    source: RingSource,
    set: DirtySet,
}

fn ring_bench(vcpus: usize) -> RingBench {
    let (kernel, vm) = (FakeKernel::new(), fake_vm());
    let fd = vm.open(&kernel);
    let config = RingConfig { entries: ENTRIES };
    assert_eq!(
        ring::enable_with(&kernel, fd.as_fd(), config).unwrap(),
        RingVariant::AcqRel
    );
    let fds: Vec<FakeFd> = (0..vcpus).map(|_| vm.create_vcpu(&kernel)).collect();
    let slots = Slots::new(SLOTS.to_vec()).unwrap();
    let source = RingSource::with_kernel(
        Arc::new(kernel.clone()),
        &fd,
        &fds,
        config,
        slots,
        control(&vm),
    )
    .unwrap()
    .without_reaper();
    let set = set();
    let mut bench = RingBench {
        kernel,
        vm,
        _fds: fds,
        source,
        set,
    };
    bench.source.start(&bench.set).unwrap();
    bench
}

impl RingBench {
    fn collect(&mut self) -> u64 {
        self.source
            .collect(&self.set, CollectPhase::PreCopy)
            .unwrap()
            .pages
    }
}

#[test]
fn probe_tells_what_is_offered() {
    let (kernel, vm) = (FakeKernel::new(), fake_vm());
    let support = probe_with(&kernel, vm.open(&kernel).as_fd()).unwrap();
    let ring = RingSupport {
        variant: RingVariant::AcqRel,
        ring_bytes_max: 1 << 20,
    };
    assert_eq!(
        support,
        Support {
            ring: Some(ring),
            ring_with_bitmap: false,
            manual_protect: 3
        }
    );
    assert_eq!(support.method(), Method::Ring);

    let plain = FakeVm::new(&[], &[(192, 65_536)]);
    let support = probe_with(&kernel, plain.open(&kernel).as_fd()).unwrap();
    assert_eq!(
        support.ring,
        Some(RingSupport {
            variant: RingVariant::Plain,
            ring_bytes_max: 65_536
        })
    );

    let none = FakeVm::new(&[], &[]);
    let support = probe_with(&kernel, none.open(&kernel).as_fd()).unwrap();
    assert_eq!((support.ring, support.method()), (None, Method::Log));
}

#[test]
fn the_log_is_chosen_from_one_page_in_64_on() {
    let ring = Some(RingSupport {
        variant: RingVariant::AcqRel,
        ring_bytes_max: 1 << 20,
    });
    let support = Support {
        ring,
        ring_with_bitmap: false,
        manual_protect: 3,
    };
    let gib = 1 << 18;
    assert_eq!(support.method_for(gib, gib / 64 - 1), Method::Ring);
    assert_eq!(support.method_for(gib, gib / 64), Method::Log);
    assert_eq!(support.method_for(gib << 10, 1000), Method::Ring);
    assert_eq!(support.method_for(gib, u64::MAX), Method::Log);
    assert_eq!(
        Support {
            ring: None,
            ..support
        }
        .method_for(gib << 10, 0),
        Method::Log
    );
}

#[test]
fn ring_sizes_are_checked_at_and_past_the_bounds() {
    let (kernel, vm) = (FakeKernel::new(), fake_vm());
    let fd = vm.open(&kernel);
    let enable = |entries| ring::enable_with(&kernel, fd.as_fd(), RingConfig { entries });
    for entries in [0, 1, 512, 1023, 1025, 131_072] {
        let text = enable(entries).unwrap_err().to_string();
        assert_eq!(
            text,
            format!(
                "a dirty ring of {entries} entries: a power of two from 1024 to 65536 is allowed"
            )
        );
    }
    assert!(enable(1024).is_ok() && enable(65_536).is_ok());

    let small = FakeVm::new(&[], &[(192, 65_536)]).open(&kernel);
    let text = ring::enable_with(&kernel, small.as_fd(), RingConfig { entries: 8192 })
        .unwrap_err()
        .to_string();
    assert_eq!(
        text,
        "not offered here: a dirty ring of 131072 bytes; this kernel gives at most 65536"
    );
    let none = FakeVm::new(&[], &[]).open(&kernel);
    let text = ring::enable_with(&kernel, none.as_fd(), RingConfig::default())
        .unwrap_err()
        .to_string();
    assert_eq!(
        text,
        "not offered here: the KVM dirty ring; use the dirty log"
    );
}

#[test]
fn a_ring_enabled_after_the_first_vcpu_is_refused() {
    let (kernel, vm) = (FakeKernel::new(), fake_vm());
    let fd = vm.open(&kernel);
    let _vcpu = vm.create_vcpu(&kernel);
    let error = ring::enable_with(&kernel, fd.as_fd(), RingConfig::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "KVM_ENABLE_CAP of the dirty ring: Invalid argument (os error 22)"
    );
    assert_eq!(error.code(), "tracking-kernel");
}

#[test]
fn slots_must_be_distinct_and_not_empty() {
    let slot = |id, pages| Slot {
        id,
        region: 0,
        first: 0,
        pages,
    };
    let text = |slots| Slots::new(slots).unwrap_err().to_string();
    assert_eq!(text(vec![]), "a KVM source needs at least one memory slot");
    assert_eq!(
        text(vec![slot(3, 1), slot(3, 1)]),
        "slot 0x3 is named twice"
    );
    assert_eq!(
        text(vec![slot(1, 0)]),
        "slot 0x1 has 0 pages; 1 to 2147483647 are allowed"
    );
    assert_eq!(
        text(vec![slot(1, 1 << 31)]),
        "slot 0x1 has 2147483648 pages; 1 to 2147483647 are allowed"
    );
    assert!(Slots::new(vec![slot(1, (1 << 31) - 1), slot(0, 1)]).is_ok());
}

#[test]
fn a_slot_outside_its_region_is_refused_at_start() {
    let mut bench = ring_bench(1);
    let small = DirtySet::new(&[4000, 1099]);
    assert_eq!(
        bench.source.start(&small).unwrap_err().to_string(),
        "1000 pages from page 100 are not inside region 1"
    );
}

#[test]
fn ring_pages_of_several_vcpus_reach_the_set_once() {
    let mut bench = ring_bench(3);
    for (vcpu, slot, page) in [
        (0, 0, 7),
        (1, 0, 3999),
        (2, 0x1_0005, 0),
        (2, 0x1_0005, 999),
    ] {
        assert_eq!(bench.vm.write(vcpu, slot, page), Wrote::GoesOn);
    }
    for _ in 0..5 {
        assert_eq!(bench.vm.write_duplicate(1, 0, 7), Wrote::GoesOn);
    }
    assert_eq!(bench.collect(), 4);
    assert_eq!(
        bench.kernel.calls_of("KVM_RESET_DIRTY_RINGS"),
        1,
        "one reset for all rings"
    );
    assert_eq!(
        take(&bench.set),
        [(0, 7), (0, 3999), (1, 100), (1, 1099)].into()
    );
    let entries: Vec<u64> = bench
        .source
        .vcpu_figures()
        .iter()
        .map(|vcpu| vcpu.entries)
        .collect();
    assert_eq!(entries, [1, 6, 2]);
}

#[test]
fn an_empty_ring_needs_no_reset() {
    let mut bench = ring_bench(2);
    assert_eq!(bench.collect(), 0);
    assert_eq!(bench.kernel.calls_of("KVM_RESET_DIRTY_RINGS"), 0);
}

#[test]
fn a_page_written_after_the_reset_is_reported_again() {
    let mut bench = ring_bench(1);
    for _ in 0..3 {
        assert_eq!(bench.vm.write(0, 0, 12), Wrote::GoesOn);
        assert_eq!(bench.vm.write(0, 0, 12), Wrote::GoesOn);
        assert_eq!(bench.collect(), 1);
        assert_eq!(take(&bench.set), [(0, 12)].into());
        assert_eq!(bench.collect(), 0);
    }
}

#[test]
fn the_ring_is_harvested_in_order_around_its_end() {
    let mut bench = ring_bench(1);
    for lap in 0..10u64 {
        // 700 of 1,024 entries each time: the places wander around the ring.
        let pages: Vec<u64> = (0..700).map(|at| (at * 5 + lap) % 4000).collect();
        for &page in &pages {
            assert_eq!(bench.vm.write(0, 0, page), Wrote::GoesOn);
        }
        assert_eq!(bench.collect(), 700);
        assert_eq!(
            take(&bench.set),
            pages.into_iter().map(|page| (0, page)).collect()
        );
    }
    assert_eq!(bench.source.figures().ring_full_hard, 0);
}

#[test]
fn a_full_ring_is_emptied_by_its_vcpus_thread() {
    let mut bench = ring_bench(2);
    let handle = bench.source.handle();
    let mut exits = 0;
    for page in 0..4000 {
        if bench.vm.write(1, 0, page) == Wrote::RingFull {
            exits += 1;
            assert_eq!(handle.on_full(1).unwrap().reported, u64::from(ENTRIES) - 64);
        }
    }
    bench.collect();
    assert_eq!((exits, bench.set.dirty_pages()), (4, 4000));
    let figures = bench.source.figures();
    assert_eq!(
        (
            figures.ring_full_soft,
            figures.ring_full_hard,
            figures.resets
        ),
        (4, 0, 5)
    );
    assert_eq!(bench.source.vcpu_figures()[1].ring_full, 4);
    let text = handle.on_full(2).unwrap_err().to_string();
    assert_eq!(text, "vCPU 2 of 2 has no dirty ring");
}

/// Writes on after KVM should have left the guest, as a KVM does that runs many instructions between two looks.
fn overflow(bench: &RingBench, pages: std::ops::Range<u64>) {
    let full = pages.fold(Wrote::GoesOn, |_, page| bench.vm.write(0, 0, page));
    assert_eq!(full, Wrote::RingFull);
}

#[test]
fn a_ring_that_overflowed_means_everything_is_dirty_and_is_in_step_again() {
    for beyond in [0, 1, 10, 200, 800] {
        let mut bench = ring_bench(2);
        let handle = bench.source.handle();
        overflow(&bench, 0..u64::from(ENTRIES) + beyond);
        handle.on_full(0).unwrap();
        assert!(!bench.vm.is_full(0), "the vCPU can enter again");
        bench.collect();
        assert_eq!(take(&bench.set).len(), 5000, "all pages of all slots");
        let figures = bench.source.figures();
        assert_eq!((figures.ring_full_hard, figures.all_dirty), (1, 1));
        // The page whose entry was written over is protected again, and found where the kernel now writes.
        for lap in 0..5 {
            for page in (0..700).map(|at| (at * 3 + lap) % 4000) {
                if bench.vm.write(0, 0, page) == Wrote::RingFull {
                    handle.on_full(0).unwrap();
                    assert!(!bench.vm.is_full(0), "{beyond} beyond, lap {lap}");
                }
            }
            bench.collect();
            let expected = (0..700).map(|at| (0, (at * 3 + lap) % 4000)).collect();
            assert_eq!(take(&bench.set), expected, "{beyond} beyond, lap {lap}");
        }
        assert_eq!(bench.source.figures().ring_full_hard, 1);
    }
}

#[test]
fn a_ring_that_overflows_again_and_again_goes_on() {
    let mut bench = ring_bench(1);
    let handle = bench.source.handle();
    for lap in 0..20u64 {
        // The vCPU runs on for some instructions after each time that KVM should have left.
        let mut late = 0;
        for page in 0..4000 {
            if bench.vm.write(0, 0, page) == Wrote::RingFull {
                late += 1;
                if late > 70 + lap * 10 {
                    handle.on_full(0).unwrap();
                    assert!(!bench.vm.is_full(0), "lap {lap}, page {page}");
                    late = 0;
                }
            }
        }
        bench.collect();
        assert_eq!(take(&bench.set).len(), 5000, "lap {lap}");
    }
    assert!(bench.source.figures().ring_full_hard >= 20);
    // A quiet lap is exact again.
    handle.on_full(0).unwrap();
    bench.collect();
    let _ = take(&bench.set);
    assert_eq!(bench.vm.write(0, 0, 17), Wrote::GoesOn);
    assert_eq!(bench.collect(), 1);
}

/// The vCPU overflows its ring between our look at it and the reset: the entries that we marked are written over.
#[test]
fn entries_written_over_before_their_reset_are_found_out() {
    let mut bench = ring_bench(1);
    for page in 0..500 {
        assert_eq!(bench.vm.write(0, 0, page), Wrote::GoesOn);
    }
    // The harvest happens, its reset fails, and before the next one the ring is written over.
    bench.kernel.fail_next("KVM_RESET_DIRTY_RINGS", libc::EIO);
    bench
        .source
        .collect(&bench.set, CollectPhase::PreCopy)
        .unwrap_err();
    overflow(&bench, 500..500 + u64::from(ENTRIES));
    bench.collect();
    assert_eq!(take(&bench.set).len(), 5000);
    assert_eq!(bench.source.figures().ring_full_hard, 1);
    for page in 0..400 {
        assert_eq!(bench.vm.write(0, 0, page), Wrote::GoesOn);
    }
    assert_eq!(bench.collect(), 400);
}

/// The vCPU's last instructions before it leaves fill the ring again behind the reset that runs, and overtake it.
#[test]
fn a_reset_that_is_overtaken_is_found_out_wherever_it_stands() {
    for reset in [0, 1, 5, 60, 500] {
        for beyond in [0, 1, 2, 40, 150] {
            let mut bench = ring_bench(2);
            let handle = bench.source.handle();
            for page in 0..u64::from(ENTRIES) - 20 {
                let _ = bench.vm.write(0, 0, page);
            }
            assert_eq!(bench.vm.write(1, 0x1_0005, 3), Wrote::GoesOn);
            bench
                .vm
                .write_during_next_reset(reset, 2000..2000 + 20 + reset as u64 + beyond);
            bench.collect();
            bench.collect();
            let hard = bench.source.figures().ring_full_hard;
            assert_eq!(hard > 0, beyond > 0, "reset at {reset}, {beyond} beyond");
            if hard > 0 {
                assert_eq!(take(&bench.set).len(), 5000);
            }
            let _ = take(&bench.set);
            for lap in 0..5 {
                for page in (0..900).map(|at| (at * 3 + lap) % 4000) {
                    if bench.vm.write(0, 0, page) == Wrote::RingFull {
                        handle.on_full(0).unwrap();
                        assert!(
                            !bench.vm.is_full(0),
                            "reset at {reset}, {beyond} beyond, lap {lap}"
                        );
                    }
                }
                bench.collect();
                let expected = (0..900).map(|at| (0, (at * 3 + lap) % 4000)).collect();
                assert_eq!(
                    take(&bench.set),
                    expected,
                    "reset at {reset}, {beyond} beyond, lap {lap}"
                );
            }
            assert_eq!(bench.source.figures().ring_full_hard, hard);
        }
    }
}

#[test]
fn two_rings_that_are_written_over_at_the_same_time_are_both_in_step_again() {
    let mut bench = ring_bench(3);
    for lap in 0..5 {
        for vcpu in 0..2 {
            for page in 0..500 {
                let _ = bench.vm.write(vcpu, 0, vcpu as u64 * 2000 + page);
            }
        }
        assert_eq!(bench.vm.write(2, 0x1_0005, lap), Wrote::GoesOn);
        bench.kernel.fail_next("KVM_RESET_DIRTY_RINGS", libc::EIO);
        bench
            .source
            .collect(&bench.set, CollectPhase::PreCopy)
            .unwrap_err();
        for vcpu in 0..2 {
            // 30 and 47 entries are written over.
            for page in 500..u64::from(ENTRIES) + 30 + vcpu as u64 * 17 {
                let _ = bench.vm.write(vcpu, 0, vcpu as u64 * 2000 + page);
            }
        }
        bench.collect();
        assert_eq!(take(&bench.set).len(), 5000);
        assert_eq!(bench.source.figures().ring_full_hard, 2 * (lap + 1));
        for vcpu in 0..2 {
            assert_eq!(bench.vm.write(vcpu, 0, vcpu as u64), Wrote::GoesOn);
        }
        assert_eq!(bench.collect(), 2);
        assert_eq!(take(&bench.set), [(0, 0), (0, 1)].into());
    }
}

#[test]
fn a_reset_that_a_signal_ended_is_repeated() {
    let mut bench = ring_bench(2);
    for page in 0..300 {
        assert_eq!(bench.vm.write((page % 2) as usize, 0, page), Wrote::GoesOn);
    }
    bench.vm.interrupt_next_reset(7);
    bench.vm.interrupt_next_reset(0);
    bench.vm.interrupt_next_reset(200);
    assert_eq!(bench.collect(), 300);
    assert_eq!(bench.source.figures().resets, 4);
    let _ = take(&bench.set);
    for page in 0..300 {
        assert_eq!(bench.vm.write(0, 0, page), Wrote::GoesOn);
    }
    assert_eq!(bench.collect(), 300, "each was protected again");
}

#[test]
fn a_reset_that_never_gets_on_is_an_error_and_loses_nothing() {
    let mut bench = ring_bench(1);
    for page in 0..300 {
        assert_eq!(bench.vm.write(0, 0, page), Wrote::GoesOn);
    }
    (0..2).for_each(|_| bench.vm.interrupt_next_reset(0));
    let error = bench
        .source
        .collect(&bench.set, CollectPhase::PreCopy)
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "KVM_RESET_DIRTY_RINGS: 300 harvested entries were not reset"
    );
    assert_eq!(bench.set.dirty_pages(), 0);
    assert_eq!(bench.collect(), 300);
}

#[test]
fn a_vmm_that_cannot_protect_again_after_an_overflow_is_named_until_it_can() {
    let (kernel, vm) = (FakeKernel::new(), fake_vm());
    let fd = vm.open(&kernel);
    let config = RingConfig { entries: ENTRIES };
    ring::enable_with(&kernel, fd.as_fd(), config).unwrap();
    let vcpus = [vm.create_vcpu(&kernel)];
    let refusing = Arc::new(AtomicBool::new(false));
    let control = {
        let (vm, refusing) = (vm.clone(), Arc::clone(&refusing));
        move |on| {
            if refusing.load(Ordering::SeqCst) {
                return Err(io::Error::from_raw_os_error(libc::EAGAIN));
            }
            vm.set_logging(on);
            Ok(())
        }
    };
    let slots = Slots::new(SLOTS.to_vec()).unwrap();
    let source = RingSource::with_kernel(
        Arc::new(kernel),
        &fd,
        &vcpus,
        config,
        slots,
        Box::new(control),
    )
    .unwrap();
    let (mut source, set) = (source.without_reaper(), set());
    source.start(&set).unwrap();
    for page in 0..2000 {
        let _ = vm.write(0, 0, page);
    }
    refusing.store(true, Ordering::SeqCst);
    for _ in 0..2 {
        let error = source.collect(&set, CollectPhase::PreCopy).unwrap_err();
        let text = "the VMM refused to switch dirty logging off and on after a ring overflowed: ";
        assert!(error.to_string().starts_with(text), "{error}");
    }
    refusing.store(false, Ordering::SeqCst);
    source.collect(&set, CollectPhase::PreCopy).unwrap();
    assert_eq!(take(&set).len(), 5000);
}

#[test]
fn the_reaper_keeps_a_ring_from_filling() {
    let (kernel, vm) = (FakeKernel::new(), fake_vm());
    let fd = vm.open(&kernel);
    let config = RingConfig { entries: ENTRIES };
    ring::enable_with(&kernel, fd.as_fd(), config).unwrap();
    let vcpus = [vm.create_vcpu(&kernel)];
    let slots = Slots::new(SLOTS.to_vec()).unwrap();
    let mut source =
        RingSource::with_kernel(Arc::new(kernel), &fd, &vcpus, config, slots, control(&vm))
            .unwrap();
    let set = set();
    source.start(&set).unwrap();
    for page in 0..800 {
        assert_eq!(vm.write(0, 0, page), Wrote::GoesOn);
    }
    // Without a collection, and within PAUSE_MAX of the pace many times over.
    let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while set.dirty_pages() < 800 {
        assert!(std::time::Instant::now() < end, "the reaper did nothing");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let collection = source.collect(&set, CollectPhase::Final).unwrap();
    assert_eq!(
        collection.pages, 800,
        "a collection tells what came since the last one"
    );
    source.stop().unwrap();
    assert_eq!(take(&set).len(), 800);
}

#[test]
fn an_entry_past_its_slot_dirties_the_slot() {
    let mut bench = ring_bench(1);
    bench.vm.push_entry(0, 0x1_0005, 1000);
    bench.collect();
    assert_eq!(
        take(&bench.set),
        (100..1100).map(|page| (1, page)).collect()
    );
    assert_eq!(bench.source.figures().entries_unknown, 1);
}

#[test]
fn an_entry_of_an_unknown_slot_dirties_everything() {
    let mut bench = ring_bench(1);
    bench.vm.push_entry(0, 9, 0);
    bench.collect();
    assert_eq!(take(&bench.set).len(), 5000);
    assert_eq!(bench.source.figures().all_dirty, 1);
}

#[test]
fn pages_of_a_failed_reset_come_with_the_next_harvest() {
    let mut bench = ring_bench(1);
    assert_eq!(bench.vm.write(0, 0, 1), Wrote::GoesOn);
    bench.kernel.fail_next("KVM_RESET_DIRTY_RINGS", libc::EIO);
    let error = bench
        .source
        .collect(&bench.set, CollectPhase::PreCopy)
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "KVM_RESET_DIRTY_RINGS: Input/output error (os error 5)"
    );
    assert_eq!(
        bench.set.dirty_pages(),
        0,
        "not re-armed, so not to be read"
    );
    assert_eq!(bench.vm.write(0, 0, 2), Wrote::GoesOn);
    bench.collect();
    assert_eq!(take(&bench.set), [(0, 1), (0, 2)].into());
    assert_eq!(bench.source.figures().errors, 1);
}

#[test]
fn a_stopped_ring_source_refuses_and_restarts_empty() {
    let mut bench = ring_bench(1);
    assert_eq!(bench.vm.write(0, 0, 1), Wrote::GoesOn);
    bench.source.stop().unwrap();
    bench.source.stop().unwrap();
    let text = bench
        .source
        .collect(&bench.set, CollectPhase::Final)
        .unwrap_err()
        .to_string();
    assert_eq!(text, "the ring source collects only between start and stop");
    assert_eq!(bench.vm.write(0, 0, 3), Wrote::GoesOn, "not logged");
    bench.source.start(&bench.set).unwrap();
    assert_eq!(bench.set.dirty_pages(), 0);
    assert_eq!(bench.vm.write(0, 0, 2), Wrote::GoesOn);
    bench.collect();
    assert_eq!(take(&bench.set), [(0, 2)].into());
}

#[test]
fn a_vmm_that_refuses_to_log_is_named() {
    let (kernel, vm) = (FakeKernel::new(), fake_vm());
    let fd = vm.open(&kernel);
    let slots = Slots::new(SLOTS.to_vec()).unwrap();
    let refuse = |_| Err(io::Error::from_raw_os_error(libc::ENOMEM));
    let kernel = Arc::new(kernel);
    let mut source =
        LogSource::with_kernel(kernel, &fd, Protect::Manual, slots, Box::new(refuse)).unwrap();
    let error = source.start(&set()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the VMM refused to switch dirty logging on: Cannot allocate memory (os error 12)"
    );
    assert_eq!(
        source
            .collect(&set(), CollectPhase::PreCopy)
            .unwrap_err()
            .code(),
        "tracking-misuse"
    );
}

struct LogBench {
    kernel: FakeKernel,
    vm: FakeVm,
    source: LogSource,
    set: DirtySet,
}

fn log_bench(wanted: Protect) -> LogBench {
    let (kernel, vm) = (FakeKernel::new(), fake_vm());
    let fd = vm.open(&kernel);
    let slots = Slots::new(SLOTS.to_vec()).unwrap();
    let source =
        LogSource::with_kernel(Arc::new(kernel.clone()), &fd, wanted, slots, control(&vm)).unwrap();
    assert_eq!(source.protect(), wanted);
    let mut bench = LogBench {
        kernel,
        vm,
        source,
        set: set(),
    };
    bench.source.start(&bench.set).unwrap();
    bench
}

impl LogBench {
    fn collect(&mut self) -> u64 {
        self.source
            .collect(&self.set, CollectPhase::PreCopy)
            .unwrap()
            .pages
    }

    fn write(&self, slot: u32, page: u64) {
        assert_eq!(self.vm.write(0, slot, page), Wrote::GoesOn);
    }
}

#[test]
fn protection_is_what_both_sides_have() {
    for (offer, wanted, got) in [
        (0, Protect::ManualInitiallySet, Protect::Plain),
        (1, Protect::ManualInitiallySet, Protect::Manual),
        (2, Protect::Manual, Protect::Plain),
        (3, Protect::Manual, Protect::Manual),
        (3, Protect::Plain, Protect::Plain),
    ] {
        let kernel = FakeKernel::new();
        let vm = FakeVm::new(&[FakeSlot { id: 0, pages: 4000 }], &[(168, offer)]);
        let fd = vm.open(&kernel);
        let slots = Slots::new(vec![SLOTS[0]]).unwrap();
        let source =
            LogSource::with_kernel(Arc::new(kernel), &fd, wanted, slots, control(&vm)).unwrap();
        assert_eq!(source.protect(), got, "{wanted:?} of offer {offer}");
    }
}

#[test]
fn a_log_reports_each_write_in_every_protection() {
    for protect in [Protect::Plain, Protect::Manual, Protect::ManualInitiallySet] {
        let mut bench = log_bench(protect);
        if protect == Protect::ManualInitiallySet {
            assert_eq!(
                take(&bench.set).len(),
                5000,
                "everything is dirty at the start"
            );
        }
        assert_eq!(bench.collect(), 0);
        for round in 0..3 {
            let pages = [
                (0, 0),
                (0, 63),
                (0, 64),
                (0, 3999),
                (0x1_0005, 0),
                (0x1_0005, 27),
                (0x1_0005, 999),
            ];
            for (slot, page) in pages {
                bench.write(slot, page);
            }
            assert_eq!(bench.collect(), 7, "{protect:?} round {round}");
            let expected = [
                (0, 0),
                (0, 63),
                (0, 64),
                (0, 3999),
                (1, 100),
                (1, 127),
                (1, 1099),
            ];
            assert_eq!(take(&bench.set), expected.into());
            assert_eq!(bench.collect(), 0);
        }
    }
}

#[test]
fn a_write_between_fetch_and_clear_needs_no_second_sending() {
    let mut bench = log_bench(Protect::Manual);
    bench.write(0, 5);
    assert_eq!(bench.collect(), 1);
    let mut round = bench.set.take_round();
    bench.write(0, 5);
    assert_eq!(
        bench.collect(),
        0,
        "the page is in the round and was not cleared yet"
    );
    assert_eq!(
        round.next_run(64),
        Some(Run {
            region: 0,
            first: 5,
            count: 1
        })
    );
    bench.write(0, 5);
    assert_eq!(bench.collect(), 1, "it was cleared when it was handed out");
}

#[test]
fn clears_come_one_per_run_in_whole_words() {
    let mut bench = log_bench(Protect::Manual);
    for page in 10..300 {
        bench.write(0, page);
    }
    bench.write(0, 3999);
    bench.collect();
    assert_eq!(bench.kernel.calls_of("KVM_CLEAR_DIRTY_LOG"), 0);
    let mut round = bench.set.take_round();
    assert_eq!(round.next_run(1000).unwrap().count, 290);
    assert_eq!(bench.kernel.calls_of("KVM_CLEAR_DIRTY_LOG"), 1);
    assert_eq!(round.next_run(1000).unwrap().first, 3999);
    assert_eq!(bench.kernel.calls_of("KVM_CLEAR_DIRTY_LOG"), 2);
}

#[test]
fn a_failed_clear_keeps_its_pages_and_is_told_at_the_next_collection() {
    let mut bench = log_bench(Protect::Manual);
    bench.write(0, 5);
    bench.write(0, 500);
    bench.collect();
    bench.kernel.fail_next("KVM_CLEAR_DIRTY_LOG", libc::EFAULT);
    assert_eq!(
        take(&bench.set),
        [(0, 500)].into(),
        "only the page that was cleared"
    );
    assert_eq!(bench.set.dirty_pages(), 1);
    let error = bench
        .source
        .collect(&bench.set, CollectPhase::PreCopy)
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "KVM_CLEAR_DIRTY_LOG: Bad address (os error 14)"
    );
    assert_eq!(bench.collect(), 0, "told once");
    bench.write(0, 5);
    assert_eq!(take(&bench.set), [(0, 5)].into());
    bench.write(0, 5);
    assert_eq!(bench.collect(), 1);
}

#[test]
fn a_failed_fetch_dirties_the_slot_and_the_others_are_collected() {
    for protect in [Protect::Plain, Protect::Manual] {
        let mut bench = log_bench(protect);
        bench.write(0x1_0005, 1);
        bench.kernel.fail_next("KVM_GET_DIRTY_LOG", libc::EFAULT);
        let error = bench
            .source
            .collect(&bench.set, CollectPhase::PreCopy)
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "KVM_GET_DIRTY_LOG: Bad address (os error 14)"
        );
        assert_eq!(bench.set.dirty_pages(), 4001);
        assert_eq!(bench.source.figures().all_dirty, 1);
    }
}

#[test]
fn a_log_source_stops_and_restarts() {
    for protect in [Protect::Plain, Protect::Manual, Protect::ManualInitiallySet] {
        let mut bench = log_bench(protect);
        bench.write(0, 1);
        bench.collect();
        bench.source.stop().unwrap();
        bench.source.stop().unwrap();
        let _ = take(&bench.set);
        assert_eq!(
            bench.kernel.calls_of("KVM_CLEAR_DIRTY_LOG"),
            0,
            "a stopped source clears nothing"
        );
        bench.source.start(&bench.set).unwrap();
        let _ = take(&bench.set);
        bench.write(0, 1);
        assert_eq!(bench.collect(), 1, "{protect:?}");
    }
}

#[test]
fn the_log_is_refused_while_the_ring_is_on() {
    let bench = ring_bench(1);
    let fd = bench.vm.open(&bench.kernel);
    let slots = Slots::new(SLOTS.to_vec()).unwrap();
    let kernel = Arc::new(bench.kernel.clone());
    let mut log =
        LogSource::with_kernel(kernel, &fd, Protect::Plain, slots, control(&bench.vm)).unwrap();
    log.start(&bench.set).unwrap();
    let error = log.collect(&bench.set, CollectPhase::PreCopy).unwrap_err();
    assert_eq!(
        error.to_string(),
        "KVM_GET_DIRTY_LOG: No such device or address (os error 6)"
    );
}

/// Guest threads write and count; the collector reads. A page whose last count was not read was lost.
fn storm(protect: Option<Protect>) {
    use std::sync::atomic::AtomicU64;
    const PAGES: usize = 2000;
    let (kernel, vm) = (FakeKernel::new(), fake_vm());
    let fd = vm.open(&kernel);
    let slots = Slots::new(SLOTS.to_vec()).unwrap();
    let config = RingConfig { entries: ENTRIES };
    let (mut source, handle): (Box<dyn Source>, _) = match protect {
        Some(protect) => {
            let kernel = Arc::new(kernel.clone());
            (
                Box::new(
                    LogSource::with_kernel(kernel, &fd, protect, slots, control(&vm)).unwrap(),
                ),
                None,
            )
        }
        None => {
            ring::enable_with(&kernel, fd.as_fd(), config).unwrap();
            let vcpus = [vm.create_vcpu(&kernel), vm.create_vcpu(&kernel)];
            let kernel = Arc::new(kernel.clone());
            let source =
                RingSource::with_kernel(kernel, &fd, &vcpus, config, slots, control(&vm)).unwrap();
            let handle = source.handle();
            (Box::new(source), Some(handle))
        }
    };
    let set = set();
    source.start(&set).unwrap();
    let memory: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
    let mut seen = vec![0; PAGES];
    let running = AtomicBool::new(true);
    let read = |seen: &mut Vec<u64>| {
        let mut round = set.take_round();
        while let Some(run) = round.next_run(64) {
            for page in (run.first..run.first + run.count).filter(|_| run.region == 0) {
                if let Some(seen) = seen.get_mut(page as usize) {
                    *seen = memory[page as usize].load(Ordering::SeqCst);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for vcpu in 0..2 {
            let (vm, memory, running, handle) = (&vm, &memory, &running, handle.clone());
            scope.spawn(move || {
                let mut state = 77 + vcpu as u64;
                while running.load(Ordering::Relaxed) {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    let page = (state >> 40) as usize % PAGES;
                    memory[page].fetch_add(1, Ordering::SeqCst);
                    if vm.write(vcpu, 0, page as u64) == Wrote::RingFull {
                        handle
                            .as_ref()
                            .expect("only a ring fills")
                            .on_full(vcpu)
                            .unwrap();
                    }
                }
            });
        }
        let end = std::time::Instant::now() + std::time::Duration::from_millis(200);
        while std::time::Instant::now() < end {
            source.collect(&set, CollectPhase::PreCopy).unwrap();
            read(&mut seen);
        }
        running.store(false, Ordering::Relaxed);
    });
    source.collect(&set, CollectPhase::Final).unwrap();
    read(&mut seen);
    for (page, &seen) in seen.iter().enumerate() {
        assert_eq!(
            seen,
            memory[page].load(Ordering::SeqCst),
            "{protect:?}: page {page} was read before its last write"
        );
    }
}

#[test]
fn no_write_is_lost_under_a_storm() {
    storm(None);
    storm(Some(Protect::Plain));
    storm(Some(Protect::Manual));
    storm(Some(Protect::ManualInitiallySet));
}
