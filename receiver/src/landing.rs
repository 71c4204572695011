//! What a lane does with admitted pages: check them where they landed, keep the digest, remember what is damaged.
//!
//! The rule it keeps: a page counts as landed only if its bytes have the checksum that its frame said. One that does not is
//! damaged until it lands well; the source is told which (SPEC: BACK-1). The digest always describes what is really in memory.

use std::sync::atomic::{AtomicU64, Ordering};

use multifd_transport::GuestMemory;
use multifd_wire::digest::page_value;
use multifd_wire::frame::RawRun;
use multifd_wire::{Digest, Layout, Misbehaved, PAGE_BYTES_U64, PageIndex, PageRun, PageValues};
use zerocopy::byteorder::little_endian::U32;

use crate::bits::PageBits;

/// Guest memory at the destination and everything that is known about its content. Shared by all lanes.
pub(crate) struct Landing {
    layout: Layout,
    memory: GuestMemory,
    values: PageValues,
    digest: AtomicU64,
    /// Pages that may hold something else than zeros. What was prepared is zero ([`crate::prepared`]) and is best left untouched.
    touched: PageBits,
    damaged: PageBits,
    damaged_pages: AtomicU64,
}

/// Why guest memory can't be used.
#[derive(Debug)]
pub(crate) enum LandingError {
    /// It is not what the layout says.
    Differs(String),
    /// There is no room for the checksums and bits.
    NoRoom,
}

impl Landing {
    pub(crate) fn new(layout: Layout, memory: GuestMemory) -> Result<Self, LandingError> {
        check_memory(&layout, &memory).map_err(LandingError::Differs)?;
        let pages = layout.pages_total().value();
        let bits = || PageBits::new(pages).ok_or(LandingError::NoRoom);
        Ok(Self {
            values: PageValues::new(&layout).map_err(|_| LandingError::NoRoom)?,
            touched: bits()?,
            damaged: bits()?,
            damaged_pages: AtomicU64::new(0),
            digest: AtomicU64::new(0),
            layout,
            memory,
        })
    }

    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    pub(crate) fn pages_total(&self) -> u64 {
        self.layout.pages_total().value()
    }

    /// The digest over all pages as landed. Complete once all lanes have said that they reached the round's end.
    pub(crate) fn digest(&self) -> Digest {
        Digest::new(self.digest.load(Ordering::Acquire))
    }

    /// Pages whose newest arrival failed its checksum.
    pub(crate) fn damaged_pages(&self) -> u64 {
        self.damaged_pages.load(Ordering::Acquire)
    }

    /// The pages that are damaged, as runs of at most `pages_max` pages. Complete while no lane is at work.
    pub(crate) fn damaged_runs(&self, pages_max: u32) -> Vec<PageRun> {
        let mut runs: Vec<PageRun> = Vec::new();
        if self.damaged_pages() == 0 {
            return runs;
        }
        for region in self.layout.regions() {
            let Ok(first) = self.layout.run(region.id, PageIndex::new(0), 1) else {
                continue;
            };
            let start = self.layout.global_index(first).start;
            let end = start + region.bytes / PAGE_BYTES_U64;
            self.damaged.each(start..end, |index| {
                let page = index - start;
                let longer = runs.last().copied().filter(|last| {
                    last.region() == region.id
                        && last.first().value() + u64::from(last.count()) == page
                        && last.count() < pages_max
                });
                let (place, count) = longer.map_or((page, 1), |last| {
                    runs.pop();
                    (last.first().value(), last.count() + 1)
                });
                runs.extend(self.layout.run(region.id, PageIndex::new(place), count));
            });
        }
        runs
    }

    /// Admits a frame's runs against the layout of this session (SPEC: RUN-1).
    pub(crate) fn admit(&self, raw: &[RawRun], into: &mut Vec<PageRun>) -> Result<(), Misbehaved> {
        into.clear();
        raw.iter().try_for_each(|run| {
            into.push(self.layout.admit(run)?);
            Ok(())
        })
    }

    /// These pages are about to be written: whatever comes of it, they are no longer known to be zero.
    pub(crate) fn touch(&self, runs: &[PageRun]) {
        for run in runs {
            self.touched.set(self.layout.global_index(*run));
        }
    }

