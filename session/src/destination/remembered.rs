//! What is left to say after the end: the source may have to ask how it went, until it knows.
//!
//! The rule it keeps: a destination that has sent PREPARED answers for as long as it keeps sessions, unless the source showed that it
//! has read RUNNING, or was answered (SPEC: ASK-4, RUNNING-2).

use std::time::Duration;

use multifd_wire::Digest;
use multifd_wire::frame::OutcomeState;

/// How a session ended, and what the source knows of that.
#[derive(Debug, Default)]
pub(super) struct Remembered {
    /// The digest of the newest PREPARED: from then on the source may have committed.
    prepared: Option<Digest>,
    ended: Option<(OutcomeState, Duration)>,
    /// The question was answered, finally.
    answered: bool,
    /// The stamp that was sent behind RUNNING. Who echoes it has read RUNNING. That a channel is closed proves nothing: a source
    /// that gave it up, or whatever lies on the way, closes it as well.
    stamp_us: Option<u64>,
    echoed: bool,
}

impl Remembered {
    pub(super) fn prepared(&mut self, digest: Digest) {
        self.prepared = Some(digest);
    }

    /// What PREPARED said last.
    pub(super) fn digest(&self) -> Option<Digest> {
        self.prepared
    }

    /// Whether the question was answered, finally.
    pub(super) fn was_answered(&self) -> bool {
        self.answered
    }

    /// It is over.
    pub(super) fn ended(&mut self, state: OutcomeState, now: Duration) {
        self.ended = Some((state, now));
    }

    /// What the source is told if it asks now.
    pub(super) fn state(&self) -> Option<OutcomeState> {
        self.ended.map(|(state, _)| state)
    }

    /// It took this answer.
    pub(super) fn answered(&mut self, state: OutcomeState) {
        self.answered |= state != OutcomeState::CommittedNotRunning;
    }

    /// This stamp goes behind RUNNING.
    pub(super) fn stamp(&mut self, stamp_us: u64) {
        self.stamp_us = Some(stamp_us);
    }

    /// A KEEP_ALIVE of the source came, of which it can be asked whether it shows that a stamp was read.
    pub(super) fn echo(&mut self, has_read: impl Fn(u64) -> bool) {
        self.echoed |= self.stamp_us.is_some_and(has_read);
    }

    /// Until when the source may have to ask.
    pub(super) fn until(&self, kept: Duration) -> Option<Duration> {
        let (state, at) = self.ended?;
        let knows = self.answered
            || match state {
                OutcomeState::Running => self.echoed,
                OutcomeState::NotCommitted => self.prepared.is_none(),
                _ => false,
            };
        (!knows).then_some(at + kept)
    }
}
