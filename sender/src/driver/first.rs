//! The first connection to the destination and its hello, which a cancellation interrupts.
//!
//! A thread of its own dials and waits, so that the control thread can be told meanwhile that nobody wants it any more. It ends by
//! itself at the deadline of the hello at the latest, and what it opened is closed with it, after the destination was told.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use crossbeam_channel::{Receiver, SendError, bounded, select};
use multifd_transport::{LOOK_MAX, Pulse, Silence, Spawner};
use multifd_wire::frame::Abort;
use multifd_wire::{ChannelRef, Hello, Phase, Reason};

use super::control::FAREWELL;
use super::link::{ControlSender, Open};
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
    // Without room: what nobody takes comes back to whoever opened it.
    let (done, result) = bounded(0);
    let (theirs, dial) = (Arc::clone(shared), Arc::clone(dial));
    let body = Box::new(move || {
        let opened = open_first(&theirs, &*dial, ChannelRef::Control, &hello);
        if let Err(SendError(Ok(unwanted))) = done.send(opened) {
            tell_cancelled(unwanted);
        }
    });
    spawner
        .spawn("mfd-dial", body)
        .map_err(|source| Fault::System {
            step: "start a thread",
            source,
        })?;
    // The dialler heeds a deadline of its own. If it does not, it is in code of the embedder's, or its thread was killed.
    let mut silence = Silence::default();
    let (never, limit) = (
        Pulse::default(),
        shared.config.hello_deadline() + shared.config.device_deadline(),
    );
    loop {
        shared.watch.at("reach the destination");
        select! {
            recv(result) -> opened => return opened.unwrap_or(Err(Fault::Cancelled)),
            recv(inbox) -> note => match note {
                // To switch over is for later.
                Ok(Note::Wish) if !shared.wishes.guest_gone.load(Relaxed) => {}
                _ => return Err(Fault::Cancelled),
            },
            default(LOOK_MAX) => {}
        }
        let waited = silence.look(&never, Instant::now());
        if waited > limit {
            return Err(Fault::ThreadStuck {
                thread: "mfd-dial, which was to reach the destination".to_owned(),
                waited_ms: waited.as_millis(),
            });
        }
    }
}

/// The destination let this source in, and nobody wants it any more: it is told, so that it doesn't take this for a loss (SPEC: ABORT-1).
fn tell_cancelled(opened: Open) {
    let (mut control, mut rx) = (ControlSender::new(opened.tx), opened.rx);
    let until = Instant::now() + FAREWELL;
    control.half().set_deadline(Some(until));
    let text = Fault::Cancelled.to_string();
    let told = control.send(Abort {
        reason: Reason::Cancelled,
        phase: Phase::Setup,
        channel: ChannelRef::None,
        text: &text,
    });
    if let Err(fault) = told {
        tracing::debug!(%fault, "the destination could not be told of the cancellation");
        return;
    }
    let _ = control.half().finish();
    // Closing before it closes could destroy what it was told.
    rx.set_deadline(Some(until));
    while rx.receive(&mut [0]).is_ok() {}
}
