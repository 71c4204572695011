//! Whole migrations with model devices, over sockets: what arrives, in which order, and what every failure leaves behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_tests::cutting::{Cutting, Side};
use multifd_tests::devices::Plan;
use multifd_tests::host::Host;
use multifd_tests::losing::{From, Losing};
use multifd_transport::Channel;
use multifd_wire::ChannelRef;

const MIB: u64 = 1 << 20;

#[test]
fn one_device_without_pre_copy_and_without_p2p_moves() {
    Plan::new(&["model:size=5M,p2p=no,config=100"])
        .run()
        .assert_migrated();
}

#[test]
fn devices_of_all_kinds_move_with_a_writing_guest_over_each_number_of_channels() {
    for channels in [1, 2, 4] {
        let mut plan = Plan::new(&[
            "model:name=a,size=20M,initial=16M,growth=4M,config=5K",
            "model:name=b,size=3M,config=2M,after-memory=yes",
            "model:name=c,size=64K,pre-copy=yes",
            "model:name=d,size=9M,initial=9M,ack=no,growth=20M,config=64,after-memory=yes,seed=7",
        ]);
        plan.writes = 5000;
        // On a host that is busy with other tests even this guest can outpace its link; convergence is not what is tested.
        let config = tx::Config::builder().channels(channels);
        let config = config.downtime_limit(Duration::from_secs(60));
        plan.config = config.build().unwrap();
        let done = plan.run();
        done.assert_migrated();
        let report = &done.sent.report;
        let device = &report.devices[0];
        assert_eq!((device.generations, device.acked), (1, 1), "{device:?}");
        assert!(device.initial_bytes == 16 * MIB, "{device:?}");
        assert!(device.stop_copy_bytes < 20 * MIB, "{device:?}");
        let parts = report.downtime.unwrap().devices.unwrap();
        assert!(parts.stop_ms > 0.0, "{parts:?}");
        assert_eq!(done.received.report.devices.len(), 4);
    }
}

#[test]
fn what_a_device_writes_into_guest_memory_arrives_as_it_wrote_it() {
    // The device itself compares it when its configuration is loaded, after memory.
    let text = "model:size=9M,initial=9M,growth=40M,dma=256K,config=64,after-memory=yes,seed=7";
    let done = Plan::new(&[text]).run();
    done.assert_migrated();
    let source = &done.sent.report.sources[1];
    assert!(source.reported > 0, "{source:?}");
}

#[test]
fn a_state_far_larger_than_the_window_moves_through_it() {
    let mut plan = Plan::new(&["model:size=40M,config=200K"]);
    plan.receiver = window(300 << 10);
    plan.run().assert_migrated();
}

fn window(bytes: u64) -> rx::Config {
    let builder = rx::Config::builder().device_window_bytes(bytes);
    builder.build().unwrap()
}

#[test]
fn a_configuration_as_large_as_the_window_moves_and_a_larger_one_is_refused_at_the_source() {
    let mut plan = Plan::new(&["model:name=x,size=2M,config=320K"]);
    plan.receiver = window(320 << 10);
    plan.run().assert_migrated();
    let mut plan = Plan::new(&["model:name=x,size=2M,config=321K"]);
    plan.receiver = window(320 << 10);
    let failed = plan.run().assert_failed();
    assert!(
        failed.contains("device x could not give its configuration")
            && failed.contains("device window"),
        "{failed}"
    );
}

#[test]
fn new_initial_bytes_are_loaded_and_acknowledged_before_the_guest_is_paused() {
    let done = Plan::new(&["model:size=4M,initial=4M,reinit=2"]).run();
    done.assert_migrated();
    let device = &done.sent.report.devices[0];
    assert_eq!(device.generations, device.acked, "{device:?}");
    assert!(device.initial_bytes >= 4 * MIB, "{device:?}");
}

// SPEC: SWACK-2
#[test]
fn the_switchover_waits_for_a_slow_acknowledgement_with_the_guest_running() {
    let (began, host) = (Instant::now(), Host::watch());
    let done = Plan::new(&["model:size=8M,initial=8M,write=16M"]).run();
    done.assert_migrated();
    assert!(
        began.elapsed() > Duration::from_millis(400),
        "loading takes half a second"
    );
    let report = &done.sent.report;
    assert!(report.ack_wait_ms > 200.0, "{}", report.ack_wait_ms);
    assert!(
        report.downtime_ms.unwrap() < 200.0 + host.delayed_ms(),
        "{:?}",
        report.downtime
    );
}

