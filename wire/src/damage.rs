//! Octets that were changed on the way, as checksums found them: counted by phase, channel and frame, for a report.
//!
//! The rule it keeps: every one is counted, and a link that damages everything fills no memory. Of pages it can't be told whether
//! the link changed them or the guest wrote them while they were sent; both come again.

use crate::code::Phase;
use crate::id::ChannelRef;

/// Entries that are told apart. A migration has few phases and kinds of frames, and at most 256 lanes; what comes when the list is
/// full is counted in one last entry, which names no channel.
const ENTRIES_MAX: usize = 1024;

/// What the last entry of a full list says instead of a frame.
const OTHERS: &str = "others";

/// Octets that were changed on the way; or, of `PAGES` while the guest runs, written while they were sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Damaged {
    /// When in the migration's life it was found.
    pub phase: Phase,
    /// On which channel; none for a connection whose hello could not be read.
    pub channel: ChannelRef,
    /// Of which frame: the name of its kind; `header` where the kind can't be trusted either; `hello`, `hello_reply`.
    pub frame: &'static str,
    /// How often: pages for `PAGES`, otherwise frames.
    pub count: u64,
}

/// The list that is filled while a migration goes on; of bounded length.
#[derive(Debug, Default)]
pub struct DamageList(Vec<Damaged>);

impl DamageList {
    /// `count` more of the same.
    pub fn note(&mut self, phase: Phase, channel: ChannelRef, frame: &'static str, count: u64) {
        let mut new = Damaged {
            phase,
            channel,
            frame,
            count: 0,
        };
        if self.0.len() >= ENTRIES_MAX - 1 {
            (new.channel, new.frame) = (ChannelRef::None, OTHERS);
        }
        let is_full = self.0.len() >= ENTRIES_MAX;
        let place = self
            .0
            .iter()
            .position(|old| Damaged { count: 0, ..*old } == new)
            // In a full list the last entry takes what is of another phase, too.
            .or(is_full.then_some(ENTRIES_MAX - 1));
        if let Some(old) = place.and_then(|place| self.0.get_mut(place)) {
            old.count = old.count.saturating_add(count);
        } else {
            self.0.push(Damaged { count, ..new });
        }
    }

    /// The entries so far, in the order in which each was found first.
    #[must_use]
    pub fn entries(&self) -> &[Damaged] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::LaneId;

    fn lane(id: usize) -> ChannelRef {
        ChannelRef::Lane(LaneId::new(id.try_into().unwrap()))
    }

    fn counts(list: &DamageList) -> Vec<u64> {
        list.entries().iter().map(|entry| entry.count).collect()
    }

    #[test]
    fn the_same_is_counted_together_and_another_apart() {
        let mut list = DamageList::default();
        list.note(Phase::Rounds, lane(1), "PAGES", 2);
        list.note(Phase::Rounds, lane(1), "PAGES", 3);
        list.note(Phase::Switchover, lane(1), "PAGES", 1);
        list.note(Phase::Rounds, lane(2), "header", 1);
        list.note(Phase::Hello, ChannelRef::None, "hello", 1);
        assert_eq!(counts(&list), [5, 1, 1, 1]);
    }

    #[test]
    fn a_full_list_counts_on_in_its_last_entry() {
        let mut list = DamageList::default();
        for id in 0..2 * ENTRIES_MAX {
            list.note(Phase::Rounds, lane(id), "PAGES", 1);
        }
        list.note(Phase::Switchover, lane(0), "PAGES", 1);
        assert_eq!(list.entries().len(), ENTRIES_MAX);
        assert_eq!(
            counts(&list).iter().sum::<u64>(),
            2 * ENTRIES_MAX as u64 + 1
        );
        let last = list.entries()[ENTRIES_MAX - 1];
        assert_eq!((last.channel, last.frame), (ChannelRef::None, OTHERS));
    }
}
