//! The debug scan: finds pages that changed although no source reported them, and names them.
//!
//! A VMM that writes guest memory and forgets to say so loses that write in a migration, and nobody notices until the
//! guest fails at the destination. The scan finds such a write where it can be found: it compares all of memory at two
//! moments when nobody writes.
//!
//! ```text
//!   pause, collect every source, [`Baseline::take`], run … pause, collect every source, [`Baseline::unreported`]
//! ```
//!
//! It reads all of memory, so it is a tool for developing a VMM and for finding a fault, and no part of a migration. This
//! crate holds no guest memory: the embedder says what a page holds ([`PageSums`]), as a checksum that differs when the
//! content does.

use crate::{DirtySet, Run};

/// Names a page's content.
pub trait PageSums {
    /// A number that depends on all of the page's bytes. Nobody writes the page meanwhile.
    fn page_sum(&self, region: u32, page: u64) -> u64;
}

impl<F: Fn(u32, u64) -> u64> PageSums for F {
    fn page_sum(&self, region: u32, page: u64) -> u64 {
        self(region, page)
    }
}

/// Runs of unreported pages that are named; more are only counted.
pub const RUNS_NAMED_MAX: usize = 16;

/// Pages that changed and that no source reported.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use = "a scan that nobody looks at finds nothing"]
pub struct Unreported {
    /// The first of them, at most [`RUNS_NAMED_MAX`] runs, in the order of regions and pages.
    pub runs: Vec<Run>,
    /// All of them.
    pub pages_total: u64,
}

impl Unreported {
    /// Whether none was found.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages_total == 0
    }

    fn push(&mut self, region: u32, page: u64) {
        self.pages_total += 1;
        let room = self.runs.len() < RUNS_NAMED_MAX;
        match self.runs.last_mut() {
            Some(last) if last.region == region && last.first + last.count == page => {
                last.count += 1;
            }
            _ if room => self.runs.push(Run {
                region,
                first: page,
                count: 1,
            }),
            _ => {}
        }
    }
}

impl std::fmt::Display for Unreported {
    /// Such as `3 pages changed and no source reported them: region 0 pages 5-6, region 1 page 9`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.pages_total {
            0 => return f.write_str("no page changed unreported"),
            1 => f.write_str("1 page changed and no source reported it:")?,
            pages => write!(f, "{pages} pages changed and no source reported them:")?,
        }
        let mut named = 0;
        for (run, separator) in self
            .runs
            .iter()
            .zip(std::iter::once(" ").chain(std::iter::repeat(", ")))
        {
            named += run.count;
            let (region, first, last) = (run.region, run.first, run.first + run.count - 1);
            if first == last {
                write!(f, "{separator}region {region} page {first}")?;
            } else {
                write!(f, "{separator}region {region} pages {first}-{last}")?;
            }
        }
        if named < self.pages_total {
            write!(f, ", and {} more", self.pages_total - named)?;
        }
        Ok(())
    }
}

/// Compares all of memory now with what was known of it `then`. Pages that are in `reported` may differ: a source reported
/// them and they have not been sent since.
///
/// For whoever keeps a checksum of each page anyway, such as a sender of what it sent last.
pub fn unreported(reported: &DirtySet, then: &dyn PageSums, now: &dyn PageSums) -> Unreported {
    let mut found = Unreported::default();
    for region in 0..reported.region_count() {
        for page in 0..reported.region_pages(region).unwrap_or(0) {
            if then.page_sum(region, page) != now.page_sum(region, page)
                && !reported.is_dirty(region, page)
            {
                found.push(region, page);
            }
        }
    }
    found
}

/// What memory held at one moment: 8 bytes a page.
#[derive(Debug)]
pub struct Baseline {
    sums: Vec<Vec<u64>>,
}

impl Baseline {
    /// Reads all of memory. The guest is paused, and every source was collected into `set` (of which only the regions
    /// matter here: what it holds may be taken meanwhile).
    pub fn take(set: &DirtySet, memory: &dyn PageSums) -> Self {
        let sums = |region: u32| {
            (0..set.region_pages(region).unwrap_or(0))
                .map(|page| memory.page_sum(region, page))
                .collect()
        };
        Self {
            sums: (0..set.region_count()).map(sums).collect(),
        }
    }

    /// Reads all of memory again. The guest is paused again, and every source was collected again; `reported` holds what they
    /// reported since [`Baseline::take`] and more does no harm.
    pub fn unreported(&self, reported: &DirtySet, memory: &dyn PageSums) -> Unreported {
        let then = |region: u32, page: u64| {
            self.sums
                .get(region as usize)
                .and_then(|sums| sums.get(page as usize))
                .copied()
                .unwrap_or(0)
        };
        unreported(reported, &then, memory)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::{CollectPhase, Source as _, VmmWrites};

    #[test]
    fn a_write_that_nobody_marked_is_named_and_marked_ones_are_not() {
        let memory = RefCell::new(vec![vec![0u64; 100], vec![0; 200]]);
        let read = |region: u32, page: u64| memory.borrow()[region as usize][page as usize];
        let write =
            |region: u32, page: u64| memory.borrow_mut()[region as usize][page as usize] += 1;
        let set = DirtySet::new(&[100, 200]);
        let mut source = VmmWrites::new();
        let marker = source.marker();
        source.start(&set).unwrap();
        write(0, 3);
        let baseline = Baseline::take(&set, &read);
        for page in [7, 8] {
            write(1, page);
            marker.mark(Run {
                region: 1,
                first: page,
                count: 1,
            });
        }
        source.collect(&set, CollectPhase::Final).unwrap();
        assert!(baseline.unreported(&set, &read).is_empty());
        for (region, page) in [(0, 50), (1, 9), (1, 10), (1, 199)] {
            write(region, page);
        }
        let found = baseline.unreported(&set, &read);
        assert_eq!(
            found.to_string(),
            "4 pages changed and no source reported them: region 0 page 50, region 1 pages 9-10, region 1 page 199"
        );
    }

    #[test]
    fn what_is_named_is_bounded_and_the_rest_is_counted() {
        let set = DirtySet::new(&[1000]);
        let baseline = Baseline::take(&set, &|_, _| 0);
        let found = baseline.unreported(&set, &|_, page: u64| u64::from(page.is_multiple_of(2)));
        assert_eq!((found.runs.len(), found.pages_total), (RUNS_NAMED_MAX, 500));
        assert!(
            found
                .to_string()
                .ends_with("region 0 page 30, and 484 more"),
            "{found}"
        );
        let found = baseline.unreported(&set, &|_, page: u64| u64::from(page == 4));
        assert_eq!(
            found.to_string(),
            "1 page changed and no source reported it: region 0 page 4"
        );
    }
}
