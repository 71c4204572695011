//! Watching lanes: slow ones from dead ones, those that carry nothing, and what is due.

use std::time::Duration;

use multifd_wire::{LaneId, Phase, Round};

use super::view::{Steps, View};
use super::{Effect, Lanes, Life};
use crate::source::error::{Error, Fault};

/// A lost lane is settled when the destination has read what the other lanes' sockets hold of the round before; this many
/// times the longest silence of a channel is more than that takes.
const SETTLE_STALLS: u32 = 3;

/// How often it is looked whether the destination takes what lanes carry.
pub(super) const WATCH_PERIOD: Duration = Duration::from_millis(100);

/// When nothing but silent lanes is waited for, with the guest paused or at the end of a round, a lane from which nothing was taken
/// for this long is not waited for any longer: what it carried is sent again on the others, which takes less time.
const LAST_LANE_STALL: Duration = Duration::from_millis(500);

/// So many times as long as a body should take at the measured bandwidth: a slow lane is not a dead one.
const LAST_BODIES: u32 = 8;

/// With the guest paused and no lane left the guest is let run again after this (SPEC: SWITCH-4).
pub(super) const PAUSED_ALONE_MAX: Duration = Duration::from_millis(300);

/// A lane that has just come back has this long for its first acknowledgement, before time that is used up ends the migration.
pub(super) const FIRST_ACK: Duration = Duration::from_millis(500);

/// What a living lane's ledger says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Which lane.
    pub lane: LaneId,
    /// Frames that were acknowledged.
    pub acked: u64,
    /// The round of the oldest frame that is not acknowledged.
    pub oldest: Option<Round>,
    /// Bytes that are not acknowledged.
    pub unacked_bytes: u64,
}

/// Bytes are on their way and none of them is acknowledged.
#[derive(Debug, Clone, Copy)]
pub(super) struct Starving {
    since: Duration,
    /// Channels that were lost meanwhile.
    losses: u32,
}

impl Lanes {
    /// Bytes were acknowledged.
    pub(in crate::source) fn took(&mut self) {
        self.starving = None;
    }

    /// Until when bytes must have been acknowledged, if they are waited for and channels were lost meanwhile. Channels that are opened
    /// again do not move it.
    pub(in crate::source) fn starves_at(&self, view: &View) -> Option<Duration> {
        let starving = self.starving.filter(|starving| starving.losses > 0)?;
        Some(starving.since + view.stall + view.reconnect)
    }

    /// The error when that time is over.
    pub(in crate::source) fn starved(&self, view: &View, now: Duration, last: String) -> Error {
        let (since, losses) = self
            .starving
            .map_or((now, 0), |starving| (starving.since, starving.losses));
        let waited_ms = now.saturating_sub(since).as_millis();
        let fault = Fault::NothingTaken {
            waited_ms,
            losses,
            last,
        };
        Error::new(view.phase, fault)
    }

    pub(super) fn count_loss(&mut self) {
        if let Some(starving) = &mut self.starving {
            starving.losses += 1;
        }
    }

    /// When the destination must have said at the latest what it has of a lost lane.
    fn settle_deadline(&self, view: &View) -> Option<Duration> {
        // It does not say so once it has said PREPARED (SPEC: PREP-2).
        if view.committed {
            return None;
        }
        let dying = self.lanes.iter().filter_map(|lane| match lane.life {
            Life::Dying { since } => Some(since),
            _ => None,
        });
        Some(dying.min()? + view.stall * SETTLE_STALLS)
    }

    fn starving_due(&self, view: &View) -> Option<Duration> {
        let watched = view.in_rounds() && view.needs_lanes && !view.reconnect.is_zero();
        let at = self.starves_at(view).filter(|_| watched)?;
        Some(at.max(self.up_at + FIRST_ACK))
    }

    /// When [`Self::tick`] is due next.
    pub(in crate::source) fn due(&self, view: &View) -> Duration {
        let watch = if view.in_rounds() {
            Some(self.watch_due.unwrap_or_default())
        } else {
            None
        };
        let redials = self
            .lanes
            .iter()
            .filter(|lane| match lane.life {
                Life::Due => true,
                Life::Dead => view.dials_again(),
                _ => false,
            })
            .filter_map(|lane| lane.redial.map(|redial| redial.due));
        let alone = self.alone_since.filter(|_| view.dials_again());
        let alone = alone.map(|since| since + view.reconnect);
        let paused = self.alone_since.filter(|_| self.ends_pause(view));
        let paused = paused.map(|since| since + PAUSED_ALONE_MAX);
        redials
            .chain(watch)
            .chain(alone)
            .chain(paused)
            .chain(self.settle_deadline(view))
            .chain(self.starving_due(view))
            .min()
            .unwrap_or(Duration::MAX)
    }

    fn ends_pause(&self, view: &View) -> bool {
        view.kept && view.phase == Phase::Switchover
    }

