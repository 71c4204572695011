//! What a vhost-user back end writes: the dirty log of its protocol, a bitmap in memory that both processes share.
//!
//! ```text
//!   log      file of VHOST_USER_SET_LOG_BASE, mapped from `mmap offset` on, `mmap size` bytes long
//!   byte n  pages 8n … 8n+7 of 4096 bytes, counted from guest-physical address 0, the lowest bit first
//!   back end writes memory, then sets the bit (atomic or);  this side takes the bits, word by word (atomic and)
//! ```
//!
//! The order is what makes it whole: a bit that is taken follows its write, so whoever reads the page afterwards reads that
//! write; a bit that is set later is found later. Little-endian hosts see byte 8n and its followers as one word of 64
//! pages, and others swap it ([`u64::from_le`]).
//!
//! The embedder tells its back ends: `VHOST_USER_SET_LOG_BASE` with [`VhostUserLog::base`], features with
//! `VHOST_F_LOG_ALL`, and `VHOST_VRING_F_LOG` with the address of each used ring; and it takes them back after
//! [`Source::stop`]. A back end writes the log from when it got it; `start` throws away what it has logged before.
//!
//! Source: the vhost-user protocol, sections "Migration" and "Log description" (QEMU's `docs/interop/vhost-user.rst`).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::kernel::{SharedWords, seal_against_shrinking, sealed_memory_file};
use crate::levels::WORD_BITS;
use crate::source::Counters;
use crate::{CollectPhase, Collected, Collection, DirtySet, Error, Figures, PAGE_BYTES, Source};

/// A region of guest memory, by where the guest has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestRange {
    /// Index of the region.
    pub region: u32,
    /// Guest-physical address of its first byte, a multiple of 4096.
    pub guest_address: u64,
    /// Its pages.
    pub pages: u64,
}

/// What goes into `VHOST_USER_SET_LOG_BASE`.
#[derive(Clone, Copy, Debug)]
pub struct LogBase<'a> {
    /// The descriptor to pass along.
    pub file: BorrowedFd<'a>,
    /// `mmap size`.
    pub bytes: u64,
    /// `mmap offset`.
    pub offset: u64,
}

/// The log that back ends write, as a source.
#[derive(Debug)]
pub struct VhostUserLog {
    file: OwnedFd,
    offset: u64,
    log: SharedWords,
    pieces: Vec<Piece>,
    tracking: bool,
    counters: Counters,
}

/// The words of the log that hold one region.
#[derive(Debug)]
struct Piece {
    region: u32,
    /// The region's first page, in the log's numbering.
    first: u64,
    pages: u64,
}

impl VhostUserLog {
    /// A new log, in a file of its own.
    ///
    /// # Errors
    /// [`Error::Misuse`] for a range that cannot be, [`Error::Kernel`].
    pub fn allocate(ranges: &[GuestRange]) -> Result<Self, Error> {
        let bytes = log_bytes(ranges)?;
        let file = sealed_memory_file(bytes).map_err(|error| Error::Kernel {
            call: "memfd_create of a vhost-user log",
            error,
        })?;
        Self::over(file, 0, bytes, ranges)
    }

