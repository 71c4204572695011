//! Octets that were changed on the way, as checksums found them: counted by phase, channel and frame, for the report.
//!
//! The rule it keeps: every one is counted, and a link that damages everything fills no memory. Of pages it can't be told whether
//! the link changed them or the guest wrote them while they were sent; both come again.

use std::sync::{Mutex, PoisonError};

use multifd_wire::{ChannelRef, Phase};
use serde::Serialize;

/// Entries that are told apart. A migration has few phases and kinds of frames, and at most 256 lanes; what comes when the list is full is
/// counted in one last entry, which names no channel.
const ENTRIES_MAX: usize = 1024;

/// Octets that were changed on the way; or, of `PAGES` while the guest runs, written while they were sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DamageReport {
    /// When in the migration's life it was found.
    pub phase: String,
    /// On which channel; null for a connection whose hello could not be read.
    pub channel: Option<String>,
    /// Of which frame: the name of its kind; `header` where the kind can't be trusted either; `hello`, `hello_reply`.
    pub frame: String,
    /// How often: pages for `PAGES`, otherwise frames.
    pub count: u64,
}

/// The list that is filled while the migration goes on.
#[derive(Debug, Default)]
pub(crate) struct Damage(Mutex<Vec<DamageReport>>);

impl Damage {
    /// `count` more of the same.
    pub(crate) fn note(&self, phase: Phase, at: ChannelRef, frame: &str, count: u64) {
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut new = DamageReport {
            phase: phase.to_string(),
            channel: (at != ChannelRef::None).then(|| at.to_string()),
            frame: frame.to_owned(),
            count: 0,
        };
        if list.len() + 1 >= ENTRIES_MAX {
            (new.channel, new.frame) = (None, "others".to_owned());
        }
        let same = |old: &DamageReport| {
            (&old.phase, &old.channel, &old.frame) == (&new.phase, &new.channel, &new.frame)
        };
        // In a full list the last entry takes what is of another phase, too.
        let place = list
            .iter()
            .position(same)
            .or((list.len() >= ENTRIES_MAX).then_some(ENTRIES_MAX - 1));
        if let Some(old) = place.and_then(|place| list.get_mut(place)) {
            old.count += count;
        } else {
            new.count = count;
            list.push(new);
        }
    }

    /// The list so far.
    pub(crate) fn list(&self) -> Vec<DamageReport> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

#[cfg(test)]
mod tests {
    use multifd_wire::LaneId;

    use super::*;

    fn lane(id: u32) -> ChannelRef {
        ChannelRef::Lane(LaneId::new(id))
    }

    #[test]
    fn the_same_is_counted_together_and_another_apart() {
        let damage = Damage::default();
        damage.note(Phase::Rounds, lane(1), "PAGES", 2);
        damage.note(Phase::Rounds, lane(1), "PAGES", 3);
        damage.note(Phase::Switchover, lane(1), "PAGES", 1);
        damage.note(Phase::Rounds, lane(2), "header", 1);
        damage.note(Phase::Hello, ChannelRef::None, "hello", 1);
        let counts: Vec<u64> = damage.list().iter().map(|entry| entry.count).collect();
        assert_eq!(counts, [5, 1, 1, 1]);
        assert_eq!(damage.list()[3].channel, None);
    }

    #[test]
    fn a_full_list_counts_on_in_its_last_entry() {
        let damage = Damage::default();
        for id in 0..2 * ENTRIES_MAX as u32 {
            damage.note(Phase::Rounds, lane(id), "PAGES", 1);
        }
        damage.note(Phase::Switchover, lane(0), "PAGES", 1);
        let list = damage.list();
        assert_eq!(list.len(), ENTRIES_MAX);
        let sum: u64 = list.iter().map(|entry| entry.count).sum();
        assert_eq!(sum, 2 * ENTRIES_MAX as u64 + 1);
        assert_eq!(list[ENTRIES_MAX - 1].channel, None);
    }
}
