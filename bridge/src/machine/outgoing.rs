//! One direction of a stream at the side that sends it: what was read from the monitor and is not acknowledged.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use multifd_wire::frame::StreamEndKind;
use multifd_wire::{Incarnation, LaneId, StreamId};

use super::Wrong;
use crate::piece::Piece;

/// The connection that a piece was sent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Via {
    /// The lane.
    pub lane: LaneId,
    /// Which connection of it.
    pub incarnation: Incarnation,
}

#[derive(Debug)]
struct Kept {
    piece: Piece,
    sent: Option<(Via, Duration)>,
}

/// What was read and is not acknowledged.
#[derive(Debug)]
pub struct Outgoing {
    stream: StreamId,
    acked: u64,
    read: u64,
    offset_max: u64,
    kept: BTreeMap<u64, Kept>,
    /// Offsets of the kept pieces that are to be sent.
    unsent: BTreeSet<u64>,
    end: Option<StreamEndKind>,
    end_due: bool,
}

impl Outgoing {
    /// A direction with the credit that it begins with.
    #[must_use]
    pub fn new(stream: StreamId, offset_max: u64) -> Self {
        Self {
            stream,
            acked: 0,
            read: 0,
            offset_max,
            kept: BTreeMap::new(),
            unsent: BTreeSet::new(),
            end: None,
            end_due: false,
        }
    }

    /// How much may be read from the monitor: never more than may be sent at once, so the credit bounds what is kept.
    #[must_use]
    pub fn room(&self) -> u64 {
        if self.end.is_some() {
            return 0;
        }
        self.offset_max.saturating_sub(self.read)
    }

    /// Bytes read so far.
    #[must_use]
    pub fn read(&self) -> u64 {
        self.read
    }

    /// Bytes that are kept.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.read - self.acked
    }

    /// Bytes that were read, within [`room`](Self::room).
    pub fn push(&mut self, piece: Piece) {
        debug_assert!(piece.bytes() <= self.offset_max.saturating_sub(self.read));
        let offset = self.read;
        self.read += piece.bytes();
        self.unsent.insert(offset);
        self.kept.insert(offset, Kept { piece, sent: None });
    }

    /// Whether a lane has something to send of it.
    #[must_use]
    pub fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// The next piece, which this lane now sends.
    pub fn next(&mut self, via: Via, now: Duration) -> Option<(u64, Piece)> {
        let offset = self.unsent.pop_first()?;
        let kept = self.kept.get_mut(&offset)?;
        kept.sent = Some((via, now));
        Some((offset, kept.piece.clone()))
    }

    /// What the peer says. Older words than the newest change nothing.
    ///
    /// # Errors
    /// [`Wrong::NeverSent`].
    // SPEC: CARRY-6, CARRY-7
    pub fn credit(&mut self, received: u64, offset_max: u64) -> Result<(), Wrong> {
        if received > self.read {
            return Err(Wrong::NeverSent {
                stream: self.stream,
                received,
                sent: self.read,
            });
        }
        self.offset_max = self.offset_max.max(offset_max);
        if received > self.acked {
            // Pieces keep their borders, so an acknowledgement inside one leaves it whole.
            while let Some((&offset, kept)) = self.kept.first_key_value() {
                if offset + kept.piece.bytes() > received {
                    break;
                }
                self.kept.pop_first();
                self.unsent.remove(&offset);
            }
            self.acked = self.kept.first_key_value().map_or(self.read, |(&at, _)| at);
        }
        Ok(())
    }

    /// A connection is gone: what it carried is to be sent again. Says whether there is something.
    pub fn lost(&mut self, via: Via) -> bool {
        self.again(|sent| sent.0 == via)
    }

    /// All connections are gone.
    pub fn all_lost(&mut self) -> bool {
        self.end_due = self.end.is_some();
        self.again(|_| true)
    }

    fn again(&mut self, which: impl Fn(&(Via, Duration)) -> bool) -> bool {
        for (&offset, kept) in &mut self.kept {
            if kept.sent.as_ref().is_some_and(&which) {
                kept.sent = None;
                self.unsent.insert(offset);
            }
        }
        self.has_unsent()
    }

    /// The connections that carry pieces which were sent before `then` and are not acknowledged.
    pub fn waiting_since(&self, then: Duration) -> impl Iterator<Item = Via> {
        self.kept
            .values()
            .filter_map(|kept| kept.sent)
            .filter(move |(_, at)| *at < then)
            .map(|(via, _)| via)
    }

    /// The monitor ended this direction, or its connection broke. The first word counts, but a reset follows a clean end.
    pub fn end(&mut self, how: StreamEndKind) {
        if self.end.is_none() || (how == StreamEndKind::Reset && self.end != Some(how)) {
            self.end = Some(how);
            self.end_due = true;
        }
        if how == StreamEndKind::Reset {
            self.forget();
        }
    }

    /// Whether it ended, and how.
    #[must_use]
    pub fn ended(&self) -> Option<StreamEndKind> {
        self.end
    }

    /// The end, if it is to be said now.
    pub fn take_end(&mut self) -> Option<(StreamEndKind, u64)> {
        let how = self.end.filter(|_| self.end_due)?;
        self.end_due = false;
        Some((how, self.read))
    }

    /// Drops what is kept: nobody will take it.
    pub fn forget(&mut self) {
        self.kept.clear();
        self.unsent.clear();
        self.acked = self.read;
    }
}
