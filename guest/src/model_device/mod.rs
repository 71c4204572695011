//! The model device: a device without hardware, which can be moved like a real one and finds out when something was lost.
//!
//! Its states, pre-copy information and stream are those of the VFIO migration interface. Its content is a function of
//! a seed and of the number of operations that it has done, and it does them as long as it runs; so whoever takes its state in
//! knows every byte that must come ([`stream`](self)). It is the same device on both sides: one that arrived can be moved on.
//!
//! It knows neither side's traits; `multifd_sender` and `multifd_receiver` implement theirs for it (feature `model`).

mod config;
mod content;
mod dma;
mod stream;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use multifd_wire::DeviceState;
use multifd_wire::frame::DeviceFlags;

pub use config::{
    DEVICE_CONFIG_BYTES_MAX, DEVICE_STATE_BYTES_MAX, DEVICE_STATE_BYTES_MIN, DeviceConfig,
    DeviceConfigError, DeviceFailure,
};
pub use dma::Dma;

use content::Piece;
use stream::{Cut, Intake, Outgoing};

/// The kind number of the blob that describes a machine's model devices: each as text, a line each.
pub const DEVICES_BLOB_KIND: u32 = 0x6d64_6576;

/// The page of its DMA.
const PAGE: u64 = 4096;

/// The head of its configuration: operations and DMA writes done.
const CONFIG_HEAD: usize = 16;

/// A model device did not do what it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DeviceFault(String);

impl DeviceFault {
    fn new(what: impl Into<String>) -> Self {
        Self(what.into())
    }
}

/// What a model device has to give while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct DevicePreCopy {
    /// Bytes left of the initial ones.
    pub initial_bytes: u64,
    /// Bytes that changed since they were read.
    pub dirty_bytes: u64,
    /// It has announced new initial bytes since the last time it was asked.
    pub reinit: bool,
}

/// What came of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceRead {
    /// So many bytes.
    Bytes(usize),
    /// Nothing now.
    NothingNow,
    /// Nothing more.
    End,
}

/// Looks at a device that is away in a migration.
#[derive(Clone, Debug, Default)]
pub struct DeviceProbe(Arc<Watched>);

#[derive(Debug, Default)]
struct Watched {
    state: AtomicU32,
    operations: AtomicU64,
    resets: AtomicU64,
    /// The highest number of devices' states that were asked for; tells an order between devices that share a probe's clock.
    steps: AtomicU64,
}

impl DeviceProbe {
    /// The state it is in.
    #[must_use]
    pub fn state(&self) -> DeviceState {
        let index = self.0.state.load(Ordering::SeqCst) as usize;
        DeviceState::ALL
            .get(index)
            .copied()
            .unwrap_or(DeviceState::Error)
    }

    /// Operations that it had done when it was last asked for anything.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.0.operations.load(Ordering::SeqCst)
    }

    /// How often it was reset.
    #[must_use]
    pub fn resets(&self) -> u64 {
        self.0.resets.load(Ordering::SeqCst)
    }

    /// How many steps from state to state it has made.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.0.steps.load(Ordering::SeqCst)
    }
}

/// A call that never returns, as of a driver that waits for hardware that is gone.
fn hang() -> ! {
    loop {
        std::thread::park();
    }
}

/// A device without hardware.
pub struct ModelDevice {
    config: DeviceConfig,
    cut: Cut,
    state: DeviceState,
    operations: u64,
    dma_writes: u64,
    /// Until when the operations are counted, and the fraction of one that is left over.
    counted: Instant,
    owed: f64,
    dma: Option<Dma>,
    outgoing: Option<Outgoing>,
    intake: Option<Intake>,
    /// The configuration that came: operations and DMA writes.
    loaded: Option<(u64, u64)>,
    reinits: u32,
    initial_over: Option<Instant>,
    announced: bool,
    moved: u64,
    busy_until: Instant,
    failure: Option<DeviceFailure>,
    probe: DeviceProbe,
}

impl ModelDevice {
    /// A device that runs.
    ///
    /// # Errors
    /// The configuration is out of its range.
    pub fn new(config: DeviceConfig) -> Result<Self, DeviceConfigError> {
        config.check()?;
        let now = Instant::now();
        let device = Self {
            cut: Cut::new(config.seed, config.size, config.initial, config.block),
            state: DeviceState::Running,
            operations: 0,
            dma_writes: 0,
            counted: now,
            owed: 0.0,
            dma: None,
            outgoing: None,
            intake: None,
            loaded: None,
            reinits: config.reinit,
            initial_over: None,
            announced: false,
            moved: 0,
            busy_until: now,
            failure: config.failure,
            probe: DeviceProbe::default(),
            config,
        };
        device.watch();
        Ok(device)
    }

