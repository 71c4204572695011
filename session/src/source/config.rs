//! The settings of one migration, validated once.
//!
//! A [`Config`] can only be made by [`ConfigBuilder::build`], so every value in it is within its limits.

use std::time::Duration;

use multifd_wire::{PAGE_BYTES, Token, limits};

use super::steer::Limits;
pub use crate::common::ConfigError;
use crate::common::config::{HOUR, LANES_MAX, SHORTEST, Waits, within, within_time};

/// What to do when the guest dirties memory faster than it can be moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum WhenNotConverging {
    /// Give up after the last allowed round, or after a few that are clearly in vain; the guest goes on running at the source,
    /// and the error says what would help.
    #[default]
    Fail,
    /// Switch over then, whatever the downtime.
    Switch,
}

/// What to do when the destination says that it does not know the migration any more: its process was restarted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum WhenDestinationLost {
    /// Give up; the guest goes on running at the source.
    #[default]
    Fail,
    /// Begin again with all of memory, at the destination that answers there now.
    StartAfresh,
}

/// Whether to look for writes to guest memory that no source of dirty pages reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum DirtyScan {
    /// No.
    #[default]
    Off,
    /// Yes: when everything is sent and the guest stands still, all of its memory is read once more and compared with what
    /// was sent. The migration fails if a page differs, and the error names it. For developing a VMM: reading a GiB
    /// takes some tenths of a second, and the guest stands still meanwhile.
    AtSwitchover,
}

/// What to do when devices have not had their initial bytes loaded by the acknowledgement deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum WhenAckLate {
    /// Give up; the guest goes on running at the source.
    #[default]
    Fail,
    /// Switch over without: what was to be loaded before is loaded while the guest stands still.
    GoOn,
}

/// The validated settings of a migration. Made by [`Config::builder`].
#[derive(Debug, Clone)]
pub struct Config {
    pub(super) channels: u32,
    pub(super) pass: Token,
    pub(super) lanes_at_work: Option<u32>,
    pub(super) limits: Limits,
    pub(super) body_pages: u64,
    pub(super) device_chunk: u64,
    pub(super) ack_deadline: Option<Duration>,
    pub(super) when_ack_late: WhenAckLate,
    pub(super) device_deadline: Duration,
    pub(super) hello_deadline: Duration,
    pub(super) setup_deadline: Duration,
    pub(super) stall: Duration,
    pub(super) keep_alive: Duration,
    pub(super) commit_deadline: Duration,
    pub(super) reconnect: Duration,
    pub(super) progress_deadline: Duration,
    pub(super) when_destination_lost: WhenDestinationLost,
    pub(super) dirty_scan: DirtyScan,
}

impl Config {
    /// Begins with the defaults: 4 channels, 300 ms downtime limit, no bandwidth cap, 30 rounds.
    #[must_use]
    pub fn builder() -> ConfigBuilder {
        ConfigBuilder::default()
    }

    /// What the destination is shown; [`Token::NONE`]: nothing.
    #[must_use]
    pub fn pass(&self) -> Token {
        self.pass
    }

    /// Number of data channels.
    #[must_use]
    pub fn channels(&self) -> u32 {
        self.channels
    }

    /// The longest time that the guest may stand still.
    #[must_use]
    pub fn downtime_limit(&self) -> Duration {
        self.limits.downtime_limit
    }

    /// How many lanes take pages at the same time at first; as many as the host makes sensible if it was not set.
    #[must_use]
    pub fn lanes_at_work(&self) -> Option<u32> {
        self.lanes_at_work
    }

    /// The most bytes per second, over all channels; no bound without.
    #[must_use]
    pub fn bandwidth(&self) -> Option<u64> {
        self.limits.bandwidth
    }

    /// Live rounds after which the forecast decides.
    #[must_use]
    pub fn rounds_max(&self) -> u32 {
        self.limits.max_rounds
    }

    /// What is done when the rounds are used up.
    #[must_use]
    pub fn when_not_converging(&self) -> WhenNotConverging {
        self.limits.when_not_converging
    }

    /// How much of the guest's time may be held back, in percent.
    #[must_use]
    pub fn throttle_limit(&self) -> u8 {
        self.limits.throttle_limit
    }

    /// All limits that may be changed while it runs, as they are at first.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Pages in the body of one frame at most.
    #[must_use]
    pub fn body_pages(&self) -> u64 {
        self.body_pages
    }

    /// Bytes of device state in one frame at most.
    #[must_use]
    pub fn device_chunk(&self) -> u64 {
        self.device_chunk
    }

