//! Connecting, accepting, and the channel that comes of it.
//!
//! Rule: everything up to the exchange of greetings happens under the caller's deadline, and a connection that fails on the way leaves
//! nothing behind.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::link::{Buffers, Fresh, Link, MESSAGES, NUDGES_MAX, PIECES, SENDS, Sizes};
use super::receive::RdmaReceive;
use super::registrar::Registrar;
use super::send::RdmaSend;
use super::sys::{
    Completion, Depth, Endpoint, Event, Events, Happened, Id, Pd, RawRequest, describe,
    describe_status, wait_any,
};
use super::wire::{Greeting, PRIVATE};
use crate::channel::{Channel, Closer, ReceiveHalf, SendHalf};
use crate::error::{ChannelError, EstablishError};

/// A channel, or a request that can become one.
pub(super) struct RdmaChannel {
    state: State,
    name: Arc<str>,
}

enum State {
    Requested {
        request: RawRequest,
        private: Vec<u8>,
    },
    Open(Box<Link>),
    /// `establish` failed, or was not called.
    Failed,
}

impl RdmaChannel {
    /// The channel of a request that arrived; nothing was answered yet.
    pub(super) fn requested(event: Event) -> Option<Self> {
        let Event {
            private, request, ..
        } = event;
        Some(Self {
            state: State::Requested {
                request: request?,
                private,
            },
            name: "rdma accepted".into(),
        })
    }

    /// Connects to one address.
    pub(super) fn dial(
        target: SocketAddr,
        registrar: Option<Arc<Registrar>>,
        deadline: Instant,
    ) -> Result<Self, DialError> {
        let id = Id::new(Arc::new(Events::new()?))?;
        id.resolve_address(target, left(deadline)?)?;
        expect(&id, Happened::AddressResolved, deadline)?;
        id.resolve_route(left(deadline)?)?;
        expect(&id, Happened::RouteResolved, deadline)?;
        let mut fresh = fresh(id, Sizes::DIALLING, registrar.as_deref())?;
        fresh.endpoint.id().connect(PRIVATE)?;
        expect(fresh.endpoint.id(), Happened::Established, deadline)?;
        let establish = |error: EstablishError| DialError::Establish(error);
        fresh.send_greeting()?;
        let name = name(fresh.endpoint.id());
        let greeted = greeting(&mut fresh, deadline, Sent::Greeting).map_err(establish)?;
        let link = Link::new(
            fresh,
            greeted.peer,
            greeted.is_out,
            registrar,
            Arc::clone(&name),
        )?;
        Ok(Self {
            state: State::Open(Box::new(link)),
            name,
        })
    }

    fn accept(
        request: RawRequest,
        private: &[u8],
        deadline: Instant,
    ) -> Result<(Link, Arc<str>), EstablishError> {
        let io = |error: io::Error| EstablishError::Channel(ChannelError::Io(Arc::new(error)));
        if !private.starts_with(PRIVATE) {
            return Err(protocol("the connection request is not one of multifd"));
        }
        let id = Id::from_request(request).map_err(io)?;
        let name = name(&id);
        let mut fresh = fresh(id, Sizes::ACCEPTING, None).map_err(io)?;
        fresh.endpoint.id().accept(PRIVATE).map_err(io)?;
        expect(fresh.endpoint.id(), Happened::Established, deadline).map_err(
            |error| match error {
                DialError::Establish(error) => error,
                DialError::Io(error) => io(error),
                DialError::Deadline => EstablishError::Deadline,
            },
        )?;
        // The dialling side speaks first: iWARP wants it so.
        let greeted = greeting(&mut fresh, deadline, Sent::Nothing)?;
        fresh.send_greeting().map_err(io)?;
        let link = Link::new(fresh, greeted.peer, true, None, Arc::clone(&name)).map_err(io)?;
        Ok((link, name))
    }
}

impl Channel for RdmaChannel {
    fn establish(&mut self, deadline: Instant) -> Result<(), EstablishError> {
        match std::mem::replace(&mut self.state, State::Failed) {
            State::Requested { request, private } => {
                let (link, name) = Self::accept(request, &private, deadline)?;
                self.state = State::Open(Box::new(link));
                self.name = name;
                Ok(())
            }
            other => {
                self.state = other;
                Ok(())
            }
        }
    }

    fn split(self: Box<Self>) -> (Box<dyn SendHalf>, Box<dyn ReceiveHalf>, Closer) {
        let State::Open(link) = self.state else {
            // Nobody may take a channel apart that was not established; what is left behaves as one that was shut down.
            let (left, _) = crate::memory::pair(1);
            let (send, receive, closer) = left.split();
            closer.shutdown();
            return (send, receive, closer);
        };
        let link = Arc::new(*link);
        let weak = Arc::downgrade(&link);
        let closer = Closer::new(move || {
            if let Some(link) = weak.upgrade() {
                link.shutdown();
            }
        });
        let send = RdmaSend::new(Arc::clone(&link));
        let receive = RdmaReceive::new(link);
        (Box::new(send), Box::new(receive), closer)
    }

    fn describe(&self) -> String {
        self.name.to_string()
    }
}

