//! `multifd-send` as a user meets it before anything moves: help, wrong usage, an address where nobody listens.
//!
//! What needs a receiver is tested in `tests/tests/programs.rs`; that file relies on this one, because cargo builds a
//! package's programs for its integration tests.

mod common;

use std::process::Output;

use common::{help_of, refuses, text};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_multifd-send");

fn run(arguments: &[&str]) -> Output {
    common::run(PROGRAM, arguments)
}

/// Every flag that the documentation names. A flag that is new joins this list.
const FLAGS: &[&str] = &[
    "--ask",
    "--ack-deadline",
    "--bandwidth",
    "--body",
    "--bridge",
    "--expect",
    "--pass",
    "--bridge-buffer",
    "--bridge-outage",
    "--channels",
    "--confine",
    "--clear-text",
    "--tls-dir",
    "--tls-peer",
    "--connect",
    "--control",
    "--data",
    "--debug-dirty-scan",
    "--device",
    "--device-deadline",
    "--dirty-rate",
    "--downtime-limit",
    "--guest-device",
    "--help",
    "--if-ack-late",
    "--if-not-converging",
    "--loopback",
    "--loopback-host",
    "--max-rounds",
    "--memory",
    "--pattern",
    "--progress",
    "--quiet",
    "--rdma-registration",
    "--reconnect-deadline",
    "--report",
    "--restart-if-lost",
    "--seed",
    "--stall",
    "--start-paused",
    "--state-file",
    "--tls-ca",
    "--tls-cert",
    "--tls-key",
    "--throttle-limit",
    "--tls-server-name",
    "--tracking",
    "--transport",
    "--vcpus",
    "--version",
    "--warm-up",
    "--working-set",
    "--zero-percent",
];

#[test]
fn help_explains_every_flag_and_every_exit_status() {
    let help = help_of(PROGRAM, FLAGS, &[0, 1, 2, 3, 4, 5, 6, 7]);
    let (_, rest) = help.split_once("Examples:").expect("examples");
    assert!(rest.contains("Ctrl-C"), "{help}");
}

#[test]
fn short_help_fits_on_two_screens_and_points_to_the_long_one() {
    let output = run(&["-h"]);
    assert_eq!(output.status.code(), Some(0));
    let help = text(&output.stdout);
    assert!(help.starts_with("Live-migrate a running guest"), "{help}");
    assert!(help.lines().count() <= 80 && !help.contains('\\'), "{help}");
    for word in [
        "--connect",
        "--loopback",
        "--downtime-limit",
        "--help",
        "Examples:",
    ] {
        assert!(help.contains(word), "{word} is not in:\n{help}");
    }
    assert!(
        !help.contains("--seed"),
        "rare flags are in --help:\n{help}"
    );
}

#[test]
fn wrong_usage_ends_with_status_2_and_says_what_would_be_right() {
    let cases: &[(&[&str], &str)] = &[
        (&[], "--loopback"),
        (&["--conect", "127.0.0.1:1"], "'--connect'"),
        (
            &["--connect", "127.0.0.1:1", "--loopback"],
            "cannot be used with",
        ),
        (&["--connect", "nowhere"], "tcp:HOST:PORT"),
        (&["--loopback", "--channels", "0"], "1 to 256"),
        (&["--loopback", "--channels", "257"], "1 to 256"),
        (&["--loopback", "--bandwidth", "12X"], "64M"),
        (&["--loopback", "--bandwidth", "100mb/s"], "bits or bytes"),
        (&["--loopback", "--memory", "100"], "64 MiB"),
        (
            &["--loopback", "--warm-up", "18446744073709551615s"],
            "at most 24h",
        ),
        (&["--loopback", "--stall", "2"], "300ms"),
        (
            &["--loopback", "--downtime-limit", "soon"],
            "--downtime-limit",
        ),
        (&["--loopback", "--if-not-converging", "hope"], "switch"),
        (&["--loopback", "--body", "2M"], "to 1M"),
        (&["--loopback", "--body", "5000"], "multiple of 4K"),
        (
            &["--loopback", "--memory", "65M", "--working-set", "65M"],
            "at most",
        ),
        (&["--loopback", "--memory", "1M"], "64 MiB"),
        (&["--loopback", "--vcpus", "17"], "1 to 16"),
        (&["--loopback", "--zero-percent", "101"], "0 to 100"),
    ];
    refuses(PROGRAM, cases);
}

#[test]
fn wrong_usage_has_a_report_for_programs_too() {
    for (arguments, says) in [
        (&["--report", "json"][..], "required"),
        (&["--report=json", "--loopback", "--vcpus", "17"], "1 to 16"),
        (
            &["--progress", "json", "--loopback", "--memory", "big"],
            "--memory",
        ),
        (
            &["--ask", "/nowhere/state", "--report", "json"],
            "/nowhere/state",
        ),
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
        let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
        assert_eq!(report["outcome"], "failed", "{report}");
        assert_eq!(report["error"]["code"], "cli.usage", "{report}");
        let said = report["error"]["text"].as_str().expect("a text");
        assert!(said.contains(says), "no {says:?} in {said}");
        assert!(!said.contains('\x1b') && !said.contains("Usage:"), "{said}");
        assert!(!output.stderr.is_empty(), "people are told as well");
    }
}

#[test]
fn an_address_where_nobody_listens_fails_with_a_report_and_the_guest_runs_on() {
    // A port that was free a moment ago, on an address that nobody else uses.
    let listener = std::net::TcpListener::bind("127.77.77.77:0").expect("loopback is there");
    let address = listener.local_addr().expect("bound").to_string();
    drop(listener);
    let guest = ["--memory", "64M", "--working-set", "1M", "--warm-up", "0ms"];
    let output = run(&[&["--connect", &address, "--report", "json"], &guest[..]].concat());
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(report["outcome"], "failed", "{report}");
    assert_eq!(report["source_guest_runs"], true, "{report}");
    let error = &report["error"];
    assert_eq!(error["code"], "sender.channel.dial", "{report}");
    assert_eq!(error["phase"], "hello", "{report}");
    assert_eq!(error["channel"], "control channel", "{report}");
    let said = error["text"].as_str().expect("a text");
    assert!(
        said.contains(&address) && said.contains("refused"),
        "{said}"
    );
}