    /// The log that lies in `file`, `bytes` bytes from byte `offset` on.
    ///
    /// The file is sealed against shrinking here: otherwise whoever holds a descriptor of it could make this process fault.
    ///
    /// # Errors
    /// [`Error::Misuse`] if the log is too small for the memory, does not lie in the file or is not aligned to 8 bytes,
    /// the file cannot be sealed, or for a range that cannot be; [`Error::Kernel`].
    pub fn over(
        file: OwnedFd,
        offset: u64,
        bytes: u64,
        ranges: &[GuestRange],
    ) -> Result<Self, Error> {
        let misuse = |what: String| Err(Error::Misuse { what });
        let needed = log_bytes(ranges)?;
        if bytes < needed || !offset.is_multiple_of(8) {
            return misuse(format!(
                "a log of {bytes} bytes at offset {offset}: this memory needs {needed} bytes, at a multiple of 8"
            ));
        }
        if let Err(error) = seal_against_shrinking(file.as_fd()) {
            return misuse(format!(
                "the log's file cannot be sealed against shrinking ({error}): give a memfd made with MFD_ALLOW_SEALING, \
                 or one that has F_SEAL_SHRINK"
            ));
        }
        let file_bytes = std::fs::File::from(file.try_clone().map_err(kernel("dup of a log"))?)
            .metadata()
            .map_err(kernel("fstat of a log"))?
            .len();
        if offset
            .checked_add(needed)
            .is_none_or(|end| end > file_bytes)
        {
            return misuse(format!(
                "the log's file has {file_bytes} bytes: {needed} from byte {offset} on do not lie in it"
            ));
        }
        let words = usize::try_from(needed / 8).map_err(|_| Error::Misuse {
            what: "the log does not fit this process".into(),
        })?;
        let log = SharedWords::new(file.as_fd(), offset, words)
            .map_err(kernel("mmap of a vhost-user log"))?;
        Ok(Self {
            file,
            offset,
            log,
            pieces: ranges
                .iter()
                .map(|range| Piece {
                    region: range.region,
                    first: range.guest_address / PAGE_BYTES,
                    pages: range.pages,
                })
                .collect(),
            tracking: false,
            counters: Counters::default(),
        })
    }

    /// What to tell the back ends.
    pub fn base(&self) -> LogBase<'_> {
        LogBase {
            file: self.file.as_fd(),
            bytes: self.log.words().len() as u64 * 8,
            offset: self.offset,
        }
    }

    /// Takes the bits of every region out of the log.
    fn take(&self, mut found: impl FnMut(&Piece, Collected)) {
        for piece in &self.pieces {
            let mut collected = Collected::new();
            let (low, high) = (
                piece.first / WORD_BITS,
                (piece.first + piece.pages - 1) / WORD_BITS,
            );
            let words = &self.log.words()[low as usize..=high as usize];
            for (word, index) in words.iter().zip(low..) {
                let bits = take_word(word, piece.mask(index));
                if bits != 0 {
                    piece.push(index, bits, &mut collected);
                }
            }
            if !collected.is_empty() {
                found(piece, collected);
            }
        }
    }
}

/// Takes the bits of `mask`. A clean word costs a look: the log of an idle device stays in everybody's cache.
fn take_word(word: &AtomicU64, mask: u64) -> u64 {
    let mask = mask.to_le();
    if word.load(Ordering::Relaxed) & mask == 0 {
        return 0;
    }
    // Acquire: the write to memory came before the bit was set.
    u64::from_le(word.fetch_and(!mask, Ordering::AcqRel) & mask)
}

impl Piece {
    /// The bits of word `index` that are pages of this region: two regions may share a word.
    fn mask(&self, index: u64) -> u64 {
        let begins = self.first.saturating_sub(index * WORD_BITS);
        let ends = (self.first + self.pages - index * WORD_BITS).min(WORD_BITS);
        (u64::MAX << begins) & (u64::MAX >> (WORD_BITS - ends))
    }

    /// Adds the pages of word `index`, wherever they lie in the region's words.
    fn push(&self, index: u64, bits: u64, collected: &mut Collected) {
        let word = index * WORD_BITS;
        let (page, bits) = match word.checked_sub(self.first) {
            Some(page) => (page, bits),
            None => (0, bits >> (self.first - word)),
        };
        let (place, shift) = (page / WORD_BITS, page % WORD_BITS);
        collected.push_bits(self.region, place, bits << shift);
        if shift != 0 {
            collected.push_bits(self.region, place + 1, bits >> (WORD_BITS - shift));
        }
    }
}

impl Source for VhostUserLog {
    fn name(&self) -> &str {
        "vhost-user-log"
    }

    fn start(&mut self, set: &DirtySet) -> Result<(), Error> {
        for piece in &self.pieces {
            set.check(crate::Run {
                region: piece.region,
                first: 0,
                count: piece.pages,
            })?;
        }
        // What was logged before is covered by round 0.
        self.take(|_, collected| drop(collected.rearmed_by_fetch()));
        self.tracking = true;
        Ok(())
    }

