//! Devices whose own code never returns: the guest runs on all the same, and soon, and the report says which device, where and
//! in what call, and that it could not be given back.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_tests::devices::{Done, Plan};
use multifd_wire::DeviceState;

const DEADLINE: Duration = Duration::from_millis(300);

/// Two devices, of which x never returns from one call, here or there.
fn run(failure: &str, there: bool) -> (Done, Duration) {
    let whole = "model:name=x,size=12M,initial=8M,config=100K";
    let mut plan = Plan::new(&["model:name=w,size=3M,initial=2M", whole]);
    let side = if there {
        &mut plan.destination
    } else {
        &mut plan.source
    };
    side[1] = format!("{whole},fail={failure}").parse().unwrap();
    let limit = Duration::from_secs(60);
    plan.config = tx::Config::builder()
        .device_deadline(DEADLINE)
        .downtime_limit(limit)
        .keep_alive(Duration::from_millis(100))
        .build()
        .unwrap();
    plan.receiver = rx::Config::builder()
        .device_deadline(DEADLINE)
        .keep_alive(Duration::from_millis(100))
        .build()
        .unwrap();
    let began = Instant::now();
    let done = plan.run();
    (done, began.elapsed())
}

#[test]
fn a_source_device_that_never_returns_holds_up_neither_the_end_nor_the_guest() {
    for (failure, phase, step) in [
        ("hang-read@1M", "rounds", "it was to be read"),
        (
            "hang@pre-copy-p2p",
            "switchover",
            "it was to become quiescent",
        ),
        ("hang@stop-copy", "switchover", "it was to stop"),
        ("hang-read@9M", "switchover", "it was to be read"),
    ] {
        let (done, took) = run(failure, false);
        assert!(took < Duration::from_secs(10), "{failure}: {took:?}");
        let error = done.sent.report.error.as_ref().unwrap();
        assert_eq!(error.code, "sender.device.stuck", "{failure}: {error:?}");
        assert_eq!(error.phase, phase, "{failure}: {error:?}");
        assert!(
            error.text.contains("device x") && error.text.contains(step),
            "{failure}: {error:?}"
        );
        // The guest and the other device run; this one is not given back, and the report says so.
        assert!(done.source_running.load(Ordering::SeqCst), "{failure}");
        assert_eq!(done.source_probes[0].state(), DeviceState::Running);
        let (w, x) = (&done.sent.report.devices[0], &done.sent.report.devices[1]);
        assert!(w.given_back && w.error.is_none(), "{failure}: {w:?}");
        assert_eq!((x.given_back, x.state), (false, "unknown"), "{failure}");
        assert!(x.error.as_ref().unwrap().contains(step), "{failure}: {x:?}");
        assert_eq!(done.sent.devices.len(), 1, "{failure}");
        // The destination was told why.
        let theirs = done.received.report.error.as_ref().unwrap();
        assert!(theirs.text.contains("device x"), "{failure}: {theirs:?}");
    }
}

#[test]
fn a_destination_device_that_never_returns_ends_it_with_everything_running_at_the_source() {
    for (failure, step) in [
        ("hang@resuming", "it was to get ready for its state"),
        ("hang-write@1M", "it was to take its state in"),
    ] {
        let (done, took) = run(failure, true);
        assert!(took < Duration::from_secs(10), "{failure}: {took:?}");
        let failed = done.assert_failed();
        assert!(
            failed.contains("device x") && failed.contains(step),
            "{failure}: {failed}"
        );
        let theirs = &done.received.report;
        assert_eq!(theirs.error.as_ref().unwrap().code, "receiver.device.stuck");
        assert!(
            theirs.devices_left.contains(&"x".to_owned()),
            "{failure}: {theirs:?}"
        );
    }
}

#[test]
fn a_device_that_never_starts_after_the_commit_strands_the_guest_and_is_named() {
    let (done, took) = run("hang@running", true);
    assert!(took < Duration::from_secs(20), "{took:?}");
    let theirs = &done.received.report;
    assert_eq!(theirs.outcome, rx::OutcomeKind::Stranded, "{theirs:?}");
    assert!(theirs.error.as_ref().unwrap().text.contains("device x"));
    assert_eq!(done.sent.report.outcome, tx::OutcomeKind::Stranded);
    assert!(!done.source_running.load(Ordering::SeqCst));
    assert!(!done.destination_running.load(Ordering::SeqCst));
}
