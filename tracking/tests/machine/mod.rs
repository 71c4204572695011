//! A small machine on the real KVM, and memory as words, for the tests of this crate that need them.
#![allow(unsafe_code)] // Justification: mapping guest memory and giving it to KVM has no safe way.
#![allow(clippy::print_stderr)] // A skipped test says so.
#![allow(dead_code)] // Each test binary uses its own part of it.
#![allow(unreachable_pub)] // The module is private to each test binary.

use std::collections::BTreeSet;
use std::ptr::NonNull;
use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use multifd_tracking::kvm::{
    self, LogSource, Protect, RingConfig, RingFullHandle, RingSource, Slot, SlotControl, Slots,
};
use multifd_tracking::{DirtySet, Run};

pub const PAGE: usize = 4096;
pub const CODE: u64 = 0x1000;
/// Where the guest writes: 2^n pages from the base. Everything below holds the code.
pub const BASE: u32 = 0x10_0000;

/// The payload, 32-bit flat:
/// ```text
/// L: imul edx,edx,1664525 ; add edx,1013904223 ; mov esi,edx ; shr esi,8 ; and esi,MASK ; add esi,BASE
///    inc eax ; mov [esi],eax ; dec ecx ; jnz L ; out 0x10,al ; jmp L
/// ```
/// It writes a growing number to `ecx` drawn pages and then leaves to us.
pub fn payload(pages: u32) -> Vec<u8> {
    let mut code = vec![0x69, 0xd2];
    code.extend(1_664_525u32.to_le_bytes());
    code.extend([0x81, 0xc2]);
    code.extend(1_013_904_223u32.to_le_bytes());
    code.extend([0x89, 0xd6, 0xc1, 0xee, 0x08, 0x81, 0xe6]);
    code.extend(((pages - 1) << 12).to_le_bytes());
    code.extend([0x81, 0xc6]);
    code.extend(BASE.to_le_bytes());
    code.extend([0x40, 0x89, 0x06, 0x49, 0x75]);
    code.push((-(code.len() as i8 + 1)) as u8);
    code.extend([0xe6, 0x10, 0xeb]);
    code.push((-(code.len() as i8 + 1)) as u8);
    code
}

/// The pages that the payload writes from this state of `edx`, which is left as the guest leaves it.
pub fn drawn(edx: &mut u32, pages: u32, writes: u32) -> BTreeSet<u64> {
    (0..writes)
        .map(|_| {
            *edx = edx.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            u64::from(((*edx >> 8) & ((pages - 1) << 12)) + BASE) / PAGE as u64
        })
        .collect()
}

pub struct Memory {
    pub start: NonNull<u8>,
    pub bytes: usize,
}