// SPEC: SWACK-2
#[test]
fn past_the_acknowledgement_deadline_it_goes_on_or_fails_as_the_user_chose() {
    let plan = |choice| {
        let mut plan = Plan::new(&["model:name=slow,size=8M,initial=8M,write=4M"]);
        let config = tx::Config::builder().ack_deadline(Some(Duration::from_millis(100)));
        let config = config.downtime_limit(Duration::from_secs(60));
        plan.config = config.when_ack_late(choice).build().unwrap();
        plan.run()
    };
    let failed = plan(tx::WhenAckLate::Fail).assert_failed();
    assert!(
        failed.starts_with("sender.device.ack-deadline, rounds"),
        "{failed}"
    );
    assert!(failed.contains("slow"), "{failed}");
    plan(tx::WhenAckLate::GoOn).assert_migrated();
}

#[test]
fn several_devices_of_which_one_lacks_p2p_are_refused_before_anything_is_sent() {
    let done = Plan::new(&["model:name=a,size=1M", "model:name=b,size=1M,p2p=no"]).run();
    let failed = done.assert_failed();
    assert!(
        failed.starts_with("sender.device.refused, hello"),
        "{failed}"
    );
    assert!(
        failed.contains("b has no P2P-quiescent state, so it can only be moved alone"),
        "{failed}"
    );
    assert_eq!(done.source_probes[0].steps(), 0);
    let neither = ["model:name=a,size=1M,p2p=no", "model:name=b,size=1M,p2p=no"];
    let failed = Plan::new(&neither).run().assert_failed();
    assert!(
        failed.contains("a has no P2P-quiescent state, so it can only be moved alone"),
        "{failed}"
    );
}

#[test]
fn a_destination_without_the_device_refuses_in_set_up() {
    let mut plan = Plan::new(&["model:name=a,size=1M"]);
    plan.destination.clear();
    let failed = plan.run().assert_failed();
    assert!(
        failed.contains("no device a") && failed.contains("set-up"),
        "{failed}"
    );
}

#[test]
fn more_window_than_the_destination_allows_is_refused_in_set_up() {
    let mut plan = Plan::new(&["model:name=a,size=1M", "model:name=b,size=1M"]);
    let config = rx::Config::builder()
        .device_window_bytes(MIB)
        .device_bytes_max(2 * MIB - 1);
    plan.receiver = config.build().unwrap();
    let failed = plan.run().assert_failed();
    assert!(
        failed.contains("windows") && failed.contains("set-up"),
        "{failed}"
    );
}

/// Failures at the source and at the destination: the device, the phase and the cause are in the report, and everything runs on.
#[test]
fn every_failure_point_leaves_guest_and_devices_running_at_the_source() {
    let cases = [
        // At the source: (failure, there?, phase, words).
        (
            "fail=read@1M",
            false,
            "rounds",
            "device x could not be read: reading failed",
        ),
        (
            "fail=read@9M",
            false,
            "switchover",
            "device x could not be read: reading failed",
        ),
        (
            "fail=save-config",
            false,
            "switchover",
            "device x could not give its configuration",
        ),
        (
            "fail=step@pre-copy",
            false,
            "rounds",
            "device x could not begin pre-copy",
        ),
        (
            "fail=step@pre-copy-p2p",
            false,
            "switchover",
            "device x could not become quiescent",
        ),
        (
            "fail=step@stop-copy",
            false,
            "switchover",
            "device x could not stop",
        ),
        (
            "fail=break@pre-copy-p2p",
            false,
            "switchover",
            "device x could not become quiescent: broke",
        ),
        (
            "fail=break@stop-copy",
            false,
            "switchover",
            "device x could not stop: broke",
        ),
        // At the destination.
        (
            "fail=write@1M",
            true,
            "",
            "device x could not take its state in: writing failed",
        ),
        (
            "fail=write@9M",
            true,
            "switchover",
            "device x could not take its state in: writing failed",
        ),
        (
            "fail=load-config",
            true,
            "switchover",
            "device x could not take its configuration in",
        ),
        (
            "fail=finish",
            true,
            "switchover",
            "device x could not finish its state: the state was refused",
        ),
        (
            "fail=step@resuming",
            true,
            "set-up",
            "device x could not get ready for its state",
        ),
    ];
    for (failure, there, phase, words) in cases {
        let mut plan = Plan::new(&[
            "model:name=w,size=3M,initial=2M",
            "model:name=x,size=12M,initial=8M,config=100K",
        ]);
        let wrong = format!("model:name=x,size=12M,initial=8M,config=100K,{failure}");
        let side = if there {
            &mut plan.destination
        } else {
            &mut plan.source
        };
        side[1] = wrong.parse().unwrap();
        let (began, host) = (Instant::now(), Host::watch());
        let done = plan.run();
        let failed = done.assert_failed();
        assert!(failed.contains(words), "{failure}: {failed}");
        assert!(failed.contains(phase), "{failure}: {failed}");
        let took_max = Duration::from_secs(10) + host.delayed();
        assert!(began.elapsed() < took_max, "{failure}");
        let resets = done.source_probes[1].resets();
        assert_eq!(resets, u64::from(failure.contains("break")), "{failure}");
        // One that was refused in set-up was not touched.
        if let Some(report) = done.sent.report.devices.get(1) {
            assert_eq!(report.was_reset, failure.contains("break"), "{failure}");
        }
    }
}

