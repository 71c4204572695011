//! The state of processors, interrupt controllers and clocks, out of KVM and into it.
//!
//! What the order of loading has to keep: CPUID decides which registers there are; control registers decide what the others may be; the
//! local APIC wants its base address (in the special registers); the deadline of the APIC's timer wants the APIC's mode and the
//! time-stamp counter; setting registers clears events, so these are last; and nothing may wake a processor before it is whole.
#![allow(unsafe_code)] // KVM_GET_XSAVE2 and KVM_SET_XSAVE, whose length the kernel decides

use anyhow::{Context as _, Result, bail, ensure};
use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES, Msrs, Xsave, kvm_clock_data, kvm_debugregs, kvm_irqchip,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

/// The time at which the APIC's timer fires, in ticks of the time-stamp counter.
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// What `kvm_xsave` holds without what a host adds to it.
const XSAVE_BYTES: usize = 4096;

/// The state of the machine apart from processors, memory and this VMM's own devices.
#[derive(Serialize, Deserialize)]
pub(crate) struct VmState {
    chips: Vec<kvm_irqchip>,
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
}

impl VmState {
    pub(crate) fn save(vm: &VmFd) -> Result<Self> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.get_irqchip(&mut chip).context("KVM_GET_IRQCHIP")?;
            Ok(chip)
        };
        let chips = [
            KVM_IRQCHIP_PIC_MASTER,
            KVM_IRQCHIP_PIC_SLAVE,
            KVM_IRQCHIP_IOAPIC,
        ];
        Ok(Self {
            chips: chips.into_iter().map(chip).collect::<Result<_>>()?,
            pit: vm.get_pit2().context("KVM_GET_PIT2")?,
            clock: vm.get_clock().context("KVM_GET_CLOCK")?,
        })
    }

    pub(crate) fn load(&self, vm: &VmFd) -> Result<()> {
        for chip in &self.chips {
            vm.set_irqchip(chip).context("KVM_SET_IRQCHIP")?;
        }
        vm.set_pit2(&self.pit).context("KVM_SET_PIT2")?;
        // The guest's clock goes on where it stood; the flags say only what the other host's clock was like.
        let clock = kvm_clock_data {
            clock: self.clock.clock,
            ..Default::default()
        };
        vm.set_clock(&clock).context("KVM_SET_CLOCK")
    }
}

/// The state of one processor.
#[derive(Serialize, Deserialize)]
pub(crate) struct VcpuState {
    cpuid: CpuId,
    tsc_khz: u32,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xcrs: kvm_xcrs,
    xsave: Xsave,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
}

impl VcpuState {
    /// The state of a processor that rests, with nothing half done. `msrs` are those of [`readable_msrs`].
    pub(crate) fn save(vm: &VmFd, vcpu: &VcpuFd, msrs: &[u32]) -> Result<Self> {
        Ok(Self {
            // First, because asking for it carries out what was sent to the processor (INIT, start-up).
            mp_state: vcpu.get_mp_state().context("KVM_GET_MP_STATE")?,
            cpuid: vcpu
                .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
                .context("KVM_GET_CPUID2")?,
            tsc_khz: vcpu.get_tsc_khz().context("KVM_GET_TSC_KHZ")?,
            regs: vcpu.get_regs().context("KVM_GET_REGS")?,
            sregs: vcpu.get_sregs().context("KVM_GET_SREGS")?,
            xcrs: vcpu.get_xcrs().context("KVM_GET_XCRS")?,
            xsave: get_xsave(vm, vcpu)?,
            debug: vcpu.get_debug_regs().context("KVM_GET_DEBUGREGS")?,
            lapic: vcpu.get_lapic().context("KVM_GET_LAPIC")?,
            msrs: get_msrs(vcpu, msrs)?,
            events: vcpu.get_vcpu_events().context("KVM_GET_VCPU_EVENTS")?,
        })
    }

