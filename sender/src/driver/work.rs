//! What the lanes share of a round: the pages still to take, and a guard that loses none of them.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use multifd_tracking::{DirtySet, Round as TakenRound, Run};
use multifd_wire::limits::PAGES_PER_FRAME_MAX;
use multifd_wire::{Layout, PageIndex, PageRun, RegionId};

use super::lock;

/// How many pages a lane takes at a time at most: 1 MiB when they lie together. One lock for all of them.
const EXTENT_PAGES: u64 = PAGES_PER_FRAME_MAX as u64;

/// Frames that a lane takes at a time at most: with small bodies the lanes take turns as often as with large ones.
const EXTENT_FRAMES: u64 = 4;

/// One round's pages. Any lane may take any of them; the fastest lane takes most.
#[derive(Debug)]
pub(super) struct RoundWork {
    round: Mutex<TakenRound>,
    /// Nothing is left.
    taken: Condvar,
    extent_pages: u64,
}

impl RoundWork {
    /// `body_pages`: the pages of the largest frame.
    pub(super) fn new(round: TakenRound, body_pages: u64) -> Self {
        Self {
            round: Mutex::new(round),
            taken: Condvar::new(),
            extent_pages: (body_pages * EXTENT_FRAMES).min(EXTENT_PAGES),
        }
    }

    /// The pages that a lane takes at a time, if nothing speaks against it.
    pub(super) fn extent_pages(&self) -> u64 {
        self.extent_pages
    }

    /// Pages that nobody has taken.
    pub(super) fn left(&self) -> u64 {
        lock(&self.round).remaining()
    }

    /// Takes up to so many pages into `extent`; none are left if it stays empty. Returns how many are left.
    pub(super) fn take(&self, extent: &mut Vec<Run>, pages_max: u64) -> u64 {
        let wanted = pages_max.min(self.extent_pages);
        loop {
            let mut round = lock(&self.round);
            let unarmed = round.take(wanted);
            let (left, any) = (round.remaining(), !unarmed.is_empty());
            if left == 0 {
                self.taken.notify_all();
            }
            drop(round);
            // Outside of the lock: a lane does not wait for another one's kernel calls.
            unarmed.rearm(extent);
            // What could not be re-armed is no sign of the round's end.
            if !any || !extent.is_empty() {
                return left;
            }
        }
    }

    /// Waits until nothing is left, at most for `time`; whether nothing is.
    pub(super) fn wait_until_taken(&self, time: Duration) -> bool {
        let round = lock(&self.round);
        let waited = self
            .taken
            .wait_timeout_while(round, time, |round| round.remaining() > 0);
        waited.unwrap_or_else(PoisonError::into_inner).0.remaining() == 0
    }
}

/// Pages that a lane took and has not entered in its ledger. Whatever is in here when it is dropped goes back.
#[derive(Debug)]
pub(super) struct Unsent {
    set: DirtySet,
    /// Taken, and not looked at yet.
    pub(super) extent: Vec<Run>,
    /// Going into the next PAGES frame.
    pub(super) pages: RunList,
    /// Going into the next ZEROS frame.
    pub(super) zeros: RunList,
}

impl Unsent {
    pub(super) fn new(set: DirtySet) -> Self {
        Self {
            set,
            extent: Vec::new(),
            pages: RunList::default(),
            zeros: RunList::default(),
        }
    }
}

/// What a look at a page said.
#[derive(Debug, Clone, Copy)]
pub(super) enum Sorted {
    Zero,
    Content,
}

impl Unsent {
    /// Moves the first page of the extent's last run to its list, in one step: whatever fails before or after, the page is
    /// in exactly one of them. A run of which nothing is left stays, with no pages, until it is popped.
    pub(super) fn sort_first(&mut self, sorted: Sorted) {
        let Some(run) = self.extent.last_mut().filter(|run| run.count > 0) else {
            return;
        };
        let (region, page) = (run.region, run.first);
        run.first += 1;
        run.count -= 1;
        match sorted {
            Sorted::Zero => self.zeros.push(region, page),
            Sorted::Content => self.pages.push(region, page),
        }
    }
}

impl Drop for Unsent {
    fn drop(&mut self) {
        for run in self
            .extent
            .iter()
            .chain(&self.pages.runs)
            .chain(&self.zeros.runs)
            .filter(|run| run.count > 0)
        {
            self.set.give_back(*run);
        }
    }
}

/// Runs in the order in which their pages were added; neighbours are merged.
#[derive(Debug, Default)]
pub(super) struct RunList {
    runs: Vec<Run>,
    pages: u64,
}

