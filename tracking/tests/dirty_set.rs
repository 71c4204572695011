//! The dirty set against a model, under concurrent marking, and at the size of a big machine.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use multifd_tracking::{Collected, DirtySet, LateRearm, Round, Run};
use proptest::prelude::*;

type Pages = BTreeSet<(u32, u64)>;

fn run(region: u32, first: u64, count: u64) -> Run {
    Run {
        region,
        first,
        count,
    }
}

fn drain(round: &mut Round, pages_max: u64) -> Vec<Run> {
    std::iter::from_fn(|| round.next_run(pages_max)).collect()
}

fn pages_of(runs: &[Run]) -> Pages {
    let mut pages = Pages::new();
    for run in runs {
        for page in run.first..run.first + run.count {
            assert!(
                pages.insert((run.region, page)),
                "page {page} of region {} was handed out twice",
                run.region
            );
        }
    }
    pages
}

#[test]
fn neighbours_are_one_run_across_words() {
    let set = DirtySet::new(&[300]);
    set.mark(run(0, 10, 200));
    let mut round = set.take_round();
    assert_eq!((round.pages(), round.remaining()), (200, 200));
    assert_eq!(round.next_run(4096), Some(run(0, 10, 200)));
    assert_eq!((round.remaining(), round.next_run(4096)), (0, None));
}

#[test]
fn a_run_longer_than_the_bound_is_split() {
    let set = DirtySet::new(&[1000]);
    set.mark(run(0, 3, 500));
    let mut round = set.take_round();
    let runs = drain(&mut round, 256);
    assert_eq!(runs, [run(0, 3, 256), run(0, 259, 244)]);
}

#[test]
fn runs_never_cross_regions() {
    let set = DirtySet::new(&[64, 128, 1]);
    assert_eq!(set.mark_all(), 193);
    let runs = drain(&mut set.take_round(), u64::MAX);
    assert_eq!(runs, [run(0, 0, 64), run(1, 0, 128), run(2, 0, 1)]);
}

#[test]
fn a_bound_of_zero_counts_as_one() {
    let set = DirtySet::new(&[8]);
    set.mark(run(0, 2, 2));
    assert_eq!(
        drain(&mut set.take_round(), 0),
        [run(0, 2, 1), run(0, 3, 1)]
    );
}

#[test]
fn marks_made_after_the_take_are_not_in_the_round() {
    let set = DirtySet::new(&[128]);
    set.mark_page(0, 5);
    let mut round = set.take_round();
    set.mark_page(0, 5);
    set.mark_page(0, 100);
    assert_eq!(drain(&mut round, 64), [run(0, 5, 1)]);
    assert_eq!(set.dirty_pages(), 2);
}

#[test]
fn a_dropped_round_gives_the_rest_back() {
    let set = DirtySet::new(&[10_000, 70]);
    set.mark(run(0, 100, 9000));
    set.mark(run(1, 69, 1));
    let mut round = set.take_round();
    let first = round.next_run(777).unwrap();
    assert_eq!(set.dirty_pages(), 0);
    drop(round);
    assert_eq!(set.dirty_pages(), 9001 - 777);
    assert_eq!(set.figures().given_back, 9001 - 777);
    let rest = drain(&mut set.take_round(), u64::MAX);
    assert_eq!(rest, [run(0, first.first + 777, 9000 - 777), run(1, 69, 1)]);
}

#[test]
fn padding_bits_of_a_bitmap_are_not_pages() {
    let set = DirtySet::new(&[70, 64]);
    assert_eq!(set.mark_bitmap(0, 0, [0, u64::MAX, u64::MAX]), 6);
    assert_eq!(set.mark_bitmap(1, 60, [u64::MAX]), 4);
    assert_eq!(
        drain(&mut set.take_round(), 64),
        [run(0, 64, 6), run(1, 60, 4)]
    );
}

#[test]
fn an_empty_set_and_empty_regions_are_fine() {
    let set = DirtySet::new(&[0, 0, 5, 0]);
    assert_eq!(set.mark_all(), 5);
    assert_eq!(drain(&mut set.take_round(), 9), [run(2, 0, 5)]);
    assert_eq!(DirtySet::new(&[]).take_round().next_run(1), None);
}

#[test]
#[should_panic(expected = "is not inside a region")]
fn a_mark_outside_its_region_panics() {
    DirtySet::new(&[8, 8]).mark(run(0, 7, 2));
}

#[test]
fn contains_refuses_wrap_around() {
    let set = DirtySet::new(&[8]);
    assert!(
        set.contains(run(0, 0, 8))
            && !set.contains(run(0, u64::MAX, 2))
            && !set.contains(run(1, 0, 1))
    );
    let text = set.check(run(1, 0, 1)).unwrap_err().to_string();
    assert_eq!(text, "1 pages from page 0 are not inside region 1");
}

