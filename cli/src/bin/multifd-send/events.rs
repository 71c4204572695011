//! `--progress json`: an object in a line of its own for each thing that happens, and one a second.
//!
//! The names of what an event carries are those of the report, where the report has it.

use std::time::{Duration, Instant};

use multifd_cli::round_end::RoundEnd;
use multifd_sender::forecast::Forecast;
use multifd_sender::report::LimitsReport;
use multifd_sender::{Limits, Snapshot};
use serde_json::{Value, json};

/// How often an event comes when nothing else happens.
const PERIOD: Duration = Duration::from_secs(1);

/// What was told so far.
pub(crate) struct Events {
    began: Instant,
    told: Instant,
    newest: Option<Snapshot>,
    round_end: RoundEnd,
}

impl Default for Events {
    fn default() -> Self {
        let now = Instant::now();
        Self {
            began: now,
            told: now,
            newest: None,
            round_end: RoundEnd::default(),
        }
    }
}

impl Events {
    /// Takes note of how far it is, and tells what is new.
    pub(crate) fn show(&mut self, now: &Snapshot) {
        self.round_end.note(self.began.elapsed(), now.into());
        for event in news(self.newest.as_ref(), now) {
            self.tell(event, now);
        }
        if self.told.elapsed() >= PERIOD {
            self.tell("progress", now);
        }
        self.newest = Some(now.clone());
    }

    /// The user asked for a cancellation.
    pub(crate) fn cancelling(&mut self, now: &Snapshot) {
        self.tell("cancelling", now);
    }

    fn tell(&mut self, event: &str, now: &Snapshot) {
        self.told = Instant::now();
        let mut object = describe(now);
        object["event"] = json!(event);
        object["elapsed_ms"] = json!(self.began.elapsed().as_millis() as u64);
        let ends = self.round_end.expected();
        object["round_ends_in_ms"] = json!(ends.map(|ends| ends.within.as_millis() as u64));
        out!("{object}");
    }
}

/// What happened between two snapshots.
fn news(before: Option<&Snapshot>, now: &Snapshot) -> Vec<&'static str> {
    let Some(before) = before else {
        return vec!["started"];
    };
    let mut news = Vec::new();
    if before.phase != now.phase {
        news.push("phase");
    }
    if before.round != now.round {
        news.push("round");
    }
    match (before.reconnect, now.reconnect) {
        (None, Some(_)) => news.push("link-lost"),
        (Some(_), None) => news.push("link-back"),
        _ => {}
    }
    if before.limits != now.limits {
        news.push("limits");
    }
    if before.throttle_percent != now.throttle_percent {
        news.push("throttle");
    }
    if before.lanes > now.lanes && now.reconnect.is_none() {
        news.push("channel-lost");
    }
    news
}

fn describe(now: &Snapshot) -> Value {
    json!({
        "phase": now.phase.to_string(),
        "round": now.round,
        "channels_open": now.lanes,
        "memory_bytes": now.memory_pages * 4096,
        "round_left_bytes": now.round_pages_left * 4096,
        "dirty_bytes": now.dirty_pages * 4096,
        "sent_bytes": now.sent_bytes,
        "acked_bytes": now.acked_bytes,
        "content_bytes": now.content_pages * 4096,
        "zero_bytes": now.zero_pages * 4096,
        "left_out_bytes": now.left_out_pages * 4096,
        "pages_mismatched": now.pages_mismatched,
        "pages_torn": now.pages_torn,
        "pages_damaged": now.pages_damaged,
        "device_bytes": now.device_bytes,
        "devices_awaited": now.devices_awaited,
        "bandwidth_bytes_per_s": (now.bandwidth > 0).then_some(now.bandwidth),
        "reconnect": now.reconnect.map(|back| json!({
            "attempts": back.attempts,
            "gives_up_in_ms": back.gives_up_in.as_millis() as u64,
        })),
        "throttle_percent": now.throttle_percent,
        "limits": limits(&now.limits),
        "forecast": now.forecast.map(forecast),
    })
}

/// As the report has them, but for when.
fn limits(limits: &Limits) -> Value {
    let report = LimitsReport::new(limits, Duration::ZERO);
    let mut object = serde_json::to_value(report).unwrap_or_default();
    if let Some(object) = object.as_object_mut() {
        object.remove("at_ms");
    }
    object
}

fn forecast(forecast: Forecast) -> Value {
    match forecast {
        Forecast::Converges {
            rounds,
            within,
            downtime,
        } => json!({
            "converges": true,
            "rounds": rounds,
            "within_ms": within.as_millis() as u64,
            "downtime_ms": downtime.as_secs_f64() * 1e3,
        }),
        Forecast::Diverges {
            downtime,
            bandwidth_needed,
            throttle_percent,
        } => json!({
            "converges": false,
            "downtime_ms": downtime.as_secs_f64() * 1e3,
            "bandwidth_needed_bytes_per_s": bandwidth_needed,
            "throttle_percent": throttle_percent,
        }),
        _ => Value::Null,
    }
}
