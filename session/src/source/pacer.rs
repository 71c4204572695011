//! The bandwidth cap: says when the next frame may be sent.
//!
//! A generic cell rate rule over one atomic: each frame moves the "line is free again at" instant on by its bytes at
//! the capped rate, and is sent when that instant's burst allowance has been reached. No lock, no thread, no clock inside.
//! The cap may be changed at any time: whoever waits for a turn under the old one takes a turn under the new one.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use super::steer::Sending;

/// How far the line may be ahead of the cap: enough that lanes need not wake for every frame.
const BURST: Duration = Duration::from_millis(5);

/// While sending is held, this many bytes a second go out all the same: a frame of the usual size in 16 seconds. A destination that
/// sees nothing at all arrive for longer than its `progress_deadline`, a minute, ends the migration.
const HELD_RATE: u64 = 16 << 10;

/// A cap that all lanes share.
#[derive(Debug)]
pub struct Pacer {
    /// Bytes a second; 0: no cap.
    rate: AtomicU64,
    free_at_ns: AtomicU64,
    /// Counts the changes of the rate.
    changes: AtomicU32,
}

/// A place in the line.
#[derive(Debug, Clone, Copy)]
#[must_use = "the cap holds only if the caller waits"]
pub struct Turn {
    at: Duration,
    changes: u32,
}

/// How it stands with a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// Send.
    Now,
    /// Look again after this time, or before.
    Wait(Duration),
    /// The cap is another one: book again.
    Void,
}

impl Pacer {
    /// `None` caps nothing.
    #[must_use]
    pub fn new(octets_per_second: Option<u64>) -> Self {
        Self {
            rate: AtomicU64::new(octets_per_second.unwrap_or(0)),
            free_at_ns: AtomicU64::new(0),
            changes: AtomicU32::new(0),
        }
    }

    /// From now on this is the cap; while sending is held next to nothing goes out, whatever the cap.
    pub fn set(&self, octets_per_second: Option<u64>, sending: Sending) {
        let rate = match sending {
            Sending::On => octets_per_second.unwrap_or(0),
            Sending::Held => HELD_RATE,
        };
        if self.rate.swap(rate, Ordering::Relaxed) != rate {
            // What was booked at the old rate and not sent yet is booked again.
            self.free_at_ns.store(0, Ordering::Relaxed);
            self.changes.fetch_add(1, Ordering::Release);
        }
    }

    /// Books `octets` at `now` (time since any fixed start); the caller sends when [`Self::look`] says so.
    pub fn book(&self, octets: u64, now: Duration) -> Turn {
        // First: a turn that was booked while the rate changed is void, and never too early.
        let changes = self.changes.load(Ordering::Acquire);
        let rate = self.rate.load(Ordering::Relaxed);
        if rate == 0 {
            return Turn { at: now, changes };
        }
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
                    let at = Duration::from_nanos(begin.saturating_sub(nanos(BURST)));
                    return Turn { at, changes };
                }
                Err(seen) => free_at = seen,
            }
        }
    }

    /// Whether the turn has come.
    #[must_use]
    pub fn look(&self, turn: Turn, now: Duration) -> Look {
        if turn.changes != self.changes.load(Ordering::Acquire) {
            return Look::Void;
        }
        match turn.at.saturating_sub(now) {
            Duration::ZERO => Look::Now,
            wait => Look::Wait(wait),
        }
    }
}

fn nanos(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Books, and gives how long to wait.
    fn wait(pacer: &Pacer, octets: u64, now: Duration) -> Duration {
        match pacer.look(pacer.book(octets, now), now) {
            Look::Now => Duration::ZERO,
            Look::Wait(time) => time,
            Look::Void => panic!("nobody changed the cap"),
        }
    }

    /// Sends frames of 100 kB from `now` on for a second, and gives the bytes.
    fn second(pacer: &Pacer, mut now: Duration) -> u64 {
        let (until, mut sent) = (now + Duration::from_secs(1), 0u64);
        while now < until {
            now += wait(pacer, 100_000, now);
            sent += 100_000;
        }
        sent
    }

    // One second at the cap, 5 ms of burst, the frame that was begun at the second's end and the one that ended the loop.
    fn holds(cap: u64, sent: u64) -> bool {
        (cap..=cap + cap / 200 + 200_000).contains(&sent)
    }

    #[test]
    fn without_a_cap_nobody_waits() {
        assert_eq!(
            wait(&Pacer::new(None), u64::MAX, Duration::ZERO),
            Duration::ZERO
        );
    }

    #[test]
    fn over_a_second_the_cap_is_kept_but_for_the_burst() {
        let sent = second(&Pacer::new(Some(10_000_000)), Duration::ZERO);
        assert!(holds(10_000_000, sent), "{sent}");
    }

    #[test]
    fn an_idle_line_saves_nothing_up_beyond_the_burst() {
        let pacer = Pacer::new(Some(1_000_000));
        let hour = Duration::from_secs(3600);
        assert_eq!(wait(&pacer, 1, hour), Duration::ZERO);
        let wait = wait(&pacer, 1_000_000, hour) + wait(&pacer, 1, hour);
        assert!(wait > Duration::from_millis(990), "{wait:?}");
    }

    #[test]
    fn a_new_cap_holds_at_once_whether_it_is_lower_or_higher() {
        let pacer = Pacer::new(Some(10_000_000));
        let s = Duration::from_secs;
        assert!(holds(10_000_000, second(&pacer, s(0))));
        pacer.set(Some(2_000_000), Sending::On);
        assert!(holds(2_000_000, second(&pacer, s(1))));
        pacer.set(Some(30_000_000), Sending::On);
        assert!(holds(30_000_000, second(&pacer, s(2))));
        pacer.set(None, Sending::On);
        assert_eq!(wait(&pacer, u64::MAX, s(3)), Duration::ZERO);
    }

    #[test]
    fn who_waits_under_the_old_cap_is_told_and_the_same_cap_again_changes_nothing() {
        let pacer = Pacer::new(Some(1_000_000));
        let now = Duration::ZERO;
        let _ = pacer.book(60_000_000, now);
        let turn = pacer.book(1, now);
        assert!(
            matches!(pacer.look(turn, now), Look::Wait(time) if time > Duration::from_secs(59))
        );
        pacer.set(Some(1_000_000), Sending::On);
        assert!(matches!(pacer.look(turn, now), Look::Wait(_)));
        pacer.set(Some(2_000_000), Sending::On);
        assert_eq!(pacer.look(turn, now), Look::Void);
        assert_eq!(wait(&pacer, 1, now), Duration::ZERO);
    }

    #[test]
    fn what_is_held_trickles_whatever_the_cap_and_goes_on_at_the_cap() {
        for cap in [None, Some(10_000_000)] {
            let pacer = Pacer::new(cap);
            pacer.set(cap, Sending::Held);
            let frame = 256 << 10;
            assert_eq!(wait(&pacer, frame, Duration::ZERO), Duration::ZERO);
            let next = wait(&pacer, frame, Duration::ZERO);
            assert!((15..=16).contains(&next.as_secs()), "{next:?}");
            pacer.set(cap, Sending::On);
            assert_eq!(wait(&pacer, frame, Duration::ZERO), Duration::ZERO);
        }
    }
}
