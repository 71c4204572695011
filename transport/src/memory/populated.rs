//! Which parts of guest memory may hold something else than zeros, found without touching any.
//!
//! ```text
//!   private, anonymous     pages that exist, in memory or in swap space          pagemap
//!   file of tmpfs, memfd   extents with data; of a private mapping, its pages    SEEK_DATA
//!   file of hugetlbfs      pages mapped here, if the file has no others          pagemap, st_blocks
//!   anything else          all of it
//! ```
//! Rule: a part that is not told of is zero, whoever else maps or writes the memory. Where the kernel can't be asked, everything
//! is told of, with the reason: reading too much is slow, leaving out one page is a lost page. Two traps on the way to it: a page
//! of a shared file may hold content although it is not mapped *here* (another process wrote it), so a mapping's own pages never
//! decide for a file; and an absent page that `userfaultfd` serves holds whatever its handler puts there.
//!
//! Reading a hole instead would fill it: a page for each page of a shared file, however large and empty the guest is.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use super::vma::{self, Vma};
use super::{GuestMemory, Region, pagemap};

/// `st_blocks` counts in these, whatever the file system's blocks are.
pub(super) const BLOCK_BYTES: u64 = 512;

/// A region of which the kernel can't say what is populated, so that all of it, or a mapping's part of it, was told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unknown {
    /// The region.
    pub region_index: u32,
    /// Why not.
    pub reason: String,
}

impl GuestMemory {
    /// Tells the parts of every region, as (region, bytes), that may hold something else than zeros: in rising order inside a mapping,
    /// rounded outwards to host pages, and possibly more than once. What is not told of is all zero. Nothing is read and no hole
    /// becomes real.
    ///
    /// Exact at one moment only for memory that nobody writes. Whoever watches the guest's writes from before the call has every page
    /// either told of here or reported there.
    ///
    /// The cost follows what is populated, and a little the size (`docs/measurements/memory.md`). Returns the regions of which it is
    /// not known: memory that `userfaultfd` serves, shared memory whose file this process does not have open, and files of file systems
    /// other than tmpfs and hugetlbfs.
    pub fn each_populated(&self, visit: &mut dyn FnMut(u32, Range<u64>)) -> Vec<Unknown> {
        let mut unknown = Vec::new();
        let mut huge = BTreeMap::new();
        for (region, region_index) in self.regions.iter().zip(0..) {
            let mut visit = |range| visit(region_index, range);
            let addresses = region.addresses();
            let mut unsure =
                |part: &Range<u64>, reason: String, visit: &mut dyn FnMut(Range<u64>)| {
                    visit(region.inside(part));
                    unknown.push(Unknown {
                        region_index,
                        reason,
                    });
                };
            let vmas = match vma::of_range(addresses.clone()) {
                Ok(vmas) => vmas,
                Err(error) => {
                    unsure(&addresses, error.to_string(), &mut visit);
                    continue;
                }
            };
            for vma in vmas {
                let part = vma.part(&addresses);
                match look(&vma, &part, &mut |found| visit(region.inside(&found))) {
                    Ok(Look::Done) => {}
                    Ok(Look::Huge(file)) => {
                        let parts: &mut HugeFile = huge
                            .entry((file.metadata().map_or(0, |of| of.dev()), vma.inode))
                            .or_insert_with(|| HugeFile {
                                file,
                                path: vma.path.clone(),
                                parts: Vec::new(),
                            });
                        parts.parts.push((region_index, part));
                    }
                    Err(error) => unsure(&part, error.to_string(), &mut visit),
                }
            }
        }
        for file in huge.into_values() {
            self.huge(&file, visit, &mut unknown);
        }
        unknown
    }

    /// The pages of a hugetlb file: those that are mapped here, if it has no others. `st_blocks` counts its pages, and hugetlbfs can't
    /// be asked for its holes.
    fn huge(
        &self,
        file: &HugeFile,
        visit: &mut dyn FnMut(u32, Range<u64>),
        unknown: &mut Vec<Unknown>,
    ) {
        let (found, reason) = match file.mapped() {
            Ok(Some(found)) => (found, None),
            Ok(None) => {
                let reason = format!(
                    "{} has huge pages that this process has not mapped",
                    file.path
                );
                (file.parts.clone(), Some(reason))
            }
            Err(error) => (file.parts.clone(), Some(error.to_string())),
        };
        for (region_index, part) in found {
            if let Some(region) = self.regions.get(region_index as usize) {
                visit(region_index, region.inside(&part));
            }
        }
        if let Some(reason) = reason {
            unknown.extend(file.parts.iter().map(|(region_index, _)| Unknown {
                region_index: *region_index,
                reason: reason.clone(),
            }));
        }
    }
}

