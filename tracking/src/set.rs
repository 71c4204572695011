//! The dirty set: the pages whose newest content is not yet proven to be at the destination.
//!
//! It is the one truth of a migration: a page leaves it when a round takes it, and comes back whenever anything goes
//! wrong before the receiver said that it landed. One bit per page, with summary levels above, so that the cost of taking
//! and of iterating follows what is dirty and not how much memory the guest has. Any thread may mark at any time
//! without waiting for any other.
//!
//! A set over 1 TiB is 32 MiB of bits. They come as zeroed memory that the kernel makes real at the first mark, so an
//! untouched set costs address space only.
//!
//! It must never drop a page by itself: only [`DirtySet::take_round`] takes pages out, and what a [`Round`] does not
//! hand out comes back.

use std::io;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use zerocopy::FromZeros;

use crate::collected::{Bits, Collected, Rearmed};
use crate::kernel::HugeWords;
use crate::levels::{Levels, WORD_BITS};
use crate::round::{Round, Span};
use crate::{Error, Run};

/// A source that re-arms the kernel not when it collects, but just before pages are read.
///
/// KVM's manually protected log gains from it: a write between collection and sending is then part of what is sent
/// instead of a page that must be sent again. The proof stays the same: a [`Round`] hands a run out only after
/// every attached source said that a later write to it will be reported.
pub trait LateRearm: Send + Sync {
    /// Re-arms what `run` covers, as far as this source tracks it and has not re-armed it since it was collected.
    ///
    /// # Errors
    /// What the kernel answered. The run is then not handed out; its pages go back to the set.
    fn rearm(&self, run: Run) -> io::Result<()>;
}

/// What a set counted since it was made. All are pages, except `rounds`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetFigures {
    /// Pages that went from clean to dirty by any kind of marking but giving back.
    pub marked: u64,
    /// Pages that went from clean to dirty because they were given back.
    pub given_back: u64,
    /// Pages that rounds took.
    pub taken: u64,
    /// Rounds taken.
    pub rounds: u64,
}

/// One bit per page of every region. Cloning gives another handle to the same set.
#[derive(Clone)]
pub struct DirtySet {
    shared: Arc<Shared>,
}

struct Shared {
    regions: Box<[Region]>,
    levels: Levels<Words>,
    dirty: AtomicU64,
    marked: AtomicU64,
    given_back: AtomicU64,
    taken: AtomicU64,
    rounds: AtomicU64,
    late: RwLock<Vec<Arc<dyn LateRearm>>>,
}

/// Where a region's bits lie: each region starts at a word of its own, so no word belongs to two regions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Region {
    pub(crate) pages: u64,
    pub(crate) first_word: u64,
}

impl Region {
    /// The word after the region's last one.
    pub(crate) fn end_word(&self) -> u64 {
        self.first_word + self.pages.div_ceil(WORD_BITS)
    }
}

impl DirtySet {
    /// An empty set over regions of the given numbers of pages; a region's index is its place in the slice.
    ///
    /// # Panics
    /// If the bits do not fit the address space, or there are more than `u32::MAX` regions.
    pub fn new(regions_pages: &[u64]) -> Self {
        assert!(
            u32::try_from(regions_pages.len()).is_ok(),
            "a region's index is a u32"
        );
        let mut words = 0u64;
        let regions = regions_pages
            .iter()
            .map(|&pages| {
                let region = Region {
                    pages,
                    first_word: words,
                };
                words = words
                    .checked_add(pages.div_ceil(WORD_BITS))
                    .expect("the regions' bits fit the address space");
                region
            })
            .collect();
        assert!(
            words <= Span::WORDS_MAX,
            "the regions' bits fit a round's spans"
        );
        let words = usize::try_from(words).expect("the regions' bits fit the address space");
        Self {
            shared: Arc::new(Shared {
                regions,
                levels: Levels::new(words, zeroed_words),
                dirty: AtomicU64::new(0),
                marked: AtomicU64::new(0),
                given_back: AtomicU64::new(0),
                taken: AtomicU64::new(0),
                rounds: AtomicU64::new(0),
                late: RwLock::new(Vec::new()),
            }),
        }
    }

