//! What the source's session does in a set-up: takes a control channel, dials the lanes, settles what landed, begins the rounds.

use std::time::Duration;

use multifd_wire::frame::{Grant, Landed, Ready};
use multifd_wire::{Features, Kind, Misbehaved, Phase, Round};

use super::{Effect, Event, Session};
use crate::source::set_up::{Beginning, SetUp};

impl Session {
    /// A control channel was accepted, with these features; the first one, or another after a loss. `hello`: the time from its
    /// hello to the reply.
    pub(super) fn connected(&mut self, agreed: Features, hello: Duration, now: Duration) {
        self.control.rest();
        self.hellos.accepted(agreed);
        self.set_up = SetUp::default();
        self.keep_alive.connected(hello, now);
        self.heard(now);
    }

    /// Whether this attempt to open a control channel is waited for.
    #[must_use]
    pub fn awaits(&self, number: u32) -> bool {
        self.control.awaits(number)
    }

    /// Until when the destination is dialled, if it is.
    #[must_use]
    pub fn dials_until(&self) -> Option<Duration> {
        self.control.until()
    }

    pub(super) fn lanes_named(&self) -> u32 {
        self.set_up
            .lanes_named(self.lanes.count(), self.config.channels)
    }

    pub(super) fn granted(&mut self, grant: Grant, now: Duration) -> Vec<Effect> {
        let first = !self.set_up.is_resuming();
        self.set_up.granted(grant);
        // SPEC: FEAT-5
        let kept = Duration::from_millis(grant.suspend_ms.into());
        let ticket = self.hellos.granted(&grant);
        self.kept_for(self.hellos.may_resume().then_some(kept));
        let steps = self.handle(Event::Granted, now);
        let lanes = match steps.last() {
            Some(Effect::SendSetup { lanes }) => *lanes,
            _ => return steps,
        };
        let ticket = first.then_some(ticket);
        let mut effects = vec![Effect::Granted { grant, ticket }];
        effects.extend(steps);
        let view = self.view();
        if self.lanes.count() > 0 && !first {
            effects.extend(self.lanes.dial_all_again(&view, now));
        } else {
            effects.extend(self.lanes.dial(lanes, &view, now));
        }
        effects
    }

    pub(super) fn ready(&mut self, ready: Ready, now: Duration) -> Result<Vec<Effect>, Misbehaved> {
        if self.phase() != Phase::Setup {
            return Err(Misbehaved::Order { kind: Kind::Ready });
        }
        self.set_up.ready(ready, self.lanes.count())?;
        Ok(self.begin(now))
    }

    /// LANDED: settles every lane of before. Checks all of it before it changes anything.
    pub(super) fn landed(
        &mut self,
        landed: &Landed<'_>,
        now: Duration,
    ) -> Result<Vec<Effect>, Misbehaved> {
        let kind = Kind::Landed;
        if !self.hellos.may_resume() {
            return Err(Misbehaved::Feature { kind });
        }
        if !self.set_up.landed_is_due() {
            return Err(Misbehaved::Order { kind });
        }
        // SPEC: RESUME-7
        let opened = self
            .last_opened
            .map_or(0, |round| round.value().saturating_add(1));
        if landed.rounds_closed < self.rounds_closed() || landed.rounds_closed > opened {
            return Err(Misbehaved::Round {
                expected: Round::new(self.rounds_closed()),
                found: Round::new(landed.rounds_closed),
            });
        }
        let count = self.lanes.count();
        if let Some(mark) = landed.iter().find(|mark| mark.lane.value() >= count) {
            self.lanes.known(mark.lane, mark.incarnation)?;
        }
        let lanes = self.lanes.landed(|lane| {
            let mark = landed.iter().find(|mark| mark.lane == lane)?;
            Some((mark.incarnation, mark.frames))
        })?;
        self.set_up.landed(landed.rounds_closed);
        self.closed = landed.rounds_closed.checked_sub(1).map(Round::new);
        self.paused_from = None;
        let mut effects = vec![Effect::SettleBefore { lanes }];
        effects.extend(self.begin(now));
        Ok(effects)
    }

    /// Begins the rounds, or goes on with them, once everything is there.
    pub(super) fn begin(&mut self, now: Duration) -> Vec<Effect> {
        let view = self.view();
        if self.lanes.dialling() || view.comes_back() && self.lanes.alive() == 0 {
            return Vec::new();
        }
        let Some((beginning, prepare_us)) = self.set_up.completes() else {
            return Vec::new();
        };
        let mut effects = Vec::new();
        if let Beginning::Resumed { rounds_closed } = beginning {
            effects.push(Effect::Resumed { rounds_closed });
        }
        if view.begun {
            effects.extend(self.begun(now));
        } else {
            // Also on the way back, if the first set-up was lost: what follows it follows now (SPEC: RESUME-13).
            effects.push(Effect::Begin { prepare_us });
        }
        effects
    }

    /// The sources of dirty pages are started.
    pub(super) fn begun(&mut self, now: Duration) -> Vec<Effect> {
        match self.set_up.begun() {
            Some(Beginning::First) => self.handle(Event::Ready, now),
            Some(Beginning::Resumed { rounds_closed }) => {
                self.handle(Event::Landed { rounds_closed }, now)
            }
            None => Vec::new(),
        }
    }
}
