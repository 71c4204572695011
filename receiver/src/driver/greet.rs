//! Greeters: read the hello of a new connection, answer it, and pass the channel on or close it.
//!
//! Each has a thread of its own for as long as its deadline allows. Connections that can be looked at get one only when their
//! whole hello is here (see `multifd_transport::door`), so that silent and slow ones keep nobody else from being served. Nothing is allocated for a
//! connection before its hello was accepted but that thread.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

pub(super) use multifd_session::destination::registry::Refusal;
use multifd_session::destination::registry::{Granted, Verdict};
use multifd_transport::door::{Host, LogLimit};
use multifd_transport::{Channel, ChannelError, Closer, ReceiveHalf, SendHalf};
use multifd_wire::frame::Outcome;
use multifd_wire::{
    Body, ChannelRef, Features, Frame, HELLO_BYTES, Hello, HelloReply, Incarnation, LaneId, Reason,
    Sequence, SessionId, Token,
};

use super::{GREETERS_MAX, GREETERS_UNKNOWN_MAX, Note, OfferError, Shared, lock};

/// How often it is looked whether a session that gives way is gone.
const PLACE_POLL: Duration = Duration::from_millis(1);

/// A control channel whose hello was accepted.
pub(super) struct Opened {
    pub(super) tx: Box<dyn SendHalf>,
    pub(super) rx: Box<dyn ReceiveHalf>,
    pub(super) closer: Closer,
    pub(super) session: SessionId,
    pub(super) features: Features,
    pub(super) ticket: Token,
    pub(super) resume_secret: Token,
    pub(super) description: String,
    /// The acceptance, when the control thread has to send it: only it knows whether the session can be resumed.
    pub(super) reply: Option<HelloReply>,
}

/// A data channel whose hello was accepted.
pub(super) struct Joined {
    pub(super) lane: LaneId,
    pub(super) incarnation: Incarnation,
    /// What it showed: the control channel of which it is a lane.
    pub(super) ticket: Token,
    pub(super) rx: Box<dyn ReceiveHalf>,
    pub(super) tx: Box<dyn SendHalf>,
    pub(super) closer: Closer,
    pub(super) description: String,
    /// The acceptance, when the control thread has to send it: only it knows into which round a lane comes that is dialled
    /// again, and the source may not send before that is settled.
    pub(super) reply: Option<HelloReply>,
}

/// Those who greet who comes to the door.
pub(super) struct Greeters(pub(super) Arc<Shared>);

impl Host for Greeters {
    fn hello_bytes(&self) -> usize {
        HELLO_BYTES
    }

    fn hello_deadline(&self) -> Duration {
        self.0.config.hello_deadline()
    }

    fn may_greet_unknown(&self) -> bool {
        self.0.greeters.load(Ordering::Acquire) < GREETERS_UNKNOWN_MAX
    }

    fn greet(&self, channel: Box<dyn Channel>) -> Result<(), Box<dyn Channel>> {
        offer(&self.0, channel, GREETERS_MAX).map_err(|refused| refused.channel)
    }

    /// A peer that has not said hello yet will read it as its answer.
    fn turn_away(&self, channel: Box<dyn Channel>) {
        self.0.counters.refused.fetch_add(1, Ordering::Relaxed);
        let (mut tx, _rx, _) = channel.split();
        tx.set_deadline(Some(Instant::now()));
        let no = HelloReply::refused(
            Reason::Busy,
            "too many connections are saying hello here",
            SessionId::new([0; 16]),
        );
        // For the peer's sake only: if it does not get through, a closed connection says the same.
        if tx.send(&no.encode(), &[]).is_ok() {
            let _ = tx.finish();
        }
    }

    fn too_late(&self, channel: Box<dyn Channel>) {
        self.0.counters.refused.fetch_add(1, Ordering::Relaxed);
        if let Some(unsaid) = self.0.log_limit.allow() {
            let peer = channel.describe();
            tracing::warn!(channel = %peer, unsaid, "connection closed: it did not say hello in time");
        }
    }

