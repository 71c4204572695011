//! Names of hosts to addresses: on a thread of its own under a deadline, and which address of a name worked last.
//!
//! Rule: what is remembered only changes the order in which addresses are tried. A name is looked up anew for every connection, and an
//! address that the lookup no longer gives is not tried.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Instant;

use crate::address::HostPort;
use crate::error::ConnectError;
use crate::spawn::{Spawner, StdSpawner};

/// Names of which the address that worked is remembered. A migration dials two or three.
const NAMES_MAX: usize = 16;

/// Looks host names up. Clones share what is remembered.
#[derive(Clone)]
pub(crate) struct Resolver {
    spawner: Arc<dyn Spawner>,
    lookup: fn(&HostPort) -> io::Result<Vec<SocketAddr>>,
    worked: Arc<Mutex<Vec<(HostPort, SocketAddr)>>>,
}

impl Default for Resolver {
    fn default() -> Self {
        Self::new(Arc::new(StdSpawner))
    }
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver").finish_non_exhaustive()
    }
}

impl Resolver {
    /// The resolver of the system, called on threads of this spawner.
    pub(crate) fn new(spawner: Arc<dyn Spawner>) -> Self {
        Self {
            spawner,
            lookup: |target| Ok((target.host(), target.port()).to_socket_addrs()?.collect()),
            worked: Arc::default(),
        }
    }

    /// Another way to look names up, for tests.
    #[cfg(test)]
    pub(crate) fn with_lookup(lookup: fn(&HostPort) -> io::Result<Vec<SocketAddr>>) -> Self {
        Self {
            lookup,
            ..Self::default()
        }
    }

    /// Whoever starts the threads.
    pub(crate) fn spawner(&self) -> &dyn Spawner {
        &*self.spawner
    }

    /// All addresses of the host, at least one: first the one that worked last, then IPv6 and IPv4 in turn (RFC 8305 section 4),
    /// otherwise in the order of the lookup.
    pub(crate) fn resolve(
        &self,
        target: &HostPort,
        deadline: Instant,
    ) -> Result<Vec<SocketAddr>, ConnectError> {
        let failed = |cause| ConnectError::Resolve {
            host: target.host().to_owned(),
            cause,
        };
        if let Ok(address) = target.host().parse::<IpAddr>() {
            let address = SocketAddr::new(address, target.port());
            check_zone(&address).map_err(failed)?;
            return Ok(vec![address]);
        }
        let (found, answer) = mpsc::sync_channel(1);
        let (query, lookup) = (target.clone(), self.lookup);
        let body = Box::new(move || {
            // Nobody waits any more if the deadline has passed.
            let _ = found.send(lookup(&query));
        });
        self.spawner.spawn("mfd-resolve", body).map_err(failed)?;
        let left = deadline.saturating_duration_since(Instant::now());
        let addresses = match answer.recv_timeout(left) {
            Ok(addresses) => addresses.map_err(failed)?,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                return Err(ConnectError::Deadline {
                    target: target.to_string(),
                    attempts: Vec::new(),
                });
            }
            // A filter of the embedder's, say, ended the thread.
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                let text = "the thread that was to look it up ended without an answer";
                return Err(failed(io::Error::other(text)));
            }
        };
        if addresses.is_empty() {
            let text = "the name has no address";
            return Err(failed(io::Error::new(io::ErrorKind::NotFound, text)));
        }
        if let [only] = addresses.as_slice() {
            check_zone(only).map_err(failed)?;
        }
        let mut addresses = in_turn(addresses);
        if let Some(worked) = self.remembered(target)
            && let Some(at) = addresses.iter().position(|address| *address == worked)
        {
            addresses[..=at].rotate_right(1);
        }
        Ok(addresses)
    }

    /// A connection to this address of the name stands.
    pub(crate) fn worked(&self, target: &HostPort, address: SocketAddr) {
        let mut worked = self.worked.lock().unwrap_or_else(PoisonError::into_inner);
        worked.retain(|(name, _)| name != target);
        worked.truncate(NAMES_MAX - 1);
        worked.insert(0, (target.clone(), address));
    }

    fn remembered(&self, target: &HostPort) -> Option<SocketAddr> {
        let worked = self.worked.lock().unwrap_or_else(PoisonError::into_inner);
        let found = worked.iter().find(|(name, _)| name == target);
        found.map(|(_, address)| *address)
    }
}

