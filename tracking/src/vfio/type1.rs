//! The dirty log of a type 1 container: `VFIO_IOMMU_DIRTY_PAGES`, and `VFIO_IOMMU_UNMAP_DMA` with a bitmap.
//!
//! The log belongs to the container, so it is asked once for all devices in it. A question must cover whole mappings, and
//! counts in the smallest page size of the IOMMU. Where the hardware does not log and the driver does not pin pages one by one,
//! the kernel reports every mapped page each time; where it does pin, the pinned pages.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use zerocopy::{FromBytes, IntoBytes};

use super::abi::{
    self, DirtyPages, DirtyPagesGet, Type1CapMigration, Type1Info, UnmapDma, UnmapDmaBitmap,
};
use super::map::{Bitmap, DmaMap, DmaRange, IovaSpan};
use super::tracker::{Bits, CallFailed, Tracker, UnmapFailed};
use crate::kernel::{Kernel, Payload, Request};
use crate::levels::WORD_BITS;
use crate::{Error, PAGE_BYTES};

/// Bytes of I/O address space that one question covers, unless a mapping is bigger.
const QUESTION_BYTES_MAX: u64 = 16 << 30;

/// The most bytes of `struct vfio_iommu_type1_info` with its capabilities. The kernel says how many it needs; today
/// some hundred.
const INFO_BYTES_MAX: u32 = 65_536;

/// What a container says of its dirty log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Type1Support {
    /// Bytes for which one bit stands: the smallest page size of the IOMMU.
    pub(crate) page_bytes: u64,
    /// The biggest bitmap, in bytes, that the kernel fills at once.
    pub(crate) bitmap_bytes_max: u64,
}

/// Asks whether a container logs dirty pages. The container must have its IOMMU set (`VFIO_SET_IOMMU`).
///
/// # Errors
/// [`Error::Kernel`] if the descriptor is no container's, [`Error::Unsupported`] if it has no dirty log.
pub(crate) fn probe(kernel: &dyn Kernel, container: BorrowedFd<'_>) -> Result<Type1Support, Error> {
    let octets = info(kernel, container).map_err(|error| Error::Kernel {
        call: abi::IOMMU_GET_INFO.name(),
        error,
    })?;
    let unsupported = |what: &str| Error::Unsupported {
        what: format!("a dirty log of this type 1 container: {what}"),
    };
    let capability = migration_capability(&octets)
        .ok_or_else(|| unsupported("the kernel names no migration capability"))?;
    let page_bytes = 1u64
        .checked_shl(capability.pgsize_bitmap.trailing_zeros())
        .filter(|&bytes| bytes >= PAGE_BYTES)
        .ok_or_else(|| unsupported("it does not count in pages of 4096 bytes or more"))?;
    Ok(Type1Support {
        page_bytes,
        bitmap_bytes_max: capability.max_dirty_bitmap_size,
    })
}

/// `struct vfio_iommu_type1_info` with its capabilities.
fn info(kernel: &dyn Kernel, container: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let mut bytes = size_of::<Type1Info>() as u32;
    // The first answer says how much there is; it can grow until the second question when a device is added meanwhile.
    for _ in 0..3 {
        let mut octets = vec![0u8; bytes as usize];
        octets[..4].copy_from_slice(&bytes.to_ne_bytes());
        kernel.ioctl(container, abi::IOMMU_GET_INFO, Payload::bytes(&mut octets))?;
        let needed = u32::from_ne_bytes([octets[0], octets[1], octets[2], octets[3]]);
        if needed <= bytes {
            return Ok(octets);
        }
        if needed > INFO_BYTES_MAX {
            break;
        }
        bytes = needed;
    }
    Err(io::Error::from_raw_os_error(libc::E2BIG))
}

