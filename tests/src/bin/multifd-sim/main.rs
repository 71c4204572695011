//! Simulates migrations from their seeds: many of them, or one again with everything that happens.
#![allow(clippy::print_stdout, clippy::print_stderr)] // A program speaks through both.

#[path = "../../sim/interpose.rs"]
mod interpose;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use multifd_tests::sim::{self, Mode, Verdict};

/// Simulates migrations in which things go wrong, and checks what must hold.
///
/// Both sides' real drivers run one thread at a time on simulated time, so a seed always gives the same migration.
/// Exit code 0: no violation. 1: violations; each is printed with the command that replays it. 70: a migration hangs.
#[derive(Parser)]
#[command(name = "multifd-sim")]
struct Arguments {
    /// Replays this one seed.
    #[arg(long)]
    seed: Option<u64>,
    /// Prints every frame, fault and log line, with the simulated time.
    #[arg(long)]
    trace: bool,
    /// How many seeds to run.
    #[arg(long, default_value_t = 1000)]
    count: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Stops after so many seconds, whatever the count.
    #[arg(long)]
    seconds: Option<u64>,
    /// Only flipped bits, many of them.
    #[arg(long, conflicts_with = "calm")]
    flips: bool,
    /// Nothing goes wrong.
    #[arg(long)]
    calm: bool,
    /// Runs every seed twice and compares the ways that it took.
    #[arg(long)]
    twice: bool,
    /// Goes on after a violation.
    #[arg(long)]
    keep_going: bool,
}

/// What all seeds came to.
#[derive(Default)]
struct Tally {
    migrations: u64,
    without_fault: u64,
    flips: u64,
    given_back: u64,
    lanes_lost: u64,
    second: u64,
    switches: u64,
    simulated: Duration,
    outcomes: BTreeMap<String, u64>,
    codes: BTreeMap<&'static str, u64>,
    faults: BTreeMap<String, u64>,
    violations: u64,
}

impl Tally {
    fn add(&mut self, verdict: &Verdict) {
        self.migrations += 1;
        self.without_fault += u64::from(verdict.faults.is_empty());
        self.flips += verdict.flips;
        self.given_back += verdict.pages_given_back;
        self.lanes_lost += u64::from(verdict.lanes_lost);
        self.second += u64::from(verdict.second);
        self.switches += verdict.figures.switches;
        self.simulated += Duration::from_nanos(verdict.figures.ns);
        *self
            .outcomes
            .entry(format!("{:?}", verdict.outcome))
            .or_default() += 1;
        if let Some(code) = verdict.code {
            *self.codes.entry(code).or_default() += 1;
        }
        for fault in &verdict.faults {
            *self.faults.entry(format!("{fault:?}")).or_default() += 1;
        }
        self.violations += u64::from(!verdict.violations.is_empty());
    }

    fn print(&self, took: Duration) {
        let rate = self.migrations as f64 / took.as_secs_f64();
        println!(
            "{} migrations in {:.1} s ({rate:.0} a second), {:.0} s of simulated time, {} switches each",
            self.migrations,
            took.as_secs_f64(),
            self.simulated.as_secs_f64(),
            self.switches / self.migrations.max(1)
        );
        println!("without any fault: {}", self.without_fault);
        println!("outcomes: {:?}", self.outcomes);
        println!("faults that happened: {:?}", self.faults);
        println!("errors: {:?}", self.codes);
        println!(
            "bits flipped {}, pages given back {}, lanes lost {}, second attempts {}",
            self.flips, self.given_back, self.lanes_lost, self.second
        );
        println!("violations: {}", self.violations);
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.trace {
        tracing_subscriber::fmt()
            .with_max_level(tracing::Level::DEBUG)
            .without_time()
            .with_target(false)
            .with_ansi(false)
            .init();
    }
    let mode = match (arguments.flips, arguments.calm) {
        (true, _) => Mode::Flips,
        (_, true) => Mode::Calm,
        _ => Mode::Faults,
    };
    let (from, count) = match arguments.seed {
        Some(seed) => (seed, 1),
        None => (arguments.from, arguments.count),
    };
    let began = Instant::now();
    let mut tally = Tally::default();
    let mut told = began;
    for seed in from..from.saturating_add(count) {
        if arguments
            .seconds
            .is_some_and(|most| began.elapsed() >= Duration::from_secs(most))
        {
            break;
        }
        let mut verdict = sim::run(seed, mode, arguments.trace);
        if arguments.twice {
            let again = sim::run(seed, mode, false);
            if again.figures != verdict.figures {
                verdict.violations.push(format!(
                    "not the same twice: {:?} and {:?}",
                    verdict.figures, again.figures
                ));
            }
        }
        tally.add(&verdict);
        for violation in &verdict.violations {
            println!("VIOLATION seed {seed}: {violation}");
        }
        if !verdict.violations.is_empty() {
            println!(
                "{}{}",
                sim::replay_command(seed),
                match mode {
                    Mode::Faults => "",
                    Mode::Flips => " --flips",
                    Mode::Calm => " --calm",
                }
            );
            if !arguments.keep_going {
                break;
            }
        }
        if told.elapsed() > Duration::from_secs(60) {
            told = Instant::now();
            eprintln!(
                "{} migrations, {} with violations",
                tally.migrations, tally.violations
            );
        }
    }
    tally.print(began.elapsed());
    if tally.violations == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
