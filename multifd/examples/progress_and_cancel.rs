//! Watching a migration from an event loop, cancelling it, and migrating the same machine again with what came back.
//!
//! `cargo run --release -p multifd --example progress_and_cancel`
#![allow(clippy::print_stdout)] // an example shows what happens

mod support;

use multifd::source;
use multifd::transport::pair;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use support::{Arriving, Leaving};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let memory = support::memory();
    let (machine, writes) = Leaving::start(&memory);

    // So slow that there is time to look: 16 MiB at 1 MiB/s.
    let slow = source::Config::builder().bandwidth(Some(1 << 20)).build()?;
    let (first, dial) = support::arrival(Arriving::default(), || pair(1 << 20))?;
    let parts = source::Parts::new(machine, memory.clone(), dial);
    let migration = source::Migration::start(parts.source(writes).config(slow))?;
    let handle = migration.handle();
    while !migration.is_finished() {
        // An event loop would have other descriptors beside this one. It becomes readable at the end.
        let mut fds = [PollFd::from_borrowed_fd(migration.ended(), PollFlags::IN)];
        let tenth = Timespec {
            tv_sec: 0,
            tv_nsec: 100_000_000,
        };
        poll(&mut fds, Some(&tenth))?;
        let now = handle.progress();
        println!(
            "{}: {} of {} pages to go",
            now.phase, now.round_pages_left, now.memory_pages
        );
        if now.content_pages + now.zero_pages > 100 {
            handle.cancel();
        }
    }
    let cancelled = migration.wait();
    assert_eq!(cancelled.report.outcome, source::OutcomeKind::Cancelled);
    let there = first.wait().vmm.ok_or("it did not come back")?;
    assert!(!there.runs, "it never ran there");

    // The guest runs on here, and everything can be used again.
    let machine = cancelled.vmm.ok_or("it did not come back")?;
    let before = machine.writes();
    while machine.writes() == before {
        std::thread::yield_now();
    }
    let (second, dial) = support::arrival(Arriving::default(), || pair(1 << 20))?;
    let mut parts = source::Parts::new(machine, memory, dial);
    parts.config = support::settings().build()?;
    parts.sources = cancelled.sources;
    let left = source::Migration::start(parts)?.wait();
    let arrived = second.wait();
    println!("then {:?}", left.report.outcome);
    let machine = arrived.vmm.ok_or("it did not come back")?;
    assert!(machine.runs && machine.is_right());
    Ok(())
}
