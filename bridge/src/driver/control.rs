//! The control channel: credit, ends, the outcome, and signs of life.

use std::sync::Arc;
use std::time::Duration;

use multifd_transport::{Closer, ReceiveHalf, SendHalf};
use multifd_wire::frame::{
    Abort, Asks, Frame, OutcomeState, RawStreamCredit, StreamCredits, StreamEndKind, StreamOpen,
    StreamOutcome,
};
use multifd_wire::limits::STREAM_CREDITS_MAX;
use multifd_wire::{ChannelKind, ChannelRef, Phase, Pulse, Reason, Role, StreamId, Text};

use super::core::Core;
use super::frames::{Fault, Receiving, Sending};
use super::{Shared, connection, spawn, wait};
use crate::report::Ended;

/// How often acknowledgements and credit go out that nobody waits for.
const TICK: Duration = Duration::from_millis(10);

/// The same while nothing moves.
const TICK_IDLE: Duration = Duration::from_millis(100);

/// How often a sign of life goes out.
const ALIVE: Duration = Duration::from_millis(200);

/// Silence for so long, and the control channel is taken for lost. Twenty signs of life.
const SILENCE_MAX: Duration = Duration::from_secs(4);

/// A multifd connection of the source's monitor may end this long before the first one does.
const LOOSE_END_MAX: Duration = Duration::from_secs(1);

/// The round trip never adds more than this to the horizon.
const ROUND_TRIP_MAX: Duration = Duration::from_millis(500);

/// What the reader tells the writer.
struct Heard {
    pulse: Pulse,
    answer: bool,
}

/// Serves the control channel of an epoch until it is lost, or the session is over. `first` is false after a resume.
pub(crate) fn serve(
    shared: &Arc<Shared>,
    mut sending: Sending,
    mut receiving: Receiving,
    epoch: u64,
) {
    sending.tx.set_deadline(None);
    sending.tx.set_stall(Some(SILENCE_MAX));
    receiving.rx.set_deadline(None);
    receiving.rx.set_stall(Some(SILENCE_MAX));
    let heard = Arc::new(std::sync::Mutex::new(Heard {
        // The hello was another's to time; the horizon has a bound of its own.
        pulse: Pulse::new(ROUND_TRIP_MAX),
        answer: false,
    }));
    let (theirs, told) = (Arc::clone(shared), Arc::clone(&heard));
    spawn("brg-control-in", move || {
        loop {
            if let Err(error) = read(&theirs, &mut receiving, &told) {
                lost(&theirs, epoch, &error);
                return;
            }
        }
    });
    if let Err(error) = write_loop(shared, &mut sending, epoch, &heard) {
        lost(shared, epoch, &error);
    }
    // What was said last must not be overtaken by a reset.
    let _ = sending.tx.finish();
}

fn lost(shared: &Shared, epoch: u64, error: &Fault) {
    let mut core = shared.lock();
    if core.is_current(epoch) {
        if !core.settled {
            tracing::warn!(%error, "the control channel ended");
        }
        if error.is_peers() {
            // The channel is whole: the writer says why before it ends.
            let why = format!("the peer broke the protocol: {error}");
            core.give_up(Ended::Failed, Reason::Misbehaved, why);
        } else {
            core.link_down(shared.now());
        }
    }
    drop(core);
    shared.wake_all();
}

/// What one turn of the writer has to say.
#[derive(Default)]
struct Words {
    open: Option<StreamId>,
    credits: Vec<RawStreamCredit>,
    ends: Vec<multifd_wire::frame::StreamEnd>,
    outcome: Option<OutcomeState>,
    abort: Option<(Reason, String)>,
}

