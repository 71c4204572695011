//! SIGINT, SIGTERM and SIGHUP: each asks for a cancellation, and no number of them ends the program in the middle of it.
//!
//! The rule it keeps: a guest lives in this process, so that nothing but SIGQUIT and SIGKILL ends it without a report. `timeout` and
//! service managers send a signal twice at once, and a terminal that is closed sends SIGHUP.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;

/// Becomes true with the first signal.
pub type Asked = Arc<AtomicBool>;

/// From now on signals only ask. `meanwhile`: what a user is told who asks again.
///
/// # Errors
/// No handler or no thread could be had; nothing has begun.
pub fn catch(program: &'static str, meanwhile: &'static str) -> io::Result<Asked> {
    let asked = Asked::default();
    let mut wanted = vec![SIGINT, SIGTERM];
    // Under `nohup` it is ignored from the start, and stays so.
    if !ignored_from_the_start(SIGHUP) {
        wanted.push(SIGHUP);
    }
    let mut signals = Signals::new(wanted)?;
    // Sent to the wrong program they would end it, and the guest with it.
    for harmless in [SIGUSR1, SIGUSR2] {
        signal_hook::flag::register(harmless, Asked::default())?;
    }
    let flag = Arc::clone(&asked);
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for signal in signals.forever() {
                if flag.swap(true, Ordering::Relaxed) && signal == SIGINT {
                    err!("{program}: {meanwhile}");
                }
            }
        })?;
    Ok(asked)
}

/// Becomes true with each SIGUSR1, until whoever heeds it makes it false.
///
/// # Errors
/// No handler could be had.
pub fn catch_switch_over() -> io::Result<Asked> {
    let asked = Asked::default();
    signal_hook::flag::register(SIGUSR1, Arc::clone(&asked))?;
    Ok(asked)
}

/// Whether this process was started with the signal ignored.
fn ignored_from_the_start(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    ignores(&status, signal)
}

/// By the mask `SigIgn` of /proc/PID/status, whose lowest bit is signal 1.
fn ignores(status: &str, signal: i32) -> bool {
    status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_of_ignored_signals_is_read() {
        let status = "Name:\tx\nSigIgn:\t0000000000001001\nSigCgt:\t0\n";
        assert!(ignores(status, SIGHUP));
        assert!(!ignores(status, SIGINT));
        assert!(!ignores("", SIGHUP));
    }
}
