//! What a migration did, for people and for programs: written once, at its end, whatever the end was.

use std::time::{Duration, Instant};

pub use multifd_session::common::{DamageReport, ErrorReport};
use multifd_tracking::Source;
use multifd_wire::frame::{GuestState, Prepared, RoundClosed, Running};
use multifd_wire::{PAGE_BYTES_U64, Round};
use serde::Serialize;

use crate::config::{Config, WhenNotConverging};
use crate::error::Error;
use crate::forecast::{Forecast, Interval, Outlook};
use crate::progress::Snapshot;
use crate::session::Outcome;
use crate::steer::{Limits, Sending};

/// How it ended, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum OutcomeKind {
    /// The guest runs at the destination.
    Migrated,
    /// The guest runs at the source.
    Failed,
    /// The user stopped it; the guest runs at the source.
    Cancelled,
    /// The destination owns the guest and could not run it: it is paused there, and stays paused here.
    Stranded,
    /// The commit was sent and nothing was heard since: the source stays paused.
    Unknown,
    /// The guest shut down or crashed at the source: it runs nowhere.
    Gone,
}

/// The final report. Times in milliseconds, sizes in bytes.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// How it ended.
    pub outcome: OutcomeKind,
    /// Whether the guest's user had paused it, so that it arrives paused.
    pub guest_paused: bool,
    /// From the start of the migration to its end.
    pub total_ms: f64,
    /// From before the guest was told to pause until it was known to run again (here or there); null if it never paused.
    pub downtime_ms: Option<f64>,
    /// The parts of the downtime.
    pub downtime: Option<Downtime>,
    /// The downtime that was predicted when the switchover was decided.
    pub predicted_downtime_ms: Option<f64>,
    /// What was forecast, and when: soon after the first round began, at the end of each round, and at the switchover.
    pub forecasts: Vec<ForecastReport>,
    /// The limits that were set, and those after each change of one of them while it ran.
    pub limits: Vec<LimitsReport>,
    /// How much of the guest's time was held back, from when on; empty if the guest was never slowed.
    pub throttles: Vec<ThrottleReport>,
    /// For how long anything was held back, in all.
    pub throttled_ms: f64,
    /// What the VMM said that could not slow the guest, or not let it go on, last.
    pub throttle_error: Option<String>,
    /// Number of rounds, the last one included; one that was broken off and opened again counts twice.
    pub rounds: usize,
    /// Each round.
    pub round_list: Vec<RoundReport>,
    /// Data channels asked for.
    pub channels: u32,
    /// Data channels that were lost on the way while the migration went on; the loss of all of them is a suspension.
    pub channels_lost: u32,
    /// Of these, how many were opened again. What is opened to resume a suspended migration is not counted.
    pub channels_reopened: u32,
    /// Size of guest memory.
    pub memory_bytes: u64,
    /// Bytes handed to data channels: heads and bodies.
    pub sent_bytes: u64,
    /// Guest memory that round 0 left out, unread and unsent: holes, which are zero, and what the VMM said is unused.
    pub left_out_bytes: u64,
    /// Guest memory that was sent as "all zero", every version counted.
    pub zero_bytes: u64,
    /// Guest memory that was sent with content, every version counted.
    pub content_bytes: u64,
    /// How often all channels were lost and the migration was suspended.
    pub suspensions: u32,
    /// How often bytes were changed on the way on the control channel, which was then lost with all others.
    pub control_damaged: u32,
    /// How long it was suspended in all; the guest ran here meanwhile.
    pub suspended_ms: f64,
    /// The longest time in the rounds in which the destination acknowledged nothing; suspensions are not counted.
    pub longest_pause_ms: f64,
    /// How long the guest stood still in all for switchovers that were broken off, after which it ran on here.
    pub broken_off_pause_ms: f64,
    /// How often the destination was asked how it ended.
    pub asked: u32,
    /// Bytes of frames that were lost with their channel, so that their pages were sent again.
    pub sent_again_bytes: u64,
    /// Pages that came back into the dirty set: not matching their checksum, or lost with a channel.
    pub pages_given_back: u64,
    /// Pages that did not match their checksum at the destination, every time counted; they were sent again.
    pub pages_mismatched: u64,
    /// Of which: torn, because the guest wrote them while they were sent. A busy guest does that.
    pub pages_torn: u64,
    /// Of which: damaged on the way, because nobody wrote them. Those that are neither were not decided before a lane was lost.
    pub pages_damaged: u64,
    /// Guest memory moved, zero pages included, per second from the first round's begin until the last
    /// one was closed at the destination.
    pub goodput_mib_s: f64,
    /// CPU seconds of this side's migration threads.
    pub cpu_sender_s: f64,
    /// CPU seconds of the destination's migration threads, as it said itself; null if it did not get that far.
    pub cpu_receiver_s: Option<f64>,
    /// Whether both sides' digests over all of memory agreed; null if it did not get that far.
    pub digest_equal: Option<bool>,
    /// The digest over all pages as last sent.
    pub digest: Option<String>,
    /// What came damaged from the destination: each by phase, channel and frame.
    pub damaged: Vec<DamageReport>,
    /// How long the debug scan for unreported writes took, if it was asked for and got its turn; part of the downtime.
    pub dirty_scan_ms: Option<f64>,
    /// How long the switchover waited for nothing but devices' initial bytes to be loaded; the guest ran meanwhile.
    pub ack_wait_ms: f64,
    /// Bytes of devices' state handed to data channels.
    pub device_bytes: u64,
    /// Each device.
    pub devices: Vec<DeviceReport>,
    /// Figures of each source of dirty pages.
    pub sources: Vec<SourceReport>,
    /// Threads that did not come back in the end, and were left alone.
    pub threads_left: Vec<String>,
    /// What went wrong, or null.
    pub error: Option<ErrorReport>,
}