    /// The same, with an area of guest memory to write.
    #[must_use]
    pub fn with_dma(mut self, dma: Dma) -> Self {
        self.dma = Some(dma);
        self
    }

    /// What it was made to be.
    #[must_use]
    pub fn config(&self) -> &DeviceConfig {
        &self.config
    }

    /// To look at it from afar.
    #[must_use]
    pub fn probe(&self) -> DeviceProbe {
        self.probe.clone()
    }

    /// What it can and wants, as the table of DEVICES says it.
    #[must_use]
    pub fn flags(&self) -> DeviceFlags {
        let c = &self.config;
        [
            (c.pre_copy, DeviceFlags::PRE_COPY),
            (c.p2p, DeviceFlags::P2P),
            (c.ack, DeviceFlags::SWITCHOVER_ACK),
            (c.after_memory, DeviceFlags::CONFIG_AFTER_MEMORY),
        ]
        .into_iter()
        .filter(|(has, _)| *has)
        .fold(DeviceFlags::NONE, |all, (_, flag)| all.union(flag))
    }

    /// The state it is in.
    #[must_use]
    pub fn state(&self) -> DeviceState {
        self.state
    }

    /// Operations done, brought up to now.
    pub fn operations(&mut self) -> u64 {
        self.work();
        self.operations
    }

    /// Does so many operations at once.
    pub fn operate(&mut self, count: u64) {
        self.work();
        self.do_operations(count);
        self.watch();
    }

    /// Makes one step of the arc table.
    ///
    /// # Errors
    /// No such arc, a failure that was asked for, or (into `Stop`, out of `Resuming`) a state that is not whole.
    pub fn set_state(&mut self, to: DeviceState) -> Result<(), DeviceFault> {
        self.work();
        let from = self.state;
        if !from.may_become(to, self.flags()) {
            return Err(DeviceFault::new(format!(
                "there is no way from {from} to {to}"
            )));
        }
        match self.failure {
            Some(DeviceFailure::Step(state)) if state == to => {
                self.failure = None;
                return Err(DeviceFault::new(format!(
                    "the step from {from} to {to} failed"
                )));
            }
            Some(DeviceFailure::HangStep(state)) if state == to => hang(),
            Some(DeviceFailure::Break(state)) if state == to => {
                self.failure = None;
                self.state = DeviceState::Error;
                self.watch();
                return Err(DeviceFault::new(format!(
                    "broke on the way from {from} to {to}"
                )));
            }
            _ => {}
        }
        match to {
            DeviceState::PreCopy | DeviceState::PreCopyP2p | DeviceState::StopCopy => {
                if self.outgoing.is_none() {
                    self.outgoing = Some(Outgoing::new(self.cut)?);
                }
            }
            DeviceState::Resuming => {
                self.intake = Some(Intake::new(self.cut)?);
                (self.loaded, self.moved) = (None, 0);
            }
            DeviceState::Stop if from == DeviceState::Resuming => self.finish()?,
            DeviceState::Stop => self.end_stream(),
            DeviceState::Running | DeviceState::RunningP2p => self.end_stream(),
            DeviceState::Error => {}
        }
        self.state = to;
        self.probe.0.steps.fetch_add(1, Ordering::SeqCst);
        self.watch();
        Ok(())
    }

    /// What there is to read while it runs.
    ///
    /// # Errors
    /// It is in no pre-copy state.
    pub fn pre_copy_info(&mut self) -> Result<DevicePreCopy, DeviceFault> {
        self.work();
        let now = Instant::now();
        let Some(outgoing) = self.outgoing.as_mut().filter(|_| self.state.is_running()) else {
            return Err(DeviceFault::new("it is in no pre-copy state"));
        };
        let over = outgoing.initial_bytes() == 0;
        if over && self.reinits > 0 {
            let since = *self.initial_over.get_or_insert(now);
            if now.duration_since(since) >= self.config.reinit_after {
                (self.reinits, self.initial_over) = (self.reinits - 1, None);
                outgoing.reinit();
                self.announced = true;
            }
        }
        Ok(DevicePreCopy {
            initial_bytes: outgoing.initial_bytes(),
            dirty_bytes: outgoing.dirty_bytes(self.operations),
            reinit: std::mem::take(&mut self.announced),
        })
    }

