//! When will it end, how long will the guest stand still, and if never, what would help.
//!
//! The model: a guest that writes pages of a set of `N` pages at `w` page writes a second, at random, has dirtied
//! `u(t) = N (1 − e^(−w t / N))` different pages after `t` seconds. A round that has to send `r` pages at `B` pages a
//! second lasts `r / B`, so the next one has `u(r / B)` to send. Either that falls until it fits the downtime limit, or it
//! stops falling at a fixed point above it, and then no number of rounds helps. `w` and `N` follow from two rounds of
//! different length. (Clark et al., NSDI 2005 describe the same writable working set; the closed form is elementary.)
//!
//! Pure arithmetic: no clock, no memory of its own.

use std::time::Duration;

use multifd_wire::PAGE_BYTES;

use crate::source::speed::{LaneLoad, seconds_for};

/// What one stretch of time showed: how many different pages the guest wrote in it.
#[derive(Debug, Clone, Copy)]
pub struct Observation {
    /// Different pages dirtied.
    pub pages: u64,
    /// In this time.
    pub over: Duration,
}

/// The size of the set follows from observations of which one is at least so many times as long as another.
const TELLS_THE_SET: f64 = 1.5;

/// The guest's writing, as fitted to what was observed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Writer {
    /// Page writes a second, the same page counted each time.
    pub writes_per_second: f64,
    /// Pages of the set that it writes.
    pub set_pages: f64,
}

impl Writer {
    /// Fits the model to the longest and the shortest observation; `None` until something was observed. `set_known`: the size of the set
    /// as it was known before the guest wrote as it does now, which counts as long as all observations are about as long.
    #[must_use]
    pub fn fit(seen: &[Observation], memory_pages: u64, set_known: Option<f64>) -> Option<Self> {
        let usable = || seen.iter().filter(|o| o.over > Duration::ZERO);
        let long = usable().max_by_key(|o| o.over)?;
        let short = usable().min_by_key(|o| o.over)?;
        let most = memory_pages as f64;
        // The set that makes the short observation predict the long one. The prediction rises with the set's size.
        let ratio = long.over.as_secs_f64() / short.over.as_secs_f64();
        let predicted =
            |set: f64| set * (1.0 - (1.0 - (short.pages as f64 / set).min(1.0)).powf(ratio));
        let least = (long.pages.max(short.pages) as f64).max(1.0);
        let set_pages = if let Some(known) = set_known.filter(|_| ratio < TELLS_THE_SET) {
            known.clamp(least, most.max(least))
        } else if ratio < 1.1 || least >= most || predicted(most) <= long.pages as f64 {
            most.max(1.0)
        } else {
            bisect(least, most, |set| predicted(set) >= long.pages as f64)
        };
        let share = (short.pages as f64 / set_pages).min(1.0 - 1e-9);
        Some(Self {
            writes_per_second: -set_pages / short.over.as_secs_f64() * (1.0 - share).ln(),
            set_pages,
        })
    }

    /// The same guest, with this share of its writes held back.
    #[must_use]
    pub fn held_back(&self, share: f64) -> Self {
        Self {
            writes_per_second: self.writes_per_second * (1.0 - share),
            ..*self
        }
    }

    /// Different pages written in `seconds`.
    #[must_use]
    pub fn unique(&self, seconds: f64) -> f64 {
        self.set_pages * (1.0 - (-self.writes_per_second * seconds / self.set_pages).exp())
    }
}

/// What the link and the machine can do, and what is asked.
#[derive(Debug, Clone)]
pub struct Conditions {
    /// Measured bytes a second over all lanes.
    pub bandwidth: f64,
    /// Each lane whose speed is known; none of them is needed for an answer.
    pub lanes: Vec<LaneLoad>,
    /// Bytes of pages on their way that have to arrive before anything sent later does. They can be waited for.
    pub in_flight: f64,
    /// Bytes that the devices will give once they stand still. They are there whenever it is.
    pub stop_bytes: f64,
    /// The part of the downtime that does not depend on bytes: pause, state, commit round trip.
    pub fixed: Duration,
    /// The user's downtime limit.
    pub limit: Duration,
}

impl Conditions {
    /// Downtime if the switchover began with this many pages still to send.
    #[must_use]
    pub fn downtime(&self, pages: f64) -> Duration {
        let bytes = pages * PAGE_BYTES as f64 + self.stop_bytes;
        let together = (self.in_flight + bytes) / self.bandwidth.max(1.0);
        // The pause waits for the slowest lane, however fast the others are.
        let seconds = seconds_for(&self.lanes, bytes).map_or(together, |each| each.max(together));
        self.fixed + Duration::from_secs_f64(seconds.clamp(0.0, SECONDS_MAX))
    }