/// The parts of the downtime, in milliseconds. They follow one another but for `load_ms`, which overlaps none here.
#[derive(Debug, Clone, Copy, Default, Serialize)]
#[non_exhaustive]
pub struct Downtime {
    /// Stopping the vCPUs.
    pub pause_ms: f64,
    /// What devices had of it; null without any. These parts overlap the others, which go on meanwhile.
    pub devices: Option<DeviceDowntime>,
    /// The last collections from all sources of dirty pages.
    pub collect_ms: f64,
    /// Saving the VM state and sending it, while the lanes send the last pages.
    pub save_ms: f64,
    /// From then until the last page was handed to a channel and FINAL was sent.
    pub send_ms: f64,
    /// From then until the destination said `prepared`: the wire, and the destination's own work.
    pub prepare_ms: f64,
    /// Of which: the destination loading the VM state.
    pub load_ms: f64,
    /// From `prepared` to `running`: the commit's round trip and the destination starting its vCPUs.
    pub commit_ms: f64,
}

/// The devices' part of the downtime, in milliseconds: one stretch after the other, over all devices.
#[derive(Debug, Clone, Copy, Default, Serialize)]
#[non_exhaustive]
pub struct DeviceDowntime {
    /// From the paused guest until the last device was P2P-quiescent.
    pub quiesce_ms: f64,
    /// From then until the last device stood still.
    pub stop_ms: f64,
    /// From then until the last device was read to its end. Sending and loading go on meanwhile.
    pub read_ms: f64,
    /// From then until the destination had acknowledged the last bytes of all devices: what the wire is behind. The way of
    /// that acknowledgement is in it.
    pub wire_ms: f64,
    /// From then until the destination said that the last device is loaded: what loading is behind.
    pub load_ms: f64,
    /// The longest time that a device took for its configuration, inside the part before.
    pub config_ms: f64,
    /// From the devices' last bytes until the last pages of memory were handed to a channel.
    pub memory_tail_ms: f64,
}

