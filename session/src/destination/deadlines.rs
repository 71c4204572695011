//! When something is due: signs of life, acknowledgements, and how long the source may be silent or do nothing.

use std::time::Duration;

use super::config::Config;

/// So much later than it should: then this side stood still.
const STOOD_STILL_MIN: Duration = Duration::from_secs(1);

/// The clocks of one session.
#[derive(Debug)]
pub(super) struct Deadlines {
    /// When the set-up began.
    pub(super) began: Duration,
    /// When the source was last heard on the control channel.
    pub(super) heard: Duration,
    /// When something last went on: pages landed, a decision came. Signs of life are none.
    pub(super) progress: Duration,
    /// Since when no lane lives although one is needed: the source is dialling (SPEC: LANE-6).
    pub(super) alone_since: Option<Duration>,
    /// When this side last did anything at all.
    looked: Duration,
    /// When this side went on after it had stood still: its own threads had no time meanwhile.
    awake: Duration,
    keep_alive_due: Duration,
    ack_due: Duration,
    /// Frames on data channels when it was last looked at.
    frames: u64,
}

impl Deadlines {
    pub(super) fn new(now: Duration) -> Self {
        Self {
            began: now,
            heard: now,
            progress: now,
            alone_since: None,
            looked: now,
            awake: now,
            keep_alive_due: now,
            ack_due: now,
            frames: 0,
        }
    }

    /// A control channel is open.
    pub(super) fn opened(&mut self, config: &Config, now: Duration) {
        (self.began, self.heard, self.progress) = (now, now, now);
        self.keep_alive_due = now + config.keep_alive();
        self.ack_due = now + config.ack_period();
    }

    /// This side does something. Where it had to before and did not, the whole program stood still.
    pub(super) fn looks(&mut self, config: &Config, now: Duration) {
        // A word that the source is slow to read holds this side up as well, but not for so long as a rule.
        if now > self.looks_again(config) + config.keep_alive().max(STOOD_STILL_MIN) {
            self.awake = now;
        }
        self.looked = now;
    }

    /// When it has to look again, while a thread of its own is waited for.
    pub(super) fn looks_again(&self, config: &Config) -> Duration {
        self.looked + config.keep_alive()
    }

    /// Since when a thread of this side, asked for something at `since`, has had its time.
    pub(super) fn own_since(&self, since: Duration) -> Duration {
        since.max(self.awake)
    }

    /// Frames on data channels are what goes on; signs of life on the control channel are not.
    pub(super) fn counted(&mut self, frames: u64, now: Duration) {
        if frames != self.frames {
            (self.frames, self.progress) = (frames, now);
        }
    }

    /// What was handled is to be acknowledged at once: the source can let go of it, and read on.
    pub(super) fn acknowledge_now(&mut self, now: Duration) {
        self.ack_due = now;
    }

    /// Whether acknowledgements are due; the next ones are a period later.
    pub(super) fn acks_are_due(&mut self, config: &Config, now: Duration) -> bool {
        let due = now >= self.ack_due;
        if due {
            self.ack_due = now + config.ack_period();
        }
        due
    }

    /// Whether a sign of life is due; the next one is a period later.
    pub(super) fn keep_alive_is_due(&mut self, config: &Config, now: Duration) -> bool {
        let due = now >= self.keep_alive_due;
        if due {
            self.keep_alive_due = now + config.keep_alive();
        }
        due
    }

    /// When something has to be said.
    pub(super) fn next_word(&self) -> Duration {
        self.keep_alive_due.min(self.ack_due)
    }
}
