//! How many lanes take pages at the same time.
//!
//! More lanes at work than the processors can serve only drive each other's pages out of the caches, between the checksum
//! and the kernel's copy. So at first only some lanes hold a permit, and the others wait. If those that hold one hardly use the
//! processors, then it is the network that limits, or a lane that stalls, and more lanes are what helps: from then on
//! there is a permit for every lane. It does not go back, since a network that was the limit once will be again.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::lock;

/// How long the use of the processors is watched before it is judged.
const WINDOW: Duration = Duration::from_millis(20);

/// A lane with a permit is busy if its thread ran for at least one part in so many of the window. On one host, where the
/// receiver's threads share the processors, two lanes a processor run for a quarter of the time each.
const BUSY_ONE_IN: u32 = 8;

#[derive(Debug)]
pub(super) struct LanePermits {
    permits_max: u32,
    /// There is a permit for every lane.
    all: AtomicBool,
    held: Mutex<u32>,
    /// What the threads of the lanes with a permit ran for in this window.
    ran_ns: AtomicU64,
    window: Mutex<Option<Window>>,
}

#[derive(Debug, Clone, Copy)]
struct Window {
    began: Instant,
    observed: Instant,
}

/// A lane's right to take pages. Dropping it lets another lane take its turn.
#[derive(Debug)]
pub(super) struct Permit<'c>(Option<&'c LanePermits>);

fn two_a_processor() -> u32 {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    u32::try_from(processors).map_or(u32::MAX, |count| count.saturating_mul(2))
}

impl LanePermits {
    /// `permits_max` of `lanes` at first; two for each processor if it was not set.
    pub(super) fn new(lanes: u32, permits_max: Option<u32>) -> Self {
        let permits_max = permits_max.unwrap_or_else(two_a_processor);
        Self {
            permits_max,
            all: AtomicBool::new(lanes <= permits_max),
            held: Mutex::new(0),
            ran_ns: AtomicU64::new(0),
            window: Mutex::new(None),
        }
    }

    /// A permit, if there is one. `all`: there is no time to lose, every lane gets one.
    pub(super) fn acquire(&self, all: bool) -> Option<Permit<'_>> {
        if all || self.all.load(Ordering::Relaxed) {
            return Some(Permit(None));
        }
        let mut held = lock(&self.held);
        if *held >= self.permits_max {
            return None;
        }
        *held += 1;
        Some(Permit(Some(self)))
    }

    /// A lane with a permit says how long its thread ran since it said so last.
    pub(super) fn ran(&self, time: Duration) {
        if !self.all.load(Ordering::Relaxed) {
            let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
            self.ran_ns.fetch_add(ns, Ordering::Relaxed);
        }
    }

    /// To be called by a lane that waits, every few milliseconds: whether those with a permit leave the processors idle.
    pub(super) fn observe(&self, now: Instant) {
        let mut window = lock(&self.window);
        match *window {
            // Nobody waited for a while, so nothing is known about that time.
            Some(w) if now.duration_since(w.observed) < WINDOW => {
                let time = now.duration_since(w.began);
                if time < WINDOW {
                    *window = Some(Window { observed: now, ..w });
                    return;
                }
                let ran = Duration::from_nanos(self.ran_ns.load(Ordering::Relaxed));
                if ran < time * self.permits_max / BUSY_ONE_IN {
                    self.all.store(true, Ordering::Relaxed);
                }
            }
            _ => {}
        }
        self.ran_ns.store(0, Ordering::Relaxed);
        *window = Some(Window {
            began: now,
            observed: now,
        });
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        if let Some(permits) = self.0 {
            *lock(&permits.held) -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(5);

    /// Looks for 50 ms, while the lanes with a permit run for `ran` in each 5 ms, all of them together.
    fn watch(permits: &LanePermits, ran: Duration) {
        let mut now = Instant::now();
        for _ in 0..10 {
            permits.observe(now);
            permits.ran(ran);
            now += STEP;
        }
    }

    #[test]
    fn a_permit_is_free_again_when_its_lane_leaves() {
        let permits = LanePermits::new(3, Some(2));
        let first = permits.acquire(false);
        let second = permits.acquire(false);
        assert!(first.is_some() && second.is_some());
        assert!(permits.acquire(false).is_none());
        drop(first);
        assert!(permits.acquire(false).is_some());
    }

    #[test]
    fn lanes_that_keep_the_processors_busy_stay_few() {
        let permits = LanePermits::new(8, Some(4));
        watch(&permits, STEP);
        let permits_max: Vec<_> = (0..8).filter_map(|_| permits.acquire(false)).collect();
        assert_eq!(permits_max.len(), 4);
    }

    #[test]
    fn lanes_that_wait_for_the_network_get_company() {
        let permits = LanePermits::new(8, Some(4));
        watch(&permits, STEP / 10);
        let permits_max: Vec<_> = (0..8).filter_map(|_| permits.acquire(false)).collect();
        assert_eq!(permits_max.len(), 8);
    }

    #[test]
    fn a_time_in_which_nobody_waited_says_nothing() {
        let permits = LanePermits::new(8, Some(4));
        let now = Instant::now();
        permits.observe(now);
        permits.observe(now + WINDOW * 3);
        let permits_max: Vec<_> = (0..8).filter_map(|_| permits.acquire(false)).collect();
        assert_eq!(permits_max.len(), 4);
    }

    #[test]
    fn with_the_guest_paused_every_lane_gets_a_permit() {
        let permits = LanePermits::new(8, Some(2));
        let permits_max: Vec<_> = (0..8).filter_map(|_| permits.acquire(true)).collect();
        assert_eq!(permits_max.len(), 8);
    }
}
