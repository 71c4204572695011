//! A fake type 1 container with a dirty log, as `linux/vfio.h` describes it and `vfio_iommu_type1` behaves.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{FakeFd, FakeKernel, FakeObject, refused, structure, structure_with, u32_at, u64_at};
use crate::kernel::{Parts, Request};

const VFIO_IOMMU_GET_INFO: u32 = 0x3b70;
const VFIO_IOMMU_UNMAP_DMA: u32 = 0x3b72;
const VFIO_IOMMU_DIRTY_PAGES: u32 = 0x3b75;

/// A fake container. Cloning gives another handle to the same one.
#[derive(Clone)]
pub struct FakeContainer {
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    page_bytes: u64,
    has_log: bool,
    bitmap_bytes_max: u64,
    /// Whether every mapped page is reported each time: no hardware log, and no driver that pins page by page.
    reports_all: bool,
    logging: bool,
    /// Bytes of each mapping by its I/O address.
    mappings: BTreeMap<u64, u64>,
    /// Dirty pages, counted by I/O address / page size.
    dirty: BTreeSet<u64>,
}

impl FakeContainer {
    /// A container whose IOMMU has pages of `page_bytes` bytes.
    pub fn new(page_bytes: u64) -> Self {
        let inner = Inner {
            page_bytes,
            has_log: true,
            bitmap_bytes_max: 256 << 20,
            reports_all: false,
            logging: false,
            mappings: BTreeMap::new(),
            dirty: BTreeSet::new(),
        };
        Self {
            inner: Arc::new(Mutex::new(inner)),
        }
    }

    /// Its descriptor.
    pub fn open(&self, kernel: &FakeKernel) -> FakeFd {
        kernel.open(ContainerObject {
            inner: Arc::clone(&self.inner),
        })
    }

    /// Takes the log away, as of a kernel that has none.
    pub fn without_log(self) -> Self {
        self.locked().has_log = false;
        self
    }

    /// Reports every mapped page each time.
    pub fn reporting_all(self) -> Self {
        self.locked().reports_all = true;
        self
    }

    /// Bounds the bitmap that one question may have.
    pub fn with_bitmap_bytes_max(self, bytes: u64) -> Self {
        self.locked().bitmap_bytes_max = bytes;
        self
    }

    /// What the VMM maps (`VFIO_IOMMU_MAP_DMA`).
    ///
    /// # Panics
    /// If it is not aligned, or mapped already.
    pub fn map(&self, iova: u64, bytes: u64) {
        let mut inner = self.locked();
        assert!((iova | bytes).is_multiple_of(inner.page_bytes) && bytes > 0);
        assert!(inner.mapping_at(iova).is_none() && inner.mapping_at(iova + bytes - 1).is_none());
        inner.mappings.insert(iova, bytes);
    }

    /// Whether an I/O address is mapped.
    pub fn is_mapped(&self, iova: u64) -> bool {
        self.locked().mapping_at(iova).is_some()
    }

    /// Whether the log is on.
    pub fn is_logging(&self) -> bool {
        self.locked().logging
    }

    /// A device in the container has written `bytes` bytes from `iova`; called after they are in memory.
    ///
    /// # Panics
    /// If the address is not mapped: the write would have been a fault.
    pub fn wrote(&self, iova: u64, bytes: u64) {
        let mut inner = self.locked();
        let page = inner.page_bytes;
        for at in iova / page..(iova + bytes).div_ceil(page) {
            assert!(
                inner.mapping_at(at * page).is_some(),
                "I/O address {:#x} is not mapped",
                at * page
            );
            if inner.logging {
                inner.dirty.insert(at);
            }
        }
    }

    fn locked(&self) -> MutexGuard<'_, Inner> {
        locked(&self.inner)
    }
}

