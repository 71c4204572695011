//! What the tracking reports is enough: a copy of the reported pages alone makes the memories equal.

mod common;

use std::time::{Duration, Instant};

use common::*;
use multifd_guest::{Config, Error, Fill, Guest, Memory, Tracking};
use multifd_tracking::{CollectPhase, DirtySet, Source};

/// The ways of tracking that this host offers.
fn ways(test: &str) -> Vec<Tracking> {
    if kvm_or_skip(&format!("{test} (its KVM part)")) {
        vec![
            Tracking::Ring,
            Tracking::Log,
            Tracking::Userfault,
            Tracking::Marks,
        ]
    } else {
        vec![Tracking::Userfault, Tracking::Marks]
    }
}

fn dirty_set(memory: &Memory) -> DirtySet {
    let pages: Vec<u64> = memory
        .regions()
        .iter()
        .map(|region| region.bytes / 4096)
        .collect();
    DirtySet::new(&pages)
}

/// Copies the pages of one round; returns how many.
fn copy_round(set: &DirtySet, from: &Memory, to: &Memory) -> u64 {
    let mut round = set.take_round();
    let mut copied = 0;
    while let Some(run) = round.next_run(256) {
        let first = from.regions()[run.region as usize].guest_address + run.first * 4096;
        (0..run.count).for_each(|page| copy_page(from, to, first + page * 4096));
        copied += run.count;
    }
    copied
}

/// A whole migration: round 0, `rounds` live rounds, the last one paused. Returns the destination and the pages of
/// the rounds after round 0.
fn migrate(source: &Guest, tracker: &mut dyn Source, rounds: usize) -> (Guest, Vec<u64>) {
    let destination = destination(source);
    let (from, to) = (source.memory(), destination.memory());
    let set = dirty_set(&from);
    tracker.start(&set).unwrap();
    set.mark_all();
    assert_eq!(copy_round(&set, &from, &to), from.bytes() / 4096);
    let mut copied = Vec::new();
    for _ in 0..rounds {
        wait_beats(source, 2);
        tracker.collect(&set, CollectPhase::PreCopy).unwrap();
        copied.push(copy_round(&set, &from, &to));
    }
    wait_beats(source, 1);
    source.pause().unwrap();
    tracker.collect(&set, CollectPhase::Final).unwrap();
    copied.push(copy_round(&set, &from, &to));
    tracker.stop().unwrap();
    destination
        .load_state(&source.save_state().unwrap())
        .unwrap();
    (destination, copied)
}

#[test]
fn the_reported_pages_alone_make_the_memories_equal() {
    for tracking in ways("the_reported_pages_alone_make_the_memories_equal") {
        for config in [
            small(tracking),
            fast(tracking),
            Config {
                vcpus: 4,
                ..small(tracking)
            },
        ] {
            let source = Guest::create(&config).unwrap();
            assert_eq!(source.tracking(), tracking);
            source.run().unwrap();
            let mut tracker = source.tracking_source().unwrap();
            let (destination, copied) = migrate(&source, &mut *tracker, 5);
            assert_eq!(
                first_difference(&source.memory(), &destination.memory()),
                None,
                "{tracking:?}"
            );
            assert_whole(&destination);
            assert!(
                copied.iter().all(|pages| *pages > 0),
                "{tracking:?} {copied:?}"
            );
            // The working set, the log and the headers at most: the rest of the memory is never reported.
            let most = (config.working_set_bytes / 4096) * 513 / 512 + 16;
            assert!(
                copied.iter().all(|pages| *pages <= most),
                "{tracking:?} {copied:?}"
            );
            assert_eq!(
                tracker.figures().all_dirty,
                0,
                "{tracking:?}: {:?}",
                tracker.figures()
            );
        }
    }
}

#[test]
fn a_guest_of_two_regions_is_tracked_in_both() {
    for tracking in ways("a_guest_of_two_regions_is_tracked_in_both") {
        let fill = Fill {
            filled_percent: 0,
            zero_percent: 0,
        };
        let config = Config {
            memory_bytes: (3 << 30) + (64 << 20),
            fill,
            ..small(tracking)
        };
        let source = Guest::create(&config).unwrap();
        source.run().unwrap();
        let (destination, _) = migrate(&source, &mut *source.tracking_source().unwrap(), 2);
        assert_eq!(
            first_difference(&source.memory(), &destination.memory()),
            None,
            "{tracking:?}"
        );
        assert_whole(&destination);
    }
}

#[test]
fn an_idle_guest_reports_nothing() {
    for tracking in ways("an_idle_guest_reports_nothing") {
        let source = Guest::create(&Config {
            dirty_rate_bytes_per_s: 0,
            ..small(tracking)
        })
        .unwrap();
        source.run().unwrap();
        let (destination, copied) = migrate(&source, &mut *source.tracking_source().unwrap(), 3);
        assert_eq!(copied, [0; 4], "{tracking:?}");
        assert_whole(&destination);
    }
}