/// One device. Times in milliseconds, sizes in bytes; "after" times count from its stop.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct DeviceReport {
    /// Its name.
    pub name: String,
    /// The state that it was in at the end.
    pub state: &'static str,
    /// Initial bytes that were read while the guest ran.
    pub initial_bytes: u64,
    /// All that was read while the guest ran.
    pub pre_copy_bytes: u64,
    /// What was read while it stood still.
    pub stop_copy_bytes: u64,
    /// Its configuration.
    pub config_bytes: u64,
    /// Batches of initial bytes that it announced, and the newest that the destination had loaded.
    pub generations: u32,
    /// See `generations`.
    pub acked: u32,
    /// How long the destination took to load them.
    pub ack_load_ms: f64,
    /// Getting P2P-quiescent.
    pub quiesce_ms: f64,
    /// Standing still.
    pub stop_ms: f64,
    /// Time in its own reads while it stood still.
    pub read_ms: f64,
    /// When it was read to its end.
    pub saved_after_ms: Option<f64>,
    /// When the last of it was handed to a channel: the kernel has it, not the destination.
    pub sent_after_ms: Option<f64>,
    /// When the destination had acknowledged all of it.
    pub arrived_after_ms: Option<f64>,
    /// When the destination's word came that it is loaded.
    pub loaded_after_ms: Option<f64>,
    /// Time that the destination's device took for its data, waits for it not counted.
    pub load_ms: Option<f64>,
    /// Time that it took for its configuration and its own check.
    pub config_ms: Option<f64>,
    /// It was broken and had to be reset: it runs, but its state is lost.
    pub was_reset: bool,
    /// How often its stream began anew, since a switchover was broken off after it had left pre-copy.
    pub restarts: u32,
    /// Whether it was given back to the VMM in the end. One whose own code does not return can't be.
    pub given_back: bool,
    /// What went wrong with it.
    pub error: Option<String>,
    #[serde(skip)]
    pub(crate) stopped_at: Option<Instant>,
    #[serde(skip)]
    pub(crate) saved_at: Option<Instant>,
    #[serde(skip)]
    pub(crate) sent_at: Option<Instant>,
    #[serde(skip)]
    pub(crate) arrived_at: Option<Instant>,
    #[serde(skip)]
    pub(crate) loaded_at: Option<Instant>,
}

/// One round.
#[derive(Debug, Clone, Copy, Serialize)]
#[non_exhaustive]
pub struct RoundReport {
    /// Its number.
    pub round: u32,
    /// Pages that it began with.
    pub pages: u64,
    /// Bytes sent in it; of one that was broken off, all that was sent until then.
    pub sent_bytes: u64,
    /// How long the lanes took; of a round that was broken off (by the end, or by the loss of all channels: it is then listed again), how
    /// long it had been.
    pub ms: f64,
    /// MiB sent a second; null for a round that was broken off.
    pub mib_s: Option<f64>,
    /// Pages found dirty after it.
    pub dirty_after: Option<u64>,
}

/// What was forecast at one moment, in milliseconds since the migration began.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ForecastReport {
    /// When.
    pub at_ms: f64,
    /// When it would be over: to be held against `total_ms`. Null if it did not look as if it would converge.
    pub end_ms: Option<IntervalReport>,
    /// The downtime: to be held against `downtime_ms`. Of one that does not converge, the best that waiting would give.
    pub downtime_ms: IntervalReport,
    /// What would make it converge, if it did not look as if it would.
    pub diverges: Option<AdviceReport>,
}

/// A figure that was not known exactly, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct IntervalReport {
    /// If all went well.
    pub low: f64,
    /// As measured.
    pub likely: f64,
    /// If it went badly; null if it would not have converged then.
    pub high: Option<f64>,
}

/// What would make a migration converge: each by itself.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct AdviceReport {
    /// A link with this many bytes a second; null if none would.
    pub bandwidth_needed_bytes_per_s: Option<u64>,
    /// A guest of whose writes this share, in percent, is held back; null if that would not do.
    pub throttle_percent: Option<u8>,
    /// A downtime limit of so many milliseconds.
    pub downtime_limit_ms: f64,
}

