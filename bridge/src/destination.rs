//! The destination's side: waits for the source's bridge, and connects to the monitor that waits for the guest.
//!
//! Here it is known how a migration ended: the monitor says so on its first connection, or ends it without having said so.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use multifd_transport::door::{Door, Host, LogLimit};
use multifd_transport::{Channel, ChannelError, Listener, StdSpawner};
use multifd_wire::frame::{Grant, Outcome, OutcomeState};
use multifd_wire::limits::LANES_MAX;
use multifd_wire::negotiate::{self, Offer};
use multifd_wire::{
    Features, HELLO_BYTES, Hello, HelloReply, Incarnation, Intent, Reason, Role, SessionId,
    StreamId, Token, VersionRange,
};

use crate::config::Config;
use crate::driver::core::Core;
use crate::driver::frames::{FEATURES, Fault, Sending, set_deadline};
use crate::driver::{Shared, connection, control, lane, spawn, wait, wind_up};
use crate::machine::{Streams, Via, WINDOW_BYTES_MIN};
use crate::monitor::MonitorAddress;
use crate::report::{Ended, Report};

/// A stream without bytes is connected after the first one has some, and after this: post-copy's channel says nothing until it is used, and
/// a monitor that waits for a connection's first bytes answers nobody meanwhile.
const QUIET: Duration = Duration::from_millis(50);

/// How long the monitor may take, once its first connection ended in the middle, to say whether it runs the guest all the same.
const LAST_WORD_MAX: Duration = Duration::from_secs(10);

/// Connections that have not said hello yet.
const GREETERS_MAX: usize = 64;

/// The answer to a wrong ticket or secret is kept back for this long.
const WRONG_TOKEN_PAUSE: Duration = Duration::from_millis(500);

/// Everything that a destination needs.
pub struct Destination {
    /// Where the monitor waits for the guest.
    pub monitor: MonitorAddress,
    /// Where the source's bridge connects.
    pub listeners: Vec<Listener>,
    /// How it behaves.
    pub config: Config,
}

/// The session that is here.
struct Session {
    id: SessionId,
    ticket: Token,
    secret: Token,
    joined: BTreeMap<u32, Incarnation>,
}

struct Home {
    shared: Arc<Shared>,
    session: Mutex<Option<Session>>,
    greeters: AtomicUsize,
    log_limit: LogLimit,
}

/// Those who greet who comes to the door.
struct Greeters(Arc<Home>);

impl Host for Greeters {
    fn hello_bytes(&self) -> usize {
        HELLO_BYTES
    }

    fn hello_deadline(&self) -> Duration {
        self.0.shared.config.hello_deadline
    }

    fn may_greet_unknown(&self) -> bool {
        self.0.greeters.load(Ordering::Acquire) < GREETERS_MAX / 2
    }

    fn greet(&self, channel: Box<dyn Channel>) -> Result<(), Box<dyn Channel>> {
        if self.0.greeters.fetch_add(1, Ordering::AcqRel) >= GREETERS_MAX {
            self.0.greeters.fetch_sub(1, Ordering::AcqRel);
            return Err(channel);
        }
        let home = Arc::clone(&self.0);
        spawn("brg-greet", move || greet(&home, channel));
        Ok(())
    }

    fn turn_away(&self, channel: Box<dyn Channel>) {
        let (mut tx, _rx, _) = channel.split();
        tx.set_deadline(Some(Instant::now()));
        let text = "too many connections are saying hello here";
        let no = HelloReply::refused(Reason::Busy, text, SessionId::new([0; 16]));
        // For the peer's sake only: if it does not get through, a closed connection says the same.
        if tx.send(&no.encode(), &[]).is_ok() {
            let _ = tx.finish();
        }
    }

    fn too_late(&self, channel: Box<dyn Channel>) {
        if let Some(unsaid) = self.0.log_limit.allow() {
            let peer = channel.describe();
            tracing::warn!(%peer, unsaid, "connection closed: it did not say hello in time");
        }
    }

    fn log_limit(&self) -> &LogLimit {
        &self.0.log_limit
    }
}