    fn log_limit(&self) -> &LogLimit {
        &self.0.log_limit
    }
}

/// Why a connection got no greeter; with the connection, which is not lost by that.
pub(super) struct NoGreeter {
    pub(super) channel: Box<dyn Channel>,
    pub(super) error: OfferError,
}

/// Gives a new connection a greeter of its own, as long as there are fewer than `most`.
pub(super) fn offer(
    shared: &Arc<Shared>,
    channel: Box<dyn Channel>,
    most: usize,
) -> Result<(), NoGreeter> {
    if shared.greeters.fetch_add(1, Ordering::AcqRel) >= most {
        shared.greeters.fetch_sub(1, Ordering::AcqRel);
        let error = OfferError::Busy;
        return Err(NoGreeter { channel, error });
    }
    // A thread that could not be started drops what it was given; the connection stays here until one has begun.
    let given = Arc::new(Mutex::new(Some(channel)));
    let (theirs, taken) = (Arc::clone(shared), Arc::clone(&given));
    let body = Box::new(move || {
        if let Some(channel) = lock(&taken).take() {
            receive(&theirs, channel);
        }
        theirs.greeters.fetch_sub(1, Ordering::AcqRel);
    });
    // Not joined: it ends by itself within the hello's deadline.
    if shared.spawner.spawn("mfd-greet", body).is_ok() {
        return Ok(());
    }
    shared.greeters.fetch_sub(1, Ordering::AcqRel);
    let error = OfferError::NoThread;
    match lock(&given).take() {
        Some(channel) => Err(NoGreeter { channel, error }),
        None => Ok(()),
    }
}

/// What a greeter does.
fn receive(shared: &Shared, mut channel: Box<dyn Channel>) {
    let peer = channel.describe();
    let deadline = Instant::now() + shared.config.hello_deadline();
    let refused = |what: &'static str, error: &dyn std::fmt::Display| {
        shared.counters.refused.fetch_add(1, Ordering::Relaxed);
        if let Some(unsaid) = shared.log_limit.allow() {
            tracing::warn!(channel = %peer, %error, unsaid, "{what}");
        }
    };
    if let Err(error) = channel.establish(deadline) {
        refused(
            "connection closed: it did not become a channel",
            &error as &dyn std::fmt::Display,
        );
    } else if let Err(error) = greet(shared, channel) {
        refused("connection closed before it was accepted", &error);
    }
}

fn greet(shared: &Shared, channel: Box<dyn Channel>) -> Result<(), ChannelError> {
    let description = channel.describe();
    let (mut tx, mut rx, closer) = channel.split();
    let deadline = Instant::now() + shared.config.hello_deadline();
    tx.set_deadline(Some(deadline));
    rx.set_deadline(Some(deadline));
    let mut bytes = [0u8; HELLO_BYTES];
    rx.receive(&mut bytes)?;
    let hello = match Hello::decode(&bytes) {
        Ok(hello) => hello,
        Err(error) => {
            if let Some(frame) = error.damaged() {
                // It can't be trusted in what it says that the channel is for.
                shared.counters.note_damage(ChannelRef::None, frame, 1);
            }
            let reply = lock(&shared.registry).unreadable(&bytes, &error);
            return refuse(shared, &mut *tx, &mut *rx, &reply);
        }
    };
    let opened = |(tx, rx, closer), granted: Granted, reply| Opened {
        tx,
        rx,
        closer,
        session: hello.session,
        features: granted.features,
        ticket: granted.ticket,
        resume_secret: granted.resume_secret,
        description: description.clone(),
        reply,
    };
    let (note, reply) = match verdict(shared, &hello, deadline) {
        Verdict::Start(reply, granted) => {
            let opened = opened((tx, rx, closer), granted, None);
            (Note::Opened(opened), reply)
        }
        Verdict::Resume(reply, granted) => {
            let opened = opened((tx, rx, closer), granted, Some(reply));
            (Note::Resuming(opened), reply)
        }
        Verdict::Join(reply) => {
            let joined = Joined {
                lane: hello.lane,
                incarnation: hello.incarnation,
                ticket: hello.token,
                rx,
                tx,
                closer,
                description,
                reply: (hello.incarnation != Incarnation::new(0)).then_some(reply),
            };
            (Note::LaneJoined(joined), reply)
        }
        Verdict::Ask(reply) => return answer(shared, &mut *tx, &mut *rx, &hello, &reply),
        Verdict::Refuse(reply) => return refuse(shared, &mut *tx, &mut *rx, &reply),
        Verdict::WrongToken(reply, pause) => {
            if !keep_back(shared, pause, deadline) {
                return Ok(());
            }
            return refuse(shared, &mut *tx, &mut *rx, &reply);
        }
        // Another session came between, and gives way as well: this hello is too late for it.
        Verdict::GiveWay => {
            let text = "a migration is under way here already";
            let no = HelloReply::refused(Reason::Busy, text, hello.session);
            return refuse(shared, &mut *tx, &mut *rx, &no);
        }
    };
    welcome(shared, note, &reply)
}

