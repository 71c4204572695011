//! What a virtual CPU does, as arithmetic: which page gets which stamp.
//!
//! A virtual CPU counts its stores: 1, 2, 3 … is its counter and the stamp that it stores. The page that stamp *s* goes
//! to is a function of *s* alone ([`Share::page_of`]), so nothing but the counter has to be known to say what every page
//! of the share must hold: walk the counter backwards, and the first stamp that falls on a page is the one it holds
//! ([`Share::last_stamps`]). The counter travels in a register, outside the memory that is migrated: memory that is
//! stale as a whole, log and all, is still found out.
//!
//! The program of the machine ([`crate::program`]) and the threads of the process guest do the same arithmetic.

use crate::config::{Config, PAGE_BYTES, Pattern};

/// Batches a second that the pace aims at: fine enough to be smooth, coarse enough to cost little.
const BATCHES_PER_S: u64 = 200;

/// Most stores in a batch.
///
/// KVM asks for a harvest of a nearly full dirty ring when a vCPU *enters*, with 64 entries in reserve
/// (KVM_DIRTY_RING_RSVD_ENTRIES). A KVM that emulates pushes an entry for each store and may not look again before the
/// next exit; past the end of the ring it overwrites what was not harvested, and from then on kernel and harvester
/// disagree about where the next entry is. Two entries for each store and one for the header, 63 in all, can never
/// get there.
const BATCH_STORES_MAX: u64 = 31;

/// Time between two heart-beats of an idle guest.
const IDLE_BEAT_NS: u64 = 20_000_000;

/// Odd, with bits all over: the second multiplier of the hash that picks random pages.
pub(crate) const MIX: u64 = 0xBF58_476D_1CE4_E5B9;

/// One virtual CPU's part of the working set, and how it writes it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Share {
    /// 0-based index of the virtual CPU.
    pub(crate) vcpu: u32,
    /// First page of the share.
    pub(crate) first_page: u64,
    /// Pages of the share.
    pub(crate) pages: u64,
    /// First page of its log.
    pub(crate) log_page: u64,
    /// Stores between two heart-beats; 0 for an idle guest.
    pub(crate) batch: u64,
    /// Nanoseconds from one heart-beat to the next at the wanted rate.
    pub(crate) batch_ns: u64,
    /// First multiplier of the hash that picks random pages; odd.
    pub(crate) weyl: u64,
    /// The order of the writes.
    pub(crate) pattern: Pattern,
}

impl Share {
    pub(crate) fn new(
        config: &Config,
        vcpu: u32,
        first_page: u64,
        pages: u64,
        log_page: u64,
    ) -> Self {
        let vcpus = u64::from(config.vcpus);
        let rate = config.dirty_rate_bytes_per_s;
        let batch = match rate {
            0 => 0,
            _ => (rate / PAGE_BYTES / vcpus / BATCHES_PER_S).clamp(1, BATCH_STORES_MAX),
        };
        let batch_ns = match rate {
            0 => IDLE_BEAT_NS,
            _ => {
                let wanted =
                    u128::from(batch * vcpus * PAGE_BYTES) * 1_000_000_000 / u128::from(rate);
                u64::try_from(wanted).unwrap_or(u64::MAX)
            }
        };
        let weyl = mix(config.seed ^ u64::from(vcpu).rotate_left(32)) | 1;
        Self {
            vcpu,
            first_page,
            pages,
            log_page,
            batch,
            batch_ns,
            weyl,
            pattern: config.pattern,
        }
    }

    /// The page, counted from the share's start, that stamp `stamp` goes to.
    ///
    /// Sequential: the remainder by the share's pages. Random: multiply, reverse the bytes so that the well-mixed high
    /// ones come low, square (without it neighbouring stamps are a few hundred fixed steps apart), multiply again, and
    /// take the high half of the product with the number of pages. Few instructions, because the machine may emulate
    /// each of them.
    #[inline]
    pub(crate) fn page_of(&self, stamp: u64) -> u64 {
        match self.pattern {
            Pattern::Sequential => stamp % self.pages,
            Pattern::Random => {
                let spread = stamp.wrapping_mul(self.weyl).swap_bytes();
                let hash = spread.wrapping_mul(spread).wrapping_mul(MIX);
                ((u128::from(hash) * u128::from(self.pages)) >> 64) as u64
            }
        }
    }

    /// For each page of the share, the last stamp not above `counter` that went there; 0 for none.
    ///
    /// `None` if that would take more than [`replay_steps_max`](Self::replay_steps_max) steps, which no counter that
    /// a guest reached by counting needs.
    pub(crate) fn last_stamps(&self, counter: u64) -> Option<Vec<u64>> {
        let mut stamps = vec![0; self.pages as usize];
        let mut missing = self.pages;
        let mut steps_left = self.replay_steps_max();
        let mut stamp = counter;
        while stamp > 0 && missing > 0 {
            steps_left = steps_left.checked_sub(1)?;
            let last = &mut stamps[self.page_of(stamp) as usize];
            if *last == 0 {
                *last = stamp;
                missing -= 1;
            }
            stamp -= 1;
        }
        Some(stamps)
    }

