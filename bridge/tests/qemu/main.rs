//! Real QEMUs over the bridge. SKIPPED where there is none: see `get` for one that needs no installing, and `MULTIFD_QEMU`.
//!
//! `cargo test -p multifd-bridge --test qemu` takes a minute; with `-- --include-ignored` everything is run.
#![allow(
    clippy::print_stdout,
    reason = "a test that is skipped says so, and reports are shown with --nocapture"
)]

mod link;
mod machine;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use link::Link;
use machine::{Machine, Program};
use multifd_bridge::destination::{self, Destination};
use multifd_bridge::source::{self, Source};
use multifd_bridge::{Config, Ended, MonitorAddress, Report};
use multifd_transport::{Address, ChannelOptions, Listener};
use serde_json::json;

/// Post-copy, and its own channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PostCopy {
    No,
    Plain,
    Preempt,
}

/// What a migration is like.
#[derive(Debug, Clone, Copy)]
struct Case {
    channels: u32,
    zstd: bool,
    post_copy: PostCopy,
    return_path: bool,
    lanes: u32,
}

const PLAIN: Case = Case {
    channels: 0,
    zstd: false,
    post_copy: PostCopy::No,
    return_path: true,
    lanes: 2,
};

/// Two QEMUs and two bridges.
struct Pair {
    src: Machine,
    dst: Machine,
    link: Link,
    stop: [Arc<AtomicBool>; 2],
    bridges: Option<(JoinHandle<Report>, JoinHandle<Report>)>,
    folder: PathBuf,
    case: Case,
}

fn program(test: &str) -> Option<Program> {
    let found = Program::find();
    if found.is_none() {
        println!("SKIPPED {test}: qemu-system-x86_64 is missing (set MULTIFD_QEMU)");
    }
    found
}

