//! Greeters: read the hello of a new connection, answer it, and pass the channel on or close it.
//!
//! Each has a thread of its own for as long as its deadline allows. Connections that can be looked at get one only when their
//! whole hello is here (see `lobby`), so that silent and slow ones keep nobody else from being served. Nothing is allocated for a
//! connection before its hello was accepted but that thread.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use multifd_session::destination::set_up;
use multifd_transport::{Channel, ChannelError, Closer, ReceiveHalf, SendHalf};
use multifd_wire::frame::Outcome;
use multifd_wire::negotiate;
use multifd_wire::{
    Body, ChannelRef, Features, Frame, HELLO_BYTES, Hello, HelloReply, Incarnation, Intent, LaneId,
    Reason, Sequence, SessionId, Token,
};

pub(super) use super::desk::Refusal;
use super::{GREETERS_MAX, Note, OfferError, Shared, lock};

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
        if let Some(unsaid) = shared.hush.speak() {
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

/// Says no to a connection of which nothing was read, without waiting: a peer that has not said hello yet will read it as its
/// answer.
pub(super) fn turn_away_busy(shared: &Shared, channel: Box<dyn Channel>) {
    shared.counters.refused.fetch_add(1, Ordering::Relaxed);
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

fn greet(shared: &Shared, channel: Box<dyn Channel>) -> Result<(), ChannelError> {
    let description = channel.describe();
    let (mut tx, mut rx, closer) = channel.split();
    let deadline = Instant::now() + shared.config.hello_deadline();
    tx.set_deadline(Some(deadline));
    rx.set_deadline(Some(deadline));
    let mut octets = [0u8; HELLO_BYTES];
    rx.receive(&mut octets)?;
    let hello = match Hello::decode(&octets) {
        Ok(hello) => hello,
        Err(error) => {
            if let Some(frame) = error.damaged() {
                // It can't be trusted in what it says that the channel is for.
                shared.counters.note_damage(ChannelRef::None, frame, 1);
            }
            let features = set_up::offered(&shared.config);
            let offer = shared.desk.offer_for(Intent::Start, features);
            return refuse(
                shared,
                &mut *tx,
                &mut *rx,
                &negotiate::refuse(&octets, &error, &offer),
            );
        }
    };
    // Who asks for what is not here is told so, whatever features it has in mind.
    let knows = match hello.intent {
        Intent::Resume | Intent::Ask => shared.desk.knows(&hello),
        Intent::Start => shared.desk.expects(&hello, shared.config.pass()),
        Intent::Join => Ok(()),
    };
    if let Err((reason, text)) = knows {
        let reply = HelloReply::refused(reason, text, hello.session);
        if reason == Reason::BadTicket && !wrong_token(shared, deadline) {
            return Ok(());
        }
        return refuse(shared, &mut *tx, &mut *rx, &reply);
    }
    let features = set_up::offered(&shared.config);
    let reply = negotiate::answer(&hello, &shared.desk.offer_for(hello.intent, features));
    let agreement = match negotiate::accept(&hello, &reply) {
        Ok(agreement) => agreement,
        Err(_) => return refuse(shared, &mut *tx, &mut *rx, &reply),
    };
    let no = |(reason, text): Refusal| HelloReply::refused(reason, text, hello.session);
    if hello.intent == Intent::Start && shared.desk.claims_place() {
        let _ = shared.notes.send(Note::GiveWay);
        shared.desk.wait_until_free(deadline);
    }
    let note = match hello.intent {
        Intent::Start => match shared
            .desk
            .start(&hello, agreement, shared.config.lanes_max())
        {
            Ok((ticket, resume_secret)) => Note::Opened(Opened {
                tx,
                rx,
                closer,
                session: hello.session,
                features: agreement.features,
                ticket,
                resume_secret,
                description,
                reply: None,
            }),
            Err(refusal) => return refuse(shared, &mut *tx, &mut *rx, &no(refusal)),
        },
        Intent::Join => match shared.desk.join(&hello) {
            Ok(()) => Note::LaneJoined(Joined {
                lane: hello.lane,
                incarnation: hello.incarnation,
                ticket: hello.token,
                rx,
                tx,
                closer,
                description,
                reply: (hello.incarnation != Incarnation::new(0)).then_some(reply),
            }),
            Err(refusal) => {
                if refusal.0 == Reason::BadTicket && !wrong_token(shared, deadline) {
                    return Ok(());
                }
                return refuse(shared, &mut *tx, &mut *rx, &no(refusal));
            }
        },
        Intent::Resume => match shared.desk.resume(&hello) {
            Ok((ticket, resume_secret)) => Note::Resuming(Opened {
                tx,
                rx,
                closer,
                session: hello.session,
                features: agreement.features,
                ticket,
                resume_secret,
                description,
                reply: Some(reply),
            }),
            Err(refusal) => return refuse(shared, &mut *tx, &mut *rx, &no(refusal)),
        },
        Intent::Ask => return answer(shared, &mut *tx, &mut *rx, &hello, &reply),
    };
    welcome(shared, note, &reply)
}

/// Counts a wrong ticket or secret, and slows its bearer down; says whether to answer.
fn wrong_token(shared: &Shared, deadline: Instant) -> bool {
    shared.counters.wrong_tokens.fetch_add(1, Ordering::Relaxed);
    let answers = shared.desk.slow_down(deadline);
    if !answers {
        shared.counters.refused.fetch_add(1, Ordering::Relaxed);
    }
    answers
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
    // Passed on even if the peer is gone already: a session or lane that was entered at the desk has to end like any other.
    if let Err(unheard) = shared.notes.send(note) {
        // The control thread has ended meanwhile; who was not answered yet is told so.
        let (mut tx, mut rx, reply) = match unheard.into_inner() {
            Note::Resuming(opened) => (opened.tx, opened.rx, opened.reply),
            Note::LaneJoined(joined) => (joined.tx, joined.rx, joined.reply),
            _ => return sent,
        };
        if let Some(HelloReply::Accepted { session, .. }) = reply {
            let no = HelloReply::refused(Reason::WrongSession, "it is over here", session);
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
            "nobody is there to answer",
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
    let patience = Some(Instant::now() + shared.patience_with_refused());
    tx.set_deadline(patience);
    rx.set_deadline(patience);
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
    if let (HelloReply::Refused { reason, text, .. }, Some(unsaid)) = (reply, shared.hush.speak()) {
        tracing::warn!(channel = %tx.describe(), %reason, %text, unsaid, "hello refused");
    }
    tx.send(&reply.encode(), &[])?;
    tx.finish()?;
    rx.set_deadline(Some(Instant::now() + shared.patience_with_refused()));
    match rx.drain(64 * 1024) {
        Ok(_) | Err(ChannelError::Deadline { .. } | ChannelError::Reset { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}
