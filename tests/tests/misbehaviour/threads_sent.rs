//! Threads of the source that never come back: the kernel kills them, or they sleep for ever as in a page fault that is never served. The
//! end comes all the same, within the deadlines that the embedder set; the report names the thread, and nothing is committed behind its back.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_tests::bounded::{Destination, GRACE, STALL, Source, tx_builder, within};
use multifd_tests::lost_threads::{Call, LOSSES, Loss, LostInCall, LostInSend, Without};
use multifd_tests::model::{SourceMachine, fill, memory};
use multifd_transport::{Spawner, TcpOptions};
use multifd_wire::{ChannelRef, LaneId};

/// How long code of the embedder's may take.
const DEADLINE: Duration = Duration::from_millis(300);

/// How long `wait` may take to miss the control thread: the longer one of device deadline and stall, and 2 s.
const MISSED: Duration = STALL.saturating_add(Duration::from_secs(2));

fn config() -> tx::Config {
    tx_builder().device_deadline(DEADLINE).build().unwrap()
}

fn dialer(destination: &Destination) -> Box<dyn tx::Dial> {
    Box::new(tx::Dialer {
        address: destination.address.clone(),
        options: TcpOptions::default().into(),
    })
}

/// A migration of a guest of 8 MiB that writes, with this VMM around its machine and threads started so.
fn start<V: tx::Vmm>(
    dial: Box<dyn tx::Dial>,
    spawner: Option<Box<dyn Spawner>>,
    vmm: impl FnOnce(SourceMachine) -> V,
) -> tx::Migration {
    let bytes = 8 << 20;
    let memory = memory(bytes);
    fill(&memory, bytes, 3);
    let machine = SourceMachine::start(memory.clone(), 1, 2000, 11);
    let sources = vec![machine.source()];
    let parts = tx::Parts {
        vmm: Box::new(vmm(machine)),
        memory,
        sources,
        dial,
        config: config(),
        spawner,
    };
    tx::Migration::start(parts).expect("a migration")
}

fn end(migration: tx::Migration, limit: Duration) -> tx::Finished {
    within(limit + GRACE, "the source's end", || migration.wait())
}

fn code(end: &tx::Finished) -> &'static str {
    end.error.as_ref().map_or("none", tx::Error::code)
}

#[test]
fn a_vmms_call_that_never_returns_is_missed_and_named_and_commits_nothing() {
    let calls = [
        (Call::Config, "describe the machine"),
        (Call::Granted, "ticket"),
        (Call::UnusedPages, "unused"),
        (Call::Pause, "pause the guest"),
        (Call::Save, "save its state"),
    ];
    let cases = LOSSES
        .into_iter()
        .flat_map(|loss| calls.map(|call| (loss, call)));
    let running: Vec<_> = cases
        .map(|(loss, (call, words))| {
            let destination = Destination::start();
            let lost = move |inner| LostInCall { inner, call, loss };
            let migration = start(dialer(&destination), None, lost);
            (
                format!("{loss:?} in {call:?}"),
                words,
                destination,
                migration,
            )
        })
        .collect();
    for (case, words, destination, migration) in running {
        let end = end(migration, MISSED);
        assert_eq!(code(&end), "sender.thread-stuck", "{case}");
        assert_eq!(end.report.outcome, tx::OutcomeKind::Failed, "{case}");
        assert_eq!(end.report.threads_left, ["mfd-control"], "{case}");
        let text = end.error.unwrap().to_string();
        assert!(
            text.contains("control thread") && text.contains(words),
            "{case}: {text}"
        );
        assert!(end.vmm.is_none(), "{case}: it is with the thread");
        destination.handle().cancel();
        assert!(!destination.end(GRACE).running, "{case}");
    }
}

#[test]
fn a_cancel_ends_a_migration_whose_vmm_never_comes_back() {
    let destination = Destination::start();
    let lost = |inner| LostInCall {
        inner,
        call: Call::Pause,
        loss: Loss::Killed,
    };
    let migration = start(dialer(&destination), None, lost);
    migration.handle().cancel();
    // It may have been heard before the call.
    let end = end(migration, MISSED);
    assert!(end.error.is_some());
}

#[test]
fn a_guest_that_has_gone_is_reported_as_gone_although_the_vmm_does_not_hear_it() {
    let destination = Destination::start();
    let lost = |inner| LostInCall {
        inner,
        call: Call::Migrated,
        loss: Loss::Killed,
    };
    let migration = start(dialer(&destination), None, lost);
    let end = end(migration, MISSED);
    assert_eq!(
        (code(&end), end.report.outcome),
        ("none", tx::OutcomeKind::Migrated)
    );
    assert!(end.vmm.is_none());
    assert!(destination.end(GRACE).running);
}

