//! One data channel at the source, as a machine without I/O: numbering, the ledger of what is not yet acknowledged, and
//! the end marks.
//!
//! ```text
//!            begin_round          end_round
//!   Idle ────────────────► Open ───────────► Idle        acked(n): entries below n leave the ledger
//!     └───────────┬──────────┘                           die(): everything in the ledger comes back
//!                 ▼ die
//!               (gone)
//! ```
//! The rule it keeps: a run that was handed to this lane is either acknowledged or comes back out of [`Lane::die`].
//! It must never forget a run, and never give one back twice.

use std::collections::VecDeque;
use std::sync::Arc;

use multifd_wire::frame::RoundEnd;
use multifd_wire::{Incarnation, LaneId, Misbehaved, PageRun, Round, Sequence};

use crate::source::stream::Item;

/// One frame that was handed to the channel and is not yet acknowledged.
#[derive(Debug)]
struct Entry {
    sequence: u64,
    round: Round,
    octets: u64,
    runs: Vec<PageRun>,
    item: Option<Arc<Item>>,
}

/// What an acknowledgement settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Settled {
    /// Frames that were handled since the last acknowledgement.
    pub frames: u64,
    /// Bytes of their heads and bodies.
    pub octets: u64,
}

/// The machine of one data channel.
#[derive(Debug)]
pub struct Lane {
    id: LaneId,
    incarnation: Incarnation,
    next: u64,
    acked: u64,
    open: Option<Open>,
    /// The round that is open, or the next.
    reached: Round,
    ledger: VecDeque<Entry>,
    unacked_octets: u64,
    acked_octets: u64,
}

/// The round that the lane is in, and what it carried of it.
#[derive(Debug, Clone, Copy)]
struct Open {
    round: Round,
    last: bool,
    pages: u64,
    zero_pages: u64,
}

/// The caller used the lane out of turn. These are bugs of this crate's driver, never the peer's doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LaneMisuse {
    /// Pages were handed over outside a round, or a round was ended that was not begun.
    #[error("the lane is in no round")]
    NotInRound,
    /// A round was begun before the one before it was ended.
    #[error("the lane is still in a round")]
    StillInRound,
}

impl Lane {
    /// A lane that has sent nothing on its channel yet.
    #[must_use]
    pub fn new(id: LaneId, incarnation: Incarnation) -> Self {
        Self {
            id,
            incarnation,
            next: 0,
            acked: 0,
            open: None,
            reached: Round::new(0),
            ledger: VecDeque::new(),
            unacked_octets: 0,
            acked_octets: 0,
        }
    }

    /// Which lane.
    #[must_use]
    pub fn id(&self) -> LaneId {
        self.id
    }

    /// Which connection of it.
    #[must_use]
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// Frames handed to the channel and not yet acknowledged.
    #[must_use]
    pub fn unacked_frames(&self) -> u64 {
        self.next.saturating_sub(self.acked)
    }

    /// Bytes handed to the channel and not yet acknowledged.
    #[must_use]
    pub fn unacked_octets(&self) -> u64 {
        self.unacked_octets
    }

    /// Bytes that were acknowledged since the channel was opened.
    #[must_use]
    pub fn acked_octets(&self) -> u64 {
        self.acked_octets
    }

    /// How many frames were acknowledged.
    #[must_use]
    pub fn acked_frames(&self) -> u64 {
        self.acked
    }

    /// The round of the oldest frame that is not acknowledged. The destination reads on to it without waiting for any other
    /// lane if every earlier round is closed.
    #[must_use]
    pub fn oldest_round(&self) -> Option<Round> {
        self.ledger.front().map(|entry| entry.round)
    }

    /// The round of a frame that is not acknowledged.
    #[must_use]
    pub fn round_of(&self, sequence: Sequence) -> Option<Round> {
        let place = self
            .ledger
            .binary_search_by_key(&sequence.value(), |entry| entry.sequence);
        self.ledger.get(place.ok()?).map(|entry| entry.round)
    }

