//! Channels that lose the bytes of one lane with the guest paused, and break that lane off when FINAL was said.
//!
//! ```text
//!  SWITCHOVER ──► the first lane that carries what is chosen: from here on nothing of it arrives ──► FINAL ──► that lane is cut
//! ```
//! No clock is asked: what the source says decides when each step happens.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use multifd_sender as tx;
use multifd_transport::{Channel, ChannelError, Closer, IoSource, ReceiveHalf, SendHalf};
use multifd_wire::{ChannelRef, HEADER_BYTES, Kind};

use crate::tapped::{Tap, Tapped};

/// The mark at the end of a device's stream (SPEC: section 13).
const CONFIG_END: u32 = 3;

/// What the lane that is lost carries first of all that is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// Whatever comes first after SWITCHOVER: pages, zeros, the end of the round, or something of a device.
    Anything,
    /// The end of a device's stream: so everything else of it has arrived, and no lane has anything left to send.
    DeviceEnd,
}

/// A dialer whose channels do so, once.
pub struct Losing {
    inner: Box<dyn tx::Dial>,
    loss: Arc<Loss>,
}

impl Losing {
    /// Loses what is on its way from there on.
    #[must_use]
    pub fn new(from: From, inner: Box<dyn tx::Dial>) -> Self {
        let loss = Loss {
            from,
            state: Mutex::default(),
        };
        Self {
            inner,
            loss: Arc::new(loss),
        }
    }
}

impl tx::Dial for Losing {
    fn dial(
        &self,
        channel: ChannelRef,
        deadline: Instant,
    ) -> Result<Box<dyn Channel>, Box<dyn std::error::Error + Send + Sync>> {
        let inner = self.inner.dial(channel, deadline)?;
        let loss = Arc::clone(&self.loss);
        Ok(Box::new(Watched {
            inner,
            channel,
            loss,
        }))
    }
}

struct Loss {
    from: From,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    paused: bool,
    lost: Option<Lost>,
}

struct Lost {
    closer: Closer,
    cut: bool,
}

impl Loss {
    /// SWITCHOVER and FINAL, once they were sent.
    fn said(&self, kind: Option<Kind>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match (kind, &mut state.lost) {
            (Some(Kind::Switchover), _) => state.paused = true,
            (Some(Kind::Final), Some(lost)) if !lost.cut => {
                lost.cut = true;
                lost.closer.shutdown();
            }
            _ => {}
        }
    }

    /// Whether the lane that is about to send this loses it.
    fn takes(&self, head: &[u8], closer: &Closer) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = self.from == From::Anything || is_device_end(head);
        let takes = state.paused && state.lost.is_none() && wanted;
        if takes {
            let closer = closer.clone();
            state.lost = Some(Lost { closer, cut: false });
        }
        takes
    }
}

fn kind(head: &[u8]) -> Option<Kind> {
    let code = head.first_chunk::<2>()?;
    Kind::from_code(u16::from_le_bytes(*code)).ok()
}

fn is_device_end(head: &[u8]) -> bool {
    let mark = head.get(HEADER_BYTES + 4..).and_then(<[u8]>::first_chunk);
    kind(head) == Some(Kind::DeviceMark)
        && mark.is_some_and(|mark| u32::from_le_bytes(*mark) == CONFIG_END)
}

struct Watched {
    inner: Box<dyn Channel>,
    channel: ChannelRef,
    loss: Arc<Loss>,
}

impl Channel for Watched {
    fn split(self: Box<Self>) -> (Box<dyn SendHalf>, Box<dyn ReceiveHalf>, Closer) {
        let (tx, rx, closer) = self.inner.split();
        let tap = Half {
            channel: self.channel,
            loss: self.loss,
            closer: closer.clone(),
            hello: true,
            lost: false,
        };
        (Box::new(Tapped::new(tx, tap)), rx, closer)
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

struct Half {
    channel: ChannelRef,
    loss: Arc<Loss>,
    closer: Closer,
    /// Nothing was sent yet.
    hello: bool,
    lost: bool,
}

impl Tap for Half {
    fn send(
        &mut self,
        half: &mut dyn SendHalf,
        head: &[u8],
        body: &[IoSource<'_>],
    ) -> Result<(), ChannelError> {
        if std::mem::take(&mut self.hello) {
            return half.send(head, body);
        }
        if self.channel == ChannelRef::Control {
            half.send(head, body)?;
            self.loss.said(kind(head));
            return Ok(());
        }
        self.lost = self.lost || self.loss.takes(head, &self.closer);
        if self.lost {
            return Ok(());
        }
        half.send(head, body)
    }

    fn swallows(&self) -> bool {
        self.lost
    }
}