impl From<&Outlook> for ForecastReport {
    fn from(outlook: &Outlook) -> Self {
        let interval = |interval: Interval| IntervalReport {
            low: ms(interval.low),
            likely: ms(interval.likely),
            high: interval.high.map(ms),
        };
        Self {
            at_ms: ms(outlook.at),
            end_ms: outlook.end.map(interval),
            downtime_ms: interval(outlook.downtime),
            diverges: match outlook.forecast {
                Forecast::Diverges {
                    downtime,
                    bandwidth_needed,
                    throttle_percent,
                } => Some(AdviceReport {
                    bandwidth_needed_bytes_per_s: bandwidth_needed,
                    throttle_percent,
                    downtime_limit_ms: ms(downtime).ceil(),
                }),
                _ => None,
            },
        }
    }
}

/// How much of the guest's time was held back from one moment on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ThrottleReport {
    /// Since when, in milliseconds since the migration began.
    pub at_ms: f64,
    /// How much, in percent; 0: it was released.
    pub percent: u8,
}

/// The limits from one moment on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct LimitsReport {
    /// Since when, in milliseconds since the migration began.
    pub at_ms: f64,
    /// The most bytes a second over all data channels; null without a cap.
    pub bandwidth_cap_bytes_per_s: Option<u64>,
    /// The longest predicted downtime at which the switchover is begun.
    pub downtime_limit_ms: f64,
    /// Live rounds after which the forecast decides.
    pub max_rounds: u32,
    /// What is done then: `fail` or `switch`.
    pub if_not_converging: &'static str,
    /// How much of the guest's time might be held back, in percent.
    pub throttle_limit_percent: u8,
    /// Sending was held.
    pub sending_held: bool,
}

impl LimitsReport {
    /// These limits, in force since then.
    #[must_use]
    pub fn new(limits: &Limits, at: Duration) -> Self {
        Self {
            at_ms: ms(at),
            bandwidth_cap_bytes_per_s: limits.bandwidth,
            downtime_limit_ms: ms(limits.downtime_limit),
            max_rounds: limits.max_rounds,
            if_not_converging: match limits.when_not_converging {
                WhenNotConverging::Switch => "switch",
                _ => "fail",
            },
            throttle_limit_percent: limits.throttle_limit,
            sending_held: limits.sending == Sending::Held,
        }
    }
}

/// One source of dirty pages.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct SourceReport {
    /// Its name.
    pub name: String,
    /// Pages it put into the dirty set that were clean there.
    pub pages: u64,
    /// Reports of pages, the same page counted each time.
    pub reported: u64,
    /// Collections.
    pub harvests: u64,
    /// Time spent collecting.
    pub harvest_ms: f64,
    /// Kernel resets.
    pub resets: u64,
    /// Exits of vCPUs because their ring was full, and rings found full to the last entry.
    pub ring_full: u64,
    /// Of which: rings found full to the last entry, after which everything counted as dirty.
    pub overflows: u64,
    /// Times that a whole region or range counted as dirty because the exact pages could not be learnt.
    pub all_dirty: u64,
    /// Reports of memory that the source does not know.
    pub entries_unknown: u64,
    /// Ranges unmapped from a device, which handed their dirty pages over first.
    pub unmaps: u64,
    /// Kernel calls that failed.
    pub errors: u64,
    /// The `errno` of the last one that failed; 0 if none did.
    pub last_errno: i32,
    /// The same in words.
    pub last_error: Option<String>,
    /// Why this source was chosen and no other, if there was a choice.
    pub reason: Option<String>,
}

/// Forecasts, and changes of limits, that the report keeps.
const FORECASTS_MAX: usize = 256;

