//! What is known of the rounds at the source: how much is written, how fast it is sent, how far the present one is, and what follows
//! from that for the end. What is decided with it is the session's.
//!
//! The rule it keeps: a forecast is made of what was measured, and says less the less that is.

use std::time::Duration;

use super::forecast::{
    Conditions, Forecast, Observation, Outlook, UnderWay, Writer, forecast, outlook, uncertainty,
};
use super::speed::{LaneCount, LaneLoad, Speeds};
use super::steer::{Limits, Sending, THROTTLE_MAX};

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
struct Diverging {
    since: Duration,
    rounds: u32,
    pages: u64,
}

/// What the downtime has beside pages.
#[derive(Debug, Clone, Copy)]
pub(super) struct Aside {
    /// How long it may be.
    pub(super) limit: Duration,
    /// The shortest round trip that was seen.
    pub(super) round_trip: Option<Duration>,
    /// Bytes that devices would still give.
    pub(super) stop_bytes: f64,
    /// The time that reading or loading them would take, whichever is longer.
    pub(super) work: Duration,
}

/// The rounds so far.
#[derive(Debug)]
pub(super) struct Rounds {
    memory_pages: u64,
    observed: Vec<Observation>,
    /// When the first round began.
    began: Duration,
    /// How far the present round is, and when to ask the sources inside it.
    counted: Counted,
    look_due: Duration,
    /// What each lane's acknowledgements say.
    speeds: Speeds,
    /// While the rounds say that no number of them will do.
    diverging: Option<Diverging>,
    bandwidth: Option<f64>,
    /// What the newest round had, if it was a small one that took long.
    crawl: Option<f64>,
    /// Bytes that are handed to channels and not acknowledged, at the end of the newest round.
    unacked_bytes: u64,
    polished: u32,
    /// The bandwidth cap.
    cap: Option<u64>,
    /// The cap was changed, or sending was held, since the present round began: its own bandwidth says little.
    mixed: bool,
    /// Sending is held.
    held: bool,
    /// Rounds that were made while sending was held: they do not count.
    rounds_held: u32,
    /// What is held back of the guest's time, in percent; all that was observed was so.
    throttle: u8,
    /// The pages that the guest writes, as they were known before that was changed.
    set_known: Option<f64>,
}

impl Rounds {
    pub(super) fn new(memory_pages: u64, limits: &Limits, now: Duration) -> Self {
        Self {
            cap: limits.bandwidth,
            mixed: false,
            throttle: 0,
            set_known: None,
            held: limits.sending == Sending::Held,
            rounds_held: 0,
            memory_pages,
            observed: Vec::new(),
            began: now,
            counted: Counted::default(),
            look_due: now,
            speeds: Speeds::default(),
            diverging: None,
            bandwidth: None,
            crawl: None,
            unacked_bytes: 0,
            polished: 0,
        }
    }

    /// The first round begins.
    pub(super) fn begin(&mut self, now: Duration) {
        self.began = now;
    }

    /// The destination has nothing: what was written so far says nothing about what is to come.
    pub(super) fn begin_again(&mut self) {
        self.observed.clear();
        self.set_known = None;
    }

    /// So much of the guest's time is held back from now on: it writes slower, in the same pages. How much slower is measured anew.
    pub(super) fn throttled(&mut self, percent: u8) {
        self.throttle = percent;
        self.set_known = self.writer().map(|writer| writer.set_pages);
        self.observed.clear();
        self.diverging = None;
    }

    /// The guest's writing, as far as it is known.
    fn writer(&self) -> Option<Writer> {
        Writer::fit(&self.observed, self.memory_pages, self.set_known)
    }

    /// The switchover was broken off: short rounds may help once more.
    pub(super) fn broken_off(&mut self) {
        self.polished = 0;
    }

    /// A live round begins.
    pub(super) fn opened(&mut self, now: Duration) {
        self.look_due = now + FIRST_LOOK;
        self.counted = Counted::default();
        self.mixed = self.held;
    }

