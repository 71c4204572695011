//! One direction of a stream at the side that receives it: pieces from any lane in any order, handed on in the order of their offsets.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use multifd_wire::StreamId;
use multifd_wire::frame::{StreamCredit, StreamEndKind};

use super::Wrong;
use super::window::Window;
use crate::piece::Piece;

/// What is to become of a piece whose head was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admit {
    /// There is room for it.
    Take,
    /// It is here already, or nobody wants it any more: its bytes are to be read and dropped.
    Drop,
}

/// What came and was not handed on, and what was granted.
#[derive(Debug)]
pub struct Incoming {
    stream: StreamId,
    /// Everything before this is here.
    received: u64,
    /// Everything before this was taken by the monitor.
    taken: u64,
    granted: u64,
    /// What the peer was told last: received, and granted.
    told: (u64, u64),
    ready: VecDeque<Piece>,
    early: BTreeMap<u64, Piece>,
    held_peak: u64,
    end: Option<(StreamEndKind, u64)>,
    window: Window,
}

impl Incoming {
    /// A direction that grants what every one begins with.
    #[must_use]
    pub fn new(stream: StreamId, granted: u64) -> Self {
        Self {
            stream,
            received: 0,
            taken: 0,
            granted,
            told: (0, granted),
            ready: VecDeque::new(),
            early: BTreeMap::new(),
            held_peak: 0,
            end: None,
            window: Window::new(),
        }
    }

    /// Whether a piece may come, before a single byte of it is read.
    ///
    /// # Errors
    /// [`Wrong::PastCredit`].
    // SPEC: CARRY-5, CARRY-7
    pub fn admit(&self, offset: u64, bytes: u64) -> Result<Admit, Wrong> {
        let end = offset.saturating_add(bytes);
        if end > self.granted {
            return Err(Wrong::PastCredit {
                stream: self.stream,
                end,
                granted: self.granted,
            });
        }
        let reset = self.end.is_some_and(|(how, _)| how == StreamEndKind::Reset);
        let here = end <= self.received || self.early.contains_key(&offset);
        Ok(if reset || here {
            Admit::Drop
        } else {
            Admit::Take
        })
    }

    /// A piece with the right checksum. Says whether something can be handed on now that could not before.
    ///
    /// # Errors
    /// [`Wrong`].
    // SPEC: CARRY-5
    pub fn take(&mut self, offset: u64, piece: Piece) -> Result<bool, Wrong> {
        let (bytes, overlap) = (
            piece.bytes(),
            Wrong::Overlap {
                stream: self.stream,
                offset,
            },
        );
        // Another lane may have brought it since its head was admitted.
        if self.admit(offset, bytes)? == Admit::Drop {
            return Ok(false);
        }
        let end = offset + bytes;
        if self.end.is_some_and(|(_, last)| end > last) {
            return Err(Wrong::End {
                stream: self.stream,
                offset: end,
            });
        }
        let before = self.early.range(..offset).next_back();
        let behind = self.early.range(offset..).next();
        if offset < self.received
            || before.is_some_and(|(at, piece)| at + piece.bytes() > offset)
            || behind.is_some_and(|(at, _)| *at < end)
        {
            return Err(overlap);
        }
        self.early.insert(offset, piece);
        let held = self.held();
        self.held_peak = self.held_peak.max(held);
        let mut grew = false;
        while let Some(piece) = self.early.remove(&self.received) {
            self.received += piece.bytes();
            self.ready.push_back(piece);
            grew = true;
        }
        Ok(grew)
    }

    /// The next piece for the monitor; [`taken`](Self::taken) follows when it has it.
    pub fn hand(&mut self) -> Option<Piece> {
        self.ready.pop_front()
    }

    /// The monitor took bytes.
    pub fn taken(&mut self, bytes: u64, now: Duration, horizon: Duration) {
        self.taken += bytes;
        self.window.took(bytes, now, horizon);
        self.granted = self.granted.max(self.taken + self.window.bytes());
    }

    /// Whether the peer should hear at once how far it may go: it may have used up most of what it knows of.
    #[must_use]
    pub fn credit_is_pressing(&self) -> bool {
        self.granted - self.told.1 >= self.window.bytes() / 4
    }

    /// What the peer does not know yet, or (`again`) should hear once more.
    pub fn credit(&mut self, again: bool) -> Option<StreamCredit> {
        let now = (self.received, self.granted);
        if now == self.told && !again {
            return None;
        }
        self.told = now;
        Some(StreamCredit {
            stream: self.stream,
            received: self.received,
            offset_max: self.granted,
        })
    }

    /// The peer's monitor ended this direction.
    ///
    /// # Errors
    /// [`Wrong::End`] when it would end before bytes that came, or twice in different ways.
    // SPEC: CARRY-8
    pub fn end(&mut self, how: StreamEndKind, offset: u64) -> Result<(), Wrong> {
        let wrong = Err(Wrong::End {
            stream: self.stream,
            offset,
        });
        match (self.end, how) {
            (Some((StreamEndKind::Reset, _)), _) => return Ok(()),
            (Some((StreamEndKind::Clean, at)), StreamEndKind::Clean) if at != offset => {
                return wrong;
            }
            (_, StreamEndKind::Clean) => {
                let last = self.early.last_key_value();
                let farthest = last.map_or(self.received, |(at, piece)| at + piece.bytes());
                if offset < farthest {
                    return wrong;
                }
            }
            (_, StreamEndKind::Reset) => {
                self.ready.clear();
                self.early.clear();
            }
        }
        self.end = Some((how, offset));
        Ok(())
    }

    /// How it ended, once everything before a clean end was taken by the monitor.
    #[must_use]
    pub fn ended(&self) -> Option<StreamEndKind> {
        match self.end {
            Some((StreamEndKind::Clean, offset)) if self.taken < offset => None,
            end => end.map(|(how, _)| how),
        }
    }

    /// Bytes that came and were not taken by the monitor yet, those on the way to it included.
    #[must_use]
    pub fn held(&self) -> u64 {
        let early: u64 = self.early.values().map(Piece::bytes).sum();
        self.received - self.taken + early
    }

    /// The most that was held.
    #[must_use]
    pub fn held_peak(&self) -> u64 {
        self.held_peak
    }

    /// Bytes that the monitor took.
    #[must_use]
    pub fn octets_taken(&self) -> u64 {
        self.taken
    }

    /// What the stream begins with, as long as nothing of it was handed on.
    #[must_use]
    pub fn first_octets(&self) -> &[u8] {
        self.ready.front().map_or(&[], |piece| piece)
    }

    /// Whether something waits for the monitor.
    #[must_use]
    pub fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Its window.
    #[must_use]
    pub fn window(&self) -> &Window {
        &self.window
    }
}