fn write_loop(
    shared: &Arc<Shared>,
    sending: &mut Sending,
    epoch: u64,
    heard: &std::sync::Mutex<Heard>,
) -> Result<(), Fault> {
    let (mut again, mut opened) = (epoch > 1, 0);
    let (mut said_at, mut looked_at) = (None::<Duration>, Duration::ZERO);
    if again {
        shared.lock().outcome_due = true;
    }
    loop {
        let now = shared.now();
        let words = {
            let mut core = shared.lock();
            if !core.is_current(epoch) {
                return Ok(());
            }
            if now.saturating_sub(looked_at) >= TICK_IDLE {
                looked_at = now;
                look(shared, &mut core, now);
            }
            gather(shared, &mut core, &mut again, &mut opened)
        };
        let ended = words.abort.is_some();
        let spoke = say(sending, words)?;
        if ended {
            shared.lock().gave_up(now);
            shared.wake_all();
            return Ok(());
        }
        let since = said_at.map_or(Duration::MAX, |at| now.saturating_sub(at));
        let alive = {
            let mut heard = heard
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            // SPEC: ALIVE-2, ALIVE-5
            if std::mem::take(&mut heard.answer) {
                Some(heard.pulse.answer(shared.now()))
            } else if since >= ALIVE {
                said_at = Some(now);
                Some(heard.pulse.ask(shared.now()))
            } else {
                None
            }
        };
        if let Some(alive) = alive {
            sending.send(alive)?;
        }
        let core = shared.lock();
        if core.is_current(epoch) {
            drop(wait(
                &shared.control,
                core,
                if spoke { TICK } else { TICK_IDLE },
            ));
        }
    }
}

/// What is due by time alone.
fn look(shared: &Shared, core: &mut Core, now: Duration) {
    // SPEC: LANE-8
    if let Some(then) = now.checked_sub(shared.config.stall) {
        for via in core.streams.silent_since(then) {
            if let Some(link) = core.lanes.get(&via) {
                tracing::info!(lane = %via.lane, "nothing is acknowledged on a lane");
                let epoch = link.epoch;
                core.lane_down(via, epoch);
            }
        }
        shared.lanes.notify_all();
    }
    let loose = |connection: &super::core::Connection| {
        let since = connection.ended.as_ref().map(|(_, since)| *since);
        since.is_some_and(|since| now.saturating_sub(since) > LOOSE_END_MAX)
    };
    if shared.role == Role::Source && core.outcome.is_none() && core.connections.values().any(loose)
    {
        let why =
            "the source's monitor ended one of its connections in the middle of the migration";
        core.give_up(Ended::Failed, Reason::VmmRefused, why.to_owned());
    }
}

fn gather(shared: &Shared, core: &mut Core, again: &mut bool, opened: &mut u32) -> Words {
    let mut words = Words::default();
    let count = core.streams.count();
    if shared.role == Role::Source && count > *opened {
        *opened = count;
        words.open = Some(StreamId::new(count - 1));
    }
    let credits = core.streams.credits(std::mem::take(again));
    words.credits = credits.into_iter().map(RawStreamCredit::from).collect();
    words.ends = core.streams.take_ends();
    if std::mem::take(&mut core.outcome_due) {
        let says = shared.role == Role::Destination || core.settled;
        words.outcome = core.outcome.filter(|_| says);
    }
    words.abort = core.abort.clone().map(|(_, reason, why)| (reason, why));
    words
}

/// Says it. Says whether there was something.
fn say(sending: &mut Sending, words: Words) -> Result<bool, Fault> {
    let mut spoke = false;
    if let Some(stream) = words.open {
        sending.send(StreamOpen { stream })?;
        spoke = true;
    }
    for credits in words.credits.chunks(STREAM_CREDITS_MAX) {
        sending.send(StreamCredits { credits })?;
        spoke = true;
    }
    for end in words.ends {
        sending.send(end)?;
        spoke = true;
    }
    if let Some(state) = words.outcome {
        sending.send(StreamOutcome { state })?;
        spoke = true;
    }
    if let Some((reason, why)) = words.abort {
        let text = Text::<512>::clip(&why);
        sending.send(Abort {
            reason,
            phase: Phase::Carrying,
            channel: ChannelRef::None,
            text: text.as_str(),
        })?;
        spoke = true;
    }
    Ok(spoke)
}

