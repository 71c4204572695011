//! The KVM sources on the real KVM: two vCPUs write, a copy of their memory is kept from what the sources report, and the
//! copy must be equal in the end.
//!
//! Without /dev/kvm each test says that it was skipped; with `MULTIFD_REQUIRE_KVM=1` it fails instead.
#![allow(clippy::print_stderr)] // A skipped test says so.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use multifd_tracking::kvm::{self, Protect, RingConfig, RingFullHandle, RingSource};
use multifd_tracking::{CollectPhase, Round, Source};

mod machine;

use machine::{Machine, PAGE, drawn, prepare, run};

fn pages_of(mut round: Round) -> BTreeSet<u64> {
    let mut pages = BTreeSet::new();
    while let Some(run) = round.next_run(256) {
        pages.extend(run.first..run.first + run.count);
    }
    pages
}

/// Every page that the guest wrote is reported; hardly any other is (some KVMs add the page of an instruction fetch); and
/// the same again after the reset, with the same pages.
fn reports_what_was_written(
    machine: &mut Machine,
    source: &mut dyn Source,
    handle: Option<&RingFullHandle>,
) {
    let set = machine.set();
    source.start(&set).unwrap();
    drop(pages_of(set.take_round()));
    for pass in 0..3 {
        let mut expected = BTreeSet::new();
        for (index, vcpu) in machine.vcpus.iter_mut().enumerate() {
            let mut edx = 7 + index as u32;
            prepare(vcpu, edx, 1500);
            run(vcpu, index, handle);
            expected.append(&mut drawn(&mut edx, machine.pages, 1500));
        }
        source.collect(&set, CollectPhase::PreCopy).unwrap();
        let got = pages_of(set.take_round());
        let missing: Vec<_> = expected.difference(&got).collect();
        assert!(
            missing.is_empty(),
            "pass {pass}: written and not reported: {missing:?}"
        );
        assert!(
            got.len() <= expected.len() + 4,
            "pass {pass}: {} reported, {} written",
            got.len(),
            expected.len()
        );
        let again = source.collect(&set, CollectPhase::PreCopy).unwrap();
        assert_eq!(again.pages, 0, "pass {pass}: collecting again is empty");
    }
    source.stop().unwrap();
}

/// The vCPUs write for a while; the copy, fed by rounds only, is equal to the memory once they stopped.
fn copy_is_equal_after_a_storm(
    machine: &mut Machine,
    source: &mut dyn Source,
    handle: Option<RingFullHandle>,
) {
    let set = machine.set();
    let memory = Arc::clone(&machine.memory);
    let mut copy = vec![0u64; memory.bytes / 8];
    source.start(&set).unwrap();
    set.mark_all();
    let running = AtomicBool::new(true);
    let rounds = std::cell::Cell::new(0);
    let mut copy_round = |mut round: Round| {
        rounds.set(rounds.get() + 1);
        while let Some(run) = round.next_run(64) {
            memory.copy(run, &mut copy);
        }
    };
    std::thread::scope(|scope| {
        let _stop = StopsOnDrop(&running);
        for (index, vcpu) in machine.vcpus.iter_mut().enumerate() {
            let (running, handle) = (&running, &handle);
            scope.spawn(move || {
                prepare(vcpu, 99 + index as u32, 500);
                while running.load(Ordering::Relaxed) {
                    run(vcpu, index, handle.as_ref());
                    let mut registers = vcpu.get_regs().unwrap();
                    registers.rcx = 500;
                    vcpu.set_regs(&registers).unwrap();
                }
            });
        }
        let end = Instant::now() + Duration::from_millis(400);
        while Instant::now() < end || rounds.get() < 5 {
            source.collect(&set, CollectPhase::PreCopy).unwrap();
            copy_round(set.take_round());
        }
        running.store(false, Ordering::Relaxed);
    });
    source.collect(&set, CollectPhase::Final).unwrap();
    copy_round(set.take_round());
    source.stop().unwrap();
    for page in 0..machine.total_pages() as usize {
        let words = page * PAGE / 8..(page + 1) * PAGE / 8;
        let differs = words
            .clone()
            .find(|&word| copy[word] != memory.read(word * 8));
        assert_eq!(
            differs,
            None,
            "page {page} differs after {} rounds",
            rounds.get()
        );
    }
}

/// Lets the vCPUs stop also when the collector panics, or the test would hang instead of failing.
struct StopsOnDrop<'a>(&'a AtomicBool);

impl Drop for StopsOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

const RING: RingConfig = RingConfig { entries: 4096 };

#[test]
fn the_ring_reports_what_two_vcpus_write() {
    let Some(mut machine) =
        Machine::new("the_ring_reports_what_two_vcpus_write", 2, 4096, Some(RING))
    else {
        return;
    };
    let mut source = machine.ring(RING);
    let handle = source.handle();
    reports_what_was_written(&mut machine, &mut source, Some(&handle));
    assert_eq!(source.figures().entries_unknown, 0);
    reports_what_was_written(&mut machine, &mut source, Some(&handle));
}