/// What the registry says of a hello. A session that gives way is waited for, but not so long that there is no time to answer.
fn verdict(shared: &Shared, hello: &Hello, deadline: Instant) -> Verdict {
    let first = lock(&shared.registry).hello(hello, random_token);
    if first != Verdict::GiveWay {
        return first;
    }
    let _ = shared.notes.send(Note::GiveWay);
    let half = deadline.saturating_duration_since(Instant::now()) / 2;
    let until = Instant::now() + half;
    while !lock(&shared.registry).is_free() && Instant::now() < until {
        std::thread::sleep(PLACE_POLL);
    }
    lock(&shared.registry).hello(hello, random_token)
}

/// Counts a wrong ticket or secret, and keeps the answer to it back; says whether it is to be given at all.
fn keep_back(shared: &Shared, pause: Option<Duration>, deadline: Instant) -> bool {
    shared.counters.wrong_tokens.fetch_add(1, Ordering::Relaxed);
    let Some(pause) = pause else {
        shared.counters.refused.fetch_add(1, Ordering::Relaxed);
        return false;
    };
    // Half of what is left, so that there is time to answer.
    let left = deadline.saturating_duration_since(Instant::now());
    std::thread::sleep(pause.min(left / 2));
    lock(&shared.registry).answered_late();
    true
}

fn random_token() -> Option<Token> {
    let mut bytes = [0u8; 16];
    getrandom::fill(&mut bytes).ok()?;
    Some(Token::new(bytes))
}

/// Sends the acceptance and passes the channel on. The control thread sends nothing on it before it has it.
fn welcome(shared: &Shared, mut note: Note, reply: &HelloReply) -> Result<(), ChannelError> {
    let (tx, rx, now) = match &mut note {
        Note::Opened(opened) => (&mut opened.tx, &mut opened.rx, true),
        Note::Resuming(opened) => (&mut opened.tx, &mut opened.rx, false),
        Note::LaneJoined(joined) => (&mut joined.tx, &mut joined.rx, joined.reply.is_none()),
        _ => unreachable!("greeters make only these"),
    };
    let sent = if now {
        tx.send(&reply.encode(), &[])
    } else {
        Ok(())
    };
    tx.set_deadline(None);
    rx.set_deadline(None);
    // Passed on even if the peer is gone already: a session or lane that was entered in the registry has to end like any other.
    if let Err(unheard) = shared.notes.send(note) {
        // The control thread has ended meanwhile; who was not answered yet is told so.
        let (mut tx, mut rx, reply) = match unheard.into_inner() {
            Note::Resuming(opened) => (opened.tx, opened.rx, opened.reply),
            Note::LaneJoined(joined) => (joined.tx, joined.rx, joined.reply),
            _ => return sent,
        };
        if let Some(HelloReply::Accepted { session, .. }) = reply {
            let no = HelloReply::refused(Reason::WrongSession, "session ended", session);
            limit(shared, &mut *tx, &mut *rx);
            return refuse(shared, &mut *tx, &mut *rx, &no);
        }
    }
    sent
}

