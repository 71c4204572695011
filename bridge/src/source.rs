//! The source's side: listens for the monitor that is told to migrate, and dials the destination's bridge.
//!
//! ```text
//!   Memory ──────────── Device ────────────────────────────────── outcome known ── told to the monitor ── settled
//!   link gone too long: link gone too long: ask, until answered;
//!   the guest goes on   the monitor hears nothing meanwhile
//! ```

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use multifd_transport::{
    Address, Channel, ChannelOptions, Closer, ReceiveHalf, SendHalf, connect_with,
};
use multifd_wire::frame::{Frame, Grant, OutcomeState};
use multifd_wire::negotiate;
use multifd_wire::{
    ChannelKind, HELLO_REPLY_BYTES, Hello, HelloReply, Incarnation, LaneId, Phase, Reason, Role,
    SessionId, StreamId, Token,
};
use socket2::Socket;

use crate::config::Config;
use crate::driver::core::Core;
use crate::driver::frames::{FEATURES, Fault, Receiving, set_deadline};
use crate::driver::{Shared, connection, control, lane, spawn, wait, wind_up};
use crate::keeper::{Kept, MakeKeeper};
use crate::machine::{Streams, Via, WINDOW_BYTES_MIN};
use crate::monitor::MonitorAddress;
use crate::report::{Ended, Report};
use crate::tap::SHUT;

/// A connection that is not made within this is tried anew: a kernel repeats a lost first packet only after a second.
const CONNECT_MAX: Duration = Duration::from_millis(900);

/// The pause after the first attempt that failed; each further one is twice as long, up to [`PAUSE_MAX`].
const PAUSE_FIRST: Duration = Duration::from_millis(20);

/// The longest pause between two attempts.
const PAUSE_MAX: Duration = Duration::from_millis(250);

/// How long the source's monitor may take to end its connections once it was told that the guest runs at the destination.
const GOODBYE_MAX: Duration = Duration::from_secs(3);

/// How long the last word to the destination may take.
const LAST_WORD_MAX: Duration = Duration::from_secs(2);

/// Everything that a source needs.
pub struct Source {
    /// Where the monitor is told to migrate to.
    pub listen: MonitorAddress,
    /// The destination's bridge.
    pub control: Address,
    /// Where lanes go, in turn; empty: where the control channel goes.
    pub data: Vec<Address>,
    /// How many lanes.
    pub lanes: u32,
    /// What the kinds of channel need.
    pub options: ChannelOptions,
    /// How it behaves.
    pub config: Config,
    /// How a [keeper](crate::keeper) is started. Without one the guest may be run twice if this process is killed after the source's
    /// monitor has stopped it.
    pub keeper: Option<MakeKeeper>,
}

/// What a hello needs.
struct Session {
    id: SessionId,
    /// Ticket and resume secret, and the control channel that they are for.
    tokens: Mutex<Option<(u64, Token, Token)>>,
}

