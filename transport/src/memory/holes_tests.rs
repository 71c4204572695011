//! What is populated, of every kind of memory, and that looking makes nothing; and memory that can't be backed.
#![allow(clippy::print_stderr)] // what was skipped

use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use super::*;

const PAGE: u64 = 4096;
const BYTES: u64 = 4 << 20;

fn layouts() -> [RegionLayout; 2] {
    [(0, BYTES / 2), (1 << 32, BYTES / 2)].map(|(guest_address, bytes)| RegionLayout {
        guest_address,
        bytes,
    })
}

fn memfd(flags: libc::c_uint, bytes: u64) -> Option<File> {
    // SAFETY: the name is a string of C; the call makes a descriptor.
    let fd = unsafe { libc::memfd_create(c"multifd test".as_ptr(), flags | libc::MFD_CLOEXEC) };
    if fd < 0 {
        return None;
    }
    // SAFETY: the kernel made it for this call, and nobody else knows it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes).ok()?;
    Some(file)
}

fn write(memory: &GuestMemory, region: u32, pages: &[u64]) {
    for page in pages {
        let span = memory.span(region, page * PAGE, 1).unwrap();
        span.copy_from(&[7]);
    }
}

/// The populated pages of both regions.
fn populated(memory: &GuestMemory) -> (Vec<(u32, Range<u64>)>, Vec<Unknown>) {
    let mut found = Vec::new();
    let unknown = memory.each_populated(&mut |region, range| {
        assert!(range.start < range.end && range.end <= BYTES / 2);
        found.push((region, range.start / PAGE..range.end.div_ceil(PAGE)));
    });
    (found, unknown)
}

#[test]
fn of_private_memory_what_was_written_is_populated() {
    let memory = GuestMemory::anonymous(&layouts().map(|layout| RegionLayout {
        // Below a huge page.
        bytes: layout.bytes / 2,
        ..layout
    }))
    .unwrap();
    assert_eq!(populated(&memory), (vec![], vec![]));
    write(&memory, 0, &[3, 4, 100]);
    write(&memory, 1, &[255]);
    // Read, and therefore mapped; still zero.
    assert!(memory.span(0, 9 * PAGE, PAGE).unwrap().is_zero());
    let (found, unknown) = populated(&memory);
    assert_eq!(unknown, []);
    let want = [(0, 3..5), (0, 100..101), (1, 255..256)];
    assert!(want.iter().all(|run| found.contains(run)), "{found:?}");
    assert_eq!(found, populated(&memory).0);
}

#[test]
fn of_shared_memory_what_anybody_wrote_is_populated_and_no_hole_is_filled() {
    let file = memfd(0, BYTES).unwrap();
    let memory = GuestMemory::shared_file(&file, &layouts()).unwrap();
    assert_eq!(populated(&memory), (vec![], vec![]));
    // By another mapping, as another process would: this one has no page of it.
    let other = GuestMemory::shared_file(&file, &layouts()).unwrap();
    write(&other, 0, &[5, 6]);
    write(&other, 1, &[0, 511]);
    let blocks = file.metadata().unwrap().blocks();
    let want = [(0, 5..7), (1, 0..1), (1, 511..512)].to_vec();
    assert_eq!(populated(&memory), (want, vec![]));
    assert_eq!(file.metadata().unwrap().blocks(), blocks);
}

#[test]
fn of_shared_memory_whose_file_is_not_open_everything_is_populated_and_it_says_why() {
    let file = memfd(0, BYTES).unwrap();
    let memory = GuestMemory::shared_file(&file, &layouts()).unwrap();
    write(&memory, 0, &[5]);
    drop(file);
    let (found, unknown) = populated(&memory);
    if unknown.is_empty() {
        // The kernel's own links may be followed by this process: nothing is unknown then.
        assert_eq!(found, [(0, 5..6)]);
        return;
    }
    assert_eq!(found, [(0, 0..512), (1, 0..512)]);
    assert!(
        unknown
            .iter()
            .all(|region| region.reason.contains("is not open"))
    );
}

#[test]
fn of_a_file_on_disk_everything_is_populated() {
    let path = std::env::current_exe()
        .unwrap()
        .with_extension("guest-memory");
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path);
    let file = file.unwrap();
    std::fs::remove_file(&path).unwrap();
    file.set_len(BYTES).unwrap();
    let memory = GuestMemory::shared_file(&file, &layouts()).unwrap();
    let (found, unknown) = populated(&memory);
    assert_eq!((found, unknown.len()), (vec![(0, 0..512), (1, 0..512)], 2));
}

#[test]
fn of_hugetlb_what_is_mapped_here_is_populated_unless_the_file_has_more() {
    let Some(file) = memfd(libc::MFD_HUGETLB, BYTES) else {
        eprintln!("SKIPPED of_hugetlb_what_is_mapped_here_is_populated: no memfd of huge pages");
        return;
    };
    let Ok(memory) = GuestMemory::shared_file(&file, &layouts()) else {
        eprintln!(
            "SKIPPED of_hugetlb_what_is_mapped_here_is_populated: no huge pages (nr_hugepages)"
        );
        return;
    };
    assert_eq!(populated(&memory), (vec![], vec![]));
    write(&memory, 1, &[100]);
    assert_eq!(populated(&memory), (vec![(1, 0..512)], vec![]));
    assert_eq!(file.metadata().unwrap().blocks() * 512, 2 << 20);
    let other = GuestMemory::shared_file(&file, &layouts()).unwrap();
    write(&other, 0, &[1]);
    let (found, unknown) = populated(&memory);
    assert_eq!(found, [(0, 0..512), (1, 0..512)]);
    assert_eq!(unknown.len(), 2, "{unknown:?}");
}

