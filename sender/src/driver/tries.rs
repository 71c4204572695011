//! The first connection of a channel: dial and hello, again and again while another try may end otherwise.
//!
//! The rule it keeps: one deadline for all tries together. What is wrong for good (a certificate, a version, a refusal) ends it at once;
//! what may pass (nobody listens yet, the destination is busy, the connection was reset) is tried again, and is what is told if it does not.

use std::error::Error;
use std::io;
use std::time::{Duration, Instant};

use multifd_session::common::Failure as _;
use multifd_transport::{ConnectError, ListenError};
use multifd_wire::{ChannelRef, Hello, Reason};

use super::link::{Open, open};
use super::{Dial, Shared};
use crate::error::Fault;

/// The pause after the first try that failed; each further one is twice as long, up to [`PAUSE_MAX`].
const PAUSE_FIRST: Duration = Duration::from_millis(20);

/// The longest pause between two tries.
const PAUSE_MAX: Duration = Duration::from_millis(250);

/// Opens a channel within the hello's deadline.
pub(super) fn open_first(
    shared: &Shared,
    dial: &dyn Dial,
    at: ChannelRef,
    hello: &Hello,
) -> Result<Open, Fault> {
    let deadline = Instant::now() + shared.config.hello_deadline();
    let mut pause = PAUSE_FIRST;
    let mut last = None;
    loop {
        let fault = match once(shared, dial, at, hello, deadline) {
            // Also if nobody wants it any more: the destination has let this source in, and is told.
            Ok(opened) => return Ok(opened),
            Err(_) if shared.check_stop().is_err() => return Err(Fault::Cancelled),
            Err(Tried::ForGood(fault)) => return Err(fault),
            // That time ran out in this try says less than what ended the one before.
            Err(Tried::MayPass(fault)) if is_deadline(&fault) => return Err(last.unwrap_or(fault)),
            Err(Tried::MayPass(fault)) => fault,
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left <= pause {
            return Err(fault);
        }
        tracing::debug!(channel = %at, %fault, ?pause, "the destination does not take this channel yet");
        last = Some(fault);
        std::thread::sleep(pause);
        shared.check_stop()?;
        pause = (2 * pause).min(PAUSE_MAX);
    }
}

/// Why a try failed, and what that means for the next one.
enum Tried {
    MayPass(Fault),
    ForGood(Fault),
}

fn once(
    shared: &Shared,
    dial: &dyn Dial,
    at: ChannelRef,
    hello: &Hello,
    deadline: Instant,
) -> Result<Open, Tried> {
    let channel = dial.dial(at, deadline).map_err(|error| {
        let fault = Fault::Dial(error.to_string());
        if dial_may_pass(&*error) {
            Tried::MayPass(fault)
        } else {
            Tried::ForGood(fault)
        }
    })?;
    shared.check_stop().map_err(Tried::ForGood)?;
    let at = channel.describe();
    open(channel, hello, deadline).map_err(|fault| {
        let may_pass = hello_may_pass(&fault);
        let fault = named(fault, at);
        if may_pass {
            Tried::MayPass(fault)
        } else {
            Tried::ForGood(fault)
        }
    })
}

/// What it means that there was no answer to a hello.
fn named(fault: Fault, at: String) -> Fault {
    match &fault {
        Fault::Channel(_) | Fault::Malformed(_) if !fault.is_damage() => Fault::NoAnswer {
            at,
            why: Box::new(fault),
        },
        _ => fault,
    }
}

/// Of a dialler's error. Those of an embedder's own types are for good: nobody here knows what they mean.
fn dial_may_pass(error: &(dyn Error + Send + Sync + 'static)) -> bool {
    if let Some(error) = error.downcast_ref::<ConnectError>() {
        return error.may_retry();
    }
    if let Some(error) = error.downcast_ref::<ListenError>() {
        // The destination dials: somebody else may have connected.
        return matches!(
            error,
            ListenError::Establish { .. } | ListenError::Exhausted(_)
        );
    }
    error.downcast_ref::<io::Error>().is_some_and(|error| {
        matches!(
            error.kind(),
            io::ErrorKind::ConnectionRefused
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::TimedOut
        )
    })
}

fn hello_may_pass(fault: &Fault) -> bool {
    match fault {
        // Closed without a word: it has no room for strangers now, or its process is about to end.
        Fault::Channel(error) => {
            let passing = [CLOSED, RESET, LOST, DEADLINE];
            passing.contains(&error.code())
        }
        Fault::Refused { reason, .. } => *reason == Reason::Busy,
        _ => false,
    }
}

fn is_deadline(fault: &Fault) -> bool {
    fault.code() == DEADLINE
}

/// Codes of the transport's errors.
const CLOSED: &str = "channel-closed";
const RESET: &str = "channel-reset";
const LOST: &str = "channel-lost";
const DEADLINE: &str = "channel-deadline";
