//! The machine: KVM's, with memory, processors, interrupt controllers, timer and devices; running, or resting.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result, ensure};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use multifd::tracking::kvm::{MemorySlots, Method, VcpuWrites};
use multifd::tracking::vm_memory::{MarkerBitmap, bind_all};
use multifd::tracking::{Source, VmmWrites};
use serde::{Deserialize, Serialize};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::signal::{Killable as _, SIGRTMIN, register_signal_handler};

use crate::boot;
use crate::devices::{Devices, DevicesState};
use crate::gate::{End, Gate};
use crate::state::{VcpuState, VmState, readable_msrs};
use crate::vcpu::Vcpu;

/// Guest memory whose bitmap tells the migration what devices write.
pub(crate) type Memory = GuestMemoryMmap<MarkerBitmap>;

/// Memory is one piece from 0 on, and above this are the registers of devices.
const MEMORY_BYTES_MAX: u64 = 3 << 30;

/// Pages that KVM needs on Intel processors, beside everything else.
const IDENTITY_MAP: u64 = 0xfffb_c000;
const TASK_STATE: usize = 0xfffb_d000;

/// What two machines must have in common for one to take over the other's state.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Shape {
    pub(crate) memory_bytes: u64,
    pub(crate) cpus: u8,
}

/// What the first instructions need.
pub(crate) struct Boot {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: Option<PathBuf>,
    pub(crate) command_line: String,
}

/// Everything that moves besides memory.
#[derive(Serialize, Deserialize)]
pub(crate) struct MachineState {
    pub(crate) vm: VmState,
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) devices: DevicesState,
}

pub(crate) struct Machine {
    pub(crate) shape: Shape,
    pub(crate) memory: Arc<Memory>,
    /// Who reports what was written to memory; away while a migration has them.
    pub(crate) sources: Vec<Box<dyn Source>>,
    pub(crate) devices: Arc<Devices>,
    pub(crate) gate: Arc<Gate>,
    vm: Arc<VmFd>,
    vcpus: Vec<Arc<Mutex<VcpuFd>>>,
    msrs: Vec<u32>,
    threads: Vec<JoinHandle<()>>,
}

