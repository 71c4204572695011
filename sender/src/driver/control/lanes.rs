//! The lanes' threads: what the session wants done with them. It decides; nothing here knows why.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use multifd_session::source::{Attempt, Seen};
use multifd_transport::{Closer, Pulse, Silence, join_within};
use multifd_wire::frame::LaneMark;
use multifd_wire::{ChannelRef, Incarnation, LaneId, Misbehaved, Phase, Round};

use super::Control;
use crate::driver::attempt::lane_life;
use crate::driver::lane::LaneCommand;
use crate::driver::work::tracked;
use crate::driver::{LaneState, lock};
use crate::error::{Error, Fault};
use crate::lane::Settled;
use crate::session::Event;
use crate::speed::LaneCount;

/// One lane's newest connection.
pub(super) struct Slot {
    pub(super) state: Arc<LaneState>,
    /// Dropped when the lane is to end.
    pub(super) commands: Option<Sender<LaneCommand>>,
    /// Once the connection is open.
    pub(super) closer: Option<Closer>,
    pub(super) thread: Option<JoinHandle<()>>,
    /// While a resume is under way: the connection that was lost, which LANDED settles.
    pub(super) before: Option<Arc<LaneState>>,
    /// For how long nothing was heard of its thread.
    pub(super) silence: Silence,
}

impl Slot {
    /// Its thread ends now, and says so.
    pub(super) fn close(&mut self) {
        self.commands = None;
        if !self.state.given_up.swap(true, Relaxed) {
            self.silence = Silence::default();
        }
        if let Some(closer) = &self.closer {
            closer.shutdown();
        }
    }
}

impl Control {
    pub(super) fn slot(&mut self, lane: LaneId) -> Option<&mut Slot> {
        self.lanes.get_mut(lane.value() as usize)
    }

    /// Starts the thread of one connection of a lane.
    pub(super) fn dial_lane(
        &mut self,
        id: LaneId,
        incarnation: Incarnation,
        attempt: Attempt,
    ) -> Result<(), Error> {
        let fail = |fault: Fault| Error::new(self.session.phase(), fault).at(ChannelRef::Lane(id));
        let state = Arc::new(LaneState {
            id,
            incarnation,
            given_up: std::sync::atomic::AtomicBool::new(false),
            pulse: Pulse::default(),
            lane: std::sync::Mutex::new(Some(crate::lane::Lane::new(id, incarnation))),
        });
        let (commands, orders) = crossbeam_channel::bounded(2);
        let (shared, dial, notes, lane) = (
            Arc::clone(&self.shared),
            Arc::clone(&self.dial),
            self.notes.clone(),
            Arc::clone(&state),
        );
        let body = Box::new(move || {
            lane_life(&shared, &*dial, &attempt, &lane, &orders, &notes);
        });
        let thread = self
            .spawner
            .spawn(&format!("mfd-lane{id}"), body)
            .map_err(|source| {
                fail(Fault::System {
                    step: "start a thread",
                    source,
                })
            })?;
        let (commands, thread) = (Some(commands), Some(thread));
        if let Some(slot) = self.slot(id) {
            tracing::debug!(lane = %id, %incarnation, "dialling a lane again");
            slot.state = state;
            slot.commands = commands;
            slot.closer = None;
            slot.silence = Silence::default();
            // It has ended or is about to: its last word was read before the lane was settled.
            let old = std::mem::replace(&mut slot.thread, thread);
            self.stragglers.retain(|thread| !thread.is_finished());
            self.stragglers.extend(old);
        } else {
            self.lanes.push(Slot {
                state,
                commands,
                closer: None,
                thread,
                before: None,
                silence: Silence::default(),
            });
        }
        Ok(())
    }

    /// A connection is open. One that was replaced meanwhile is closed at once.
    pub(super) fn lane_up(
        &mut self,
        lane: LaneId,
        incarnation: Incarnation,
        closer: Closer,
        description: &str,
    ) {
        tracing::info!(channel = %description, %lane, "lane open");
        match self
            .slot(lane)
            .filter(|slot| slot.state.incarnation == incarnation)
        {
            Some(slot) => slot.closer = Some(closer),
            None => closer.shutdown(),
        }
        self.drive(Event::LaneUp { lane, incarnation });
    }

