//! What a VMM that is built on rust-vmm writes: two ways, both behind vm-memory's `Bitmap`, which each of its accesses marks
//! after the access.
//!
//! * [`MarkerBitmap`] as the bitmap of a `GuestMemoryMmap<MarkerBitmap>` marks straight in the dirty set. Nothing is
//!   searched for at a collection, whatever the size of the guest, and nothing is marked without a migration.
//! * [`AtomicBitmaps`] reads vm-memory's own `AtomicBitmap`, for a VMM that has it already. The crate offers a bitmap's words
//!   only all at once and by copy, with a locked write for each word, clean or not (`get_and_reset`). So this source goes
//!   by bits: a look for each page, a locked write only for a dirty one, and no copy. That is a nanosecond or less a page.
//!
//! Writes through a pointer (`get_host_address`, `ptr_guard_mut`) are the VMM's to mark: `bitmap().mark_dirty(…)`, after them.

use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use ::vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use ::vm_memory::mmap::MmapRegion;
use ::vm_memory::{GuestMemoryBackend as _, GuestMemoryMmap};

use crate::source::Counters;
use crate::vmm_writes::VmmMarker;
use crate::{
    CollectPhase, Collected, Collection, DirtySet, Error, Figures, PAGE_BYTES, Run, Source,
    VmmWrites,
};

/// vm-memory's bitmap of one region as a marker of the dirty set.
#[derive(Debug, Default)]
pub struct MarkerBitmap {
    /// Who is told, and of which region. Nobody until [`MarkerBitmap::bind`].
    bound: OnceLock<(VmmMarker, u32)>,
}

impl MarkerBitmap {
    /// Has this bitmap mark pages of region `region` from now on. Only the first call counts.
    ///
    /// A write before it is a write before any migration, which round 0 covers; so it must come before a migration begins.
    pub fn bind(&self, marker: VmmMarker, region: u32) {
        let _ = self.bound.set((marker, region));
    }
}

/// Binds the bitmaps of all regions of `memory` to `source`; a region's index is its place by guest address.
pub fn bind_all(memory: &GuestMemoryMmap<MarkerBitmap>, source: &VmmWrites) {
    for (region, index) in memory.iter().zip(0..) {
        MmapRegion::bitmap(region).bind(source.marker(), index);
    }
}

impl<'a> WithBitmapSlice<'a> for MarkerBitmap {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for MarkerBitmap {
    fn mark_dirty(&self, offset: usize, bytes: usize) {
        if let Some((marker, region)) = self.bound.get() {
            marker.mark_bytes(*region, offset as u64, bytes as u64);
        }
    }

