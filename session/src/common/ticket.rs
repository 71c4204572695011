//! What names a session to whoever did not run it, and what it has to be shown.
//!
//! The rule it keeps: the secret is not printed (SPEC: SEC-2).

use std::fmt;

use multifd_wire::{SessionId, Token};

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

    pub(crate) const fn session_id(&self) -> SessionId {
        self.session
    }

    pub(crate) const fn token(&self) -> Token {
        self.secret
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
