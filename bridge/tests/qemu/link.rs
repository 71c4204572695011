//! A link between the two bridges that can be cut, stand still, and be slow.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

#[derive(Default)]
struct State {
    /// New connections are closed at once.
    down: AtomicBool,
    /// Nothing moves.
    still: AtomicBool,
    /// Bytes a second over all connections; 0: no limit.
    rate: AtomicU64,
    /// When the next byte may go, with a limit.
    due: Mutex<Option<Instant>>,
    open: Mutex<Vec<TcpStream>>,
    carried: AtomicU64,
}

/// The link.
#[derive(Clone)]
pub(crate) struct Link {
    state: Arc<State>,
    pub(crate) port: u16,
}

impl Link {
    /// A link to a port of this host.
    pub(crate) fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let link = Self {
            port: listener.local_addr().unwrap().port(),
            state: Arc::default(),
        };
        let state = Arc::clone(&link.state);
        std::thread::spawn(move || {
            for incoming in listener.incoming().flatten() {
                if state.down.load(Ordering::SeqCst) {
                    continue;
                }
                let Ok(outgoing) = TcpStream::connect(("127.0.0.1", port)) else {
                    continue;
                };
                for stream in [&incoming, &outgoing] {
                    stream.set_nodelay(true).unwrap();
                    state.open.lock().unwrap().push(stream.try_clone().unwrap());
                }
                for (from, to) in [
                    (incoming.try_clone().unwrap(), outgoing.try_clone().unwrap()),
                    (outgoing, incoming),
                ] {
                    let state = Arc::clone(&state);
                    std::thread::spawn(move || pump(&state, from, to));
                }
            }
        });
        link
    }

    /// Cuts every connection, and takes none for a while.
    pub(crate) fn cut(&self, time: Duration) {
        self.down();
        std::thread::sleep(time);
        self.up();
    }

    pub(crate) fn down(&self) {
        self.state.down.store(true, Ordering::SeqCst);
        for stream in self.state.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    pub(crate) fn up(&self) {
        self.state.down.store(false, Ordering::SeqCst);
    }

    /// Nothing moves for a while.
    pub(crate) fn stand_still(&self, time: Duration) {
        self.state.still.store(true, Ordering::SeqCst);
        std::thread::sleep(time);
        self.state.still.store(false, Ordering::SeqCst);
    }

    /// Limits what all connections carry together.
    pub(crate) fn limit(&self, octets_per_second: u64) {
        self.state.rate.store(octets_per_second, Ordering::SeqCst);
    }

    /// Bytes that went over it.
    pub(crate) fn carried(&self) -> u64 {
        self.state.carried.load(Ordering::SeqCst)
    }
}

fn pump(state: &State, mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(bytes) = from.read(&mut buffer) {
        if bytes == 0 {
            break;
        }
        while state.still.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(2));
        }
        let rate = state.rate.load(Ordering::SeqCst);
        if rate > 0 {
            let mut due = state.due.lock().unwrap();
            let start = due.unwrap_or_else(Instant::now).max(Instant::now());
            let until = start + Duration::from_secs_f64(bytes as f64 / rate as f64);
            *due = Some(until);
            drop(due);
            std::thread::sleep(until.saturating_duration_since(Instant::now()));
        }
        state.carried.fetch_add(bytes as u64, Ordering::SeqCst);
        if to.write_all(&buffer[..bytes]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
