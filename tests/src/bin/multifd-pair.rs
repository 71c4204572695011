//! Both roles' machines in one thread, joined by encoded frames over a made-up network, seed after seed.
//!
//! `cargo run --release -p multifd-tests --bin multifd-pair -- --count 1000000`. What it does and what must hold is in
//! `session/src/exercise/pair/mod.rs`. It complements `multifd-sim`, which runs the drivers and their threads.
#![allow(clippy::print_stdout)] // What it is for.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use clap::Parser;
use multifd_session::exercise::{pair, pair_traced};

/// Migrates with made-up faults, one migration per seed.
#[derive(Parser)]
struct Args {
    /// How many seeds.
    #[arg(long, default_value_t = 10_000)]
    count: u64,
    /// The first of them; to replay one, with `--count 1`.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// How many at once.
    #[arg(long, default_value_t = 1)]
    jobs: u64,
    /// Stop after this many seconds.
    #[arg(long)]
    seconds: Option<u64>,
    /// Go on after a violation.
    #[arg(long)]
    keep_going: bool,
    /// Print what happens in the migration of the first seed, and make no other.
    #[arg(long)]
    trace: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.trace {
        let run = pair_traced(args.from);
        run.trace.iter().for_each(|line| println!("{line}"));
        println!("{}, violations: {:?}", run.outcome, run.violations);
        return ExitCode::from(u8::from(!run.violations.is_empty()));
    }
    let (began, next) = (Instant::now(), AtomicU64::new(0));
    let outcomes = Mutex::new(BTreeMap::<&str, u64>::new());
    let violations = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..args.jobs.max(1) {
            scope.spawn(|| {
                let mut own = BTreeMap::<&str, u64>::new();
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let time_is_up = || {
                        let limit = args.seconds.map(std::time::Duration::from_secs);
                        limit.is_some_and(|limit| began.elapsed() >= limit)
                    };
                    let stop = !args.keep_going && violations.load(Ordering::Relaxed) > 0;
                    if number >= args.count || stop || number % 64 == 0 && time_is_up() {
                        break;
                    }
                    let seed = args.from.wrapping_add(number);
                    let run = pair(seed);
                    *own.entry(run.outcome).or_default() += 1;
                    if !run.violations.is_empty() {
                        violations.fetch_add(1, Ordering::Relaxed);
                        println!("VIOLATION seed {seed}: {}", run.violations.join("; "));
                    }
                }
                if let Ok(mut all) = outcomes.lock() {
                    for (outcome, count) in own {
                        *all.entry(outcome).or_default() += count;
                    }
                }
            });
        }
    });
    let seconds = began.elapsed().as_secs_f64();
    let outcomes = outcomes.into_inner().unwrap_or_default();
    let words: Vec<String> = outcomes
        .iter()
        .map(|(outcome, count)| format!("{count} {outcome}"))
        .collect();
    println!("{}", words.join(", "));
    let (count, found) = (outcomes.values().sum::<u64>(), violations.into_inner());
    println!(
        "{count} migrations in {seconds:.1} s, {:.0} a second; violations: {found}",
        count as f64 / seconds
    );
    if found == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
