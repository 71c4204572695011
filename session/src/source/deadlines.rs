//! The moments that the source's deadlines count from.

use std::time::Duration;

/// When what happened last.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadlines {
    /// The set-up began.
    pub(super) began: Duration,
    /// Anything came from the destination.
    pub(super) heard: Duration,
    /// The destination took something, or a step of ours was done. Signs of life are none.
    pub(super) progress: Duration,
    /// The guest was to be paused.
    pub(super) paused_at: Option<Duration>,
}

impl Deadlines {
    pub(super) const fn new(now: Duration) -> Self {
        Self {
            began: now,
            heard: now,
            progress: now,
            paused_at: None,
        }
    }
}