    /// Steps after which a replay gives up.
    ///
    /// Drawing at random until each of n pages came once takes n · (ln n + x) draws, and more with a chance of e^-x.
    /// 64 covers 2^32 pages with x = 41.
    fn replay_steps_max(&self) -> u64 {
        self.pages.saturating_mul(64).saturating_add(1024)
    }
}

/// A bijection of 64-bit words that leaves no bit of its input recognisable (two rounds of multiply and fold).
#[inline]
pub(crate) fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 32))
        .wrapping_add(0x9E37_79B9_7F4A_7C15)
        .wrapping_mul(MIX);
    let word = (word ^ (word >> 29)).wrapping_mul(0x94D0_49BB_1331_11EB);
    word ^ (word >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(pattern: Pattern, pages: u64) -> Share {
        let config = Config {
            pattern,
            ..Config::default()
        };
        Share::new(&config, 1, 1000, pages, 100)
    }

    #[test]
    fn random_pages_are_uniform() {
        for pages in [1, 2, 7, 1000, 1 << 15] {
            let share = share(Pattern::Random, pages);
            let mut hits = vec![0u64; pages as usize];
            let draws = pages * 200;
            (1..=draws).for_each(|stamp| hits[share.page_of(stamp) as usize] += 1);
            // Each page is expected 200 times with a deviation of 14.1; 6 deviations are never passed by chance.
            assert!(
                hits.iter().all(|count| (115..=285).contains(count)),
                "{pages} pages"
            );
            // The spread must be that of chance and not smaller: pages are drawn, not dealt.
            let spread = hits
                .iter()
                .map(|count| count.abs_diff(200).pow(2))
                .sum::<u64>()
                / pages;
            assert!(
                pages < 1000 || (100..400).contains(&spread),
                "{pages} pages: {spread}"
            );
        }
    }

    /// Of 10,000 draws out of 32,768 pages, chance leaves 8,613 different ones, give or take 31; the steps from one draw
    /// to the next, and the steps of those steps, are as varied.
    #[test]
    fn random_pages_neither_walk_in_steps_nor_in_steps_of_steps() {
        let share = share(Pattern::Random, 1 << 15);
        let mut series: Vec<u64> = (1..=10_000).map(|stamp| share.page_of(stamp)).collect();
        for order in 0..4 {
            let different = series
                .iter()
                .collect::<std::collections::HashSet<_>>()
                .len();
            assert!(
                (8_400..8_800).contains(&different),
                "order {order}: {different}"
            );
            series = series
                .windows(2)
                .map(|pair| pair[1].wrapping_sub(pair[0]) % (1 << 15))
                .collect();
        }
    }

    #[test]
    fn sequential_pages_wrap_around() {
        let share = share(Pattern::Sequential, 3);
        assert_eq!(
            (1..=6)
                .map(|stamp| share.page_of(stamp))
                .collect::<Vec<_>>(),
            [1, 2, 0, 1, 2, 0]
        );
    }

    #[test]
    fn last_stamps_equal_a_replay_from_the_start() {
        for pattern in [Pattern::Random, Pattern::Sequential] {
            let share = share(pattern, 50);
            let mut replayed = vec![0; 50];
            for counter in 0..2000 {
                if counter > 0 {
                    replayed[share.page_of(counter) as usize] = counter;
                }
                assert_eq!(
                    share.last_stamps(counter).as_deref(),
                    Some(&replayed[..]),
                    "{pattern:?} {counter}"
                );
            }
        }
    }

    #[test]
    fn last_stamps_of_a_huge_counter_take_bounded_steps() {
        for pages in [1, 2, 1000, 1 << 20] {
            let stamps = share(Pattern::Random, pages)
                .last_stamps(u64::MAX - 7)
                .unwrap();
            assert!(stamps.iter().all(|stamp| *stamp > 0));
        }
    }

    #[test]
    fn rate_decides_batch_and_time() {
        let share = |rate, vcpus| {
            Share::new(
                &Config {
                    dirty_rate_bytes_per_s: rate,
                    vcpus,
                    ..Config::default()
                },
                0,
                0,
                10,
                0,
            )
        };
        let of = |rate, vcpus| (share(rate, vcpus).batch, share(rate, vcpus).batch_ns);
        assert_eq!(of(0, 2), (0, IDLE_BEAT_NS));
        // 10 MB/s over two: 1,220 pages/s each, 6 in a batch, 4.9152 ms.
        assert_eq!(of(10_000_000, 2), (6, 4_915_200));
        // 100 MB/s over two: 12,207 pages/s each, 61 would be 5 ms and 31 are allowed: 2.53952 ms.
        assert_eq!(of(100_000_000, 2), (31, 2_539_520));
        assert_eq!(of(1, 1), (1, 4_096_000_000_000));
        assert_eq!(of(u64::MAX, 16), (BATCH_STORES_MAX, 0));
    }
}
