//! The settings that both sides have.

use std::time::Duration;

use crate::machine::HORIZON_DEFAULT;

/// How a bridge behaves. Both sides choose their own.
#[derive(Debug, Clone)]
pub struct Config {
    /// How long the link may be gone before the migration is given up. Below libvirt's 25 s, after which it gives its own connection up.
    pub outage: Duration,
    /// How long what is held between the monitors may take to arrive, beside the round trip.
    pub horizon: Duration,
    /// Nothing acknowledged on a channel for so long: it is closed and dialled again.
    pub stall: Duration,
    /// How long the destination answers how the migration ended, when the source has not said that it knows.
    pub remember: Duration,
    /// How long the destination's monitor may take to be there.
    pub monitor_deadline: Duration,
    /// How long a hello may take.
    pub hello_deadline: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            outage: Duration::from_secs(20),
            horizon: HORIZON_DEFAULT,
            stall: Duration::from_secs(2),
            remember: Duration::from_secs(60),
            monitor_deadline: Duration::from_secs(10),
            hello_deadline: Duration::from_secs(5),
        }
    }
}
