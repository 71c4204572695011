//! A bitmap with summary levels: which of very many bits are set, found at a cost that follows the set bits.
//!
//! ```text
//!  level 2                                  [..1....1]      one word
//!  level 1              [........]  [.1......] [....1...]   a bit per line of level 0 that may hold bits, and so on upwards
//!  level 0   [..11.1..|........|.. 8 words ..] [........|1.......|..]    a bit per page, in lines of 8 words
//! ```
//!
//! A bit of level 1 stands for a whole cache line of level 0, 512 pages: looking at eight words of a line that is there
//! costs less than another level of locked writes.
//!
//! The rule: **a bit of level 0 that is set has all its summary bits set, except while the call that sets it is still
//! running.** A summary bit may be set above empty words; that costs a look and nothing else.
//!
//! Setters go up: level 0 first, then each summary level. Takers go down: they clear a summary word before they look
//! at what lies below it. Every operation is sequentially consistent, so there is one order of all of them:
//!
//! * If the setter's write of level 0 comes before the taker's swap of that word, the taker gets the bit, or does not
//!   visit the word because its summary was not set yet; then the setter sets the summary afterwards and the bit stays.
//! * If it comes after, then all the taker's clears of the words above came before it too, so each summary bit that
//!   the setter now looks at is either clear, and the setter sets it, or was set again by another setter. The bit stays.
//!
//! So a bit is never lost. The setter must look at *every* level, even when level 0 was not empty and even when a lower
//! summary bit was set already: another setter may have set that one and not yet have gone up. That is also why a call
//! that returned before a take began is always seen by that take.
//!
//! One level is not cleared on the way down: a word of level 1 with few bits is only looked at, and its bits stay set above
//! the lines that were just emptied. A guest writes what it wrote before, so the next setter there finds its bit and the
//! taker saves a locked write for each scattered page, which is what taking them costs most. A bit above a line that has
//! stayed empty until the next visit is cleared then, and the line is looked at once more: a setter that still saw the bit
//! had written level 0 before, and is found; one that comes later sees it clear, and sets it. The levels above need no such
//! care, because a setter looks at every level anyhow.
//!
//! Acquire and release alone would not do: "write one word, then read another" on both sides is the store-buffer case.

use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};

/// The bits of a word.
pub(crate) const WORD_BITS: u64 = 64;

/// One atomic word of 64 bits. The standard one in use; the tests put in one whose interleavings are all tried.
pub(crate) trait Word {
    /// The word's value.
    fn load(&self) -> u64;
    /// Sets `bits` and returns what the word held before.
    fn set(&self, bits: u64) -> u64;
    /// Clears `bits`.
    fn clear(&self, bits: u64);
    /// Empties the word and returns what it held.
    fn take(&self) -> u64;
}

impl Word for AtomicU64 {
    fn load(&self) -> u64 {
        AtomicU64::load(self, Ordering::SeqCst)
    }

    fn set(&self, bits: u64) -> u64 {
        self.fetch_or(bits, Ordering::SeqCst)
    }

    fn clear(&self, bits: u64) {
        self.fetch_and(!bits, Ordering::SeqCst);
    }

    fn take(&self) -> u64 {
        self.swap(0, Ordering::SeqCst)
    }
}

/// The levels, lowest first. The last one has exactly one word. `B` is what holds the words of a level.
pub(crate) struct Levels<B> {
    levels: Vec<B>,
}

impl<W: Word, B: Deref<Target = [W]>> Levels<B> {
    /// Levels over `words` words of bits, all clear. `zeroed` makes that many words of zero.
    pub(crate) fn new(words: usize, zeroed: impl Fn(usize) -> B) -> Self {
        let mut levels = vec![zeroed(words)];
        let mut below = words.div_ceil(LINE_WORDS);
        loop {
            let count = below.div_ceil(WORD_BITS as usize).max(1);
            levels.push(zeroed(count));
            if count == 1 {
                return Self { levels };
            }
            below = count;
        }
    }

