//! The registry: which session is here, and what a new channel has to show to begin it, join it, resume it or ask for it.
//!
//! ```text
//!   hello ──► Start / Join / Resume / Ask     it is let in; the reply that says so, and what was made for it
//!         └─► Refuse                          no, and why
//!         └─► WrongToken                      no, but not at once: whoever guesses is slowed down (SPEC: SEC-6)
//!         └─► GiveWay                         a session that was lost in set-up is here: it goes, and the hello is heard again
//! ```
//! The rule it keeps: one session at a time, and a channel belongs to it only by a ticket or a secret that it was told. A ticket is
//! for one control channel: each resume makes another.

use std::time::Duration;

use multifd_wire::negotiate::{self, Agreement, Offer};
use multifd_wire::{
    Features, HELLO_BYTES, Hello, HelloReply, Incarnation, Intent, Malformed, Reason, SessionId,
    Token, VersionRange,
};

use super::config::Config;
use super::set_up::offered;
use crate::common::AskTicket;

/// The answer to the first wrong ticket or secret is kept back for this long, each further one twice as long as the one before.
const WRONG_TOKEN_PAUSE: Duration = Duration::from_millis(50);

/// Up to this.
const WRONG_TOKEN_PAUSE_MAX: Duration = Duration::from_secs(2);

/// So many answers may be kept back at once; who comes with a wrong token beyond that is not answered at all, so that there is
/// always a thread for the right one.
const WRONG_TOKENS_AT_ONCE: usize = 32;

/// Why a hello was refused, in the words that the peer gets.
pub type Refusal = (Reason, &'static str);

/// What the channels of a session have to show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granted {
    /// For its data channels, until the session is resumed.
    pub ticket: Token,
    /// To resume it, or to ask how it ended.
    pub resume_secret: Token,
    /// The features that it uses.
    pub features: Features,
}

/// What becomes of a hello.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub enum Verdict {
    /// A session begins with this channel.
    Start(HelloReply, Granted),
    /// A data channel of the session that is here.
    Join(HelloReply),
    /// The session that is here goes on over this channel, if its machine says so as well.
    Resume(HelloReply, Granted),
    /// Whoever asks how the session ended may know.
    Ask(HelloReply),
    /// It is refused.
    Refuse(HelloReply),
    /// It is refused, and the answer kept back for so long, after which [`Registry::answered_late`] is told; `None`: there are too many
    /// such answers already, and it gets none.
    WrongToken(HelloReply, Option<Duration>),
    /// The session that is here gives way to this one (SPEC: SEC-8). When it is gone, or has not gone in time, the hello is to be
    /// heard again.
    GiveWay,
}

/// Which session is here, and who may come to it.
#[derive(Debug)]
pub struct Registry {
    features: Features,
    pass: Token,
    lanes_max: u32,
    here: Option<Here>,
    /// A session that another process ran: it can be asked for, and nothing else.
    ended: Option<AskTicket>,
    wrong: WrongTokens,
}

#[derive(Debug)]
struct Here {
    /// It lost its control channel before its set-up was complete: who begins now may take its place (SPEC: SEC-8).
    yields: bool,
    session: SessionId,
    ticket: Token,
    resume_secret: Token,
    agreement: Agreement,
    /// The newest incarnation of each lane.
    joined: Vec<Option<Incarnation>>,
    /// The session was resumed.
    resumed: bool,
}

/// Tickets and secrets that were not the session's (SPEC: SEC-6).
#[derive(Debug, Default)]
struct WrongTokens {
    /// How many came in a row that was not broken by a right one.
    count: u32,
    /// Answers that are kept back.
    waiting: usize,
}

impl WrongTokens {
    /// How long the answer to another one is kept back; `None` if it gets none.
    fn another(&mut self) -> Option<Duration> {
        let before = self.count;
        self.count = self.count.saturating_add(1);
        if self.waiting >= WRONG_TOKENS_AT_ONCE {
            return None;
        }
        self.waiting += 1;
        let pause = WRONG_TOKEN_PAUSE.saturating_mul(1 << before.min(16));
        Some(pause.min(WRONG_TOKEN_PAUSE_MAX))
    }
}