    /// Enters a round.
    ///
    /// # Errors
    /// [`LaneMisuse::StillInRound`] if the round before was not ended.
    pub fn begin_round(&mut self, round: Round, last: bool) -> Result<(), LaneMisuse> {
        if self.open.is_some() {
            return Err(LaneMisuse::StillInRound);
        }
        self.reached = round;
        self.open = Some(Open {
            round,
            last,
            pages: 0,
            zero_pages: 0,
        });
        Ok(())
    }

    /// Enters a PAGES frame in the ledger and gives it its number. To be called before the first byte is sent.
    ///
    /// # Errors
    /// [`LaneMisuse::NotInRound`].
    pub fn pages(&mut self, runs: Vec<PageRun>, octets: u64) -> Result<Sequence, LaneMisuse> {
        let pages = count(&runs);
        let open = self.open.as_mut().ok_or(LaneMisuse::NotInRound)?;
        open.pages += pages;
        let round = open.round;
        Ok(self.enter(round, runs, octets))
    }

    /// Enters a ZEROS frame in the ledger and gives it its number. To be called before the first byte is sent.
    ///
    /// # Errors
    /// [`LaneMisuse::NotInRound`].
    pub fn zeros(&mut self, runs: Vec<PageRun>, octets: u64) -> Result<Sequence, LaneMisuse> {
        let pages = count(&runs);
        let open = self.open.as_mut().ok_or(LaneMisuse::NotInRound)?;
        open.zero_pages += pages;
        let round = open.round;
        Ok(self.enter(round, runs, octets))
    }

    /// Enters an item of a device's stream in the ledger and gives it its number. To be called before the first byte is sent.
    /// Items belong to no round (SPEC: DEVSTREAM-7); they are kept here until they are acknowledged.
    pub fn item(&mut self, item: Arc<Item>, octets: u64) -> Sequence {
        let sequence = self.enter(self.reached, Vec::new(), octets);
        if let Some(entry) = self.ledger.back_mut() {
            entry.item = Some(item);
        }
        sequence
    }

    /// Takes out the items that were not acknowledged, the oldest first: the channel is gone, and they are to be sent again.
    #[must_use = "the destination does not have these: send them again"]
    pub fn take_items(&mut self) -> Vec<Arc<Item>> {
        self.ledger
            .iter_mut()
            .filter_map(|entry| entry.item.take())
            .collect()
    }

    /// The items of devices that an acknowledgement of so many frames settles.
    pub fn items_below(&self, frames: u64) -> impl Iterator<Item = &Arc<Item>> {
        self.ledger
            .iter()
            .take_while(move |entry| entry.sequence < frames)
            .filter_map(|entry| entry.item.as_ref())
    }

    /// Ends the round: the mark that the lane must carry next (SPEC: ROUND-3), and its number.
    ///
    /// # Errors
    /// [`LaneMisuse::NotInRound`].
    pub fn end_round(&mut self) -> Result<(RoundEnd, Sequence), LaneMisuse> {
        let open = self.open.take().ok_or(LaneMisuse::NotInRound)?;
        let mark = RoundEnd {
            round: open.round,
            final_round: open.last,
            pages: open.pages,
            zero_pages: open.zero_pages,
        };
        let sequence = self.enter(open.round, Vec::new(), 0);
        self.reached = open.round.next().unwrap_or(open.round);
        Ok((mark, sequence))
    }

    /// Every frame below `frames` was handled by the receiver (SPEC: ACK-1).
    ///
    /// # Errors
    /// [`Misbehaved::Amount`]; the ledger is then unchanged.
    pub fn acked(&mut self, frames: u64) -> Result<Settled, Misbehaved> {
        self.check_acked(frames)?;
        let mut settled = Settled {
            frames: frames - self.acked,
            octets: 0,
        };
        while let Some(entry) = self.ledger.front()
            && entry.sequence < frames
        {
            settled.octets += entry.octets;
            self.ledger.pop_front();
        }
        self.acked = frames;
        self.unacked_octets -= settled.octets;
        self.acked_octets += settled.octets;
        Ok(settled)
    }

