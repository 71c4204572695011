//! What every source of dirty pages must do, as checks that run against any source.
//!
//! A [`Kind`] is a name and a function that makes a [`Harness`]: a source, something that writes where the source looks,
//! and a way to read what was written. Each check makes a fresh harness, uses nothing but the crate's own interface, and
//! panics with a sentence if the source does not keep the promise that the check is named after.
//! [`source_conformance_tests!`](crate::source_conformance_tests) makes one test per check; [`CHECKS`] is for runners of
//! another sort.
//!
//! Rule: a check trusts the source with nothing but time. What a page holds is read only after a round handed it out,
//! as a sender does.

mod life;
mod reports;
mod storm;

use std::collections::BTreeSet;

use crate::{CollectPhase, Collection, DirtySet, Round, Source};

/// A kind of source under test.
#[derive(Clone, Copy)]
pub struct Kind {
    /// What to call it in failures.
    pub name: &'static str,
    /// Makes a fresh source and its surroundings; `None` if the machine lacks what it needs, which the maker has said
    /// by name.
    pub make: fn(check: &str) -> Option<Box<dyn Harness>>,
}

/// How exactly a source reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// The pages that were written, and, of real hardware, a handful more.
    Exact,
    /// Aligned groups of so many pages, of which at least one was written.
    Granule {
        /// The pages of a group, counted from the start of the region.
        pages: u64,
    },
    /// Everything that the source is about, at each collection with the guest running.
    Everything,
}

/// A source and its surroundings. At least [`PAGES_MIN`] pages in its first region.
pub trait Harness {
    /// The pages of each region.
    fn regions(&self) -> Vec<u64>;

    /// The source under test. Called once.
    fn source(&mut self) -> Box<dyn Source>;

    /// What writes, at least one of them. Called once.
    fn writers(&mut self) -> Vec<Box<dyn Writer>>;

    /// What the page holds: each write changes it to a value that it did not hold before.
    fn value(&self, region: u32, page: u64) -> u64;

    /// How exactly the source reports.
    fn precision(&self) -> Precision {
        Precision::Exact
    }

    /// How many writes a storm makes in all. Fewer where a write is slow.
    fn storm_writes(&self) -> u64 {
        100_000
    }
}

/// Something that writes guest memory, as the source is meant to see it.
pub trait Writer: Send {
    /// Writes one page. When it returns, a collection that begins later has it.
    fn write(&mut self, region: u32, page: u64);
}

/// Pages that the checks use of the first region.
pub const PAGES_MIN: u64 = 512;

/// Pages that a source of [`Precision::Exact`] may report although nobody wrote them: on some processors a fetch of
/// instructions or a page table counts as a write.
const STRAY_PAGES_MAX: usize = 4;

/// One promise.
#[derive(Clone, Copy)]
pub struct Check {
    /// The promise, in words.
    pub name: &'static str,
    /// Panics if the source breaks it.
    pub run: fn(&mut Bench),
}

macro_rules! checks {
    ($($module:ident::$name:ident,)*) => {
        /// All checks.
        pub const CHECKS: &[Check] = &[$(Check { name: stringify!($name), run: $module::$name }),*];
    };
}

checks! {
    reports::a_write_is_reported_once,
    reports::a_write_of_another_thread_is_reported,
    reports::a_write_after_it_was_handed_out_is_reported_again,
    reports::a_write_between_collection_and_round_is_not_lost,
    reports::pages_given_back_come_again_and_their_writes_too,
    reports::pages_of_every_region_and_both_ends_are_reported,
    reports::the_final_phase_comes_to_an_end,
    life::collecting_before_start_and_after_stop_is_misuse,
    life::stopping_twice_is_nothing,
    life::a_write_after_stop_does_not_touch_the_set,
    life::a_restart_reports_into_the_new_set,
    life::figures_count_up_and_have_a_name,
    storm::no_write_is_lost_under_a_storm,
}

/// Runs one check by its name; `false` if it was skipped.
///
/// # Panics
/// If there is no such check, or the source does not pass it.
pub fn run(name: &str, kind: Kind) -> bool {
    let check = CHECKS
        .iter()
        .find(|check| check.name == name)
        .expect("a check of this name");
    let Some(harness) = (kind.make)(name) else {
        return false;
    };
    (check.run)(&mut Bench::new(harness));
    true
}