    /// The next bytes of the stream.
    ///
    /// # Errors
    /// There is no stream, or a failure that was asked for.
    pub fn read(&mut self, into: &mut [u8]) -> Result<DeviceRead, DeviceFault> {
        self.work();
        if let Some(DeviceFailure::Read { after }) = self.failure
            && self.moved >= after
        {
            self.failure = None;
            return Err(DeviceFault::new(format!(
                "reading failed after {} bytes",
                self.moved
            )));
        }
        if matches!(self.failure, Some(DeviceFailure::HangRead { after }) if self.moved >= after) {
            hang();
        }
        let last = self.state == DeviceState::StopCopy;
        let Some(outgoing) = self.outgoing.as_mut() else {
            return Err(DeviceFault::new(format!(
                "nothing can be read in {}",
                self.state
            )));
        };
        // A slow device gives less at a time, so that whoever reads is not kept for long.
        let most = pace_bytes(self.config.read).min(into.len());
        let count = outgoing.read(self.operations, last, &mut into[..most]);
        if count == 0 {
            return Ok(if last && outgoing.is_over() {
                DeviceRead::End
            } else {
                DeviceRead::NothingNow
            });
        }
        if let Some(DeviceFailure::Corrupt { at }) = self.failure
            && (self.moved..self.moved + count as u64).contains(&at)
        {
            into[usize::try_from(at - self.moved).unwrap_or(0)] ^= 1;
            self.failure = None;
        }
        self.moved += count as u64;
        self.pace(count, self.config.read);
        Ok(DeviceRead::Bytes(count))
    }

    /// Bytes that it would give if it were stopped now.
    pub fn stop_copy_bytes(&mut self) -> u64 {
        self.work();
        match &self.outgoing {
            Some(outgoing) => outgoing.rest_bytes(self.operations),
            None => self.config.size,
        }
    }

    /// Its configuration; empty if it has none.
    ///
    /// # Errors
    /// It does not stand still, or a failure that was asked for.
    pub fn save_config(&mut self) -> Result<Vec<u8>, DeviceFault> {
        if self.state != DeviceState::StopCopy {
            return Err(DeviceFault::new("it does not stand still"));
        }
        if self.failure == Some(DeviceFailure::SaveConfig) {
            self.failure = None;
            return Err(DeviceFault::new("the configuration can't be read"));
        }
        let bytes = usize::try_from(self.config.config).unwrap_or(usize::MAX);
        if bytes == 0 {
            return Ok(Vec::new());
        }
        let mut blob = vec![0; bytes.max(CONFIG_HEAD)];
        let (head, content) = blob.split_at_mut(CONFIG_HEAD);
        head[..8].copy_from_slice(&self.operations.to_le_bytes());
        head[8..].copy_from_slice(&self.dma_writes.to_le_bytes());
        self.config_piece(self.operations).fill(0, content);
        Ok(blob)
    }

    /// Takes bytes of another's stream in.
    ///
    /// # Errors
    /// They are not what they must be, or a failure that was asked for.
    pub fn write(&mut self, octets: &[u8]) -> Result<(), DeviceFault> {
        if let Some(DeviceFailure::Write { after }) = self.failure
            && self.moved + octets.len() as u64 > after
        {
            self.failure = None;
            return Err(DeviceFault::new(format!(
                "writing failed after {} bytes",
                self.moved
            )));
        }
        if matches!(self.failure, Some(DeviceFailure::HangWrite { after }) if self.moved + octets.len() as u64 > after)
        {
            hang();
        }
        let Some(intake) = self
            .intake
            .as_mut()
            .filter(|_| self.state == DeviceState::Resuming)
        else {
            return Err(DeviceFault::new(format!(
                "nothing can be written in {}",
                self.state
            )));
        };
        intake.write(octets)?;
        self.moved += octets.len() as u64;
        self.pace(octets.len(), self.config.write);
        Ok(())
    }

    /// Takes another's configuration in, after its stream.
    ///
    /// # Errors
    /// It is not what it must be: too early, of other content, or (with DMA, after memory) guest memory is not what the
    /// device wrote.
    pub fn load_config(&mut self, octets: &[u8]) -> Result<(), DeviceFault> {
        if self.failure == Some(DeviceFailure::LoadConfig) {
            self.failure = None;
            return Err(DeviceFault::new("the configuration is refused"));
        }
        let Some(operations) = self.intake.as_ref().and_then(Intake::operations) else {
            return Err(DeviceFault::new(
                "the configuration came before the end of the data",
            ));
        };
        let number = |from: usize| {
            let octets = octets.get(from..from + 8).and_then(|o| o.try_into().ok());
            octets.map(u64::from_le_bytes)
        };
        let wanted = self.config.config.max(CONFIG_HEAD as u64);
        let (Some(said), Some(writes)) = (number(0), number(8)) else {
            return Err(DeviceFault::new("the configuration is too short"));
        };
        let content = octets.get(CONFIG_HEAD..).unwrap_or(&[]);
        if octets.len() as u64 != wanted
            || said != operations
            || self.config_piece(said).differs(0, content).is_some()
        {
            return Err(DeviceFault::new(
                "the configuration is not that of this state",
            ));
        }
        if let Some(dma) = self.dma.as_ref().filter(|_| self.config.after_memory)
            && let Some(page) = dma.differs(self.config.seed, writes)
        {
            return Err(DeviceFault::new(format!(
                "page {page} of guest memory is not what the device wrote there"
            )));
        }
        self.loaded = Some((said, writes));
        Ok(())
    }

