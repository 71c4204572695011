//! The source over the kernel's calls.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use zerocopy::IntoBytes;

use super::MappedRange;
use super::abi::{self, AddressRange, Api, PIECE_WORDS, Register, ScanArguments};
use crate::kernel::{Kernel, Linux, Payload, duplicate, host_page_bytes, open_userfaultfd};
use crate::source::Counters;
use crate::{
    CollectPhase, Collected, Collection, DirtySet, Error, Figures, PAGE_BYTES, Run, Source,
};

/// Pieces that one call may report: 96 KiB of answers, so that a million scattered pages take some 250 calls.
const PIECES_PER_CALL: usize = 4096;

/// What lets whoever has it find which pages of a process's memory were written: that process's userfaultfd and page map. Both can be
/// passed to another process, over a Unix socket, and go on being about the process that opened them.
#[derive(Debug)]
pub struct Permission {
    /// A userfaultfd, of which nothing was asked yet (no `UFFDIO_API`).
    pub faults: OwnedFd,
    /// `/proc/self/pagemap`, open for reading.
    pub pagemap: OwnedFd,
}

impl Permission {
    /// For this process's memory.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the kernel does not offer or does not permit it, with what to do about that; [`Error::Kernel`].
    pub fn of_this_process() -> Result<Self, Error> {
        refuse_other_pages()?;
        let faults = open_userfaultfd().map_err(not_opened)?;
        let pagemap = File::options()
            .read(true)
            .open("/proc/self/pagemap")
            .map_err(|error| Error::Kernel {
                call: "open of /proc/self/pagemap",
                error,
            })?;
        let pagemap = pagemap.into();
        Ok(Self { faults, pagemap })
    }
}

fn refuse_other_pages() -> Result<(), Error> {
    if host_page_bytes() == PAGE_BYTES {
        return Ok(());
    }
    Err(Error::Unsupported {
        what: format!(
            "tracking a process on a host whose pages have {} bytes, not {PAGE_BYTES}",
            host_page_bytes()
        ),
    })
}

/// What was written to ranges of a process's memory.
pub struct ProcessSource {
    kernel: Arc<dyn Kernel>,
    faults: OwnedFd,
    pagemap: OwnedFd,
    ranges: Vec<MappedRange>,
    tracking: bool,
    pieces: Vec<u64>,
    counters: Counters,
}

impl ProcessSource {
    /// A source over these ranges, which must not overlap. Nothing is protected before [`Source::start`].
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the kernel does not offer or does not permit it, with what to do about that;
    /// [`Error::Misuse`] for a range that cannot be; [`Error::Kernel`].
    pub fn new(ranges: Vec<MappedRange>) -> Result<Self, Error> {
        Self::of_another(&Permission::of_this_process()?, ranges)
    }

    /// As [`ProcessSource::new`], for the memory of another process, which made the [`Permission`]: addresses are that process's.
    ///
    /// # Errors
    /// As [`ProcessSource::new`]. A permission serves one source: the kernel refuses a second one.
    pub fn of_another(permission: &Permission, ranges: Vec<MappedRange>) -> Result<Self, Error> {
        refuse_other_pages()?;
        let Permission { faults, pagemap } = permission;
        Self::with_kernel(Arc::new(Linux), faults, pagemap, ranges)
    }

    /// As [`ProcessSource::new`], with another kernel and its descriptors of userfaultfd and of the page map.
    ///
    /// # Errors
    /// As [`ProcessSource::new`].
    pub fn with_kernel(
        kernel: Arc<dyn Kernel>,
        faults: &impl AsRawFd,
        pagemap: &impl AsRawFd,
        ranges: Vec<MappedRange>,
    ) -> Result<Self, Error> {
        ranges.iter().try_for_each(MappedRange::check)?;
        refuse_overlap(&ranges)?;
        let own =
            |file: io::Result<OwnedFd>, call| file.map_err(|error| Error::Kernel { call, error });
        let mut source = Self {
            kernel,
            faults: own(duplicate(faults), "dup of a userfaultfd")?,
            pagemap: own(duplicate(pagemap), "dup of a page map")?,
            ranges,
            tracking: false,
            pieces: vec![0; PIECES_PER_CALL * PIECE_WORDS],
            counters: Counters::default(),
        };
        source.offered()?;
        Ok(source)
    }

