//! Asking a destination how a session ended, by a process that did not run it. What an answer means the question itself says.

use std::time::{Duration, Instant};

use multifd_session::source::NotOpened;
use multifd_session::source::ask::{AskTicket, Follows, Question};
use multifd_wire::frame::OutcomeState;
use multifd_wire::{ChannelRef, Phase};

use super::Dial;
use super::attempt::{connect, say_hello};
use super::link::read_outcome;
use crate::error::Error;

/// Asks the destination how the session stands, until it gives an answer that is final or `patience` is over.
///
/// **The question ends a session that is not committed**: the destination then takes no commit and no resume any more
/// (SPEC: ASK-3). Do not ask while the source that runs the session is alive.
///
/// # Errors
/// [`Fault::Refused`](crate::Fault::Refused) when the destination does not know the session or takes the secret for wrong; otherwise why
/// there was no answer. The outcome is unknown then.
pub fn ask(dial: &dyn Dial, ticket: &AskTicket, patience: Duration) -> Result<OutcomeState, Error> {
    let began = Instant::now();
    let question = Question::new(ticket, patience);
    loop {
        let answer = once(dial, &question, began);
        match question.asked(answer, began.elapsed()) {
            Follows::Again(pause) => std::thread::sleep(pause),
            Follows::Over(answer) => {
                return answer
                    .map_err(|fault| Error::new(Phase::Commit, fault).at(ChannelRef::Control));
            }
        }
    }
}

fn once(dial: &dyn Dial, question: &Question, began: Instant) -> Result<OutcomeState, NotOpened> {
    let attempt = question.attempt();
    let channel = connect(dial, ChannelRef::Control, began + attempt.connect_by)?;
    let until = began + attempt.answer_by;
    let mut opened = say_hello(channel, &attempt.hello, until)?;
    opened.rx.set_deadline(Some(until));
    read_outcome(&mut *opened.rx).map_err(NotOpened::prevented)
}
