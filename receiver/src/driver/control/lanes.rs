//! The lanes' threads and channels: started, closed and waited for as the session wants it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use multifd_session::destination::Event;
use multifd_session::destination::lane::Begins;
use multifd_transport::{Closer, SendHalf, join_within};
use multifd_wire::frame::LaneMark;
use multifd_wire::limits::PAGES_PER_FRAME_MAX;
use multifd_wire::{Incarnation, LaneId, Round};

use super::{ANSWER_MAX, Control};
use crate::driver::gate::Gate;
use crate::driver::greet::{Joined, Refusal, turn_away};
use crate::driver::lane::{LaneThread, Start, Work};
use crate::driver::{Note, Shared};
use crate::error::Fault;

/// One lane that was let in.
struct OpenLane {
    incarnation: Incarnation,
    closer: Closer,
    /// Kept so that the connection is not half closed under the source.
    _tx: Box<dyn SendHalf>,
    handled: Arc<AtomicU64>,
    given_up: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// All lanes of the control channel that there is.
pub(super) struct Lanes {
    /// Channels that wait for the session to let them in.
    joining: BTreeMap<(LaneId, Incarnation), Joined>,
    open: BTreeMap<LaneId, OpenLane>,
    start: Arc<Start>,
    pub(super) gate: Arc<Gate>,
}

impl Default for Lanes {
    fn default() -> Self {
        Self {
            joining: BTreeMap::new(),
            open: BTreeMap::new(),
            start: Arc::default(),
            gate: Arc::new(Gate::new()),
        }
    }
}

impl Lanes {
    /// How far the frames of each were handled.
    pub(super) fn handled(&self) -> Vec<LaneMark> {
        let mark = |(lane, lane_thread): (&LaneId, &OpenLane)| LaneMark {
            lane: *lane,
            incarnation: lane_thread.incarnation,
            frames: lane_thread.handled.load(Ordering::Acquire),
        };
        self.open.iter().map(mark).collect()
    }

    /// Ends a channel; its thread ends with what it has read whole, also if it waits.
    pub(super) fn close(&self, lane: LaneId) {
        if let Some(lane_thread) = self.open.get(&lane) {
            self.give_up(lane_thread);
        }
    }

    fn give_up(&self, lane_thread: &OpenLane) {
        lane_thread.given_up.store(true, Ordering::Relaxed);
        lane_thread.closer.shutdown();
        self.gate.nudge();
        self.start.nudge();
    }

    /// Its thread has said its last word.
    pub(super) fn ended(&self, lane: LaneId, incarnation: Incarnation) {
        if let Some(lane_thread) = self.open.get(&lane)
            && lane_thread.incarnation == incarnation
        {
            lane_thread.closer.shutdown();
        }
    }

    /// Closes all of them.
    pub(super) fn suspend(&mut self) {
        self.joining.clear();
        self.open
            .values()
            .for_each(|lane_thread| self.give_up(lane_thread));
        self.start = Arc::default();
    }

    /// The same at the end; gives their threads.
    pub(super) fn end(&mut self) -> Vec<JoinHandle<()>> {
        self.gate.end();
        self.suspend();
        let open = std::mem::take(&mut self.open);
        open.into_values()
            .map(|lane_thread| lane_thread.thread)
            .collect()
    }
}

impl Control {
    /// A data channel wants to be let in.
    pub(super) fn lane_joined(&mut self, joined: Joined) {
        let (lane, incarnation, ticket) = (joined.lane, joined.incarnation, joined.ticket);
        tracing::info!(channel = %joined.description, %lane, %incarnation, "lane open");
        self.lanes.joining.insert((lane, incarnation), joined);
        self.drive(Event::LaneJoined {
            lane,
            incarnation,
            ticket,
        });
    }

    /// Lets a lane in. It is part of the fence already: no round can be closed between its being told and its first frame
    /// (SPEC: LANE-5).
    pub(super) fn admit(&mut self, lane: LaneId, incarnation: Incarnation, begins: Option<Begins>) {
        let Some(mut joined) = self.lanes.joining.remove(&(lane, incarnation)) else {
            return self.internal(format!("lane {lane}, which is not here"));
        };
        if let Some(reply) = joined.reply.take() {
            joined.tx.set_deadline(Some(Instant::now() + ANSWER_MAX));
            if let Err(error) = joined.tx.send(&reply.encode(), &[]) {
                tracing::warn!(%lane, %error, "a lane was lost again before it was let in");
                let unheard = Event::LaneUnheard { lane, incarnation };
                return self.events.push_back(unheard);
            }
            joined.tx.set_deadline(None);
            self.timeline.lanes_reopened += 1;
        }
        let lane_thread = match self.lanes.start(joined, begins, &self.shared) {
            Ok(lane_thread) => lane_thread,
            Err(fault) => return self.events.push_back(Event::Failed(fault)),
        };
        // The thread of the connection before it has said its last word.
        let old = self.lanes.open.insert(lane, lane_thread);
        self.detached.extend(old.map(|old| old.thread));
        self.detached.retain(|thread| !thread.is_finished());
    }

