//! What the kernel says of the mappings that guest memory lies in: `/proc/self/smaps`, and the file behind a shared one.
//!
//! Rule: what can't be read or understood is said to be unknown, never guessed. A caller treats the unknown as if it held content.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// One mapping of this process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Vma {
    /// Addresses.
    pub(super) range: Range<u64>,
    pub(super) shared: bool,
    /// Where in the file it begins, in bytes.
    pub(super) offset: u64,
    device: (u32, u32),
    pub(super) inode: u64,
    pub(super) path: String,
    /// Bytes of it that have pages, and of which copies are in swap space.
    pub(super) resident_bytes: u64,
    pub(super) swapped_bytes: u64,
    /// The size of the pages that the kernel maps it by: larger than the host's for hugetlb only.
    pub(super) page_bytes: u64,
    flags: Vec<String>,
}

impl Vma {
    /// Whether a user-space handler decides what an absent page holds (`userfaultfd`, missing or minor faults).
    pub(super) fn is_served(&self) -> bool {
        self.has("um") || self.has("ui")
    }

    /// Whether the kernel promised no huge pages for it when it was made (`MAP_NORESERVE`).
    pub(super) fn is_unreserved(&self) -> bool {
        self.has("nr")
    }

    pub(super) fn is_huge_tlb(&self) -> bool {
        self.has("ht")
    }

    /// Private memory with nothing behind it: a page that was never written is zero and is nowhere.
    pub(super) fn is_private_anonymous(&self) -> bool {
        !self.shared
            && (self.inode == 0 || self.is_huge_tlb() && self.path.starts_with("/anon_hugepage"))
    }

    /// Its part inside `addresses`, which it meets.
    pub(super) fn part(&self, addresses: &Range<u64>) -> Range<u64> {
        self.range.start.max(addresses.start)..self.range.end.min(addresses.end)
    }

    fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|own| own == flag)
    }

    /// The file behind it, opened anew, so that seeking in it moves nobody's offset.
    ///
    /// By the kernel's own link if this process may follow it (it needs a capability), otherwise by a descriptor of the same
    /// file that this process has open, which a VMM that shares memory has.
    pub(super) fn file(&self) -> io::Result<File> {
        let Range { start, end } = self.range;
        let link = format!("/proc/self/map_files/{start:x}-{end:x}");
        if let Some(file) = self.opened(Path::new(&link)) {
            return Ok(file);
        }
        let open = fs::read_dir("/proc/self/fd")?
            .filter_map(Result::ok)
            .find_map(|entry| self.opened(&entry.path()));
        open.ok_or_else(|| {
            io::Error::other(format!(
                "{} is not open in this process, or may not be opened again",
                self.path
            ))
        })
    }

    /// The file at `path`, if it is the one that is mapped here.
    fn opened(&self, path: &Path) -> Option<File> {
        let is_it = |of: &fs::Metadata| {
            of.is_file()
                && of.ino() == self.inode
                && (libc::major(of.dev()), libc::minor(of.dev())) == self.device
        };
        // Looked at before it is opened: opening a device or a pipe can do things.
        fs::metadata(path).ok().filter(is_it)?;
        let file = File::open(path).ok()?;
        file.metadata().ok().filter(is_it).map(|_| file)
    }
}

/// The mappings that `range` lies in, without gaps and cut to it.
pub(super) fn of_range(range: Range<u64>) -> io::Result<Vec<Vma>> {
    let smaps = BufReader::new(File::open("/proc/self/smaps")?);
    let mut found = Vec::new();
    read(smaps, &range, &mut found)?;
    let mut at = range.start;
    for vma in &found {
        if vma.range.start > at {
            break;
        }
        at = vma.range.end;
    }
    if at < range.end {
        return Err(io::Error::other(format!("nothing is mapped at {at:#x}")));
    }
    Ok(found)
}

