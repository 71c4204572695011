//! The control thread as it looks to whoever waits for it: whether it still goes round, what it is at, and who decides about the commit
//! if it does not.
//!
//! The rule it keeps: a migration that was given up is never committed, and one that may be committed is never reported as failed. Both
//! sides change the one [`Fate`], so a thread that comes back late finds it decided.

use std::sync::Mutex;
use std::time::Duration;

use multifd_transport::{Closer, Pulse};

use super::lock;
use crate::config::Config;

/// What the control thread's own waits take at most between two beats, and a busy machine: a farewell is waited for 1 s.
const OWN_WAITS_MAX: Duration = Duration::from_secs(2);

/// How long the control thread may be silent: in the embedder's code, or while it writes to the control channel.
pub(super) fn silent_max(config: &Config) -> Duration {
    config.device_deadline().max(config.stall()) + OWN_WAITS_MAX
}

/// What became of a migration, as far as it can't be taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// Nothing is decided.
    Open,
    /// The commit may be with the destination.
    Committed,
    /// The guest runs at the destination.
    Migrated,
    /// Nobody waits for the control thread any more.
    GivenUp,
}

/// Shared by the control thread and whoever waits for it.
#[derive(Debug)]
pub(super) struct Watch {
    pulse: Pulse,
    step: Mutex<&'static str>,
    fate: Mutex<Fate>,
    closer: Mutex<Option<Closer>>,
}

impl Watch {
    pub(super) fn new() -> Self {
        Self {
            pulse: Pulse::default(),
            step: Mutex::new("begin"),
            fate: Mutex::new(Fate::Open),
            closer: Mutex::new(None),
        }
    }

    pub(super) fn pulse(&self) -> &Pulse {
        &self.pulse
    }

    /// What the control thread is to do next: into code that is not ours, as a rule.
    pub(super) fn at(&self, step: &'static str) {
        self.pulse.beat();
        *lock(&self.step) = step;
    }

    /// What it was about to do when it was heard of last.
    pub(super) fn step(&self) -> &'static str {
        *lock(&self.step)
    }

    /// Whether the commit may be sent.
    pub(super) fn commit(&self) -> bool {
        let mut fate = lock(&self.fate);
        if *fate == Fate::Open {
            *fate = Fate::Committed;
        }
        *fate == Fate::Committed
    }

    /// The destination can't have the commit, and will not get it.
    pub(super) fn commit_unsent(&self) {
        let mut fate = lock(&self.fate);
        if *fate == Fate::Committed {
            *fate = Fate::Open;
        }
    }

    /// It is known that the guest runs at the destination.
    pub(super) fn migrated(&self) {
        *lock(&self.fate) = Fate::Migrated;
    }

    /// Nobody waits any more. Gives what had become of it by then; the destination hears nothing more from here.
    pub(super) fn give_up(&self) -> Fate {
        let mut fate = lock(&self.fate);
        let before = *fate;
        if before == Fate::Open {
            *fate = Fate::GivenUp;
        }
        drop(fate);
        if let Some(closer) = lock(&self.closer).take() {
            closer.shutdown();
        }
        before
    }

    /// How the control channel is closed from outside the control thread.
    pub(super) fn control_channel(&self, closer: Closer) {
        *lock(&self.closer) = Some(closer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_up_is_not_committed_and_what_was_committed_is_not_given_up() {
        let watch = Watch::new();
        assert_eq!(watch.give_up(), Fate::Open);
        assert!(!watch.commit());

        let watch = Watch::new();
        assert!(watch.commit());
        assert_eq!(watch.give_up(), Fate::Committed);
        assert!(watch.commit(), "it may be said again");

        let watch = Watch::new();
        assert!(watch.commit());
        watch.commit_unsent();
        assert_eq!(watch.give_up(), Fate::Open);
        assert!(!watch.commit());
    }
}