impl RunList {
    pub(super) fn push(&mut self, region: u32, page: u64) {
        self.pages += 1;
        if let Some(last) = self.runs.last_mut()
            && last.region == region
            && last.first + last.count == page
        {
            last.count += 1;
            return;
        }
        self.runs.push(Run {
            region,
            first: page,
            count: 1,
        });
    }

    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    pub(super) fn runs(&self) -> usize {
        self.runs.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The runs in the wire's terms. The list keeps them until [`RunList::clear`]: until then they would go back.
    pub(super) fn admitted(&self, layout: &Layout) -> Vec<PageRun> {
        self.runs
            .iter()
            .filter_map(|run| admitted(layout, *run))
            .collect()
    }

    /// They are in a ledger now.
    pub(super) fn clear(&mut self) {
        self.runs.clear();
        self.pages = 0;
    }
}

/// A run of the dirty set in the wire's terms. The set was made from the layout, so there always is one.
fn admitted(layout: &Layout, run: Run) -> Option<PageRun> {
    let count = u32::try_from(run.count).ok()?;
    let admitted = layout
        .run(RegionId::new(run.region), PageIndex::new(run.first), count)
        .ok();
    debug_assert!(
        admitted.is_some(),
        "the dirty set and the layout disagree about {run:?}"
    );
    admitted
}

/// A run of the wire in the dirty set's terms.
pub(super) fn tracked(run: PageRun) -> Run {
    Run {
        region: run.region().value(),
        first: run.first().value(),
        count: u64::from(run.count()),
    }
}

#[cfg(test)]
mod tests {
    use multifd_wire::Region;

    use super::*;

    fn set() -> DirtySet {
        DirtySet::new(&[1024, 1024])
    }

    #[test]
    fn neighbours_merge_inside_a_region_only() {
        let layout = Layout::new([0u32, 1].map(|id| Region {
            id: RegionId::new(id),
            guest_address: u64::from(id) << 30,
            bytes: 1024 * 4096,
        }))
        .unwrap();
        let mut list = RunList::default();
        for (region, page) in [(0, 1022), (0, 1023), (1, 0), (1, 1), (1, 3)] {
            list.push(region, page);
        }
        assert_eq!((list.runs(), list.pages()), (3, 5));
        let counts: Vec<u32> = list
            .admitted(&layout)
            .iter()
            .map(|run| run.count())
            .collect();
        assert_eq!(counts, [2, 2, 1]);
    }

    #[test]
    fn scattered_pages_fill_an_extent_under_one_lock() {
        let set = set();
        for page in (0..1024).step_by(2) {
            set.mark_page(0, page);
        }
        let work = RoundWork::new(set.take_round(), EXTENT_PAGES);
        let mut extent = Vec::new();
        assert_eq!(work.take(&mut extent, EXTENT_PAGES), 256);
        assert_eq!(extent.len(), 256);
    }

    #[test]
    fn a_page_is_in_the_extent_or_in_a_list_at_every_step() {
        let set = set();
        for page in [3, 4, 5, 9] {
            set.mark_page(1, page);
        }
        for steps in 0..=6 {
            let work = RoundWork::new(set.take_round(), 64);
            let mut unsent = Unsent::new(set.clone());
            work.take(&mut unsent.extent, EXTENT_PAGES);
            for step in 0..steps {
                unsent.sort_first(if step % 2 == 0 {
                    Sorted::Content
                } else {
                    Sorted::Zero
                });
                if unsent.extent.last().is_some_and(|run| run.count == 0) {
                    unsent.extent.pop();
                }
            }
            let sorted = unsent.pages.pages() + unsent.zeros.pages();
            assert_eq!(sorted, 4.min(steps));
            drop((unsent, work));
            assert_eq!(set.dirty_pages(), 4, "after {steps} steps");
        }
    }

    #[test]
    fn what_a_lane_took_and_did_not_enter_goes_back() {
        let set = set();
        set.mark_all();
        let work = RoundWork::new(set.take_round(), EXTENT_PAGES);
        let mut unsent = Unsent::new(set.clone());
        work.take(&mut unsent.extent, EXTENT_PAGES);
        unsent.extent.clear();
        unsent.pages.push(0, 5);
        unsent.zeros.push(0, 6);
        unsent.zeros.push(0, 7);
        assert_eq!(set.dirty_pages(), 0);
        drop(unsent);
        assert_eq!(set.dirty_pages(), 3);
        drop(work);
        assert_eq!(set.dirty_pages(), 3 + 2048 - 256);
    }
}
