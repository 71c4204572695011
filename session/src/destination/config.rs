//! The settings of the destination, validated once.

use std::time::Duration;

use multifd_wire::Token;

pub use crate::common::ConfigError;
use crate::common::config::{HOUR, LANES_MAX, Waits, within, within_time};

/// Whether a guest may be larger than the memory that is left for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Overcommit {
    /// It may not: a guest that uses all its memory must find room.
    #[default]
    Refused,
    /// It may: whoever runs this host counts on guests that do not use all of theirs.
    Allowed,
}

/// What becomes of a reception when a source's set-up did not come to its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum AfterFailedSetup {
    /// It ends, and says why.
    #[default]
    End,
    /// It goes on waiting, since it may have been anybody. The machine is discarded, and built anew for the next source.
    WaitOn,
}

/// The validated settings. Made by [`Config::builder`].
#[derive(Debug, Clone)]
pub struct Config {
    pub(super) lanes_max: u32,
    pub(super) pass: Token,
    pub(super) after_failed_setup: AfterFailedSetup,
    pub(super) memory_bytes_max: Option<u64>,
    pub(super) overcommit: Overcommit,
    pub(super) blob_bytes_max: u64,
    pub(super) device_window_bytes: u64,
    pub(super) device_bytes_max: u64,
    pub(super) device_deadline: Duration,
    pub(super) hello_deadline: Duration,
    pub(super) setup_deadline: Duration,
    pub(super) stall: Duration,
    pub(super) keep_alive: Duration,
    pub(super) ack_period: Duration,
    pub(super) suspend: Duration,
    pub(super) progress_deadline: Duration,
}

impl Config {
    /// Begins with the defaults.
    #[must_use]
    pub fn builder() -> ConfigBuilder {
        ConfigBuilder {
            config: Self::default(),
        }
    }

    /// What a source has to show to begin; [`Token::NONE`]: nothing.
    #[must_use]
    pub fn pass(&self) -> Token {
        self.pass
    }

    /// What becomes of the reception when a set-up failed.
    #[must_use]
    pub fn after_failed_setup(&self) -> AfterFailedSetup {
        self.after_failed_setup
    }

    /// The most data channels that a source is granted.
    #[must_use]
    pub fn lanes_max(&self) -> u32 {
        self.lanes_max
    }

    /// The largest guest that is taken; no bound without.
    #[must_use]
    pub fn memory_bytes_max(&self) -> Option<u64> {
        self.memory_bytes_max
    }

    /// Whether a guest may be larger than the memory that is left for it.
    #[must_use]
    pub fn overcommit(&self) -> Overcommit {
        self.overcommit
    }

    /// The most bytes of configuration or VM state.
    #[must_use]
    pub fn blob_bytes_max(&self) -> u64 {
        self.blob_bytes_max
    }

    /// The most bytes of one device that wait to be loaded.
    #[must_use]
    pub fn device_window_bytes(&self) -> u64 {
        self.device_window_bytes
    }

    /// The most bytes that one device holds elsewhere.
    #[must_use]
    pub fn device_bytes_max(&self) -> u64 {
        self.device_bytes_max
    }

    /// How long one call of a device may take.
    #[must_use]
    pub fn device_deadline(&self) -> Duration {
        self.device_deadline
    }

    /// How long a connection may take to say hello.
    #[must_use]
    pub fn hello_deadline(&self) -> Duration {
        self.hello_deadline
    }

    /// How long the set-up may take.
    #[must_use]
    pub fn setup_deadline(&self) -> Duration {
        self.setup_deadline
    }

    /// How long a channel may be silent before it is given up.
    #[must_use]
    pub fn stall(&self) -> Duration {
        self.stall
    }

    /// How often a sign of life is sent.
    #[must_use]
    pub fn keep_alive(&self) -> Duration {
        self.keep_alive
    }

    /// How often what landed is acknowledged.
    #[must_use]
    pub fn ack_period(&self) -> Duration {
        self.ack_period
    }

    /// How long a session without channels is kept.
    #[must_use]
    pub fn suspend(&self) -> Duration {
        self.suspend
    }

    /// How long a source may live without sending anything.
    #[must_use]
    pub fn progress_deadline(&self) -> Duration {
        self.progress_deadline
    }
}

