//! The set-up, made for the first time or again: what has come of it, and when the rounds may begin.
//!
//! ```text
//!   connected ──GRANT──► the tables are sent, lanes are dialled ──READY──► (again: LANDED) ──every lane, or one, is open──► the rounds
//! ```
//! The rule it keeps: the rounds begin when the destination is ready *and* the lanes have read their acceptance, which may be later.

use std::time::Duration;

use multifd_wire::frame::{Grant, Landed, Ready};
use multifd_wire::{Features, Kind, Misbehaved, Phase, Round};

use super::{Effect, Event, Session};

/// What the destination has said in this set-up.
#[derive(Debug, Default)]
pub(super) struct SetUp {
    agreed: Features,
    grant: Option<Grant>,
    ready: Option<Ready>,
    /// The session is resumed: LANDED follows.
    resuming: bool,
    /// Rounds that LANDED says are closed.
    landed: Option<u32>,
    /// While the sources of dirty pages are started: what follows then.
    beginning: Option<Beginning>,
}

#[derive(Debug, Clone, Copy)]
enum Beginning {
    First,
    Resumed { rounds_closed: u32 },
}

impl SetUp {
    /// Channels were lost: what was said on them is void.
    pub(super) fn disconnected(&mut self) {
        *self = Self {
            agreed: self.agreed,
            grant: self.grant,
            ..Self::default()
        };
    }

    pub(super) fn resumes(&mut self) {
        self.resuming = true;
    }

    /// READY came, and the rounds have not begun.
    pub(super) fn is_ready(&self) -> bool {
        self.ready.is_some()
    }
}

impl Session {
    /// A control channel was accepted, with these features; the first one, or another after a loss. `hello`: the time from its
    /// hello to the reply.
    pub fn connected(&mut self, agreed: Features, hello: Duration, now: Duration) {
        self.set_up = SetUp {
            agreed,
            ..SetUp::default()
        };
        self.keep_alive.connected(hello, now);
    }

    fn resume_agreed(&self) -> bool {
        self.set_up.agreed.contains(Features::RESUME)
    }

    /// How many lanes the set-up names: those that there are, or as many as are wanted and granted.
    pub(super) fn lanes_named(&self) -> u32 {
        let there_are = self.lanes.count();
        // A first set-up that was lost early has none yet.
        if self.set_up.resuming && there_are > 0 {
            return there_are;
        }
        let granted = self.set_up.grant.map_or(u32::MAX, |grant| grant.lanes_max);
        self.config.channels.min(granted)
    }

    pub(super) fn granted(&mut self, grant: Grant, now: Duration) -> Vec<Effect> {
        let first = !self.set_up.resuming;
        self.set_up.grant = Some(grant);
        // SPEC: FEAT-5
        let kept = Duration::from_millis(grant.suspend_ms.into());
        self.kept_for(self.resume_agreed().then_some(kept));
        let steps = self.handle(Event::Granted, now);
        let lanes = match steps.last() {
            Some(Effect::SendSetup { lanes }) => *lanes,
            _ => return steps,
        };
        let mut effects = vec![Effect::Granted { grant, first }];
        effects.extend(steps);
        if self.lanes.count() > 0 && !first {
            let view = self.view();
            effects.extend(self.lanes.dial_all_again(&view, now));
        } else {
            effects.extend(self.lanes.dial(lanes));
        }
        effects
    }

    pub(super) fn ready(&mut self, ready: Ready, now: Duration) -> Result<Vec<Effect>, Misbehaved> {
        if self.phase() != Phase::Setup || self.set_up.grant.is_none() {
            return Err(Misbehaved::Order { kind: Kind::Ready });
        }
        let lanes = self.lanes.count();
        // SPEC: READY-1, RESUME-14. A destination may have sent a READY that was lost, and need no more than one lane now.
        let fits = if self.set_up.resuming {
            (1..=lanes).contains(&ready.lanes)
        } else {
            ready.lanes == lanes
        };
        if !fits {
            return Err(Misbehaved::Amount {
                field: "ready.lanes",
                expected: lanes.into(),
                found: ready.lanes.into(),
            });
        }
        self.set_up.ready = Some(ready);
        Ok(self.begin(now))
    }

    /// LANDED: settles every lane of before. Checks all of it before it changes anything.
    pub(super) fn landed(
        &mut self,
        landed: &Landed<'_>,
        now: Duration,
    ) -> Result<Vec<Effect>, Misbehaved> {
        let kind = Kind::Landed;
        if !self.resume_agreed() {
            return Err(Misbehaved::Feature { kind });
        }
        // SPEC: RESUME-6
        let due = self.set_up.resuming && self.set_up.landed.is_none() && self.set_up.is_ready();
        if !due {
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
        self.set_up.landed = Some(landed.rounds_closed);
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
        let Some(ready) = self.set_up.ready else {
            return Vec::new();
        };
        let beginning = if self.set_up.resuming {
            let Some(rounds_closed) = self.set_up.landed else {
                return Vec::new();
            };
            Beginning::Resumed { rounds_closed }
        } else {
            Beginning::First
        };
        self.set_up.ready = None;
        self.set_up.resuming = false;
        let mut effects = Vec::new();
        if let Beginning::Resumed { rounds_closed } = beginning {
            effects.push(Effect::Resumed { rounds_closed });
        }
        self.set_up.beginning = Some(beginning);
        if view.begun {
            effects.extend(self.begun(now));
        } else {
            // Also on the way back, if the first set-up was lost: what follows it follows now (SPEC: RESUME-13).
            effects.push(Effect::Begin {
                prepare_us: ready.prepare_us,
            });
        }
        effects
    }

    /// The sources of dirty pages are started.
    pub(super) fn begun(&mut self, now: Duration) -> Vec<Effect> {
        match self.set_up.beginning.take() {
            Some(Beginning::First) => self.handle(Event::Ready, now),
            Some(Beginning::Resumed { rounds_closed }) => {
                self.handle(Event::Landed { rounds_closed }, now)
            }
            None => Vec::new(),
        }
    }
}
