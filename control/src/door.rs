//! The socket: whose it is, who is let in, and how many.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use multifd_transport::unix::{OwnPath, listen};
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::{Value, json};

use crate::session;
use crate::socket::{Patience, Stream};
use crate::status::End;
use crate::subject::Subject;

/// Clients at a time; one more is closed at once.
pub const CLIENTS_MAX: u32 = 8;

/// How long the end waits for those who watch to have been told.
const FAREWELL: Duration = Duration::from_secs(1);

/// How long a client may take for what it asked for, and may be there without asking anything.
const PATIENCE: Patience = Patience {
    write: Duration::from_secs(2),
    idle: Duration::from_secs(60),
};

/// A socket on which nobody is served yet. Dropping it removes its path.
pub struct Door {
    listener: UnixListener,
    path: OwnPath,
}

/// A socket that is served. Dropping it ends that.
pub struct Control {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    _path: OwnPath,
}

/// What all clients' threads share.
pub(crate) struct Shared {
    pub(crate) subject: Box<dyn Subject>,
    end: Mutex<Option<End>>,
    ended: Condvar,
    closing: Arc<AtomicBool>,
    clients: AtomicU32,
    watchers: AtomicU32,
}

/// One who watches, as long as it is told.
pub(crate) struct Watching<'s>(&'s Shared);

impl Door {
    /// Listens at this path: mode 0600, so its owner and root may connect. A stale socket is replaced. To be called before the
    /// program confines itself.
    ///
    /// # Errors
    /// The path can't be had.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let (listener, path) = listen(path)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path })
    }

    /// Serves this side of a migration, on threads of its own.
    ///
    /// # Errors
    /// No thread.
    pub fn serve(self, subject: impl Subject) -> io::Result<Control> {
        let shared = Arc::new(Shared {
            subject: Box::new(subject),
            end: Mutex::default(),
            ended: Condvar::new(),
            closing: Arc::default(),
            clients: AtomicU32::new(0),
            watchers: AtomicU32::new(0),
        });
        let (theirs, listener) = (Arc::clone(&shared), self.listener);
        let thread = Builder::new()
            .name("mfd-door".into())
            .spawn(move || accept(&theirs, &listener))?;
        Ok(Control {
            shared,
            thread: Some(thread),
            _path: self.path,
        })
    }
}

impl Control {
    /// It is over: those who watch are told how, within a second, and everybody is sent away.
    pub fn end(self, end: End) {
        *self.shared.lock() = Some(end);
        self.shared.ended.notify_all();
        let until = Instant::now() + FAREWELL;
        while self.shared.watchers.load(Ordering::Acquire) > 0 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Relaxed);
        self.shared.ended.notify_all();
        if let Some(thread) = self.thread.take() {
            // It has nothing that can panic; if it did, that changes nothing here.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Option<End>> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How it ended, if it has.
    pub(crate) fn end(&self) -> Option<End> {
        self.lock().clone()
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }

    /// How far it is, with how it ended.
    pub(crate) fn status(&self) -> Value {
        let mut status = self.subject.look().status();
        status["end"] = json!(self.end());
        status
    }

    /// Waits so long, or until it is over.
    pub(crate) fn wait_for_end(&self, time: Duration) {
        let _ = self
            .ended
            .wait_timeout_while(self.lock(), time, |end| end.is_none() && !self.is_closing());
    }

    pub(crate) fn watching(&self) -> Watching<'_> {
        self.watchers.fetch_add(1, Ordering::AcqRel);
        Watching(self)
    }
}

impl Drop for Watching<'_> {
    fn drop(&mut self) {
        self.0.watchers.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Lets clients in until it is over.
fn accept(shared: &Arc<Shared>, listener: &UnixListener) {
    while !shared.is_closing() {
        let mut wanted = [PollFd::new(listener, PollFlags::IN)];
        let wait = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 50_000_000,
        };
        // A signal, or nobody: it is looked again.
        let _ = poll(&mut wanted, Some(&wait));
        match listener.accept() {
            Ok((stream, _)) => admit(shared, stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                // Too many descriptors, for now.
                tracing::debug!(%error, "the control socket takes nobody");
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
}

/// A place among the clients, as long as it is held.
struct Place(Arc<Shared>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.clients.fetch_sub(1, Ordering::AcqRel);
    }
}

fn admit(shared: &Arc<Shared>, stream: UnixStream) {
    let place = Place(Arc::clone(shared));
    if shared.clients.fetch_add(1, Ordering::AcqRel) >= CLIENTS_MAX {
        tracing::debug!("the control socket has as many clients as it takes");
        return;
    }
    let closing = Arc::clone(&shared.closing);
    let Ok(stream) = Stream::new(stream, closing, PATIENCE) else {
        return;
    };
    let body = move || session::serve(&place.0, stream);
    if let Err(error) = Builder::new().name("mfd-client".into()).spawn(body) {
        tracing::debug!(%error, "no thread for a client of the control socket");
    }
}
