//! What every page holds at the start: a function of the page number, never stored anywhere.
//!
//! Plain and working-set pages are either zero or 512 words that follow from the seed and the page number, so that a
//! page says of itself which one it is: a page that is stale, torn, or in another page's place is found, word by word.
//! In a working-set page the words for the stamps are zero at the start.

use std::thread;

use crate::config::PAGE_BYTES;
use crate::layout::{
    self, DIRECTORIES_PAGE, HEADER_COUNTER_WORD, Layout, PAGE_MAP_PAGE, PAGE_WORDS, POINTERS_PAGE,
    PROGRAM_PAGE, PageWords, Purpose,
};
use crate::memory::Memory;
use crate::program::Program;
use crate::workload::{MIX, Share, mix};

/// First word of a header page: "MFDGUEST".
const HEADER_MAGIC: u64 = u64::from_le_bytes(*b"MFDGUEST");

/// Page table entry of a table: present, writable, accessed (set here, so that the processor never has to write it).
const TABLE_ENTRY: u64 = 0x23;

/// Page table entry of a 2 MiB page: present, writable, accessed, dirty, large.
const LARGE_PAGE_ENTRY: u64 = 0xE3;

const LARGE_PAGE_BYTES: u64 = 2 << 20;

/// Threads that fill or check a memory at the same time, at most.
pub(crate) const SCAN_THREADS_MAX: usize = 4;

/// Below this a memory is not worth a second thread.
const PAGES_PER_THREAD_MIN: u64 = (64 << 20) / PAGE_BYTES;

/// The memory of a guest as it is at the start.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Image<'a> {
    pub(crate) layout: &'a Layout,
    pub(crate) program: &'a Program,
}

impl Image<'_> {
    /// Writes the image into fresh memory; pages that are zero are not touched.
    pub(crate) fn write_to(&self, memory: &Memory) {
        scan(self.layout.pages, &|pages| {
            let mut words = [0; PAGE_WORDS];
            for page in pages {
                if self.page(page, &mut words) == Content::Words {
                    memory.write_page(page, &words);
                }
            }
        });
    }

    /// Sets `words` to what page `page` holds at the start.
    pub(crate) fn page(&self, page: u64, words: &mut PageWords) -> Content {
        let layout = self.layout;
        match layout.purpose(page) {
            Purpose::Fixed => *words = self.fixed(page),
            Purpose::Header(share) => *words = header(layout, share),
            Purpose::Log(..) => *words = [0; PAGE_WORDS],
            Purpose::Plain => return plain(layout, page, words),
            Purpose::Work(share, _) => {
                let content = plain(layout, page, words);
                words[layout::stamp_word(share.vcpu)] = 0;
                return content;
            }
        }
        Content::Words
    }

    fn fixed(&self, page: u64) -> PageWords {
        let mut words = [0; PAGE_WORDS];
        match page {
            PROGRAM_PAGE => words = self.program.page_words(),
            PAGE_MAP_PAGE => words[0] = (POINTERS_PAGE * PAGE_BYTES) | TABLE_ENTRY,
            POINTERS_PAGE => {
                for (word, index) in words.iter_mut().zip(0..self.layout.directories) {
                    *word = ((DIRECTORIES_PAGE + index) * PAGE_BYTES) | TABLE_ENTRY;
                }
            }
            _ if page >= DIRECTORIES_PAGE => {
                let first = (page - DIRECTORIES_PAGE) * PAGE_WORDS as u64;
                for (word, index) in words.iter_mut().zip(first..) {
                    let page = index * LARGE_PAGE_BYTES / PAGE_BYTES;
                    *word = layout::guest_address(page) | LARGE_PAGE_ENTRY;
                }
            }
            _ => {}
        }
        words
    }
}

/// Whether a page is worth writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// All words are zero.
    Zero,
    /// Some words may not be zero.
    Words,
}

/// Runs `work` over all of `pages` pages, in a few threads if they are many.
pub(crate) fn scan(pages: u64, work: &(dyn Fn(std::ops::Range<u64>) + Sync)) {
    let cores = thread::available_parallelism()
        .map_or(1, usize::from)
        .min(SCAN_THREADS_MAX) as u64;
    let threads = (pages / PAGES_PER_THREAD_MIN).clamp(1, cores);
    let share = pages.div_ceil(threads);
    thread::scope(|scope| {
        for thread in 1..threads {
            scope.spawn(move || work(thread * share..((thread + 1) * share).min(pages)));
        }
        work(0..share.min(pages));
    });
}

fn header(layout: &Layout, share: &Share) -> PageWords {
    let mut words = [0; PAGE_WORDS];
    let facts = [
        HEADER_MAGIC,
        u64::from(share.vcpu),
        share.first_page,
        share.pages,
        share.log_page,
        share.batch,
        layout.seed,
    ];
    words[..facts.len()].copy_from_slice(&facts);
    words[HEADER_COUNTER_WORD] = 0;
    words
}

