//! How the sides start their threads: plainly, or as the embedder wants it (names, seccomp filters, CPU affinity).
//!
//! It lives here because every thread that a migration starts drives a channel or waits for one.

use std::io;
use std::thread::{Builder, JoinHandle};

/// Starts the threads of a migration.
pub trait Spawner: Send + Sync {
    /// Starts a thread that runs `body`. `name` says what it is for ("lane 3") and is at most 15 octets long, which is what
    /// the kernel keeps.
    ///
    /// # Errors
    /// What the system said; the migration then fails cleanly.
    fn spawn(&self, name: &str, body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>>;
}

/// Starts threads of the standard library.
#[derive(Debug, Clone, Copy, Default)]
pub struct StdSpawner;

impl Spawner for StdSpawner {
    fn spawn(&self, name: &str, body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
        Builder::new().name(name.to_owned()).spawn(body)
    }
}
