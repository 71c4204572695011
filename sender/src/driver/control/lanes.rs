//! Lanes that are lost, watched and dialled again (SPEC: section 14, ROUND-6).
//!
//! The rules it keeps: a lane is dialled again only when both sides have settled what its last connection carried; and it
//! takes part in the round that is open, after it has ended those that the destination may not have closed.

use std::time::Duration;

use multifd_wire::frame::LaneDown;
use multifd_wire::{ChannelRef, Incarnation, LaneId, Phase, Reason, Round};

use super::{Control, Life, Slot, Spawned};
use crate::driver::lane::LaneCommand;
use crate::driver::lock;
use crate::driver::redial::{Attempt, Next, Redial};
use crate::error::{Error, Fault};
use crate::session::Event;

/// A lane that is lost more often than this is not dialled again: its way is broken, and each loss sends pages twice.
const LANE_LOSSES_MAX: u32 = 64;

/// How often it is looked whether the destination takes what lanes carry.
const WATCH_PERIOD: Duration = Duration::from_millis(100);

/// When nothing but silent lanes is waited for, with the guest paused or at the end of a round, a lane from which nothing was taken
/// for this long is not waited for any longer: what it carried is sent again on the others, which takes less time.
const LAST_LANE_STALL: Duration = Duration::from_millis(500);

/// So many times as long as a body should take at the measured bandwidth: a slow lane is not a dead one.
const LAST_BODIES: u32 = 8;

/// How far a lane was acknowledged when that last changed.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Watch {
    acked: u64,
    since: Duration,
}

impl Control {
    /// Whether lanes that are lost are dialled again.
    pub(super) fn dials_again(&self) -> bool {
        let rounds = matches!(self.session.phase(), Phase::Rounds | Phase::Switchover);
        !self.shared.config.reconnect().is_zero()
            && (rounds && self.session.needs_lanes() || self.comes_back())
    }

    /// Whether lanes carry something that has to be taken.
    fn watches_lanes(&self) -> bool {
        matches!(self.session.phase(), Phase::Rounds | Phase::Switchover)
    }

    /// When something of this file is due next.
    pub(super) fn lanes_due(&self) -> Duration {
        // As in `tend_lanes`: what nobody will do is not due, or the control thread would never wait again.
        let watch = if self.watches_lanes() {
            self.watch_due
        } else {
            Duration::MAX
        };
        if !self.dials_again() {
            return watch;
        }
        let redials = self
            .lanes
            .iter()
            .filter(|slot| slot.life == Life::Dead)
            .filter_map(|slot| slot.redial.map(|redial| redial.due));
        let alone = self
            .alone_since
            .map(|since| since + self.shared.config.reconnect());
        redials
            .chain(alone)
            .min()
            .unwrap_or(Duration::MAX)
            .min(watch)
    }

    /// Does what is due.
    pub(super) fn tend_lanes(&mut self, now: Duration) {
        // SPEC: LANE-9
        if !self.session.needs_lanes() {
            self.alone_since = None;
        }
        // Whether or not a lane that is lost is dialled again: the others have to know that it is.
        if !self.watches_lanes() {
            self.watch_due = Duration::MAX;
        } else if now >= self.watch_due || self.watch_due == Duration::MAX {
            self.watch_due = now + WATCH_PERIOD;
            self.watch_lanes(now);
        }
        if !self.dials_again() {
            return;
        }
        let due: Vec<LaneId> = self
            .lanes
            .iter()
            .filter(|slot| slot.life == Life::Dead)
            .filter(|slot| slot.redial.is_some_and(|redial| redial.due <= now))
            .map(|slot| slot.state.id)
            .collect();
        for id in due {
            if let Err(error) = self.redial(id) {
                return self.drive(Event::Failed(error));
            }
        }
        if let Some(since) = self.alone_since {
            // Nothing can be taken meanwhile.
            self.session.progressed(now);
            if now >= since + self.shared.config.reconnect() {
                let last = format!(
                    "none could be opened again within {:?}",
                    now.saturating_sub(since)
                );
                let error = Error::new(self.session.phase(), Fault::AllLanesLost { last });
                self.drive(Event::Failed(error));
            }
        }
    }

    pub(super) fn redial(&mut self, id: LaneId) -> Result<(), Error> {
        let Some(slot) = self.slot(id) else {
            return Ok(());
        };
        // SPEC: JOIN-3
        let incarnation = Incarnation::new(slot.incarnation.value().saturating_add(1));
        let round_trip = self.session.round_trip();
        let Spawned {
            state,
            commands,
            thread,
        } = self.spawn_lane(id, incarnation, Attempt::Again { round_trip })?;
        let Some(slot) = self.slot(id) else {
            return Ok(());
        };
        slot.state = state;
        slot.incarnation = incarnation;
        slot.commands = Some(commands);
        slot.closer = None;
        slot.life = Life::Redialling;
        slot.encoded = None;
        // It has ended or is about to: its last word was read before the lane was settled.
        let old = slot.thread.replace(thread);
        self.stragglers.extend(old);
        tracing::debug!(lane = %id, %incarnation, "dialling a lost lane again");
        Ok(())
    }

    /// An attempt came to nothing.
    pub(super) fn redial_failed(&mut self, id: LaneId, fault: Fault) {
        let now = self.shared.now();
        let phase = self.session.phase();
        let Some(slot) = self.slot(id) else { return };
        slot.life = Life::Dead;
        slot.commands = None;
        lock(&slot.state.lane).take();
        let incarnation = slot.incarnation;
        if slot.redial.as_mut().map(|redial| redial.failed(now)) == Some(Next::GiveUp) {
            slot.redial = None;
        }
        tracing::debug!(lane = %id, %incarnation, %fault, "a lost lane could not be opened again yet");
        self.session
            .hindered(Error::new(phase, fault).at(ChannelRef::Lane(id)));
        // The destination may have let it in: nothing came on it, and nothing will (SPEC: LANE-1).
        self.send(LaneDown {
            lane: id,
            incarnation,
            reason: Reason::ChannelsLost,
        });
        self.check_alone(now);
    }

