//! The final report of `multifd-send`: for people, and as one JSON object.

use multifd_sender::{Finished, OutcomeKind, Report};
use serde_json::{Value, json};

use crate::args::ReportKind;

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
    pub(crate) fn not_begun(error: &anyhow::Error) -> Value {
        json!({
            "outcome": "failed", "total_ms": 0.0, "downtime_ms": null, "downtime": null, "rounds": 0, "channels": 0,
            "memory_bytes": 0, "sent_bytes": 0, "zero_bytes": 0, "goodput_mib_s": 0.0, "cpu_sender_s": 0.0,
            "cpu_receiver_s": null, "digest_equal": null, "guest_check": null,
            "error": { "code": "cli.not-begun", "phase": "hello", "channel": null, "text": format!("{error:#}") },
        })
    }

    /// See `--help`.
    pub(crate) fn exit_status(&self) -> u8 {
        match self.report.outcome {
            OutcomeKind::Migrated if self.guest_check.is_null() || self.guest_check == "passed" => {
                0
            }
            OutcomeKind::Migrated => 5,
            OutcomeKind::Failed => 1,
            OutcomeKind::Cancelled => 3,
            OutcomeKind::Unknown => 4,
            OutcomeKind::Stranded => 6,
        }
    }

    pub(crate) fn print(&self, kind: ReportKind) {
        match kind {
            ReportKind::Json => out!("{}", self.object()),
            ReportKind::Text => self.text(),
        }
    }

    fn object(&self) -> Value {
        let mut object = serde_json::to_value(&self.report).unwrap_or_default();
        object["guest_check"] = self.guest_check.clone();
        object["source_guest_runs"] = json!(self.source_runs);
        object["receiver"] = self.theirs.clone();
        object
    }

    fn text(&self) {
        let r = &self.report;
        let seconds = r.total_ms / 1e3;
        match r.outcome {
            OutcomeKind::Migrated => out!("\nmigrated: the guest runs at the destination"),
            OutcomeKind::Failed => out!("\nfailed: {}", self.where_it_runs()),
            OutcomeKind::Cancelled => out!("\ncancelled: {}", self.where_it_runs()),
            OutcomeKind::Stranded => out!(
                "\nnot running: the destination took the guest over and could not run it; it is paused there, and stays paused here"
            ),
            OutcomeKind::Unknown => out!(
                "\noutcome unknown: the commit was sent and nothing was heard since; the guest stays paused here"
            ),
        }
        if let Some(error) = &r.error {
            out!(
                "  reason       {} [{}] in phase {}{}",
                error.text,
                error.code,
                error.phase,
                error
                    .channel
                    .as_ref()
                    .map(|c| format!(", {c}"))
                    .unwrap_or_default()
            );
        }
        out!(
            "  total        {seconds:.3} s, {} rounds over {} channels{}",
            r.rounds,
            r.channels,
            if r.channels_lost > 0 {
                format!(
                    " ({} lost, {} opened again)",
                    r.channels_lost, r.channels_reopened
                )
            } else {
                String::new()
            }
        );
        if let (Some(downtime), Some(d)) = (r.downtime_ms, r.downtime) {
            out!(
                "  downtime     {downtime:.1} ms (predicted {:.1})",
                r.predicted_downtime_ms.unwrap_or_default()
            );
            out!(
                "               pause {:.1}, last collection {:.1}, save {:.1}, send {:.1}, destination {:.1} (load {:.1}), commit {:.1}",
                d.pause_ms,
                d.collect_ms,
                d.save_ms,
                d.send_ms,
                d.prepare_ms,
                d.load_ms,
                d.commit_ms
            );
        }
        self.devices();
        out!(
            "  memory       {}: sent {} with content, {} as zero pages, {} on the wire",
            mib(r.memory_bytes),
            mib(r.content_bytes),
            mib(r.zero_bytes),
            mib(r.sent_bytes)
        );
        if r.suspensions > 0 || r.asked > 0 {
            out!(
                "  link         lost {} times, {:.3} s without it in all; a pause of {:.1} ms was broken off; the destination was asked {} times",
                r.suspensions,
                r.suspended_ms / 1e3,
                r.broken_off_pause_ms,
                r.asked
            );
        }
        if r.control_damaged > 0 {
            out!(
                "               {} times because octets on the control channel were changed on the way",
                r.control_damaged
            );
        }
        if r.sent_again_bytes > 0 {
            out!(
                "  sent again   {} that were on their way when a channel was lost",
                mib(r.sent_again_bytes)
            );
        }
        for damage in &r.damaged {
            out!(
                "  damaged      {} times {} on {} ({}), found by its checksum",
                damage.count,
                damage.frame,
                damage.channel.as_deref().unwrap_or("a new connection"),
                damage.phase
            );
        }
        out!("  goodput      {:.0} MiB/s", r.goodput_mib_s);
        out!(
            "  CPU          {:.2} s here, {} there",
            r.cpu_sender_s,
            r.cpu_receiver_s
                .map_or_else(|| "?".into(), |s| format!("{s:.2} s"))
        );
        for round in &r.round_list {
            let dirty = round
                .dirty_after
                .map(|pages| format!(", then dirty {}", mib(pages * 4096)))
                .unwrap_or_default();
            out!(
                "  round {:<6} {} in {:.1} ms ({:.0} MiB/s on the wire){dirty}",
                round.round,
                mib(round.pages * 4096),
                round.ms,
                round.mib_s
            );
        }
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
            out!(
                "  {:<12} {} pages found in {} harvests ({:.1} ms), {} reports, {} resets{trouble}",
                source.name,
                source.pages,
                source.harvests,
                source.harvest_ms,
                source.reported,
                source.resets,
            );
            if let Some(error) = &source.last_error {
                out!("               its last error: {error}");
            }
            if let Some(reason) = &source.reason {
                out!("               chosen because: {reason}");
            }
        }
        if let Some(ms) = r.dirty_scan_ms {
            out!(
                "  debug scan   all memory compared with what was sent, in {ms:.1} ms of the downtime"
            );
        }
        if let Some(equal) = r.digest_equal {
            out!(
                "  digest       {}{}",
                r.digest.as_deref().unwrap_or(""),
                if equal { " on both sides" } else { " DIFFERS" }
            );
        }
        match &self.guest_check {
            Value::Null => {}
            Value::String(text) if text == "passed" => {
                out!(
                    "  guest check  passed: every word of its memory is as new as its own log says ({} heart-beats at the destination)",
                    self.theirs["guest_beats"]
                );
            }
            other => out!("  guest check  FAILED: {other}"),
        }
    }

    fn devices(&self) {
        let r = &self.report;
        if let Some(d) = r.downtime.and_then(|downtime| downtime.devices) {
            out!(
                "               devices: quiesce {:.1}, stop {:.1}, read {:.1}, wire {:.1}, load {:.1} (config {:.1}); memory after them {:.1}",
                d.quiesce_ms,
                d.stop_ms,
                d.read_ms,
                d.wire_ms,
                d.load_ms,
                d.config_ms,
                d.memory_tail_ms
            );
        }
        if r.ack_wait_ms > 0.0 {
            out!(
                "               waited {:.1} ms before it for initial bytes to be loaded, with the guest running",
                r.ack_wait_ms
            );
        }
        for device in &r.devices {
            let part = |ms: Option<f64>| ms.map_or_else(|| "-".into(), |ms| format!("{ms:.1} ms"));
            out!(
                "  device       {}: {} while the guest ran ({} initial, generation {} of {} loaded), {} while it stood still",
                device.name,
                mib(device.pre_copy_bytes),
                mib(device.initial_bytes),
                device.acked,
                device.generations,
                mib(device.stop_copy_bytes)
            );
            out!(
                "               read after {}, sent after {}, there after {}, loaded after {} (loading {}, config {}); now {}{}{}",
                part(device.saved_after_ms),
                part(device.sent_after_ms),
                part(device.arrived_after_ms),
                part(device.loaded_after_ms),
                part(device.load_ms),
                part(device.config_ms),
                device.state,
                match (device.was_reset, device.given_back) {
                    (_, false) => ", NOT GIVEN BACK: its code does not return",
                    (true, true) => ", WAS RESET: its state is lost",
                    (false, true) => "",
                },
                device
                    .error
                    .as_ref()
                    .map(|text| format!("; {text}"))
                    .unwrap_or_default()
            );
        }
    }

    fn where_it_runs(&self) -> &'static str {
        match self.source_runs {
            Some(false) => "the guest does NOT run here: see the log",
            _ => "the guest runs on here",
        }
    }
}

fn mib(octets: u64) -> String {
    format!("{:.1} MiB", octets as f64 / 1_048_576.0)
}