#[test]
fn full_rings_are_emptied_by_their_vcpus() {
    let Some(mut machine) = Machine::new(
        "full_rings_are_emptied_by_their_vcpus",
        2,
        32_768,
        Some(RING),
    ) else {
        return;
    };
    let mut source = machine.ring(RING).without_reaper();
    let (handle, set) = (source.handle(), machine.set());
    source.start(&set).unwrap();
    let mut expected = BTreeSet::new();
    for (index, vcpu) in machine.vcpus.iter_mut().enumerate() {
        let mut edx = 1 + index as u32;
        prepare(vcpu, edx, 12_000);
        run(vcpu, index, Some(&handle));
        expected.append(&mut drawn(&mut edx, machine.pages, 12_000));
    }
    source.collect(&set, CollectPhase::Final).unwrap();
    let figures = source.figures();
    assert!(figures.ring_full_soft >= 2, "{figures:?}");
    assert_eq!(figures.errors, 0, "{figures:?}");
    assert!(source.vcpu_figures().iter().all(|vcpu| vcpu.ring_full >= 1));
    let got = pages_of(set.take_round());
    assert!(expected.is_subset(&got));
    // A KVM that lets a ring overflow makes everything dirty, once.
    assert!(
        got.len() <= expected.len() + 4 || figures.ring_full_hard > 0,
        "{figures:?}"
    );
    // Afterwards it is exact again, and the vCPUs go on.
    for (index, vcpu) in machine.vcpus.iter_mut().enumerate() {
        prepare(vcpu, 5, 100);
        run(vcpu, index, Some(&handle));
    }
    source.collect(&set, CollectPhase::Final).unwrap();
    let got = pages_of(set.take_round());
    let expected = drawn(&mut 5, machine.pages, 100);
    assert!(
        expected.is_subset(&got) && got.len() <= expected.len() + 4,
        "{} of {}",
        got.len(),
        expected.len()
    );
}

#[test]
fn a_copy_fed_by_the_ring_is_equal_after_a_storm() {
    let name = "a_copy_fed_by_the_ring_is_equal_after_a_storm";
    let Some(mut machine) = Machine::new(name, 2, 8192, Some(RING)) else {
        return;
    };
    let mut source = machine.ring(RING);
    let handle = source.handle();
    copy_is_equal_after_a_storm(&mut machine, &mut source, Some(handle.clone()));
    copy_is_equal_after_a_storm(&mut machine, &mut source, Some(handle));
}

/// Without the reaper the rings get full, and overflow on a KVM that looks too seldom.
#[test]
fn a_copy_fed_by_overflowing_rings_is_equal_after_a_storm() {
    let name = "a_copy_fed_by_overflowing_rings_is_equal_after_a_storm";
    let small = RingConfig {
        entries: RingConfig::ENTRIES_MIN,
    };
    let Some(mut machine) = Machine::new(name, 2, 8192, Some(small)) else {
        return;
    };
    let mut source = machine.ring(small).without_reaper();
    let handle = source.handle();
    copy_is_equal_after_a_storm(&mut machine, &mut source, Some(handle));
    assert!(
        source.figures().ring_full_soft > 0,
        "{:?}",
        source.figures()
    );
}

#[test]
fn the_log_reports_what_two_vcpus_write() {
    for protect in [Protect::Plain, Protect::Manual, Protect::ManualInitiallySet] {
        let Some(mut machine) = Machine::new("the_log_reports_what_two_vcpus_write", 2, 4096, None)
        else {
            return;
        };
        let mut source = machine.log(protect);
        assert_eq!(source.protect(), protect);
        reports_what_was_written(&mut machine, &mut source, None);
        reports_what_was_written(&mut machine, &mut source, None);
    }
}

#[test]
fn a_copy_fed_by_the_log_is_equal_after_a_storm() {
    for protect in [Protect::Plain, Protect::Manual, Protect::ManualInitiallySet] {
        let name = "a_copy_fed_by_the_log_is_equal_after_a_storm";
        let Some(mut machine) = Machine::new(name, 2, 8192, None) else {
            return;
        };
        let mut source = machine.log(protect);
        copy_is_equal_after_a_storm(&mut machine, &mut source, None);
        copy_is_equal_after_a_storm(&mut machine, &mut source, None);
    }
}

#[test]
fn the_ring_of_a_real_kvm_refuses_a_late_enable_and_too_big_a_size() {
    let name = "the_ring_of_a_real_kvm_refuses_a_late_enable_and_too_big_a_size";
    let Some(machine) = Machine::new(name, 1, 4096, None) else {
        return;
    };
    let support = kvm::probe(&machine.vm).unwrap();
    if support.ring.is_none() {
        eprintln!("SKIPPED {name}: this KVM has no dirty ring");
        return;
    }
    assert_eq!(
        kvm::enable(&machine.vm, RING).unwrap_err().code(),
        "tracking-kernel"
    );
    assert_eq!(
        kvm::enable(&machine.vm, RingConfig { entries: 131_072 })
            .unwrap_err()
            .code(),
        "tracking-misuse"
    );
    let slots = machine.slots();
    let late = RingSource::new(&machine.vm, &machine.vcpus, RING, slots, machine.control());
    assert_eq!(
        late.err().unwrap().code(),
        "tracking-kernel",
        "the ring was never switched on, so it cannot be mapped"
    );
}
