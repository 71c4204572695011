//! One bit per page of the guest, changed by any lane at any time, looked at a word at a time.
//!
//! Costs 32 KiB per GiB of guest, backed by memory only where a bit was ever set.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use zerocopy::FromZeros;

/// A bit for each page, by the layout's numbering over all regions. All clear when new.
pub(crate) struct PageBits {
    words: Box<[AtomicU64]>,
}

impl PageBits {
    /// Bits for this many pages; `None` when there is no memory for them.
    pub(crate) fn new(pages: u64) -> Option<Self> {
        let words = usize::try_from(pages.div_ceil(64)).ok()?;
        Some(Self {
            words: <[AtomicU64]>::new_box_zeroed_with_elems(words).ok()?,
        })
    }

    /// Sets the bits of a range of pages. Returns how many were clear.
    pub(crate) fn set(&self, pages: Range<u64>) -> u64 {
        let change = |word: &AtomicU64, mask: u64| mask & !word.fetch_or(mask, Relaxed);
        self.masks(pages)
            .map(|(word, _, mask)| u64::from(change(word, mask).count_ones()))
            .sum()
    }

    /// Clears the bits of a range of pages, and tells the page number of each that was set.
    pub(crate) fn clear(&self, pages: Range<u64>, mut was_set: impl FnMut(u64)) {
        for (word, first, mask) in self.masks(pages) {
            if word.load(Relaxed) & mask == 0 {
                continue;
            }
            let mut gone = word.fetch_and(!mask, Relaxed) & mask;
            while gone != 0 {
                was_set(first + u64::from(gone.trailing_zeros()));
                gone &= gone - 1;
            }
        }
    }

    /// Tells the page number of each bit of a range that is set.
    pub(crate) fn each(&self, pages: Range<u64>, mut is_set: impl FnMut(u64)) {
        for (word, first, mask) in self.masks(pages) {
            let mut bits = word.load(Relaxed) & mask;
            while bits != 0 {
                is_set(first + u64::from(bits.trailing_zeros()));
                bits &= bits - 1;
            }
        }
    }

    /// Each word that the range touches, with its first page and the mask of the range's pages in it.
    fn masks(&self, pages: Range<u64>) -> impl Iterator<Item = (&AtomicU64, u64, u64)> {
        let last = pages.end.div_ceil(64).max(pages.start / 64);
        (pages.start / 64..last).filter_map(move |index| {
            let first = index * 64;
            let low = pages.start.saturating_sub(first).min(63);
            let high = (pages.end - first).min(64);
            let mask = (u64::MAX >> (64 - (high - low))) << low;
            Some((self.words.get(usize::try_from(index).ok()?)?, first, mask))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn does_what_a_set_of_numbers_would(steps in proptest::collection::vec((any::<bool>(), 0u64..300, 1u64..200), 1..40)) {
            let bits = PageBits::new(500).unwrap();
            let mut model = BTreeSet::new();
            for (set, first, count) in steps {
                let range = first..first + count;
                let mut all = Vec::new();
                bits.each(0..500, |page| all.push(page));
                prop_assert_eq!(all, model.iter().copied().collect::<Vec<_>>());
                if set {
                    let fresh = range.clone().filter(|page| model.insert(*page)).count() as u64;
                    prop_assert_eq!(bits.set(range), fresh);
                } else {
                    let gone: Vec<u64> = range.clone().filter(|page| model.remove(page)).collect();
                    let mut seen = Vec::new();
                    bits.clear(range, |page| seen.push(page));
                    prop_assert_eq!(seen, gone);
                }
            }
        }
    }
}