// SAFETY: the memory is reached by volatile word accesses and by KVM only.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    pub fn new(bytes: usize) -> Self {
        Self::mapped(bytes, libc::MAP_SHARED)
    }

    /// Anonymous memory, `libc::MAP_SHARED` or `MAP_PRIVATE`.
    pub fn mapped(bytes: usize, kind: i32) -> Self {
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            kind | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        );
        // SAFETY: a new mapping of nobody's address.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        Self {
            start: NonNull::new(start.cast()).unwrap(),
            bytes,
        }
    }

    pub fn word(&self, at: usize) -> *mut u64 {
        assert!(at.is_multiple_of(8) && at < self.bytes);
        // SAFETY: inside the mapping, as just asserted.
        unsafe { self.start.as_ptr().add(at) }.cast()
    }

    pub fn read(&self, at: usize) -> u64 {
        // SAFETY: `word` gives an aligned address inside the mapping; a guest may write at the same time, hence volatile.
        unsafe { self.word(at).read_volatile() }
    }

    pub fn write(&self, at: usize, octets: &[u8]) {
        for (index, chunk) in octets.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            // SAFETY: as in `read`.
            unsafe {
                self.word(at + index * 8)
                    .write_volatile(u64::from_le_bytes(word))
            };
        }
    }

    /// Adds one to the word at `at`, from any thread.
    pub fn increment(&self, at: usize) {
        // SAFETY: `word` gives an aligned address inside the mapping, which is accessed as atomics or by the kernel.
        let word = unsafe { std::sync::atomic::AtomicU64::from_ptr(self.word(at)) };
        word.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    }

    /// Has the kernel write `octets` at `at`, by a read from a pipe.
    pub fn fill_by_read(&self, at: usize, octets: &[u8]) {
        use std::io::Write as _;
        use std::os::fd::AsRawFd as _;
        let (reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(octets).unwrap();
        assert!(at + octets.len() <= self.bytes);
        // SAFETY: the bytes lie inside the mapping, as just asserted.
        let to = unsafe { self.start.as_ptr().add(at) };
        // SAFETY: the kernel writes as many bytes there as the mapping has room for, as above.
        let read = unsafe { libc::read(reader.as_raw_fd(), to.cast(), octets.len()) };
        assert_eq!(read, octets.len() as isize);
    }

    /// Asks for huge pages.
    pub fn advise_huge(&self) {
        // SAFETY: the range is this value's own mapping, and the advice changes no content.
        unsafe { libc::madvise(self.start.as_ptr().cast(), self.bytes, libc::MADV_HUGEPAGE) };
    }

    /// Copies a run of pages into `copy`.
    pub fn copy(&self, run: Run, copy: &mut [u64]) {
        let first = run.first as usize * PAGE / 8;
        let words = run.count as usize * PAGE / 8;
        for (at, word) in copy[first..first + words].iter_mut().enumerate() {
            *word = self.read((first + at) * 8);
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own; the VM that used it is dropped before it.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

/// Field order is drop order: the vCPUs and the VM go before their memory.
pub struct Machine {
    pub vcpus: Vec<VcpuFd>,
    pub vm: Arc<VmFd>,
    pub memory: Arc<Memory>,
    pub pages: u32,
}

/// Two slots that meet in the middle of a word of the set, as one region.
pub fn slots(pages: u64) -> [Slot; 2] {
    let first = 1000;
    [
        Slot {
            id: 0,
            region: 0,
            first: 0,
            pages: first,
        },
        Slot {
            id: 3,
            region: 0,
            first,
            pages: pages - first,
        },
    ]
}

impl Machine {
    /// A machine whose payload draws from `pages` pages (a power of two); `None` without /dev/kvm.
    pub fn new(test: &str, vcpus: u32, pages: u32, ring: Option<RingConfig>) -> Option<Self> {
        if !std::path::Path::new("/dev/kvm").exists() {
            assert!(
                std::env::var_os("MULTIFD_REQUIRE_KVM").is_none_or(|value| value != "1"),
                "{test} needs /dev/kvm"
            );
            eprintln!("SKIPPED {test}: /dev/kvm missing");
            return None;
        }
        let kvm = Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        if let Some(config) = ring {
            kvm::enable(&vm, config).unwrap();
        }
        let memory = Memory::new(BASE as usize + pages as usize * PAGE);
        memory.write(CODE as usize, &payload(pages));
        let machine = Self {
            vcpus: Vec::new(),
            vm: Arc::new(vm),
            memory: Arc::new(memory),
            pages,
        };
        set_slots(&machine.vm, &machine.memory, 0).unwrap();
        let vcpus = (0..vcpus)
            .map(|index| new_vcpu(&machine.vm, index))
            .collect();
        Some(Self { vcpus, ..machine })
    }

    pub fn total_pages(&self) -> u64 {
        (self.memory.bytes / PAGE) as u64
    }

    pub fn set(&self) -> DirtySet {
        DirtySet::new(&[self.total_pages()])
    }

    pub fn slots(&self) -> Slots {
        Slots::new(slots(self.total_pages()).to_vec()).unwrap()
    }

    pub fn control(&self) -> Box<dyn SlotControl> {
        let (vm, memory) = (Arc::clone(&self.vm), Arc::clone(&self.memory));
        Box::new(move |on| set_slots(&vm, &memory, if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 }))
    }

    pub fn ring(&self, config: RingConfig) -> RingSource {
        RingSource::new(&self.vm, &self.vcpus, config, self.slots(), self.control()).unwrap()
    }

    pub fn log(&self, protect: Protect) -> LogSource {
        LogSource::new(&self.vm, protect, self.slots(), self.control()).unwrap()
    }
}

pub fn set_slots(vm: &VmFd, memory: &Memory, flags: u32) -> std::io::Result<()> {
    for slot in slots((memory.bytes / PAGE) as u64) {
        let region = kvm_userspace_memory_region {
            slot: slot.id,
            flags,
            guest_phys_addr: slot.first * PAGE as u64,
            memory_size: slot.pages * PAGE as u64,
            userspace_addr: memory.start.as_ptr() as u64 + slot.first * PAGE as u64,
        };
        // SAFETY: the range lies inside the mapping, which outlives the VM; slots of one machine do not overlap.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(|error| std::io::Error::from_raw_os_error(error.errno()))?;
    }
    Ok(())
}

pub fn new_vcpu(vm: &VmFd, index: u32) -> VcpuFd {
    let vcpu = vm.create_vcpu(index.into()).unwrap();
    let mut special = vcpu.get_sregs().unwrap();
    let code = kvm_segment {
        limit: u32::MAX,
        selector: 8,
        type_: 11,
        present: 1,
        s: 1,
        db: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: 16,
        type_: 3,
        ..code
    };
    (special.cs, special.ds, special.es, special.ss) = (code, data, data, data);
    special.cr0 |= 1;
    vcpu.set_sregs(&special).unwrap();
    vcpu
}

pub fn prepare(vcpu: &VcpuFd, seed: u32, writes: u32) {
    let registers = kvm_regs {
        rip: CODE,
        rflags: 2,
        rdx: seed.into(),
        rcx: writes.into(),
        ..Default::default()
    };
    vcpu.set_regs(&registers).unwrap();
}

/// Runs the payload until it leaves to us.
pub fn run(vcpu: &mut VcpuFd, index: usize, handler: Option<&RingFullHandle>) {
    loop {
        match vcpu.run().unwrap() {
            VcpuExit::IoOut(0x10, _) => return,
            VcpuExit::Unsupported(kvm::EXIT_DIRTY_RING_FULL) => {
                let handle = handler.expect("only a ring fills");
                handle.on_full(index).unwrap();
            }
            VcpuExit::Intr => {}
            other => panic!("the payload left by {other:?}"),
        }
    }
}

/// `L: inc dword [esi] ; out 0x10,al ; jmp L`: writes the page at `esi` and leaves to us.
pub const TOUCH: [u8; 6] = [0xff, 0x06, 0xe6, 0x10, 0xeb, 0xfa];

/// Where the program of [`touch`] is.
pub const TOUCH_AT: u64 = 0x1400;

/// Has the vCPU write the doubleword at `address`.
pub fn touch(vcpu: &mut VcpuFd, index: usize, address: u64, handler: Option<&RingFullHandle>) {
    let registers = kvm_regs {
        rip: TOUCH_AT,
        rflags: 2,
        rsi: address,
        ..Default::default()
    };
    vcpu.set_regs(&registers).unwrap();
    run(vcpu, index, handler);
}

/// A vhost-user log as a back end has it: bytes that it sets bits in.
pub struct SharedLog(NonNull<u8>, usize);

// SAFETY: the bytes are reached as atomics only.
unsafe impl Send for SharedLog {}
// SAFETY: as above.
unsafe impl Sync for SharedLog {}

impl SharedLog {
    /// Maps the first `bytes` bytes of `file`.
    pub fn map(file: std::os::fd::BorrowedFd<'_>, bytes: usize) -> Self {
        use std::os::fd::AsRawFd as _;
        let (protection, fd) = (libc::PROT_READ | libc::PROT_WRITE, file.as_raw_fd());
        // SAFETY: a new mapping of nobody's address.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                protection,
                libc::MAP_SHARED,
                fd,
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED);
        Self(NonNull::new(start.cast()).unwrap(), bytes)
    }

    /// Logs a write, byte by byte as the protocol says.
    pub fn or(&self, page: u64) {
        let at = (page / 8) as usize;
        assert!(at < self.1);
        // SAFETY: inside the mapping, as just asserted.
        let octet = unsafe { self.0.as_ptr().add(at) };
        // SAFETY: a byte of the mapping, which lives as long as `self` and is accessed as atomics only.
        let octet = unsafe { std::sync::atomic::AtomicU8::from_ptr(octet) };
        octet.fetch_or(1 << (page % 8), std::sync::atomic::Ordering::SeqCst);
    }
}

impl Drop for SharedLog {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own.
        unsafe { libc::munmap(self.0.as_ptr().cast(), self.1) };
    }
}