    /// Gives the state to a processor that rests.
    pub(crate) fn load(&self, vm: &VmFd, vcpu: &VcpuFd) -> Result<()> {
        vcpu.set_cpuid2(&self.cpuid).context("KVM_SET_CPUID2")?;
        if vcpu.get_tsc_khz().ok() != Some(self.tsc_khz) {
            vcpu.set_tsc_khz(self.tsc_khz)
                .context("the time-stamp counters differ, and this host cannot scale its own")?;
        }
        vcpu.set_sregs(&self.sregs).context("KVM_SET_SREGS")?;
        vcpu.set_xcrs(&self.xcrs).context("KVM_SET_XCRS")?;
        set_xsave(vm, vcpu, &self.xsave)?;
        vcpu.set_debug_regs(&self.debug)
            .context("KVM_SET_DEBUGREGS")?;
        vcpu.set_lapic(&self.lapic).context("KVM_SET_LAPIC")?;
        let (late, early): (Vec<_>, Vec<_>) = self
            .msrs
            .iter()
            .partition(|msr| msr.index == MSR_TSC_DEADLINE);
        set_msrs(vcpu, &early)?;
        set_msrs(vcpu, &late)?;
        vcpu.set_regs(&self.regs).context("KVM_SET_REGS")?;
        vcpu.set_vcpu_events(&self.events)
            .context("KVM_SET_VCPU_EVENTS")?;
        vcpu.set_mp_state(self.mp_state)
            .context("KVM_SET_MP_STATE")?;
        // Tells the guest's watchdogs that it stood still; a guest without KVM's clock has none.
        let _ = vcpu.kvmclock_ctrl();
        Ok(())
    }
}

/// Bytes of extended state that this host saves for a guest.
fn xsave_bytes(vm: &VmFd) -> usize {
    let bytes = vm.check_extension_int(Cap::Xsave2);
    usize::try_from(bytes).unwrap_or(0).max(XSAVE_BYTES)
}

fn get_xsave(vm: &VmFd, vcpu: &VcpuFd) -> Result<Xsave> {
    let more = (xsave_bytes(vm) - XSAVE_BYTES).div_ceil(4);
    let mut xsave = Xsave::new(more).context("no room for the extended state")?;
    // SAFETY: the kernel writes as many bytes as KVM_CAP_XSAVE2 says, and so many were made room for.
    unsafe { vcpu.get_xsave2(&mut xsave) }.context("KVM_GET_XSAVE2")?;
    Ok(xsave)
}

fn set_xsave(vm: &VmFd, vcpu: &VcpuFd, xsave: &Xsave) -> Result<()> {
    let (has, wants) = (XSAVE_BYTES + xsave.as_slice().len() * 4, xsave_bytes(vm));
    ensure!(
        has >= wants,
        "the guest's extended state has {has} bytes, and this host wants {wants}"
    );
    // SAFETY: the kernel reads as many bytes as KVM_CAP_XSAVE2 says, and there are no fewer.
    unsafe { vcpu.set_xsave2(xsave) }.context("KVM_SET_XSAVE")
}

/// The registers (MSR) that KVM names and lets be read on this host.
pub(crate) fn readable_msrs(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<u32>> {
    let named = kvm.get_msr_index_list().context("KVM_GET_MSR_INDEX_LIST")?;
    let named = named.as_slice().iter().copied();
    Ok(named
        .filter(|&index| get_msrs(vcpu, &[index]).is_ok())
        .collect())
}

/// KVM takes this many at a time.
const MSRS_AT_A_TIME: usize = 128;

fn get_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>> {
    let mut all = Vec::with_capacity(indices.len());
    for some in indices.chunks(MSRS_AT_A_TIME) {
        let entries: Vec<_> = some
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut msrs = Msrs::from_entries(&entries).context("too many registers")?;
        let read = vcpu.get_msrs(&mut msrs).context("KVM_GET_MSRS")?;
        if let Some(refused) = some.get(read) {
            bail!("this host's KVM does not read MSR {refused:#x}");
        }
        all.extend_from_slice(msrs.as_slice());
    }
    Ok(all)
}

/// Sets registers. One that this host does not let be set is no harm if it has the value already.
fn set_msrs(vcpu: &VcpuFd, mut wanted: &[&kvm_msr_entry]) -> Result<()> {
    while !wanted.is_empty() {
        let some = &wanted[..wanted.len().min(MSRS_AT_A_TIME)];
        let entries: Vec<_> = some.iter().map(|&&msr| msr).collect();
        let msrs = Msrs::from_entries(&entries).context("too many registers")?;
        let mut set = vcpu.set_msrs(&msrs).context("KVM_SET_MSRS")?;
        if let Some(refused) = entries.get(set) {
            let has = get_msrs(vcpu, &[refused.index])?;
            ensure!(
                has.first().is_some_and(|msr| msr.data == refused.data),
                "this host's KVM refuses {:#x} in MSR {:#x}",
                refused.data,
                refused.index
            );
            set += 1;
        }
        wanted = &wanted[set..];
    }
    Ok(())
}