impl Default for Config {
    fn default() -> Self {
        let waits = Waits::default();
        Self {
            lanes_max: LANES_MAX,
            pass: Token::NONE,
            after_failed_setup: AfterFailedSetup::End,
            memory_bytes_max: None,
            overcommit: Overcommit::Refused,
            blob_bytes_max: 64 << 20,
            device_window_bytes: 16 << 20,
            device_bytes_max: 1 << 30,
            device_deadline: waits.device_deadline,
            hello_deadline: waits.hello_deadline,
            setup_deadline: waits.setup_deadline,
            stall: waits.stall,
            keep_alive: waits.keep_alive,
            ack_period: Duration::from_millis(20),
            suspend: Duration::from_secs(60),
            progress_deadline: waits.progress_deadline,
        }
    }
}

/// Builds a [`Config`]; each method replaces one default.
#[derive(Debug, Clone)]
pub struct ConfigBuilder {
    config: Config,
}

impl ConfigBuilder {
    /// The most data channels that the source is granted; 1 to `wire::limits::LANES_MAX`.
    #[must_use]
    pub fn lanes_max(mut self, lanes: u32) -> Self {
        self.config.lanes_max = lanes;
        self
    }

    /// What a source has to show to begin. The default, [`Token::NONE`], is that anybody may.
    #[must_use]
    pub fn pass(mut self, pass: Token) -> Self {
        self.config.pass = pass;
        self
    }

    /// What becomes of the reception when a source's set-up did not come to its end. The default is to end.
    #[must_use]
    pub fn after_failed_setup(mut self, then: AfterFailedSetup) -> Self {
        self.config.after_failed_setup = then;
        self
    }

    /// The most guest memory that is accepted, in bytes. `None`: what the VMM can build.
    #[must_use]
    pub fn memory_bytes_max(mut self, octets: Option<u64>) -> Self {
        self.config.memory_bytes_max = octets;
        self
    }

    /// Whether a guest is taken that may need more memory than the host or this process's control groups have left. The default
    /// refuses it in set-up. A file that is too short, or that can't grow to what is mapped of it, and missing huge pages are refused in
    /// any case (`GuestMemory::check_backing` of the transport).
    #[must_use]
    pub fn overcommit(mut self, overcommit: Overcommit) -> Self {
        self.config.overcommit = overcommit;
        self
    }

    /// The most bytes of configuration, and again of VM state, that are held in memory; 1 MiB to 1 GiB.
    #[must_use]
    pub fn blob_bytes_max(mut self, octets: u64) -> Self {
        self.config.blob_bytes_max = octets;
        self
    }

    /// How much of one device's state is held at most while it waits to be loaded, in bytes; 64 KiB to 1 GiB. It should be what
    /// the link carries in the time of a round trip, and of 20 ms of loading. The device's configuration is held whole and
    /// counts, so it can't be larger. What it costs: at most 8/7 of it for buffers, one chunk, and 1/16 for
    /// bookkeeping if the source sends the smallest chunks (`tests/tests/misbehaviour_device_memory.rs`).
    #[must_use]
    pub fn device_window_bytes(mut self, octets: u64) -> Self {
        self.config.device_window_bytes = octets;
        self
    }

    /// How much all devices' windows may be together, in bytes; 64 KiB to 1 TiB. A source with more devices is refused.
    #[must_use]
    pub fn device_bytes_max(mut self, octets: u64) -> Self {
        self.config.device_bytes_max = octets;
        self
    }

    /// How long one call of a device's own code may take: a step, a write; 10 ms to 1 hour. One that does not return ends the
    /// migration without waiting for it. Any thread that is to end has as long: the VMM's at the end, a data channel's when it was
    /// closed. The default is 10 s.
    #[must_use]
    pub fn device_deadline(mut self, deadline: Duration) -> Self {
        self.config.device_deadline = deadline;
        self
    }

    /// How long a new connection may take to say hello; 100 ms to 10 min.
    #[must_use]
    pub fn hello_deadline(mut self, deadline: Duration) -> Self {
        self.config.hello_deadline = deadline;
        self
    }

    /// How long set-up may take, the VMM's own work included; 100 ms to 1 hour.
    #[must_use]
    pub fn setup_deadline(mut self, deadline: Duration) -> Self {
        self.config.setup_deadline = deadline;
        self
    }

