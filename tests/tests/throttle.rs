//! A guest that writes faster than its link carries is slowed, as much as it takes and no longer than it takes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use multifd_sender as tx;
use multifd_tests::bounded::{Destination, GRACE, tx_builder, within};
use multifd_tests::model::{SourceMachine, differing_page, fill, memory};
use multifd_transport::{GuestMemory, TcpOptions};
use tx::{OutcomeKind, Steer};

const MIB: u64 = 1 << 20;

/// What the cap lets through in a second, in pages.
const LINK: u64 = 8 * MIB / 4096;

fn builder() -> tx::ConfigBuilder {
    tx_builder()
        .channels(2)
        .bandwidth(Some(8 * MIB))
        .downtime_limit(Duration::from_millis(300))
}

struct Leaving {
    migration: tx::Migration,
    memory: GuestMemory,
    throttle: Arc<AtomicU8>,
}

/// A VMM that slows no guest: everything else is the machine's.
struct Unable(SourceMachine);

impl tx::Vmm for Unable {
    fn config(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        self.0.config()
    }

    fn pause(&mut self) -> Result<(), tx::VmmError> {
        self.0.pause()
    }

    fn save(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        self.0.save()
    }

    fn resume(&mut self, proof: tx::Reclaimed) -> Result<(), tx::VmmError> {
        self.0.resume(proof)
    }
}

fn leave(
    to: &Destination,
    pages_per_second: u64,
    config: tx::ConfigBuilder,
    wrap: fn(SourceMachine) -> Box<dyn tx::Vmm>,
) -> Leaving {
    let memory = memory(16 * MIB);
    fill(&memory, 8, 0);
    let machine = SourceMachine::start(memory.clone(), 1, pages_per_second, 5);
    let throttle = Arc::clone(&machine.throttle);
    let parts = tx::Parts {
        sources: vec![machine.source()],
        vmm: wrap(machine),
        memory: memory.clone(),
        dial: Box::new(tx::Dialer {
            address: to.address.clone(),
            options: TcpOptions::default().into(),
        }),
        config: config.build().unwrap(),
        spawner: None,
    };
    Leaving {
        migration: tx::Migration::start(parts).expect("a migration"),
        memory,
        throttle,
    }
}

fn end(migration: tx::Migration) -> tx::Report {
    within(20 * GRACE, "the source's end", || migration.wait()).report
}

#[test]
fn a_guest_at_twice_the_links_rate_arrives_within_the_limit_by_throttle_alone() {
    let destination = Destination::start();
    let there = Arc::clone(&destination.memory);
    // It is allowed while it runs.
    let leaving = leave(&destination, 2 * LINK, builder(), |it| Box::new(it));
    let handle = leaving.migration.handle();
    handle.steer(Steer::ThrottleLimit(90)).unwrap();
    let report = end(leaving.migration);
    assert_eq!(report.outcome, OutcomeKind::Migrated, "{:?}", report.error);
    let predicted = report.predicted_downtime_ms.unwrap();
    assert!(predicted <= 300.0, "{predicted}");
    let steps: Vec<u8> = report.throttles.iter().map(|it| it.percent).collect();
    assert!(steps.len() >= 2 && steps[0] <= 20, "{steps:?}");
    for (before, after) in steps.iter().zip(&steps[1..]) {
        assert!(*after <= before + 20 && *after <= 90, "{steps:?}");
    }
    assert!(report.throttled_ms > 0.0 && report.throttled_ms < report.total_ms);
    assert!(destination.end(GRACE).running);
    let there = there.lock().unwrap().clone().unwrap();
    assert_eq!(differing_page(&leaving.memory, &there), None);
}

#[test]
fn a_guest_that_converges_is_never_slowed() {
    let destination = Destination::start();
    let config = builder().throttle_limit(90);
    let leaving = leave(&destination, LINK / 8, config, |it| Box::new(it));
    let report = end(leaving.migration);
    assert_eq!(report.outcome, OutcomeKind::Migrated, "{:?}", report.error);
    assert!(report.throttles.is_empty(), "{:?}", report.throttles);
    assert_eq!(leaving.throttle.load(Ordering::SeqCst), 0);
}

#[test]
fn a_guest_that_was_slowed_in_vain_has_all_of_its_time_again() {
    for cancels in [true, false] {
        let destination = Destination::start();
        let config = builder().throttle_limit(20).max_rounds(4);
        let leaving = leave(&destination, 8 * LINK, config, |it| Box::new(it));
        let handle = leaving.migration.handle();
        let throttle = Arc::clone(&leaving.throttle);
        within(10 * GRACE, "a throttle", move || {
            while throttle.load(Ordering::SeqCst) == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        if cancels {
            handle.cancel();
        }
        let report = end(leaving.migration);
        let outcome = if cancels {
            OutcomeKind::Cancelled
        } else {
            OutcomeKind::Failed
        };
        assert_eq!(report.outcome, outcome, "{:?}", report.error);
        let steps: Vec<u8> = report.throttles.iter().map(|it| it.percent).collect();
        assert_eq!(steps, [20, 0]);
        assert!(report.throttled_ms > 0.0);
        assert_eq!(leaving.throttle.load(Ordering::SeqCst), 0);
        assert_eq!(handle.progress().throttle_percent, 0);
    }
}

#[test]
fn a_vmm_that_slows_no_guest_fails_as_without_leave() {
    let destination = Destination::start();
    let config = builder().throttle_limit(90).max_rounds(3);
    let leaving = leave(&destination, 4 * LINK, config, |it| Box::new(Unable(it)));
    let report = end(leaving.migration);
    assert_eq!(report.outcome, OutcomeKind::Failed);
    assert_eq!(report.error.unwrap().code, "sender.not-converging");
    assert!(report.throttles.is_empty());
    assert_eq!(report.throttle_error, None);
}
