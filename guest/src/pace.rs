//! When the next batch may begin.
//!
//! No clock in here: the time is an argument. A virtual CPU that fell behind catches up, but by no more than
//! [`CATCH_UP_MAX`], so that a host that was busy for a while is not answered by a storm.

use std::time::{Duration, Instant};

/// How far behind its pace a virtual CPU may be and still catch up.
pub(crate) const CATCH_UP_MAX: Duration = Duration::from_millis(50);

/// The pace of one virtual CPU.
#[derive(Debug)]
pub(crate) struct Pace {
    batch: Duration,
    due: Instant,
    /// When the present batch began.
    began: Instant,
}

impl Pace {
    /// One batch each `batch_ns` nanoseconds, from `now` on.
    pub(crate) fn new(batch_ns: u64, now: Instant) -> Self {
        // A century is for ever, and can be added to any clock.
        let batch = Duration::from_nanos(batch_ns).min(Duration::from_secs(100 * 365 * 86_400));
        Self {
            batch,
            due: now,
            began: now,
        }
    }

    /// A batch ended at `now`: when the next one is due. In the past means at once. With `held_back` percent of its time held back, the
    /// batch lasts as much longer as the virtual CPU runs less, and nothing is caught up.
    pub(crate) fn batch_ended(&mut self, now: Instant, held_back: u8) -> Instant {
        if held_back == 0 {
            self.due += self.batch;
            if let Some(earliest) = now.checked_sub(CATCH_UP_MAX) {
                self.due = self.due.max(earliest);
            }
        } else {
            let took = self.batch.max(now.saturating_duration_since(self.began));
            let rest = 100 - u32::from(held_back.min(99));
            self.due = self.began + took / rest * 100;
        }
        self.began = self.due.max(now);
        self.due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn batches_are_due_at_equal_distances_whatever_they_took() {
        let start = Instant::now();
        let mut pace = Pace::new(5_000_000, start);
        assert_eq!(pace.batch_ended(start + MS, 0), start + 5 * MS);
        assert_eq!(pace.batch_ended(start + 9 * MS, 0), start + 10 * MS);
    }

    #[test]
    fn a_short_delay_is_caught_up_and_a_long_one_is_forgiven() {
        let start = Instant::now();
        let mut pace = Pace::new(5_000_000, start);
        assert_eq!(pace.batch_ended(start + 40 * MS, 0), start + 5 * MS);
        let late = start + Duration::from_secs(10);
        assert_eq!(pace.batch_ended(late, 0), late - CATCH_UP_MAX);
    }

    #[test]
    fn what_is_held_back_stretches_the_pace_and_what_a_batch_took() {
        let start = Instant::now();
        let mut pace = Pace::new(5_000_000, start);
        // Half of its time: a batch of 5 ms lasts 10.
        assert_eq!(pace.batch_ended(start + MS, 50), start + 10 * MS);
        assert_eq!(pace.batch_ended(start + 11 * MS, 50), start + 20 * MS);
        // One that took 8 ms lasts 40 at a fifth.
        assert_eq!(pace.batch_ended(start + 28 * MS, 80), start + 60 * MS);
        // Released: its own pace again, from where it is.
        assert_eq!(pace.batch_ended(start + 61 * MS, 0), start + 65 * MS);
        // A batch that nothing paces lasts as long as it takes.
        let mut busy = Pace::new(0, start);
        assert_eq!(busy.batch_ended(start + 6 * MS, 75), start + 24 * MS);
    }

    #[test]
    fn the_longest_pace_does_not_overflow_the_clock() {
        let start = Instant::now();
        let mut pace = Pace::new(u64::MAX, start);
        assert!(pace.batch_ended(start, 0) > start + Duration::from_secs(86_400));
    }
}
