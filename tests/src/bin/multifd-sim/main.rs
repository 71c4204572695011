//! Simulates migrations from their seeds: many of them, or one again with everything that happens.
#![allow(clippy::print_stdout, clippy::print_stderr)] // A program speaks through both.

#[path = "../../sim/interpose.rs"]
mod interpose;
mod tally;
mod workers;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use multifd_tests::sim::{self, Mode};

use self::tally::Tally;

/// Simulates migrations in which things go wrong, and checks what must hold.
///
/// Both sides' real drivers run one thread at a time on simulated time, so a seed always gives the same migration.
/// Exit code 0: no violation. 1: violations; each is printed with the command that replays it.
#[derive(Parser, Debug, Clone)]
#[command(name = "multifd-sim")]
struct Arguments {
    /// Replays this one seed.
    #[arg(long)]
    seed: Option<u64>,
    /// Prints every frame, fault and log line, with the simulated time. With --seed.
    #[arg(long, requires = "seed")]
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
    /// How many processes share the seeds. Each keeps to one processor, and a simulation that hangs ends only its own.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=64))]
    jobs: u64,
    /// Only flipped bits, dozens in each migration; each has to be found and named.
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
    /// One of the processes of --jobs: every so many seeds.
    #[arg(long, hide = true)]
    stride: Option<u64>,
    /// One of the processes of --jobs: the processor that it keeps to.
    #[arg(long, hide = true)]
    processor: Option<usize>,
}

impl Arguments {
    fn mode(&self) -> Mode {
        match (self.flips, self.calm) {
            (true, _) => Mode::Flips,
            (_, true) => Mode::Calm,
            _ => Mode::Faults,
        }
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
    let began = Instant::now();
    let tally = match (arguments.seed, arguments.stride) {
        (Some(seed), _) => {
            let mut tally = Tally::default();
            run(&arguments, seed, &mut tally);
            tally
        }
        (None, Some(stride)) => return work(&arguments, stride),
        (None, None) => workers::share(&arguments),
    };
    tally.print(arguments.mode(), began.elapsed());
    if tally.violations() == 0 && tally.unfinished() == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Beside a busy process the kernel does not come to free the stacks of threads that ended, thousands a second, and has no memory left
/// within the hour. It frees gigabytes in this time.
const BREATH: Duration = Duration::from_millis(500);

/// After so many seeds.
const BREATH_EVERY: u64 = 4096;

/// The life of one of the processes that share the seeds. What it counted it says in lines that the first process adds up.
fn work(arguments: &Arguments, stride: u64) -> ExitCode {
    if let Some(processor) = arguments.processor {
        workers::keep_to(processor);
    }
    let began = Instant::now();
    let mut tally = Tally::default();
    let mut well = true;
    let mut seed = arguments.from;
    for number in 0..arguments.count {
        if arguments
            .seconds
            .is_some_and(|most| began.elapsed() >= Duration::from_secs(most))
        {
            break;
        }
        well &= run(arguments, seed, &mut tally);
        seed = seed.saturating_add(stride);
        let stop = !well && !arguments.keep_going;
        if stop || number % 256 == 255 {
            std::mem::take(&mut tally).tell();
        }
        if number % BREATH_EVERY == BREATH_EVERY - 1 {
            std::thread::sleep(BREATH);
        }
        if stop {
            break;
        }
    }
    tally.tell();
    if well {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Runs one seed; whether all was well.
fn run(arguments: &Arguments, seed: u64, tally: &mut Tally) -> bool {
    let mode = arguments.mode();
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
        println!("{}", sim::replay_command(seed, mode));
    }
    verdict.violations.is_empty()
}
