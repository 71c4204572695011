//! Frames over a channel, and hellos: the few moves that both sides share.

use std::time::Instant;

use multifd_transport::{ChannelError, IoSource, ReceiveHalf, SendHalf};
use multifd_wire::frame::Frame;
use multifd_wire::{
    Body, ChannelKind, Features, HEADER_BYTES, Header, Malformed, Misbehaved, Misuse, Phase, Role,
    Sequence,
};

use crate::machine::Wrong;
use crate::piece::Piece;

/// The features of a session that carries streams.
pub(crate) const FEATURES: Features = Features::BRIDGE.union(Features::RESUME);

/// Why a channel is of no more use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    /// The link.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// Bytes that make no sense.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// Legal bytes at the wrong moment.
    #[error(transparent)]
    Misbehaved(#[from] Misbehaved),
    /// Words about streams that contradict what was said before.
    #[error(transparent)]
    Wrong(#[from] Wrong),
    /// A frame that we may not send.
    #[error(transparent)]
    Misuse(#[from] Misuse),
}

impl Fault {
    /// Whether the peer breaks the protocol, so that to go on makes no sense.
    pub(crate) fn is_peers(&self) -> bool {
        let changed = |error: &Malformed| {
            use multifd_wire::Reason;
            error.reason() == Reason::Corruption
        };
        match self {
            Self::Channel(_) | Self::Misuse(_) => false,
            Self::Malformed(error) => !changed(error),
            Self::Misbehaved(_) | Self::Wrong(_) => true,
        }
    }
}

/// A sending direction with its sequence.
pub(crate) struct Sending {
    pub(crate) tx: Box<dyn SendHalf>,
    next: Sequence,
    head: Vec<u8>,
}

impl Sending {
    pub(crate) fn new(tx: Box<dyn SendHalf>) -> Self {
        Self {
            tx,
            next: Sequence::FIRST,
            head: Vec::with_capacity(8192),
        }
    }

    pub(crate) fn send<'a>(&mut self, frame: impl Into<Frame<'a>>) -> Result<(), Fault> {
        self.head.clear();
        frame.into().encode(self.next, Body::None, &mut self.head)?;
        self.next = self.next.next();
        Ok(self.tx.send(&self.head, &[])?)
    }

    pub(crate) fn send_piece<'a>(
        &mut self,
        frame: impl Into<Frame<'a>>,
        piece: &Piece,
    ) -> Result<(), Fault> {
        self.head.clear();
        let body = Body::Sum {
            bytes: u32::try_from(piece.bytes()).unwrap_or(u32::MAX),
            crc: piece.crc(),
        };
        frame.into().encode(self.next, body, &mut self.head)?;
        self.next = self.next.next();
        Ok(self.tx.send(&self.head, &[IoSource::Bytes(piece)])?)
    }
}

/// A receiving direction with its sequence.
pub(crate) struct Receiving {
    pub(crate) rx: Box<dyn ReceiveHalf>,
    from: Role,
    on: ChannelKind,
    next: Sequence,
    table: Vec<u8>,
}

impl Receiving {
    pub(crate) fn new(rx: Box<dyn ReceiveHalf>, from: Role, on: ChannelKind) -> Self {
        Self {
            rx,
            from,
            on,
            next: Sequence::FIRST,
            table: Vec::with_capacity(8192),
        }
    }

    /// Reads a head. The body, if there is one, is the caller's to read.
    // SPEC: KIND-1, KIND-2, HEAD-8
    pub(crate) fn head(&mut self, phase: Phase) -> Result<(Header, Frame<'_>), Fault> {
        let mut octets = [0u8; HEADER_BYTES];
        self.rx.receive(&mut octets)?;
        let header = Header::decode(&octets)?;
        header.check_sequence(self.next)?;
        self.next = self.next.next();
        header.kind().check_direction(self.from, self.on)?;
        header.kind().check_phase(phase)?;
        self.table.resize(header.table_bytes(), 0);
        self.rx.receive(&mut self.table)?;
        let frame = Frame::decode(&header, &self.table)?;
        Ok((header, frame))
    }

    /// Reads the body of a kind that nobody knows, and drops it.
    pub(crate) fn skip(&mut self, header: &Header) -> Result<(), Fault> {
        let mut body = vec![0; header.body_bytes()];
        self.rx.receive(&mut body)?;
        Ok(header.check_body(&body)?)
    }
}

/// Sets one deadline for both directions.
pub(crate) fn set_deadline(tx: &mut dyn SendHalf, rx: &mut dyn ReceiveHalf, at: Option<Instant>) {
    tx.set_deadline(at);
    rx.set_deadline(at);
}
