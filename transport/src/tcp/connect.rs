//! Connecting to the addresses of a name: one after the other, a little apart, and the first that answers wins (RFC 8305).
//!
//! Rule: an address that never answers costs [`STAGGER`], and nothing at all once another one of the name has worked.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use socket2::Socket;

use super::{OptionRefused, TcpOptions, socket};
use crate::address::HostPort;
use crate::error::{ConnectAttempt, ConnectError};
use crate::resolve::Resolver;
use crate::sys::{self, Ready};

/// How long one address may be alone in the race (RFC 8305 section 5).
const STAGGER: Duration = Duration::from_millis(250);

/// Connects, and makes something of the connected, blocking socket.
///
/// A host name is looked up on a thread of its own, since the system's resolver knows no deadline; if it is passed, that thread ends when
/// the resolver does.
pub(crate) fn connect_with<T>(
    target: &HostPort,
    options: &TcpOptions,
    resolver: &Resolver,
    deadline: Instant,
    make: impl Fn(Socket) -> io::Result<T>,
) -> Result<T, ConnectError> {
    let mut race = Race {
        waiting: resolver.resolve(target, deadline)?.into(),
        under_way: Vec::new(),
        next_due: Instant::now(),
        attempts: Vec::new(),
    };
    let option = |refused: OptionRefused| ConnectError::Option {
        target: target.to_string(),
        option: refused.option,
        cause: refused.source,
    };
    loop {
        let now = Instant::now();
        if now >= deadline {
            return Err(race.out_of_time(target));
        }
        if race.is_over() {
            return Err(ConnectError::Refused {
                target: target.to_string(),
                attempts: race.attempts,
            });
        }
        race.start_next(options, now).map_err(option)?;
        let wake = if race.waiting.is_empty() {
            deadline
        } else {
            deadline.min(race.next_due)
        };
        let winner = race.wait(wake).map_err(|cause| ConnectError::Refused {
            target: target.to_string(),
            attempts: vec![ConnectAttempt {
                address: target.to_string(),
                cause,
            }],
        })?;
        let Some((address, socket)) = winner else {
            continue;
        };
        options.fit(&socket).map_err(option)?;
        match socket.set_nonblocking(false).and_then(|()| make(socket)) {
            Ok(made) => {
                resolver.worked(target, address);
                return Ok(made);
            }
            Err(cause) => race.failed(address, cause),
        }
    }
}

/// The addresses of one name, as far as each has come.
struct Race {
    waiting: VecDeque<SocketAddr>,
    under_way: Vec<(SocketAddr, Socket)>,
    /// When the next one may start.
    next_due: Instant,
    attempts: Vec<ConnectAttempt>,
}

impl Race {
    fn is_over(&self) -> bool {
        self.waiting.is_empty() && self.under_way.is_empty()
    }

    fn failed(&mut self, address: SocketAddr, cause: io::Error) {
        self.attempts.push(ConnectAttempt {
            address: address.to_string(),
            cause,
        });
        // Nobody stands in the way of the next one.
        self.next_due = Instant::now();
    }

