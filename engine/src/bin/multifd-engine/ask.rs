//! An earlier engine died when the commit may have been sent: whose the guest is, the destination is asked.

use std::time::Duration;

use multifd::source::{AskTicket, Dial, OutcomeState, ask};
use multifd_engine::link::Link;
use multifd_engine::protocol::{Ended, Kind, Outcome, SESSION_BYTES, TICKET_BYTES};

/// Asks, and tells the VMM what it may do.
pub(crate) fn outcome(
    link: &Link,
    dial: &dyn Dial,
    ticket: &[u8; TICKET_BYTES],
    patience: Duration,
) -> Ended {
    let (session, secret) = halves(ticket);
    let (kind, outcome, text) = match ask(dial, &AskTicket::new(session, secret), patience) {
        Ok(OutcomeState::Running) => (
            Some(Kind::Migrated),
            Outcome::Migrated,
            "the guest is the destination's".to_owned(),
        ),
        Ok(OutcomeState::NotCommitted) => (
            Some(Kind::Resume),
            Outcome::Failed,
            "it was not committed and never will be: the guest runs here".to_owned(),
        ),
        Ok(OutcomeState::FailedAfterCommit) => (
            None,
            Outcome::Stranded,
            "the destination has the guest and could not run it: it is paused on both sides"
                .to_owned(),
        ),
        Ok(OutcomeState::CommittedNotRunning) => (
            None,
            Outcome::Unknown,
            "the destination has the guest and does not run it yet: ask again".to_owned(),
        ),
        Err(error) => (None, Outcome::Unknown, format!("no answer: {error}")),
    };
    let told = kind.map_or(Ok(()), |kind| link.tell(kind, &session));
    let ended = match told {
        Ok(()) => Ended { outcome, text },
        Err(error) => Ended {
            outcome: Outcome::Unknown,
            text: format!("{text}; but the VMM does not know that yet: {error}"),
        },
    };
    link.ended(&ended);
    ended
}

/// The session's name, and its secret.
pub(crate) fn halves(ticket: &[u8; TICKET_BYTES]) -> ([u8; SESSION_BYTES], [u8; SESSION_BYTES]) {
    let mut halves = ([0; SESSION_BYTES], [0; SESSION_BYTES]);
    halves.0.copy_from_slice(&ticket[..SESSION_BYTES]);
    halves.1.copy_from_slice(&ticket[SESSION_BYTES..]);
    halves
}
