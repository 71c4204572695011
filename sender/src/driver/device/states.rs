//! The states that a device is led through as the control thread tells it: one arc of the table at a time.

use multifd_wire::DeviceState;
use multifd_wire::frame::DeviceFlags;

use super::DeviceCommand;
use super::thread::{DeviceReader, Mode};
use crate::device::DeviceError;
use crate::error::Fault;

impl DeviceReader {
    /// Does what it was told.
    pub(super) fn carry_out(&mut self, command: DeviceCommand) -> Result<(), Fault> {
        use DeviceState::{PreCopy, PreCopyP2p, Running, RunningP2p, Stop, StopCopy};
        let flags = self.stream.flags;
        let p2p = flags.contains(DeviceFlags::P2P);
        match command {
            DeviceCommand::PreCopy if flags.contains(DeviceFlags::PRE_COPY) => {
                self.lead(PreCopy, "begin pre-copy")?;
                self.mode = Mode::PreCopy;
            }
            DeviceCommand::Quiesce if p2p => {
                let to = if self.source.state() == PreCopy {
                    PreCopyP2p
                } else {
                    RunningP2p
                };
                self.mode = Mode::Idle;
                self.lead(to, "become quiescent")?;
            }
            DeviceCommand::PreCopy | DeviceCommand::Quiesce | DeviceCommand::End => {}
            DeviceCommand::Stop => {
                self.lead(StopCopy, "stop")?;
                self.mode = Mode::StopCopy;
            }
            DeviceCommand::Restore => {
                self.mode = Mode::Idle;
                self.let_go();
                // One that was never made quiescent need not become so now.
                let state = self.source.state();
                if p2p && (state == DeviceState::Error || state.is_quiescent()) {
                    self.lead_back(RunningP2p, "come back, quiescent")?;
                }
            }
            DeviceCommand::Run => {
                self.lead_back(Running, "run again")?;
                self.forget();
            }
            DeviceCommand::Hold => match self.source.state() {
                // The stream stands: it is quiescent, or has not even become so.
                PreCopy | PreCopyP2p => self.mode = Mode::Idle,
                _ => self.carry_out(DeviceCommand::Restore)?,
            },
            DeviceCommand::Continue => match self.source.state() {
                PreCopy | PreCopyP2p => {
                    self.lead(PreCopy, "go on with pre-copy")?;
                    self.mode = Mode::PreCopy;
                }
                _ => {
                    self.lead_back(Running, "run again")?;
                    self.restart();
                    self.carry_out(DeviceCommand::PreCopy)?;
                }
            },
            DeviceCommand::Retire => {
                self.mode = Mode::Idle;
                if self.source.state() != DeviceState::Error {
                    self.lead(Stop, "stop for good")?;
                }
            }
        }
        Ok(())
    }

    /// Step by step along the arcs.
    fn lead(&mut self, to: DeviceState, step: &'static str) -> Result<(), Fault> {
        while let Some(next) = self.source.state().step_to(to, self.stream.flags) {
            self.call(step, |source| source.set_state(next))?;
        }
        let state = self.source.state();
        if state == to {
            return Ok(());
        }
        Err(self.fault(step, DeviceError::new(format!("it is in {state}"))))
    }

    /// Back to where it runs. One that is broken is reset first; one that broke by itself may show it only now.
    fn lead_back(&mut self, to: DeviceState, step: &'static str) -> Result<(), Fault> {
        if self.source.state() != DeviceState::Error {
            let led = self.lead(to, step);
            if led.is_ok() || self.source.state() != DeviceState::Error {
                return led;
            }
        }
        self.call("be reset", |source| source.reset())?;
        self.stream.note(|stats| stats.was_reset = true);
        self.lead(to, step)
    }
}
