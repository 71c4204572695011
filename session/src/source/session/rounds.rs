//! The decision after each live round: go on, wait, switch over, or give up; and what the forecast is made of.

use std::time::Duration;

use multifd_wire::{Phase, Round};

use super::{Effect, Session, State};
use crate::source::config::{WhenAckLate, WhenNotConverging};
use crate::source::error::{Error, Fault};
use crate::source::forecast::{
    Conditions, Forecast, Observation, Outlook, UnderWay, Writer, outlook, uncertainty,
};
use crate::source::speed::{LaneCount, LaneLoad};

/// A round is worth while below the limit only if it halves what is left, and only this often.
const POLISH_ROUNDS_MAX: u32 = 4;

/// Pause, state and commit as long as nothing of them was measured: the round trip counts three times beside this. A guess is no
/// reason to refuse: it counts for half of the limit at most.
const FIXED_GUESS: Duration = Duration::from_millis(4);

/// The sources are asked inside a round for the first time after this long, and then whenever it has lasted twice as long: the
/// guest's writing is known before the first round is over, however long that takes.
const FIRST_LOOK: Duration = Duration::from_millis(250);

/// A migration that does not converge is given up after so many rounds in a row that say so and leave no less than the one before,
const DIVERGING_ROUNDS: u32 = 3;

/// if they took this long at least: a burst of writing is over sooner.
const DIVERGING_TIME: Duration = Duration::from_secs(2);

/// The part of what the round before left that counts as no less.
const NO_LESS: f64 = 0.9;

/// How often our destination acknowledges. One that does it less often (SPEC: ACK-2 allows 100 ms) makes the prediction too high,
/// never too low.
const ACK_LAG: Duration = Duration::from_millis(20);

/// What is on its way may take this many times as long as the measured bandwidth says, and the longest silence beside, before
/// the destination is given up.
const DRAIN_PATIENCE: u32 = 2;

/// While devices are waited for, what is dirty is looked at this often, and sent if it no longer fits the downtime limit.
const WAIT_ROUND: Duration = Duration::from_millis(200);

/// A round with fewer octets than this says too little about the bandwidth: most of them may be in buffers.
const MEASURABLE_OCTETS: u64 = 4 << 20;

/// A smaller round that takes longer than this says that the bandwidth is no more than what it had.
const CRAWL: Duration = Duration::from_millis(200);

/// A round in which a page has fewer octets than this on average is one of zero pages.
const CONTENT_OCTETS_MIN: f64 = 64.0;

/// How far the present round is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counted {
    /// Pages that it began with.
    pub pages: u64,
    /// Pages that no lane has taken yet.
    pub pages_left: u64,
    /// Bytes that were handed to channels in it.
    pub sent_bytes: u64,
    /// Bytes that were handed to channels, in whichever round, and are not acknowledged yet.
    pub unacked_bytes: u64,
}

/// Rounds in a row after which it looked hopeless.
#[derive(Debug, Clone, Copy)]
pub(super) struct Diverging {
    since: Duration,
    rounds: u32,
    pages: u64,
}

impl Session {
    /// What was sent and acknowledged, of the lanes that live.
    pub(super) fn counted(&mut self, counted: Counted, lanes: &[LaneCount], now: Duration) {
        self.counted = counted;
        self.speeds.observe(lanes, now);
    }

    pub(super) fn open(&mut self, round: Round, now: Duration) -> Vec<Effect> {
        self.state = State::Sending { round, since: now };
        self.look_due = now + FIRST_LOOK;
        self.counted = Counted::default();
        vec![self.open_round(round, false)]
    }

    pub(super) fn measure(&mut self, octets: u64, over: Duration) {
        self.crawl = None;
        if octets == 0 || over == Duration::ZERO {
            return;
        }
        let rate = octets as f64 / over.as_secs_f64();
        // What acknowledgements say is better than a few octets that went into buffers.
        let unknown = self.bandwidth.is_none() && self.speeds.total().is_none();
        if octets >= MEASURABLE_OCTETS || unknown {
            self.bandwidth = Some(rate);
        } else if over >= CRAWL {
            self.crawl = Some(rate);
        }
    }

