//! The bandwidth cap: says how long to wait before the next frame may be sent.
//!
//! A generic cell rate rule over one atomic: each frame moves the "line is free again at" instant on by its bytes at
//! the capped rate, and is sent when that instant's burst allowance has been reached. No lock, no thread, no clock inside.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How far the line may be ahead of the cap: enough that lanes need not wake for every frame.
const BURST: Duration = Duration::from_millis(5);

/// A cap that all lanes share.
#[derive(Debug)]
pub struct Pacer {
    octets_per_second: Option<u64>,
    free_at_ns: AtomicU64,
}

impl Pacer {
    /// `None` caps nothing.
    #[must_use]
    pub fn new(octets_per_second: Option<u64>) -> Self {
        Self {
            octets_per_second: octets_per_second.filter(|rate| *rate > 0),
            free_at_ns: AtomicU64::new(0),
        }
    }

    /// Books `octets` at `now` (time since any fixed start); the caller waits for the returned time and then sends.
    #[must_use = "the cap holds only if the caller waits"]
    pub fn book(&self, octets: u64, now: Duration) -> Duration {
        let Some(rate) = self.octets_per_second else {
            return Duration::ZERO;
        };
        let now_ns = nanos(now);
        let cost_ns = u64::try_from(u128::from(octets) * 1_000_000_000 / u128::from(rate))
            .unwrap_or(u64::MAX);
        let mut free_at = self.free_at_ns.load(Ordering::Relaxed);
        loop {
            let begin = free_at.max(now_ns);
            match self.free_at_ns.compare_exchange_weak(
                free_at,
                begin.saturating_add(cost_ns),
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => {
                    return Duration::from_nanos(
                        begin.saturating_sub(now_ns.saturating_add(nanos(BURST))),
                    );
                }
                Err(seen) => free_at = seen,
            }
        }
    }
}

fn nanos(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_cap_nobody_waits() {
        assert_eq!(
            Pacer::new(None).book(u64::MAX, Duration::ZERO),
            Duration::ZERO
        );
    }

    #[test]
    fn over_a_second_the_cap_is_kept_but_for_the_burst() {
        let pacer = Pacer::new(Some(10_000_000));
        let (mut now, mut sent) = (Duration::ZERO, 0u64);
        while now < Duration::from_secs(1) {
            now += pacer.book(100_000, now);
            sent += 100_000;
        }
        // One second at the cap, 5 ms of burst, the frame that was begun at the second's end and the one that ended the loop.
        assert!(
            (10_000_000..=10_000_000 + 50_000 + 200_000).contains(&sent),
            "{sent}"
        );
    }

    #[test]
    fn an_idle_line_saves_nothing_up_beyond_the_burst() {
        let pacer = Pacer::new(Some(1_000_000));
        assert_eq!(pacer.book(1, Duration::from_secs(3600)), Duration::ZERO);
        let wait = pacer.book(1_000_000, Duration::from_secs(3600))
            + pacer.book(1, Duration::from_secs(3600));
        assert!(wait > Duration::from_millis(990), "{wait:?}");
    }
}