    /// The bits of word `index` at this moment.
    pub(crate) fn load(&self, index: usize) -> u64 {
        self.levels[0][index].load()
    }

    /// Lets the words come from memory, and those above them, all at the same time: [`Levels::set`] would wait for one
    /// after the other, because a locked write lets nothing pass.
    pub(crate) fn touch(&self, indices: impl Iterator<Item = usize> + Clone) {
        touch(indices.clone().map(|index| &self.levels[0][index]));
        touch(indices.map(|index| &self.levels[1][index / LINE_WORDS / WORD_BITS as usize]));
    }

    /// Sets `bits` of word `index`; returns those of them that were clear.
    pub(crate) fn set(&self, index: usize, bits: u64) -> u64 {
        if bits == 0 {
            return 0;
        }
        let before = self.levels[0][index].set(bits);
        let mut below = index / LINE_WORDS;
        for level in &self.levels[1..] {
            let bit = 1 << (below as u64 % WORD_BITS);
            below /= WORD_BITS as usize;
            // A look is cheaper than a locked write, and the bit is mostly there: see the module's rule for why it is enough.
            if level[below].load() & bit == 0 {
                level[below].set(bit);
            }
        }
        bits & !before
    }

    /// Sets all bits of the words `first .. first + count`; returns how many bits were clear.
    pub(crate) fn set_words(&self, first: usize, count: usize) -> u64 {
        if count == 0 {
            return 0;
        }
        let mut fresh = 0;
        for word in &self.levels[0][first..first + count] {
            fresh += u64::from((!word.set(u64::MAX)).count_ones());
        }
        let line = LINE_WORDS as u64;
        let (mut low, mut high) = (first as u64 / line, (first + count - 1) as u64 / line);
        for level in &self.levels[1..] {
            let (low_word, high_word) = (low / WORD_BITS, high / WORD_BITS);
            for index in low_word..=high_word {
                let from = if index == low_word {
                    low % WORD_BITS
                } else {
                    0
                };
                let to = if index == high_word {
                    high % WORD_BITS
                } else {
                    WORD_BITS - 1
                };
                level[index as usize].set((u64::MAX << from) & (u64::MAX >> (WORD_BITS - 1 - to)));
            }
            (low, high) = (low_word, high_word);
        }
        fresh
    }

    /// Empties the bitmap into `found`, which is called with each non-empty word's index and bits, indices rising.
    pub(crate) fn take(&self, found: &mut impl FnMut(usize, u64)) {
        self.take_below(self.levels.len() - 1, 0, &mut Scratch::default(), found);
    }

    /// Takes word `index` of summary level `level` and everything below it. The depth is the number of levels: 7 for 2^40
    /// bits.
    fn take_below(
        &self,
        level: usize,
        index: usize,
        scratch: &mut Scratch,
        found: &mut impl FnMut(usize, u64),
    ) {
        if level <= BATCH_LEVEL {
            return self.take_batch(level, index, scratch, found);
        }
        let bits = self.levels[level][index].take();
        for below in ones(index, bits) {
            self.take_below(level - 1, below, scratch, found);
        }
    }