    /// Since when no lane lives although one is needed.
    pub(in crate::source) fn alone_since(&self) -> Option<Duration> {
        self.alone_since
    }

    /// Does what is due.
    pub(in crate::source) fn tick(&mut self, view: &View, now: Duration) -> Steps {
        if self.settle_deadline(view).is_some_and(|due| now >= due) {
            let what = "the destination to say what it has of a lost lane";
            return Steps::lost(Error::new(view.phase, Fault::Timeout { what }));
        }
        // SPEC: LANE-9
        if !view.needs_lanes {
            self.alone_since = None;
        }
        let mut steps = Steps::default();
        // Whether or not a lane that is lost is dialled again: the others have to know that it is.
        if !view.in_rounds() {
            self.watch_due = None;
        } else if self.watch_due.is_none_or(|due| now >= due) {
            self.watch_due = Some(now + WATCH_PERIOD);
            steps = Steps::from([Effect::LookAtLanes]);
        }
        if let Some(since) = self.alone_since
            && self.ends_pause(view)
            && now >= since + PAUSED_ALONE_MAX
        {
            let last = "the guest is paused, and none came back at once".to_owned();
            let error = Error::new(view.phase, Fault::AllLanesLost { last });
            return steps.then(Steps::lost(error));
        }
        if self.starving_due(view).is_some_and(|due| now >= due) {
            let last = "lanes were lost as often as they were opened again".to_owned();
            return steps.then(Steps::failed(self.starved(view, now, last)));
        }
        steps.effects.extend(self.dial_due(view, now));
        if !view.dials_again() {
            return steps;
        }
        let due: Vec<LaneId> = self
            .numbered()
            .filter(|(_, lane)| lane.life == Life::Dead)
            .filter(|(_, lane)| lane.redial.is_some_and(|redial| redial.due <= now))
            .map(|(id, _)| id)
            .collect();
        for id in due {
            steps.effects.extend(self.redial(id, view, now));
        }
        if let Some(since) = self.alone_since
            && now >= since + view.reconnect
        {
            let last = format!(
                "none could be opened again within {:?}",
                now.saturating_sub(since)
            );
            let error = Error::new(view.phase, Fault::AllLanesLost { last });
            return steps.then(Steps::failed(error));
        }
        steps
    }

    /// Tells slow lanes from dead ones. A slow lane's acknowledgements move; a dead one's do not, although the destination waits
    /// for nothing else on it: every round before that of its oldest frame is closed.
    pub(in crate::source) fn seen(
        &mut self,
        seen: &[Seen],
        view: &View,
        now: Duration,
    ) -> Vec<Effect> {
        if seen.iter().any(|seen| seen.unacked_bytes > 0) {
            let begins = Starving {
                since: now,
                losses: 0,
            };
            self.starving.get_or_insert(begins);
        }
        let alive = self.alive();
        let soon = LAST_LANE_STALL
            .max(self.body_time(view, alive).saturating_mul(LAST_BODIES))
            .min(view.stall);
        let (mut dead, mut silent, mut busy, mut idle) = (Vec::new(), Vec::new(), 0, 0);
        for seen in seen {
            let Some(lane) = self.get(seen.lane).filter(|lane| lane.life == Life::Alive) else {
                continue;
            };
            let waits_for_others = seen
                .oldest
                .is_none_or(|round| round.value() > view.rounds_closed);
            idle += u32::from(waits_for_others);
            if waits_for_others || seen.acked != lane.acked.0 {
                lane.acked = (seen.acked, now);
                busy += u32::from(!waits_for_others);
                continue;
            }
            let silence = now.saturating_sub(lane.acked.1);
            if silence > view.stall {
                dead.push(seen.lane);
            } else if silence > soon {
                silent.push(seen.lane);
            } else {
                busy += 1;
            }
        }
        // The round, and a guest that runs nowhere, wait for them alone; a lane without anything on its way is there to take over.
        let alone = if view.phase == Phase::Switchover {
            alive > 1
        } else {
            busy == 0 && idle > 0 && view.dials_again()
        };
        if alone {
            dead.extend(silent);
        }
        dead.into_iter()
            .map(|id| {
                if let Some(lane) = self.get(id) {
                    let what = "the destination to take anything on this lane";
                    lane.failing = Some(Fault::Timeout { what });
                }
                // Its thread then says that it has ended, and the rest follows.
                Effect::CloseLane { lane: id }
            })
            .collect()
    }

    /// How long one body on each lane takes at the measured bandwidth.
    fn body_time(&self, view: &View, alive: u32) -> Duration {
        view.bandwidth.map_or(Duration::ZERO, |bandwidth| {
            let bodies = view.body_bytes * f64::from(alive);
            Duration::try_from_secs_f64(bodies / bandwidth.max(1.0)).unwrap_or(Duration::MAX)
        })
    }
}