    fn collect(&mut self, set: &DirtySet, _phase: CollectPhase) -> Result<Collection, Error> {
        if !self.tracking {
            return Err(Error::Misuse {
                what: "the vhost-user log is collected only between start and stop".into(),
            });
        }
        let begun = Instant::now();
        let mut sum = Collection::default();
        self.take(|_, collected| {
            self.counters.resets.fetch_add(1, Ordering::Relaxed);
            sum.reported += collected.pages();
            // A bit that was taken can be set again: taking is what re-arms.
            sum.pages += set.merge(collected.rearmed_by_fetch());
        });
        self.counters.harvested(begun, sum);
        Ok(sum)
    }

    fn stop(&mut self) -> Result<(), Error> {
        self.tracking = false;
        Ok(())
    }

    fn figures(&self) -> Figures {
        self.counters.figures()
    }
}

/// The bytes of a log over these ranges: one bit for each page up to the highest, in whole words.
fn log_bytes(ranges: &[GuestRange]) -> Result<u64, Error> {
    let end = |range: &GuestRange| {
        (range.pages > 0 && range.guest_address.is_multiple_of(PAGE_BYTES))
            .then(|| (range.guest_address / PAGE_BYTES).checked_add(range.pages))
            .flatten()
            .ok_or_else(|| Error::Misuse {
                what: format!(
                    "region {} of {} pages at guest address {:#x}: a region has at least one page, at a multiple of {PAGE_BYTES}",
                    range.region, range.pages, range.guest_address
                ),
            })
    };
    let mut pages = 0;
    for range in ranges {
        pages = pages.max(end(range)?);
    }
    let mut sorted: Vec<_> = ranges.iter().collect();
    sorted.sort_by_key(|range| range.guest_address);
    let meet = |pair: &&[&GuestRange]| {
        pair[0].guest_address / PAGE_BYTES + pair[0].pages > pair[1].guest_address / PAGE_BYTES
    };
    if let Some(pair) = sorted.windows(2).find(meet) {
        return Err(Error::Misuse {
            what: format!(
                "regions {} and {} overlap at guest address {:#x}",
                pair[0].region, pair[1].region, pair[1].guest_address
            ),
        });
    }
    if pages == 0 {
        return Err(Error::Misuse {
            what: "a vhost-user log needs at least one region".into(),
        });
    }
    Ok(pages.div_ceil(WORD_BITS) * 8)
}

