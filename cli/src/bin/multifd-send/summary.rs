//! The final report of `multifd-send`: as one JSON object, and for people as a table of lines.
//!
//! ```text
//!   <label, 12 wide> <text>
//!                    <more about the same>
//! ```

use std::fmt::Arguments;

use multifd_cli::flags::ReportKind;
use multifd_cli::units::{Rate, Size, Time};
use multifd_sender::report::LimitsReport;
use multifd_sender::{Finished, OutcomeKind, Report};
use serde_json::{Value, json};

/// What is printed at the end.
pub(crate) struct Summary {
    report: Report,
    /// The report of the receiver that `--loopback` started; null otherwise.
    theirs: Value,
    guest_check: Value,
    source_runs: Option<bool>,
}

impl Summary {
    /// `theirs`: the report of our own receiver, if there was one. `source_runs`: whether the guest was seen running here.
    pub(crate) fn new(
        finished: &Finished,
        theirs: Option<Value>,
        source_runs: Option<bool>,
    ) -> Self {
        let mut report = finished.report.clone();
        let theirs = theirs.unwrap_or(Value::Null);
        // The receiver's own end is later than what it could say in RUNNING.
        report.cpu_receiver_s = report
            .cpu_receiver_s
            .or_else(|| theirs["cpu_receiver_s"].as_f64());
        let guest_check = theirs["guest_check"].clone();
        Self {
            report,
            theirs,
            guest_check,
            source_runs,
        }
    }

    /// The object for a migration that was not even begun.
    pub(crate) fn not_begun(error: Value) -> Value {
        json!({
            "outcome": "failed", "total_ms": 0.0, "downtime_ms": null, "downtime": null, "rounds": 0, "channels": 0,
            "memory_bytes": 0, "sent_bytes": 0, "zero_bytes": 0, "goodput_mib_s": 0.0, "cpu_sender_s": 0.0,
            "cpu_receiver_s": null, "digest_equal": null, "guest_check": null, "error": error,
        })
    }

    /// See `--help`.
    pub(crate) fn exit_status(&self) -> u8 {
        let passed = self.guest_check.is_null() || self.guest_check == "passed";
        exit_status(self.report.outcome, passed)
    }

    pub(crate) fn print(&self, kind: ReportKind) {
        match kind {
            ReportKind::Json => out!("{}", self.object()),
            ReportKind::Text => out!("\n{}", self.text()),
        }
    }

    fn object(&self) -> Value {
        let mut object = serde_json::to_value(&self.report).unwrap_or_default();
        object["guest_check"] = self.guest_check.clone();
        object["source_guest_runs"] = json!(self.source_runs);
        object["receiver"] = self.theirs.clone();
        object
    }

    fn text(&self) -> String {
        let r = &self.report;
        let mut lines = Lines::default();
        lines.0.push(self.headline());
        end(r, &mut lines);
        downtime(r, &mut lines);
        devices(r, &mut lines);
        steered(r, &mut lines);
        moved(r, &mut lines);
        trouble(r, &mut lines);
        speed(r, &mut lines);
        rounds(r, &mut lines);
        sources(r, &mut lines);
        proof(r, &mut lines);
        self.check(&mut lines);
        lines.0.join("\n")
    }

    fn headline(&self) -> String {
        let here = match self.source_runs {
            None if self.report.guest_paused => "the guest stays paused here",
            Some(false) => "the guest does NOT run here: see the log",
            _ => "the guest runs on here",
        };
        match self.report.outcome {
            OutcomeKind::Migrated if self.report.guest_paused => {
                "migrated: the guest is at the destination, paused as it was here".into()
            }
            OutcomeKind::Migrated => "migrated: the guest runs at the destination".into(),
            OutcomeKind::Gone => "ended: the guest shut down or crashed here; it runs nowhere".into(),
            OutcomeKind::Failed => format!("failed: {here}"),
            OutcomeKind::Cancelled => format!("cancelled: {here}"),
            OutcomeKind::Stranded => {
                "not running: the destination has the guest and could not run it; it is paused there and here".into()
            }
            _ => {
                "outcome unknown: the commit was sent and nothing was heard since; the guest stays paused here".into()
            }
        }
    }

