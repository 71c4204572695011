//! What round 0 holds: the pages that may be something else than zeros at the source, and that the VMM wants moved.
//!
//! The destination's memory is all zero before round 0 (SPEC: REGION-6), so a page that is zero here need not be sent, nor
//! even looked at: to read a hole of shared memory would fill it. The rule: pages are left out only *after* the sources of dirty
//! pages were started. What is written to such a page later is reported, and sent.

use multifd_tracking::{DirtySet, Error, PAGE_BYTES, Run};
use multifd_transport::Pulse;
use multifd_transport::memory::Unknown;

use super::Shared;

/// Pages whose content nobody needs, as the VMM says: sorted, and none twice.
#[derive(Debug, Default)]
pub(super) struct Unused(Vec<Run>);

impl Unused {
    /// # Errors
    /// [`Error::Misuse`] for a run that is not inside a region.
    pub(super) fn new(mut runs: Vec<Run>, set: &DirtySet) -> Result<Self, Error> {
        runs.sort_unstable();
        let mut merged: Vec<Run> = Vec::with_capacity(runs.len());
        for run in runs {
            set.check(run)?;
            match merged.last_mut() {
                Some(last) if last.region == run.region && run.first <= end(*last) => {
                    last.count = end(*last).max(end(run)) - last.first;
                }
                _ => merged.push(run),
            }
        }
        Ok(Self(merged))
    }

    /// The parts of `run` that are not among them.
    fn each_other(&self, mut run: Run, visit: &mut dyn FnMut(Run)) {
        let behind = |unused: &Run| (unused.region, end(*unused)) <= (run.region, run.first);
        for unused in &self.0[self.0.partition_point(behind)..] {
            if unused.region != run.region || unused.first >= end(run) {
                break;
            }
            if unused.first > run.first {
                visit(Run {
                    count: unused.first - run.first,
                    ..run
                });
            }
            let first = end(*unused).min(end(run));
            run.count = end(run) - first;
            run.first = first;
        }
        if run.count > 0 {
            visit(run);
        }
    }

    fn contains(&self, region: u32, page: u64) -> bool {
        let behind = |unused: &Run| (unused.region, end(*unused)) <= (region, page);
        let next = self.0.get(self.0.partition_point(behind));
        next.is_some_and(|unused| unused.region == region && unused.first <= page)
    }
}

fn end(run: Run) -> u64 {
    run.first + run.count
}

/// Marks what round 0 has to move. Returns the regions of which the kernel does not know what is populated.
pub(super) fn mark_populated(shared: &Shared, unused: &Unused, pulse: &Pulse) -> Vec<Unknown> {
    // A source may begin with everything in the set, and watch no page before it is taken (KVM's initially set log). Holes are
    // taken out of it, and looked for again now that they are watched.
    if shared.dirty.dirty_pages() > 0 {
        let begun = shared.dirty.take_round();
        begun.keep_only(&populated(shared, pulse));
    }
    shared.memory.each_populated(&mut |region, octets| {
        pulse.beat();
        let first = octets.start / PAGE_BYTES;
        let run = Run {
            region,
            first,
            count: octets.end.div_ceil(PAGE_BYTES) - first,
        };
        unused.each_other(run, &mut |run| {
            shared.dirty.mark(run);
        });
    })
}

/// The pages that may hold something now.
fn populated(shared: &Shared, pulse: &Pulse) -> DirtySet {
    let pages = (0..shared.dirty.region_count())
        .map(|region| shared.dirty.region_pages(region).unwrap_or(0));
    let populated = DirtySet::new(&pages.collect::<Vec<_>>());
    let _ = shared.memory.each_populated(&mut |region, octets| {
        pulse.beat();
        let first = octets.start / PAGE_BYTES;
        populated.mark(Run {
            region,
            first,
            count: octets.end.div_ceil(PAGE_BYTES) - first,
        });
    });
    populated
}

/// What a page may hold now, without reading a hole: the pages of a scan.
#[derive(Debug)]
pub(super) struct Readable<'u> {
    populated: DirtySet,
    unused: &'u Unused,
}

impl<'u> Readable<'u> {
    /// Asks the kernel, once.
    pub(super) fn new(shared: &Shared, unused: &'u Unused, pulse: &Pulse) -> Self {
        Self {
            populated: populated(shared, pulse),
            unused,
        }
    }

    /// Whether the page may hold something, and was not left out.
    pub(super) fn is_readable(&self, region: u32, page: u64) -> bool {
        self.populated.is_dirty(region, page)
    }

    /// Whether nobody needs what the page holds.
    pub(super) fn is_unused(&self, region: u32, page: u64) -> bool {
        self.unused.contains(region, page)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(region: u32, first: u64, count: u64) -> Run {
        Run {
            region,
            first,
            count,
        }
    }

    #[test]
    fn a_run_outside_memory_is_refused() {
        let set = DirtySet::new(&[10, 5]);
        assert!(Unused::new(vec![run(1, 0, 5)], &set).is_ok());
        assert!(Unused::new(vec![run(1, 1, 5)], &set).is_err());
        assert!(Unused::new(vec![run(2, 0, 1)], &set).is_err());
    }

    proptest! {
        #[test]
        fn what_is_not_unused_is_what_a_set_would_leave(
            unused in proptest::collection::vec((0u32..2, 0u64..60, 0u64..12), 0..12),
            asked in (0u32..2, 0u64..60, 1u64..40),
        ) {
            let set = DirtySet::new(&[100, 100]);
            let runs: Vec<Run> = unused.iter().map(|&(region, first, count)| run(region, first, count)).collect();
            let within = |page: (u32, u64)| runs.iter().any(|run| run.region == page.0 && (run.first..end(*run)).contains(&page.1));
            let unused = Unused::new(runs.clone(), &set).unwrap();
            let asked = run(asked.0, asked.1, asked.2);
            let mut found = Vec::new();
            unused.each_other(asked, &mut |part| found.extend((part.first..end(part)).map(|page| (part.region, page))));
            let want: Vec<_> = (asked.first..end(asked)).map(|page| (asked.region, page)).filter(|page| !within(*page)).collect();
            prop_assert_eq!(found, want);
            for page in 0..100 {
                prop_assert_eq!(unused.contains(1, page), within((1, page)));
            }
        }
    }
}