    /// The same, once everything that is on its way has arrived.
    #[must_use]
    pub fn drained(&self) -> Self {
        let free = |lane: &LaneLoad| LaneLoad {
            on_its_way: 0.0,
            ..*lane
        };
        Self {
            lanes: self.lanes.iter().map(free).collect(),
            in_flight: 0.0,
            ..self.clone()
        }
    }

    /// The same over a link that is so many times as fast.
    fn times_as_fast(&self, factor: f64) -> Self {
        let faster = |lane: &LaneLoad| LaneLoad {
            speed: lane.speed * factor,
            ..*lane
        };
        Self {
            bandwidth: self.bandwidth * factor,
            lanes: self.lanes.iter().map(faster).collect(),
            ..self.clone()
        }
    }
}

/// Longer than any migration: a bound for what is turned into a [`Duration`].
const SECONDS_MAX: f64 = 1e9;

/// The forecast, made anew after each round.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Forecast {
    /// It will fit the limit.
    Converges {
        /// Rounds still to come before the switchover.
        rounds: u32,
        /// Time until the switchover begins.
        within: Duration,
        /// Predicted downtime.
        downtime: Duration,
    },
    /// The rounds stop shrinking above the limit.
    Diverges {
        /// Downtime at the fixed point: the best that waiting can give.
        downtime: Duration,
        /// The bandwidth, in bytes a second, that would make it converge; none would if the fixed part alone is over the limit.
        bandwidth_needed: Option<u64>,
        /// The share of the guest's writes, in percent, that would have to be held back at the present bandwidth; if that helps.
        throttle_percent: Option<u8>,
    },
}

/// Advice is given with so much to spare: rates are never the same twice, and who follows it must not be told that it was not enough.
const ADVICE_MARGIN: f64 = 1.1;

/// More rounds than any useful migration has; a bound for the loop below.
const ROUNDS_LOOKED_AHEAD: u32 = 10_000;

/// Follows the model from `pages` dirty now until it fits or stops shrinking.
#[must_use]
pub fn forecast(writer: &Writer, pages: f64, conditions: &Conditions) -> Forecast {
    match look_ahead(writer, pages, conditions) {
        Ok((rounds, within, downtime)) => Forecast::Converges {
            rounds,
            within,
            downtime,
        },
        Err(downtime) => {
            let converges_at =
                |factor: f64| look_ahead(writer, pages, &conditions.times_as_fast(factor)).is_ok();
            let converges_with =
                |share: f64| look_ahead(&writer.held_back(share), pages, conditions).is_ok();
            let bandwidth = conditions.bandwidth.max(1.0);
            let needed =
                || (bisect(1.0, 1e6, converges_at) * ADVICE_MARGIN * bandwidth).ceil() as u64;
            let throttle = || {
                let writes_left = (1.0 - bisect(0.0, 1.0, converges_with)) / ADVICE_MARGIN;
                ((1.0 - writes_left) * 100.0).ceil() as u8
            };
            Forecast::Diverges {
                downtime,
                bandwidth_needed: converges_at(1e6).then(needed),
                throttle_percent: converges_with(1.0).then(throttle),
            }
        }
    }
}

/// Rounds, time and downtime until it fits, or the downtime at which it gets stuck.
fn look_ahead(
    writer: &Writer,
    pages: f64,
    conditions: &Conditions,
) -> Result<(u32, Duration, Duration), Duration> {
    let downtime = conditions.downtime(pages);
    if downtime <= conditions.limit {
        return Ok((0, Duration::ZERO, downtime));
    }
    // What is on its way now has arrived by the end of the next round, or is waited for: it is in no later pause.
    let drained = conditions.drained();
    let mut seconds = downtime
        .saturating_sub(drained.downtime(pages))
        .as_secs_f64();
    let mut left = pages;
    for round in 0..ROUNDS_LOOKED_AHEAD {
        let downtime = drained.downtime(left);
        if downtime <= conditions.limit {
            return Ok((round, seconds_long(seconds), downtime));
        }
        let lasts = left * PAGE_BYTES as f64 / conditions.bandwidth.max(1.0);
        let next = writer.unique(lasts);
        seconds += lasts;
        if next >= left * 0.999 {
            return Err(drained.downtime(next));
        }
        left = next;
    }
    Err(drained.downtime(left))
}

fn seconds_long(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds.clamp(0.0, SECONDS_MAX))
}

