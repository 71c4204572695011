//! The KVM sources on the real KVM: two vCPUs write, a copy of their memory is kept from what the sources report, and the
//! copy must be equal in the end.
//!
//! Without /dev/kvm each test says that it was skipped; with `MULTIFD_REQUIRE_KVM=1` it fails instead.
#![allow(unsafe_code)] // Justification: mapping guest memory and giving it to KVM has no safe way.
#![allow(clippy::print_stderr)] // A skipped test says so.

use std::collections::BTreeSet;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use multifd_tracking::kvm::{
    self, LogSource, Protect, RingConfig, RingFullHandle, RingSource, Slot, SlotControl, Slots,
};
use multifd_tracking::{CollectPhase, DirtySet, Round, Run, Source};

const PAGE: usize = 4096;
const CODE: u64 = 0x1000;
/// Where the guest writes: 2^n pages from the base. Everything below holds the code.
const BASE: u32 = 0x10_0000;

/// The payload, 32-bit flat:
/// ```text
/// L: imul edx,edx,1664525 ; add edx,1013904223 ; mov esi,edx ; shr esi,8 ; and esi,MASK ; add esi,BASE
///    inc eax ; mov [esi],eax ; dec ecx ; jnz L ; out 0x10,al ; jmp L
/// ```
/// It writes a growing number to `ecx` drawn pages and then leaves to us.
fn payload(pages: u32) -> Vec<u8> {
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
fn drawn(edx: &mut u32, pages: u32, writes: u32) -> BTreeSet<u64> {
    (0..writes)
        .map(|_| {
            *edx = edx.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            u64::from(((*edx >> 8) & ((pages - 1) << 12)) + BASE) / PAGE as u64
        })
        .collect()
}

struct Memory {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the memory is reached by volatile word accesses and by KVM only.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(bytes: usize) -> Self {
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
        );
        // SAFETY: a new mapping of nobody's address.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        Self {
            start: NonNull::new(start.cast()).unwrap(),
            bytes,
        }
    }

    fn word(&self, at: usize) -> *mut u64 {
        assert!(at.is_multiple_of(8) && at < self.bytes);
        // SAFETY: inside the mapping, as just asserted.
        unsafe { self.start.as_ptr().add(at) }.cast()
    }

    fn read(&self, at: usize) -> u64 {
        // SAFETY: `word` gives an aligned address inside the mapping; a guest may write at the same time, hence volatile.
        unsafe { self.word(at).read_volatile() }
    }

    fn write(&self, at: usize, octets: &[u8]) {
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

    /// Copies a run of pages into `copy`.
    fn copy(&self, run: Run, copy: &mut [u64]) {
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
struct Machine {
    vcpus: Vec<VcpuFd>,
    vm: Arc<VmFd>,
    memory: Arc<Memory>,
    pages: u32,
}

/// Two slots that meet in the middle of a word of the set, as one region.
fn slots(pages: u64) -> [Slot; 2] {
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
    fn new(test: &str, vcpus: u32, pages: u32, ring: Option<RingConfig>) -> Option<Self> {
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

    fn total_pages(&self) -> u64 {
        (self.memory.bytes / PAGE) as u64
    }

    fn set(&self) -> DirtySet {
        DirtySet::new(&[self.total_pages()])
    }

    fn slots(&self) -> Slots {
        Slots::new(slots(self.total_pages()).to_vec()).unwrap()
    }

    fn control(&self) -> Box<dyn SlotControl> {
        let (vm, memory) = (Arc::clone(&self.vm), Arc::clone(&self.memory));
        Box::new(move |on| set_slots(&vm, &memory, if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 }))
    }

    fn ring(&self, config: RingConfig) -> RingSource {
        RingSource::new(&self.vm, &self.vcpus, config, self.slots(), self.control()).unwrap()
    }

    fn log(&self, protect: Protect) -> LogSource {
        LogSource::new(&self.vm, protect, self.slots(), self.control()).unwrap()
    }
}

fn set_slots(vm: &VmFd, memory: &Memory, flags: u32) -> std::io::Result<()> {
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

fn new_vcpu(vm: &VmFd, index: u32) -> VcpuFd {
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

fn prepare(vcpu: &VcpuFd, seed: u32, writes: u32) {
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
fn run(vcpu: &mut VcpuFd, index: usize, handler: Option<(&RingFullHandle, &DirtySet)>) {
    loop {
        match vcpu.run().unwrap() {
            VcpuExit::IoOut(0x10, _) => return,
            VcpuExit::Unsupported(kvm::EXIT_DIRTY_RING_FULL) => {
                let (handle, set) = handler.expect("only a ring fills");
                handle.on_full(index, set).unwrap();
            }
            VcpuExit::Intr => {}
            other => panic!("the payload left by {other:?}"),
        }
    }
}

fn pages_of(mut round: Round) -> BTreeSet<u64> {
    let mut pages = BTreeSet::new();
    while let Some(run) = round.next_run(256) {
        pages.extend(run.first..run.first + run.count);
    }
    pages
}

/// Every page that the guest wrote is reported; hardly any other is (some KVMs add the page of an instruction fetch); and
/// the same again after the reset, with the same pages.
fn reports_what_was_written(
    machine: &mut Machine,
    source: &mut dyn Source,
    handle: Option<&RingFullHandle>,
) {
    let set = machine.set();
    source.start(&set).unwrap();
    drop(pages_of(set.take_round()));
    for pass in 0..3 {
        let mut expected = BTreeSet::new();
        for (index, vcpu) in machine.vcpus.iter_mut().enumerate() {
            let mut edx = 7 + index as u32;
            prepare(vcpu, edx, 1500);
            run(vcpu, index, handle.map(|handle| (handle, &set)));
            expected.append(&mut drawn(&mut edx, machine.pages, 1500));
        }
        source.collect(&set, CollectPhase::PreCopy).unwrap();
        let got = pages_of(set.take_round());
        let missing: Vec<_> = expected.difference(&got).collect();
        assert!(
            missing.is_empty(),
            "pass {pass}: written and not reported: {missing:?}"
        );
        assert!(
            got.len() <= expected.len() + 4,
            "pass {pass}: {} reported, {} written",
            got.len(),
            expected.len()
        );
        let again = source.collect(&set, CollectPhase::PreCopy).unwrap();
        assert_eq!(again.pages, 0, "pass {pass}: collecting again is empty");
    }
    source.stop().unwrap();
}

/// The vCPUs write for a while; the copy, fed by rounds only, is equal to the memory once they stopped.
fn copy_is_equal_after_a_storm(
    machine: &mut Machine,
    source: &mut dyn Source,
    handle: Option<RingFullHandle>,
) {
    let set = machine.set();
    let memory = Arc::clone(&machine.memory);
    let mut copy = vec![0u64; memory.bytes / 8];
    source.start(&set).unwrap();
    set.mark_all();
    let running = AtomicBool::new(true);
    let rounds = std::cell::Cell::new(0);
    let mut copy_round = |mut round: Round| {
        rounds.set(rounds.get() + 1);
        while let Some(run) = round.next_run(64) {
            memory.copy(run, &mut copy);
        }
    };
    std::thread::scope(|scope| {
        let _stop = StopsOnDrop(&running);
        for (index, vcpu) in machine.vcpus.iter_mut().enumerate() {
            let (running, set, handle) = (&running, &set, &handle);
            scope.spawn(move || {
                prepare(vcpu, 99 + index as u32, 500);
                while running.load(Ordering::Relaxed) {
                    run(vcpu, index, handle.as_ref().map(|handle| (handle, set)));
                    let mut registers = vcpu.get_regs().unwrap();
                    registers.rcx = 500;
                    vcpu.set_regs(&registers).unwrap();
                }
            });
        }
        let end = Instant::now() + Duration::from_millis(400);
        while Instant::now() < end || rounds.get() < 5 {
            source.collect(&set, CollectPhase::PreCopy).unwrap();
            copy_round(set.take_round());
        }
        running.store(false, Ordering::Relaxed);
    });
    source.collect(&set, CollectPhase::Final).unwrap();
    copy_round(set.take_round());
    source.stop().unwrap();
    for page in 0..machine.total_pages() as usize {
        let words = page * PAGE / 8..(page + 1) * PAGE / 8;
        let differs = words
            .clone()
            .find(|&word| copy[word] != memory.read(word * 8));
        assert_eq!(
            differs,
            None,
            "page {page} differs after {} rounds",
            rounds.get()
        );
    }
}

/// Lets the vCPUs stop also when the collector panics, or the test would hang instead of failing.
struct StopsOnDrop<'a>(&'a AtomicBool);

impl Drop for StopsOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

const RING: RingConfig = RingConfig { entries: 4096 };

#[test]
fn the_ring_reports_what_two_vcpus_write() {
    let Some(mut machine) =
        Machine::new("the_ring_reports_what_two_vcpus_write", 2, 4096, Some(RING))
    else {
        return;
    };
    let mut source = machine.ring(RING);
    let handle = source.handle();
    reports_what_was_written(&mut machine, &mut source, Some(&handle));
    assert_eq!(source.figures().entries_unknown, 0);
    reports_what_was_written(&mut machine, &mut source, Some(&handle));
}

#[test]
fn full_rings_are_emptied_by_their_vcpus() {
    let Some(mut machine) = Machine::new(
        "full_rings_are_emptied_by_their_vcpus",
        2,
        32_768,
        Some(RING),
    ) else {
        return;
    };
    let mut source = machine.ring(RING).without_reaper();
    let (handle, set) = (source.handle(), machine.set());
    source.start(&set).unwrap();
    let mut expected = BTreeSet::new();
    for (index, vcpu) in machine.vcpus.iter_mut().enumerate() {
        let mut edx = 1 + index as u32;
        prepare(vcpu, edx, 12_000);
        run(vcpu, index, Some((&handle, &set)));
        expected.append(&mut drawn(&mut edx, machine.pages, 12_000));
    }
    source.collect(&set, CollectPhase::Final).unwrap();
    let figures = source.figures();
    assert!(figures.ring_full_soft >= 2, "{figures:?}");
    assert_eq!(figures.errors, 0, "{figures:?}");
    assert!(source.vcpu_figures().iter().all(|vcpu| vcpu.ring_full >= 1));
    let got = pages_of(set.take_round());
    assert!(expected.is_subset(&got));
    // A KVM that lets a ring overflow makes everything dirty, once.
    assert!(
        got.len() <= expected.len() + 4 || figures.ring_full_hard > 0,
        "{figures:?}"
    );
    // Afterwards it is exact again, and the vCPUs go on.
    for (index, vcpu) in machine.vcpus.iter_mut().enumerate() {
        prepare(vcpu, 5, 100);
        run(vcpu, index, Some((&handle, &set)));
    }
    source.collect(&set, CollectPhase::Final).unwrap();
    let got = pages_of(set.take_round());
    let expected = drawn(&mut 5, machine.pages, 100);
    assert!(
        expected.is_subset(&got) && got.len() <= expected.len() + 4,
        "{} of {}",
        got.len(),
        expected.len()
    );
}

#[test]
fn a_copy_fed_by_the_ring_is_equal_after_a_storm() {
    let name = "a_copy_fed_by_the_ring_is_equal_after_a_storm";
    let Some(mut machine) = Machine::new(name, 2, 8192, Some(RING)) else {
        return;
    };
    let mut source = machine.ring(RING);
    let handle = source.handle();
    copy_is_equal_after_a_storm(&mut machine, &mut source, Some(handle.clone()));
    copy_is_equal_after_a_storm(&mut machine, &mut source, Some(handle));
}

/// Without the reaper the rings get full, and overflow on a KVM that looks too seldom.
#[test]
fn a_copy_fed_by_overflowing_rings_is_equal_after_a_storm() {
    let name = "a_copy_fed_by_overflowing_rings_is_equal_after_a_storm";
    let small = RingConfig {
        entries: RingConfig::ENTRIES_MIN,
    };
    let Some(mut machine) = Machine::new(name, 2, 8192, Some(small)) else {
        return;
    };
    let mut source = machine.ring(small).without_reaper();
    let handle = source.handle();
    copy_is_equal_after_a_storm(&mut machine, &mut source, Some(handle));
    assert!(
        source.figures().ring_full_soft > 0,
        "{:?}",
        source.figures()
    );
}

#[test]
fn the_log_reports_what_two_vcpus_write() {
    for protect in [Protect::Plain, Protect::Manual, Protect::ManualInitiallySet] {
        let Some(mut machine) = Machine::new("the_log_reports_what_two_vcpus_write", 2, 4096, None)
        else {
            return;
        };
        let mut source = machine.log(protect);
        assert_eq!(source.protect(), protect);
        reports_what_was_written(&mut machine, &mut source, None);
        reports_what_was_written(&mut machine, &mut source, None);
    }
}

#[test]
fn a_copy_fed_by_the_log_is_equal_after_a_storm() {
    for protect in [Protect::Plain, Protect::Manual, Protect::ManualInitiallySet] {
        let name = "a_copy_fed_by_the_log_is_equal_after_a_storm";
        let Some(mut machine) = Machine::new(name, 2, 8192, None) else {
            return;
        };
        let mut source = machine.log(protect);
        copy_is_equal_after_a_storm(&mut machine, &mut source, None);
        copy_is_equal_after_a_storm(&mut machine, &mut source, None);
    }
}

#[test]
fn the_ring_of_a_real_kvm_refuses_a_late_enable_and_too_big_a_size() {
    let name = "the_ring_of_a_real_kvm_refuses_a_late_enable_and_too_big_a_size";
    let Some(machine) = Machine::new(name, 1, 4096, None) else {
        return;
    };
    let support = kvm::probe(&machine.vm).unwrap();
    if support.ring.is_none() {
        eprintln!("SKIPPED {name}: this KVM has no dirty ring");
        return;
    }
    assert_eq!(
        kvm::enable(&machine.vm, RING).unwrap_err().code(),
        "tracking-kernel"
    );
    assert_eq!(
        kvm::enable(&machine.vm, RingConfig { entries: 131_072 })
            .unwrap_err()
            .code(),
        "tracking-misuse"
    );
    let slots = machine.slots();
    let late = RingSource::new(&machine.vm, &machine.vcpus, RING, slots, machine.control());
    assert_eq!(
        late.err().unwrap().code(),
        "tracking-kernel",
        "the ring was never switched on, so it cannot be mapped"
    );
}
