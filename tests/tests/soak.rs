//! One guest moves to and fro between two processes, many times, while it writes its memory: no migration fails, nothing of its
//! memory is lost, and neither process keeps a thread, a descriptor or memory of the migrations that are over.
//!
//! `cargo test` does 20 migrations. The long form does as many as it is told:
//!
//! ```sh
//! MULTIFD_SOAK=200 cargo test -p multifd-tests --test soak -- --nocapture
//! ```
//!
//! Channels (1 to 8) and the pauses between migrations are drawn from a seed that is printed; `MULTIFD_SEED=N` repeats them.
#![allow(clippy::print_stdout)] // what was measured is worth reading

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use multifd_tests::model::Random;
use multifd_tests::programs::{PATIENCE, kvm_or_skip, number_from_environment, seed};
use serde_json::Value;

const MEMORY_MIB: u64 = 64;

/// What the guest dirties, in MB a second.
const DIRTY_RATE: u64 = 50;

const CHANNELS_MAX: u64 = 8;

/// How much the resident memory of a process may grow from the first measurement to the last. A leak of one page's
/// worth of bookkeeping for each page of the guest (4 bytes each, 64 KiB a migration) would be over it in the long form;
/// the allocator's own unrest is under it.
const RSS_GROWTH_KIB_MAX: u64 = 8 << 10;

/// Longest wait for threads that have said their last word to be gone from the kernel's list as well.
const SETTLE: Duration = Duration::from_secs(3);

#[test]
fn a_kvm_guest_moves_to_and_fro_and_nothing_is_lost_or_kept() {
    if kvm_or_skip("a_kvm_guest_moves_to_and_fro_and_nothing_is_lost_or_kept") {
        move_to_and_fro("kvm", number_from_environment("MULTIFD_SOAK").unwrap_or(20));
    }
}

#[test]
fn a_process_guest_moves_to_and_fro_and_nothing_is_lost_or_kept() {
    move_to_and_fro("process", 20);
}

/// What a process holds while it does not hold the guest, or while it does: always the same of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    threads: u64,
    descriptors: u64,
    rss_kib: u64,
}

fn move_to_and_fro(kind: &str, migrations: u64) {
    let seed = seed();
    println!("{kind}: {migrations} migrations, MULTIFD_SEED={seed}");
    assert!(
        migrations >= 4 && migrations.is_multiple_of(2),
        "an even number, so that the guest is at home when the processes are compared"
    );
    let mut random = Random::new(seed);
    let mut shuttles = [Shuttle::start("A"), Shuttle::start("B")];
    shuttles[0].ask(&format!("create {MEMORY_MIB} {DIRTY_RATE} {kind} {seed}"));
    // From here on everything that a process makes once (arenas of the allocator, signal handlers) has been made.
    let first = 20.min(migrations / 2 / 2 * 2);
    let mut counters = Vec::new();
    let mut before = None;
    let mut figures = Figures::default();
    for number in 1..=migrations {
        let channels = 1 + random.below(CHANNELS_MAX);
        let (from, to) = if number % 2 == 1 { (0, 1) } else { (1, 0) };
        let address = shuttles[to].ask("receive")["address"].clone();
        let address = address.as_str().expect("an address");
        let sent = shuttles[from].ask(&format!("send {address} {channels}"));
        let received = shuttles[to].ask("arrived");
        let context =
            || format!("{kind} migration {number} of {migrations}, seed {seed}: {sent} {received}");
        assert_eq!(sent["outcome"], "migrated", "{}", context());
        assert_eq!(sent["digest_equal"], true, "{}", context());
        assert_eq!(received["outcome"], "running", "{}", context());
        assert_eq!(sent["digest"], received["digest"], "{}", context());
        figures.note(&sent);
        // Every time: a page lost in one migration could be written again before a later one.
        let check = shuttles[to].ask("check");
        assert_eq!(check["passed"], true, "{check} {}", context());
        let now: Vec<u64> = serde_json::from_value(check["counters"].clone()).expect("counters");
        assert!(
            counters.is_empty() || counters.iter().zip(&now).all(|(then, now)| now > then),
            "counters {counters:?} became {now:?}: {}",
            context()
        );
        counters = now;
        std::thread::sleep(Duration::from_millis(random.below(20)));
        if number == first {
            std::thread::sleep(Duration::from_millis(200)); // threads that are on their way out are not counted as the norm
            before = Some(shuttles.each_mut().map(|shuttle| shuttle.held()));
        }
        if number.is_multiple_of(20) {
            println!(
                "{kind} after {number}: {:?}",
                shuttles.each_mut().map(|shuttle| shuttle.held())
            );
        }
    }
    println!("{kind}: {figures}");
    let before = before.expect("measured on the way");
    for (shuttle, before) in shuttles.iter_mut().zip(before) {
        shuttle.assert_nothing_kept(before);
    }
    shuttles.into_iter().for_each(Shuttle::quit);
}

