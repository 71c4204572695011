//! What an engine prints at the end.

use multifd::{destination, source};
use multifd_cli::flags::{Output, ReportKind};
use multifd_cli::units::Size;
use multifd_engine::protocol::{Ended, Outcome};
use serde_json::{Value, json};

/// The object of an engine that did not begin.
pub(crate) fn not_begun(error: Value) -> Value {
    json!({ "outcome": "failed", "error": error })
}

/// How the source's migration ended, for the VMM.
pub(crate) fn of_source<V>(finished: &source::Finished<V>) -> Ended {
    let outcome = match finished.report.outcome {
        source::OutcomeKind::Migrated => Outcome::Migrated,
        source::OutcomeKind::Cancelled => Outcome::Cancelled,
        source::OutcomeKind::Stranded => Outcome::Stranded,
        source::OutcomeKind::Gone => Outcome::Gone,
        source::OutcomeKind::Failed => Outcome::Failed,
        // Also whatever there may be one day.
        _ => Outcome::Unknown,
    };
    let text = finished.report.error.as_ref();
    let text = text.map(|error| error.text.clone()).unwrap_or_default();
    Ended { outcome, text }
}

/// How the destination's ended.
pub(crate) fn of_destination<V>(finished: &destination::Finished<V>) -> Ended {
    let outcome = match finished.report.outcome {
        destination::OutcomeKind::Running => Outcome::Migrated,
        destination::OutcomeKind::Failed => Outcome::Failed,
        _ => Outcome::Stranded,
    };
    let text = finished.report.error.as_ref();
    let text = text.map(|error| error.text.clone()).unwrap_or_default();
    Ended { outcome, text }
}

pub(crate) fn sent<V>(output: &Output, finished: &source::Finished<V>) {
    let report = &finished.report;
    if output.report() == ReportKind::Json {
        return out!("{}", serde_json::to_value(report).unwrap_or_default());
    }
    if let Some(error) = &report.error {
        return failed(error);
    }
    out!(
        "migrated: the guest {} at the destination",
        if report.guest_paused {
            "is paused"
        } else {
            "runs"
        }
    );
    out!(
        "  total {:.3} s, {} rounds over {} channels, downtime {:.1} ms",
        report.total_ms / 1e3,
        report.rounds,
        report.channels,
        report.downtime_ms.unwrap_or_default()
    );
    out!(
        "  memory {}: {} with content, {} zero, {} sent; goodput {:.0} MiB/s",
        Size(report.memory_bytes),
        Size(report.content_bytes),
        Size(report.zero_bytes),
        Size(report.sent_bytes),
        report.goodput_mib_s
    );
}

pub(crate) fn received<V>(output: &Output, finished: &destination::Finished<V>) {
    let report = &finished.report;
    if output.report() == ReportKind::Json {
        return out!("{}", serde_json::to_value(report).unwrap_or_default());
    }
    if let Some(error) = &report.error {
        return failed(error);
    }
    out!(
        "the guest {}: {} of memory in {} rounds, digest {}",
        if report.guest_paused {
            "is here, paused"
        } else {
            "runs here"
        },
        Size(report.memory_bytes),
        report.rounds,
        report.digest.as_deref().unwrap_or("?")
    );
}

fn failed(error: &source::ErrorReport) {
    err!(
        "multifd-engine: {} [{}] in phase {}",
        error.text,
        error.code,
        error.phase
    );
}

/// What an engine found out, or told, of the migration of an earlier one.
pub(crate) fn settled(output: &Output, ended: &Ended) {
    let outcome = match ended.outcome {
        Outcome::Migrated => "migrated",
        Outcome::Stranded => "stranded",
        Outcome::Unknown => "unknown",
        _ => "failed",
    };
    match output.report() {
        ReportKind::Json => out!("{}", json!({ "outcome": outcome, "text": ended.text })),
        ReportKind::Text => out!("{}", ended.text),
    }
}
