//! Dirty tracking of iommufd's hardware page tables: `IOMMU_HWPT_SET_DIRTY_TRACKING`, `IOMMU_HWPT_GET_DIRTY_BITMAP`.
//!
//! The bits stand in the IOMMU's own page tables. Reading normally clears them; when nothing will be written any more (the
//! devices are stopped, or the range is unmapped next), they are read with `NO_CLEAR`, which saves the flush of the
//! IOMMU's caches. Unmapping an I/O address drops its bits, so they are read before it.
//!
//! A page table must have been made for it (`IOMMU_HWPT_ALLOC_DIRTY_TRACKING`), or the hardware may refuse. A question must
//! lie in what is mapped, without a hole.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use zerocopy::IntoBytes;

use super::abi::{self, GetDirtyBitmap, HwInfo, IoasUnmap, SetDirtyTracking};
use super::map::{Bitmap, DmaMap, DmaRange, IovaSpan};
use super::tracker::{Bits, CallFailed, Tracker, UnmapFailed};
use crate::kernel::{Kernel, Payload, Request};
use crate::levels::WORD_BITS;
use crate::{Error, PAGE_BYTES};

/// Bytes of I/O address space that one question covers, unless a mapping is bigger.
const QUESTION_BYTES_MAX: u64 = 16 << 30;

/// Whether the IOMMU behind a device can track dirty pages (`IOMMU_GET_HW_INFO`, `IOMMU_HW_CAP_DIRTY_TRACKING`).
/// `device` is the id that binding the device to the iommufd returned.
///
/// # Errors
/// [`Error::Kernel`] if the kernel does not know the device, or is older than the question.
pub(crate) fn probe(
    kernel: &dyn Kernel,
    iommufd: BorrowedFd<'_>,
    device: u32,
) -> Result<bool, Error> {
    let mut info = HwInfo {
        size: size_of::<HwInfo>() as u32,
        dev_id: device,
        ..HwInfo::default()
    };
    kernel
        .ioctl(
            iommufd,
            abi::GET_HW_INFO,
            Payload::bytes(info.as_mut_bytes()),
        )
        .map_err(|error| Error::Kernel {
            call: abi::GET_HW_INFO.name(),
            error,
        })?;
    Ok(info.out_capabilities & abi::HW_CAP_DIRTY_TRACKING != 0)
}

pub(crate) struct IommufdTracker {
    kernel: Arc<dyn Kernel>,
    iommufd: OwnedFd,
    /// The hardware page tables of the devices; all show the same I/O address space.
    tables: Vec<u32>,
    /// That address space.
    ioas: u32,
    words: Vec<u64>,
}

impl IommufdTracker {
    pub(crate) fn new(
        kernel: Arc<dyn Kernel>,
        iommufd: BorrowedFd<'_>,
        tables: Vec<u32>,
        ioas: u32,
    ) -> Result<Self, Error> {
        if tables.is_empty() {
            return Err(Error::Misuse {
                what: "an iommufd source needs at least one hardware page table".into(),
            });
        }
        let iommufd = iommufd
            .try_clone_to_owned()
            .map_err(|error| Error::Kernel {
                call: "dup of the iommufd",
                error,
            })?;
        Ok(Self {
            kernel,
            iommufd,
            tables,
            ioas,
            words: Vec::new(),
        })
    }

    fn call(&self, request: Request, payload: Payload<'_>) -> Result<(), CallFailed> {
        self.kernel
            .ioctl(self.iommufd.as_fd(), request, payload)
            .map(|_| ())
            .map_err(|error| CallFailed {
                call: request.name(),
                error,
            })
    }

    fn switch(&self, table: u32, flags: u32) -> Result<(), CallFailed> {
        let mut set = SetDirtyTracking {
            size: size_of::<SetDirtyTracking>() as u32,
            flags,
            hwpt_id: table,
            reserved: 0,
        };
        self.call(
            abi::HWPT_SET_DIRTY_TRACKING,
            Payload::bytes(set.as_mut_bytes()),
        )
    }

    /// The bits of a span in all tables together.
    fn ask(&mut self, span: IovaSpan, bits: Bits) -> Result<(), CallFailed> {
        let pages = span.bytes / PAGE_BYTES;
        let mut words = std::mem::take(&mut self.words);
        words.clear();
        words.resize(pages.div_ceil(WORD_BITS) as usize, 0);
        // The kernel only sets bits, so each table adds its own.
        let answer = self.tables.iter().try_for_each(|&hwpt_id| {
            let mut get = GetDirtyBitmap {
                size: size_of::<GetDirtyBitmap>() as u32,
                hwpt_id,
                flags: match bits {
                    Bits::Clear => 0,
                    Bits::Keep => abi::BITMAP_NO_CLEAR,
                },
                reserved: 0,
                iova: span.iova,
                length: span.bytes,
                page_size: PAGE_BYTES,
                data: 0,
            };
            let payload =
                Payload::attached(get.as_mut_bytes(), abi::GET_DIRTY_BITMAP_AT, &mut words);
            self.call(abi::HWPT_GET_DIRTY_BITMAP, payload)
        });
        self.words = words;
        answer
    }

    fn bitmap(&self, span: IovaSpan) -> Bitmap<'_> {
        Bitmap {
            iova: span.iova,
            page_bytes: PAGE_BYTES,
            bits: span.bytes / PAGE_BYTES,
            words: &self.words,
        }
    }
}

impl Tracker for IommufdTracker {
    fn kind(&self) -> &'static str {
        "iommufd"
    }

    fn start(&mut self, _: &DmaMap) -> Result<(), CallFailed> {
        self.tables
            .iter()
            .try_for_each(|&table| self.switch(table, abi::TRACKING_ENABLE))
    }

    fn read(
        &mut self,
        map: &DmaMap,
        bits: Bits,
        take: &mut dyn FnMut(&Bitmap<'_>),
    ) -> Result<(), CallFailed> {
        for span in map.whole_spans(QUESTION_BYTES_MAX) {
            self.ask(span, bits)?;
            take(&self.bitmap(span));
        }
        Ok(())
    }

    fn unmap(
        &mut self,
        range: &DmaRange,
        take: Option<&mut dyn FnMut(&Bitmap<'_>)>,
    ) -> Result<(), UnmapFailed> {
        let span = IovaSpan {
            iova: range.iova,
            bytes: range.bytes(),
        };
        let mut lost = None;
        if let Some(take) = take {
            match self.ask(span, Bits::Keep) {
                Ok(()) => take(&self.bitmap(span)),
                Err(error) => lost = Some(error),
            }
        }
        let mut unmap = IoasUnmap {
            size: size_of::<IoasUnmap>() as u32,
            ioas_id: self.ioas,
            iova: span.iova,
            length: span.bytes,
        };
        self.call(abi::IOAS_UNMAP, Payload::bytes(unmap.as_mut_bytes()))
            .map_err(UnmapFailed::StillMapped)?;
        lost.map_or(Ok(()), |error| Err(UnmapFailed::BitmapLost(error)))
    }

    fn stop(&mut self) -> Result<(), CallFailed> {
        let mut answer = Ok(());
        for &table in &self.tables {
            answer = answer.and(self.switch(table, 0));
        }
        answer
    }
}
