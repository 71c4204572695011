//! Heart-beats: what each virtual CPU reported last, and when.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What one virtual CPU reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// 0-based index of the virtual CPU.
    pub vcpu: u32,
    /// Heart-beats since this guest was made or loaded in this process.
    pub beats: u64,
    /// The guest's own counter at the last one: stores (of an idle guest: heart-beats) since the guest's very first
    /// start, wherever that was. Before the first heart-beat of a loaded guest, the counter it arrived with.
    pub counter: u64,
    /// Time since the last one; `None` before the first.
    pub age: Option<Duration>,
}

/// The last heart-beat of one virtual CPU. Written by its thread, read by anybody.
#[derive(Debug)]
pub(crate) struct Beat {
    born: Instant,
    beats: AtomicU64,
    counter: AtomicU64,
    /// Nanoseconds from `born` to the last heart-beat.
    at_ns: AtomicU64,
}

impl Beat {
    pub(crate) fn new() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            born: Instant::now(),
            beats: zero(),
            counter: zero(),
            at_ns: zero(),
        }
    }

    /// Sets what the counter was when the guest arrived.
    pub(crate) fn arrive(&self, counter: u64) {
        self.counter.store(counter, Ordering::Relaxed);
    }

    /// A heart-beat with the low half of the counter, which grew by less than 2^32 since the last one.
    pub(crate) fn report_low(&self, low: u32) {
        let last = self.counter.load(Ordering::Relaxed);
        let grown = low.wrapping_sub(last as u32);
        self.report(last.wrapping_add(u64::from(grown)));
    }

    /// A heart-beat with the counter.
    pub(crate) fn report(&self, counter: u64) {
        let at = u64::try_from(self.born.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.counter.store(counter, Ordering::Relaxed);
        self.at_ns.store(at, Ordering::Relaxed);
        self.beats.fetch_add(1, Ordering::Release);
    }

    /// What a caller may see.
    pub(crate) fn read(&self, vcpu: u32) -> Heartbeat {
        let beats = self.beats.load(Ordering::Acquire);
        let at = Duration::from_nanos(self.at_ns.load(Ordering::Relaxed));
        let age = (beats > 0).then(|| self.born.elapsed().saturating_sub(at));
        Heartbeat {
            vcpu,
            beats,
            counter: self.counter.load(Ordering::Relaxed),
            age,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_low_half_is_extended_over_its_wrap() {
        let beat = Beat::new();
        beat.arrive(0x0000_0007_FFFF_FFF0);
        beat.report_low(0xFFFF_FFFF);
        assert_eq!(beat.read(0).counter, 0x0000_0007_FFFF_FFFF);
        beat.report_low(0x0000_0010);
        assert_eq!(beat.read(0).counter, 0x0000_0008_0000_0010);
        assert_eq!(beat.read(0).beats, 2);
    }

    #[test]
    fn there_is_no_age_before_the_first() {
        let beat = Beat::new();
        assert_eq!(
            beat.read(3),
            Heartbeat {
                vcpu: 3,
                beats: 0,
                counter: 0,
                age: None
            }
        );
        beat.report(5);
        assert!(beat.read(3).age.is_some());
    }
}
