//! Pending hellos: connections that have not shown what they come for.
//!
//! Rule: a connection costs a descriptor here, and what its kind needs for a handshake, and no thread. Whoever comes is let in;
//! if there is no room, somebody of the address with the most connections here has to go, the one that has waited longest. So an
//! honest peer, which says hello within a round trip, is heard however many strangers stand about, from elsewhere or from its own
//! address.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use crate::{Approach, Channel};

/// Connections that may wait here. Each may hold 64 KiB of a TLS handshake at most.
pub const PENDING_MAX: usize = 512;

/// With more than this many, nobody is waited for longer than [`UNDER_PRESSURE`].
const CROWDED: usize = PENDING_MAX / 2;

/// How long a connection may be silent when many are.
const UNDER_PRESSURE: Duration = Duration::from_secs(1);

/// Who counts as one: an IPv4 address, or the network of an IPv6 address, of which one host has as many as it likes. `None` are
/// all that have no such address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Origin(Option<IpAddr>);

impl Origin {
    /// The origin of a peer that is called so.
    pub(super) fn of(peer: &str) -> Self {
        let address = peer.parse::<SocketAddr>().ok().map(|address| address.ip());
        Self(address.map(|address| match address.to_canonical() {
            IpAddr::V6(v6) => {
                let [a, b, c, d, ..] = v6.segments();
                IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
            }
            v4 @ IpAddr::V4(_) => v4,
        }))
    }
}

/// One connection.
pub(super) struct Pending {
    pub(super) channel: Box<dyn Channel>,
    origin: Origin,
    since: Instant,
    state: Stage,
    /// The descriptor at which events of it are waited for.
    pub(super) watched: Option<RawFd>,
}

/// What a connection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Its hello.
    Silent,
    /// A greeter: its hello is here.
    Ready,
    /// A greeter, who will find out.
    Unknown,
}

/// Where a connection state after it was looked at.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// It is to be looked at again when this descriptor is ready.
    Waits(RawFd),
    /// It can be greeted.
    Ready,
    /// It is gone, and was let go.
    Gone,
}

/// All that wait. A connection is known by a number that counts up, so the oldest has the lowest.
#[derive(Default)]
pub(super) struct PendingHellos {
    pending: BTreeMap<usize, Pending>,
    next: usize,
}

impl PendingHellos {
    /// Takes a connection in; `None` if there was room, or who has to go for it.
    pub(super) fn admit(
        &mut self,
        channel: Box<dyn Channel>,
        origin: Origin,
        now: Instant,
    ) -> (usize, Option<Box<dyn Channel>>) {
        let id = self.next;
        // It would take centuries to count to the end, which is kept for tokens of other kinds.
        self.next = self.next.wrapping_add(1) & (usize::MAX >> 1);
        let one = Pending {
            channel,
            origin,
            since: now,
            state: Stage::Silent,
            watched: None,
        };
        self.pending.insert(id, one);
        let evicted = (self.pending.len() > PENDING_MAX).then(|| self.evict());
        (id, evicted.flatten())
    }

    /// Lets the oldest of those go who are most; one that has said hello only if all of them have.
    pub(super) fn evict(&mut self) -> Option<Box<dyn Channel>> {
        let mut crowds = BTreeMap::<Origin, usize>::new();
        for one in self.pending.values() {
            *crowds.entry(one.origin).or_default() += 1;
        }
        let (most, _) = crowds.into_iter().max_by_key(|(_, count)| *count)?;
        let theirs = |ready: bool| {
            let is_ready = |one: &Pending| one.state == Stage::Ready;
            let mut pending = self.pending.iter();
            pending.find(|(_, one)| one.origin == most && is_ready(one) == ready)
        };
        let (&id, _) = theirs(false).or_else(|| theirs(true))?;
        self.pending.remove(&id).map(|one| one.channel)
    }

    /// Looks how far a connection has come.
    pub(super) fn look(&mut self, id: usize, hello_bytes: usize) -> Seen {
        let Some(one) = self.pending.get_mut(&id) else {
            return Seen::Gone;
        };
        match one.channel.approach(hello_bytes) {
            Approach::Here => one.state = Stage::Ready,
            Approach::Unknown => one.state = Stage::Unknown,
            Approach::Waiting(socket) => {
                let socket = socket.as_raw_fd();
                one.watched = Some(socket);
                return Seen::Waits(socket);
            }
            Approach::Gone => {
                self.pending.remove(&id);
                return Seen::Gone;
            }
        }
        Seen::Ready
    }

    /// Takes the youngest out that can be greeted; only one that has said hello, unless `unknown` ones may go as well.
    pub(super) fn take_ready(&mut self, unknown: bool) -> Option<(usize, Pending)> {
        let may_go = |one: &Pending| match one.state {
            Stage::Silent => false,
            Stage::Ready => true,
            Stage::Unknown => unknown,
        };
        let mut pending = self.pending.iter().rev();
        let (&id, _) = pending.find(|(_, one)| may_go(one))?;
        self.pending.remove(&id).map(|one| (id, one))
    }

