//! A virtual processor's thread.
//!
//! ```text
//!   gate ──run──► KVM_RUN ◄──► port or memory of a device; a full dirty ring is emptied on this thread
//!    ▲               │ the gate was closed
//!    └───────────────┴── once more with immediate_exit: the kernel completes what a device answered, and returns at once
//! ```
//! The rule it keeps: a thread that rests has nothing half done, so that the registers are whole when they are saved. After an exit to a
//! device they are not before the next KVM_RUN (KVM API, KVM_EXIT_IO).

use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::{VcpuExit, VcpuFd};
use multifd::tracking::kvm::{EXIT_DIRTY_RING_FULL, RingFullHandle};

use crate::devices::Devices;
use crate::gate::{End, Gate, Order};

/// What the thread of one vCPU needs.
pub(crate) struct Vcpu {
    pub(crate) index: usize,
    pub(crate) descriptor: Arc<Mutex<VcpuFd>>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) devices: Arc<Devices>,
    pub(crate) ring: Option<RingFullHandle>,
}

enum Exit {
    Handled,
    Interrupted,
    RingFull,
    End(End),
}

impl Vcpu {
    /// The thread's body.
    pub(crate) fn serve(self) {
        while self.gate.rest() == Order::Run {
            // Held until it rests: whoever saves or loads a resting vCPU has it alone.
            let descriptor = Arc::clone(&self.descriptor);
            let mut descriptor = descriptor.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(end) = self.run(&mut descriptor) {
                self.gate.end(end);
            }
        }
    }

    fn run(&self, descriptor: &mut VcpuFd) -> Result<(), End> {
        descriptor.set_kvm_immediate_exit(0);
        while self.gate.is_open() {
            self.enter(descriptor)?;
        }
        descriptor.set_kvm_immediate_exit(1);
        while !matches!(self.enter(descriptor)?, Exit::Interrupted) {}
        Ok(())
    }

    fn enter(&self, descriptor: &mut VcpuFd) -> Result<Exit, End> {
        let exit = self.handle(descriptor.run());
        match exit {
            Exit::End(end) => Err(end),
            Exit::RingFull => match &self.ring {
                // What fails is kept for the next harvest, and the exit comes again.
                Some(ring) => {
                    let _ = ring.on_full(self.index);
                    Ok(Exit::RingFull)
                }
                None => Err(End::Failed("a full dirty ring, and there is none".into())),
            },
            exit => Ok(exit),
        }
    }

    fn handle(&self, exit: Result<VcpuExit<'_>, kvm_ioctls::Error>) -> Exit {
        match exit {
            Ok(VcpuExit::IoIn(port, data)) => self.devices.port_in(port, data),
            Ok(VcpuExit::IoOut(port, data)) => self.devices.port_out(port, data),
            Ok(VcpuExit::MmioRead(address, data)) => self.devices.memory_in(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => self.devices.memory_out(address, data),
            Ok(VcpuExit::Intr) => return Exit::Interrupted,
            Ok(VcpuExit::Unsupported(EXIT_DIRTY_RING_FULL)) => return Exit::RingFull,
            // A guest without firmware that reboots makes the processor fault three times.
            Ok(VcpuExit::Shutdown | VcpuExit::SystemEvent(..)) => return Exit::End(End::Down),
            Ok(exit) => return Exit::End(End::Failed(format!("{exit:?}"))),
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {
                return Exit::Interrupted;
            }
            Err(error) => return Exit::End(End::Failed(format!("KVM_RUN: {error}"))),
        }
        Exit::Handled
    }
}
