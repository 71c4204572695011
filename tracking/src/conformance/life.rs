//! A source's life: start, stop, start again.

use super::Bench;
use crate::{CollectPhase, DirtySet};

/// A source that does not track says so, instead of reporting nothing.
pub(super) fn collecting_before_start_and_after_stop_is_misuse(bench: &mut Bench) {
    let refused = |bench: &mut Bench, when: &str| {
        let answer = bench.source.collect(&bench.set, CollectPhase::PreCopy);
        let error = answer.expect_err(when);
        assert_eq!(error.code(), "tracking-misuse", "{when}: {error}");
    };
    refused(bench, "before start");
    bench.start();
    bench.stop();
    refused(bench, "after stop");
}

/// Also before the first start.
pub(super) fn stopping_twice_is_nothing(bench: &mut Bench) {
    bench.source.stop().expect("nothing to stop");
    bench.start();
    bench.stop();
    bench.source.stop().expect("stopped already");
}

/// The set of a migration that is over stays as it is: its owner may look at it for as long as it likes.
pub(super) fn a_write_after_stop_does_not_touch_the_set(bench: &mut Bench) {
    bench.start();
    bench.stop();
    bench.drain();
    bench.write(30);
    bench.write(31);
    assert_eq!(bench.set.dirty_pages(), 0, "nothing is tracked");
}

/// A second migration: another set, and nothing of the first.
pub(super) fn a_restart_reports_into_the_new_set(bench: &mut Bench) {
    bench.start();
    bench.write(50);
    bench.stop();
    let old = std::mem::replace(&mut bench.set, DirtySet::new(&bench.harness.regions()));
    drop(super::pages(old.take_round()));
    bench.write(51);
    bench.start();
    bench.assert_quiet(
        CollectPhase::PreCopy,
        "writes before the start are round 0's",
    );
    bench.write(52);
    let got = bench.collect_and_drain();
    bench.assert_reported(&got, &[(0, 52)], "after the restart");
    assert_eq!(old.dirty_pages(), 0, "the old set is left alone");
    bench.stop();
}

/// Figures never go down, also over a restart, and count what was found.
pub(super) fn figures_count_up_and_have_a_name(bench: &mut Bench) {
    assert!(!bench.source.name().is_empty());
    bench.start();
    let before = bench.source.figures();
    bench.write(60);
    bench.write(61);
    let collection = bench.collect(CollectPhase::PreCopy);
    // Subtracting would panic if one had gone down.
    let since = bench.source.figures() - before;
    assert!(since.pages >= 2, "{since:?}");
    assert!(since.harvests >= 1, "{since:?}");
    assert!(collection.pages >= 2, "{collection:?}");
    assert_eq!((since.errors, since.ring_full_hard), (0, 0), "{since:?}");
    let before = bench.source.figures();
    bench.stop();
    bench.start();
    let _ = bench.source.figures() - before;
    bench.stop();
}
