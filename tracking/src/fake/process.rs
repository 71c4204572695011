//! A fake userfaultfd and page map of one process: which pages are there, and which are protected.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{FakeFd, FakeKernel, FakeObject, refused, structure, structure_with, u64_at};
use crate::kernel::{Parts, Request};

// From linux/userfaultfd.h and linux/fs.h, as a compiler gives them.
const UFFDIO_API: u32 = 0xc018_aa3f;
const UFFDIO_REGISTER: u32 = 0xc020_aa00;
const UFFDIO_UNREGISTER: u32 = 0x8010_aa01;
const PAGEMAP_SCAN: u32 = 0xc060_6610;
const FEATURES: u64 = (1 << 17) - 1;

/// A process whose memory is numbers. Cloning gives another handle to the same one.
#[derive(Clone, Default)]
pub struct FakeProcess {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    agreed: bool,
    /// Start and end of what is registered.
    registered: Vec<(u64, u64)>,
    /// Addresses of pages that were ever touched.
    present: BTreeSet<u64>,
    protected: BTreeSet<u64>,
    /// The next scans stop after so many pieces.
    pieces_max: Option<usize>,
    features: u64,
}

impl FakeProcess {
    /// A process without memory.
    #[must_use]
    pub fn new() -> Self {
        let process = Self::default();
        process.locked().features = FEATURES;
        process
    }

    /// The descriptors of its userfaultfd and of its page map.
    #[must_use]
    pub fn open(&self, kernel: &FakeKernel) -> (FakeFd, FakeFd) {
        let state = || Arc::clone(&self.state);
        (
            kernel.open(Faults { state: state() }),
            kernel.open(PageMap { state: state() }),
        )
    }

    /// A write to the page at `address`: lifts its protection.
    pub fn write(&self, address: u64) {
        let mut state = self.locked();
        let page = address & !4095;
        state.present.insert(page);
        state.protected.remove(&page);
    }

    /// Lets scans stop after so many pieces, as a small answer does.
    pub fn stop_scans_after(&self, pieces: usize) {
        self.locked().pieces_max = Some(pieces);
    }

    /// A kernel that lacks features.
    pub fn offer_only(&self, features: u64) {
        self.locked().features = features;
    }

    /// How many pages are protected.
    #[must_use]
    pub fn protected_pages(&self) -> usize {
        self.locked().protected.len()
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Faults {
    state: Arc<Mutex<State>>,
}

impl FakeObject for Faults {
    fn ioctl(&mut self, request: Request, parts: Parts<'_>) -> io::Result<i32> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match request.number() {
            UFFDIO_API => {
                let octets = structure(parts, 24);
                assert_eq!(u64_at(octets, 0), 0xaa, "the version of the interface");
                assert!(!state.agreed, "the interface is agreed on once");
                let features = u64_at(octets, 8);
                if features & !state.features != 0 {
                    return refused(libc::EINVAL);
                }
                assert_eq!(
                    features,
                    1 << 15 | 1 << 12,
                    "asynchronous protection, shared memory too"
                );
                state.agreed = true;
                Ok(0)
            }
            UFFDIO_REGISTER => {
                let octets = structure(parts, 32);
                assert!(state.agreed);
                let (start, bytes, mode) =
                    (u64_at(octets, 0), u64_at(octets, 8), u64_at(octets, 16));
                assert_eq!(mode, 2, "write protection and nothing else");
                check_range(start, bytes);
                state.registered.push((start, start + bytes));
                octets[24..32].copy_from_slice(&(1u64 << 6).to_ne_bytes());
                Ok(0)
            }
            UFFDIO_UNREGISTER => {
                let octets = structure(parts, 16);
                let (start, bytes) = (u64_at(octets, 0), u64_at(octets, 8));
                check_range(start, bytes);
                let end = start + bytes;
                state.registered.retain(|range| *range != (start, end));
                state.protected.retain(|page| !(start..end).contains(page));
                Ok(0)
            }
            other => panic!(
                "{} has number {other:#x}, which no userfaultfd knows",
                request.name()
            ),
        }
    }
}

fn check_range(start: u64, bytes: u64) {
    assert!(start.is_multiple_of(4096) && bytes.is_multiple_of(4096) && bytes > 0);
}

struct PageMap {
    state: Arc<Mutex<State>>,
}

impl FakeObject for PageMap {
    fn ioctl(&mut self, request: Request, parts: Parts<'_>) -> io::Result<i32> {
        assert_eq!(request.number(), PAGEMAP_SCAN, "{}", request.name());
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match parts {
            Parts::Struct(octets, None) => {
                assert_eq!(u64_at(octets, 40), 0, "no address");
                assert_eq!(u64_at(octets, 48), 0, "no room for pieces");
                state.scan(structure(Parts::Struct(octets, None), 96), None)
            }
            parts => {
                let (octets, pieces) = structure_with(parts, 96, 40);
                assert_eq!(
                    u64_at(octets, 48) as usize * 3,
                    pieces.len(),
                    "room for pieces"
                );
                assert_eq!(u64_at(octets, 88), 2, "asks for PAGE_IS_WRITTEN");
                state.scan(octets, Some(pieces))
            }
        }
    }
}

impl State {
    /// Protects the written pages of the range and reports them as pieces, as far as there is room.
    fn scan(&mut self, octets: &mut [u8], pieces: Option<&mut [u64]>) -> io::Result<i32> {
        assert_eq!(u64_at(octets, 0), 96, "the structure's own size");
        assert_eq!(
            u64_at(octets, 8),
            3,
            "protect what matches, and check for protection"
        );
        assert_eq!(u64_at(octets, 56), 0, "as many pages as there are");
        assert_eq!(u64_at(octets, 64), 0, "no category is inverted");
        assert_eq!(u64_at(octets, 72), 2, "written pages");
        assert_eq!(u64_at(octets, 80), 0, "and no others");
        let (start, end) = (u64_at(octets, 16), u64_at(octets, 24));
        assert!(start <= end);
        let room = pieces
            .as_ref()
            .map_or(usize::MAX, |pieces| pieces.len() / 3);
        let room = room.min(self.pieces_max.unwrap_or(usize::MAX));
        let written: Vec<u64> = self
            .present
            .range(start..end)
            .copied()
            .filter(|page| !self.protected.contains(page))
            .collect();
        if written.iter().any(|page| !self.is_registered(*page)) {
            return refused(libc::EPERM);
        }
        let mut found: Vec<[u64; 3]> = Vec::new();
        let mut walked = end;
        for page in written {
            let full = found.len() == room;
            match found.last_mut() {
                Some(last) if last[1] == page => last[1] += 4096,
                _ if full => {
                    walked = page;
                    break;
                }
                _ => found.push([page, page + 4096, 2]),
            }
            self.protected.insert(page);
        }
        octets[32..40].copy_from_slice(&walked.to_ne_bytes());
        let Some(pieces) = pieces else {
            return Ok(0);
        };
        for (place, piece) in pieces.chunks_exact_mut(3).zip(&found) {
            place.copy_from_slice(piece);
        }
        Ok(found.len() as i32)
    }

    fn is_registered(&self, page: u64) -> bool {
        self.registered
            .iter()
            .any(|(start, end)| (*start..*end).contains(&page))
    }
}
