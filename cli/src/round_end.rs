//! When the round under way ends, from what was acknowledged so far: known some tenths of a second into round 0, long before there is
//! a forecast.
//!
//! The rule it keeps: it counts acknowledged bytes, not sent ones, since a socket's buffers take the first megabytes at once.

use std::time::Duration;

use multifd_sender::Snapshot;

/// How long acknowledgements are watched before anything is said: they come every 20 ms and jump at first.
const WATCHED_MIN: Duration = Duration::from_millis(200);

/// Watches one round after the other.
#[derive(Debug, Default)]
pub struct RoundEnd {
    round: Option<u32>,
    first: Option<Sample>,
    newest: Option<Sample>,
}

#[derive(Debug, Clone, Copy)]
struct Sample {
    at: Duration,
    moved: Moved,
}

/// What of a [`Snapshot`] counts here.
#[derive(Debug, Clone, Copy)]
pub struct Moved {
    round: u32,
    sent: u64,
    acked: u64,
    pages_left: u64,
    link_lost: bool,
}

impl From<&Snapshot> for Moved {
    fn from(now: &Snapshot) -> Self {
        Self {
            round: now.round,
            sent: now.sent_bytes,
            acked: now.acked_bytes,
            pages_left: now.round_pages_left,
            link_lost: now.reconnect.is_some(),
        }
    }
}

/// What is expected of the round under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// Bytes a second that the destination acknowledges.
    pub rate: u64,
    /// How long the round goes on.
    pub within: Duration,
}

impl RoundEnd {
    /// Takes note of how far it is, `at` since any fixed moment.
    pub fn note(&mut self, at: Duration, moved: Moved) {
        let sample = Sample { at, moved };
        if self.round != Some(moved.round) || moved.link_lost {
            (self.round, self.first) = (Some(moved.round), None);
        }
        if self.first.is_none() && moved.acked > 0 && !moved.link_lost {
            self.first = Some(sample);
        }
        self.newest = Some(sample);
    }

    /// What is expected by now; nothing before enough was seen.
    #[must_use]
    pub fn expected(&self) -> Option<Expected> {
        let (first, newest) = (self.first?, self.newest?);
        let watched = newest.at.checked_sub(first.at)?;
        if watched < WATCHED_MIN {
            return None;
        }
        let (first, newest) = (first.moved, newest.moved);
        let rate = newest.acked.checked_sub(first.acked)? as f64 / watched.as_secs_f64();
        let taken = first.pages_left.checked_sub(newest.pages_left)?;
        // A page costs what those before it cost: many are zero and take no bytes.
        let a_page = newest.sent.checked_sub(first.sent)? as f64 / taken.max(1) as f64;
        let under_way = newest.sent.saturating_sub(newest.acked) as f64;
        let left = newest.pages_left as f64 * a_page + under_way;
        let within = Duration::try_from_secs_f64(left / rate).ok()?;
        (rate >= 1.0).then_some(Expected {
            rate: rate as u64,
            within,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moved(round: u32, pages_left: u64, sent: u64, acked: u64) -> Moved {
        Moved {
            round,
            pages_left,
            sent,
            acked,
            link_lost: false,
        }
    }

    #[test]
    fn half_way_as_long_again_is_expected_whatever_part_is_zero() {
        let mut end = RoundEnd::default();
        // 1000 pages, of which every second takes 4000 bytes; 200,000 bytes a second.
        for step in 0..=50 {
            let at = Duration::from_millis(step * 100);
            let sent = step * 20_000;
            end.note(at, moved(0, 1000 - step * 10, sent + 1, sent + 1));
        }
        let expected = end.expected().expect("enough was seen");
        assert_eq!(expected.rate, 200_000);
        assert!(
            (4.9..5.1).contains(&expected.within.as_secs_f64()),
            "{expected:?}"
        );
    }

    #[test]
    fn nothing_is_said_before_something_is_acknowledged_or_when_nothing_moves() {
        let mut end = RoundEnd::default();
        for step in 0..10 {
            end.note(Duration::from_secs(step), moved(0, 1000, 4096, 0));
        }
        assert_eq!(end.expected(), None);
        for step in 10..20 {
            end.note(Duration::from_secs(step), moved(0, 1000, 4096, 512));
        }
        assert_eq!(end.expected(), None, "it stands still");
    }

    #[test]
    fn a_new_round_begins_anew() {
        let mut end = RoundEnd::default();
        end.note(Duration::ZERO, moved(0, 1000, 10, 10));
        end.note(Duration::from_secs(1), moved(0, 500, 10_000, 10_000));
        assert!(end.expected().is_some());
        end.note(Duration::from_secs(2), moved(1, 700, 12_000, 12_000));
        assert_eq!(end.expected(), None);
    }
}
