//! What tells a thread that is at work from one that never comes back: the kernel may have killed it, or a page fault of its is never
//! served.
//!
//! Nothing in the process changes when that happens, so the thread has to be missed: it beats where it goes round, and whoever waits
//! for it counts how long no beat has come. The time is the watcher's own: while the whole process is stopped nobody is missed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How often a watcher has to look at least. A longer time between two looks counts as this: then the watcher stood still as well.
pub const LOOK_MAX: Duration = Duration::from_millis(500);

/// The watched side: beats.
#[derive(Debug, Default)]
pub struct Pulse(AtomicU64);

impl Pulse {
    /// This thread is at work.
    pub fn beat(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// The watching side: for how long no beat has come.
#[derive(Debug, Default)]
pub struct Silence {
    beats: u64,
    quiet: Duration,
    looked: Option<Instant>,
}

impl Silence {
    /// Looks; gives for how long no beat has come, as far as this watcher was awake.
    pub fn look(&mut self, pulse: &Pulse, now: Instant) -> Duration {
        let beats = pulse.0.load(Ordering::Relaxed);
        let since = self.looked.replace(now).map_or(Duration::ZERO, |looked| {
            now.saturating_duration_since(looked).min(LOOK_MAX)
        });
        if std::mem::replace(&mut self.beats, beats) == beats {
            self.quiet += since;
        } else {
            self.quiet = Duration::ZERO;
        }
        self.quiet
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_counted_from_the_last_beat() {
        let (pulse, mut silence, mut now) = (Pulse::default(), Silence::default(), Instant::now());
        let mut after = |ms, pulse: &Pulse| {
            now += Duration::from_millis(ms);
            silence.look(pulse, now).as_millis()
        };
        assert_eq!(after(0, &pulse), 0);
        assert_eq!(after(200, &pulse), 200);
        assert_eq!(after(300, &pulse), 500);
        pulse.beat();
        assert_eq!(after(400, &pulse), 0);
        assert_eq!(after(100, &pulse), 100);
    }

    #[test]
    fn while_the_watcher_stands_still_nobody_is_missed() {
        let (pulse, mut silence, now) = (Pulse::default(), Silence::default(), Instant::now());
        silence.look(&pulse, now);
        // The process was stopped for an hour.
        let later = now + Duration::from_secs(3600);
        assert_eq!(silence.look(&pulse, later), LOOK_MAX);
    }
}
