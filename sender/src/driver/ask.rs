//! Asking a destination how a session ended, by a process that did not run it: the source itself died after the commit.
//!
//! The rule it keeps: only a clear answer is given as one. Whatever else happens, a refusal, silence, a lost link, leaves the
//! outcome unknown (SPEC: ASK-5).

use std::fmt;
use std::time::{Duration, Instant};

use multifd_wire::frame::OutcomeState;
use multifd_wire::{ChannelRef, Hello, Phase, SessionId, Token};

use super::Dial;
use super::link::{open, read_outcome};
use crate::error::{Error, Fault};

/// The pause between two attempts.
const PAUSE: Duration = Duration::from_millis(250);

/// What one needs to ask a destination how a session ended. Whoever has it can also end the session, and take it over while its
/// channels are lost: keep it from others. It is not printed.
#[derive(Clone, PartialEq, Eq)]
pub struct AskTicket {
    session: SessionId,
    secret: Token,
}

impl AskTicket {
    /// From what was kept of an earlier one.
    #[must_use]
    pub const fn new(session: [u8; 16], secret: [u8; 16]) -> Self {
        Self {
            session: SessionId::new(session),
            secret: Token::new(secret),
        }
    }

    /// The session's name. It is no secret.
    #[must_use]
    pub fn session(&self) -> [u8; 16] {
        self.session.value()
    }

    /// The session's resume secret (SPEC: GRANT).
    #[must_use]
    pub fn secret(&self) -> [u8; 16] {
        self.secret.value()
    }
}

impl fmt::Debug for AskTicket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // SPEC: SEC-2
        f.debug_struct("AskTicket")
            .field("session", &self.session)
            .finish_non_exhaustive()
    }
}

/// Asks the destination how the session stands, until it gives an answer that is final or `patience` is over.
///
/// **The question ends a session that is not committed**: the destination then takes no commit and no resume any more
/// (SPEC: ASK-3). Do not ask while the source that runs the session is alive.
///
/// # Errors
/// [`Fault::Refused`] when the destination does not know the session or takes the secret for wrong; otherwise why there was no answer. The
/// outcome is unknown then.
pub fn ask(dial: &dyn Dial, ticket: &AskTicket, patience: Duration) -> Result<OutcomeState, Error> {
    let until = Instant::now() + patience;
    loop {
        let answer = once(dial, ticket, until);
        let left = until.saturating_duration_since(Instant::now());
        match &answer {
            // It will run, or not: the next answer says.
            Ok(OutcomeState::CommittedNotRunning) if left > PAUSE => {}
            Err(Fault::Dial(_) | Fault::Channel(_)) if left > PAUSE => {}
            _ => {
                return answer
                    .map_err(|fault| Error::new(Phase::Commit, fault).at(ChannelRef::Control));
            }
        }
        std::thread::sleep(PAUSE);
    }
}

fn once(dial: &dyn Dial, ticket: &AskTicket, until: Instant) -> Result<OutcomeState, Fault> {
    let channel = dial
        .dial(ChannelRef::Control, until)
        .map_err(|e| Fault::Dial(e.to_string()))?;
    let mut opened = open(channel, &Hello::ask(ticket.session, ticket.secret), until)?;
    opened.rx.set_deadline(Some(until));
    read_outcome(&mut *opened.rx)
}
