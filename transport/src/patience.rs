//! How long an operation may wait: the arithmetic of deadlines and stalls, with the time as an argument.
//!
//! Rule: the clock is read only if a limit is set, and no limit costs a system call on its own.

use std::time::{Duration, Instant};

use crate::error::ChannelError;

/// What a half was told about waiting.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Patience {
    pub(crate) deadline: Option<Instant>,
    pub(crate) stall: Option<Duration>,
}

/// The waiting of one operation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wait {
    patience: Patience,
    /// When bytes moved last, or when the operation began. Kept only if a stall limit is set.
    moved: Option<Instant>,
    /// Whether the operation may still try once in spite of a deadline that has passed.
    first: bool,
}

/// What an operation may do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    /// Wait without end.
    Forever,
    /// Wait at most this long, then ask again.
    AtMost(Duration),
    /// Do what can be done without waiting; if nothing can, ask again.
    Try,
    /// Give up: the deadline passed.
    DeadlinePassed,
    /// Give up: nothing moved for this long.
    Stalled(Duration),
}

impl Patience {
    /// Starts an operation.
    pub(crate) fn start(self) -> Wait {
        Wait {
            patience: self,
            moved: self.stall.map(|_| Instant::now()),
            first: true,
        }
    }
}

impl Wait {
    /// Bytes moved: the stall clock starts anew.
    pub(crate) fn moved(&mut self) {
        if self.patience.stall.is_some() {
            self.moved = Some(Instant::now());
        }
    }

    /// What the operation may do next.
    pub(crate) fn pace(&mut self) -> Pace {
        if self.patience.deadline.is_none() && self.patience.stall.is_none() {
            return Pace::Forever;
        }
        // At an operation's first question the clock was read a moment ago, if at all.
        let now = self.moved.filter(|_| self.first);
        self.pace_at(now.unwrap_or_else(Instant::now))
    }

    fn pace_at(&mut self, now: Instant) -> Pace {
        let first = std::mem::replace(&mut self.first, false);
        let until_deadline = self
            .patience
            .deadline
            .map(|deadline| deadline.saturating_duration_since(now));
        let until_stall = self
            .patience
            .stall
            .zip(self.moved)
            .map(|(stall, moved)| stall.saturating_sub(now.saturating_duration_since(moved)));
        match (until_deadline, until_stall) {
            (Some(Duration::ZERO), _) if first => Pace::Try,
            (Some(Duration::ZERO), _) => Pace::DeadlinePassed,
            (_, Some(Duration::ZERO)) if first => Pace::Try,
            (_, Some(Duration::ZERO)) => Pace::Stalled(self.patience.stall.unwrap_or_default()),
            (Some(left), None) | (None, Some(left)) => Pace::AtMost(left),
            (Some(deadline), Some(stall)) => Pace::AtMost(deadline.min(stall)),
            (None, None) => Pace::Forever,
        }
    }
}

impl Pace {
    /// The error of an operation that has to give up, or how to go on.
    pub(crate) fn check(self, bytes_done: u64) -> Result<Self, ChannelError> {
        match self {
            Self::DeadlinePassed => Err(ChannelError::Deadline { bytes_done }),
            Self::Stalled(stall) => Err(ChannelError::Stalled { bytes_done, stall }),
            Self::Forever | Self::AtMost(_) | Self::Try => Ok(self),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn wait(deadline: Option<Instant>, stall: Option<Duration>, moved: Instant) -> Wait {
        let patience = Patience { deadline, stall };
        Wait {
            patience,
            moved: stall.map(|_| moved),
            first: true,
        }
    }

    #[test]
    fn without_limits_waits_without_end() {
        assert_eq!(Patience::default().start().pace(), Pace::Forever);
        assert_eq!(
            wait(None, None, Instant::now()).pace_at(Instant::now()),
            Pace::Forever
        );
    }

    #[test]
    fn waits_until_the_nearer_limit() {
        let now = Instant::now();
        let far = Some(now + 5 * SECOND);
        assert_eq!(
            wait(far, None, now).pace_at(now + SECOND),
            Pace::AtMost(4 * SECOND)
        );
        assert_eq!(
            wait(None, Some(3 * SECOND), now).pace_at(now + SECOND),
            Pace::AtMost(2 * SECOND)
        );
        assert_eq!(
            wait(far, Some(3 * SECOND), now).pace_at(now + SECOND),
            Pace::AtMost(2 * SECOND)
        );
        assert_eq!(
            wait(far, Some(9 * SECOND), now).pace_at(now + SECOND),
            Pace::AtMost(4 * SECOND)
        );
    }

    #[test]
    fn a_limit_that_passed_before_the_operation_leaves_one_try() {
        let now = Instant::now();
        let mut late = wait(Some(now), None, now);
        assert_eq!(late.pace_at(now), Pace::Try);
        assert_eq!(late.pace_at(now), Pace::DeadlinePassed);
        let mut none = wait(None, Some(Duration::ZERO), now);
        assert_eq!(none.pace_at(now), Pace::Try);
        assert_eq!(none.pace_at(now), Pace::Stalled(Duration::ZERO));
    }

    #[test]
    fn a_limit_that_passes_during_the_operation_leaves_none() {
        let now = Instant::now();
        let mut wait = wait(Some(now + SECOND), Some(5 * SECOND), now);
        assert_eq!(wait.pace_at(now), Pace::AtMost(SECOND));
        assert_eq!(wait.pace_at(now + SECOND), Pace::DeadlinePassed);
    }

    #[test]
    fn octets_that_move_restart_the_stall_clock_only() {
        let start = Instant::now();
        let mut wait = wait(Some(start + 9 * SECOND), Some(2 * SECOND), start);
        assert_eq!(wait.pace_at(start + SECOND), Pace::AtMost(SECOND));
        wait.moved = Some(start + SECOND);
        assert_eq!(wait.pace_at(start + 2 * SECOND), Pace::AtMost(SECOND));
        assert_eq!(wait.pace_at(start + 3 * SECOND), Pace::Stalled(2 * SECOND));
        wait.moved = Some(start + 9 * SECOND);
        assert_eq!(wait.pace_at(start + 9 * SECOND), Pace::DeadlinePassed);
    }

    #[test]
    fn giving_up_says_how_much_was_done() {
        let deadline = Pace::DeadlinePassed.check(7);
        assert!(matches!(
            deadline,
            Err(ChannelError::Deadline { bytes_done: 7 })
        ));
        let stalled = Pace::Stalled(SECOND).check(8);
        assert!(matches!(
            stalled,
            Err(ChannelError::Stalled {
                bytes_done: 8,
                stall: SECOND
            })
        ));
        assert!(matches!(Pace::Try.check(9), Ok(Pace::Try)));
    }
}
