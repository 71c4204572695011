//! `multifd-send` and `multifd-receive` together, as a user runs them: what they print, how they end, and where the guest is then.
//!
//! Guests are small. Where a test does not say otherwise the guest is a KVM machine where there is KVM, and threads of a process
//! elsewhere.

use std::time::{Duration, Instant};

use multifd_tests::host::Host;
use multifd_tests::programs::{Ended, PATIENCE, Process, kvm_or_skip};
use serde_json::Value;

/// A guest that moves in a fraction of a second.
const SMALL: &[[&str; 2]] = &[
    ["--memory", "64M"],
    ["--working-set", "16M"],
    ["--dirty-rate", "20M"],
    ["--warm-up", "50ms"],
];

/// What the report promises to programs.
const REPORT_KEYS: &[&str] = &[
    "outcome",
    "total_ms",
    "downtime_ms",
    "downtime",
    "rounds",
    "channels",
    "memory_bytes",
    "sent_bytes",
    "zero_bytes",
    "goodput_mib_s",
    "cpu_sender_s",
    "cpu_receiver_s",
    "digest_equal",
    "guest_check",
    "error",
];

/// Starts `multifd-send` with a small guest, but for what `arguments` say of it.
fn send(arguments: &[&str]) -> Process {
    let small = SMALL.iter().filter(|[flag, _]| !arguments.contains(flag));
    let all: Vec<&str> = small.flatten().chain(arguments).copied().collect();
    Process::start("multifd-send", &all)
}

/// Starts it with a guest that is moved in any case: a host that is busy with other tests is slower than the guest.
fn move_it(arguments: &[&str]) -> Process {
    send(&[arguments, &["--if-not-converging", "switch"]].concat())
}

fn send_loopback(arguments: &[&str]) -> Ended {
    send(&[&["--loopback", "--report", "json"], arguments].concat()).end()
}

/// The same with [`move_it`].
fn moved(arguments: &[&str]) -> Ended {
    move_it(&[&["--loopback", "--report", "json"], arguments].concat()).end()
}

fn assert_migrated(ended: &Ended) -> Value {
    let report = ended.report();
    assert_eq!(ended.status, Some(0), "{ended}");
    assert_eq!(report["outcome"], "migrated", "{ended}");
    assert_eq!(report["digest_equal"], true, "{ended}");
    assert_eq!(report["guest_check"], "passed", "{ended}");
    assert!(report["error"].is_null(), "{ended}");
    assert!(report["source_guest_runs"].is_null(), "{ended}");
    report
}

/// The guest stayed: it was seen running at the source, and never ran at the destination.
fn assert_stayed(ended: &Ended, status: i32, outcome: &str, code: &str) -> Value {
    let report = ended.report();
    assert_eq!(ended.status, Some(status), "{ended}");
    assert_eq!(report["outcome"], outcome, "{ended}");
    assert_eq!(report["source_guest_runs"], true, "{ended}");
    assert_eq!(report["error"]["code"], code, "{ended}");
    assert!(report["guest_check"].is_null(), "{ended}");
    assert!(
        report["receiver"].is_null() || report["receiver"]["outcome"] == "failed",
        "{ended}"
    );
    report
}

// ── what is printed ──────────────────────────────────────────────────────────────────────────────────────────────────────