    /// How long initial bytes of devices are waited for.
    #[must_use]
    pub fn ack_deadline(&self) -> Option<Duration> {
        self.ack_deadline
    }

    /// What is done when they are not loaded by then.
    #[must_use]
    pub fn when_ack_late(&self) -> WhenAckLate {
        self.when_ack_late
    }

    /// How long one call of a device may take.
    #[must_use]
    pub fn device_deadline(&self) -> Duration {
        self.device_deadline
    }

    /// How long connecting and greeting may take.
    #[must_use]
    pub fn hello_deadline(&self) -> Duration {
        self.hello_deadline
    }

    /// How long the destination may take to get ready.
    #[must_use]
    pub fn setup_deadline(&self) -> Duration {
        self.setup_deadline
    }

    /// How long a channel may take nothing before it is given up.
    #[must_use]
    pub fn stall(&self) -> Duration {
        self.stall
    }

    /// How often the destination is asked whether it is there.
    #[must_use]
    pub fn keep_alive(&self) -> Duration {
        self.keep_alive
    }

    /// How long the destination may take to run the guest after the commit.
    #[must_use]
    pub fn commit_deadline(&self) -> Duration {
        self.commit_deadline
    }

    /// How long a lost link is dialled again.
    #[must_use]
    pub fn reconnect(&self) -> Duration {
        self.reconnect
    }

    /// How long a destination may live without taking anything.
    #[must_use]
    pub fn progress_deadline(&self) -> Duration {
        self.progress_deadline
    }

    /// What is done when the destination no longer knows the migration.
    #[must_use]
    pub fn when_destination_lost(&self) -> WhenDestinationLost {
        self.when_destination_lost
    }

    /// Whether all of memory is compared once more in the end.
    #[must_use]
    pub fn dirty_scan(&self) -> DirtyScan {
        self.dirty_scan
    }
}

impl Default for Config {
    fn default() -> Self {
        // The defaults are within every limit; `defaults_are_valid` holds this to it.
        ConfigBuilder::default().config
    }
}

/// Builds a [`Config`]; each method replaces one default.
#[derive(Debug, Clone)]
pub struct ConfigBuilder {
    config: Config,
}

impl Default for ConfigBuilder {
    fn default() -> Self {
        let waits = Waits::default();
        Self {
            config: Config {
                channels: 4,
                pass: Token::NONE,
                lanes_at_work: None,
                limits: Limits::default(),
                body_pages: 64,
                device_chunk: 256 << 10,
                ack_deadline: None,
                when_ack_late: WhenAckLate::default(),
                device_deadline: waits.device_deadline,
                hello_deadline: waits.hello_deadline,
                setup_deadline: waits.setup_deadline,
                stall: waits.stall,
                keep_alive: waits.keep_alive,
                commit_deadline: Duration::from_secs(30),
                reconnect: Duration::from_secs(60),
                progress_deadline: waits.progress_deadline,
                when_destination_lost: WhenDestinationLost::default(),
                dirty_scan: DirtyScan::Off,
            },
        }
    }
}

impl ConfigBuilder {
    /// What the destination wants to see before it lets this source begin. The default, [`Token::NONE`], is nothing.
    #[must_use]
    pub fn pass(mut self, pass: Token) -> Self {
        self.config.pass = pass;
        self
    }

    /// Data channels, 1 to `wire::limits::LANES_MAX`.
    #[must_use]
    pub fn channels(mut self, channels: u32) -> Self {
        self.config.channels = channels;
        self
    }

    /// How many lanes take pages at the same time as long as they keep the processors busy, from 1; with more channels the
    /// others wait until the network is what limits, and serve devices meanwhile. The default is two for each processor.
    #[must_use]
    pub fn lanes_at_work(mut self, lanes: u32) -> Self {
        self.config.lanes_at_work = Some(lanes);
        self
    }

    /// The longest predicted stand-still at which the switchover is begun; 1 ms to 1 hour.
    #[must_use]
    pub fn downtime_limit(mut self, limit: Duration) -> Self {
        self.config.limits.downtime_limit = limit;
        self
    }

    /// A cap on the bytes a second over all data channels, in every phase; at least 1 MiB/s. `None`: no cap.
    #[must_use]
    pub fn bandwidth(mut self, octets_per_second: Option<u64>) -> Self {
        self.config.limits.bandwidth = octets_per_second;
        self
    }

    /// How many live rounds may be spent before [`WhenNotConverging`] decides; 1 to 10,000.
    #[must_use]
    pub fn max_rounds(mut self, rounds: u32) -> Self {
        self.config.limits.max_rounds = rounds;
        self
    }