fn plain(layout: &Layout, page: u64, words: &mut PageWords) -> Content {
    let key = mix(layout.seed.wrapping_add(mix(page)));
    if page >= layout.filled_pages || key % 100 < layout.zero_percent {
        *words = [0; PAGE_WORDS];
        return Content::Zero;
    }
    for (word, index) in words.iter_mut().zip(0u64..) {
        // Two folds and two multiplications for each word: nothing to compress, not even from word to word, and
        // still several gigabytes a second.
        let spread = key.wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let mixed = (spread ^ (spread >> 31)).wrapping_mul(MIX);
        *word = mixed ^ (mixed >> 29);
    }
    // The first words name the page to whoever looks at it in a debugger.
    words[0] = page;
    words[1] = layout.seed;
    Content::Words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Fill};

    fn layout(filled_percent: u8, zero_percent: u8) -> Layout {
        let fill = Fill {
            filled_percent,
            zero_percent,
        };
        Layout::new(&Config {
            memory_bytes: 64 << 20,
            working_set_bytes: 1 << 20,
            fill,
            ..Config::default()
        })
        .unwrap()
    }

    fn is_zero(layout: &Layout, page: u64) -> bool {
        let mut words = [1; PAGE_WORDS];
        let content = plain(layout, page, &mut words);
        assert_eq!(content == Content::Zero, words == [0; PAGE_WORDS]);
        content == Content::Zero
    }

    #[test]
    fn zero_and_filled_shares_are_as_asked() {
        for (filled, zero, expect) in [
            (100, 0, 16384),
            (100, 100, 0),
            (0, 0, 0),
            (50, 0, 8192),
            (100, 50, 8192),
        ] {
            let layout = layout(filled, zero);
            let filled_pages = (0..layout.pages)
                .filter(|page| !is_zero(&layout, *page))
                .count();
            assert!(
                filled_pages.abs_diff(expect) < 400,
                "{filled} % with {zero} % zero: {filled_pages}"
            );
        }
    }

    #[test]
    fn neither_words_nor_differences_of_neighbouring_words_come_twice() {
        let layout = layout(100, 0);
        let mut seen = std::collections::HashSet::new();
        let mut words = [0; PAGE_WORDS];
        for page in 1000..1400 {
            plain(&layout, page, &mut words);
            words[2..]
                .iter()
                .for_each(|word| assert!(seen.insert(*word), "page {page}"));
            let differences = words[2..]
                .windows(2)
                .map(|pair| pair[1].wrapping_sub(pair[0]));
            differences.for_each(|difference| assert!(seen.insert(difference), "page {page}"));
        }
    }

    #[test]
    fn every_bit_of_a_filled_word_is_set_half_of_the_time() {
        let layout = layout(100, 0);
        let mut counts = [0u32; 64];
        let mut words = [0; PAGE_WORDS];
        for page in 0..100 {
            plain(&layout, page, &mut words);
            words[2..]
                .iter()
                .for_each(|w| (0..64).for_each(|bit| counts[bit] += (w >> bit & 1) as u32));
        }
        assert!(
            counts.iter().all(|count| (24_500..26_500).contains(count)),
            "{counts:?}"
        );
    }

    #[test]
    fn octets_of_a_filled_page_are_evenly_spread() {
        let layout = layout(100, 0);
        let mut counts = [0u64; 256];
        let mut words = [0; PAGE_WORDS];
        for page in 0..256 {
            plain(&layout, page, &mut words);
            words[2..]
                .iter()
                .flat_map(|word| word.to_le_bytes())
                .for_each(|o| counts[usize::from(o)] += 1);
        }
        // 256 pages give each value 4,080 times, with a deviation of 64.
        assert!(
            counts.iter().all(|count| (3_600..4_600).contains(count)),
            "{counts:?}"
        );
    }

    #[test]
    fn page_tables_map_page_numbers_over_the_hole() {
        let config = Config {
            memory_bytes: 5 << 30,
            working_set_bytes: 1 << 20,
            ..Config::default()
        };
        let layout = Layout::new(&config).unwrap();
        let program = Program::new(&layout);
        let image = Image {
            layout: &layout,
            program: &program,
        };
        let entry = |page: u64, index: u64| image.fixed(page)[index as usize];
        let translate = |address: u64| {
            let pointers = entry(PAGE_MAP_PAGE, address >> 39) >> 12;
            let directory = entry(pointers, (address >> 30) & 511) >> 12;
            let large = entry(directory, (address >> 21) & 511);
            assert_eq!(large & 0xFFF, LARGE_PAGE_ENTRY);
            (large & !0xFFF) + (address & (LARGE_PAGE_BYTES - 1))
        };
        for address in [
            0,
            4096,
            (3 << 30) - 8,
            3 << 30,
            (4 << 30) + 12_345,
            (5 << 30) - 1,
        ] {
            assert_eq!(
                translate(address),
                layout::guest_address(address / 4096) + address % 4096
            );
        }
    }

    #[test]
    fn scan_visits_every_page_once() {
        for pages in [1, PAGES_PER_THREAD_MIN, 5 * PAGES_PER_THREAD_MIN + 3] {
            let visited = std::sync::atomic::AtomicU64::new(0);
            scan(pages, &|range| {
                visited.fetch_add(range.count() as u64, std::sync::atomic::Ordering::Relaxed);
            });
            assert_eq!(visited.into_inner(), pages);
        }
    }
}
