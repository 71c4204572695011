//! Ends that are not asked for nicely: signals while the destination is silent, signals that come twice, a terminal that is closed.
//! Whatever comes, there is a report, and it says whose the guest is.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Far more than it takes: the host may be busy.
const PATIENCE: Duration = Duration::from_secs(30);

/// A guest that is there at once, and needs no KVM.
const GUEST: &[&str] = &[
    "--memory",
    "64M",
    "--working-set",
    "1M",
    "--warm-up",
    "0s",
    "--tracking",
    "marks",
    "--report",
    "json",
];

fn start(program: &str, arguments: &[&str]) -> Child {
    Command::new(program)
        .args(arguments)
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("cargo built it with this test")
}

fn send_to(address: &str) -> Child {
    let to = ["--connect", address];
    start(env!("CARGO_BIN_EXE_multifd-send"), &[&to, GUEST].concat())
}

/// By the tool that every Linux has: this package needs no other way to send one.
fn signal(child: &Child, names: &[&str]) {
    let id = child.id().to_string();
    for name in names {
        let sent = Command::new("kill")
            .args([&format!("-{name}"), &id])
            .status();
        assert!(sent.expect("kill is there").success());
    }
}

fn end(mut child: Child) -> Output {
    let asked = Instant::now();
    while child.try_wait().expect("it is our child").is_none() {
        if asked.elapsed() > PATIENCE {
            let _ = child.kill();
            panic!("it does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().expect("it has ended")
}

fn report(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// A place that takes connections and never says a word; the second value gives the next connection.
fn silent() -> (String, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback is there");
    let address = listener.local_addr().expect("bound").to_string();
    (address, listener)
}

#[test]
fn a_signal_while_the_destination_is_silent_cancels_within_a_moment() {
    for names in [
        &["TERM"][..],
        &["TERM", "TERM"],
        &["HUP"],
        &["INT", "INT", "TERM"],
    ] {
        let (address, listener) = silent();
        let sender = send_to(&address);
        // Its hello is here: it waits for an answer, which would take 5 s to be given up.
        let (mut peer, _) = listener.accept().expect("it dials");
        let mut hello = [0; 128];
        peer.read_exact(&mut hello).expect("its hello");
        let asked = Instant::now();
        signal(&sender, names);
        let output = end(sender);
        let took = asked.elapsed();
        assert_eq!(output.status.code(), Some(3), "{names:?}: {output:?}");
        let report = report(&output);
        assert_eq!(report["outcome"], "cancelled", "{report}");
        assert_eq!(report["error"]["code"], "sender.cancelled", "{report}");
        assert_eq!(report["source_guest_runs"], true, "{report}");
        assert!(
            took < Duration::from_secs(4),
            "as long as the deadline: {took:?}"
        );
    }
}

#[test]
fn no_number_of_signals_ends_a_receiver_without_a_report() {
    for names in [
        &["TERM", "TERM"][..],
        &["HUP", "HUP"],
        &["INT", "TERM", "HUP"],
    ] {
        let receiver = start(
            env!("CARGO_BIN_EXE_multifd-receive"),
            &["--listen", "127.0.0.1:0", "--report", "json"],
        );
        std::thread::sleep(Duration::from_millis(300));
        signal(&receiver, names);
        let output = end(receiver);
        assert_eq!(output.status.code(), Some(1), "{names:?}: {output:?}");
        assert_eq!(report(&output)["error"]["code"], "receiver.cancelled");
    }
}

#[test]
fn another_service_at_the_address_is_called_that() {
    for banner in [
        &b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n"[..],
        &[b'x'; 4096],
        b"",
    ] {
        let (address, listener) = silent();
        let sender = send_to(&address);
        let (mut peer, _) = listener.accept().expect("it dials");
        peer.write_all(banner).expect("it listens");
        drop(peer);
        let output = end(sender);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let report = report(&output);
        let said = report["error"]["text"].as_str().expect("a text");
        assert!(
            said.contains("no multifd-receive answers at")
                && said.contains(&address)
                && (said.contains("TLS") || said.contains("it began with")),
            "{said}"
        );
    }
}

#[test]
fn progress_for_programs_is_a_line_for_each_event_and_then_the_report() {
    let (receiver, sender) = (
        env!("CARGO_BIN_EXE_multifd-receive"),
        env!("CARGO_BIN_EXE_multifd-send"),
    );
    assert!(std::path::Path::new(receiver).exists());
    let arguments = [
        "--loopback",
        "--progress",
        "json",
        "--if-not-converging",
        "switch",
        "--bandwidth",
        "40MB/s",
    ];
    let output = end(start(sender, &[&arguments, GUEST].concat()));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).expect("each line is an object"))
        .collect();
    let (report, events) = lines.split_last().expect("at least the report");
    assert_eq!(report["outcome"], "migrated", "{report}");
    assert!(report.get("event").is_none(), "{report}");
    let named = |name: &str| events.iter().filter(|event| event["event"] == name).count();
    assert_eq!(named("started"), 1, "{text}");
    assert!(named("round") >= 1 && named("phase") >= 1, "{text}");
    // Round 0 takes more than a second at this bandwidth, and its end is known before it comes.
    assert!(
        events
            .iter()
            .any(|event| event["round"] == 0 && event["round_ends_in_ms"].is_u64()),
        "{text}"
    );
    let sent = |event: &Value| event["sent_bytes"].as_u64().expect("a number");
    assert!(
        events
            .windows(2)
            .all(|pair| sent(&pair[0]) <= sent(&pair[1])),
        "{text}"
    );
}

#[test]
fn a_cancelled_migration_claims_nothing_that_did_not_happen() {
    let (address, text) = {
        let sender = start(
            env!("CARGO_BIN_EXE_multifd-send"),
            &[
                "--loopback",
                "--memory",
                "64M",
                "--working-set",
                "1M",
                // A guest that writes tears a page at times, which is then rightly sent again.
                "--dirty-rate",
                "0",
                "--warm-up",
                "0s",
                "--tracking",
                "marks",
                "--bandwidth",
                "4MB/s",
                "--quiet",
            ],
        );
        std::thread::sleep(Duration::from_millis(1500));
        signal(&sender, &["INT"]);
        let output = end(sender);
        assert_eq!(output.status.code(), Some(3), "{output:?}");
        (
            output.stderr,
            String::from_utf8(output.stdout).expect("UTF-8"),
        )
    };
    assert!(
        text.contains("cancelled: the guest runs on here"),
        "{text} {address:?}"
    );
    assert!(!text.contains("sent again"), "no channel was lost: {text}");
    assert!(
        text.contains("round 0") && text.contains("broken off after"),
        "{text}"
    );
    assert!(!text.contains("(0 B/s"), "{text}");
}
