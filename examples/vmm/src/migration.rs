//! The migration of this machine, both ways: what an author of another VMM copies. Nothing else in this program knows multifd, but for
//! the sources of dirty pages, which a machine is made with.
//!
//! ```text
//!   leave(machine) ──► Left::Moved                     arrive(listener) ──► the machine, running
//!                  ├─► Left::Stayed(machine, why)                       └─► why it did not come
//!                  └─► Left::Lost(why)
//! ```
//! The rule it keeps: a machine runs only where the library has shown a proof for it ([`Reclaimed`], [`Ownership`]).

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use multifd::destination::{self, Ownership, Reception};
use multifd::source::{self, Migration, OutcomeKind, Reclaimed, SpreadDialer};
use multifd::tracking::kvm::Method;
use multifd::transport::{
    Address, ChannelOptions, Clients, GuestMemory, Listener, TlsClient, TlsFiles, TlsServer,
};
use multifd::{Blob, Layout, VmmError};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::machine::{Machine, MachineState, Shape};

/// Our kinds of blob, and the version of what is in them.
const SHAPE: u32 = 1;
const STATE: u32 = 2;
const VERSION: u32 = 1;

/// How often somebody looks whether a migration is to be cancelled.
const LOOK: Duration = Duration::from_millis(20);

/// What a user may set.
pub(crate) struct Settings {
    pub(crate) channels: u32,
    pub(crate) downtime_limit: Duration,
    /// Bytes a second, over all channels.
    pub(crate) bandwidth: Option<u64>,
    /// How long lost channels are dialled again, and waited for.
    pub(crate) reconnect: Duration,
    /// A channel on which nothing moves for this long is given up.
    pub(crate) stall: Duration,
    pub(crate) tls: TlsFiles,
}

/// How a migration away from here ended. The text is the report, as JSON.
pub(crate) enum Left {
    /// The machine runs there.
    Moved(String),
    /// It runs here as before, and can be moved again.
    Stayed(Box<Machine>, anyhow::Error),
    /// It does not run here, and must not: it ended, or is the destination's, or nobody knows.
    Lost(anyhow::Error),
}

/// Moves a machine to whoever waits at `to`. `cancelled` is asked again and again.
pub(crate) fn leave(
    mut machine: Box<Machine>,
    to: &Address,
    settings: &Settings,
    cancelled: impl Fn() -> bool,
) -> Left {
    let (memory, config, dial) = match way(&machine, to, settings) {
        Ok(way) => way,
        Err(error) => return Left::Stayed(machine, error),
    };
    let gate = Arc::clone(&machine.gate);
    let sources = std::mem::take(&mut machine.sources);
    let mut parts = source::Parts::new(Leaving(machine), memory, dial).config(config);
    parts.sources = sources;
    let migration = match Migration::start(parts) {
        Ok(migration) => migration,
        Err(failed) => {
            let Leaving(mut machine) = failed.parts.vmm;
            machine.sources = failed.parts.sources;
            return Left::Stayed(machine, failed.error.into());
        }
    };
    let handle = migration.handle();
    while !migration.is_finished() {
        if cancelled() {
            handle.cancel();
        }
        if gate.ended().is_some() {
            handle.guest_gone();
        }
        std::thread::sleep(LOOK);
    }
    let left = migration.wait();
    let report = serde_json::to_string(&left.report).unwrap_or_default();
    let why = match left.error {
        // It has a stable code, the phase, the channel, and what to do.
        Some(error) => anyhow!("{error} [{}]", error.code()),
        None => anyhow!("{:?}", left.report.outcome),
    };
    match (left.report.outcome, left.vmm) {
        (OutcomeKind::Migrated, _) => Left::Moved(report),
        (OutcomeKind::Failed | OutcomeKind::Cancelled, Some(Leaving(mut machine))) => {
            machine.sources = left.sources;
            Left::Stayed(machine, why)
        }
        _ => Left::Lost(why),
    }
}

fn way(
    machine: &Machine,
    to: &Address,
    settings: &Settings,
) -> Result<(GuestMemory, source::Config, SpreadDialer)> {
    let memory = GuestMemory::from_vm_memory(Arc::clone(&machine.memory))?;
    let config = source::Config::builder()
        .channels(settings.channels)
        .downtime_limit(settings.downtime_limit)
        .reconnect_deadline(settings.reconnect)
        .bandwidth(settings.bandwidth)
        .stall(settings.stall)
        .hello_deadline(settings.stall)
        .progress_deadline(settings.stall.max(Duration::from_secs(60)))
        .build()?;
    let mut options = ChannelOptions::default();
    if settings.tls.authorities.is_some() {
        options.tls_client = Some(TlsClient::from_files(settings.tls.clone())?);
    }
    let dial = SpreadDialer {
        control: to.clone(),
        data: Vec::new(),
        options,
    };
    Ok((memory, config, dial))
}