/// What the migrations took.
#[derive(Default)]
struct Figures {
    migrations: u64,
    rounds: u64,
    total_ms: f64,
    downtime_ms: f64,
    downtime_ms_max: f64,
}

impl Figures {
    fn note(&mut self, sent: &Value) {
        let downtime = sent["downtime_ms"].as_f64().expect("it was paused");
        self.migrations += 1;
        self.rounds += sent["rounds"].as_u64().expect("a number");
        self.total_ms += sent["total_ms"].as_f64().expect("a number");
        self.downtime_ms += downtime;
        self.downtime_ms_max = self.downtime_ms_max.max(downtime);
    }
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let each = |sum: f64| sum / self.migrations as f64;
        write!(
            f,
            "{} migrations of {:.0} ms and {:.1} rounds each, downtime {:.1} ms each, {:.1} at most",
            self.migrations,
            each(self.total_ms),
            each(self.rounds as f64),
            each(self.downtime_ms),
            self.downtime_ms_max
        )
    }
}

/// One `multifd-shuttle`.
struct Shuttle {
    name: &'static str,
    child: Child,
    input: ChildStdin,
    answers: Receiver<String>,
}

impl Shuttle {
    fn start(name: &'static str) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_multifd-shuttle"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("cargo built it with this test");
        let input = child.stdin.take().expect("piped");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let (sender, answers) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Self {
            name,
            child,
            input,
            answers,
        }
    }

    /// Gives a command and waits for its answer, which must be a good one.
    fn ask(&mut self, command: &str) -> Value {
        writeln!(self.input, "{command}").unwrap_or_else(|error| {
            panic!(
                "{} does not listen any more ({command}): {error}",
                self.name
            )
        });
        let line = match self.answers.recv_timeout(PATIENCE) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => panic!("{} is silent after {command:?}", self.name),
            Err(RecvTimeoutError::Disconnected) => panic!("{} died at {command:?}", self.name),
        };
        let answer: Value = serde_json::from_str(&line).expect("one JSON object a line");
        assert_eq!(answer["ok"], true, "{}: {}", self.name, answer["error"]);
        answer
    }

    fn held(&mut self) -> Held {
        let stats = self.ask("stats");
        let number = |key: &str| stats[key].as_u64().expect("a number");
        Held {
            threads: number("threads"),
            descriptors: number("descriptors"),
            rss_kib: number("rss_kib"),
        }
    }

    fn assert_nothing_kept(&mut self, before: Held) {
        let settled = |now: Held| {
            now.threads <= before.threads
                && now.descriptors <= before.descriptors
                && now.rss_kib <= before.rss_kib + RSS_GROWTH_KIB_MAX
        };
        let began = Instant::now();
        let mut now = self.held();
        while !settled(now) && began.elapsed() < SETTLE {
            std::thread::sleep(Duration::from_millis(20));
            now = self.held();
        }
        println!("process {}: {before:?} became {now:?}", self.name);
        assert!(
            settled(now),
            "process {} kept something: {before:?} became {now:?}",
            self.name
        );
    }

    fn quit(mut self) {
        writeln!(self.input, "quit").expect("it listens");
        assert!(self.child.wait().expect("it is our child").success());
    }
}

impl Drop for Shuttle {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
