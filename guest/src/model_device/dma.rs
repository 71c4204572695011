//! The model device's way into guest memory: page after page of its own area, each write reported to the dirty set.
//!
//! The rule: write first, report after, so that a round that is taken in between sends the page once more.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use multifd_tracking::{
    CollectPhase, Collection, DirtySet, Error as TrackingError, Figures, Source,
};
use multifd_transport::GuestMemory;

use super::content::Piece;
use super::{DeviceFault, PAGE};

/// A device's own area of guest memory.
#[derive(Clone)]
pub struct Dma {
    memory: GuestMemory,
    region: u32,
    first: u64,
    pages: u64,
    marker: Arc<Mutex<Marker>>,
}

#[derive(Debug, Default)]
struct Marker {
    set: Option<DirtySet>,
    figures: Figures,
}

impl Dma {
    /// The pages `first` to `first + pages` of a region. Nobody else may write them.
    ///
    /// # Errors
    /// They are not in the memory.
    pub fn new(
        memory: GuestMemory,
        region: u32,
        first: u64,
        pages: u64,
    ) -> Result<Self, DeviceFault> {
        memory
            .span(region, first * PAGE, pages * PAGE)
            .map_err(|e| DeviceFault::new(format!("the area for DMA: {e}")))?;
        Ok(Self {
            memory,
            region,
            first,
            pages,
            marker: Arc::default(),
        })
    }

    /// The source of dirty pages that reports the writes. One for each migration.
    #[must_use]
    pub fn source(&self) -> Box<dyn Source> {
        Box::new(DmaSource(Arc::clone(&self.marker)))
    }

    /// Makes the writes numbered `from + 1` to `to`. Of those that overwrite each other only the last are really made.
    pub(super) fn write(&self, seed: u64, from: u64, to: u64) {
        let mut page = [0; PAGE as usize];
        for number in from.max(to.saturating_sub(self.pages)) + 1..=to {
            let at = self.first + (number - 1) % self.pages;
            self.piece(seed, at, number).fill(0, &mut page);
            if let Ok(span) = self.memory.span(self.region, at * PAGE, PAGE) {
                span.copy_from(&page);
            }
            let mut marker = lock(&self.marker);
            if let Some(set) = &marker.set {
                let pages = set.mark_page(self.region, at);
                marker.figures.pages += pages;
                marker.figures.reported += 1;
            }
        }
    }

    /// The first page that is not what it must be after `count` writes.
    pub(super) fn differs(&self, seed: u64, count: u64) -> Option<u64> {
        let mut page = [0; PAGE as usize];
        (0..self.pages.min(count)).find_map(|index| {
            let number = super::newest(index, count, self.pages);
            let at = self.first + index;
            self.memory
                .span(self.region, at * PAGE, PAGE)
                .ok()?
                .copy_to(&mut page);
            self.piece(seed, at, number).differs(0, &page).map(|_| at)
        })
    }

    fn piece(&self, seed: u64, page: u64, version: u64) -> Piece {
        Piece {
            seed: seed ^ 0x0064_6d61,
            place: page,
            version,
        }
    }
}

struct DmaSource(Arc<Mutex<Marker>>);

impl Source for DmaSource {
    fn name(&self) -> &str {
        "model device"
    }

    fn start(&mut self, set: &DirtySet) -> Result<(), TrackingError> {
        lock(&self.0).set = Some(set.clone());
        Ok(())
    }

    fn collect(&mut self, _: &DirtySet, _: CollectPhase) -> Result<Collection, TrackingError> {
        lock(&self.0).figures.harvests += 1;
        Ok(Collection::default())
    }

    fn stop(&mut self) -> Result<(), TrackingError> {
        lock(&self.0).set = None;
        Ok(())
    }

    fn figures(&self) -> Figures {
        lock(&self.0).figures
    }
}

fn lock(marker: &Mutex<Marker>) -> MutexGuard<'_, Marker> {
    marker.lock().unwrap_or_else(PoisonError::into_inner)
}