#[test]
fn the_json_report_is_one_object_with_every_promised_key_and_plausible_figures() {
    let ended = moved(&["--channels", "3"]);
    let report = assert_migrated(&ended);
    for key in REPORT_KEYS {
        assert!(report.get(key).is_some(), "no {key} in {report}");
    }
    let number = |key: &str| {
        report[key]
            .as_f64()
            .unwrap_or_else(|| panic!("{key} is no number: {report}"))
    };
    assert_eq!(report["memory_bytes"], 64 << 20);
    assert_eq!(report["channels"], 3);
    assert!(number("rounds") >= 2.0, "{report}");
    assert_eq!(
        report["round_list"].as_array().map(Vec::len),
        Some(number("rounds") as usize)
    );
    // A quarter of what the guest does not write is zero, and every page was sent at least once, in one way or the other.
    let zero = number("zero_bytes") + number("left_out_bytes");
    assert!(zero > 8e6 && zero < 17e6, "{report}");
    assert!(
        number("content_bytes") + number("zero_bytes") + number("left_out_bytes")
            >= number("memory_bytes"),
        "{report}"
    );
    assert!(
        number("sent_bytes") > number("content_bytes"),
        "heads are not free: {report}"
    );
    assert!(
        number("total_ms") > number("downtime_ms") && number("downtime_ms") > 0.0,
        "{report}"
    );
    assert!(
        number("goodput_mib_s") > 0.0
            && number("cpu_sender_s") > 0.0
            && number("cpu_receiver_s") > 0.0,
        "{report}"
    );
    let parts = report["downtime"].as_object().expect("its parts");
    let sum: f64 = parts
        .iter()
        .filter(|(part, _)| *part != "load_ms")
        .filter_map(|(_, ms)| ms.as_f64())
        .sum();
    assert!(
        (sum - number("downtime_ms")).abs() < 1.0,
        "the parts make {sum}: {report}"
    );
    assert_eq!(report["receiver"]["digest"], report["digest"], "{report}");
}

#[test]
fn the_text_report_is_for_people() {
    let ended = move_it(&["--loopback"]).end();
    assert_eq!(ended.status, Some(0), "{ended}");
    for line in [
        "migrated: the guest runs at the destination",
        "  total        ",
        " over 4 channels",
        "  downtime     ",
        "  memory       64.0 MiB",
        "  goodput      ",
        "  CPU          ",
        "  round 0      64.0 MiB in ",
        " on both sides",
        "  guest check  passed",
    ] {
        assert!(ended.output.contains(line), "no {line:?} in {ended}");
    }
    assert!(
        ended.errors.contains("guest: ") && ended.errors.contains("moving it to process "),
        "{ended}"
    );
    assert!(
        !ended.output.contains('\x1b') && !ended.errors.contains("\x1b["),
        "no terminal, no colours: {ended}"
    );
}

#[test]
fn two_programs_on_a_tcp_address_tell_both_users() {
    let receiver = Process::start(
        "multifd-receive",
        &[
            "--listen",
            "127.0.0.1:0",
            "--run-for",
            "100ms",
            "--report",
            "json",
        ],
    );
    let address = receiver.announced();
    let sent = move_it(&["--connect", &address, "--report", "json", "--quiet"]).end();
    let received = receiver.end();
    assert_eq!(sent.status, Some(0), "{sent}");
    let (report, theirs) = (sent.report(), received.report());
    assert_eq!(report["outcome"], "migrated", "{sent}");
    // The sender of two programs does not see the other's check; the receiver's own report has it.
    assert!(
        report["guest_check"].is_null() && report["receiver"].is_null(),
        "{sent}"
    );
    assert_eq!(received.status, Some(0), "{received}");
    assert_eq!(theirs["outcome"], "running", "{received}");
    assert_eq!(theirs["guest_check"], "passed", "{received}");
    assert_eq!(theirs["digest"], report["digest"], "{sent}\n{received}");
    assert!(theirs["guest_beats"].as_u64() > Some(0), "{received}");
}

#[test]
fn two_programs_on_a_unix_socket() {
    let path = std::env::temp_dir().join(format!("multifd-programs-{}.sock", std::process::id()));
    let address = format!("unix:{}", path.display());
    let receiver = Process::start(
        "multifd-receive",
        &[
            "--listen",
            &address,
            "--run-for",
            "100ms",
            "--report",
            "json",
        ],
    );
    assert_eq!(receiver.announced(), address);
    let sent = move_it(&["--connect", &address, "--report", "json", "--channels", "2"]).end();
    let received = receiver.end();
    assert_eq!(sent.status, Some(0), "{sent}");
    assert_eq!(sent.report()["outcome"], "migrated", "{sent}");
    assert_eq!(received.report()["guest_check"], "passed", "{received}");
    assert!(!path.exists(), "the receiver left its socket behind");
}