/// Notes down when things happened. Kept by the control thread.
#[derive(Debug, Default)]
pub(crate) struct Timeline {
    began: Option<Instant>,
    forecasts: Vec<ForecastReport>,
    changed: Vec<LimitsReport>,
    throttles: Vec<ThrottleReport>,
    throttled_since: Option<Duration>,
    throttled: Duration,
    pub(crate) throttle_error: Option<String>,
    rounds_began: Option<Duration>,
    rounds_ended: Option<Duration>,
    last_closed: Option<Duration>,
    pausing: Option<Instant>,
    paused: Option<Instant>,
    quiesced: Option<Instant>,
    encoded: Option<Instant>,
    waiting: Option<Duration>,
    ack_wait: Duration,
    saved: Option<Instant>,
    final_sent: Option<Instant>,
    prepared: Option<Instant>,
    running_again: Option<Instant>,
    ended: Option<Instant>,
    predicted: Option<Duration>,
    last_collects: Duration,
    rounds: Vec<(RoundReport, Duration)>,
    sent_before_round: u64,
    lanes_lost: u32,
    lanes_reopened: u32,
    pub(crate) control_damaged: u32,
    suspensions: u32,
    suspended_since: Option<Instant>,
    suspended: Duration,
    /// When something was acknowledged last, while the rounds go on.
    taken: Option<Instant>,
    longest_pause: Duration,
    broken_off_pause: Duration,
    asked: u32,
    committed: bool,
    destination_load: Duration,
    destination_cpu: Option<Duration>,
    digest: Option<u64>,
    pub(crate) dirty_scan: Option<Duration>,
    pub(crate) resume_failed: Option<String>,
    pub(crate) threads_left: Vec<String>,
    /// What the guest was when it was asked last.
    pub(crate) guest: GuestState,
}

impl Timeline {
    /// Of a migration of which no more is known than when it began.
    pub(crate) fn begun(at: Instant) -> Self {
        Self {
            began: Some(at),
            ..Self::default()
        }
    }

    pub(crate) fn begin(&mut self) {
        self.began = Some(Instant::now());
    }

    pub(crate) fn ready(&mut self, now: Duration, prepare_us: u64) {
        tracing::info!(prepare_ms = prepare_us / 1000, "the destination is ready");
        self.rounds_began = Some(now);
        self.taken = Some(Instant::now());
    }

    /// The destination acknowledged something.
    pub(crate) fn taken(&mut self) {
        if let Some(before) = &mut self.taken {
            self.longest_pause = self.longest_pause.max(before.elapsed());
            *before = Instant::now();
        }
    }

    /// What the session said of the end. A migration that waits for long says it again and again: the newest replaces the one
    /// before then.
    pub(crate) fn forecast(&mut self, outlook: Outlook) {
        if self.forecasts.len() >= FORECASTS_MAX {
            self.forecasts.pop();
        }
        self.forecasts.push(ForecastReport::from(&outlook));
    }

    /// The limits are these from now on. Of more changes than the report keeps, the newest replaces the one before.
    pub(crate) fn limits(&mut self, limits: Limits, now: Duration) {
        if self.changed.len() >= FORECASTS_MAX {
            self.changed.pop();
        }
        self.changed.push(LimitsReport::new(&limits, now));
    }

    /// So much of the guest's time is held back from now on.
    pub(crate) fn throttled(&mut self, percent: u8, now: Duration) {
        if self.throttles.len() >= FORECASTS_MAX {
            self.throttles.pop();
        }
        let at_ms = ms(now);
        self.throttles.push(ThrottleReport { at_ms, percent });
        match percent {
            0 => self.throttle_ends(now),
            _ => self.throttled_since = self.throttled_since.or(Some(now)),
        }
    }

    fn throttle_ends(&mut self, now: Duration) {
        if let Some(since) = self.throttled_since.take() {
            self.throttled += now.saturating_sub(since);
        }
    }

    /// `sent`: the bytes that were handed to data channels by then, in all.
    pub(crate) fn round_opened(&mut self, round: Round, pages: u64, sent: u64, now: Duration) {
        self.sent_before_round = sent;
        let report = RoundReport {
            round: round.value(),
            pages,
            sent_bytes: 0,
            ms: 0.0,
            mib_s: None,
            dirty_after: None,
        };
        self.rounds.push((report, now));
    }

