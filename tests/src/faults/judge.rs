//! What must hold after a migration with a fault, by what both programs said and how they ended.
//!
//! The rules it keeps: never two owners; never none while the source lives, unless the commit was sent and the source says so; an
//! exit status and a report that tell the truth; a reason that can be read.

use serde_json::Value;

use super::table::Ending;
use crate::programs::Ended;

/// The line of the sender's log with which the switchover begins.
pub const PAUSED: &str = "the guest is paused for the switchover";

/// The line of the sender's log before the guest runs on at the source after all.
pub const RUNS_ON: &str = "the guest runs on here";

/// The line of the receiver's log just before its guest runs.
pub const STARTED: &str = "the guest is started here";

/// A program that has ended.
#[derive(Debug)]
pub struct Witness {
    /// What it said, and its status.
    pub ended: Ended,
    /// It was killed by the fault, if it still lived then.
    pub killed: bool,
    /// Its output went to a disk that was full: it is known by its exit status alone.
    pub mute: bool,
}

impl Witness {
    fn report(&self) -> Option<Value> {
        serde_json::from_str(&self.ended.output).ok()
    }

    /// Ended by a signal, and not by itself.
    fn is_dead(&self) -> bool {
        self.ended.status.is_none()
    }

    fn started(&self) -> bool {
        if self.mute {
            self.ended.status == Some(0)
        } else {
            self.ended.errors.contains(STARTED)
        }
    }
}

/// What is wrong with how it ended.
#[derive(Debug, Default)]
pub struct Verdict {
    /// How it ended, if that can be said.
    pub ending: Option<Ending>,
    /// What must not be; empty if all is well.
    pub violations: Vec<String>,
}

impl Verdict {
    fn must(&mut self, holds: bool, otherwise: impl FnOnce() -> String) {
        if !holds {
            self.violations.push(otherwise());
        }
    }
}

/// Judges a migration. Without a source none was begun, since the destination did not come up.
#[must_use]
pub fn judge(source: Option<&Witness>, destinations: &[Witness]) -> Verdict {
    let mut verdict = Verdict::default();
    for witness in source.into_iter().chain(destinations) {
        let panicked = witness.ended.errors.contains("panicked at");
        verdict.must(!panicked, || "a program panicked".to_owned());
    }
    for destination in destinations {
        judge_destination(destination, &mut verdict);
    }
    let started = destinations.iter().filter(|d| d.started()).count();
    verdict.must(started <= 1, || {
        format!("DOUBLED: the guest was started {started} times")
    });
    match source {
        None => verdict.ending = Some(Ending::NotBegun),
        Some(source) => judge_source(source, destinations, started > 0, &mut verdict),
    }
    verdict
}

fn judge_destination(destination: &Witness, verdict: &mut Verdict) {
    if destination.mute || (destination.is_dead() && destination.report().is_none()) {
        return;
    }
    let Some(report) = destination.report() else {
        let output = &destination.ended.output;
        return verdict.must(false, || {
            format!("the destination's report is no JSON object: {output:?}")
        });
    };
    let (outcome, status) = (&report["outcome"], destination.ended.status);
    let started = destination.started();
    if outcome == "running" {
        let check = &report["guest_check"];
        verdict.must(check == "passed", || {
            format!("the guest at the destination is not what it was: {check}")
        });
        verdict.must(started, || {
            "the destination says that the guest runs, and never started it".into()
        });
        verdict.must(status == Some(0) || status.is_none(), || {
            format!("the destination runs the guest and ends with {status:?}")
        });
    } else {
        verdict.must(!started, || {
            format!("the destination started the guest and says {outcome}")
        });
        verdict.must(status == Some(1) || status.is_none(), || {
            format!("the destination says {outcome} and ends with {status:?}")
        });
        verdict.must(is_clear(&report["error"]), || {
            format!("the destination's reason is not clear: {}", report["error"])
        });
    }
}

fn judge_source(source: &Witness, destinations: &[Witness], started: bool, verdict: &mut Verdict) {
    let report = source.report();
    if report.is_none() && source.killed && source.is_dead() {
        verdict.ending = Some(if started {
            Ending::SurvivesSource
        } else {
            Ending::GoneWithSource
        });
        return;
    }
    if source.mute {
        let status = source.ended.status;
        verdict.must(status == Some(0) && started, || {
            format!("the source, which can't write, ends with {status:?}, started there: {started}")
        });
        verdict.ending = (status == Some(0)).then_some(Ending::Migrated);
        return;
    }
    let Some(report) = report else {
        let output = &source.ended.output;
        return verdict.must(false, || {
            format!(
                "LOST: the source ended with {:?} and this report: {output:?}",
                source.ended.status
            )
        });
    };
    let outcome = report["outcome"].as_str().unwrap_or_default().to_owned();
    let status = source.ended.status;
    let expected = match outcome.as_str() {
        "migrated" => 0,
        "failed" => 1,
        "cancelled" => 3,
        "unknown" => 4,
        "stranded" => 6,
        _ => -1,
    };
    verdict.must(status == Some(expected), || {
        format!("the source says {outcome} and ends with {status:?}")
    });
    let errors = &source.ended.errors;
    // Which came last: the pause, or going on.
    let paused = errors.rfind(PAUSED) > errors.rfind(RUNS_ON);
    let begun = report["error"]["code"] != "cli.not-begun";
    match outcome.as_str() {
        "migrated" => {
            verdict.must(started, || {
                "LOST: migrated, says the source, and no destination started the guest".into()
            });
            verdict.must(paused, || {
                "DOUBLED: migrated, and the guest runs at the source".into()
            });
            verdict.must(report["error"].is_null(), || {
                format!("migrated, with an error: {}", report["error"])
            });
        }
        "failed" | "cancelled" => {
            verdict.must(!started, || {
                format!("DOUBLED: {outcome}, says the source, and a destination started the guest")
            });
            verdict.must(!begun || report["source_guest_runs"] == true, || {
                format!("LOST: {outcome}, and the guest was not seen running at the source")
            });
            verdict.must(!paused, || {
                "LOST: the guest was paused and never let run again".into()
            });
        }
        _ => {
            verdict.must(paused, || {
                format!("DOUBLED: {outcome}, and the guest runs at the source")
            });
            let alive = destinations.iter().all(|d| !d.is_dead());
            verdict.must(outcome != "stranded" || !alive || !started, || {
                "stranded, and the guest runs".into()
            });
        }
    }
    verdict.must(outcome == "migrated" || is_clear(&report["error"]), || {
        format!("the source's reason is not clear: {}", report["error"])
    });
    let disturbed = ["suspensions", "asked", "channels_lost"]
        .iter()
        .any(|key| report[*key].as_u64().unwrap_or(0) > 0);
    verdict.ending = match outcome.as_str() {
        "migrated" if disturbed => Some(Ending::Resumed),
        "migrated" => Some(Ending::Migrated),
        "failed" if !begun => Some(Ending::NotBegun),
        "failed" => Some(Ending::Stays),
        "unknown" => Some(Ending::Unknown),
        _ => None,
    };
}

/// A code, a phase, and words.
fn is_clear(error: &Value) -> bool {
    let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
    !text("code").is_empty() && !text("phase").is_empty() && text("text").len() > 5
}