impl Registry {
    /// Without a session, for a destination with these settings.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self {
            features: offered(config),
            pass: config.pass(),
            lanes_max: config.lanes_max(),
            here: None,
            ended: None,
            wrong: WrongTokens::default(),
        }
    }

    /// For who only answers how this session ended, which another process ran: none begins here.
    #[must_use]
    pub fn of_ended(config: &Config, ticket: AskTicket) -> Self {
        Self {
            ended: Some(ticket),
            ..Self::new(config)
        }
    }

    /// What becomes of a hello. `draw` gives a token that nobody can guess, or nothing if there is none to be had.
    pub fn hello(&mut self, hello: &Hello, draw: impl FnMut() -> Option<Token>) -> Verdict {
        // Who asks for what is not here is told so, whatever features it has in mind.
        let knows = match hello.intent {
            Intent::Resume | Intent::Ask => self.knows(hello),
            Intent::Start => self.expects(hello),
            Intent::Join => Ok(()),
        };
        if let Err(refusal) = knows {
            return self.refuse(hello, refusal);
        }
        let reply = negotiate::answer(hello, &self.offer(hello.intent));
        let Ok(agreement) = negotiate::accept(hello, &reply) else {
            return Verdict::Refuse(reply);
        };
        let verdict = match hello.intent {
            Intent::Start if self.takes_place() => return Verdict::GiveWay,
            Intent::Start => self
                .start(hello, agreement, draw)
                .map(|granted| Verdict::Start(reply, granted)),
            Intent::Join => self.join(hello).map(|()| Verdict::Join(reply)),
            Intent::Resume => self
                .resume(draw)
                .map(|granted| Verdict::Resume(reply, granted)),
            Intent::Ask => Ok(Verdict::Ask(reply)),
        };
        verdict.unwrap_or_else(|refusal| self.refuse(hello, refusal))
    }

    /// The answer to bytes that are no hello.
    #[must_use]
    pub fn unreadable(&self, bytes: &[u8; HELLO_BYTES], error: &Malformed) -> HelloReply {
        negotiate::refuse(bytes, error, &self.offer(Intent::Start))
    }

    /// An answer to a wrong token, which was kept back, is given now.
    pub fn answered_late(&mut self) {
        self.wrong.waiting = self.wrong.waiting.saturating_sub(1);
    }

    /// Whether a session is here.
    #[must_use]
    pub fn is_free(&self) -> bool {
        self.here.is_none()
    }

    /// The session that is here is over, and another one may begin.
    pub fn clear(&mut self) {
        self.here = None;
    }

    /// Whether the session that is here gives way to another one.
    pub fn set_yields(&mut self, yields: bool) {
        if let Some(here) = &mut self.here {
            here.yields = yields;
        }
    }

    fn refuse(&mut self, hello: &Hello, (reason, text): Refusal) -> Verdict {
        let reply = HelloReply::refused(reason, text, hello.session);
        // A source that is not the one that is waited for has shown something wrong as well.
        if reason == Reason::BadTicket {
            return Verdict::WrongToken(reply, self.wrong.another());
        }
        Verdict::Refuse(reply)
    }

    /// Whether this may be the source that is waited for. SPEC: SEC-7
    fn expects(&self, hello: &Hello) -> Result<(), Refusal> {
        if self.pass.is_none() || self.pass == hello.token {
            return Ok(());
        }
        let text = "this destination waits for a source that shows a pass, and this is not it";
        Err((Reason::BadTicket, text))
    }

    /// Whether somebody may speak for the session that is here. SPEC: RESUME-1, ASK-1
    fn knows(&mut self, hello: &Hello) -> Result<(), Refusal> {
        let here = self.here.as_ref();
        let here = here.map(|here| (here.session, here.resume_secret));
        let ended = self.ended.as_ref().filter(|_| hello.intent == Intent::Ask);
        let ended = ended.map(|ticket| (ticket.session_id(), ticket.token()));
        let known = here
            .or(ended)
            .filter(|(session, _)| *session == hello.session);
        let Some((_, resume_secret)) = known else {
            return Err((Reason::WrongSession, "no such session here"));
        };
        if resume_secret != hello.token {
            return Err((
                Reason::BadTicket,
                "the secret is not the one of this session",
            ));
        }
        self.wrong.count = 0;
        Ok(())
    }

    /// Whether the session that is here gives way; true for the first who asks.
    fn takes_place(&mut self) -> bool {
        let here = self.here.as_mut();
        here.is_some_and(|here| std::mem::take(&mut here.yields))
    }

    /// A new session; there can be only one.
    fn start(
        &mut self,
        hello: &Hello,
        agreement: Agreement,
        mut draw: impl FnMut() -> Option<Token>,
    ) -> Result<Granted, Refusal> {
        if self.here.is_some() {
            return Err((Reason::Busy, "a migration is under way here already"));
        }
        if self.ended.is_some() {
            return Err((Reason::Busy, "only questions are answered here"));
        }
        let (ticket, resume_secret) = draw().zip(draw()).ok_or(NO_RANDOM)?;
        self.here = Some(Here {
            yields: false,
            session: hello.session,
            ticket,
            resume_secret,
            agreement,
            joined: vec![None; self.lanes_max as usize],
            resumed: false,
        });
        Ok(Granted {
            ticket,
            resume_secret,
            features: agreement.features,
        })
    }

    /// A data channel of the session.
    fn join(&mut self, hello: &Hello) -> Result<(), Refusal> {
        let here = self
            .here
            .as_mut()
            .filter(|here| here.session == hello.session);
        let Some(here) = here else {
            return Err((Reason::WrongSession, "no such session here"));
        };
        if here.ticket != hello.token {
            return Err((
                Reason::BadTicket,
                "the ticket is not the one of this session",
            ));
        }
        match here.joined.get_mut(hello.lane.value() as usize) {
            None if self.lanes_max == 1 => Err((Reason::TooManyLanes, "only one lane was granted")),
            None => Err((Reason::TooManyLanes, "more lanes than were granted")),
            // SPEC: JOIN-1, JOIN-3
            Some(Some(newest)) if hello.incarnation <= *newest => {
                Err((Reason::Misbehaved, "this lane has joined already"))
            }
            // After a resume it may have been lost before it was here (SPEC: RESUME-13).
            Some(None) if hello.incarnation != Incarnation::new(0) && !here.resumed => {
                Err((Reason::Misbehaved, "this lane was never here before"))
            }
            Some(joined) => {
                *joined = Some(hello.incarnation);
                Ok(())
            }
        }
    }

    /// The session is resumed: the ticket of before is void (SPEC: GRANT-1).
    fn resume(&mut self, mut draw: impl FnMut() -> Option<Token>) -> Result<Granted, Refusal> {
        let here = self.here.as_mut();
        let here = here.ok_or((Reason::WrongSession, "no such session here"))?;
        if !here.agreement.features.contains(Features::RESUME) {
            return Err((Reason::Feature, "this session is not kept"));
        }
        here.ticket = draw().ok_or(NO_RANDOM)?;
        here.resumed = true;
        Ok(Granted {
            ticket: here.ticket,
            resume_secret: here.resume_secret,
            features: here.agreement.features,
        })
    }

    fn offer(&self, intent: Intent) -> Offer {
        match (intent, &self.here) {
            (Intent::Join | Intent::Resume, Some(here)) => Offer::exactly(here.agreement),
            _ => Offer {
                versions: VersionRange::OURS,
                features: self.features,
                required: Features::NONE,
            },
        }
    }
}

const NO_RANDOM: Refusal = (Reason::Internal, "no random numbers");

#[cfg(test)]
mod tests;
