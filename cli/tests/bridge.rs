//! The two programs as a bridge between real QEMUs, and killed at any moment. SKIPPED where there is no QEMU (see docs/bridge.md).
#![allow(clippy::print_stdout, reason = "a test that is skipped says so")]

#[path = "../../bridge/tests/qemu/link.rs"]
#[allow(dead_code, reason = "shared with the bridge's own tests")]
mod link;
#[path = "../../bridge/tests/qemu/machine.rs"]
#[allow(dead_code, reason = "shared with the bridge's own tests")]
mod machine;

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use link::Link;
use machine::{Machine, Program};
use serde_json::{Value, json};

/// A program, killed when it is dropped.
struct Bridge(Child);

impl Bridge {
    fn start(program: &str, arguments: &[&str]) -> Self {
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        Self(child)
    }

    /// A line that it says on standard error.
    fn line(&mut self) -> String {
        let mut line = String::new();
        let stderr = self.0.stderr.take().expect("a pipe");
        let mut reader = BufReader::new(stderr);
        reader.read_line(&mut line).expect("it speaks");
        // The rest is for whoever reads the test's output.
        std::thread::spawn(move || {
            for line in reader.lines().map_while(Result::ok) {
                println!("{line}");
            }
        });
        line
    }

    fn report(&mut self) -> (Option<i32>, Value) {
        let mut text = String::new();
        let mut stdout = self.0.stdout.take().expect("a pipe");
        stdout.read_to_string(&mut text).expect("UTF-8");
        let status = self.0.wait().expect("it ends").code();
        (status, serde_json::from_str(&text).unwrap_or_default())
    }

    fn kill(&mut self) {
        self.0.kill().expect("it runs");
        self.0.wait().expect("it ends");
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Setting {
    src: Machine,
    dst: Machine,
    send: Bridge,
    receive: Bridge,
    link: Link,
    folder: PathBuf,
}

impl Drop for Setting {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn setting(test: &str) -> Option<Setting> {
    let Some(program) = Program::find() else {
        println!("SKIPPED {test}: qemu-system-x86_64 is missing (set MULTIFD_QEMU)");
        return None;
    };
    let folder = std::env::temp_dir().join(format!("mfd-{}-{test}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    machine::firmware(&folder);
    let mut src = Machine::start(&program, &folder, "src", &[]);
    let mut dst = Machine::start(&program, &folder, "dst", &["-incoming", "defer"]);
    for machine in [&mut src, &mut dst] {
        let capabilities = json!([{ "capability": "return-path", "state": true }]);
        machine.run(
            "migrate-set-capabilities",
            json!({ "capabilities": capabilities }),
        );
    }
    src.run(
        "migrate-set-parameters",
        json!({ "max-bandwidth": 0, "downtime-limit": 1000 }),
    );
    dst.run(
        "migrate-incoming",
        json!({ "uri": uri(&folder, "in.sock") }),
    );
    let mut receive = Bridge::start(
        env!("CARGO_BIN_EXE_multifd-receive"),
        &[
            "--bridge",
            &uri(&folder, "in.sock"),
            "--listen",
            "127.0.0.1:0",
            "--report",
            "json",
        ],
    );
    let line = receive.line();
    let port = line
        .split("127.0.0.1:")
        .nth(1)
        .and_then(|rest| rest.split(',').next());
    let port: u16 = port.and_then(|port| port.parse().ok()).expect(&line);
    let link = Link::to(port);
    let mut send = Bridge::start(
        env!("CARGO_BIN_EXE_multifd-send"),
        &[
            "--bridge",
            &uri(&folder, "out.sock"),
            "--connect",
            &format!("127.0.0.1:{}", link.port),
            "--report",
            "json",
            "--bridge-outage",
            "3s",
        ],
    );
    assert!(send.line().contains("may migrate"));
    src.wait_until_it_writes(4);
    Some(Setting {
        src,
        dst,
        send,
        receive,
        link,
        folder,
    })
}

fn uri(folder: &Path, name: &str) -> String {
    format!("unix:{}", folder.join(name).display())
}

impl Setting {
    fn migrate(&mut self) {
        let uri = uri(&self.folder, "out.sock");
        self.src.run("migrate", json!({ "uri": uri }));
    }

    /// Waits until the source's QEMU has stopped the guest, and the destination's does not run it yet.
    fn wait_until_stopped(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.src.is_running() == Some(true) {
            assert!(Instant::now() < deadline, "it never stops");
        }
    }

    /// Waits until exactly one guest runs, and looks for a while whether it stays so: never two.
    fn one_runs(&mut self) -> &'static str {
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut since = None;
        loop {
            let (here, there) = (self.src.is_running(), self.dst.is_running());
            assert!(
                !(here == Some(true) && there == Some(true)),
                "the guest runs twice"
            );
            let now = (here == Some(true), there == Some(true));
            if since.is_some_and(|(_, before)| before != now) {
                since = None;
            }
            if now.0 != now.1 {
                let (first, _) = *since.get_or_insert((Instant::now(), now));
                if first.elapsed() > Duration::from_secs(3) {
                    return if now.0 { "source" } else { "destination" };
                }
            }
            assert!(Instant::now() < deadline, "nobody runs the guest");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn the_programs_carry_a_migration_and_report_it() {
    let Some(mut setting) = setting("programs") else {
        return;
    };
    setting.migrate();
    setting.wait_until_stopped();
    assert_eq!(setting.one_runs(), "destination");
    for bridge in [&mut setting.send, &mut setting.receive] {
        let (status, report) = bridge.report();
        assert_eq!(
            (status, &report["outcome"]),
            (Some(0), &json!("migrated")),
            "{report}"
        );
    }
    setting.dst.stop_and_check();
}

#[test]
fn killing_the_source_while_memory_travels_leaves_the_guest_there() {
    let Some(mut setting) = setting("kill-early") else {
        return;
    };
    setting.link.limit(30 << 20);
    setting.migrate();
    std::thread::sleep(Duration::from_millis(300));
    setting.send.kill();
    assert_eq!(setting.one_runs(), "source");
    setting.src.stop_and_check();
}

#[test]
fn killing_the_source_after_the_guest_was_stopped_never_runs_it_twice() {
    let Some(mut setting) = setting("kill-late") else {
        return;
    };
    setting.link.limit(30 << 20);
    setting.migrate();
    setting.wait_until_stopped();
    // The last bytes are in the bridge, and on their way when it is killed.
    let link = setting.link.clone();
    link.limit(0);
    link.stand_still(Duration::from_millis(500));
    setting.send.kill();
    let place = setting.one_runs();
    println!("the guest runs at the {place}");
    if place == "source" {
        setting.src.stop_and_check();
    } else {
        setting.dst.stop_and_check();
    }
}

#[test]
fn killing_the_destination_while_memory_travels_leaves_the_guest_at_the_source() {
    let Some(mut setting) = setting("kill-destination") else {
        return;
    };
    setting.link.limit(30 << 20);
    setting.migrate();
    std::thread::sleep(Duration::from_millis(300));
    setting.receive.kill();
    assert_eq!(setting.one_runs(), "source");
    let (status, report) = setting.send.report();
    assert_eq!(
        (status, &report["outcome"]),
        (Some(1), &json!("failed")),
        "{report}"
    );
}
