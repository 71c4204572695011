//! What each frame of the destination means, and each event of a lane.
//!
//! The rule it keeps: a frame is taken whole or the session ends: what it speaks of is checked before anything changes.

use std::time::Duration;

use multifd_wire::frame::{Acks, GiveBack, KeepAlive, LaneMark, RoundClosed};
use multifd_wire::{ChannelRef, Frame, Kind, Misbehaved, Phase, Round};

use super::{Effect, Event, Session, State};
use crate::source::error::{Error, Fault};
use crate::source::lanes::{End, Steps, View};

impl Session {
    /// A frame came on this channel.
    #[must_use]
    pub fn frame(&mut self, channel: ChannelRef, frame: &Frame<'_>, now: Duration) -> Vec<Effect> {
        self.heard(now);
        if self.state == State::Over {
            return Vec::new();
        }
        match self.take(frame, now) {
            Ok(effects) => effects,
            Err(misbehaved) => {
                let error = Error::new(self.phase(), misbehaved).at(channel);
                self.handle(Event::Failed(error), now)
            }
        }
    }

    fn take(&mut self, frame: &Frame<'_>, now: Duration) -> Result<Vec<Effect>, Misbehaved> {
        let devices = self.devices.is_some();
        Ok(match frame {
            Frame::Grant(grant) => self.granted(*grant, now),
            Frame::Ready(ready) => self.ready(*ready, now)?,
            Frame::Landed(landed) => self.landed(landed, now)?,
            Frame::Ack(acks) => vec![Effect::Acknowledged(self.acks(acks)?)],
            Frame::GiveBack(back) => self.give_back(back)?,
            Frame::RoundClosed(closed) => self.closed(closed, now)?,
            Frame::SwitchoverAck(ack) if devices => vec![Effect::DeviceAcked(*ack)],
            Frame::DeviceLoaded(loaded) if devices => vec![Effect::DeviceLoaded(*loaded)],
            // The devices have it already: they must not wait for a control thread that is busy pausing the guest.
            Frame::Credit(_) if devices => Vec::new(),
            Frame::Prepared(prepared) => {
                let digest = prepared.digest.value();
                self.handle(Event::Prepared { digest }, now)
            }
            Frame::Running(_) => self.handle(Event::Running, now),
            Frame::KeepAlive(alive) => {
                let heard = self.keep_alive.heard(alive, now);
                let answer = heard.answer.map(Effect::SendKeepAlive);
                let mut effects: Vec<Effect> = answer.into_iter().collect();
                if let Some(time) = heard.round_trip {
                    effects.extend(self.handle(Event::RoundTrip(time), now));
                }
                effects
            }
            Frame::LaneDown(down) => {
                let steps = self.lanes.down(*down, &self.view(), now)?;
                self.carry(steps, now)
            }
            Frame::Abort(abort) => {
                let fault = Fault::PeerAborted {
                    reason: abort.reason,
                    text: abort.text.to_owned(),
                };
                let error = Error::new(self.phase(), fault).at(ChannelRef::Control);
                self.handle(Event::Failed(error), now)
            }
            Frame::Progress(_) | Frame::Skipped(_) => Vec::new(),
            // An OUTCOME answers a question, and none was asked on this channel. Devices are a feature that was not agreed on
            // (SPEC: FEAT-4).
            other => return Err(Misbehaved::Feature { kind: other.kind() }),
        })
    }

    /// A sign of life that asks for one, while something else keeps the driver from [`Session::tick`].
    pub fn asks(&mut self, now: Duration) -> KeepAlive {
        self.keep_alive.asks(now)
    }

    /// The answer to a sign of life, if it asks for one; also after the end (SPEC: RUNNING-2).
    pub fn answers(&mut self, alive: &KeepAlive, now: Duration) -> Option<KeepAlive> {
        self.keep_alive.heard(alive, now).answer
    }

    fn acks(&self, acks: &Acks<'_>) -> Result<Vec<LaneMark>, Misbehaved> {
        acks.iter()
            .map(|mark| {
                self.lanes.known(mark.lane, mark.incarnation)?;
                Ok(mark)
            })
            .collect()
    }

    fn give_back(&mut self, back: &GiveBack<'_>) -> Result<Vec<Effect>, Misbehaved> {
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

    fn closed(&mut self, closed: &RoundClosed, now: Duration) -> Result<Vec<Effect>, Misbehaved> {
        if let Some(expected) = self.lanes.current().filter(|open| closed.round > *open) {
            let found = closed.round;
            return Err(Misbehaved::Round { expected, found });
        }
        let (round, damaged) = (closed.round, closed.damaged_pages);
        Ok(self.handle(Event::Closed { round, damaged }, now))
    }

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

    /// Does what is due: signs of life, lanes, and the deadlines of [`Event::Tick`].
    #[must_use]
    pub fn tick(&mut self, now: Duration) -> Vec<Effect> {
        if self.state == State::Over {
            return Vec::new();
        }
        let alive = self.keep_alive.tick(self.is_paused(), now);
        let mut effects: Vec<Effect> = alive.map(Effect::SendKeepAlive).into_iter().collect();
        // Nothing can be taken meanwhile.
        if self.lanes.alone_since().is_some() {
            self.progressed(now);
        }
        let steps = self.lanes.tick(&self.view(), now);
        effects.extend(self.carry(steps, now));
        effects.extend(self.handle(Event::Tick, now));
        effects
    }

    /// When [`Session::tick`] is due at the latest.
    #[must_use]
    pub fn due(&self) -> Duration {
        self.next_deadline()
            .min(self.keep_alive.due())
            .min(self.lanes.due(&self.view()))
    }

    /// Lanes that are open.
    #[must_use]
    pub fn lanes_alive(&self) -> u32 {
        self.lanes.alive()
    }

    fn carry(&mut self, steps: Steps, now: Duration) -> Vec<Effect> {
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

    /// How many rounds the destination is known to have closed.
    pub(super) fn rounds_closed(&self) -> u32 {
        self.closed
            .map_or(0, |round| round.value().saturating_add(1))
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
            stall: self.config.stall,
        }
    }
}

#[cfg(test)]
mod tests;
