//! The per-page values behind the running digest: what each page's newest version, sent or landed, was.
//!
//! Both sides keep one. Replacing a page's value gives the change of the digest, which a lane adds up privately and merges
//! once per frame, so that no lock is taken per page. Inside a round a page belongs to one lane (SPEC: ROUND-2), so the
//! load and the store of one page's value need not be one step.
//!
//! Costs 4 octets a page (1 MiB per GiB of guest), allocated from the layout that *this* side admitted, never from a
//! number that came with a frame, and backed by memory only where a page was ever not zero.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use zerocopy::FromZeros;

use crate::digest::Digest;
use crate::layout::{Layout, PageRun};

/// One value per page; all zero (every page a page of zeros) when new.
pub struct PageValues {
    layout: Layout,
    values: Box<[AtomicU32]>,
}

/// The values did not fit this process's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no memory for the checksums of {pages} pages")]
pub struct ValuesError {
    /// Pages of the layout.
    pages: u64,
}

impl PageValues {
    /// Values for a guest whose memory is all zero.
    ///
    /// # Errors
    /// [`ValuesError`] when 4 octets a page can't be had.
    pub fn new(layout: &Layout) -> Result<Self, ValuesError> {
        let pages = layout.pages_total().value();
        let error = ValuesError { pages };
        let count = usize::try_from(pages).map_err(|_| error)?;
        let values = <[AtomicU32]>::new_box_zeroed_with_elems(count).map_err(|_| error)?;
        Ok(Self {
            layout: layout.clone(),
            values,
        })
    }

    /// Replaces the values of a run's pages, in order, by `new` ([`page_value`](crate::digest::page_value) of their
    /// checksums), and returns the change of the digest. Values that `new` has too few of are taken as zero.
    // SPEC: DIGEST-3
    #[must_use = "the digest is only right if the change is merged into it"]
    pub fn replace(&self, run: PageRun, new: impl IntoIterator<Item = u32>) -> Digest {
        let mut delta = Digest::EMPTY;
        let mut new = new.into_iter();
        for (slot, page) in self.slots(run).iter().zip(run.page_indices()) {
            let value = new.next().unwrap_or(0);
            let old = slot.load(Relaxed);
            if old != value {
                slot.store(value, Relaxed);
                delta.replace(run.region(), page, old, value);
            }
        }
        delta
    }

    /// The run's pages are now pages of zeros.
    #[must_use = "the digest is only right if the change is merged into it"]
    pub fn clear(&self, run: PageRun) -> Digest {
        self.replace(run, [])
    }

    /// The value of the first page of a run.
    #[must_use]
    pub fn first_of(&self, run: PageRun) -> u32 {
        self.slots(run).first().map_or(0, |slot| slot.load(Relaxed))
    }

    fn slots(&self, run: PageRun) -> &[AtomicU32] {
        let range = self.layout.global_index(run);
        let index = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
        self.values
            .get(index(range.start)..index(range.end))
            .unwrap_or(&[])
    }
}

impl std::fmt::Debug for PageValues {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageValues")
            .field("pages", &self.values.len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::term;
    use crate::id::{PageIndex, RegionId};
    use crate::layout::Region;

    fn layout() -> Layout {
        let region = |id, guest_address, bytes| Region {
            id: RegionId::new(id),
            guest_address,
            bytes,
        };
        Layout::new([region(0, 0, 64 << 10), region(1, 1 << 32, 64 << 10)]).unwrap()
    }

    fn run(region: u32, first: u64, count: u32) -> PageRun {
        layout()
            .run(RegionId::new(region), PageIndex::new(first), count)
            .unwrap()
    }

    #[test]
    fn the_digest_is_the_sum_of_the_terms_of_the_newest_values() {
        let values = PageValues::new(&layout()).unwrap();
        let mut digest = Digest::EMPTY;
        digest.merge(values.replace(run(0, 3, 2), [7, 8]));
        digest.merge(values.replace(run(1, 0, 1), [9]));
        digest.merge(values.replace(run(0, 3, 1), [70]));
        let want = term(RegionId::new(0), PageIndex::new(3), 70)
            .wrapping_add(term(RegionId::new(0), PageIndex::new(4), 8))
            .wrapping_add(term(RegionId::new(1), PageIndex::new(0), 9));
        assert_eq!(digest.value(), want);
    }

    #[test]
    fn the_digest_does_not_depend_on_the_order_and_returns_to_empty() {
        let (a, b) = (
            PageValues::new(&layout()).unwrap(),
            PageValues::new(&layout()).unwrap(),
        );
        let (mut x, mut y) = (Digest::EMPTY, Digest::EMPTY);
        for first in 0..16 {
            x.merge(a.replace(run(0, first, 1), [first as u32 + 1]));
            y.merge(b.replace(run(0, 15 - first, 1), [16 - first as u32]));
        }
        assert_eq!(x, y);
        assert_ne!(x, Digest::EMPTY);
        x.merge(a.clear(run(0, 0, 16)));
        assert_eq!(x, Digest::EMPTY);
    }
}
