//! All streams of a session at one side: which piece a lane takes next, and what is to be said on the control channel.

use std::collections::BTreeMap;
use std::time::Duration;

use multifd_wire::StreamId;
use multifd_wire::frame::{StreamCredit, StreamEnd, StreamEndKind};
use multifd_wire::limits::STREAMS_MAX;

use super::Wrong;
use super::incoming::{Admit, Incoming};
use super::outgoing::{Outgoing, Via};
use crate::piece::Piece;

/// What goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// What somebody waits for: page requests and answers, everything from the destination.
    Urgent,
    /// The first connection: commands and marks, and pages where there are no others for them.
    Main,
    /// Pages beside the first connection.
    Bulk,
}

/// A piece for a lane.
#[derive(Debug, Clone)]
pub struct Outbound {
    /// The stream.
    pub stream: StreamId,
    /// Where it belongs.
    pub offset: u64,
    /// The bytes.
    pub piece: Piece,
}

/// What the peer's end of a direction means for the monitor here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerEnd {
    /// The stream.
    pub stream: StreamId,
    /// How it ended.
    pub how: StreamEndKind,
}

/// What a session holds, for reports.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Held {
    /// Bytes read here that the peer has not acknowledged.
    pub outgoing: u64,
    /// Bytes of the peer that the monitor has not taken.
    pub incoming: u64,
}

#[derive(Debug)]
struct Stream {
    class: Class,
    outgoing: Outgoing,
    incoming: Incoming,
}

/// The streams of one side.
#[derive(Debug)]
pub struct Streams {
    initial: u64,
    horizon: Duration,
    streams: BTreeMap<u32, Stream>,
    /// Where the search for the next piece begins, so that streams of a class take turns.
    turn: u32,
}

impl Streams {
    /// No streams. `initial` is the credit that each direction begins with; `horizon` is how long what is held may take.
    #[must_use]
    pub fn new(initial: u64, horizon: Duration) -> Self {
        Self {
            initial,
            horizon,
            streams: BTreeMap::new(),
            turn: 0,
        }
    }

    /// The round trip was measured: what is on the way counts on top of the horizon.
    pub fn set_horizon(&mut self, horizon: Duration) {
        self.horizon = horizon;
    }

    /// How many streams there were.
    #[must_use]
    pub fn count(&self) -> u32 {
        u32::try_from(self.streams.len()).unwrap_or(u32::MAX)
    }

    /// The monitor connected. `None` when there are as many streams as a session can have.
    // SPEC: CARRY-3
    pub fn open(&mut self) -> Option<StreamId> {
        let next = self.count();
        if next as usize >= STREAMS_MAX {
            return None;
        }
        self.add(next);
        Some(StreamId::new(next))
    }

    /// The peer spoke of a stream: opens it and all before it. Returns the new ones.
    // SPEC: CARRY-4
    pub fn open_up_to(&mut self, stream: StreamId) -> std::ops::Range<u32> {
        let from = self.count();
        let to = stream.value().saturating_add(1).max(from);
        for number in from..to {
            self.add(number);
        }
        from..to
    }

    fn add(&mut self, number: u32) {
        let stream = StreamId::new(number);
        let new = Stream {
            class: Class::Urgent,
            outgoing: Outgoing::new(stream, self.initial),
            incoming: Incoming::new(stream, self.initial),
        };
        self.streams.insert(number, new);
    }

    fn get(&mut self, stream: StreamId) -> Result<&mut Stream, Wrong> {
        self.streams
            .get_mut(&stream.value())
            .ok_or(Wrong::Unknown { stream })
    }

    /// What is read from the monitor.
    #[must_use]
    pub fn outgoing(&self, stream: StreamId) -> Option<&Outgoing> {
        self.streams.get(&stream.value()).map(|s| &s.outgoing)
    }

    /// What goes to the monitor.
    #[must_use]
    pub fn incoming(&self, stream: StreamId) -> Option<&Incoming> {
        self.streams.get(&stream.value()).map(|s| &s.incoming)
    }

    /// What a stream is was found out from its first bytes.
    pub fn set_class(&mut self, stream: StreamId, class: Class) {
        if let Ok(stream) = self.get(stream) {
            stream.class = class;
        }
    }

    /// Bytes from the monitor, within the room that there is.
    pub fn push(&mut self, stream: StreamId, piece: Piece) {
        if let Ok(stream) = self.get(stream)
            && stream.outgoing.ended().is_none()
        {
            stream.outgoing.push(piece);
        }
    }

    /// The next piece for a lane: the first class that has something, inside it the streams in turn. A lane that is `kept_free` takes nothing
    /// of the last class that there is, so that what goes first need not wait behind what a lane's socket holds.
    pub fn next(&mut self, via: Via, kept_free: bool, now: Duration) -> Option<Outbound> {
        let last = self.streams.values().map(|stream| stream.class).max();
        let turn = self.turn;
        let best = self
            .streams
            .iter()
            .filter(|(_, stream)| stream.outgoing.has_unsent())
            .filter(|(_, stream)| {
                !kept_free || stream.class == Class::Urgent || Some(stream.class) != last
            })
            .min_by_key(|(number, stream)| (stream.class, **number < turn, **number))
            .map(|(number, _)| *number)?;
        self.turn = best.wrapping_add(1);
        let stream = self.streams.get_mut(&best)?;
        let (offset, piece) = stream.outgoing.next(via, now)?;
        Some(Outbound {
            stream: StreamId::new(best),
            offset,
            piece,
        })
    }

