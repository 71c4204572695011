//! The lives of the data channels: who may join, who is waited for at the end of a round, who is lost, what was acknowledged.
//!
//! ```text
//!   Expected ──joined──► InRound ◄──gate──► AtFence          first set-up: every lane is expected
//!      ▲                    │ ended            │ ended       on the way back: lanes are lost until they join
//!      └── before READY ────┴──────► Lost ◄────┘
//!                                     └──joined again, higher incarnation──► InRound, or AtFence while the gate is shut
//! ```
//! The rules it keeps: a lane is named by its number *and* its incarnation, so that nothing of an old connection is taken for the
//! new one; and for the fence a lane lives until its channel has ended (SPEC: LANE-4), also when the source gave it up before.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::time::Duration;

use multifd_wire::frame::{LaneMark, RawLaneMark};
use multifd_wire::{ChannelRef, Incarnation, LaneId, Misbehaved};

/// Where a lane is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Life {
    /// It has to join before READY.
    Expected,
    /// It is read; before READY: it waits to be.
    InRound,
    /// It has reached the end of the round, and waits at the gate.
    AtFence {
        /// Its mark said that the guest is paused in the round.
        last: bool,
    },
    /// It was lost, or has not joined after a resume.
    Lost,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    life: Life,
    /// The newest connection that was let in, and the one before it.
    incarnation: Option<Incarnation>,
    before: Option<Incarnation>,
    /// Connections up to this one were given up by the source before they joined (SPEC: LANE-7).
    given_up: Option<Incarnation>,
    /// How many of its frames were acknowledged.
    acked: u64,
    /// Since when its channel is being closed: it has to end.
    closing: Option<Duration>,
}

impl Slot {
    fn lives(&self) -> bool {
        matches!(self.life, Life::InRound | Life::AtFence { .. })
    }
}

/// What the source's LANE_DOWN asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Down {
    /// Close the channel; the answer follows when it has ended.
    Close,
    /// Answer at once: the connection was never here, and never will be.
    Answer,
    /// Nothing: it answers ours, or is about a connection before this one.
    Settled,
}

/// Whether a data channel may join.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Door {
    /// It may.
    Open,
    /// It lives still, or this connection of it was given up.
    Over,
    /// There is no such lane.
    Unknown,
}

/// All lanes of the control channel that there is.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    slots: Vec<Slot>,
    /// How far the frames of lanes of earlier control channels were handled (SPEC: LANDED-1).
    landed: BTreeMap<LaneId, LaneMark>,
}

impl Lanes {
    /// SETUP_END: there are so many lanes, all in this state.
    pub(super) fn announce(&mut self, lanes: u32, life: Life) {
        let slot = Slot {
            life,
            incarnation: None,
            before: None,
            given_up: None,
            acked: 0,
            closing: None,
        };
        self.slots = vec![slot; lanes as usize];
    }

    /// The channels are lost. What is said of these lanes from now on is about nothing.
    pub(super) fn clear(&mut self) {
        self.slots.clear();
    }

    /// No lane of earlier control channels can land anything more.
    pub(super) fn settle(&mut self, marks: &[LaneMark]) {
        // SPEC: LANDED-1
        for mark in marks.iter().filter(|mark| mark.frames > 0) {
            self.landed.insert(mark.lane, *mark);
        }
    }

    /// How far those were handled.
    pub(super) fn landed(&self) -> impl Iterator<Item = LaneMark> {
        self.landed.values().copied()
    }

    fn slot(&self, lane: LaneId) -> Option<&Slot> {
        self.slots.get(lane.value() as usize)
    }

    fn slot_mut(&mut self, lane: LaneId) -> Option<&mut Slot> {
        self.slots.get_mut(lane.value() as usize)
    }

    /// This connection, while it lives.
    fn current(&mut self, lane: LaneId, incarnation: Incarnation) -> Option<&mut Slot> {
        self.slot_mut(lane)
            .filter(|slot| slot.lives() && slot.incarnation == Some(incarnation))
    }

    /// Whether this connection lives.
    pub(super) fn is_current(&mut self, lane: LaneId, incarnation: Incarnation) -> bool {
        self.current(lane, incarnation).is_some()
    }

    /// Whether this connection may join. Each incarnation comes once, and they rise (SPEC: JOIN-3).
    pub(super) fn door(&self, lane: LaneId, incarnation: Incarnation) -> Door {
        let Some(slot) = self.slot(lane) else {
            return Door::Unknown;
        };
        let over = |newest: Option<Incarnation>| newest.is_some_and(|it| incarnation <= it);
        if slot.lives() || over(slot.incarnation) || over(slot.given_up) {
            Door::Over
        } else {
            Door::Open
        }
    }

    /// It was let in.
    pub(super) fn join(&mut self, lane: LaneId, incarnation: Incarnation, life: Life) {
        if let Some(slot) = self.slot_mut(lane) {
            slot.before = slot.incarnation.replace(incarnation);
            (slot.life, slot.acked, slot.closing) = (life, 0, None);
        }
    }

    /// It was let in and does not know: as if it had never come.
    pub(super) fn unheard(&mut self, lane: LaneId, incarnation: Incarnation, life: Life) -> bool {
        let Some(slot) = self.current(lane, incarnation) else {
            return false;
        };
        slot.incarnation = slot.before;
        slot.life = life;
        true
    }

