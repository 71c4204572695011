//! Greeters: read the hello of a new connection, answer it, and pass the channel on or close it.
//!
//! Each has a thread of its own for as long as its deadline allows, so that a silent or hostile connection keeps nobody else
//! from being served. Nothing is allocated for a connection before its hello was accepted but that thread.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use multifd_session::destination::set_up;
use multifd_transport::{Channel, ChannelError, Closer, ReceiveHalf, SendHalf};
use multifd_wire::frame::Outcome;
use multifd_wire::negotiate::{self, Agreement, Offer};
use multifd_wire::{
    Body, ChannelRef, Features, Frame, HELLO_BYTES, Hello, HelloReply, Incarnation, Intent, LaneId,
    Reason, Sequence, SessionId, Token, VersionRange,
};

use super::{GREETERS_MAX, Note, OfferError, Shared, lock};

/// The answer to the first wrong ticket or secret is kept back for this long, each further one twice as long as the one before.
const WRONG_TOKEN_PAUSE: Duration = Duration::from_millis(50);

/// Up to this.
const WRONG_TOKEN_PAUSE_MAX: Duration = Duration::from_secs(2);

/// So many greeters may keep an answer back at once; who comes with a wrong token beyond that is not answered at all, so that
/// there is always a greeter for the right one.
const WRONG_TOKENS_AT_ONCE: usize = 32;

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

/// Which session is at home, and what its channels must show.
#[derive(Debug, Default)]
pub(super) struct Desk(Mutex<Option<AtHome>>, WrongTokens);

/// Tickets and secrets that were not the session's (SPEC: SEC-6).
#[derive(Debug, Default)]
struct WrongTokens {
    /// How many came in a row that was not broken by a right one.
    count: AtomicU32,
    waiting: AtomicUsize,
}

impl WrongTokens {
    /// How long the answer to another one is kept back.
    fn pause(&self) -> Duration {
        let before = self.count.fetch_add(1, Ordering::Relaxed);
        WRONG_TOKEN_PAUSE
            .saturating_mul(1 << before.min(16))
            .min(WRONG_TOKEN_PAUSE_MAX)
    }
}

#[derive(Debug)]
struct AtHome {
    session: SessionId,
    ticket: Token,
    resume_secret: Token,
    agreement: Agreement,
    lanes_max: u32,
    /// The newest incarnation of each lane.
    joined: Vec<Option<Incarnation>>,
    /// The session was resumed.
    resumed: bool,
}