    /// What happens when the rounds are used up.
    #[must_use]
    pub fn when_not_converging(mut self, choice: WhenNotConverging) -> Self {
        self.config.limits.when_not_converging = choice;
        self
    }

    /// How much of the guest's time may be held back while it does not converge otherwise, in percent, up to 99. The default, 0, leaves the
    /// guest alone. It is asked of the embedder (`Vmm::throttle`), by steps of 20 at most, as little as the forecast needs, and released
    /// before the guest is left to its owner, however the migration ends.
    #[must_use]
    pub fn throttle_limit(mut self, percent: u8) -> Self {
        self.config.limits.throttle_limit = percent;
        self
    }

    /// The largest body of a PAGES frame: whole pages, 4 KiB to 1 MiB. The default is 256 KiB;
    /// none was clearly better (docs/measurements/stream.md).
    #[must_use]
    pub fn body_bytes(mut self, octets: u64) -> Self {
        self.config.body_pages = octets / PAGE_BYTES as u64;
        self
    }

    /// The largest body of a DEVICE_CHUNK, 4 KiB to 1 MiB. The default is 256 KiB.
    #[must_use]
    pub fn device_chunk_bytes(mut self, octets: u64) -> Self {
        self.config.device_chunk = octets;
        self
    }

    /// How long the switchover waits for devices that want their initial bytes loaded before the guest is paused, 1 ms to
    /// 1 hour, counted from when nothing else is missing. `None`: as long as it takes, with the guest running.
    #[must_use]
    pub fn ack_deadline(mut self, deadline: Option<Duration>) -> Self {
        self.config.ack_deadline = deadline;
        self
    }

    /// What happens then.
    #[must_use]
    pub fn when_ack_late(mut self, choice: WhenAckLate) -> Self {
        self.config.when_ack_late = choice;
        self
    }

    /// How long one call of a device's own code may take: a step, a read; 10 ms to 1 hour. One that does not return ends the
    /// migration, and the guest runs on without waiting for it. The default is 10 s.
    #[must_use]
    pub fn device_deadline(mut self, deadline: Duration) -> Self {
        self.config.device_deadline = deadline;
        self
    }

    /// How long a connection may take until its hello is answered; 100 ms to 10 min.
    #[must_use]
    pub fn hello_deadline(mut self, deadline: Duration) -> Self {
        self.config.hello_deadline = deadline;
        self
    }

    /// How long the destination may take to build the machine and get its memory ready; 100 ms to 1 hour.
    #[must_use]
    pub fn setup_deadline(mut self, deadline: Duration) -> Self {
        self.config.setup_deadline = deadline;
        self
    }

    /// Whether to look for writes that no source reported.
    #[must_use]
    pub fn dirty_scan(mut self, scan: DirtyScan) -> Self {
        self.config.dirty_scan = scan;
        self
    }

    /// A channel on which nothing moves for this long is given up; 100 ms to 1 hour.
    #[must_use]
    pub fn stall(mut self, stall: Duration) -> Self {
        self.config.stall = stall;
        self
    }

    /// How often the control channel says that this side lives; 10 ms to 1 min, and less than half of `stall`.
    #[must_use]
    pub fn keep_alive(mut self, period: Duration) -> Self {
        self.config.keep_alive = period;
        self
    }

    /// How much longer than was forecast a guest stays paused before it goes on at the source, if the destination has not taken it
    /// over by then; and how long the source waits for `running` after the commit before it asks, and reports the outcome as unknown
    /// if nobody answers. 100 ms to 1 hour.
    #[must_use]
    pub fn commit_deadline(mut self, deadline: Duration) -> Self {
        self.config.commit_deadline = deadline;
        self
    }

    /// How long lost channels are dialled again before the migration is given up; the guest runs on meanwhile, and the
    /// migration goes on where it was. After the commit: how long the destination is asked how it ended. Zero: what is
    /// lost is lost. At most 1 hour; the destination keeps its part for as long as it says itself.
    #[must_use]
    pub fn reconnect_deadline(mut self, deadline: Duration) -> Self {
        self.config.reconnect = deadline;
        self
    }

    /// A destination that says that it lives, and takes nothing for this long, is given up; `stall` to 1 hour.
    #[must_use]
    pub fn progress_deadline(mut self, deadline: Duration) -> Self {
        self.config.progress_deadline = deadline;
        self
    }

    /// What happens when the destination was restarted meanwhile.
    #[must_use]
    pub fn when_destination_lost(mut self, choice: WhenDestinationLost) -> Self {
        self.config.when_destination_lost = choice;
        self
    }

