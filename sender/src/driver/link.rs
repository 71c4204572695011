//! Frames over a channel: the hello exchange, the control channel's two directions.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use multifd_session::common::ChannelFault;
use multifd_transport::{
    Channel, ChannelError, Closer, ReceiveHalf, STRANGER_BYTES, SendHalf, Stranger,
};
use multifd_wire::frame::OutcomeState;
use multifd_wire::limits::TABLE_BYTES_MAX;
use multifd_wire::negotiate::{Agreement, accept};
use multifd_wire::{
    Body, ChannelKind, ChannelRef, Frame, HEADER_BYTES, HELLO_REPLY_BYTES, Header, Hello,
    HelloReply, Incompatible, Misbehaved, Phase, Role, Sequence,
};

use super::device::DeviceTable;
use super::{Note, Shared};
use crate::error::{Error, Fault};

/// The transport's error, as the protocol knows it.
pub(super) fn failed(error: ChannelError) -> Fault {
    Fault::Channel(ChannelFault::new(error.code(), error.sent_nothing(), error))
}

/// A channel whose hello was accepted.
pub(super) struct Open {
    pub(super) tx: Box<dyn SendHalf>,
    pub(super) rx: Box<dyn ReceiveHalf>,
    pub(super) closer: Closer,
    pub(super) agreement: Agreement,
    pub(super) description: String,
    /// From the hello to its reply: a round trip, or longer than one.
    pub(super) round_trip: Duration,
}

/// Says hello and reads the answer (SPEC: HELLO-1).
pub(super) fn open(
    channel: Box<dyn Channel>,
    hello: &Hello,
    deadline: Instant,
) -> Result<Open, Fault> {
    let description = channel.describe();
    let (mut tx, mut rx, closer) = channel.split();
    tx.set_deadline(Some(deadline));
    rx.set_deadline(Some(deadline));
    let asked = Instant::now();
    tx.send(&hello.encode(), &[]).map_err(failed)?;
    let mut octets = [0u8; HELLO_REPLY_BYTES];
    rx.receive(&mut octets)
        .map_err(|error| unanswered(error, &*rx))?;
    let round_trip = asked.elapsed();
    let reply = HelloReply::decode(&octets).map_err(|error| match stranger(&octets) {
        Some(stranger) => stranger,
        None => error.into(),
    })?;
    let agreement = accept(hello, &reply).map_err(|e| match e {
        Incompatible::Refused { reason, text } => Fault::Refused {
            reason,
            text: text.to_string(),
        },
        other => Fault::Incompatible(other),
    })?;
    tx.set_deadline(None);
    rx.set_deadline(None);
    Ok(Open {
        tx,
        rx,
        closer,
        agreement,
        description,
        round_trip,
    })
}

/// What it means that no answer came to a hello: what came instead, if it was anything.
fn unanswered(error: ChannelError, rx: &dyn ReceiveHalf) -> Fault {
    let mut octets = [0; STRANGER_BYTES];
    let heard = rx.peek(&mut octets);
    stranger(&octets[..heard]).unwrap_or_else(|| failed(error))
}

/// The fault of a peer that speaks something else. None speaks as a destination does, if only the beginning of it.
fn stranger(octets: &[u8]) -> Option<Fault> {
    /// What an answer begins with (SPEC: HELLO-1).
    const BEGINNING: &[u8] = b"MULTIFD\n";
    let known = octets.len().min(BEGINNING.len());
    if octets.get(..known) == BEGINNING.get(..known) {
        return None;
    }
    let text = Stranger::look_at(octets)?.to_string();
    Some(Fault::Channel(ChannelFault::new(
        "channel-stranger",
        false,
        text,
    )))
}

/// The sending direction of the control channel.
pub(super) struct ControlSender {
    tx: Box<dyn SendHalf>,
    next: Sequence,
    head: Vec<u8>,
}

impl ControlSender {
    pub(super) fn new(tx: Box<dyn SendHalf>) -> Self {
        Self {
            tx,
            next: Sequence::new(0),
            head: Vec::with_capacity(4096),
        }
    }