    /// Puts one back for which there was no greeter.
    pub(super) fn put_back(&mut self, id: usize, one: Pending) {
        self.pending.insert(id, one);
    }

    /// Whether anybody waits for a greeter.
    pub(super) fn is_anybody_ready(&self) -> bool {
        let mut pending = self.pending.values();
        pending.any(|one| one.state != Stage::Silent)
    }

    /// Lets one go.
    pub(super) fn forget(&mut self, id: usize) {
        self.pending.remove(&id);
    }

    /// When somebody's time will be over.
    pub(super) fn next_end(&self, limit: Duration) -> Option<Instant> {
        let limit = self.limit(limit);
        let oldest = self.pending.values().next()?;
        oldest.since.checked_add(limit)
    }

    /// Takes one out whose time is over.
    pub(super) fn expired(&mut self, limit: Duration, now: Instant) -> Option<Box<dyn Channel>> {
        let limit = self.limit(limit);
        let (&id, oldest) = self.pending.iter().next()?;
        if now.saturating_duration_since(oldest.since) < limit {
            return None;
        }
        self.pending.remove(&id).map(|one| one.channel)
    }

    fn limit(&self, limit: Duration) -> Duration {
        if self.pending.len() > CROWDED {
            limit.min(UNDER_PRESSURE)
        } else {
            limit
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unix;

    const HELLO_BYTES: usize = 128;

    fn connection() -> Box<dyn Channel> {
        unix::pair().unwrap().0
    }

    #[test]
    fn an_address_with_many_connections_gives_way_to_one_with_few() {
        let (mut hellos, now) = (PendingHellos::default(), Instant::now());
        let honest = Origin::of("10.0.0.1:5");
        let (first, _) = hellos.admit(connection(), honest, now);
        for port in 0..2 * PENDING_MAX {
            hellos.admit(connection(), Origin::of(&format!("10.0.0.2:{port}")), now);
        }
        assert_eq!(hellos.pending.len(), PENDING_MAX);
        assert!(
            hellos.pending.contains_key(&first),
            "the one that was alone"
        );
    }

    #[test]
    fn of_one_address_the_one_that_waited_longest_goes_and_none_that_said_hello() {
        let (mut hellos, now) = (PendingHellos::default(), Instant::now());
        for _ in 0..PENDING_MAX {
            hellos.admit(connection(), Origin(None), now);
        }
        hellos.pending.get_mut(&0).unwrap().state = Stage::Ready;
        let (last, evicted) = hellos.admit(connection(), Origin(None), now);
        assert!(evicted.is_some());
        assert!(hellos.pending.contains_key(&0) && hellos.pending.contains_key(&last));
        assert!(!hellos.pending.contains_key(&1));
        assert_eq!(hellos.take_ready(false).map(|(id, _)| id), Some(0));
    }

    #[test]
    fn hosts_of_one_network_count_as_one() {
        assert_eq!(Origin::of("[2001:db8::1]:1"), Origin::of("[2001:db8::2]:2"));
        assert_ne!(
            Origin::of("[2001:db8::1]:1"),
            Origin::of("[2001:db8:0:1::1]:1")
        );
        assert_eq!(Origin::of("[::ffff:10.0.0.1]:1"), Origin::of("10.0.0.1:2"));
        assert_ne!(Origin::of("10.0.0.1:1"), Origin::of("10.0.0.2:1"));
    }

    #[test]
    fn nobody_is_waited_for_long_when_many_wait() {
        let (mut hellos, now) = (PendingHellos::default(), Instant::now());
        let limit = Duration::from_secs(5);
        for _ in 0..CROWDED {
            hellos.admit(connection(), Origin(None), now);
        }
        let later = now + UNDER_PRESSURE;
        assert!(hellos.expired(limit, later).is_none());
        hellos.admit(connection(), Origin(None), now);
        assert!(hellos.expired(limit, later).is_some());
        assert!(hellos.expired(limit, later).is_none(), "not crowded now");
        assert!(hellos.expired(limit, now + limit).is_some());
    }

    #[test]
    fn a_connection_is_ready_when_the_whole_hello_is_here() {
        let (ours, theirs) = unix::pair().unwrap();
        let (mut tx, rx, _) = theirs.split();
        let mut hellos = PendingHellos::default();
        let (id, _) = hellos.admit(ours, Origin(None), Instant::now());
        assert!(matches!(hellos.look(id, HELLO_BYTES), Seen::Waits(_)));
        tx.send(&[0; HELLO_BYTES - 1], &[]).unwrap();
        assert!(matches!(hellos.look(id, HELLO_BYTES), Seen::Waits(_)));
        tx.send(&[0], &[]).unwrap();
        assert_eq!(hellos.look(id, HELLO_BYTES), Seen::Ready);
        let (other, theirs) = unix::pair().unwrap();
        drop(theirs);
        let (id, _) = hellos.admit(other, Origin(None), Instant::now());
        assert_eq!(hellos.look(id, HELLO_BYTES), Seen::Gone);
        drop((tx, rx));
    }
}
