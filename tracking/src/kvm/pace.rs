//! How long to wait until the dirty rings are harvested again.
//!
//! Too often costs the guest: each harvest protects pages again that it will write again. Too seldom lets a ring fill, and
//! then its vCPU stops until it is emptied. So the pause follows how fast the fastest ring fills. A machine without
//! clock or thread: the time is an argument.

use std::time::{Duration, Instant};

/// The part of a ring that is to be filled when it is harvested, as 1/this. A vCPU may then become four times as fast
/// during one pause before it stops.
const FILL_PART: u32 = 4;
/// The shortest pause: a harvest costs some ten microseconds and must not become the machine's main work.
const PAUSE_MIN: Duration = Duration::from_millis(2);
/// The longest pause: how late a vCPU that wakes up is noticed. At 600,000 entries a second it does not fill the biggest
/// ring by then.
const PAUSE_MAX: Duration = Duration::from_millis(100);

/// Chooses the pauses between harvests, and measures each vCPU's rate on the way.
#[derive(Clone, Debug)]
pub struct Pace {
    ring_entries: u32,
    last: Option<Instant>,
    /// Entries a second, per vCPU.
    rates: Vec<u64>,
}

impl Pace {
    /// For `vcpus` rings of `ring_entries` entries each.
    pub fn new(ring_entries: u32, vcpus: usize) -> Self {
        Self {
            ring_entries,
            last: None,
            rates: vec![0; vcpus],
        }
    }

    /// Takes note of what each vCPU's ring brought since the last call, and says how long to wait now.
    ///
    /// A rate that rises counts at once; one that falls counts by half each time, so that a vCPU that pauses for a
    /// moment is not left alone for long.
    pub fn next_pause(&mut self, now: Instant, entries: &[u64]) -> Duration {
        let Some(last) = self.last.replace(now) else {
            return PAUSE_MIN;
        };
        // Two harvests in the same microsecond say nothing about a rate.
        let elapsed_us = now.saturating_duration_since(last).as_micros().max(1);
        for (rate, &entries) in self.rates.iter_mut().zip(entries) {
            let seen =
                u64::try_from(u128::from(entries) * 1_000_000 / elapsed_us).unwrap_or(u64::MAX);
            *rate = seen.max(seen / 2 + *rate / 2);
        }
        let fastest = self.rates.iter().copied().max().unwrap_or(0).max(1);
        let fill = u64::from(self.ring_entries / FILL_PART);
        Duration::from_micros(fill * 1_000_000 / fastest).clamp(PAUSE_MIN, PAUSE_MAX)
    }

    /// Entries a second, in the order of the vCPUs. Duplicates count, so it is no less than the pages written.
    pub fn rates(&self) -> &[u64] {
        &self.rates
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(pace: &mut Pace, now: &mut Instant, ms: u64, entries: &[u64]) -> Duration {
        *now += Duration::from_millis(ms);
        pace.next_pause(*now, entries)
    }

    #[test]
    fn the_fastest_vcpu_sets_the_pause() {
        let (mut pace, mut now) = (Pace::new(65_536, 2), Instant::now());
        assert_eq!(
            pace.next_pause(now, &[9, 9]),
            PAUSE_MIN,
            "the first call knows no time"
        );
        // 16,384 entries at 1,000,000 a second take 16 ms.
        assert_eq!(
            after(&mut pace, &mut now, 10, &[100, 10_000]),
            Duration::from_micros(16_384)
        );
        assert_eq!(pace.rates(), [10_000, 1_000_000]);
    }

    #[test]
    fn the_pause_stays_inside_its_bounds() {
        let (mut pace, mut now) = (Pace::new(1024, 1), Instant::now());
        pace.next_pause(now, &[0]);
        assert_eq!(after(&mut pace, &mut now, 1, &[0]), PAUSE_MAX);
        assert_eq!(after(&mut pace, &mut now, 1, &[1024]), PAUSE_MIN);
        assert_eq!(
            after(&mut pace, &mut now, 0, &[u64::MAX]),
            PAUSE_MIN,
            "no time passed"
        );
    }

    #[test]
    fn a_rate_rises_at_once_and_falls_slowly() {
        let (mut pace, mut now) = (Pace::new(65_536, 1), Instant::now());
        pace.next_pause(now, &[0]);
        after(&mut pace, &mut now, 10, &[10_000]);
        after(&mut pace, &mut now, 10, &[0]);
        assert_eq!(pace.rates(), [500_000]);
        after(&mut pace, &mut now, 10, &[20_000]);
        assert_eq!(pace.rates(), [2_000_000]);
    }
}
