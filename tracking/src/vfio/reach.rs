//! What a device can write, told by the embedder: fixed, through an IOMMU of the guest, or pinned page by page.

use std::io;

use super::map::{DmaMap, DmaRange, mark_runs};
use crate::{Collection, DirtySet, Error, Run};

/// The guest's own IOMMU, as the embedder knows it: its notifier, seen from here.
///
/// With one, I/O addresses are the guest's choice and come and go. A device's pages are then known from the mappings only:
/// what is unmapped goes through [`Unmapper`](super::Unmapper) and hands back its dirty pages first; what is mapped at the stop is
/// walked here.
pub trait Viommu: Send {
    /// Calls `visit` for each mapping that devices may write now, in any order. Each is one mapping as it was made in
    /// the host's IOMMU. The vCPUs are paused.
    ///
    /// # Errors
    /// The embedder's reason. All memory then counts as dirty.
    fn walk(&self, visit: &mut dyn FnMut(DmaRange)) -> io::Result<()>;
}

impl<F: Fn(&mut dyn FnMut(DmaRange)) -> io::Result<()> + Send> Viommu for F {
    fn walk(&self, visit: &mut dyn FnMut(DmaRange)) -> io::Result<()> {
        self(visit)
    }
}

/// A driver that pins the pages a device may write, and says which.
pub trait Pinned: Send {
    /// Calls `visit` for each run of pages that was pinned at any time since the last call.
    ///
    /// Also a page that is not pinned any more may have been written while it was.
    ///
    /// # Errors
    /// The embedder's reason. All memory then counts as dirty.
    fn pinned(&self, visit: &mut dyn FnMut(Run)) -> io::Result<()>;
}

impl<F: Fn(&mut dyn FnMut(Run)) -> io::Result<()> + Send> Pinned for F {
    fn pinned(&self, visit: &mut dyn FnMut(Run)) -> io::Result<()> {
        self(visit)
    }
}

/// What a device can write.
pub enum Reach {
    /// The same ranges for the whole migration: a guest without an IOMMU of its own.
    Fixed(DmaMap),
    /// Whatever the guest maps.
    Viommu(Box<dyn Viommu>),
    /// The pages that a driver pins. Only for a device that nothing tracks.
    Pinned(Box<dyn Pinned>),
}

impl Reach {
    /// Refuses a reach that has nothing to do with the set.
    pub(crate) fn check(&self, set: &DirtySet) -> Result<(), Error> {
        match self {
            Self::Fixed(map) => map.check(set),
            Self::Viommu(_) | Self::Pinned(_) => Ok(()),
        }
    }

    /// Marks everything that the device may have written: the fall-back. Without a better answer that is all memory.
    pub(crate) fn mark_all(&self, set: &DirtySet) -> Result<Collection, io::Error> {
        match self {
            Self::Fixed(map) => Ok(map.mark(set)),
            Self::Viommu(_) => Ok(mark_memory(set)),
            Self::Pinned(pinned) => {
                let mut runs = Vec::new();
                let mut outside = false;
                let told = pinned.pinned(&mut |run| {
                    outside |= !set.contains(run);
                    runs.push(run);
                });
                match told {
                    Ok(()) if !outside => Ok(mark_runs(set, runs)),
                    told => {
                        mark_memory(set);
                        Err(told.err().unwrap_or_else(|| {
                            io::Error::other("a pinned run lies outside the guest's memory")
                        }))
                    }
                }
            }
        }
    }

    /// The mappings of this moment.
    pub(crate) fn walk(viommu: &dyn Viommu, set: &DirtySet) -> io::Result<DmaMap> {
        let mut ranges = Vec::new();
        viommu.walk(&mut |range| ranges.push(range))?;
        let map = DmaMap::new(ranges).map_err(io::Error::other)?;
        map.check(set).map_err(io::Error::other)?;
        Ok(map)
    }
}

impl std::fmt::Debug for Reach {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Fixed(map) => f.debug_tuple("Fixed").field(map).finish(),
            Self::Viommu(_) => f.write_str("Viommu"),
            Self::Pinned(_) => f.write_str("Pinned"),
        }
    }
}

/// Marks all memory of the set.
pub(crate) fn mark_memory(set: &DirtySet) -> Collection {
    Collection {
        reported: set.pages_total(),
        pages: set.mark_all(),
    }
}
