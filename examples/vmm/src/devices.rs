//! What the machine has besides processors and memory, and who answers at which port.

use std::convert::Infallible;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, anyhow};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};

use crate::machine::Memory;
use crate::virtio::{Rng, RngState, VIRTIO, VIRTIO_BYTES, VIRTIO_IRQ};

pub(crate) const COM1: u16 = 0x3f8;
const COM1_END: u16 = COM1 + 8;
const VIRTIO_END: u64 = VIRTIO + VIRTIO_BYTES;
pub(crate) const COM1_IRQ: u32 = 4;

/// An interrupt line that is edge-triggered: raised and lowered at once, so that nothing is on its way when vCPUs rest.
pub(crate) struct Line {
    vm: Arc<VmFd>,
    number: u32,
}

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        for level in [true, false] {
            // The in-kernel controller refuses no line that it has.
            let _ = self.vm.set_irq_line(self.number, level);
        }
        Ok(())
    }
}

/// The console goes to standard output.
struct Console;

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A reader that went away must not end the guest.
        let mut out = io::stdout();
        let _ = out.write_all(bytes).and_then(|()| out.flush());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The devices of one machine.
pub(crate) struct Devices {
    serial: Mutex<Serial<Line, NoEvents, Console>>,
    rng: Rng,
}

/// Their state.
#[derive(Serialize, Deserialize)]
pub(crate) struct DevicesState {
    /// The registers of [`SerialState`], in its order.
    serial: [u8; 9],
    serial_input: Vec<u8>,
    rng: RngState,
}

impl Devices {
    /// Devices that rest.
    ///
    /// # Errors
    /// A thread cannot be had.
    pub(crate) fn new(vm: &Arc<VmFd>, memory: &Arc<Memory>) -> Result<Self> {
        let line = |number| Line {
            vm: Arc::clone(vm),
            number,
        };
        Ok(Self {
            serial: Mutex::new(Serial::new(line(COM1_IRQ), Console)),
            rng: Rng::new(memory, line(VIRTIO_IRQ))?,
        })
    }

    /// Has those with threads of their own write no memory from here on.
    pub(crate) fn rest(&self) {
        self.rng.rest();
    }

    pub(crate) fn go(&self) {
        self.rng.go();
    }

    fn serial(&self) -> MutexGuard<'_, Serial<Line, NoEvents, Console>> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a port says. Nobody is at most of them.
    pub(crate) fn port_in(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let (COM1..COM1_END, [byte]) = (port, data) {
            *byte = self.serial().read((port - COM1) as u8);
        }
    }

    pub(crate) fn port_out(&self, port: u16, data: &[u8]) {
        if let (COM1..COM1_END, [byte]) = (port, data) {
            // It fails only if the console or the line does, which they do not.
            let _ = self.serial().write((port - COM1) as u8, *byte);
        }
    }

    /// What an address without memory says. Registers have 32 bits.
    pub(crate) fn memory_in(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (VIRTIO..VIRTIO_END, Ok(data)) = (address, <&mut [u8; 4]>::try_from(data)) {
            *data = self.rng.read(address - VIRTIO).to_le_bytes();
        }
    }

    pub(crate) fn memory_out(&self, address: u64, data: &[u8]) {
        if let (VIRTIO..VIRTIO_END, Ok(data)) = (address, data.try_into()) {
            self.rng.write(address - VIRTIO, u32::from_le_bytes(data));
        }
    }

    /// What was typed. What the guest has no room for is lost, as on a real line.
    pub(crate) fn typed(&self, bytes: &[u8]) {
        let _ = self.serial().enqueue_raw_bytes(bytes);
    }

    /// The state of devices that nobody uses: vCPUs rest.
    pub(crate) fn save(&self) -> DevicesState {
        let state = self.serial().state();
        DevicesState {
            serial: [
                state.baud_divisor_low,
                state.baud_divisor_high,
                state.interrupt_enable,
                state.interrupt_identification,
                state.line_control,
                state.line_status,
                state.modem_control,
                state.modem_status,
                state.scratch,
            ],
            serial_input: state.in_buffer,
            rng: self.rng.save(),
        }
    }

    /// # Errors
    /// A state that no device was ever in.
    pub(crate) fn load(&self, state: DevicesState) -> Result<()> {
        self.rng.load(state.rng)?;
        let [
            low,
            high,
            enable,
            identification,
            line,
            status,
            control,
            modem,
            scratch,
        ] = state.serial;
        let state = SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control: line,
            line_status: status,
            modem_control: control,
            modem_status: modem,
            scratch,
            in_buffer: state.serial_input,
        };
        let mut serial = self.serial();
        let line = Line {
            vm: Arc::clone(&serial.interrupt_evt().vm),
            number: COM1_IRQ,
        };
        *serial = Serial::from_state(&state, line, NoEvents, Console)
            .map_err(|error| anyhow!("the state of the serial line: {error:?}"))?;
        Ok(())
    }
}
