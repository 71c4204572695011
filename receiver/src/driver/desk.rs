//! The desk: which session is here, and what a new channel has to show to belong to it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use multifd_wire::negotiate::{Agreement, Offer};
use multifd_wire::{Features, Hello, Incarnation, Intent, Reason, SessionId, Token, VersionRange};

use super::lock;

/// The answer to the first wrong ticket or secret is kept back for this long, each further one twice as long as the one before.
const WRONG_TOKEN_PAUSE: Duration = Duration::from_millis(50);

/// Up to this.
const WRONG_TOKEN_PAUSE_MAX: Duration = Duration::from_secs(2);

/// So many greeters may keep an answer back at once; who comes with a wrong token beyond that is not answered at all, so that
/// there is always a greeter for the right one.
const WRONG_TOKENS_AT_ONCE: usize = 32;

/// How often it is looked whether a session that gives way is gone.
const PLACE_POLL: Duration = Duration::from_millis(1);

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
    /// It lost its control channel before its set-up was complete: who begins now may take its place (SPEC: SEC-8).
    yields: bool,
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
    /// Whether this may be the source that is waited for. SPEC: SEC-7
    pub(super) fn expects(&self, hello: &Hello, pass: Token) -> Result<(), Refusal> {
        if pass.is_none() || pass == hello.token {
            return Ok(());
        }
        let text = "this destination waits for a source that shows a pass, and this is not it";
        Err((Reason::BadTicket, text))
    }

    /// The session that is here is over, and another one may begin.
    pub(super) fn clear(&self) {
        *lock(&self.0) = None;
    }

    /// Whether the session that is here gives way to another one.
    pub(super) fn set_yields(&self, yields: bool) {
        if let Some(home) = lock(&self.0).as_mut() {
            home.yields = yields;
        }
    }

    /// Whether the session that is here gives way; true for the first who asks.
    pub(super) fn claims_place(&self) -> bool {
        let mut home = lock(&self.0);
        home.as_mut()
            .is_some_and(|home| std::mem::take(&mut home.yields))
    }

    /// Waits until no session is here, but not so long that there is no time to answer.
    pub(super) fn wait_until_free(&self, until: Instant) {
        let half = until.saturating_duration_since(Instant::now()) / 2;
        let until = Instant::now() + half;
        while lock(&self.0).is_some() && Instant::now() < until {
            std::thread::sleep(PLACE_POLL);
        }
    }

    /// A new session; there can be only one.
    pub(super) fn start(
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
            yields: false,
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
    pub(super) fn join(&self, hello: &Hello) -> Result<(), Refusal> {
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
    pub(super) fn knows(&self, hello: &Hello) -> Result<(), Refusal> {
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
    pub(super) fn slow_down(&self, until: Instant) -> bool {
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
    pub(super) fn resume(&self, hello: &Hello) -> Result<(Token, Token), Refusal> {
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

    pub(super) fn offer_for(&self, intent: Intent, features: Features) -> Offer {
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

#[cfg(test)]
mod tests {
    use super::*;

    // SPEC: SEC-6
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
