//! The state of one virtual CPU as bytes, and its way out of and into KVM.
//!
//! ```text
//!      0 u32 index         4 u32 MSRs
//!      8 kvm_regs[144]       152 kvm_sregs[312]        464 kvm_xsave[4096]   4560 kvm_xcrs[392]
//!   4952 kvm_debugregs[128] 5080 kvm_vcpu_events[64]  5144 u32 mp_state      5148 u32 reserved (0)
//!   5152 MSRs: u32 index, u32 reserved (0), u64 value; indices rising
//! ```
//!
//! The structures are the kernel's own (`linux/kvm.h`, x86), whose layout is a promise. The guest sees
//! the same plain processor on every host, and its extended state is x87 and SSE alone.
#![allow(unsafe_code)] // KVM_SET_XSAVE, whose length the kernel decides

use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, Msrs, kvm_debugregs, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::codec::{Reader, put};
use crate::error::{Error, Result};

/// Model-specific registers that make up a processor's state for 64-bit code, by rising index: what is not in here is
/// a host's matter (microcode, feature and paravirtual registers). A host may offer fewer.
const MSRS: [u32; 12] = [
    0x10,        // time-stamp counter
    0x174,       // SYSENTER: code segment
    0x175,       // SYSENTER: stack
    0x176,       // SYSENTER: entry
    0x1A0,       // miscellaneous enable
    0x277,       // page attribute table
    0xC000_0081, // SYSCALL: segments
    0xC000_0082, // SYSCALL: 64-bit entry
    0xC000_0083, // SYSCALL: 32-bit entry
    0xC000_0084, // SYSCALL: flag mask
    0xC000_0102, // swapped GS base
    0xC000_0103, // time-stamp counter's auxiliary value
];

/// The state of one virtual CPU.
#[derive(Debug)]
pub(crate) struct VcpuState {
    raw: RawVcpu,
    msrs: Vec<kvm_msr_entry>,
}

#[derive(Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct RawVcpu {
    index: u32,
    msr_count: u32,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    events: kvm_vcpu_events,
    mp_state: u32,
    reserved: u32,
}

const _: () = assert!(size_of::<RawVcpu>() == 5152);

impl VcpuState {
    /// Asks KVM for the state of a vCPU that is out of `KVM_RUN`, with what the kernel had to complete completed.
    ///
    /// # Errors
    /// [`Error::Kernel`] with the ioctl that failed.
    pub(crate) fn save(vcpu: &VcpuFd, index: u32, msrs: &[u32]) -> Result<Self> {
        let mp_state = vcpu
            .get_mp_state()
            .map_err(|error| Error::kvm("KVM_GET_MP_STATE", error))?;
        let raw = RawVcpu {
            index,
            msr_count: msrs.len() as u32,
            regs: vcpu
                .get_regs()
                .map_err(|error| Error::kvm("KVM_GET_REGS", error))?,
            sregs: vcpu
                .get_sregs()
                .map_err(|error| Error::kvm("KVM_GET_SREGS", error))?,
            xsave: vcpu
                .get_xsave()
                .map_err(|error| Error::kvm("KVM_GET_XSAVE", error))?,
            xcrs: vcpu
                .get_xcrs()
                .map_err(|error| Error::kvm("KVM_GET_XCRS", error))?,
            debugregs: vcpu
                .get_debug_regs()
                .map_err(|error| Error::kvm("KVM_GET_DEBUGREGS", error))?,
            events: vcpu
                .get_vcpu_events()
                .map_err(|error| Error::kvm("KVM_GET_VCPU_EVENTS", error))?,
            mp_state: mp_state.mp_state,
            reserved: 0,
        };
        Ok(Self {
            raw,
            msrs: read_msrs(vcpu, msrs)?,
        })
    }

    /// Gives the state to a vCPU that never ran.
    ///
    /// # Errors
    /// [`Error::Kernel`] with the ioctl that refused it; [`Error::Incompatible`] for an MSR that this host refuses.
    /// The vCPU must not run then.
    pub(crate) fn load(&self, vcpu: &VcpuFd) -> Result<()> {
        let raw = &self.raw;
        // Control registers first: they decide what the others may be. Events last: setting registers clears them.
        vcpu.set_sregs(&raw.sregs)
            .map_err(|error| Error::kvm("KVM_SET_SREGS", error))?;
        vcpu.set_xcrs(&raw.xcrs)
            .map_err(|error| Error::kvm("KVM_SET_XCRS", error))?;
        // SAFETY: the kernel reads as many bytes as KVM_CAP_XSAVE2 says, and `require_xsave` refused every host where
        // those are more than the 4,096 of this structure.
        unsafe { vcpu.set_xsave(&raw.xsave) }
            .map_err(|error| Error::kvm("KVM_SET_XSAVE", error))?;
        vcpu.set_regs(&raw.regs)
            .map_err(|error| Error::kvm("KVM_SET_REGS", error))?;
        vcpu.set_debug_regs(&raw.debugregs)
            .map_err(|error| Error::kvm("KVM_SET_DEBUGREGS", error))?;
        self.load_msrs(vcpu)?;
        vcpu.set_vcpu_events(&raw.events)
            .map_err(|error| Error::kvm("KVM_SET_VCPU_EVENTS", error))?;
        let mp_state = kvm_mp_state {
            mp_state: raw.mp_state,
        };
        vcpu.set_mp_state(mp_state)
            .map_err(|error| Error::kvm("KVM_SET_MP_STATE", error))
    }

