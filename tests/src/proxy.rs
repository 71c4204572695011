//! An impairment proxy: real TCP connections on loopback that are cut, reset, held up, throttled, damaged or ended at a chosen byte.
//!
//! ```text
//!   source ──► proxy ──► destination        connection 0 is the control channel, 1 … are the lanes as they are dialled,
//!          ◄──       ◄──                    later numbers are those that were dialled again
//! ```
//! The rule it keeps: without a rule every byte passes, in order and unchanged. Each direction has a thread and one buffer.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use socket2::SockRef;

use crate::flow::{Flow, Place};

/// Bytes that are read at once.
const PIECE: usize = 16 << 10;

/// How often a thread looks whether the proxy has ended.
const LOOK: Duration = Duration::from_millis(20);

/// What happens to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Impairment {
    /// Both directions end, in an orderly way.
    Cut,
    /// Both ends find the connection reset.
    Reset,
    /// Nothing passes in this direction for a while.
    Stall(Duration),
    /// From here on so many bytes a second pass in this direction.
    Throttle(u64),
    /// The lowest bit of the byte is flipped.
    Flip,
    /// This direction ends, the other one goes on.
    Truncate,
}

/// Which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the source.
    Forth,
    /// From the destination.
    Back,
}

/// One thing that happens to one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// The connection, in the order in which they were made.
    pub connection: u32,
    /// The direction in which bytes are counted.
    pub direction: Direction,
    /// Bytes that pass before.
    pub after: u64,
    /// What then happens.
    pub impairment: Impairment,
}

/// A flipped bit: on which connection, and in what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flipped {
    /// The connection, in the order in which they were made.
    pub connection: u32,
    /// The lane that it is for, if it is one.
    pub lane: Option<u32>,
    /// Which way the byte went.
    pub direction: Direction,
    /// What it belonged to.
    pub place: Place,
}

