//! One data channel at the destination, as a machine without I/O: numbering, rounds, and what an end mark must say.
//!
//! ```text
//!   InRound(k) ── ROUND_END(k) ──► AtFence(k) ── gate_opened(k+1) ──► InRound(k+1)
//! ```
//! The rule it keeps: nothing of round k+1 is admitted before the gate was opened, which the session does when every living
//! lane stands at the fence (SPEC: ROUND-3). Two versions of a page can then never race.

use multifd_wire::frame::RoundEnd;
use multifd_wire::{Header, Kind, Misbehaved, Round, Sequence};

/// The machine of one data channel.
#[derive(Debug)]
pub struct Lane {
    next: Sequence,
    round: Round,
    at_fence: bool,
    pages: u64,
    zero_pages: u64,
    /// It joined while rounds were under way: end marks of rounds that were closed before say nothing to it.
    behind: bool,
}

/// What an end mark means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// The lane stands at the fence now.
    Fence,
    /// The mark is of a round that was closed before the lane joined: the lane goes on (SPEC: ROUND-6).
    Past,
}

/// Where a lane begins to read that joins while rounds are under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begins {
    /// In this round, which is open (SPEC: ROUND-6).
    Within(Round),
    /// In this round, when the gate to it opens.
    Behind(Round),
}

impl Lane {
    /// A lane that has received nothing and may receive frames of `round`.
    #[must_use]
    pub fn new(round: Round) -> Self {
        Self {
            next: Sequence::FIRST,
            round,
            at_fence: false,
            pages: 0,
            zero_pages: 0,
            behind: false,
        }
    }

    /// A lane that joins again while `round` is open. The source may not know yet that earlier rounds were closed.
    #[must_use]
    pub fn rejoined(round: Round) -> Self {
        Self {
            behind: true,
            ..Self::new(round)
        }
    }

    /// The round that the lane is in, or whose end it has reached.
    #[must_use]
    pub fn round(&self) -> Round {
        self.round
    }

    /// Frames whose header was admitted.
    #[must_use]
    pub fn frames(&self) -> u64 {
        self.next.value()
    }

    /// A header came: is it its turn?
    ///
    /// # Errors
    /// [`Misbehaved::Sequence`], or [`Misbehaved::Order`] when the lane stands at the fence.
    pub fn header(&mut self, header: &Header) -> Result<(), Misbehaved> {
        header.check_sequence(self.next)?;
        if self.at_fence {
            return Err(Misbehaved::Order {
                kind: header.kind(),
            });
        }
        self.next = Sequence::new(self.next.value().saturating_add(1));
        Ok(())
    }

    /// A PAGES table of this round with this many pages.
    ///
    /// # Errors
    /// [`Misbehaved::Round`].
    pub fn pages(&mut self, round: Round, pages: u64) -> Result<(), Misbehaved> {
        self.check_round(round)?;
        self.behind = false;
        self.pages = self.pages.saturating_add(pages);
        Ok(())
    }

    /// A ZEROS table of this round with this many pages; `most` is what the guest has.
    ///
    /// # Errors
    /// [`Misbehaved::Round`]; [`Misbehaved::Amount`] for more pages than the guest has, which bounds the work per frame.
    pub fn zeros(&mut self, round: Round, pages: u64, most: u64) -> Result<(), Misbehaved> {
        self.check_round(round)?;
        if pages > most {
            return Err(Misbehaved::Amount {
                field: "zeros.page_count",
                expected: most,
                found: pages,
            });
        }
        self.behind = false;
        self.zero_pages = self.zero_pages.saturating_add(pages);
        Ok(())
    }

    /// The end mark: the lane stands at the fence now, unless it has just joined and the round is long closed.
    ///
    /// # Errors
    /// [`Misbehaved::Round`]; [`Misbehaved::Amount`] when it does not say what came.
    pub fn round_end(&mut self, mark: &RoundEnd) -> Result<Mark, Misbehaved> {
        // SPEC: ROUND-6
        if self.behind && mark.round < self.round && (mark.pages, mark.zero_pages) == (0, 0) {
            return Ok(Mark::Past);
        }
        self.check_round(mark.round)?;
        agree("round_end.pages", self.pages, mark.pages)?;
        agree("round_end.zero_pages", self.zero_pages, mark.zero_pages)?;
        self.at_fence = true;
        Ok(Mark::Fence)
    }

    /// The session opened the gate to `round`.
    ///
    /// # Errors
    /// [`Misbehaved::Order`] if the lane does not stand at the fence before it.
    pub fn gate_opened(&mut self, round: Round) -> Result<(), Misbehaved> {
        if !self.at_fence || self.round.next() != Some(round) {
            return Err(Misbehaved::Order {
                kind: Kind::RoundEnd,
            });
        }
        *self = Self {
            next: self.next,
            ..Self::new(round)
        };
        Ok(())
    }

    fn check_round(&self, found: Round) -> Result<(), Misbehaved> {
        if found == self.round {
            Ok(())
        } else {
            Err(Misbehaved::Round {
                expected: self.round,
                found,
            })
        }
    }
}