/// Carries one migration. Returns when it has ended, however it did; `stop` ends it.
///
/// # Errors
/// No thread or no descriptor: it could not begin.
pub fn run(destination: Destination, stop: &AtomicBool) -> io::Result<Report> {
    let Destination {
        monitor,
        listeners,
        config,
    } = destination;
    let streams = Streams::new(WINDOW_BYTES_MIN, config.horizon);
    let core = Core::new(Role::Destination, streams);
    let home = Arc::new(Home {
        shared: Shared::new(Role::Destination, config, core, None),
        session: Mutex::new(None),
        greeters: AtomicUsize::new(0),
        log_limit: LogLimit::default(),
    });
    let shared = &home.shared;
    let greeters = Arc::new(Greeters(Arc::clone(&home)));
    let door = Door::open(greeters, listeners, &StdSpawner, "brg-accept")?;
    {
        let shared = Arc::clone(shared);
        spawn("brg-dial", move || dial_all(&shared, &monitor));
    }
    let (how, why) = watch(shared, stop);
    let end = wind_down(shared, stop, how, why);
    remember(shared, stop);
    drop(door);
    shared.wake_all();
    wind_up::break_all(shared);
    Ok(wind_up::report(shared, end.0, end.1))
}

/// Looks at how things are until nothing more is to be carried.
fn watch(shared: &Arc<Shared>, stop: &AtomicBool) -> (Ended, Option<String>) {
    loop {
        let mut core = shared.lock();
        if let Some(over) = &core.over {
            return over.clone();
        }
        if core.settled {
            let how = if core.is_read() {
                Ended::Failed
            } else {
                Ended::Carried
            };
            return (how, Some("the guest did not run here".into()));
        }
        if stop.load(Ordering::Relaxed) && core.abort.is_none() {
            if core.epoch == 0 {
                return (
                    Ended::Cancelled,
                    Some("stopped before a source came".into()),
                );
            }
            core.give_up(
                Ended::Failed,
                Reason::ShuttingDown,
                "the destination was stopped".into(),
            );
            shared.control.notify_all();
        }
        let away = core.away_since.filter(|_| core.epoch > 0);
        let away = away.map_or(Duration::ZERO, |since| shared.now().saturating_sub(since));
        if away > shared.config.outage {
            let why = format!("no link for {:.0} s", away.as_secs_f64());
            return (Ended::Failed, Some(why));
        }
        drop(wait(&shared.changed, core, Duration::from_millis(50)));
    }
}

/// Nothing more is carried. Finds out how the migration ended: only the monitor can say it. One that may have all that it needs is
/// waited for as long as it takes, since the source may run the guest again as soon as it is told that this one does not.
// SPEC: CARRY-9, CARRY-10, CARRY-12
fn wind_down(
    shared: &Arc<Shared>,
    stop: &AtomicBool,
    how: Ended,
    why: Option<String>,
) -> (Ended, Option<String>) {
    let main = {
        let core = shared.lock();
        let open = core.outcome.is_none() && core.is_read();
        let main = core.main.filter(|_| open);
        main.and_then(|main| core.connections.get(&main)?.socket.clone())
    };
    if let Some(socket) = main {
        // What it lacks will not come; if it lacks nothing, it says so.
        let _ = socket.shutdown(std::net::Shutdown::Write);
        let is_known = |core: &Core| core.outcome.is_some();
        while !wind_up::wait_for(shared, LAST_WORD_MAX, is_known) {
            // In post-copy it runs the guest already; by a broken connection it can say nothing.
            let core = shared.lock();
            let first = core.main.and_then(|main| core.connections.get(&main));
            if core.is_safe() || core.is_post_copy() || first.is_none_or(|first| first.broken) {
                break;
            }
            drop(core);
            tracing::warn!(
                "the monitor may have everything, and does not say whether it runs the guest"
            );
            if stop.load(Ordering::Relaxed) {
                break;
            }
        }
    }
    let outcome = {
        let mut core = shared.lock();
        if core.is_post_copy() && core.outcome.is_none() {
            core.outcome = Some(OutcomeState::FailedAfterCommit);
        }
        let may_run = core.is_read() && core.outcome.is_none() && !core.is_safe();
        if may_run {
            let why = "not known: the machine monitor may have everything, and did not say whether it runs the guest";
            return (Ended::Unknown, Some(why.to_owned()));
        }
        if core.is_read() || how != Ended::Carried {
            *core.outcome.get_or_insert(OutcomeState::NotCommitted)
        } else {
            OutcomeState::CommittedNotRunning
        }
    };
    match outcome {
        OutcomeState::Running => (Ended::Migrated, None),
        OutcomeState::CommittedNotRunning => (Ended::Carried, None),
        _ => (how, why),
    }
}

