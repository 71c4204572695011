//! What the destination's session does about its lanes: lets them in, loses them, settles with the source what they carried.

use std::time::Duration;

use multifd_wire::frame::{Acks, GiveBack, GiveBackReason, LaneDown, LaneMark, RawRun};
use multifd_wire::{
    ChannelRef, Incarnation, LaneId, PageRun, Phase, Reason, Round, Sequence, Token,
};

use super::{Done, Session, State, internal, out_of_turn};
use crate::destination::error::{Error, Fault};
use crate::destination::event::Effect;
use crate::destination::lane::Begins;
use crate::destination::lanes::{Door, Down, Life};
use crate::destination::set_up::Plan;

impl Session {
    /// SETUP_END: the lanes are known, and the VMM is asked to build the machine if it was not before.
    pub(super) fn set_up_ended(
        &mut self,
        plan: Option<Plan>,
        lanes: u32,
        now: Duration,
        out: &mut Vec<Effect>,
    ) -> Done {
        self.lanes.announce(lanes, self.life_of_the_lost());
        if let Some(plan) = plan {
            out.push(Effect::Prepare {
                configs: plan.configs,
                layout: plan.layout,
                devices: plan.devices,
            });
        }
        for (lane, incarnation) in std::mem::take(&mut self.early) {
            self.join_in_set_up(lane, incarnation, now, out)?;
        }
        Ok(())
    }

    /// What a lane is that is not here: on the way back it may come whenever it likes, before the first READY it has to
    /// (SPEC: READY-1, RESUME-14).
    pub(super) fn life_of_the_lost(&self) -> Life {
        if self.begun {
            Life::Lost
        } else {
            Life::Expected
        }
    }

    /// A data channel asks to be let in.
    pub(super) fn lane_joined(
        &mut self,
        lane: LaneId,
        incarnation: Incarnation,
        ticket: Token,
        now: Duration,
        out: &mut Vec<Effect>,
    ) -> Done {
        let turn_away = |reason, text| Effect::TurnAway {
            lane,
            incarnation,
            reason,
            text,
        };
        let not_now = turn_away(Reason::ShuttingDown, "this lane is not wanted now");
        // Of a control channel that was lost meanwhile: the source dials it again (SPEC: RESUME-13, GRANT-1).
        if self.secrets.is_none_or(|secrets| secrets.ticket != ticket) {
            let text = "the ticket is of a control channel that was lost";
            out.push(turn_away(Reason::BadTicket, text));
            return Ok(());
        }
        let unknown = self.lanes.door(lane, incarnation) == Door::Unknown;
        let begins = match &self.state {
            // A lane may be faster than the SETUP_END that announces it.
            State::Setup if !self.set_up.has_ended() => {
                if let Some(older) = self.early.insert(lane, incarnation) {
                    out.push(Effect::TurnAway {
                        lane,
                        incarnation: older,
                        reason: Reason::Misbehaved,
                        text: "the lane was dialled again",
                    });
                }
                return Ok(());
            }
            State::Setup => return self.join_in_set_up(lane, incarnation, now, out),
            State::Rounds | State::Fenced(_) if unknown => {
                return Err(out_of_turn(format!("lane {lane}")));
            }
            // SPEC: LANE-5, ROUND-6
            State::Rounds if self.lanes.is_lost(lane) && !self.rounds.is_closing() => {
                Begins::Within(self.rounds.round())
            }
            State::Fenced(fence) if self.lanes.is_lost(lane) => match fence.round.next() {
                Some(next) => Begins::Behind(next),
                None => {
                    out.push(not_now);
                    return Ok(());
                }
            },
            // SPEC: LANE-9
            _ => {
                out.push(not_now);
                return Ok(());
            }
        };
        if self.lanes.door(lane, incarnation) != Door::Open {
            let text = "this incarnation of the lane is over";
            out.push(turn_away(Reason::Misbehaved, text));
            return Ok(());
        }
        // The fence waits for it from now on, and only then is it told that it was let in.
        let life = match begins {
            Begins::Behind(_) => Life::AtFence { last: true },
            _ => Life::InRound,
        };
        self.lanes.join(lane, incarnation, life);
        self.deadlines.alone_since = None;
        out.push(Effect::Admit {
            lane,
            incarnation,
            begins: Some(begins),
        });
        Ok(())
    }

    fn join_in_set_up(
        &mut self,
        lane: LaneId,
        incarnation: Incarnation,
        now: Duration,
        out: &mut Vec<Effect>,
    ) -> Done {
        match self.lanes.door(lane, incarnation) {
            Door::Unknown => return Err(out_of_turn(format!("lane {lane}"))),
            Door::Over => out.push(Effect::TurnAway {
                lane,
                incarnation,
                reason: Reason::Misbehaved,
                text: "this incarnation of the lane is over",
            }),
            Door::Open => {
                self.lanes.join(lane, incarnation, Life::InRound);
                out.push(Effect::Admit {
                    lane,
                    incarnation,
                    begins: None,
                });
            }
        }
        self.begin(now, out)
    }

    /// A lane that was let in could not be told. The source gives this connection up by itself (SPEC: LANE-7).
    pub(super) fn lane_unheard(
        &mut self,
        lane: LaneId,
        incarnation: Incarnation,
        now: Duration,
        out: &mut Vec<Effect>,
    ) -> Done {
        let life = self.life_of_the_lost();
        if self.lanes.unheard(lane, incarnation, life) {
            self.lane_is_missing(lane, now, out)
        } else {
            Ok(())
        }
    }