impl Session {
    fn tokens(&self) -> Option<(u64, Token, Token)> {
        *self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Carries one migration. Returns when it has ended, however it did; `stop` ends it.
///
/// # Errors
/// When it could not begin: nothing was carried.
pub fn run(mut source: Source, stop: &AtomicBool, announce: impl FnOnce()) -> io::Result<Report> {
    let listener = Arc::new(source.listen.listen()?);
    announce();
    let mut id = [0u8; 16];
    getrandom::fill(&mut id).map_err(|error| io::Error::other(error.to_string()))?;
    let streams = Streams::new(WINDOW_BYTES_MIN, source.config.horizon);
    let core = Core::new(Role::Source, streams);
    let shared = Shared::new(
        Role::Source,
        source.config.clone(),
        core,
        source.keeper.take(),
    );
    let session = Arc::new(Session {
        id: SessionId::new(id),
        tokens: Mutex::new(None),
    });
    let source = Arc::new(source);
    {
        let (shared, listener) = (Arc::clone(&shared), Arc::clone(&listener));
        spawn("brg-accept", move || accept(&shared, &listener));
    }
    {
        let (source, shared, session) = (
            Arc::clone(&source),
            Arc::clone(&shared),
            Arc::clone(&session),
        );
        spawn("brg-control", move || link(&source, &shared, &session));
    }
    for number in 0..source.lanes {
        let (source, shared, session) = (
            Arc::clone(&source),
            Arc::clone(&shared),
            Arc::clone(&session),
        );
        spawn(&format!("brg-lane{number}"), move || {
            lane_life(&source, &shared, &session, number);
        });
    }
    let (how, why) = watch(&shared, stop);
    let _ = listener.shutdown(std::net::Shutdown::Both);
    source.listen.unlisten();
    shared.wake_all();
    if how != Ended::Unknown {
        wind_up::break_all(&shared);
        if let Some(keeper) = &mut shared.lock().keeper {
            keeper.over();
        }
    }
    Ok(wind_up::report(&shared, how, why))
}

fn accept(shared: &Arc<Shared>, listener: &Socket) {
    loop {
        match listener.accept() {
            Ok((socket, _)) => {
                let _ = socket.set_tcp_nodelay(true);
                let opened = {
                    let mut core = shared.lock();
                    if core.over.is_some() {
                        return;
                    }
                    core.streams.open()
                };
                let Some(stream) = opened else {
                    tracing::warn!("the monitor makes more connections than a session has streams");
                    continue;
                };
                connection::start(shared, stream.value(), socket);
                shared.control.notify_all();
            }
            Err(error) => {
                if shared.lock().over.is_some() {
                    return;
                }
                tracing::warn!(%error, "a connection of the monitor could not be accepted");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

/// Looks at how things are until they have ended.
fn watch(shared: &Arc<Shared>, stop: &AtomicBool) -> (Ended, Option<String>) {
    loop {
        let mut core = shared.lock();
        if let Some(over) = &core.over {
            return over.clone();
        }
        let now = shared.now();
        let away = core
            .away_since
            .map_or(Duration::ZERO, |since| now.saturating_sub(since));
        if stop.load(Ordering::Relaxed) && core.abort.is_none() {
            if core.is_safe() {
                core.give_up(Ended::Cancelled, Reason::Cancelled, "cancelled".into());
                shared.control.notify_all();
            } else if core.asking {
                let why = "not known: the destination could not be asked".to_owned();
                core.end(Ended::Unknown, Some(why));
            }
        }
        match core.outcome {
            Some(OutcomeState::Running) => {
                drop(core);
                return migrated(shared);
            }
            Some(_) => {
                drop(core);
                wind_up::break_all(shared);
                settle(shared);
                let why = "the destination's monitor did not run the guest".to_owned();
                return (Ended::Failed, Some(why));
            }
            None => {}
        }
        if is_carried(&core) {
            drop(core);
            shared.lock().outcome = Some(OutcomeState::CommittedNotRunning);
            settle(shared);
            return (Ended::Carried, None);
        }
        // SPEC: CARRY-12
        if core.asking && away > shared.config.outage + shared.config.remember {
            core.end(
                Ended::Unknown,
                Some("not known: the destination did not answer".into()),
            );
        } else if !core.asking && away > shared.config.outage {
            if core.is_safe() {
                let last = core.no_link.as_deref().unwrap_or("the channel was lost");
                let why = format!("no link for {:.0} s: {last}", away.as_secs_f64());
                core.end(Ended::Failed, Some(why));
            } else {
                tracing::warn!("no link, and the guest may run at the destination: asking");
                core.asking = true;
            }
        }
        drop(wait(&shared.changed, core, Duration::from_millis(50)));
    }
}

/// A monitor that can't be read ended all its connections, and so did the one at the destination.
fn is_carried(core: &Core) -> bool {
    let mut ends = core.connections.keys().map(|number| {
        let stream = StreamId::new(*number);
        let out = core.streams.outgoing(stream).and_then(|o| o.ended());
        let back = core.streams.incoming(stream).and_then(|i| i.ended());
        let nothing = core.streams.outgoing(stream).is_some_and(|o| o.read() == 0);
        out.is_some() && (back.is_some() || nothing)
    });
    let something = core.streams.octets().0 > 0;
    something && !core.is_read() && ends.all(|ended| ended)
}

/// The guest runs at the destination: the monitor here hears it, and ends its connections.
fn migrated(shared: &Arc<Shared>) -> (Ended, Option<String>) {
    let heard = |core: &Core| {
        let main = core.main.and_then(|main| core.connections.get(&main));
        main.is_none_or(|main| main.told_shut)
    };
    // The bytes may still be on their way, or come only after a resume.
    let patience = shared.config.outage + LAST_WORD_MAX;
    if !wind_up::wait_for(shared, patience, heard) {
        tell_by_hand(shared);
    }
    let gone = |core: &Core| {
        core.connections.keys().all(|number| {
            let outgoing = core.streams.outgoing(StreamId::new(*number));
            outgoing.is_some_and(|outgoing| outgoing.ended().is_some())
        })
    };
    wind_up::wait_for(shared, GOODBYE_MAX, gone);
    settle(shared);
    (Ended::Migrated, None)
}

/// The destination's last words did not come, but their meaning did: they are said to the monitor here.
fn tell_by_hand(shared: &Shared) {
    let core = shared.lock();
    let main = core.main.and_then(|main| core.connections.get(&main));
    if let Some(main) = main
        && main.path.is_between_messages()
        && let Some(socket) = &main.socket
    {
        use std::io::Write as _;
        let _ = (&**socket).write_all(&SHUT);
    }
}

/// Says to the destination that it may forget the session.
// SPEC: CARRY-11
fn settle(shared: &Shared) {
    {
        let mut core = shared.lock();
        core.settled = true;
        core.outcome_due = true;
    }
    shared.control.notify_all();
    wind_up::wait_for(shared, LAST_WORD_MAX, |core| !core.outcome_due);
    shared.lock().end(Ended::Migrated, None);
}

/// Why there is no control channel.
enum NoLink {
    /// The destination's answer.
    Refused(Reason, String),
    /// The way there.
    Lost(String),
}

impl From<Fault> for NoLink {
    fn from(fault: Fault) -> Self {
        Self::Lost(fault.to_string())
    }
}

type Halves = (Box<dyn SendHalf>, Box<dyn ReceiveHalf>, Closer);

/// Connects and says a hello.
fn greet(
    config: &Config,
    options: &ChannelOptions,
    to: &Address,
    hello: &Hello,
) -> Result<Halves, NoLink> {
    let lost = |error: &dyn std::fmt::Display| NoLink::Lost(error.to_string());
    let deadline = Instant::now() + CONNECT_MAX;
    let channel: Box<dyn Channel> =
        connect_with(to, options, deadline).map_err(|error| lost(&error))?;
    let (mut tx, mut rx, closer) = channel.split();
    set_deadline(
        &mut *tx,
        &mut *rx,
        Some(Instant::now() + config.hello_deadline),
    );
    tx.send(&hello.encode(), &[])
        .map_err(|error| lost(&error))?;
    let mut octets = [0u8; HELLO_REPLY_BYTES];
    rx.receive(&mut octets).map_err(|error| lost(&error))?;
    let reply = HelloReply::decode(&octets).map_err(|error| lost(&error))?;
    if let HelloReply::Refused { reason, text, .. } = &reply {
        let text = text.as_str();
        return Err(NoLink::Refused(
            *reason,
            format!("{reason} ({text}). {}", reason.advice()),
        ));
    }
    negotiate::accept(hello, &reply).map_err(|error| lost(&error))?;
    Ok((tx, rx, closer))
}

/// Dials the control channel, and again, for as long as the session lives.
fn link(source: &Source, shared: &Arc<Shared>, session: &Session) {
    let mut pause = PAUSE_FIRST;
    loop {
        let asking = {
            let core = shared.lock();
            if core.over.is_some() {
                return;
            }
            core.asking
        };
        let tokens = session.tokens();
        let result = match (tokens, asking) {
            (Some((_, _, secret)), true) => ask(source, shared, session, secret),
            _ => carry(source, shared, session),
        };
        match result {
            Ok(()) => pause = PAUSE_FIRST,
            // Others are at the door, or another migration has not ended: that passes.
            Err(NoLink::Lost(why) | NoLink::Refused(Reason::Busy, why)) => {
                tracing::info!(%why, "no control channel");
                shared.lock().no_link = Some(why);
            }
            Err(NoLink::Refused(reason, why)) => refused(shared, reason, why, asking),
        }
        let core = shared.lock();
        if core.over.is_some() {
            return;
        }
        drop(core);
        std::thread::sleep(pause);
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

fn refused(shared: &Shared, reason: Reason, why: String, asking: bool) {
    let mut core = shared.lock();
    if core.epoch == 0 || core.is_safe() {
        core.end(
            Ended::Failed,
            Some(format!("the destination refused: {why}")),
        );
    } else if asking && reason == Reason::WrongSession {
        let why =
            "not known: the destination's bridge was restarted and knows nothing of it".to_owned();
        core.end(Ended::Unknown, Some(why));
    } else {
        core.asking = true;
    }
    shared.wake_all();
}

/// One control channel, until it is lost.
fn carry(source: &Source, shared: &Arc<Shared>, session: &Session) -> Result<(), NoLink> {
    let hello = match session.tokens() {
        None => Hello::start(session.id, FEATURES, multifd_wire::Features::NONE),
        Some((_, _, secret)) => Hello::resume(session.id, secret, FEATURES),
    };
    let (tx, rx, closer) = greet(&source.config, &source.options, &source.control, &hello)?;
    let (sending, mut receiving) = control::halves(shared, tx, rx);
    let grant = grant(&mut receiving)?;
    let epoch = control::enter(shared, closer);
    {
        let mut tokens = session
            .tokens
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *tokens = Some((epoch, grant.ticket, grant.resume_secret));
    }
    shared.lock().names = Some((session.id, grant.resume_secret));
    shared.wake_all();
    control::serve(shared, sending, receiving, epoch);
    Ok(())
}

fn grant(receiving: &mut Receiving) -> Result<Grant, NoLink> {
    match receiving.head(Phase::Setup)?.1 {
        Frame::Grant(grant) => Ok(grant),
        frame => Err(NoLink::Lost(format!(
            "{} in the place of GRANT",
            frame.kind()
        ))),
    }
}

/// Asks how the migration ended.
fn ask(source: &Source, shared: &Shared, session: &Session, secret: Token) -> Result<(), NoLink> {
    let hello = Hello::ask(session.id, secret);
    let state = asked(&source.config, &source.options, &source.control, &hello)?;
    if state != OutcomeState::CommittedNotRunning {
        shared.lock().outcome = Some(state);
        shared.wake_all();
    }
    Ok(())
}

fn asked(
    config: &Config,
    options: &ChannelOptions,
    to: &Address,
    hello: &Hello,
) -> Result<OutcomeState, NoLink> {
    let (_tx, rx, _closer) = greet(config, options, to, hello)?;
    let mut receiving = Receiving::new(rx, Role::Destination, ChannelKind::Control);
    let Frame::Outcome(outcome) = receiving.head(Phase::Setup)?.1 else {
        return Err(NoLink::Lost("no OUTCOME came".into()));
    };
    tracing::info!(state = ?outcome.state, "the destination answered");
    Ok(outcome.state)
}

/// In a keeper's process, after the bridge was killed: keeps the connection until the destination has said how it ended, and then
/// tells the monitor. Returns what it was; never, if nobody answers.
pub fn keep(kept: Kept, options: &ChannelOptions, control: &Address) -> Option<Ended> {
    let Kept::Hold {
        socket,
        session,
        secret,
    } = kept
    else {
        return None;
    };
    let hello = Hello::ask(session, secret);
    loop {
        match asked(&Config::default(), options, control, &hello) {
            Ok(OutcomeState::Running) => {
                use std::io::Write as _;
                // The last word is one small message; if the monitor has it already, its end is closed.
                let _ = (&socket).write_all(&SHUT);
                return Some(Ended::Migrated);
            }
            Ok(OutcomeState::CommittedNotRunning) => {}
            Ok(_) => return Some(Ended::Failed),
            Err(NoLink::Refused(reason, why)) => tracing::warn!(%reason, %why, "no answer"),
            Err(NoLink::Lost(why)) => tracing::info!(%why, "the destination is not reached"),
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// Dials a lane, and again, for as long as the session lives.
fn lane_life(source: &Source, shared: &Arc<Shared>, session: &Session, number: u32) {
    let mut incarnation = Incarnation::new(0);
    let mut pause = PAUSE_FIRST;
    loop {
        let current = {
            let core = shared.lock();
            if core.over.is_some() {
                return;
            }
            session
                .tokens()
                .filter(|(epoch, ..)| core.is_current(*epoch))
        };
        let Some((epoch, ticket, _)) = current else {
            let core = shared.lock();
            drop(wait(&shared.changed, core, Duration::from_millis(100)));
            continue;
        };
        let via = Via {
            lane: LaneId::new(number),
            incarnation,
        };
        let hello = Hello::join(session.id, ticket, FEATURES, via.lane, incarnation);
        let to = match &source.data[..] {
            [] => &source.control,
            data => &data[number as usize % data.len()],
        };
        match greet(&source.config, &source.options, to, &hello) {
            Ok((mut tx, mut rx, closer)) => {
                set_deadline(&mut *tx, &mut *rx, None);
                let began = Instant::now();
                lane::serve(shared, tx, rx, closer, via, epoch);
                if began.elapsed() > Duration::from_secs(1) {
                    pause = PAUSE_FIRST;
                }
            }
            Err(NoLink::Refused(reason, why)) => {
                tracing::info!(lane = number, %reason, %why, "a lane was refused");
            }
            Err(NoLink::Lost(why)) => tracing::info!(lane = number, %why, "a lane was not reached"),
        }
        let Some(next) = incarnation.next() else {
            return;
        };
        incarnation = next;
        std::thread::sleep(pause);
        pause = (pause * 2).min(PAUSE_MAX);
    }
}