#[test]
fn a_failed_reset_keeps_the_pages() {
    let mut seen = Collected::new();
    seen.push_page(0, 7);
    seen.push_run(run(0, 1, 2));
    let failed = seen
        .rearm(|| Err(std::io::Error::from_raw_os_error(libc::EIO)))
        .unwrap_err();
    assert_eq!(failed.collected.pages(), 3);
    let set = DirtySet::new(&[8]);
    assert_eq!(
        set.merge(
            failed
                .collected
                .rearm(|| Ok::<_, std::io::Error>(()))
                .unwrap()
        ),
        3
    );
}

/// A source that refuses one page.
struct Refuses(u64);

impl LateRearm for Refuses {
    fn rearm(&self, run: Run) -> std::io::Result<()> {
        if (run.first..run.first + run.count).contains(&self.0) {
            return Err(std::io::Error::from_raw_os_error(libc::EFAULT));
        }
        Ok(())
    }
}

#[test]
fn a_run_that_cannot_be_rearmed_is_not_handed_out() {
    let set = DirtySet::new(&[64]);
    let late: Arc<dyn LateRearm> = Arc::new(Refuses(9));
    set.attach_late(Arc::clone(&late));
    set.mark(run(0, 0, 12));
    let mut round = set.take_round();
    assert_eq!(drain(&mut round, 4), [run(0, 0, 4), run(0, 4, 4)]);
    assert_eq!((round.held_back(), set.dirty_pages()), (4, 4));
    set.mark(run(0, 0, 4));
    let mut round = set.take_round();
    let mut runs = Vec::new();
    assert_eq!(round.take(4).rearm(&mut runs), 0);
    assert_eq!(round.take(4).rearm(&mut runs), 4);
    assert_eq!((&runs[..], set.dirty_pages()), (&[run(0, 0, 4)][..], 4));
    assert_eq!(round.take(4).rearm(&mut runs), 0, "nothing is left");
    set.mark(run(0, 0, 4));
    drop(set.take_round().take(4));
    assert_eq!(set.dirty_pages(), 8, "not re-armed, not lost");
    drop(drain(&mut set.take_round(), 4));
    set.detach_late(&late);
    assert_eq!(drain(&mut set.take_round(), 4), [run(0, 8, 4)]);
}

#[test]
#[should_panic(expected = "attached to the set")]
fn a_late_source_must_be_attached() {
    let late: Arc<dyn LateRearm> = Arc::new(Refuses(0));
    DirtySet::new(&[64]).merge_late(Collected::new(), &late);
}

#[derive(Clone, Debug)]
enum Operation {
    Mark(u32, u64, u64),
    GiveBack(u32, u64, u64),
    Bitmap(u32, u64, Vec<u64>),
    Merge(Vec<(u32, u64)>),
    MarkAll,
    /// Takes a round, hands out some runs of a bound, and drops the rest.
    Round(u64, usize),
}

const REGIONS: [u64; 4] = [1, 64, 4100, 700];

fn operation() -> impl Strategy<Value = Operation> {
    let place = || {
        (0..REGIONS.len()).prop_flat_map(|region| {
            let pages = REGIONS[region];
            (0..pages).prop_flat_map(move |first| {
                (
                    Just(region as u32),
                    Just(first),
                    0..=(pages - first).min(300),
                )
            })
        })
    };
    let page = (0..REGIONS.len()).prop_flat_map(|region| (Just(region as u32), 0..REGIONS[region]));
    prop_oneof![
        6 => place().prop_map(|(region, first, count)| Operation::Mark(region, first, count)),
        2 => place().prop_map(|(region, first, count)| Operation::GiveBack(region, first, count)),
        2 => (place(), prop::collection::vec(prop_oneof![Just(0), any::<u64>(), Just(u64::MAX)], 0..6))
            .prop_map(|((region, first, _), words)| Operation::Bitmap(region, first, words)),
        2 => prop::collection::vec(page, 0..40).prop_map(Operation::Merge),
        1 => Just(Operation::MarkAll),
        4 => (prop_oneof![1u64..5, 60..70u64, Just(256), Just(u64::MAX)], 0usize..40)
            .prop_map(|(pages_max, runs)| Operation::Round(pages_max, runs)),
    ]
}

