//! Which guest pages lie behind which I/O addresses, and how a bitmap over I/O addresses becomes pages.
//!
//! ```text
//!   iova:    |--- range 0 ---|--- range 1 ---|       gap        |------ range 2 ------|
//!   pages:     region 0, 0..   region 1, 512..                    region 0, 4096..
//! ```
//!
//! The rule that this file keeps: a bit that covers any part of a page marks that page, and a bit over a gap marks nothing.

use crate::levels::WORD_BITS;
use crate::{Collected, Collection, DirtySet, Error, PAGE_BYTES, Run};

/// A piece of I/O address space and the guest pages behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DmaRange {
    /// The I/O address of the first page's first byte; a multiple of 4096.
    pub iova: u64,
    /// The pages, in the order of their I/O addresses.
    pub run: Run,
}

impl DmaRange {
    /// Its length in bytes.
    pub fn bytes(&self) -> u64 {
        self.run.count * PAGE_BYTES
    }

    /// The address after its last byte.
    pub fn end(&self) -> u64 {
        self.iova + self.bytes()
    }
}

/// What a device can reach: ranges in the order of their I/O addresses, none over another.
///
/// Two ranges may show the same pages. For a type 1 container each range is one mapping, as it was made with
/// `VFIO_IOMMU_MAP_DMA`: the kernel refuses to report a part of one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DmaMap {
    ranges: Vec<DmaRange>,
}

/// A piece of I/O address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IovaSpan {
    pub(crate) iova: u64,
    pub(crate) bytes: u64,
}

impl IovaSpan {
    pub(crate) fn end(self) -> u64 {
        self.iova + self.bytes
    }
}

/// A bitmap as a kernel filled it: bit `i` stands for `page_bytes` bytes from `iova + i * page_bytes`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bitmap<'a> {
    pub(crate) iova: u64,
    pub(crate) page_bytes: u64,
    /// Bits that count; what lies behind them is padding.
    pub(crate) bits: u64,
    pub(crate) words: &'a [u64],
}

/// The most bytes from one I/O address to another: no range reaches beyond, so sums do not overflow, also when they are
/// rounded up to any page size below it.
const IOVA_END_MAX: u64 = 1 << 63;

/// Collected words that are merged into the set at a time, so that a bitmap over a TiB needs no list of all its words.
const MERGE_WORDS: usize = 1 << 16;

impl DmaMap {
    /// Nothing.
    pub(crate) const EMPTY: Self = Self { ranges: Vec::new() };

    /// The ranges, in any order.
    ///
    /// # Errors
    /// [`Error::Misuse`] if a range is empty, is not aligned to 4096 bytes, ends above 2^63, or lies over another.
    pub fn new(mut ranges: Vec<DmaRange>) -> Result<Self, Error> {
        let misuse = |what: String| Err(Error::Misuse { what });
        ranges.sort_by_key(|range| range.iova);
        for range in &ranges {
            let end = range
                .run
                .count
                .checked_mul(PAGE_BYTES)
                .and_then(|bytes| bytes.checked_add(range.iova));
            if range.run.count == 0
                || !range.iova.is_multiple_of(PAGE_BYTES)
                || end.is_none_or(|end| end > IOVA_END_MAX)
            {
                return misuse(format!(
                    "{} pages at I/O address {:#x}: a range has at least one page, is aligned to 4096 octets and ends \
                     below 2^63",
                    range.run.count, range.iova
                ));
            }
        }
        if let Some(pair) = ranges.windows(2).find(|pair| pair[0].end() > pair[1].iova) {
            return misuse(format!(
                "the ranges at I/O addresses {:#x} and {:#x} lie over each other",
                pair[0].iova, pair[1].iova
            ));
        }
        Ok(Self { ranges })
    }

    /// A guest without an IOMMU of its own: I/O addresses are guest addresses. `regions` are, in the order of their
    /// indices, each region's guest address and pages.
    ///
    /// # Errors
    /// As [`DmaMap::new`].
    pub fn identity(regions: impl IntoIterator<Item = (u64, u64)>) -> Result<Self, Error> {
        let ranges = (0..)
            .zip(regions)
            .map(|(region, (iova, count))| DmaRange {
                iova,
                run: Run {
                    region,
                    first: 0,
                    count,
                },
            })
            .collect();
        Self::new(ranges)
    }

