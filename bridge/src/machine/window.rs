//! How much a stream may be ahead of its reader: a time, turned into bytes by the rate at which the reader takes them.
//!
//! A machine monitor counts bytes as sent once its own socket has taken them, and computes the guest's downtime from that. So what is held
//! between two monitors is bounded by (rate × a small time), begins small, and grows only as bytes really arrive.

use std::time::Duration;

/// What a stream begins with, and never has less: two pieces of 32 KiB, enough for any command.
pub const WINDOW_BYTES_MIN: u64 = 64 * 1024;

/// What no stream exceeds: 20 ms of 12.8 Gb/s, or 150 ms of a third of that.
pub const WINDOW_BYTES_MAX: u64 = 32 << 20;

/// How long what is held may take to arrive, beside the round trip.
pub const HORIZON_DEFAULT: Duration = Duration::from_millis(20);

/// The shortest time over which a rate is taken: the timer of an idle kernel is a few milliseconds off.
const SAMPLE_MIN: Duration = Duration::from_millis(5);

/// The window of one direction of one stream.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    bytes: u64,
    bytes_peak: u64,
    taken: u64,
    since: Option<Duration>,
}

impl Window {
    /// A window at its smallest.
    #[must_use]
    pub fn new() -> Self {
        Self {
            bytes: WINDOW_BYTES_MIN,
            bytes_peak: WINDOW_BYTES_MIN,
            taken: 0,
            since: None,
        }
    }

    /// Its size now.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The largest that it was.
    #[must_use]
    pub fn bytes_peak(&self) -> u64 {
        self.bytes_peak
    }

    /// The reader took bytes. `horizon` is how long what is held may take, round trip included.
    pub fn took(&mut self, bytes: u64, now: Duration, horizon: Duration) {
        let Some(since) = self.since else {
            self.since = Some(now);
            return;
        };
        self.taken = self.taken.saturating_add(bytes);
        let elapsed = now.saturating_sub(since);
        if elapsed < SAMPLE_MIN {
            return;
        }
        let target = u128::from(self.taken) * horizon.as_nanos() / elapsed.as_nanos().max(1);
        let target = u64::try_from(target).unwrap_or(u64::MAX);
        // Twice as much at a time upwards, a quarter less downwards: a pause of the reader must not cost the whole window.
        let bytes = if target > self.bytes {
            target.min(self.bytes.saturating_mul(2))
        } else {
            target.max(self.bytes / 4 * 3)
        };
        self.bytes = bytes.clamp(WINDOW_BYTES_MIN, WINDOW_BYTES_MAX);
        self.bytes_peak = self.bytes_peak.max(self.bytes);
        self.taken = 0;
        self.since = Some(now);
    }
}

impl Default for Window {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settles_at_the_rate_times_the_horizon() {
        let (mut window, mut now) = (Window::new(), Duration::ZERO);
        for _ in 0..200 {
            now += Duration::from_millis(10);
            window.took(1 << 20, now, HORIZON_DEFAULT);
        }
        // 1 MiB in 10 ms, so 2 MiB in 20 ms.
        assert_eq!(window.bytes(), 2 << 20);
        for _ in 0..200 {
            now += Duration::from_millis(10);
            window.took(100_000, now, HORIZON_DEFAULT);
        }
        assert_eq!(window.bytes(), 200_000);
        now += Duration::from_secs(60);
        for _ in 0..20 {
            now += Duration::from_secs(1);
            window.took(1, now, HORIZON_DEFAULT);
        }
        assert_eq!(window.bytes(), WINDOW_BYTES_MIN);
    }

    #[test]
    fn never_more_than_twice_as_much_at_a_time_and_never_past_its_bound() {
        let (mut window, mut now) = (Window::new(), Duration::ZERO);
        window.took(0, now, HORIZON_DEFAULT);
        let mut before = window.bytes();
        for _ in 0..40 {
            now += SAMPLE_MIN;
            window.took(1 << 40, now, HORIZON_DEFAULT);
            assert!(window.bytes() <= before * 2);
            before = window.bytes();
        }
        assert_eq!(window.bytes(), WINDOW_BYTES_MAX);
        assert_eq!(window.bytes_peak(), WINDOW_BYTES_MAX);
    }
}
