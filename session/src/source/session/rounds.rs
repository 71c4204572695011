//! The decision after each live round: go on, wait, switch over, or give up.

use std::time::Duration;

use multifd_wire::{Phase, Round};

use super::{Effect, Event, Session, State};
use crate::source::config::WhenNotConverging;
use crate::source::devices::WAIT_ROUND;
use crate::source::error::{Error, Fault};
use crate::source::rounds::{Aside, Weighed};
use crate::source::steer::Sending;

/// What is on its way may take this many times as long as the measured bandwidth says, and the longest silence beside, before
/// the destination is given up.
const DRAIN_PATIENCE: u32 = 2;

impl Session {
    /// What happens while rounds are made and the guest runs.
    pub(super) fn handle_round(&mut self, event: Event, now: Duration) -> Vec<Effect> {
        match (self.state, event) {
            (
                State::Sending { round, since },
                Event::Encoded {
                    octets,
                    unacked_octets,
                },
            ) => {
                let over = now.saturating_sub(since);
                self.rounds.encoded(octets, unacked_octets, over);
                self.state = State::Deciding {
                    round,
                    since,
                    encoded: now,
                };
                vec![Effect::Collect { last: false }]
            }
            (State::Sending { since, .. }, Event::Collected { pages }) => {
                self.look(pages, since, now)
            }
            (
                State::Deciding {
                    round,
                    since,
                    encoded,
                },
                Event::Collected { pages },
            ) => {
                // What was collected was dirtied from the round's begin to now.
                let over = now.max(encoded).saturating_sub(since);
                self.rounds.collected(pages, over);
                self.decide(round, pages, since, now)
            }
            (State::Draining { round, since, .. }, Event::Closed { round: closed, .. })
                if closed >= round =>
            {
                self.state = State::Deciding {
                    round,
                    since,
                    encoded: now,
                };
                vec![Effect::Collect { last: false }]
            }
            (_, Event::Devices(outlook)) if self.devices.are_there() => {
                let ready = outlook.unacked.is_empty();
                self.devices.known(outlook);
                if ready {
                    self.look_again(now)
                } else {
                    Vec::new()
                }
            }
            // Old news: rounds close and pages come back while the next round is long under way.
            (_, Event::Closed { .. } | Event::LaneLost { .. }) => Vec::new(),
            (_, event) => self.unexpected(&event),
        }
    }

    pub(super) fn open(&mut self, round: Round, now: Duration) -> Vec<Effect> {
        self.state = State::Sending { round, since: now };
        self.rounds.opened(now);
        vec![self.open_round(round, false)]
    }

    /// Inside a round: what was collected has been dirtied since it began.
    pub(super) fn look(&mut self, pages: u64, since: Duration, now: Duration) -> Vec<Effect> {
        let (lasted, aside) = (now.saturating_sub(since), self.aside());
        let outlook = self.rounds.look(pages, lasted, &aside, now);
        // While it is held nothing can be said of the end.
        let outlook = outlook.filter(|_| self.sending() == Sending::On);
        outlook.map(Effect::Forecast).into_iter().collect()
    }

    /// What the downtime has beside pages.
    fn aside(&self) -> Aside {
        let (stop_bytes, work) = self.devices.share();
        Aside {
            limit: self.config.limits.downtime_limit,
            round_trip: self.round_trip,
            stop_bytes,
            work,
        }
    }

