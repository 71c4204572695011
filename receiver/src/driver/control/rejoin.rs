//! Lanes that were lost and are dialled again by the source (SPEC: LANE-2, LANE-5, ROUND-6, RESUME-14).
//!
//! The rule it keeps: a lane is part of the fence before the source may send the first octet on it. The acceptance is
//! therefore sent from here and not by the greeter: no round can be closed between the two.

use std::cmp::Ordering;
use std::time::{Duration, Instant};

use multifd_wire::frame::LaneDown;
use multifd_wire::{ChannelRef, Incarnation, LaneId, Misbehaved, Reason};

use super::{Control, Slot};
use crate::driver::greet::{Joined, turn_away};
use crate::driver::lane::Begins;
use crate::session::{Entry, Event};

/// An acceptance is 256 octets on a channel that has carried nothing: it never waits, unless the channel is lost.
const ANSWER_MAX: Duration = Duration::from_secs(1);

impl Control {
    /// Whether this is the newest incarnation of the lane here: notes of older ones are old news.
    pub(super) fn is_newest(&self, lane: LaneId, incarnation: Incarnation) -> bool {
        self.lanes
            .iter()
            .any(|slot| slot.id == lane && slot.incarnation == incarnation)
    }

    /// Takes a lane in that was lost before, if the session still needs it.
    pub(super) fn rejoined(&mut self, mut joined: Joined) {
        let (lane, incarnation) = (joined.lane, joined.incarnation);
        let entry = self
            .session
            .as_ref()
            .map_or(Entry::Refused, |session| session.entry(lane));
        let place = self.lanes.iter().position(|slot| slot.id == lane);
        let given_up = self
            .given_up
            .get(&lane)
            .is_some_and(|newest| incarnation <= *newest);
        let begins = match entry {
            Entry::Setup => None,
            Entry::Round(round) => Some(Begins::Within(round)),
            Entry::BehindFence(round) => Some(Begins::Behind(round)),
            Entry::Refused => {
                let refusal = (Reason::ShuttingDown, "this lane is not wanted now");
                return turn_away(&self.shared, (joined.tx, joined.rx), joined.reply, refusal);
            }
        };
        let lives = place
            .and_then(|place| self.lanes.get(place))
            .is_some_and(|slot| !slot.ended);
        if given_up || lives {
            let refusal = (Reason::Misbehaved, "this incarnation of the lane is over");
            return turn_away(&self.shared, (joined.tx, joined.rx), joined.reply, refusal);
        }
        if let Some(reply) = joined.reply.take() {
            joined.tx.set_deadline(Some(Instant::now() + ANSWER_MAX));
            if let Err(error) = joined.tx.send(&reply.encode(), &[]) {
                tracing::warn!(%lane, %error, "a lane was lost again before it was let in");
                return;
            }
            joined.tx.set_deadline(None);
        }
        let mut slot = Slot::new(joined);
        if let (Some(begins), Some(landing)) = (begins, &self.landing)
            && let Err(error) = slot.start(
                &self.shared,
                landing,
                &self.gate,
                self.inventory.as_ref(),
                begins,
            )
        {
            return self.drive(Event::Failed(error.at(ChannelRef::Lane(lane))));
        }
        match place {
            Some(place) => {
                let old = std::mem::replace(&mut self.lanes[place], slot);
                // It has said its last word; to wait for it takes no time.
                if let Some(thread) = old.thread {
                    let _ = thread.join();
                }
            }
            None => self.lanes.push(slot),
        }
        self.lanes.sort_by_key(|slot| slot.id);
        self.timeline.lanes_rejoined += 1;
        self.count_lanes();
        self.drive(Event::LaneJoined { lane });
    }

    /// The source gave a lane up.
    pub(super) fn lane_down(
        &mut self,
        lane: LaneId,
        incarnation: Incarnation,
        reason: Reason,
    ) -> Result<(), Misbehaved> {
        let unknown = Misbehaved::Lane {
            channel: ChannelRef::Lane(lane),
            incarnation: incarnation.value(),
        };
        let lost = self
            .session
            .as_ref()
            .is_some_and(|session| session.is_lost(lane));
        let slot = self.lanes.iter().find(|slot| slot.id == lane);
        match slot.map(|slot| (slot, incarnation.cmp(&slot.incarnation))) {
            Some((slot, Ordering::Equal)) => {
                tracing::warn!(%lane, %reason, "the source lost a lane");
                // Its thread ends, and with it goes our own LANE_DOWN.
                slot.give_up(&self.gate);
            }
            // An answer to ours that was overtaken by the lane's next hello.
            Some((_, Ordering::Less)) => {}
            // The source dialled, and does not know whether it was let in. It was not, and never will be.
            None | Some((_, Ordering::Greater)) if lost => {
                self.given_up.insert(lane, incarnation);
                self.send(LaneDown {
                    lane,
                    incarnation,
                    reason,
                });
            }
            _ => return Err(unknown),
        }
        Ok(())
    }

    /// Frames on data channels are what goes on; signs of life on the control channel are not.
    pub(super) fn note_progress(&mut self, now: Duration) {
        let frames = self
            .shared
            .counters
            .frames
            .load(std::sync::atomic::Ordering::Relaxed);
        if frames != self.frames_seen {
            self.frames_seen = frames;
            if let Some(session) = &mut self.session {
                session.progressed(now);
            }
        }
    }
}
