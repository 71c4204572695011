//! What the source's session does about its lanes: passes on what happens to them, and carries out what follows.

use std::time::Duration;

use multifd_wire::frame::{Acks, GiveBack, LaneMark};
use multifd_wire::{Kind, Misbehaved, Phase, Round};

use super::{Effect, Event, Session};
use crate::source::control::Timing;
use crate::source::lanes::{End, Steps, View};

impl Session {
    /// What an event of a lane, or of the work on them, means.
    pub(super) fn handle_lanes(&mut self, event: Event, now: Duration) -> Vec<Effect> {
        let view = self.view();
        match event {
            Event::LaneUp { lane, incarnation } => {
                let steps = self.lanes.up(lane, incarnation, &view, now);
                let mut effects = self.carry(steps, now);
                effects.extend(self.begin(now));
                effects
            }
            Event::LaneNotOpened {
                lane,
                incarnation,
                why,
            } => {
                let steps = self.lanes.unopened(lane, incarnation, why, &view, now);
                self.carry(steps, now)
            }
            Event::LaneEncoded {
                lane,
                incarnation,
                round,
            } => {
                self.lanes.encoded(lane, incarnation, round);
                self.lanes.check_encoded().into_iter().collect()
            }
            Event::LaneEnded {
                lane,
                incarnation,
                fault,
            } => {
                let steps = self.lanes.ended(lane, incarnation, fault, &view, now);
                self.carry(steps, now)
            }
            Event::LanesSeen(seen) => self.lanes.seen(&seen, &view, now),
            Event::Acked { bytes } => {
                // SPEC: CHAN-5
                if bytes > 0 {
                    self.lanes.took();
                    self.progressed(now);
                }
                Vec::new()
            }
            Event::Begun => self.begun(now),
            _ => Vec::new(),
        }
    }

    pub(super) fn acks(&self, acks: &Acks<'_>) -> Result<Vec<LaneMark>, Misbehaved> {
        acks.iter()
            .map(|mark| {
                self.lanes.known(mark.lane, mark.incarnation)?;
                Ok(mark)
            })
            .collect()
    }

    pub(super) fn give_back(&mut self, back: &GiveBack<'_>) -> Result<Vec<Effect>, Misbehaved> {
        // In a set-up only for a session that comes back, between READY and LANDED (SPEC: RESUME-10).
        let resumes = self.view().comes_back() && self.set_up.is_ready();
        if self.phase() == Phase::Setup && !resumes {
            let kind = Kind::GiveBack;
            return Err(Misbehaved::Order { kind });
        }
        // Of a connection that was lost as well: a page that was damaged on it is owed all the same.
        self.lanes.was_known(back.lane, back.incarnation)?;
        Ok(vec![Effect::GiveBack {
            lane: back.lane,
            incarnation: back.incarnation,
            sequence: back.sequence,
            runs: back.runs.to_vec(),
        }])
    }

    /// Lanes that are open.
    #[must_use]
    pub fn lanes_alive(&self) -> u32 {
        self.lanes.alive()
    }

    pub(super) fn carry(&mut self, steps: Steps, now: Duration) -> Vec<Effect> {
        if let Some(error) = steps.not_opened {
            self.hindered(error);
        }
        let mut effects = steps.effects;
        match steps.end {
            Some(End::Lost(error)) => effects.extend(self.handle(Event::Lost(error), now)),
            Some(End::Failed(error)) => effects.extend(self.handle(Event::Failed(error), now)),
            None => {}
        }
        effects
    }

    /// All living lanes are given this round.
    pub(super) fn open_round(&mut self, round: Round, last: bool) -> Effect {
        self.last_opened = Some(round);
        if last {
            self.paused_from.get_or_insert(round);
        }
        self.lanes.opened(round);
        Effect::OpenRound { round, last }
    }

    /// How long attempts to open a channel may take.
    pub(super) fn timing(&self) -> Timing {
        Timing {
            hello: self.config.hello_deadline,
            round_trip: self.round_trip,
        }
    }

    pub(super) fn view(&self) -> View {
        View {
            phase: self.phase(),
            needs_lanes: self.needs_lanes(),
            rejoining: self.is_rejoining(),
            begun: !self.unready,
            kept: self.is_kept(),
            committed: self.is_committed(),
            rounds_closed: self.rounds_closed(),
            paused_from: self.paused_from,
            bandwidth: self.bandwidth(),
            body_bytes: self.config.body_pages as f64 * multifd_wire::PAGE_BYTES as f64,
            reconnect: self.config.reconnect,
            hellos: self.hellos,
            timing: self.timing(),
            stall: self.config.stall,
        }
    }
}
