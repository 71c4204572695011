//! Real faults, in short: some rows of the table of `tests/src/faults`, and what the hunt for them found.
//!
//! The long form is a program: `multifd-faults series --count 2000`. Rows that need links of their own are skipped without root.
#![allow(clippy::print_stdout)] // a skipped test says so

use std::fs::File;
use std::time::Duration;

use multifd_tests::faults::net::{remove_stale, what_is_missing};
use multifd_tests::faults::play::Stage;
use multifd_tests::faults::table::table;
use multifd_tests::programs::{Launch, Process};

const SMALL: [&str; 12] = [
    "--memory",
    "64M",
    "--working-set",
    "2M",
    "--zero-percent",
    "100",
    "--dirty-rate",
    "4M",
    "--warm-up",
    "20ms",
    "--report",
    "json",
];

/// A row for each thing that can fail, in different moments and over different channels.
const ROWS: [&str; 8] = [
    "reset/later-rounds/tls",
    "short-cut/switchover/tcp",
    "no-descriptors-destination/first-round/tcp",
    "kill-destination/commit/unix",
    "kill-source/switchover/tcp",
    "restart-destination/later-rounds/unix",
    "disk-full-source/set-up/tcp",
    "disk-full-destination/set-up/tls",
];

#[test]
fn a_fault_of_each_sort_ends_as_the_table_says() {
    remove_stale();
    let missing = what_is_missing();
    let stage = Stage::new("test", missing.is_none()).expect("a place");
    for name in ROWS {
        let rows = table();
        let row = rows.iter().find(|row| row.to_string() == name);
        let row = row.unwrap_or_else(|| panic!("there is no row {name}"));
        if let (true, Some(missing)) = (row.fault.needs_root(), &missing) {
            println!("SKIPPED {name}: {missing}");
            continue;
        }
        let played = stage.play(*row, 1);
        println!("{name}: {:?} after {:?}", played.ending, played.took);
        assert!(
            played.violations.is_empty(),
            "{name}: {:?}\n{}",
            played.violations,
            played.words
        );
    }
}

/// A disk that is full under the log and the report: what is said is lost, and nothing else.
#[test]
fn an_output_that_cannot_be_written_costs_the_words_and_not_the_guest() {
    let full = || {
        File::options()
            .write(true)
            .open("/dev/full")
            .expect("a device of Linux")
    };
    let (destination, address) = Process::receiver(&["--run-for", "30ms"]);
    let source = Launch::new("multifd-send")
        .arguments(&SMALL)
        .arguments(&["--connect", &address])
        .log("trace")
        .output(full());
    let sent = source.start().end();
    assert_eq!(sent.status, Some(0), "{sent}");
    let received = destination.end();
    assert_eq!(received.report()["guest_check"], "passed", "{received}");

    let address = format!(
        "unix:{}",
        std::env::temp_dir()
            .join(format!("multifd-full-{}", std::process::id()))
            .display()
    );
    let destination = Launch::new("multifd-receive")
        .arguments(&["--listen", &address, "--run-for", "30ms"])
        .log("trace")
        .output(full())
        .start();
    // It can't say that it listens: that its socket is there does.
    let socket = address.trim_start_matches("unix:");
    let sent = loop {
        if std::path::Path::new(socket).exists() {
            break Process::start(
                "multifd-send",
                &[&SMALL[..], &["--connect", &address]].concat(),
            )
            .end();
        }
        assert!(destination.age() < multifd_tests::programs::PATIENCE);
        std::thread::sleep(Duration::from_millis(2));
    };
    assert_eq!(sent.report()["outcome"], "migrated", "{sent}");
    assert_eq!(destination.end().status, Some(0), "its check passed");
}

/// A connection that came while there was no descriptor for it waits in the kernel's queue, and no event tells of it again.
#[test]
fn a_connection_that_found_no_descriptor_is_taken_when_there_is_one() {
    let (destination, address) = Process::receiver(&["--run-for", "30ms"]);
    let before = destination.limit_descriptors(3).expect("it lives");
    let source = Process::start(
        "multifd-send",
        &[&SMALL[..], &["--connect", &address]].concat(),
    );
    let _ = destination.wait_for("a connection could not be accepted");
    let _ = destination.limit_descriptors(before);
    let sent = source.end();
    assert_eq!(sent.report()["outcome"], "migrated", "{sent}");
    assert_eq!(destination.end().report()["guest_check"], "passed");
}
