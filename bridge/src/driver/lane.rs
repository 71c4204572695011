//! A lane: one thread that sends whatever goes next, one that receives. Which pieces and which streams is the machine's affair.

use std::sync::Arc;
use std::time::Duration;

use multifd_transport::{Closer, ReceiveHalf, SendHalf};
use multifd_wire::frame::{Frame, StreamData};
use multifd_wire::{ChannelKind, Phase, Reason, Role};

use super::core::Link;
use super::frames::{Fault, Receiving, Sending};
use super::{Shared, connection, wait};
use crate::machine::{Admit, Via};
use crate::report::Ended;

/// Pieces shorter than this get memory of their own size: a buffer of the pool for each would let a peer that sends single bytes hold
/// far more than it was granted.
const SMALL: usize = 16 * 1024;

/// Carries pieces both ways until the lane ends, or its control channel does.
pub(crate) fn serve(
    shared: &Arc<Shared>,
    tx: Box<dyn SendHalf>,
    rx: Box<dyn ReceiveHalf>,
    closer: Closer,
    via: Via,
    epoch: u64,
) {
    {
        let mut core = shared.lock();
        if !core.is_current(epoch) {
            closer.shutdown();
            return;
        }
        let link = Link {
            closer: closer.clone(),
            epoch,
        };
        core.lanes.insert(via, link);
    }
    shared.lanes.notify_all();
    let theirs = Arc::clone(shared);
    super::spawn(&format!("brg-lane{}-in", via.lane), move || {
        let peer = match theirs.role {
            Role::Source => Role::Destination,
            Role::Destination => Role::Source,
        };
        let mut receiving = Receiving::new(rx, peer, ChannelKind::Data);
        let error = loop {
            if let Err(error) = receive(&theirs, &mut receiving) {
                break error;
            }
        };
        lost(&theirs, via, epoch, &error);
    });
    let mut sending = Sending::new(tx);
    let error = loop {
        match send(shared, &mut sending, via, epoch) {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => break error,
        }
    };
    lost(shared, via, epoch, &error);
}

fn lost(shared: &Shared, via: Via, epoch: u64, error: &Fault) {
    let mut core = shared.lock();
    if core.is_current(epoch) {
        tracing::info!(lane = %via.lane, incarnation = %via.incarnation, %error, "a lane ended");
        if matches!(error, Fault::Malformed(_)) && !error.is_peers() {
            core.damaged += 1;
        }
        if error.is_peers() {
            let why = format!("the peer broke the protocol: {error}");
            core.give_up(Ended::Failed, Reason::Misbehaved, why);
        }
    }
    core.lane_down(via, epoch);
    drop(core);
    shared.wake_all();
}

/// Sends the next piece, once there is one. Says whether the lane goes on.
fn send(shared: &Shared, sending: &mut Sending, via: Via, epoch: u64) -> Result<bool, Fault> {
    let outbound = {
        let mut core = shared.lock();
        loop {
            if core.lanes.get(&via).is_none_or(|link| link.epoch != epoch) {
                return Ok(false);
            }
            let kept_free = core.is_kept_free(via);
            if let Some(outbound) = core.streams.next(via, kept_free, shared.now()) {
                break outbound;
            }
            core = wait(&shared.lanes, core, Duration::from_secs(1));
        }
    };
    let frame = StreamData {
        stream: outbound.stream,
        offset: outbound.offset,
    };
    sending.send_piece(frame, &outbound.piece)?;
    Ok(true)
}

/// Receives one piece and puts it where it belongs.
fn receive(shared: &Arc<Shared>, receiving: &mut Receiving) -> Result<(), Fault> {
    let (header, frame) = receiving.head(Phase::Carrying)?;
    let Frame::StreamData(data) = frame else {
        return receiving.skip(&header);
    };
    let bytes = header.body_bytes();
    let admit = {
        let mut core = shared.lock();
        connection::open_up_to(shared, &mut core, data.stream)?;
        core.streams.admit(data.stream, data.offset, bytes as u64)?
    };
    let piece = if bytes < SMALL {
        let mut octets = vec![0; bytes];
        receiving.rx.receive(&mut octets)?;
        crate::piece::Piece::new(octets)
    } else {
        let mut buffer = shared.pool.buffer(bytes);
        receiving.rx.receive(&mut buffer.octets()[..bytes])?;
        buffer.piece(bytes)
    };
    header.check_body_crc(piece.crc())?;
    if admit == Admit::Drop {
        return Ok(());
    }
    let mut core = shared.lock();
    if core.streams.data(data.stream, data.offset, piece)?
        && let Some(connection) = core.connections.get(&data.stream.value())
    {
        connection.gate.write.notify_all();
        if connection.socket.is_none() {
            shared.changed.notify_all();
        }
    }
    Ok(())
}
