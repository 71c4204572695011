//! Frames over a channel: reading heads, and the control channel's two directions.

use multifd_session::common::ChannelFault;
use multifd_transport::{ChannelError, ReceiveHalf, SendHalf};
use multifd_wire::frame::{BlobPart, Commit, Device, Final, Regions, SetupEnd, Switchover};
use multifd_wire::{
    Body, ChannelKind, ChannelRef, Frame, HEADER_BYTES, Header, Incarnation, LaneId, Layout,
    Malformed, Misbehaved, Phase, Reason, Role, Sequence,
};

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
            next: Sequence::FIRST,
            head: Vec::with_capacity(4096),
        }
    }

    pub(super) fn send<'a>(&mut self, frame: impl Into<Frame<'a>>) -> Result<(), Fault> {
        self.head.clear();
        frame.into().encode(self.next, Body::None, &mut self.head)?;
        self.next = Sequence::new(self.next.value() + 1);
        self.tx.send(&self.head, &[]).map_err(failed)
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
    let mut octets = [0u8; HEADER_BYTES];
    receive_first(rx, &mut octets).map_err(failed)?;
    let header = Header::decode(&octets)?;
    turn(&header)?;
    let (kind, from) = (header.kind(), Role::Source);
    if !kind.may_travel(from, on) {
        return Err(Misbehaved::Direction { kind, from, on }.into());
    }
    table.resize(header.table_bytes(), 0);
    rx.receive(table).map_err(failed)?;
    Ok(header)
}

/// Reads what a frame begins with. Between frames a channel may be idle for as long as the source has nothing for it: the
/// control channel tells whether the source lives. But once a first octet is here, the others have to come.
fn receive_first(rx: &mut dyn ReceiveHalf, octets: &mut [u8]) -> Result<(), ChannelError> {
    loop {
        match rx.receive(octets) {
            Err(ChannelError::Stalled { bytes_done: 0, .. }) if rx.buffered() == 0 => {}
            result => return result,
        }
    }
}

/// What the source says on the control channel, in owned form.
#[derive(Debug)]
pub(super) enum Inbound {
    Config(BlobPart, Vec<u8>),
    Regions(Layout),
    Devices(Vec<Device>),
    SetupEnd(SetupEnd),
    KeepAlive {
        stamp_us: u64,
        echo_us: u64,
    },
    LaneDown {
        lane: LaneId,
        incarnation: Incarnation,
        reason: Reason,
    },
    Switchover(Switchover),
    VmState(BlobPart, Vec<u8>),
    Final(Final),
    Commit(Commit),
    Abort {
        reason: Reason,
        text: String,
    },
    /// Optional kinds of later versions.
    Other,
}

/// Reads the control channel until it ends, and passes every frame on. Never returns without a last word to the control thread.
pub(super) fn read_control(mut rx: Box<dyn ReceiveHalf>, shared: &Shared, epoch: u32) {
    let (mut expected, mut table) = (Sequence::FIRST, Vec::new());
    loop {
        let note = match next(&mut *rx, &mut expected, &mut table) {
            Ok(inbound) => Note::Inbound { epoch, inbound },
            Err(fault) => {
                shared.counters.note_fault(ChannelRef::Control, &fault);
                Note::ControlLost {
                    epoch,
                    error: Error::new(Phase::Hello, fault).at(ChannelRef::Control),
                }
            }
        };
        let ended = matches!(note, Note::ControlLost { .. });
        if shared.notes.send(note).is_err() || ended {
            return;
        }
    }
}

fn next(
    rx: &mut dyn ReceiveHalf,
    expected: &mut Sequence,
    table: &mut Vec<u8>,
) -> Result<Inbound, Fault> {
    let header = read_head(rx, table, ChannelKind::Control, |header| {
        header.check_sequence(*expected)
    })?;
    *expected = Sequence::new(expected.value() + 1);
    let frame = Frame::decode(&header, table)?;
    let with_body = matches!(frame, Frame::Config(_) | Frame::VmState(_));
    let body = if with_body {
        read_body(rx, &header)?
    } else {
        Vec::new()
    };
    let inbound = owned(frame, body)?;
    if !with_body {
        skip_body(rx, header.body_bytes()).map_err(failed)?;
    }
    Ok(inbound)
}

/// A body of at most 1 MiB, which the header's check has seen to.
fn read_body(rx: &mut dyn ReceiveHalf, header: &Header) -> Result<Vec<u8>, Fault> {
    let mut body = vec![0u8; header.body_bytes()];
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

fn owned(frame: Frame<'_>, body: Vec<u8>) -> Result<Inbound, Malformed> {
    Ok(match frame {
        Frame::Config(config) => Inbound::Config(config.blob, body),
        Frame::Regions(regions) => Inbound::Regions(layout(&regions)?),
        Frame::Devices(devices) => Inbound::Devices(devices.iter().collect::<Result<_, _>>()?),
        Frame::SetupEnd(end) => Inbound::SetupEnd(end),
        Frame::KeepAlive(alive) => Inbound::KeepAlive {
            stamp_us: alive.stamp_us,
            echo_us: alive.echo_us,
        },
        Frame::LaneDown(down) => Inbound::LaneDown {
            lane: down.lane,
            incarnation: down.incarnation,
            reason: down.reason,
        },
        Frame::Switchover(switchover) => Inbound::Switchover(switchover),
        Frame::VmState(state) => Inbound::VmState(state.blob, body),
        Frame::Final(last) => Inbound::Final(last),
        Frame::Commit(commit) => Inbound::Commit(commit),
        Frame::Abort(abort) => Inbound::Abort {
            reason: abort.reason,
            text: abort.text.to_owned(),
        },
        _ => Inbound::Other,
    })
}

fn layout(regions: &Regions<'_>) -> Result<Layout, Malformed> {
    Ok(Layout::from_frame(regions)?)
}