/// Answers how it ended until the source knows.
// SPEC: CARRY-11
fn remember(shared: &Arc<Shared>, stop: &AtomicBool) {
    if shared.lock().epoch == 0 {
        return;
    }
    let known = |core: &Core| {
        let cancelled = matches!(core.over, Some((Ended::Cancelled, _)));
        core.settled
            || (cancelled && core.outcome == Some(OutcomeState::NotCommitted))
            || stop.load(Ordering::Relaxed)
    };
    wind_up::wait_for(shared, shared.config.remember, known);
}

/// Connects to the monitor, stream by stream.
// SPEC: CARRY-4
fn dial_all(shared: &Arc<Shared>, monitor: &MonitorAddress) {
    let mut next = 0;
    loop {
        let mut core = shared.lock();
        loop {
            if core.over.is_some() {
                return;
            }
            if is_due(shared, &core, next) {
                break;
            }
            core = wait(&shared.changed, core, QUIET / 2);
        }
        drop(core);
        let deadline = Instant::now() + shared.config.monitor_deadline;
        let go_on = || shared.lock().over.is_none();
        match monitor.connect(deadline, go_on) {
            Ok(socket) => {
                let first = first_octets(shared, next);
                shared.lock().recognise(next, &first);
                connection::start(shared, next, socket);
            }
            Err(error) => {
                let why = format!("the machine monitor at {monitor} can't be reached: {error}");
                let mut core = shared.lock();
                core.give_up(Ended::Failed, Reason::VmmRefused, why);
                drop(core);
                shared.wake_all();
                return;
            }
        }
        next += 1;
    }
}

fn is_due(shared: &Shared, core: &Core, next: u32) -> bool {
    let Some(connection) = core.connections.get(&next) else {
        return false;
    };
    let incoming = core.streams.incoming(StreamId::new(next));
    let has_octets = incoming.is_some_and(|incoming| incoming.has_ready());
    let quiet = shared.now().saturating_sub(connection.opened) >= QUIET;
    has_octets || (next > 0 && quiet)
}

/// What a stream begins with, as far as it is here; nothing of it is taken away.
fn first_octets(shared: &Shared, stream: u32) -> Vec<u8> {
    let core = shared.lock();
    let incoming = core.streams.incoming(StreamId::new(stream));
    incoming.map_or_else(Vec::new, |incoming| incoming.first_octets().to_vec())
}

/// What an accepted hello leads to.
enum Welcome {
    Control(Grant),
    Lane(Via, u64),
    Answer(OutcomeState),
}

/// Reads a hello, answers it, and serves what it is for.
fn greet(home: &Arc<Home>, mut channel: Box<dyn Channel>) {
    let peer = channel.describe();
    let shared = &home.shared;
    let deadline = Instant::now() + shared.config.hello_deadline;
    let established = channel.establish(deadline);
    let (mut tx, mut rx, closer) = channel.split();
    set_deadline(&mut *tx, &mut *rx, Some(deadline));
    let welcome = match established {
        Ok(()) => said_hello(home, &mut *tx, &mut *rx),
        Err(error) => {
            if let Some(unsaid) = home.log_limit.allow() {
                tracing::warn!(%peer, %error, unsaid, "a connection did not become a channel");
            }
            Ok(None)
        }
    };
    home.greeters.fetch_sub(1, Ordering::AcqRel);
    let welcome = match welcome {
        Ok(Some(welcome)) => welcome,
        Ok(None) => return,
        Err(error) => {
            if let Some(unsaid) = home.log_limit.allow() {
                tracing::warn!(%peer, %error, unsaid, "a connection was closed before it was accepted");
            }
            return;
        }
    };
    match welcome {
        Welcome::Control(grant) => {
            let (mut sending, receiving) = control::halves(shared, tx, rx);
            if sending.send(grant).is_ok() {
                let epoch = control::enter(shared, closer);
                control::serve(shared, sending, receiving, epoch);
            }
        }
        Welcome::Lane(via, epoch) => {
            set_deadline(&mut *tx, &mut *rx, None);
            lane::serve(shared, tx, rx, closer, via, epoch);
        }
        Welcome::Answer(state) => {
            let mut sending = Sending::new(tx);
            if sending.send(Outcome { state }).is_ok() {
                let _ = sending.tx.finish();
                let _ = rx.drain(4096);
            }
        }
    }
}

