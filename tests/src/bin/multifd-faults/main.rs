//! Real migrations with real faults: the two programs, links, processes, descriptors, memory, disks.
#![allow(clippy::print_stdout)] // A program speaks.

mod outage;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use multifd_tests::faults::net::{remove_stale, what_is_missing};
use multifd_tests::faults::play::{Played, Stage};
use multifd_tests::faults::table::{Ending, MOMENTS, Moment, Scenario, table};
use multifd_tests::model::Random;

/// Moves small guests with multifd-send and multifd-receive, in network namespaces and on loopback, and lets something fail each
/// time: a row of a table of fault × moment × kind of channel.
///
/// Links need root and iproute2; without them only the rows that need neither are played, and it says so.
/// Exit code 0: no guest was lost, doubled or changed, and each migration ended as the table says. 1: otherwise.
#[derive(Parser)]
#[command(name = "multifd-faults")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Print the table: how each row may end.
    Table,
    /// Rows drawn at random, each from its own seed.
    Series(Series),
    /// What an interruption of a large migration costs, in namespaces: all links down for some seconds, and one of four.
    Outage(outage::Outage),
}

#[derive(Args)]
struct Series {
    /// How many migrations.
    #[arg(long, default_value_t = 100)]
    count: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// So many at the same time, each in namespaces of its own.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Only rows whose name contains this, such as `reset/`, `/commit/tls` or `kill-source/devices/tcp+device`.
    #[arg(long, default_value = "")]
    only: String,
    /// Each row once, and not at random.
    #[arg(long, conflicts_with = "count")]
    each: bool,
    /// Begin no migration after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    at_most: Option<u64>,
    /// Without network namespaces, also where they can be had.
    #[arg(long)]
    loopback_only: bool,
    /// Where the words of migrations that went wrong are kept.
    #[arg(long, value_name = "FOLDER", default_value = "target/faults")]
    logs: PathBuf,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Table => {
            print_table();
            Ok(true)
        }
        Command::Series(series) => series.run(),
        Command::Outage(outage) => outage.run(),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("multifd-faults: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// How a fault in a moment may end, over whatever channels, and with devices or without.
fn print_table() {
    let lines: BTreeMap<_, _> = table()
        .iter()
        .map(|row| ((row.fault, row.moment), row.endings()))
        .collect();
    println!("| fault | moment | may end as |\n|---|---|---|");
    for ((fault, moment), endings) in lines {
        let words: Vec<String> = endings.iter().map(|ending| format!("{ending:?}")).collect();
        println!("| {fault:?} | {moment:?} | {} |", words.join(", "));
    }
}

impl Series {
    fn run(&self) -> anyhow::Result<bool> {
        remove_stale();
        let missing = if self.loopback_only {
            Some("--loopback-only".to_owned())
        } else {
            what_is_missing()
        };
        if let Some(missing) = &missing {
            println!("SKIPPED: rows that need links of their own or a small disk ({missing})");
        }
        let namespaces = missing.is_none();
        let playable = |row: &Scenario| namespaces || !row.fault.needs_root();
        let mut rows: Vec<Scenario> = table()
            .into_iter()
            .filter(playable)
            .filter(|row| row.to_string().contains(&self.only))
            .collect();
        // The name of one row may be the beginning of another's.
        if let Some(row) = rows
            .iter()
            .copied()
            .find(|row| row.to_string() == self.only)
        {
            rows = vec![row];
        }
        anyhow::ensure!(!rows.is_empty(), "no row of the table is called so");
        let count = if self.each {
            rows.len() as u64
        } else {
            self.count
        };
        let until = self
            .at_most
            .map(|seconds| Instant::now() + Duration::from_secs(seconds));
        let (began, next) = (Instant::now(), AtomicU64::new(0));
        let summary = Mutex::new(Summary::default());
        let trouble = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for job in 0..self.jobs.max(1) {
                let (rows, next, summary, trouble) = (&rows, &next, &summary, &trouble);
                scope.spawn(move || {
                    let stage = match Stage::new(&format!("j{job}"), namespaces) {
                        Ok(stage) => stage,
                        Err(error) => return trouble.lock().expect("no panics").push(error),
                    };
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= count || until.is_some_and(|until| Instant::now() >= until) {
                            return;
                        }
                        let seed = self.from + number;
                        let place = if self.each {
                            number
                        } else {
                            Random::new(seed).below(rows.len() as u64)
                        };
                        let played = stage.play(rows[place as usize], seed);
                        self.tell(&played);
                        summary.lock().expect("no panics").count(&played);
                    }
                });
            }
        });
        if let Some(error) = trouble.into_inner().expect("no panics").pop() {
            return Err(error.context("a place for migrations"));
        }
        let summary = summary.into_inner().expect("no panics");
        summary.print(began.elapsed());
        Ok(summary.violations == 0)
    }

    /// A line, and what was said, for a migration that went wrong.
    fn tell(&self, played: &Played) {
        let (seed, row) = (played.seed, &played.scenario);
        if played.violations.is_empty() {
            return;
        }
        println!(
            "VIOLATION seed {seed}, {row}: {}",
            played.violations.join("; ")
        );
        println!("    again: multifd-faults series --from {seed} --count 1 --jobs 1 --only {row}");
        let file = self.logs.join(format!("{seed}.log"));
        let kept = std::fs::create_dir_all(&self.logs)
            .and_then(|()| std::fs::write(&file, &played.words))
            .with_context(|| file.display().to_string());
        match kept {
            Ok(()) => println!("    words: {}", file.display()),
            Err(error) => println!("    the words could not be kept: {error:#}"),
        }
    }
}

