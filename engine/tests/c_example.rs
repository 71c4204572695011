//! The example in C: a process whose memory is moved to another process by two engines, which are other processes still.

mod common;

use common::{Folder, Process, example_or_skip, number, receiving, sending};

/// Source and destination of the example.
fn processes(folder: &Folder, program: &std::path::Path, mib: &str) -> (Process, Process) {
    let (s, d) = (folder.path("s"), folder.path("d"));
    let source = Process::start("source", program, &["source", &s, mib]);
    let destination = Process::start("destination", program, &["destination", &d]);
    source.says(0, "listening");
    destination.says(0, "listening");
    (source, destination)
}

/// The value behind `hash=` of the last line that begins so.
fn last_hash(process: &Process, begin: &str) -> String {
    let output = process.output();
    let line = output.iter().rev().find(|line| line.starts_with(begin));
    let line = line.unwrap_or_else(|| panic!("no {begin:?} in {output:#?}"));
    line.split_once("hash=")
        .expect("it has a hash")
        .1
        .to_owned()
}

#[test]
fn a_process_in_c_is_moved_with_all_of_its_memory() {
    let Some(program) = example_or_skip("a_process_in_c_is_moved_with_all_of_its_memory") else {
        return;
    };
    let folder = Folder::new("c");
    let (mut source, mut destination) = processes(&folder, program, "256");
    let (mut receiver, address) = receiving(&folder.path("d"), "127.0.0.1:0", &[]);
    let mut sender = sending(&folder.path("s"), &address, &["--report", "json"]);
    assert_eq!(sender.status(), 0, "{:#?}", sender.output());
    assert_eq!(receiver.status(), 0, "{:#?}", receiver.output());

    let report = sender.says(0, "{");
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["outcome"], "migrated");
    assert_eq!(report["memory_bytes"], 256 << 20);
    // Pages that nobody wrote are holes of a memfd, which are neither read nor sent.
    assert!(
        report["content_bytes"].as_u64().unwrap() < 200 << 20,
        "{report}"
    );
    assert!(report["rounds"].as_u64().unwrap() > 1, "{report}");

    // Equal memory, by the processes' own words; the source stands, the destination goes on.
    assert_eq!(
        last_hash(&source, "saved"),
        last_hash(&destination, "loaded hash")
    );
    let left = source.ask("state", "state");
    assert!(left.starts_with("state 2 standing"), "{left}");
    let arrived = destination.ask("state", "state");
    assert!(arrived.starts_with("state 3 running"), "{arrived}");
    assert!(number(&arrived, "steps=") >= number(&left, "steps="));
    loop {
        let later = destination.ask("state", "state");
        if number(&later, "steps=") > number(&arrived, "steps=") {
            break;
        }
    }
    let check = destination.ask("quit", "check");
    assert!(check.starts_with("check passed wrong=0 ran"), "{check}");
    source.ask("quit", "no guest here");
}

#[test]
fn a_migration_that_is_cancelled_leaves_the_process_running_where_it_was() {
    let test = "a_migration_that_is_cancelled_leaves_the_process_running_where_it_was";
    let Some(program) = example_or_skip(test) else {
        return;
    };
    let folder = Folder::new("cancel");
    let (mut source, mut destination) = processes(&folder, program, "64");
    let one_attempt = ["--one-attempt", "--suspend", "0s"];
    let (mut receiver, address) = receiving(&folder.path("d"), "127.0.0.1:0", &one_attempt);
    // It writes faster than that, so it does not converge.
    let slow = ["--bandwidth", "2MB/s", "--max-rounds", "1000"];
    let mut sender = sending(&folder.path("s"), &address, &slow);
    while number(&source.ask("state", "state"), "steps=") < 1000 {}
    sender.terminate();
    assert_eq!(sender.status(), 3, "{:#?}", sender.output());
    assert_eq!(receiver.status(), 1, "{:#?}", receiver.output());
    source.says(0, "ended outcome=3");
    destination.says(0, "discarded");
    let state = source.ask("state", "state");
    assert!(state.starts_with("state 0 running"), "{state}");

    // And it can be moved with the next engines.
    let (mut receiver, address) = receiving_again(&folder, &mut destination, program);
    let mut sender = sending(&folder.path("s"), &address, &[]);
    assert_eq!(sender.status(), 0, "{:#?}", sender.output());
    assert_eq!(receiver.status(), 0, "{:#?}", receiver.output());
    let check = destination.ask("quit", "check");
    assert!(check.starts_with("check passed wrong=0 ran"), "{check}");
}

/// A destination that has discarded a guest only answers for it: another one takes its place.
fn receiving_again(
    folder: &Folder,
    destination: &mut Process,
    program: &std::path::Path,
) -> (Process, String) {
    destination.ask("quit", "no guest here");
    let path = folder.path("d");
    *destination = Process::start("destination", program, &["destination", &path]);
    destination.says(0, "listening");
    receiving(&path, "127.0.0.1:0", &[])
}
