//! What an interruption of a large migration costs, with real links: all of them down for some seconds, and one of four for good.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Args;
use multifd_tests::faults::net::{End, Network, remove_stale, what_is_missing};
use multifd_tests::programs::{Launch, Process};
use serde_json::Value;

const MIB: f64 = 1_048_576.0;

/// A link and a lane for each.
const PATHS: usize = 4;

/// What the sockets of the lanes hold, both ends: the window in flight.
const WINDOW: f64 = (PATHS * (4 << 20)) as f64;

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(300);

#[derive(Args)]
pub(crate) struct Outage {
    /// The guest's memory, in MiB.
    #[arg(long, default_value_t = 1024)]
    memory: u64,
    /// How long all links are down, in milliseconds.
    #[arg(long, default_value_t = 5000)]
    cut: u64,
    /// Cap on the bandwidth, in MiB/s.
    #[arg(long, default_value_t = 256)]
    bandwidth: u64,
    /// What the guest writes, in MiB/s.
    #[arg(long, default_value_t = 20)]
    dirty_rate: u64,
    /// Longest silence of a channel, in milliseconds, for both programs. Default: theirs.
    #[arg(long)]
    stall: Option<u64>,
    /// Undisturbed runs, and runs with one link cut.
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Hold only the bounds that do not depend on how busy the host is.
    #[arg(long)]
    busy: bool,
}

struct Run {
    report: Value,
    /// From the return of the links until the rounds went on.
    back: Option<Duration>,
}

impl Run {
    fn figure(&self, key: &str) -> f64 {
        self.report[key].as_f64().unwrap_or_default()
    }

    fn tell(&self, name: &str) {
        println!(
            "{name:<28} {:7.3} s, {:7.1} MiB sent, {:5.2} MiB of it again, {} lanes lost, {} opened again, {} suspensions of {:.3} s, longest pause {:.3} s, downtime {:.0} ms",
            self.figure("total_ms") / 1e3,
            self.figure("sent_bytes") / MIB,
            self.figure("sent_again_bytes") / MIB,
            self.report["channels_lost"],
            self.report["channels_reopened"],
            self.report["suspensions"],
            self.figure("suspended_ms") / 1e3,
            self.figure("longest_pause_ms") / 1e3,
            self.figure("downtime_ms"),
        );
    }
}

impl Outage {
    pub(crate) fn run(&self) -> anyhow::Result<bool> {
        remove_stale();
        if let Some(missing) = what_is_missing() {
            println!("SKIPPED outage: {missing}");
            return Ok(true);
        }
        let network = Network::new("outage", PATHS)?;
        let mut bad = Vec::new();
        let mut must = |holds: bool, what: String| {
            if !holds {
                println!("    NOT MET: {what}");
                bad.push(what);
            }
        };
        let mut plain = Vec::new();
        for _ in 0..self.runs {
            let run = self.migrate(&network, |_| Ok(None))?;
            run.tell("undisturbed");
            plain.push(run.figure("total_ms"));
        }
        let cut = self.migrate(&network, |source| {
            network.take_all_down(End::Destination)?;
            std::thread::sleep(Duration::from_millis(self.cut));
            network.bring_up()?;
            let up = Instant::now();
            // A connection that was given up is dialled again; one that was not needs no word.
            let lost = source.said("link lost: dialling again");
            let line = lost.then(|| source.wait_for_line_within("the migration goes on", PATIENCE));
            Ok(line.flatten().map(|_| up.elapsed()))
        })?;
        cut.tell("all links down");
        let again = cut.figure("sent_again_bytes");
        let bound = self.memory as f64 * MIB / 100.0 + WINDOW;
        must(
            again <= bound,
            format!(
                "{:.1} MiB were sent again, of at most {:.1}",
                again / MIB,
                bound / MIB
            ),
        );
        match cut.back {
            Some(back) => {
                println!(
                    "    the rounds went on {:.3} s after the links were up",
                    back.as_secs_f64()
                );
                must(
                    self.busy || back < Duration::from_secs(1),
                    format!("back after {back:?}, of at most 1 s"),
                );
            }
            // Shorter than a stall: the connections lived through it.
            None => {
                let back = cut.figure("longest_pause_ms") - self.cut as f64;
                println!(
                    "    no connection was lost; something landed {:.3} s after the links were up",
                    back / 1e3
                );
                must(
                    self.busy || back < 1e3,
                    format!("back after {back:.0} ms, of at most 1 s"),
                );
            }
        }
        let mut lane = Vec::new();
        for _ in 0..self.runs {
            let run = self.migrate(&network, |_| {
                network.take_down(End::Destination, 2)?;
                Ok(None)
            })?;
            run.tell("one of four links down");
            let pause = run.figure("longest_pause_ms");
            must(
                self.busy || pause < 1e3,
                format!("a pause of {pause:.0} ms, of at most 1 s"),
            );
            lane.push(run.figure("total_ms"));
        }
        let median = |times: &mut Vec<f64>| {
            times.sort_by(f64::total_cmp);
            times.get(times.len() / 2).copied().unwrap_or_default()
        };
        let ratio = median(&mut lane) / median(&mut plain);
        println!("    median of total time to the undisturbed one's: {ratio:.3}");
        must(
            self.busy || ratio <= 1.35,
            format!("{ratio:.3} times as long, of at most 1.35"),
        );
        Ok(bad.is_empty())
    }

