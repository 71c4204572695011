//! All channels lost with devices on their way: what was loaded stays loaded, and what was read with the guest paused is read anew
//! (SPEC: RESUME-8, RESUME-12). The model device finds out by itself when a byte was lost, doubled or put in another place.

use std::time::Duration;

use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_tests::devices::{Done, Plan, Watch};
use multifd_tests::links::Links;
use multifd_tests::model::Random;
use multifd_wire::{ChannelRef, DeviceState, Phase};

const MIB: u64 = 1 << 20;

/// These devices over links, with memory that takes a second; a small window, so that credit has to flow.
fn plan(devices: &[&str], disturb: impl FnOnce(Links, Watch) + Send + 'static) -> Plan {
    let mut plan = Plan::new(devices);
    plan.memory_bytes = 16 * MIB;
    plan.writes = 500;
    plan.config = tx::Config::builder()
        .channels(2)
        .bandwidth(Some(24 * MIB))
        .body_bytes(64 << 10)
        .stall(Duration::from_secs(2))
        .reconnect_deadline(Duration::from_secs(8))
        .downtime_limit(Duration::from_secs(60))
        .build()
        .unwrap();
    plan.receiver = rx::Config::builder()
        .stall(Duration::from_secs(2))
        .suspend(Duration::from_secs(8))
        .device_window_bytes(MIB)
        .build()
        .unwrap();
    plan.disturb = Some(Box::new(disturb));
    plan
}

/// Everything is lost, and the link comes back a little later.
fn interrupt(links: &Links) {
    links.take_down();
    std::thread::sleep(Duration::from_millis(150));
    links.set_down(false);
}

fn suspensions(done: &Done) -> (u32, u32) {
    (
        done.sent.report.suspensions,
        done.received.report.suspensions,
    )
}

#[test]
fn lost_in_the_middle_of_initial_bytes_they_go_on_where_they_were() {
    for over_tcp in [false, true] {
        let mut plan = plan(
            &["model:name=a,size=9M,initial=8M", "model:name=b,size=1M"],
            |links, watch| {
                assert!(watch.until(|watch| watch.destination.progress().device_bytes > 2 * MIB));
                interrupt(&links);
            },
        );
        plan.over_tcp = over_tcp;
        let done = plan.run();
        done.assert_migrated();
        assert_eq!(suspensions(&done), (1, 1));
        let device = &done.sent.report.devices[0];
        assert_eq!(
            (device.generations, device.acked, device.restarts),
            (1, 1, 0)
        );
        assert_eq!(device.initial_bytes, 8 * MIB, "read once: {device:?}");
        // What was loaded is not sent again: that costs a window of each device and what lanes held of memory.
        assert!(
            done.sent.report.sent_again_bytes < 5 * MIB,
            "{:?}",
            done.sent.report
        );
    }
}

#[test]
fn lost_after_the_acknowledgement_it_still_counts() {
    let done = plan(&["model:name=a,size=2M,initial=1M"], |links, watch| {
        assert!(watch.until(|watch| {
            watch.destination.progress().device_bytes >= MIB
                && watch.source.progress().sent_bytes > 8 * MIB
        }));
        assert_eq!(watch.source.progress().phase, Phase::Rounds);
        interrupt(&links);
    })
    .run();
    done.assert_migrated();
    assert_eq!(suspensions(&done), (1, 1));
    let device = &done.sent.report.devices[0];
    assert_eq!(
        (device.generations, device.acked, device.restarts),
        (1, 1, 0)
    );
}

#[test]
fn lost_in_the_middle_of_stop_copy_the_device_runs_again_and_is_read_anew() {
    for over_tcp in [false, true] {
        let mut plan = plan(
            &[
                "model:name=a,size=8M,read=8M,config=100K,after-memory=yes",
                "model:name=b,size=4M,initial=3M,growth=1M,config=64",
            ],
            |links, watch| {
                let stopped = |watch: &Watch| {
                    let stands =
                        |probe: &multifd_guest::DeviceProbe| probe.state() == DeviceState::StopCopy;
                    watch.source_probes.iter().all(stands)
                };
                assert!(watch.until(stopped));
                std::thread::sleep(Duration::from_millis(300));
                assert!(stopped(&watch));
                interrupt(&links);
                // The guest and its devices run meanwhile, and b streams again.
                assert!(
                    watch.until(|watch| watch.source_probes[0].state() == DeviceState::Running)
                );
                assert!(
                    watch.until(|watch| watch.source_probes[1].state() == DeviceState::PreCopy)
                );
            },
        );
        plan.over_tcp = over_tcp;
        let done = plan.run();
        done.assert_migrated();
        assert_eq!(suspensions(&done), (1, 1));
        let report = &done.sent.report;
        assert!(report.broken_off_pause_ms > 200.0, "{report:?}");
        let (a, b) = (&report.devices[0], &report.devices[1]);
        assert_eq!((a.restarts, b.restarts), (1, 1), "{a:?} {b:?}");
        // What b had loaded is void, so its initial bytes were acknowledged once more.
        assert_eq!((b.generations, b.acked), (2, 2), "{b:?}");
        let once = 8 * MIB..9 * MIB;
        assert!(once.contains(&a.stop_copy_bytes), "of the last time: {a:?}");
    }
}

#[test]
fn a_device_that_had_everything_when_the_switchover_was_broken_off_is_loaded_anew() {
    let done = plan(
        &[
            "model:name=a,size=64K,config=1K",
            "model:name=b,size=6M,read=6M",
        ],
        |links, watch| {
            assert!(watch.until(|watch| watch.destination_probes[0].state() == DeviceState::Stop));
            links.cut_all();
        },
    )
    .run();
    done.assert_migrated();
    assert_eq!(suspensions(&done), (1, 1));
    let device = &done.sent.report.devices[0];
    assert_eq!(device.restarts, 1, "{device:?}");
}

#[test]
fn cut_at_any_moment_devices_arrive_whole() {
    for seed in 0..5u64 {
        let done = plan(
            &[
                "model:name=a,size=3M,read=6M,config=20K",
                "model:name=b,size=5M,initial=4M,growth=2M,reinit=1,after-memory=yes,config=64",
            ],
            move |links, watch| {
                let mut random = Random::new(seed + 7);
                for _ in 0..6 {
                    std::thread::sleep(Duration::from_millis(50 + random.below(350)));
                    if matches!(watch.source.progress().phase, Phase::Commit | Phase::Done) {
                        return;
                    }
                    match random.below(3) {
                        0 => links.cut(ChannelRef::Control),
                        1 => links.cut_lanes(),
                        _ => links.cut_all(),
                    }
                }
            },
        )
        .run();
        if done.sent.report.outcome == tx::OutcomeKind::Migrated {
            done.assert_migrated();
        } else {
            // Cut between COMMIT and its arrival.
            let failed = done.assert_failed();
            assert!(
                failed.starts_with("sender.not-committed"),
                "seed {seed}: {failed}"
            );
        }
    }
}