    /// The ranges in the order of their I/O addresses.
    pub fn ranges(&self) -> &[DmaRange] {
        &self.ranges
    }

    /// Bytes that can be reached.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(DmaRange::bytes).sum()
    }

    /// Refuses a map whose pages are not the set's.
    pub(crate) fn check(&self, set: &DirtySet) -> Result<(), Error> {
        self.ranges
            .iter()
            .try_for_each(|range| set.check(range.run).map(|_| ()))
    }

    /// Marks every page of the map.
    pub(crate) fn mark(&self, set: &DirtySet) -> Collection {
        mark_runs(set, self.ranges.iter().map(|range| range.run))
    }

    /// The map's addresses, rounded out to a multiple of `unit` (a power of two); what touches is one span.
    pub(crate) fn spans(&self, unit: u64) -> Vec<IovaSpan> {
        let mut spans: Vec<IovaSpan> = Vec::new();
        for range in &self.ranges {
            let iova = range.iova & !(unit - 1);
            let end = range.end().next_multiple_of(unit);
            match spans.last_mut() {
                Some(last) if last.end() >= iova => last.bytes = end.max(last.end()) - last.iova,
                _ => spans.push(IovaSpan {
                    iova,
                    bytes: end - iova,
                }),
            }
        }
        spans
    }

    /// The map's addresses in pieces of whole ranges: neighbours are joined up to about `bytes_max`, and no range is ever split.
    ///
    /// A kernel may hold one dirty bit for a big piece of a mapping. Asked for a part of it, it clears the bit and tells
    /// of that part only.
    pub(crate) fn whole_spans(&self, bytes_max: u64) -> Vec<IovaSpan> {
        let mut spans: Vec<IovaSpan> = Vec::new();
        for range in &self.ranges {
            match spans.last_mut() {
                Some(last)
                    if last.end() == range.iova && last.bytes + range.bytes() <= bytes_max =>
                {
                    last.bytes += range.bytes();
                }
                _ => spans.push(IovaSpan {
                    iova: range.iova,
                    bytes: range.bytes(),
                }),
            }
        }
        spans
    }

    /// Takes out the ranges that lie inside `gone`: nobody can reach them any more.
    pub(crate) fn remove(&mut self, gone: &DmaRange) {
        self.ranges
            .retain(|range| range.iova < gone.iova || range.end() > gone.end());
    }

    /// Merges into the set the pages that a bitmap names. The kernel must report any later write to them.
    pub(crate) fn merge(&self, bitmap: &Bitmap<'_>, set: &DirtySet) -> Collection {
        let mut sum = Collection::default();
        let mut collected = Collected::new();
        let mut flush = |collected: &mut Collected| {
            let full = std::mem::take(collected);
            sum.reported += full.pages();
            sum.pages += set.merge(full.rearmed_by_fetch());
        };
        let end = bitmap.iova + bitmap.bits * bitmap.page_bytes;
        let first = self
            .ranges
            .partition_point(|range| range.end() <= bitmap.iova);
        for range in self.ranges[first..]
            .iter()
            .take_while(|range| range.iova < end)
        {
            if bitmap.page_bytes == PAGE_BYTES {
                push_pages(range, bitmap, end, &mut collected, &mut flush);
            } else {
                push_units(range, bitmap, end, &mut collected);
            }
            flush(&mut collected);
        }
        sum
    }
}

/// Marks runs as a fall-back does: each page counts as reported.
pub(crate) fn mark_runs(set: &DirtySet, runs: impl IntoIterator<Item = Run>) -> Collection {
    let mut sum = Collection::default();
    for run in runs {
        sum.reported += run.count;
        sum.pages += set.mark(run);
    }
    sum
}