    /// The bytes of these runs are in memory. Checks each page against its checksum; the runs that failed are left in `bad`.
    pub(crate) fn landed(&self, runs: &[PageRun], checksums: &[U32], bad: &mut Vec<PageRun>) {
        let mut said = checksums.iter();
        let mut delta = Digest::EMPTY;
        for run in runs {
            let index = self.layout.global_index(*run);
            let bad_before = bad.len();
            let values = run.page_indices().map(|page| {
                let found = self.crc(*run, page);
                if said.next().is_none_or(|crc| crc.get() != found) {
                    note_bad(&self.layout, *run, page, bad);
                }
                page_value(found)
            });
            delta.merge(self.values.replace(*run, values));
            self.settle(index, bad.get(bad_before..).unwrap_or(&[]));
        }
        self.merge(delta);
    }

    /// The bytes of these runs came in part, or not at all: what is in memory now is nothing that the source had. Each page is
    /// damaged, and counts with its real value, so that the digest can't agree before it came again (SPEC: DIGEST-6).
    pub(crate) fn cut_off(&self, runs: &[PageRun]) {
        self.landed(runs, &[], &mut Vec::new());
    }

    /// These pages are all zero at the source. Memory that was never written is left alone.
    pub(crate) fn zeros(&self, run: PageRun) {
        let index = self.layout.global_index(run);
        let start = index.start;
        self.touched.clear(index.clone(), |page| {
            let offset = run.offset_bytes() + (page - start) * PAGE_BYTES_U64;
            if let Ok(span) = self
                .memory
                .span(run.region().value(), offset, PAGE_BYTES_U64)
            {
                span.fill_zero();
            }
        });
        self.merge(self.values.clear(run));
        self.settle(index, &[]);
    }

    /// Updates which pages of a range are damaged: those of `bad`, and no others.
    fn settle(&self, index: std::ops::Range<u64>, bad: &[PageRun]) {
        let mut healed = 0;
        self.damaged.clear(index, |_| healed += 1);
        let broken: u64 = bad
            .iter()
            .map(|run| self.damaged.set(self.layout.global_index(*run)))
            .sum();
        // Two steps would let a reader see a count below zero.
        self.damaged_pages
            .fetch_add(broken.wrapping_sub(healed), Ordering::AcqRel);
    }

    fn crc(&self, run: PageRun, page: PageIndex) -> u32 {
        let span = self.memory.span(
            run.region().value(),
            page.value() * PAGE_BYTES_U64,
            PAGE_BYTES_U64,
        );
        debug_assert!(
            span.is_ok(),
            "the run was admitted against the layout that memory was checked against"
        );
        span.map_or(0, |span| span.crc32())
    }

    fn merge(&self, delta: Digest) {
        self.digest.fetch_add(delta.value(), Ordering::AcqRel);
    }
}

fn note_bad(layout: &Layout, run: PageRun, page: PageIndex, bad: &mut Vec<PageRun>) {
    if let Ok(one) = layout.run(run.region(), page, 1) {
        bad.push(one);
    }
}