fn kernel(call: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |error| Error::Kernel { call, error }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt as _;

    use super::*;

    /// Two regions that share the word of pages 64 to 127, and a hole.
    const RANGES: [GuestRange; 3] = [
        GuestRange {
            region: 0,
            guest_address: 0,
            pages: 100,
        },
        GuestRange {
            region: 1,
            guest_address: 100 * PAGE_BYTES,
            pages: 50,
        },
        GuestRange {
            region: 2,
            guest_address: 1 << 20 << 12,
            pages: 64,
        },
    ];

    fn set() -> DirtySet {
        DirtySet::new(&[100, 50, 64])
    }

    /// A back end: the protocol's own formula, byte by byte through the file.
    fn log_write(log: &VhostUserLog, guest_address: u64) {
        let page = guest_address / 4096;
        let file = File::from(log.file.try_clone().unwrap());
        let mut octet = [0];
        let at = log.offset + page / 8;
        file.read_exact_at(&mut octet, at).unwrap();
        octet[0] |= 1 << (page % 8);
        file.write_all_at(&octet, at).unwrap();
    }

    fn taken(set: &DirtySet) -> Vec<(u32, u64)> {
        let mut round = set.take_round();
        std::iter::from_fn(|| round.next_run(1))
            .map(|run| (run.region, run.first))
            .collect()
    }

    #[test]
    fn bits_mean_the_pages_that_the_protocol_says() {
        let mut log = VhostUserLog::allocate(&RANGES).unwrap();
        assert_eq!(log.base().bytes, (1 << 20) / 8 + 8);
        let set = set();
        log_write(&log, 5 * 4096);
        log.start(&set).unwrap();
        assert_eq!(
            log.collect(&set, CollectPhase::PreCopy).unwrap().pages,
            0,
            "logged before the start"
        );
        let pages = [0, 63, 64, 99, 100, 127, 128, 149, 1 << 20, (1 << 20) + 63];
        pages
            .iter()
            .for_each(|page| log_write(&log, page * 4096 + 77));
        // Not memory at all.
        log_write(&log, 150 * 4096);
        assert_eq!(log.collect(&set, CollectPhase::PreCopy).unwrap().pages, 10);
        assert_eq!(
            taken(&set),
            [
                (0, 0),
                (0, 63),
                (0, 64),
                (0, 99),
                (1, 0),
                (1, 27),
                (1, 28),
                (1, 49),
                (2, 0),
                (2, 63)
            ]
        );
        assert_eq!(log.collect(&set, CollectPhase::PreCopy).unwrap().pages, 0);
    }

    #[test]
    fn a_log_at_an_offset_of_a_file_of_the_embedder_works() {
        let file = sealed_memory_file(3 * 4096).unwrap();
        let range = [GuestRange {
            region: 0,
            guest_address: 0,
            pages: 100,
        }];
        let mut log = VhostUserLog::over(file, 4096 + 8, 4096, &range).unwrap();
        let set = set();
        log.start(&set).unwrap();
        log_write(&log, 77 * 4096);
        log.collect(&set, CollectPhase::PreCopy).unwrap();
        assert_eq!(taken(&set), [(0, 77)]);
    }

    #[test]
    fn logs_that_cannot_be_are_refused_with_the_reason() {
        let refusal = |offset, bytes, file_bytes, ranges: &[GuestRange]| {
            let file = sealed_memory_file(file_bytes).unwrap();
            VhostUserLog::over(file, offset, bytes, ranges)
                .unwrap_err()
                .to_string()
        };
        let one = [GuestRange {
            region: 0,
            guest_address: 0,
            pages: 100,
        }];
        assert_eq!(
            refusal(0, 15, 4096, &one),
            "a log of 15 bytes at offset 0: this memory needs 16 bytes, at a multiple of 8"
        );
        assert!(VhostUserLog::over(sealed_memory_file(16).unwrap(), 0, 16, &one).is_ok());
        assert_eq!(
            refusal(4, 16, 4096, &one),
            "a log of 16 bytes at offset 4: this memory needs 16 bytes, at a multiple of 8"
        );
        assert_eq!(
            refusal(8, 16, 23, &one),
            "the log's file has 23 bytes: 16 from byte 8 on do not lie in it"
        );
        assert_eq!(
            refusal(0, 16, 16, &[]),
            "a vhost-user log needs at least one region"
        );
        let empty = [GuestRange { pages: 0, ..one[0] }];
        assert!(
            refusal(0, 16, 16, &empty).starts_with("region 0 of 0 pages at guest address 0x0:")
        );
        let odd = [GuestRange {
            guest_address: 7,
            ..one[0]
        }];
        assert!(
            refusal(0, 16, 16, &odd).starts_with("region 0 of 100 pages at guest address 0x7:")
        );
        let twice = [
            one[0],
            GuestRange {
                region: 1,
                guest_address: 99 * 4096,
                pages: 1,
            },
        ];
        assert_eq!(
            refusal(0, 16, 16, &twice),
            "regions 0 and 1 overlap at guest address 0x63000"
        );
        let plain = File::open("/proc/self/exe").unwrap();
        let text = VhostUserLog::over(plain.into(), 0, 16, &one)
            .unwrap_err()
            .to_string();
        assert!(
            text.contains("cannot be sealed against shrinking"),
            "{text}"
        );
    }

    #[test]
    fn nobody_can_shrink_the_log_under_its_reader() {
        let log = VhostUserLog::allocate(&RANGES).unwrap();
        let file = File::from(log.file.try_clone().unwrap());
        assert_eq!(
            file.set_len(0).unwrap_err().raw_os_error(),
            Some(libc::EPERM)
        );
    }
}