    /// Whether [`Lane::acked`] would take it.
    ///
    /// # Errors
    /// As [`Lane::acked`].
    pub fn check_acked(&self, frames: u64) -> Result<(), Misbehaved> {
        if frames < self.acked {
            return Err(Misbehaved::Amount {
                field: "ack.frames (gone back)",
                expected: self.acked,
                found: frames,
            });
        }
        if frames > self.next {
            return Err(Misbehaved::Amount {
                field: "ack.frames",
                expected: self.next,
                found: frames,
            });
        }
        Ok(())
    }

    /// The channel is gone: all runs that were not acknowledged, for the dirty set.
    #[must_use = "these pages are not proven to be at the destination: give them back to the dirty set"]
    pub fn die(self) -> Vec<PageRun> {
        self.ledger
            .into_iter()
            .flat_map(|entry| entry.runs)
            .collect()
    }

    fn enter(&mut self, round: Round, runs: Vec<PageRun>, octets: u64) -> Sequence {
        let sequence = self.next;
        self.next += 1;
        self.unacked_octets += octets;
        self.ledger.push_back(Entry {
            sequence,
            round,
            octets,
            runs,
            item: None,
        });
        Sequence::new(sequence)
    }
}

fn count(runs: &[PageRun]) -> u64 {
    runs.iter().map(|run| u64::from(run.count())).sum()
}

#[cfg(test)]
mod tests {
    use multifd_wire::{Layout, PageIndex, Region, RegionId};
    use proptest::prelude::*;

    use super::*;

    fn layout() -> Layout {
        Layout::new([Region {
            id: RegionId::new(0),
            guest_address: 0,
            bytes: 1 << 30,
        }])
        .unwrap()
    }

    fn run(first: u64, pages: u32) -> PageRun {
        layout()
            .run(RegionId::new(0), PageIndex::new(first), pages)
            .unwrap()
    }

    fn lane_in_round() -> Lane {
        let mut lane = Lane::new(LaneId::new(3), Incarnation::new(0));
        lane.begin_round(Round::new(0), false).unwrap();
        lane
    }

    #[test]
    fn numbers_frames_from_zero_and_counts_them_in_the_end_mark() {
        let mut lane = lane_in_round();
        assert_eq!(lane.pages(vec![run(0, 4)], 100).unwrap(), Sequence::new(0));
        assert_eq!(lane.zeros(vec![run(8, 5)], 10).unwrap(), Sequence::new(1));
        let (mark, sequence) = lane.end_round().unwrap();
        assert_eq!(
            (mark.pages, mark.zero_pages, sequence),
            (4, 5, Sequence::new(2))
        );
        assert_eq!(lane.unacked_octets(), 110);
    }

    #[test]
    fn knows_the_round_of_its_oldest_unacknowledged_frame() {
        let mut lane = lane_in_round();
        assert_eq!(lane.oldest_round(), None);
        lane.pages(vec![run(0, 1)], 7).unwrap();
        lane.end_round().unwrap();
        lane.begin_round(Round::new(1), false).unwrap();
        lane.zeros(vec![run(1, 1)], 7).unwrap();
        assert_eq!(lane.oldest_round(), Some(Round::new(0)));
        assert_eq!(
            [0, 2, 3].map(|frame| lane.round_of(Sequence::new(frame))),
            [Some(Round::new(0)), Some(Round::new(1)), None]
        );
        lane.acked(1).unwrap();
        assert_eq!(lane.round_of(Sequence::new(0)), None);
        assert_eq!(lane.oldest_round(), Some(Round::new(0)), "the end mark");
        lane.acked(2).unwrap();
        assert_eq!(lane.oldest_round(), Some(Round::new(1)));
        lane.acked(3).unwrap();
        assert_eq!((lane.oldest_round(), lane.acked_frames()), (None, 3));
    }