/// Makes a module of tests, one per check: `source_conformance_tests!(marker, make_marker);`, where `make_marker` is
/// [`Kind::make`].
#[macro_export]
macro_rules! source_conformance_tests {
    ($module:ident, $make:expr) => {
        $crate::source_conformance_tests!(@tests $module, $make;
            a_write_is_reported_once
            a_write_of_another_thread_is_reported
            a_write_after_it_was_handed_out_is_reported_again
            a_write_between_collection_and_round_is_not_lost
            pages_given_back_come_again_and_their_writes_too
            pages_of_every_region_and_both_ends_are_reported
            the_final_phase_comes_to_an_end
            collecting_before_start_and_after_stop_is_misuse
            stopping_twice_is_nothing
            a_write_after_stop_does_not_touch_the_set
            a_restart_reports_into_the_new_set
            figures_count_up_and_have_a_name
            no_write_is_lost_under_a_storm
        );
    };
    (@tests $module:ident, $make:expr; $($check:ident)*) => {
        mod $module {
            #[allow(unused_imports)]
            use super::*;

            const KIND: $crate::conformance::Kind = $crate::conformance::Kind {
                name: stringify!($module),
                make: $make,
            };

            $(#[test]
            fn $check() {
                $crate::conformance::run(stringify!($check), KIND);
            })*

            /// Fails when the suite grew and the macro's list did not.
            #[test]
            fn every_check_is_listed() {
                let listed = [$(stringify!($check)),*];
                let all: Vec<_> = $crate::conformance::CHECKS.iter().map(|check| check.name).collect();
                assert_eq!(listed[..], all[..]);
            }
        }
    };
}

/// A harness with its source and writers taken out, and the set of the migration under way.
pub struct Bench {
    harness: Box<dyn Harness>,
    source: Box<dyn Source>,
    writers: Vec<Box<dyn Writer>>,
    set: DirtySet,
}

impl Bench {
    fn new(mut harness: Box<dyn Harness>) -> Self {
        let regions = harness.regions();
        assert!(
            regions.first().is_some_and(|pages| *pages >= PAGES_MIN),
            "the first region has {PAGES_MIN} pages"
        );
        let (source, writers) = (harness.source(), harness.writers());
        assert!(!writers.is_empty(), "something writes");
        Self {
            set: DirtySet::new(&regions),
            harness,
            source,
            writers,
        }
    }

    /// Starts, and takes what a source may put into the set at once.
    fn start(&mut self) {
        self.source.start(&self.set).expect("the source starts");
        self.drain();
    }

    fn stop(&mut self) {
        self.source.stop().expect("the source stops");
    }

    fn write(&mut self, page: u64) {
        self.writers[0].write(0, page);
    }

    fn collect(&mut self, phase: CollectPhase) -> Collection {
        self.source
            .collect(&self.set, phase)
            .expect("the source collects")
    }

    /// Takes a round and hands all of it out.
    fn drain(&self) -> BTreeSet<(u32, u64)> {
        pages(self.set.take_round())
    }

    fn collect_and_drain(&mut self) -> BTreeSet<(u32, u64)> {
        self.collect(CollectPhase::PreCopy);
        self.drain()
    }

    /// Panics unless `got` is what the source's precision allows for `written`.
    fn assert_reported(&self, got: &BTreeSet<(u32, u64)>, written: &[(u32, u64)], when: &str) {
        let missing: Vec<_> = written.iter().filter(|page| !got.contains(page)).collect();
        assert!(
            missing.is_empty(),
            "{when}: written and not reported: {missing:?}"
        );
        let precision = self.harness.precision();
        let allowed = |&(region, page): &(u32, u64)| match precision {
            Precision::Everything => true,
            Precision::Exact => written.contains(&(region, page)),
            Precision::Granule { pages } => written
                .iter()
                .any(|&(r, w)| r == region && w / pages == page / pages),
        };
        let stray: Vec<_> = got.iter().filter(|page| !allowed(page)).collect();
        assert!(
            stray.len() <= STRAY_PAGES_MAX,
            "{when}: reported and not written: {stray:?}"
        );
    }

    /// Panics unless a collection with nothing written since the last one brings nothing.
    fn assert_quiet(&mut self, phase: CollectPhase, when: &str) {
        if phase == CollectPhase::PreCopy && self.harness.precision() == Precision::Everything {
            return;
        }
        self.collect(phase);
        let got = self.drain();
        assert!(got.is_empty(), "{when}: reported again: {got:?}");
    }
}

fn pages(mut round: Round) -> BTreeSet<(u32, u64)> {
    let mut pages = BTreeSet::new();
    while let Some(run) = round.next_run(256) {
        pages.extend((run.first..run.first + run.count).map(|page| (run.region, page)));
    }
    assert_eq!(round.held_back(), 0, "every page could be re-armed");
    pages
}
