//! Losing lanes, one or all, and settling with the destination what they carried.

use std::time::Duration;

use multifd_wire::frame::LaneDown;
use multifd_wire::{ChannelRef, Incarnation, LaneId, Misbehaved, Reason};

use super::view::{Steps, View};
use super::{Effect, Lane, Lanes, Life, unknown};
use crate::source::error::{Error, Fault};
use crate::source::redial::Redial;

impl Lanes {
    /// A lane's thread has ended; with a fault unless it ended in peace.
    pub(in crate::source) fn ended(
        &mut self,
        id: LaneId,
        incarnation: Incarnation,
        fault: Option<Fault>,
        view: &View,
        now: Duration,
    ) -> Steps {
        let Some(lane) = self.get(id).filter(|lane| lane.incarnation == incarnation) else {
            return Steps::default();
        };
        let Some(fault) = lane.failing.take().or(fault) else {
            return Steps::default();
        };
        let error = |fault| Error::new(view.phase, fault).at(ChannelRef::Lane(id));
        match lane.life {
            Life::Due | Life::Dying { .. } | Life::Dead => Steps::default(),
            Life::Redialling { .. } => self.not_opened(id, fault, view, now),
            // The first set-up is made with all lanes at once, or again from the start.
            Life::Dialling if view.rejoining && view.first_set_up() => Steps::lost(error(fault)),
            // Lost like the control channel may be: the set-up is made again, if it can be.
            Life::Alive if view.first_set_up() => Steps::lost(error(fault)),
            Life::Dialling if matches!(fault, Fault::Channel(_)) => Steps::lost(error(fault)),
            // The destination has lost the control channel whose ticket it was; this side sees that in a moment (SPEC: RESUME-13).
            Life::Dialling if fault.is_bad_ticket() => Steps::lost(error(fault)),
            // What may pass was tried again until the hello's deadline: a migration begins with all its lanes or not at all.
            Life::Dialling => Steps::failed(error(fault)),
            Life::Alive => {
                lane.life = Life::Dying { since: now };
                self.count_loss();
                let why = fault.to_string();
                let gone = Steps::from([Effect::LaneGone { lane: id, why }]);
                if view.needs_lanes && !view.dials_again() && self.alive() == 0 {
                    let last = fault.to_string();
                    return gone.then(Steps::failed(error(Fault::AllLanesLost { last })));
                }
                gone.then(Steps::from([lane_down(id, incarnation)]))
                    .then(self.check_alone(view, now))
            }
        }
    }

    /// The destination lost a lane, or has settled one that this side lost.
    pub(in crate::source) fn down(
        &mut self,
        down: LaneDown,
        view: &View,
        now: Duration,
    ) -> Result<Steps, Misbehaved> {
        let (id, incarnation) = (down.lane, down.incarnation);
        // About a connection before this one: it was settled before the lane was dialled again.
        if self
            .get(id)
            .is_some_and(|lane| incarnation < lane.incarnation)
        {
            return Ok(Steps::default());
        }
        self.known(id, incarnation)?;
        if view.first_set_up() {
            // It is made with all lanes at once, or again from the start.
            let error = Error::new(
                view.phase,
                Fault::LaneDown {
                    reason: down.reason,
                },
            );
            return Ok(Steps::lost(error.at(ChannelRef::Lane(id))));
        }
        let Some(lane) = self.get(id) else {
            return Ok(Steps::default());
        };
        Ok(match lane.life {
            // It was let in, and lost before this side knew.
            Life::Redialling { .. } => {
                lane.life = Life::Redialling { given_up: true };
                Steps::default()
            }
            // Both sides know: what the destination has of it was acknowledged before this frame, the rest comes back.
            Life::Dying { .. } => self.settle(id, view, now),
            Life::Dead => Steps::default(),
            Life::Dialling | Life::Due | Life::Alive => {
                lane.failing = None;
                lane.encoded = None;
                self.count_loss();
                // SPEC: LANE-2
                let why = format!("the destination lost it: {}", down.reason);
                Steps::from([
                    Effect::LaneGone { lane: id, why },
                    Effect::Send(down.into()),
                ])
                .then(self.settle(id, view, now))
            }
        })
    }

    /// What the destination has of a lost lane is known: everything else of it comes back.
    fn settle(&mut self, id: LaneId, view: &View, now: Duration) -> Steps {
        let Some(lane) = self.get(id) else {
            return Steps::default();
        };
        lane.life = Life::Dead;
        let settle = Steps::from([Effect::SettleLane { lane: id }]);
        let gone = |lane: &Lane| matches!(lane.life, Life::Dead | Life::Dying { .. });
        if view.needs_lanes && !view.dials_again() && self.lanes.iter().all(gone) {
            let last = "closed by the destination".to_owned();
            let error = Error::new(view.phase, Fault::AllLanesLost { last });
            return settle.then(Steps::failed(error.at(ChannelRef::Lane(id))));
        }
        if let Some(lane) = self.get(id) {
            lane.redial = view
                .dials_again()
                .then(|| Redial::at_once(now, now + view.reconnect));
        }
        settle.then(self.check_alone(view, now))
    }

    /// Whether no lane is left, and what follows: a wait for one to come back, or the end.
    pub(super) fn check_alone(&mut self, view: &View, now: Duration) -> Steps {
        // On the way back the time is that of the resume.
        if !view.needs_lanes || view.rejoining || self.alive() > 0 {
            return Steps::default();
        }
        let hope = |lane: &Lane| lane.life != Life::Dead || lane.redial.is_some();
        if view.dials_again() && self.lanes.iter().any(hope) {
            self.alone_since.get_or_insert(now);
            return Steps::default();
        }
        if !view.in_rounds() {
            return Steps::default();
        }
        let last = "it could not be opened again".to_owned();
        Steps::failed(Error::new(view.phase, Fault::AllLanesLost { last }))
    }

    /// All channels are lost. What the lanes carried is settled by LANDED.
    pub(in crate::source) fn disconnect(&mut self) {
        for lane in &mut self.lanes {
            lane.life = Life::Dead;
            (lane.redial, lane.last) = (None, None);
            lane.failing = None;
            lane.with_all = true;
            // A resume that came to nothing has left no ledger of its own behind.
            lane.before.get_or_insert(lane.incarnation);
        }
        self.count_loss();
        (self.open, self.current, self.alone_since) = (None, None, None);
    }

    /// The frames that LANDED settles, of each lane's connection before the resume.
    pub(in crate::source) fn landed(
        &mut self,
        mark: impl Fn(LaneId) -> Option<(Incarnation, u64)>,
    ) -> Result<Vec<(LaneId, u64)>, Misbehaved> {
        let mut settled = Vec::new();
        for (id, lane) in self.numbered() {
            let Some(before) = lane.before else { continue };
            let frames = match mark(id) {
                Some((incarnation, _)) if incarnation > before => {
                    return Err(unknown(id, incarnation));
                }
                Some((incarnation, frames)) if incarnation == before => frames,
                _ => 0,
            };
            settled.push((id, frames));
        }
        for lane in &mut self.lanes {
            lane.before = None;
        }
        Ok(settled)
    }
}

/// Tells the destination that a lane is lost here.
pub(super) fn lane_down(lane: LaneId, incarnation: Incarnation) -> Effect {
    let down = LaneDown {
        lane,
        incarnation,
        reason: Reason::ChannelsLost,
    };
    Effect::Send(down.into())
}