    pub(crate) fn round_encoded(&mut self, octets: u64, now: Duration) {
        self.encoded = Some(Instant::now());
        self.rounds_ended = Some(now);
        if let Some((report, since)) = self.rounds.last_mut() {
            let took = now.saturating_sub(*since);
            report.sent_bytes = octets;
            report.ms = ms(took);
            report.mib_s = Some(mib_s(octets, took));
        }
    }

    pub(crate) fn collected(&mut self, pages: u64, last: bool, took: Duration) {
        if last {
            self.last_collects += took;
        } else if let Some((report, _)) = self.rounds.last_mut() {
            report.dirty_after = Some(pages);
        }
    }

    pub(crate) fn round_closed(&mut self, closed: &RoundClosed, now: Duration) {
        self.last_closed = Some(now);
        tracing::debug!(round = %closed.round, pages = closed.pages, zero_pages = closed.zero_pages, damaged = closed.damaged_pages, "round closed");
    }

    pub(crate) fn quiesced(&mut self) {
        self.quiesced = Some(Instant::now());
    }

    /// Nothing but acknowledgements is missing.
    pub(crate) fn awaiting(&mut self, now: Duration) {
        let since = *self.waiting.get_or_insert(now);
        self.ack_wait = now.saturating_sub(since);
    }

    fn device_downtime(&self, devices: &[DeviceReport]) -> Option<DeviceDowntime> {
        let last = |at: fn(&DeviceReport) -> Option<Instant>| devices.iter().filter_map(at).max();
        let between = |from: Option<Instant>, to: Option<Instant>| {
            from.zip(to)
                .map_or(0.0, |(from, to)| ms(to.saturating_duration_since(from)))
        };
        if devices.is_empty() || self.pausing.is_none() {
            return None;
        }
        let stopped = last(|device| device.stopped_at);
        let saved = last(|device| device.saved_at);
        let sent = last(|device| device.sent_at);
        let arrived = last(|device| device.arrived_at);
        Some(DeviceDowntime {
            quiesce_ms: between(self.paused, self.quiesced),
            stop_ms: between(self.quiesced, stopped),
            read_ms: between(stopped, saved),
            wire_ms: between(saved, arrived),
            load_ms: between(arrived, last(|device| device.loaded_at)),
            config_ms: devices
                .iter()
                .filter_map(|device| device.config_ms)
                .fold(0.0, f64::max),
            memory_tail_ms: between(sent, self.encoded),
        })
    }

    pub(crate) fn pausing(&mut self, predicted: Option<Duration>, now: Duration) {
        (self.paused, self.saved, self.final_sent, self.prepared) = (None, None, None, None);
        (self.running_again, self.last_collects) = (None, Duration::ZERO);
        self.taken();
        self.taken = None;
        // Of a guest that stands still nothing is held back.
        self.throttle_ends(now);
        self.pausing = Some(Instant::now());
        self.predicted = predicted;
    }

    pub(crate) fn paused(&mut self) {
        self.paused = Some(Instant::now());
    }

    pub(crate) fn saved(&mut self) {
        self.saved = Some(Instant::now());
    }

    pub(crate) fn final_sent(&mut self) {
        self.final_sent = Some(Instant::now());
    }

    pub(crate) fn prepared(&mut self, prepared: &Prepared) {
        self.prepared = Some(Instant::now());
        self.destination_load = Duration::from_micros(prepared.load_us);
        self.digest = Some(prepared.digest.value());
    }

    pub(crate) fn committed(&mut self) {
        self.committed = true;
    }

    pub(crate) fn running(&mut self, running: &Running) {
        self.running_again = Some(Instant::now());
        self.destination_cpu = Some(Duration::from_micros(running.cpu_us));
    }

    pub(crate) fn reclaimed(&mut self) {
        self.running_again = Some(Instant::now());
    }

    pub(crate) fn lane_lost(&mut self) {
        self.lanes_lost += 1;
    }

