//! Shows the progress while a migration runs, and cancels it or has it switch over when the user wants that.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use multifd_cli::control::{self, Door};
use multifd_cli::flags::{Output, ProgressKind};
use multifd_cli::signals::Asked;
use multifd_sender::{Finished, Migration};

use crate::display::Display;
use crate::events::Events;

/// How often it looks.
const PERIOD: Duration = Duration::from_millis(20);

/// Waits for the end.
pub(crate) fn watch(
    output: &Output,
    migration: Migration,
    asked: Asked,
    switch_over: Asked,
    door: Option<Door>,
) -> Finished {
    let handle = migration.handle();
    let control = control::serve("multifd-send", door, &handle);
    let done = Arc::new(AtomicBool::new(false));
    let ended = Arc::clone(&done);
    let mut display = Display::new(output.quiet);
    let mut events = (output.progress == ProgressKind::Json).then(Events::default);
    let watcher = std::thread::Builder::new().spawn(move || {
        let mut told = false;
        while !ended.load(Ordering::Relaxed) {
            if asked.load(Ordering::Relaxed) && !told {
                told = true;
                handle.cancel();
                if let Some(events) = &mut events {
                    events.cancelling(&handle.progress());
                }
            }
            if switch_over.swap(false, Ordering::Relaxed) {
                handle.switch_over_now();
            }
            let now = handle.progress();
            if let Some(events) = &mut events {
                events.show(&now);
            }
            display.show(now);
            std::thread::sleep(PERIOD);
        }
        display.finish();
    });
    // The migration needs nobody who watches it.
    if let Err(error) = &watcher {
        err!("multifd-send: no progress display, and Ctrl-C does not cancel: {error}");
    }
    let finished = migration.wait();
    done.store(true, Ordering::Relaxed);
    let _ = watcher.map(std::thread::JoinHandle::join);
    let error = finished.report.error.as_ref();
    control::end(control, &finished.report.outcome, error);
    finished
}
