//! A VMM whose guest leaves, as the source's library sees it: each call goes over the link.
//!
//! The rule it keeps: the VMM is told [`Kind::Resume`] only with the library's [`Reclaimed`], and [`Kind::Committing`] before the commit is
//! sent, so that its answer to the question "is the guest certainly mine?" never depends on this process being alive.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use multifd::source::{AskTicket, GuestState, Reclaimed, Throttled, Vmm};
use multifd::tracking::process::{MappedRange, Permission, ProcessSource};
use multifd::tracking::{Error as TrackingError, Source};
use multifd::transport::{FileRegion, GuestMemory, MapError, RegionLayout};
use multifd::{Blob, VmmError};

use crate::bitmap::{BitmapSource, PAGE_BYTES};
use crate::link::{Answer, Link, LinkError, wrong};
use crate::protocol::{
    self, Kind, Malformed, RegionEntry, SESSION_BYTES, Status, TrackerEntry, TrackerKind,
};

/// The VMM.
#[derive(Debug)]
pub struct Leaving {
    link: Arc<Link>,
    session: [u8; SESSION_BYTES],
}

/// Memory that the VMM handed over, with its files, which are kept open: what is populated is asked of them.
#[derive(Debug)]
pub struct HandedOver {
    /// The memory, mapped here.
    pub memory: GuestMemory,
    /// Its files.
    pub files: Vec<OwnedFd>,
}

/// Why what the VMM hands over can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandOverError {
    /// The call.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The memory.
    #[error("the VMM's memory can't be mapped: {0}")]
    Memory(#[from] MapError),
    /// The tracking.
    #[error("the VMM's dirty pages can't be found: {0}")]
    Tracking(#[from] TrackingError),
    /// There is none.
    #[error("the VMM names no way to find dirty pages")]
    NoTracker,
    /// There is more than can be read at one moment.
    #[error("the VMM names two bitmaps: one COLLECT fills one, for all of memory")]
    TwoBitmaps,
    /// Pages of which nobody would know whether they were written.
    #[error("the VMM names no way to find dirty pages in {pages} pages of region {region}")]
    Untracked {
        /// Which region.
        region: u32,
        /// How many of its pages.
        pages: u64,
    },
    /// A region that was not asked for.
    #[error("the VMM's regions are not those of the source: {what}")]
    Regions {
        /// How they differ.
        what: String,
    },
}

impl Leaving {
    /// Over this link.
    #[must_use]
    pub const fn new(link: Arc<Link>) -> Self {
        let session = [0; SESSION_BYTES];
        Self { link, session }
    }
}

/// Asks for the guest's memory, and maps it.
///
/// # Errors
/// [`HandOverError`].
pub fn memory(link: &Link) -> Result<HandedOver, HandOverError> {
    let answer = link.ask(Kind::Memory, &[], &[])?;
    map(Kind::Memory, answer)
}

/// Maps the regions of an answer.
pub(crate) fn map(kind: Kind, answer: Answer) -> Result<HandedOver, HandOverError> {
    let Answer { body, descriptors } = answer;
    let entries = wrong(kind, protocol::read_regions(&body, descriptors.len()))?;
    let regions = entries
        .iter()
        .map(|entry| file_region(entry, &descriptors))
        .collect::<Result<Vec<_>, _>>();
    let memory = GuestMemory::from_files(&wrong(kind, regions)?)?;
    Ok(HandedOver {
        memory,
        files: descriptors,
    })
}

fn file_region<'f>(entry: &RegionEntry, files: &'f [OwnedFd]) -> Result<FileRegion<'f>, Malformed> {
    let index = entry.descriptor;
    let count = files.len();
    let file = usize::try_from(index)
        .ok()
        .and_then(|index| files.get(index))
        .ok_or(Malformed::Descriptor { index, count })?;
    Ok(FileRegion {
        layout: RegionLayout {
            guest_address: entry.guest_address,
            bytes: entry.bytes,
        },
        file: file.as_fd(),
        offset: entry.offset,
    })
}

/// Asks how dirty pages are found, and makes sources of that.
///
/// # Errors
/// [`HandOverError`].
pub fn trackers(
    link: &Arc<Link>,
    memory: &GuestMemory,
) -> Result<Vec<Box<dyn Source>>, HandOverError> {
    let kind = Kind::Trackers;
    let Answer { body, descriptors } = link.ask(kind, &[], &[])?;
    let entries = wrong(kind, protocol::read_trackers(&body, descriptors.len()))?;
    let mut descriptors: Vec<_> = descriptors.into_iter().map(Some).collect();
    let mut sources: Vec<Box<dyn Source>> = Vec::new();
    check_coverage(&entries, memory)?;
    let mut entries = entries.as_slice();
    while let Some(first) = entries.first() {
        let same =
            |entry: &TrackerEntry| (entry.kind, entry.descriptor) == (first.kind, first.descriptor);
        // Entries of one tracker stand together; one that comes again finds its descriptor taken.
        let count = entries.iter().take_while(|entry| same(entry)).count();
        let (own, others) = entries.split_at(count);
        entries = others;
        let mut take = |index: u32| {
            let count = descriptors.len();
            usize::try_from(index)
                .ok()
                .and_then(|index| descriptors.get_mut(index)?.take())
                .ok_or(Malformed::Descriptor { index, count })
        };
        let faults = wrong(kind, take(first.descriptor))?;
        match first.kind {
            TrackerKind::Process => {
                let pagemap = wrong(kind, take(first.descriptor.saturating_add(1)))?;
                let permission = Permission { faults, pagemap };
                let ranges = own.iter().map(range).collect();
                let source = ProcessSource::of_another(&permission, ranges)?;
                sources.push(Box::new(source));
            }
            TrackerKind::Bitmap => {
                sources.push(Box::new(BitmapSource::new(
                    Arc::clone(link),
                    faults,
                    memory,
                )));
            }
        }
    }
    Ok(sources)
}