    /// Whether the page is in the dirty set now.
    fn dirty_at(&self, offset: usize) -> bool {
        self.bound
            .get()
            .is_some_and(|(marker, region)| marker.is_marked(*region, offset as u64 / PAGE_BYTES))
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for MarkerBitmap {
    fn with_len(_bytes: usize) -> Self {
        Self::default()
    }
}

/// Who owns the bitmaps.
pub trait Bitmaps: Send {
    /// The number of regions.
    fn region_count(&self) -> u32;

    /// The bitmap of a region: of 4096-byte pages, as many as the region has.
    fn bitmap(&self, region: u32) -> Option<&AtomicBitmap>;
}

impl Bitmaps for Vec<Arc<AtomicBitmap>> {
    fn region_count(&self) -> u32 {
        self.len() as u32
    }

    fn bitmap(&self, region: u32) -> Option<&AtomicBitmap> {
        self.get(region as usize).map(|bitmap| &**bitmap)
    }
}

impl Bitmaps for Arc<GuestMemoryMmap<AtomicBitmap>> {
    fn region_count(&self) -> u32 {
        self.num_regions() as u32
    }

    fn bitmap(&self, region: u32) -> Option<&AtomicBitmap> {
        self.iter()
            .nth(region as usize)
            .map(|region| MmapRegion::bitmap(region))
    }
}

/// vm-memory's own bitmaps as a source.
#[derive(Debug)]
pub struct AtomicBitmaps<B> {
    bitmaps: B,
    tracking: bool,
    counters: Counters,
}

impl<B: Bitmaps> AtomicBitmaps<B> {
    /// A source over these bitmaps. Nobody else may reset them while it tracks.
    pub fn new(bitmaps: B) -> Self {
        Self {
            bitmaps,
            tracking: false,
            counters: Counters::default(),
        }
    }

    fn each(&self) -> impl Iterator<Item = (u32, &AtomicBitmap)> {
        (0..self.bitmaps.region_count())
            .filter_map(|region| Some((region, self.bitmaps.bitmap(region)?)))
    }
}

/// Takes the bits out of a bitmap.
fn take(region: u32, bitmap: &AtomicBitmap) -> Collected {
    let mut collected = Collected::new();
    for page in 0..bitmap.len() {
        if bitmap.is_bit_set(page) {
            // The write came before its bit, so the page is read as it was written or later; a bit set after this is found
            // by the next collection.
            bitmap.reset_bit(page);
            collected.push_page(region, page as u64);
        }
    }
    collected
}

impl<B: Bitmaps + 'static> Source for AtomicBitmaps<B> {
    fn name(&self) -> &str {
        "vm-memory"
    }

    fn start(&mut self, set: &DirtySet) -> Result<(), Error> {
        for (region, bitmap) in self.each() {
            set.check(Run {
                region,
                first: 0,
                count: bitmap.len() as u64,
            })?;
            let pages = (bitmap.byte_size() as u64).div_ceil(PAGE_BYTES);
            if bitmap.len() as u64 != pages {
                return Err(Error::Misuse {
                    what: format!(
                        "the bitmap of region {region} has {} bits for {} bytes: it must have one for each {PAGE_BYTES} bytes",
                        bitmap.len(),
                        bitmap.byte_size()
                    ),
                });
            }
        }
        // What was written before is covered by round 0.
        self.each().for_each(|(_, bitmap)| bitmap.reset());
        self.tracking = true;
        Ok(())
    }

    fn collect(&mut self, set: &DirtySet, _phase: CollectPhase) -> Result<Collection, Error> {
        if !self.tracking {
            return Err(Error::Misuse {
                what: "vm-memory's bitmaps are collected only between start and stop".into(),
            });
        }
        let begun = Instant::now();
        let mut sum = Collection::default();
        for (region, bitmap) in self.each() {
            let collected = take(region, bitmap);
            if !collected.is_empty() {
                self.counters.resets.fetch_add(1, Ordering::Relaxed);
                sum.reported += collected.pages();
                sum.pages += set.merge(collected.rearmed_by_fetch());
            }
        }
        self.counters.harvested(begun, sum);
        Ok(sum)
    }

    fn stop(&mut self) -> Result<(), Error> {
        self.tracking = false;
        Ok(())
    }

    fn figures(&self) -> Figures {
        self.counters.figures()
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use ::vm_memory::{Bytes as _, GuestAddress};

    use super::*;

    const RANGES: [(GuestAddress, usize); 2] = [
        (GuestAddress(0), 100 << 12),
        (GuestAddress(1 << 32), 50 << 12),
    ];

    fn taken(set: &DirtySet) -> Vec<Run> {
        let mut round = set.take_round();
        std::iter::from_fn(|| round.next_run(64)).collect()
    }

    fn run(region: u32, first: u64, count: u64) -> Run {
        Run {
            region,
            first,
            count,
        }
    }

    #[test]
    fn accesses_of_vm_memory_reach_the_set_through_both() {
        let set = DirtySet::new(&[100, 50]);
        let marked = GuestMemoryMmap::<MarkerBitmap>::from_ranges(&RANGES).unwrap();
        let mut writes = VmmWrites::new();
        bind_all(&marked, &writes);
        writes.start(&set).unwrap();
        marked
            .write_slice(&[7; 4097], GuestAddress(5 << 12))
            .unwrap();
        marked
            .write_obj(1u64, GuestAddress((1 << 32) + (49 << 12)))
            .unwrap();
        assert!(set.is_dirty(1, 49));
        assert_eq!(taken(&set), [run(0, 5, 2), run(1, 49, 1)]);

        let memory = Arc::new(GuestMemoryMmap::<AtomicBitmap>::from_ranges(&RANGES).unwrap());
        let mut source = AtomicBitmaps::new(Arc::clone(&memory));
        memory.write_obj(1u64, GuestAddress(0)).unwrap();
        source.start(&set).unwrap();
        memory
            .write_slice(&[7; 4097], GuestAddress(5 << 12))
            .unwrap();
        memory
            .write_obj(1u64, GuestAddress((1 << 32) + (49 << 12)))
            .unwrap();
        let collection = source.collect(&set, CollectPhase::PreCopy).unwrap();
        assert_eq!((collection.pages, collection.reported), (3, 3));
        assert_eq!(taken(&set), [run(0, 5, 2), run(1, 49, 1)]);
    }

    #[test]
    fn a_bitmap_of_other_pages_or_other_memory_is_refused() {
        let start = |bytes: usize, page_bytes: usize| {
            let page_bytes = NonZeroUsize::new(page_bytes).unwrap();
            let bitmaps = vec![Arc::new(AtomicBitmap::new(bytes, page_bytes))];
            AtomicBitmaps::new(bitmaps)
                .start(&DirtySet::new(&[100]))
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            start(100 << 12, 8192),
            "the bitmap of region 0 has 50 bits for 409600 bytes: it must have one for each 4096 bytes"
        );
        assert_eq!(
            start(101 << 12, 4096),
            "101 pages from page 0 are not inside region 0"
        );
    }
}