/// Both families in turn, beginning with that of the first.
fn in_turn(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let first_is_v6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (one, other): (Vec<_>, Vec<_>) = addresses
        .into_iter()
        .partition(|address| address.is_ipv6() == first_is_v6);
    let (mut one, mut other) = (one.into_iter(), other.into_iter());
    let mut all = Vec::new();
    loop {
        let (next, after) = (one.next(), other.next());
        if next.is_none() && after.is_none() {
            return all;
        }
        all.extend(next.into_iter().chain(after));
    }
}

/// A link-local address means something only together with an interface, and the kernel says `Invalid argument` without one.
fn check_zone(address: &SocketAddr) -> io::Result<()> {
    match address {
        SocketAddr::V6(v6) if v6.ip().is_unicast_link_local() && v6.scope_id() == 0 => {
            let (ip, port) = (v6.ip(), v6.port());
            let text = format!(
                "it is a link-local address, which every interface has its own of: name the interface, as in [{ip}%eth0]:{port}"
            );
            Err(io::Error::new(io::ErrorKind::InvalidInput, text))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn families_take_turns_and_what_worked_comes_first() {
        fn lookup(_: &HostPort) -> io::Result<Vec<SocketAddr>> {
            Ok(addresses(&["[::1]:1", "[::2]:1", "1.1.1.1:1", "2.2.2.2:1"]))
        }
        let resolver = Resolver::with_lookup(lookup);
        let name = "name:1".parse().unwrap();
        let order = resolver.resolve(&name, soon()).unwrap();
        let turns = addresses(&["[::1]:1", "1.1.1.1:1", "[::2]:1", "2.2.2.2:1"]);
        assert_eq!(order, turns);
        resolver.worked(&name, turns[2]);
        let order = resolver.clone().resolve(&name, soon()).unwrap();
        assert_eq!(
            order,
            addresses(&["[::2]:1", "[::1]:1", "1.1.1.1:1", "2.2.2.2:1"])
        );
        resolver.worked(&name, "9.9.9.9:9".parse().unwrap());
        assert_eq!(
            resolver.resolve(&name, soon()).unwrap(),
            turns,
            "an address that the name no longer has is not tried"
        );
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let resolver = Resolver::default();
        for port in 0..100 {
            let name = format!("name:{port}").parse().unwrap();
            resolver.worked(&name, SocketAddr::from(([127, 0, 0, 1], port)));
        }
        let worked = resolver.worked.lock().unwrap();
        assert_eq!(worked.len(), NAMES_MAX);
        assert_eq!(worked[0].1.port(), 99, "the newest are kept");
    }

    #[test]
    fn the_thread_is_started_by_the_spawner_given() {
        static STARTED: AtomicUsize = AtomicUsize::new(0);
        struct Counting;
        impl Spawner for Counting {
            fn spawn(
                &self,
                name: &str,
                body: Box<dyn FnOnce() + Send>,
            ) -> io::Result<std::thread::JoinHandle<()>> {
                assert_eq!(name, "mfd-resolve");
                STARTED.fetch_add(1, Ordering::SeqCst);
                StdSpawner.spawn(name, body)
            }
        }
        let mut resolver = Resolver::with_lookup(|_| Ok(addresses(&["127.0.0.1:1"])));
        resolver.spawner = Arc::new(Counting);
        resolver
            .resolve(&"name:1".parse().unwrap(), soon())
            .unwrap();
        assert_eq!(STARTED.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_thread_that_dies_is_an_error_at_once_and_no_wait() {
        struct Killing;
        impl Spawner for Killing {
            fn spawn(
                &self,
                name: &str,
                body: Box<dyn FnOnce() + Send>,
            ) -> io::Result<std::thread::JoinHandle<()>> {
                drop(body);
                StdSpawner.spawn(name, Box::new(|| ()))
            }
        }
        let resolver = Resolver::new(Arc::new(Killing));
        let far = Instant::now() + Duration::from_secs(3600);
        let error = resolver.resolve(&"name:1".parse().unwrap(), far);
        assert_eq!(error.unwrap_err().code(), "connect-resolve");
    }
}