/// Reads the mappings that meet `wanted`, as the whole ones that they are. Stops behind the last.
fn read(smaps: impl BufRead, wanted: &Range<u64>, found: &mut Vec<Vma>) -> io::Result<()> {
    let mut meets = false;
    for line in smaps.lines() {
        let line = line?;
        if let Some(vma) = header(&line) {
            if vma.range.start >= wanted.end {
                return Ok(());
            }
            meets = vma.range.end > wanted.start;
            if meets {
                found.push(vma);
            }
        } else if meets && let Some(vma) = found.last_mut() {
            field(vma, &line);
        }
    }
    Ok(())
}

/// `start-end perms offset major:minor inode path`; numbers in base 16 but for the inode.
fn header(line: &str) -> Option<Vma> {
    let mut words = line.splitn(6, ' ');
    let (start, end) = words.next()?.split_once('-')?;
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let range = hex(start)?..hex(end)?;
    let permissions = words.next().filter(|word| word.len() == 4)?;
    let offset = hex(words.next()?)?;
    let (major, minor) = words.next()?.split_once(':')?;
    let part = |text: &str| u32::from_str_radix(text, 16).ok();
    let device = (part(major)?, part(minor)?);
    let inode = words.next()?.parse().ok()?;
    Some(Vma {
        range,
        shared: permissions.ends_with('s'),
        offset,
        device,
        inode,
        path: words.next().unwrap_or_default().trim_start().to_owned(),
        ..Vma::default()
    })
}

fn field(vma: &mut Vma, line: &str) {
    let Some((name, value)) = line.split_once(':') else {
        return;
    };
    let bytes = || {
        let kib = value.trim().strip_suffix(" kB");
        kib.and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) << 10
    };
    match name {
        "KernelPageSize" => vma.page_bytes = bytes(),
        // Huge pages of hugetlb are counted apart.
        "Rss" | "Shared_Hugetlb" | "Private_Hugetlb" => vma.resident_bytes += bytes(),
        "Swap" => vma.swapped_bytes = bytes(),
        "VmFlags" => vma.flags = value.split_whitespace().map(str::to_owned).collect(),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f0000000000-7f0000200000 rw-p 00000000 00:00 0 
Size:               2048 kB
KernelPageSize:        4 kB
Rss:                  12 kB
Swap:                  8 kB
VmFlags: rd wr mr mw me ac sd um 
7f0000200000-7f0000a00000 rw-s 00400000 00:10 4711                       /memfd:guest memory (deleted)
Size:               8192 kB
KernelPageSize:     2048 kB
Rss:                   0 kB
Shared_Hugetlb:        0 kB
Private_Hugetlb:    2048 kB
VmFlags: rd wr sh mr mw me ms nr ht sd 
7f0000a00000-7f0000b00000 rw-p 00000000 00:00 0                          [heap]
";

    fn parsed(wanted: Range<u64>) -> Vec<Vma> {
        let mut found = Vec::new();
        read(SMAPS.as_bytes(), &wanted, &mut found).unwrap();
        found
    }

    #[test]
    fn mappings_are_read_as_the_kernel_prints_them() {
        let [anonymous, huge] = &parsed(0x7f00_0010_0000..0x7f00_0030_0000)[..] else {
            panic!("two mappings meet the range");
        };
        assert!(anonymous.is_private_anonymous() && anonymous.is_served());
        assert_eq!(
            (
                anonymous.resident_bytes,
                anonymous.swapped_bytes,
                anonymous.page_bytes
            ),
            (12 << 10, 8 << 10, 4096)
        );
        assert!(huge.shared && huge.is_huge_tlb() && huge.is_unreserved() && !huge.is_served());
        assert_eq!(
            (
                huge.offset,
                huge.inode,
                huge.resident_bytes,
                huge.page_bytes
            ),
            (0x40_0000, 4711, 2 << 20, 2 << 20)
        );
        assert_eq!(huge.path, "/memfd:guest memory (deleted)");
    }

    #[test]
    fn a_range_with_a_gap_is_refused() {
        assert!(
            of_range(0x1000..0x2000).is_err(),
            "nobody maps the first pages"
        );
    }
}
