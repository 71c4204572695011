//! Where everything is in the guest's memory.
//!
//! Memory is numbered in pages from 0, without the hole that a PC has below 4 GiB; the guest's page tables map this
//! numbering to its virtual addresses, so that guest-virtual address = page × 4,096, and only the region table knows
//! of the hole.
//!
//! ```text
//!   page 0        nothing, stays zero: catches stray stores
//!        1        the program
//!        2        page map (one entry)
//!        3        page directory pointers, one for each GiB
//!        4 …      page directories, one page for each GiB, 2 MiB entries
//!        … …      headers, one page for each virtual CPU: what it was told, and its counter
//!        … …      logs, one u64 for each page of its share: the last stamp that it stored there
//!        … …      plain pages: never written after the start
//!        … end    working set: one contiguous share for each virtual CPU
//!
//!   region 0: guest-physical 0 … 3 GiB at most;   region 1: the rest, from 4 GiB on
//! ```
//!
//! The working set is at the top so that a guest of more than 3 GiB dirties both regions: its log in the lower one.

use crate::config::{Config, PAGE_BYTES, Pattern, refuse};
use crate::error::Result;
use crate::workload::Share;

/// 64-bit words in a page.
pub(crate) const PAGE_WORDS: usize = 512;

/// The words of one page.
pub(crate) type PageWords = [u64; PAGE_WORDS];

/// Where the hole for devices begins: memory beyond this goes to [`HIGH_ADDRESS`].
pub(crate) const LOW_BYTES_MAX: u64 = 3 << 30;

/// Guest-physical address of the second region.
pub(crate) const HIGH_ADDRESS: u64 = 4 << 30;

/// Page of the program.
pub(crate) const PROGRAM_PAGE: u64 = 1;

/// Page of the page map (the root of the page tables).
pub(crate) const PAGE_MAP_PAGE: u64 = 2;

/// Page of the page directory pointers.
pub(crate) const POINTERS_PAGE: u64 = 3;

/// First page of the page directories.
pub(crate) const DIRECTORIES_PAGE: u64 = 4;

/// Word of a header page that holds the counter at the end of the last batch.
pub(crate) const HEADER_COUNTER_WORD: usize = 8;

/// Word of a working-set page that holds the stamp of virtual CPU 0; the others follow it.
const STAMP_WORD_FIRST: usize = 8;

const BYTES_PER_DIRECTORY: u64 = 1 << 30;

/// The map of one guest's memory.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    /// Pages of memory.
    pub(crate) pages: u64,
    /// Page directories.
    pub(crate) directories: u64,
    /// First header page.
    pub(crate) headers_page: u64,
    /// First page that is not a table, header or log.
    pub(crate) plain_page: u64,
    /// First page of the working set.
    pub(crate) working_set_page: u64,
    /// Pages below this one are filled at the start.
    pub(crate) filled_pages: u64,
    /// Of those, the percentage left zero.
    pub(crate) zero_percent: u64,
    /// Seed of everything pseudo-random.
    pub(crate) seed: u64,
    /// The order of the writes.
    pub(crate) pattern: Pattern,
    /// One for each virtual CPU.
    pub(crate) shares: Vec<Share>,
}

