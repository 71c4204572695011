//! The lobby: connections that have not shown what they come for.
//!
//! Rule: a connection costs a descriptor here, and what its kind needs for a handshake, and no thread. Whoever comes is let in;
//! if there is no room, somebody of the address with the most connections here has to go, the one that has waited longest. So an
//! honest peer, which says hello within a round trip, is heard however many strangers stand about, from elsewhere or from its own
//! address.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use multifd_transport::{Approach, Channel};
use multifd_wire::HELLO_BYTES;

/// Connections that may wait here. Each may hold 64 KiB of a TLS handshake at most.
pub(super) const LOBBY_MAX: usize = 512;

/// With more than this many, nobody is waited for longer than [`UNDER_PRESSURE`].
const CROWDED: usize = LOBBY_MAX / 2;

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
pub(super) struct Guest {
    pub(super) channel: Box<dyn Channel>,
    origin: Origin,
    since: Instant,
    stands: Stands,
    /// The descriptor at which events of it are waited for.
    pub(super) watched: Option<RawFd>,
}

/// What a connection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stands {
    /// Its hello.
    Silent,
    /// A greeter: its hello is here.
    Ready,
    /// A greeter, who will find out.
    Unknown,
}

/// Where a connection stands after it was looked at.
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
pub(super) struct Lobby {
    guests: BTreeMap<usize, Guest>,
    next: usize,
}

impl Lobby {
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
        let guest = Guest {
            channel,
            origin,
            since: now,
            stands: Stands::Silent,
            watched: None,
        };
        self.guests.insert(id, guest);
        let evicted = (self.guests.len() > LOBBY_MAX).then(|| self.evict());
        (id, evicted.flatten())
    }

    /// Lets the oldest of those go who are most; one that has said hello only if all of them have.
    pub(super) fn evict(&mut self) -> Option<Box<dyn Channel>> {
        let mut crowds = BTreeMap::<Origin, usize>::new();
        for guest in self.guests.values() {
            *crowds.entry(guest.origin).or_default() += 1;
        }
        let (most, _) = crowds.into_iter().max_by_key(|(_, count)| *count)?;
        let theirs = |ready: bool| {
            let is_ready = |guest: &Guest| guest.stands == Stands::Ready;
            let mut guests = self.guests.iter();
            guests.find(|(_, guest)| guest.origin == most && is_ready(guest) == ready)
        };
        let (&id, _) = theirs(false).or_else(|| theirs(true))?;
        self.guests.remove(&id).map(|guest| guest.channel)
    }

    /// Looks how far a connection has come.
    pub(super) fn look(&mut self, id: usize) -> Seen {
        let Some(guest) = self.guests.get_mut(&id) else {
            return Seen::Gone;
        };
        match guest.channel.approach(HELLO_BYTES) {
            Approach::Here => guest.stands = Stands::Ready,
            Approach::Unknown => guest.stands = Stands::Unknown,
            Approach::Waiting(socket) => {
                let socket = socket.as_raw_fd();
                guest.watched = Some(socket);
                return Seen::Waits(socket);
            }
            Approach::Gone => {
                self.guests.remove(&id);
                return Seen::Gone;
            }
        }
        Seen::Ready
    }

    /// Takes the youngest out that can be greeted; only one that has said hello, unless `unknown` ones may go as well.
    pub(super) fn take_ready(&mut self, unknown: bool) -> Option<(usize, Guest)> {
        let may_go = |guest: &Guest| match guest.stands {
            Stands::Silent => false,
            Stands::Ready => true,
            Stands::Unknown => unknown,
        };
        let mut guests = self.guests.iter().rev();
        let (&id, _) = guests.find(|(_, guest)| may_go(guest))?;
        self.guests.remove(&id).map(|guest| (id, guest))
    }

    /// Puts one back for which there was no greeter.
    pub(super) fn put_back(&mut self, id: usize, guest: Guest) {
        self.guests.insert(id, guest);
    }

    /// Whether anybody waits for a greeter.
    pub(super) fn is_anybody_ready(&self) -> bool {
        let mut guests = self.guests.values();
        guests.any(|guest| guest.stands != Stands::Silent)
    }

    /// Lets one go.
    pub(super) fn forget(&mut self, id: usize) {
        self.guests.remove(&id);
    }

    /// When somebody's time will be over.
    pub(super) fn next_end(&self, patience: Duration) -> Option<Instant> {
        let patience = self.patience(patience);
        let oldest = self.guests.values().next()?;
        oldest.since.checked_add(patience)
    }

    /// Takes one out whose time is over.
    pub(super) fn expired(&mut self, patience: Duration, now: Instant) -> Option<Box<dyn Channel>> {
        let patience = self.patience(patience);
        let (&id, oldest) = self.guests.iter().next()?;
        if now.saturating_duration_since(oldest.since) < patience {
            return None;
        }
        self.guests.remove(&id).map(|guest| guest.channel)
    }

    fn patience(&self, patience: Duration) -> Duration {
        if self.guests.len() > CROWDED {
            patience.min(UNDER_PRESSURE)
        } else {
            patience
        }
    }
}

