//! Which pages of a mapping exist: the ioctl `PAGEMAP_SCAN` of Linux 6.7, and before that the file `/proc/self/pagemap`.
//!
//! Neither touches a page. Source: `Documentation/admin-guide/mm/pagemap.rst`, `linux/fs.h`.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::map::host_page_bytes;

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: u64 = 0xC060_6610;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
/// The shared page of zeros, which a read of fresh private memory maps.
const PAGE_IS_PFNZERO: u64 = 1 << 5;

/// Bits of an entry of `/proc/self/pagemap`.
const ENTRY_PRESENT: u64 = 1 << 63;
const ENTRY_SWAPPED: u64 = 1 << 62;

/// Pieces that one call may report: 24 KiB of answers.
const PIECES_MAX: usize = 1024;
/// Entries that are read at a time: 32 KiB.
const ENTRIES_MAX: u64 = 4096;

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArguments {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Piece {
    start: u64,
    end: u64,
    categories: u64,
}

const _: () = assert!(size_of::<ScanArguments>() == 96 && size_of::<Piece>() == 24);

/// Tells the ranges of addresses inside `range` that have pages, in memory or in swap space, in rising order.
///
/// Every address that is told of nowhere has no page (or the shared page of zeros). More may be told than there are.
pub(super) fn each_present(
    range: &Range<u64>,
    visit: &mut dyn FnMut(Range<u64>),
) -> io::Result<()> {
    let pagemap = File::open("/proc/self/pagemap")?;
    match scan(&pagemap, range, visit) {
        // Nothing was told of yet: a kernel or a filter that does not have the call refuses the first one.
        Err(error) if !matches!(error.raw_os_error(), Some(libc::EFAULT | libc::EINVAL)) => {
            read(&pagemap, range, visit)
        }
        answer => answer,
    }
}

/// By the ioctl.
fn scan(pagemap: &File, range: &Range<u64>, visit: &mut dyn FnMut(Range<u64>)) -> io::Result<()> {
    let mut pieces = vec![Piece::default(); PIECES_MAX];
    let mut from = range.start;
    while from < range.end {
        let mut arguments = ScanArguments {
            size: size_of::<ScanArguments>() as u64,
            start: from,
            end: range.end,
            vec: pieces.as_mut_ptr().expose_provenance() as u64,
            vec_len: PIECES_MAX as u64,
            category_inverted: PAGE_IS_PFNZERO,
            category_mask: PAGE_IS_PFNZERO,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_PRESENT,
            ..ScanArguments::default()
        };
        // SAFETY: the request reads and writes one `pm_scan_arg`, which `arguments` is, and writes at most `vec_len` pieces at
        // `vec`, which `pieces` has room for; both are borrowed by nobody else. It changes no mapping: `flags` is 0.
        let answer = unsafe {
            libc::ioctl(
                pagemap.as_raw_fd(),
                PAGEMAP_SCAN as libc::Ioctl,
                &raw mut arguments,
            )
        };
        let Ok(count) = usize::try_from(answer) else {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        };
        for piece in pieces.iter().take(count) {
            visit(piece.start..piece.end);
        }
        if arguments.walk_end <= from {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        from = arguments.walk_end;
    }
    Ok(())
}

/// By the file: 8 bytes a page, whether there is one or not.
fn read(pagemap: &File, range: &Range<u64>, visit: &mut dyn FnMut(Range<u64>)) -> io::Result<()> {
    let page = host_page_bytes() as u64;
    let mut buffer = vec![0; (ENTRIES_MAX * 8) as usize];
    let mut run: Option<Range<u64>> = None;
    let mut at = range.start - range.start % page;
    while at < range.end {
        let entries = (range.end - at).div_ceil(page).min(ENTRIES_MAX);
        let octets = buffer.get_mut(..(entries * 8) as usize).unwrap_or_default();
        pagemap.read_exact_at(octets, at / page * 8)?;
        for entry in octets.chunks_exact(8) {
            let bits = entry.try_into().map_or(u64::MAX, u64::from_ne_bytes);
            let there = bits & (ENTRY_PRESENT | ENTRY_SWAPPED) != 0;
            match (&mut run, there) {
                (Some(run), true) => run.end = at + page,
                (None, true) => run = Some(at..at + page),
                (Some(_), false) => run.take().into_iter().for_each(&mut *visit),
                (None, false) => {}
            }
            at += page;
        }
    }
    run.into_iter().for_each(visit);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{GuestMemory, RegionLayout};
    use super::*;

    const BYTES: u64 = 64 << 10;

    type How = fn(&File, &Range<u64>, &mut dyn FnMut(Range<u64>)) -> io::Result<()>;

    #[test]
    fn both_ways_tell_the_pages_that_were_written_and_make_none() {
        // No huge pages: one write would bring 2 MiB.
        let memory = GuestMemory::anonymous(&[RegionLayout {
            guest_address: 0,
            bytes: BYTES,
        }])
        .unwrap();
        let start = memory.span(0, 0, 1).unwrap().as_ptr() as u64;
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let told = |how: How| {
            let mut found = Vec::new();
            let asked = how(&pagemap, &(start..start + BYTES), &mut |range| {
                found.push((range.start - start) / 4096..(range.end - start) / 4096);
            });
            asked.map(|()| found)
        };
        for page in [2, 3, 9] {
            memory.span(0, page * 4096, 1).unwrap().copy_from(&[1]);
        }
        // A page of zeros that is mapped because it was read.
        assert!(memory.span(0, 12 * 4096, 4096).unwrap().is_zero());
        let by_file = told(read).unwrap();
        assert_eq!(by_file, [2..4, 9..10, 12..13]);
        match told(scan) {
            Ok(found) => assert_eq!(found, [2..4, 9..10]),
            // A kernel before 6.7, or a filter: the file is what is used there.
            Err(error) => assert!(error.raw_os_error().is_some(), "{error}"),
        }
        assert_eq!(told(read).unwrap(), by_file, "looking made nothing");
    }
}