#[test]
fn a_guest_that_arrived_can_leave_again() {
    for tracking in ways("a_guest_that_arrived_can_leave_again") {
        let mut guest = Guest::create(&small(tracking)).unwrap();
        for hop in 0..6 {
            guest.run().unwrap();
            wait_beats(&guest, 1);
            let (arrived, _) = migrate(&guest, &mut *guest.tracking_source().unwrap(), 1 + hop % 2);
            assert_eq!(arrived.tracking(), tracking);
            assert_whole(&arrived);
            guest = arrived;
        }
    }
}

#[test]
fn a_cancelled_migration_leaves_a_guest_that_runs_and_migrates_later() {
    for tracking in ways("a_cancelled_migration_leaves_a_guest_that_runs_and_migrates_later") {
        let source = Guest::create(&fast(tracking)).unwrap();
        source.run().unwrap();
        for attempt in 0..4 {
            let mut tracker = source.tracking_source().unwrap();
            let set = dirty_set(&source.memory());
            tracker.start(&set).unwrap();
            wait_beats(&source, 3);
            tracker.collect(&set, CollectPhase::PreCopy).unwrap();
            wait_beats(&source, 3);
            // Cancelled with rings that hold entries; every other time without a stop, because dropping stops too.
            if attempt % 2 == 0 {
                tracker.stop().unwrap();
            }
            drop(tracker);
            wait_beats(&source, 3);
        }
        let (destination, _) = migrate(&source, &mut *source.tracking_source().unwrap(), 2);
        assert_eq!(
            first_difference(&source.memory(), &destination.memory()),
            None,
            "{tracking:?}"
        );
        assert_whole(&destination);
    }
}

/// The vCPUs push two entries for each store, as fast as they can, for many times the size of their rings.
#[test]
fn rings_that_nobody_collects_for_a_while_lose_nothing() {
    if !kvm_or_skip("rings_that_nobody_collects_for_a_while_lose_nothing") {
        return;
    }
    let source = Guest::create(&fast(Tracking::Ring)).unwrap();
    let destination = destination(&source);
    let (from, to) = (source.memory(), destination.memory());
    let set = dirty_set(&from);
    let mut tracker = source.tracking_source().unwrap();
    source.run().unwrap();
    tracker.start(&set).unwrap();
    set.mark_all();
    copy_round(&set, &from, &to);
    let begun = Instant::now();
    let before = counters(&source);
    // 100,000 stores are 200,000 entries, and a ring has 65,536.
    while counters(&source)
        .iter()
        .zip(&before)
        .any(|(now, then)| now - then < 100_000)
    {
        assert!(begun.elapsed() < PATIENCE, "{:?}", tracker.figures());
        assert!(source.failure().is_none(), "{:?}", source.failure());
        std::thread::sleep(Duration::from_millis(5));
    }
    source.pause().unwrap();
    tracker.collect(&set, CollectPhase::Final).unwrap();
    copy_round(&set, &from, &to);
    destination
        .load_state(&source.save_state().unwrap())
        .unwrap();
    assert_eq!(first_difference(&from, &to), None);
    assert_whole(&destination);
    let figures = tracker.figures();
    assert_eq!(
        (figures.ring_full_hard, figures.all_dirty, figures.errors),
        (0, 0, 0),
        "{figures:?}"
    );
}

/// The test of the tests above: without the pages that a collection reported, the check fails.
#[test]
fn leaving_out_one_collection_is_found() {
    for tracking in ways("leaving_out_one_collection_is_found") {
        let source = Guest::create(&fast(tracking)).unwrap();
        let destination = destination(&source);
        let (from, to) = (source.memory(), destination.memory());
        let set = dirty_set(&from);
        let mut tracker = source.tracking_source().unwrap();
        source.run().unwrap();
        tracker.start(&set).unwrap();
        set.mark_all();
        copy_round(&set, &from, &to);
        wait_beats(&source, 5);
        source.pause().unwrap();
        tracker.collect(&set, CollectPhase::Final).unwrap();
        assert!(set.dirty_pages() > 0);
        destination
            .load_state(&source.save_state().unwrap())
            .unwrap();
        assert!(!destination.check().unwrap().passed(), "{tracking:?}");
    }
}

#[test]
fn the_source_is_lent_once() {
    if !kvm_or_skip("the_source_is_lent_once") {
        return;
    }
    for tracking in [Tracking::Ring, Tracking::Log] {
        let guest = Guest::create(&small(tracking)).unwrap();
        let first = guest.tracking_source().unwrap();
        assert!(matches!(guest.tracking_source(), Err(Error::Misuse { .. })));
        drop(first);
        let mut second = guest.tracking_source().unwrap();
        assert_eq!(second.figures(), multifd_tracking::Figures::default());
        second.start(&dirty_set(&guest.memory())).unwrap();
        second.stop().unwrap();
    }
}