    fn check(&self, lines: &mut Lines) {
        match &self.guest_check {
            Value::Null => {}
            Value::String(text) if text == "passed" => lines.add(
                "guest check",
                format_args!(
                    "passed: every word of its memory is as new as its own log says ({} heart-beats at the destination)",
                    self.theirs["guest_beats"]
                ),
            ),
            other => lines.add("guest check", format_args!("FAILED: {other}")),
        }
    }
}

fn exit_status(outcome: OutcomeKind, check_passed: bool) -> u8 {
    match outcome {
        OutcomeKind::Migrated if check_passed => 0,
        OutcomeKind::Migrated => 5,
        OutcomeKind::Failed => 1,
        OutcomeKind::Cancelled => 3,
        OutcomeKind::Stranded => 6,
        OutcomeKind::Gone => 7,
        // Unknown. Whatever else there may be one day has to be looked at as well before the guest is run anywhere.
        _ => 4,
    }
}

/// The lines of a report.
#[derive(Default)]
struct Lines(Vec<String>);

impl Lines {
    fn add(&mut self, label: &str, text: Arguments<'_>) {
        self.0.push(format!("  {label:<12} {text}"));
    }

    /// About the same as the line before.
    fn more(&mut self, text: Arguments<'_>) {
        self.add("", text);
    }

    /// Only if something is worth a line.
    fn more_if(&mut self, worth: bool, text: Arguments<'_>) {
        if worth {
            self.more(text);
        }
    }
}

fn end(r: &Report, lines: &mut Lines) {
    if let Some(error) = &r.error {
        let channel = error.channel.as_ref().map(|channel| format!(", {channel}"));
        lines.add(
            "reason",
            format_args!(
                "{} [{}] in phase {}{}",
                error.text,
                error.code,
                error.phase,
                channel.unwrap_or_default()
            ),
        );
    }
    let lost = (r.channels_lost > 0).then(|| {
        format!(
            " ({} lost, {} opened again)",
            r.channels_lost, r.channels_reopened
        )
    });
    lines.add(
        "total",
        format_args!(
            "{}, {} rounds over {} channels{}",
            Time::ms(r.total_ms),
            r.rounds,
            r.channels,
            lost.unwrap_or_default()
        ),
    );
}

fn downtime(r: &Report, lines: &mut Lines) {
    let (Some(downtime), Some(d)) = (r.downtime_ms, r.downtime) else {
        return;
    };
    let predicted = r
        .predicted_downtime_ms
        .map(|ms| format!(" (predicted {})", Time::ms(ms)));
    lines.add(
        "downtime",
        format_args!("{}{}", Time::ms(downtime), predicted.unwrap_or_default()),
    );
    let limit = r.limits.last().map(|limits| limits.downtime_limit_ms);
    if let Some(limit) = limit.filter(|limit| downtime > *limit) {
        lines.more(format_args!("longer than the limit of {}", Time::ms(limit)));
    }
    lines.more(format_args!(
        "pause {:.1}, last collection {:.1}, save {:.1}, send {:.1}, destination {:.1} (load {:.1}), commit {:.1} ms",
        d.pause_ms, d.collect_ms, d.save_ms, d.send_ms, d.prepare_ms, d.load_ms, d.commit_ms
    ));
    if let Some(d) = d.devices {
        lines.more(format_args!(
            "devices: quiesce {:.1}, stop {:.1}, read {:.1}, wire {:.1}, load {:.1} (config {:.1}); memory after them {:.1} ms",
            d.quiesce_ms, d.stop_ms, d.read_ms, d.wire_ms, d.load_ms, d.config_ms, d.memory_tail_ms
        ));
    }
}

fn devices(r: &Report, lines: &mut Lines) {
    lines.more_if(
        r.ack_wait_ms > 0.0,
        format_args!(
            "waited {} before it for initial bytes to be loaded, with the guest running",
            Time::ms(r.ack_wait_ms)
        ),
    );
    let part = |ms: Option<f64>| ms.map_or_else(|| "-".into(), |ms| Time::ms(ms).to_string());
    for device in &r.devices {
        lines.add(
            "device",
            format_args!(
                "{}: {} while the guest ran ({} initial, generation {} of {} loaded), {} while it was paused",
                device.name,
                Size(device.pre_copy_bytes),
                Size(device.initial_bytes),
                device.acked,
                device.generations,
                Size(device.stop_copy_bytes)
            ),
        );
        let left = match (device.was_reset, device.given_back) {
            (_, false) => ", NOT GIVEN BACK: its code does not return",
            (true, true) => ", WAS RESET: its state is lost",
            (false, true) => "",
        };
        let error = device.error.as_ref().map(|text| format!("; {text}"));
        lines.more(format_args!(
            "read after {}, sent after {}, there after {}, loaded after {} (loading {}, config {}); now {}{left}{}",
            part(device.saved_after_ms),
            part(device.sent_after_ms),
            part(device.arrived_after_ms),
            part(device.loaded_after_ms),
            part(device.load_ms),
            part(device.config_ms),
            device.state,
            error.unwrap_or_default()
        ));
    }
}