/// What a page is for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Purpose<'a> {
    /// Zero, program or page table.
    Fixed,
    /// The header of a virtual CPU.
    Header(&'a Share),
    /// A page of a log, counted from the log's start.
    Log(&'a Share, u64),
    /// Never written after the start.
    Plain,
    /// A page of a share, counted from the share's start.
    Work(&'a Share, u64),
}

impl Layout {
    /// The layout of a guest of this configuration.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a field out of bounds, or a working set that does not fit.
    pub(crate) fn new(config: &Config) -> Result<Self> {
        config.validate_fields()?;
        let pages = config.memory_bytes / PAGE_BYTES;
        let working_set_pages = config.working_set_bytes / PAGE_BYTES;
        let vcpus = u64::from(config.vcpus);
        let directories = config.memory_bytes.div_ceil(BYTES_PER_DIRECTORY);
        let headers_page = DIRECTORIES_PAGE + directories;
        let logs_page = headers_page + vcpus;
        if config.dirty_rate_bytes_per_s > 0 && working_set_pages < vcpus {
            let advice = format!(
                "give at least {} bytes, one page for each virtual CPU, or a dirty rate of 0",
                vcpus * PAGE_BYTES
            );
            return Err(refuse(
                "working_set_bytes",
                config.working_set_bytes,
                advice,
            ));
        }
        let need = |working_set_pages: u64| {
            logs_page + log_pages_total(working_set_pages, vcpus) + working_set_pages
        };
        if need(working_set_pages) > pages {
            let advice = format!(
                "give at most {} bytes, or more memory: the guest keeps its page tables and its log beside it",
                largest_working_set(pages, need) * PAGE_BYTES
            );
            return Err(refuse(
                "working_set_bytes",
                config.working_set_bytes,
                advice,
            ));
        }
        let working_set_page = pages - working_set_pages;
        let mut first_page = working_set_page;
        let mut log_page = logs_page;
        let mut shares = Vec::new();
        for vcpu in 0..config.vcpus {
            let share_pages = share_pages(working_set_pages, vcpus, u64::from(vcpu));
            shares.push(Share::new(config, vcpu, first_page, share_pages, log_page));
            first_page += share_pages;
            log_page += log_pages(share_pages);
        }
        Ok(Self {
            pages,
            directories,
            headers_page,
            plain_page: log_page,
            working_set_page,
            filled_pages: pages * u64::from(config.fill.filled_percent) / 100,
            zero_percent: u64::from(config.fill.zero_percent),
            seed: config.seed,
            pattern: config.pattern,
            shares,
        })
    }

    /// What page `page` is for.
    pub(crate) fn purpose(&self, page: u64) -> Purpose<'_> {
        if page >= self.working_set_page {
            let share = self
                .shares
                .iter()
                .rev()
                .find(|share| share.first_page <= page);
            return share.map_or(Purpose::Plain, |share| {
                Purpose::Work(share, page - share.first_page)
            });
        }
        if page >= self.plain_page {
            return Purpose::Plain;
        }
        if page < self.headers_page {
            return Purpose::Fixed;
        }
        let index = (page - self.headers_page) as usize;
        if let Some(share) = self.shares.get(index) {
            return Purpose::Header(share);
        }
        let share = self
            .shares
            .iter()
            .rev()
            .find(|share| share.log_page <= page);
        share.map_or(Purpose::Plain, |share| {
            Purpose::Log(share, page - share.log_page)
        })
    }

    /// Page of the header of virtual CPU `vcpu`.
    pub(crate) fn header_page(&self, vcpu: u32) -> u64 {
        self.headers_page + u64::from(vcpu)
    }
}

/// Word of a working-set page in which virtual CPU `vcpu` stores its stamp.
pub(crate) fn stamp_word(vcpu: u32) -> usize {
    STAMP_WORD_FIRST + vcpu as usize
}

/// The regions of `memory_bytes` of memory: guest-physical address and bytes, lowest first.
pub(crate) fn regions(memory_bytes: u64) -> Vec<(u64, u64)> {
    let low = memory_bytes.min(LOW_BYTES_MAX);
    let mut regions = vec![(0, low)];
    if memory_bytes > low {
        regions.push((HIGH_ADDRESS, memory_bytes - low));
    }
    regions
}

/// Guest-physical address of page `page`.
pub(crate) fn guest_address(page: u64) -> u64 {
    let offset = page * PAGE_BYTES;
    if offset < LOW_BYTES_MAX {
        offset
    } else {
        offset - LOW_BYTES_MAX + HIGH_ADDRESS
    }
}

/// Pages of the share of virtual CPU `vcpu`; the first ones take what does not divide.
fn share_pages(working_set_pages: u64, vcpus: u64, vcpu: u64) -> u64 {
    working_set_pages / vcpus + u64::from(vcpu < working_set_pages % vcpus)
}

fn log_pages(share_pages: u64) -> u64 {
    share_pages.div_ceil(PAGE_WORDS as u64)
}

fn log_pages_total(working_set_pages: u64, vcpus: u64) -> u64 {
    (0..vcpus)
        .map(|vcpu| log_pages(share_pages(working_set_pages, vcpus, vcpu)))
        .sum()
}

/// The most pages for which `need` stays within `pages`; `need` grows with its argument.
fn largest_working_set(pages: u64, need: impl Fn(u64) -> u64) -> u64 {
    let (mut fits, mut too_many) = (0, pages + 1);
    while too_many - fits > 1 {
        let middle = fits + (too_many - fits) / 2;
        if need(middle) <= pages {
            fits = middle
        } else {
            too_many = middle
        }
    }
    fits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(memory_bytes: u64, vcpus: u32, working_set_bytes: u64) -> Layout {
        Layout::new(&Config {
            memory_bytes,
            vcpus,
            working_set_bytes,
            ..Config::default()
        })
        .unwrap()
    }

    #[test]
    fn one_region_up_to_three_gib_and_two_above() {
        assert_eq!(regions(64 << 20), [(0, 64 << 20)]);
        assert_eq!(regions(3 << 30), [(0, 3 << 30)]);
        assert_eq!(regions((3 << 30) + 4096), [(0, 3 << 30), (4 << 30, 4096)]);
        assert_eq!(regions(5 << 30), [(0, 3 << 30), (4 << 30, 2 << 30)]);
    }

    #[test]
    fn guest_address_jumps_over_the_hole() {
        assert_eq!(guest_address((3 << 30) / 4096 - 1), (3 << 30) - 4096);
        assert_eq!(guest_address((3 << 30) / 4096), 4 << 30);
    }

    #[test]
    fn every_page_has_one_purpose_and_the_purposes_follow_each_other() {
        for vcpus in [1, 2, 3, 16] {
            let layout = layout(64 << 20, vcpus, (10 << 20) + 3 * 4096);
            let mut kinds = Vec::new();
            let mut work = 0;
            for page in 0..layout.pages {
                let purpose = layout.purpose(page);
                let kind = match purpose {
                    Purpose::Fixed => "fixed",
                    Purpose::Header(share) => {
                        assert_eq!(layout.header_page(share.vcpu), page);
                        "header"
                    }
                    Purpose::Log(share, index) => {
                        assert!(index < log_pages(share.pages), "page {page}");
                        "log"
                    }
                    Purpose::Plain => "plain",
                    Purpose::Work(share, index) => {
                        assert!(index < share.pages, "page {page}");
                        work += 1;
                        "work"
                    }
                };
                if kinds.last() != Some(&kind) {
                    kinds.push(kind);
                }
            }
            assert_eq!(kinds, ["fixed", "header", "log", "plain", "work"]);
            assert_eq!(work, (10 << 20) / 4096 + 3);
        }
    }

    #[test]
    fn shares_are_disjoint_and_cover_the_working_set() {
        let layout = layout(64 << 20, 3, 10 * 4096);
        let shares: Vec<_> = layout
            .shares
            .iter()
            .map(|s| (s.first_page, s.pages))
            .collect();
        assert_eq!(shares, [(16374, 4), (16378, 3), (16381, 3)]);
    }

    #[test]
    fn the_working_set_of_a_two_region_guest_is_in_the_upper_region() {
        let layout = layout(5 << 30, 2, 256 << 20);
        assert!(guest_address(layout.working_set_page) > HIGH_ADDRESS);
        assert!(guest_address(layout.plain_page) < LOW_BYTES_MAX);
    }
}
