//! One connection of the monitor: a thread that reads it as far as there is credit, and one that writes to it what came.
//!
//! Here it is decided what an end means (SPEC: CARRY-9, CARRY-12).

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::sync::Arc;
use std::time::Duration;

use multifd_wire::frame::{OutcomeState, StreamEndKind};
use multifd_wire::{Reason, Role, StreamId};
use socket2::Socket;

use super::core::Core;
use super::{Shared, spawn, wait};
use crate::keeper::Keeper;
use crate::machine::{Outgoing, Wrong};
use crate::piece::{PIECE_BYTES, Piece};
use crate::report::Ended;
use crate::tap::{KIND_BYTES, Stage};

/// Shorter reads are copied into memory of their own size, and the buffer is used again.
const SMALL: usize = 16 * 1024;

/// The longest wait before a thread looks again by itself.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// The peer spoke of a stream.
// SPEC: CARRY-4
pub(crate) fn open_up_to(shared: &Shared, core: &mut Core, stream: StreamId) -> Result<(), Wrong> {
    if stream.value() < core.streams.count() {
        return Ok(());
    }
    if shared.role == Role::Source {
        return Err(Wrong::Unknown { stream });
    }
    for number in core.streams.open_up_to(stream) {
        core.add_connection(number, shared.now());
    }
    shared.changed.notify_all();
    Ok(())
}

/// Starts both threads of a connection.
pub(crate) fn start(shared: &Arc<Shared>, stream: u32, socket: Socket) {
    let socket = Arc::new(socket);
    {
        let mut core = shared.lock();
        let now = shared.now();
        core.add_connection(stream, now).socket = Some(Arc::clone(&socket));
    }
    let (reads, writes) = (Arc::clone(shared), Arc::clone(shared));
    let read_socket = Arc::clone(&socket);
    spawn(&format!("brg-vmm{stream}-in"), move || {
        read_loop(&reads, stream, &read_socket);
    });
    spawn(&format!("brg-vmm{stream}-out"), move || {
        write_loop(&writes, stream, &socket);
    });
}

/// Waits for room and says how much there is; `None` when nothing more is to be read.
fn room(shared: &Shared, stream: u32) -> Option<usize> {
    let id = StreamId::new(stream);
    let mut core = shared.lock();
    loop {
        let connection = core.connections.get(&stream)?;
        if connection.broken {
            return None;
        }
        let room = core.streams.outgoing(id).map_or(0, Outgoing::room);
        if room > 0 {
            return Some(usize::try_from(room).unwrap_or(usize::MAX).min(PIECE_BYTES));
        }
        let gate = Arc::clone(&connection.gate);
        core = wait(&gate.read, core, LOOK_AGAIN);
    }
}

fn read_loop(shared: &Arc<Shared>, stream: u32, mut socket: &Socket) {
    let mut spare = None;
    let mut first = true;
    while let Some(room) = room(shared, stream) {
        let mut buffer = spare
            .take()
            .unwrap_or_else(|| shared.pool.buffer(PIECE_BYTES));
        let mut bytes = match socket.read(&mut buffer.octets()[..room]) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => {
                tracing::info!(stream, %error, "the monitor's connection broke");
                ended(shared, stream, StreamEndKind::Reset);
                return;
            }
        };
        // What a stream is, is told by its first bytes: they are read together.
        while first && bytes > 0 && bytes < KIND_BYTES.min(room) {
            match socket.read(&mut buffer.octets()[bytes..room]) {
                Ok(0) | Err(_) => break,
                Ok(more) => bytes += more,
            }
        }
        if bytes == 0 {
            ended(shared, stream, StreamEndKind::Clean);
            return;
        }
        let piece = if bytes < SMALL {
            let piece = Piece::new(buffer.octets()[..bytes].to_vec());
            spare = Some(buffer);
            piece
        } else {
            buffer.piece(bytes)
        };
        let mut core = shared.lock();
        if first {
            first = false;
            if shared.role == Role::Source {
                core.recognise(stream, &piece);
                keep(shared, &mut core, stream, socket);
            }
        }
        tap_outgoing(shared, &mut core, stream, &piece);
        core.streams.push(StreamId::new(stream), piece);
        drop(core);
        shared.lanes.notify_one();
    }
}