extern "C" fn interrupts_only(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl Machine {
    /// A machine that rests, with empty memory.
    pub(crate) fn new(shape: Shape, tracking: Option<Method>) -> Result<Self> {
        ensure!(
            (1 << 20..=MEMORY_BYTES_MAX).contains(&shape.memory_bytes)
                && shape.memory_bytes.is_multiple_of(4096),
            "memory of {} bytes: 1 MiB to 3 GiB in pages of 4 KiB are supported",
            shape.memory_bytes
        );
        ensure!(shape.cpus > 0, "a machine has at least one processor");
        let kvm = Kvm::new().context("/dev/kvm")?;
        let vm = Arc::new(kvm.create_vm().context("KVM_CREATE_VM")?);
        // Before the first vCPU.
        let writes = VcpuWrites::enable(&vm, tracking)?;
        vm.set_identity_map_address(IDENTITY_MAP)
            .context("KVM_SET_IDENTITY_MAP_ADDR")?;
        vm.set_tss_address(TASK_STATE).context("KVM_SET_TSS_ADDR")?;
        vm.create_irq_chip().context("KVM_CREATE_IRQCHIP")?;
        vm.create_pit2(kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        })
        .context("KVM_CREATE_PIT2")?;

        let bytes = usize::try_from(shape.memory_bytes)?;
        let memory = Memory::from_ranges(&[(GuestAddress(0), bytes)])?;
        let memory = Arc::new(memory);
        let devices_write = VmmWrites::named("devices");
        bind_all(&memory, &devices_write);
        let slots = MemorySlots::new(&vm, &memory)?;

        let vcpus = (0..u64::from(shape.cpus))
            .map(|index| vm.create_vcpu(index).context("KVM_CREATE_VCPU"))
            .collect::<Result<Vec<_>>>()?;
        for (vcpu, index) in vcpus.iter().zip(0..) {
            vcpu.set_cpuid2(&cpuid(&kvm, index)?)
                .context("KVM_SET_CPUID2")?;
        }
        let (vcpus_write, ring) = writes.source(&vm, &vcpus, slots)?;
        let msrs = readable_msrs(&kvm, &vcpus[0])?;

        let mut machine = Self {
            shape,
            sources: vec![vcpus_write, Box::new(devices_write)],
            devices: Arc::new(Devices::new(&vm, &memory)?),
            memory,
            gate: Arc::default(),
            vm,
            vcpus: vcpus
                .into_iter()
                .map(|vcpu| Arc::new(Mutex::new(vcpu)))
                .collect(),
            msrs,
            threads: Vec::new(),
        };
        register_signal_handler(SIGRTMIN(), interrupts_only)?;
        for (index, descriptor) in machine.vcpus.iter().enumerate() {
            let vcpu = Vcpu {
                index,
                descriptor: Arc::clone(descriptor),
                gate: Arc::clone(&machine.gate),
                devices: Arc::clone(&machine.devices),
                ring: ring.clone(),
            };
            let name = format!("vcpu{index}");
            let thread = std::thread::Builder::new().name(name);
            machine.threads.push(thread.spawn(move || vcpu.serve())?);
        }
        Ok(machine)
    }

    /// Puts a kernel into memory, and the first processor before its first instruction.
    pub(crate) fn boot(&self, boot: &Boot) -> Result<()> {
        let entry = boot::load(
            &self.memory,
            self.shape.memory_bytes,
            &boot.kernel,
            boot.initrd.as_deref(),
            &boot.command_line,
            self.shape.cpus,
        )?;
        let first = self.vcpu(0);
        let sregs = first.get_sregs().context("KVM_GET_SREGS")?;
        first
            .set_sregs(&entry.sregs(sregs))
            .context("KVM_SET_SREGS")?;
        first.set_regs(&entry.regs).context("KVM_SET_REGS")
    }

    /// Lets it run.
    pub(crate) fn run(&self) {
        self.devices.go();
        self.gate.run();
    }

    /// Brings it to rest: memory and state do not change any more.
    pub(crate) fn pause(&self) {
        self.gate.pause(self.threads.len(), || {
            for thread in &self.threads {
                // A thread that has ended is as good as one that rests.
                let _ = thread.kill(SIGRTMIN());
            }
        });
        self.devices.rest();
    }

    /// How the guest ended, if it did.
    pub(crate) fn ended(&self) -> Option<End> {
        self.gate.ended()
    }

    /// The state of a machine that rests.
    pub(crate) fn save(&self) -> Result<MachineState> {
        let vcpus = (0..self.vcpus.len())
            .map(|index| VcpuState::save(&self.vm, &self.vcpu(index), &self.msrs));
        Ok(MachineState {
            vcpus: vcpus.collect::<Result<_>>()?,
            vm: VmState::save(&self.vm)?,
            devices: self.devices.save(),
        })
    }

    /// Gives it the state of another machine of its shape. It rests.
    pub(crate) fn load(&self, state: MachineState) -> Result<()> {
        let (has, comes) = (self.vcpus.len(), state.vcpus.len());
        ensure!(
            has == comes,
            "the state is one of {comes} processors, and here are {has}"
        );
        state.vm.load(&self.vm)?;
        for (index, vcpu) in state.vcpus.iter().enumerate() {
            vcpu.load(&self.vm, &self.vcpu(index))
                .with_context(|| format!("processor {index}"))?;
        }
        self.devices.load(state.devices)
    }

    /// A processor; waits until its thread rests.
    fn vcpu(&self, index: usize) -> MutexGuard<'_, VcpuFd> {
        self.vcpus[index]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.pause();
        self.gate.close();
        for thread in self.threads.drain(..) {
            // What a thread that panicked had to say, it has said.
            let _ = thread.join();
        }
    }
}

/// The processor that the guest sees: this host's, as KVM can give it.
fn cpuid(kvm: &Kvm, index: u32) -> Result<CpuId> {
    let mut cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .context("KVM_GET_SUPPORTED_CPUID")?;
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0x00ff_ffff | index << 24;
                // A hypervisor; a timer that is set by the time-stamp counter, which KVM's APIC always has.
                entry.ecx |= 1 << 31 | 1 << 24;
            }
            // The numbers of processors in their topology.
            0xb | 0x1f => entry.edx = index,
            0x8000_001e => entry.eax = index,
            _ => {}
        }
    }
    Ok(cpuid)
}