    pub(super) fn close_lane(&mut self, lane: LaneId) {
        if let Some(slot) = self.slot(lane) {
            tracing::debug!(%lane, incarnation = %slot.state.incarnation, "closing a lane");
            slot.close();
        }
    }

    pub(super) fn lane_gone(&mut self, lane: LaneId, why: &str) {
        tracing::warn!(%lane, why, "lane lost");
        self.timeline.lane_lost();
        self.close_lane(lane);
    }

    /// Gives back what a lost lane carried, once its thread can take nothing any more.
    pub(super) fn settle_lane(&mut self, lane: LaneId) -> Option<Event> {
        let slot = self.slot(lane)?;
        slot.close();
        let (thread, state) = (slot.thread.take(), Arc::clone(&slot.state));
        if let Some(thread) = thread {
            let limit = self.shared.config.device_deadline();
            let (inbox, later, watch) = (&self.inbox, &mut self.later, &self.shared.watch);
            // It, or another one, may be waiting for room in the queue.
            let joined = join_within(thread, limit, || {
                watch.at("wait for a lane's thread");
                later.extend(inbox.recv_timeout(Duration::from_millis(1)));
            });
            if joined.is_err() {
                // What it took is not in the ledger, so the migration can't go on.
                return Some(Event::Failed(self.lane_stuck(lane, limit)));
            }
        }
        let items = self.give_back_ledger(&state);
        let pages = self.shared.dirty.dirty_pages();
        Some(Event::LaneLost { pages, items })
    }

    pub(super) fn lane_stuck(&mut self, lane: LaneId, waited: Duration) -> Error {
        let name = format!("mfd-lane{lane}");
        self.timeline.threads_left.push(name.clone());
        self.stuck(
            format!("{name}, the thread of {}", ChannelRef::Lane(lane)),
            waited,
        )
        .at(ChannelRef::Lane(lane))
    }

    /// A lane's thread may not come back: from a page fault that nobody serves, or because it was killed. One that has something on its
    /// way is watched by the session, which closes the lane; then its thread has to end.
    pub(super) fn watch_lanes(&mut self) {
        // What lanes had to do is done.
        if self.session.is_committed() {
            return;
        }
        let (limit, now) = (self.shared.config.device_deadline(), Instant::now());
        let stuck = self.lanes.iter_mut().find_map(|slot| {
            let thread = slot.thread.as_ref()?;
            if slot.closer.is_none() || thread.is_finished() {
                return None;
            }
            let silent = slot.silence.look(&slot.state.pulse, now);
            let on_its_way = !slot.state.given_up.load(Relaxed)
                && lock(&slot.state.lane)
                    .as_ref()
                    .is_some_and(|lane| lane.unacked_frames() > 0);
            (silent > limit && !on_its_way).then_some((slot.state.id, silent))
        });
        if let Some((lane, silent)) = stuck {
            let error = self.lane_stuck(lane, silent);
            self.drive(Event::Failed(error));
        }
    }

    /// Everything of a lane's connection that is not acknowledged comes back. Gives how many items of devices that is.
    pub(super) fn give_back_ledger(&mut self, state: &LaneState) -> u64 {
        let Some(mut lane) = lock(&state.lane).take() else {
            return 0;
        };
        // Some of these may have been lost with the lane as well, and are about to be in the set for that.
        self.mismatches.leave_open(&self.shared.dirty);
        let items = self.shared.devices.queue.again(lane.take_items());
        let counters = &self.shared.counters;
        // What is under way at the end is lost, and not sent again.
        if self.session.phase() != Phase::Done {
            counters
                .sent_again_bytes
                .fetch_add(lane.unacked_octets(), Relaxed);
        }
        let mut pages = 0;
        for run in lane.die() {
            pages += u64::from(run.count());
            self.shared.dirty.give_back(tracked(run));
        }
        counters.pages_given_back.fetch_add(pages, Relaxed);
        items
    }