    /// What is known of link and devices; `landed`: nothing of the pages is on its way any more.
    fn conditions(&self, landed: bool, unacked_octets: u64) -> Conditions {
        // Without any measurement (a guest of zero pages only) what is left costs next to nothing.
        let bandwidth = self.bandwidth().unwrap_or(1e9);
        // Acknowledgements lag by up to their period: what was sent in that time is not all on its way still.
        let lag = |speed: f64| ACK_LAG.as_secs_f64() * speed;
        let mut lanes: Vec<LaneLoad> = self.speeds.known().map(|(_, load)| load).collect();
        for lane in &mut lanes {
            let on_its_way = (lane.on_its_way - lag(lane.speed)).max(0.0);
            lane.on_its_way = if landed { 0.0 } else { on_its_way };
        }
        let unacked_octets = if landed { 0 } else { unacked_octets };
        let (stop_bytes, work) = self.device_share();
        // Reading and loading go on while the state travels: only what the slower of them takes longer than the way counts.
        let arrives = Duration::try_from_secs_f64(stop_bytes / bandwidth).unwrap_or(Duration::MAX);
        let limit = self.config.downtime_limit;
        Conditions {
            bandwidth,
            lanes,
            in_flight: (unacked_octets as f64 - lag(bandwidth)).max(0.0),
            stop_bytes,
            fixed: FIXED_GUESS.min(limit / 2)
                + self.round_trip.unwrap_or_default() * 3
                + work.saturating_sub(arrives),
            limit,
        }
    }

    /// Inside a round: what was collected has been dirtied since it began.
    pub(super) fn look(&mut self, pages: u64, since: Duration, now: Duration) -> Vec<Effect> {
        let lasted = now.saturating_sub(since);
        self.look_due = now + lasted.max(FIRST_LOOK);
        self.observed.push(Observation {
            pages,
            over: lasted,
        });
        let Counted {
            pages: all,
            pages_left,
            sent_bytes,
            unacked_bytes,
        } = self.counted;
        let done = all.saturating_sub(pages_left);
        if done == 0 {
            return Vec::new();
        }
        let conditions = self.conditions(false, unacked_bytes);
        let each = sent_bytes as f64 / done as f64;
        let rest = if self.bandwidth().is_some() && each >= CONTENT_OCTETS_MIN {
            (each * pages_left as f64 + unacked_bytes as f64) / conditions.bandwidth
        } else {
            // Next to nothing is sent: it takes as long as it takes to look at the pages.
            lasted.as_secs_f64() * pages_left as f64 / done as f64
        };
        let under_way = UnderWay {
            lasted: lasted.as_secs_f64(),
            rest,
        };
        self.outlook(pages, &conditions, under_way, now)
            .into_iter()
            .map(Effect::Forecast)
            .collect()
    }

    fn outlook(
        &self,
        pages: u64,
        conditions: &Conditions,
        under_way: UnderWay,
        now: Duration,
    ) -> Option<Outlook> {
        let writer = Writer::fit(&self.observed, self.memory_pages)?;
        let off = uncertainty(now.saturating_sub(self.sending_since).as_secs_f64());
        Some(outlook(now, &writer, pages, conditions, under_way, off))
    }

    /// Octets that devices would still give, and the time that reading or loading them would take, whichever is longer.
    fn device_share(&self) -> (f64, Duration) {
        self.devices
            .as_ref()
            .map_or((0.0, Duration::ZERO), |devices| {
                let work = devices.load.max(devices.read);
                (devices.stop_bytes as f64, work)
            })
    }