/// A figure that is not known exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Interval {
    /// If all goes well.
    pub low: Duration,
    /// As measured.
    pub likely: Duration,
    /// If it goes badly; `None` if it would not converge then.
    pub high: Option<Duration>,
}

/// What is known at one moment of when and how it will end.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Outlook {
    /// When this was said, since the migration began.
    pub at: Duration,
    /// The likely case, with what would help if it does not converge.
    pub forecast: Forecast,
    /// When it will be over, since the migration began; `None` if it does not converge.
    pub end: Option<Interval>,
    /// The downtime; of a migration that does not converge, the best that waiting can give.
    pub downtime: Interval,
}

impl Outlook {
    /// The same, of a guest of whose time so much is held back already: what would help counts from nothing.
    #[must_use]
    pub fn beside(mut self, held: u8) -> Self {
        if let Forecast::Diverges {
            throttle_percent: Some(percent),
            ..
        } = &mut self.forecast
        {
            let left = u32::from(100 - held.min(100)) * u32::from(100 - (*percent).min(100));
            *percent = u8::try_from(100 - left / 100).unwrap_or(100);
        }
        self
    }
}

/// The round that is under way.
#[derive(Debug, Clone, Copy, Default)]
pub struct UnderWay {
    /// How long it has lasted.
    pub lasted: f64,
    /// How long it will still take.
    pub rest: f64,
}

/// The part by which speeds and rates may be off that were measured for `seconds`: windows of a tenth of a second scatter, and
/// the guest changes its mind.
#[must_use]
pub fn uncertainty(seconds: f64) -> f64 {
    0.06 + 0.3 / (1.0 + seconds / 0.5)
}

/// What will become of it, seen `at` a moment at which `pages` were dirty, with rates that may be off by the part `off`.
#[must_use]
pub fn outlook(
    at: Duration,
    writer: &Writer,
    pages: u64,
    conditions: &Conditions,
    under_way: UnderWay,
    off: f64,
) -> Outlook {
    let case = |speed: f64, writes: f64| {
        let writer = Writer {
            writes_per_second: writer.writes_per_second * writes,
            ..*writer
        };
        let rest = under_way.rest / speed;
        // What is dirty now has been written since the round began; by its end there will be more.
        let by_then = if under_way.rest > 0.0 {
            (pages as f64).max(writer.unique(under_way.lasted + rest))
        } else {
            pages as f64
        };
        let conditions = conditions.times_as_fast(speed);
        let forecast = forecast(&writer, by_then, &conditions);
        let (downtime, end) = match forecast {
            Forecast::Converges {
                within, downtime, ..
            } => (downtime, Some(at + seconds_long(rest) + within + downtime)),
            Forecast::Diverges { downtime, .. } => (downtime, None),
        };
        (forecast, downtime, end)
    };
    let (forecast, downtime, end) = case(1.0, 1.0);
    let (_, least_downtime, soonest) = case(1.0 + off, 1.0 - off);
    let (_, most_downtime, latest) = case(1.0 / (1.0 + off), 1.0 + off);
    // A further round may leave less than the likely case has: the three are put in order.
    let ordered = |low: Duration, likely: Duration, high: Option<Duration>| Interval {
        low: low.min(likely),
        likely,
        high: high.map(|high| high.max(likely)),
    };
    let known = latest.is_some() || end.is_none();
    Outlook {
        at,
        forecast,
        end: end.map(|end| ordered(soonest.unwrap_or(end), end, latest)),
        downtime: ordered(least_downtime, downtime, known.then_some(most_downtime)),
    }
}

