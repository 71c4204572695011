//! What is behind the lock: the streams, the monitor's connections, and what is known of how the migration goes.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar};
use std::time::Duration;

use multifd_transport::Closer;
use multifd_wire::frame::{OutcomeState, StreamEndKind};
use multifd_wire::{Reason, Role, SessionId, StreamId, Token};
use socket2::Socket;

use crate::keeper::Keeper;
use crate::machine::{Class, Streams, Via};
use crate::monitor;
use crate::report::Ended;
use crate::tap::{Kind, MainStream, Pages, ReturnPath, Seen, Stage};

/// What waits for one connection of the monitor.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    /// There may be room to read.
    pub(crate) read: Condvar,
    /// There may be something to write.
    pub(crate) write: Condvar,
}

/// One connection of the monitor.
pub(crate) struct Connection {
    pub(crate) gate: Arc<Gate>,
    /// `None` at the destination until it was made.
    pub(crate) socket: Option<Arc<Socket>>,
    pub(crate) opened: Duration,
    pub(crate) kind: Option<Kind>,
    pub(crate) main: Option<MainStream>,
    pub(crate) pages: Option<Pages>,
    pub(crate) path: ReturnPath,
    /// The monitor ended its direction, which is not passed on yet.
    pub(crate) ended: Option<(StreamEndKind, Duration)>,
    /// Both threads are to end.
    pub(crate) broken: bool,
    /// The peer's end was passed on to the monitor.
    pub(crate) told_end: bool,
    /// The monitor at the source has the last word of the one at the destination.
    pub(crate) told_shut: bool,
}

impl Connection {
    fn new(now: Duration) -> Self {
        Self {
            gate: Arc::default(),
            socket: None,
            opened: now,
            kind: None,
            main: None,
            pages: None,
            path: ReturnPath::new(),
            ended: None,
            broken: false,
            told_end: false,
            told_shut: false,
        }
    }
}

/// A lane that is up.
pub(crate) struct Link {
    pub(crate) closer: Closer,
    pub(crate) epoch: u64,
}

/// Everything behind the lock.
pub(crate) struct Core {
    pub(crate) role: Role,
    pub(crate) streams: Streams,
    pub(crate) connections: BTreeMap<u32, Connection>,
    /// Counts control channels; 0 before the first.
    pub(crate) epoch: u64,
    /// The control channel that is up.
    pub(crate) control: Option<Closer>,
    pub(crate) lanes: BTreeMap<Via, Link>,
    /// QEMU's first connection, or the newest that took its place.
    pub(crate) main: Option<u32>,
    /// How the migration ended at the destination, once known.
    pub(crate) outcome: Option<OutcomeState>,
    /// The outcome is to be said on the control channel.
    pub(crate) outcome_due: bool,
    /// The source has told its monitor, or the destination was told that it has.
    pub(crate) settled: bool,
    /// An ABORT that is to be said, after which the session is over.
    pub(crate) abort: Option<(Ended, Reason, String)>,
    /// The source asks how it ended instead of going on: the link was gone for too long at a moment at which the guest may run there.
    pub(crate) asking: bool,
    /// How this side ends. The first word counts.
    pub(crate) over: Option<(Ended, Option<String>)>,
    /// The link is gone since.
    pub(crate) away_since: Option<Duration>,
    pub(crate) away_max: Duration,
    /// Why the last attempt at a link came to nothing.
    pub(crate) no_link: Option<String>,
    pub(crate) lanes_lost: u64,
    pub(crate) resumes: u64,
    pub(crate) damaged: u64,
    pub(crate) round_trip: Option<Duration>,
    pub(crate) first_connection: Option<Duration>,
    /// At the source: who has QEMU's first connection as well, and what it needs to ask.
    pub(crate) keeper: Option<Keeper>,
    pub(crate) names: Option<(SessionId, Token)>,
}

impl Core {
    pub(crate) fn new(role: Role, streams: Streams) -> Self {
        Self {
            role,
            streams,
            connections: BTreeMap::new(),
            epoch: 0,
            control: None,
            lanes: BTreeMap::new(),
            main: None,
            outcome: None,
            outcome_due: false,
            settled: false,
            abort: None,
            asking: false,
            over: None,
            away_since: Some(Duration::ZERO),
            away_max: Duration::ZERO,
            no_link: None,
            lanes_lost: 0,
            resumes: 0,
            damaged: 0,
            round_trip: None,
            first_connection: None,
            keeper: None,
            names: None,
        }
    }

    /// A stream's connection, which is made if there is none.
    pub(crate) fn add_connection(&mut self, stream: u32, now: Duration) -> &mut Connection {
        self.first_connection.get_or_insert(now);
        self.connections
            .entry(stream)
            .or_insert_with(|| Connection::new(now))
    }

    /// This control channel is the one that is up.
    pub(crate) fn is_current(&self, epoch: u64) -> bool {
        self.epoch == epoch && self.control.is_some() && self.over.is_none()
    }

    /// A control channel came up.
    pub(crate) fn link_up(&mut self, closer: Closer, now: Duration) -> u64 {
        self.link_down(now);
        self.epoch += 1;
        self.control = Some(closer);
        if self.epoch > 1 {
            self.resumes += 1;
        }
        if let Some(since) = self.away_since.take()
            && self.epoch > 1
        {
            self.away_max = self.away_max.max(now.saturating_sub(since));
        }
        self.epoch
    }

    /// The control channel is gone: all lanes go with it, and everything that is not acknowledged is sent again.
    // SPEC: RESUME-2, CARRY-13
    pub(crate) fn link_down(&mut self, now: Duration) {
        if let Some(closer) = self.control.take() {
            closer.shutdown();
            self.away_since = Some(now);
        }
        for link in self.lanes.values() {
            link.closer.shutdown();
        }
        self.lanes.clear();
        self.streams.session_lost();
    }