/// Walks the chain of capabilities. It may be as wrong as it likes: it is bounded and never read out of place.
fn migration_capability(octets: &[u8]) -> Option<Type1CapMigration> {
    let (info, _) = Type1Info::read_from_prefix(octets).ok()?;
    if info.flags & abi::INFO_CAPS == 0 {
        return None;
    }
    let mut at = info.cap_offset as usize;
    while at != 0 {
        let capability = octets.get(at..)?;
        let id = u16::from_ne_bytes(capability.get(..2)?.try_into().ok()?);
        if u32::from(id) == abi::INFO_CAP_MIGRATION {
            return Type1CapMigration::read_from_prefix(capability)
                .ok()
                .map(|(capability, _)| capability);
        }
        let next = u32::from_ne_bytes(capability.get(4..8)?.try_into().ok()?) as usize;
        // Only forward: a chain that turns back would never end.
        if next <= at {
            return None;
        }
        at = next;
    }
    None
}

pub(crate) struct Type1Tracker {
    kernel: Arc<dyn Kernel>,
    container: OwnedFd,
    support: Type1Support,
    words: Vec<u64>,
}

impl Type1Tracker {
    pub(crate) fn new(kernel: Arc<dyn Kernel>, container: BorrowedFd<'_>) -> Result<Self, Error> {
        let support = probe(&*kernel, container)?;
        let container = container
            .try_clone_to_owned()
            .map_err(|error| Error::Kernel {
                call: "dup of the container",
                error,
            })?;
        Ok(Self {
            kernel,
            container,
            support,
            words: Vec::new(),
        })
    }

    fn call(&self, request: Request, payload: Payload<'_>) -> Result<(), CallFailed> {
        self.kernel
            .ioctl(self.container.as_fd(), request, payload)
            .map(|_| ())
            .map_err(|error| CallFailed {
                call: request.name(),
                error,
            })
    }

    fn switch(&self, request: Request, flags: u32) -> Result<(), CallFailed> {
        let mut pages = DirtyPages {
            argsz: size_of::<DirtyPages>() as u32,
            flags,
        };
        self.call(request, Payload::bytes(pages.as_mut_bytes()))
    }

    /// Zeroed words for a span, and their size in bytes.
    fn clear_words(&mut self, bytes: u64) -> u64 {
        let bits = bytes.div_ceil(self.support.page_bytes);
        self.words.clear();
        self.words.resize(bits.div_ceil(WORD_BITS) as usize, 0);
        self.words.len() as u64 * 8
    }

    fn bitmap(&self, iova: u64, bytes: u64) -> Bitmap<'_> {
        Bitmap {
            iova,
            page_bytes: self.support.page_bytes,
            bits: bytes.div_ceil(self.support.page_bytes),
            words: &self.words,
        }
    }

    fn ask(&mut self, span: IovaSpan) -> Result<(), CallFailed> {
        let bitmap_size = self.clear_words(span.bytes);
        let mut get = DirtyPagesGet {
            argsz: size_of::<DirtyPagesGet>() as u32,
            flags: abi::DIRTY_GET,
            iova: span.iova,
            size: span.bytes,
            bitmap_pgsize: self.support.page_bytes,
            bitmap_size,
            bitmap_data: 0,
        };
        let mut words = std::mem::take(&mut self.words);
        let payload = Payload::attached(get.as_mut_bytes(), abi::DIRTY_PAGES_BITMAP_AT, &mut words);
        let answer = self.call(abi::DIRTY_PAGES_GET, payload);
        self.words = words;
        answer
    }

    fn unmap_plain(&self, range: &DmaRange) -> Result<(), CallFailed> {
        let mut unmap = UnmapDma {
            argsz: size_of::<UnmapDma>() as u32,
            flags: 0,
            iova: range.iova,
            size: range.bytes(),
        };
        self.call(abi::IOMMU_UNMAP_DMA, Payload::bytes(unmap.as_mut_bytes()))
    }

    fn unmap_with_bitmap(&mut self, range: &DmaRange) -> Result<(), CallFailed> {
        let bitmap_size = self.clear_words(range.bytes());
        let mut unmap = UnmapDmaBitmap {
            argsz: size_of::<UnmapDmaBitmap>() as u32,
            flags: abi::UNMAP_GET_BITMAP,
            iova: range.iova,
            size: range.bytes(),
            bitmap_pgsize: self.support.page_bytes,
            bitmap_size,
            bitmap_data: 0,
        };
        let mut words = std::mem::take(&mut self.words);
        let payload = Payload::attached(unmap.as_mut_bytes(), abi::UNMAP_BITMAP_AT, &mut words);
        let answer = self.call(abi::IOMMU_UNMAP_DMA, payload);
        self.words = words;
        answer
    }
}