/// The machine that leaves.
struct Leaving(Box<Machine>);

impl source::Vmm for Leaving {
    fn config(&mut self) -> Result<Vec<Blob>, VmmError> {
        blob(SHAPE, &self.0.shape)
    }

    fn pause(&mut self) -> Result<(), VmmError> {
        self.0.pause();
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<Blob>, VmmError> {
        blob(STATE, &self.0.save().map_err(words)?)
    }

    fn resume(&mut self, _: Reclaimed) -> Result<(), VmmError> {
        self.0.run();
        Ok(())
    }
}

/// Waits at `at` for a machine, and takes it over. `listening` is told the address; `cancelled` is asked again and again.
///
/// # Errors
/// It did not come; then it is the source's, unless the text says otherwise.
pub(crate) fn arrive(
    at: &Address,
    settings: &Settings,
    tracking: Option<Method>,
    listening: impl FnOnce(&Address),
    cancelled: impl Fn() -> bool,
) -> Result<(Box<Machine>, String)> {
    let mut options = ChannelOptions::default();
    if settings.tls.certificate.is_some() {
        let files = settings.tls.clone();
        options.tls_server = Some(TlsServer::from_files(files, Clients::OfAuthority)?);
    }
    let listener = Listener::bind_with(at, &options)?;
    listening(listener.local_address());
    let config = destination::Config::builder()
        .suspend(settings.reconnect)
        .stall(settings.stall)
        .hello_deadline(settings.stall)
        .progress_deadline(settings.stall.max(Duration::from_secs(60)))
        .build()?;
    let arriving = Arriving {
        tracking,
        machine: None,
    };
    let parts = destination::Parts::new(arriving);
    let reception =
        Reception::start(parts.listener(listener).config(config)).map_err(|failed| failed.error)?;
    while !reception.is_finished() {
        if cancelled() {
            reception.handle().cancel();
        }
        std::thread::sleep(LOOK);
    }
    let arrived = reception.wait();
    let report = serde_json::to_string(&arrived.report).unwrap_or_default();
    if let Some(error) = arrived.error {
        return Err(anyhow!("{error} [{}]", error.code()));
    }
    let machine = arrived.vmm.and_then(|arriving| arriving.machine);
    Ok((machine.context("the machine did not come back")?, report))
}

/// The machine that arrives.
struct Arriving {
    tracking: Option<Method>,
    machine: Option<Box<Machine>>,
}

impl Arriving {
    fn machine(&self) -> Result<&Machine, VmmError> {
        self.machine
            .as_deref()
            .ok_or_else(|| VmmError::new("there is no machine"))
    }
}

impl destination::Vmm for Arriving {
    fn prepare(&mut self, configs: Vec<Blob>, layout: &Layout) -> Result<GuestMemory, VmmError> {
        let shape: Shape = content(&configs, SHAPE)?;
        let described: Vec<_> = layout
            .regions()
            .map(|region| (region.guest_address, region.bytes))
            .collect();
        if described != [(0, shape.memory_bytes)] {
            return Err(VmmError::new("the memory is not that of the machine"));
        }
        let machine = Machine::new(shape, self.tracking).map_err(words)?;
        let memory = GuestMemory::from_vm_memory(Arc::clone(&machine.memory));
        self.machine = Some(Box::new(machine));
        memory.map_err(VmmError::new)
    }

    fn load(&mut self, states: Vec<Blob>) -> Result<(), VmmError> {
        let state: MachineState = content(&states, STATE)?;
        self.machine()?.load(state).map_err(words)
    }

    fn resume(&mut self, _: Ownership) -> Result<(), VmmError> {
        self.machine()?.run();
        Ok(())
    }

    fn discard(&mut self) {
        self.machine = None;
    }
}

fn blob(kind: u32, content: &impl Serialize) -> Result<Vec<Blob>, VmmError> {
    let bytes = serde_json::to_vec(content).map_err(VmmError::new)?;
    Ok(vec![Blob::new(kind, VERSION, bytes)])
}

fn content<T: DeserializeOwned>(blobs: &[Blob], kind: u32) -> Result<T, VmmError> {
    let blob = blobs
        .iter()
        .find(|blob| (blob.kind, blob.version) == (kind, VERSION))
        .ok_or_else(|| VmmError::new(format!("no blob of kind {kind} and version {VERSION}")))?;
    serde_json::from_slice(&blob.bytes).map_err(VmmError::new)
}

/// An error and its causes in one line.
fn words(error: anyhow::Error) -> VmmError {
    VmmError::new(format!("{error:#}"))
}
