//! What is told of a migration: how far it is, and what happened between two looks. The names are those of the reports.

use std::time::Duration;

use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_wire::{PAGE_BYTES_U64, Phase};
use serde::Serialize;
use serde_json::{Map, Value, json};
use tx::forecast::Forecast;
use tx::report::{ForecastReport, LimitsReport};

/// The name of the event that the guest is paused for the switchover.
pub(crate) const SWITCHOVER: &str = "switchover";

/// How a migration ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct End {
    /// In one word, as in the report.
    pub outcome: String,
    /// The code of the error, if there was one.
    pub code: Option<String>,
    /// Its text.
    pub text: Option<String>,
}

impl End {
    /// With this outcome, and the code and text of the error.
    #[must_use]
    pub fn new(outcome: &str, error: Option<(&str, &str)>) -> Self {
        let (code, text) = error.unzip();
        Self {
            outcome: outcome.to_owned(),
            code: code.map(str::to_owned),
            text: text.map(str::to_owned),
        }
    }

    /// The name of its event: `done` if the guest runs where it was to go.
    #[must_use]
    pub fn event(&self) -> &'static str {
        match self.outcome.as_str() {
            "migrated" | "running" => "done",
            _ => "failed",
        }
    }
}

/// What a side said of itself at one moment.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Seen {
    /// The source.
    Source(Box<tx::Snapshot>),
    /// The destination.
    Destination(rx::Snapshot),
}

impl Seen {
    /// As an object.
    #[must_use]
    pub fn status(&self) -> Value {
        match self {
            Self::Source(now) => of_source(now),
            Self::Destination(now) => of_destination(now),
        }
    }

    /// What happened since `before`, in words; the first time it is `started`.
    #[must_use]
    pub fn news(&self, before: Option<&Self>) -> Vec<&'static str> {
        match (before, self) {
            (Some(Self::Source(before)), Self::Source(now)) => news_of_source(before, now),
            (Some(Self::Destination(before)), Self::Destination(now)) => {
                news_of_destination(before, now)
            }
            _ => vec!["started"],
        }
    }
}

fn news_of_source(before: &tx::Snapshot, now: &tx::Snapshot) -> Vec<&'static str> {
    let (was_lost, is_lost) = (before.reconnect.is_some(), now.reconnect.is_some());
    let open = !was_lost && !is_lost && now.phase != Phase::Done;
    pick([
        (before.phase != now.phase, "phase"),
        (begins_switchover(before.phase, now.phase), SWITCHOVER),
        (before.round != now.round, "round"),
        (!was_lost && is_lost, "link-lost"),
        (was_lost && !is_lost, "link-back"),
        (open && before.lanes > now.lanes, "channel-lost"),
        (
            open && before.lanes < now.lanes && before.phase >= Phase::Rounds,
            "channel-back",
        ),
        (before.limits != now.limits, "limits"),
        (before.throttle_percent != now.throttle_percent, "throttle"),
        (
            now.outlook.is_some() && before.outlook != now.outlook,
            "forecast",
        ),
    ])
}

fn news_of_destination(before: &rx::Snapshot, now: &rx::Snapshot) -> Vec<&'static str> {
    let lost = |phase| phase == Phase::Suspended;
    let open = !lost(before.phase) && !lost(now.phase) && now.phase != Phase::Done;
    pick([
        (before.phase != now.phase, "phase"),
        (begins_switchover(before.phase, now.phase), SWITCHOVER),
        (before.round != now.round, "round"),
        (!lost(before.phase) && lost(now.phase), "link-lost"),
        (lost(before.phase) && !lost(now.phase), "link-back"),
        (open && before.lanes > now.lanes, "channel-lost"),
        (
            open && before.lanes < now.lanes && before.phase >= Phase::Rounds,
            "channel-back",
        ),
    ])
}

fn begins_switchover(before: Phase, now: Phase) -> bool {
    // It may be past it already, or back before it.
    before < Phase::Switchover && matches!(now, Phase::Switchover | Phase::Commit)
}

fn pick<const N: usize>(news: [(bool, &'static str); N]) -> Vec<&'static str> {
    let happened = news.into_iter().filter(|(happened, _)| *happened);
    happened.map(|(_, name)| name).collect()
}

fn of_source(now: &tx::Snapshot) -> Value {
    json!({
        "side": "source",
        "phase": now.phase.to_string(),
        "round": now.round,
        "channels_open": now.lanes,
        "memory_bytes": now.memory_pages * PAGE_BYTES_U64,
        "round_left_bytes": now.round_pages_left * PAGE_BYTES_U64,
        "dirty_bytes": now.dirty_pages * PAGE_BYTES_U64,
        "sent_bytes": now.sent_bytes,
        "acked_bytes": now.acked_bytes,
        "content_bytes": now.content_pages * PAGE_BYTES_U64,
        "zero_bytes": now.zero_pages * PAGE_BYTES_U64,
        "left_out_bytes": now.left_out_pages * PAGE_BYTES_U64,
        "pages_mismatched": now.pages_mismatched,
        "pages_torn": now.pages_torn,
        "pages_damaged": now.pages_damaged,
        "device_bytes": now.device_bytes,
        "devices_awaited": now.devices_awaited,
        "bandwidth_bytes_per_s": (now.bandwidth > 0).then_some(now.bandwidth),
        "throttle_percent": now.throttle_percent,
        "limits": limits(&now.limits),
        "reconnect": now.reconnect.map(|back| json!({
            "attempts": back.attempts,
            "gives_up_in_ms": back.gives_up_in.as_millis() as u64,
        })),
        "forecast": now.forecast.map(forecast),
        "outlook": now.outlook.map(|outlook| ForecastReport::from(&outlook)),
    })
}

fn of_destination(now: &rx::Snapshot) -> Value {
    json!({
        "side": "destination",
        "phase": now.phase.to_string(),
        "round": now.round,
        "channels_open": now.lanes,
        "memory_bytes": now.memory_pages * PAGE_BYTES_U64,
        "received_bytes": now.received_bytes,
        "content_bytes": now.content_pages * PAGE_BYTES_U64,
        "zero_bytes": now.zero_pages * PAGE_BYTES_U64,
        "pages_mismatched": now.pages_mismatched,
        "devices": now.devices,
        "devices_loaded": now.devices_loaded,
        "device_bytes": now.device_bytes,
    })
}

/// As the report has them, but for when.
fn limits(limits: &tx::Limits) -> Value {
    let report = serde_json::to_value(LimitsReport::new(limits, Duration::ZERO));
    let mut object: Map<String, Value> = match report {
        Ok(Value::Object(object)) => object,
        _ => Map::new(),
    };
    object.remove("at_ms");
    Value::Object(object)
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
