//! The guest as a machine of KVM.
//!
//! The machine has memory, virtual CPUs in 64-bit mode and one I/O port, and nothing else: no interrupt controller, no
//! clock, no firmware. Its virtual CPUs start in the program with paging on, as the registers are set before the first
//! entry. Descriptors, threads and mappings go with the machine.

use std::sync::Arc;

use kvm_bindings::{CpuId, kvm_cpuid_entry2, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::{Cap, Kvm, VmFd};
use multifd_tracking::Source;

use crate::codec::Reader;
use crate::config::{PAGE_BYTES, Tracking};
use crate::crew::{Crew, Threads};
use crate::device::DmaDevice;
use crate::error::{Error, Result};
use crate::guest::{Engine, Kind, Origin, Plan};
use crate::layout::PAGE_MAP_PAGE;
use crate::memory::Memory;
use crate::program::{Progress, Registers};
use crate::tracking::{KvmTracking, TrackingChoice};
use crate::vcpu::Vcpu;
use crate::vcpu_state::{self, VcpuState};
use crate::workload::Share;

/// The interface that every KVM since Linux 2.6.22 has.
const KVM_API_VERSION: i32 = 12;

/// Reserved bit 1 of the flags, which is always set.
const RFLAGS: u64 = 0x2;

/// Paging, alignment mask, write protect, numeric error, extension type, monitor, protection.
const CR0: u64 = 0x8005_0033;

/// Physical address extension, which 64-bit mode demands.
const CR4: u64 = 0x20;

/// Long mode enabled and active.
const EFER: u64 = 0x500;

/// Enough for the largest memory and the hole, and not more than any host has that could hold it.
const PHYSICAL_ADDRESS_BITS: u32 = 39;

/// Four levels of page tables.
const VIRTUAL_ADDRESS_BITS: u32 = 48;

/// The engine of a machine. The threads come first, so that they end before what they use goes.
#[derive(Debug)]
pub(crate) struct Machine {
    threads: Threads,
    plan: Arc<Plan>,
    vcpus: Vec<Arc<Vcpu>>,
    msrs: Vec<u32>,
    tracking: KvmTracking,
}

impl Machine {
    /// Whether this host offers KVM to this process.
    ///
    /// # Errors
    /// [`Error::NoKvm`] with the reason.
    pub(crate) fn offered() -> Result<()> {
        open().map(|_| ())
    }

    /// The engine, all its threads resting. With [`Origin::Image`] the vCPUs stand before the program's first
    /// instruction; otherwise they wait for a state.
    ///
    /// # Errors
    /// [`Error::NoKvm`], [`Error::Kernel`], [`Error::Incompatible`], [`Error::Tracking`].
    pub(crate) fn new(
        plan: &Arc<Plan>,
        memory: &Memory,
        crew: &Arc<Crew>,
        origin: Origin,
    ) -> Result<Self> {
        let kvm = open()?;
        let vm = Arc::new(create_vm(&kvm)?);
        vcpu_state::require_xsave(&vm)?;
        // The ring must be on before the first vCPU is made.
        let choice = TrackingChoice::enable(&vm, plan.config.tracking, plan.rings)?;
        let mut descriptors = Vec::new();
        for share in &plan.layout.shares {
            let descriptor = vm
                .create_vcpu(u64::from(share.vcpu))
                .map_err(|e| Error::kvm("KVM_CREATE_VCPU", e))?;
            descriptor
                .set_cpuid2(&processor())
                .map_err(|error| Error::kvm("KVM_SET_CPUID2", error))?;
            if origin == Origin::Image {
                let sregs = descriptor
                    .get_sregs()
                    .map_err(|error| Error::kvm("KVM_GET_SREGS", error))?;
                descriptor
                    .set_sregs(&long_mode(sregs))
                    .map_err(|error| Error::kvm("KVM_SET_SREGS", error))?;
                let regs = first_regs(plan.program.registers(&plan.layout, share));
                descriptor
                    .set_regs(&regs)
                    .map_err(|error| Error::kvm("KVM_SET_REGS", error))?;
            }
            descriptors.push(descriptor);
        }
        let tracking = choice.attach(&vm, &descriptors, memory)?;
        let mut vcpus = Vec::new();
        for (index, descriptor) in (0..).zip(descriptors) {
            vcpus.push(Arc::new(Vcpu::new(index, descriptor)?));
        }
        let msrs = match vcpus.first() {
            Some(vcpu) => vcpu_state::offered_msrs(&kvm, &vcpu.descriptor())?,
            None => Vec::new(),
        };
        let mut threads = Threads::new(crew);
        for vcpu in &vcpus {
            let (vcpu, plan, crew) = (Arc::clone(vcpu), Arc::clone(plan), Arc::clone(crew));
            let ring_full = tracking.ring_full();
            let device = DmaDevice::new(plan.config.device, memory);
            threads.spawn(Some(Arc::clone(&vcpu.kick)), move || {
                vcpu.serve(&plan, &crew, &ring_full, device.as_ref())
            })?;
        }
        Ok(Self {
            threads,
            plan: Arc::clone(plan),
            vcpus,
            msrs,
            tracking,
        })
    }
}

impl Engine for Machine {
    fn kind(&self) -> Kind {
        Kind::Kvm
    }

    fn tracking(&self) -> Tracking {
        self.tracking.kind()
    }

    fn tracking_source(&self) -> Result<Box<dyn Source>> {
        self.tracking.source()
    }

    fn kick(&self) {
        self.threads.kick();
    }

    fn save(&self, records: &mut Vec<u8>) -> Result<()> {
        for vcpu in &self.vcpus {
            VcpuState::save(&vcpu.descriptor(), vcpu.index, &self.msrs)?.put(records);
        }
        Ok(())
    }

    fn load(&self, mut reader: Reader<'_>) -> Result<Vec<u64>> {
        let mut states = Vec::new();
        for vcpu in &self.vcpus {
            states.push(VcpuState::take(&mut reader, vcpu.index)?);
        }
        reader.finish()?;
        for (vcpu, state) in self.vcpus.iter().zip(&states) {
            state.load(&vcpu.descriptor())?;
        }
        Ok(states.iter().map(VcpuState::counter).collect())
    }

    fn progress(&self) -> Result<Vec<std::result::Result<Progress, String>>> {
        let progress = |(vcpu, share): (&Arc<Vcpu>, &Share)| {
            let regs = vcpu
                .descriptor()
                .get_regs()
                .map_err(|error| Error::kvm("KVM_GET_REGS", error))?;
            Ok(self.plan.program.progress(share, regs.rip, regs.rbx))
        };
        self.vcpus
            .iter()
            .zip(&self.plan.layout.shares)
            .map(progress)
            .collect()
    }
}

/// Why /dev/kvm can't be opened: not there and not allowed want different cures.
fn why_closed(errno: i32) -> String {
    match errno {
        libc::ENOENT => "there is no /dev/kvm".to_owned(),
        libc::EACCES | libc::EPERM => {
            "this process has no read and write access to /dev/kvm".to_owned()
        }
        _ => format!("/dev/kvm: {}", std::io::Error::from_raw_os_error(errno)),
    }
}

fn open() -> Result<Kvm> {
    let kvm = Kvm::new().map_err(|error| Error::NoKvm {
        reason: why_closed(error.errno()),
    })?;
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION {
        return Err(Error::NoKvm {
            reason: format!("KVM's interface has version {version}"),
        });
    }
    if !kvm.check_extension(Cap::ImmediateExit) {
        return Err(Error::NoKvm {
            reason: "KVM is older than immediate_exit (Linux 4.12)".to_owned(),
        });
    }
    Ok(kvm)
}

fn create_vm(kvm: &Kvm) -> Result<VmFd> {
    loop {
        match kvm.create_vm() {
            Ok(vm) => return Ok(vm),
            // Making a machine may be interrupted by any signal.
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(Error::kvm("KVM_CREATE_VM", error)),
        }
    }
}

/// The processor that the guest sees, the same on every host: the least that 64-bit code can expect. Without the width
/// of its addresses (leaf 8000_0008h) KVM takes 36 bits, and a guest of more than 60 GiB faults.
fn processor() -> CpuId {
    let entry = |function, eax, edx| kvm_cpuid_entry2 {
        function,
        eax,
        edx,
        ..Default::default()
    };
    // FPU, TSC, MSR, PAE, CX8, CMOV, FXSR, SSE, SSE2.
    let features = 1 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 15 | 1 << 24 | 1 << 25 | 1 << 26;
    // SYSCALL, NX, long mode.
    let extended = 1 << 11 | 1 << 20 | 1 << 29;
    let entries = [
        entry(0, 1, 0),
        entry(1, 0, features),
        entry(0x8000_0000, 0x8000_0008, 0),
        entry(0x8000_0001, 0, extended),
        entry(
            0x8000_0008,
            PHYSICAL_ADDRESS_BITS | VIRTUAL_ADDRESS_BITS << 8,
            0,
        ),
    ];
    CpuId::from_entries(&entries).expect("five entries are few")
}

/// Flat 64-bit mode with the guest's page tables, from what a fresh vCPU has.
fn long_mode(fresh: kvm_sregs) -> kvm_sregs {
    let code = kvm_segment {
        limit: u32::MAX,
        selector: 8,
        type_: 11, // execute, read, accessed
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: 16,
        type_: 3, // read, write, accessed
        db: 1,
        l: 0,
        ..code
    };
    kvm_sregs {
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        cr0: CR0,
        cr3: PAGE_MAP_PAGE * PAGE_BYTES,
        cr4: CR4,
        efer: EFER,
        ..fresh
    }
}

fn first_regs(registers: Registers) -> kvm_regs {
    let Registers {
        rip,
        rcx,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
    } = registers;
    kvm_regs {
        rip,
        rcx,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        rflags: RFLAGS,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_device_and_no_right_are_told_apart() {
        assert_eq!(why_closed(libc::ENOENT), "there is no /dev/kvm");
        assert!(why_closed(libc::EACCES).contains("access to /dev/kvm"));
        assert!(why_closed(libc::EBUSY).contains("busy"));
    }
}