    pub(super) fn turn_lane_away(
        &mut self,
        lane: LaneId,
        incarnation: Incarnation,
        refusal: Refusal,
    ) {
        tracing::debug!(%lane, %incarnation, text = refusal.1, "a lane is not let in");
        // Whoever has dialled the lane again does not wait for this answer: keeping the channel for it would let one lane hold many.
        if let Some(joined) = self.lanes.joining.remove(&(lane, incarnation))
            && joined.reply.is_some()
            && !self.lanes.joining.keys().any(|(again, _)| *again == lane)
        {
            turn_away(&self.shared, (joined.tx, joined.rx), joined.reply, refusal);
        }
    }

    /// Lets the devices load and the lanes read.
    pub(super) fn start_lanes(&mut self, round: Round) -> Result<(), Fault> {
        let Some(landing) = self.landing.clone() else {
            let what = "lanes before memory".into();
            return Err(Fault::Internal { what });
        };
        let devices = self.devices.start(&self.shared)?;
        self.lanes.start.begin(Work {
            round,
            landing,
            devices,
        });
        Ok(())
    }

    /// Waits until every thread of a lane has ended. What else is said meanwhile is kept for later; what it says of these lanes the session
    /// knows to be over by then.
    pub(super) fn settle_lanes(&mut self) {
        let limit = self.shared.config.device_deadline();
        let mut marks = Vec::new();
        for (lane, lane_thread) in std::mem::take(&mut self.lanes.open) {
            let (inbox, later) = (&self.inbox, &mut self.later);
            let ended = join_within(lane_thread.thread, limit, || {
                later.extend(inbox.recv_timeout(Duration::from_millis(1)));
            });
            if let Err(thread) = ended {
                self.detached.push(thread);
                let stuck = Fault::ThreadStuck {
                    thread: format!("the thread of data channel {lane}, which was closed,"),
                    waited_ms: limit.as_millis(),
                };
                return self.events.push_back(Event::Failed(stuck));
            }
            // Now, and not before: a thread ends with what it has read whole.
            marks.push(LaneMark {
                lane,
                incarnation: lane_thread.incarnation,
                frames: lane_thread.handled.load(Ordering::Acquire),
            });
        }
        self.devices.break_off();
        let damaged = match &self.landing {
            Some(landing) => landing.damaged_runs(PAGES_PER_FRAME_MAX as u32),
            None => Vec::new(),
        };
        let settled = Event::LanesSettled { marks, damaged };
        self.events.push_back(settled);
    }
}

impl Lanes {
    /// Starts the thread of a lane.
    fn start(
        &self,
        joined: Joined,
        begins: Option<Begins>,
        shared: &Arc<Shared>,
    ) -> Result<OpenLane, Fault> {
        let (lane, incarnation, rx) = (joined.lane, joined.incarnation, joined.rx);
        let (handled, given_up) = (Arc::default(), Arc::default());
        let thread = LaneThread {
            id: lane,
            incarnation,
            begins,
            shared: Arc::clone(shared),
            start: Arc::clone(&self.start),
            gate: Arc::clone(&self.gate),
            handled: Arc::clone(&handled),
            given_up: Arc::clone(&given_up),
            notes: shared.notes.clone(),
        };
        let (notes, counted) = (shared.notes.clone(), Arc::clone(&handled));
        let body = Box::new(move || {
            let fault = thread.run(rx);
            let mark = LaneMark {
                lane,
                incarnation,
                frames: counted.load(Ordering::Acquire),
            };
            let _ = notes.send(Note::LaneEnded { mark, fault });
        });
        let thread = shared.spawner.spawn(&format!("mfd-lane{lane}"), body);
        Ok(OpenLane {
            incarnation,
            closer: joined.closer,
            _tx: joined.tx,
            handled,
            given_up,
            thread: thread.map_err(|source| Fault::System {
                step: "start a thread",
                source,
            })?,
        })
    }
}