fn check_memory(layout: &Layout, memory: &GuestMemory) -> Result<(), String> {
    let (want, have) = (layout.regions().len(), memory.region_count());
    if want != have {
        return Err(format!("{have} regions instead of {want}"));
    }
    for (region, built) in layout.regions().zip(memory.layouts()) {
        if (region.guest_address, region.bytes) != (built.guest_address, built.bytes) {
            return Err(format!(
                "region {} is {} bytes at {:#x} instead of {} bytes at {:#x}",
                region.id, built.bytes, built.guest_address, region.bytes, region.guest_address
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use multifd_transport::memory::RegionLayout;
    use multifd_wire::digest::term;
    use multifd_wire::{Region, RegionId};

    use super::*;

    fn landing() -> Landing {
        let layout = Layout::new([Region {
            id: RegionId::new(0),
            guest_address: 0,
            bytes: 16 * 4096,
        }])
        .unwrap();
        let memory = GuestMemory::anonymous(&[RegionLayout {
            guest_address: 0,
            bytes: 16 * 4096,
        }])
        .unwrap();
        Landing::new(layout, memory).unwrap()
    }

    fn run(landing: &Landing, first: u64, count: u32) -> PageRun {
        landing
            .layout
            .run(RegionId::new(0), PageIndex::new(first), count)
            .unwrap()
    }

    fn land(landing: &Landing, first: u64, fill: &[u8], claim: &[u32]) -> Vec<PageRun> {
        let runs = [run(landing, first, u32::try_from(fill.len()).unwrap())];
        landing.touch(&runs);
        for (page, octet) in (first..).zip(fill) {
            landing
                .memory
                .span(0, page * 4096, 4096)
                .unwrap()
                .copy_from(&[*octet; 4096]);
        }
        let mut bad = Vec::new();
        landing.landed(
            &runs,
            &claim.iter().copied().map(U32::new).collect::<Vec<_>>(),
            &mut bad,
        );
        bad
    }

    fn crc(octet: u8) -> u32 {
        let memory = GuestMemory::anonymous(&[RegionLayout {
            guest_address: 0,
            bytes: 4096,
        }])
        .unwrap();
        memory.span(0, 0, 4096).unwrap().copy_from(&[octet; 4096]);
        memory.span(0, 0, 4096).unwrap().crc32()
    }

    #[test]
    fn a_page_with_another_checksum_is_named_and_stays_damaged_until_it_lands_well() {
        let l = landing();
        let bad = land(&l, 2, &[1, 2, 3], &[crc(1), crc(9), crc(3)]);
        assert_eq!(bad, [run(&l, 3, 1)]);
        assert_eq!(l.damaged_pages(), 1);
        assert_eq!(land(&l, 3, &[4], &[crc(5)]), [run(&l, 3, 1)]);
        assert_eq!(l.damaged_pages(), 1, "damaged twice is still one page");
        assert_eq!(l.damaged_runs(8), [run(&l, 3, 1)]);
        assert!(land(&l, 3, &[9], &[crc(9)]).is_empty());
        assert_eq!(l.damaged_pages(), 0);
    }

    #[test]
    fn damaged_pages_are_listed_in_runs_of_bounded_length() {
        let l = landing();
        land(&l, 0, &[1; 5], &[0; 5]);
        land(&l, 9, &[1, 1], &[0, crc(1)]);
        let runs = [run(&l, 0, 2), run(&l, 2, 2), run(&l, 4, 1), run(&l, 9, 1)];
        assert_eq!(l.damaged_runs(2), runs);
        l.zeros(run(&l, 0, 16));
        assert!(l.damaged_runs(2).is_empty());
    }

    #[test]
    fn a_page_that_came_in_part_is_damaged_and_counts_with_what_is_in_memory() {
        let l = landing();
        land(&l, 2, &[7], &[crc(7)]);
        let whole = l.digest();
        // The page that was there is overwritten in part, the next one, which was never written, not at all.
        let runs = [run(&l, 2, 2)];
        l.touch(&runs);
        let part = l.memory.span(0, 2 * 4096, 100).unwrap();
        part.copy_from(&[9; 100]);
        l.cut_off(&runs);
        assert_ne!(l.digest(), whole);
        assert_eq!(l.damaged_runs(8), runs);
        // Even if the page is what it was, and the source therefore has the same digest as before: it has to come again.
        land(&l, 2, &[7], &[crc(7)]);
        l.zeros(run(&l, 3, 1));
        assert_eq!((l.digest(), l.damaged_pages()), (whole, 0));
    }

    #[test]
    fn the_digest_describes_what_is_in_memory_not_what_was_claimed() {
        let l = landing();
        land(&l, 0, &[7], &[crc(8)]);
        assert_eq!(
            l.digest().value(),
            term(RegionId::new(0), PageIndex::new(0), page_value(crc(7)))
        );
    }

    // SPEC: ZEROS-3
    #[test]
    fn zeros_clear_written_memory_heal_damage_and_empty_the_digest() {
        let l = landing();
        land(&l, 0, &[7, 8], &[crc(7), crc(9)]);
        l.zeros(run(&l, 0, 16));
        assert!(l.memory.span(0, 0, 16 * 4096).unwrap().is_zero());
        assert_eq!((l.damaged_pages(), l.digest()), (0, Digest::EMPTY));
    }

    #[test]
    fn zeros_leave_memory_alone_that_was_never_written() {
        let l = landing();
        // Content that did not come through `touch`: if zeros wrote here, it would be gone.
        l.memory.span(0, 4096, 4096).unwrap().copy_from(&[5; 4096]);
        l.zeros(run(&l, 0, 16));
        assert!(!l.memory.span(0, 4096, 4096).unwrap().is_zero());
    }

    #[test]
    fn refuses_memory_that_is_not_what_the_layout_says() {
        let layout = Layout::new([Region {
            id: RegionId::new(0),
            guest_address: 0,
            bytes: 8192,
        }])
        .unwrap();
        for (address, bytes) in [(0, 4096), (4096, 8192)] {
            let memory = GuestMemory::anonymous(&[RegionLayout {
                guest_address: address,
                bytes,
            }])
            .unwrap();
            assert!(matches!(
                Landing::new(layout.clone(), memory),
                Err(LandingError::Differs(_))
            ));
        }
    }
}