/// Reads the hello and sends the reply. `None`: it was refused.
fn said_hello(
    home: &Home,
    tx: &mut dyn multifd_transport::SendHalf,
    rx: &mut dyn multifd_transport::ReceiveHalf,
) -> Result<Option<Welcome>, Fault> {
    let mut octets = [0u8; HELLO_BYTES];
    rx.receive(&mut octets)?;
    let offer = |required| Offer {
        versions: VersionRange::OURS,
        features: FEATURES,
        required,
    };
    let refuse = |tx: &mut dyn multifd_transport::SendHalf,
                  rx: &mut dyn multifd_transport::ReceiveHalf,
                  reply: &HelloReply| {
        if let Some(unsaid) = home.log_limit.allow() {
            tracing::warn!(?reply, unsaid, "a hello was refused");
        }
        tx.send(&reply.encode(), &[])?;
        tx.finish()?;
        let _ = rx.drain(4096);
        Ok::<_, ChannelError>(None)
    };
    let hello = match Hello::decode(&octets) {
        Ok(hello) => hello,
        Err(error) => {
            let reply = negotiate::refuse(&octets, &error, &offer(Features::NONE));
            return Ok(refuse(tx, rx, &reply)?);
        }
    };
    let required = match hello.intent {
        Intent::Ask => Features::NONE,
        _ => FEATURES,
    };
    let reply = negotiate::answer(&hello, &offer(required));
    if negotiate::accept(&hello, &reply).is_err() {
        return Ok(refuse(tx, rx, &reply)?);
    }
    match admit(home, &hello) {
        Ok(welcome) => {
            tx.send(&reply.encode(), &[])?;
            Ok(Some(welcome))
        }
        Err((reason, text)) => {
            if reason == Reason::BadTicket {
                // SPEC: SEC-6
                std::thread::sleep(WRONG_TOKEN_PAUSE);
            }
            Ok(refuse(
                tx,
                rx,
                &HelloReply::refused(reason, text, hello.session),
            )?)
        }
    }
}

fn random_token() -> Result<Token, (Reason, &'static str)> {
    let mut octets = [0u8; 16];
    getrandom::fill(&mut octets).map_err(|_| (Reason::Internal, "no random numbers"))?;
    Ok(Token::new(octets))
}

/// Whether the session takes this hello.
// SPEC: JOIN-1, RESUME-1, ASK-1, GRANT-1
fn admit(home: &Home, hello: &Hello) -> Result<Welcome, (Reason, &'static str)> {
    let mut session = home.session.lock().unwrap_or_else(PoisonError::into_inner);
    if hello.intent == Intent::Start {
        if session.is_some() {
            return Err((Reason::Busy, "a migration is under way here already"));
        }
        let (ticket, secret) = (random_token()?, random_token()?);
        *session = Some(Session {
            id: hello.session,
            ticket,
            secret,
            joined: BTreeMap::new(),
        });
        return Ok(Welcome::Control(grant(home, ticket, secret)));
    }
    let session = session
        .as_mut()
        .filter(|session| session.id == hello.session)
        .ok_or((Reason::WrongSession, "no such session here"))?;
    let token = if hello.intent == Intent::Join {
        session.ticket
    } else {
        session.secret
    };
    if token != hello.token {
        return Err((
            Reason::BadTicket,
            "the ticket or secret is not the one of this session",
        ));
    }
    let core = home.shared.lock();
    match hello.intent {
        Intent::Join => {
            let newest = session.joined.get(&hello.lane.value());
            if newest.is_some_and(|newest| hello.incarnation <= *newest) {
                return Err((Reason::Misbehaved, "this lane has joined already"));
            }
            if !core.is_current(core.epoch) {
                return Err((Reason::ChannelsLost, "the control channel is gone"));
            }
            session.joined.insert(hello.lane.value(), hello.incarnation);
            let via = Via {
                lane: hello.lane,
                incarnation: hello.incarnation,
            };
            Ok(Welcome::Lane(via, core.epoch))
        }
        Intent::Resume => {
            if core.over.is_some() {
                return Err((
                    Reason::WrongSession,
                    "the session is over; ask how it ended",
                ));
            }
            drop(core);
            session.ticket = random_token()?;
            Ok(Welcome::Control(grant(
                home,
                session.ticket,
                session.secret,
            )))
        }
        // SPEC: CARRY-12
        Intent::Ask | Intent::Start => Ok(Welcome::Answer(
            core.outcome.unwrap_or(OutcomeState::CommittedNotRunning),
        )),
    }
}

fn grant(home: &Home, ticket: Token, resume_secret: Token) -> Grant {
    let remember = home.shared.config.outage.as_millis();
    Grant {
        ticket,
        resume_secret,
        lanes_max: u32::try_from(LANES_MAX).unwrap_or(u32::MAX),
        suspend_ms: u32::try_from(remember).unwrap_or(u32::MAX),
        device_window_bytes: WINDOW_BYTES_MIN,
    }
}
