//! What a migration did, as the destination saw it.

use std::time::{Duration, Instant};

pub use multifd_session::common::{DamageReport, ErrorReport};
use multifd_session::destination::{Outcome, Session};
use multifd_wire::frame::GuestState;
use multifd_wire::{DeviceId, PAGE_BYTES_U64};
use serde::Serialize;

use crate::progress::Snapshot;

/// How it ended, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum OutcomeKind {
    /// The guest runs here.
    Running,
    /// The guest is the source's.
    Failed,
    /// The source gave the guest away, and it could not be run here: it is loaded and paused.
    Stranded,
}

/// The final report. Times in milliseconds, sizes in bytes.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// How it ended.
    pub outcome: OutcomeKind,
    /// Whether the guest, which is this side's, is paused, because its user had paused it at the source.
    pub guest_paused: bool,
    /// From the source's hello to the end.
    pub total_ms: f64,
    /// Building the machine.
    pub prepare_ms: f64,
    /// Loading the VM state.
    pub load_ms: f64,
    /// Starting the guest.
    pub resume_ms: f64,
    /// Rounds that were closed.
    pub rounds: u32,
    /// Size of guest memory.
    pub memory_bytes: u64,
    /// Octets that came on data channels.
    pub received_bytes: u64,
    /// Guest memory that came with content, every version counted.
    pub content_bytes: u64,
    /// Guest memory that came as "all zero", every version counted.
    pub zero_bytes: u64,
    /// Pages that did not match their checksum, every time counted: torn by the guest, or damaged on the way. They came again, and
    /// the source's report says which they were.
    pub pages_mismatched: u64,
    /// The same, each by phase and channel.
    pub mismatched: Vec<DamageReport>,
    /// Pages that were not zero in the memory that the VMM prepared, and were made so before the first page landed.
    pub pages_cleared: u64,
    /// What came damaged from the source: each by phase, channel and frame.
    pub damaged: Vec<DamageReport>,
    /// Data channels that the source opened again after they were lost.
    pub channels_reopened: u32,
    /// How often all channels were lost and the migration was kept for the source to come back.
    pub suspensions: u32,
    /// How often octets were changed on the way on the control channel, which was then lost with all others.
    pub control_damaged: u32,
    /// How long it was kept so in all.
    pub suspended_ms: f64,
    /// How often the source asked how it ended.
    pub asked: u32,
    /// Each device that was loaded.
    pub devices: Vec<DeviceReport>,
    /// Names of devices whose own code did not return: they could not be given back.
    pub devices_left: Vec<String>,
    /// Connections that were refused.
    pub refused: u64,
    /// Of which: because of a wrong ticket or secret.
    pub wrong_tokens: u64,
    /// CPU seconds of this side's migration threads.
    pub cpu_receiver_s: f64,
    /// The digest that both sides had.
    pub digest: Option<String>,
    /// What went wrong, or null.
    pub error: Option<ErrorReport>,
}

/// One device.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct DeviceReport {
    /// Its name.
    pub name: String,
    /// Octets of its data.
    pub bytes: u64,
    /// Time that it took for loading its data, waits for the data not counted.
    pub load_ms: f64,
    /// Time that it took for its configuration and its own final check.
    pub config_ms: f64,
}

/// A device that has everything, and how long that took.
#[derive(Debug, Clone)]
pub(crate) struct LoadedDevice {
    pub(crate) device: DeviceId,
    pub(crate) name: String,
    pub(crate) bytes: u64,
    pub(crate) load: Duration,
    pub(crate) config: Duration,
    /// How often its stream had begun anew.
    pub(crate) restarts: u32,
}

/// Times and results that the control thread notes down.
#[derive(Debug, Default)]
pub(crate) struct Timeline {
    pub(crate) total_ms: f64,
    pub(crate) prepare_ms: f64,
    pub(crate) load_ms: f64,
    pub(crate) resume_ms: f64,
    pub(crate) rounds: u32,
    pub(crate) lanes_reopened: u32,
    pub(crate) asked: u32,
    control_damaged: u32,
    suspensions: u32,
    suspended_since: Option<Instant>,
    suspended: Duration,
    digest: Option<u64>,
    devices: Vec<(DeviceId, DeviceReport)>,
    pub(crate) devices_left: Vec<String>,
    /// What the guest was to be when the source gave it away.
    pub(crate) guest: Option<GuestState>,
}

impl Timeline {
    pub(crate) fn device_loaded(&mut self, loaded: &LoadedDevice) {
        let ms = |time: std::time::Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
        let report = DeviceReport {
            name: loaded.name.clone(),
            bytes: loaded.bytes,
            load_ms: ms(loaded.load),
            config_ms: ms(loaded.config),
        };
        self.devices.push((loaded.device, report));
    }

    /// Whether the device had been loaded.
    pub(crate) fn device_restarted(&mut self, device: DeviceId) -> bool {
        let before = self.devices.len();
        self.devices.retain(|(id, _)| *id != device);
        self.devices.len() < before
    }
}

impl Timeline {
    /// All channels are lost.
    pub(crate) fn suspended(&mut self) {
        if self.suspended_since.is_none() {
            self.suspensions += 1;
            self.suspended_since = Some(Instant::now());
        }
    }

    /// What the session knows at the end.
    pub(crate) fn ended(&mut self, session: &Session) {
        self.control_damaged = session.damages();
        self.digest = session.digest().map(|digest| digest.value());
    }

    /// The rounds go on, or it is over.
    pub(crate) fn resumed(&mut self) {
        if let Some(since) = self.suspended_since.take() {
            self.suspended += since.elapsed();
        }
    }
}

impl Report {
    pub(crate) fn new(timeline: &Timeline, outcome: &Outcome, end: &Snapshot) -> Self {
        let (kind, error) = match outcome {
            Outcome::Running => (OutcomeKind::Running, None),
            Outcome::Failed(error) => (OutcomeKind::Failed, Some(error)),
            Outcome::Stranded(error) => (OutcomeKind::Stranded, Some(error)),
        };
        Self {
            outcome: kind,
            total_ms: timeline.total_ms,
            prepare_ms: timeline.prepare_ms,
            load_ms: timeline.load_ms,
            resume_ms: timeline.resume_ms,
            rounds: timeline.rounds,
            memory_bytes: end.memory_pages * PAGE_BYTES_U64,
            received_bytes: end.received_bytes,
            content_bytes: end.content_pages * PAGE_BYTES_U64,
            zero_bytes: end.zero_pages * PAGE_BYTES_U64,
            pages_mismatched: end.pages_mismatched,
            mismatched: Vec::new(),
            pages_cleared: end.pages_cleared,
            damaged: Vec::new(),
            channels_reopened: timeline.lanes_reopened,
            suspensions: timeline.suspensions,
            control_damaged: timeline.control_damaged,
            suspended_ms: timeline.suspended.as_secs_f64() * 1e3,
            asked: timeline.asked,
            devices: timeline
                .devices
                .iter()
                .map(|(_, report)| report.clone())
                .collect(),
            devices_left: timeline.devices_left.clone(),
            guest_paused: kind == OutcomeKind::Running
                && timeline.guest == Some(GuestState::Paused),
            refused: end.refused,
            wrong_tokens: end.wrong_tokens,
            cpu_receiver_s: end.cpu.as_secs_f64(),
            digest: timeline.digest.map(|digest| format!("{digest:016x}")),
            error: error.map(ErrorReport::from),
        }
    }
}