    /// The number of regions.
    pub fn region_count(&self) -> u32 {
        self.shared.regions.len() as u32
    }

    /// The pages of a region, or `None` if there is no such region.
    pub fn region_pages(&self, region: u32) -> Option<u64> {
        self.shared
            .regions
            .get(region as usize)
            .map(|region| region.pages)
    }

    /// The pages of all regions.
    pub fn pages_total(&self) -> u64 {
        self.shared.regions.iter().map(|region| region.pages).sum()
    }

    /// Whether all of `run` lies inside one region of this set.
    pub fn contains(&self, run: Run) -> bool {
        self.region_pages(run.region).is_some_and(|pages| {
            run.first
                .checked_add(run.count)
                .is_some_and(|end| end <= pages)
        })
    }

    /// Whether a page is in the set at this moment.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn is_dirty(&self, region: u32, page: u64) -> bool {
        let place = self.shared.regions[region as usize];
        assert!(
            page < place.pages,
            "page {page} is not inside region {region}"
        );
        let word = place.first_word + page / WORD_BITS;
        self.shared.levels.load(word as usize) >> (page % WORD_BITS) & 1 == 1
    }

    /// The pages in the set: exact while nobody marks or takes, a moment's estimate otherwise. Costs one load.
    pub fn dirty_pages(&self) -> u64 {
        // A taker may subtract a page a moment before its marker added it; the sum is then below zero.
        (self.shared.dirty.load(Ordering::Relaxed) as i64).max(0) as u64
    }

    /// What was counted so far.
    pub fn figures(&self) -> SetFigures {
        SetFigures {
            marked: self.shared.marked.load(Ordering::Relaxed),
            given_back: self.shared.given_back.load(Ordering::Relaxed),
            taken: self.shared.taken.load(Ordering::Relaxed),
            rounds: self.shared.rounds.load(Ordering::Relaxed),
        }
    }

    /// Marks the run's pages dirty; returns how many of them were clean.
    ///
    /// For a write that the caller itself made or was told of after it was made: a VMM's or a back end's. What a
    /// kernel reports goes through [`Collected`](crate::Collected) and [`DirtySet::merge`].
    ///
    /// # Panics
    /// If the run is not inside a region (see [`DirtySet::contains`]).
    pub fn mark(&self, run: Run) -> u64 {
        let fresh = self.set_run(run);
        self.count(fresh, &self.shared.marked)
    }

    /// Marks one page dirty; returns 1 if it was clean, else 0.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn mark_page(&self, region: u32, page: u64) -> u64 {
        self.mark(Run {
            region,
            first: page,
            count: 1,
        })
    }

    /// Marks the pages whose bits are set in `words`; bit 0 of the first word is page `first_page`. Returns how many of
    /// them were clean. Empty words cost a look only. Bits past the region's end are padding and count for nothing.
    ///
    /// # Panics
    /// If there is no such region.
    pub fn mark_bitmap(
        &self,
        region: u32,
        first_page: u64,
        words: impl IntoIterator<Item = u64>,
    ) -> u64 {
        let place = self.shared.regions[region as usize];
        let mut fresh = 0;
        let mut page = first_page;
        for bits in words {
            if page >= place.pages {
                break;
            }
            if bits != 0 {
                fresh += self.set_bits(place, page, bits);
            }
            page += WORD_BITS;
        }
        self.count(fresh, &self.shared.marked)
    }

    /// Marks every page of every region dirty; returns how many were clean.
    pub fn mark_all(&self) -> u64 {
        let mut fresh = 0;
        for (region, place) in (0u32..).zip(&self.shared.regions) {
            fresh += self.set_run(Run {
                region,
                first: 0,
                count: place.pages,
            });
        }
        self.count(fresh, &self.shared.marked)
    }

    /// Puts back pages that a round handed out and that did not land. The same as [`DirtySet::mark`], counted apart.
    ///
    /// # Panics
    /// If the run is not inside a region.
    pub fn give_back(&self, run: Run) -> u64 {
        let fresh = self.set_run(run);
        self.count(fresh, &self.shared.given_back)
    }

    /// Puts into the set what a kernel reported and has re-armed since; returns how many of the pages were clean.
    ///
    /// What was only [`Collected`](crate::Collected) does not come in:
    ///
    /// ```compile_fail,E0308
    /// let set = multifd_tracking::DirtySet::new(&[8]);
    /// let mut seen = multifd_tracking::Collected::new();
    /// seen.push_page(0, 3);
    /// set.merge(seen);
    /// ```
    ///
    /// # Panics
    /// If a page is not inside a region: a source checks what the kernel says against its own table of slots.
    pub fn merge(&self, rearmed: Rearmed) -> u64 {
        self.set_collected(&rearmed.into_inner())
    }

    /// Puts into the set what a kernel reported and what `late` will re-arm just before it is read; returns how many of
    /// the pages were clean. Rounds that begin from now on hand the pages out only after `late` agreed.
    ///
    /// # Panics
    /// If `late` is not attached to this set, so that nobody would ask it; or if a page is not inside a region.
    pub fn merge_late(&self, collected: Collected, late: &Arc<dyn LateRearm>) -> u64 {
        let attached = self
            .shared
            .late
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        assert!(
            attached.iter().any(|source| Arc::ptr_eq(source, late)),
            "the late source is attached to the set"
        );
        self.set_collected(&collected)
    }

    /// Takes everything out of the set, as one round.
    ///
    /// Every mark that returned before this call began is in the round; a mark that runs at the same time lands in the
    /// round or stays in the set; a mark made later stays in the set. So a round hands out a page at most once, however
    /// often it is written meanwhile. The words are moved out eagerly: the cost follows the non-empty words, and the
    /// round then holds 16 bytes per such word (less for whole ones that lie side by side).
    pub fn take_round(&self) -> Round {
        let late = self
            .shared
            .late
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let mut spans = Vec::new();
        let mut pages = 0;
        let mut region = 0;
        self.shared.levels.take(&mut |word, bits| {
            let word = word as u64;
            pages += u64::from(bits.count_ones());
            while word >= self.shared.regions[region].end_word() {
                region += 1;
            }
            let starts_region = word == self.shared.regions[region].first_word;
            Span::push(&mut spans, word, bits, starts_region);
        });
        self.shared.dirty.fetch_sub(pages, Ordering::Relaxed);
        self.shared.taken.fetch_add(pages, Ordering::Relaxed);
        self.shared.rounds.fetch_add(1, Ordering::Relaxed);
        Round::new(self.clone(), spans, pages, late)
    }

    /// Lets `source` re-arm runs just before rounds that begin from now on hand them out.
    pub fn attach_late(&self, source: Arc<dyn LateRearm>) {
        self.shared
            .late
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .push(source);
    }

    /// Ends what [`DirtySet::attach_late`] began. A round that is already there goes on asking the source.
    pub fn detach_late(&self, source: &Arc<dyn LateRearm>) {
        self.shared
            .late
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|attached| !Arc::ptr_eq(attached, source));
    }

    /// Refuses a run that does not lie inside a region.
    ///
    /// # Errors
    /// [`Error::Misuse`] that names the run.
    pub fn check(&self, run: Run) -> Result<Run, Error> {
        if self.contains(run) {
            Ok(run)
        } else {
            Err(Error::outside(run))
        }
    }

    pub(crate) fn regions(&self) -> &[Region] {
        &self.shared.regions
    }

    /// Puts back whole words that a round took, by their place in the bitmap. The same words, so always inside.
    pub(crate) fn give_back_words(&self, first_word: u64, bits: u64, full_after: u64) {
        let mut fresh = u64::from(
            self.shared
                .levels
                .set(first_word as usize, bits)
                .count_ones(),
        );
        fresh += self
            .shared
            .levels
            .set_words(first_word as usize + 1, full_after as usize);
        self.count(fresh, &self.shared.given_back);
    }

    fn set_collected(&self, collected: &Collected) -> u64 {
        let mut fresh = 0;
        for group in collected.words().chunks(TOUCHED_TOGETHER) {
            let word = |found: &Bits| {
                let place = self.shared.regions[found.region as usize];
                assert!(
                    found.word * WORD_BITS < place.pages,
                    "word {} is not inside region {}",
                    found.word,
                    found.region
                );
                (place.first_word + found.word) as usize
            };
            self.shared.levels.touch(group.iter().map(word));
            for found in group {
                let place = self.shared.regions[found.region as usize];
                fresh += self.set_bits(place, found.word * WORD_BITS, found.bits);
            }
        }
        for &run in collected.runs() {
            fresh += self.set_run(run);
        }
        self.count(fresh, &self.shared.marked)
    }

    fn count(&self, fresh: u64, kind: &AtomicU64) -> u64 {
        if fresh != 0 {
            self.shared.dirty.fetch_add(fresh, Ordering::Relaxed);
            kind.fetch_add(fresh, Ordering::Relaxed);
        }
        fresh
    }

    /// Sets a run's bits without counting.
    fn set_run(&self, run: Run) -> u64 {
        assert!(self.contains(run), "{run:?} is not inside a region");
        if run.count == 0 {
            return 0;
        }
        let levels = &self.shared.levels;
        let base = self.shared.regions[run.region as usize].first_word;
        let last = run.first + run.count - 1;
        let (low, high) = (base + run.first / WORD_BITS, base + last / WORD_BITS);
        let low_bits = u64::MAX << (run.first % WORD_BITS);
        let high_bits = u64::MAX >> (WORD_BITS - 1 - last % WORD_BITS);
        let set = |word: u64, bits: u64| u64::from(levels.set(word as usize, bits).count_ones());
        if low == high {
            return set(low, low_bits & high_bits);
        }
        set(low, low_bits)
            + levels.set_words(low as usize + 1, (high - low - 1) as usize)
            + set(high, high_bits)
    }

    /// Sets up to 64 bits that begin at `page`, wherever that lies in its word, cut at the region's end.
    fn set_bits(&self, place: Region, page: u64, bits: u64) -> u64 {
        let room = place.pages - page;
        let bits = if room < WORD_BITS {
            bits & !(u64::MAX << room)
        } else {
            bits
        };
        let word = (place.first_word + page / WORD_BITS) as usize;
        let shift = page % WORD_BITS;
        let mut fresh = self.shared.levels.set(word, bits << shift).count_ones();
        if shift != 0 {
            let carried = bits >> (WORD_BITS - shift);
            if carried != 0 {
                fresh += self.shared.levels.set(word + 1, carried).count_ones();
            }
        }
        u64::from(fresh)
    }
}