/// Applies one operation to both; every answer of the set is compared.
fn apply(set: &DirtySet, model: &mut Pages, operation: &Operation) {
    let insert = |model: &mut Pages, region: u32, pages: &mut dyn Iterator<Item = u64>| {
        pages.filter(|&page| model.insert((region, page))).count() as u64
    };
    match operation {
        &Operation::Mark(region, first, count) => {
            assert_eq!(
                set.mark(run(region, first, count)),
                insert(model, region, &mut (first..first + count))
            );
        }
        &Operation::GiveBack(region, first, count) => {
            assert_eq!(
                set.give_back(run(region, first, count)),
                insert(model, region, &mut (first..first + count))
            );
        }
        Operation::Bitmap(region, first, words) => {
            let bits = words.iter().enumerate().flat_map(|(at, &word)| {
                (0..64)
                    .filter(move |bit| word >> bit & 1 == 1)
                    .map(move |bit| at as u64 * 64 + bit)
            });
            let pages = REGIONS[*region as usize];
            let mut inside = bits.map(|bit| first + bit).filter(|&page| page < pages);
            assert_eq!(
                set.mark_bitmap(*region, *first, words.iter().copied()),
                insert(model, *region, &mut inside)
            );
        }
        Operation::Merge(pages) => {
            let mut seen = Collected::new();
            let mut fresh = 0;
            for &(region, page) in pages {
                seen.push_page(region, page);
                fresh += insert(model, region, &mut std::iter::once(page));
            }
            assert_eq!(
                set.merge(seen.rearm(|| Ok::<_, std::io::Error>(())).unwrap()),
                fresh
            );
        }
        Operation::MarkAll => {
            let before = model.len();
            for (region, &pages) in REGIONS.iter().enumerate() {
                insert(model, region as u32, &mut (0..pages));
            }
            assert_eq!(set.mark_all(), (model.len() - before) as u64);
        }
        &Operation::Round(pages_max, runs_max) => {
            let mut round = set.take_round();
            assert_eq!(round.pages(), model.len() as u64);
            let runs: Vec<Run> = (0..runs_max)
                .map_while(|_| round.next_run(pages_max))
                .collect();
            assert!(
                runs.windows(2).all(|pair| pair[0] < pair[1]),
                "runs come in order"
            );
            assert!(
                runs.iter()
                    .all(|run| run.count >= 1 && run.count <= pages_max)
            );
            for pair in runs.windows(2) {
                let adjacent = pair[0].region == pair[1].region
                    && pair[0].first + pair[0].count == pair[1].first;
                assert!(
                    !adjacent || pair[0].count == pages_max,
                    "neighbours are merged up to the bound"
                );
            }
            let handed = pages_of(&runs);
            assert!(handed.is_subset(model));
            model.retain(|page| !handed.contains(page));
            assert_eq!(round.remaining(), model.len() as u64);
        }
    }
    assert_eq!(set.dirty_pages(), model.len() as u64);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn behaves_as_a_set_of_pages(operations in prop::collection::vec(operation(), 0..40)) {
        let set = DirtySet::new(&REGIONS);
        let mut model = Pages::new();
        for operation in &operations {
            apply(&set, &mut model, operation);
        }
        prop_assert_eq!(pages_of(&drain(&mut set.take_round(), 256)), model);
        prop_assert_eq!(set.take_round().pages(), 0);
    }
}

/// Writers store a growing number in "memory" and then mark; a reader takes rounds and reads. At the end the reader must
/// have seen the last number of every page: a lost mark leaves an old one.
#[test]
fn no_mark_is_lost_under_a_storm() {
    const PAGES: u64 = 5000;
    const WRITERS: u64 = 3;
    let set = DirtySet::new(&[PAGES]);
    let memory: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
    let writing = AtomicBool::new(true);
    let begin = Barrier::new(WRITERS as usize + 1);
    let mut seen = vec![0; PAGES as usize];
    let read = |seen: &mut Vec<u64>| {
        let mut round = set.take_round();
        let mut pages = Pages::new();
        while let Some(run) = round.next_run(16) {
            for page in run.first..run.first + run.count {
                assert!(pages.insert((0, page)), "twice in one round");
                seen[page as usize] = memory[page as usize].load(Ordering::SeqCst);
            }
            if run.first.is_multiple_of(7) {
                // Some of it "did not land".
                set.give_back(run);
            }
        }
    };
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (set, memory, begin) = (&set, &memory, &begin);
            let writing = &writing;
            scope.spawn(move || {
                begin.wait();
                let mut state = 0x9e37_79b9_7f4a_7c15 ^ writer;
                while writing.load(Ordering::Relaxed) {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    let page = (state >> 33) % PAGES;
                    memory[page as usize].fetch_add(1, Ordering::SeqCst);
                    set.mark_page(0, page);
                }
            });
        }
        begin.wait();
        let end = Instant::now() + Duration::from_millis(700);
        while Instant::now() < end {
            read(&mut seen);
        }
        writing.store(false, Ordering::Relaxed);
    });
    // What was given back in one pass is read in the next; the last pass gives nothing that was not read.
    read(&mut seen);
    for (page, seen) in seen.iter().enumerate() {
        assert_eq!(*seen, memory[page].load(Ordering::SeqCst), "page {page}");
    }
    // The count is exact when quiet.
    assert_eq!(set.dirty_pages(), set.take_round().pages());
}

