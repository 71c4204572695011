//! The final report of `multifd-receive`: for people, and as one JSON object.

use multifd_cli::flags::ReportKind;
use multifd_cli::units::Size;
use multifd_receiver::{Finished, OutcomeKind};
use serde_json::{Value, json};

use crate::check::Check;

/// The object for a reception that was not even begun.
pub(crate) fn not_begun(error: Value) -> Value {
    json!({ "outcome": "failed", "guest_check": null, "error": error })
}

/// See `--help`.
pub(crate) fn exit_status(outcome: OutcomeKind, check: Option<&Check>) -> u8 {
    match outcome {
        OutcomeKind::Running if check.is_none_or(|check| check.passed) => 0,
        OutcomeKind::Running => 5,
        OutcomeKind::Failed => 1,
        // Stranded. Whatever else there may be one day: the guest is here and does not run.
        _ => 4,
    }
}

pub(crate) fn print(kind: ReportKind, finished: &Finished, check: Option<&Check>) {
    match kind {
        ReportKind::Json => out!("{}", object(finished, check)),
        ReportKind::Text => text(finished, check),
    }
}

fn object(finished: &Finished, check: Option<&Check>) -> Value {
    let mut report = serde_json::to_value(&finished.report).unwrap_or_default();
    report["guest_check"] = json!(check.map(|check| match check.passed {
        true => "passed",
        false => check.text.as_str(),
    }));
    report["guest_beats"] = json!(check.map(|check| check.beats));
    report
}

fn text(finished: &Finished, check: Option<&Check>) {
    let r = &finished.report;
    for damage in &r.damaged {
        err!(
            "multifd-receive: damaged on the way, found by its checksum: {} times {} on {}, in phase {}",
            damage.count,
            damage.frame,
            damage.channel.as_deref().unwrap_or("a new connection"),
            damage.phase
        );
    }
    if r.pages_mismatched > 0 {
        err!(
            "multifd-receive: {} pages did not match their checksum, torn by the guest or damaged on the way, and came again: the \
             source's report says which",
            r.pages_mismatched
        );
    }
    if r.pages_cleared > 0 {
        err!(
            "multifd-receive: {} pages of the memory that was prepared were not zero, and were made so",
            r.pages_cleared
        );
    }
    if let Some(error) = &r.error {
        let channel = error.channel.as_ref().map(|channel| format!(", {channel}"));
        err!(
            "multifd-receive: {} [{}] in phase {}{}",
            error.text,
            error.code,
            error.phase,
            channel.unwrap_or_default()
        );
        return;
    }
    let guest = match r.guest_paused {
        true => "the guest is here, paused as it was at the source",
        false => "the guest runs here",
    };
    let Some(check) = check else {
        out!("{guest}");
        return;
    };
    out!(
        "{guest}: {} of memory in {} rounds, digest {}",
        Size(r.memory_bytes),
        r.rounds,
        r.digest.as_deref().unwrap_or("?")
    );
    out!(
        "guest check: {} ({} heart-beats since it arrived)",
        check.text,
        check.beats
    );
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_table_of_exit_states_in_the_readme_is_that_of_this_program() {
        let check = |passed| Check {
            passed,
            text: String::new(),
            beats: 0,
        };
        let outcomes = [
            OutcomeKind::Running,
            OutcomeKind::Failed,
            OutcomeKind::Stranded,
        ];
        let mut ours: BTreeSet<(u8, String)> = outcomes
            .into_iter()
            .flat_map(|outcome| [true, false].map(|passed| (outcome, passed)))
            .map(|(outcome, passed)| {
                let word = serde_json::to_value(outcome).unwrap();
                let word = word.as_str().unwrap().to_owned();
                (exit_status(outcome, Some(&check(passed))), word)
            })
            .collect();
        // Nothing was begun: no reception has this one.
        let usage = not_begun(Value::Null);
        ours.insert((2, usage["outcome"].as_str().unwrap().to_owned()));
        assert_eq!(crate::readme::exit_states("multifd-receive"), ours);
    }
}