/// Starts a keeper for QEMU's first connection.
fn keep(shared: &Shared, core: &mut Core, stream: u32, socket: &Socket) {
    let first = core.main == Some(stream) && core.keeper.is_none();
    if let Some(make) = shared.make_keeper.as_ref().filter(|_| first) {
        match Keeper::start(make, socket) {
            Ok(keeper) => core.keeper = Some(keeper),
            Err(error) => tracing::error!(%error, "no keeper: do not kill this program"),
        }
    }
}

/// Bytes from the monitor, before anybody else has them: what they say is known before the peer can act on it.
fn tap_outgoing(shared: &Shared, core: &mut Core, stream: u32, piece: &Piece) {
    let is_main = core.main == Some(stream);
    let post_copy = core.is_post_copy();
    let Some(connection) = core.connections.get_mut(&stream) else {
        return;
    };
    match shared.role {
        Role::Source => {
            if let Some(main) = &mut connection.main {
                main.feed(piece);
                // Before the destination can have it.
                if main.stage() > Stage::Memory
                    && let (Some(keeper), Some((session, secret))) = (&mut core.keeper, core.names)
                {
                    keeper.hold(session, secret);
                }
                if main.lacks_return_path() && core.abort.is_none() {
                    let why = "the source's monitor migrates without a return path, so nobody would hear whether the guest runs at the \
                               destination: switch the capability return-path on, on both sides";
                    refuse(shared, core, stream, why);
                }
            } else if let Some(pages) = &mut connection.pages {
                pages.feed(piece);
            }
        }
        Role::Destination if is_main => {
            let before = connection.path.shut();
            connection.path.feed(piece);
            let Some(word) = connection.path.shut().filter(|_| before.is_none()) else {
                return;
            };
            // SPEC: CARRY-10
            let outcome = match word {
                0 => OutcomeState::Running,
                _ if post_copy => OutcomeState::FailedAfterCommit,
                _ => OutcomeState::NotCommitted,
            };
            set_outcome(shared, core, outcome);
        }
        Role::Destination => {}
    }
}

/// Ends everything before memory travels: the guest goes on at the source.
fn refuse(shared: &Shared, core: &mut Core, stream: u32, why: &str) {
    core.give_up(Ended::Failed, Reason::Incompatible, why.to_owned());
    core.break_connection(stream);
    shared.wake_all();
}

/// The destination knows how it ended.
pub(crate) fn set_outcome(shared: &Shared, core: &mut Core, outcome: OutcomeState) {
    if core.outcome.is_none() {
        tracing::info!(?outcome, "the outcome is known");
        core.outcome = Some(outcome);
        core.outcome_due = true;
        release_ends(core);
        shared.wake_all();
    }
}

/// Passes the ends on that were kept back while the outcome was open.
pub(crate) fn release_ends(core: &mut Core) {
    let kept: Vec<_> = core
        .connections
        .iter_mut()
        .filter_map(|(stream, connection)| Some((*stream, connection.ended.take()?.0)))
        .collect();
    for (stream, how) in kept {
        core.streams.end(StreamId::new(stream), how);
    }
}

