//! Answering how a session ended, by a process that did not run it: the destination's own died, and the machine outlived it.
//!
//! The rule it keeps: nothing is decided here. Whoever calls knows how it ended, and that it stays so.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::RecvTimeoutError;
use multifd_session::destination::registry::Registry;
use multifd_transport::door::Door;
use multifd_transport::{Listener, Spawner, StdSpawner};
use multifd_wire::Phase;
use multifd_wire::frame::OutcomeState;

use super::{Note, Shared, greet};
use crate::config::Config;
use crate::error::{Error, Fault};
use crate::vmm::AskTicket;

/// How often it is looked whether it is cancelled.
const LOOK: Duration = Duration::from_millis(20);

/// How often it is looked whether the answer is out.
const POLL: Duration = Duration::from_millis(1);

/// Tells whoever asks for this session that it ended so, until somebody was told, `patience` is over, or `is_cancelled` says so; says
/// whether somebody was told. Whose secret is wrong is told nothing, and no session begins here.
///
/// **What is said must be true and stay so**: after [`OutcomeState::NotCommitted`] the source runs its guest, so the machine here must
/// have been discarded before.
///
/// # Errors
/// No thread, or no event queue for the listeners.
pub fn answer(
    listeners: Vec<Listener>,
    ticket: &AskTicket,
    state: OutcomeState,
    config: Config,
    spawner: Option<Box<dyn Spawner>>,
    patience: Duration,
    is_cancelled: &dyn Fn() -> bool,
) -> Result<Answered, Error> {
    let spawner: Arc<dyn Spawner> =
        spawner.map_or_else(|| Arc::new(StdSpawner) as Arc<dyn Spawner>, Arc::from);
    let registry = Registry::of_ended(&config, ticket.clone());
    let (shared, inbox) = Shared::new(config, registry, Arc::clone(&spawner));
    let greeters = Arc::new(greet::Greeters(Arc::clone(&shared)));
    let door = Door::open(greeters, listeners, &*spawner, "mfd-accept").map_err(|source| {
        let step = "wait on the listeners";
        Error::new(Phase::Hello, Fault::System { step, source })
    })?;
    let until = Instant::now() + patience;
    let mut answered = Answered::Nobody;
    while answered == Answered::Nobody && Instant::now() < until && !is_cancelled() {
        match inbox.recv_timeout(LOOK) {
            Ok(Note::Asked { answer, .. }) => {
                if answer.send(state).is_ok() {
                    answered = Answered::Source;
                }
            }
            // The registry lets nobody in, so there is nothing else.
            Ok(_) | Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    // The answer is on its way while a greeter lives; if this process ended now it would be lost.
    let until = Instant::now() + shared.config.hello_deadline();
    while answered == Answered::Source
        && shared.greeters.load(Ordering::Acquire) > 0
        && Instant::now() < until
    {
        std::thread::sleep(POLL);
    }
    drop(door);
    Ok(answered)
}

/// Who was told how a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answered {
    /// A source that knew the session's secret.
    Source,
    /// Nobody asked in time.
    Nobody,
}
