//! One virtual CPU of a machine, and the thread that runs it.
//!
//! ```text
//!   gate ──run──► disarm ─► KVM_RUN ─► heart-beat: report, wait until the next batch is due ─┐
//!    ▲                        ▲ │ interrupted: look at the gate                              │
//!    │                        │ │ ring full: harvest on this thread                          │
//!    │                        └─┴────────────────────────────────────────────────────────────┘
//!    └── arm, KVM_RUN once more: the kernel completes the `out`, and returns at once
//! ```
//!
//! The descriptor is behind a lock that the thread holds from the run to the rest, so that whoever saves or loads a
//! resting vCPU has it alone.
//!
//! The last `KVM_RUN` before a rest is needed: after a port I/O exit the registers are only whole once the vCPU was
//! entered again (KVM API, KVM_EXIT_IO).

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::crew::Crew;
use crate::device::DmaDevice;
use crate::error::Result;
use crate::gate::Order;
use crate::guest::Plan;
use crate::kick::{self, Kick};
use crate::pace::Pace;
use crate::program::BEAT_PORT;
use crate::tracking::RingFull;

/// One virtual CPU.
#[derive(Debug)]
pub(crate) struct Vcpu {
    pub(crate) index: u32,
    pub(crate) kick: Arc<Kick>,
    descriptor: Mutex<VcpuFd>,
}

/// What the device was given and the guest has not taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mapped {
    Nothing,
    /// The pages of a batch.
    Batch,
}

/// Why a vCPU came out of `KVM_RUN`.
#[derive(Debug, PartialEq, Eq)]
enum Exit {
    /// Nothing to do but to look at the gate.
    Interrupted,
    /// The low half of the counter.
    Beat(u32),
    /// The dirty ring of this vCPU is nearly full.
    RingFull,
    /// Something that the guest's program never does.
    Unexpected(String),
}

impl Vcpu {
    /// A vCPU that never ran.
    ///
    /// # Errors
    /// [`Error::Kernel`](crate::Error::Kernel) if it cannot be made kickable.
    pub(crate) fn new(index: u32, descriptor: VcpuFd) -> Result<Self> {
        let kick = Arc::new(Kick::new(&descriptor)?);
        Ok(Self {
            index,
            kick,
            descriptor: Mutex::new(descriptor),
        })
    }

    /// The descriptor; waits for the thread's rest.
    pub(crate) fn descriptor(&self) -> MutexGuard<'_, VcpuFd> {
        self.descriptor
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
    }

    /// The thread's body: runs whenever the gate says so, until the end.
    pub(crate) fn serve(
        &self,
        plan: &Plan,
        crew: &Crew,
        ring_full: &RingFull,
        device: Option<&DmaDevice>,
    ) {
        if let Err(error) = kick::unblock_kick() {
            return crew.gate.fail(self.index, error.to_string());
        }
        while crew.gate.rest(self.index) == Order::Run {
            if let Err(detail) = self.run(plan, crew, ring_full, device) {
                return crew.gate.fail(self.index, detail);
            }
        }
    }

    /// Runs until the gate says otherwise; returns with the vCPU's registers whole.
    fn run(
        &self,
        plan: &Plan,
        crew: &Crew,
        ring_full: &RingFull,
        device: Option<&DmaDevice>,
    ) -> std::result::Result<(), String> {
        let mut descriptor = self.descriptor();
        let beat = &crew.beats[self.index as usize];
        let share = &plan.layout.shares[self.index as usize];
        let mut pace = Pace::new(share.batch_ns, Instant::now());
        // A guest with a device rests only at the end of a batch, so this is where one begins.
        let mut counter = descriptor
            .get_regs()
            .map_err(|error| format!("KVM_GET_REGS: {error}"))?
            .rbx;
        let mut mapped = Mapped::Nothing;
        // Whoever pauses sets the wish first and arms second: if this disarms too late, the wish is seen below.
        self.kick.disarm();
        while crew.gate.may_run() || mapped == Mapped::Batch {
            if let Some(device) = device
                && mapped == Mapped::Nothing
            {
                device.transfer(&plan.layout, share, counter);
                mapped = Mapped::Batch;
            }
            match enter(&mut descriptor) {
                // What the device was given is taken back first.
                Exit::Interrupted if mapped == Mapped::Batch => self.kick.disarm(),
                Exit::Interrupted => {}
                Exit::Beat(low) => {
                    mapped = Mapped::Nothing;
                    counter = counter.wrapping_add(share.batch);
                    beat.report_low(low);
                    let due = pace.batch_ended(Instant::now(), crew.throttle());
                    crew.gate.wait_until(due);
                }
                Exit::RingFull => ring_full.harvest(self.index)?,
                Exit::Unexpected(what) => return Err(locate(&descriptor, &what)),
            }
        }
        self.kick.arm();
        match enter(&mut descriptor) {
            Exit::Interrupted => Ok(()),
            exit => Err(locate(
                &descriptor,
                &format!("{exit:?} while coming to rest"),
            )),
        }
    }
}

fn enter(descriptor: &mut VcpuFd) -> Exit {
    match descriptor.run() {
        Ok(VcpuExit::IoOut(port, data)) if port == u16::from(BEAT_PORT) => {
            // The program sends 32 bits; anything else is not the program.
            <[u8; 4]>::try_from(data).map_or_else(
                |_| Exit::Unexpected(format!("a heart-beat of {} bytes", data.len())),
                |octets| Exit::Beat(u32::from_le_bytes(octets)),
            )
        }
        Ok(VcpuExit::Intr) => Exit::Interrupted,
        Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => Exit::RingFull,
        Ok(exit) => Exit::Unexpected(format!("exit {exit:?}")),
        Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => Exit::Interrupted,
        Err(error) => Exit::Unexpected(format!("KVM_RUN: {error}")),
    }
}

/// `what`, and where the program was.
fn locate(descriptor: &VcpuFd, what: &str) -> String {
    match descriptor.get_regs() {
        Ok(regs) => format!("{what}, at {:#x} with counter {}", regs.rip, regs.rbx),
        Err(_) => what.to_owned(),
    }
}