/// The smallest value in `least..=most` at which a rising yes/no question says yes (or `most`).
fn bisect(mut least: f64, mut most: f64, yes: impl Fn(f64) -> bool) -> f64 {
    for _ in 0..60 {
        let middle = f64::midpoint(least, most);
        if yes(middle) {
            most = middle;
        } else {
            least = middle;
        }
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: f64 = (1 << 20) as f64;

    fn observe(writer: &Writer, seconds: f64) -> Observation {
        Observation {
            pages: writer.unique(seconds) as u64,
            over: Duration::from_secs_f64(seconds),
        }
    }

    #[test]
    fn finds_the_rate_and_the_set_again_from_two_rounds() {
        let truth = Writer {
            writes_per_second: 50_000.0,
            set_pages: 65_536.0,
        };
        let fit =
            Writer::fit(&[observe(&truth, 4.0), observe(&truth, 0.7)], 1 << 20, None).unwrap();
        assert!(
            (fit.writes_per_second / truth.writes_per_second - 1.0).abs() < 0.02,
            "{fit:?}"
        );
        assert!(
            (fit.set_pages / truth.set_pages - 1.0).abs() < 0.02,
            "{fit:?}"
        );
    }

    #[test]
    fn a_writer_that_never_repeats_gets_all_memory_as_its_set() {
        let seen = [
            Observation {
                pages: 1000,
                over: Duration::from_secs(1),
            },
            Observation {
                pages: 4000,
                over: Duration::from_secs(4),
            },
        ];
        let fit = Writer::fit(&seen, 1 << 20, None).unwrap();
        assert!((fit.unique(2.0) - 2000.0).abs() < 20.0, "{fit:?}");
    }

    #[test]
    fn an_idle_guest_and_no_observation_are_told_apart() {
        assert_eq!(Writer::fit(&[], 100, None), None);
        let idle = Writer::fit(
            &[Observation {
                pages: 0,
                over: Duration::from_secs(1),
            }],
            100,
            None,
        )
        .unwrap();
        assert!(idle.unique(1e6) < 1e-6, "{idle:?}");
    }

    #[test]
    fn says_converges_exactly_when_iterating_the_guest_would() {
        let limit = Duration::from_millis(300);
        for (writes, mib_s, want) in [
            (25_000.0, 1000.0, true),
            (200_000.0, 500.0, false),
            (120_000.0, 400.0, false),
            (90_000.0, 4000.0, true),
        ] {
            let writer = Writer {
                writes_per_second: writes,
                set_pages: 262_144.0,
            };
            let conditions = Conditions {
                bandwidth: mib_s * MIB,
                lanes: Vec::new(),
                in_flight: 0.0,
                stop_bytes: 0.0,
                fixed: Duration::from_millis(5),
                limit,
            };
            let got = forecast(&writer, 262_144.0, &conditions);
            assert_eq!(
                matches!(got, Forecast::Converges { .. }),
                want,
                "{writes} {mib_s} {got:?}"
            );
        }
    }

    #[test]
    fn what_it_says_would_help_does_help_and_less_does_not() {
        let writer = Writer {
            writes_per_second: 200_000.0,
            set_pages: 262_144.0,
        };
        let conditions = Conditions {
            bandwidth: 500.0 * MIB,
            lanes: Vec::new(),
            in_flight: 0.0,
            stop_bytes: 0.0,
            fixed: Duration::from_millis(5),
            limit: Duration::from_millis(300),
        };
        let Forecast::Diverges {
            bandwidth_needed,
            throttle_percent,
            downtime,
        } = forecast(&writer, 262_144.0, &conditions)
        else {
            panic!("must diverge")
        };
        assert!(downtime > conditions.limit);
        let (bandwidth_needed, throttle_percent) =
            (bandwidth_needed.unwrap(), throttle_percent.unwrap());
        let at = |share: f64| {
            forecast(
                &writer,
                262_144.0,
                &Conditions {
                    bandwidth: bandwidth_needed as f64 * share,
                    ..conditions.clone()
                },
            )
        };
        // With what was put on top for safety, and no more than that.
        assert!(matches!(
            at(1.001 / ADVICE_MARGIN),
            Forecast::Converges { .. }
        ));
        assert!(matches!(
            at(0.98 / ADVICE_MARGIN),
            Forecast::Diverges { .. }
        ));
        let held = |percent: f64| Writer {
            writes_per_second: writer.writes_per_second * (1.0 - percent / 100.0),
            ..writer
        };
        assert!(matches!(
            forecast(&held(f64::from(throttle_percent)), 262_144.0, &conditions),
            Forecast::Converges { .. }
        ));
        assert!(matches!(
            forecast(
                &held(100.0 - (102.0 - f64::from(throttle_percent)) * ADVICE_MARGIN),
                262_144.0,
                &conditions
            ),
            Forecast::Diverges { .. }
        ));
    }

    #[test]
    fn when_the_fixed_part_is_over_the_limit_it_says_that_no_bandwidth_helps() {
        let writer = Writer {
            writes_per_second: 1000.0,
            set_pages: 1e6,
        };
        let conditions = Conditions {
            bandwidth: 500.0 * MIB,
            lanes: Vec::new(),
            in_flight: 0.0,
            stop_bytes: 0.0,
            fixed: Duration::from_millis(400),
            limit: Duration::from_millis(300),
        };
        let got = forecast(&writer, 262_144.0, &conditions);
        assert!(
            matches!(
                got,
                Forecast::Diverges {
                    bandwidth_needed: None,
                    throttle_percent: None,
                    ..
                }
            ),
            "{got:?}"
        );
    }

    #[test]
    fn predicted_rounds_and_time_follow_from_the_shrinking() {
        let writer = Writer {
            writes_per_second: 25_600.0,
            set_pages: 1e9,
        };
        let conditions = Conditions {
            bandwidth: 1000.0 * MIB,
            lanes: Vec::new(),
            in_flight: 0.0,
            stop_bytes: 0.0,
            fixed: Duration::ZERO,
            limit: Duration::from_millis(20),
        };
        // 1 GiB at 1000 MiB/s and 100 MiB/s dirtied: 1.024 s, 0.102 s, then 10 ms would be left.
        let Forecast::Converges {
            rounds,
            within,
            downtime,
        } = forecast(&writer, 262_144.0, &conditions)
        else {
            panic!()
        };
        assert_eq!(rounds, 2);
        assert!(
            (within.as_secs_f64() - 1.126).abs() < 0.01 && downtime < Duration::from_millis(11),
            "{within:?} {downtime:?}"
        );
    }

    #[test]
    fn a_set_that_was_known_counts_until_the_observations_tell_another() {
        let truth = Writer {
            writes_per_second: 10_000.0,
            set_pages: 20_000.0,
        };
        let fit = |seen: &[Observation]| Writer::fit(seen, 1 << 20, Some(20_000.0)).unwrap();
        let one = fit(&[observe(&truth, 3.0)]);
        let near = |fit: Writer| (fit.writes_per_second / truth.writes_per_second - 1.0).abs();
        assert!(near(one) < 0.02, "{one:?}");
        let unknown = Writer::fit(&[observe(&truth, 3.0)], 1 << 20, None).unwrap();
        assert!(near(unknown) > 0.3, "{unknown:?}");
        let smaller = Writer {
            set_pages: 5_000.0,
            ..truth
        };
        let two = fit(&[observe(&smaller, 0.3), observe(&smaller, 3.0)]);
        assert!((two.set_pages / 5_000.0 - 1.0).abs() < 0.02, "{two:?}");
    }

    fn on_a_slow_link() -> (Writer, Conditions) {
        let writer = Writer {
            writes_per_second: 24_000.0,
            set_pages: 16_384.0,
        };
        let conditions = Conditions {
            bandwidth: 12e6,
            lanes: Vec::new(),
            in_flight: 6e6,
            stop_bytes: 0.0,
            fixed: Duration::from_millis(5),
            limit: Duration::from_millis(300),
        };
        (writer, conditions)
    }

    /// Half a second is on its way on a slow link. It is so once, not in every pause to come.
    #[test]
    fn what_is_on_its_way_now_does_not_hide_that_a_throttle_would_help() {
        let (writer, conditions) = on_a_slow_link();
        let got = forecast(&writer, 16_384.0, &conditions);
        let Forecast::Diverges {
            throttle_percent: Some(percent),
            ..
        } = got
        else {
            panic!("{got:?}")
        };
        let held = writer.held_back(f64::from(percent) / 100.0);
        assert!(matches!(
            forecast(&held, 16_384.0, &conditions),
            Forecast::Converges { .. }
        ));
    }

    #[test]
    fn a_slow_lane_counts_with_what_it_has_on_its_way() {
        let (_, conditions) = on_a_slow_link();
        let lane = |speed: f64, on_its_way: f64| LaneLoad { speed, on_its_way };
        let uneven = Conditions {
            bandwidth: 52e6,
            lanes: vec![lane(50e6, 0.0), lane(2e6, 1e6)],
            in_flight: 1e6,
            ..conditions
        };
        assert_eq!(uneven.downtime(0.0), Duration::from_millis(505));
        assert_eq!(uneven.drained().downtime(0.0), Duration::from_millis(5));
    }

    #[test]
    fn an_outlook_is_in_order_and_narrows_with_what_was_measured() {
        let writer = Writer {
            writes_per_second: 10_000.0,
            set_pages: 100_000.0,
        };
        let (_, conditions) = on_a_slow_link();
        let conditions = Conditions {
            bandwidth: 200e6,
            ..conditions
        };
        let under_way = UnderWay {
            lasted: 1.0,
            rest: 4.0,
        };
        let at = Duration::from_secs(1);
        let width = |off: f64| {
            let seen = outlook(at, &writer, 9_000, &conditions, under_way, off);
            let end = seen.end.unwrap();
            assert!(
                end.low <= end.likely && end.likely <= end.high.unwrap(),
                "{seen:?}"
            );
            assert!(end.likely > Duration::from_secs(5), "{seen:?}");
            end.high.unwrap() - end.low
        };
        assert!(width(uncertainty(10.0)) < width(uncertainty(1.0)));
    }
}
