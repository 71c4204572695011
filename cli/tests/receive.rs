//! `multifd-receive` as a user meets it before a source comes: help, wrong usage, a taken address, Ctrl-C.
//!
//! What needs a sender is tested in `tests/tests/programs.rs`; that file relies on this one, because cargo builds a
//! package's programs for its integration tests.

mod common;

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{help_of, program, refuses, text};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_multifd-receive");

fn run(arguments: &[&str]) -> Output {
    common::run(PROGRAM, arguments)
}

/// Every flag that the documentation names. A flag that is new joins this list.
const FLAGS: &[&str] = &[
    "--bridge",
    "--bridge-buffer",
    "--bridge-outage",
    "--confine",
    "--control",
    "--clear-text",
    "--tls-dir",
    "--tls-peer",
    "--tls-any-source",
    "--expect",
    "--memory-ceiling",
    "--one-attempt",
    "--overcommit",
    "--pass",
    "--listen",
    "--transport",
    "--tls-ca",
    "--tls-cert",
    "--tls-key",
    "--run-for",
    "--max-memory",
    "--stall",
    "--suspend",
    "--hello-deadline",
    "--report",
    "--progress",
    "--quiet",
    "--help",
    "--version",
];

#[test]
fn help_explains_every_flag_and_every_exit_status() {
    let help = help_of(PROGRAM, FLAGS, &[0, 1, 2, 4, 5]);
    assert!(help.contains("trusted networks only"), "{help}");
}

#[test]
fn wrong_usage_ends_with_status_2_and_says_what_would_be_right() {
    let cases: &[(&[&str], &str)] = &[
        (&["--lisen", "127.0.0.1:0"], "'--listen'"),
        (&["--listen", "nowhere"], "tcp:HOST:PORT"),
        (&["--run-for", "long"], "--run-for"),
        (&["--run-for", "18446744073709551615s"], "at most 24h"),
        (&["--max-memory", "12X"], "64M"),
        (&["--listen", "127.0.0.1:0", "--stall", "1ms"], "100ms"),
    ];
    refuses(PROGRAM, cases);
}

#[test]
fn flags_stand_under_the_heading_that_they_belong_to() {
    let help = text(&run(&["--help"]).stdout);
    let tls = help.split_once("\nTLS:").expect("a heading").1;
    let tls = tls
        .split("\n\n")
        .take_while(|block| block.starts_with(' ') || block.starts_with('\n'))
        .collect::<Vec<_>>();
    let tls = tls.join("\n");
    let tls = tls.split("\nDeadlines:").next().unwrap_or_default();
    for flag in ["--run-for", "--stall", "--suspend", "--report", "--quiet"] {
        assert!(!tls.contains(flag), "{flag} is under TLS:\n{help}");
    }
    assert!(tls.contains("--tls-key"), "{help}");
    let short = text(&run(&["-h"]).stdout);
    assert!(short.lines().count() <= 60, "{short}");
    assert!(short.starts_with("Wait for a guest"), "{short}");
}

#[test]
fn wrong_usage_has_a_report_for_programs_too() {
    for arguments in [
        &["--report", "json", "--run-for", "18446744073709551615s"][..],
        &["--report=json", "--listen", "tls:127.0.0.1:0"],
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
        let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
        assert_eq!(report["error"]["code"], "cli.usage", "{report}");
    }
}

#[test]
fn an_address_that_is_taken_fails_with_a_report_that_names_it() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback is there");
    let address = taken.local_addr().expect("bound").to_string();
    let output = run(&["--listen", &address, "--report", "json"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(report["outcome"], "failed", "{report}");
    let said = report["error"]["text"].as_str().expect("a text");
    assert!(said.contains(&address), "{said}");
    let errors = text(&output.stderr);
    assert_eq!(errors.matches(&address).count(), 1, "said twice: {errors}");
}

#[test]
fn ctrl_c_ends_a_receiver_that_waits_and_its_report_says_so() {
    let mut receiver = program(PROGRAM, &["--listen", "127.0.0.1:0", "--report", "json"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("cargo built it with this test");
    let mut announced = String::new();
    let mut errors = BufReader::new(receiver.stderr.take().expect("piped"));
    errors.read_line(&mut announced).expect("UTF-8");
    assert!(
        announced.starts_with("listening on tcp:127.0.0.1:"),
        "{announced}"
    );
    interrupt(&receiver);
    let status = end(&mut receiver);
    let mut output = String::new();
    let mut pipe = receiver.stdout.take().expect("piped");
    pipe.read_to_string(&mut output).expect("UTF-8");
    assert_eq!(status, Some(1), "{output}");
    let report: Value = serde_json::from_str(&output).expect("one JSON object");
    assert_eq!(report["outcome"], "failed", "{report}");
    assert_eq!(report["error"]["code"], "receiver.cancelled", "{report}");
    assert!(report["guest_check"].is_null(), "{report}");
}

/// SIGINT, by the tool that every Linux has: this package needs no other way to send one.
fn interrupt(child: &Child) {
    let id = child.id().to_string();
    let sent = Command::new("kill").args(["-INT", &id]).status();
    assert!(sent.expect("kill is there").success());
}

fn end(child: &mut Child) -> Option<i32> {
    let asked = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("it is our child") {
            return status.code();
        }
        if asked.elapsed() > Duration::from_secs(10) {
            let _ = child.kill();
            panic!("it does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
