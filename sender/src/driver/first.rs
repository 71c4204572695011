//! The first connection to the destination and its hello, which a cancellation interrupts.
//!
//! A thread of its own dials and waits, so that the control thread can be told meanwhile that nobody wants it any more. It ends by
//! itself at the deadline of the hello at the latest, and what it opened is closed with it.

use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Receiver, bounded, select};
use multifd_transport::Spawner;
use multifd_wire::{ChannelRef, Hello};

use super::link::{Open, open};
use super::{Dial, Note};
use crate::error::Fault;

/// Dials the control channel and says hello. `inbox`: where a cancellation arrives; nobody else has anything to say yet.
pub(super) fn first_contact(
    dial: &Arc<dyn Dial>,
    spawner: &dyn Spawner,
    inbox: &Receiver<Note>,
    hello: Hello,
    deadline: Instant,
) -> Result<Open, Fault> {
    let (done, result) = bounded(1);
    let dial = Arc::clone(dial);
    let body = Box::new(move || {
        // Nobody waits for it any more if the migration was cancelled.
        let _ = done.send(contact(&*dial, &hello, deadline));
    });
    spawner
        .spawn("mfd-dial", body)
        .map_err(|source| Fault::System {
            step: "start a thread",
            source,
        })?;
    select! {
        recv(result) -> opened => opened.unwrap_or(Err(Fault::Cancelled)),
        recv(inbox) -> _cancel => Err(Fault::Cancelled),
    }
}

fn contact(dial: &dyn Dial, hello: &Hello, deadline: Instant) -> Result<Open, Fault> {
    let channel = dial
        .dial(ChannelRef::Control, deadline)
        .map_err(|error| Fault::Dial(error.to_string()))?;
    let at = channel.describe();
    open(channel, hello, deadline).map_err(|fault| match fault {
        Fault::Channel(_) | Fault::Malformed(_) if !fault.is_damage() => Fault::NoAnswer {
            at,
            why: Box::new(fault),
        },
        _ => fault,
    })
}