/// Answers the question how the session stands, which only the control thread knows.
fn answer(
    shared: &Shared,
    tx: &mut dyn SendHalf,
    rx: &mut dyn ReceiveHalf,
    hello: &Hello,
    reply: &HelloReply,
) -> Result<(), ChannelError> {
    let (asked, answers) = crossbeam_channel::bounded(1);
    let _ = shared.notes.send(Note::Asked {
        secret: hello.token,
        answer: asked,
    });
    let Ok(state) = answers.recv_timeout(shared.config.hello_deadline()) else {
        let no = HelloReply::refused(
            Reason::ShuttingDown,
            "control thread not responding",
            hello.session,
        );
        return refuse(shared, tx, rx, &no);
    };
    tracing::info!(?state, "the source asked how the migration stands");
    let mut octets = reply.encode().to_vec();
    if Frame::from(Outcome { state })
        .encode(Sequence::FIRST, Body::None, &mut octets)
        .is_err()
    {
        return Ok(());
    }
    // Who asked and does not read must not hold up the end of this side.
    let until = Some(Instant::now() + shared.refused_limit());
    tx.set_deadline(until);
    rx.set_deadline(until);
    tx.send(&octets, &[])?;
    tx.finish()?;
    match rx.drain(64 * 1024) {
        Ok(_) | Err(ChannelError::Deadline { .. } | ChannelError::Reset { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Says no to a channel whose hello a greeter had accepted: in a thread, since the peer may take its time to close.
pub(super) fn turn_away(
    shared: &Arc<Shared>,
    halves: (Box<dyn SendHalf>, Box<dyn ReceiveHalf>),
    reply: Option<HelloReply>,
    refusal: Refusal,
) {
    // Each holds a channel, and a peer can bring about as many as it likes: with too many, closing it has to do.
    if shared.greeters.fetch_add(1, Ordering::AcqRel) >= GREETERS_MAX {
        shared.greeters.fetch_sub(1, Ordering::AcqRel);
        return;
    }
    let theirs = Arc::clone(shared);
    let body = Box::new(move || {
        let (mut tx, mut rx) = halves;
        limit(&theirs, &mut *tx, &mut *rx);
        if let Some(HelloReply::Accepted { session, .. }) = reply {
            let no = HelloReply::refused(refusal.0, refusal.1, session);
            let _ = refuse(&theirs, &mut *tx, &mut *rx, &no);
        }
        theirs.greeters.fetch_sub(1, Ordering::AcqRel);
    });
    // Without a thread the channel is dropped with `body`, which closes it.
    if shared.spawner.spawn("mfd-greet", body).is_err() {
        shared.greeters.fetch_sub(1, Ordering::AcqRel);
    }
}

/// From now on a peer has as long as it has for its hello.
fn limit(shared: &Shared, tx: &mut dyn SendHalf, rx: &mut dyn ReceiveHalf) {
    let deadline = Instant::now() + shared.config.hello_deadline();
    tx.set_deadline(Some(deadline));
    rx.set_deadline(Some(deadline));
}

/// Says no, and reads until the peer has closed, so that the answer is not destroyed by our own close; but not for long.
fn refuse(
    shared: &Shared,
    tx: &mut dyn SendHalf,
    rx: &mut dyn ReceiveHalf,
    reply: &HelloReply,
) -> Result<(), ChannelError> {
    shared.counters.refused.fetch_add(1, Ordering::Relaxed);
    if let (HelloReply::Refused { reason, text, .. }, Some(unsaid)) =
        (reply, shared.log_limit.allow())
    {
        tracing::warn!(channel = %tx.describe(), %reason, %text, unsaid, "hello refused");
    }
    tx.send(&reply.encode(), &[])?;
    tx.finish()?;
    rx.set_deadline(Some(Instant::now() + shared.refused_limit()));
    match rx.drain(64 * 1024) {
        Ok(_) | Err(ChannelError::Deadline { .. } | ChannelError::Reset { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}
