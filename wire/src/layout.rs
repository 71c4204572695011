//! The agreed region table, and runs of pages that are known to lie inside it.
//!
//! A [`PageRun`] is a proof: it is made only by [`Layout::admit`] (from a peer's octets), [`Layout::run`] (by our own
//! side) or by splitting another. It must be used with the layout that made it.

use core::ops::Range;

use crate::PAGE_BYTES_U64;
use crate::codec;
use crate::error::{LayoutError, Misbehaved, Misuse};
use crate::frame::{RawRun, Regions};
use crate::id::{PageCount, PageIndex, RegionId};
use crate::limits::{MEMORY_PAGES_MAX, REGIONS_MAX};

/// One contiguous piece of guest-physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its number: the 0-based place in the table.
    pub id: RegionId,
    /// Its first guest-physical address, a multiple of the page size.
    pub guest_address: u64,
    /// Its size in octets, a multiple of the page size and not 0.
    pub bytes: u64,
}

/// A region and what is derived from it once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    region: Region,
    /// Pages in the region.
    pages: u64,
    /// Pages in all regions before it.
    base: u64,
}

/// A checked region table: 1 to [`REGIONS_MAX`] regions, numbered from 0, aligned, none empty, none overlapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    entries: Vec<Entry>,
    pages: u64,
}

impl Layout {
    /// Checks regions and keeps them. Allocates for at most [`REGIONS_MAX`] regions, however many the iterator yields.
    ///
    /// # Errors
    /// [`LayoutError`] says what is wrong with the table.
    // SPEC: REGION-1, REGION-2, REGION-3, REGION-4
    pub fn new(regions: impl IntoIterator<Item = Region>) -> Result<Self, LayoutError> {
        let mut entries = Vec::new();
        let mut pages = 0_u64;
        for (index, region) in regions.into_iter().enumerate() {
            if index >= REGIONS_MAX {
                return Err(LayoutError::Regions {
                    count: index.saturating_add(1),
                });
            }
            check_region(index, &region)?;
            let entry = Entry {
                region,
                pages: region.bytes.div_euclid(PAGE_BYTES_U64),
                base: pages,
            };
            pages = pages.saturating_add(entry.pages);
            entries.push(entry);
        }
        if entries.is_empty() {
            return Err(LayoutError::Regions { count: 0 });
        }
        if pages > MEMORY_PAGES_MAX {
            return Err(LayoutError::Pages);
        }
        check_overlap(&entries)?;
        Ok(Self { entries, pages })
    }

    /// Checks the regions of a decoded frame and keeps them.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn from_frame(regions: &Regions<'_>) -> Result<Self, LayoutError> {
        Self::new(regions.iter())
    }

    /// The regions in the order of their numbers.
    pub fn regions(&self) -> impl ExactSizeIterator<Item = Region> + Clone + '_ {
        self.entries.iter().map(|entry| entry.region)
    }

    /// One region.
    #[must_use]
    pub fn region(&self, id: RegionId) -> Option<Region> {
        self.entry(id.value()).map(|entry| entry.region)
    }

    /// Pages in one region.
    #[must_use]
    pub fn region_pages(&self, id: RegionId) -> Option<PageCount> {
        self.entry(id.value())
            .map(|entry| PageCount::new(entry.pages))
    }

    /// Pages in all regions.
    #[must_use]
    pub const fn pages_total(&self) -> PageCount {
        PageCount::new(self.pages)
    }

    /// Admits a run from a peer's table: its region is known, it is not empty, and it ends inside its region.
    ///
    /// # Errors
    /// [`Misbehaved`]: `UnknownRegion`, `EmptyRun` or `RunPastRegion`.
    // SPEC: RUN-1, RUN-2, RUN-3
    pub fn admit(&self, raw: &RawRun) -> Result<PageRun, Misbehaved> {
        let (region, count, first) = (raw.region.get(), raw.count.get(), raw.first.get());
        let entry = self
            .entry(region)
            .ok_or(Misbehaved::UnknownRegion { region })?;
        if count == 0 {
            return Err(Misbehaved::EmptyRun { region });
        }
        entry.run(first, count).ok_or(Misbehaved::RunPastRegion {
            region,
            first,
            count,
        })
    }

    /// Makes a run for our own side.
    ///
    /// # Errors
    /// [`Misuse::Run`] when the run is empty or does not lie in the region.
    pub fn run(&self, region: RegionId, first: PageIndex, count: u32) -> Result<PageRun, Misuse> {
        let (region, first) = (region.value(), first.value());
        self.entry(region)
            .filter(|_| count > 0)
            .and_then(|entry| entry.run(first, count))
            .ok_or(Misuse::Run {
                region,
                first,
                count,
            })
    }

    /// Where a run lies when the pages of all regions are counted through, in the order of the table.
    ///
    /// For a run of another layout the answer is some range within this layout's pages, possibly empty.
    #[must_use]
    pub fn global_index(&self, run: PageRun) -> Range<u64> {
        let base = self
            .entry(run.region)
            .map_or(self.pages, |entry| entry.base);
        let start = base.saturating_add(run.first).min(self.pages);
        start..start.saturating_add(u64::from(run.count)).min(self.pages)
    }

    /// The region and page at a place in the count over all regions; `None` past the end.
    #[must_use]
    pub fn locate(&self, global: u64) -> Option<(RegionId, PageIndex)> {
        let after = self.entries.partition_point(|entry| entry.base <= global);
        let entry = self.entries.get(after.checked_sub(1)?)?;
        let page = global.checked_sub(entry.base)?;
        (page < entry.pages).then_some((entry.region.id, PageIndex::new(page)))
    }

    /// The entry of a region number.
    fn entry(&self, region: u32) -> Option<&Entry> {
        self.entries.get(codec::size(region))
    }
}

