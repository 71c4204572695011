//! The one door to the kernel, so that a test can put another kernel behind it.
//!
//! A [`Request`] is one ioctl of the kernel's headers; only this crate makes them, and each is listed with the header it
//! comes from. A [`Payload`] is what goes with it: a number, or a structure as bytes, to which memory may be attached
//! whose address the structure holds. The real kernel gets the address written into the bytes at the last moment; a fake
//! one gets both as slices. So neither the callers nor the fakes need `unsafe`, and a fake sees every byte.
//!
//! This file must never form a reference to guest memory; it sees none.

#![allow(unsafe_code)] // Justification: ioctl and mmap are this crate's reason to touch the kernel; all of them are here.

use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

/// Times that a call is repeated when a signal interrupted it. Signals are rare here; the bound keeps a storm of them
/// from hiding a call that never gets through.
const INTERRUPTED_MAX: u32 = 1000;

/// One ioctl of the kernel's interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Request {
    number: u32,
    name: &'static str,
}

impl Request {
    pub(crate) const fn new(number: u32, name: &'static str) -> Self {
        Self { number, name }
    }

    /// The request's number as the kernel takes it.
    pub fn number(self) -> u32 {
        self.number
    }

    /// The request's name in the kernel's headers.
    pub fn name(self) -> &'static str {
        self.name
    }
}

/// `_IO(kind, index)` of `asm-generic/ioctl.h`.
pub(crate) const fn io_none(kind: u8, index: u8) -> u32 {
    (kind as u32) << 8 | index as u32
}

/// `_IOW(kind, index, bytes)`: the kernel reads the structure.
pub(crate) const fn io_write(kind: u8, index: u8, bytes: usize) -> u32 {
    1 << 30 | (bytes as u32) << 16 | io_none(kind, index)
}

/// `_IOR(kind, index, bytes)`: the kernel writes the structure.
pub(crate) const fn io_read(kind: u8, index: u8, bytes: usize) -> u32 {
    2 << 30 | (bytes as u32) << 16 | io_none(kind, index)
}

/// `_IOWR(kind, index, bytes)`: the kernel reads and writes the structure.
pub(crate) const fn io_both(kind: u8, index: u8, bytes: usize) -> u32 {
    3 << 30 | (bytes as u32) << 16 | io_none(kind, index)
}

/// What goes with a request.
#[derive(Debug)]
pub struct Payload<'a> {
    inner: Inner<'a>,
}

#[derive(Debug)]
enum Inner<'a> {
    Value(u64),
    Struct {
        bytes: &'a mut [u8],
        attached: Option<Attached<'a>>,
    },
}

/// Memory whose address a structure holds.
#[derive(Debug)]
struct Attached<'a> {
    /// Where in the structure the address goes.
    pointer_at: usize,
    words: &'a mut [u64],
}

/// A payload taken apart, as a kernel sees it.
#[derive(Debug)]
pub enum Parts<'a> {
    /// A plain number; 0 for a request that takes nothing.
    Value(u64),
    /// A structure and, if it holds an address: where the address stands, and the memory there.
    Struct(&'a mut [u8], Option<(usize, &'a mut [u64])>),
}

impl<'a> Payload<'a> {
    pub(crate) fn none() -> Self {
        Self::value(0)
    }

    pub(crate) fn value(value: u64) -> Self {
        Self {
            inner: Inner::Value(value),
        }
    }

    pub(crate) fn bytes(bytes: &'a mut [u8]) -> Self {
        Self {
            inner: Inner::Struct {
                bytes,
                attached: None,
            },
        }
    }

    /// The structure holds the address of `words` at byte `pointer_at`. How much of `words` the kernel touches follows
    /// from the structure's other fields: who calls this sees to it that it fits.
    pub(crate) fn attached(bytes: &'a mut [u8], pointer_at: usize, words: &'a mut [u64]) -> Self {
        assert!(
            pointer_at + 8 <= bytes.len(),
            "the address lies inside the structure"
        );
        Self {
            inner: Inner::Struct {
                bytes,
                attached: Some(Attached { pointer_at, words }),
            },
        }
    }

