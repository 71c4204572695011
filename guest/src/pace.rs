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
}

impl Pace {
    /// One batch each `batch_ns` nanoseconds, from `now` on.
    pub(crate) fn new(batch_ns: u64, now: Instant) -> Self {
        // A century is for ever, and can be added to any clock.
        let batch = Duration::from_nanos(batch_ns).min(Duration::from_secs(100 * 365 * 86_400));
        Self { batch, due: now }
    }

    /// A batch ended at `now`: when the next one is due. In the past means at once.
    pub(crate) fn batch_ended(&mut self, now: Instant) -> Instant {
        self.due += self.batch;
        if let Some(earliest) = now.checked_sub(CATCH_UP_MAX) {
            self.due = self.due.max(earliest);
        }
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
        assert_eq!(pace.batch_ended(start + MS), start + 5 * MS);
        assert_eq!(pace.batch_ended(start + 9 * MS), start + 10 * MS);
    }

    #[test]
    fn a_short_delay_is_caught_up_and_a_long_one_is_forgiven() {
        let start = Instant::now();
        let mut pace = Pace::new(5_000_000, start);
        assert_eq!(pace.batch_ended(start + 40 * MS), start + 5 * MS);
        let late = start + Duration::from_secs(10);
        assert_eq!(pace.batch_ended(late), late - CATCH_UP_MAX);
    }

    #[test]
    fn the_longest_pace_does_not_overflow_the_clock() {
        let start = Instant::now();
        let mut pace = Pace::new(u64::MAX, start);
        assert!(pace.batch_ended(start) > start + Duration::from_secs(86_400));
    }
}