    /// A lost lane is open again: it joins the round that is under way.
    pub(super) fn rejoined(&mut self, id: LaneId) {
        let now = self.shared.now();
        self.alone_since = None;
        self.session.progressed(now);
        let first = self.rounds_closed;
        let paused_from = self.paused_from;
        let was_paused = |round: Round| paused_from.is_some_and(|from| round >= from);
        let command = self.open.as_ref().map(|open| LaneCommand::Round {
            work: std::sync::Arc::clone(&open.work),
            round: open.round,
            last: open.last,
            behind: (first..open.round.value())
                .map(|round| (Round::new(round), was_paused(Round::new(round))))
                .collect(),
        });
        let Some(slot) = self.slot(id) else { return };
        let by_itself = !std::mem::replace(&mut slot.with_all, false);
        slot.redial = None;
        slot.watch = Watch {
            acked: 0,
            since: now,
        };
        tracing::info!(lane = %id, incarnation = %slot.incarnation, "a lost lane is open again");
        if let (Some(commands), Some(command)) = (&slot.commands, command) {
            // Its queue is empty.
            let _ = commands.try_send(command);
        }
        if by_itself {
            self.timeline.lane_rejoined();
        }
    }

    /// After a lane was settled: it is dialled again, unless it is lost too often.
    pub(super) fn schedule_redial(&mut self, id: LaneId) {
        let now = self.shared.now();
        let (dials, until) = (self.dials_again(), now + self.shared.config.reconnect());
        let Some(slot) = self.slot(id) else { return };
        slot.losses += 1;
        slot.redial =
            (dials && slot.losses <= LANE_LOSSES_MAX).then(|| Redial::at_once(now, until));
        self.check_alone(now);
    }

    /// Whether no lane is left, and what follows: a wait for one to come back, or the end.
    pub(super) fn check_alone(&mut self, now: Duration) {
        // On the way back the time is that of the resume.
        if !self.session.needs_lanes()
            || self.session.is_rejoining()
            || self.lanes.iter().any(|slot| slot.life == Life::Alive)
        {
            return;
        }
        let hope = |slot: &Slot| {
            matches!(slot.life, Life::Dying | Life::Dialling | Life::Redialling)
                || slot.redial.is_some()
        };
        if self.dials_again() && self.lanes.iter().any(hope) {
            self.alone_since.get_or_insert(now);
            return;
        }
        if matches!(self.session.phase(), Phase::Rounds | Phase::Switchover) {
            let last = "it could not be opened again".to_owned();
            let error = Error::new(self.session.phase(), Fault::AllLanesLost { last });
            self.drive(Event::Failed(error));
        }
    }

    /// Tells slow lanes from dead ones. A slow lane's acknowledgements move; a dead one's do not, although the destination waits
    /// for nothing else on it: every round before that of its oldest frame is closed.
    fn watch_lanes(&mut self, now: Duration) {
        let paused = self.session.is_paused();
        let alive = self
            .lanes
            .iter()
            .filter(|slot| slot.life == Life::Alive)
            .count();
        let bodies = self
            .session
            .bandwidth()
            .map_or(Duration::ZERO, |bandwidth| {
                let body = self.shared.config.body_pages() as f64 * 4096.0 * alive as f64;
                Duration::try_from_secs_f64(body / bandwidth.max(1.0)).unwrap_or(Duration::MAX)
            });
        let stall = self.shared.config.stall();
        let soon = LAST_LANE_STALL
            .max(bodies.saturating_mul(LAST_BODIES))
            .min(stall);
        let closed = self.rounds_closed;
        let (mut dead, mut silent, mut busy, mut idle) = (Vec::new(), Vec::new(), 0, 0);
        for slot in self
            .lanes
            .iter_mut()
            .filter(|slot| slot.life == Life::Alive)
        {
            let (acked, oldest) = lock(&slot.state.lane)
                .as_ref()
                .map_or((0, None), |lane| (lane.acked_frames(), lane.oldest_round()));
            let waits_for_others = oldest.is_none_or(|round| round.value() > closed);
            idle += u32::from(waits_for_others);
            if waits_for_others || acked != slot.watch.acked {
                slot.watch = Watch { acked, since: now };
                busy += u32::from(!waits_for_others);
                continue;
            }
            let silence = now.saturating_sub(slot.watch.since);
            if silence > stall {
                dead.push(slot.state.id);
            } else if silence > soon {
                silent.push(slot.state.id);
            } else {
                busy += 1;
            }
        }
        // The round, and a guest that runs nowhere, wait for them alone; a lane without anything on its way is there to take over.
        let alone = if paused {
            alive > 1
        } else {
            busy == 0 && idle > 0 && self.dials_again()
        };
        if alone {
            dead.extend(silent);
        }
        for id in dead {
            self.give_up_lane(
                id,
                Fault::Timeout {
                    what: "the destination to take anything on this lane",
                },
            );
        }
    }

    /// Ends a lane's channel; its thread then says that it has ended, and the rest follows.
    fn give_up_lane(&mut self, id: LaneId, fault: Fault) {
        let Some(slot) = self.slot(id) else { return };
        tracing::warn!(channel = %ChannelRef::Lane(id), %fault, "giving a lane up");
        slot.doomed = Some(fault);
        slot.state
            .given_up
            .store(true, std::sync::atomic::Ordering::Relaxed);
        slot.commands = None;
        if let Some(closer) = &slot.closer {
            closer.shutdown();
        }
    }
}