// ── guests of every kind ─────────────────────────────────────────────────────────────────────────────────────────────────

#[test]
fn an_idle_guest_moves_and_its_heart_beats_on() {
    let report = assert_migrated(&moved(&["--dirty-rate", "0"]));
    assert!(
        report["receiver"]["guest_beats"].as_u64() > Some(0),
        "{report}"
    );
    assert!(report["rounds"].as_u64() <= Some(3), "{report}");
}

#[test]
fn a_guest_tracked_by_the_log_moves() {
    if kvm_or_skip("a_guest_tracked_by_the_log_moves") {
        let report = assert_migrated(&moved(&["--tracking", "log"]));
        assert_eq!(report["sources"][0]["name"], "kvm-log", "{report}");
    }
}

#[test]
fn a_guest_tracked_by_the_ring_moves() {
    if kvm_or_skip("a_guest_tracked_by_the_ring_moves") {
        let report = assert_migrated(&moved(&["--tracking", "ring"]));
        assert_eq!(report["sources"][0]["name"], "kvm-ring", "{report}");
    }
}

#[test]
fn a_guest_without_kvm_moves() {
    for (tracking, name, way) in [
        ("process", "process", "found by userfaultfd"),
        (
            "marks",
            "process-marks",
            "found by the writing threads themselves",
        ),
    ] {
        let ended = moved(&["--tracking", tracking]);
        let report = assert_migrated(&ended);
        assert_eq!(report["sources"][0]["name"], name, "{report}");
        assert!(ended.errors.contains("guest: process"), "{ended}");
        assert!(ended.errors.contains(way), "{ended}");
    }
}

#[test]
fn the_debug_scan_names_what_a_device_wrote_behind_everybodys_back() {
    if !kvm_or_skip("the_debug_scan_names_what_a_device_wrote_behind_everybodys_back") {
        return;
    }
    let report = assert_migrated(&moved(&["--debug-dirty-scan", "--guest-device", "dma"]));
    assert!(
        report["dirty_scan_ms"].as_f64().is_some_and(|ms| ms > 0.0),
        "{report}"
    );
    let ended = moved(&["--debug-dirty-scan", "--guest-device", "dma-unreported"]);
    let report = assert_stayed(&ended, 1, "failed", "sender.tracking.unreported");
    let text = report["error"]["text"].as_str().unwrap_or_default();
    assert!(
        text.contains("changed and no source reported") && text.contains("region 0 page"),
        "{ended}"
    );
}

#[test]
fn a_device_without_kvm_is_refused_with_the_reason() {
    let ended = send_loopback(&["--tracking", "process", "--guest-device", "dma"]);
    assert_eq!(ended.status, Some(1), "{ended}");
    assert!(
        ended.errors.contains("threads of a process have no device"),
        "{ended}"
    );
}

#[test]
fn a_sequential_guest_of_one_vcpu_moves_over_one_channel() {
    let report = assert_migrated(&moved(&[
        "--pattern",
        "sequential",
        "--vcpus",
        "1",
        "--channels",
        "1",
    ]));
    assert_eq!(report["channels"], 1);
}

#[test]
fn the_largest_numbers_that_are_taken_end_no_program() {
    let receiver = Process::start(
        "multifd-receive",
        &[
            "--listen",
            "127.0.0.1:0",
            "--report",
            "json",
            "--run-for",
            "24h",
            "--max-memory",
            "18446744073709551615",
            "--stall",
            "1h",
            "--suspend",
            "1h",
            "--hello-deadline",
            "10min",
        ],
    );
    let address = receiver.announced();
    let sent = move_it(&[
        "--connect",
        &address,
        "--report",
        "json",
        "--bandwidth",
        "18446744073709551615",
        "--max-rounds",
        "3",
        "--stall",
        "1h",
        "--reconnect-deadline",
        "1h",
        "--ack-deadline",
        "1h",
        "--device-deadline",
        "1h",
        "--downtime-limit",
        "1h",
        "--seed",
        "18446744073709551615",
        "--dirty-rate",
        "18446744073709551615B/s",
        "--rdma-registration",
        "18446744073709551615",
    ])
    .end();
    assert_eq!(sent.status, Some(0), "{sent}");
    // The guest is there and stays for a day, unless somebody is in a hurry.
    receiver.interrupt();
    let received = receiver.end();
    assert_eq!(received.status, Some(0), "{received}");
    assert_eq!(received.report()["guest_check"], "passed", "{received}");
}

