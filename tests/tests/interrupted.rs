//! What an interruption costs, measured: everything cut for some seconds, and one of four lanes cut.
//!
//! One test in a process of its own, since it measures time. `MULTIFD_INTERRUPTED_BYTES` is the guest's memory (the figures in
//! `docs/measurements/faults.md` are for 1 GiB); without it the guest is small and only the bounds that do not depend on how busy
//! the host is are held.
#![allow(clippy::print_stdout)] // figures, for whoever asked for them

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_tests::bounded::{Destination, GRACE, within};
use multifd_tests::host::Host;
use multifd_tests::links::Links;
use multifd_tests::model::{DestinationMachine, SourceMachine, differing_page, fill, memory};
use multifd_tracking::{
    CollectPhase, Collection, DirtySet, Error as TrackingError, Figures, Source,
};
use multifd_wire::Phase;

const MIB: f64 = 1_048_576.0;

/// Pages that the guest writes a second: 20 MiB/s.
const PAGES_PER_SECOND: u64 = 5120;

/// Bytes a second that the link carries.
const BANDWIDTH: u64 = 256 << 20;

/// Finds all memory dirty after every round as long as it is shut: a migration that is to be disturbed is not over before.
struct Gate(Arc<AtomicBool>);

impl Source for Gate {
    fn name(&self) -> &str {
        "gate"
    }

    fn start(&mut self, _: &DirtySet) -> Result<(), TrackingError> {
        Ok(())
    }

    fn collect(
        &mut self,
        set: &DirtySet,
        phase: CollectPhase,
    ) -> Result<Collection, TrackingError> {
        if phase == CollectPhase::PreCopy && !self.0.load(Ordering::SeqCst) {
            set.mark_all();
        }
        Ok(Collection::default())
    }

    fn stop(&mut self) -> Result<(), TrackingError> {
        Ok(())
    }

    fn figures(&self) -> Figures {
        Figures::default()
    }
}

struct Run {
    total: Duration,
    report: tx::Report,
    /// The longest time in which nothing was acknowledged while the rounds went on.
    pause: Duration,
    /// Pages that the guest wrote from the first cut to its end.
    written: u64,
    /// From the link's return to the first acknowledgement.
    back: Option<Duration>,
    /// What the host kept waiting.
    delayed: Duration,
}

/// A migration over four lanes in which `disturb` happens when half of memory was sent.
///
/// One that is held is not over before it was disturbed and has recovered, however slow this host is.
fn run(
    bytes: u64,
    held: bool,
    disturb: impl FnOnce(&Links, &tx::Handle) -> Option<Instant>,
) -> Run {
    let there = DestinationMachine::default();
    let landed = Arc::clone(&there.memory);
    let destination = Destination::with(rx::Config::default(), there);
    let links = Links::over_tcp(destination.handle(), destination.address.clone());
    let here = memory(bytes);
    fill(&here, bytes, 0);
    let machine = SourceMachine::start(here.clone(), 1, PAGES_PER_SECOND, 5);
    let writes = machine.write_counter();
    let config = tx::Config::builder()
        .channels(4)
        .bandwidth(Some(BANDWIDTH))
        .max_rounds(10_000)
        // All memory has to be too much for it, if it is held.
        .downtime_limit(Duration::from_millis(if held { 100 } else { 500 }));
    let open = Arc::new(AtomicBool::new(!held));
    let parts = tx::Parts {
        sources: vec![machine.source(), Box::new(Gate(Arc::clone(&open)))],
        vmm: Box::new(machine),
        memory: here.clone(),
        dial: links.dial(),
        config: config.build().expect("within the limits"),
        spawner: None,
    };
    let (began, host) = (Instant::now(), Host::watch());
    let migration = tx::Migration::start(parts).expect("a migration");
    let handle = migration.handle();
    let done = Arc::new(AtomicBool::new(false));
    let (watched, ended) = (handle.clone(), Arc::clone(&done));
    let watch = std::thread::spawn(move || {
        let (mut acked, mut since, mut pause) = (0, Instant::now(), Duration::ZERO);
        while !ended.load(Ordering::Relaxed) {
            let now = watched.progress();
            if now.acked_bytes != acked || !matches!(now.phase, Phase::Rounds) {
                (acked, since) = (now.acked_bytes, Instant::now());
            }
            pause = pause.max(since.elapsed());
            std::thread::sleep(Duration::from_millis(2));
        }
        pause
    });
    while handle.progress().sent_bytes < bytes / 2 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let written = writes();
    let up = disturb(&links, &handle);
    let written = writes() - written;
    let back = up.map(|up| {
        let before = handle.progress().acked_bytes;
        while handle.progress().acked_bytes == before {
            assert!(up.elapsed() < 10 * GRACE, "it does not go on");
            std::thread::sleep(Duration::from_millis(1));
        }
        up.elapsed()
    });
    open.store(true, Ordering::SeqCst);
    let finished = within(Duration::from_secs(300), "the end", || migration.wait());
    let (total, delayed) = (began.elapsed(), host.delayed());
    done.store(true, Ordering::Relaxed);
    assert!(finished.error.is_none(), "{:?}", finished.error);
    assert!(destination.end(GRACE).finished.error.is_none());
    let there = landed.lock().expect("no panics").clone().expect("memory");
    assert_eq!(differing_page(&here, &there), None);
    Run {
        total,
        report: finished.report,
        pause: watch.join().expect("the watch"),
        written,
        back,
        delayed,
    }
}