#[cfg(test)]
mod tests {
    use multifd_transport::{Channel, unix};

    use super::*;

    fn connection() -> Box<dyn Channel> {
        unix::pair().unwrap().0
    }

    #[test]
    fn an_address_with_many_connections_gives_way_to_one_with_few() {
        let (mut lobby, now) = (Lobby::default(), Instant::now());
        let honest = Origin::of("10.0.0.1:5");
        let (first, _) = lobby.admit(connection(), honest, now);
        for port in 0..2 * LOBBY_MAX {
            lobby.admit(connection(), Origin::of(&format!("10.0.0.2:{port}")), now);
        }
        assert_eq!(lobby.guests.len(), LOBBY_MAX);
        assert!(lobby.guests.contains_key(&first), "the one that was alone");
    }

    #[test]
    fn of_one_address_the_one_that_waited_longest_goes_and_none_that_said_hello() {
        let (mut lobby, now) = (Lobby::default(), Instant::now());
        for _ in 0..LOBBY_MAX {
            lobby.admit(connection(), Origin(None), now);
        }
        lobby.guests.get_mut(&0).unwrap().stands = Stands::Ready;
        let (last, evicted) = lobby.admit(connection(), Origin(None), now);
        assert!(evicted.is_some());
        assert!(lobby.guests.contains_key(&0) && lobby.guests.contains_key(&last));
        assert!(!lobby.guests.contains_key(&1));
        assert_eq!(lobby.take_ready(false).map(|(id, _)| id), Some(0));
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
        let (mut lobby, now) = (Lobby::default(), Instant::now());
        let patience = Duration::from_secs(5);
        for _ in 0..CROWDED {
            lobby.admit(connection(), Origin(None), now);
        }
        let later = now + UNDER_PRESSURE;
        assert!(lobby.expired(patience, later).is_none());
        lobby.admit(connection(), Origin(None), now);
        assert!(lobby.expired(patience, later).is_some());
        assert!(lobby.expired(patience, later).is_none(), "not crowded now");
        assert!(lobby.expired(patience, now + patience).is_some());
    }

    #[test]
    fn a_connection_is_ready_when_the_whole_hello_is_here() {
        let (ours, theirs) = unix::pair().unwrap();
        let (mut tx, rx, _) = theirs.split();
        let mut lobby = Lobby::default();
        let (id, _) = lobby.admit(ours, Origin(None), Instant::now());
        assert!(matches!(lobby.look(id), Seen::Waits(_)));
        tx.send(&[0; HELLO_BYTES - 1], &[]).unwrap();
        assert!(matches!(lobby.look(id), Seen::Waits(_)));
        tx.send(&[0], &[]).unwrap();
        assert_eq!(lobby.look(id), Seen::Ready);
        let (other, theirs) = unix::pair().unwrap();
        drop(theirs);
        let (id, _) = lobby.admit(other, Origin(None), Instant::now());
        assert_eq!(lobby.look(id), Seen::Gone);
        drop((tx, rx));
    }
}