    /// As `take_below`, one level after the other. A swap waits for its word to come from memory and lets nothing pass;
    /// so all words of a level are first touched by plain loads, whose waiting overlaps.
    fn take_batch(
        &self,
        top: usize,
        index: usize,
        scratch: &mut Scratch,
        found: &mut impl FnMut(usize, u64),
    ) {
        let Scratch { words, below } = scratch;
        words.clear();
        words.push(index);
        for level in (2..=top).rev() {
            touch(words.iter().map(|&index| &self.levels[level][index]));
            below.clear();
            for &index in &*words {
                below.extend(ones(index, self.levels[level][index].take()));
            }
            std::mem::swap(words, below);
        }
        touch(words.iter().map(|&index| &self.levels[1][index]));
        below.clear();
        for &index in &*words {
            let word = &self.levels[1][index];
            let bits = word.load();
            if bits.count_ones() <= KEPT_BITS_MAX {
                below.extend(ones(index, bits).map(|line| line | KEPT));
            } else {
                below.extend(ones(index, word.take()));
            }
        }
        std::mem::swap(words, below);
        touch(
            words
                .iter()
                .map(|&line| &self.levels[0][(line & !KEPT) * LINE_WORDS]),
        );
        for &line in &*words {
            let (line, kept) = (line & !KEPT, line & KEPT != 0);
            if !self.take_line(line, found) && kept {
                let bit = line as u64 % WORD_BITS;
                self.levels[1][line / WORD_BITS as usize].clear(1 << bit);
                self.take_line(line, found);
            }
        }
    }

    /// Takes the words of a line of level 0; whether there was anything in them.
    fn take_line(&self, line: usize, found: &mut impl FnMut(usize, u64)) -> bool {
        let first = line * LINE_WORDS;
        let end = self.levels[0].len().min(first + LINE_WORDS);
        let mut any = false;
        for index in first..end {
            let word = &self.levels[0][index];
            // A bit that is set after this look is found by a later take: its setter goes up after it.
            let bits = if word.load() == 0 { 0 } else { word.take() };
            if bits != 0 {
                any = true;
                found(index, bits);
            }
        }
        any
    }
}

/// Lets the words come from memory, all at the same time.
fn touch<'a, W: Word + 'a>(words: impl Iterator<Item = &'a W>) {
    std::hint::black_box(words.fold(0, |seen, word| seen | word.load()));
}

/// A word of level 1 with at most so many bits keeps them when it is taken. More, and clearing them one by one later would
/// cost more than clearing all at once now.
const KEPT_BITS_MAX: u32 = 4;

/// Marks a line of level 0 whose bit of level 1 was kept. There are fewer than 2^60 lines.
const KEPT: usize = 1 << (usize::BITS - 1);

/// The words of level 0 that one bit of level 1 stands for: a cache line.
const LINE_WORDS: usize = 8;

/// Summary levels up to this one are taken as a batch: at most 64^3 lines of level 0 (32 GiB of guest memory if all of it
/// is dirty), whose indices fill 2 MiB.
const BATCH_LEVEL: usize = 3;

/// The words of two neighbouring levels that are being taken; kept between batches.
#[derive(Default)]
struct Scratch {
    words: Vec<usize>,
    below: Vec<usize>,
}