    /// Whether a piece may come, before its bytes are read.
    ///
    /// # Errors
    /// [`Wrong`].
    pub fn admit(&self, stream: StreamId, offset: u64, bytes: u64) -> Result<Admit, Wrong> {
        self.incoming(stream)
            .ok_or(Wrong::Unknown { stream })?
            .admit(offset, bytes)
    }

    /// A piece came. Says whether something can be handed on.
    ///
    /// # Errors
    /// [`Wrong`].
    pub fn data(&mut self, stream: StreamId, offset: u64, piece: Piece) -> Result<bool, Wrong> {
        self.get(stream)?.incoming.take(offset, piece)
    }

    /// The next piece for the monitor.
    pub fn hand(&mut self, stream: StreamId) -> Option<Piece> {
        self.get(stream).ok()?.incoming.hand()
    }

    /// The monitor took bytes. Says whether the peer should hear of its credit at once.
    pub fn taken(&mut self, stream: StreamId, bytes: u64, now: Duration) -> bool {
        let horizon = self.horizon;
        let Ok(stream) = self.get(stream) else {
            return false;
        };
        stream.incoming.taken(bytes, now, horizon);
        stream.incoming.credit_is_pressing()
    }

    /// The peer's credit.
    ///
    /// # Errors
    /// [`Wrong`].
    pub fn credit(&mut self, credit: StreamCredit) -> Result<(), Wrong> {
        self.get(credit.stream)?
            .outgoing
            .credit(credit.received, credit.offset_max)
    }

    /// What the peer is to hear of credit, or, `again` after a resume, of every stream.
    pub fn credits(&mut self, again: bool) -> Vec<StreamCredit> {
        self.streams
            .values_mut()
            .filter(|stream| stream.incoming.ended() != Some(StreamEndKind::Reset))
            .filter_map(|stream| stream.incoming.credit(again))
            .collect()
    }

    /// The monitor ended a direction, or its connection broke.
    pub fn end(&mut self, stream: StreamId, how: StreamEndKind) {
        if let Ok(stream) = self.get(stream) {
            stream.outgoing.end(how);
        }
    }

    /// The ends that the peer is to hear of.
    pub fn take_ends(&mut self) -> Vec<StreamEnd> {
        self.streams
            .iter_mut()
            .filter_map(|(number, stream)| {
                let (how, offset) = stream.outgoing.take_end()?;
                Some(StreamEnd {
                    stream: StreamId::new(*number),
                    how,
                    offset,
                })
            })
            .collect()
    }

    /// The peer's monitor ended a direction.
    ///
    /// # Errors
    /// [`Wrong`].
    pub fn peer_end(&mut self, end: StreamEnd) -> Result<(), Wrong> {
        let stream = self.get(end.stream)?;
        stream.incoming.end(end.how, end.offset)?;
        if end.how == StreamEndKind::Reset {
            stream.outgoing.forget();
        }
        Ok(())
    }

    /// A connection is gone. Says whether there is something to be sent again.
    pub fn lane_lost(&mut self, via: Via) -> bool {
        let again = self.streams.values_mut().map(|s| s.outgoing.lost(via));
        again.fold(false, |any, again| any | again)
    }

    /// All connections are gone: everything that is not acknowledged is sent again, and every end said again.
    // SPEC: CARRY-13
    pub fn session_lost(&mut self) {
        for stream in self.streams.values_mut() {
            stream.outgoing.all_lost();
        }
    }

    /// Connections on which something was sent before `then` that nobody has acknowledged.
    #[must_use]
    pub fn silent_since(&self, then: Duration) -> Vec<Via> {
        let waiting = self
            .streams
            .values()
            .flat_map(|s| s.outgoing.waiting_since(then));
        let mut found: Vec<Via> = waiting.collect();
        found.sort_unstable();
        found.dedup();
        found
    }

    /// What is held now.
    #[must_use]
    pub fn held(&self) -> Held {
        let streams = self.streams.values();
        streams.fold(Held::default(), |held, stream| Held {
            outgoing: held.outgoing + stream.outgoing.held(),
            incoming: held.incoming + stream.incoming.held(),
        })
    }

    /// The largest window that any stream had here, and the most that one held.
    #[must_use]
    pub fn peaks(&self) -> (u64, u64) {
        let incoming = || self.streams.values().map(|stream| &stream.incoming);
        let window = incoming().map(|i| i.window().bytes_peak()).max();
        let held = incoming().map(Incoming::held_peak).max();
        (window.unwrap_or(0), held.unwrap_or(0))
    }

    /// Bytes that went out and came in, over all streams.
    #[must_use]
    pub fn octets(&self) -> (u64, u64) {
        self.streams.values().fold((0, 0), |(out, inn), stream| {
            (
                out + stream.outgoing.read(),
                inn + stream.incoming.octets_taken(),
            )
        })
    }
}
