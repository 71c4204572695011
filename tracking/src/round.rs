//! A round: what the dirty set held at one moment, handed out as runs.
//!
//! The rule: every page that a round holds is either handed out once, or goes back to the set when the round is dropped.
//! A run is handed out only after each [`LateRearm`] source said that a later write to it will be reported; pages for
//! which that failed go back to the set at once.

use std::sync::Arc;

use crate::levels::WORD_BITS;
use crate::set::{DirtySet, LateRearm};
use crate::{Run, set};

/// One word of bits, and how many whole (all ones) words the span holds in all if its bits are all ones.
#[derive(Clone, Copy)]
pub(crate) struct Span {
    /// The word's index in the upper 40 bits, the number of words in the lower 24.
    place: u64,
    bits: u64,
}

impl Span {
    const COUNT_BITS: u32 = 24;
    const COUNT_MAX: u64 = (1 << Self::COUNT_BITS) - 1;
    /// Words that a span can name: 2^40 words are 2^46 pages, 2^58 bytes of guest memory.
    pub(crate) const WORDS_MAX: u64 = 1 << (64 - Self::COUNT_BITS);

    /// Adds a word behind the others, to the last span if both are whole, neighbours and of one region.
    pub(crate) fn push(spans: &mut Vec<Self>, word: u64, bits: u64, starts_region: bool) {
        if bits == u64::MAX
            && !starts_region
            && let Some(last) = spans.last_mut()
            && last.bits == u64::MAX
            && last.word() + last.count() == word
            && last.count() < Self::COUNT_MAX
        {
            last.place += 1;
            return;
        }
        spans.push(Self {
            place: word << Self::COUNT_BITS | 1,
            bits,
        });
    }

    fn word(self) -> u64 {
        self.place >> Self::COUNT_BITS
    }

    fn count(self) -> u64 {
        self.place & Self::COUNT_MAX
    }
}

/// What the set held when the round began, less what was handed out since.
///
/// Dropping it gives the rest back to the set.
#[must_use = "a round that is dropped gives its pages back to the set"]
pub struct Round {
    set: DirtySet,
    late: Arc<[Arc<dyn LateRearm>]>,
    spans: Arc<[Span]>,
    /// The next span to look at.
    next: usize,
    /// The word that is being handed out, what is left of it, and how many whole words of its span follow it.
    word: u64,
    bits: u64,
    full_after: u64,
    /// The region of `word`.
    region: usize,
    pages: u64,
    remaining: u64,
    held_back: u64,
}

impl Round {
    pub(crate) fn new(
        set: DirtySet,
        spans: Vec<Span>,
        pages: u64,
        late: Vec<Arc<dyn LateRearm>>,
    ) -> Self {
        Self {
            set,
            late: late.into(),
            spans: spans.into(),
            next: 0,
            word: 0,
            bits: 0,
            full_after: 0,
            region: 0,
            pages,
            remaining: pages,
            held_back: 0,
        }
    }

    /// Pages that the round began with.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Which pages the round began with, to be asked also when the round is over.
    pub fn taken(&self) -> TakenPages {
        TakenPages {
            set: self.set.clone(),
            spans: Arc::clone(&self.spans),
        }
    }

    /// Pages not yet handed out.
    pub fn remaining(&self) -> u64 {
        self.remaining
    }

    /// Pages that went back to the set instead of being handed out, because a source could not re-arm them. The
    /// source's next collection says why.
    pub fn held_back(&self) -> u64 {
        self.held_back
    }

    /// The next run in the order of regions and pages, of at most `pages_max` pages (0 counts as 1), or `None` at the
    /// round's end. Neighbouring pages come as one run as far as the bound allows.
    ///
    /// The contents of a run's pages may be read from now on: the next write to them will be reported.
    pub fn next_run(&mut self, pages_max: u64) -> Option<Run> {
        loop {
            let run = self.take_run(pages_max)?;
            if rearmed(&self.late, run) {
                return Some(run);
            }
            self.hold_back(run);
        }
    }

    /// Takes runs of `pages_max` pages in all, not yet re-armed; none at the round's end.
    pub fn take(&mut self, pages_max: u64) -> Unarmed {
        let mut wanted = pages_max;
        let mut runs = Vec::new();
        while wanted > 0
            && let Some(run) = self.take_run(wanted)
        {
            wanted -= run.count;
            runs.push(run);
        }
        // They are handed out from the end.
        runs.reverse();
        Unarmed {
            set: self.set.clone(),
            late: Arc::clone(&self.late),
            runs,
        }
    }

    /// Gives the pages that `keep` holds back to the set, and lets the others go without anybody reading them: they are known to
    /// hold nothing. Whoever knows it finds out again afterwards, since only from now on a later write to them will be
    /// reported by each late source. Pages for which that failed go back to the set.
    pub fn keep_only(mut self, keep: &DirtySet) {
        while let Some(run) = self.take_run(u64::MAX) {
            let mut first = run.first;
            let end = run.first + run.count;
            while first < end {
                let kept = keep.is_dirty(run.region, first);
                let same = (first..end)
                    .take_while(|page| keep.is_dirty(run.region, *page) == kept)
                    .count() as u64;
                let part = Run {
                    region: run.region,
                    first,
                    count: same,
                };
                if kept || !rearmed(&self.late, part) {
                    self.set.give_back(part);
                }
                first += same;
            }
        }
    }