impl Region {
    /// Where it lies in this process.
    pub(super) fn addresses(&self) -> Range<u64> {
        let start = self.base.as_ptr() as u64;
        start..start + self.layout.bytes
    }

    /// Addresses as bytes of the region.
    fn inside(&self, addresses: &Range<u64>) -> Range<u64> {
        let start = self.base.as_ptr() as u64;
        let offset = |at: u64| at.saturating_sub(start).min(self.layout.bytes);
        offset(addresses.start)..offset(addresses.end)
    }
}

/// What became of looking at a mapping.
enum Look {
    /// Everything was told.
    Done,
    /// A file of huge pages, which is looked at as a whole.
    Huge(File),
}

/// Tells what is populated of the part `part` of a mapping.
fn look(vma: &Vma, part: &Range<u64>, visit: &mut dyn FnMut(Range<u64>)) -> io::Result<Look> {
    if vma.is_served() {
        return Err(io::Error::other("userfaultfd serves its absent pages"));
    }
    if vma.is_private_anonymous() {
        return pagemap::each_present(part, visit).map(|()| Look::Done);
    }
    let file = vma.file()?;
    match file_system(&file)? {
        FileSystem::Tmpfs => {}
        FileSystem::HugeTlb if vma.shared => return Ok(Look::Huge(file)),
        FileSystem::HugeTlb | FileSystem::Other => {
            let text = format!("{} is no shared memory of tmpfs or hugetlbfs", vma.path);
            return Err(io::Error::other(text));
        }
    }
    let shift = vma.offset.wrapping_sub(vma.range.start);
    let in_file = part.start.wrapping_add(shift)..part.end.wrapping_add(shift);
    each_data(&file, &in_file, &mut |data| {
        visit(data.start.wrapping_sub(shift)..data.end.wrapping_sub(shift));
    })?;
    if !vma.shared {
        pagemap::each_present(part, visit)?;
    }
    Ok(Look::Done)
}

/// The extents of `range` in `file` that have data.
fn each_data(file: &File, range: &Range<u64>, visit: &mut dyn FnMut(Range<u64>)) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        let start = match seek(file, at, libc::SEEK_DATA) {
            Ok(start) if start < range.end => start,
            Ok(_) => return Ok(()),
            // Only holes follow.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(()),
            Err(error) => return Err(error),
        };
        let end = match seek(file, start, libc::SEEK_HOLE) {
            Ok(end) => end,
            // A hole was punched into it since.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(()),
            Err(error) => return Err(error),
        };
        // Data that became a hole between the two calls.
        at = end.max(start + 1);
        if end > start {
            visit(start..end.min(range.end));
        }
    }
    Ok(())
}

fn seek(file: &File, at: u64, whence: libc::c_int) -> io::Result<u64> {
    let at = i64::try_from(at).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    // SAFETY: the descriptor is open, and the call changes its offset only, which is this description's own.
    let answer = unsafe { libc::lseek(file.as_raw_fd(), at, whence) };
    u64::try_from(answer).map_err(|_| io::Error::last_os_error())
}

/// File systems whose holes are known to be told exactly, whoever maps the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileSystem {
    Tmpfs,
    HugeTlb,
    /// Some have no holes or say so later than a page is written: FUSE asks a server that has not heard of it yet.
    Other,
}

pub(super) fn file_system(file: &File) -> io::Result<FileSystem> {
    Ok(match statfs(file)?.f_type {
        libc::TMPFS_MAGIC => FileSystem::Tmpfs,
        libc::HUGETLBFS_MAGIC => FileSystem::HugeTlb,
        _ => FileSystem::Other,
    })
}

pub(super) fn statfs(file: &File) -> io::Result<libc::statfs> {
    let mut answer = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the descriptor is open, and the kernel writes one `statfs` at that address.
    if unsafe { libc::fstatfs(file.as_raw_fd(), answer.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so the kernel filled it in.
    Ok(unsafe { answer.assume_init() })
}

/// Addresses of a region.
type Part = (u32, Range<u64>);

/// A hugetlb file and the parts of it that guest memory has mapped.
struct HugeFile {
    file: File,
    path: String,
    parts: Vec<Part>,
}

impl HugeFile {
    /// The pages mapped here, if they are all pages of the file. Its pages are counted before and after: a page that came
    /// meanwhile was written meanwhile, and whoever watches writes hears of it.
    fn mapped(&self) -> io::Result<Option<Vec<Part>>> {
        let bytes = || self.file.metadata().map(|of| of.blocks() * BLOCK_BYTES);
        let before = bytes()?;
        let mut found = Vec::new();
        let mut mapped = 0;
        for (region_index, part) in &self.parts {
            pagemap::each_present(part, &mut |range| {
                mapped += range.end - range.start;
                found.push((*region_index, range));
            })?;
        }
        Ok((before == mapped && bytes()? == mapped).then_some(found))
    }
}