/// Why a hello was refused, in the words that the peer gets.
pub(super) type Refusal = (Reason, &'static str);

impl Desk {
    /// A new session; there can be only one.
    fn start(
        &self,
        hello: &Hello,
        agreement: Agreement,
        lanes_max: u32,
    ) -> Result<(Token, Token), Refusal> {
        let mut home = lock(&self.0);
        if home.is_some() {
            return Err((Reason::Busy, "a migration is under way here already"));
        }
        let (ticket, resume_secret) = (random_token()?, random_token()?);
        *home = Some(AtHome {
            session: hello.session,
            ticket,
            resume_secret,
            agreement,
            lanes_max,
            joined: vec![None; lanes_max as usize],
            resumed: false,
        });
        Ok((ticket, resume_secret))
    }

    /// A data channel of the session.
    fn join(&self, hello: &Hello) -> Result<(), Refusal> {
        let mut home = lock(&self.0);
        let Some(home) = home.as_mut().filter(|home| home.session == hello.session) else {
            return Err((Reason::WrongSession, "no such session here"));
        };
        if home.ticket != hello.token {
            return Err((
                Reason::BadTicket,
                "the ticket is not the one of this session",
            ));
        }
        let lanes_max = home.lanes_max;
        match home.joined.get_mut(hello.lane.value() as usize) {
            None => Err((
                Reason::TooManyLanes,
                if lanes_max == 1 {
                    "only one lane was granted"
                } else {
                    "more lanes than were granted"
                },
            )),
            // SPEC: JOIN-1, JOIN-3
            Some(Some(newest)) if hello.incarnation <= *newest => {
                Err((Reason::Misbehaved, "this lane has joined already"))
            }
            // After a resume it may have been lost before it was here (SPEC: RESUME-13).
            Some(None) if hello.incarnation != Incarnation::new(0) && !home.resumed => {
                Err((Reason::Misbehaved, "this lane was never here before"))
            }
            Some(joined) => {
                *joined = Some(hello.incarnation);
                Ok(())
            }
        }
    }

    /// Whether somebody may speak for the session that is here. SPEC: RESUME-1, ASK-1
    fn knows(&self, hello: &Hello) -> Result<(), Refusal> {
        let home = lock(&self.0);
        let Some(home) = home.as_ref().filter(|home| home.session == hello.session) else {
            return Err((Reason::WrongSession, "no such session here"));
        };
        if home.resume_secret != hello.token {
            return Err((
                Reason::BadTicket,
                "the secret is not the one of this session",
            ));
        }
        self.1.count.store(0, Ordering::Relaxed);
        Ok(())
    }

    /// Keeps the answer to a wrong token back for a while; says whether it is to be given at all (SPEC: SEC-6). Whoever has the right
    /// one is not kept waiting by those who have not.
    fn slow_down(&self, until: Instant) -> bool {
        let WrongTokens { waiting, .. } = &self.1;
        let pause = self.1.pause();
        let answers = waiting.fetch_add(1, Ordering::AcqRel) < WRONG_TOKENS_AT_ONCE;
        if answers {
            let left = until.saturating_duration_since(Instant::now());
            // Half of what is left, so that there is time to answer.
            std::thread::sleep(pause.min(left / 2));
        }
        waiting.fetch_sub(1, Ordering::AcqRel);
        answers
    }

    /// A session is resumed: the ticket of before is void (SPEC: GRANT-1). Returns the new one, and the secret.
    fn resume(&self, hello: &Hello) -> Result<(Token, Token), Refusal> {
        self.knows(hello)?;
        let mut home = lock(&self.0);
        let home = home
            .as_mut()
            .ok_or((Reason::WrongSession, "no such session here"))?;
        if !home.agreement.features.contains(Features::RESUME) {
            return Err((Reason::Feature, "this session is not kept"));
        }
        home.ticket = random_token()?;
        home.resumed = true;
        Ok((home.ticket, home.resume_secret))
    }

    fn offer_for(&self, intent: Intent, features: Features) -> Offer {
        let ours = Offer {
            versions: VersionRange::OURS,
            features,
            required: Features::NONE,
        };
        match (intent, &*lock(&self.0)) {
            (Intent::Join | Intent::Resume, Some(home)) => Offer::exactly(home.agreement),
            _ => ours,
        }
    }
}

fn random_token() -> Result<Token, Refusal> {
    let mut octets = [0u8; 16];
    getrandom::fill(&mut octets).map_err(|_| (Reason::Internal, "no random numbers"))?;
    Ok(Token::new(octets))
}

/// Gives a new connection a greeter of its own.
pub(super) fn offer(shared: &Arc<Shared>, mut channel: Box<dyn Channel>) -> Result<(), OfferError> {
    if shared.greeters.fetch_add(1, Ordering::AcqRel) >= GREETERS_MAX {
        shared.greeters.fetch_sub(1, Ordering::AcqRel);
        return Err(OfferError::Busy);
    }
    let theirs = Arc::clone(shared);
    let body = Box::new(move || {
        let peer = channel.describe();
        let deadline = Instant::now() + theirs.config.hello_deadline();
        if let Err(error) = channel.establish(deadline) {
            theirs.counters.refused.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(channel = %peer, %error, "connection closed: it did not become a channel");
        } else if let Err(error) = greet(&theirs, channel) {
            theirs.counters.refused.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(channel = %peer, %error, "connection closed before it was accepted");
        }
        theirs.greeters.fetch_sub(1, Ordering::AcqRel);
    });
    // Not joined: it ends by itself within the hello's deadline.
    shared
        .spawner
        .spawn("mfd-greet", body)
        .map(drop)
        .map_err(|_| {
            shared.greeters.fetch_sub(1, Ordering::AcqRel);
            OfferError::NoThread
        })
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
    if matches!(hello.intent, Intent::Resume | Intent::Ask)
        && let Err((reason, text)) = shared.desk.knows(&hello)
    {
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
    let _ = shared.notes.send(Note::Asked { answer: asked });
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
    let theirs = Arc::clone(shared);
    let body = Box::new(move || {
        let (mut tx, mut rx) = halves;
        limit(&theirs, &mut *tx, &mut *rx);
        if let Some(HelloReply::Accepted { session, .. }) = reply {
            let no = HelloReply::refused(refusal.0, refusal.1, session);
            let _ = refuse(&theirs, &mut *tx, &mut *rx, &no);
        }
    });
    // Without a thread the channel is dropped with `body`, which closes it.
    let _ = shared.spawner.spawn("mfd-greet", body);
}

/// From now on a peer has as long as it has for its hello.
fn limit(shared: &Shared, tx: &mut dyn SendHalf, rx: &mut dyn ReceiveHalf) {
    let deadline = Instant::now() + shared.config.hello_deadline();
    tx.set_deadline(Some(deadline));
    rx.set_deadline(Some(deadline));
}

/// Says no, and reads until the peer has closed, so that the answer is not destroyed by our own close. For as long as
/// the halves' deadline allows.
fn refuse(
    shared: &Shared,
    tx: &mut dyn SendHalf,
    rx: &mut dyn ReceiveHalf,
    reply: &HelloReply,
) -> Result<(), ChannelError> {
    shared.counters.refused.fetch_add(1, Ordering::Relaxed);
    tracing::warn!(channel = %tx.describe(), ?reply, "hello refused");
    tx.send(&reply.encode(), &[])?;
    tx.finish()?;
    match rx.drain(64 * 1024) {
        Ok(_) | Err(ChannelError::Deadline { .. } | ChannelError::Reset { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_wrong_token_waits_twice_as_long_as_the_one_before_up_to_a_bound() {
        let wrong = WrongTokens::default();
        let pauses: Vec<u128> = (0..8).map(|_| wrong.pause().as_millis()).collect();
        assert_eq!(pauses, [50, 100, 200, 400, 800, 1600, 2000, 2000]);
    }

    #[test]
    fn only_so_many_wrong_tokens_wait_for_an_answer_and_none_past_its_deadline() {
        let desk = Desk::default();
        let began = Instant::now();
        assert!(desk.slow_down(began + Duration::from_millis(20)));
        assert!(began.elapsed() < Duration::from_millis(200));
        desk.1
            .waiting
            .store(WRONG_TOKENS_AT_ONCE, Ordering::Relaxed);
        let now = Instant::now();
        assert!(!desk.slow_down(now + Duration::from_secs(60)));
        assert!(
            now.elapsed() < Duration::from_millis(200),
            "it does not wait either"
        );
    }
}
