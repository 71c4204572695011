//! The threads of a guest, one for each virtual CPU: how they are made, hurried and ended.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::beat::Beat;
use crate::error::{Error, Result};
use crate::gate::Gate;
use crate::kick::Kick;

/// How long an ending thread is left alone before it is hurried again.
const END_POLL: Duration = Duration::from_micros(100);

/// What a guest and its threads share.
#[derive(Debug)]
pub(crate) struct Crew {
    pub(crate) gate: Gate,
    /// One for each virtual CPU.
    pub(crate) beats: Vec<Beat>,
    /// How much of their time is held back, in percent.
    pub(crate) throttle: AtomicU8,
}

/// The threads themselves. Dropping it ends them all, from whatever they do, and waits for them.
#[derive(Debug)]
pub(crate) struct Threads {
    crew: Arc<Crew>,
    threads: Vec<Thread>,
}

#[derive(Debug)]
struct Thread {
    handle: JoinHandle<()>,
    kick: Option<Arc<Kick>>,
}

impl Crew {
    pub(crate) fn new(vcpus: u32) -> Self {
        Self {
            gate: Gate::new(vcpus),
            beats: (0..vcpus).map(|_| Beat::new()).collect(),
            throttle: AtomicU8::new(0),
        }
    }
}

impl Crew {
    /// How much of a virtual CPU's time is held back now, in percent.
    pub(crate) fn throttle(&self) -> u8 {
        self.throttle.load(Ordering::Relaxed)
    }
}

impl Threads {
    /// No thread yet.
    pub(crate) fn new(crew: &Arc<Crew>) -> Self {
        Self {
            crew: Arc::clone(crew),
            threads: Vec::new(),
        }
    }

    /// One more thread, named after its index: `vcpu0`. `kick` gets it out of `KVM_RUN`, if it goes there.
    ///
    /// # Errors
    /// [`Error::Kernel`] if the thread cannot be made.
    pub(crate) fn spawn(
        &mut self,
        kick: Option<Arc<Kick>>,
        body: impl FnOnce() + Send + 'static,
    ) -> Result<()> {
        let index = self.threads.len() as u32;
        let watch = PanicWatch {
            crew: Arc::clone(&self.crew),
            index,
        };
        let handle = thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || {
                let _watch = watch;
                body();
            })
            .map_err(|source| Error::Kernel {
                call: "clone (vCPU thread)",
                source,
            })?;
        self.threads.push(Thread { handle, kick });
        Ok(())
    }

    /// Gets every thread out of `KVM_RUN`. Those that wait at the gate are woken by the gate.
    pub(crate) fn kick(&self) {
        for thread in &self.threads {
            if let Some(kick) = &thread.kick {
                kick.kick(&thread.handle);
            }
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.crew.gate.ask_end();
        for Thread { handle, kick } in self.threads.drain(..) {
            while !handle.is_finished() {
                if let Some(kick) = &kick {
                    kick.kick(&handle);
                }
                thread::sleep(END_POLL);
            }
            // A thread that panicked has said so on its own; there is nothing to add while dropping.
            let _ = handle.join();
        }
    }
}

/// Turns a panic of a thread into a failure of its virtual CPU, so that a pause does not wait for it.
struct PanicWatch {
    crew: Arc<Crew>,
    index: u32,
}

impl Drop for PanicWatch {
    fn drop(&mut self) {
        if thread::panicking() {
            self.crew
                .gate
                .fail(self.index, "its thread panicked".to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gate::{Order, Rested};

    #[test]
    fn a_thread_that_panics_is_a_failure_and_not_a_hang() {
        let crew = Arc::new(Crew::new(1));
        let mut threads = Threads::new(&crew);
        let inside = Arc::clone(&crew);
        threads
            .spawn(None, move || {
                assert_eq!(inside.gate.rest(0), Order::Run);
                panic!("on purpose");
            })
            .unwrap();
        crew.gate.ask_run();
        while crew.gate.failure().is_none() {
            thread::yield_now();
        }
        crew.gate.ask_rest();
        assert_eq!(crew.gate.wait_rested(Duration::ZERO), Rested::All);
        drop(threads);
    }
}