/// Why no connection was made.
pub(super) enum DialError {
    /// The address cannot be reached by RDMA, or refused.
    Io(io::Error),
    Deadline,
    /// Connected, but no channel came of it.
    Establish(EstablishError),
}

impl From<io::Error> for DialError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn protocol(text: impl ToString) -> EstablishError {
    EstablishError::Protocol {
        protocol: "RDMA",
        text: text.to_string(),
    }
}

fn left(deadline: Instant) -> Result<Duration, DialError> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(DialError::Deadline);
    }
    Ok(left.max(Duration::from_millis(1)))
}

fn name(id: &Id) -> Arc<str> {
    let print =
        |address: Option<SocketAddr>| address.map_or_else(|| "?".to_owned(), |a| a.to_string());
    let (ours, theirs) = id.addresses();
    format!("rdma {} → {}", print(ours), print(theirs)).into()
}

/// Buffers, keys and a queue pair for a connection.
fn fresh(id: Id, sizes: Sizes, registrar: Option<&Registrar>) -> io::Result<Fresh> {
    let pd = match registrar {
        Some(registrar) => registrar.domain(&id)?,
        None => Arc::new(Pd::new(&id)?),
    };
    let buffers = Buffers::new(sizes)?;
    let keys = buffers.register(&pd)?;
    let depth = Depth {
        sends: SENDS,
        receives: MESSAGES + 2,
        pieces: PIECES,
    };
    let endpoint = Endpoint::new(id, &pd, depth)?;
    let mut fresh = Fresh {
        endpoint,
        keys,
        buffers,
        pd,
    };
    fresh.post_messages()?;
    Ok(fresh)
}

/// Waits for an event of the connection.
fn expect(id: &Id, wanted: Happened, deadline: Instant) -> Result<(), DialError> {
    loop {
        if let Some(event) = id.events().next()? {
            return match event.happened {
                happened if happened == wanted => Ok(()),
                Happened::Rejected => Err(DialError::Io(io::Error::new(
                    io::ErrorKind::ConnectionRefused,
                    "nobody takes RDMA connections there",
                ))),
                Happened::Other(number) => {
                    let status = match event.status {
                        0 => String::new(),
                        status if status < 0 => {
                            format!(": {}", io::Error::from_raw_os_error(-status))
                        }
                        status => format!(": status {status}"),
                    };
                    let text = format!("{}{status}", describe(number));
                    Err(DialError::Io(io::Error::other(text)))
                }
                _ => Err(DialError::Io(io::ErrorKind::ConnectionReset.into())),
            };
        }
        let fd = id.events().as_fd();
        wait_any(&[fd, fd, fd], Some(left(deadline)?))?;
    }
}

/// Whether this side's greeting is on its way.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sent {
    Nothing,
    Greeting,
}

struct Greeted {
    peer: Greeting,
    /// Our own greeting has not completed.
    is_out: bool,
}

/// How long the dialling side waits for an answer before it makes itself noticed; each time twice as long.
const NUDGE_AFTER: Duration = Duration::from_millis(200);

/// Waits for the peer's greeting.
///
/// Soft-iWARP does not look at what arrives between its answer to a connection and taking the connection over (Linux 6.12): the greeting then
/// lies in the peer's socket until something follows it. So something follows.
fn greeting(fresh: &mut Fresh, deadline: Instant, sent: Sent) -> Result<Greeted, EstablishError> {
    let io = |error: io::Error| EstablishError::Channel(ChannelError::Io(Arc::new(error)));
    let mut is_out = sent == Sent::Greeting;
    let mut nudges = match sent {
        Sent::Greeting => NUDGES_MAX,
        Sent::Nothing => 0,
    };
    let (mut pause, mut quiet_since) = (NUDGE_AFTER, Instant::now());
    loop {
        fresh.endpoint.arm().map_err(io)?;
        let mut found = [Completion::default()];
        while fresh.endpoint.poll(&mut found).map_err(io)? == 1 {
            let [completion] = found;
            if completion.status != 0 {
                let text = describe_status(completion.status);
                return Err(io(io::Error::other(text)));
            }
            if completion.id > u64::from(u32::MAX) {
                is_out = false;
                continue;
            }
            let peer = fresh
                .read_greeting(completion.id as u32, completion.byte_len)
                .map_err(protocol)?;
            return Ok(Greeted { peer, is_out });
        }
        while let Some(event) = fresh.endpoint.id().events().next().map_err(io)? {
            if event.happened != Happened::Established {
                return Err(EstablishError::Channel(ChannelError::Reset {
                    bytes_done: 0,
                }));
            }
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(EstablishError::Deadline);
        }
        let mut at_most = left;
        if nudges > 0 {
            if quiet_since.elapsed() >= pause {
                fresh.nudge();
                (pause, quiet_since) = (2 * pause, Instant::now());
                nudges -= 1;
            }
            at_most = left.min(pause.saturating_sub(quiet_since.elapsed()));
        }
        let completions = fresh.endpoint.as_fd();
        let events = fresh.endpoint.id().events().as_fd();
        wait_any(&[completions, events, events], Some(at_most)).map_err(io)?;
    }
}

#[cfg(test)]
#[path = "hostile.rs"]
mod hostile;
