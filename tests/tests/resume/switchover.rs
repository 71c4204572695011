//! Channels that are lost with the guest paused, and lanes that die without a sign (SPEC: LANE-8, RESUME-8, SWITCH-4).

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_tests::bounded::{Destination, GRACE, STALL, within};
use multifd_tests::host::Host;
use multifd_tests::links::Links;
use multifd_tests::model::{DestinationMachine, SourceMachine, differing_page, fill, memory};
use multifd_wire::ChannelRef;

use super::pairs::{Pair, comes_back, waits};

/// A machine that does something when its state is saved: the guest is paused, and the last round is under way.
struct Hooked {
    machine: SourceMachine,
    saves: Arc<AtomicU32>,
    hook: Box<dyn Fn(u32) + Send>,
}

impl tx::Vmm for Hooked {
    fn config(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        self.machine.config()
    }

    fn pause(&mut self) -> Result<(), tx::VmmError> {
        self.machine.pause()
    }

    fn save(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        (self.hook)(self.saves.fetch_add(1, Ordering::SeqCst));
        self.machine.save()
    }

    fn resume(&mut self, proof: tx::Reclaimed) -> Result<(), tx::VmmError> {
        self.machine.resume(proof)
    }
}

struct End {
    report: tx::Report,
    /// What the host kept waiting, in milliseconds.
    delayed_ms: f64,
    saves: u32,
    resumed: u64,
}

/// A migration that is disturbed each time the state is saved; `hook` is told how often that was before. It has to arrive.
fn disturbed(
    case: &str,
    config: tx::config::ConfigBuilder,
    hook: impl Fn(&Links, u32) + Send + 'static,
) -> End {
    let there = DestinationMachine::default();
    let (landed, runs_there) = (Arc::clone(&there.memory), Arc::clone(&there.running));
    let destination = Destination::with(waits().build().unwrap(), there);
    let links = Links::to(destination.handle());
    let here = memory(4 << 20);
    fill(&here, 9, 5);
    let machine = SourceMachine::start(here.clone(), 1, 2000, 3);
    let (running, resumed) = (Arc::clone(&machine.running), Arc::clone(&machine.resumed));
    let saves = Arc::new(AtomicU32::new(0));
    let (sources, cut) = (vec![machine.source()], Mutex::new(links.clone()));
    let vmm = Box::new(Hooked {
        machine,
        saves: Arc::clone(&saves),
        hook: Box::new(move |before| hook(&cut.lock().unwrap(), before)),
    });
    let parts = tx::Parts {
        vmm,
        memory: here.clone(),
        sources,
        dial: links.dial(),
        config: config.build().unwrap(),
        spawner: None,
    };
    let host = Host::watch();
    let migration = tx::Migration::start(parts).unwrap();
    let finished = within(10 * GRACE, "the source's end", || migration.wait());
    let received: rx::Finished = destination.end(2 * GRACE).finished;
    let errors = (&finished.error, &received.error);
    assert!(matches!(errors, (None, None)), "{case}: {errors:?}");
    assert!(
        runs_there.load(Ordering::SeqCst) && !running.load(Ordering::SeqCst),
        "{case}"
    );
    let there = landed.lock().unwrap().clone().unwrap();
    assert_eq!(differing_page(&here, &there), None, "{case}");
    End {
        report: finished.report,
        delayed_ms: host.delayed_ms(),
        saves: saves.load(Ordering::SeqCst),
        resumed: resumed.load(Ordering::SeqCst),
    }
}

fn four() -> tx::config::ConfigBuilder {
    comes_back().channels(4)
}

#[test]
fn a_lane_that_dies_with_the_guest_paused_does_not_break_the_switchover_off() {
    for lanes in 1..4 {
        let end = disturbed("some lanes", four(), move |links, before| {
            if before == 0 {
                (0..lanes).for_each(|lane| links.cut_lane(lane));
            }
        });
        assert_eq!((end.saves, end.resumed, end.report.suspensions), (1, 0, 0));
        assert!(end.report.channels_lost <= lanes);
    }
}

#[test]
fn all_lanes_that_die_with_the_guest_paused_are_opened_again_or_the_guest_runs_meanwhile() {
    let end = disturbed("back at once", four(), |links, before| {
        if before == 0 {
            links.cut_lanes();
        }
    });
    assert!(
        end.report.downtime_ms.unwrap() < 1000.0 + end.delayed_ms,
        "{:?}",
        end.report
    );
    let end = disturbed("back later", four(), |links, before| {
        if before == 0 {
            links.set_down(true);
            links.cut_lanes();
            let links = links.clone();
            std::thread::spawn(move || {
                std::thread::sleep(3 * STALL);
                links.set_down(false);
            });
        }
    });
    assert_eq!((end.saves, end.resumed, end.report.suspensions), (2, 1, 1));
    assert!(
        end.report.broken_off_pause_ms < 1000.0 + end.delayed_ms,
        "{:?}",
        end.report
    );
}

#[test]
fn a_control_channel_that_is_lost_with_the_guest_paused_lets_it_run_until_the_next_switchover() {
    for which in [Some(ChannelRef::Control), None] {
        let end = disturbed("control", four(), move |links, before| {
            if before < 2 {
                match which {
                    Some(channel) => links.cut(channel),
                    None => links.cut_all(),
                }
            }
        });
        assert_eq!((end.saves, end.resumed, end.report.suspensions), (3, 2, 2));
        assert!(
            end.report.broken_off_pause_ms < 1000.0 + end.delayed_ms,
            "{:?}",
            end.report
        );
    }
}

#[test]
fn a_lane_that_dies_without_a_sign_is_told_from_a_slow_one() {
    // Every byte that lane 1 is handed from 4 MiB on vanishes.
    let config = comes_back().channels(3).bandwidth(Some(24 << 20));
    let pair = Pair::new(24 << 20, config.body_bytes(64 << 10));
    pair.sent(4 << 20);
    let began = Instant::now();
    pair.links.swallow_lane(1);
    let handle = pair.source.handle();
    while handle.progress().sent_again_bytes == 0 {
        assert!(began.elapsed() < STALL + GRACE, "{:?}", handle.progress());
        std::thread::sleep(Duration::from_millis(1));
    }
    let ends = pair.arrives("a silent death");
    let report = &ends.source.finished.report;
    assert_eq!((report.channels_lost, report.channels_reopened), (1, 1));
}

#[test]
fn a_slow_lane_is_not_given_up() {
    // A body takes as long as a stall, but its frames are acknowledged.
    let config = comes_back().channels(1).bandwidth(Some(2 << 20));
    let pair = Pair::new(2 << 20, config.body_bytes(1 << 20));
    let ends = pair.arrives("slow");
    assert_eq!(ends.source.finished.report.channels_lost, 0);
}

#[test]
fn a_lane_that_dies_without_a_sign_holds_a_paused_guest_no_longer_than_a_second() {
    let end = disturbed("silent", four().stall(10 * STALL), |links, before| {
        if before == 0 {
            links.swallow_lane(2);
        }
    });
    assert_eq!((end.saves, end.resumed), (1, 0));
    assert!(
        end.report.downtime_ms.unwrap() < 1500.0 + end.delayed_ms,
        "{:?}",
        end.report
    );
}