    /// The payload as a kernel sees it. The bytes where an address belongs are not set.
    pub fn into_parts(self) -> Parts<'a> {
        match self.inner {
            Inner::Value(value) => Parts::Value(value),
            Inner::Struct { bytes, attached } => Parts::Struct(
                bytes,
                attached.map(|attached| (attached.pointer_at, attached.words)),
            ),
        }
    }
}

/// A kernel: Linux, or a test's.
pub trait Kernel: Send + Sync {
    /// One ioctl.
    ///
    /// # Errors
    /// The kernel's `errno`.
    fn ioctl(&self, fd: BorrowedFd<'_>, request: Request, payload: Payload<'_>) -> io::Result<i32>;

    /// Maps the dirty ring of a vCPU, `entries` of them.
    ///
    /// # Errors
    /// The kernel's `errno`.
    fn map_ring(&self, vcpu: BorrowedFd<'_>, entries: u32) -> io::Result<Box<dyn RingMemory>>;

    /// Reads from a descriptor that a request returned, as `read(2)`: bytes read, 0 at the end of the stream.
    ///
    /// # Errors
    /// The kernel's `errno`.
    fn read(&self, fd: BorrowedFd<'_>, octets: &mut [u8]) -> io::Result<usize>;

    /// Writes to a descriptor that a request returned, as `write(2)`: bytes written.
    ///
    /// # Errors
    /// The kernel's `errno`.
    fn write(&self, fd: BorrowedFd<'_>, octets: &[u8]) -> io::Result<usize>;
}

/// The page of a vCPU's descriptor at which its ring is mapped: of `linux/kvm.h`, for x86.
const KVM_DIRTY_LOG_PAGE_OFFSET: i64 = 64;

#[cfg(feature = "kvm")]
const _: () = assert!(KVM_DIRTY_LOG_PAGE_OFFSET == kvm_bindings::KVM_DIRTY_LOG_PAGE_OFFSET as i64);

/// One entry of a dirty ring: `struct kvm_dirty_gfn` of `linux/kvm.h`, 16 bytes.
#[repr(C)]
#[derive(Debug, Default)]
pub struct RingEntry {
    /// Bit 0 dirty, bit 1 harvested.
    pub flags: AtomicU32,
    /// Address space in the upper, slot in the lower 16 bits.
    pub slot: AtomicU32,
    /// Page inside the slot.
    pub offset: AtomicU64,
}

const _: () = assert!(size_of::<RingEntry>() == 16 && align_of::<RingEntry>() == 8);

/// The memory of one vCPU's dirty ring, shared with the kernel.
pub trait RingMemory: Send + Sync {
    /// The entries, in the ring's order.
    fn entries(&self) -> &[RingEntry];
}

/// The kernel that this process runs on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Linux;

impl Kernel for Linux {
    fn ioctl(&self, fd: BorrowedFd<'_>, request: Request, payload: Payload<'_>) -> io::Result<i32> {
        let argument = match payload.into_parts() {
            Parts::Value(value) => value as usize,
            Parts::Struct(bytes, attached) => {
                if let Some((at, words)) = attached {
                    let address = words.as_mut_ptr().expose_provenance() as u64;
                    bytes[at..at + 8].copy_from_slice(&address.to_ne_bytes());
                }
                bytes.as_mut_ptr().expose_provenance()
            }
        };
        for _ in 0..INTERRUPTED_MAX {
            // SAFETY:
            // - `fd` is open for the call: it is borrowed.
            // - The argument is what the request takes: requests and payloads are made in this crate only, side by side,
            //   and the fake kernel's tests compare each with the headers. Addresses in it are those of the attached
            //   memory, which is borrowed exclusively for the call, and whose length its maker fits to the other fields.
            let answer =
                unsafe { libc::ioctl(fd.as_raw_fd(), libc::Ioctl::from(request.number), argument) };
            if answer >= 0 {
                return Ok(answer);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        Err(io::ErrorKind::Interrupted.into())
    }

    fn map_ring(&self, vcpu: BorrowedFd<'_>, entries: u32) -> io::Result<Box<dyn RingMemory>> {
        let bytes = entries as usize * size_of::<RingEntry>();
        let offset = KVM_DIRTY_LOG_PAGE_OFFSET * host_page_bytes() as i64;
        let map = Mapping::new(
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            Some((vcpu, offset)),
        )?;
        // A ring that is smaller or was never enabled can be mapped too; touching it would be a SIGBUS.
        map.probe(0)?;
        map.probe(bytes - 1)?;
        Ok(Box::new(MappedRing {
            map,
            entries: entries as usize,
        }))
    }

    fn read(&self, fd: BorrowedFd<'_>, octets: &mut [u8]) -> io::Result<usize> {
        // SAFETY: the kernel writes at most `octets.len()` bytes at that address, which are borrowed exclusively.
        let count = unsafe { libc::read(fd.as_raw_fd(), octets.as_mut_ptr().cast(), octets.len()) };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    fn write(&self, fd: BorrowedFd<'_>, octets: &[u8]) -> io::Result<usize> {
        // SAFETY: the kernel reads at most `octets.len()` bytes at that address, which are borrowed.
        let count = unsafe { libc::write(fd.as_raw_fd(), octets.as_ptr().cast(), octets.len()) };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }
}

/// Takes over a descriptor that a request has just returned in its structure.
///
/// Only for numbers that the kernel (or a fake one) put there in this call: it made the descriptor for the caller, and
/// nobody else knows it.
///
/// # Errors
/// `EBADF` for a negative number.
#[cfg(feature = "vfio")]
pub(crate) fn adopt(returned: i32) -> io::Result<OwnedFd> {
    if returned < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: the descriptor is open and owned by nobody: see above, which the callers keep.
    Ok(unsafe { OwnedFd::from_raw_fd(returned) })
}

/// Another descriptor of the same file, for a type that names its descriptor only as a number.
///
/// # Errors
/// The kernel's `errno`, such as too many open files.
pub(crate) fn duplicate(file: &impl AsRawFd) -> io::Result<OwnedFd> {
    // SAFETY: the descriptor is open for this call, because `file` owns it and is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(file.as_raw_fd()) };
    fd.try_clone_to_owned()
}

/// A descriptor of the system call `userfaultfd`, for faults of user mode only (`UFFD_USER_MODE_ONLY`, which needs no
/// privilege since Linux 5.11).
///
/// # Errors
/// The kernel's `errno`: `EPERM` from a filter of system calls, `ENOSYS` from a kernel built without it.
pub(crate) fn open_userfaultfd() -> io::Result<OwnedFd> {
    /// `UFFD_USER_MODE_ONLY` of `linux/userfaultfd.h`.
    const USER_MODE_ONLY: libc::c_int = 1;
    // SAFETY: the call takes flags only and makes a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | USER_MODE_ONLY) };
    let Ok(fd) = i32::try_from(fd) else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel made the descriptor for this call, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A mapping of shared words, such as a log that another process writes.
#[derive(Debug)]
pub(crate) struct SharedWords {
    map: Mapping,
    /// Bytes from the mapping's start to the first word.
    lead: usize,
    words: usize,
}

impl SharedWords {
    /// Maps `words` words of `file` from byte `offset` on, a multiple of 8. The file is at least that long and is sealed
    /// against shrinking: its owner checked that, or touching the words would be a SIGBUS.
    pub(crate) fn new(file: BorrowedFd<'_>, offset: u64, words: usize) -> io::Result<Self> {
        let page = host_page_bytes();
        let lead = (offset % page) as usize;
        let start = i64::try_from(offset - lead as u64)
            .map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
        assert!(lead.is_multiple_of(8), "words are aligned");
        let map = Mapping::new(
            lead + words * 8,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            Some((file, start)),
        )?;
        Ok(Self { map, lead, words })
    }

    /// The words.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: the lead lies inside the mapping.
        let first = unsafe { self.map.start.as_ptr().byte_add(self.lead) };
        // SAFETY:
        // - the mapping holds `words` words from there on, readable, writable and aligned to 8 (as `new` asserted), and
        //   lives as long as `self`;
        // - other processes write into it at any time, which atomics allow; every pattern of bytes is a valid one.
        unsafe { std::slice::from_raw_parts(first.cast(), self.words) }
    }
}

/// Words of zero that threads share, backed by huge pages as far as there are any.
///
/// They cost memory only once they are written, and then by the huge page: the words of something that is written all over
/// sooner or later. Scattered words of a large bitmap are then found through a few entries of the processor's page cache
/// (TLB) instead of one entry each.
#[derive(Debug)]
pub(crate) struct HugeWords {
    map: Mapping,
    lead: usize,
    words: usize,
}

/// A transparent huge page of x86-64, and of aarch64 with pages of 4 KiB. Elsewhere the alignment is only not needed.
const HUGE_PAGE_BYTES: usize = 2 << 20;

impl HugeWords {
    /// `words` words.
    ///
    /// # Errors
    /// The kernel's `errno`, if the address space cannot be had. Huge pages that cannot be had are none.
    pub(crate) fn new(words: usize) -> io::Result<Self> {
        let bytes = (words * 8).next_multiple_of(HUGE_PAGE_BYTES);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let map = Mapping::new(bytes + HUGE_PAGE_BYTES, protection, flags, None)?;
        let lead = map.start.as_ptr().align_offset(HUGE_PAGE_BYTES);
        // SAFETY: the lead is smaller than a huge page, by which the mapping is longer than `bytes`.
        let first = unsafe { map.start.as_ptr().byte_add(lead) };
        // SAFETY: the range lies inside the mapping that was made just now; the advice changes no content.
        unsafe { libc::madvise(first, bytes, libc::MADV_HUGEPAGE) };
        Ok(Self { map, lead, words })
    }
}

impl Deref for HugeWords {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: the lead lies inside the mapping.
        let first = unsafe { self.map.start.as_ptr().byte_add(self.lead) };
        // SAFETY: the mapping holds `words` words from there on, aligned, readable and writable, zero or written, for as long
        // as `self` lives; they are reached as atomics only.
        unsafe { std::slice::from_raw_parts(first.cast(), self.words) }
    }
}

/// A file in memory of `bytes` bytes of zero, which can grow but never shrink.
pub(crate) fn sealed_memory_file(bytes: u64) -> io::Result<OwnedFd> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a string that ends in zero; the call makes a descriptor.
    let fd = unsafe { libc::memfd_create(c"multifd-dirty-log".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel made the descriptor for this call, and nobody else knows it.
    let file = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(bytes)?;
    let file = OwnedFd::from(file);
    seal_against_shrinking(file.as_fd())?;
    Ok(file)
}

/// Sees to it that nobody can make the file shorter: it is sealed so already, or is now.
pub(crate) fn seal_against_shrinking(file: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: asks for a number.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    if seals < 0 {
        return Err(io::Error::last_os_error());
    }
    if seals & libc::F_SEAL_SHRINK != 0 {
        return Ok(());
    }
    // SAFETY: sets a flag of the file; its contents stay.
    let answer = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The bytes of a page of this host.
pub(crate) fn host_page_bytes() -> u64 {
    // SAFETY: sysconf has no preconditions.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(bytes).expect("every Linux names its page size")
}

/// A piece of address space that is given back when dropped.
#[derive(Debug)]
struct Mapping {
    start: NonNull<libc::c_void>,
    bytes: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread; what lies in it is reached only through the types below.
unsafe impl Send for Mapping {}
// SAFETY: as above; a shared `Mapping` offers nothing but its address.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(
        bytes: usize,
        protection: i32,
        flags: i32,
        file: Option<(BorrowedFd<'_>, i64)>,
    ) -> io::Result<Self> {
        let (fd, offset) = file.map_or((-1, 0), |(fd, offset)| (fd.as_raw_fd(), offset));
        // SAFETY: no address is asked for, so no mapping that exists is replaced; the descriptor is borrowed or absent.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, fd, offset) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            start: NonNull::new(start).expect("the kernel maps nothing at address 0 unasked"),
            bytes,
        })
    }
}

impl Mapping {
    /// Whether the byte at `at` can be read: a write of it into a pipe fails where a load would be a fault.
    fn probe(&self, at: usize) -> io::Result<()> {
        let (_reader, writer) = io::pipe()?;
        let address = self.start.as_ptr().wrapping_byte_add(at);
        // SAFETY: the kernel checks the address and copies one byte; the pipe is this function's own.
        let written = unsafe { libc::write(writer.as_raw_fd(), address, 1) };
        if written == 1 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: start and length are those of a mapping that this value owns; nothing borrowed from it outlives it.
        unsafe { libc::munmap(self.start.as_ptr(), self.bytes) };
    }
}

struct MappedRing {
    map: Mapping,
    entries: usize,
}

impl RingMemory for MappedRing {
    fn entries(&self) -> &[RingEntry] {
        // SAFETY:
        // - the mapping is page aligned, `entries * 16` bytes long, readable, writable, and lives as long as `self`;
        // - the kernel writes into it at any time, which the atomics of `RingEntry` allow;
        // - every pattern of bytes is a valid `RingEntry`.
        unsafe { std::slice::from_raw_parts(self.map.start.cast().as_ptr(), self.entries) }
    }
}

/// Words for a bitmap whose length the *kernel* derives from a number that the embedder told us (a slot's size).
///
/// Behind the words lies address space that nobody may touch, more than the biggest bitmap of a KVM slot. If the embedder
/// named a slot smaller than it is, the kernel's copy ends there with `EFAULT` instead of in somebody's memory.
/// The words are zero at first and cost memory only once they are written.
#[derive(Debug)]
pub(crate) struct GuardedWords {
    map: Mapping,
    words: usize,
}

/// A KVM slot has fewer than 2^31 pages (KVM_MEM_MAX_NR_PAGES), so its bitmap has at most 256 MiB.
const GUARD_BYTES: usize = 256 << 20;

impl GuardedWords {
    /// `words` words of zero. The last of them ends where the guard begins.
    pub(crate) fn new(words: usize) -> io::Result<Self> {
        let page = host_page_bytes() as usize;
        let bytes = (words * 8).next_multiple_of(page);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let map = Mapping::new(bytes + GUARD_BYTES, libc::PROT_NONE, flags, None)?;
        // SAFETY: the range is the front part of a mapping that was made just now and that nobody else knows.
        let answer = unsafe {
            libc::mprotect(
                map.start.as_ptr(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
            )
        };
        if answer != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { map, words })
    }
}

impl Deref for GuardedWords {
    type Target = [u64];

    fn deref(&self) -> &[u64] {
        // SAFETY: the front of the mapping is readable, page aligned, at least `words` words long and initialised (zero
        // or written); it lives as long as `self`, and it is changed only through `deref_mut`.
        unsafe { std::slice::from_raw_parts(self.map.start.cast().as_ptr(), self.words) }
    }
}

impl DerefMut for GuardedWords {
    fn deref_mut(&mut self) -> &mut [u64] {
        // SAFETY: as in `deref`, writable too, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.map.start.cast().as_ptr(), self.words) }
    }
}
