//! How fast each lane is, and when all of them would be done with what there is.
//!
//! The bytes of a round are shared: a lane that is fast takes more of them. What is *on its way* on a lane is not, it arrives at
//! that lane's own speed, and the destination closes a round when the slowest has ended it. So the time for some bytes is no
//! quotient of two sums. It is the first moment at which every lane has delivered what it has, and all together what is left:
//!
//! ```text
//!   bytes │        ╱ fast lane              T is where the shaded part, all that lanes deliver
//!         │      ╱░░                        beyond what they have on their way, is what is left,
//!         │    ╱░░░░     ___--- slow lane   and no earlier than where the slowest has delivered
//!         │  ╱░░░___---░░                   what it has.
//!         └────────┴───► time
//! ```
//! Speeds are those of acknowledgements: what a socket's buffer swallowed says nothing about the way.

use std::time::Duration;

use multifd_wire::{Incarnation, LaneId};

/// A speed is taken over at least this long: a destination acknowledges every 20 to 100 ms (SPEC: ACK-2).
const WINDOW: Duration = Duration::from_millis(100);

/// The share of a window of that length in a lane's speed; a longer one has more.
const NEWEST_SHARE: f64 = 0.4;

/// What a lane carries at once, and has acknowledged as a whole: a body of the usual size.
const FRAME_BYTES: f64 = 262_144.0;

/// What was acknowledged on one lane, and what is not yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneCount {
    /// Which lane.
    pub lane: LaneId,
    /// Which connection of it: the bytes count from its beginning.
    pub incarnation: Incarnation,
    /// Bytes that the destination acknowledged.
    pub acked_bytes: u64,
    /// Bytes that were handed to the channel and are not acknowledged.
    pub unacked_bytes: u64,
}

/// A lane's speed, and what it has on its way.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LaneLoad {
    /// Bytes a second.
    pub speed: f64,
    /// Bytes that have to arrive before anything that is sent later does.
    pub on_its_way: f64,
}

/// The measured speeds of all lanes of one migration.
#[derive(Debug, Default)]
pub struct Speeds {
    lanes: Vec<Measured>,
}

#[derive(Debug)]
struct Measured {
    newest: LaneCount,
    /// Where the open window began, and with how much acknowledged.
    since: Duration,
    acked_then: u64,
    /// The lane had something on its way at every look in the window: it was the way that it waited for.
    busy: bool,
    /// When the speed was last corrected for a lane that is silent.
    slowed: Duration,
    speed: Option<f64>,
}

impl Speeds {
    /// What was counted at `now`, of the lanes that live. Lanes that are not named any more are forgotten.
    pub fn observe(&mut self, counts: &[LaneCount], now: Duration) {
        self.lanes.retain(|lane| {
            let same = |count: &LaneCount| {
                count.lane == lane.newest.lane && count.incarnation == lane.newest.incarnation
            };
            counts.iter().any(same)
        });
        for count in counts {
            match self
                .lanes
                .iter_mut()
                .find(|lane| lane.newest.lane == count.lane)
            {
                Some(lane) => lane.observe(*count, now),
                None => self.lanes.push(Measured::new(*count, now)),
            }
        }
    }

    /// Each lane whose speed is known.
    pub fn known(&self) -> impl Iterator<Item = (LaneId, LaneLoad)> + '_ {
        self.lanes.iter().filter_map(|lane| {
            let load = LaneLoad {
                speed: lane.speed?,
                on_its_way: lane.newest.unacked_bytes as f64,
            };
            Some((lane.newest.lane, load))
        })
    }

    /// One lane's speed, in bytes a second, once it was measured.
    #[must_use]
    pub fn speed(&self, lane: LaneId) -> Option<f64> {
        let measured = self
            .lanes
            .iter()
            .find(|measured| measured.newest.lane == lane)?;
        measured.speed
    }

    /// The speed of all lanes together; `None` before the first was measured.
    #[must_use]
    pub fn total(&self) -> Option<f64> {
        let known = || self.lanes.iter().filter_map(|lane| lane.speed);
        (known().count() > 0).then(|| known().sum())
    }
}

impl Measured {
    fn new(count: LaneCount, now: Duration) -> Self {
        Self {
            newest: count,
            since: now,
            acked_then: count.acked_bytes,
            busy: count.unacked_bytes > 0,
            slowed: now,
            speed: None,
        }
    }

