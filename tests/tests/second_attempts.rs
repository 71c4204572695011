//! After a migration that failed or was cancelled, at any moment: the next one of the same guest is right, and nothing of the
//! first is left behind: no thread, no descriptor, no port, no mapping.
//!
//! One test in a process of its own, since it counts what the process has.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use multifd_sender as tx;
use multifd_tests::bounded::{Destination, GRACE, STALL, rx_builder, tx_builder, within};
use multifd_tests::links::Links;
use multifd_tests::model::{DestinationMachine, SourceMachine, differing_page, fill, memory};
use multifd_transport::{Listener, TcpOptions};
use multifd_wire::Phase;

const BYTES: u64 = 8 << 20;

/// What this process has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    threads: usize,
    descriptors: usize,
    mapped_regions: usize,
}

fn held() -> Held {
    let count = |path: &str| std::fs::read_dir(path).expect("this is Linux").count();
    let maps = std::fs::read_to_string("/proc/self/maps").expect("this is Linux");
    // Guest memory; what the allocator maps for itself comes and goes.
    let large = |line: &&str| {
        let range = line.split(' ').next().unwrap_or_default();
        let ends: Vec<u64> = range
            .split('-')
            .filter_map(|end| u64::from_str_radix(end, 16).ok())
            .collect();
        matches!(ends[..], [start, end] if (end - start) % 4096 == 0 && (end - start) >= BYTES / 3 && (end - start) <= BYTES)
            && line.contains("rw-")
    };
    Held {
        threads: count("/proc/self/task"),
        descriptors: count("/proc/self/fd"),
        mapped_regions: maps.lines().filter(large).count(),
    }
}

/// Waits until no more is held than before: threads that have said their last word may still be in the kernel's list.
fn nothing_left(before: Held, case: &str) {
    let since = Instant::now();
    loop {
        let now = held();
        if now.threads <= before.threads
            && now.descriptors <= before.descriptors
            && now.mapped_regions <= before.mapped_regions
        {
            return;
        }
        assert!(
            since.elapsed() < 2 * GRACE,
            "{case}: {before:?} became {now:?}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// How a first attempt is brought to nothing.
#[derive(Debug, Clone, Copy)]
enum End {
    CancelledHere,
    CancelledThere,
    LanesLostForGood,
    EverythingLostForGood,
    CancelledWhileSuspended,
}

const ENDS: [End; 5] = [
    End::CancelledHere,
    End::CancelledThere,
    End::LanesLostForGood,
    End::EverythingLostForGood,
    End::CancelledWhileSuspended,
];

/// One attempt to move `machine`; gives it back with how it went.
fn attempt(
    vmm: Box<dyn tx::Vmm>,
    sources: Vec<Box<dyn multifd_tracking::Source>>,
    here: &multifd_transport::GuestMemory,
    end: Option<End>,
) -> tx::Finished {
    let there = DestinationMachine::default();
    let landed = std::sync::Arc::clone(&there.memory);
    let config = rx_builder()
        .suspend(2 * STALL)
        .build()
        .expect("within the limits");
    let destination = Destination::with(config, there);
    let address = destination.address.clone();
    let links = Links::over_tcp(destination.handle(), address.clone());
    let mut config = tx_builder().channels(3).reconnect_deadline(2 * STALL);
    if end.is_some() {
        config = config.bandwidth(Some(8 << 20)).body_bytes(64 << 10);
    }
    let migration = tx::Migration::start(tx::Parts {
        vmm,
        memory: here.clone(),
        sources,
        dial: links.dial(),
        config: config.build().expect("within the limits"),
        spawner: None,
    })
    .expect("a migration");
    let handle = migration.handle();
    if end.is_some() {
        while handle.progress().sent_bytes < BYTES / 4 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    match end {
        None => {}
        Some(End::CancelledHere) => handle.cancel(),
        Some(End::CancelledThere) => destination.handle().cancel(),
        Some(End::LanesLostForGood) => {
            links.set_down(true);
            links.cut_lanes();
        }
        Some(End::EverythingLostForGood) => links.take_down(),
        Some(End::CancelledWhileSuspended) => {
            links.take_down();
            while handle.progress().phase != Phase::Suspended {
                std::thread::sleep(Duration::from_millis(1));
            }
            handle.cancel();
        }
    }
    let finished = within(5 * GRACE, "the source's end", || migration.wait());
    let received = destination.end(5 * GRACE);
    if end.is_none() {
        assert!(finished.error.is_none(), "{:?}", finished.error);
        assert!(received.finished.error.is_none() && received.running);
        let there = landed.lock().expect("no panics").clone().expect("memory");
        assert_eq!(differing_page(here, &there), None);
    } else {
        assert!(finished.error.is_some() && received.finished.error.is_some());
        assert!(!received.running);
    }
    // The port is free again.
    let again = Listener::bind(&address, &TcpOptions::default());
    assert!(again.is_ok(), "{:?}", again.err());
    finished
}

// SPEC: SETUP-4
#[test]
fn a_second_attempt_is_right_and_nothing_of_the_first_is_left() {
    let here = memory(BYTES);
    fill(&here, 3, 4);
    let machine = SourceMachine::start(here.clone(), 1, 2000, 17);
    let (running, resumed) = (
        std::sync::Arc::clone(&machine.running),
        std::sync::Arc::clone(&machine.resumed),
    );
    let mut sources = vec![machine.source()];
    let mut vmm: Box<dyn tx::Vmm> = Box::new(machine);
    // Once around, so that what is made once is there.
    for warm_up in [true, false] {
        let before = held();
        for end in ENDS {
            let finished = attempt(vmm, sources, &here, Some(end));
            assert!(running.load(Ordering::SeqCst), "{end:?}: the guest runs on");
            (vmm, sources) = (finished.vmm.expect("it came back"), finished.sources);
            if !warm_up {
                nothing_left(before, &format!("{end:?}"));
            }
        }
    }
    assert_eq!(resumed.load(Ordering::SeqCst), 0, "it was never paused");
    let finished = attempt(vmm, sources, &here, None);
    assert_eq!(finished.report.outcome, tx::OutcomeKind::Migrated);
    assert!(!running.load(Ordering::SeqCst));
}
