//! The limits of a migration that may be changed while it runs, and a change of one of them.
//!
//! The rules it keeps: a limit has the same range when it is set and when it is changed; and a change never begins, ends or undoes
//! anything by itself. It is heeded by the next decision, and where only time is waited for that is made at once.

use std::fmt;
use std::time::Duration;

use super::config::WhenNotConverging;
use crate::common::ConfigError;
use crate::common::config::{HOUR, within, within_time};

/// The most of a guest's time that may be held back, in percent: it always goes on a little.
pub const THROTTLE_MAX: u8 = 99;

/// Whether pages are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sending {
    /// As fast as the limits allow.
    #[default]
    On,
    /// Held: next to nothing is sent, and no switchover begins, until it goes on. The guest runs here, and what it writes is kept track of.
    Held,
}

/// The limits in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// The most bytes a second over all data channels; no bound without.
    pub bandwidth: Option<u64>,
    /// The longest predicted downtime at which the switchover is begun.
    pub downtime_limit: Duration,
    /// Live rounds after which the forecast decides.
    pub max_rounds: u32,
    /// What is done then.
    pub when_not_converging: WhenNotConverging,
    /// How much of the guest's time may be held back if it does not converge otherwise, in percent; 0: nothing.
    pub throttle_limit: u8,
    /// Whether pages are sent.
    pub sending: Sending,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bandwidth: None,
            downtime_limit: Duration::from_millis(300),
            max_rounds: 30,
            when_not_converging: WhenNotConverging::default(),
            throttle_limit: 0,
            sending: Sending::default(),
        }
    }
}

/// A change of one limit, with what it is from now on. The ranges are those of [`Config::builder`](super::Config::builder).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Steer {
    /// [`Limits::bandwidth`].
    Bandwidth(Option<u64>),
    /// [`Limits::downtime_limit`].
    DowntimeLimit(Duration),
    /// [`Limits::max_rounds`]. Rounds that were made count.
    MaxRounds(u32),
    /// [`Limits::when_not_converging`].
    WhenNotConverging(WhenNotConverging),
    /// [`Limits::throttle_limit`]. If more is held back, that is lowered at once.
    ThrottleLimit(u8),
    /// [`Limits::sending`].
    Sending(Sending),
}

impl Steer {
    /// Whether it is in its range.
    ///
    /// # Errors
    /// It is not: which setting, and the range.
    pub fn check(&self) -> Result<(), ConfigError> {
        Limits::default().with(*self).check()
    }
}

impl Limits {
    /// The same but for this change.
    #[must_use]
    pub(super) fn with(mut self, change: Steer) -> Self {
        match change {
            Steer::Bandwidth(cap) => self.bandwidth = cap,
            Steer::DowntimeLimit(limit) => self.downtime_limit = limit,
            Steer::MaxRounds(rounds) => self.max_rounds = rounds,
            Steer::WhenNotConverging(choice) => self.when_not_converging = choice,
            Steer::ThrottleLimit(percent) => self.throttle_limit = percent,
            Steer::Sending(sending) => self.sending = sending,
        }
        self
    }

    /// Whether each is in its range.
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let shortest = Duration::from_millis(1);
        within_time("downtime limit", self.downtime_limit, shortest, HOUR)?;
        if let Some(cap) = self.bandwidth {
            within("bandwidth (bytes a second)", &cap, &(1 << 20), &u64::MAX)?;
        }
        within("max rounds", &self.max_rounds, &1, &10_000)?;
        within(
            "throttle limit (percent)",
            &self.throttle_limit,
            &0,
            &THROTTLE_MAX,
        )
    }
}

impl fmt::Display for Steer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bandwidth(Some(cap)) => write!(f, "bandwidth cap {cap} bytes/s"),
            Self::Bandwidth(None) => f.write_str("no bandwidth cap"),
            Self::DowntimeLimit(limit) => write!(f, "downtime limit {limit:?}"),
            Self::MaxRounds(rounds) => write!(f, "at most {rounds} rounds"),
            Self::WhenNotConverging(WhenNotConverging::Fail) => {
                f.write_str("if not converging: fail")
            }
            Self::WhenNotConverging(WhenNotConverging::Switch) => {
                f.write_str("if not converging: switch")
            }
            Self::ThrottleLimit(percent) => write!(f, "throttle limit {percent} %"),
            Self::Sending(Sending::On) => f.write_str("sending goes on"),
            Self::Sending(Sending::Held) => f.write_str("sending is held"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_has_the_range_that_the_setting_has() {
        let ms = Duration::from_millis;
        for (change, name) in [
            (Steer::Bandwidth(Some((1 << 20) - 1)), "bandwidth"),
            (
                Steer::DowntimeLimit(Duration::from_micros(999)),
                "downtime limit",
            ),
            (Steer::DowntimeLimit(HOUR + ms(1)), "downtime limit"),
            (Steer::MaxRounds(0), "max rounds"),
            (Steer::MaxRounds(10_001), "max rounds"),
            (Steer::ThrottleLimit(100), "throttle limit"),
        ] {
            let text = change.check().unwrap_err().to_string();
            assert!(text.starts_with(name) && text.contains("must be"), "{text}");
        }
        for change in [
            Steer::Bandwidth(Some(1 << 20)),
            Steer::Bandwidth(None),
            Steer::DowntimeLimit(ms(1)),
            Steer::DowntimeLimit(HOUR),
            Steer::MaxRounds(1),
            Steer::MaxRounds(10_000),
            Steer::WhenNotConverging(WhenNotConverging::Switch),
            Steer::ThrottleLimit(0),
            Steer::ThrottleLimit(99),
            Steer::Sending(Sending::Held),
        ] {
            change.check().unwrap();
            let limits = Limits::default();
            assert_eq!(limits.with(change).with(change), limits.with(change));
        }
    }
}