    /// The decision after a live round that began at `since`: go on, wait, switch over, or give up.
    pub(super) fn decide(
        &mut self,
        round: Round,
        pages: u64,
        since: Duration,
        now: Duration,
    ) -> Vec<Effect> {
        let landed = self.closed >= Some(round);
        let conditions = self.conditions(landed, self.unacked_octets);
        let writer = Writer::fit(&self.observed, self.memory_pages);
        let mut effects = Vec::new();
        let outlook = self.outlook(pages, &conditions, UnderWay::default(), now);
        effects.extend(outlook.map(Effect::Forecast));
        let outlook = outlook.map(|outlook| outlook.forecast);
        let predicted = conditions.downtime(pages as f64);
        let counted = (round.value() + 1).saturating_sub(self.rounds_waited);
        let used_up = counted >= self.config.rounds_max || self.diverges(outlook, pages, now);
        let fits = predicted <= conditions.limit || self.at_once;
        if !fits && conditions.drained().downtime(pages as f64) <= conditions.limit {
            let on_its_way = conditions.downtime(0.0);
            self.state = State::Draining {
                round,
                since,
                until: now + self.config.stall + on_its_way * DRAIN_PATIENCE,
            };
            return effects;
        }
        if fits
            && !used_up
            && !self.at_once
            && self.worth_polishing(writer.as_ref(), pages, &conditions)
        {
            self.polished += 1;
        } else if fits || (used_up && self.config.when_not_converging == WhenNotConverging::Switch)
        {
            if self.acks_missing() && !self.acks_waived(now) {
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
        match round.next() {
            Some(next) => {
                let unacked = self.acks_missing() && !self.acks_waived(now);
                // The devices' part alone is above the limit. Rounds bring neither that nor the acknowledgements any nearer, and would
                // follow one another without end, most of them empty.
                let idle = self.devices.is_some() && conditions.downtime(0.0) > conditions.limit;
                let waits = unacked && (idle || self.waiting_since.is_some());
                if (waits || idle) && now < self.round_waited_at + WAIT_ROUND {
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
                    self.round_waited_at = now;
                    // While initial bytes are under way there is something to wait for.
                    self.rounds_waited += u32::from(waits);
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

    /// The embedder knows that nobody would notice a pause now. The round under way is finished; where only time is waited for, the
    /// decision is made again at once. Acknowledgements of devices are still waited for.
    pub(super) fn wants_switchover(&mut self, now: Duration) -> Vec<Effect> {
        self.at_once = true;
        match self.state {
            State::Draining { round, since, .. } => {
                self.state = State::Deciding {
                    round,
                    since,
                    encoded: now,
                };
                vec![Effect::Collect { last: false }]
            }
            State::Waiting { .. } => self.look_again(now),
            _ => Vec::new(),
        }
    }

    /// Whether it has been clear for long enough that no number of rounds will do.
    fn diverges(&mut self, forecast: Option<Forecast>, pages: u64, now: Duration) -> bool {
        let says_so = matches!(forecast, Some(Forecast::Diverges { .. }));
        let no_less = self
            .diverging
            .is_none_or(|before| pages as f64 >= before.pages as f64 * NO_LESS);
        if !says_so || !no_less {
            self.diverging = None;
        }
        if !says_so {
            return false;
        }
        let streak = self.diverging.get_or_insert(Diverging {
            since: now,
            rounds: 0,
            pages,
        });
        streak.rounds += 1;
        streak.pages = pages;
        streak.rounds >= DIVERGING_ROUNDS && now >= streak.since + DIVERGING_TIME
    }

    pub(super) fn acks_missing(&self) -> bool {
        self.devices
            .as_ref()
            .is_some_and(|devices| !devices.unacked.is_empty())
    }

    pub(super) fn ack_deadline(&self) -> Option<Duration> {
        Some(self.waiting_since? + self.config.ack_deadline?)
    }

    /// The guest runs on until the devices' initial bytes are loaded, or until the user's patience is at its end.
    pub(super) fn wait_for_devices(
        &mut self,
        round: Round,
        since: Duration,
        now: Duration,
    ) -> Vec<Effect> {
        let began = *self.waiting_since.get_or_insert(now);
        let deadline = self.ack_deadline();
        if deadline.is_some_and(|deadline| now >= deadline)
            && self.config.when_ack_late == WhenAckLate::Fail
        {
            let unacked = self.devices.as_ref().map(|devices| &devices.unacked);
            let fault = Fault::AckDeadline {
                devices: unacked.map_or_else(String::new, |names| names.join(", ")),
                waited_ms: now.saturating_sub(began).as_millis(),
            };
            return self.fail(Error::new(Phase::Rounds, fault));
        }
        let again = (now + WAIT_ROUND).min(deadline.unwrap_or(Duration::MAX));
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
        self.progress = now;
        self.state = State::Deciding {
            round,
            since,
            encoded: now,
        };
        vec![Effect::Collect { last: false }]
    }

    /// Below the limit a further live round is made as long as it is short and halves the downtime: it costs the guest nothing.
    fn worth_polishing(
        &self,
        writer: Option<&Writer>,
        pages: u64,
        conditions: &Conditions,
    ) -> bool {
        let lasts = conditions
            .downtime(pages as f64)
            .saturating_sub(conditions.fixed);
        let Some(writer) = writer else { return false };
        let next = writer.unique(lasts.as_secs_f64());
        self.polished < POLISH_ROUNDS_MAX
            && lasts > Duration::from_millis(2)
            && next < pages as f64 / 2.0
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
        self.paused_at = Some(now);
        effects.push(Effect::Pause);
        effects
    }
}