    /// Agrees with the kernel on the features, and tries both calls once.
    fn offered(&mut self) -> Result<(), Error> {
        let mut api = Api {
            api: abi::API_VERSION,
            features: abi::FEATURE_WP_ASYNC | abi::FEATURE_WP_SHARED,
            ioctls: 0,
        };
        let payload = Payload::bytes(api.as_mut_bytes());
        self.kernel
            .ioctl(self.faults.as_fd(), abi::UFFDIO_API, payload)
            .map_err(|error| not_offered(abi::UFFDIO_API.name(), error))?;
        let nothing = MappedRange {
            region: 0,
            first: 0,
            address: 0,
            pages: 0,
        };
        self.scan(&nothing, 0, false)
            .map(|_| ())
            .map_err(|error| not_offered(abi::PAGEMAP_SCAN.name(), error))
    }

    fn register(&self, range: &MappedRange) -> Result<(), Error> {
        let mut register = Register {
            range: AddressRange {
                start: range.address,
                len: range.bytes(),
            },
            mode: abi::REGISTER_MODE_WP,
            ioctls: 0,
        };
        let payload = Payload::bytes(register.as_mut_bytes());
        self.kernel
            .ioctl(self.faults.as_fd(), abi::UFFDIO_REGISTER, payload)
            .map(|_| ())
            .map_err(|error| Error::Kernel {
                call: abi::UFFDIO_REGISTER.name(),
                error,
            })
    }

    fn unregister(&self, range: &MappedRange) -> Result<(), Error> {
        let mut place = AddressRange {
            start: range.address,
            len: range.bytes(),
        };
        let payload = Payload::bytes(place.as_mut_bytes());
        self.kernel
            .ioctl(self.faults.as_fd(), abi::UFFDIO_UNREGISTER, payload)
            .map(|_| ())
            .map_err(|error| Error::Kernel {
                call: abi::UFFDIO_UNREGISTER.name(),
                error,
            })
    }

    /// Protects what was written in `range` from address `from` on, and, if `report`, leaves it in `self.pieces`.
    /// Returns the number of pieces and where it stopped.
    fn scan(&mut self, range: &MappedRange, from: u64, report: bool) -> io::Result<(usize, u64)> {
        let mut arguments = ScanArguments {
            size: size_of::<ScanArguments>() as u64,
            flags: abi::SCAN_WP_MATCHING | abi::SCAN_CHECK_WPASYNC,
            start: from,
            end: range.end(),
            walk_end: 0,
            vec: 0,
            vec_len: 0,
            max_pages: 0,
            category_inverted: 0,
            category_mask: abi::PAGE_IS_WRITTEN,
            category_anyof_mask: 0,
            return_mask: 0,
        };
        let octets;
        let payload = if report {
            arguments.vec_len = PIECES_PER_CALL as u64;
            arguments.return_mask = abi::PAGE_IS_WRITTEN;
            octets = arguments.as_mut_bytes();
            Payload::attached(octets, abi::SCAN_VEC_AT, &mut self.pieces)
        } else {
            octets = arguments.as_mut_bytes();
            Payload::bytes(octets)
        };
        let answer = self
            .kernel
            .ioctl(self.pagemap.as_fd(), abi::PAGEMAP_SCAN, payload)?;
        let count = usize::try_from(answer)
            .ok()
            .filter(|count| *count <= PIECES_PER_CALL)
            .ok_or_else(|| io::Error::other(format!("{answer} pieces were reported")))?;
        Ok((count, arguments.walk_end))
    }

    /// Protects a range without caring what was written there.
    fn protect(&mut self, range: &MappedRange) -> Result<(), Error> {
        let mut from = range.address;
        while from < range.end() {
            let (_, end) = self
                .scan(range, from, false)
                .and_then(|step| advanced(step, from, range))
                .map_err(|error| Error::Kernel {
                    call: abi::PAGEMAP_SCAN.name(),
                    error,
                })?;
            from = end;
        }
        Ok(())
    }

    /// Protects and takes over what was written in a range. After a failure the whole range counts as written: what the
    /// failed call had protected is not reported again.
    fn collect_range(&mut self, range: &MappedRange, set: &DirtySet) -> io::Result<Collection> {
        let mut sum = Collection::default();
        let mut from = range.address;
        while from < range.end() {
            let step = self
                .scan(range, from, true)
                .and_then(|step| advanced(step, from, range))
                .and_then(|(count, end)| Ok((self.pages(count, range)?, end)));
            let (collected, end) = match step {
                Ok(step) => step,
                Err(error) => {
                    set.mark(range.run());
                    return Err(error);
                }
            };
            self.counters
                .resets
                .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            sum.reported += collected.pages();
            // Each page was protected in the step that reported it.
            sum.pages += set.merge(collected.rearmed_by_fetch());
            from = end;
        }
        Ok(sum)
    }