    /// A lost lane is open again: it enters the round that is under way.
    pub(super) fn lane_back(&mut self, id: LaneId, behind: Vec<(Round, bool)>, by_itself: bool) {
        let command = self.open.as_ref().map(|open| LaneCommand::Round {
            work: Arc::clone(&open.work),
            round: open.round,
            last: open.last,
            behind,
        });
        let Some(slot) = self.slot(id) else { return };
        tracing::info!(lane = %id, incarnation = %slot.state.incarnation, "a lost lane is open again");
        if let (Some(commands), Some(command)) = (&slot.commands, command) {
            // Its queue is empty.
            let _ = commands.try_send(command);
        }
        if by_itself {
            self.timeline.lane_rejoined();
        }
    }

    /// How much of each open lane was acknowledged.
    pub(super) fn lane_counts(&self) -> Vec<LaneCount> {
        let open = self.lanes.iter().filter(|slot| slot.commands.is_some());
        let counts = open
            .filter(|slot| slot.closer.is_some())
            .filter_map(|slot| {
                let lane = lock(&slot.state.lane);
                let lane = lane.as_ref()?;
                Some(LaneCount {
                    lane: lane.id(),
                    incarnation: lane.incarnation(),
                    acked_bytes: lane.acked_octets(),
                    unacked_bytes: lane.unacked_octets(),
                })
            });
        counts.collect()
    }

    /// What the ledgers of open lanes hold.
    pub(super) fn look_at_lanes(&self) -> Event {
        let seen = self.lanes.iter().filter_map(|slot| {
            let lane = lock(&slot.state.lane);
            let lane = lane.as_ref()?;
            Some(Seen {
                lane: slot.state.id,
                acked: lane.acked_frames(),
                oldest: lane.oldest_round(),
                unacked_bytes: lane.unacked_octets(),
            })
        });
        Event::LanesSeen(seen.collect())
    }

    pub(super) fn acknowledged(&mut self, marks: &[LaneMark]) -> Result<Event, Misbehaved> {
        let mut bytes = 0;
        for mark in marks {
            let Some(slot) = self.slot(mark.lane) else {
                continue;
            };
            let state = Arc::clone(&slot.state);
            let settled = self.settle_frames(&state, mark.frames)?;
            if settled.frames > 0 {
                self.timeline.taken();
            }
            bytes += settled.octets;
        }
        Ok(Event::Acked { bytes })
    }

    /// So many frames of a connection were handled: they leave its ledger.
    fn settle_frames(&self, state: &LaneState, frames: u64) -> Result<Settled, Misbehaved> {
        let mut lane = lock(&state.lane);
        let Some(lane) = lane.as_mut() else {
            return Ok(Settled::default());
        };
        self.shared.devices.arrived(lane.items_below(frames));
        let settled = lane.acked(frames)?;
        let counters = &self.shared.counters;
        counters.acked_bytes.fetch_add(settled.octets, Relaxed);
        Ok(settled)
    }

    /// Settles the ledgers of the connections before a resume. Checks all of it before it changes anything.
    pub(super) fn settle_before(&mut self, lanes: &[(LaneId, u64)]) -> Result<(), Misbehaved> {
        let mut handled: Vec<(Arc<LaneState>, u64)> = Vec::new();
        for (lane, frames) in lanes {
            let Some(before) = self.slot(*lane).and_then(|slot| slot.before.clone()) else {
                continue;
            };
            if let Some(lane) = lock(&before.lane).as_ref() {
                lane.check_acked(*frames)?;
            }
            handled.push((before, *frames));
        }
        for (before, frames) in handled {
            self.settle_frames(&before, frames)?;
            self.give_back_ledger(&before);
        }
        for slot in &mut self.lanes {
            slot.before = None;
        }
        let table = Arc::clone(&self.shared.devices);
        self.device_set.landed(&table);
        Ok(())
    }

    /// Bytes that are handed to channels and not acknowledged.
    pub(super) fn unacked_octets(&self) -> u64 {
        let unacked = self.lanes.iter().map(|slot| {
            lock(&slot.state.lane)
                .as_ref()
                .map_or(0, crate::lane::Lane::unacked_octets)
        });
        unacked.sum()
    }
}
