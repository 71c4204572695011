//! What each frame of the destination means: the table of frames.
//!
//! The rule it keeps: a frame is taken whole or the session ends: what it speaks of is checked before anything changes.

use std::time::Duration;

use multifd_wire::frame::{KeepAlive, RoundClosed};
use multifd_wire::{ChannelRef, Frame, Misbehaved};

use super::{Effect, Event, Session, State};
use crate::source::error::{Error, Fault};

impl Session {
    /// A frame came on this channel.
    #[must_use]
    pub fn frame(&mut self, channel: ChannelRef, frame: &Frame<'_>, now: Duration) -> Vec<Effect> {
        self.heard(now);
        match self.state {
            State::Over => return Vec::new(),
            State::Parting(parting) => return self.part_frame(parting, frame, now),
            _ => {}
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
        let devices = self.devices.are_there();
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
                let answer = heard.answer.map(|answer| Effect::Send(answer.into()));
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

    fn closed(&mut self, closed: &RoundClosed, now: Duration) -> Result<Vec<Effect>, Misbehaved> {
        if let Some(expected) = self.lanes.current().filter(|open| closed.round > *open) {
            let found = closed.round;
            return Err(Misbehaved::Round { expected, found });
        }
        let (round, damaged) = (closed.round, closed.damaged_pages);
        Ok(self.handle(Event::Closed { round, damaged }, now))
    }

    /// How many rounds the destination is known to have closed.
    pub(super) fn rounds_closed(&self) -> u32 {
        self.closed
            .map_or(0, |round| round.value().saturating_add(1))
    }
}

#[cfg(test)]
mod tests;