/// What was changed while it ran, and how the guest was slowed.
fn steered(r: &Report, lines: &mut Lines) {
    for (before, after) in r.limits.iter().zip(r.limits.iter().skip(1)) {
        let at = Time::ms(after.at_ms);
        for change in changes(before, after) {
            lines.add("changed", format_args!("after {at}: {change}"));
        }
    }
    let most = r.throttles.iter().map(|throttle| throttle.percent).max();
    if let Some(most) = most.filter(|most| *most > 0) {
        lines.add(
            "throttle",
            format_args!(
                "the guest was slowed for {}, by {most} % of its time at most",
                Time::ms(r.throttled_ms)
            ),
        );
    }
    if let Some(error) = &r.throttle_error {
        lines.add("throttle", format_args!("the VMM did not do it: {error}"));
    }
}

/// What differs, in words.
fn changes(before: &LimitsReport, after: &LimitsReport) -> Vec<String> {
    let mut changes = Vec::new();
    if before.bandwidth_cap_bytes_per_s != after.bandwidth_cap_bytes_per_s {
        changes.push(match after.bandwidth_cap_bytes_per_s {
            Some(cap) => format!("bandwidth cap {}", Rate(cap)),
            None => "no bandwidth cap".to_owned(),
        });
    }
    if before.downtime_limit_ms != after.downtime_limit_ms {
        let limit = Time::ms(after.downtime_limit_ms);
        changes.push(format!("downtime limit {limit}"));
    }
    if before.max_rounds != after.max_rounds {
        changes.push(format!("at most {} rounds", after.max_rounds));
    }
    if before.if_not_converging != after.if_not_converging {
        changes.push(format!("if not converging: {}", after.if_not_converging));
    }
    if before.throttle_limit_percent != after.throttle_limit_percent {
        changes.push(format!("throttle limit {} %", after.throttle_limit_percent));
    }
    if before.sending_held != after.sending_held {
        let word = if after.sending_held {
            "held"
        } else {
            "goes on"
        };
        changes.push(format!("sending {word}"));
    }
    changes
}

fn moved(r: &Report, lines: &mut Lines) {
    lines.add(
        "memory",
        format_args!(
            "{}: sent {} with content, {} as zero pages, {} on the wire",
            Size(r.memory_bytes),
            Size(r.content_bytes),
            Size(r.zero_bytes),
            Size(r.sent_bytes)
        ),
    );
    lines.more_if(
        r.left_out_bytes > 0,
        format_args!(
            "{} are holes, neither read nor sent",
            Size(r.left_out_bytes)
        ),
    );
}

/// What went wrong on the way, whether or not it mattered in the end.
fn trouble(r: &Report, lines: &mut Lines) {
    if r.suspensions > 0 || r.asked > 0 {
        lines.add(
            "link",
            format_args!(
                "lost {} times, {} without it in all; the destination was asked {} times",
                r.suspensions,
                Time::ms(r.suspended_ms),
                r.asked
            ),
        );
    }
    lines.more_if(
        r.broken_off_pause_ms > 0.0,
        format_args!(
            "the guest stood still for {} for switchovers that were broken off",
            Time::ms(r.broken_off_pause_ms)
        ),
    );
    lines.more_if(
        r.control_damaged > 0,
        format_args!(
            "{} times because bytes on the control channel were changed on the way",
            r.control_damaged
        ),
    );
    if r.sent_again_bytes > 0 {
        let what = "that were on their way when a channel was lost";
        lines.add(
            "sent again",
            format_args!("{} {what}", Size(r.sent_again_bytes)),
        );
    }
    if r.pages_torn > 0 {
        let what = "pages that the guest wrote while they were sent, and sent again";
        lines.add("torn", format_args!("{} {what}", r.pages_torn));
    }
    if r.pages_damaged > 0 {
        let what = "pages on the way, found by their checksums and sent again: look at the network";
        lines.add("damaged", format_args!("{} {what}", r.pages_damaged));
    }
    for damage in &r.damaged {
        let channel = damage.channel.as_deref().unwrap_or("a new connection");
        lines.add(
            "damaged",
            format_args!(
                "{} times {} on {channel} ({}), found by its checksum",
                damage.count, damage.frame, damage.phase
            ),
        );
    }
}