fn locked(inner: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    fn mapping_at(&self, iova: u64) -> Option<(u64, u64)> {
        self.mappings
            .range(..=iova)
            .next_back()
            .map(|(&start, &bytes)| (start, bytes))
            .filter(|(start, bytes)| iova < start + bytes)
    }

    /// Whether the ends of a range lie inside a mapping instead of at its ends.
    fn bisects(&self, iova: u64, size: u64) -> bool {
        self.mapping_at(iova)
            .is_some_and(|(start, _)| start != iova)
            || self
                .mapping_at(iova + size - 1)
                .is_some_and(|(start, bytes)| start + bytes != iova + size)
    }

    fn whole_range(&self, iova: u64, size: u64) -> bool {
        size != 0
            && (iova | size).is_multiple_of(self.page_bytes)
            && iova.checked_add(size).is_some()
            && !self.bisects(iova, size)
    }

    /// Fills the bitmap of a range's mappings and clears their bits.
    fn take(&mut self, iova: u64, size: u64, words: &mut [u64]) {
        let page = self.page_bytes;
        for (&start, &bytes) in self.mappings.range(iova..iova + size) {
            for at in start / page..(start + bytes) / page {
                let dirty = self.dirty.remove(&at) || self.reports_all;
                if dirty {
                    let bit = at - iova / page;
                    words[(bit / 64) as usize] |= 1 << (bit % 64);
                }
            }
        }
    }

    /// The checks that the kernel makes on a `struct vfio_bitmap` at byte `at`, and that the words are really there.
    fn bitmap_fits(&self, octets: &[u8], at: usize, size: u64, words: &[u64]) -> bool {
        let (pgsize, bytes) = (u64_at(octets, at), u64_at(octets, at + 8));
        let needed = (size / self.page_bytes).div_ceil(64) * 8;
        assert!(words.len() as u64 * 8 >= bytes, "the bitmap is there");
        pgsize == self.page_bytes
            && bytes >= needed
            && bytes <= self.bitmap_bytes_max
            && words.iter().all(|&word| word == 0)
    }

    fn dirty_pages(&mut self, parts: Parts<'_>) -> io::Result<i32> {
        let Parts::Struct(head, _) = &parts else {
            panic!("a structure was expected, not {parts:?}");
        };
        let (argsz, flags) = (u32_at(head, 0), u32_at(head, 4));
        assert_eq!(argsz as usize, head.len(), "argsz is the structure's size");
        match flags {
            1 => {
                structure(parts, 8);
                self.logging = true;
                Ok(0)
            }
            2 => {
                structure(parts, 8);
                self.logging = false;
                self.dirty.clear();
                Ok(0)
            }
            4 => {
                let (octets, words) = structure_with(parts, 48, 40);
                let (iova, size) = (u64_at(octets, 8), u64_at(octets, 16));
                if !self.logging
                    || !self.whole_range(iova, size)
                    || !self.bitmap_fits(octets, 24, size, words)
                {
                    return refused(libc::EINVAL);
                }
                self.take(iova, size, words);
                Ok(0)
            }
            _ => refused(libc::EINVAL),
        }
    }

    fn unmap(&mut self, parts: Parts<'_>) -> io::Result<i32> {
        let (octets, words) = match parts {
            Parts::Struct(_, None) => (structure(parts, 24), None),
            parts => {
                let (octets, words) = structure_with(parts, 48, 40);
                (octets, Some(words))
            }
        };
        assert_eq!(u32_at(octets, 0) as usize, octets.len(), "argsz");
        let (flags, iova, size) = (u32_at(octets, 4), u64_at(octets, 8), u64_at(octets, 16));
        assert_eq!(flags == 1, words.is_some(), "the flag goes with a bitmap");
        if !self.whole_range(iova, size) {
            return refused(libc::EINVAL);
        }
        if let Some(words) = words {
            if !self.logging || !self.bitmap_fits(octets, 24, size, words) {
                return refused(libc::EINVAL);
            }
            self.take(iova, size, words);
        }
        let gone: Vec<u64> = self
            .mappings
            .range(iova..iova + size)
            .map(|m| *m.0)
            .collect();
        let mut unmapped = 0;
        for start in gone {
            unmapped += self.mappings.remove(&start).unwrap_or(0);
        }
        let page = self.page_bytes;
        self.dirty
            .retain(|at| *at < iova / page || *at >= (iova + size) / page);
        octets[16..24].copy_from_slice(&unmapped.to_ne_bytes());
        Ok(0)
    }

    /// `struct vfio_iommu_type1_info`: first how much there is to say, then all of it, behind another capability.
    fn info(&self, parts: Parts<'_>) -> io::Result<i32> {
        let Parts::Struct(octets, None) = parts else {
            panic!("a structure without an address was expected");
        };
        let argsz = u32_at(octets, 0);
        assert_eq!(
            argsz as usize,
            octets.len(),
            "argsz is the structure's size"
        );
        let needed = if self.has_log { 24 + 16 + 32 } else { 24 + 16 };
        octets[4..8].copy_from_slice(&3u32.to_ne_bytes());
        octets[8..16].copy_from_slice(&self.page_bytes.to_ne_bytes());
        if argsz < needed {
            octets[0..4].copy_from_slice(&needed.to_ne_bytes());
            return Ok(0);
        }
        octets[16..20].copy_from_slice(&24u32.to_ne_bytes());
        // VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL: id 3, version 1, next, number.
        octets[24..26].copy_from_slice(&3u16.to_ne_bytes());
        octets[26..28].copy_from_slice(&1u16.to_ne_bytes());
        if self.has_log {
            octets[28..32].copy_from_slice(&40u32.to_ne_bytes());
            octets[40..42].copy_from_slice(&2u16.to_ne_bytes());
            octets[42..44].copy_from_slice(&1u16.to_ne_bytes());
            octets[56..64].copy_from_slice(&self.page_bytes.to_ne_bytes());
            octets[64..72].copy_from_slice(&self.bitmap_bytes_max.to_ne_bytes());
        }
        Ok(0)
    }
}

struct ContainerObject {
    inner: Arc<Mutex<Inner>>,
}

impl FakeObject for ContainerObject {
    fn ioctl(&mut self, request: Request, parts: Parts<'_>) -> io::Result<i32> {
        let mut inner = locked(&self.inner);
        match request.number() {
            VFIO_IOMMU_GET_INFO => inner.info(parts),
            VFIO_IOMMU_DIRTY_PAGES if inner.has_log => inner.dirty_pages(parts),
            VFIO_IOMMU_UNMAP_DMA => inner.unmap(parts),
            _ => refused(libc::ENOTTY),
        }
    }
}
