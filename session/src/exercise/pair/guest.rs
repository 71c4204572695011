//! The model of what is moved: memory as a number per page, VM state, and who runs it.

use std::collections::BTreeSet;

use multifd_wire::digest::page_value;
use multifd_wire::{Digest, Layout, PageIndex, PageRun, PageValues, RegionId};

use super::dice::Dice;

/// The checksum of a page: what stands for its 4096 bytes is a number.
pub(super) fn sum(value: u64) -> u32 {
    (value ^ (value >> 32)) as u32
}

/// The one page as a run.
pub(super) fn run_of(layout: &Layout, page: u64) -> PageRun {
    let (region, first) = (RegionId::new(0), PageIndex::new(page));
    layout.run(region, first, 1).unwrap()
}

pub(super) fn pages_of(run: PageRun) -> impl Iterator<Item = u64> {
    run.page_indices().map(PageIndex::value)
}

/// Memory of one side, and the values that its digest is made of.
pub(super) struct Memory {
    pub(super) pages: Vec<u64>,
    values: PageValues,
    pub(super) digest: Digest,
}

impl Memory {
    pub(super) fn new(layout: &Layout, pages: Vec<u64>) -> Self {
        Self {
            pages,
            values: PageValues::new(layout).unwrap(),
            digest: Digest::EMPTY,
        }
    }

    /// The page counts as one with this checksum from now on; 0 stands for a page of zeros.
    pub(super) fn count(&mut self, run: PageRun, value: u64) {
        let delta = if value == 0 {
            self.values.clear(run)
        } else {
            self.values.replace(run, [page_value(sum(value))])
        };
        self.digest.merge(delta);
    }

    /// Nothing counts any more.
    pub(super) fn forget(&mut self, layout: &Layout) {
        self.values = PageValues::new(layout).unwrap();
        self.digest = Digest::EMPTY;
    }
}

/// The guest at the source.
pub(super) struct Guest {
    pub(super) memory: Memory,
    /// Written since the last collection.
    pub(super) written: BTreeSet<u64>,
    pub(super) dirty: BTreeSet<u64>,
    /// How much of its time is held back, in percent.
    pub(super) throttle: u8,
    pub(super) runs: bool,
    /// The VM state as it was saved last.
    pub(super) saved: Vec<u8>,
}

impl Guest {
    pub(super) fn new(layout: &Layout, pages: u64, dice: &mut Dice) -> Self {
        let page = |page| if dice.one_in(4) { 0 } else { page + 1 };
        let pages = (0..pages).map(page).collect();
        Self {
            memory: Memory::new(layout, pages),
            written: BTreeSet::new(),
            dirty: BTreeSet::new(),
            throttle: 0,
            runs: true,
            saved: Vec::new(),
        }
    }

    pub(super) fn write(&mut self, dice: &mut Dice) {
        let page = dice.place(self.memory.pages.len());
        self.memory.pages[page] = if dice.one_in(4) { 0 } else { dice.next() };
        self.written.insert(page as u64);
    }

    /// What was written joins what is dirty; gives how much that is now.
    pub(super) fn collect(&mut self) -> u64 {
        self.dirty.append(&mut self.written);
        self.dirty.len() as u64
    }

    /// Puts pages back into the dirty set.
    pub(super) fn give_back(&mut self, runs: Vec<PageRun>) {
        self.dirty.extend(runs.into_iter().flat_map(pages_of));
    }
}