    fn hold_back(&mut self, run: Run) {
        self.set.give_back(run);
        self.held_back += run.count;
    }

    /// The next run, not yet re-armed.
    fn take_run(&mut self, pages_max: u64) -> Option<Run> {
        let pages_max = pages_max.max(1);
        if self.bits == 0 && !self.next_word() {
            return None;
        }
        let place = self.place();
        let shift = u64::from(self.bits.trailing_zeros());
        let first = (self.word - place.first_word) * WORD_BITS + shift;
        let mut count = self.take_bits(pages_max);
        // A run goes on into the next word if it used this one up to its last bit.
        while count < pages_max
            && self.bits == 0
            && (first + count).is_multiple_of(WORD_BITS)
            && self.continues(place)
        {
            let words = self.full_after.min((pages_max - count) / WORD_BITS);
            if words > 0 {
                self.word += words;
                self.full_after -= words;
                count += words * WORD_BITS;
            } else {
                self.next_word();
                count += self.take_bits(pages_max - count);
            }
        }
        self.remaining -= count;
        Some(Run {
            region: self.region as u32,
            first,
            count,
        })
    }

    /// The region of the current word.
    fn place(&mut self) -> set::Region {
        let regions = self.set.regions();
        while self.word >= regions[self.region].end_word() {
            self.region += 1;
        }
        regions[self.region]
    }

    /// Takes the lowest group of ones out of the current word, at most `pages_max` of them.
    fn take_bits(&mut self, pages_max: u64) -> u64 {
        let shift = self.bits.trailing_zeros();
        let ones = u64::from((self.bits >> shift).trailing_ones());
        let count = ones.min(pages_max);
        let mask = u64::MAX >> (WORD_BITS - count);
        self.bits &= !(mask << shift);
        count
    }

    /// Goes on to the next word that has bits. False at the end.
    fn next_word(&mut self) -> bool {
        if self.full_after > 0 {
            self.full_after -= 1;
            self.word += 1;
            self.bits = u64::MAX;
            return true;
        }
        let Some(&span) = self.spans.get(self.next) else {
            return false;
        };
        self.next += 1;
        (self.word, self.bits, self.full_after) = (span.word(), span.bits, span.count() - 1);
        true
    }

    /// Whether the page after the current word's last one is in the round too, and in the same region.
    fn continues(&self, place: set::Region) -> bool {
        self.full_after > 0
            || self.spans.get(self.next).is_some_and(|span| {
                span.word() == self.word + 1 && span.word() < place.end_word() && span.bits & 1 == 1
            })
    }
}

impl Drop for Round {
    fn drop(&mut self) {
        if self.bits != 0 || self.full_after != 0 {
            self.set
                .give_back_words(self.word, self.bits, self.full_after);
        }
        for span in self.spans.iter().skip(self.next) {
            self.set
                .give_back_words(span.word(), span.bits, span.count() - 1);
        }
    }
}

/// The pages that a round began with: 16 bytes per word of 64 pages, less where whole words lie side by side.
#[derive(Clone)]
pub struct TakenPages {
    set: DirtySet,
    spans: Arc<[Span]>,
}

impl TakenPages {
    /// Whether the page was among them.
    ///
    /// # Panics
    /// If there is no such region.
    pub fn contains(&self, region: u32, page: u64) -> bool {
        let word = self.set.regions()[region as usize].first_word + page / WORD_BITS;
        let behind = |span: &Span| span.word() + span.count() <= word;
        let next = self.spans.get(self.spans.partition_point(behind));
        next.is_some_and(|span| span.word() <= word && span.bits >> (page % WORD_BITS) & 1 == 1)
    }
}

impl std::fmt::Debug for TakenPages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TakenPages")
            .field("spans", &self.spans.len())
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Round {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Round")
            .field("pages", &self.pages)
            .field("remaining", &self.remaining)
            .field("held_back", &self.held_back)
            .finish_non_exhaustive()
    }
}

/// Runs that left a round and are not watched yet. Dropping it gives them back to the set.
///
/// It lets several threads share a round behind a lock, and make the kernel calls of re-arming outside of it.
#[must_use = "what is dropped goes back to the set"]
pub struct Unarmed {
    set: DirtySet,
    late: Arc<[Arc<dyn LateRearm>]>,
    runs: Vec<Run>,
}

impl Unarmed {
    /// Whether there are none: the round has ended.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Has every late source watch the runs, and adds them to `into`: their pages may be read from now on. Runs for which that
    /// failed go back to the set; returns how many pages that is. The source's next collection says why.
    pub fn rearm(mut self, into: &mut Vec<Run>) -> u64 {
        let mut held_back = 0;
        while let Some(run) = self.runs.pop() {
            if rearmed(&self.late, run) {
                into.push(run);
            } else {
                self.set.give_back(run);
                held_back += run.count;
            }
        }
        held_back
    }
}

impl Drop for Unarmed {
    fn drop(&mut self) {
        for run in self.runs.drain(..) {
            self.set.give_back(run);
        }
    }
}

impl std::fmt::Debug for Unarmed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Unarmed").field(&self.runs).finish()
    }
}

fn rearmed(late: &[Arc<dyn LateRearm>], run: Run) -> bool {
    late.iter().all(|source| source.rearm(run).is_ok())
}