#[test]
fn a_guest_that_was_paused_arrives_paused_and_whole() {
    let ended = moved(&["--start-paused"]);
    let report = assert_migrated(&ended);
    assert_eq!(report["guest_paused"], true, "{ended}");
    assert_eq!(report["receiver"]["guest_paused"], true, "{ended}");
    assert_eq!(
        report["receiver"]["guest_beats"], 0,
        "it never ran: {ended}"
    );
}

#[test]
fn a_user_may_switch_over_now_whatever_the_forecast_says() {
    let sender = send(&[
        "--loopback",
        "--report",
        "json",
        "--bandwidth",
        "20MB/s",
        "--dirty-rate",
        "100MB/s",
        "--downtime-limit",
        "1ms",
        "--max-rounds",
        "1000",
    ]);
    let _ = sender.wait_for("the destination is ready");
    sender.switch_over();
    let ended = sender.end();
    let report = assert_migrated(&ended);
    assert!(
        report["downtime_ms"].as_f64().is_some_and(|ms| ms > 1.0),
        "{report}"
    );
}

// ── migrations that do not happen ────────────────────────────────────────────────────────────────────────────────────────

/// Round 0 alone takes many seconds.
const SLOW: &[&str] = &["--bandwidth", "4M"];

#[test]
fn ctrl_c_cancels_and_the_guest_runs_on() {
    let sender = send(&[SLOW, &["--loopback", "--report", "json"]].concat());
    let _ = sender.wait_for("moving it to process ");
    std::thread::sleep(Duration::from_millis(300));
    let (asked, host) = (Instant::now(), Host::watch());
    // As a terminal does: to the program and to all that it started.
    sender.interrupt();
    let ended = sender.end();
    assert!(
        asked.elapsed() < Duration::from_secs(8) + host.delayed(),
        "{:?}: {ended}",
        asked.elapsed()
    );
    let report = assert_stayed(&ended, 3, "cancelled", "sender.cancelled");
    // The receiver was told, and did not just lose its channel.
    assert_eq!(
        report["receiver"]["error"]["code"], "receiver.peer.aborted",
        "{ended}"
    );
}

#[test]
fn ctrl_c_before_the_migration_begins_cancels_it_as_well() {
    let sender = send(&["--loopback", "--report", "json", "--warm-up", "30s"]);
    let _ = sender.wait_for("guest: ");
    sender.interrupt();
    let ended = sender.end();
    assert_stayed(&ended, 3, "cancelled", "sender.cancelled");
    assert!(ended.took < Duration::from_secs(20), "{ended}");
}