    /// The decision after a live round that began at `since`: go on, wait, switch over, or give up.
    pub(super) fn decide(
        &mut self,
        round: Round,
        pages: u64,
        since: Duration,
        now: Duration,
    ) -> Vec<Effect> {
        if self.sending() == Sending::Held {
            return self.go_on_held(round, since, now);
        }
        let landed = self.closed >= Some(round);
        let weighed = self.rounds.weigh(pages, landed, &self.aside(), now);
        let conditions = &weighed.conditions;
        let mut effects: Vec<Effect> = weighed.outlook.map(Effect::Forecast).into_iter().collect();
        let outlook = weighed.outlook.map(|outlook| outlook.forecast);
        let predicted = conditions.downtime(pages as f64);
        let counted = (round.value() + 1)
            .saturating_sub(self.devices.rounds_waited() + self.rounds.rounds_held());
        let left = self.config.limits.max_rounds.saturating_sub(counted);
        let fits = predicted <= conditions.limit || self.at_once;
        let drains = !fits && conditions.drained().downtime(pages as f64) <= conditions.limit;
        let throttle = if fits || drains {
            None
        } else {
            self.throttles(&weighed, pages, left)
        };
        let used_up = left == 0 || throttle.is_none() && self.rounds.diverges(outlook, pages, now);
        if drains {
            let on_its_way = conditions.downtime(0.0);
            self.state = State::Draining {
                round,
                since,
                until: now + self.config.stall + on_its_way * DRAIN_PATIENCE,
            };
            return effects;
        }
        if fits && !used_up && !self.at_once && self.rounds.polishes(&weighed, pages) {
            // It costs the guest nothing.
        } else if fits
            || (used_up && self.config.limits.when_not_converging == WhenNotConverging::Switch)
        {
            if self.devices.hold(&self.config, now) {
                effects.extend(self.wait_for_devices(round, since, now));
                return effects;
            }
            return self.switch_over(round, predicted, now, effects);
        } else if used_up {
            let error = Error::new(
                Phase::Rounds,
                Fault::not_converging(round.value() + 1, predicted, conditions.limit, outlook),
            );
            effects.extend(self.fail(error));
            return effects;
        }
        if let Some(percent) = throttle {
            effects.push(self.throttle_to(percent));
        }
        match round.next() {
            Some(next) => {
                let unacked = self.devices.hold(&self.config, now);
                // The devices' part alone is above the limit. Rounds bring neither that nor the acknowledgements any nearer, and would
                // follow one another without end, most of them empty.
                let idle = self.devices.are_there() && conditions.downtime(0.0) > conditions.limit;
                let waits = unacked && (idle || self.devices.are_waited_for());
                if (waits || idle) && self.devices.round_was_just_made(now) {
                    if waits {
                        effects.extend(self.wait_for_devices(round, since, now));
                    } else {
                        let again = now + WAIT_ROUND;
                        self.state = State::Waiting {
                            round,
                            since,
                            again,
                        };
                    }
                    return effects;
                }
                if waits || idle {
                    // While initial bytes are under way there is something to wait for.
                    self.devices.round_made(waits, now);
                }
                effects.extend(self.open(next, now));
            }
            None => effects.extend(self.fail(Error::new(
                Phase::Rounds,
                Fault::not_converging(round.value(), predicted, conditions.limit, outlook),
            ))),
        }
        effects
    }

    /// How much of the guest's time is to be held back in what follows, if that is more or less than now, with so many rounds left.
    fn throttles(&mut self, weighed: &Weighed, pages: u64, left: u32) -> Option<u8> {
        let limit = self.config.limits.throttle_limit;
        if limit == 0 || left == 0 {
            return None;
        }
        let needed = weighed.throttle_needed(self.throttle.percent(), pages, left);
        self.throttle.decide(needed, limit)
    }

    /// The embedder knows that nobody would notice a pause now. The round under way is finished; where only time is waited for, the
    /// decision is made again at once. Acknowledgements of devices are still waited for.
    pub(super) fn wants_switchover(&mut self, now: Duration) -> Vec<Effect> {
        self.at_once = true;
        self.decide_again(now)
    }

    /// The user holds the sending: nothing is decided. Rounds go on, each for a while, with next to nothing in them.
    fn go_on_held(&mut self, round: Round, since: Duration, now: Duration) -> Vec<Effect> {
        if let Some(again) = self.holds_until(since, now) {
            self.state = State::Waiting {
                round,
                since,
                again,
            };
            return Vec::new();
        }
        match round.next() {
            Some(next) => {
                self.rounds.held_round();
                self.open(next, now)
            }
            None => {
                let what = "held for more rounds than there are numbers".into();
                self.fail(Error::new(Phase::Rounds, Fault::Internal { what }))
            }
        }
    }

    /// The guest runs on until the devices' initial bytes are loaded, or until the user's patience is at its end.
    pub(super) fn wait_for_devices(
        &mut self,
        round: Round,
        since: Duration,
        now: Duration,
    ) -> Vec<Effect> {
        let again = match self.devices.wait(&self.config, now) {
            Ok(again) => again,
            Err(fault) => return self.fail(Error::new(Phase::Rounds, fault)),
        };
        self.state = State::Waiting {
            round,
            since,
            again,
        };
        vec![Effect::AwaitDevices]
    }

    /// While waiting for devices: back to the decision.
    pub(super) fn look_again(&mut self, now: Duration) -> Vec<Effect> {
        let State::Waiting { round, since, .. } = self.state else {
            return Vec::new();
        };
        self.deadlines.progress = now;
        self.state = State::Deciding {
            round,
            since,
            encoded: now,
        };
        vec![Effect::Collect { last: false }]
    }

    fn switch_over(
        &mut self,
        round: Round,
        predicted: Duration,
        now: Duration,
        mut effects: Vec<Effect>,
    ) -> Vec<Effect> {
        let Some(next) = round.next() else {
            effects.extend(self.fail(Error::new(
                Phase::Rounds,
                Fault::Internal {
                    what: "a switchover after the last round number".into(),
                },
            )));
            return effects;
        };
        self.predicted = Some(predicted);
        // It was wanted of this one.
        self.at_once = false;
        self.state = State::Pausing { round: next };
        self.deadlines.paused_at = Some(now);
        effects.push(Effect::Pause);
        effects
    }
}
