//! Whether there is room for all of guest memory, before the first page of it is needed.
//!
//! Without room the kernel answers a write with SIGBUS (a file that is too short or can't grow, huge pages that were never
//! reserved) or kills a process (no memory). Nothing is made real by looking, so the answer holds for the moment only; who needs a
//! promise populates ([`GuestMemory::populate`]) or reserves.
//!
//! ```text
//!   file too short, no room in its file system     the guest would die of SIGBUS       always an error
//!   huge pages not reserved, and too few free      the guest would die of SIGBUS       always an error
//!   host, or a memory cgroup, has less left        something would be killed           an error that is not certain
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use super::populated::{BLOCK_BYTES, FileSystem, file_system, statfs};
use super::vma::{self, Vma};
use super::{GuestMemory, cgroup};

/// What is left to be had counts as less than is needed only if it is by more than this: the figures move all the time.
const SLACK_BYTES: u64 = 16 << 20;

/// Why guest memory can't be backed. All sizes in bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BackingError {
    /// A write behind the file's end is a SIGBUS.
    #[error(
        "{path} has {bytes} bytes and is mapped up to {mapped}: make the file as large as the guest's memory"
    )]
    FileTooShort {
        /// The file.
        path: String,
        /// Its size.
        bytes: u64,
        /// Where the mapping ends in it.
        mapped: u64,
    },
    /// The file can't grow to what is mapped of it.
    #[error(
        "the file system of {path} has {free} bytes left, and the guest's memory in it may need {needed} more: enlarge it, or use \
         another"
    )]
    FileSystemFull {
        /// The first file in it.
        path: String,
        /// What the file system has left.
        free: u64,
        /// What is not backed yet.
        needed: u64,
    },
    /// There are too few huge pages, and none were reserved.
    #[error(
        "{free} bytes of huge pages of {page_bytes} bytes are free and not reserved, and the guest's memory may need {needed} more: \
         provide more of them (nr_hugepages)"
    )]
    HugePages {
        /// The size of one.
        page_bytes: u64,
        /// What is left of them.
        free: u64,
        /// What is not backed yet.
        needed: u64,
    },
    /// The host, or a control group, has too little memory left.
    #[error(
        "{limit} has {free} bytes of memory left, and the guest's memory may need {needed} more: free some, or allow overcommit"
    )]
    Memory {
        /// Who sets the limit: the host, or a control group by name.
        limit: String,
        /// What is left.
        free: u64,
        /// What is not backed yet.
        needed: u64,
    },
}

impl BackingError {
    /// Whether it is certain death for a guest that uses all its memory, and not a matter of how much the host is trusted.
    #[must_use]
    pub fn is_certain(&self) -> bool {
        !matches!(self, Self::Memory { .. })
    }
}

impl GuestMemory {
    /// Whether everything that has no page yet can get one, at this moment. Looks only; memory that can't be looked at passes.
    ///
    /// # Errors
    /// [`BackingError`] for the first thing that is short; those that are certain come first.
    pub fn check_backing(&self) -> Result<(), BackingError> {
        let mut needs = Needs::default();
        for region in self.regions.iter() {
            let addresses = region.addresses();
            for vma in vma::of_range(addresses.clone()).unwrap_or_default() {
                needs.add(&vma, &vma.part(&addresses))?;
            }
        }
        needs.check()
    }
}

/// What is not backed yet, by what would have to back it.
#[derive(Default)]
struct Needs {
    /// Of memory that counts as the host's: private, and tmpfs.
    memory: u64,
    /// By the size of the pages.
    huge_pages: BTreeMap<u64, u64>,
    /// By device: what is needed, what is free, and the first file.
    file_systems: BTreeMap<u64, (u64, u64, String)>,
    /// By device and inode: what of a file's blocks was not yet set against a mapping of it.
    blocks: BTreeMap<(u64, u64), u64>,
    /// By address: the same of a private mapping's pages. One mapping may hold several regions.
    pages: BTreeMap<u64, u64>,
}

