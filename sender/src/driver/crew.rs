//! How many lanes take pages at the same time.
//!
//! More lanes at work than the processors can serve only drive each other's pages out of the caches, between the checksum
//! and the kernel's copy. So at first only some lanes have a seat, and the others wait. If those that sit hardly use the
//! processors, then it is the network that limits, or a lane that stalls, and more lanes are what helps: from then on
//! there is a seat for everybody. It does not go back, since a network that was the limit once will be again.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::lock;

/// How long the use of the processors is watched before it is judged.
const WINDOW: Duration = Duration::from_millis(20);

/// A lane that sits is busy if its thread ran for at least one part in so many of the window. On one host, where the
/// receiver's threads share the processors, two lanes a processor run for a quarter of the time each.
const BUSY_ONE_IN: u32 = 8;

#[derive(Debug)]
pub(super) struct Crew {
    seats: u32,
    /// There is a seat for everybody.
    all: AtomicBool,
    seated: Mutex<u32>,
    /// What the threads of the lanes that sit ran for in this window.
    ran_ns: AtomicU64,
    window: Mutex<Option<Window>>,
}

#[derive(Debug, Clone, Copy)]
struct Window {
    began: Instant,
    looked: Instant,
}

/// A lane's right to take pages. Dropping it lets another lane sit down.
#[derive(Debug)]
pub(super) struct Seat<'c>(Option<&'c Crew>);

fn two_a_processor() -> u32 {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    u32::try_from(processors).map_or(u32::MAX, |count| count.saturating_mul(2))
}

impl Crew {
    /// `seats` of `lanes` at first; two for each processor if it was not set.
    pub(super) fn new(lanes: u32, seats: Option<u32>) -> Self {
        let seats = seats.unwrap_or_else(two_a_processor);
        Self {
            seats,
            all: AtomicBool::new(lanes <= seats),
            seated: Mutex::new(0),
            ran_ns: AtomicU64::new(0),
            window: Mutex::new(None),
        }
    }

    /// A seat, if there is one. `all`: there is no time to lose, everybody sits.
    pub(super) fn sit(&self, all: bool) -> Option<Seat<'_>> {
        if all || self.all.load(Ordering::Relaxed) {
            return Some(Seat(None));
        }
        let mut seated = lock(&self.seated);
        if *seated >= self.seats {
            return None;
        }
        *seated += 1;
        Some(Seat(Some(self)))
    }

    /// A lane that sits says how long its thread ran since it said so last.
    pub(super) fn ran(&self, time: Duration) {
        if !self.all.load(Ordering::Relaxed) {
            let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
            self.ran_ns.fetch_add(ns, Ordering::Relaxed);
        }
    }

    /// To be called by a lane that waits, every few milliseconds: whether those that sit leave the processors idle.
    pub(super) fn look(&self, now: Instant) {
        let mut window = lock(&self.window);
        match *window {
            // Nobody waited for a while, so nothing is known about that time.
            Some(w) if now.duration_since(w.looked) < WINDOW => {
                let time = now.duration_since(w.began);
                if time < WINDOW {
                    *window = Some(Window { looked: now, ..w });
                    return;
                }
                let ran = Duration::from_nanos(self.ran_ns.load(Ordering::Relaxed));
                if ran < time * self.seats / BUSY_ONE_IN {
                    self.all.store(true, Ordering::Relaxed);
                }
            }
            _ => {}
        }
        self.ran_ns.store(0, Ordering::Relaxed);
        *window = Some(Window {
            began: now,
            looked: now,
        });
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        if let Some(crew) = self.0 {
            *lock(&crew.seated) -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(5);

    /// Looks for 50 ms, while the lanes that sit run for `ran` in each 5 ms, all of them together.
    fn watch(crew: &Crew, ran: Duration) {
        let mut now = Instant::now();
        for _ in 0..10 {
            crew.look(now);
            crew.ran(ran);
            now += STEP;
        }
    }

    #[test]
    fn a_seat_is_free_again_when_its_lane_leaves() {
        let crew = Crew::new(3, Some(2));
        let first = crew.sit(false);
        let second = crew.sit(false);
        assert!(first.is_some() && second.is_some());
        assert!(crew.sit(false).is_none());
        drop(first);
        assert!(crew.sit(false).is_some());
    }

    #[test]
    fn lanes_that_keep_the_processors_busy_stay_few() {
        let crew = Crew::new(8, Some(4));
        watch(&crew, STEP);
        let seats: Vec<_> = (0..8).filter_map(|_| crew.sit(false)).collect();
        assert_eq!(seats.len(), 4);
    }

    #[test]
    fn lanes_that_wait_for_the_network_get_company() {
        let crew = Crew::new(8, Some(4));
        watch(&crew, STEP / 10);
        let seats: Vec<_> = (0..8).filter_map(|_| crew.sit(false)).collect();
        assert_eq!(seats.len(), 8);
    }

    #[test]
    fn a_time_in_which_nobody_waited_says_nothing() {
        let crew = Crew::new(8, Some(4));
        let now = Instant::now();
        crew.look(now);
        crew.look(now + WINDOW * 3);
        let seats: Vec<_> = (0..8).filter_map(|_| crew.sit(false)).collect();
        assert_eq!(seats.len(), 4);
    }

    #[test]
    fn with_the_guest_paused_everybody_sits() {
        let crew = Crew::new(8, Some(2));
        let seats: Vec<_> = (0..8).filter_map(|_| crew.sit(true)).collect();
        assert_eq!(seats.len(), 8);
    }
}
