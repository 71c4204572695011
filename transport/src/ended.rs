//! A thread that works towards a result, and an event descriptor that says that it is over: for embedders that wait in an event
//! loop of their own.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use crate::{LOOK_MAX, Pulse, Silence, Spawner, join_within, spawn_with};

/// The watching side: readable once the [`EndGuard`] is gone, and from then on.
#[derive(Debug)]
pub struct Ended(Arc<State>);

/// The working side. Dropping it, also in a panic, is the end.
#[derive(Debug)]
pub struct EndGuard(Arc<State>);

#[derive(Debug)]
struct State {
    fd: OwnedFd,
    over: Mutex<bool>,
    changed: Condvar,
}

/// Both sides.
///
/// # Errors
/// No descriptor could be had.
pub fn ended() -> io::Result<(Ended, EndGuard)> {
    let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let state = Arc::new(State {
        fd,
        over: Mutex::new(false),
        changed: Condvar::new(),
    });
    Ok((Ended(Arc::clone(&state)), EndGuard(state)))
}

impl Ended {
    /// Whether it is over.
    #[must_use]
    pub fn is_over(&self) -> bool {
        *lock(&self.0.over)
    }

    /// Waits for the end, so long at most; whether it is over.
    #[must_use]
    pub fn wait(&self, time: Duration) -> bool {
        let over = lock(&self.0.over);
        let waited = self.0.changed.wait_timeout_while(over, time, |over| !*over);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

impl AsFd for Ended {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

impl Drop for EndGuard {
    fn drop(&mut self) {
        *lock(&self.0.over) = true;
        self.0.changed.notify_all();
        // A counter that was never written has room for 1, so this can't fail.
        let _ = rustix::io::write(&self.0.fd, &1_u64.to_ne_bytes());
    }
}

/// A thread that works towards a result, as whoever waits for it has it.
#[derive(Debug)]
pub struct Running<T> {
    thread: JoinHandle<()>,
    result: Arc<Mutex<Option<T>>>,
    ended: Ended,
}

impl<T: Send + 'static> Running<T> {
    /// Starts the thread, which works on `value`; `ended` is what [`ended`](ended()) made for it.
    ///
    /// # Errors
    /// What the system said, with the value.
    pub fn start<V: Send + 'static>(
        spawner: &dyn Spawner,
        name: &str,
        (ended, guard): (Ended, EndGuard),
        value: V,
        work: impl FnOnce(V) -> T + Send + 'static,
    ) -> Result<Self, (io::Error, V)> {
        let result = Arc::new(Mutex::new(None));
        let theirs = Arc::clone(&result);
        let thread = spawn_with(spawner, name, value, move |value| {
            let _over = guard;
            let done = work(value);
            *lock(&theirs) = Some(done);
        })?;
        Ok(Self {
            thread,
            result,
            ended,
        })
    }
}

impl<T> Running<T> {
    /// Whether [`wait`](Self::wait) would return at once.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.ended.is_over()
    }

    /// An event descriptor that becomes readable, and stays so, when it is over. It is not to be read.
    #[must_use]
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }

    /// Waits for the result.
    ///
    /// # Panics
    /// If the thread panicked; with the same words.
    #[must_use]
    pub fn wait(self) -> T {
        if let Err(panic) = self.thread.join() {
            std::panic::resume_unwind(panic);
        }
        let result = lock(&self.result).take();
        match result {
            Some(result) => result,
            None => unreachable!("the thread leaves its result before it ends"),
        }
    }

    /// Waits for the result as long as the thread beats.
    ///
    /// # Errors
    /// No beat came for longer than `limit`, and how long none has: the thread is left alone.
    ///
    /// # Panics
    /// If the thread panicked; with the same words.
    pub fn wait_while_it_beats(self, pulse: &Pulse, limit: Duration) -> Result<T, Duration> {
        let mut silence = Silence::default();
        while !self.ended.wait(LOOK_MAX) {
            let silent = silence.look(pulse, Instant::now());
            if silent > limit {
                // It may have been killed on its last steps.
                return lock(&self.result).take().ok_or(silent);
            }
        }
        let Some(result) = lock(&self.result).take() else {
            return Ok(self.wait());
        };
        // It has nothing more to do than to end.
        let nap = || std::thread::sleep(Duration::from_millis(1));
        let _ = join_within(self.thread, LOOK_MAX, nap);
        Ok(result)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    fn readable(ended: &Ended) -> bool {
        let mut fds = [PollFd::new(ended, PollFlags::IN)];
        let now = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut fds, Some(&now)).expect("one descriptor") == 1
    }

    #[test]
    fn it_is_over_when_the_guard_is_gone_also_by_a_panic() {
        let (watching, guard) = ended().expect("a descriptor");
        assert!(!watching.is_over() && !readable(&watching));
        assert!(!watching.wait(Duration::from_millis(1)));
        let thread = std::thread::spawn(move || {
            let _guard = guard;
            panic!("on purpose");
        });
        thread.join().unwrap_err();
        assert!(watching.wait(Duration::from_secs(60)));
        assert!(watching.is_over() && readable(&watching) && readable(&watching));
    }

    #[test]
    fn a_thread_is_waited_for_as_long_as_it_beats() {
        let pulse = Arc::new(Pulse::default());
        let limit = Duration::from_millis(600);
        let theirs = Arc::clone(&pulse);
        let begin = |work: Box<dyn FnOnce(()) -> u32 + Send>| {
            let ends = ended().unwrap();
            Running::start(&crate::StdSpawner, "works", ends, (), work)
                .unwrap_or_else(|_| panic!("a thread"))
        };
        let beats = begin(Box::new(move |()| {
            for _ in 0..12 {
                theirs.beat();
                std::thread::sleep(Duration::from_millis(100));
            }
            7
        }));
        assert_eq!(beats.wait_while_it_beats(&pulse, 10 * limit), Ok(7));
        let (go, gone) = std::sync::mpsc::channel::<()>();
        let silent = begin(Box::new(move |()| {
            let _ = gone.recv();
            8
        }));
        let waited = silent.wait_while_it_beats(&pulse, limit).unwrap_err();
        assert!(waited > limit, "{waited:?}");
        drop(go);
    }

    #[test]
    fn a_thread_leaves_its_result_and_its_panic_to_whoever_waits() {
        let start = |work: fn(u32) -> u32| {
            let ends = ended().unwrap();
            Running::start(&crate::StdSpawner, "works", ends, 20, work)
        };
        let running = start(|value| value + 1).unwrap_or_else(|_| panic!("a thread"));
        while !running.is_finished() {
            std::thread::yield_now();
        }
        assert_eq!(running.wait(), 21);
        let panics = start(|_| panic!("in its own words")).unwrap_or_else(|_| panic!("a thread"));
        let waited = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| panics.wait()));
        let said = waited.unwrap_err();
        assert_eq!(said.downcast_ref::<&str>(), Some(&"in its own words"));
    }
}
