//! Pages that did not match their checksum at the destination: whether the guest tore them or the way damaged them.
//!
//! The destination can't know. The source can: a page that the guest wrote between the checksum and the last read of its bytes was
//! written after the round re-armed it and before the round was encoded, so the next collection reports it. The rule: a page that did
//! not match in round k is *torn* if the collection after round k found it dirty again, and *damaged* if not. It goes back to the
//! dirty set either way, before the next round takes it.
//!
//! ```text
//!   round k open        kept here until the next collection, which decides
//!   round k+1 or later  decided at once, by what round k+1 took
//!   neither is known    counted as mismatched, and as nothing else
//! ```
//! A VMM that marks its own write only long after it made it may have its torn page called damaged; nothing else depends on it.

use std::collections::VecDeque;

use multifd_tracking::{DirtySet, Run, TakenPages};
use multifd_wire::Round;
use multifd_wire::limits::PAGES_PER_FRAME_MAX;

/// How many of the newest rounds are remembered: what is on its way is seldom of more than two.
const ROUNDS_KEPT: usize = 8;

/// What was decided of some pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Judged {
    pub(super) torn: u64,
    pub(super) damaged: u64,
}

impl Judged {
    fn count(&mut self, written: bool) {
        let kind = if written {
            &mut self.torn
        } else {
            &mut self.damaged
        };
        *kind += 1;
    }
}

/// The pages that wait for a collection, and what the newest rounds took.
#[derive(Debug)]
pub(super) struct Mismatches {
    /// Of the round that is open. One bit a page, so that a peer can't make it grow.
    waiting: DirtySet,
    taken: VecDeque<(Round, TakenPages)>,
}

impl Mismatches {
    pub(super) fn new(dirty: &DirtySet) -> Self {
        let pages = (0..dirty.region_count()).filter_map(|region| dirty.region_pages(region));
        Self {
            waiting: DirtySet::new(&pages.collect::<Vec<_>>()),
            taken: VecDeque::new(),
        }
    }

    /// A round has begun.
    pub(super) fn took(&mut self, round: Round, pages: TakenPages) {
        // A resume opens rounds again that the destination did not close.
        self.taken.retain(|(before, _)| *before < round);
        if self.taken.len() == ROUNDS_KEPT {
            self.taken.pop_front();
        }
        self.taken.push_back((round, pages));
    }

    /// Pages of a frame of `round` did not match; `None` if the frame is no longer known. They go back to `dirty`, now or with
    /// [`Mismatches::collected`].
    pub(super) fn came(&mut self, round: Option<Round>, runs: &[Run], dirty: &DirtySet) -> Judged {
        let mut judged = Judged::default();
        let newest = self.taken.back().map(|(round, _)| *round);
        // What came back on a lane that lives is of one frame.
        let pages: u64 = runs.iter().map(|run| run.count).sum();
        let round = round.filter(|_| pages <= PAGES_PER_FRAME_MAX as u64);
        if round.is_some() && round == newest {
            for run in runs {
                self.waiting.mark(*run);
            }
            return judged;
        }
        let next = round.and_then(Round::next);
        let after = self.taken.iter().find(|(round, _)| Some(*round) == next);
        for run in runs {
            if let Some((_, taken)) = after {
                (run.first..run.first + run.count)
                    .for_each(|page| judged.count(taken.contains(run.region, page)));
            }
            dirty.give_back(*run);
        }
        judged
    }

    /// Every source was collected into `dirty` since the newest round took its pages: decides what waits, and gives it back.
    pub(super) fn collected(&mut self, dirty: &DirtySet) -> Judged {
        let mut judged = Judged::default();
        self.each_waiting(|run| {
            (run.first..run.first + run.count)
                .for_each(|page| judged.count(dirty.is_dirty(run.region, page)));
            dirty.give_back(run);
        });
        judged
    }

    /// Gives back what waits without a word about it: the set is about to hold pages for other reasons.
    pub(super) fn leave_open(&mut self, dirty: &DirtySet) {
        self.each_waiting(|run| {
            dirty.give_back(run);
        });
    }

    fn each_waiting(&mut self, mut visit: impl FnMut(Run)) {
        if self.waiting.dirty_pages() == 0 {
            return;
        }
        let mut waiting = self.waiting.take_round();
        while let Some(run) = waiting.next_run(u64::MAX) {
            visit(run);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, count: u64) -> Run {
        Run {
            region: 0,
            first,
            count,
        }
    }

    /// Takes a round as the control thread does.
    fn open(mismatches: &mut Mismatches, dirty: &DirtySet, round: u32) {
        let taken = dirty.take_round();
        mismatches.took(Round::new(round), taken.taken());
        let mut taken = taken;
        while taken.next_run(64).is_some() {}
    }

    fn judged(torn: u64, damaged: u64) -> Judged {
        Judged { torn, damaged }
    }

    #[test]
    fn a_page_that_the_next_collection_finds_dirty_is_torn_and_any_other_damaged() {
        let dirty = DirtySet::new(&[100]);
        let mut mismatches = Mismatches::new(&dirty);
        dirty.mark_all();
        open(&mut mismatches, &dirty, 0);
        let came = mismatches.came(Some(Round::new(0)), &[run(5, 3)], &dirty);
        assert_eq!((came, dirty.dirty_pages()), (judged(0, 0), 0));
        dirty.mark(run(6, 1));
        assert_eq!(mismatches.collected(&dirty), judged(1, 2));
        assert_eq!(dirty.dirty_pages(), 3, "all of them come again");
        assert_eq!(mismatches.collected(&dirty), judged(0, 0), "once");
    }

    #[test]
    fn a_page_of_an_earlier_round_is_judged_by_what_the_round_after_it_took() {
        let dirty = DirtySet::new(&[100]);
        let mut mismatches = Mismatches::new(&dirty);
        dirty.mark_all();
        open(&mut mismatches, &dirty, 0);
        dirty.mark(run(7, 1));
        open(&mut mismatches, &dirty, 1);
        open(&mut mismatches, &dirty, 2);
        let came = mismatches.came(Some(Round::new(0)), &[run(7, 2)], &dirty);
        assert_eq!((came, dirty.dirty_pages()), (judged(1, 1), 2));
    }

    #[test]
    fn of_a_frame_that_is_not_known_nothing_is_said_and_its_pages_come_again() {
        let dirty = DirtySet::new(&[1000]);
        let mut mismatches = Mismatches::new(&dirty);
        for round in 0..20 {
            open(&mut mismatches, &dirty, round);
        }
        for (round, pages) in [
            (None, 3),
            (Some(Round::new(2)), 4),
            (Some(Round::new(19)), 257),
        ] {
            assert_eq!(
                mismatches.came(round, &[run(0, pages)], &dirty),
                judged(0, 0)
            );
            assert_eq!(dirty.dirty_pages(), pages, "{round:?}");
        }
        mismatches.came(Some(Round::new(19)), &[run(500, 1)], &dirty);
        mismatches.leave_open(&dirty);
        assert_eq!(dirty.dirty_pages(), 258);
        assert_eq!(mismatches.collected(&dirty), judged(0, 0));
    }
}
