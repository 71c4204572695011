//! A migration inside one process: a running machine moves into another one over channels in memory.
//!
//! `cargo run --release -p multifd --example in_process`
#![allow(clippy::print_stdout)] // an example shows what happens

mod support;

use multifd::transport::pair;
use multifd::{destination, source};
use support::{Arriving, Leaving};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let reception = destination::Reception::start(destination::Parts::new(Arriving::default()))?;
    let there = reception.handle();
    let dial = source::dial_by(move |_, _| {
        let (ours, theirs) = pair(1 << 20);
        there.offer(theirs)?;
        Ok(ours)
    });

    let memory = support::memory();
    let (machine, writes) = Leaving::start(&memory);
    let parts = source::Parts::new(machine, memory, dial)
        .source(writes)
        .config(support::settings().build()?);
    let left = source::Migration::start(parts)?.wait();
    let arrived = reception.wait();

    let report = &left.report;
    println!(
        "{:?} in {:.0} ms, downtime {:.1} ms, {} rounds",
        report.outcome,
        report.total_ms,
        report.downtime_ms.unwrap_or_default(),
        report.rounds
    );
    // The machines come back as what they are.
    assert_eq!(report.outcome, source::OutcomeKind::Migrated);
    let machine = arrived.vmm.ok_or("it did not come back")?;
    let before = left.vmm.ok_or("it did not come back")?;
    assert_eq!(before.writes(), machine.count);
    assert!(machine.runs && machine.is_right());
    Ok(())
}