    #[test]
    fn refuses_pages_outside_a_round_and_a_round_inside_a_round() {
        let mut lane = lane_in_round();
        assert_eq!(
            lane.begin_round(Round::new(1), false),
            Err(LaneMisuse::StillInRound)
        );
        lane.end_round().unwrap();
        assert_eq!(lane.pages(vec![run(0, 1)], 1), Err(LaneMisuse::NotInRound));
        assert_eq!(lane.zeros(vec![run(0, 1)], 1), Err(LaneMisuse::NotInRound));
        assert!(lane.end_round().is_err());
    }

    #[test]
    fn refuses_an_ack_that_goes_back_or_past_what_was_sent() {
        let mut lane = lane_in_round();
        lane.pages(vec![run(0, 1)], 7).unwrap();
        lane.pages(vec![run(1, 1)], 7).unwrap();
        assert_eq!(
            lane.acked(1).unwrap(),
            Settled {
                frames: 1,
                octets: 7
            }
        );
        assert!(matches!(
            lane.acked(0),
            Err(Misbehaved::Amount { found: 0, .. })
        ));
        assert!(matches!(
            lane.acked(3),
            Err(Misbehaved::Amount { found: 3, .. })
        ));
        assert_eq!(
            lane.acked(2).unwrap(),
            Settled {
                frames: 1,
                octets: 7
            }
        );
        assert!(lane.die().is_empty());
    }

    #[test]
    fn items_go_in_and_between_rounds_and_come_back_unless_they_are_acknowledged() {
        let mark = |index| {
            Item::mark(multifd_wire::frame::DeviceMark {
                device: multifd_wire::DeviceId::new(0),
                mark: multifd_wire::frame::Mark::DataEnd,
                generation: multifd_wire::Generation::new(0),
                index,
                offset: 0,
            })
        };
        let mut lane = Lane::new(LaneId::new(0), Incarnation::new(0));
        assert_eq!(lane.item(mark(0), 64), Sequence::new(0));
        assert_eq!(lane.oldest_round(), Some(Round::new(0)));
        lane.begin_round(Round::new(0), false).unwrap();
        lane.item(mark(1), 64);
        lane.pages(vec![run(0, 2)], 10).unwrap();
        let (end, _) = lane.end_round().unwrap();
        assert_eq!((end.pages, end.zero_pages), (2, 0));
        lane.item(mark(2), 64);
        lane.acked(4).unwrap();
        assert_eq!(
            lane.oldest_round(),
            Some(Round::new(1)),
            "behind the mark of 0"
        );
        lane.item(mark(3), 64);
        let back: Vec<String> = lane
            .take_items()
            .iter()
            .map(|item| format!("{item:?}"))
            .collect();
        assert!(back.len() == 2 && back[0].contains("index: 2") && back[1].contains("index: 3"));
        assert!(lane.die().is_empty());
    }

    proptest! {
        /// Whatever the order of frames and acknowledgements, each page is settled or comes back, exactly once.
        #[test]
        fn every_run_is_acknowledged_or_comes_back(steps in proptest::collection::vec((0u64..50, 1u32..9, any::<bool>()), 1..60)) {
            let mut lane = lane_in_round();
            let (mut sent, mut settled_upto, mut next_page) = (Vec::new(), 0u64, 0u64);
            for (ack, pages, zero) in steps {
                let r = run(next_page, pages);
                let octets = u64::from(pages);
                next_page += octets;
                if zero { lane.zeros(vec![r], octets).unwrap() } else { lane.pages(vec![r], octets).unwrap() };
                sent.push(r);
                let upto = (settled_upto + ack).min(sent.len() as u64);
                lane.acked(upto).unwrap();
                settled_upto = upto;
            }
            let left = &sent[settled_upto as usize..];
            prop_assert_eq!(lane.unacked_octets(), count(left));
            prop_assert_eq!(lane.die(), left.to_vec());
        }
    }
}
