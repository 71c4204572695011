//! Dirty pages by a bitmap that the VMM writes into a shared file whenever it is asked.
//!
//! ```text
//!   region 0: ceil(pages / 64) words | region 1: … | …       bit 0 of a word is the first of its 64 pages; little-endian
//! ```
//! The rule it keeps: whatever goes wrong after the VMM may have taken the pages out of its own log, all pages count as written.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Instant;

use multifd::tracking::{CollectPhase, Collection, DirtySet, Error, Figures, Source};
use multifd::transport::GuestMemory;

use crate::link::Link;
use crate::protocol::{Collect, Kind};

pub(crate) const PAGE_BYTES: u64 = multifd::PAGE_BYTES as u64;

/// Read at a time.
const PIECE_BYTES: usize = 64 * 1024;

/// The bitmap.
#[derive(Debug)]
pub struct BitmapSource {
    link: Arc<Link>,
    file: File,
    /// Words of each region.
    words: Vec<u64>,
    tracking: bool,
    figures: Figures,
}

impl BitmapSource {
    /// In this file, for the regions of `memory`.
    #[must_use]
    pub fn new(link: Arc<Link>, file: OwnedFd, memory: &GuestMemory) -> Self {
        let words = memory
            .layouts()
            .map(|region| region.bytes.div_ceil(PAGE_BYTES).div_ceil(64))
            .collect();
        Self {
            link,
            file: file.into(),
            words,
            tracking: false,
            figures: Figures::default(),
        }
    }

    fn ask(&self, step: Collect) -> Result<(), Error> {
        let told = self.link.tell(Kind::Collect, &step.encode());
        told.map_err(|error| Error::Vmm {
            what: "write its bitmap of dirty pages",
            error: io::Error::other(error),
        })
    }

    fn read(&self, set: &DirtySet) -> io::Result<Collection> {
        let mut sum = Collection::default();
        let mut offset = 0;
        let mut piece = vec![0; PIECE_BYTES];
        for (words, region) in self.words.iter().zip(0..) {
            let mut at = 0;
            while at < *words {
                let count = (PIECE_BYTES as u64 / 8).min(words - at);
                let octets = piece
                    .get_mut(..usize::try_from(count * 8).unwrap_or(PIECE_BYTES))
                    .unwrap_or_default();
                self.file.read_exact_at(octets, offset)?;
                let bits = octets
                    .chunks_exact(8)
                    .map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()));
                sum.reported += bits
                    .clone()
                    .map(|word| u64::from(word.count_ones()))
                    .sum::<u64>();
                sum.pages += set.mark_bitmap(region, at * 64, bits);
                at += count;
                offset += count * 8;
            }
        }
        Ok(sum)
    }
}

impl Source for BitmapSource {
    fn name(&self) -> &str {
        "vmm-bitmap"
    }

    fn start(&mut self, _: &DirtySet) -> Result<(), Error> {
        self.ask(Collect::Start)?;
        self.tracking = true;
        Ok(())
    }

    fn collect(&mut self, set: &DirtySet, phase: CollectPhase) -> Result<Collection, Error> {
        let began = Instant::now();
        let step = match phase {
            CollectPhase::PreCopy => Collect::Running,
            CollectPhase::Final => Collect::Paused,
        };
        let call = "read of the VMM's bitmap";
        let read = self.ask(step).and_then(|()| {
            self.read(set)
                .map_err(|error| Error::Kernel { call, error })
        });
        let took = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.figures.harvests += 1;
        self.figures.harvest_ns += took;
        match &read {
            Ok(collection) => {
                self.figures.pages += collection.pages;
                self.figures.reported += collection.reported;
            }
            Err(_) => {
                self.figures.errors += 1;
                self.figures.all_dirty += 1;
                self.figures.pages += set.mark_all();
            }
        }
        read
    }

    fn stop(&mut self) -> Result<(), Error> {
        if !std::mem::take(&mut self.tracking) {
            return Ok(());
        }
        self.ask(Collect::Stop)
    }

    fn figures(&self) -> Figures {
        self.figures
    }
}