#[test]
fn several_threads_share_one_round_without_overlap() {
    let set = DirtySet::new(&[200_000]);
    for page in (0..200_000).step_by(3) {
        set.mark_page(0, page);
    }
    let round = std::sync::Mutex::new(set.take_round());
    let runs: Vec<Run> = std::thread::scope(|scope| {
        let pull = || {
            let mut runs = Vec::new();
            loop {
                let (before, unarmed) = (runs.len(), round.lock().unwrap().take(64));
                unarmed.rearm(&mut runs);
                if runs.len() == before {
                    return runs;
                }
            }
        };
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(pull)).collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect()
    });
    assert_eq!(pages_of(&runs).len(), 200_000usize.div_ceil(3));
    assert_eq!(round.lock().unwrap().remaining(), 0);
}

/// The bytes that this process really occupies.
fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        * 4096
}

#[test]
fn an_untouched_set_over_16_tib_costs_next_to_no_memory() {
    let before = resident_bytes();
    let set = DirtySet::new(&[(16 << 40) / 4096]);
    set.mark_page(0, (16 << 40) / 4096 - 1);
    assert_eq!(set.take_round().pages(), 1);
    // Its bits would be 512 MiB. Other tests of this process run at the same time.
    assert!(resident_bytes() - before < 128 << 20);
}

/// Marks, takes and iterates 1,000 scattered pages; the fastest of many tries, in nanoseconds.
fn scattered_round_ns(bytes: u64) -> [u64; 3] {
    let pages = bytes / 4096;
    let set = DirtySet::new(&[pages]);
    let stride = pages / 1000;
    let mut best = [u64::MAX; 3];
    for _ in 0..200 {
        let mut lap = Instant::now();
        let mut times = [0; 3];
        let mut stop = |at: usize| {
            times[at] = lap.elapsed().as_nanos() as u64;
            lap = Instant::now();
        };
        for at in 0..1000 {
            set.mark_page(0, at * stride);
        }
        stop(0);
        let mut round = set.take_round();
        stop(1);
        while round.next_run(256).is_some() {}
        stop(2);
        for (best, time) in best.iter_mut().zip(times) {
            *best = time.min(*best);
        }
    }
    best
}

/// The cost follows what is dirty, not the size of the guest. The bound is loose because other tests run at the same
/// time; the figures are in docs/measurements/.
#[test]
fn a_thousand_pages_of_a_tebibyte_cost_about_what_those_of_a_gibibyte_cost() {
    let small: u64 = scattered_round_ns(1 << 30).iter().sum();
    let large: u64 = scattered_round_ns(1 << 40).iter().sum();
    assert!(
        large < small * 4,
        "{small} ns of 1 GiB, {large} ns of 1 TiB"
    );
}

#[test]
fn pages_that_hold_nothing_leave_the_set_once_they_are_watched_and_all_others_stay() {
    let set = DirtySet::new(&[200, 100]);
    set.attach_late(Arc::new(Refuses(159)));
    set.mark_all();
    let keep = DirtySet::new(&[200, 100]);
    for (region, first, count) in [(0, 60, 10), (1, 99, 1)] {
        keep.mark(Run {
            region,
            first,
            count,
        });
    }
    set.take_round().keep_only(&keep);
    let mut left = Vec::new();
    for (region, pages) in [(0, 200), (1, 100)] {
        left.extend(
            (0..pages)
                .filter(|page| set.is_dirty(region, *page))
                .map(|page| (region, page)),
        );
    }
    assert!(
        (60..70).all(|page| left.contains(&(0, page))) && left.contains(&(1, 99)),
        "{left:?}"
    );
    // The source could not watch page 159, nor what was asked for together with it.
    assert!(left.contains(&(0, 159)), "{left:?}");
    assert!(!left.contains(&(0, 59)) && !left.contains(&(0, 0)) && !left.contains(&(1, 98)));
}

#[test]
fn a_round_remembers_what_it_began_with() {
    let set = DirtySet::new(&[1000, 70]);
    let marked = [(0, 3, 1), (0, 64, 300), (1, 69, 1)];
    for (region, first, count) in marked {
        set.mark(Run {
            region,
            first,
            count,
        });
    }
    let mut round = set.take_round();
    let taken = round.taken();
    while round.next_run(100).is_some() {}
    drop(round);
    for (region, pages) in [(0, 1000), (1, 70)] {
        for page in 0..pages {
            let want = marked
                .iter()
                .any(|&(of, first, count)| of == region && (first..first + count).contains(&page));
            assert_eq!(
                taken.contains(region, page),
                want,
                "region {region} page {page}"
            );
        }
    }
}
