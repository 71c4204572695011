//! Frames over the control channel, in both directions.

use std::sync::Arc;

use crossbeam_channel::Sender;
use multifd_session::common::ChannelFault;
use multifd_session::source::ask::outcome;
use multifd_transport::{ChannelError, ReceiveHalf, SendHalf};
use multifd_wire::frame::OutcomeState;
use multifd_wire::limits::TABLE_BYTES_MAX;
use multifd_wire::{
    Body, ChannelKind, ChannelRef, Frame, HEADER_BYTES, Header, Misbehaved, Phase, Role, Sequence,
};

use super::device::DeviceTable;
use super::{Note, Shared};
use crate::error::{Error, Fault};

/// The transport's error, as the protocol knows it.
pub(super) fn failed(error: ChannelError) -> Fault {
    Fault::Channel(ChannelFault::new(error.code(), error.sent_nothing(), error))
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

/// Reads the one frame that answers a question.
pub(super) fn read_outcome(rx: &mut dyn ReceiveHalf) -> Result<OutcomeState, Fault> {
    let mut reader = Reader {
        expected: Sequence::new(0),
        table: Vec::new(),
        // No device is spoken of there.
        devices: Arc::new(DeviceTable::new()),
        epoch: 0,
    };
    let header = reader.next(rx)?;
    outcome(&Frame::decode(&header, &reader.table)?)
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