impl Pair {
    fn new(test: &str, program: &Program, case: Case, config: Config) -> Self {
        let _ = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_test_writer()
            .try_init();
        let folder = std::env::temp_dir().join(format!("mfd-{}-{test}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        machine::firmware(&folder);
        let mut src = Machine::start(program, &folder, "src", &[]);
        let mut dst = Machine::start(program, &folder, "dst", &["-incoming", "defer"]);
        for machine in [&mut src, &mut dst] {
            let mut capabilities = Vec::new();
            let mut on =
                |name: &str| capabilities.push(json!({ "capability": name, "state": true }));
            if case.return_path {
                on("return-path");
            }
            if case.channels > 0 {
                on("multifd");
            }
            if case.post_copy != PostCopy::No {
                on("postcopy-ram");
            }
            if case.post_copy == PostCopy::Preempt {
                on("postcopy-preempt");
            }
            machine.run(
                "migrate-set-capabilities",
                json!({ "capabilities": capabilities }),
            );
            if case.channels > 0 {
                let method = if case.zstd { "zstd" } else { "none" };
                let parameters =
                    json!({ "multifd-channels": case.channels, "multifd-compression": method });
                machine.run("migrate-set-parameters", parameters);
            }
        }
        src.run(
            "migrate-set-parameters",
            json!({ "max-bandwidth": 0, "downtime-limit": 300 }),
        );
        let uri = format!("unix:{}", folder.join("in.sock").display());
        dst.run("migrate-incoming", json!({ "uri": uri }));

        let any: Address = "tcp:127.0.0.1:0".parse().unwrap();
        let options = ChannelOptions::default();
        let listener = Listener::bind_with(&any, &options).unwrap();
        let Address::Tcp(at) = listener.local_address().clone() else {
            panic!("tcp");
        };
        let link = Link::to(at.port());
        let stop = [
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicBool::new(false)),
        ];
        let destination = Destination {
            monitor: MonitorAddress::Unix(folder.join("in.sock")),
            listeners: vec![listener],
            config: config.clone(),
        };
        let source = Source {
            listen: MonitorAddress::Unix(folder.join("out.sock")),
            control: format!("tcp:127.0.0.1:{}", link.port).parse().unwrap(),
            data: Vec::new(),
            lanes: case.lanes,
            options,
            config,
            keeper: None,
        };
        let (theirs, ours) = (Arc::clone(&stop[0]), Arc::clone(&stop[1]));
        let (tell, told) = std::sync::mpsc::channel();
        let bridges = (
            std::thread::spawn(move || {
                source::run(source, &theirs, || tell.send(()).unwrap()).unwrap()
            }),
            std::thread::spawn(move || destination::run(destination, &ours).unwrap()),
        );
        told.recv().unwrap();
        Self {
            src,
            dst,
            link,
            stop,
            bridges: Some(bridges),
            folder,
            case,
        }
    }

    fn migrate(&mut self) {
        self.src.wait_until_it_writes(4);
        let uri = format!("unix:{}", self.folder.join("out.sock").display());
        self.src.run("migrate", json!({ "uri": uri }));
        if self.case.post_copy != PostCopy::No {
            std::thread::sleep(Duration::from_millis(50));
            self.src.run("migrate-start-postcopy", json!({}));
        }
    }

    /// Waits until the source's migration is in one of these states.
    fn wait_for(&mut self, states: &[&str]) -> String {
        let deadline = Instant::now() + Duration::from_secs(90);
        loop {
            let state = self.src.migration();
            if states.contains(&state.as_str()) {
                return state;
            }
            assert!(
                Instant::now() < deadline,
                "the migration is still {state}; source: {} destination: {}",
                self.src.complaints(),
                self.dst.complaints()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn reports(&mut self) -> (Report, Report) {
        let (source, destination) = self.bridges.take().unwrap();
        (source.join().unwrap(), destination.join().unwrap())
    }

    /// The guest arrived, whole, runs there and not here.
    fn arrives(&mut self) -> (Report, Report) {
        let state = self.wait_for(&["completed", "failed"]);
        let (source, destination) = self.reports();
        let told = format!(
            "{state}\n{source:?}\n{destination:?}\n{}\n{}",
            self.src.complaints(),
            self.dst.complaints()
        );
        assert_eq!(state, "completed", "{told}");
        assert_eq!(source.outcome, Ended::Migrated, "{told}");
        assert_eq!(destination.outcome, Ended::Migrated, "{told}");
        assert_eq!(self.src.is_running(), Some(false), "{told}");
        assert_eq!(self.dst.is_running(), Some(true), "{told}");
        let at_source = machine::check(&self.src.memory());
        self.dst.wait_until_it_writes(at_source + 100);
        let at_destination = self.dst.stop_and_check();
        assert!(at_destination > at_source);
        (source, destination)
    }

    /// The guest runs at the source and not at the destination.
    fn stays(&mut self) -> (Report, Report) {
        let state = self.wait_for(&["completed", "failed", "cancelled"]);
        let (source, destination) = self.reports();
        let told = format!("{state}\n{source:?}\n{destination:?}");
        assert_ne!(state, "completed", "{told}");
        assert_eq!(self.src.is_running(), Some(true), "{told}");
        assert_ne!(self.dst.is_running(), Some(true), "{told}");
        self.src.stop_and_check();
        (source, destination)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        for stop in &self.stop {
            stop.store(true, Ordering::SeqCst);
        }
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn arrives(test: &str, case: Case) {
    let Some(program) = program(test) else { return };
    let mut pair = Pair::new(test, &program, case, Config::default());
    pair.migrate();
    let (source, destination) = pair.arrives();
    println!("{test}: {source:?}\n{destination:?}");
    assert_eq!(source.resumes, 0);
}

#[test]
fn a_guest_arrives() {
    arrives("plain", PLAIN);
}

#[test]
fn a_guest_arrives_over_two_channels() {
    arrives(
        "multifd2",
        Case {
            channels: 2,
            ..PLAIN
        },
    );
}

#[test]
#[ignore = "the long form"]
fn a_guest_arrives_over_one_channel_and_over_eight() {
    arrives(
        "multifd1",
        Case {
            channels: 1,
            ..PLAIN
        },
    );
    arrives(
        "multifd8",
        Case {
            channels: 8,
            ..PLAIN
        },
    );
    arrives(
        "multifd8-1",
        Case {
            channels: 8,
            lanes: 1,
            ..PLAIN
        },
    );
}

#[test]
#[ignore = "the long form"]
fn a_guest_arrives_compressed() {
    arrives(
        "zstd",
        Case {
            channels: 2,
            zstd: true,
            ..PLAIN
        },
    );
}

#[test]
fn a_guest_arrives_by_post_copy_with_its_own_channel() {
    arrives(
        "preempt",
        Case {
            post_copy: PostCopy::Preempt,
            ..PLAIN
        },
    );
}

#[test]
#[ignore = "the long form"]
fn a_guest_arrives_by_post_copy() {
    arrives(
        "postcopy",
        Case {
            post_copy: PostCopy::Plain,
            ..PLAIN
        },
    );
}

#[test]
fn a_migration_without_return_path_is_refused_and_the_guest_stays() {
    let test = "no-return-path";
    let Some(program) = program(test) else { return };
    let mut pair = Pair::new(
        test,
        &program,
        Case {
            return_path: false,
            ..PLAIN
        },
        Config::default(),
    );
    pair.migrate();
    let (source, _) = pair.stays();
    assert!(source.reason.unwrap().contains("return-path"));
}

#[test]
fn a_guest_arrives_although_the_link_is_cut_again_and_again() {
    let test = "cuts";
    let Some(program) = program(test) else { return };
    let mut pair = Pair::new(
        test,
        &program,
        Case {
            channels: 2,
            ..PLAIN
        },
        Config::default(),
    );
    pair.link.limit(60 << 20);
    pair.migrate();
    for cut in [0, 50, 500] {
        std::thread::sleep(Duration::from_millis(300));
        pair.link.cut(Duration::from_millis(cut));
    }
    pair.link.limit(0);
    let (source, destination) = pair.arrives();
    println!("{source:?}\n{destination:?}");
    assert!(source.resumes >= 2, "{source:?}");
}

#[test]
#[ignore = "the long form"]
fn a_guest_arrives_although_nothing_moves_for_five_seconds() {
    let test = "still";
    let Some(program) = program(test) else { return };
    let mut pair = Pair::new(
        test,
        &program,
        Case {
            channels: 2,
            ..PLAIN
        },
        Config::default(),
    );
    pair.link.limit(60 << 20);
    pair.migrate();
    std::thread::sleep(Duration::from_millis(300));
    pair.link.stand_still(Duration::from_secs(5));
    pair.link.limit(0);
    let (source, _) = pair.arrives();
    println!("{source:?}");
}

#[test]
fn a_guest_stays_when_the_link_is_gone_for_good_while_memory_travels() {
    let test = "gone";
    let Some(program) = program(test) else { return };
    let config = Config {
        outage: Duration::from_secs(2),
        remember: Duration::from_secs(5),
        ..Config::default()
    };
    let mut pair = Pair::new(test, &program, PLAIN, config);
    pair.link.limit(20 << 20);
    pair.migrate();
    std::thread::sleep(Duration::from_millis(500));
    assert!(pair.link.carried() > 0);
    pair.link.down();
    let (source, destination) = pair.stays();
    assert_eq!(source.outcome, Ended::Failed);
    assert_eq!(destination.outcome, Ended::Failed);
}

#[test]
fn a_cancelled_migration_leaves_the_guest_at_the_source() {
    let test = "cancel";
    let Some(program) = program(test) else { return };
    let mut pair = Pair::new(
        test,
        &program,
        Case {
            channels: 2,
            ..PLAIN
        },
        Config::default(),
    );
    pair.link.limit(20 << 20);
    pair.migrate();
    std::thread::sleep(Duration::from_millis(300));
    pair.src.run("migrate_cancel", json!({}));
    let (source, _) = pair.stays();
    assert_eq!(source.outcome, Ended::Cancelled);
}