    /// The counter of the guest's program.
    pub(crate) fn counter(&self) -> u64 {
        self.raw.regs.rbx
    }

    /// Appends the bytes.
    pub(crate) fn put(&self, octets: &mut Vec<u8>) {
        put(octets, &self.raw);
        self.msrs.iter().for_each(|msr| put(octets, msr));
    }

    /// Reads the record of virtual CPU `index`.
    ///
    /// # Errors
    /// [`Error::Malformed`] for bytes that [`put`](Self::put) does not write.
    pub(crate) fn take(reader: &mut Reader<'_>, index: u32) -> Result<Self> {
        let raw: RawVcpu = reader.take()?;
        reader.expect("vCPU index", raw.index, index)?;
        reader.expect("reserved field", raw.reserved, 0)?;
        // Without an interrupt controller nothing could ever wake a vCPU in another state.
        reader.expect("vCPU run state", raw.mp_state, KVM_MP_STATE_RUNNABLE)?;
        if raw.xcrs.nr_xcrs as usize > raw.xcrs.xcrs.len() {
            return Err(
                reader.malformed(format!("{} extended control registers", raw.xcrs.nr_xcrs))
            );
        }
        if raw.msr_count as usize > MSRS.len() {
            return Err(reader.malformed(format!(
                "{} MSRs, and at most {} are known",
                raw.msr_count,
                MSRS.len()
            )));
        }
        let mut msrs: Vec<kvm_msr_entry> = Vec::with_capacity(MSRS.len());
        for _ in 0..raw.msr_count {
            let msr: kvm_msr_entry = reader.take()?;
            let rising = msrs.last().is_none_or(|last| last.index < msr.index);
            if !rising || msr.reserved != 0 || !MSRS.contains(&msr.index) {
                return Err(
                    reader.malformed(format!("MSR {:#x} is unknown or out of order", msr.index))
                );
            }
            msrs.push(msr);
        }
        Ok(Self { raw, msrs })
    }

    fn load_msrs(&self, vcpu: &VcpuFd) -> Result<()> {
        let wanted = Msrs::from_entries(&self.msrs).expect("at most twelve entries");
        let set = vcpu
            .set_msrs(&wanted)
            .map_err(|error| Error::kvm("KVM_SET_MSRS", error))?;
        match self.msrs.get(set) {
            None => Ok(()),
            Some(refused) => Err(Error::Incompatible {
                detail: format!(
                    "this host's KVM refuses MSR {:#x} of the guest's state",
                    refused.index
                ),
            }),
        }
    }
}

/// Refuses a host whose extended state does not fit [`kvm_xsave`].
///
/// # Errors
/// [`Error::Incompatible`].
pub(crate) fn require_xsave(vm: &VmFd) -> Result<()> {
    let bytes = vm.check_extension_int(Cap::Xsave2);
    if !vm.check_extension(Cap::Xsave) || bytes > size_of::<kvm_xsave>() as i32 {
        let detail = format!(
            "the guest's extended state takes {bytes} bytes on this host, and 4096 are supported"
        );
        return Err(Error::Incompatible { detail });
    }
    Ok(())
}

/// The MSRs that this host saves: those of the list that KVM names and lets be read.
///
/// # Errors
/// [`Error::Kernel`] if KVM does not answer at all.
pub(crate) fn offered_msrs(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<u32>> {
    let named = kvm
        .get_msr_index_list()
        .map_err(|error| Error::kvm("KVM_GET_MSR_INDEX_LIST", error))?;
    let mut offered: Vec<u32> = MSRS
        .into_iter()
        .filter(|msr| named.as_slice().contains(msr))
        .collect();
    // KVM reads until the first one it refuses, and says how many it read.
    loop {
        let mut msrs = request(&offered);
        let read = vcpu
            .get_msrs(&mut msrs)
            .map_err(|error| Error::kvm("KVM_GET_MSRS", error))?;
        if read >= offered.len() {
            return Ok(offered);
        }
        offered.remove(read);
    }
}

fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>> {
    let mut msrs = request(indices);
    let read = vcpu
        .get_msrs(&mut msrs)
        .map_err(|error| Error::kvm("KVM_GET_MSRS", error))?;
    match indices.get(read) {
        None => Ok(msrs.as_slice().to_vec()),
        Some(refused) => Err(Error::Incompatible {
            detail: format!("this host's KVM does not read MSR {refused:#x} any more"),
        }),
    }
}

fn request(indices: &[u32]) -> Msrs {
    let entries: Vec<kvm_msr_entry> = indices
        .iter()
        .map(|index| kvm_msr_entry {
            index: *index,
            ..Default::default()
        })
        .collect();
    Msrs::from_entries(&entries).expect("at most twelve entries")
}