    /// Limits were changed. What was measured under another cap is no measure of what is to come.
    pub(super) fn steered(&mut self, before: &Limits, after: &Limits, now: Duration) {
        self.diverging = None;
        self.held = after.sending == Sending::Held;
        self.mixed |= before.bandwidth != after.bandwidth || before.sending != after.sending;
        if before.bandwidth != after.bandwidth {
            self.cap = after.bandwidth;
            // The lanes' acknowledgements follow within some tenths of a second.
            self.bandwidth = self.bandwidth.filter(|_| self.speeds.total().is_none());
            self.crawl = None;
        }
        if self.look_due < Duration::MAX {
            // A forecast by the new limits, once they can be seen in what is acknowledged.
            self.look_due = self.look_due.min(now + FIRST_LOOK);
        }
    }

    /// A round was made with sending held.
    pub(super) fn held_round(&mut self) {
        self.rounds_held += 1;
    }

    /// Rounds that do not count.
    pub(super) fn rounds_held(&self) -> u32 {
        self.rounds_held
    }

    /// What was sent and acknowledged, of the lanes that live.
    pub(super) fn counted(&mut self, counted: Counted, lanes: &[LaneCount], now: Duration) {
        self.counted = counted;
        self.speeds.observe(lanes, now);
    }

    /// All of a live round was handed to channels, so many bytes in so long a time.
    pub(super) fn encoded(&mut self, bytes: u64, unacked_bytes: u64, over: Duration) {
        self.unacked_bytes = unacked_bytes;
        self.crawl = None;
        if bytes == 0 || over == Duration::ZERO || self.mixed && self.speeds.total().is_some() {
            return;
        }
        let rate = bytes as f64 / over.as_secs_f64();
        // What acknowledgements say is better than a few bytes that went into buffers.
        let unknown = self.bandwidth.is_none() && self.speeds.total().is_none();
        if bytes >= MEASURABLE_OCTETS || unknown {
            self.bandwidth = Some(rate);
        } else if over >= CRAWL {
            self.crawl = Some(rate);
        }
    }

    /// So many pages were dirtied in so long a time.
    pub(super) fn collected(&mut self, pages: u64, over: Duration) {
        self.observed.push(Observation { pages, over });
    }

    /// The measured bytes a second, once a round was long enough.
    pub(super) fn bandwidth(&self) -> Option<f64> {
        let crawl = self.crawl.unwrap_or(f64::INFINITY);
        // What went into buffers may have been faster than the cap, what comes out of them is not.
        let cap = self.cap.map_or(f64::INFINITY, |cap| cap as f64);
        let measured = self.bandwidth.or(self.speeds.total());
        measured.map(|measured| measured.min(crawl).min(cap))
    }

    pub(super) fn speeds(&self) -> &Speeds {
        &self.speeds
    }

    /// When the sources are asked inside the present round.
    pub(super) fn look_due(&self) -> Duration {
        self.look_due
    }

    /// They are asked now.
    pub(super) fn looks(&mut self) {
        self.look_due = Duration::MAX;
    }

    /// What is known of link and devices. `on_its_way`: bytes that are not acknowledged; none if all pages are known to have landed.
    fn conditions(&self, on_its_way: Option<u64>, aside: &Aside) -> Conditions {
        let landed = on_its_way.is_none();
        // Without any measurement (a guest of zero pages only) what is left costs next to nothing.
        let bandwidth = self.bandwidth().unwrap_or(1e9);
        // Acknowledgements lag by up to their period: what was sent in that time is not all on its way still.
        let lag = |speed: f64| ACK_LAG.as_secs_f64() * speed;
        let mut lanes: Vec<LaneLoad> = self.speeds.known().map(|(_, load)| load).collect();
        for lane in &mut lanes {
            let on_its_way = (lane.on_its_way - lag(lane.speed)).max(0.0);
            lane.on_its_way = if landed { 0.0 } else { on_its_way };
        }
        let unacked_octets = on_its_way.unwrap_or(0);
        // Reading and loading go on while the state travels: only what the slower of them takes longer than the way counts.
        let arrives =
            Duration::try_from_secs_f64(aside.stop_bytes / bandwidth).unwrap_or(Duration::MAX);
        let limit = aside.limit;
        Conditions {
            bandwidth,
            lanes,
            in_flight: (unacked_octets as f64 - lag(bandwidth)).max(0.0),
            stop_bytes: aside.stop_bytes,
            fixed: FIXED_GUESS.min(limit / 2)
                + aside.round_trip.unwrap_or_default() * 3
                + aside.work.saturating_sub(arrives),
            limit,
        }
    }

