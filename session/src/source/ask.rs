//! Asking a destination how a session ended, by a process that did not run it: the source itself died after the commit.
//!
//! ```text
//!   ask ──► an answer that is final, or a refusal ──► over
//!    ▲ └──► not running yet, no connection, no answer ──► after a pause, as long as there is time
//! ```
//! The rule it keeps: only a clear answer is given as one. Whatever else happens, a refusal, silence, a lost link, leaves the
//! outcome unknown (SPEC: ASK-5). The session itself asks with a machine of its own: [`Session`](super::Session).

use std::time::Duration;

use multifd_wire::frame::OutcomeState;
use multifd_wire::{Frame, Hello};

use super::error::Fault;
use super::hello::{Attempt, NotOpened};
pub use crate::common::AskTicket;

/// The pause between two attempts.
const PAUSE: Duration = Duration::from_millis(250);

/// The machine of one question, which is asked again until there is an answer or no time.
#[derive(Debug)]
pub struct Question {
    hello: Hello,
    until: Duration,
}

/// What follows an attempt to ask.
#[derive(Debug)]
pub enum Follows {
    /// Another one, after this pause.
    Again(Duration),
    /// Nothing: this is the answer, or why there is none.
    Over(Result<OutcomeState, Fault>),
}

impl Question {
    /// A question about this session, asked until `until`.
    #[must_use]
    pub fn new(ticket: &AskTicket, until: Duration) -> Self {
        Self {
            hello: Hello::ask(ticket.session_id(), ticket.token()),
            until,
        }
    }

    /// The attempt to be made now.
    #[must_use]
    pub fn attempt(&self) -> Attempt {
        Attempt {
            hello: self.hello,
            connect_by: self.until,
            answer_by: self.until,
        }
    }

    /// An attempt has ended.
    #[must_use]
    pub fn asked(&self, answer: Result<OutcomeState, NotOpened>, now: Duration) -> Follows {
        let again = match &answer {
            // It will run, or not: the next answer says.
            Ok(OutcomeState::CommittedNotRunning) => true,
            Ok(_) => false,
            Err(why) => match why.fault() {
                Fault::Dial(_) | Fault::Channel(_) => true,
                Fault::NoAnswer { why, .. } => matches!(**why, Fault::Channel(_)),
                _ => false,
            },
        };
        if again && self.until.saturating_sub(now) > PAUSE {
            return Follows::Again(PAUSE);
        }
        Follows::Over(answer.map_err(|why| why.fault))
    }
}

/// Reads the one frame that answers a question (SPEC: ASK-1).
///
/// # Errors
/// [`Fault::OutOfTurn`] for any other frame.
pub fn outcome(frame: &Frame<'_>) -> Result<OutcomeState, Fault> {
    match frame {
        Frame::Outcome(outcome) => Ok(outcome.state),
        other => Err(Fault::OutOfTurn {
            what: format!("{other:?} in the place of an answer"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use multifd_wire::frame::{Asks, KeepAlive, Outcome};
    use multifd_wire::{Incompatible, Reason};

    use super::*;
    use crate::source::hello::Lasts;

    const MS: Duration = Duration::from_millis(1);

    fn question() -> Question {
        let ticket = AskTicket::new([1; 16], [2; 16]);
        Question::new(&ticket, 1000 * MS)
    }

    fn over(follows: &Follows) -> bool {
        matches!(follows, Follows::Over(_))
    }

    /// SPEC: ASK-5
    #[test]
    fn a_final_answer_and_a_refusal_end_it_and_all_else_is_asked_again_while_there_is_time() {
        let question = question();
        for state in [
            OutcomeState::NotCommitted,
            OutcomeState::Running,
            OutcomeState::FailedAfterCommit,
        ] {
            let follows = question.asked(Ok(state), MS);
            assert!(matches!(follows, Follows::Over(Ok(same)) if same == state));
        }
        let refused = Incompatible::Refused {
            reason: Reason::WrongSession,
            text: "who?".into(),
        };
        assert!(over(&question.asked(Err(refused.into()), MS)));
        let pending = || Ok(OutcomeState::CommittedNotRunning);
        let silent = || Err(NotOpened::unconnected("refused".into(), Lasts::ForGood));
        for (at, ends) in [(749 * MS, false), (750 * MS, true)] {
            assert_eq!(over(&question.asked(pending(), at)), ends);
            assert_eq!(over(&question.asked(silent(), at)), ends);
        }
    }

    #[test]
    fn only_an_outcome_answers_a_question() {
        let state = OutcomeState::Running;
        assert_eq!(outcome(&Frame::from(Outcome { state })).unwrap(), state);
        let alive = Frame::from(KeepAlive {
            stamp_us: 1,
            echo_us: 0,
            held_us: 0,
            asks: Asks::Nothing,
        });
        assert!(matches!(outcome(&alive), Err(Fault::OutOfTurn { .. })));
    }

    /// SPEC: SEC-2
    #[test]
    fn the_secret_of_a_ticket_is_not_printed() {
        let ticket = AskTicket::new([0x11; 16], [0x77; 16]);
        assert!(!format!("{ticket:?}").contains("77"));
    }
}