    /// Sends a frame without a body.
    pub(super) fn send<'a>(&mut self, frame: impl Into<Frame<'a>>) -> Result<(), Fault> {
        self.head.clear();
        frame.into().encode(self.next, Body::None, &mut self.head)?;
        self.next = Sequence::new(self.next.value() + 1);
        self.tx.send(&self.head, &[]).map_err(failed)
    }

    /// Sends a frame and its body.
    pub(super) fn send_with<'a>(
        &mut self,
        frame: impl Into<Frame<'a>>,
        body: &[u8],
    ) -> Result<(), Fault> {
        self.head.clear();
        frame
            .into()
            .encode(self.next, Body::Octets(body), &mut self.head)?;
        self.next = Sequence::new(self.next.value() + 1);
        self.tx
            .send(&self.head, &[multifd_transport::IoSource::Bytes(body)])
            .map_err(failed)
    }

    pub(super) fn half(&mut self) -> &mut dyn SendHalf {
        &mut *self.tx
    }
}

/// Reads the control channel until it ends, and passes every frame on. Never returns without a last word to the control thread.
pub(super) fn read_control(
    mut rx: Box<dyn ReceiveHalf>,
    shared: &Shared,
    epoch: u32,
    notes: &Sender<Note>,
) {
    let mut reader = Reader {
        expected: Sequence::new(0),
        table: Vec::new(),
        devices: Arc::clone(&shared.devices),
        epoch,
    };
    loop {
        let note = match reader.next(&mut *rx) {
            Ok(header) => Note::Frame {
                epoch,
                header,
                table: reader.table.clone(),
            },
            Err(fault) => {
                shared.counters.note_fault(ChannelRef::Control, &fault);
                Note::ControlLost {
                    epoch,
                    error: Error::new(Phase::Hello, fault).at(ChannelRef::Control),
                }
            }
        };
        let ended = matches!(note, Note::ControlLost { .. });
        if notes.send(note).is_err() || ended {
            return;
        }
    }
}

/// Reads the one frame that answers a question (SPEC: ASK-1).
pub(super) fn read_outcome(rx: &mut dyn ReceiveHalf) -> Result<OutcomeState, Fault> {
    let mut reader = Reader {
        expected: Sequence::new(0),
        table: Vec::new(),
        // No device is spoken of there.
        devices: Arc::new(DeviceTable::new()),
        epoch: 0,
    };
    let header = reader.next(rx)?;
    match Frame::decode(&header, &reader.table)? {
        Frame::Outcome(outcome) => Ok(outcome.state),
        other => Err(Fault::OutOfTurn {
            what: format!("{other:?} in the place of an answer"),
        }),
    }
}

struct Reader {
    expected: Sequence,
    table: Vec<u8>,
    devices: Arc<DeviceTable>,
    epoch: u32,
}

impl Reader {
    fn next(&mut self, rx: &mut dyn ReceiveHalf) -> Result<Header, Fault> {
        let mut octets = [0u8; HEADER_BYTES];
        rx.receive(&mut octets).map_err(failed)?;
        let header = Header::decode(&octets)?;
        header.check_sequence(self.expected)?;
        self.expected = Sequence::new(self.expected.value() + 1);
        let (kind, from, on) = (header.kind(), Role::Destination, ChannelKind::Control);
        if !kind.may_travel(from, on) {
            return Err(Misbehaved::Direction { kind, from, on }.into());
        }
        debug_assert!(
            header.table_bytes() <= TABLE_BYTES_MAX,
            "Header::decode bounds it"
        );
        self.table.resize(header.table_bytes(), 0);
        rx.receive(&mut self.table).map_err(failed)?;
        let frame = Frame::decode(&header, &self.table)?;
        // Straight to the devices: the control thread may be busy pausing the guest, and they must not stand still for that.
        let devices = !self.devices.streams().is_empty();
        if let Frame::Credit(credits) = &frame
            && devices
        {
            for credit in credits.iter() {
                let stream = self.devices.stream(credit.device)?;
                stream.grant(self.epoch, credit.offset_max)?;
            }
        }
        skip_body(rx, header.body_bytes()).map_err(failed)?;
        Ok(header)
    }
}

/// No kind that the destination sends in this version has a body; one of a later version, marked optional, may.
fn skip_body(rx: &mut dyn ReceiveHalf, mut octets: usize) -> Result<(), ChannelError> {
    let mut bin = [0u8; 4096];
    while octets > 0 {
        let piece = octets.min(bin.len());
        rx.receive(&mut bin[..piece])?;
        octets -= piece;
    }
    Ok(())
}
