//! One attempt to open a channel: dial, hello, answer. When it is made, and what follows if it comes to nothing, is the session's to say.
//!
//! An attempt has a thread of its own, so that the control thread can be told meanwhile that nobody wants it any more. It ends by itself
//! at its deadline at the latest, and what it opened in vain is closed with it.

use std::error::Error;
use std::io;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use multifd_session::common::ChannelFault;
use multifd_session::source::hello::judge;
use multifd_session::source::{Attempt, Lasts, NotOpened, Purpose};
use multifd_transport::{
    Channel, ChannelError, Closer, ConnectError, ListenError, ReceiveHalf, STRANGER_BYTES,
    SendHalf, Stranger,
};
use multifd_wire::frame::{Abort, OutcomeState};
use multifd_wire::{
    ChannelRef, Features, HELLO_REPLY_BYTES, Hello, HelloReply, Malformed, Phase, Reason,
};

use super::control::FAREWELL;
use super::lane::{LaneCommand, serve};
use super::link::{ControlSender, failed, read_outcome};
use super::{Dial, LaneState, Note, Shared};
use crate::error::Fault;

/// A channel whose hello was accepted.
pub(super) struct Open {
    pub(super) tx: Box<dyn SendHalf>,
    pub(super) rx: Box<dyn ReceiveHalf>,
    pub(super) closer: Closer,
    pub(super) agreed: Features,
    pub(super) description: String,
    /// From the hello to its reply: a round trip, or longer than one.
    pub(super) round_trip: Duration,
}

/// The destination was reached.
pub(super) enum Reached {
    /// A control channel, accepted.
    Control(Offer),
    /// An answer; the channel is closed again.
    Answer(OutcomeState),
}

/// A control channel that waits for somebody to take it.
pub(super) struct Offer {
    open: Option<Open>,
    purpose: Purpose,
}

impl Offer {
    pub(super) fn take(mut self) -> Option<Open> {
        self.open.take()
    }
}

impl Drop for Offer {
    /// The destination let this source in, and nobody wants it any more: it is told, so that it does not take this for a loss
    /// (SPEC: ABORT-1). A session that can be taken up again is kept, and is not told.
    fn drop(&mut self) {
        if let Some(open) = self.open.take()
            && self.purpose == Purpose::Start
        {
            tell_cancelled(open);
        }
    }
}

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

/// One attempt to reach the destination on a control channel.
pub(super) fn reach(
    shared: &Shared,
    dial: &dyn Dial,
    purpose: Purpose,
    attempt: &Attempt,
) -> Result<Reached, NotOpened> {
    let mut opened = open(shared, dial, ChannelRef::Control, attempt)?;
    if purpose == Purpose::Ask {
        let until = shared.began + attempt.answer_by;
        opened.rx.set_deadline(Some(until));
        let state = read_outcome(&mut *opened.rx).map_err(NotOpened::prevented)?;
        return Ok(Reached::Answer(state));
    }
    let open = Some(opened);
    Ok(Reached::Control(Offer { open, purpose }))
}

/// The life of one lane's thread: dial, hello, serve. Its last word is a note.
pub(super) fn lane_life(
    shared: &Shared,
    dial: &dyn Dial,
    attempt: &Attempt,
    state: &LaneState,
    orders: &Receiver<LaneCommand>,
    notes: &Sender<Note>,
) {
    let (lane, incarnation) = (state.id, state.incarnation);
    let opened = match open(shared, dial, ChannelRef::Lane(lane), attempt) {
        Ok(opened) => opened,
        Err(why) => {
            let counters = &shared.counters;
            counters.note_fault(ChannelRef::Lane(lane), why.fault());
            tracing::debug!(%lane, %incarnation, fault = %why.fault(), "a lane could not be opened");
            let _ = notes.send(Note::LaneNotOpened {
                lane,
                incarnation,
                why,
            });
            return;
        }
    };
    let (mut tx, rx) = (opened.tx, opened.rx);
    tx.set_stall(Some(shared.config.stall()));
    let _ = notes.send(Note::LaneUp {
        lane,
        incarnation,
        closer: opened.closer,
        description: opened.description,
    });
    let fault = serve(shared, state, tx, orders, notes).err();
    // Kept until here: closing the receiving half earlier would reset the connection.
    drop(rx);
    if let Some(fault) = &fault {
        shared.counters.note_fault(ChannelRef::Lane(lane), fault);
        tracing::debug!(%lane, %incarnation, %fault, "a lane's thread has ended");
    }
    let _ = notes.send(Note::LaneEnded {
        lane,
        incarnation,
        fault,
    });
}