/// Joins neighbouring spans over the smallest gaps until there are at most `count_max` (at least one).
pub(crate) fn coalesce(spans: &[IovaSpan], count_max: usize) -> Vec<IovaSpan> {
    let surplus = spans.len().saturating_sub(count_max.max(1));
    let mut gaps: Vec<(u64, usize)> = spans
        .windows(2)
        .map(|pair| pair[1].iova - pair[0].end())
        .zip(1..)
        .collect();
    gaps.sort_unstable();
    let mut joins = vec![false; spans.len()];
    for &(_, right) in gaps.iter().take(surplus) {
        joins[right] = true;
    }
    let mut joined: Vec<IovaSpan> = Vec::with_capacity(spans.len() - surplus);
    for (span, join) in spans.iter().zip(joins) {
        match joined.last_mut() {
            Some(last) if join => last.bytes = span.end() - last.iova,
            _ => joined.push(*span),
        }
    }
    joined
}

/// Bits of one page each: up to 64 at a time, aligned to the region's words.
fn push_pages(
    range: &DmaRange,
    bitmap: &Bitmap<'_>,
    end: u64,
    collected: &mut Collected,
    flush: &mut dyn FnMut(&mut Collected),
) {
    let (from, to) = (range.iova.max(bitmap.iova), range.end().min(end));
    let mut page = range.run.first + (from - range.iova) / PAGE_BYTES;
    let mut bit = (from - bitmap.iova) / PAGE_BYTES;
    let mut left = (to - from) / PAGE_BYTES;
    while left > 0 {
        let shift = page % WORD_BITS;
        let count = left.min(WORD_BITS - shift);
        let bits = extract(bitmap.words, bit, count);
        if bits != 0 {
            collected.push_bits(range.run.region, page / WORD_BITS, bits << shift);
            if collected.words().len() >= MERGE_WORDS {
                flush(collected);
            }
        }
        (page, bit, left) = (page + count, bit + count, left - count);
    }
}

/// Bits of several pages each: whatever part of one lies in the range is marked.
fn push_units(range: &DmaRange, bitmap: &Bitmap<'_>, end: u64, collected: &mut Collected) {
    let unit = bitmap.page_bytes;
    let (from, to) = (range.iova.max(bitmap.iova), range.end().min(end));
    let low = (from - bitmap.iova) / unit;
    let high = (to - bitmap.iova).div_ceil(unit);
    for bit in low..high {
        if extract(bitmap.words, bit, 1) == 0 {
            continue;
        }
        let at = bitmap.iova + bit * unit;
        let (first, last) = (at.max(from), (at + unit).min(to));
        collected.push_run(Run {
            region: range.run.region,
            first: range.run.first + (first - range.iova) / PAGE_BYTES,
            count: (last - first) / PAGE_BYTES,
        });
    }
}