    /// Checks every setting.
    ///
    /// # Errors
    /// The first setting that is out of its range, by name, with the range.
    pub fn build(self) -> Result<Config, ConfigError> {
        let c = &self.config;
        within("channels", &c.channels, &1, &LANES_MAX)?;
        within(
            "lanes at work",
            &c.lanes_at_work.unwrap_or(1),
            &1,
            &u32::MAX,
        )?;
        c.limits.check()?;
        within(
            "body pages",
            &c.body_pages,
            &1,
            &(limits::PAGES_PER_FRAME_MAX as u64),
        )?;
        within(
            "device chunk bytes",
            &c.device_chunk,
            &4096,
            &limits::BODY_BYTES_MAX_U64,
        )?;
        if let Some(deadline) = c.ack_deadline {
            within_time("ack deadline", deadline, Duration::from_millis(1), HOUR)?;
        }
        Waits {
            device_deadline: c.device_deadline,
            hello_deadline: c.hello_deadline,
            setup_deadline: c.setup_deadline,
            stall: c.stall,
            keep_alive: c.keep_alive,
            progress_deadline: c.progress_deadline,
        }
        .check()?;
        within_time("commit deadline", c.commit_deadline, SHORTEST, HOUR)?;
        within_time("reconnect deadline", c.reconnect, Duration::ZERO, HOUR)?;
        Ok(self.config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid() {
        Config::builder().build().unwrap();
    }

    #[test]
    fn each_setting_is_accepted_at_its_bounds_and_refused_one_past_them() {
        let ms = Duration::from_millis;
        let hour = Duration::from_secs(3600);
        let good = |b: ConfigBuilder| b.build().unwrap();
        let bad = |b: ConfigBuilder, name: &str| {
            let text = b.build().unwrap_err().to_string();
            assert!(text.starts_with(name) && text.contains("must be"), "{text}");
        };
        let b = Config::builder;
        good(b().channels(1));
        good(b().channels(LANES_MAX));
        bad(b().channels(0), "channels");
        bad(b().channels(LANES_MAX + 1), "channels");
        good(b().downtime_limit(ms(1)));
        good(b().downtime_limit(hour));
        bad(
            b().downtime_limit(Duration::from_micros(999)),
            "downtime limit",
        );
        bad(b().downtime_limit(hour + ms(1)), "downtime limit");
        good(b().bandwidth(Some(1 << 20)));
        bad(b().bandwidth(Some((1 << 20) - 1)), "bandwidth");
        good(b().max_rounds(1));
        good(b().max_rounds(10_000));
        bad(b().max_rounds(0), "max rounds");
        bad(b().max_rounds(10_001), "max rounds");
        good(b().throttle_limit(99));
        bad(b().throttle_limit(100), "throttle limit");
        good(b().body_bytes(4096));
        good(b().body_bytes(1 << 20));
        bad(b().body_bytes(4095), "body pages");
        bad(b().body_bytes((1 << 20) + 4096), "body pages");
        good(b().device_chunk_bytes(4096));
        good(b().device_chunk_bytes(1 << 20));
        bad(b().device_chunk_bytes(4095), "device chunk");
        bad(b().device_chunk_bytes((1 << 20) + 1), "device chunk");
        good(b().ack_deadline(Some(ms(1))));
        bad(b().ack_deadline(Some(Duration::ZERO)), "ack deadline");
        bad(b().ack_deadline(Some(hour + ms(1))), "ack deadline");
        good(b().device_deadline(ms(10)));
        bad(b().device_deadline(ms(9)), "device deadline");
        bad(b().device_deadline(hour + ms(1)), "device deadline");
        good(b().stall(ms(100)).keep_alive(ms(50)));
        bad(b().stall(ms(99)).keep_alive(ms(20)), "stall");
        bad(b().stall(ms(100)).keep_alive(ms(51)), "keep-alive");
        bad(b().hello_deadline(ms(99)), "hello deadline");
        bad(b().setup_deadline(hour + ms(1)), "set-up deadline");
        bad(b().commit_deadline(ms(99)), "commit deadline");
        good(b().reconnect_deadline(Duration::ZERO));
        good(b().reconnect_deadline(hour));
        bad(b().reconnect_deadline(hour + ms(1)), "reconnect deadline");
        let short = || b().stall(ms(900)).keep_alive(ms(100));
        good(short().progress_deadline(ms(900)));
        bad(short().progress_deadline(ms(899)), "progress deadline");
        bad(b().progress_deadline(hour + ms(1)), "progress deadline");
    }
}
