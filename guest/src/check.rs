//! The proof that nothing was lost: every word of a paused guest's memory is what it must be.
//!
//! Nothing is remembered from the time when the guest ran. What each page must hold follows from
//! - the image at the start ([`Image`]), for all words that the guest never writes;
//! - each virtual CPU's counter, which is a register and travels outside the memory: it tells the last stamp of every
//!   page ([`Share::last_stamps`]), and the log and the page must both say so;
//! - the virtual CPU's position in its program, which tells how far the one store that was under way came.
//!
//! So there is no tolerance anywhere: a page that is one store behind fails, and so does one that is ahead.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::config::Device;
use crate::device;
use crate::image::{Image, scan};
use crate::layout::{self, HEADER_COUNTER_WORD, PAGE_WORDS, PageWords, Purpose};
use crate::memory::Memory;
use crate::program::{LastStore, Progress};
use crate::workload::Share;

/// Failures that a report describes; more are only counted.
pub const FAILURES_MAX: usize = 32;

/// What a check pass found.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "a check that nobody looks at proves nothing"]
pub struct CheckReport {
    /// Pages compared: all of them.
    pub pages_checked: u64,
    /// Pages of the working set that must hold a stamp.
    pub stamps: u64,
    /// The first failures, at most [`FAILURES_MAX`], by rising page.
    pub failures: Vec<String>,
    /// All failures.
    pub failures_total: u64,
    /// How long it took.
    pub elapsed: Duration,
}

impl CheckReport {
    /// Whether every page is as it must be.
    pub fn passed(&self) -> bool {
        self.failures_total == 0
    }
}

impl std::fmt::Display for CheckReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.passed() {
            return write!(
                f,
                "passed: {} pages, {} stamps",
                self.pages_checked, self.stamps
            );
        }
        write!(
            f,
            "{} failures in {} pages",
            self.failures_total, self.pages_checked
        )?;
        self.failures
            .iter()
            .try_for_each(|failure| write!(f, "; {failure}"))
    }
}

/// Compares the whole of `memory` with what it must be, given how far each virtual CPU came.
///
/// An `Err` in `progress` is a virtual CPU that is outside its program: a failure of its own, and its pages are
/// compared with what they were at the start. Nobody may write the memory meanwhile.
pub(crate) fn check(
    image: Image<'_>,
    memory: &Memory,
    progress: &[Result<Progress, String>],
    device: Device,
) -> CheckReport {
    let counters: Vec<u64> = progress
        .iter()
        .map(|progress| progress.as_ref().map_or(0, |progress| progress.counter))
        .collect();
    let begun = Instant::now();
    let mut failures = Failures::default();
    let mut expected = Vec::new();
    for (share, progress) in image.layout.shares.iter().zip(progress) {
        expected.push(
            match progress
                .as_ref()
                .map_err(Clone::clone)
                .and_then(|p| Stamps::new(share, *p))
            {
                Ok(stamps) => stamps,
                Err(text) => {
                    failures.add(0, text);
                    Stamps::none(share)
                }
            },
        );
    }
    let failures = Mutex::new(failures);
    let pages = image.layout.pages;
    scan(pages, &|pages| {
        let (mut wanted, mut found) = ([0; PAGE_WORDS], [0; PAGE_WORDS]);
        for page in pages {
            image.page(page, &mut wanted);
            let purpose = image.layout.purpose(page);
            if let Some(stamps) = stamps_of(purpose, &expected) {
                stamps.put_into(purpose, &mut wanted);
            }
            let stamp = match purpose {
                Purpose::Work(share, at) => expected[share.vcpu as usize].pages[at as usize],
                _ => 0,
            };
            device::put_into(device, image.layout, page, stamp, &counters, &mut wanted);
            memory.read_page(page, &mut found);
            if wanted != found {
                let text = describe(image, page, &wanted, &found);
                failures
                    .lock()
                    .unwrap_or_else(|poison| poison.into_inner())
                    .add(page, text);
            }
        }
    });
    let failures = failures
        .into_inner()
        .unwrap_or_else(|poison| poison.into_inner());
    CheckReport {
        pages_checked: pages,
        stamps: expected.iter().map(Stamps::stamped_pages).sum(),
        failures_total: failures.total,
        failures: failures.into_texts(),
        elapsed: begun.elapsed(),
    }
}

/// What one virtual CPU must have left in memory.
struct Stamps {
    /// Last stamp in each page of the share; 0 for none.
    pages: Vec<u64>,
    /// The page of the share whose log is ahead of its stamp, and what the log says.
    ahead: Option<(u64, u64)>,
    /// The counter in the header.
    header: u64,
}