// SPEC: SEC-3
#[test]
fn damage_that_no_checksum_sees_is_found_by_the_device_that_loads_it() {
    let mut plan = Plan::new(&["model:name=x,size=2M"]);
    plan.source[0] = "model:name=x,size=2M,fail=corrupt@1000K".parse().unwrap();
    let failed = plan.run().assert_failed();
    assert!(failed.contains("wrong content"), "{failed}");
}

#[test]
fn cancelled_at_any_moment_guest_and_devices_run_on_at_the_source() {
    for wait_ms in [0, 5, 20, 60, 120, 250] {
        let mut plan = Plan::new(&[
            "model:name=a,size=30M,initial=10M,read=100M",
            "model:name=b,size=30M,read=100M",
        ]);
        plan.meanwhile = Some(Box::new(move |handle, _| {
            std::thread::sleep(Duration::from_millis(wait_ms));
            handle.cancel();
        }));
        let done = plan.run();
        // The last ones may come too late.
        if done.sent.error.is_none() {
            done.assert_migrated();
            continue;
        }
        let failed = done.assert_failed();
        assert!(failed.contains("cancelled"), "{wait_ms}: {failed}");
    }
}

/// Cuts lanes after so many bytes.
struct Cuts {
    inner: tx::Dialer,
    /// Of each lane, also when it comes back; otherwise of all of them together, and then once: whichever is at it.
    each: bool,
    octets: Arc<AtomicU64>,
    dialled: Arc<AtomicUsize>,
}

impl tx::Dial for Cuts {
    fn dial(
        &self,
        channel: ChannelRef,
        deadline: Instant,
    ) -> Result<Box<dyn Channel>, Box<dyn std::error::Error + Send + Sync>> {
        let inner = self.inner.dial(channel, deadline)?;
        if channel == ChannelRef::Control {
            return Ok(inner);
        }
        self.dialled.fetch_add(1, Ordering::SeqCst);
        let octets = if self.each {
            Arc::new(AtomicU64::new(self.octets.load(Ordering::SeqCst)))
        } else {
            Arc::clone(&self.octets)
        };
        Ok(Cutting::shared(octets, Side::Sending, inner))
    }
}

#[test]
fn a_lane_lost_in_the_middle_of_a_device_costs_nothing_of_it() {
    // Memory is 16 MiB, devices are 60: the cut comes in memory, in pre-copy, or in the middle of what is read after the stop.
    for octets in [3 * MIB, 8 * MIB, 14 * MIB, 30 * MIB, 60 * MIB] {
        // As slow as is needed for the lane to come back before the end.
        let mut plan = Plan::new(&[
            "model:name=a,size=40M,initial=10M,config=100K,read=80M",
            "model:name=b,size=20M,config=100K,read=40M",
        ]);
        // With a lane less for a while on a busy host, even an idle guest may look as if it did not converge.
        let config = tx::Config::builder().channels(3);
        let limit = Duration::from_secs(60);
        plan.config = config.downtime_limit(limit).build().unwrap();
        let dialled = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&dialled);
        plan.dial = Some(Box::new(move |inner| {
            Box::new(Cuts {
                inner,
                each: false,
                octets: Arc::new(AtomicU64::new(octets)),
                dialled,
            })
        }));
        let done = plan.run();
        done.assert_migrated();
        assert_eq!(done.sent.report.channels_lost, 1, "{octets}");
        assert!(seen.load(Ordering::SeqCst) > 3, "it was dialled again");
    }
}

