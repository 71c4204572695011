//! Threads that never come back: killed by the kernel as a seccomp filter does it, or asleep for ever as in a page fault that nobody
//! serves.

use std::io;
use std::thread::JoinHandle;

use multifd_sender as tx;
use multifd_transport::{Channel, ChannelError, Closer, IoSource, ReceiveHalf, SendHalf, Spawner};
use multifd_wire::ChannelRef;
use rustix::thread::{SecureComputingMode, set_secure_computing_mode};

use crate::tapped::{Tap, Tapped};

/// What becomes of a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// The kernel kills it, and it alone, at its next system call.
    Killed,
    /// It sleeps for ever.
    Asleep,
}

/// Both.
pub const LOSSES: [Loss; 2] = [Loss::Killed, Loss::Asleep];

impl Loss {
    /// This thread is lost here.
    ///
    /// # Panics
    /// If the kernel has no seccomp.
    pub fn happen(self) -> ! {
        if self == Self::Killed {
            // In this mode four system calls are left, and this is none of them. The thread ends, not the process.
            set_secure_computing_mode(SecureComputingMode::Strict).expect("seccomp");
            std::thread::yield_now();
            unreachable!("the kernel killed this thread");
        }
        loop {
            std::thread::park();
        }
    }
}

/// Starts threads; the one of this name is lost before it does anything.
pub struct Without {
    /// Its name.
    pub thread: &'static str,
    /// What becomes of it.
    pub loss: Loss,
}

impl Spawner for Without {
    fn spawn(&self, name: &str, body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
        let loss = (name == self.thread).then_some(self.loss);
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                if let Some(loss) = loss {
                    // What it holds it holds for ever.
                    std::mem::forget(body);
                    loss.happen();
                }
                body();
            })
    }
}

/// A dialer with a lane whose thread is lost while it sends.
pub struct LostInSend {
    /// The way to the destination.
    pub inner: Box<dyn tx::Dial>,
    /// On which channel.
    pub channel: ChannelRef,
    /// After so many sends.
    pub sends: u32,
    /// What becomes of it.
    pub loss: Loss,
}

impl tx::Dial for LostInSend {
    fn dial(
        &self,
        channel: ChannelRef,
        deadline: std::time::Instant,
    ) -> Result<Box<dyn Channel>, Box<dyn std::error::Error + Send + Sync>> {
        let inner = self.inner.dial(channel, deadline)?;
        if channel != self.channel {
            return Ok(inner);
        }
        let (left, loss) = (self.sends, self.loss);
        Ok(Box::new(Doomed { inner, left, loss }))
    }
}

struct Doomed {
    inner: Box<dyn Channel>,
    left: u32,
    loss: Loss,
}

impl Channel for Doomed {
    fn split(self: Box<Self>) -> (Box<dyn SendHalf>, Box<dyn ReceiveHalf>, Closer) {
        let (tx, rx, closer) = self.inner.split();
        let tap = Fatal {
            left: self.left,
            loss: self.loss,
        };
        (Box::new(Tapped::new(tx, tap)), rx, closer)
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

struct Fatal {
    left: u32,
    loss: Loss,
}

impl Tap for Fatal {
    fn send(
        &mut self,
        half: &mut dyn SendHalf,
        head: &[u8],
        body: &[IoSource<'_>],
    ) -> Result<(), ChannelError> {
        if self.left == 0 {
            self.loss.happen();
        }
        self.left -= 1;
        half.send(head, body)
    }
}

/// A VMM's call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// [`tx::Vmm::config`].
    Config,
    /// [`tx::Vmm::granted`].
    Granted,
    /// [`tx::Vmm::unused_pages`].
    UnusedPages,
    /// [`tx::Vmm::pause`].
    Pause,
    /// [`tx::Vmm::save`].
    Save,
    /// [`tx::Vmm::migrated`].
    Migrated,
}

/// A VMM of the source whose thread is lost in one of its calls.
pub struct LostInCall<V> {
    /// The machine.
    pub inner: V,
    /// In which call.
    pub call: Call,
    /// What becomes of the thread.
    pub loss: Loss,
}

impl<V> LostInCall<V> {
    fn lost_in(&self, call: Call) {
        if self.call == call {
            self.loss.happen();
        }
    }
}

impl<V: tx::Vmm> tx::Vmm for LostInCall<V> {
    fn config(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        self.lost_in(Call::Config);
        self.inner.config()
    }

    fn granted(&mut self, ticket: &tx::AskTicket) -> Result<(), tx::VmmError> {
        self.lost_in(Call::Granted);
        self.inner.granted(ticket)
    }

    fn unused_pages(&mut self) -> Result<Vec<multifd_tracking::Run>, tx::VmmError> {
        self.lost_in(Call::UnusedPages);
        self.inner.unused_pages()
    }

    fn pause(&mut self) -> Result<(), tx::VmmError> {
        self.lost_in(Call::Pause);
        self.inner.pause()
    }

    fn save(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        self.lost_in(Call::Save);
        self.inner.save()
    }

    fn resume(&mut self, proof: tx::Reclaimed) -> Result<(), tx::VmmError> {
        self.inner.resume(proof)
    }

    fn migrated(&mut self) {
        self.lost_in(Call::Migrated);
        self.inner.migrated();
    }
}
