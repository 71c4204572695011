//! What the settings of both roles share: ranges, the waits that both have, and the error of a value that is out of its range.

use std::fmt::Display;
use std::time::Duration;

use multifd_wire::limits;

/// The most data channels that the format has room for.
pub(crate) const LANES_MAX: u32 = limits::LANES_MAX as u32;

/// The longest time that can be set, for any wait.
pub(crate) const HOUR: Duration = Duration::from_secs(3600);

/// The shortest time in which a peer on another host can be expected to do anything.
pub(crate) const SHORTEST: Duration = Duration::from_millis(100);

/// A setting that is out of its range. The text says which range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{setting} is {value}, but must be {range}")]
pub struct ConfigError {
    setting: &'static str,
    value: String,
    range: String,
}

/// Checks that `least <= value <= most`.
pub(crate) fn within<T: PartialOrd + Display>(
    setting: &'static str,
    value: &T,
    least: &T,
    most: &T,
) -> Result<(), ConfigError> {
    if value < least || value > most {
        return Err(ConfigError {
            setting,
            value: value.to_string(),
            range: format!("{least} to {most}"),
        });
    }
    Ok(())
}

/// Checks that `least <= value <= most`, of a time.
pub(crate) fn within_time(
    setting: &'static str,
    value: Duration,
    least: Duration,
    most: Duration,
) -> Result<(), ConfigError> {
    if value < least || value > most {
        return Err(ConfigError {
            setting,
            value: format!("{value:?}"),
            range: format!("{least:?} to {most:?}"),
        });
    }
    Ok(())
}

/// The waits that both roles have, as they were set.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Waits {
    pub device_deadline: Duration,
    pub hello_deadline: Duration,
    pub setup_deadline: Duration,
    pub stall: Duration,
    pub keep_alive: Duration,
    pub progress_deadline: Duration,
}

impl Default for Waits {
    fn default() -> Self {
        Self {
            device_deadline: Duration::from_secs(10),
            hello_deadline: Duration::from_secs(5),
            setup_deadline: Duration::from_secs(60),
            stall: Duration::from_secs(10),
            keep_alive: Duration::from_secs(1),
            progress_deadline: Duration::from_secs(60),
        }
    }
}

impl Waits {
    /// Checks each against its range.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        const INSTANT: Duration = Duration::from_millis(10);
        const HELLO_MAX: Duration = Duration::from_secs(600);
        within_time("device deadline", self.device_deadline, INSTANT, HOUR)?;
        within_time("hello deadline", self.hello_deadline, SHORTEST, HELLO_MAX)?;
        within_time("set-up deadline", self.setup_deadline, SHORTEST, HOUR)?;
        within_time("stall", self.stall, SHORTEST, HOUR)?;
        within_time("keep-alive", self.keep_alive, INSTANT, self.stall / 2)?;
        within_time(
            "progress deadline",
            self.progress_deadline,
            self.stall,
            HOUR,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_wait_is_accepted_at_its_bounds_and_refused_one_past_them() {
        const NANO: Duration = Duration::from_nanos(1);
        let ms = Duration::from_millis;
        type Set = fn(&mut Waits, Duration);
        let table: [(&str, Set, Duration, Duration); 6] = [
            (
                "device deadline",
                |w, t| w.device_deadline = t,
                ms(10),
                HOUR,
            ),
            (
                "hello deadline",
                |w, t| w.hello_deadline = t,
                ms(100),
                ms(600_000),
            ),
            (
                "set-up deadline",
                |w, t| w.setup_deadline = t,
                ms(100),
                HOUR,
            ),
            (
                "stall",
                |w, t| {
                    w.stall = t;
                    w.keep_alive = t / 2;
                    w.progress_deadline = t;
                },
                ms(100),
                HOUR,
            ),
            ("keep-alive", |w, t| w.keep_alive = t, ms(10), ms(5_000)),
            (
                "progress deadline",
                |w, t| w.progress_deadline = t,
                ms(10_000),
                HOUR,
            ),
        ];
        Waits::default().check().unwrap();
        for (name, set, least, most) in table {
            let check = |time| {
                let mut waits = Waits::default();
                set(&mut waits, time);
                waits.check().map_err(|error| error.to_string())
            };
            assert_eq!(check(least), Ok(()), "{name}");
            assert_eq!(check(most), Ok(()), "{name}");
            for past in [least - NANO, most + NANO] {
                let text = check(past).unwrap_err();
                assert!(text.starts_with(name) && text.contains("must be"), "{text}");
            }
        }
    }
}