impl Stamps {
    fn new(share: &Share, progress: Progress) -> Result<Self, String> {
        if share.batch == 0 {
            return Ok(Self::none(share));
        }
        let done = match progress.last_store {
            LastStore::Done => progress.counter,
            LastStore::Begun | LastStore::Logged => progress.counter.saturating_sub(1),
        };
        let pages = share.last_stamps(done).ok_or_else(|| {
            format!(
                "vcpu{} has a counter of {}, which cannot be replayed",
                share.vcpu, progress.counter
            )
        })?;
        let ahead = (progress.last_store == LastStore::Logged)
            .then(|| (share.page_of(progress.counter), progress.counter));
        Ok(Self {
            pages,
            ahead,
            header: progress.header,
        })
    }

    fn none(share: &Share) -> Self {
        Self {
            pages: vec![0; share.pages as usize],
            ahead: None,
            header: 0,
        }
    }

    fn stamped_pages(&self) -> u64 {
        self.pages.iter().filter(|stamp| **stamp != 0).count() as u64
    }

    /// Overwrites the words that the guest writes, in what the image says of a page.
    fn put_into(&self, purpose: Purpose<'_>, words: &mut PageWords) {
        match purpose {
            Purpose::Header(_) => words[HEADER_COUNTER_WORD] = self.header,
            Purpose::Log(_, page) => {
                let first = page as usize * PAGE_WORDS;
                let stamps = self.pages.iter().skip(first);
                words
                    .iter_mut()
                    .zip(stamps)
                    .for_each(|(word, stamp)| *word = *stamp);
                if let Some((page, stamp)) = self.ahead
                    && let Some(word) = (page as usize)
                        .checked_sub(first)
                        .and_then(|at| words.get_mut(at))
                {
                    *word = stamp;
                }
            }
            Purpose::Work(share, page) => {
                words[layout::stamp_word(share.vcpu)] = self.pages[page as usize];
            }
            Purpose::Fixed | Purpose::Plain => {}
        }
    }
}

fn stamps_of<'a>(purpose: Purpose<'_>, expected: &'a [Stamps]) -> Option<&'a Stamps> {
    match purpose {
        Purpose::Header(share) | Purpose::Log(share, _) | Purpose::Work(share, _) => {
            expected.get(share.vcpu as usize)
        }
        Purpose::Fixed | Purpose::Plain => None,
    }
}

/// One sentence about a page that is not what it must be.
fn describe(image: Image<'_>, page: u64, wanted: &PageWords, found: &PageWords) -> String {
    let differing = wanted
        .iter()
        .zip(found)
        .filter(|(wanted, found)| wanted != found)
        .count();
    let word = wanted
        .iter()
        .zip(found)
        .position(|(wanted, found)| wanted != found)
        .unwrap_or(0);
    let (wanted, found) = (wanted[word], found[word]);
    let place = format!(
        "page {page} (guest address {:#x})",
        layout::guest_address(page)
    );
    match image.layout.purpose(page) {
        Purpose::Work(share, _) if differing == 1 && word == layout::stamp_word(share.vcpu) => {
            format!(
                "{place}: vcpu{}'s last stamp there was {wanted}, and the page holds {found}",
                share.vcpu
            )
        }
        Purpose::Log(share, index) => {
            let of = share.first_page + index * PAGE_WORDS as u64 + word as u64;
            format!(
                "{place}: vcpu{}'s log must say {wanted} for page {of}, and says {found} ({differing} such words)",
                share.vcpu
            )
        }
        Purpose::Header(share) if word == HEADER_COUNTER_WORD => {
            format!(
                "{place}: vcpu{}'s header must count {wanted}, and counts {found}",
                share.vcpu
            )
        }
        purpose => {
            let what = match purpose {
                Purpose::Fixed => "program and page tables",
                Purpose::Header(_) => "header",
                Purpose::Log(..) => "log",
                Purpose::Plain => "never written",
                Purpose::Work(..) => "working set",
            };
            format!(
                "{place}, {what}: word {word} must be {wanted:#x} and is {found:#x} ({differing} words differ)"
            )
        }
    }
}

/// The failures with the lowest pages, and how many there are.
#[derive(Default)]
struct Failures {
    lowest: Vec<(u64, String)>,
    total: u64,
}

impl Failures {
    fn add(&mut self, page: u64, text: String) {
        self.total += 1;
        let place = self.lowest.partition_point(|(other, _)| *other <= page);
        if place < FAILURES_MAX {
            self.lowest.insert(place, (page, text));
            self.lowest.truncate(FAILURES_MAX);
        }
    }

    fn into_texts(self) -> Vec<String> {
        self.lowest.into_iter().map(|(_, text)| text).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Pattern};
    use crate::layout::Layout;
    use crate::program::Program;
    use std::sync::atomic::Ordering;

    const LAST_STORES: [LastStore; 3] = [LastStore::Begun, LastStore::Logged, LastStore::Done];

