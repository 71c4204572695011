//! A fake iommufd: one address space, hardware page tables with dirty bits, as `linux/iommufd.h` describes them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{FakeFd, FakeKernel, FakeObject, refused, structure, structure_with, u32_at, u64_at};
use crate::kernel::{Parts, Request};

const IOMMU_IOAS_UNMAP: u32 = 0x3b86;
const IOMMU_GET_HW_INFO: u32 = 0x3b8a;
const IOMMU_HWPT_SET_DIRTY_TRACKING: u32 = 0x3b8b;
const IOMMU_HWPT_GET_DIRTY_BITMAP: u32 = 0x3b8c;

/// A fake iommufd. Cloning gives another handle to the same one.
#[derive(Clone)]
pub struct FakeIommufd {
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    /// What one dirty bit of the hardware covers.
    unit_bytes: u64,
    mappings: BTreeMap<u64, u64>,
    tables: BTreeMap<u32, Table>,
    /// Whether the hardware behind a device has dirty bits.
    devices: BTreeMap<u32, bool>,
    no_clear_reads: u64,
}

#[derive(Default)]
struct Table {
    tracking: bool,
    dirty: BTreeSet<u64>,
}

impl FakeIommufd {
    /// The id of the one address space.
    pub const IOAS: u32 = 3;

    /// Page tables with these ids. The hardware has one dirty bit for `unit_bytes` bytes.
    pub fn new(unit_bytes: u64, tables: &[u32]) -> Self {
        let inner = Inner {
            unit_bytes,
            mappings: BTreeMap::new(),
            tables: tables.iter().map(|&id| (id, Table::default())).collect(),
            devices: BTreeMap::new(),
            no_clear_reads: 0,
        };
        Self {
            inner: Arc::new(Mutex::new(inner)),
        }
    }

    /// Its descriptor.
    pub fn open(&self, kernel: &FakeKernel) -> FakeFd {
        kernel.open(IommufdObject {
            inner: Arc::clone(&self.inner),
        })
    }

    /// Binds a device; `tracks`: the IOMMU behind it has dirty bits.
    pub fn bind(&self, device: u32, tracks: bool) {
        self.locked().devices.insert(device, tracks);
    }

    /// What the VMM maps (`IOMMU_IOAS_MAP`).
    ///
    /// # Panics
    /// If it is not aligned, or mapped already.
    pub fn map(&self, iova: u64, bytes: u64) {
        let mut inner = self.locked();
        assert!((iova | bytes).is_multiple_of(4096) && bytes > 0);
        assert!(inner.mapping_at(iova).is_none() && inner.mapping_at(iova + bytes - 1).is_none());
        inner.mappings.insert(iova, bytes);
    }

    /// Whether an I/O address is mapped.
    pub fn is_mapped(&self, iova: u64) -> bool {
        self.locked().mapping_at(iova).is_some()
    }

    /// Whether a table tracks.
    pub fn is_tracking(&self, table: u32) -> bool {
        self.locked().tables.get(&table).is_some_and(|t| t.tracking)
    }

    /// Bitmaps that were read without clearing.
    pub fn no_clear_reads(&self) -> u64 {
        self.locked().no_clear_reads
    }