    /// A lane is gone.
    pub(crate) fn lane_down(&mut self, via: Via, epoch: u64) {
        if self.lanes.get(&via).is_some_and(|link| link.epoch == epoch) {
            if let Some(link) = self.lanes.remove(&via) {
                link.closer.shutdown();
            }
            self.lanes_lost += u64::from(!self.settled);
            self.streams.lane_lost(via);
        }
    }

    /// The lowest lane carries no bulk while there are others for it.
    pub(crate) fn is_kept_free(&self, via: Via) -> bool {
        self.lanes.len() > 1 && self.lanes.keys().next() == Some(&via)
    }

    /// A stream's first bytes say what it is.
    pub(crate) fn recognise(&mut self, stream: u32, first: &[u8]) {
        let kind = Kind::of(first);
        let Some(connection) = self.connections.get_mut(&stream) else {
            return;
        };
        if connection.kind.is_some() {
            return;
        }
        connection.kind = Some(kind);
        match kind {
            Kind::QemuMain => {
                connection.main = Some(MainStream::new());
                self.main = Some(stream);
            }
            Kind::QemuRecovery if self.main.is_some() => {
                connection.main = Some(MainStream::recovery());
                self.main = Some(stream);
            }
            Kind::QemuPages => connection.pages = Some(Pages::new()),
            Kind::QemuRecovery | Kind::Other => {}
        }
        if self.role == Role::Source {
            let class = match kind {
                Kind::QemuMain | Kind::QemuRecovery => Class::Main,
                Kind::QemuPages => Class::Bulk,
                Kind::Other if stream == 0 => Class::Main,
                Kind::Other => Class::Urgent,
            };
            self.streams.set_class(StreamId::new(stream), class);
        }
    }

    /// How far the migration is. `None` when nothing says so: nobody connected, or what connected can't be read.
    pub(crate) fn stage(&self) -> Option<Stage> {
        let main = self.connections.get(&self.main?)?;
        main.main.as_ref().map(MainStream::stage)
    }

    /// Whether QEMU's end of a migration can be seen.
    pub(crate) fn is_read(&self) -> bool {
        self.main.is_some()
    }

    /// Whether the monitor must not hear yet that the peer's monitor ended this connection: the first one goes on, and nobody
    /// knows how the migration ended.
    // SPEC: CARRY-9
    pub(crate) fn holds_back_end(&self, stream: u32) -> bool {
        let Some(main) = self.main.filter(|main| *main != stream) else {
            return false;
        };
        let goes_on = |first: &Connection| !(first.told_end || first.broken);
        self.outcome.is_none() && self.connections.get(&main).is_some_and(goes_on)
    }

    /// Whether the destination's monitor can't have all that it needs to run the guest.
    pub(crate) fn is_safe(&self) -> bool {
        let untouched = self.connections.keys().all(|stream| {
            let outgoing = self.streams.outgoing(StreamId::new(*stream));
            outgoing.is_none_or(|outgoing| outgoing.read() == 0)
        });
        untouched || self.stage() == Some(Stage::Memory)
    }

    /// Post-copy has begun: connections may end and come again.
    pub(crate) fn is_post_copy(&self) -> bool {
        self.stage() == Some(Stage::PostCopy)
    }

    /// Breaks a connection of the monitor off.
    pub(crate) fn break_connection(&mut self, stream: u32) {
        if let Some(connection) = self.connections.get_mut(&stream) {
            connection.broken = true;
            if let Some(socket) = &connection.socket {
                monitor::break_off(socket);
            }
            connection.gate.read.notify_all();
            connection.gate.write.notify_all();
        }
    }

    /// The end of this side. Later words change nothing.
    pub(crate) fn end(&mut self, how: Ended, why: Option<String>) {
        self.over.get_or_insert((how, why));
    }

    /// The session is to end with an ABORT, and this side as `how`.
    pub(crate) fn give_up(&mut self, how: Ended, reason: Reason, why: String) {
        if self.over.is_none() && self.abort.is_none() {
            tracing::warn!(%why, "the migration ends");
            self.abort = Some((how, reason, why.clone()));
            if self.control.is_none() {
                self.gave_up(Duration::MAX);
            }
        }
    }

    /// The ABORT was said, or can't be. A source whose guest may run at the destination goes on to ask.
    // SPEC: CARRY-12
    pub(crate) fn gave_up(&mut self, now: Duration) {
        let Some((how, _, why)) = self.abort.take() else {
            return;
        };
        if self.must_ask() && how == Ended::Failed {
            self.asking = true;
            self.link_down(now);
        } else {
            self.end(how, Some(why));
        }
    }

    /// Whether this is a source that may not end its monitor's connections before it knows the outcome.
    pub(crate) fn must_ask(&self) -> bool {
        self.role == Role::Source && self.outcome.is_none() && !self.is_safe()
    }

    /// What the taps saw, all together.
    pub(crate) fn seen(&self) -> (Seen, Option<&'static str>) {
        let taps = self.connections.values();
        let seen = taps.fold(Seen::default(), |seen, connection| {
            let main = connection.main.as_ref().map(MainStream::seen);
            let pages = connection.pages.as_ref().map(Pages::seen);
            seen.and(main.unwrap_or_default())
                .and(pages.unwrap_or_default())
        });
        let mut mains = self.connections.values().filter_map(|c| c.main.as_ref());
        let stopped = mains.find_map(MainStream::stopped);
        (
            seen,
            if self.is_read() {
                stopped
            } else {
                Some("it is no QEMU, or protected inside")
            },
        )
    }
}
