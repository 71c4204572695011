//! The simulator's devices: the guest's model devices in small, with a look over their shoulder at every step.
//!
//! A model device knows each byte that must come, so its content is its own affair; what it refuses comes out as an error, and
//! an error for which the plan has no reason is a violation. What is looked at here besides is who runs: a device runs at
//! one side only, at the destination only what the source's device was when it was stopped, and before the guest does.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use multifd_guest::{DeviceConfig, DeviceFailure, DeviceProbe, ModelDevice};
use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_wire::DeviceState;
use multifd_wire::frame::{Device, DeviceFlags};

use super::faults::Side;
use super::world::World;
use crate::model::Random;

/// Draws none to three devices; half of all migrations have none.
pub(super) fn draw(random: &mut Random) -> Vec<DeviceConfig> {
    let pick = |random: &mut Random, of: &[u64]| of[random.below(of.len() as u64) as usize];
    let count = pick(random, &[0, 0, 0, 0, 1, 1, 2, 3]);
    (0..count)
        .map(|index| {
            let most = pick(random, &[1 << 10, 40 << 10, 120 << 10]);
            let size = 4096 + random.below(most);
            let mut config = DeviceConfig::new(&format!("device{index}"), size);
            config.block = pick(random, &[1 << 10, 4 << 10]);
            config.pre_copy = random.below(4) > 0;
            if config.pre_copy {
                config.initial = random.below(size + 1);
                config.ack = random.below(3) > 0;
                config.reinit = if config.initial > 0 {
                    pick(random, &[0, 0, 1, 2]) as u32
                } else {
                    0
                };
                config.reinit_after = Duration::from_millis(pick(random, &[0, 1, 10]));
            }
            config.growth = pick(random, &[0, 100_000, 1_000_000, 5_000_000]);
            config.read = pick(random, &[0, 0, 1 << 20, 10 << 20]);
            config.write = pick(random, &[0, 0, 1 << 20, 10 << 20]);
            config.config = pick(random, &[0, 16, 5_000, 20_000]);
            config.after_memory = random.below(3) == 0;
            // One without the state can only be moved alone (SPEC: DEVICE-4).
            config.p2p = count > 1 || random.below(2) == 0;
            config.seed = random.next_u64();
            config
        })
        .collect()
}

/// A failure of a device with this configuration, and on which side.
pub(super) fn draw_failure(random: &mut Random, config: &DeviceConfig) -> (Side, DeviceFailure) {
    use DeviceState::{PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
    let place = random.below(config.size * 2);
    let step = |random: &mut Random, states: &[DeviceState]| {
        let state = states[random.below(states.len() as u64) as usize];
        if random.below(2) == 0 {
            DeviceFailure::Step(state)
        } else {
            DeviceFailure::Break(state)
        }
    };
    match random.below(9) {
        0 => (Side::Source, DeviceFailure::Read { after: place }),
        1 => (Side::Source, DeviceFailure::Corrupt { at: place }),
        2 => (Side::Source, DeviceFailure::SaveConfig),
        3 | 4 => {
            let states = [PreCopy, PreCopyP2p, RunningP2p, StopCopy, Running, Stop];
            (Side::Source, step(random, &states))
        }
        5 => (Side::Destination, DeviceFailure::Write { after: place }),
        6 => (Side::Destination, DeviceFailure::LoadConfig),
        7 => (Side::Destination, DeviceFailure::Finish),
        _ => {
            let states = [Resuming, Stop, RunningP2p, Running];
            (Side::Destination, step(random, &states))
        }
    }
}

/// What is known of a device at one side.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) state: DeviceState,
    /// Operations that it had done when it was last asked for anything.
    pub(super) operations: u64,
}

/// One device at one side, with somebody who looks on.
pub(super) struct Watched {
    world: Arc<World>,
    side: Side,
    index: usize,
    /// Which of the destination's programs it belongs to.
    life: u32,
    probe: DeviceProbe,
    device: ModelDevice,
}

impl Watched {
    pub(super) fn new(
        world: &Arc<World>,
        side: Side,
        index: usize,
        life: u32,
        config: DeviceConfig,
    ) -> Self {
        let device = ModelDevice::new(config).expect("drawn within its ranges");
        Self {
            world: Arc::clone(world),
            side,
            index,
            life,
            probe: device.probe(),
            device,
        }
    }

    /// Whether its program is not a ghost.
    fn lives(&self) -> bool {
        self.world.lives_as(self.side, self.life)
    }