    /// Inside a round: what was collected has been dirtied since it began.
    pub(super) fn look(
        &mut self,
        pages: u64,
        lasted: Duration,
        aside: &Aside,
        now: Duration,
    ) -> Option<Outlook> {
        self.look_due = now + lasted.max(FIRST_LOOK);
        self.collected(pages, lasted);
        let Counted {
            pages: all,
            pages_left,
            sent_bytes,
            unacked_bytes,
        } = self.counted;
        let done = all.saturating_sub(pages_left);
        if done == 0 {
            return None;
        }
        let conditions = self.conditions(Some(unacked_bytes), aside);
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
    }

    fn outlook(
        &self,
        pages: u64,
        conditions: &Conditions,
        under_way: UnderWay,
        now: Duration,
    ) -> Option<Outlook> {
        let writer = self.writer()?;
        let off = uncertainty(now.saturating_sub(self.began).as_secs_f64());
        let outlook = outlook(now, &writer, pages, conditions, under_way, off);
        Some(outlook.beside(self.throttle))
    }

    /// After a live round: what a switchover would cost now, and what is to be expected of further rounds. `landed`: all of its pages are
    /// known to be there.
    pub(super) fn weigh(&self, pages: u64, landed: bool, aside: &Aside, now: Duration) -> Weighed {
        let on_its_way = (!landed).then_some(self.unacked_bytes);
        let conditions = self.conditions(on_its_way, aside);
        Weighed {
            writer: self.writer(),
            outlook: self.outlook(pages, &conditions, UnderWay::default(), now),
            conditions,
        }
    }

    /// Whether it has been clear for long enough that no number of rounds will do.
    pub(super) fn diverges(
        &mut self,
        forecast: Option<Forecast>,
        pages: u64,
        now: Duration,
    ) -> bool {
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

    /// Below the limit a further live round is made as long as it is short and halves the downtime: it costs the guest nothing.
    pub(super) fn polishes(&mut self, weighed: &Weighed, pages: u64) -> bool {
        let conditions = &weighed.conditions;
        let lasts = conditions
            .downtime(pages as f64)
            .saturating_sub(conditions.fixed);
        let Some(writer) = &weighed.writer else {
            return false;
        };
        let next = writer.unique(lasts.as_secs_f64());
        let worth = self.polished < POLISH_ROUNDS_MAX
            && lasts > Duration::from_millis(2)
            && next < pages as f64 / 2.0;
        self.polished += u32::from(worth);
        worth
    }
}

/// What is known when it is decided.
#[derive(Debug)]
pub(super) struct Weighed {
    pub(super) conditions: Conditions,
    pub(super) outlook: Option<Outlook>,
    writer: Option<Writer>,
}

/// The guest's writing may be off by this part: what is held back leaves room for it.
const THROTTLE_MARGIN: f64 = 1.1;

impl Weighed {
    /// How much of the guest's time would have to be held back, in percent, so that it converges within so many rounds: what is held back
    /// now if that does. `None`: no share would do, or nothing is known.
    pub(super) fn throttle_needed(&self, held: u8, pages: u64, rounds: u32) -> Option<u8> {
        let writer = self.writer?;
        let converges = |percent: u8, margin: f64| {
            // Measured with `held` held back.
            let rest = |percent: u8| f64::from(100 - percent.min(99)) / 100.0;
            let writes = writer.writes_per_second * margin * rest(percent) / rest(held);
            let writer = Writer {
                writes_per_second: writes,
                ..writer
            };
            let forecast = forecast(&writer, pages as f64, &self.conditions);
            matches!(forecast, Forecast::Converges { rounds: needed, .. } if needed <= rounds)
        };
        if converges(0, 1.0) {
            return Some(0);
        }
        let least = (1..=THROTTLE_MAX).find(|percent| converges(*percent, THROTTLE_MARGIN))?;
        // It is enough as it is: nothing is added for the margin's sake.
        let enough = least > held && held > 0 && converges(held, 1.0);
        Some(if enough { held } else { least })
    }
}
