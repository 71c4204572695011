//! A migration that is watched and steered from outside, by its socket and `multifd-ctl`, with both programs confined as they are.

mod common;

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use multifd_control::client::Client;
use serde_json::{Value, json};

const SEND: &str = env!("CARGO_BIN_EXE_multifd-send");
const RECEIVE: &str = env!("CARGO_BIN_EXE_multifd-receive");
const CTL: &str = env!("CARGO_BIN_EXE_multifd-ctl");

/// For anything that has to come.
const PATIENCE: Duration = Duration::from_secs(120);

fn socket(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("multifd-{name}-{}.sock", std::process::id()))
}

fn start(program: &str, arguments: &[&str]) -> Child {
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program is built")
}

/// Kills a program that a test has left.
struct Running(Option<Child>);

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Running {
    fn end(mut self) -> Output {
        let mut child = self.0.take().unwrap();
        let began = Instant::now();
        while child.try_wait().unwrap().is_none() {
            assert!(began.elapsed() < PATIENCE, "it does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
        child.wait_with_output().unwrap()
    }
}

fn connect(path: &Path) -> Client {
    let began = Instant::now();
    loop {
        match Client::connect(path) {
            Ok(client) => return client,
            Err(error) => assert!(began.elapsed() < PATIENCE, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn until(client: &mut Client, like: impl Fn(&Value) -> bool) -> Value {
    let began = Instant::now();
    loop {
        let now = client.call("GetStatus", &json!({})).unwrap()["status"].take();
        if like(&now) {
            return now;
        }
        assert!(began.elapsed() < PATIENCE, "{now}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn ctl(path: &Path, arguments: &[&str]) -> Output {
    let mut all = vec![path.to_str().unwrap()];
    all.extend(arguments);
    common::run(CTL, &all)
}

fn done(path: &Path, arguments: &[&str]) -> String {
    let output = ctl(path, arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_source_is_watched_and_steered_until_it_is_switched_over_by_hand() {
    let path = socket("send");
    let at = format!("unix:{}", path.display());
    let running = Running(Some(start(
        SEND,
        &[
            "--loopback",
            "--control",
            &at,
            "--memory=96M",
            "--working-set=32M",
            "--dirty-rate=2M",
            "--bandwidth=8MB/s",
            "--downtime-limit=1ms",
            "--max-rounds=10000",
            "--report=json",
            "--quiet",
        ],
    )));
    let mut client = connect(&path);
    until(&mut client, |now| {
        now["phase"] == "rounds" && now["sent_bytes"].as_u64() > Some(0)
    });
    let mut watcher = start(CTL, &[path.to_str().unwrap(), "watch", "--json"]);
    let mut events = BufReader::new(watcher.stdout.take().unwrap()).lines();
    let first: Value = serde_json::from_str(&events.next().unwrap().unwrap()).unwrap();
    assert_eq!(first["event"], "started");

    let table = done(&path, &["status"]);
    assert!(
        table.contains("source") && table.contains("7.63 MiB/s"),
        "{table}"
    );
    let status: Value = serde_json::from_str(&done(&path, &["status", "--json"])).unwrap();
    assert_eq!(status["limits"]["bandwidth_cap_bytes_per_s"], 8_000_000);

    done(&path, &["set", "--bandwidth=4MB/s", "--throttle-limit=20%"]);
    until(&mut client, |now| {
        now["limits"]["bandwidth_cap_bytes_per_s"] == 4_000_000
    });
    done(&path, &["hold"]);
    until(&mut client, |now| now["limits"]["sending_held"] == true);
    done(&path, &["go-on"]);
    until(&mut client, |now| now["limits"]["sending_held"] == false);
    let refused = ctl(&path, &["set", "--max-rounds=0"]);
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("max rounds is 0"), "{said}");
    done(&path, &["set", "--bandwidth=0"]);
    until(&mut client, |now| {
        now["limits"]["bandwidth_cap_bytes_per_s"].is_null()
    });
    done(&path, &["switch-over"]);

    let output = running.end();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["outcome"], "migrated");
    let caps: Vec<_> = report["limits"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it["bandwidth_cap_bytes_per_s"].as_u64())
        .collect();
    assert_eq!(caps.first(), Some(&Some(8_000_000)));
    assert!(
        caps.contains(&Some(4_000_000)) && caps.last() == Some(&None),
        "{caps:?}"
    );

    let events: Vec<Value> = events
        .map(|line| serde_json::from_str(&line.unwrap()).unwrap())
        .collect();
    let names: Vec<&str> = events
        .iter()
        .map(|event| event["event"].as_str().unwrap())
        .collect();
    for name in ["limits", "round", "switchover", "forecast"] {
        assert!(names.contains(&name), "{name}: {names:?}");
    }
    assert_eq!(names.last(), Some(&"done"));
    assert_eq!(
        events.last().unwrap()["status"]["end"]["outcome"],
        "migrated"
    );
    assert_eq!(watcher.wait().unwrap().code(), Some(0));
    assert!(!path.exists(), "the socket goes with the program");
    assert_eq!(ctl(&path, &["status"]).status.code(), Some(3));
}

#[test]
fn a_destination_is_asked_and_cancelled_and_steers_nothing() {
    let path = socket("receive");
    let at = format!("unix:{}", path.display());
    let running = Running(Some(start(
        RECEIVE,
        &["--listen=127.0.0.1:0", "--control", &at, "--report=json"],
    )));
    drop(connect(&path));
    let table = done(&path, &["status"]);
    assert!(table.contains("destination"), "{table}");
    for command in [
        ["hold"].as_slice(),
        &["switch-over"],
        &["set", "--max-rounds=9"],
    ] {
        let refused = ctl(&path, command);
        assert_eq!(refused.status.code(), Some(1), "{command:?}");
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(said.contains("only the source"), "{said}");
    }
    done(&path, &["cancel"]);
    let output = running.end();
    assert_eq!(output.status.code(), Some(1));
    assert!(!path.exists());
}

#[test]
fn wrong_usage_is_told_and_completion_is_printed() {
    assert_eq!(common::run(CTL, &["status"]).status.code(), Some(2));
    assert_eq!(
        common::run(CTL, &["/nowhere.sock", "set"]).status.code(),
        Some(2)
    );
    assert_eq!(
        common::run(CTL, &["/nowhere.sock", "status"]).status.code(),
        Some(3)
    );
    let script = common::run(CTL, &["completion", "bash"]);
    assert_eq!(script.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&script.stdout).contains("go-on"));
    let both = common::run(SEND, &["--loopback", "--control", "somewhere"]);
    assert_eq!(both.status.code(), Some(2));
}