impl Entry {
    /// A run of this region, if it ends inside it.
    fn run(&self, first: u64, count: u32) -> Option<PageRun> {
        let end = first.checked_add(u64::from(count))?;
        let region = self.region.id.value();
        (end <= self.pages).then_some(PageRun {
            region,
            first,
            count,
        })
    }
}

/// Refuses a region that is out of order, empty, not aligned, or that wraps.
fn check_region(index: usize, region: &Region) -> Result<(), LayoutError> {
    let found = region.id.value();
    let expected = codec::narrow(index);
    if found != expected {
        return Err(LayoutError::Order { expected, found });
    }
    let mask = PAGE_BYTES_U64.wrapping_sub(1);
    if region.bytes == 0 || (region.bytes | region.guest_address) & mask != 0 {
        return Err(LayoutError::Alignment { region: found });
    }
    match region.guest_address.checked_add(region.bytes) {
        Some(_) => Ok(()),
        None => Err(LayoutError::Wraps { region: found }),
    }
}

/// Refuses regions that share addresses. The table is ordered by number, so addresses are sorted apart.
fn check_overlap(entries: &[Entry]) -> Result<(), LayoutError> {
    let mut regions: Vec<Region> = entries.iter().map(|entry| entry.region).collect();
    regions.sort_unstable_by_key(|region| (region.guest_address, region.id));
    let mut end = 0_u64;
    for region in regions {
        if region.guest_address < end {
            return Err(LayoutError::Overlap {
                region: region.id.value(),
            });
        }
        end = region.guest_address.saturating_add(region.bytes);
    }
    Ok(())
}

/// A run of one or more pages that lies inside a region of the layout that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRun {
    region: u32,
    first: u64,
    count: u32,
}

impl PageRun {
    /// The run's region.
    #[must_use]
    pub const fn region(self) -> RegionId {
        RegionId::new(self.region)
    }

    /// The run's first page, counted from its region's start.
    #[must_use]
    pub const fn first(self) -> PageIndex {
        PageIndex::new(self.first)
    }

    /// The run's pages, at least 1.
    #[must_use]
    pub const fn count(self) -> u32 {
        self.count
    }

    /// The run's pages as a size in memory.
    #[must_use]
    pub fn pages(self) -> usize {
        codec::size(self.count)
    }

    /// The run's size in octets.
    #[must_use]
    pub fn bytes(self) -> u64 {
        u64::from(self.count).saturating_mul(PAGE_BYTES_U64)
    }

    /// Where the run begins, in octets from its region's start.
    #[must_use]
    pub const fn offset_bytes(self) -> u64 {
        self.first.saturating_mul(PAGE_BYTES_U64)
    }

    /// The run's pages, counted from its region's start.
    pub fn page_indices(self) -> impl Iterator<Item = PageIndex> {
        let end = self.first.saturating_add(u64::from(self.count));
        (self.first..end).map(PageIndex::new)
    }

    /// The first `pages` pages and the rest. The rest is `None` when the run has no more than `pages` pages; a
    /// `pages` of 0 counts as 1, because a run is never empty.
    #[must_use = "the rest names pages that still have to be sent"]
    pub fn split_at(self, pages: u32) -> (Self, Option<Self>) {
        let head = pages.max(1);
        let Some(rest) = self.count.checked_sub(head).filter(|rest| *rest > 0) else {
            return (self, None);
        };
        let first = self.first.saturating_add(u64::from(head));
        (
            Self {
                count: head,
                ..self
            },
            Some(Self {
                first,
                count: rest,
                ..self
            }),
        )
    }
}
