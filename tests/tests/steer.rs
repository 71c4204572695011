//! Limits that are changed while a guest is moved, over real channels.

use std::sync::Arc;
use std::time::{Duration, Instant};

use multifd_sender as tx;
use multifd_tests::bounded::{Destination, GRACE, tx_builder, within};
use multifd_tests::model::{SourceMachine, differing_page, fill, memory};
use multifd_transport::{GuestMemory, TcpOptions};
use tx::forecast::Forecast;
use tx::{Handle, OutcomeKind, Sending, Snapshot, Steer};

const MIB: u64 = 1 << 20;

/// A frame, with its head.
const FRAME: u64 = (256 << 10) + 4096;

fn builder() -> tx::ConfigBuilder {
    tx_builder()
        .channels(4)
        .downtime_limit(Duration::from_millis(300))
}

struct Leaving {
    migration: tx::Migration,
    memory: GuestMemory,
}

/// A guest of some MiB that writes so many pages a second.
fn leave(to: &Destination, mib: u64, pages_per_second: u64, config: tx::ConfigBuilder) -> Leaving {
    let memory = memory(mib * MIB);
    fill(&memory, 8, 0);
    let machine = SourceMachine::start(memory.clone(), 1, pages_per_second, 5);
    let parts = tx::Parts {
        sources: vec![machine.source()],
        vmm: Box::new(machine),
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
    }
}

/// Waits until progress is like this.
fn until(
    what: &'static str,
    handle: &Handle,
    like: impl Fn(&Snapshot) -> bool + Send + 'static,
) -> Snapshot {
    let handle = handle.clone();
    within(10 * GRACE, what, move || {
        loop {
            let now = handle.progress();
            if like(&now) {
                return now;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    })
}

/// Bytes that are sent from now on in this time, and how long it really was.
fn sent_in(handle: &Handle, time: Duration) -> (u64, Duration) {
    let (before, began) = (handle.progress().sent_bytes, Instant::now());
    std::thread::sleep(time);
    (handle.progress().sent_bytes - before, began.elapsed())
}

/// It arrives, whole.
fn arrives(leaving: Leaving, destination: Destination) -> tx::Report {
    let there = Arc::clone(&destination.memory);
    let left = within(20 * GRACE, "the source's end", || leaving.migration.wait());
    assert_eq!(
        left.report.outcome,
        OutcomeKind::Migrated,
        "{:?}",
        left.error
    );
    assert!(destination.end(GRACE).running);
    let there = there.lock().unwrap().clone().unwrap();
    assert_eq!(differing_page(&leaving.memory, &there), None);
    left.report
}

#[test]
fn a_migration_that_can_not_converge_at_its_cap_is_let_through_by_a_higher_one() {
    let destination = Destination::start();
    let config = builder().bandwidth(Some(8 * MIB));
    let leaving = leave(&destination, 32, 8000, config);
    let handle = leaving.migration.handle();
    until("a forecast that it diverges", &handle, |now| {
        now.round > 0 && matches!(now.forecast, Some(Forecast::Diverges { .. }))
    });
    handle.steer(Steer::Bandwidth(None)).unwrap();
    let report = arrives(leaving, destination);
    let caps: Vec<_> = report
        .limits
        .iter()
        .map(|limits| limits.bandwidth_cap_bytes_per_s)
        .collect();
    assert_eq!(caps, [Some(8 * MIB), None]);
    let changed = report.limits[1].at_ms;
    assert!(changed > 0.0 && changed < report.total_ms, "{changed}");
}

#[test]
fn a_higher_downtime_limit_lets_it_through_as_well() {
    let destination = Destination::start();
    let config = builder()
        .bandwidth(Some(8 * MIB))
        .downtime_limit(Duration::from_millis(20));
    let leaving = leave(&destination, 8, 8000, config);
    let handle = leaving.migration.handle();
    until("a forecast that it diverges", &handle, |now| {
        now.round > 0 && matches!(now.forecast, Some(Forecast::Diverges { .. }))
    });
    let limit = Duration::from_secs(20);
    handle.steer(Steer::DowntimeLimit(limit)).unwrap();
    until("the new limit", &handle, move |now| {
        now.limits.downtime_limit == limit
    });
    arrives(leaving, destination);
}

#[test]
fn a_held_one_sends_next_to_nothing_and_goes_on() {
    let destination = Destination::start();
    let leaving = leave(&destination, 64, 500, builder().bandwidth(Some(8 * MIB)));
    let handle = leaving.migration.handle();
    until("pages", &handle, |now| now.sent_bytes > MIB);
    handle.steer(Steer::Sending(Sending::Held)).unwrap();
    until("the hold", &handle, |now| {
        now.limits.sending == Sending::Held
    });
    let (sent, _) = sent_in(&handle, Duration::from_secs(2));
    // One that was being sent on each channel, and the one that says that it means to go on.
    let channels = 4;
    assert!(sent <= (channels + 1) * FRAME, "{sent}");
    handle.steer(Steer::Sending(Sending::On)).unwrap();
    let report = arrives(leaving, destination);
    let held: Vec<_> = report
        .limits
        .iter()
        .map(|limits| limits.sending_held)
        .collect();
    assert_eq!(held, [false, true, false]);
}

#[test]
fn a_lowered_cap_holds() {
    let destination = Destination::start();
    let leaving = leave(&destination, 64, 500, builder().bandwidth(Some(16 * MIB)));
    let handle = leaving.migration.handle();
    until("pages", &handle, |now| now.sent_bytes > MIB);
    handle.steer(Steer::Bandwidth(Some(2 * MIB))).unwrap();
    until("the cap", &handle, |now| {
        now.limits.bandwidth == Some(2 * MIB)
    });
    let (sent, took) = sent_in(&handle, Duration::from_secs(2));
    let most = 2.0 * took.as_secs_f64() * MIB as f64 + (5 * FRAME) as f64;
    assert!(sent as f64 <= most, "{sent} in {took:?}");
    assert!(handle.progress().bandwidth <= 2 * MIB);
    handle.steer(Steer::Bandwidth(None)).unwrap();
    arrives(leaving, destination);
}

#[test]
fn what_is_out_of_its_range_is_refused_and_changes_nothing() {
    let destination = Destination::start();
    let leaving = leave(&destination, 8, 500, builder());
    let handle = leaving.migration.handle();
    let error = handle.steer(Steer::MaxRounds(0)).unwrap_err().to_string();
    assert!(error.contains("max rounds is 0"), "{error}");
    assert_eq!(arrives(leaving, destination).limits.len(), 1);
}

#[test]
fn after_the_end_a_change_means_nothing() {
    let destination = Destination::start();
    let leaving = leave(&destination, 8, 500, builder());
    let handle = leaving.migration.handle();
    arrives(leaving, destination);
    handle.steer(Steer::Bandwidth(Some(MIB))).unwrap();
    assert_eq!(handle.progress().limits.bandwidth, None);
}