    /// Starts the next address if it is due, or nothing else is under way.
    fn start_next(&mut self, options: &TcpOptions, now: Instant) -> Result<(), OptionRefused> {
        while self.under_way.is_empty() || now >= self.next_due {
            let Some(address) = self.waiting.pop_front() else {
                return Ok(());
            };
            let begun = socket(address).and_then(|socket| {
                socket.set_nonblocking(true)?;
                Ok(socket)
            });
            let socket = match begun {
                Ok(socket) => socket,
                Err(cause) => {
                    self.failed(address, cause);
                    continue;
                }
            };
            options.apply(&socket)?;
            match socket.connect(&address.into()) {
                Err(cause) if cause.raw_os_error() != Some(libc::EINPROGRESS) => {
                    self.failed(address, cause);
                }
                _ => {
                    self.under_way.push((address, socket));
                    self.next_due = now + STAGGER;
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Waits until one has an answer, at most until `wake`; gives the one that is connected.
    fn wait(&mut self, wake: Instant) -> io::Result<Option<(SocketAddr, Socket)>> {
        let sockets: Vec<_> = self
            .under_way
            .iter()
            .map(|(_, socket)| socket.as_fd())
            .collect();
        let left = wake.saturating_duration_since(Instant::now());
        let ready = sys::wait_for_some(&sockets, Ready::Send, left)?;
        // The last first, so that the indices of the others stay.
        for index in ready.into_iter().rev() {
            let (address, socket) = self.under_way.remove(index);
            match socket.take_error() {
                Ok(None) => return Ok(Some((address, socket))),
                Ok(Some(cause)) | Err(cause) => self.failed(address, cause),
            }
        }
        Ok(None)
    }

    fn out_of_time(mut self, target: &HostPort) -> ConnectError {
        let silent = |(address, _): (SocketAddr, Socket)| ConnectAttempt {
            address: address.to_string(),
            cause: io::Error::new(io::ErrorKind::TimedOut, "no answer"),
        };
        self.attempts.extend(self.under_way.into_iter().map(silent));
        ConnectError::Deadline {
            target: target.to_string(),
            attempts: self.attempts,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::OnceLock;

    use socket2::{Domain, Type};

    use super::*;

    /// A port at which the kernel drops what comes: a queue for one connection that nobody accepts.
    struct Silent {
        address: SocketAddr,
        _held: Vec<Socket>,
    }

    impl Silent {
        fn new() -> Self {
            let listening = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
            listening.bind(&any.into()).unwrap();
            listening.listen(0).unwrap();
            let address = listening.local_addr().unwrap().as_socket().unwrap();
            let mut held = vec![listening];
            loop {
                let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
                let taken = socket.connect_timeout(&address.into(), Duration::from_millis(100));
                held.push(socket);
                if taken.is_err() {
                    return Self {
                        address,
                        _held: held,
                    };
                }
            }
        }
    }

    fn dial(resolver: &Resolver, within: Duration) -> Result<SocketAddr, ConnectError> {
        let name = "destination:1".parse().unwrap();
        let options = TcpOptions::default();
        connect_with(
            &name,
            &options,
            resolver,
            Instant::now() + within,
            |socket| {
                assert!(!socket.nonblocking()?);
                Ok(socket
                    .peer_addr()?
                    .as_socket()
                    .expect("an internet address"))
            },
        )
    }

    #[test]
    fn a_dead_address_of_a_name_holds_up_the_first_channel_a_moment_and_the_next_not_at_all() {
        static ADDRESSES: OnceLock<Vec<SocketAddr>> = OnceLock::new();
        let (dead, alive) = (Silent::new(), TcpListener::bind("127.0.0.1:0").unwrap());
        let alive = alive.local_addr().map(|address| (address, alive)).unwrap();
        ADDRESSES.set(vec![dead.address, alive.0]).unwrap();
        let resolver = Resolver::with_lookup(|_| Ok(ADDRESSES.get().cloned().unwrap_or_default()));
        let start = Instant::now();
        // An even share of the time for each address would be half a minute for the dead one.
        assert_eq!(dial(&resolver, Duration::from_secs(60)).unwrap(), alive.0);
        let first = start.elapsed();
        assert!(
            first >= STAGGER && first < Duration::from_secs(20),
            "{first:?}"
        );
        // A busy machine makes one slow, not all.
        let next = (0..5).map(|_| {
            let start = Instant::now();
            assert_eq!(dial(&resolver, Duration::from_secs(60)).unwrap(), alive.0);
            start.elapsed()
        });
        let next = next.min().unwrap();
        assert!(next < STAGGER, "{next:?}");
    }

    #[test]
    fn addresses_that_refuse_are_all_named_without_waiting() {
        fn unused() -> SocketAddr {
            // Bound and not listening, for good: nobody else gets the port meanwhile.
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
            socket.bind(&any.into()).unwrap();
            let address = socket.local_addr().unwrap().as_socket().unwrap();
            std::mem::forget(socket);
            address
        }
        static ADDRESSES: OnceLock<Vec<SocketAddr>> = OnceLock::new();
        ADDRESSES.set(vec![unused(), unused()]).unwrap();
        let resolver = Resolver::with_lookup(|_| Ok(ADDRESSES.get().cloned().unwrap_or_default()));
        let error = dial(&resolver, Duration::from_secs(60)).unwrap_err();
        let ConnectError::Refused { attempts, .. } = error else {
            panic!("{error}")
        };
        assert_eq!(attempts.len(), 2);
    }

    #[test]
    fn at_the_deadline_those_that_did_not_answer_are_named() {
        static ADDRESS: OnceLock<SocketAddr> = OnceLock::new();
        let dead = Silent::new();
        ADDRESS.set(dead.address).unwrap();
        let resolver = Resolver::with_lookup(|_| Ok(ADDRESS.get().copied().into_iter().collect()));
        let error = dial(&resolver, Duration::from_millis(100)).unwrap_err();
        let text = error.to_string();
        assert_eq!(error.code(), "connect-deadline");
        assert!(
            text.contains(&format!("{}: no answer", dead.address)),
            "{text}"
        );
    }
}