    /// A device attached to `table` has written `bytes` bytes from `iova`; called after they are in memory.
    ///
    /// # Panics
    /// If the address is not mapped, or there is no such table.
    pub fn wrote(&self, table: u32, iova: u64, bytes: u64) {
        let mut inner = self.locked();
        for at in iova / 4096..(iova + bytes).div_ceil(4096) {
            assert!(
                inner.mapping_at(at * 4096).is_some(),
                "I/O address {:#x} is not mapped",
                at * 4096
            );
        }
        let unit = inner.unit_bytes;
        let table = inner.tables.get_mut(&table).expect("a known page table");
        if table.tracking {
            table
                .dirty
                .extend(iova / unit..(iova + bytes).div_ceil(unit));
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

    /// Whether every address of the range is mapped.
    fn mapped_without_hole(&self, iova: u64, end: u64) -> bool {
        let mut at = iova;
        while at < end {
            match self.mapping_at(at) {
                Some((start, bytes)) => at = start + bytes,
                None => return false,
            }
        }
        true
    }

    fn set_tracking(&mut self, octets: &[u8]) -> io::Result<i32> {
        assert_eq!(u32_at(octets, 0), 16, "size");
        let (flags, table) = (u32_at(octets, 4), u32_at(octets, 8));
        assert_eq!(u32_at(octets, 12), 0, "reserved");
        if flags & !1 != 0 {
            return refused(libc::EOPNOTSUPP);
        }
        let Some(table) = self.tables.get_mut(&table) else {
            return refused(libc::ENOENT);
        };
        table.tracking = flags == 1;
        if table.tracking {
            table.dirty.clear();
        }
        Ok(0)
    }

    fn get_bitmap(&mut self, octets: &[u8], words: &mut [u64]) -> io::Result<i32> {
        assert_eq!(u32_at(octets, 0), 48, "size");
        let (table, flags) = (u32_at(octets, 4), u32_at(octets, 8));
        let (iova, length) = (u64_at(octets, 16), u64_at(octets, 24));
        let page_size = u64_at(octets, 32);
        if flags & !1 != 0 || u32_at(octets, 12) != 0 {
            return refused(libc::EOPNOTSUPP);
        }
        let Some(end) = iova.checked_add(length) else {
            return refused(libc::EOVERFLOW);
        };
        if length == 0
            || page_size == 0
            || !(iova | end).is_multiple_of(page_size)
            || !(iova | end).is_multiple_of(4096)
            || !self.mapped_without_hole(iova, end)
        {
            return refused(libc::EINVAL);
        }
        assert!(
            words.len() as u64 * 64 >= length / page_size,
            "the bitmap holds the answer"
        );
        self.no_clear_reads += u64::from(flags);
        let unit = self.unit_bytes;
        let Some(table) = self.tables.get_mut(&table) else {
            return refused(libc::ENOENT);
        };
        let asked: Vec<u64> = table
            .dirty
            .range(iova / unit..end.div_ceil(unit))
            .copied()
            .collect();
        for dirty in asked {
            if flags == 0 {
                table.dirty.remove(&dirty);
            }
            let (from, to) = ((dirty * unit).max(iova), ((dirty + 1) * unit).min(end));
            for bit in (from - iova) / page_size..(to - iova).div_ceil(page_size) {
                words[(bit / 64) as usize] |= 1 << (bit % 64);
            }
        }
        Ok(0)
    }

    fn unmap(&mut self, octets: &mut [u8]) -> io::Result<i32> {
        assert_eq!(u32_at(octets, 0), 24, "size");
        let (ioas, iova, length) = (u32_at(octets, 4), u64_at(octets, 8), u64_at(octets, 16));
        if ioas != FakeIommufd::IOAS {
            return refused(libc::ENOENT);
        }
        let Some(end) = iova.checked_add(length).filter(|_| length > 0) else {
            return refused(libc::EINVAL);
        };
        let cut = |at: Option<(u64, u64)>| {
            at.is_some_and(|(start, bytes)| start < iova || start + bytes > end)
        };
        if cut(self.mapping_at(iova)) || cut(self.mapping_at(end - 1)) {
            return refused(libc::ENOENT);
        }
        let gone: Vec<u64> = self.mappings.range(iova..end).map(|m| *m.0).collect();
        if gone.is_empty() {
            return refused(libc::ENOENT);
        }
        let mut unmapped = 0;
        for start in gone {
            unmapped += self.mappings.remove(&start).unwrap_or(0);
        }
        let unit = self.unit_bytes;
        for table in self.tables.values_mut() {
            table
                .dirty
                .retain(|at| (at + 1) * unit <= iova || at * unit >= end);
        }
        octets[16..24].copy_from_slice(&unmapped.to_ne_bytes());
        Ok(0)
    }

    fn hw_info(&self, octets: &mut [u8]) -> io::Result<i32> {
        assert_eq!(u32_at(octets, 0), 40, "size");
        assert_eq!(
            (u32_at(octets, 4), u32_at(octets, 12)),
            (0, 0),
            "flags, length"
        );
        let Some(&tracks) = self.devices.get(&u32_at(octets, 8)) else {
            return refused(libc::ENOENT);
        };
        octets[32..40].copy_from_slice(&u64::from(tracks).to_ne_bytes());
        Ok(0)
    }
}

struct IommufdObject {
    inner: Arc<Mutex<Inner>>,
}

impl FakeObject for IommufdObject {
    fn ioctl(&mut self, request: Request, parts: Parts<'_>) -> io::Result<i32> {
        let mut inner = locked(&self.inner);
        match request.number() {
            IOMMU_HWPT_SET_DIRTY_TRACKING => inner.set_tracking(structure(parts, 16)),
            IOMMU_HWPT_GET_DIRTY_BITMAP => {
                let (octets, words) = structure_with(parts, 48, 40);
                inner.get_bitmap(octets, words)
            }
            IOMMU_IOAS_UNMAP => inner.unmap(structure(parts, 24)),
            IOMMU_GET_HW_INFO => inner.hw_info(structure(parts, 40)),
            _ => refused(libc::ENOTTY),
        }
    }
}