impl std::fmt::Debug for DirtySet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DirtySet")
            .field("regions", &self.region_count())
            .field("pages_total", &self.pages_total())
            .field("dirty_pages", &self.dirty_pages())
            .finish_non_exhaustive()
    }
}

/// The words of a level: from the heap if they are few, or from a mapping of their own that huge pages back.
enum Words {
    Few(Box<[AtomicU64]>),
    Many(HugeWords),
}

/// Words that come from memory at the same time before they are set: their lines fit the first cache.
const TOUCHED_TOGETHER: usize = 64;

/// Words from which on a level gets a mapping: the bits of 8 GiB of guest memory, an eighth of a huge page.
const MANY_WORDS: usize = 1 << 15;

impl Deref for Words {
    type Target = [AtomicU64];

    #[inline]
    fn deref(&self) -> &[AtomicU64] {
        match self {
            Self::Few(words) => words,
            Self::Many(words) => words,
        }
    }
}

/// Words of zero that the kernel makes real only when they are written.
fn zeroed_words(count: usize) -> Words {
    if count >= MANY_WORDS {
        return Words::Many(HugeWords::new(count).expect("memory for the dirty set's bits"));
    }
    let few = <[AtomicU64]>::new_box_zeroed_with_elems(count);
    Words::Few(few.expect("memory for the dirty set's bits"))
}
