//! What every source of dirty pages can do.
//!
//! ```text
//!   new ──start──► running ──collect(PreCopy)*──► ──collect(Final)*──► ──stop──► stopped ──start──► running …
//! ```
//!
//! The order that loses nothing: start every source, then [`DirtySet::mark_all`], then take round 0. A write before
//! `start` is covered by round 0, a write after it is reported.

use std::any::Any;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::time::Instant;

use crate::{DirtySet, Error};

/// In which part of the migration a collection happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CollectPhase {
    /// The guest runs.
    PreCopy,
    /// The vCPUs are paused and their threads are out of this crate's handlers. Devices may still be saving.
    Final,
}

/// What a collection brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collection {
    /// Pages that went from clean to dirty.
    pub pages: u64,
    /// Pages that the kernel reported, counted as often as it reported them.
    pub reported: u64,
}

impl std::ops::AddAssign for Collection {
    fn add_assign(&mut self, other: Self) {
        self.pages += other.pages;
        self.reported += other.reported;
    }
}

/// What a source counted since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Pages that it turned from clean to dirty.
    pub pages: u64,
    /// Pages that the kernel reported, counted as often as it reported them.
    pub reported: u64,
    /// Times that the kernel was asked what is dirty.
    pub harvests: u64,
    /// Nanoseconds spent in harvests, re-arming and merging included.
    pub harvest_ns: u64,
    /// Calls that re-armed.
    pub resets: u64,
    /// vCPU exits because a ring was nearly full.
    pub ring_full_soft: u64,
    /// Rings found full to the last entry: entries may be missing, so everything was marked dirty.
    pub ring_full_hard: u64,
    /// Entries that named memory that the source does not know.
    pub entries_unknown: u64,
    /// Times that a whole region or range was marked because the exact pages could not be learnt.
    pub all_dirty: u64,
    /// Ranges that were unmapped from a device and handed their dirty pages over first.
    pub unmaps: u64,
    /// Kernel calls that failed.
    pub errors: u64,
    /// The `errno` of the last kernel call that failed; 0 if none did, or if the failure had none.
    pub last_errno: i32,
}

impl std::ops::Sub for Figures {
    type Output = Self;

    /// What was counted since `before`, an earlier reading of the same source.
    fn sub(self, before: Self) -> Self {
        Self {
            pages: self.pages - before.pages,
            reported: self.reported - before.reported,
            harvests: self.harvests - before.harvests,
            harvest_ns: self.harvest_ns - before.harvest_ns,
            resets: self.resets - before.resets,
            ring_full_soft: self.ring_full_soft - before.ring_full_soft,
            ring_full_hard: self.ring_full_hard - before.ring_full_hard,
            entries_unknown: self.entries_unknown - before.entries_unknown,
            all_dirty: self.all_dirty - before.all_dirty,
            unmaps: self.unmaps - before.unmaps,
            errors: self.errors - before.errors,
            last_errno: self.last_errno,
        }
    }
}

/// Something that knows which pages were written.
///
/// All calls come from one thread at a time. No page may get lost: what a source was told by the kernel it merges
/// into the set, or keeps and merges at the next collection, or marks a superset of.
pub trait Source: Any + Send {
    /// A short name for reports, such as `kvm-ring`.
    fn name(&self) -> &str;

    /// Why this source was chosen and no other, in words for the user; `None` if there was nothing to choose.
    fn reason(&self) -> Option<String> {
        None
    }

    /// Begins to track: every write after this call returned is reported by some later collection.
    ///
    /// # Errors
    /// Nothing is tracked then, and the source may be started again.
    fn start(&mut self, set: &DirtySet) -> Result<(), Error>;

    /// Merges into the set what was written since the last collection.
    ///
    /// Every write that happened before the call began is in the set (or in a round) when it returns `Ok`.
    ///
    /// In [`CollectPhase::Final`] it is called at least twice: after the pause, and after the state was saved. It must
    /// come to an end there: a page that was not written since the last collection must not be reported again and again,
    /// or the last rounds would never be the last. A source that has no re-arming left to do in this phase remembers what it
    /// has reported in it.
    ///
    /// # Errors
    /// What the kernel answered. Nothing is lost: the pages come with a later collection, or a superset is in the set.
    fn collect(&mut self, set: &DirtySet, phase: CollectPhase) -> Result<Collection, Error>;

    /// Ends tracking. Calling it when nothing is tracked is allowed and does nothing.
    ///
    /// # Errors
    /// What the kernel answered; tracking is over nevertheless as far as this source is concerned.
    fn stop(&mut self) -> Result<(), Error>;

    /// What was counted so far.
    fn figures(&self) -> Figures;
}

/// The figures of a source while it works. Threads count at the same time.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) pages: AtomicU64,
    pub(crate) reported: AtomicU64,
    pub(crate) harvests: AtomicU64,
    pub(crate) harvest_ns: AtomicU64,
    pub(crate) resets: AtomicU64,
    pub(crate) ring_full_soft: AtomicU64,
    pub(crate) ring_full_hard: AtomicU64,
    pub(crate) entries_unknown: AtomicU64,
    pub(crate) all_dirty: AtomicU64,
    pub(crate) unmaps: AtomicU64,
    pub(crate) errors: AtomicU64,
    pub(crate) last_errno: AtomicI32,
}

impl Counters {
    /// Counts a harvest that began at `begun` and is over now.
    pub(crate) fn harvested(&self, begun: Instant, collection: Collection) {
        let elapsed = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.harvests.fetch_add(1, Ordering::Relaxed);
        self.harvest_ns.fetch_add(elapsed, Ordering::Relaxed);
        self.add(collection);
    }

    /// Counts a kernel call that failed, after which all that it was about was marked.
    pub(crate) fn failed_range(&self, error: &std::io::Error) {
        self.failed(error);
        self.all_dirty.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts pages only.
    pub(crate) fn add(&self, collection: Collection) {
        self.pages.fetch_add(collection.pages, Ordering::Relaxed);
        self.reported
            .fetch_add(collection.reported, Ordering::Relaxed);
    }

    /// Counts a kernel call that failed.
    pub(crate) fn failed(&self, error: &std::io::Error) {
        self.errors.fetch_add(1, Ordering::Relaxed);
        self.last_errno
            .store(error.raw_os_error().unwrap_or(0), Ordering::Relaxed);
    }

    /// All pages counted so far.
    pub(crate) fn collection(&self) -> Collection {
        Collection {
            pages: self.pages.load(Ordering::Relaxed),
            reported: self.reported.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn figures(&self) -> Figures {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Figures {
            pages: read(&self.pages),
            reported: read(&self.reported),
            harvests: read(&self.harvests),
            harvest_ns: read(&self.harvest_ns),
            resets: read(&self.resets),
            ring_full_soft: read(&self.ring_full_soft),
            ring_full_hard: read(&self.ring_full_hard),
            entries_unknown: read(&self.entries_unknown),
            all_dirty: read(&self.all_dirty),
            unmaps: read(&self.unmaps),
            errors: read(&self.errors),
            last_errno: self.last_errno.load(Ordering::Relaxed),
        }
    }
}