/// Reads one frame and does what it says.
fn read(
    shared: &Arc<Shared>,
    receiving: &mut Receiving,
    heard: &std::sync::Mutex<Heard>,
) -> Result<(), Fault> {
    let (header, frame) = receiving.head(Phase::Carrying)?;
    match frame {
        Frame::StreamOpen(open) => {
            let mut core = shared.lock();
            connection::open_up_to(shared, &mut core, open.stream)?;
        }
        Frame::StreamCredit(credits) => {
            let mut core = shared.lock();
            for credit in credits.iter() {
                connection::open_up_to(shared, &mut core, credit.stream)?;
                core.streams.credit(credit)?;
                if let Some(connection) = core.connections.get(&credit.stream.value()) {
                    connection.gate.read.notify_all();
                }
            }
            // After a resume the pieces that are left may go.
            shared.lanes.notify_all();
        }
        Frame::StreamEnd(end) => {
            let mut core = shared.lock();
            connection::open_up_to(shared, &mut core, end.stream)?;
            core.streams.peer_end(end)?;
            if let Some(connection) = core.connections.get(&end.stream.value()) {
                connection.gate.write.notify_all();
                connection.gate.read.notify_all();
            }
            if end.how == StreamEndKind::Reset {
                core.break_connection(end.stream.value());
            }
            shared.changed.notify_all();
        }
        Frame::StreamOutcome(outcome) => {
            let mut core = shared.lock();
            match shared.role {
                Role::Source => {
                    core.outcome.get_or_insert(outcome.state);
                    connection::release_ends(&mut core);
                }
                // SPEC: CARRY-11
                Role::Destination => core.settled = true,
            }
            shared.wake_all();
        }
        Frame::KeepAlive(alive) => {
            let mut heard = heard
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            let seen = heard.pulse.heard(&alive, shared.now());
            heard.answer |= seen.asks == Asks::Answer;
            drop(heard);
            // The destination, which grants what is large, measures the round trip.
            if let (Some(trip), Role::Destination) = (seen.round_trip, shared.role) {
                measure(shared, trip);
            }
            shared.control.notify_all();
        }
        Frame::Abort(abort) => {
            let (how, why) = match abort.reason {
                Reason::Cancelled => (Ended::Cancelled, abort.text.to_owned()),
                _ => (Ended::Failed, format!("the other side: {}", abort.text)),
            };
            let mut core = shared.lock();
            if core.must_ask() {
                tracing::warn!(%why, "the other side gave up: asking how it ended");
                core.asking = true;
                core.link_down(shared.now());
            } else {
                core.end(how, Some(why));
            }
            shared.wake_all();
        }
        _ => receiving.skip(&header)?,
    }
    Ok(())
}

fn measure(shared: &Shared, seen: Duration) {
    let mut core = shared.lock();
    let seen = seen.min(ROUND_TRIP_MAX);
    let best = core.round_trip.map_or(seen, |before| before.min(seen));
    core.round_trip = Some(best);
    core.streams.set_horizon(shared.config.horizon + best);
}

/// Makes the two directions of a control channel that said its hello.
pub(crate) fn halves(
    shared: &Shared,
    tx: Box<dyn SendHalf>,
    rx: Box<dyn ReceiveHalf>,
) -> (Sending, Receiving) {
    let peer = match shared.role {
        Role::Source => Role::Destination,
        Role::Destination => Role::Source,
    };
    (
        Sending::new(tx),
        Receiving::new(rx, peer, ChannelKind::Control),
    )
}

/// Enters a control channel that said its hello, and says which one it is.
pub(crate) fn enter(shared: &Shared, closer: Closer) -> u64 {
    let epoch = shared.lock().link_up(closer, shared.now());
    shared.wake_all();
    epoch
}
