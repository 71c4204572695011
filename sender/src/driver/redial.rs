//! One attempt to connect again, for the control channel and for a lane. When it is due is the session's to say.

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use multifd_session::source::redial::connect_timeout;
use multifd_transport::Channel;
use multifd_wire::frame::OutcomeState;
use multifd_wire::{ChannelRef, Hello};

use super::lane::{LaneCommand, serve};
use super::link::{Open, open, read_outcome};
use super::tries::open_first;
use super::{Dial, LaneState, Note, Shared};
use crate::error::Fault;

/// Makes a connection for a channel that was lost. `round_trip`: the shortest that was seen.
pub(super) fn dial_again(
    shared: &Shared,
    dial: &dyn Dial,
    channel: ChannelRef,
    round_trip: Option<Duration>,
) -> Result<Box<dyn Channel>, Fault> {
    let timeout = connect_timeout(round_trip).min(shared.config.hello_deadline());
    let deadline = Instant::now() + timeout;
    dial.dial(channel, deadline)
        .map_err(|e| Fault::Dial(e.to_string()))
}

/// What a new control channel is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To go on with the session.
    Resume,
    /// To ask how it ended.
    Ask,
    /// To begin another one.
    Start,
}

/// The destination was reached again.
pub(super) enum Reached {
    /// A control channel, accepted.
    Control(Open),
    /// An answer; the channel is closed again.
    Answer(OutcomeState),
}

/// One attempt to reach the destination again.
pub(super) fn reach(
    shared: &Shared,
    dial: &dyn Dial,
    purpose: Purpose,
    hello: &Hello,
    round_trip: Option<Duration>,
) -> Result<Reached, Fault> {
    let channel = dial_again(shared, dial, ChannelRef::Control, round_trip)?;
    shared.check_stop()?;
    let deadline = Instant::now() + shared.config.hello_deadline();
    let mut opened = open(channel, hello, deadline)?;
    if purpose == Purpose::Ask {
        opened.rx.set_deadline(Some(deadline));
        let state = read_outcome(&mut *opened.rx)?;
        return Ok(Reached::Answer(state));
    }
    Ok(Reached::Control(opened))
}

/// How the connection of a lane is made.
#[derive(Debug, Clone, Copy)]
pub(super) enum Attempt {
    /// For the first time: everything that is wrong is found here, so it may take its time.
    First,
    /// Again: it is one of many.
    Again {
        /// The shortest round trip that was seen.
        round_trip: Option<Duration>,
    },
}

/// The life of one lane's thread: dial, hello, serve.
pub(super) fn lane_life(
    shared: &Shared,
    dial: &dyn Dial,
    attempt: Attempt,
    hello: &Hello,
    state: &LaneState,
    orders: &Receiver<LaneCommand>,
    notes: &Sender<Note>,
) -> Result<(), Fault> {
    let at = ChannelRef::Lane(state.id);
    let opened = match attempt {
        Attempt::First => open_first(shared, dial, at, hello)?,
        Attempt::Again { round_trip } => {
            let deadline = Instant::now() + shared.config.hello_deadline();
            let channel = dial_again(shared, dial, at, round_trip)?;
            shared.check_stop()?;
            open(channel, hello, deadline)?
        }
    };
    let (mut tx, rx) = (opened.tx, opened.rx);
    tx.set_stall(Some(shared.config.stall()));
    let _ = notes.send(Note::LaneUp {
        lane: state.id,
        incarnation: state.incarnation,
        closer: opened.closer,
        description: opened.description,
    });
    let result = serve(shared, state, tx, orders, notes);
    // Kept until here: closing the receiving half earlier would reset the connection.
    drop(rx);
    result
}
