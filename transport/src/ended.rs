//! An event descriptor that says that something is over: for embedders that wait in an event loop of their own.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};

/// The watching side: readable once the [`EndGuard`] is gone, and from then on.
#[derive(Debug)]
pub struct Ended(Arc<State>);

/// The working side. Dropping it, also in a panic, is the end.
#[derive(Debug)]
pub struct EndGuard(Arc<State>);

#[derive(Debug)]
struct State {
    fd: OwnedFd,
    over: AtomicBool,
}

/// Both sides.
///
/// # Errors
/// No descriptor could be had.
pub fn ended() -> io::Result<(Ended, EndGuard)> {
    let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let state = Arc::new(State {
        fd,
        over: AtomicBool::new(false),
    });
    Ok((Ended(Arc::clone(&state)), EndGuard(state)))
}

impl Ended {
    /// Whether it is over.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.0.over.load(Ordering::Acquire)
    }
}

impl AsFd for Ended {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

impl Drop for EndGuard {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::Release);
        // A counter that was never written has room for 1, so this can't fail.
        let _ = rustix::io::write(&self.0.fd, &1_u64.to_ne_bytes());
    }
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
        let thread = std::thread::spawn(move || {
            let _guard = guard;
            panic!("on purpose");
        });
        thread.join().unwrap_err();
        assert!(watching.is_over() && readable(&watching) && readable(&watching));
    }
}