/// `count` (1 to 64) bits from bit `at`; what the words do not hold is 0.
fn extract(words: &[u64], at: u64, count: u64) -> u64 {
    let (word, shift) = ((at / WORD_BITS) as usize, at % WORD_BITS);
    let low = words.get(word).copied().unwrap_or(0) >> shift;
    let high = if shift == 0 {
        0
    } else {
        words.get(word + 1).copied().unwrap_or(0) << (WORD_BITS - shift)
    };
    (low | high) & (u64::MAX >> (WORD_BITS - count))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(iova: u64, region: u32, first: u64, count: u64) -> DmaRange {
        DmaRange {
            iova,
            run: Run {
                region,
                first,
                count,
            },
        }
    }

    fn refusal(ranges: Vec<DmaRange>) -> String {
        DmaMap::new(ranges).unwrap_err().to_string()
    }

    #[test]
    fn refuses_ranges_that_are_empty_unaligned_too_high_or_over_each_other() {
        for bad in [
            range(0, 0, 0, 0),
            range(100, 0, 0, 1),
            range(1 << 63, 0, 0, 1),
            range(0, 0, 0, 1 << 52),
            range((1 << 63) - 4096, 0, 0, 2),
        ] {
            assert!(
                refusal(vec![bad]).contains("a range has at least one page"),
                "{bad:?}"
            );
        }
        assert!(DmaMap::new(vec![range((1 << 63) - 4096, 0, 0, 1)]).is_ok());
        assert_eq!(
            refusal(vec![range(8192, 0, 0, 2), range(0, 1, 0, 3)]),
            "the ranges at I/O addresses 0x0 and 0x2000 lie over each other"
        );
    }

    #[test]
    fn spans_are_rounded_out_and_joined_where_they_touch() {
        let map = DmaMap::new(vec![
            range(0x1000, 0, 0, 1),
            range(0x2000, 1, 0, 2),
            range(0x11000, 0, 9, 1),
            range(0x40000, 0, 20, 1),
        ])
        .unwrap();
        let pairs = |unit| -> Vec<(u64, u64)> {
            map.spans(unit)
                .iter()
                .map(|span| (span.iova, span.bytes))
                .collect()
        };
        assert_eq!(
            pairs(4096),
            [(0x1000, 0x3000), (0x11000, 0x1000), (0x40000, 0x1000)]
        );
        assert_eq!(pairs(0x10000), [(0, 0x20000), (0x40000, 0x10000)]);
        assert_eq!(pairs(1 << 30), [(0, 1 << 30)]);
    }

    #[test]
    fn coalescing_joins_over_the_smallest_gaps_first() {
        let spans: Vec<IovaSpan> = [(0, 1), (3, 1), (5, 1), (100, 1)]
            .map(|(iova, bytes)| IovaSpan { iova, bytes })
            .to_vec();
        let pairs = |count| -> Vec<(u64, u64)> {
            coalesce(&spans, count)
                .iter()
                .map(|span| (span.iova, span.bytes))
                .collect()
        };
        assert_eq!(pairs(9).len(), 4);
        assert_eq!(pairs(4).len(), 4);
        assert_eq!(pairs(3), [(0, 1), (3, 3), (100, 1)]);
        assert_eq!(pairs(2), [(0, 6), (100, 1)]);
        assert_eq!(pairs(1), [(0, 101)]);
        assert_eq!(pairs(0), [(0, 101)]);
    }

    proptest! {
        /// Ranges of pages at random distances, a bitmap of random bits at a random place and unit: the set holds exactly
        /// the pages that a bit covers in part.
        #[test]
        fn a_bitmap_marks_exactly_the_pages_under_its_bits(
            gaps in prop::collection::vec((0u64..200, 1u64..300, 0u64..70), 1..6),
            start in 0u64..300,
            unit_log in 0u32..5,
            words in prop::collection::vec(any::<u64>(), 1..12),
            cut in 0u64..64,
        ) {
            let mut ranges = Vec::new();
            let (mut iova, mut pages) = (0, 0);
            for (gap, count, skip) in gaps {
                iova += gap * PAGE_BYTES;
                ranges.push(range(iova, 1, pages + skip, count));
                iova += count * PAGE_BYTES;
                pages += skip + count;
            }
            let map = DmaMap::new(ranges.clone()).unwrap();
            let set = DirtySet::new(&[5, pages]);
            let page_bytes = PAGE_BYTES << unit_log;
            let base = start * page_bytes;
            let bits = words.len() as u64 * 64 - cut;
            let bitmap = Bitmap { iova: base, page_bytes, bits, words: &words };
            let collection = map.merge(&bitmap, &set);
            let mut want = vec![false; pages as usize];
            for range in &ranges {
                for page in 0..range.run.count {
                    let at = range.iova + page * PAGE_BYTES;
                    let bit = at.checked_sub(base).map(|offset| offset / page_bytes);
                    if let Some(bit) = bit.filter(|bit| *bit < bits) {
                        want[(range.run.first + page) as usize] =
                            words[(bit / 64) as usize] >> (bit % 64) & 1 == 1;
                    }
                }
            }
            let mut have = vec![false; pages as usize];
            let mut round = set.take_round();
            while let Some(run) = round.next_run(u64::MAX) {
                prop_assert_eq!(run.region, 1);
                for page in run.first..run.first + run.count {
                    have[page as usize] = true;
                }
            }
            prop_assert_eq!(&have, &want);
            let count = want.iter().filter(|dirty| **dirty).count() as u64;
            prop_assert_eq!(collection.pages, count);
        }
    }
}
