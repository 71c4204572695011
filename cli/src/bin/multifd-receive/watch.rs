//! Shows the progress while a guest arrives, and ends the reception when the user wants that.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use multifd_cli::control::{self, Door};
use multifd_cli::flags::{Output, ProgressKind, ReportKind};
use multifd_cli::signals::Asked;
use multifd_cli::units::Size;
use multifd_receiver::{Finished, Reception, Snapshot};
use multifd_wire::Phase;
use serde_json::json;

/// How often it looks.
const LOOK: Duration = Duration::from_millis(20);

/// How often it tells.
const PERIOD: Duration = Duration::from_secs(1);

/// Waits for the end.
pub(crate) fn watch(
    output: &Output,
    reception: Reception,
    asked: Asked,
    door: Option<Door>,
) -> Finished {
    let handle = reception.handle();
    let control = control::serve("multifd-receive", door, &handle);
    let done = Arc::new(AtomicBool::new(false));
    let ended = Arc::clone(&done);
    // Who reads the report as JSON does not read lines for people.
    let quiet = output.quiet || output.report() == ReportKind::Json;
    let events = output.progress == ProgressKind::Json;
    let watcher = std::thread::Builder::new().spawn(move || {
        let (began, mut told) = (Instant::now(), Instant::now());
        let mut phase = None;
        while !ended.load(Ordering::Relaxed) {
            if asked.load(Ordering::Relaxed) {
                handle.cancel();
            }
            let now = handle.progress();
            let new = phase.replace(now.phase) != Some(now.phase);
            let due = now.memory_pages > 0 && told.elapsed() > PERIOD;
            if events && (new || due) {
                event(if new { "phase" } else { "progress" }, began, &now);
            }
            if due {
                told = Instant::now();
                if !quiet {
                    say(&now);
                }
            }
            std::thread::sleep(LOOK);
        }
    });
    // The reception needs nobody who watches it.
    if let Err(error) = &watcher {
        err!("multifd-receive: no progress display, and Ctrl-C does not end it: {error}");
    }
    let finished = reception.wait();
    done.store(true, Ordering::Relaxed);
    let _ = watcher.map(std::thread::JoinHandle::join);
    let error = finished.report.error.as_ref();
    control::end(control, &finished.report.outcome, error);
    finished
}

fn say(now: &Snapshot) {
    if now.phase == Phase::Suspended {
        err!("  link lost: keeping what came until the source is back");
        return;
    }
    err!(
        "  round {}: {} received on {} channels ({})",
        now.round,
        Size(now.received_bytes),
        now.lanes,
        now.phase
    );
    if now.devices > 0 {
        err!(
            "  devices: {} loaded, {} of {} have everything",
            Size(now.device_bytes),
            now.devices_loaded,
            now.devices
        );
    }
}

fn event(name: &str, began: Instant, now: &Snapshot) {
    out!(
        "{}",
        json!({
            "event": name,
            "elapsed_ms": began.elapsed().as_millis() as u64,
            "phase": now.phase.to_string(),
            "round": now.round,
            "channels_open": now.lanes,
            "memory_bytes": now.memory_pages * 4096,
            "received_bytes": now.received_bytes,
            "devices": now.devices,
            "devices_loaded": now.devices_loaded,
            "device_bytes": now.device_bytes,
        })
    );
}