    /// A migration in which `disturb` happens in the middle of round 0.
    fn migrate(
        &self,
        network: &Network,
        disturb: impl FnOnce(&Process) -> anyhow::Result<Option<Duration>>,
    ) -> anyhow::Result<Run> {
        let stall = self.stall.map(|ms| format!("{ms}ms"));
        let stall: Vec<&str> = stall.iter().flat_map(|time| ["--stall", time]).collect();
        let destination = Launch::new("multifd-receive")
            .by(&network.inside(End::Destination))
            .arguments(&[
                "--listen",
                "0.0.0.0:4444",
                "--one-attempt",
                "--report",
                "json",
                "--run-for",
                "100ms",
            ])
            .arguments(&stall)
            .start();
        let _ = destination.announced();
        let addresses: Vec<String> = (0..network.paths())
            .map(|path| format!("{}:4444", Network::address(path)))
            .collect();
        let data: Vec<&str> = addresses
            .iter()
            .flat_map(|place| ["--data", place])
            .collect();
        let mib = |number: u64| format!("{number}M");
        let source = Launch::new("multifd-send")
            .by(&network.inside(End::Source))
            .arguments(&[
                "--connect",
                &addresses[0],
                "--channels",
                "4",
                "--report",
                "json",
            ])
            .arguments(&data)
            .arguments(&[
                "--memory",
                &mib(self.memory),
                "--working-set",
                &mib(self.memory / 2),
            ])
            .arguments(&[
                "--dirty-rate",
                &mib(self.dirty_rate),
                "--bandwidth",
                &mib(self.bandwidth),
            ])
            .arguments(&[
                "--zero-percent",
                "0",
                "--tracking",
                "process",
                "--downtime-limit",
                "500ms",
            ])
            .arguments(&stall)
            .start();
        // The progress is told every two seconds; with 1 GiB at 256 MiB/s this is half of round 0.
        source
            .wait_for_line_within("  round 0: ", PATIENCE)
            .context("round 0 was too short for the progress display: give more memory, or less bandwidth")?;
        let back = disturb(&source)?;
        let sent = source.end_within(PATIENCE).map_err(anyhow::Error::msg)?;
        network.restore()?;
        let received = destination
            .end_within(PATIENCE)
            .map_err(anyhow::Error::msg)?;
        let (report, theirs) = (sent.report(), received.report());
        ensure!(report["outcome"] == "migrated", "{sent}");
        ensure!(theirs["guest_check"] == "passed", "{received}");
        Ok(Run { report, back })
    }
}
