//! Real migrations over TCP through the impairment proxy, from seeds.
#![allow(clippy::print_stdout)] // A program speaks.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use multifd_tests::impaired;
use multifd_tests::model::Random;

/// Migrates a small machine over loopback TCP, again and again, while connections are cut, reset, stalled, throttled, damaged and ended.
///
/// Exit code 0: no guest was lost, doubled or changed. 1: otherwise; the seed is printed.
#[derive(Parser)]
#[command(name = "multifd-impair")]
struct Arguments {
    /// How many migrations.
    #[arg(long, default_value_t = 100)]
    count: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Nothing happens to any connection.
    #[arg(long)]
    calm: bool,
    /// Only flipped bits, dozens in each migration, and a table of what they were in and whether a report names them.
    #[arg(long, conflicts_with = "calm")]
    flips: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let began = Instant::now();
    let (mut outcomes, mut impairments) = (BTreeMap::new(), BTreeMap::new());
    let (mut calm, mut violations) = (0u64, 0u64);
    let mut flips = BTreeMap::new();
    for seed in arguments.from..arguments.from + arguments.count {
        let rules = if arguments.calm {
            Vec::new()
        } else if arguments.flips {
            impaired::draw_flips(&mut Random::new(seed))
        } else {
            impaired::draw(&mut Random::new(seed))
        };
        let passage = impaired::migrate(seed, rules);
        *outcomes
            .entry(format!("{:?}", passage.outcome))
            .or_insert(0u64) += 1;
        calm += u64::from(passage.happened.is_empty());
        for rule in &passage.happened {
            let name = format!("{:?}", rule.impairment);
            let name = name.split('(').next().unwrap_or_default().to_owned();
            *impairments.entry(name).or_insert(0u64) += 1;
        }
        for (flip, named) in &passage.flipped {
            let what = format!(
                "{:?} {:?} | {:?}",
                flip.direction, flip.place, passage.outcome
            );
            let (count, found) = flips.entry(what).or_insert((0u64, 0u64));
            (*count, *found) = (*count + 1, *found + u64::from(*named));
        }
        for violation in &passage.violations {
            violations += 1;
            println!("VIOLATION seed {seed}: {violation}; {passage:?}");
        }
    }
    if arguments.flips {
        println!("| flipped bit in | migration | flips | named by a report |\n|---|---|---|---|");
        for (what, (count, found)) in &flips {
            println!("| {what} | {count} | {found} |");
        }
    }
    println!(
        "{} migrations in {:.0} s, {calm} of them undisturbed; {outcomes:?}; {impairments:?}; violations: {violations}",
        arguments.count,
        began.elapsed().as_secs_f64()
    );
    if violations == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