/// The monitor ended a connection.
// SPEC: CARRY-9
fn ended(shared: &Arc<Shared>, stream: u32, how: StreamEndKind) {
    let mut core = shared.lock();
    let now = shared.now();
    let id = StreamId::new(stream);
    let is_main = core.main == Some(stream);
    let Some(connection) = core.connections.get(&stream) else {
        return;
    };
    if connection.broken {
        core.streams.end(id, StreamEndKind::Reset);
    } else if core.outcome == Some(OutcomeState::Running) || !core.is_read() {
        core.streams.end(id, how);
    } else if core.is_post_copy() {
        // Either monitor pauses then, and the source connects anew.
        core.streams.end(id, StreamEndKind::Reset);
    } else if is_main && shared.role == Role::Source {
        let why = "the source's monitor ended the migration".to_owned();
        core.give_up(Ended::Cancelled, Reason::Cancelled, why);
    } else if is_main {
        tracing::warn!("the destination's monitor ended the migration before the guest ran there");
        set_outcome(shared, &mut core, OutcomeState::NotCommitted);
        core.streams.end(id, StreamEndKind::Reset);
    } else if let Some(connection) = core.connections.get_mut(&stream) {
        connection.ended = Some((how, now));
    }
    drop(core);
    shared.wake_all();
}

/// What the writing thread does next.
enum Work {
    Write(Piece),
    TellEnd,
    Stop,
}

fn work(shared: &Shared, stream: u32) -> Work {
    let id = StreamId::new(stream);
    let mut core = shared.lock();
    loop {
        let Some(connection) = core.connections.get(&stream) else {
            return Work::Stop;
        };
        if connection.broken {
            return Work::Stop;
        }
        let gate = Arc::clone(&connection.gate);
        let told = connection.told_end;
        if let Some(piece) = core.streams.hand(id) {
            return Work::Write(piece);
        }
        let end = core
            .streams
            .incoming(id)
            .and_then(|incoming| incoming.ended());
        match end {
            Some(StreamEndKind::Reset) => {
                core.break_connection(stream);
                return Work::Stop;
            }
            Some(StreamEndKind::Clean) if !told && !core.holds_back_end(stream) => {
                if let Some(connection) = core.connections.get_mut(&stream) {
                    connection.told_end = true;
                }
                return Work::TellEnd;
            }
            _ => {}
        }
        core = wait(&gate.write, core, LOOK_AGAIN);
    }
}

fn write_loop(shared: &Arc<Shared>, stream: u32, mut socket: &Socket) {
    let id = StreamId::new(stream);
    loop {
        match work(shared, stream) {
            Work::Stop => return,
            Work::TellEnd => {
                let _ = socket.shutdown(Shutdown::Write);
                shared.wake_all();
            }
            Work::Write(piece) => {
                // Before the monitor has it: what it does next may follow from it at once.
                tap_incoming(&mut shared.lock(), stream, &piece);
                if let Err(error) = socket.write_all(&piece) {
                    // The reading thread finds out what this means.
                    tracing::info!(stream, %error, "the monitor takes no more");
                    if error.kind() != std::io::ErrorKind::BrokenPipe {
                        let _ = socket.shutdown(Shutdown::Both);
                    }
                    return;
                }
                let now = shared.now();
                let mut core = shared.lock();
                let pressing = core.streams.taken(id, piece.bytes(), now);
                if let Some(connection) = core.connections.get_mut(&stream)
                    && connection.path.shut().is_some()
                {
                    connection.told_shut = true;
                    shared.changed.notify_all();
                }
                drop(core);
                if pressing {
                    shared.control.notify_all();
                }
            }
        }
    }
}

/// Bytes on their way to the monitor.
fn tap_incoming(core: &mut Core, stream: u32, piece: &Piece) {
    let is_main = core.main == Some(stream);
    let role = core.role;
    let Some(connection) = core.connections.get_mut(&stream) else {
        return;
    };
    match role {
        Role::Source if is_main => {
            connection.path.feed(piece);
            if connection.path.shut() == Some(0) {
                core.outcome.get_or_insert(OutcomeState::Running);
                release_ends(core);
            }
        }
        Role::Source => {}
        Role::Destination => {
            if let Some(main) = &mut connection.main {
                main.feed(piece);
            }
        }
    }
}