/// The words below those bits of word `index`.
fn ones(index: usize, mut bits: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = (bits != 0).then_some(bits.trailing_zeros())?;
        bits &= bits - 1;
        Some(index * WORD_BITS as usize + bit as usize)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use shuttle::sync::Arc;
    use shuttle::sync::atomic::AtomicU64 as ShuttleWord;

    impl Word for ShuttleWord {
        fn load(&self) -> u64 {
            self.load(Ordering::SeqCst)
        }

        fn set(&self, bits: u64) -> u64 {
            self.fetch_or(bits, Ordering::SeqCst)
        }

        fn clear(&self, bits: u64) {
            self.fetch_and(!bits, Ordering::SeqCst);
        }

        fn take(&self) -> u64 {
            self.swap(0, Ordering::SeqCst)
        }
    }

    fn plain(count: usize) -> Box<[AtomicU64]> {
        (0..count).map(|_| AtomicU64::new(0)).collect()
    }

    fn shuttled(count: usize) -> Box<[ShuttleWord]> {
        (0..count).map(|_| ShuttleWord::new(0)).collect()
    }

    fn taken<W: Word>(levels: &Levels<Box<[W]>>) -> Vec<(usize, u64)> {
        let mut words = Vec::new();
        levels.take(&mut |index, bits| words.push((index, bits)));
        words
    }

    #[test]
    fn takes_what_was_set_once_and_in_order() {
        let levels = Levels::new(64 * 64 + 1, plain);
        assert_eq!(levels.set(4096, 1 << 63), 1 << 63);
        assert_eq!(levels.set(0, 0b101), 0b101);
        assert_eq!(
            levels.set(0, 0b110),
            0b010,
            "only the bit that was clear is fresh"
        );
        assert_eq!(levels.set(65, 7), 7);
        assert_eq!(taken(&levels), [(0, 0b111), (65, 7), (4096, 1 << 63)]);
        assert_eq!(taken(&levels), []);
    }

    #[test]
    fn sets_word_spans_at_every_alignment() {
        for (first, count) in [
            (0, 1),
            (0, 64),
            (63, 2),
            (1, 200),
            (64, 64),
            (100, 4000),
            (0, 4160),
        ] {
            let levels = Levels::new(4160, plain);
            assert_eq!(levels.set_words(first, count), count as u64 * 64);
            assert_eq!(levels.set_words(first, count), 0);
            let expected: Vec<_> = (first..first + count)
                .map(|index| (index, u64::MAX))
                .collect();
            assert_eq!(taken(&levels), expected);
        }
    }

    #[test]
    fn one_word_needs_no_summary() {
        let levels = Levels::new(1, plain);
        levels.set(0, 9);
        assert_eq!(taken(&levels), [(0, 9)]);
    }

    /// Tries the interleavings over one summary level one after the other (all, or the first 50,000), and 20,000 drawn ones
    /// over two, where a setter can overtake another one in the middle of its way up. A failure prints the schedule to replay.
    fn in_all_orders(body: impl Fn(usize) + Send + Sync + Copy + 'static) {
        shuttle::check_dfs(move || body(2), Some(50_000));
        shuttle::check_pct(move || body(65 * LINE_WORDS), 10_000, 3);
        shuttle::check_random(move || body(65 * LINE_WORDS), 10_000);
    }

    fn bits(words: &[(usize, u64)]) -> u64 {
        words.iter().map(|(_, bits)| bits).sum()
    }

    #[test]
    fn no_interleaving_of_take_and_set_loses_a_bit() {
        in_all_orders(|words| {
            let levels = Arc::new(Levels::new(words, shuttled));
            levels.set(1, 1);
            let setter = {
                let levels = Arc::clone(&levels);
                shuttle::thread::spawn(move || {
                    levels.set(1, 2);
                })
            };
            let first = bits(&taken(&levels));
            setter.join().unwrap();
            assert_eq!(first + bits(&taken(&levels)), 3);
            assert_eq!(taken(&levels), [], "a bit was taken and stayed");
        });
    }

    /// Two setters of one word, then a take that begins when one of them has returned: that one's bit must be in it,
    /// although the other may have been the first to set the word and may not have gone up yet.
    #[test]
    fn a_take_sees_every_set_that_returned_before_it() {
        in_all_orders(|words| {
            let levels = Arc::new(Levels::new(words, shuttled));
            let slow = {
                let levels = Arc::clone(&levels);
                shuttle::thread::spawn(move || {
                    levels.set(1, 1);
                })
            };
            levels.set(1, 2);
            let first = bits(&taken(&levels));
            assert_eq!(first & 2, 2);
            slow.join().unwrap();
            assert_eq!(first + bits(&taken(&levels)), 3);
        });
    }

    #[test]
    fn two_takers_share_without_loss_or_double() {
        in_all_orders(|words| {
            let levels = Arc::new(Levels::new(words, shuttled));
            levels.set(0, 1);
            let other = {
                let levels = Arc::clone(&levels);
                shuttle::thread::spawn(move || bits(&taken(&levels)))
            };
            levels.set(words - 1, 2);
            let mine = bits(&taken(&levels));
            let theirs = other.join().unwrap();
            assert_eq!(mine + theirs + bits(&taken(&levels)), 3);
        });
    }
}
