//! What the VMM and its back ends write into guest memory themselves: marked by whoever writes, from any thread.
//!
//! A VMM that emulates a device writes guest memory by its own stores, which no hypervisor sees. The writer holds a
//! [`VmmMarker`] and marks **after** it has written: a mark made before the write could be taken and its page sent in
//! between. Marking is a locked write of one word of the dirty set; nobody waits for anybody but while a migration begins
//! or ends. Without a migration it is a look at one flag.
//!
//! Forgetting a mark is the classic bug of a VMM; [`scan`](crate::scan) finds it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use crate::source::Counters;
use crate::{CollectPhase, Collection, DirtySet, Error, Figures, PAGE_BYTES, Run, Source};

/// Marks pages that its holder wrote. Clones mark for the same source.
#[derive(Clone)]
pub struct VmmMarker {
    shared: Arc<Shared>,
}

/// The source of what [`VmmMarker`]s mark.
pub struct VmmWrites {
    shared: Arc<Shared>,
    name: &'static str,
    told: Collection,
}

#[derive(Default)]
struct Shared {
    /// Whether there is a set: so that a marker without a migration takes no lock.
    tracking: AtomicBool,
    set: RwLock<Option<DirtySet>>,
    counters: Counters,
}

impl VmmWrites {
    /// A source named `vmm-writes`.
    #[must_use]
    pub fn new() -> Self {
        Self::named("vmm-writes")
    }

    /// A source of another name, for a VMM that wants its back ends apart in the report.
    #[must_use]
    pub fn named(name: &'static str) -> Self {
        Self {
            shared: Arc::default(),
            name,
            told: Collection::default(),
        }
    }

    /// A handle for a thread that writes guest memory.
    #[must_use]
    pub fn marker(&self) -> VmmMarker {
        VmmMarker {
            shared: Arc::clone(&self.shared),
        }
    }

    fn serve(&self, set: Option<DirtySet>) {
        let tracking = set.is_some();
        let mut place = self
            .shared
            .set
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        *place = set;
        // Inside the lock, so that flag and set change in the same order.
        self.shared.tracking.store(tracking, Ordering::SeqCst);
    }
}

impl Default for VmmWrites {
    fn default() -> Self {
        Self::new()
    }
}

impl VmmMarker {
    /// Marks pages that were written. To be called after the write. Without a migration nothing happens.
    ///
    /// # Panics
    /// During a migration, if the run is not inside a region: the VMM and the migration then disagree about memory.
    pub fn mark(&self, run: Run) {
        // A write before `start` is in round 0, whatever this reads: round 0 is what is populated after the start.
        if !self.shared.tracking.load(Ordering::SeqCst) {
            return;
        }
        let set = self
            .shared
            .set
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(set) = &*set {
            self.shared.counters.add(Collection {
                pages: set.mark(run),
                reported: run.count,
            });
        }
    }

    /// Marks the pages that `bytes` bytes from byte `offset` of the region touch. No bytes touch no page.
    ///
    /// # Panics
    /// As [`VmmMarker::mark`].
    pub fn mark_bytes(&self, region: u32, offset: u64, bytes: u64) {
        if bytes == 0 {
            return;
        }
        let first = offset / PAGE_BYTES;
        let last = offset.saturating_add(bytes - 1) / PAGE_BYTES;
        self.mark(Run {
            region,
            first,
            count: last - first + 1,
        });
    }

    /// Whether a page is in the set of the migration under way.
    #[cfg(feature = "vm-memory")]
    pub(crate) fn is_marked(&self, region: u32, page: u64) -> bool {
        let set = self
            .shared
            .set
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        set.as_ref().is_some_and(|set| set.is_dirty(region, page))
    }

    /// Whether a migration is under way, for a writer that wants to save the work of finding out what it wrote. One that
    /// looks before it writes and marks nothing because of it loses the write: look after the write, or always mark.
    #[must_use]
    pub fn is_tracking(&self) -> bool {
        self.shared.tracking.load(Ordering::SeqCst)
    }
}

impl Source for VmmWrites {
    fn name(&self) -> &str {
        self.name
    }

    fn start(&mut self, set: &DirtySet) -> Result<(), Error> {
        self.serve(Some(set.clone()));
        self.told = self.shared.counters.collection();
        Ok(())
    }

    /// The marks are in the set already; this tells how many there were.
    fn collect(&mut self, _set: &DirtySet, _phase: CollectPhase) -> Result<Collection, Error> {
        if !self.shared.tracking.load(Ordering::SeqCst) {
            return Err(Error::Misuse {
                what: "the VMM's writes are collected only between start and stop".into(),
            });
        }
        let begun = Instant::now();
        let now = self.shared.counters.collection();
        let told = std::mem::replace(&mut self.told, now);
        self.shared.counters.harvested(begun, Collection::default());
        Ok(Collection {
            pages: now.pages - told.pages,
            reported: now.reported - told.reported,
        })
    }

    fn stop(&mut self) -> Result<(), Error> {
        self.serve(None);
        Ok(())
    }

    fn figures(&self) -> Figures {
        self.shared.counters.figures()
    }
}

impl Drop for VmmWrites {
    fn drop(&mut self) {
        self.serve(None);
    }
}

impl std::fmt::Debug for VmmMarker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VmmMarker")
            .field("tracking", &self.is_tracking())
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for VmmWrites {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VmmWrites")
            .field("name", &self.name)
            .field("figures", &self.figures())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octets_touch_the_pages_that_they_lie_in() {
        let mut source = VmmWrites::new();
        let marker = source.marker();
        let set = DirtySet::new(&[10]);
        source.start(&set).unwrap();
        marker.mark_bytes(0, 0, 0);
        assert_eq!(set.dirty_pages(), 0);
        marker.mark_bytes(0, 4095, 2);
        assert_eq!(
            set.take_round()
                .next_run(9)
                .map(|run| (run.first, run.count)),
            Some((0, 2))
        );
        marker.mark_bytes(0, 3 * 4096, 4096);
        let mut round = set.take_round();
        let pages: u64 = std::iter::from_fn(|| round.next_run(9))
            .map(|run| run.count)
            .sum();
        assert_eq!(pages, 1);
    }

    #[test]
    #[should_panic(expected = "is not inside a region")]
    fn a_mark_outside_memory_panics_while_tracking() {
        let mut source = VmmWrites::new();
        source.start(&DirtySet::new(&[10])).unwrap();
        source.marker().mark_bytes(0, 10 * 4096, 1);
    }

    #[test]
    fn without_a_migration_a_mark_is_nothing() {
        let source = VmmWrites::new();
        source.marker().mark_bytes(77, 0, 1);
        assert_eq!(source.figures(), Figures::default());
        assert!(!source.marker().is_tracking());
    }
}