    /// A guest of one virtual CPU, written by hand.
    struct Fixture {
        layout: Layout,
        program: Program,
        memory: Memory,
    }

    impl Fixture {
        fn new() -> Self {
            let config = Config {
                memory_bytes: 64 << 20,
                vcpus: 1,
                working_set_bytes: 4 << 20,
                dirty_rate_bytes_per_s: 10_000_000,
                pattern: Pattern::Random,
                ..Config::default()
            };
            let layout = Layout::new(&config).unwrap();
            let program = Program::new(&layout);
            let memory = Memory::new(config.memory_bytes).unwrap();
            let fixture = Self {
                layout,
                program,
                memory,
            };
            fixture.image().write_to(&fixture.memory);
            fixture
        }

        fn image(&self) -> Image<'_> {
            Image {
                layout: &self.layout,
                program: &self.program,
            }
        }

        fn share(&self) -> &Share {
            &self.layout.shares[0]
        }

        /// Does all stores of stamps 1 to `counter`, the last one as far as `last_store` says.
        fn run(&self, counter: u64, last_store: LastStore) -> Progress {
            let share = self.share();
            let mut header = 0;
            for stamp in 1..=counter {
                let page = share.page_of(stamp);
                if stamp < counter || last_store != LastStore::Begun {
                    self.memory
                        .word(share.log_page, page)
                        .store(stamp, Ordering::Relaxed);
                }
                if stamp < counter || last_store == LastStore::Done {
                    let word = layout::stamp_word(0) as u64;
                    self.memory
                        .word(share.first_page + page, word)
                        .store(stamp, Ordering::Relaxed);
                }
                if stamp < counter && stamp % share.batch == 0 {
                    header = stamp;
                }
            }
            let header_page = self.layout.header_page(0);
            self.memory
                .word(header_page, HEADER_COUNTER_WORD as u64)
                .store(header, Ordering::Relaxed);
            Progress {
                counter,
                last_store,
                header,
            }
        }

        fn check(&self, progress: Progress) -> CheckReport {
            check(self.image(), &self.memory, &[Ok(progress)], Device::None)
        }
    }

    #[test]
    fn a_fresh_image_passes() {
        let fixture = Fixture::new();
        let report = fixture.check(Progress {
            counter: 0,
            last_store: LastStore::Done,
            header: 0,
        });
        assert!(report.passed(), "{report}");
        assert_eq!((report.pages_checked, report.stamps), (16384, 0));
    }

    #[test]
    fn a_store_under_way_passes_exactly_where_the_program_says_it_is() {
        for actual in LAST_STORES {
            for claimed in LAST_STORES {
                let fixture = Fixture::new();
                let progress = fixture.run(5000, actual);
                let report = fixture.check(Progress {
                    last_store: claimed,
                    ..progress
                });
                assert_eq!(
                    report.passed(),
                    actual == claimed,
                    "{actual:?} as {claimed:?}: {report}"
                );
                assert!(report.stamps > 900, "{report}");
            }
        }
    }

    #[test]
    fn a_counter_that_is_one_too_low_or_too_high_fails() {
        let fixture = Fixture::new();
        let progress = fixture.run(5000, LastStore::Done);
        for counter in [4999, 5001] {
            assert!(
                !fixture
                    .check(Progress {
                        counter,
                        ..progress
                    })
                    .passed()
            );
        }
    }

    #[test]
    fn memory_that_is_stale_as_a_whole_fails() {
        let fixture = Fixture::new();
        let before = fixture.run(4000, LastStore::Done);
        assert!(fixture.check(before).passed());
        // The registers went on and the memory did not: log and pages agree with each other, and the check sees it.
        assert!(
            !fixture
                .check(Progress {
                    counter: 4001,
                    ..before
                })
                .passed()
        );
    }

    #[test]
    fn a_vcpu_outside_its_program_fails_by_name() {
        let fixture = Fixture::new();
        let report = check(
            fixture.image(),
            &fixture.memory,
            &[Err("vcpu0 is lost".to_owned())],
            Device::None,
        );
        assert_eq!(report.failures, ["vcpu0 is lost"]);
        assert!(!report.passed());
    }

    #[test]
    fn failures_are_bounded_and_counted_and_the_lowest_pages_are_told() {
        let fixture = Fixture::new();
        let progress = fixture.run(100, LastStore::Done);
        for page in (0..16384).rev() {
            fixture
                .memory
                .word(page, 100)
                .fetch_xor(1, Ordering::Relaxed);
        }
        let report = fixture.check(progress);
        assert_eq!(report.failures_total, 16384);
        assert_eq!(report.failures.len(), FAILURES_MAX);
        let told = |index: usize| report.failures[index].starts_with(&format!("page {index} "));
        assert!((0..FAILURES_MAX).all(told), "{:?}", report.failures);
    }
}