fn told(name: &str, run: &Run) {
    let r = &run.report;
    println!(
        "{name:<28} {:7.3} s, {:7.1} MiB sent, {:5.2} MiB of it again, {} lanes lost, {} opened again, {} suspensions of {:.3} s, longest pause {:.3} s, downtime {:.0} ms",
        run.total.as_secs_f64(),
        r.sent_bytes as f64 / MIB,
        r.sent_again_bytes as f64 / MIB,
        r.channels_lost,
        r.channels_reopened,
        r.suspensions,
        r.suspended_ms / 1e3,
        run.pause.as_secs_f64(),
        r.downtime_ms.unwrap_or_default(),
    );
}

#[test]
fn an_interruption_costs_what_was_on_its_way() {
    let asked = std::env::var("MULTIFD_INTERRUPTED_BYTES").ok();
    let measured = asked.is_some();
    let bytes = asked.map_or(64 << 20, |text| text.parse().expect("a number of bytes"));
    let away = Duration::from_secs(if measured { 5 } else { 1 });

    let mut undisturbed: Vec<Run> = (0..3).map(|_| run(bytes, false, |_, _| None)).collect();
    undisturbed.sort_by_key(|run| run.total);
    for run in &undisturbed {
        told("undisturbed", run);
    }
    let plain = &undisturbed[1];

    let cut = run(bytes, !measured, |links, _| {
        links.take_down();
        std::thread::sleep(away);
        links.set_down(false);
        Some(Instant::now())
    });
    told("everything cut", &cut);
    let back = cut.back.expect("the link came back");
    let dirtied = cut.written * 4096;
    println!(
        "    back {:.3} s after the link; the guest wrote {:.1} MiB meanwhile; 1 % of memory is {:.1} MiB",
        back.as_secs_f64(),
        dirtied as f64 / MIB,
        bytes as f64 / 100.0 / MIB
    );
    assert_eq!(cut.report.suspensions, 1);
    // What four sockets of this host hold, both ends: the window.
    let window = 4 * (4 << 20);
    assert!(cut.report.sent_again_bytes <= bytes / 100 + window);
    assert!(back < Duration::from_secs(1) + cut.delayed, "{back:?}");

    let mut ratios = Vec::new();
    for _ in 0..3 {
        let one = run(bytes, !measured, |links, handle| {
            let dialled = links.dialled();
            links.cut_lane(2);
            let since = Instant::now();
            while !measured && (links.dialled() == dialled || handle.progress().lanes < 4) {
                assert!(since.elapsed() < 10 * GRACE, "the lane does not come back");
                std::thread::sleep(Duration::from_millis(1));
            }
            None
        });
        told("one of four lanes cut", &one);
        assert_eq!(
            (one.report.channels_lost, one.report.channels_reopened),
            (1, 1)
        );
        let pause_max = Duration::from_secs(1) + one.delayed;
        assert!(one.pause < pause_max, "{:?}", one.pause);
        ratios.push(one.total.as_secs_f64() / plain.total.as_secs_f64());
    }
    ratios.sort_by(f64::total_cmp);
    println!(
        "    median of total time to the undisturbed one's: {:.3}",
        ratios[1]
    );
    if measured {
        assert!(ratios[1] <= 1.35, "{ratios:?}");
    }
}
