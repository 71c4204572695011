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
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let began = Instant::now();
    let (mut outcomes, mut impairments) = (BTreeMap::new(), BTreeMap::new());
    let (mut calm, mut violations) = (0u64, 0u64);
    for seed in arguments.from..arguments.from + arguments.count {
        let rules = if arguments.calm {
            Vec::new()
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
        for violation in &passage.violations {
            violations += 1;
            println!("VIOLATION seed {seed}: {violation}; {passage:?}");
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
