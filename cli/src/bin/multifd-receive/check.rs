//! What becomes of the guest after it arrived: it runs for a while, unless it arrived paused, then all of its memory is checked.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use multifd_receiver::{Finished, OutcomeKind};

use crate::machine::GuestHandle;

/// Longest wait for the first heart-beat after `--run-for`. They come every few milliseconds, but a guest that is told to write
/// a page now and then reports only when it does.
const HEARTBEAT_MAX: Duration = Duration::from_secs(5);

/// What was found.
pub(crate) struct Check {
    pub(crate) passed: bool,
    pub(crate) text: String,
    pub(crate) beats: u64,
}

/// Lets the guest run, then stops it and has all of its memory checked. Nothing if it does not run here.
pub(crate) fn observe(
    run_for: Duration,
    finished: &Finished,
    guest: &GuestHandle,
    asked: &AtomicBool,
) -> Option<Check> {
    if finished.report.outcome != OutcomeKind::Running {
        return None;
    }
    let guest = guest.get()?;
    let runs = !finished.report.guest_paused;
    let began = Instant::now();
    let beats = || -> u64 { guest.heartbeats().iter().map(|beat| beat.beats).sum() };
    let hurried = || !runs || run_for.is_zero() || asked.load(Ordering::Relaxed);
    let enough = || {
        let longer = began.elapsed().checked_sub(run_for);
        longer.is_some_and(|longer| beats() > 0 || longer >= HEARTBEAT_MAX)
    };
    while !enough() && !hurried() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let (beats, hurried) = (beats(), hurried());
    let (passed, text) = match guest.pause().and_then(|()| guest.check()) {
        Ok(report) if report.passed() && beats == 0 && !hurried => {
            (false, "the guest's heart does not beat here".to_owned())
        }
        Ok(report) => (report.passed(), report.to_string()),
        Err(error) => (false, error.to_string()),
    };
    Some(Check {
        passed,
        text,
        beats,
    })
}