    /// The round that is under way, if one is, goes no further.
    fn broken_off(&mut self, sent: u64, now: Duration) {
        if let Some((report, since)) = self.rounds.last_mut()
            && report.mib_s.is_none()
        {
            report.ms = ms(now.saturating_sub(*since));
            report.sent_bytes = sent.saturating_sub(self.sent_before_round);
        }
    }

    /// All channels are lost. If the guest was paused it runs again by now.
    pub(crate) fn suspended(&mut self, sent: u64, now: Duration) {
        self.broken_off(sent, now);
        self.taken = None;
        if self.suspended_since.is_none() {
            self.suspensions += 1;
            self.suspended_since = Some(Instant::now());
        }
        if self.running_again.is_some() {
            self.broken_off_pause += self.last_broken_off();
            (self.pausing, self.running_again) = (None, None);
        }
    }

    /// How long the guest stood still for the last switchover, if it ran on here.
    fn last_broken_off(&self) -> Duration {
        match (self.pausing, self.running_again) {
            (Some(since), Some(again)) if self.destination_cpu.is_none() => {
                again.saturating_duration_since(since)
            }
            _ => Duration::ZERO,
        }
    }

    /// The rounds go on.
    pub(crate) fn resumed(&mut self) {
        if let Some(since) = self.suspended_since.take() {
            self.suspended += since.elapsed();
            self.taken = Some(Instant::now());
        }
    }

    pub(crate) fn asked(&mut self) {
        self.asked += 1;
    }

    pub(crate) fn lane_rejoined(&mut self) {
        self.lanes_reopened += 1;
    }

    /// It is known how it ends. What is said to the destination after that does not count.
    pub(crate) fn ended(&mut self, sent: u64, now: Duration) {
        if self.ended.is_some() {
            return;
        }
        self.resumed();
        self.ended = Some(Instant::now());
        self.broken_off(sent, now);
    }

    fn downtime(&self, devices: &[DeviceReport]) -> Option<Downtime> {
        let pausing = self.pausing?;
        let paused = self.paused.unwrap_or(pausing);
        let saved = self.saved.unwrap_or(paused);
        let sent = self.final_sent.unwrap_or(saved).max(saved);
        let prepared = self.prepared.unwrap_or(sent);
        let running = self.running_again.unwrap_or(prepared);
        Some(Downtime {
            devices: self.device_downtime(devices),
            pause_ms: ms(paused - pausing),
            collect_ms: ms(self.last_collects),
            save_ms: ms((saved - paused).saturating_sub(self.last_collects)),
            send_ms: ms(sent - saved),
            prepare_ms: ms(prepared.saturating_duration_since(sent)),
            load_ms: ms(self.destination_load),
            commit_ms: ms(running.saturating_duration_since(prepared)),
        })
    }
}