#[test]
fn a_lanes_thread_that_is_lost_while_it_sends_ends_the_migration_and_the_guest_runs_on() {
    for loss in LOSSES {
        // After the hello: the first frame, and one in the middle of a round.
        for sends in [1, 4] {
            let destination = Destination::start();
            let dial = LostInSend {
                inner: dialer(&destination),
                channel: ChannelRef::Lane(LaneId::new(0)),
                sends,
                loss,
            };
            let source = Source::start(Box::new(dial), config());
            let began = Instant::now();
            let end = source.end(STALL + 2 * DEADLINE + GRACE);
            let case = format!("{loss:?} after {sends}: {:?}", began.elapsed());
            // Either the lane is missed here, or the destination, which hears nothing of it, closes it.
            assert_eq!(
                end.finished.report.outcome,
                tx::OutcomeKind::Failed,
                "{case}"
            );
            end.runs_on(&case);
            assert!(
                end.finished
                    .report
                    .threads_left
                    .contains(&"mfd-lane0".to_owned()),
                "{case}"
            );
            assert!(end.finished.vmm.is_some(), "{case}");
            assert!(!destination.end(GRACE).running, "{case}");
        }
    }
}

#[test]
fn a_cancel_does_not_wait_for_a_lanes_thread_that_is_lost() {
    for loss in LOSSES {
        let destination = Destination::start();
        let dial = LostInSend {
            inner: dialer(&destination),
            channel: ChannelRef::Lane(LaneId::new(0)),
            sends: 1,
            loss,
        };
        let source = Source::start(Box::new(dial), config());
        while source.handle().progress().memory_pages == 0 || source.handle().progress().lanes == 0
        {
            std::thread::yield_now();
        }
        source.handle().cancel();
        let end = source.end(DEADLINE + GRACE);
        assert_eq!(
            end.finished.report.outcome,
            tx::OutcomeKind::Cancelled,
            "{loss:?}"
        );
        end.runs_on("cancelled");
    }
}

#[test]
fn threads_that_are_lost_before_they_do_anything_are_missed() {
    // Both sides wait for what a lane's thread and the reader do, and one of them says so first.
    let stuck = &["sender.thread-stuck"][..];
    let late = &["sender.timeout", "sender.peer.aborted"][..];
    let threads = [
        ("mfd-dial", stuck),
        ("mfd-scan", stuck),
        ("mfd-control", stuck),
        ("mfd-lane0", late),
        ("mfd-reader", late),
    ];
    let cases = LOSSES
        .into_iter()
        .flat_map(|loss| threads.map(|(thread, expected)| (thread, loss, expected)));
    let running: Vec<_> = cases
        .map(|(thread, loss, expected)| {
            let destination = Destination::start();
            let spawner: Box<dyn Spawner> = Box::new(Without { thread, loss });
            let migration = start(dialer(&destination), Some(spawner), |machine| machine);
            let case = format!("{thread} {loss:?}");
            (case, expected, destination, migration)
        })
        .collect();
    for (case, expected, destination, migration) in running {
        let end = end(migration, MISSED);
        assert!(expected.contains(&code(&end)), "{case}: {:?}", end.error);
        assert_eq!(end.report.outcome, tx::OutcomeKind::Failed, "{case}");
        destination.handle().cancel();
        let there = destination.end(GRACE);
        assert_ne!(
            there.finished.report.outcome,
            rx::OutcomeKind::Running,
            "{case}"
        );
        assert!(!there.running, "{case}");
    }
}

/// The thread comes back when `wait` has given it up: nothing is committed, and the guest runs here.
#[test]
fn a_thread_that_comes_back_too_late_does_not_commit() {
    struct Late {
        inner: SourceMachine,
        gate: crossbeam_channel::Receiver<()>,
    }
    impl tx::Vmm for Late {
        fn config(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
            self.inner.config()
        }
        fn pause(&mut self) -> Result<(), tx::VmmError> {
            self.inner.pause()
        }
        fn save(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
            let _ = self.gate.recv();
            self.inner.save()
        }
        fn resume(&mut self, proof: tx::Reclaimed) -> Result<(), tx::VmmError> {
            self.inner.resume(proof)
        }
    }
    let destination = Destination::start();
    let (open, gate) = crossbeam_channel::bounded(0);
    let (tell, told) = crossbeam_channel::bounded(1);
    let migration = start(dialer(&destination), None, move |inner| {
        let _ = tell.send(inner.resumed.clone());
        Late { inner, gate }
    });
    let resumed = told.recv().unwrap();
    let end = end(migration, MISSED);
    assert_eq!(code(&end), "sender.thread-stuck");
    drop(open);
    within(GRACE, "the guest to run again", move || {
        while resumed.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
    });
    assert!(!destination.end(GRACE).running);
}