struct Shared {
    rules: Vec<Rule>,
    happened: Mutex<Vec<Rule>>,
    flipped: Mutex<Vec<Flipped>>,
    connections: AtomicU32,
    ended: AtomicBool,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// The proxy. Ends its connections and threads when it is dropped.
pub struct Proxy {
    shared: Arc<Shared>,
    address: SocketAddr,
    accept: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Listens on a free port of loopback, and passes connections on to `target`.
    ///
    /// # Errors
    /// No port, or no thread.
    pub fn start(target: SocketAddr, rules: Vec<Rule>) -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            rules,
            happened: Mutex::new(Vec::new()),
            flipped: Mutex::new(Vec::new()),
            connections: AtomicU32::new(0),
            ended: AtomicBool::new(false),
            threads: Mutex::new(Vec::new()),
        });
        let theirs = Arc::clone(&shared);
        let accept = std::thread::Builder::new()
            .name("proxy-accept".into())
            .spawn(move || accept(&theirs, &listener, target))?;
        Ok(Self {
            shared,
            address,
            accept: Some(accept),
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The bits that were flipped by now.
    #[must_use]
    pub fn flipped(&self) -> Vec<Flipped> {
        self.shared
            .flipped
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The rules that were carried out by now.
    #[must_use]
    pub fn happened(&self) -> Vec<Rule> {
        self.shared
            .happened
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        if let Some(accept) = self.accept.take() {
            let _ = accept.join();
        }
        let threads = std::mem::take(
            &mut *self
                .shared
                .threads
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        for thread in threads {
            let _ = thread.join();
        }
    }
}

fn accept(shared: &Arc<Shared>, listener: &TcpListener, target: SocketAddr) {
    while !shared.ended.load(Ordering::SeqCst) {
        let Ok((near, _)) = listener.accept() else {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        };
        let number = shared.connections.fetch_add(1, Ordering::SeqCst);
        // Nobody listens there: the connection is closed again.
        let Ok(far) = TcpStream::connect(target) else {
            continue;
        };
        let _ = (
            near.set_nonblocking(false),
            near.set_nodelay(true),
            far.set_nodelay(true),
        );
        let (Ok(near_too), Ok(far_too)) = (near.try_clone(), far.try_clone()) else {
            continue;
        };
        let ways = [
            (Direction::Forth, near, far_too),
            (Direction::Back, far, near_too),
        ];
        let broken = Arc::new(AtomicBool::new(false));
        for (direction, from, to) in ways {
            let (theirs, broken) = (Arc::clone(shared), Arc::clone(&broken));
            let started = std::thread::Builder::new()
                .name("proxy".into())
                .spawn(move || {
                    if pass(&theirs, &broken, number, direction, from, to) == Way::Broken {
                        broken.store(true, Ordering::SeqCst);
                    }
                });
            if let Ok(thread) = started {
                shared
                    .threads
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(thread);
            }
        }
    }
}

/// How a direction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// In an orderly way; the other direction goes on.
    Ended,
    /// With a reset of the connection.
    Broken,
}

/// Passes bytes on in one direction, and does what the rules say.
fn pass(
    shared: &Shared,
    broken: &AtomicBool,
    number: u32,
    direction: Direction,
    mut from: TcpStream,
    mut to: TcpStream,
) -> Way {
    let mut rules: Vec<Rule> = shared
        .rules
        .iter()
        .copied()
        .filter(|rule| rule.connection == number && rule.direction == direction)
        .collect();
    rules.sort_by_key(|rule| rule.after);
    rules.reverse();
    let mut octets = vec![0; PIECE];
    let mut flow = Flow::new(direction);
    let (mut passed, mut rate) = (0u64, None);
    let _ = from.set_read_timeout(Some(LOOK));
    while !shared.ended.load(Ordering::SeqCst) && !broken.load(Ordering::SeqCst) {
        // Up to the next rule, so that it happens at its byte.
        let most = rules
            .last()
            .map_or(PIECE as u64, |rule| rule.after - passed);
        if most == 0
            && let Some(rule) = rules.pop()
        {
            if let Some(way) = happens(shared, rule, &mut flow, &mut from, &mut to, &mut rate) {
                return way;
            }
            passed += u64::from(rule.impairment == Impairment::Flip);
            continue;
        }
        let most = usize::try_from(most).unwrap_or(PIECE).min(PIECE);
        let count = match from.read(&mut octets[..most]) {
            Ok(0) => {
                let _ = to.shutdown(Shutdown::Write);
                return Way::Ended;
            }
            Ok(count) => count,
            Err(error) if is_timeout(&error) => continue,
            Err(_) => return reset(&from, &to),
        };
        flow.pass(&octets[..count]);
        if to.write_all(&octets[..count]).is_err() {
            return reset(&from, &to);
        }
        passed += count as u64;
        if let Some(rate) = rate {
            std::thread::sleep(Duration::from_secs_f64(count as f64 / rate as f64));
        }
    }
    reset(&from, &to)
}

/// Carries a rule out; says so when the direction has ended.
fn happens(
    shared: &Shared,
    rule: Rule,
    flow: &mut Flow,
    from: &mut TcpStream,
    to: &mut TcpStream,
    rate: &mut Option<u64>,
) -> Option<Way> {
    if rule.impairment == Impairment::Flip {
        // The byte itself has to come first.
        let mut octet = [0];
        loop {
            match from.read(&mut octet) {
                Ok(1..) => break,
                Err(error) if is_timeout(&error) && !shared.ended.load(Ordering::SeqCst) => {}
                _ => {
                    let _ = to.shutdown(Shutdown::Write);
                    return Some(Way::Ended);
                }
            }
        }
        let flipped = Flipped {
            connection: rule.connection,
            lane: flow.lane().filter(|_| rule.connection > 0),
            direction: rule.direction,
            place: flow.place(),
        };
        flow.pass(&octet);
        octet[0] ^= 1;
        if to.write_all(&octet).is_err() {
            return Some(reset(from, to));
        }
        shared
            .flipped
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(flipped);
    }
    shared
        .happened
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(rule);
    match rule.impairment {
        Impairment::Flip => None,
        Impairment::Cut => {
            let _ = (to.shutdown(Shutdown::Both), from.shutdown(Shutdown::Both));
            Some(Way::Ended)
        }
        Impairment::Reset => Some(reset(from, to)),
        Impairment::Truncate => {
            let _ = to.shutdown(Shutdown::Write);
            let _ = from.shutdown(Shutdown::Read);
            Some(Way::Ended)
        }
        Impairment::Throttle(octets_per_second) => {
            *rate = Some(octets_per_second.max(1));
            None
        }
        Impairment::Stall(time) => {
            let until = Instant::now() + time;
            while Instant::now() < until && !shared.ended.load(Ordering::SeqCst) {
                std::thread::sleep(LOOK.min(until.saturating_duration_since(Instant::now())));
            }
            None
        }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}

/// Closing with the linger time 0 resets a connection instead of ending it. It is closed when the other direction's thread, which
/// holds copies of both sockets, has seen that it is broken.
fn reset(from: &TcpStream, to: &TcpStream) -> Way {
    for socket in [from, to] {
        let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
    }
    Way::Broken
}