    /// Passes a result on, and tells the world what came of the call.
    fn told<T, E: std::fmt::Display>(&self, result: Result<T, E>) -> Result<T, E> {
        if !self.lives() {
            return result;
        }
        if let Err(error) = &result {
            self.world
                .device_failed(self.side, self.index, &error.to_string());
        }
        let seen = Seen {
            state: self.probe.state(),
            operations: self.probe.operations(),
        };
        self.world.device_seen(self.side, self.index, seen);
        result
    }

    /// A step, looked at before it is made: what must not run is not to run for a moment either.
    fn step(&self, to: DeviceState) {
        // A device that nothing was written to yet runs at the destination as well, as it does under any VMM that was started.
        if self.lives() && to.is_running() && !self.device.state().is_running() {
            self.world.device_runs(self.side, self.index);
        }
    }
}

impl tx::DeviceSource for Watched {
    fn traits(&self) -> tx::DeviceTraits {
        tx::DeviceSource::traits(&self.device)
    }

    fn state(&self) -> DeviceState {
        self.device.state()
    }

    fn set_state(&mut self, to: DeviceState) -> Result<(), tx::DeviceError> {
        self.step(to);
        let result = tx::DeviceSource::set_state(&mut self.device, to);
        self.told(result)
    }

    fn pre_copy_info(&mut self) -> Result<tx::PreCopyInfo, tx::DeviceError> {
        let result = tx::DeviceSource::pre_copy_info(&mut self.device);
        self.told(result)
    }

    fn read(&mut self, into: &mut [u8]) -> Result<tx::Read, tx::DeviceError> {
        let result = tx::DeviceSource::read(&mut self.device, into);
        self.told(result)
    }

    fn stop_copy_bytes(&mut self) -> Result<u64, tx::DeviceError> {
        tx::DeviceSource::stop_copy_bytes(&mut self.device)
    }

    fn config(&mut self) -> Result<Bytes, tx::DeviceError> {
        let result = tx::DeviceSource::config(&mut self.device);
        self.told(result)
    }

    fn reset(&mut self) -> Result<(), tx::DeviceError> {
        let result = tx::DeviceSource::reset(&mut self.device);
        self.told(result)
    }
}

impl rx::DeviceSink for Watched {
    fn name(&self) -> &str {
        &self.device.config().name
    }

    fn flags(&self) -> DeviceFlags {
        self.device.flags()
    }

    fn state(&self) -> DeviceState {
        self.device.state()
    }

    fn set_state(&mut self, to: DeviceState) -> Result<(), rx::DeviceError> {
        self.step(to);
        let result = rx::DeviceSink::set_state(&mut self.device, to);
        self.told(result)
    }

    fn write(&mut self, octets: &[u8]) -> Result<(), rx::DeviceError> {
        let result = rx::DeviceSink::write(&mut self.device, octets);
        self.told(result)
    }

    fn load_config(&mut self, octets: &[u8]) -> Result<(), rx::DeviceError> {
        let result = rx::DeviceSink::load_config(&mut self.device, octets);
        self.told(result)
    }

    fn restart(&mut self) -> Result<(), rx::DeviceError> {
        let result = rx::DeviceSink::restart(&mut self.device);
        self.told(result)
    }
}

/// The source's devices, running.
pub(super) fn at_source(world: &Arc<World>) -> Vec<Box<dyn tx::DeviceSource>> {
    let configs = world.device_configs(Side::Source).into_iter().enumerate();
    configs
        .map(|(index, config)| {
            let device = Watched::new(world, Side::Source, index, 0, config);
            Box::new(device) as Box<dyn tx::DeviceSource>
        })
        .collect()
}

/// The destination's devices for this table.
pub(super) fn at_destination(
    world: &Arc<World>,
    life: u32,
    table: &[Device],
) -> Result<Vec<Box<dyn rx::DeviceSink>>, rx::VmmError> {
    let configs = world.device_configs(Side::Destination);
    table
        .iter()
        .map(|entry| {
            let found = configs
                .iter()
                .enumerate()
                .find(|(_, config)| config.name == entry.name.as_str());
            let (index, config) =
                found.ok_or_else(|| rx::VmmError::new(format!("no device {}", entry.name)))?;
            let device = Watched::new(world, Side::Destination, index, life, config.clone());
            Ok(Box::new(device) as Box<dyn rx::DeviceSink>)
        })
        .collect()
}