fn open(
    shared: &Shared,
    dial: &dyn Dial,
    at: ChannelRef,
    attempt: &Attempt,
) -> Result<Open, NotOpened> {
    let wanted = || shared.check_stop().map_err(NotOpened::prevented);
    let channel = connect(dial, at, shared.began + attempt.connect_by);
    wanted()?;
    let opened = say_hello(channel?, &attempt.hello, shared.began + attempt.answer_by);
    // One that was accepted is handed on all the same: whoever let this source in is told.
    opened.or_else(|why| wanted().and(Err(why)))
}

/// Makes a connection.
pub(super) fn connect(
    dial: &dyn Dial,
    at: ChannelRef,
    until: Instant,
) -> Result<Box<dyn Channel>, NotOpened> {
    dial.dial(at, until).map_err(|error| {
        let lasts = if may_pass(&*error) {
            Lasts::MayPass
        } else {
            Lasts::ForGood
        };
        NotOpened::unconnected(error.to_string(), lasts)
    })
}

/// Of a dialler's error. Those of an embedder's own types are for good: nobody here knows what they mean.
fn may_pass(error: &(dyn Error + Send + Sync + 'static)) -> bool {
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

/// Says hello and reads the answer (SPEC: HELLO-1).
pub(super) fn say_hello(
    channel: Box<dyn Channel>,
    hello: &Hello,
    until: Instant,
) -> Result<Open, NotOpened> {
    let description = channel.describe();
    let (mut tx, mut rx, closer) = channel.split();
    tx.set_deadline(Some(until));
    rx.set_deadline(Some(until));
    let asked = Instant::now();
    let reply = exchange(&mut *tx, &mut *rx, hello)
        .map_err(|fault| NotOpened::unanswered(description.clone(), fault))?;
    let round_trip = asked.elapsed();
    let agreed = judge(hello, &reply)?;
    tx.set_deadline(None);
    rx.set_deadline(None);
    Ok(Open {
        tx,
        rx,
        closer,
        agreed,
        description,
        round_trip,
    })
}

fn exchange(
    tx: &mut dyn SendHalf,
    rx: &mut dyn ReceiveHalf,
    hello: &Hello,
) -> Result<HelloReply, Fault> {
    tx.send(&hello.encode(), &[]).map_err(failed)?;
    let mut octets = [0u8; HELLO_REPLY_BYTES];
    rx.receive(&mut octets)
        .map_err(|error| unanswered(error, rx))?;
    HelloReply::decode(&octets).map_err(|error| match (stranger(&octets), error) {
        (Some(stranger), _) => stranger,
        (None, Malformed::Magic { .. }) => HelloReply::damaged(&octets).into(),
        (None, error) => error.into(),
    })
}

/// What it means that no answer came to a hello: what came instead, if it was anything.
fn unanswered(error: ChannelError, rx: &dyn ReceiveHalf) -> Fault {
    let mut octets = [0; STRANGER_BYTES];
    let heard = rx.peek(&mut octets);
    stranger(&octets[..heard]).unwrap_or_else(|| failed(error))
}

/// The fault of a peer that speaks something else. None speaks as a destination does, if only the beginning of it, or with a byte
/// that was changed on the way.
fn stranger(octets: &[u8]) -> Option<Fault> {
    /// What an answer begins with (SPEC: HELLO-1).
    const BEGINNING: &[u8] = b"MULTIFD\n";
    let differs = BEGINNING.iter().zip(octets).filter(|(a, b)| a != b).count();
    if differs == 0 || (differs == 1 && octets.len() >= BEGINNING.len()) {
        return None;
    }
    let text = Stranger::look_at(octets)?.to_string();
    Some(Fault::Channel(ChannelFault::new(
        ChannelFault::STRANGER,
        false,
        text,
    )))
}