/// What came of all of them.
#[derive(Default)]
struct Summary {
    played: u64,
    hit: u64,
    violations: u64,
    took: Duration,
    /// By fault and moment: how often each ending came.
    endings: BTreeMap<String, BTreeMap<Moment, BTreeMap<Ending, u64>>>,
    totals: BTreeMap<Ending, u64>,
    rows: BTreeSet<String>,
    /// Migrations whose fault came too late for its moment.
    late: BTreeMap<Moment, u64>,
}

impl Summary {
    fn count(&mut self, played: &Played) {
        let (fault, moment) = (played.scenario.fault, played.scenario.moment);
        self.played += 1;
        self.took += played.took;
        self.hit += u64::from(played.hit);
        self.violations += u64::from(!played.violations.is_empty());
        self.rows.insert(played.scenario.to_string());
        if !played.hit {
            *self.late.entry(moment).or_default() += 1;
        }
        if let Some(ending) = played.ending {
            *self.totals.entry(ending).or_default() += 1;
            if played.hit {
                let cells = self.endings.entry(format!("{fault:?}")).or_default();
                *cells.entry(moment).or_default().entry(ending).or_default() += 1;
            }
        }
    }

    fn print(&self, took: Duration) {
        let cell = |cell: Option<&BTreeMap<Ending, u64>>| -> String {
            let words = cell.into_iter().flatten();
            let words: Vec<String> = words
                .map(|(ending, times)| format!("{ending:?} {times}"))
                .collect();
            words.join(", ")
        };
        let heads: Vec<String> = MOMENTS.iter().map(|moment| format!("{moment:?}")).collect();
        println!("| fault | {} |", heads.join(" | "));
        println!("|---|{}", "---|".repeat(MOMENTS.len()));
        for (fault, cells) in &self.endings {
            let line: Vec<String> = MOMENTS
                .iter()
                .map(|moment| cell(cells.get(moment)))
                .collect();
            println!("| {fault} | {} |", line.join(" | "));
        }
        println!(
            "{} migrations of {} rows in {:.0} s, {:.2} s each; {}; {} in the moment that was meant, late: {:?}; violations: {}",
            self.played,
            self.rows.len(),
            took.as_secs_f64(),
            self.took.as_secs_f64() / (self.played.max(1)) as f64,
            cell(Some(&self.totals)),
            self.hit,
            self.late,
            self.violations
        );
    }
}