    /// The source gave a connection up.
    pub(super) fn down(
        &mut self,
        lane: LaneId,
        incarnation: Incarnation,
        now: Duration,
    ) -> Result<Down, Misbehaved> {
        let unknown = Misbehaved::Lane {
            channel: ChannelRef::Lane(lane),
            incarnation: incarnation.value(),
        };
        let slot = self.slot_mut(lane).ok_or(unknown)?;
        let order = slot.incarnation.map(|newest| incarnation.cmp(&newest));
        match order {
            Some(Ordering::Equal) if slot.lives() => {
                slot.closing.get_or_insert(now);
                Ok(Down::Close)
            }
            Some(Ordering::Equal | Ordering::Less) => Ok(Down::Settled),
            // It dialled, and does not know whether it was let in. It was not, and never will be (SPEC: LANE-7). The channel of the
            // attempt before, which it gave up too, may still be closing.
            None | Some(Ordering::Greater) if !slot.lives() || slot.closing.is_some() => {
                slot.given_up = slot.given_up.max(Some(incarnation));
                Ok(Down::Answer)
            }
            _ => Err(unknown),
        }
    }

    /// Its channel has ended. Gives how far it is to be acknowledged, or nothing if this is not the connection that lives.
    pub(super) fn end(&mut self, mark: LaneMark, life: Life) -> Option<Option<LaneMark>> {
        let slot = self.current(mark.lane, mark.incarnation)?;
        slot.life = life;
        let unacked = mark.frames > slot.acked;
        slot.acked = mark.frames;
        Some(unacked.then_some(mark))
    }

    /// It has reached the end of the round. False if it is not in the round.
    pub(super) fn arrive(&mut self, lane: LaneId, incarnation: Incarnation, last: bool) -> bool {
        let slot = self.current(lane, incarnation);
        let Some(slot) = slot.filter(|slot| slot.life == Life::InRound) else {
            return false;
        };
        slot.life = Life::AtFence { last };
        true
    }

    /// The gate was opened.
    pub(super) fn pass_gate(&mut self) {
        for slot in &mut self.slots {
            if matches!(slot.life, Life::AtFence { .. }) {
                slot.life = Life::InRound;
            }
        }
    }

    /// Whether every lane that has to be there is, and at least one (SPEC: READY-1, RESUME-14).
    pub(super) fn are_ready(&self) -> bool {
        !self.none_lives() && self.slots.iter().all(|slot| slot.life != Life::Expected)
    }

    /// Whether the end of the round is waited for, and by a lane (SPEC: ROUND-3). A round that no living lane has ended is not
    /// over: the source will dial one, and end the round on it.
    pub(super) fn all_at_fence(&self) -> bool {
        let waits = |slot: &Slot| matches!(slot.life, Life::Expected | Life::InRound);
        !self.none_lives() && !self.slots.iter().any(waits)
    }

    pub(super) fn none_lives(&self) -> bool {
        !self.slots.iter().any(Slot::lives)
    }

    /// The lane whose channel has been closing for longest, and since when.
    pub(super) fn closing(&self) -> Option<(u32, Duration)> {
        let closing = |(lane, slot): (u32, &Slot)| {
            let since = slot.closing.filter(|_| slot.lives())?;
            Some((lane, since))
        };
        let all = (0..).zip(&self.slots).filter_map(closing);
        all.min_by_key(|(_, since)| *since)
    }

    /// How many live.
    pub(super) fn alive(&self) -> u32 {
        let alive = self.slots.iter().filter(|slot| slot.lives()).count();
        u32::try_from(alive).unwrap_or(u32::MAX)
    }

    /// Whether it was lost, or has not come back after a resume.
    pub(super) fn is_lost(&self, lane: LaneId) -> bool {
        self.slot(lane).is_some_and(|slot| slot.life == Life::Lost)
    }

    /// What the marks of those at the end of the round say of the guest: paused or not. `None` if they do not agree.
    pub(super) fn verdict(&self) -> Option<bool> {
        let mut marks = self.slots.iter().filter_map(|slot| match slot.life {
            Life::AtFence { last } => Some(last),
            _ => None,
        });
        let first = marks.next().unwrap_or(false);
        marks.all(|mark| mark == first).then_some(first)
    }

    /// Frames were handled: what is new in that, to be acknowledged.
    pub(super) fn acknowledge(&mut self, marks: &[LaneMark]) -> Vec<RawLaneMark> {
        let mut news = Vec::new();
        for mark in marks {
            if let Some(slot) = self.current(mark.lane, mark.incarnation)
                && mark.frames > slot.acked
            {
                slot.acked = mark.frames;
                news.push(RawLaneMark::from(*mark));
            }
        }
        news
    }

    /// For the printed table.
    #[cfg(test)]
    pub(super) fn in_words(&self) -> String {
        let word = |slot: &Slot| match slot.life {
            Life::Expected => "expected",
            Life::InRound if slot.closing.is_some() => "closing",
            Life::InRound => "in",
            Life::AtFence { last: false } => "at the fence",
            Life::AtFence { last: true } => "at the fence, paused",
            Life::Lost => "lost",
        };
        let words: Vec<&str> = self.slots.iter().map(word).collect();
        words.join(" | ")
    }

    #[cfg(test)]
    pub(super) fn life(&self, lane: LaneId) -> Option<Life> {
        Some(self.slot(lane)?.life)
    }

    /// Which connection of it would be the next.
    #[cfg(test)]
    pub(super) fn next_incarnation(&self, lane: LaneId) -> u32 {
        let slot = self.slot(lane);
        let newest = slot.and_then(|slot| slot.incarnation.max(slot.given_up));
        newest.map_or(0, |newest| newest.value() + 1)
    }
}
