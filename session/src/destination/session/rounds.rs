//! What the destination's session does from READY to PREPARED: begins, closes rounds, opens the gate, lets everything be loaded.

use std::time::Duration;

use multifd_wire::frame::{Credits, Prepared, RawCredit, Ready, RoundClosed};

use super::{Done, Session, State, micros, out_of_turn};
use crate::destination::commit::Loading;
use crate::destination::event::{Closed, DeviceEvent, Effect};
use crate::destination::rounds::{Next, Verified};

impl Session {
    /// READY, if the machine and the lanes are there.
    pub(super) fn begin(&mut self, now: Duration, out: &mut Vec<Effect>) -> Done {
        let complete = self.set_up.is_complete() && self.lanes.are_ready();
        if !matches!(self.state, State::Setup) || !complete {
            return Ok(());
        }
        self.state = State::Rounds;
        self.begun = true;
        self.rounds.begin(now);
        out.push(Effect::StartLanes(self.rounds.round()));
        self.send(
            Ready {
                lanes: self.lanes.alive(),
                prepare_us: micros(self.set_up.since_end(now)),
            },
            out,
        )?;
        // SPEC: RESUME-6
        if self.resumed {
            self.landed(out)?;
        }
        Ok(())
    }

    /// It was counted what is in memory at the end of a round.
    pub(super) fn closed(&mut self, closed: Closed, now: Duration, out: &mut Vec<Effect>) -> Done {
        // SPEC: ACK-2
        self.acknowledge(&closed.handled, out)?;
        self.devices.round_closed(&closed.restarts);
        let round = self.rounds.round();
        let (took, counts) = self.rounds.closed(closed.counts, now);
        self.send(
            RoundClosed {
                round,
                pages: counts.pages,
                zero_pages: counts.zero_pages,
                digest: closed.digest,
                elapsed_us: micros(took),
                damaged_pages: closed.damaged,
            },
            out,
        )?;
        let Some(paused) = self.lanes.verdict() else {
            let what = "lanes that disagree whether the round is the last";
            return Err(out_of_turn(what));
        };
        if self.rounds.contradicts(paused) {
            let what = format!("an end mark of round {round} that contradicts SWITCHOVER");
            return Err(out_of_turn(what));
        }
        if !paused {
            return self.open_gate(out);
        }
        self.state = State::Fenced(self.rounds.fence(closed));
        self.conclude(now, out)
    }

    /// With the guest paused the gate stays shut until the source says which it is: FINAL of this round, or a further one.
    pub(super) fn conclude(&mut self, now: Duration, out: &mut Vec<Effect>) -> Done {
        let State::Fenced(fence) = &mut self.state else {
            return Ok(());
        };
        match self.rounds.conclude(fence, now) {
            Next::Wait => Ok(()),
            Next::Open => {
                self.state = State::Rounds;
                self.open_gate(out)
            }
            Next::Load(verified, states) => self.load(verified, states, now, out),
            Next::Fail(fault) => Err(fault),
        }
    }

    fn open_gate(&mut self, out: &mut Vec<Effect>) -> Done {
        let Some(next) = self.rounds.next() else {
            return Err(out_of_turn("a round after the last round number"));
        };
        self.lanes.pass_gate();
        out.push(Effect::OpenGate(next));
        Ok(())
    }

    /// Memory is complete.
    fn load(
        &mut self,
        verified: Verified,
        states: u32,
        now: Duration,
        out: &mut Vec<Effect>,
    ) -> Done {
        // SPEC: FINAL-5
        let states = self.states.take(states)?;
        self.state = State::Loading(Loading::begin(verified, now));
        self.loads.asked();
        out.push(Effect::Load { states });
        Ok(())
    }

    /// PREPARED, once state and devices are loaded over memory that is verified (SPEC: PREP-1).
    pub(super) fn prepared(&mut self, now: Duration, out: &mut Vec<Effect>) -> Done {
        let State::Loading(loading) = &self.state else {
            return Ok(());
        };
        let Some(ready) = loading.ready(self.devices.all_loaded()) else {
            return Ok(());
        };
        let since = loading.since();
        let (waited, verify) = self.rounds.waited(since);
        let prepared = Prepared {
            digest: ready.digest(),
            wait_us: micros(waited),
            load_us: micros(now.saturating_sub(since)),
            verify_us: micros(verify),
        };
        self.state = State::Prepared(ready);
        self.remembered.prepared(prepared.digest);
        self.send(prepared, out)
    }

    /// A device's loader got on.
    pub(super) fn device(
        &mut self,
        event: DeviceEvent,
        now: Duration,
        out: &mut Vec<Effect>,
    ) -> Done {
        self.deadlines.progress = now;
        // Without channels, or before LANDED, there is nobody to be told; LANDED is followed by all that counts (SPEC: RESUME-12).
        let tells = !matches!(self.state, State::Setup | State::Suspended { .. });
        match event {
            DeviceEvent::Credit(credit) => {
                self.devices.granted(credit);
                // What was loaded was handled: the source can let go of it, and read on.
                self.deadlines.acknowledge_now(now);
                if tells {
                    let credits = &[RawCredit::from(credit)];
                    self.send(Credits { credits }, out)?;
                }
            }
            DeviceEvent::Arrived => self.deadlines.acknowledge_now(now),
            DeviceEvent::InitialLoaded(ack) => {
                self.devices.acknowledged(ack);
                if tells {
                    self.send(ack, out)?;
                }
            }
            DeviceEvent::Loaded { loaded, restarts } => {
                self.devices.loaded(loaded.device, restarts);
                if tells {
                    self.send(loaded, out)?;
                }
                self.prepared(now, out)?;
            }
            DeviceEvent::Restarted(device) => self.devices.restarted(device),
        }
        Ok(())
    }
}