    /// Everything that was written is void.
    ///
    /// # Errors
    /// It is not being written.
    pub fn restart(&mut self) -> Result<(), DeviceFault> {
        if self.state != DeviceState::Resuming {
            return Err(DeviceFault::new("it is not being written"));
        }
        self.intake = Some(Intake::new(self.cut)?);
        (self.loaded, self.moved) = (None, 0);
        Ok(())
    }

    /// Out of the error into running, as new.
    pub fn reset(&mut self) {
        self.end_stream();
        (self.intake, self.loaded) = (None, None);
        (self.operations, self.dma_writes, self.owed) = (0, 0, 0.0);
        self.counted = Instant::now();
        self.state = DeviceState::Running;
        self.probe.0.resets.fetch_add(1, Ordering::SeqCst);
        self.watch();
    }

    fn config_piece(&self, operations: u64) -> Piece {
        Piece {
            seed: self.config.seed,
            place: u64::MAX,
            version: operations,
        }
    }

    fn end_stream(&mut self) {
        self.outgoing = None;
        (self.moved, self.initial_over, self.announced) = (0, None, false);
        self.reinits = self.config.reinit;
    }

    fn finish(&mut self) -> Result<(), DeviceFault> {
        if self.failure == Some(DeviceFailure::Finish) {
            self.failure = None;
            return Err(DeviceFault::new(
                "the state was refused when it was complete",
            ));
        }
        let Some(intake) = &self.intake else {
            return Ok(());
        };
        let operations = intake.finish()?;
        if self.config.config > 0 && self.loaded.is_none() {
            return Err(DeviceFault::new("its configuration never came"));
        }
        self.operations = operations;
        self.dma_writes = self.loaded.map_or(0, |(_, writes)| writes);
        self.intake = None;
        Ok(())
    }

    /// Does what it would have done since it was last asked.
    fn work(&mut self) {
        let now = Instant::now();
        let since = now.duration_since(self.counted);
        self.counted = now;
        if !self.state.is_running() || self.config.growth == 0 {
            return;
        }
        self.owed += since.as_secs_f64() * self.config.growth as f64 / self.config.block as f64;
        let count = self.owed.floor();
        self.owed -= count;
        self.do_operations(count as u64);
        self.watch();
    }

    fn do_operations(&mut self, count: u64) {
        // Both may have come from a peer.
        self.operations = self.operations.saturating_add(count);
        if let Some(dma) = self.dma.as_ref().filter(|_| !self.state.is_quiescent()) {
            let until = self.dma_writes.saturating_add(count);
            dma.write(self.config.seed, self.dma_writes, until);
            self.dma_writes = until;
        }
    }

    /// Waits as long as so many bytes take at this speed.
    fn pace(&mut self, octets: usize, rate: u64) {
        if rate == 0 {
            return;
        }
        let now = Instant::now();
        let cost = Duration::from_secs_f64(octets as f64 / rate as f64);
        self.busy_until = self.busy_until.max(now) + cost;
        // Sleeps that are too short for the clock are made up for together.
        let wait = self.busy_until.saturating_duration_since(now);
        if wait > Duration::from_micros(200) {
            std::thread::sleep(wait);
        }
    }

    fn watch(&self) {
        let index = DeviceState::ALL
            .iter()
            .position(|state| *state == self.state);
        let index = index
            .and_then(|index| u32::try_from(index).ok())
            .unwrap_or(0);
        self.probe.0.state.store(index, Ordering::SeqCst);
        self.probe
            .0
            .operations
            .store(self.operations, Ordering::SeqCst);
    }
}

/// At most 20 ms of a slow device at a time, and at least 4 KiB.
fn pace_bytes(rate: u64) -> usize {
    match rate {
        0 => usize::MAX,
        rate => usize::try_from(rate / 50).unwrap_or(usize::MAX).max(4096),
    }
}

/// The newest of `count` numbered turns, from 1, that came to `place` when they go round `places` places; 0 if none did.
fn newest(place: u64, count: u64, places: u64) -> u64 {
    if place >= places || count <= place {
        return 0;
    }
    place + 1 + (count - place - 1) / places * places
}

#[cfg(test)]
mod tests;
