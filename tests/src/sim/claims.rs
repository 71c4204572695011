//! What the reports say of time and bytes, held against the simulated clock and themselves: the downtime, pauses that were broken off, the whole; and that each
//! side ends within what its settings add up to, once nothing goes wrong any more.

use std::time::Duration;

use multifd_sender as tx;

use super::faults::Fault;
use super::world::{Summary, World};
use super::{Attempt, Settings};

/// What the clocks of threads that take turns may be apart.
const SLACK_NS: u64 = 1_000_000;

/// When what happened to the guest, in ns of simulated time.
#[derive(Debug, Clone, Copy, Default)]
pub struct Times {
    /// Since when the guest is paused.
    pub paused: Option<u64>,
    /// How long it was paused in all for switchovers after which it ran at the source again.
    pub broken_off: u64,
    /// From the pause until it ran at the destination.
    pub down: Option<u64>,
}

impl Times {
    pub(super) fn pauses(&mut self, now: u64) {
        self.paused.get_or_insert(now);
    }

    pub(super) fn runs_again(&mut self, now: u64) {
        if let Some(since) = self.paused.take() {
            self.broken_off += now - since;
        }
    }

    pub(super) fn runs_there(&mut self, now: u64) {
        self.down = self.paused.map(|since| now - since);
    }
}

/// When an attempt began and when each side's end was known, in ns.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Lasted {
    pub(super) began: u64,
    pub(super) source: u64,
    pub(super) destination: u64,
}

pub(super) fn judge(world: &World, summary: &Summary, attempt: &Attempt, settings: &Settings) {
    ends(world, summary, attempt, settings);
    if summary.ledger.source_crashed {
        return;
    }
    let report = &attempt.sent.report;
    let stopped = stopped(settings);
    let trip = settings.quality.iter().map(|quality| quality.latency_ns);
    let trip = trip.max().unwrap_or(0);
    let lasted = &attempt.lasted;
    // A program that stands still reads its clock late.
    let slack = SLACK_NS + stopped;
    if let (tx::OutcomeKind::Migrated, Some(down)) = (report.outcome, summary.times.down) {
        let said = ns(report.downtime_ms.unwrap_or(0.0));
        // The guest runs, and the source hears of it later: after a fault much later.
        let heard = trip * 4 + slack;
        let in_the_way = !summary.happened.is_empty();
        if said + SLACK_NS < down || said > down + heard && !in_the_way {
            world.violation(format!(
                "the guest was down for {} ns, the report says {said}",
                down
            ));
        }
    }
    let said = ns(report.broken_off_pause_ms);
    let truth = summary.times.broken_off;
    // A VMM that refuses to pause was asked to, all the same.
    let refused = summary
        .happened
        .iter()
        .any(|(_, fault, _)| *fault == Fault::VmmRefuses);
    if said.abs_diff(truth) > slack && !refused {
        world.violation(format!(
            "switchovers that were broken off paused the guest for {truth} ns, the report says {said}"
        ));
    }
    let truth = lasted.source - lasted.began;
    let said = ns(report.total_ms);
    if said > truth + SLACK_NS {
        world.violation(format!("it took {truth} ns, the report says {said}"));
    }
    let rounds: u64 = report.round_list.iter().map(|round| round.sent_bytes).sum();
    // What a lane sends again after its round was encoded is of no round, nor is what devices give between two.
    let all = settings.devices.is_empty() && summary.happened.is_empty();
    if rounds > report.sent_bytes || all && rounds != report.sent_bytes {
        world.violation(format!(
            "{} bytes were sent, in rounds {rounds}",
            report.sent_bytes
        ));
    }
}

/// Once nothing goes wrong any more, both sides end within what their settings say, and what there is to move takes.
fn ends(world: &World, summary: &Summary, attempt: &Attempt, settings: &Settings) {
    let last = summary.happened.iter().map(|(at, ..)| *at).max();
    let since = last.unwrap_or(0).max(attempt.lasted.began) + stopped(settings) + closed(settings);
    let patience = patience(settings);
    for (who, ended) in [
        ("source", attempt.lasted.source),
        ("destination", attempt.lasted.destination),
    ] {
        let crashed = who == "source" && summary.ledger.source_crashed;
        if !crashed && ended > since.saturating_add(patience) {
            world.violation(format!(
                "the {who} ended {} ms after the last fault, {} at most",
                (ended - since) / 1_000_000,
                patience / 1_000_000
            ));
        }
    }
}

fn patience(settings: &Settings) -> u64 {
    let (source, destination) = (&settings.config, &settings.receiver);
    let mut deadlines = source.hello_deadline() * 2
        + source.setup_deadline()
        + source.stall() * 4
        + source.reconnect() * 2
        + source.progress_deadline()
        + source.commit_deadline()
        + source.downtime_limit()
        + destination.suspend() * 2
        + destination.progress_deadline()
        + destination.device_deadline();
    if !settings.devices.is_empty() {
        deadlines += source.ack_deadline().unwrap_or_default();
    }
    // Each round takes what is there over the slowest lane; what devices have to be read and loaded as slowly as they do that.
    let slowest = settings.quality.iter().map(|quality| quality.ps_per_octet);
    let pages: u64 = settings.shape.iter().sum();
    let rounds = u64::from(source.rounds_max()) + 4;
    let bytes = pages * 4096 * rounds;
    let way = bytes * slowest.max().unwrap_or(0) / 1000 * 2;
    let devices: u64 = settings
        .devices
        .iter()
        .map(|device| {
            let speed = [device.read, device.write].into_iter().filter(|s| *s > 0);
            let speed = speed.min().unwrap_or(1 << 30);
            (device.size + device.initial * 3) * 1_000_000_000 / speed * rounds
        })
        .sum();
    nanos(deadlines) + way + devices
}

fn stopped(settings: &Settings) -> u64 {
    let stop = settings.troubles.stop;
    stop.map_or(0, |stop| nanos(stop.lasts))
}

fn closed(settings: &Settings) -> u64 {
    let forever = u64::MAX / 4;
    let closed = settings.closed.map(|way| way.after_ns + way.lasts_ns);
    closed.filter(|closed| *closed < forever).unwrap_or(0)
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX / 4)
}

fn ns(ms: f64) -> u64 {
    (ms * 1e6) as u64
}