    fn observe(&mut self, count: LaneCount, now: Duration) {
        self.newest = count;
        self.busy &= count.unacked_bytes > 0;
        let lasted = now.saturating_sub(self.since);
        let acked = count.acked_bytes.saturating_sub(self.acked_then);
        if lasted < WINDOW {
            // Nothing is on its way: the next bytes find a free lane, and their window begins with them.
            if count.unacked_bytes == 0 && acked == 0 {
                self.restart(count, now);
            }
            return;
        }
        if self.busy && acked == 0 {
            return self.silent(count, lasted, now);
        }
        let seen = acked as f64 / lasted.as_secs_f64();
        let windows = lasted.as_secs_f64() / WINDOW.as_secs_f64();
        let share = 1.0 - (1.0 - NEWEST_SHARE).powf(windows);
        self.speed = match self.speed {
            // A lane that had nothing to do for a while is at least this fast.
            _ if !self.busy && acked == 0 => self.speed,
            Some(speed) if !self.busy => Some(speed.max(seen)),
            Some(speed) => Some(speed + (seen - speed) * share),
            None => Some(seen),
        };
        self.restart(count, now);
    }

    /// Something is on its way, and nothing was acknowledged in the open window. The window goes on, so that what comes is held against
    /// the time that it took: a slow lane's frames come one by one, and each would look fast by itself. Meanwhile the lane counts as slower,
    /// but not as slower than one frame in all that time.
    fn silent(&mut self, count: LaneCount, lasted: Duration, now: Duration) {
        if now.saturating_sub(self.slowed) < WINDOW {
            return;
        }
        self.slowed = now;
        let one_frame = FRAME_BYTES.min(count.unacked_bytes as f64) / lasted.as_secs_f64();
        let speed = self.speed.unwrap_or(one_frame);
        self.speed = Some(speed.min(one_frame.max(speed * (1.0 - NEWEST_SHARE))));
    }

    fn restart(&mut self, count: LaneCount, now: Duration) {
        self.slowed = now;
        self.since = now;
        self.acked_then = count.acked_bytes;
        self.busy = count.unacked_bytes > 0;
    }
}

/// The seconds until `bytes` more have arrived, shared as well as it goes, behind what each lane has on its way.
/// `None` without a lane that moves at all.
#[must_use]
pub fn seconds_for(lanes: &[LaneLoad], bytes: f64) -> Option<f64> {
    let mut moving: Vec<LaneLoad> = lanes
        .iter()
        .copied()
        .filter(|lane| lane.speed > 0.0)
        .collect();
    moving.sort_by(|a, b| own_seconds(a).total_cmp(&own_seconds(b)));
    let slowest = own_seconds(moving.last()?);
    // The lanes that are free first fill up to where the next is free, and so on.
    let (mut speed, mut delivered_at_zero) = (0.0, 0.0);
    let mut level = f64::INFINITY;
    for (lane, next) in moving
        .iter()
        .zip(moving.iter().skip(1).map(Some).chain([None]))
    {
        speed += lane.speed;
        delivered_at_zero += lane.on_its_way;
        level = (bytes + delivered_at_zero) / speed;
        if next.is_none_or(|next| level <= own_seconds(next)) {
            break;
        }
    }
    Some(level.max(slowest))
}

/// Until a lane has delivered what it has.
fn own_seconds(lane: &LaneLoad) -> f64 {
    lane.on_its_way / lane.speed
}

