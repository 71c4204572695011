//! Backing the destination's memory with pages before they are needed.
//!
//! The first write to a fresh 4 KiB page costs far more than the copy that follows. With huge pages a fault comes once
//! in 512 pages and nothing has to be done; without them a helper thread populates the memory chunk by chunk while
//! the set-up and the first frames are on their way. Populating changes no content, so it may run at any time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use crate::config::PAGE_BYTES;
use crate::error::{Error, Result};
use crate::memory::{self, Memory};

/// Pages populated by one call: 32 MiB, so that giving up takes milliseconds.
const CHUNK_PAGES: u64 = (32 << 20) / PAGE_BYTES;

/// How much to prepare.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preparation {
    /// Populate everything where huge pages are not offered; nothing where they are.
    #[default]
    Auto,
    /// Populate everything. Pages that are zero in the guest then take memory too.
    Populate,
}

/// A preparation under way. Dropping it ends it.
#[derive(Debug)]
#[must_use = "dropping it ends the preparation"]
pub struct Preparing {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<()>>>,
}

#[derive(Debug, Default)]
struct Shared {
    populated_pages: AtomicU64,
    stop: AtomicBool,
}

impl Memory {
    /// Begins to back this memory with pages, from a thread of its own.
    ///
    /// # Errors
    /// [`Error::Kernel`] if the thread cannot be made.
    pub fn prepare(&self, preparation: Preparation) -> Result<Preparing> {
        let shared = Arc::new(Shared::default());
        if preparation == Preparation::Auto && memory::huge_pages_offered() {
            return Ok(Preparing {
                shared,
                thread: None,
            });
        }
        let (memory, helper) = (self.clone(), Arc::clone(&shared));
        let thread = thread::Builder::new()
            .name("prepare".to_owned())
            .spawn(move || populate(&memory, &helper))
            .map_err(|source| Error::Kernel {
                call: "clone (prepare thread)",
                source,
            })?;
        Ok(Preparing {
            shared,
            thread: Some(thread),
        })
    }
}

impl Preparing {
    /// Bytes populated so far.
    pub fn populated_bytes(&self) -> u64 {
        self.shared.populated_pages.load(Ordering::Relaxed) * PAGE_BYTES
    }

    /// Waits for the end, and says how many bytes were populated.
    ///
    /// # Errors
    /// [`Error::Kernel`] if the host ran out of memory, or the kernel is older than 5.14.
    pub fn wait(mut self) -> Result<u64> {
        self.join()?;
        Ok(self.populated_bytes())
    }

    fn join(&mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        thread.join().unwrap_or(Err(Error::Misuse {
            advice: "the prepare thread panicked",
        }))
    }
}

impl Drop for Preparing {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // Who dropped it did not want to know how it went.
        let _ = self.join();
    }
}

fn populate(memory: &Memory, shared: &Shared) -> Result<()> {
    let mut page = 0;
    while page < memory.pages() && !shared.stop.load(Ordering::Relaxed) {
        let pages = CHUNK_PAGES.min(memory.pages() - page);
        memory.populate(page, pages)?;
        page += pages;
        shared.populated_pages.store(page, Ordering::Relaxed);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn populate_covers_everything() {
        let memory = Memory::new(65 << 20).unwrap();
        assert_eq!(
            memory
                .prepare(Preparation::Populate)
                .unwrap()
                .wait()
                .unwrap(),
            65 << 20
        );
    }

    #[test]
    fn auto_populates_exactly_where_huge_pages_are_not_offered() {
        let memory = Memory::new(64 << 20).unwrap();
        let populated = memory.prepare(Preparation::Auto).unwrap().wait().unwrap();
        assert_eq!(populated == 0, memory::huge_pages_offered());
    }

    #[test]
    fn dropping_ends_it_early() {
        let memory = Memory::new(8 << 30).unwrap();
        let preparing = memory.prepare(Preparation::Populate).unwrap();
        let shared = Arc::clone(&preparing.shared);
        drop(preparing);
        assert!(shared.populated_pages.load(Ordering::Relaxed) * PAGE_BYTES < 8 << 30);
    }
}