/// What a lane carried is lost and the lane with it, after FINAL was said of all that. The others make up for it while the guest stays
/// paused; no device is read anew.
#[test]
fn a_lane_lost_after_final_is_made_up_for_on_the_others_and_the_switchover_goes_on() {
    for from in [From::Anything, From::DeviceEnd] {
        for channels in [2, 3] {
            let mut plan = Plan::new(&[
                "model:name=a,size=2M,config=100K,after-memory=yes",
                "model:name=b,size=1M,initial=512K,config=4K",
            ]);
            plan.memory_bytes = 8 * MIB;
            plan.writes = 2000;
            // At this speed and with these bodies a lane may be silent for seconds before it is taken for dead: what this is about is
            // the one that is.
            let config = tx::Config::builder().channels(channels);
            let config = config.bandwidth(Some(8 * MIB)).body_bytes(1 << 20);
            let config = config.downtime_limit(Duration::from_secs(60));
            // Nor is one that is lost dialled again.
            let config = config.reconnect_deadline(Duration::ZERO);
            plan.config = config.stall(Duration::from_secs(30)).build().unwrap();
            // Nothing may be broken off and resumed: a loss of everything is the end.
            let receiver = rx::Config::builder().suspend(Duration::ZERO);
            plan.receiver = receiver.stall(Duration::from_secs(30)).build().unwrap();
            plan.dial = Some(Box::new(move |inner| {
                Box::new(Losing::new(from, Box::new(inner)))
            }));
            let done = plan.run();
            done.assert_migrated();
            let report = &done.sent.report;
            assert!(report.channels_lost >= 1, "{from:?}: {report:?}");
            assert_eq!(report.suspensions, 0, "{from:?}: {report:?}");
            let restarts: u32 = report.devices.iter().map(|device| device.restarts).sum();
            assert_eq!(restarts, 0, "{from:?}: {report:?}");
        }
    }
}

#[test]
fn without_any_lane_in_the_middle_of_a_device_everything_runs_on_at_the_source() {
    let mut plan = Plan::new(&["model:name=a,size=40M,initial=10M"]);
    // As above, this is not about convergence.
    let config = tx::Config::builder().channels(2);
    let config = config.downtime_limit(Duration::from_secs(60));
    plan.config = config.reconnect_deadline(Duration::ZERO).build().unwrap();
    plan.dial = Some(Box::new(move |inner| {
        Box::new(Cuts {
            inner,
            each: true,
            octets: Arc::new(AtomicU64::new(18 * MIB)),
            dialled: Arc::default(),
        })
    }));
    let done = plan.run();
    let failed = done.assert_failed();
    assert!(
        failed.contains("lanes-lost") || failed.contains("channels"),
        "{failed}"
    );
    // Whose state was under way is said beside it.
    let device = &done.sent.report.devices[0];
    let text = device.error.as_deref().unwrap_or_default();
    assert!(text.starts_with("device a was cut off"), "{device:?}");
}

#[test]
fn a_slow_device_does_not_keep_another_waiting() {
    let (began, host) = (Instant::now(), Host::watch());
    // Each takes 400 ms to be read; one after the other they would take 1.6 s.
    let names: Vec<String> = (0..4)
        .map(|i| format!("model:name=d{i},size=4M,read=10M"))
        .collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut plan = Plan::new(&names);
    plan.config = tx::Config::builder()
        .downtime_limit(Duration::from_secs(60))
        .build()
        .unwrap();
    let done = plan.run();
    done.assert_migrated();
    let parts = done.sent.report.downtime.unwrap().devices.unwrap();
    let read_ms_max = 900.0 + host.delayed_ms();
    assert!((350.0..read_ms_max).contains(&parts.read_ms), "{parts:?}");
    assert!(began.elapsed() < Duration::from_secs(10) + host.delayed());
}
