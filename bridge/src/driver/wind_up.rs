//! The end: how a monitor's connections are ended, in which order, and the report.
//!
//! The rule it keeps: the first connection ends first. A multifd connection that just ends is no error to QEMU, and it would wait for ever.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Shared;
use super::core::Core;
use crate::report::{Ended, Report};

/// How long a monitor may take to notice that its first connection ended, before the others do.
const FIRST_MAX: Duration = Duration::from_millis(300);

/// Ends all connections of the monitor, the first one first.
// SPEC: CARRY-9
pub(crate) fn break_all(shared: &Arc<Shared>) {
    let main = {
        let mut core = shared.lock();
        let main = core
            .main
            .or_else(|| core.connections.keys().next().copied());
        if let Some(main) = main {
            core.break_connection(main);
        }
        main
    };
    if main.is_some() {
        std::thread::sleep(FIRST_MAX);
    }
    let mut core = shared.lock();
    let all: Vec<u32> = core.connections.keys().copied().collect();
    for stream in all {
        core.break_connection(stream);
    }
}

/// Waits until something holds, or the time is over. Says whether it holds.
pub(crate) fn wait_for(shared: &Shared, most: Duration, holds: impl Fn(&Core) -> bool) -> bool {
    let deadline = Instant::now() + most;
    let mut core = shared.lock();
    loop {
        if holds(&core) {
            return true;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        core = super::wait(&shared.changed, core, left.min(Duration::from_millis(50)));
    }
}

/// What to say about it all.
pub(crate) fn report(shared: &Shared, outcome: Ended, reason: Option<String>) -> Report {
    let core = shared.lock();
    let (from, to) = core.streams.octets();
    let (window, held) = core.streams.peaks();
    let (seen, stopped) = core.seen();
    let elapsed = core
        .first_connection
        .map_or(Duration::ZERO, |first| shared.now().saturating_sub(first));
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    Report {
        outcome,
        reason,
        streams: core.streams.count(),
        bytes_from_monitor: from,
        bytes_to_monitor: to,
        lanes_lost: core.lanes_lost,
        resumes: core.resumes,
        outage_ms_max: millis(core.away_max),
        damaged: core.damaged,
        window_bytes_max: window,
        held_bytes_max: held,
        round_trip_us: core.round_trip.map(|time| millis(time * 1000)),
        elapsed_ms: millis(elapsed),
        seen,
        tap_stopped: stopped,
    }
}
