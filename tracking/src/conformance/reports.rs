//! What is written is reported: once, in time, and again when it is written again.

use super::Bench;
use crate::CollectPhase;

/// A page that was written is reported by the next collection, and not by the one after it.
pub(super) fn a_write_is_reported_once(bench: &mut Bench) {
    bench.start();
    for pass in 0..3 {
        let when = format!("pass {pass}");
        bench.write(17);
        bench.write(300);
        bench.write(17);
        let got = bench.collect_and_drain();
        bench.assert_reported(&got, &[(0, 17), (0, 300)], &when);
        bench.assert_quiet(CollectPhase::PreCopy, &when);
    }
    bench.stop();
}

/// The same from a thread of its own, while this one collects.
pub(super) fn a_write_of_another_thread_is_reported(bench: &mut Bench) {
    bench.start();
    let mut writer = bench.writers.remove(0);
    let thread = std::thread::spawn(move || {
        for page in (0..256).step_by(3) {
            writer.write(0, page);
        }
    });
    let mut got = std::collections::BTreeSet::new();
    while !thread.is_finished() {
        got.append(&mut bench.collect_and_drain());
    }
    thread.join().expect("the writer wrote");
    got.append(&mut bench.collect_and_drain());
    let written: Vec<_> = (0..256).step_by(3).map(|page| (0, page)).collect();
    bench.assert_reported(&got, &written, "while collecting");
    bench.assert_quiet(CollectPhase::PreCopy, "after the last one");
    bench.stop();
}

/// "No page is read before the kernel was told to report the next write to it."
pub(super) fn a_write_after_it_was_handed_out_is_reported_again(bench: &mut Bench) {
    bench.start();
    bench.write(40);
    let got = bench.collect_and_drain();
    bench.assert_reported(&got, &[(0, 40)], "first");
    bench.write(40);
    let got = bench.collect_and_drain();
    bench.assert_reported(&got, &[(0, 40)], "written after it was handed out");
    bench.stop();
}

/// A write between the collection and the hand-out is either read with the page or reported afterwards.
pub(super) fn a_write_between_collection_and_round_is_not_lost(bench: &mut Bench) {
    bench.start();
    bench.write(40);
    bench.collect(CollectPhase::PreCopy);
    bench.write(40);
    bench.write(41);
    let mut round = bench.set.take_round();
    bench.write(40);
    let mut seen = std::collections::BTreeMap::new();
    while let Some(run) = round.next_run(1) {
        seen.insert(
            (run.region, run.first),
            bench.harness.value(run.region, run.first),
        );
    }
    assert!(seen.contains_key(&(0, 40)), "page 40 is in the round");
    let later = bench.collect_and_drain();
    for page in [40, 41] {
        let read = seen.get(&(0, page)) == Some(&bench.harness.value(0, page));
        assert!(
            read || later.contains(&(0, page)),
            "the last write to page {page} is neither what was read nor reported"
        );
    }
    bench.stop();
}

/// Pages that a lane lost come back, and a write to one of them meanwhile is not forgotten.
pub(super) fn pages_given_back_come_again_and_their_writes_too(bench: &mut Bench) {
    bench.start();
    for page in [5, 6, 7, 200] {
        bench.write(page);
    }
    bench.collect(CollectPhase::PreCopy);
    let mut round = bench.set.take_round();
    let taken = round.next_run(2).expect("something was written");
    // The rest of the round is dropped, the run was sent and lost; meanwhile one of its pages is written.
    drop(round);
    bench.write(5);
    bench.set.give_back(taken);
    let got = bench.drain();
    bench.assert_reported(&got, &[(0, 5), (0, 6), (0, 7), (0, 200)], "given back");
    let seen = bench.harness.value(0, 5);
    bench.write(5);
    let later = bench.collect_and_drain();
    assert_ne!(seen, bench.harness.value(0, 5), "a write changes the page");
    assert!(
        later.contains(&(0, 5)),
        "written after it was handed out again"
    );
    bench.stop();
}

/// The first and the last page of each region, and neighbours across a word of the set.
pub(super) fn pages_of_every_region_and_both_ends_are_reported(bench: &mut Bench) {
    bench.start();
    let mut written = Vec::new();
    for (pages, region) in bench.harness.regions().into_iter().zip(0..) {
        let mut some: Vec<u64> = [0, 1, 63, 64, 127, 128, pages / 2, pages - 1].into();
        some.retain(|page| *page < pages);
        some.sort_unstable();
        some.dedup();
        written.extend(some.into_iter().map(|page| (region, page)));
    }
    for &(region, page) in &written {
        bench.writers[0].write(region, page);
    }
    let got = bench.collect_and_drain();
    bench.assert_reported(&got, &written, "both ends");
    bench.stop();
}

/// Writes before the pause, and writes of the VMM's own saving, are found by the final collections; then there is nothing
/// more to find, however often it is asked.
pub(super) fn the_final_phase_comes_to_an_end(bench: &mut Bench) {
    bench.start();
    bench.write(9);
    bench.collect(CollectPhase::Final);
    let got = bench.drain();
    bench.assert_reported(&got, &[(0, 9)], "before the pause");
    bench.write(10);
    bench.collect(CollectPhase::Final);
    let got = bench.drain();
    bench.assert_reported(&got, &[(0, 10)], "while saving");
    for time in 0..3 {
        bench.assert_quiet(CollectPhase::Final, &format!("final collection {time}"));
    }
    bench.stop();
}
