//! `multifd-shuttle`: a process that holds the built-in guest or nothing, and gives it away or takes it in as it is told.
//! A helper of `tests/soak.rs`, which moves one guest to and fro between two of these.
//!
//! One command a line on standard input, one JSON object a line on standard output:
//!
//! ```text
//!   create MIB MEGABYTES_A_SECOND kvm|process SEED   makes a guest here and runs it
//!   receive                     waits for a guest from now on                    { address }
//!   arrived                     waits until it is here                           the receiver's report
//!   send ADDRESS CHANNELS       moves the guest away                             the sender's report
//!   check                       waits for heart-beats, pauses, checks, runs on   { passed, text, counters }
//!   stats                       what this process holds                          { threads, descriptors, rss_kib }
//!   quit
//! ```
//! Each answer has `ok`; if that is false, `error` says why, and nothing else of the command has happened.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout)] // a program's business

use std::io::{BufRead as _, Write as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use multifd_guest::{Config, Fill, Guest, Tracking};
use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_tests::built_in::{Arriving, Leaving, Slot};
use multifd_transport::{Listener, TcpOptions};
use serde_json::{Value, json};

/// Longest wait for the heart-beats that show that an arrived guest runs: they come every few milliseconds.
const HEARTBEATS_MAX: Duration = Duration::from_secs(20);

fn main() {
    let mut shuttle = Shuttle::default();
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        let words: Vec<&str> = line.split_whitespace().collect();
        if words == ["quit"] {
            break;
        }
        let answer = match shuttle.obey(&words) {
            Ok(mut answer) => {
                answer["ok"] = json!(true);
                answer
            }
            Err(error) => json!({ "ok": false, "error": format!("{line}: {error:#}") }),
        };
        println!("{answer}");
        let _ = std::io::stdout().flush();
    }
}

#[derive(Default)]
struct Shuttle {
    guest: Option<Arc<Guest>>,
    expected: Option<(rx::Reception, Slot)>,
}

impl Shuttle {
    fn obey(&mut self, words: &[&str]) -> anyhow::Result<Value> {
        match words {
            ["create", mib, rate, kind, seed] => self.create(mib, rate, kind, seed),
            ["receive"] => self.receive(),
            ["arrived"] => self.arrived(),
            ["send", address, channels] => self.send(address, channels),
            ["check"] => self.check(),
            ["stats"] => stats(),
            _ => bail!("not a command"),
        }
    }

    fn create(&mut self, mib: &str, rate: &str, kind: &str, seed: &str) -> anyhow::Result<Value> {
        let memory_bytes = mib.parse::<u64>()? << 20;
        let config = Config {
            memory_bytes,
            vcpus: 2,
            working_set_bytes: memory_bytes / 4,
            dirty_rate_bytes_per_s: rate.parse::<u64>()? * 1_000_000,
            tracking: match kind {
                "kvm" => Tracking::Kvm,
                "process" => Tracking::Process,
                other => bail!("{other}: kvm or process"),
            },
            seed: seed.parse()?,
            fill: Fill {
                filled_percent: 100,
                zero_percent: 25,
            },
            ..Config::default()
        };
        let guest = Arc::new(Guest::create(&config)?);
        guest.run()?;
        let answer = json!({ "kind": guest.kind().to_string() });
        self.guest = Some(guest);
        Ok(answer)
    }

    fn receive(&mut self) -> anyhow::Result<Value> {
        if self.guest.is_some() || self.expected.is_some() {
            bail!("there is a guest here, or one is expected");
        }
        let listener = Listener::bind(&"127.0.0.1:0".parse()?, &TcpOptions::default())?;
        let address = listener.local_address().to_string();
        let slot = Slot::default();
        let reception = rx::Reception::start(rx::Parts {
            vmm: Box::new(Arriving::new(slot.clone())),
            listeners: vec![listener],
            config: rx::Config::default(),
            spawner: None,
        })
        .map_err(|failed| failed.error)?;
        self.expected = Some((reception, slot));
        Ok(json!({ "address": address }))
    }

    fn arrived(&mut self) -> anyhow::Result<Value> {
        let (reception, slot) = self.expected.take().context("no guest is expected")?;
        let finished = reception.wait();
        if let Some(error) = finished.error {
            bail!("[{}] {error}", error.code());
        }
        self.guest = Some(slot.get()?);
        Ok(serde_json::to_value(&finished.report)?)
    }

    fn send(&mut self, address: &str, channels: &str) -> anyhow::Result<Value> {
        let guest = self.guest.as_ref().context("there is no guest here")?;
        let config = tx::Config::builder().channels(channels.parse()?).build()?;
        let migration = tx::Migration::start(tx::Parts {
            vmm: Box::new(Leaving(Arc::clone(guest))),
            memory: guest.memory().to_channels(),
            sources: vec![guest.tracking_source()?],
            dial: Box::new(tx::Dialer {
                address: address.parse()?,
                options: TcpOptions::default().into(),
            }),
            config,
            spawner: None,
        })
        .map_err(|failed| failed.error)?;
        let finished = migration.wait();
        if let Some(error) = finished.error {
            bail!("[{}] {error}", error.code());
        }
        self.guest = None;
        Ok(serde_json::to_value(&finished.report)?)
    }

    fn check(&mut self) -> anyhow::Result<Value> {
        let guest = self.guest.as_ref().context("there is no guest here")?;
        let began = Instant::now();
        while guest.heartbeats().iter().any(|beat| beat.beats < 2) {
            if let Some(failure) = guest.failure() {
                bail!(failure);
            }
            if began.elapsed() > HEARTBEATS_MAX {
                bail!("its heart does not beat: {:?}", guest.heartbeats());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        guest.pause()?;
        let report = guest.check()?;
        let counters: Vec<u64> = guest.heartbeats().iter().map(|beat| beat.counter).collect();
        guest.run()?;
        Ok(json!({ "passed": report.passed(), "text": report.to_string(), "counters": counters }))
    }
}

/// Threads, open descriptors (without the one that counts them) and resident memory of this process.
fn stats() -> anyhow::Result<Value> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let number = |name: &str| -> anyhow::Result<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let line = line.with_context(|| format!("no {name} in /proc/self/status"))?;
        Ok(line.trim_end_matches("kB").trim().parse()?)
    };
    Ok(json!({
        "threads": number("Threads:")?,
        "descriptors": std::fs::read_dir("/proc/self/fd")?.count() - 1,
        "rss_kib": number("VmRSS:")?,
    }))
}
