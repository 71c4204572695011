//! The states that devices are led through together: to where their state can be written, and to where they run.

use multifd_wire::DeviceState;
use multifd_wire::frame::{Device, DeviceFlags};

use super::call::CallWatch;
use crate::device::{DeviceError, DeviceSink};
use crate::error::Fault;

/// Checks that these are the devices of the table and can be moved together, and leads each to where its state can be written.
pub(in crate::driver) fn open(
    table: &[Device],
    sinks: &mut [Box<dyn DeviceSink>],
    watch: &CallWatch,
) -> Result<(), Fault> {
    let refuse = |text: String| Err(Fault::Devices { text });
    if sinks.len() != table.len() {
        return refuse(format!("the VMM gave {} for {}", sinks.len(), table.len()));
    }
    for (device, sink) in table.iter().zip(sinks.iter()) {
        if sink.name() != device.name.as_str() {
            return refuse(format!("the VMM gave {} for {}", sink.name(), device.name));
        }
    }
    let without = sinks
        .iter()
        .find(|sink| !sink.flags().contains(DeviceFlags::P2P));
    if let Some(sink) = without.filter(|_| sinks.len() > 1) {
        return refuse(format!(
            "{} has no P2P-quiescent state, so it can only be moved alone",
            sink.name()
        ));
    }
    for sink in sinks {
        lead(&mut **sink, DeviceState::Resuming, watch)?;
    }
    Ok(())
}

/// Starts all devices, which have all been loaded: first every one to where none disturbs another, then on.
pub(in crate::driver) fn start(
    sinks: &mut [Box<dyn DeviceSink>],
    watch: &CallWatch,
) -> Result<(), Fault> {
    for sink in sinks.iter_mut() {
        if sink.flags().contains(DeviceFlags::P2P) {
            lead(&mut **sink, DeviceState::RunningP2p, watch)?;
        }
    }
    sinks
        .iter_mut()
        .try_for_each(|sink| lead(&mut **sink, DeviceState::Running, watch))
}

/// Step by step.
pub(super) fn lead(
    sink: &mut dyn DeviceSink,
    to: DeviceState,
    watch: &CallWatch,
) -> Result<(), Fault> {
    while let Some(next) = sink.state().step_to(to, sink.flags()) {
        watch.call(sink, to_step(to), |sink| sink.set_state(next))?;
    }
    if sink.state() == to {
        return Ok(());
    }
    Err(Fault::Device {
        device: sink.name().to_owned(),
        step: to_step(to),
        source: DeviceError::new(format!("it is in {}", sink.state())),
    })
}

fn to_step(to: DeviceState) -> &'static str {
    match to {
        DeviceState::Resuming => "get ready for its state",
        DeviceState::RunningP2p => "start, quiescent",
        _ => "start",
    }
}
