//! How a program starts: its command line, its log, and its report if nothing was begun.

use std::io::IsTerminal as _;
use std::process::ExitCode;

use clap::Parser;
use serde_json::{Value, json};

/// The command line, or the exit status of a program that has nothing more to do: help was printed, or the usage was wrong.
/// Who asked for a report as JSON gets one in that case too.
///
/// # Errors
/// The exit status.
pub fn arguments<A: Parser>(not_begun: impl Fn(Value) -> Value) -> Result<A, ExitCode> {
    A::try_parse().map_err(|error| {
        if error.use_stderr() && wants_json(std::env::args_os()) {
            let text = error.render().to_string();
            let words = text.split("\n\nUsage:").next().unwrap_or_default();
            let words = words.trim().trim_start_matches("error: ");
            out!("{}", not_begun(fault(USAGE, words)));
        }
        let _ = error.print();
        ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
    })
}

/// The code of wrong usage.
pub const USAGE: &str = "cli.usage";

/// The code of what was found wrong before anything was moved.
pub const NOT_BEGUN: &str = "cli.not-begun";

/// The member `error` of a report.
#[must_use]
pub fn fault(code: &str, text: &str) -> Value {
    json!({ "code": code, "phase": "hello", "channel": null, "text": text })
}

/// An error and its causes in one line; what a cause says again is left out.
#[must_use]
pub fn words(error: &anyhow::Error) -> String {
    let mut causes: Vec<String> = Vec::new();
    for cause in error.chain().map(ToString::to_string) {
        // A cause's own words often begin with those of its context.
        if causes
            .last()
            .is_some_and(|context| cause.starts_with(context))
        {
            causes.pop();
        }
        if !causes.iter().any(|context| context.contains(&cause)) {
            causes.push(cause);
        }
    }
    causes.join(": ")
}

/// Whether the arguments, which could not be parsed, ask for JSON.
fn wants_json(arguments: impl IntoIterator<Item = impl AsRef<std::ffi::OsStr>>) -> bool {
    let words: Vec<String> = arguments
        .into_iter()
        .map(|word| word.as_ref().to_string_lossy().into_owned())
        .collect();
    let flags = ["--report", "--progress"];
    words
        .windows(2)
        .any(|pair| flags.contains(&pair[0].as_str()) && pair[1] == "json")
        || words
            .iter()
            .any(|word| flags.iter().any(|flag| *word == format!("{flag}=json")))
}

/// The log, on standard error: warnings, or what RUST_LOG asks for. Colours only on a terminal.
pub fn log() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colours)
        // What can't be written must not end the thread that said it.
        .log_internal_errors(false)
        .init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_said_twice() {
        let cause = anyhow::anyhow!("in use");
        let once = cause.context("cannot listen on a:1: in use");
        assert_eq!(words(&once), "cannot listen on a:1: in use");
        let again = once.context("cannot listen on a:1");
        assert_eq!(words(&again), "cannot listen on a:1: in use");
        let more = again.context("it did not start");
        assert_eq!(
            words(&more),
            "it did not start: cannot listen on a:1: in use"
        );
    }

    #[test]
    fn json_is_asked_for_in_either_spelling() {
        assert!(wants_json(["x", "--nonsense", "--report", "json"]));
        assert!(wants_json(["x", "--report=json"]));
        assert!(wants_json(["x", "--progress=json"]));
        assert!(!wants_json(["x", "--report", "text", "json"]));
        assert!(!wants_json([""; 0]));
    }
}
