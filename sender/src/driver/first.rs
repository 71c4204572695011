//! The first connection to the destination and its hello, which a cancellation interrupts.
//!
//! A thread of its own dials and waits, so that the control thread can be told meanwhile that nobody wants it any more. It ends by
//! itself at the deadline of the hello at the latest, and what it opened is closed with it.

use std::sync::Arc;

use crossbeam_channel::{Receiver, bounded, select};
use multifd_transport::Spawner;
use multifd_wire::{ChannelRef, Hello};

use super::link::Open;
use super::tries::open_first;
use super::{Dial, Note, Shared};
use crate::error::Fault;

/// Dials the control channel and says hello. `inbox`: where a cancellation arrives; nobody else has anything to say yet.
pub(super) fn first_contact(
    shared: &Arc<Shared>,
    dial: &Arc<dyn Dial>,
    spawner: &dyn Spawner,
    inbox: &Receiver<Note>,
    hello: Hello,
) -> Result<Open, Fault> {
    let (done, result) = bounded(1);
    let (shared, dial) = (Arc::clone(shared), Arc::clone(dial));
    let body = Box::new(move || {
        // Nobody waits for it any more if the migration was cancelled.
        let _ = done.send(open_first(&shared, &*dial, ChannelRef::Control, &hello));
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