fn agree(field: &'static str, expected: u64, found: u64) -> Result<(), Misbehaved> {
    if expected == found {
        Ok(())
    } else {
        Err(Misbehaved::Amount {
            field,
            expected,
            found,
        })
    }
}

#[cfg(test)]
mod tests {
    use multifd_wire::{Body, Frame, HEADER_BYTES};

    use super::*;

    fn mark(round: u32, pages: u64, zero_pages: u64) -> RoundEnd {
        RoundEnd {
            round: Round::new(round),
            final_round: false,
            pages,
            zero_pages,
        }
    }

    fn header(sequence: u64) -> Header {
        let mut head = Vec::new();
        Frame::from(mark(0, 0, 0))
            .encode(Sequence::new(sequence), Body::None, &mut head)
            .unwrap();
        Header::decode(head[..HEADER_BYTES].try_into().unwrap()).unwrap()
    }

    #[test]
    fn refuses_a_frame_out_of_sequence() {
        let mut lane = Lane::new(Round::new(0));
        lane.header(&header(0)).unwrap();
        assert!(matches!(
            lane.header(&header(0)),
            Err(Misbehaved::Sequence {
                expected: 1,
                found: 0
            })
        ));
        assert!(matches!(
            lane.header(&header(2)),
            Err(Misbehaved::Sequence {
                expected: 1,
                found: 2
            })
        ));
        lane.header(&header(1)).unwrap();
        assert_eq!(lane.frames(), 2);
    }

    #[test]
    fn refuses_pages_of_another_round() {
        let mut lane = Lane::new(Round::new(3));
        assert!(matches!(
            lane.pages(Round::new(4), 1),
            Err(Misbehaved::Round { .. })
        ));
        assert!(matches!(
            lane.zeros(Round::new(2), 1, 9),
            Err(Misbehaved::Round { .. })
        ));
        assert!(matches!(
            lane.round_end(&mark(4, 0, 0)),
            Err(Misbehaved::Round { .. })
        ));
    }

    #[test]
    fn refuses_more_zero_pages_than_the_guest_has() {
        let mut lane = Lane::new(Round::new(0));
        lane.zeros(Round::new(0), 9, 9).unwrap();
        assert!(matches!(
            lane.zeros(Round::new(0), 10, 9),
            Err(Misbehaved::Amount { .. })
        ));
    }

    #[test]
    fn refuses_an_end_mark_that_does_not_say_what_came() {
        let mut lane = Lane::new(Round::new(0));
        lane.pages(Round::new(0), 3).unwrap();
        lane.zeros(Round::new(0), 4, 9).unwrap();
        assert!(matches!(
            lane.round_end(&mark(0, 2, 4)),
            Err(Misbehaved::Amount { .. })
        ));
        assert!(matches!(
            lane.round_end(&mark(0, 3, 5)),
            Err(Misbehaved::Amount { .. })
        ));
        lane.round_end(&mark(0, 3, 4)).unwrap();
    }

    #[test]
    fn a_lane_that_joins_again_passes_empty_marks_of_closed_rounds_and_nothing_else_of_them() {
        let mut lane = Lane::rejoined(Round::new(3));
        assert_eq!(lane.round_end(&mark(1, 0, 0)), Ok(Mark::Past));
        assert_eq!(lane.round_end(&mark(2, 0, 0)), Ok(Mark::Past));
        assert!(matches!(
            lane.pages(Round::new(2), 1),
            Err(Misbehaved::Round { .. })
        ));
        assert!(matches!(
            lane.round_end(&mark(2, 1, 0)),
            Err(Misbehaved::Round { .. })
        ));
        lane.pages(Round::new(3), 1).unwrap();
        assert!(
            lane.round_end(&mark(2, 0, 0)).is_err(),
            "it is past the closed rounds"
        );
        assert_eq!(lane.round_end(&mark(3, 1, 0)), Ok(Mark::Fence));
        let mut first = Lane::new(Round::new(3));
        assert!(
            first.round_end(&mark(2, 0, 0)).is_err(),
            "it was there from the beginning"
        );
    }

    #[test]
    fn admits_nothing_behind_the_fence_until_the_gate_opens_and_counts_anew() {
        let mut lane = Lane::new(Round::new(0));
        lane.pages(Round::new(0), 3).unwrap();
        assert!(
            lane.gate_opened(Round::new(1)).is_err(),
            "not at the fence yet"
        );
        lane.round_end(&mark(0, 3, 0)).unwrap();
        assert!(matches!(
            lane.header(&header(0)),
            Err(Misbehaved::Order { .. })
        ));
        assert!(
            lane.gate_opened(Round::new(2)).is_err(),
            "not the next round"
        );
        lane.gate_opened(Round::new(1)).unwrap();
        lane.header(&header(0)).unwrap();
        lane.round_end(&mark(1, 0, 0)).unwrap();
    }
}
