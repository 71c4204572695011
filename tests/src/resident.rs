//! The memory that this process holds, and how high it rises while something is done. For tests that are alone in their process.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

/// The memory that this process holds.
///
/// # Panics
/// If the kernel does not say.
#[must_use]
pub fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("this is Linux");
    let field = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = field.and_then(|field| field.trim().strip_suffix(" kB"));
    kib.and_then(|kib| kib.parse::<u64>().ok())
        .expect("a number of KiB")
        << 10
}

/// The most that this process held while `act` ran, looked at every 2 ms.
///
/// # Panics
/// If `act` does.
pub fn peak_bytes(act: impl FnOnce()) -> u64 {
    let (stop, stopped) = channel::<()>();
    let watch = std::thread::spawn(move || {
        let mut most = 0;
        loop {
            most = most.max(resident_bytes());
            if stopped.recv_timeout(Duration::from_millis(2)) != Err(RecvTimeoutError::Timeout) {
                return most;
            }
        }
    });
    act();
    drop(stop);
    watch.join().expect("the watch")
}
