//! What differs between the kernels that track DMA, behind one small trait.

use std::io;

use super::map::{Bitmap, DmaMap, DmaRange};

/// What to do with the kernel's dirty bits when they are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Bits {
    /// They are cleared, so that the next read gives what was written since.
    Clear,
    /// They may stay, because nothing will be written any more: cheaper where the kernel offers it. A kernel that can't
    /// keep them clears them.
    Keep,
}

/// A kernel call that failed.
#[derive(Debug, thiserror::Error)]
#[error("{call}: {error}")]
pub(crate) struct CallFailed {
    /// Its name in the kernel's headers.
    pub(crate) call: &'static str,
    /// What it answered.
    #[source]
    pub(crate) error: io::Error,
}

/// Unmapping failed, or what was dirty could not be learnt.
#[derive(Debug)]
pub(crate) enum UnmapFailed {
    /// The range is unmapped; the bitmap was lost.
    BitmapLost(CallFailed),
    /// The range is still mapped.
    StillMapped(CallFailed),
}

/// One kernel interface that logs the pages a device writes.
///
/// The map may be another one at each read: with an IOMMU in the guest it changes.
pub(crate) trait Tracker: Send {
    /// A short name for reports.
    fn kind(&self) -> &'static str;

    /// Begins to log writes to the map's pages. Called while nothing is logged.
    fn start(&mut self, map: &DmaMap) -> Result<(), CallFailed>;

    /// Gives `take` bitmaps that together cover the map. After a failure some of the kernel's bits may be lost.
    fn read(
        &mut self,
        map: &DmaMap,
        bits: Bits,
        take: &mut dyn FnMut(&Bitmap<'_>),
    ) -> Result<(), CallFailed>;

    /// Unmaps a whole mapping (or several that lie side by side). With `take`, hands over first the bitmap of what was
    /// written to it and not read yet.
    ///
    /// The error says whether the range is unmapped nevertheless.
    fn unmap(
        &mut self,
        range: &DmaRange,
        take: Option<&mut dyn FnMut(&Bitmap<'_>)>,
    ) -> Result<(), UnmapFailed>;

    /// Ends logging. Called after `start` was called, also if that failed.
    fn stop(&mut self) -> Result<(), CallFailed>;
}