fn speed(r: &Report, lines: &mut Lines) {
    lines.add("goodput", format_args!("{}", mib_s(r.goodput_mib_s)));
    let there = r.cpu_receiver_s.map(|s| format!("{s:.2} s"));
    lines.add(
        "CPU",
        format_args!(
            "{:.2} s here, {} there",
            r.cpu_sender_s,
            there.as_deref().unwrap_or("?")
        ),
    );
}

fn rounds(r: &Report, lines: &mut Lines) {
    for round in &r.round_list {
        let label = format!("round {}", round.round);
        let pages = Size(round.pages * 4096);
        let Some(speed) = round.mib_s else {
            lines.add(
                &label,
                format_args!("{pages}, broken off after {}", Time::ms(round.ms)),
            );
            continue;
        };
        let dirty = round
            .dirty_after
            .map(|pages| format!(", then dirty {}", Size(pages * 4096)));
        lines.add(
            &label,
            format_args!(
                "{pages} in {} ({} on the wire){}",
                Time::ms(round.ms),
                mib_s(speed),
                dirty.unwrap_or_default()
            ),
        );
    }
}

fn sources(r: &Report, lines: &mut Lines) {
    for source in &r.sources {
        let trouble: String = [
            (source.ring_full, "times full"),
            (source.overflows, "overflows"),
            (source.all_dirty, "times everything dirty"),
            (source.entries_unknown, "unknown entries"),
            (source.unmaps, "unmaps"),
            (source.errors, "errors"),
        ]
        .iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!(", {count} {what}"))
        .collect();
        lines.add(
            &source.name,
            format_args!(
                "{} pages found in {} harvests ({}), {} reports, {} resets{trouble}",
                source.pages,
                source.harvests,
                Time::ms(source.harvest_ms),
                source.reported,
                source.resets,
            ),
        );
        if let Some(error) = &source.last_error {
            lines.more(format_args!("its last error: {error}"));
        }
        if let Some(reason) = &source.reason {
            lines.more(format_args!("chosen because: {reason}"));
        }
    }
}

fn proof(r: &Report, lines: &mut Lines) {
    if let Some(ms) = r.dirty_scan_ms {
        lines.add(
            "debug scan",
            format_args!(
                "all memory compared with what was sent, in {} of the downtime",
                Time::ms(ms)
            ),
        );
    }
    if let Some(equal) = r.digest_equal {
        let digest = r.digest.as_deref().unwrap_or_default();
        let verdict = if equal { "on both sides" } else { "DIFFERS" };
        lines.add("digest", format_args!("{digest} {verdict}"));
    }
}

/// The report has MiB a second.
fn mib_s(speed: f64) -> Rate {
    Rate((speed * 1_048_576.0) as u64)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_table_of_exit_states_in_the_readme_is_that_of_this_program() {
        let outcomes = [
            OutcomeKind::Migrated,
            OutcomeKind::Failed,
            OutcomeKind::Cancelled,
            OutcomeKind::Unknown,
            OutcomeKind::Stranded,
            OutcomeKind::Gone,
        ];
        let mut ours: BTreeSet<(u8, String)> = outcomes
            .into_iter()
            .flat_map(|outcome| [true, false].map(|passed| (outcome, passed)))
            .map(|(outcome, passed)| {
                let word = serde_json::to_value(outcome).unwrap();
                let word = word.as_str().unwrap().to_owned();
                (exit_status(outcome, passed), word)
            })
            .collect();
        // Nothing was begun: no migration has this one.
        let usage = Summary::not_begun(Value::Null);
        ours.insert((2, usage["outcome"].as_str().unwrap().to_owned()));
        assert_eq!(crate::readme::exit_states("multifd-send"), ours);
    }
}
