//! How the sides start their threads: plainly, or as the embedder wants it (names, seccomp filters, CPU affinity).
//!
//! It lives here because every thread that a migration starts drives a channel or waits for one.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// Starts the threads of a migration.
pub trait Spawner: Send + Sync {
    /// Starts a thread that runs `body`. `name` says what it is for ("lane 3") and is at most 15 bytes long, which is what
    /// the kernel keeps.
    ///
    /// # Errors
    /// What the system said; the migration then fails cleanly.
    fn spawn(&self, name: &str, body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>>;
}

impl<S: Spawner + ?Sized> Spawner for Arc<S> {
    fn spawn(&self, name: &str, body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
        (**self).spawn(name, body)
    }
}

/// Starts a thread that works on `value`, and gives the value back if there is no thread.
///
/// # Errors
/// What the system said, with the value.
pub fn spawn_with<T: Send + 'static>(
    spawner: &dyn Spawner,
    name: &str,
    value: T,
    body: impl FnOnce(T) + Send + 'static,
) -> Result<JoinHandle<()>, (io::Error, T)> {
    let slot = Arc::new(Mutex::new(Some(value)));
    let take = |slot: &Mutex<Option<T>>| slot.lock().unwrap_or_else(PoisonError::into_inner).take();
    let theirs = Arc::clone(&slot);
    let started = spawner.spawn(
        name,
        Box::new(move || {
            if let Some(value) = take(&theirs) {
                body(value);
            }
        }),
    );
    started.map_err(|error| match take(&slot) {
        Some(value) => (error, value),
        // A spawner that runs the body and then says that it could not: the thread is there.
        None => unreachable!("a thread that was not started took nothing"),
    })
}

/// Starts threads of the standard library.
#[derive(Debug, Clone, Copy, Default)]
pub struct StdSpawner;

impl Spawner for StdSpawner {
    fn spawn(&self, name: &str, body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
        Builder::new().name(name.to_owned()).spawn(body)
    }
}

/// Waits for a thread to end, so long at most; gives it back if it does not. A thread may be stuck in a page fault that is never
/// served, and one that the kernel killed (a seccomp filter does) never counts as ended: to join it would take for ever, or panic.
///
/// `meanwhile` is called again and again and should take a millisecond or so: what the thread waits for may have to be done.
///
/// # Errors
/// The thread, if it has not ended by then.
pub fn join_within(
    thread: JoinHandle<()>,
    limit: Duration,
    mut meanwhile: impl FnMut(),
) -> Result<(), JoinHandle<()>> {
    let until = Instant::now() + limit;
    while !thread.is_finished() {
        if Instant::now() >= until {
            return Err(thread);
        }
        meanwhile();
    }
    // A panic was reported when it happened.
    let _ = thread.join();
    Ok(())
}

/// CPU time of this thread since `last`, which is moved on.
pub fn thread_cpu(last: &mut Duration) -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    let now = Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    );
    let spent = now.saturating_sub(*last);
    *last = now;
    spent
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_does_not_end_is_given_back_and_one_that_does_is_joined() {
        let (go, gone) = std::sync::mpsc::channel::<()>();
        let nap = || std::thread::sleep(Duration::from_millis(1));
        let thread = std::thread::spawn(move || {
            let _ = gone.recv();
        });
        let Err(thread) = join_within(thread, Duration::from_millis(5), nap) else {
            panic!("it waits for us");
        };
        drop(go);
        assert!(join_within(thread, Duration::from_secs(60), nap).is_ok());
    }
}
