//! How often strangers may make this side write a line of log.
//!
//! Rule: whoever can open a connection can't fill a disk. Some lines in a while say what happens, and the next one how many
//! were left out.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// So many lines are written...
const LINES_MAX: u32 = 10;

/// ... in each time of this length.
const WHILE: Duration = Duration::from_secs(10);

/// Counts the lines of a log that strangers can cause.
#[derive(Debug, Default)]
pub struct LogLimit(Mutex<Said>);

#[derive(Debug, Default)]
struct Said {
    began: Option<Instant>,
    lines: u32,
    unsaid: u64,
}

impl LogLimit {
    /// Whether a line may be written now, and how many were left out since the last one.
    #[must_use]
    pub fn allow(&self) -> Option<u64> {
        self.allow_at(Instant::now())
    }

    fn allow_at(&self, now: Instant) -> Option<u64> {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if said
            .began
            .is_none_or(|began| now.duration_since(began) >= WHILE)
        {
            (said.began, said.lines) = (Some(now), 0);
        }
        if said.lines == LINES_MAX {
            said.unsaid = said.unsaid.saturating_add(1);
            return None;
        }
        said.lines += 1;
        Some(std::mem::take(&mut said.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_lines_are_written_in_a_while_and_the_next_one_says_how_many_were_not() {
        let (limit, now) = (LogLimit::default(), Instant::now());
        let said = (0..1000).filter(|_| limit.allow_at(now) == Some(0)).count();
        assert_eq!(said, 10);
        assert_eq!(limit.allow_at(now + WHILE / 2), None);
        assert_eq!(limit.allow_at(now + WHILE), Some(991));
        assert_eq!(limit.allow_at(now + WHILE), Some(0));
    }
}