impl Tracker for Type1Tracker {
    fn kind(&self) -> &'static str {
        "vfio-type1"
    }

    fn start(&mut self, map: &DmaMap) -> Result<(), CallFailed> {
        let bytes_max = self
            .support
            .bitmap_bytes_max
            .saturating_mul(8)
            .saturating_mul(self.support.page_bytes);
        if let Some(range) = map.ranges().iter().find(|range| range.bytes() > bytes_max) {
            return Err(CallFailed {
                call: abi::DIRTY_PAGES_START.name(),
                error: io::Error::other(format!(
                    "the mapping at {:#x} has {} octets, and the kernel reports at most {bytes_max} at once: map it in \
                     several pieces",
                    range.iova,
                    range.bytes()
                )),
            });
        }
        self.switch(abi::DIRTY_PAGES_START, abi::DIRTY_START)
    }

    fn read(
        &mut self,
        map: &DmaMap,
        _: Bits,
        take: &mut dyn FnMut(&Bitmap<'_>),
    ) -> Result<(), CallFailed> {
        for span in map.whole_spans(QUESTION_BYTES_MAX) {
            self.ask(span)?;
            take(&self.bitmap(span.iova, span.bytes));
        }
        Ok(())
    }

    fn unmap(
        &mut self,
        range: &DmaRange,
        take: Option<&mut dyn FnMut(&Bitmap<'_>)>,
    ) -> Result<(), UnmapFailed> {
        let Some(take) = take else {
            return self.unmap_plain(range).map_err(UnmapFailed::StillMapped);
        };
        match self.unmap_with_bitmap(range) {
            Ok(()) => {
                take(&self.bitmap(range.iova, range.bytes()));
                Ok(())
            }
            // The call ends at the mapping whose bitmap failed, so the range may be unmapped in part: unmapping the rest
            // answers for all of it.
            Err(lost) => match self.unmap_plain(range) {
                Ok(()) => Err(UnmapFailed::BitmapLost(lost)),
                Err(error) => Err(UnmapFailed::StillMapped(error)),
            },
        }
    }

    fn stop(&mut self) -> Result<(), CallFailed> {
        self.switch(abi::DIRTY_PAGES_STOP, abi::DIRTY_STOP)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An info structure with one capability at `offset`, whose header says `id` and `next`.
    fn octets(flags: u32, offset: u32, id: u16, next: u32) -> Vec<u8> {
        let info = Type1Info {
            argsz: 128,
            flags,
            iova_pgsizes: 4096,
            cap_offset: offset,
            pad: 0,
        };
        let capability = Type1CapMigration {
            id,
            version: 1,
            next,
            pgsize_bitmap: 4096,
            max_dirty_bitmap_size: 77,
            ..Type1CapMigration::default()
        };
        let mut octets = vec![0; 128];
        octets[..24].copy_from_slice(info.as_bytes());
        octets[24..24 + 32].copy_from_slice(capability.as_bytes());
        octets
    }

    #[test]
    fn a_chain_of_capabilities_is_walked_and_never_believed() {
        let found = migration_capability(&octets(2, 24, 2, 0)).expect("it is there");
        assert_eq!(found.max_dirty_bitmap_size, 77);
        for (flags, offset, id, next) in [
            (0, 24, 2, 0),
            (2, 0, 2, 0),
            (2, 24, 1, 0),
            (2, 24, 1, 24),
            (2, 24, 1, 8),
            (2, 24, 1, 127),
            (2, 24, 1, u32::MAX),
            (2, u32::MAX, 2, 0),
            (2, 120, 2, 0),
        ] {
            assert!(
                migration_capability(&octets(flags, offset, id, next)).is_none(),
                "{flags} {offset} {id} {next}"
            );
        }
        for length in 0..56 {
            let _ = migration_capability(&octets(2, 24, 2, 0)[..length]);
        }
    }
}