    /// The source gave a lane up.
    pub(super) fn lane_down(
        &mut self,
        down: LaneDown,
        now: Duration,
        out: &mut Vec<Effect>,
    ) -> Done {
        match self.lanes.down(down.lane, down.incarnation, now)? {
            // Its channel ends, and with that goes our own LANE_DOWN.
            Down::Close => out.push(Effect::CloseLane(down.lane)),
            Down::Answer => self.send(down, out)?,
            Down::Settled => {}
        }
        Ok(())
    }

    /// A lane's channel has ended.
    pub(super) fn lane_ended(
        &mut self,
        mark: LaneMark,
        fault: Fault,
        now: Duration,
        out: &mut Vec<Effect>,
    ) -> Done {
        let (lane, incarnation) = (mark.lane, mark.incarnation);
        let Some(unacked) = self.lanes.end(mark, self.life_of_the_lost()) else {
            return Ok(());
        };
        let phase = self.phase();
        let error = Error::new(phase, fault).at(ChannelRef::Lane(lane));
        // What was changed on the way costs the lane (SPEC: ERR-2); if it can't be dialled again, everything.
        let damaged = error.is_damage() && !self.config.suspend().is_zero();
        // What does not parse, or breaks the protocol, is not a matter of one lane: the source can't be trusted (SPEC: ERR-3).
        if !damaged && !matches!(error.fault(), Fault::Channel(_)) {
            self.fail(error, now, out);
            return Ok(());
        }
        if phase < Phase::Commit {
            if let Some(mark) = unacked {
                let lanes = &[mark.into()];
                self.send(Acks { lanes }, out)?;
            }
            // SPEC: LANE-1, LANE-2
            let reason = if damaged {
                Reason::Corruption
            } else {
                Reason::ChannelsLost
            };
            self.send(
                LaneDown {
                    lane,
                    incarnation,
                    reason,
                },
                out,
            )?;
        }
        self.lane_is_missing(lane, now, out)
    }

    /// What follows when a lane is no longer there.
    fn lane_is_missing(&mut self, lane: LaneId, now: Duration, out: &mut Vec<Effect>) -> Done {
        match self.state {
            // Nothing was sent on it. The source dials it again, or begins the set-up again.
            State::Setup => return Ok(()),
            // Once the memory is verified no lane is needed any more (SPEC: LANE-9).
            State::Loading(_) | State::Prepared(_) | State::Owning { .. } => return Ok(()),
            State::Suspended { .. } | State::Over => return Ok(()),
            State::Rounds | State::Fenced(_) => {}
        }
        self.rounds.lane_lost();
        if self.lanes.none_lives() {
            if self.config.suspend().is_zero() {
                let last = format!("lane {lane} closed");
                return Err(Fault::AllLanesLost { last });
            }
            // SPEC: LANE-6
            self.deadlines.alone_since = Some(now);
            return Ok(());
        }
        self.check_fence(now, out);
        Ok(())
    }

    /// A lane reached the end of its round.
    pub(super) fn lane_arrived(
        &mut self,
        lane: LaneId,
        incarnation: Incarnation,
        round: Round,
        last: bool,
        now: Duration,
        out: &mut Vec<Effect>,
    ) -> Done {
        // It had read its mark whole when the channels were lost; the round is opened again (SPEC: RESUME-2, RESUME-7).
        if !self.lanes.is_current(lane, incarnation) {
            return Ok(());
        }
        let in_round = matches!(self.state, State::Rounds) && round == self.rounds.round();
        if !in_round || !self.lanes.arrive(lane, incarnation, last) {
            return Err(internal(format!("lane {lane} at the end of round {round}")));
        }
        self.check_fence(now, out);
        Ok(())
    }

    /// SPEC: ROUND-3
    fn check_fence(&mut self, now: Duration, out: &mut Vec<Effect>) {
        let in_round = matches!(self.state, State::Rounds) && !self.rounds.is_closing();
        if in_round && self.lanes.all_at_fence() {
            self.rounds.close(now);
            out.push(Effect::CloseRound(self.rounds.round()));
        }
    }

    /// Pages of a frame are damaged. Of a lane whose channel was settled nothing is said any more: what is damaged then is given back
    /// before LANDED (SPEC: RESUME-10).
    pub(super) fn give_back(
        &mut self,
        lane: LaneId,
        incarnation: Incarnation,
        sequence: Sequence,
        runs: &[PageRun],
        out: &mut Vec<Effect>,
    ) -> Done {
        if !self.lanes.is_current(lane, incarnation) {
            return Ok(());
        }
        let runs: Vec<RawRun> = runs.iter().copied().map(RawRun::from).collect();
        self.send(
            GiveBack {
                lane,
                incarnation,
                sequence,
                reason: GiveBackReason::Checksum,
                runs: &runs,
            },
            out,
        )
    }

    pub(super) fn acknowledge(&mut self, marks: &[LaneMark], out: &mut Vec<Effect>) -> Done {
        let lanes = self.lanes.acknowledge(marks);
        if lanes.is_empty() {
            return Ok(());
        }
        self.send(Acks { lanes: &lanes }, out)
    }
}