#[test]
fn memory_that_userfaultfd_serves_is_populated_whatever_is_there() {
    let memory = GuestMemory::anonymous(&layouts()).unwrap();
    /// `UFFD_USER_MODE_ONLY`.
    const USER_MODE_ONLY: libc::c_int = 1;
    // SAFETY: takes flags only and makes a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | USER_MODE_ONLY) };
    if fd < 0 {
        let error = std::io::Error::last_os_error();
        eprintln!("SKIPPED memory_that_userfaultfd_serves_is_populated: {error}");
        return;
    }
    // SAFETY: the kernel made it for this call.
    let uffd = unsafe { File::from_raw_fd(fd as i32) };
    let ask = |request: libc::c_ulong, words: &mut [u64]| {
        // SAFETY: both requests take a structure of words, which `words` is as long as.
        let answer = unsafe {
            libc::ioctl(
                std::os::fd::AsRawFd::as_raw_fd(&uffd),
                request,
                words.as_mut_ptr(),
            )
        };
        assert_eq!(answer, 0, "{}", std::io::Error::last_os_error());
    };
    let start = memory.span(0, 0, 1).unwrap().as_ptr() as u64;
    // UFFDIO_API, and UFFDIO_REGISTER for missing pages.
    ask(0xC018_AA3F, &mut [0xAA, 0, 0]);
    ask(0xC020_AA00, &mut [start, BYTES / 2, 1, 0]);
    let (found, unknown) = populated(&memory);
    assert_eq!(found, [(0, 0..512)]);
    assert_eq!(unknown.len(), 1);
}

#[test]
fn memory_that_has_room_passes_and_a_file_that_is_too_short_does_not() {
    GuestMemory::anonymous(&layouts())
        .unwrap()
        .check_backing()
        .unwrap();
    let file = memfd(0, BYTES).unwrap();
    let memory = GuestMemory::shared_file(&file, &layouts()).unwrap();
    memory.check_backing().unwrap();
    file.set_len(BYTES / 2 + PAGE).unwrap();
    let error = memory.check_backing().unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, BackingError::FileTooShort { .. }), "{text}");
    assert!(
        error.is_certain() && text.contains("2101248 bytes and is mapped up to 4194304"),
        "{text}"
    );
}

#[test]
fn memory_larger_than_the_host_has_left_is_refused_without_being_made() {
    // 16 TiB of addresses.
    let memory = GuestMemory::anonymous(&[RegionLayout {
        guest_address: 0,
        bytes: 1 << 44,
    }])
    .unwrap();
    let error = memory.check_backing().unwrap_err();
    assert!(matches!(error, BackingError::Memory { .. }) && !error.is_certain());
    assert_eq!(populated_bytes(&memory), 0);
}

fn populated_bytes(memory: &GuestMemory) -> u64 {
    let mut bytes = 0;
    let unknown = memory.each_populated(&mut |_, range| bytes += range.end - range.start);
    assert_eq!(unknown, []);
    bytes
}

#[test]
fn a_file_system_that_is_too_small_is_refused() {
    let path = std::env::temp_dir().join(format!("multifd-small-{}", std::process::id()));
    std::fs::create_dir_all(&path).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"])
        .arg(&path)
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED a_file_system_that_is_too_small_is_refused: mounting needs root");
        let _ = std::fs::remove_dir(&path);
        return;
    }
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path.join("guest"));
    let file = file.unwrap();
    // Lazily, so that it goes when the file does.
    let unmounted = Command::new("umount").arg("-l").arg(&path).status();
    assert!(unmounted.is_ok_and(|status| status.success()));
    let _ = std::fs::remove_dir(&path);
    file.set_len(BYTES).unwrap();
    let memory = GuestMemory::shared_file(&file, &layouts()).unwrap();
    let error = memory.check_backing().unwrap_err();
    let BackingError::FileSystemFull { free, needed, .. } = error else {
        panic!("{error}");
    };
    assert_eq!((free, needed), (2 << 20, BYTES));
    file.set_len(BYTES / 2).unwrap();
    let half = GuestMemory::shared_file(&file, &layouts()[..1]).unwrap();
    half.check_backing().unwrap();
}

#[test]
fn huge_pages_that_nobody_reserved_are_counted() {
    let Some(file) = memfd(libc::MFD_HUGETLB, 1 << 40) else {
        eprintln!("SKIPPED huge_pages_that_nobody_reserved_are_counted: no memfd of huge pages");
        return;
    };
    // SAFETY: a new mapping at an address of the kernel's choice.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            1 << 40,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_NORESERVE,
            std::os::fd::AsRawFd::as_raw_fd(&file),
            0,
        )
    };
    assert_ne!(base, libc::MAP_FAILED);
    let region = RawRegion {
        layout: RegionLayout {
            guest_address: 0,
            bytes: 1 << 40,
        },
        base: NonNull::new(base.cast()).unwrap(),
        owner: Arc::new(()),
    };
    // SAFETY: mapped above, and never unmapped; nobody reaches it.
    let memory = unsafe { GuestMemory::from_raw(vec![region]) };
    let error = memory.check_backing().unwrap_err();
    assert!(matches!(error, BackingError::HugePages { .. }), "{error}");
}