#[test]
fn the_receiver_of_a_loopback_ends_with_its_sender() {
    let mut sender = send(&["--loopback", "--warm-up", "30s"]);
    let _ = sender.wait_for("guest: ");
    let receivers = sender.children();
    assert_eq!(receivers.len(), 1, "{receivers:?}");
    sender.kill();
    let _ = sender.end();
    let killed = Instant::now();
    while receivers[0].is_alive() {
        assert!(
            killed.elapsed() < PATIENCE,
            "the receiver lives on, and nobody knows of it"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_guest_that_is_too_busy_stays_and_the_error_says_what_would_help() {
    let ended = send_loopback(&[
        "--dirty-rate",
        "100M",
        "--bandwidth",
        "32M",
        "--max-rounds",
        "4",
        "--downtime-limit",
        "100ms",
    ]);
    let report = assert_stayed(&ended, 1, "failed", "sender.not-converging");
    assert_eq!(report["error"]["phase"], "rounds", "{ended}");
    assert_eq!(report["rounds"], 4, "{ended}");
    let text = report["error"]["text"].as_str().expect("a text");
    for advice in [
        "MiB/s would make it converge",
        "% of the guest's writes",
        "a limit of",
    ] {
        assert!(text.contains(advice), "no {advice:?} in {text}");
    }
}

#[test]
fn a_guest_that_is_too_busy_is_switched_over_if_the_user_wants_that() {
    let ended = send_loopback(&[
        "--dirty-rate",
        "100M",
        "--bandwidth",
        "32M",
        "--max-rounds",
        "3",
        "--downtime-limit",
        "100ms",
        "--if-not-converging",
        "switch",
    ]);
    let report = assert_migrated(&ended);
    assert!(
        report["downtime_ms"].as_f64() > Some(100.0),
        "else it did converge: {ended}"
    );
}

#[test]
fn a_receiver_that_does_not_take_so_much_memory_refuses_and_the_guest_runs_on() {
    let (receiver, address) = Process::receiver(&["--max-memory", "32M"]);
    let sent = send(&["--connect", &address, "--report", "json"]).end();
    let received = receiver.end();
    let report = assert_stayed(&sent, 1, "failed", "sender.peer.aborted");
    let text = report["error"]["text"].as_str().expect("a text");
    assert!(
        text.contains("33554432") || text.contains("memory"),
        "{text}"
    );
    assert_eq!(received.status, Some(1), "{received}");
    assert_eq!(received.report()["outcome"], "failed", "{received}");
}

#[test]
fn ctrl_c_at_the_receiver_leaves_the_guest_to_the_source() {
    let (receiver, address) = Process::receiver(&[]);
    let sender = send(&[SLOW, &["--connect", &address, "--report", "json"]].concat());
    let _ = receiver.wait_for("lane open");
    std::thread::sleep(Duration::from_millis(200));
    receiver.interrupt();
    let (received, sent) = (receiver.end(), sender.end());
    assert_stayed(&sent, 1, "failed", "sender.peer.aborted");
    assert_eq!(received.status, Some(1), "{received}");
    assert_eq!(
        received.report()["error"]["code"],
        "receiver.cancelled",
        "{received}"
    );
}

#[test]
fn how_a_migration_ended_can_be_asked_after_its_sender_was_killed() {
    let (receiver, address) = Process::receiver(&["--suspend", "20s"]);
    let folder = std::env::temp_dir().join(format!("multifd-ask-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let file = folder.join("state");
    let file = file.to_str().expect("UTF-8");
    let slow = [
        "--connect",
        &address,
        "--bandwidth",
        "8M",
        "--state-file",
        file,
    ];
    let mut sender = send(&slow);
    let since = Instant::now();
    while !std::path::Path::new(file).exists() {
        assert!(since.elapsed() < PATIENCE, "no state file was written");
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(300));
    sender.kill();
    let _ = sender.end();
    let ask = Process::start("multifd-send", &["--ask", file, "--report", "json"]).end();
    assert_eq!(ask.status, Some(1), "{ask}");
    assert_eq!(ask.report()["outcome"], "not-committed", "{ask}");
    // The question has ended it there.
    let ended = receiver.end();
    assert_eq!(ended.status, Some(1), "{ended}");
    // Nobody is there any more: unknown. A sender does not overwrite what may still be needed.
    let later = ["--ask", file, "--reconnect-deadline", "300ms"];
    assert_eq!(Process::start("multifd-send", &later).end().status, Some(4));
    let (receiver, address) = Process::receiver(&[]);
    let again = send(&["--connect", &address, "--state-file", file]).end();
    assert_eq!(again.status, Some(1), "{again}");
    assert!(again.to_string().contains("--ask"), "{again}");
    assert_eq!(receiver.end().status, Some(1));
    // One that ends well leaves none behind.
    std::fs::remove_file(file).expect("it is left");
    let (receiver, address) = Process::receiver(&[]);
    let well = move_it(&["--connect", &address, "--state-file", file]).end();
    assert_eq!(well.status, Some(0), "{well}");
    assert_eq!(receiver.end().status, Some(0));
    std::fs::remove_dir(&folder).expect("an empty folder");
}
