//! Frames over a channel: reading heads, and the control channel's two directions.

use multifd_session::common::{ChannelFault, Encoded};
use multifd_transport::{ChannelError, ReceiveHalf, SendHalf};
use multifd_wire::{
    ChannelKind, ChannelRef, Frame, HEADER_BYTES, Header, Malformed, Misbehaved, Role, Sequence,
};

use super::{Note, Shared};
use crate::error::Fault;

/// The transport's error, as the protocol knows it.
pub(super) fn failed(error: ChannelError) -> Fault {
    Fault::Channel(ChannelFault::new(error.code(), error.sent_nothing(), error))
}

/// The sending direction of the control channel.
pub(super) struct ControlSender {
    tx: Box<dyn SendHalf>,
}

impl ControlSender {
    pub(super) fn new(tx: Box<dyn SendHalf>) -> Self {
        Self { tx }
    }

    pub(super) fn send(&mut self, frame: &Encoded) -> Result<(), Fault> {
        self.tx.send(frame.bytes(), &[]).map_err(failed)
    }

    pub(super) fn half(&mut self) -> &mut dyn SendHalf {
        &mut *self.tx
    }
}

/// Reads one header and its table. The table's buffer is reused; its size is bounded by the header's own check.
pub(super) fn read_head(
    rx: &mut dyn ReceiveHalf,
    table: &mut Vec<u8>,
    on: ChannelKind,
    turn: impl FnOnce(&Header) -> Result<(), Misbehaved>,
) -> Result<Header, Fault> {
    let octets = read_first(rx)?;
    read_table(rx, &octets, table, on, turn)
}

/// Reads what a frame begins with. Between frames a channel may be idle for as long as the source has nothing for it: the
/// control channel tells whether the source lives. But once a first byte is here, the others have to come (SPEC: LANE-8).
pub(super) fn read_first(rx: &mut dyn ReceiveHalf) -> Result<[u8; HEADER_BYTES], Fault> {
    let mut octets = [0u8; HEADER_BYTES];
    loop {
        match rx.receive(&mut octets) {
            Err(ChannelError::Stalled { bytes_done: 0, .. }) if rx.buffered() == 0 => {}
            result => return result.map(|()| octets).map_err(failed),
        }
    }
}

/// Checks a header, and reads the table that follows it.
pub(super) fn read_table(
    rx: &mut dyn ReceiveHalf,
    octets: &[u8; HEADER_BYTES],
    table: &mut Vec<u8>,
    on: ChannelKind,
    turn: impl FnOnce(&Header) -> Result<(), Misbehaved>,
) -> Result<Header, Fault> {
    let header = Header::decode(octets)?;
    turn(&header)?;
    let (kind, from) = (header.kind(), Role::Source);
    if !kind.may_travel(from, on) {
        return Err(Misbehaved::Direction { kind, from, on }.into());
    }
    table.resize(header.table_bytes(), 0);
    rx.receive(table).map_err(failed)?;
    Ok(header)
}

/// A frame of the control channel as it came: what it holds is borrowed from it.
pub(super) struct Message {
    header: Header,
    table: Vec<u8>,
    body: Vec<u8>,
}

impl Message {
    /// The frame, checked.
    pub(super) fn frame(&self) -> Result<Frame<'_>, Malformed> {
        Frame::decode(&self.header, &self.table)
    }

    pub(super) fn body(&self) -> &[u8] {
        &self.body
    }
}

/// Reads the control channel until it ends, and passes every frame on. Never returns without a last word to the control thread.
pub(super) fn read_control(mut rx: Box<dyn ReceiveHalf>, shared: &Shared, epoch: u32) {
    let mut expected = Sequence::FIRST;
    loop {
        let note = match next(&mut *rx, &mut expected) {
            Ok(message) => Note::Inbound { epoch, message },
            Err(fault) => {
                shared.counters.note_fault(ChannelRef::Control, &fault);
                Note::ControlLost { epoch, fault }
            }
        };
        let ended = matches!(note, Note::ControlLost { .. });
        if shared.notes.send(note).is_err() || ended {
            return;
        }
    }
}

fn next(rx: &mut dyn ReceiveHalf, expected: &mut Sequence) -> Result<Message, Fault> {
    let mut table = Vec::new();
    let header = read_head(rx, &mut table, ChannelKind::Control, |header| {
        header.check_sequence(*expected)
    })?;
    *expected = expected.next();
    let mut message = Message {
        header,
        table,
        body: Vec::new(),
    };
    // What can't be read is found here, where the channel is: nothing more of it is used (SPEC: ERR-5).
    let skipped = matches!(message.frame()?, Frame::Skipped(_));
    if skipped {
        skip_body(rx, header.body_bytes()).map_err(failed)?;
    } else if header.body_bytes() > 0 {
        message.body = read_body(rx, &header)?;
    }
    Ok(message)
}

/// A body of at most 1 MiB, which the header's check has seen to.
fn read_body(rx: &mut dyn ReceiveHalf, header: &Header) -> Result<Vec<u8>, Fault> {
    let mut body = Vec::new();
    let wanted = header.body_bytes();
    body.try_reserve_exact(wanted).map_err(|_| Fault::System {
        step: "memory for a frame",
        source: std::io::ErrorKind::OutOfMemory.into(),
    })?;
    body.resize(wanted, 0u8);
    rx.receive(&mut body).map_err(failed)?;
    header.check_body(&body)?;
    Ok(body)
}

/// Reads over the body of an optional kind that this version does not know.
pub(super) fn skip_body(rx: &mut dyn ReceiveHalf, mut octets: usize) -> Result<(), ChannelError> {
    let mut bin = [0u8; 4096];
    while octets > 0 {
        let piece = octets.min(bin.len());
        rx.receive(&mut bin[..piece])?;
        octets -= piece;
    }
    Ok(())
}