/// Whether the lane at `own` in `lanes` should take `frame` more bytes of a round of which `left` bytes are to be taken: not if it
/// would be done with them only when the others are done with all of it. The lane that would be done first always should.
#[must_use]
pub fn should_take(own: usize, lanes: &[LaneLoad], left: f64, frame: f64) -> bool {
    let Some(own) = lanes.get(own) else {
        return true;
    };
    let done = |lane: &LaneLoad| (lane.on_its_way + frame) / lane.speed;
    let first = lanes
        .iter()
        .filter(|lane| lane.speed > 0.0)
        .map(done)
        .fold(f64::INFINITY, f64::min);
    match seconds_for(lanes, left) {
        Some(all) if own.speed > 0.0 => done(own) <= all.max(first),
        // Its speed is not known: somebody has to find out.
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn count(lane: u32, acked_bytes: u64, unacked_bytes: u64) -> LaneCount {
        LaneCount {
            lane: LaneId::new(lane),
            incarnation: Incarnation::new(0),
            acked_bytes,
            unacked_bytes,
        }
    }

    fn load(speed: f64, on_its_way: f64) -> LaneLoad {
        LaneLoad { speed, on_its_way }
    }

    #[test]
    fn a_slow_lane_whose_frames_come_one_by_one_has_its_speed_at_every_moment() {
        const FRAME: u64 = 262_144;
        let mut speeds = Speeds::default();
        // 1 Mbit/s: a frame every 2.1 s, looked at every 20 ms; from the sixth frame on half of that.
        let mut acked = 0;
        let (mut next, mut frame) = (2_100, 2_100);
        for at in (0..40_000u64).step_by(20) {
            if at >= next {
                acked += FRAME;
                frame = if acked >= 6 * FRAME { 4_200 } else { frame };
                next += frame;
            }
            speeds.observe(&[count(0, acked, FRAME)], MS * at as u32);
            let settled = acked > 2 * FRAME && !(6..8).contains(&(acked / FRAME));
            let speed = speeds.total().unwrap_or(0.0);
            let right = FRAME as f64 / frame as f64 * 1e3;
            assert!(
                !settled || (speed / right - 1.0).abs() < 0.1,
                "{at}: {speed} {right}"
            );
        }
    }

    #[test]
    fn the_speed_is_that_of_acknowledgements_and_not_of_what_buffers_took() {
        let mut speeds = Speeds::default();
        for step in 0..=50u64 {
            // 2 MB/s arrive; four megabytes went into a buffer at once.
            speeds.observe(&[count(0, step * 40_000, 4_000_000)], 20 * MS * step as u32);
        }
        let speed = speeds.total().unwrap();
        assert!((speed / 2e6 - 1.0).abs() < 0.01, "{speed}");
    }

    #[test]
    fn a_lane_that_had_nothing_to_do_is_not_slow() {
        let mut speeds = Speeds::default();
        for step in 0..=10u64 {
            speeds.observe(&[count(0, step * 40_000, 1)], 20 * MS * step as u32);
        }
        let before = speeds.speed(LaneId::new(0)).unwrap();
        for step in 11..=100u64 {
            speeds.observe(&[count(0, 400_001, 0)], 20 * MS * step as u32);
        }
        assert_eq!(speeds.speed(LaneId::new(0)), Some(before));
    }

    #[test]
    fn a_lane_that_stands_still_with_bytes_on_their_way_becomes_slow() {
        let mut speeds = Speeds::default();
        for step in 0..=100u64 {
            let acked = step.min(50) * 40_000;
            speeds.observe(&[count(0, acked, 100_000)], 20 * MS * step as u32);
        }
        let speed = speeds.speed(LaneId::new(0)).unwrap();
        // No faster than a lane that has all of this on its way, and nothing of it there after a second.
        assert!(speed < 110_000.0, "{speed}");
    }

    #[test]
    fn another_connection_of_a_lane_is_measured_anew() {
        let mut speeds = Speeds::default();
        for step in 0..=10u64 {
            speeds.observe(&[count(0, step * 40_000, 1)], 20 * MS * step as u32);
        }
        let again = LaneCount {
            incarnation: Incarnation::new(1),
            ..count(0, 0, 1)
        };
        speeds.observe(&[again], 220 * MS);
        assert_eq!(speeds.total(), None);
    }

    #[test]
    fn what_a_slow_lane_has_on_its_way_is_waited_for() {
        // 50 MB/s and 2 MB/s: in a sum, 1 MB on its way is 19 ms. On the slow lane it is half a second.
        let lanes = [load(50e6, 0.0), load(2e6, 1e6)];
        assert_eq!(seconds_for(&lanes, 0.0), Some(0.5));
        // In which the fast one takes what is left beside.
        assert_eq!(seconds_for(&lanes, 10e6), Some(0.5));
        assert_eq!(seconds_for(&[], 1.0), None);
        assert_eq!(seconds_for(&[load(0.0, 5.0)], 1.0), None);
    }

    #[test]
    fn a_slow_lane_takes_what_it_can_deliver_in_time_and_no_more() {
        let frame = 262_144.0;
        let lanes = [load(50e6, 0.0), load(2e6, 0.0)];
        // 50 MB last a second: a frame of the slow lane's takes 0.13 s of it.
        assert!(should_take(1, &lanes, 50e6, frame));
        // 5 MB last 0.1 s.
        assert!(!should_take(1, &lanes, 5e6, frame));
        assert!(should_take(0, &lanes, 5e6, frame));
        // Also of the last page, somebody has to take it.
        assert!(should_take(0, &lanes, 4096.0, frame));
        let stands = [lanes[0], lanes[1], load(0.0, 0.0)];
        assert!(should_take(2, &stands, 4096.0, frame));
    }

    proptest! {
        #[test]
        fn the_shares_add_up_and_somebody_always_takes(
            lanes in prop::collection::vec((1e3..1e9f64, 0.0..1e8f64), 1..9),
            bytes in 0.0..1e10f64,
            frame in 4096.0..1e6f64,
        ) {
            let lanes: Vec<LaneLoad> = lanes.into_iter().map(|(speed, way)| load(speed, way)).collect();
            let seconds = seconds_for(&lanes, bytes).unwrap();
            let delivered: f64 = lanes
                .iter()
                .map(|lane| (lane.speed * seconds - lane.on_its_way).max(0.0))
                .sum();
            let slowest = lanes.iter().map(own_seconds).fold(0.0, f64::max);
            prop_assert!(delivered >= bytes * (1.0 - 1e-9) - 1e-3);
            prop_assert!(seconds >= slowest);
            // And no later than that takes.
            prop_assert!(seconds <= slowest * (1.0 + 1e-9) || delivered <= bytes * (1.0 + 1e-9) + 1e-3);
            prop_assert!((0..lanes.len()).any(|lane| should_take(lane, &lanes, bytes, frame)));
        }
    }
}
