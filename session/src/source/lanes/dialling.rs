//! Opening lanes: for the first time, all with one deadline; and again, each by itself.

use std::time::Duration;

use multifd_wire::{ChannelRef, Incarnation, LaneId, Reason, Round};

use super::losing::lane_down;
use super::view::{Steps, View};
use super::{Effect, Lane, Lanes, Life};
use crate::source::error::{Error, Fault};
use crate::source::hello::NotOpened;
use crate::source::redial::{First, Next, Redial};

impl Lanes {
    /// For the first time, all with one deadline.
    pub(in crate::source) fn dial(
        &mut self,
        count: u32,
        view: &View,
        now: Duration,
    ) -> Vec<Effect> {
        let until = now + view.timing.hello;
        let first = Incarnation::new(0);
        (0..count)
            .map(LaneId::new)
            .map(|lane| {
                self.lanes.push(Lane {
                    incarnation: first,
                    life: Life::Dialling,
                    encoded: None,
                    redial: Some(Redial::at_once(now, until)),
                    last: None,
                    with_all: false,
                    acked: (0, Duration::ZERO),
                    failing: None,
                    before: None,
                });
                Effect::DialLane {
                    lane,
                    incarnation: first,
                    attempt: view.first_attempt(lane, first, until),
                }
            })
            .collect()
    }

    /// The first attempts that are due again.
    pub(super) fn dial_due(&mut self, view: &View, now: Duration) -> Vec<Effect> {
        let mut effects = Vec::new();
        for (id, lane) in (0..).map(LaneId::new).zip(&mut self.lanes) {
            let Some(redial) = lane.redial.filter(|redial| redial.due <= now) else {
                continue;
            };
            if lane.life == Life::Due {
                lane.life = Life::Dialling;
                // SPEC: JOIN-3. The one before may have been let in, and its answer lost.
                lane.incarnation = Incarnation::new(lane.incarnation.value().saturating_add(1));
                effects.push(Effect::DialLane {
                    lane: id,
                    incarnation: lane.incarnation,
                    attempt: view.first_attempt(id, lane.incarnation, redial.until),
                });
            }
        }
        effects
    }

    /// Dials all lanes of a resumed session (SPEC: RESUME-5).
    pub(in crate::source) fn dial_all_again(&mut self, view: &View, now: Duration) -> Vec<Effect> {
        let redial = Redial::at_once(now, now + view.reconnect);
        let all = !view.comes_back();
        let ids: Vec<LaneId> = self.numbered().map(|(id, _)| id).collect();
        let mut effects = Vec::new();
        for id in ids {
            effects.extend(self.redial(id, view, now));
            if let Some(lane) = self.get(id) {
                if all {
                    lane.life = Life::Dialling;
                } else {
                    lane.redial = Some(redial);
                }
            }
        }
        effects
    }

    pub(super) fn redial(&mut self, id: LaneId, view: &View, now: Duration) -> Option<Effect> {
        let lane = self.get(id)?;
        // SPEC: JOIN-3
        lane.incarnation = Incarnation::new(lane.incarnation.value().saturating_add(1));
        lane.life = Life::Redialling { given_up: false };
        lane.encoded = None;
        Some(Effect::DialLane {
            lane: id,
            incarnation: lane.incarnation,
            attempt: view.another_attempt(id, lane.incarnation, now),
        })
    }

    /// A connection is open and its hello was accepted.
    pub(in crate::source) fn up(
        &mut self,
        id: LaneId,
        incarnation: Incarnation,
        view: &View,
        now: Duration,
    ) -> Steps {
        let Some(lane) = self.get(id).filter(|lane| lane.incarnation == incarnation) else {
            return Steps::default();
        };
        match lane.life {
            Life::Dialling => {
                lane.life = Life::Alive;
                (lane.redial, lane.last) = (None, None);
                self.up_at = now;
                Steps::default()
            }
            Life::Redialling { given_up: true } => {
                let lost = Fault::LaneDown {
                    reason: Reason::ChannelsLost,
                };
                self.not_opened(id, lost, view, now)
            }
            Life::Redialling { given_up: false } => {
                lane.life = Life::Alive;
                lane.redial = None;
                lane.acked = (0, now);
                let by_itself = !std::mem::replace(&mut lane.with_all, false);
                self.alone_since = None;
                self.up_at = now;
                let was_paused = |round| view.paused_from.is_some_and(|from| round >= from);
                let until = self.current.map_or(0, Round::value);
                let behind = (view.rounds_closed..until)
                    .map(Round::new)
                    .map(|round| (round, was_paused(round)))
                    .collect();
                Steps::from([Effect::LaneBack {
                    lane: id,
                    behind,
                    by_itself,
                }])
            }
            // The destination gave it up before this was known.
            Life::Due | Life::Alive | Life::Dying { .. } | Life::Dead => {
                Steps::from([Effect::CloseLane { lane: id }])
            }
        }
    }

    /// An attempt came to nothing, and the lane's thread has ended with it.
    pub(in crate::source) fn unopened(
        &mut self,
        id: LaneId,
        incarnation: Incarnation,
        why: NotOpened,
        view: &View,
        now: Duration,
    ) -> Steps {
        let first = |lane: &&mut Lane| {
            lane.incarnation == incarnation && lane.life == Life::Dialling && lane.redial.is_some()
        };
        let again = !(view.rejoining && view.first_set_up());
        let Some(lane) = self.get(id).filter(first).filter(|_| again) else {
            return self.ended(id, incarnation, Some(why.fault), view, now);
        };
        let next = lane
            .redial
            .as_mut()
            .map(|redial| redial.first_failed(&why, now));
        let last = lane.last.take();
        let fault = match next {
            Some(First::Again) => {
                lane.life = Life::Due;
                lane.last = Some(why.fault);
                return Steps::default();
            }
            Some(First::OutOfTime) => last.unwrap_or(why.fault),
            // An attempt whose answer was lost may have been let in, and then this one is not: the set-up is made again.
            Some(First::Over) | None
                if matches!(why.fault, Fault::Refused { .. })
                    && matches!(last, Some(Fault::NoAnswer { .. })) =>
            {
                let error = Error::new(view.phase, why.fault).at(ChannelRef::Lane(id));
                return Steps::lost(error);
            }
            Some(First::Over) | None => why.fault,
        };
        self.ended(id, incarnation, Some(fault), view, now)
    }

    /// An attempt came to nothing.
    pub(super) fn not_opened(
        &mut self,
        id: LaneId,
        fault: Fault,
        view: &View,
        now: Duration,
    ) -> Steps {
        let Some(lane) = self.get(id) else {
            return Steps::default();
        };
        lane.life = Life::Dead;
        let incarnation = lane.incarnation;
        if lane.redial.as_mut().map(|redial| redial.failed(now)) == Some(Next::GiveUp) {
            lane.redial = None;
        }
        // The destination may have let it in: nothing came on it, and nothing will (SPEC: LANE-1).
        let mut steps = Steps::from([Effect::CloseLane { lane: id }, lane_down(id, incarnation)]);
        steps.not_opened = Some(Error::new(view.phase, fault).at(ChannelRef::Lane(id)));
        steps.then(self.check_alone(view, now))
    }
}
