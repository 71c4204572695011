//! No write is lost, however writes and collections fall.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{Bench, PAGES_MIN};
use crate::{CollectPhase, Round};

/// The longest that a storm may take. A slow machine then makes fewer writes.
const STORM_MAX: Duration = Duration::from_secs(3);

/// All writers write drawn pages as fast as they can while this thread collects, takes rounds, loses some of what it
/// took and gives it back, as a sender over a bad link does. In the end the copy that it made is equal to the memory.
/// The seed is drawn from the clock and printed by a failure; `MULTIFD_SEED` replays it, as far as threads repeat.
pub(super) fn no_write_is_lost_under_a_storm(bench: &mut Bench) {
    let seed = seed();
    bench.source.start(&bench.set).expect("the source starts");
    bench.set.mark_all();
    let mut copy = Copy::new(&bench.harness.regions(), seed);
    let writers = std::mem::take(&mut bench.writers);
    let left = AtomicU64::new(bench.harness.storm_writes());
    let living = AtomicU32::new(writers.len() as u32);
    let until = Instant::now() + STORM_MAX;
    std::thread::scope(|scope| {
        for (mut writer, index) in writers.into_iter().zip(1..) {
            let (left, living) = (&left, &living);
            scope.spawn(move || {
                let _gone = CountsDown(living);
                let mut random = Random(seed ^ (index << 32));
                while Instant::now() < until {
                    for _ in 0..64 {
                        // Half of the writes fall on a few pages, so that pages are written again and again between and
                        // inside collections.
                        let of = if random.next() & 1 == 0 { 8 } else { PAGES_MIN };
                        writer.write(0, random.next() % of);
                    }
                    let done = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                        left.checked_sub(64)
                    });
                    if done.is_err() {
                        return;
                    }
                }
            });
        }
        while living.load(Ordering::Acquire) > 0 {
            bench
                .source
                .collect(&bench.set, CollectPhase::PreCopy)
                .expect("the source collects");
            copy.take(&*bench.harness, &bench.set, bench.set.take_round());
        }
    });
    copy.lossy = false;
    for _ in 0..2 {
        bench
            .source
            .collect(&bench.set, CollectPhase::Final)
            .expect("the source collects");
        copy.take(&*bench.harness, &bench.set, bench.set.take_round());
    }
    bench.stop();
    for (pages, region) in copy.pages.iter().zip(0..) {
        for (&seen, page) in pages.iter().zip(0..) {
            let now = bench.harness.value(region, page);
            assert_eq!(
                seen, now,
                "region {region} page {page} was read before its last write (MULTIFD_SEED={seed})"
            );
        }
    }
    assert!(copy.rounds >= 2, "the storm saw {} rounds", copy.rounds);
}

/// A destination: what was read of each page last.
struct Copy {
    pages: Vec<Vec<u64>>,
    rounds: u64,
    random: Random,
    lossy: bool,
}

impl Copy {
    fn new(regions: &[u64], seed: u64) -> Self {
        Self {
            pages: regions
                .iter()
                .map(|&pages| vec![0; pages as usize])
                .collect(),
            rounds: 0,
            random: Random(seed),
            lossy: true,
        }
    }

    fn take(&mut self, harness: &dyn super::Harness, set: &crate::DirtySet, mut round: Round) {
        self.rounds += 1;
        while let Some(run) = round.next_run(1 + self.random.next() % 64) {
            match self.random.next() % 16 {
                // Sent and lost.
                0 if self.lossy => {
                    set.give_back(run);
                }
                // The rest is not sent at all.
                1 if self.lossy && self.random.next().is_multiple_of(8) => {
                    set.give_back(run);
                    return;
                }
                _ => {
                    for page in run.first..run.first + run.count {
                        self.pages[run.region as usize][page as usize] =
                            harness.value(run.region, page);
                    }
                }
            }
        }
    }
}

/// Lets the collector end also when a writer panics.
struct CountsDown<'a>(&'a AtomicU32);

impl Drop for CountsDown<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }
}

fn seed() -> u64 {
    if let Some(seed) = std::env::var("MULTIFD_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
    {
        return seed;
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(1, |now| now.as_nanos() as u64)
}
