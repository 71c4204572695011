//! How long a host kept its work waiting, by its own account: what a claim about time has to leave out.
//!
//! A bound in seconds is a claim about the product on a host that gives it a processor. On a host that doesn't, the bound is longer
//! by what the kernel says that tasks waited for processors, disks and memory (pressure stall information, in the kernel's
//! `Documentation/accounting/psi.rst`), and by what a hypervisor took (`steal` in `/proc/stat`). An idle host adds nothing. Without
//! pressure information nothing is added but the stolen time. Some task waits somewhere all the time on a host with much to do, so
//! that is not the whole truth, and no excuse without end: at most `EXCUSED` of the time that passed is left out.

use std::time::{Duration, Instant};

/// Length of the ticks of `/proc/stat`, which are always 1/100 s to programs.
const TICK: Duration = Duration::from_millis(10);

/// The largest part of the time that passed for which a host is blamed: a bound is never more than four times what it says.
const EXCUSED: f64 = 0.75;

/// What this host has kept waiting since it was looked at first.
#[derive(Debug, Clone, Copy)]
pub struct Host {
    began: Instant,
    before: Duration,
}

impl Host {
    /// Looks at it.
    #[must_use]
    pub fn watch() -> Self {
        Self {
            began: Instant::now(),
            before: waited() + stolen(),
        }
    }

    /// The time since then in which something waited for the host; at most `EXCUSED` of what has passed.
    #[must_use]
    pub fn delayed(&self) -> Duration {
        let delayed = (waited() + stolen()).saturating_sub(self.before);
        delayed.min(self.began.elapsed().mul_f64(EXCUSED))
    }

    /// The same in milliseconds, as reports have them.
    #[must_use]
    pub fn delayed_ms(&self) -> f64 {
        self.delayed().as_secs_f64() * 1e3
    }
}

/// Time in which at least one task waited, since the host was started.
fn waited() -> Duration {
    ["cpu", "io", "memory"]
        .into_iter()
        .filter_map(|what| std::fs::read_to_string(format!("/proc/pressure/{what}")).ok())
        .filter_map(|text| some_total(&text))
        .sum()
}

/// The `total` of the line of what `some` task waited for.
fn some_total(text: &str) -> Option<Duration> {
    let line = text.lines().find(|line| line.starts_with("some "))?;
    let (_, total) = line.split_once("total=")?;
    total.parse().ok().map(Duration::from_micros)
}

/// Time that went to other machines, of all processors together.
fn stolen() -> Duration {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let ticks = text
        .lines()
        .next()
        .and_then(|all| all.split_whitespace().nth(8))
        .and_then(|steal| steal.parse().ok());
    TICK * ticks.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_host_is_an_excuse_without_end() {
        let host = Host {
            began: Instant::now(),
            before: Duration::ZERO,
        };
        std::thread::sleep(Duration::from_millis(20));
        let (delayed, passed) = (host.delayed(), host.began.elapsed());
        assert!(
            delayed <= passed.mul_f64(EXCUSED),
            "{delayed:?} of {passed:?}"
        );
    }

    #[test]
    fn the_time_that_some_task_waited_is_read() {
        let text = "some avg10=0.10 avg60=0.02 avg300=0.00 total=1500\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n";
        assert_eq!(some_total(text), Some(Duration::from_micros(1500)));
        assert_eq!(some_total("full avg10=0.00 total=7\n"), None);
    }
}