    /// A source from which nothing is heard for this long is given up; 100 ms to 1 hour.
    #[must_use]
    pub fn stall(mut self, stall: Duration) -> Self {
        self.config.stall = stall;
        self
    }

    /// How often this side says that it lives; 10 ms to half of `stall`.
    #[must_use]
    pub fn keep_alive(mut self, period: Duration) -> Self {
        self.config.keep_alive = period;
        self
    }

    /// How long a migration that lost its channels is kept for the source to come back, with the guest's memory, before
    /// everything is freed; and how long the source may ask how it ended. Zero: not at all. At most 1 hour.
    #[must_use]
    pub fn suspend(mut self, time: Duration) -> Self {
        self.config.suspend = time;
        self
    }

    /// A source that says that it lives, and sends nothing else for this long, is given up; `stall` to 1 hour.
    #[must_use]
    pub fn progress_deadline(mut self, deadline: Duration) -> Self {
        self.config.progress_deadline = deadline;
        self
    }

    /// Checks every setting.
    ///
    /// # Errors
    /// The first setting that is out of its range, by name, with the range.
    pub fn build(self) -> Result<Config, ConfigError> {
        let c = &self.config;
        within("lanes max", &c.lanes_max, &1, &LANES_MAX)?;
        within("blob bytes max", &c.blob_bytes_max, &(1 << 20), &(1 << 30))?;
        within(
            "device window bytes",
            &c.device_window_bytes,
            &(64 << 10),
            &(1 << 30),
        )?;
        within(
            "device bytes max",
            &c.device_bytes_max,
            &(64 << 10),
            &(1 << 40),
        )?;
        Waits {
            device_deadline: c.device_deadline,
            hello_deadline: c.hello_deadline,
            setup_deadline: c.setup_deadline,
            stall: c.stall,
            keep_alive: c.keep_alive,
            progress_deadline: c.progress_deadline,
        }
        .check()?;
        within_time("suspend", c.suspend, Duration::ZERO, HOUR)?;
        Ok(self.config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_setting_is_accepted_at_its_bounds_and_refused_one_past_them() {
        let ms = Duration::from_millis;
        let bad = |b: ConfigBuilder, name: &str| {
            assert!(b.build().unwrap_err().to_string().starts_with(name))
        };
        let b = Config::builder;
        b().build().unwrap();
        b().lanes_max(1).build().unwrap();
        bad(b().lanes_max(0), "lanes max");
        bad(b().lanes_max(LANES_MAX + 1), "lanes max");
        b().blob_bytes_max(1 << 20).build().unwrap();
        bad(b().blob_bytes_max((1 << 20) - 1), "blob bytes max");
        bad(b().blob_bytes_max((1 << 30) + 1), "blob bytes max");
        b().device_window_bytes(64 << 10).build().unwrap();
        bad(
            b().device_window_bytes((64 << 10) - 1),
            "device window bytes",
        );
        bad(
            b().device_window_bytes((1 << 30) + 1),
            "device window bytes",
        );
        bad(b().device_bytes_max((64 << 10) - 1), "device bytes max");
        bad(b().device_bytes_max((1 << 40) + 1), "device bytes max");
        bad(b().hello_deadline(ms(99)), "hello deadline");
        bad(b().setup_deadline(ms(99)), "set-up deadline");
        b().stall(ms(100)).keep_alive(ms(50)).build().unwrap();
        bad(b().stall(ms(100)).keep_alive(ms(51)), "keep-alive");
        bad(b().stall(ms(99)).keep_alive(ms(20)), "stall");
        let hour = Duration::from_secs(3600);
        b().suspend(Duration::ZERO).build().unwrap();
        b().suspend(hour).build().unwrap();
        bad(b().suspend(hour + ms(1)), "suspend");
        b().stall(ms(900))
            .progress_deadline(ms(900))
            .keep_alive(ms(100))
            .build()
            .unwrap();
        bad(
            b().stall(ms(900))
                .progress_deadline(ms(899))
                .keep_alive(ms(100)),
            "progress deadline",
        );
        bad(b().progress_deadline(hour + ms(1)), "progress deadline");
    }
}