impl Needs {
    fn add(&mut self, vma: &Vma, part: &Range<u64>) -> Result<(), BackingError> {
        let bytes = part.end - part.start;
        // Huge pages that were reserved when they were mapped are there for certain.
        if vma.is_huge_tlb() && !vma.is_unreserved() {
            return Ok(());
        }
        if vma.is_private_anonymous() {
            self.private(vma, bytes);
            return Ok(());
        }
        let Ok(file) = vma.file() else {
            return Ok(());
        };
        let (Ok(of), Ok(kind), Ok(fs)) = (file.metadata(), file_system(&file), statfs(&file))
        else {
            return Ok(());
        };
        let mapped = vma.offset + (part.end - vma.range.start);
        if of.len() < mapped {
            return Err(BackingError::FileTooShort {
                path: vma.path.clone(),
                bytes: of.len(),
                mapped,
            });
        }
        if !vma.shared {
            self.private(vma, bytes);
            return Ok(());
        }
        let blocks = self.blocks.entry((of.dev(), of.ino()));
        let missing = not_there(bytes, blocks.or_insert(of.blocks() * BLOCK_BYTES));
        if kind != FileSystem::Other {
            self.own(vma, missing);
        }
        // A tmpfs without a limit says that it has no blocks at all.
        if fs.f_blocks > 0 {
            let free = fs
                .f_bavail
                .saturating_mul(u64::try_from(fs.f_bsize).unwrap_or(0));
            let entry = self.file_systems.entry(of.dev());
            entry.or_insert((0, free, vma.path.clone())).0 += missing;
        }
        Ok(())
    }

    fn private(&mut self, vma: &Vma, bytes: u64) {
        let pages = self.pages.entry(vma.range.start);
        let missing = not_there(
            bytes,
            pages.or_insert(vma.resident_bytes + vma.swapped_bytes),
        );
        self.own(vma, missing);
    }

    /// Counts what pages of the host are needed for.
    fn own(&mut self, vma: &Vma, missing: u64) {
        if vma.is_huge_tlb() {
            *self.huge_pages.entry(vma.page_bytes).or_default() += missing;
        } else {
            self.memory += missing;
        }
    }

    fn check(self) -> Result<(), BackingError> {
        for (needed, free, path) in self.file_systems.into_values() {
            if needed > free {
                return Err(BackingError::FileSystemFull { path, free, needed });
            }
        }
        for (page_bytes, needed) in self.huge_pages {
            let free = free_huge_bytes(page_bytes);
            if let Some(free) = free.filter(|free| needed > *free) {
                return Err(BackingError::HugePages {
                    page_bytes,
                    free,
                    needed,
                });
            }
        }
        let limits = host_left().into_iter().chain(cgroup::left());
        let needed = self.memory;
        for (limit, free) in limits {
            if needed > free.saturating_add(SLACK_BYTES) {
                return Err(BackingError::Memory {
                    limit,
                    free,
                    needed,
                });
            }
        }
        Ok(())
    }
}

/// What `bytes` need beyond what is there, which is used up by them.
fn not_there(bytes: u64, there: &mut u64) -> u64 {
    let used = bytes.min(*there);
    *there -= used;
    bytes - used
}

/// Bytes of huge pages of a size that are free and promised to nobody, or that the kernel may make.
fn free_huge_bytes(page_bytes: u64) -> Option<u64> {
    let directory = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", page_bytes >> 10);
    let count = |name: &str| {
        let text = fs::read_to_string(format!("{directory}/{name}")).ok()?;
        text.trim().parse::<u64>().ok()
    };
    let free = count("free_hugepages")?.saturating_sub(count("resv_hugepages")?);
    let surplus = count("nr_overcommit_hugepages")?.saturating_sub(count("surplus_hugepages")?);
    Some(free.saturating_add(surplus).saturating_mul(page_bytes))
}

/// What the host has left: what it says is available, and what fits its swap space.
fn host_left() -> Option<(String, u64)> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
        Some(kib << 10)
    };
    let left = field("MemAvailable:")? + field("SwapFree:").unwrap_or(0);
    Some(("this host".to_owned(), left))
}