impl Report {
    pub(crate) fn new(
        timeline: &Timeline,
        outcome: &Outcome,
        end: &Snapshot,
        config: &Config,
        sources: &[Box<dyn Source>],
        devices: Vec<DeviceReport>,
    ) -> Self {
        let (kind, error) = match outcome {
            Outcome::Migrated => (OutcomeKind::Migrated, None),
            Outcome::Failed(error) => (OutcomeKind::Failed, Some(error)),
            Outcome::Cancelled(error) => (OutcomeKind::Cancelled, Some(error)),
            Outcome::Stranded(error) => (OutcomeKind::Stranded, Some(error)),
            Outcome::Unknown(error) => (OutcomeKind::Unknown, Some(error)),
            Outcome::Gone(error) => (OutcomeKind::Gone, Some(error)),
        };
        let ended = timeline.ended.unwrap_or_else(Instant::now);
        let total = timeline.began.map_or(Duration::ZERO, |began| ended - began);
        let moved = (end.content_pages + end.zero_pages) * PAGE_BYTES_U64;
        let moving = timeline
            .last_closed
            .max(timeline.rounds_ended)
            .zip(timeline.rounds_began)
            .map_or(Duration::ZERO, |(b, a)| b.saturating_sub(a));
        Self {
            outcome: kind,
            guest_paused: timeline.guest == GuestState::Paused,
            total_ms: ms(total),
            downtime_ms: timeline
                .pausing
                .map(|since| ms(timeline.running_again.unwrap_or(ended) - since)),
            downtime: timeline.downtime(&devices),
            predicted_downtime_ms: timeline.predicted.map(ms),
            rounds: timeline.rounds.len(),
            forecasts: timeline.forecasts.clone(),
            throttles: timeline.throttles.clone(),
            throttled_ms: ms(timeline.throttled),
            throttle_error: timeline.throttle_error.clone(),
            limits: std::iter::once(LimitsReport::new(&config.limits(), Duration::ZERO))
                .chain(timeline.changed.iter().copied())
                .collect(),
            round_list: timeline.rounds.iter().map(|(report, _)| *report).collect(),
            channels: config.channels(),
            channels_lost: timeline.lanes_lost,
            channels_reopened: timeline.lanes_reopened,
            memory_bytes: end.memory_pages * PAGE_BYTES_U64,
            sent_bytes: end.sent_bytes,
            zero_bytes: end.zero_pages * PAGE_BYTES_U64,
            content_bytes: end.content_pages * PAGE_BYTES_U64,
            left_out_bytes: end.left_out_pages * PAGE_BYTES_U64,
            suspensions: timeline.suspensions,
            control_damaged: timeline.control_damaged,
            suspended_ms: ms(timeline.suspended),
            longest_pause_ms: ms(timeline.longest_pause),
            broken_off_pause_ms: ms(timeline.broken_off_pause + timeline.last_broken_off()),
            asked: timeline.asked,
            sent_again_bytes: end.sent_again_bytes,
            pages_given_back: end.pages_given_back,
            pages_mismatched: end.pages_mismatched,
            pages_torn: end.pages_torn,
            pages_damaged: end.pages_damaged,
            goodput_mib_s: mib_s(moved, moving),
            cpu_sender_s: end.cpu.as_secs_f64(),
            cpu_receiver_s: timeline.destination_cpu.map(|cpu| cpu.as_secs_f64()),
            // The machine commits only after it compared them.
            digest_equal: timeline
                .committed
                .then_some(true)
                .or_else(|| mismatch(error)),
            digest: timeline.digest.map(|digest| format!("{digest:016x}")),
            damaged: Vec::new(),
            dirty_scan_ms: timeline.dirty_scan.map(ms),
            ack_wait_ms: ms(timeline.ack_wait),
            device_bytes: end.device_bytes,
            devices,
            sources: sources
                .iter()
                .map(|source| SourceReport::from(&**source))
                .collect(),
            threads_left: timeline.threads_left.clone(),
            error: error.map(ErrorReport::from),
        }
    }
}

fn mismatch(error: Option<&Error>) -> Option<bool> {
    matches!(error?.fault(), crate::error::Fault::DigestMismatch { .. }).then_some(false)
}

impl From<&dyn Source> for SourceReport {
    fn from(source: &dyn Source) -> Self {
        let figures = source.figures();
        Self {
            name: source.name().to_owned(),
            pages: figures.pages,
            reported: figures.reported,
            harvests: figures.harvests,
            harvest_ms: figures.harvest_ns as f64 / 1e6,
            resets: figures.resets,
            ring_full: figures.ring_full_soft + figures.ring_full_hard,
            overflows: figures.ring_full_hard,
            all_dirty: figures.all_dirty,
            entries_unknown: figures.entries_unknown,
            unmaps: figures.unmaps,
            errors: figures.errors,
            last_errno: figures.last_errno,
            last_error: (figures.last_errno != 0)
                .then(|| std::io::Error::from_raw_os_error(figures.last_errno).to_string()),
            reason: source.reason(),
        }
    }
}

pub(crate) fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

fn mib_s(octets: u64, over: Duration) -> f64 {
    if over.is_zero() {
        0.0
    } else {
        (octets as f64 / f64::from(1 << 20) / over.as_secs_f64() * 10.0).round() / 10.0
    }
}
