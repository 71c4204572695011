//! A round: what the dirty set held at one moment, handed out as runs.
//!
//! The rule: every page that a round holds is either handed out once, or goes back to the set when the round is dropped.
//! A run is handed out only after each [`LateRearm`] source said that a later write to it will be reported; pages for
//! which that failed go back to the set at once.

use std::sync::{Arc, Mutex, PoisonError};

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
    /// Words that a span can name: 2^40 words are 2^46 pages, 2^58 octets of guest memory.
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
    late: Vec<Arc<dyn LateRearm>>,
    spans: Vec<Span>,
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
            late,
            spans,
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
        for span in &self.spans[self.next..] {
            self.set
                .give_back_words(span.word(), span.bits, span.count() - 1);
        }
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

/// A round from which several threads pull runs.
#[derive(Debug)]
#[must_use = "a round that is dropped gives its pages back to the set"]
pub struct SharedRound {
    round: Mutex<Round>,
}

impl SharedRound {
    /// Shares `round`.
    pub fn new(round: Round) -> Self {
        Self {
            round: Mutex::new(round),
        }
    }

    /// As [`Round::next_run`]. The re-arming of a late source happens outside the lock, so that kernel calls of several
    /// threads do not wait for each other here.
    pub fn next_run(&self, pages_max: u64) -> Option<Run> {
        loop {
            let (run, late) = {
                let mut round = self.locked();
                let run = round.take_run(pages_max)?;
                if round.late.is_empty() {
                    return Some(run);
                }
                (run, round.late.clone())
            };
            if rearmed(&late, run) {
                return Some(run);
            }
            self.locked().hold_back(run);
        }
    }

    /// As [`Round::remaining`].
    pub fn remaining(&self) -> u64 {
        self.locked().remaining
    }

    /// The round itself, with what is left of it.
    pub fn into_inner(self) -> Round {
        self.round
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, Round> {
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn rearmed(late: &[Arc<dyn LateRearm>], run: Run) -> bool {
    late.iter().all(|source| source.rearm(run).is_ok())
}