    /// The reported pieces as pages of the region.
    fn pages(&self, count: usize, range: &MappedRange) -> io::Result<Collected> {
        let mut collected = Collected::new();
        for piece in self.pieces.chunks_exact(PIECE_WORDS).take(count) {
            let (start, end) = (piece[0], piece[1]);
            if start < range.address || end > range.end() || start >= end {
                let text = format!("a piece from {start:#x} to {end:#x} was not asked for");
                return Err(io::Error::other(text));
            }
            let first = range.first + (start - range.address) / PAGE_BYTES;
            let count = (end - start).div_ceil(PAGE_BYTES);
            if count == 1 {
                collected.push_page(range.region, first);
            } else {
                collected.push_run(Run {
                    region: range.region,
                    first,
                    count,
                });
            }
        }
        Ok(collected)
    }

    fn unregister_first(&self, count: usize) -> Result<(), Error> {
        let answers: Vec<_> = self.ranges[..count]
            .iter()
            .map(|range| self.unregister(range))
            .collect();
        answers.into_iter().collect()
    }
}

impl Source for ProcessSource {
    fn name(&self) -> &str {
        "process"
    }

    fn start(&mut self, set: &DirtySet) -> Result<(), Error> {
        let ranges = self.ranges.clone();
        for range in &ranges {
            set.check(range.run())?;
        }
        for (range, before) in ranges.iter().zip(0..) {
            let registered = self.register(range);
            let begun = registered.and_then(|()| self.protect(range));
            if let Err(error) = begun {
                // The one that failed may be registered too; the answer for it tells nothing new.
                let _ = self.unregister_first(before + 1);
                return Err(error);
            }
        }
        self.tracking = true;
        Ok(())
    }

    fn collect(&mut self, set: &DirtySet, _phase: CollectPhase) -> Result<Collection, Error> {
        if !self.tracking {
            return Err(Error::Misuse {
                what: "the process source collects only between start and stop".into(),
            });
        }
        let begun = Instant::now();
        let mut sum = Collection::default();
        let mut failed = None;
        for range in self.ranges.clone() {
            match self.collect_range(&range, set) {
                Ok(collection) => sum += collection,
                Err(error) => {
                    self.counters.failed_range(&error);
                    failed = failed.or(Some(error));
                }
            }
        }
        self.counters.harvested(begun, sum);
        failed.map_or(Ok(sum), |error| {
            Err(Error::Kernel {
                call: abi::PAGEMAP_SCAN.name(),
                error,
            })
        })
    }

    fn stop(&mut self) -> Result<(), Error> {
        if !std::mem::take(&mut self.tracking) {
            return Ok(());
        }
        self.unregister_first(self.ranges.len())
    }

    fn figures(&self) -> Figures {
        self.counters.figures()
    }
}

impl Drop for ProcessSource {
    fn drop(&mut self) {
        // The kernel does the same when the descriptor's last copy is closed.
        let _ = self.stop();
    }
}

/// Refuses an answer that would have the scan repeat itself for ever or run away.
fn advanced(step: (usize, u64), from: u64, range: &MappedRange) -> io::Result<(usize, u64)> {
    let (count, end) = step;
    if end > from && end <= range.end() {
        return Ok((count, end));
    }
    Err(io::Error::other(format!(
        "the scan from {from:#x} ended at {end:#x}"
    )))
}

fn refuse_overlap(ranges: &[MappedRange]) -> Result<(), Error> {
    let mut sorted: Vec<_> = ranges.iter().collect();
    sorted.sort_by_key(|range| range.address);
    let overlap = sorted
        .windows(2)
        .find(|pair| pair[0].end() > pair[1].address);
    overlap.map_or(Ok(()), |pair| {
        Err(Error::Misuse {
            what: format!(
                "the ranges at {:#x} and {:#x} overlap",
                pair[0].address, pair[1].address
            ),
        })
    })
}

/// Why there is no descriptor, in words that help.
pub(super) fn not_opened(error: io::Error) -> Error {
    let advice = match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "it is not permitted to this process: allow the system call userfaultfd in the filter (seccomp) of the \
             container or service; no capability and no sysctl is needed since Linux 5.11"
        }
        Some(libc::ENOSYS) => {
            "this kernel was built without CONFIG_USERFAULTFD, or a filter of system calls says so"
        }
        _ => "see the error",
    };
    Error::Unsupported {
        what: format!("tracking a process by userfaultfd ({error}): {advice}"),
    }
}

/// Why the descriptor does not do what is needed.
pub(super) fn not_offered(call: &str, error: io::Error) -> Error {
    Error::Unsupported {
        what: format!(
            "tracking a process by asynchronous write protection ({call}: {error}): Linux 6.7 or later with \
             CONFIG_USERFAULTFD and CONFIG_PTE_MARKER_UFFD_WP has it"
        ),
    }
}