/// Every page has somebody who knows whether it was written.
fn check_coverage(entries: &[TrackerEntry], memory: &GuestMemory) -> Result<(), HandOverError> {
    let bitmaps = |entry: &&TrackerEntry| entry.kind == TrackerKind::Bitmap;
    match entries.iter().filter(bitmaps).count() {
        0 => {}
        1 => return Ok(()),
        _ => return Err(HandOverError::TwoBitmaps),
    }
    if entries.is_empty() {
        return Err(HandOverError::NoTracker);
    }
    for (region, layout) in (0..).zip(memory.layouts()) {
        let own = entries.iter().filter(|entry| entry.region == region);
        let tracked = own.fold(0_u64, |sum, entry| sum.saturating_add(entry.pages));
        let pages = (layout.bytes / PAGE_BYTES).saturating_sub(tracked);
        if pages > 0 {
            return Err(HandOverError::Untracked { region, pages });
        }
    }
    Ok(())
}

fn range(entry: &TrackerEntry) -> MappedRange {
    MappedRange {
        region: entry.region,
        first: entry.first_page,
        address: entry.address,
        pages: entry.pages,
    }
}

impl Vmm for Leaving {
    fn config(&mut self) -> Result<Vec<Blob>, VmmError> {
        Ok(self.link.blobs(Kind::Config)?)
    }

    fn guest(&mut self) -> GuestState {
        let answer = self.link.ask(Kind::Guest, &[], &[]);
        let state = answer
            .and_then(|answer| wrong(Kind::Guest, protocol::read_word("GUEST", &answer.body)));
        match state {
            Ok(1) => GuestState::Paused,
            Ok(_) => GuestState::Running,
            Err(error) => {
                // Whatever is asked next fails as well, and says so.
                tracing::warn!(%error, "whether the guest runs is not known");
                GuestState::Running
            }
        }
    }

    fn granted(&mut self, ticket: &AskTicket) -> Result<(), VmmError> {
        self.session = ticket.session();
        let ticket = [ticket.session(), ticket.secret()].concat();
        Ok(self.link.tell(Kind::Granted, &ticket)?)
    }

    fn throttle(&mut self, percent: u8) -> Result<Throttled, VmmError> {
        let told = self
            .link
            .tell(Kind::Throttle, &protocol::word(percent.into()));
        match told {
            Ok(()) => Ok(Throttled::Done),
            Err(LinkError::Refused {
                status: Status::UnknownKind,
                ..
            }) => Ok(Throttled::NotSupported),
            Err(error) => Err(error.into()),
        }
    }

    fn pause(&mut self) -> Result<(), VmmError> {
        Ok(self.link.tell(Kind::Pause, &[])?)
    }

    fn save(&mut self) -> Result<Vec<Blob>, VmmError> {
        Ok(self.link.blobs(Kind::Save)?)
    }

    fn committing(&mut self) -> Result<(), VmmError> {
        Ok(self.link.tell(Kind::Committing, &[])?)
    }

    fn resume(&mut self, _: Reclaimed) -> Result<(), VmmError> {
        Ok(self.link.tell(Kind::Resume, &self.session)?)
    }

    fn migrated(&mut self) {
        if let Err(error) = self.link.tell(Kind::Migrated, &self.session) {
            tracing::warn!(%error, "the source's VMM could not be told that its guest has migrated");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: TrackerKind, region: u32, pages: u64) -> TrackerEntry {
        TrackerEntry {
            kind,
            descriptor: 0,
            region,
            first_page: 0,
            address: 0,
            pages,
        }
    }

    #[test]
    fn every_page_has_one_who_knows_whether_it_was_written() {
        use TrackerKind::{Bitmap, Process};
        let region = |guest_address| RegionLayout {
            guest_address,
            bytes: 4 * PAGE_BYTES,
        };
        let memory = GuestMemory::anonymous(&[region(0), region(1 << 20)]).unwrap();
        let check = |entries: &[TrackerEntry]| check_coverage(entries, &memory);
        assert!(check(&[entry(Bitmap, 0, 0)]).is_ok());
        assert!(
            check(&[
                entry(Process, 0, 4),
                entry(Process, 1, 1),
                entry(Process, 1, 3)
            ])
            .is_ok()
        );
        assert!(matches!(check(&[]), Err(HandOverError::NoTracker)));
        let two = [entry(Bitmap, 0, 0), entry(Bitmap, 0, 0)];
        assert!(matches!(check(&two), Err(HandOverError::TwoBitmaps)));
        let short = check(&[entry(Process, 0, 4), entry(Process, 1, 3)]);
        assert!(matches!(
            short,
            Err(HandOverError::Untracked {
                region: 1,
                pages: 1
            })
        ));
    }
}
