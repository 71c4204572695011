//! A device's own DMA log: `VFIO_DEVICE_FEATURE_DMA_LOGGING_START`, `_REPORT`, `_STOP`.
//!
//! The device takes a bounded list of ranges, none over another, aligned to the page size that is asked for, and answers
//! with the page size that it logs by. If that is bigger, logging is begun again with ranges rounded out to it: the part of a unit
//! that was not asked for might otherwise not be logged. Reports are asked for in pages of 4096 bytes over whole units;
//! the kernel repeats a unit's bit. No unit is ever split between two reports, because the first would clear it.
//!
//! "If any error is returned userspace should assume that the dirty log is corrupted" (`linux/vfio.h`): the source above
//! then marks all that the device can reach.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use zerocopy::IntoBytes;

use super::abi::{self, Feature, FeatureLogReport, FeatureLogStart};
use super::feature::{Device, header};
use super::map::{Bitmap, DmaMap, DmaRange, IovaSpan, coalesce};
use super::tracker::{Bits, CallFailed, Tracker, UnmapFailed};
use crate::PAGE_BYTES;
use crate::kernel::Kernel;
use crate::levels::WORD_BITS;

/// The ranges that the kernel takes at least: as many as fit a page of 4096 bytes. A device may take fewer.
pub const RANGES_MAX: usize = 4096 / (abi::LOG_RANGE_WORDS * 8);

/// Bytes of I/O address space that one report covers at most: a bitmap of 512 KiB.
const REPORT_BYTES_MAX: u64 = 16 << 30;

pub(crate) struct LoggingTracker {
    device: Device,
    /// The page size that the device logs by; 4096 until it said.
    unit: u64,
    /// Reused for each report.
    words: Vec<u64>,
}

impl LoggingTracker {
    pub(crate) fn new(kernel: Arc<dyn Kernel>, device: BorrowedFd<'_>) -> io::Result<Self> {
        Ok(Self {
            device: Device::new(kernel, device)?,
            unit: PAGE_BYTES,
            words: Vec::new(),
        })
    }

    /// Begins with as many ranges as the device takes, and returns the page size that it logs by.
    fn start_by(&self, map: &DmaMap, unit: u64) -> Result<u64, CallFailed> {
        let all = map.spans(unit);
        let mut ranges = coalesce(&all, RANGES_MAX);
        loop {
            match self.start_with(&ranges, unit) {
                Ok(unit) => return Ok(unit),
                // The errors with which drivers say "too many" or "no room for so many".
                Err(error)
                    if ranges.len() > 1
                        && matches!(
                            error.raw_os_error(),
                            Some(libc::E2BIG | libc::ENOMEM | libc::ENOSPC)
                        ) =>
                {
                    ranges = coalesce(&all, ranges.len() / 2);
                }
                Err(error) => {
                    return Err(CallFailed {
                        call: abi::FEATURE_LOG_START.name(),
                        error,
                    });
                }
            }
        }
    }

    fn start_with(&self, ranges: &[IovaSpan], page_size: u64) -> io::Result<u64> {
        let mut words: Vec<u64> = ranges
            .iter()
            .flat_map(|range| [range.iova, range.bytes])
            .collect();
        let (argsz, flags) = header::<FeatureLogStart>(abi::SET, abi::LOGGING_START);
        let mut start = FeatureLogStart {
            argsz,
            flags,
            page_size,
            num_ranges: ranges.len() as u32,
            reserved: 0,
            ranges: 0,
        };
        self.device.call_with(
            abi::FEATURE_LOG_START,
            start.as_mut_bytes(),
            abi::LOG_START_RANGES_AT,
            &mut words,
        )?;
        Ok(start.page_size)
    }

    fn report(&mut self, span: IovaSpan) -> Result<(), CallFailed> {
        let pages = span.bytes / PAGE_BYTES;
        self.words.clear();
        self.words.resize(pages.div_ceil(WORD_BITS) as usize, 0);
        let (argsz, flags) = header::<FeatureLogReport>(abi::GET, abi::LOGGING_REPORT);
        let mut report = FeatureLogReport {
            argsz,
            flags,
            iova: span.iova,
            length: span.bytes,
            page_size: PAGE_BYTES,
            bitmap: 0,
        };
        self.device
            .call_with(
                abi::FEATURE_LOG_REPORT,
                report.as_mut_bytes(),
                abi::LOG_REPORT_BITMAP_AT,
                &mut self.words,
            )
            .map_err(|error| CallFailed {
                call: abi::FEATURE_LOG_REPORT.name(),
                error,
            })
    }
}

impl Tracker for LoggingTracker {
    fn kind(&self) -> &'static str {
        "vfio-dma-logging"
    }

    fn start(&mut self, map: &DmaMap) -> Result<(), CallFailed> {
        let failed = |text: String| CallFailed {
            call: abi::FEATURE_LOG_START.name(),
            error: io::Error::other(text),
        };
        let chosen = self.start_by(map, PAGE_BYTES)?;
        if !chosen.is_power_of_two() {
            return Err(failed(format!(
                "the device logs by {chosen} bytes, no power of two"
            )));
        }
        self.unit = chosen.max(PAGE_BYTES);
        let fits = |span: &IovaSpan| (span.iova | span.bytes).is_multiple_of(self.unit);
        if map.spans(PAGE_BYTES).iter().all(fits) {
            return Ok(());
        }
        self.stop()?;
        let again = self.start_by(map, self.unit)?;
        if again > self.unit {
            return Err(failed(format!(
                "the device logs by {} bytes, and by {again} when it is asked for that",
                self.unit
            )));
        }
        Ok(())
    }

    fn read(
        &mut self,
        map: &DmaMap,
        _: Bits,
        take: &mut dyn FnMut(&Bitmap<'_>),
    ) -> Result<(), CallFailed> {
        let step = REPORT_BYTES_MAX.max(self.unit);
        for span in map.spans(self.unit) {
            let mut iova = span.iova;
            while iova < span.end() {
                let part = IovaSpan {
                    iova,
                    bytes: step.min(span.end() - iova),
                };
                self.report(part)?;
                take(&Bitmap {
                    iova,
                    page_bytes: PAGE_BYTES,
                    bits: part.bytes / PAGE_BYTES,
                    words: &self.words,
                });
                iova = part.end();
            }
        }
        Ok(())
    }

    fn unmap(
        &mut self,
        _: &DmaRange,
        _: Option<&mut dyn FnMut(&Bitmap<'_>)>,
    ) -> Result<(), UnmapFailed> {
        // A device knows nothing of mappings. `DmaSource::unmapper` gives nothing for it.
        Err(UnmapFailed::StillMapped(CallFailed {
            call: "unmap",
            error: io::ErrorKind::Unsupported.into(),
        }))
    }

    fn stop(&mut self) -> Result<(), CallFailed> {
        let (argsz, flags) = header::<Feature>(abi::SET, abi::LOGGING_STOP);
        let mut stop = Feature { argsz, flags };
        self.device
            .call(abi::FEATURE_LOG_STOP, stop.as_mut_bytes())
            .map_err(|error| CallFailed {
                call: abi::FEATURE_LOG_STOP.name(),
                error,
            })
    }
}
