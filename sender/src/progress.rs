//! How far a migration is, for anybody to read at any time, also after it failed. Nothing that moves bytes waits for a reader.
//!
//! The migration's threads only ever store; readers only ever load. Each number is true on its own; two numbers of one
//! [`Snapshot`] may be some microseconds apart.

use std::sync::atomic::{AtomicI32, AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use multifd_tracking::{Figures, Source};
use multifd_wire::{ChannelRef, DamageList, Damaged, Phase};

use crate::error::Fault;
use crate::forecast::{Forecast, Outlook};
use crate::steer::Limits;

/// The live counters. Shared by all threads of a migration.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    phase: AtomicU32,
    damage: Mutex<DamageList>,
    pub(crate) round: AtomicU32,
    pub(crate) lanes: AtomicU32,
    pub(crate) memory_pages: AtomicU64,
    /// Pages of this round that no lane has taken yet.
    pub(crate) round_pages_left: AtomicU64,
    /// Pages found dirty by the collection after the newest finished round.
    pub(crate) dirty_pages: AtomicU64,
    pub(crate) content_pages: AtomicU64,
    pub(crate) zero_pages: AtomicU64,
    /// Bytes of heads and bodies handed to data channels.
    pub(crate) sent_bytes: AtomicU64,
    pub(crate) acked_bytes: AtomicU64,
    /// Bytes of devices' streams handed to data channels.
    pub(crate) device_bytes: AtomicU64,
    /// Devices whose acknowledgement is all that the switchover waits for.
    pub(crate) devices_awaited: AtomicU32,
    pub(crate) pages_given_back: AtomicU64,
    pub(crate) pages_mismatched: AtomicU64,
    pub(crate) pages_torn: AtomicU64,
    pub(crate) pages_damaged: AtomicU64,
    /// Pages that round 0 left out.
    pub(crate) left_out_pages: AtomicU64,
    /// Bytes of frames that were lost with their channel.
    pub(crate) sent_again_bytes: AtomicU64,
    /// Attempts to reach the destination again since the channels were lost; 0 while they are open.
    pub(crate) attempts: AtomicU32,
    /// Until when it is tried, in milliseconds; counts down.
    pub(crate) gives_up_in_ms: AtomicU64,
    /// Bytes a second over all lanes in the newest round that was long enough to measure.
    pub(crate) bandwidth: AtomicU64,
    /// Held back of the guest's time, in percent.
    pub(crate) throttle_percent: AtomicU8,
    cpu_ns: AtomicU64,
    outlook: Mutex<Option<Outlook>>,
    limits: Mutex<Limits>,
    sources: Box<[LiveSource]>,
}

macro_rules! live_figures {
    ($($field:ident: $cell:ty),*) => {
        /// A source's figures as they were after its newest collection.
        #[derive(Debug, Default)]
        struct LiveFigures {
            $($field: $cell,)*
        }

        impl LiveFigures {
            fn store(&self, figures: Figures) {
                $(self.$field.store(figures.$field, Relaxed);)*
            }

            fn load(&self) -> Figures {
                Figures {
                    $($field: self.$field.load(Relaxed),)*
                }
            }
        }
    };
}

live_figures! {
    pages: AtomicU64, reported: AtomicU64, harvests: AtomicU64, harvest_ns: AtomicU64, resets: AtomicU64,
    ring_full_soft: AtomicU64, ring_full_hard: AtomicU64, entries_unknown: AtomicU64, all_dirty: AtomicU64,
    unmaps: AtomicU64, errors: AtomicU64, last_errno: AtomicI32
}

#[derive(Debug)]
struct LiveSource {
    name: Arc<str>,
    figures: LiveFigures,
}

impl Counters {
    /// A checksum found bytes that were changed on the way.
    pub(crate) fn note_damage(&self, at: ChannelRef, frame: &'static str, count: u64) {
        let phase = Phase::from_u32(self.phase.load(Relaxed)).unwrap_or(Phase::Hello);
        let mut list = self.damage.lock().unwrap_or_else(PoisonError::into_inner);
        list.note(phase, at, frame, count);
    }

    /// What was found so far.
    pub(crate) fn damaged(&self) -> Vec<Damaged> {
        let list = self.damage.lock().unwrap_or_else(PoisonError::into_inner);
        list.entries().to_vec()
    }

    /// The same, if it was a checksum that this fault comes from.
    pub(crate) fn note_fault(&self, at: ChannelRef, fault: &Fault) {
        if let Fault::Malformed(malformed) = fault
            && let Some(frame) = malformed.damaged()
        {
            self.note_damage(at, frame, 1);
        }
    }

    /// All zero, for these sources, with these limits.
    pub(crate) fn new(sources: &[Box<dyn Source>], limits: Limits) -> Self {
        let live = |name: &str| LiveSource {
            name: name.into(),
            figures: LiveFigures::default(),
        };
        Self {
            sources: sources.iter().map(|source| live(source.name())).collect(),
            limits: Mutex::new(limits),
            ..Self::default()
        }
    }

    /// Takes note of what the sources have counted. Called by their own thread, since nobody else may ask them.
    pub(crate) fn note_sources(&self, sources: &[Box<dyn Source>]) {
        for (live, source) in self.sources.iter().zip(sources) {
            live.figures.store(source.figures());
        }
    }

    pub(crate) fn set_phase(&self, phase: Phase) {
        self.phase.store(phase.as_u32(), Relaxed);
    }

    pub(crate) fn add_cpu(&self, spent: Duration) {
        self.cpu_ns
            .fetch_add(u64::try_from(spent.as_nanos()).unwrap_or(0), Relaxed);
    }

    pub(crate) fn set_outlook(&self, outlook: Outlook) {
        *self.outlook.lock().unwrap_or_else(PoisonError::into_inner) = Some(outlook);
    }

    pub(crate) fn set_limits(&self, limits: Limits) {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner) = limits;
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        let outlook = *self.outlook.lock().unwrap_or_else(PoisonError::into_inner);
        Snapshot {
            phase: Phase::from_u32(self.phase.load(Relaxed)).unwrap_or(Phase::Hello),
            round: self.round.load(Relaxed),
            lanes: self.lanes.load(Relaxed),
            memory_pages: self.memory_pages.load(Relaxed),
            round_pages_left: self.round_pages_left.load(Relaxed),
            dirty_pages: self.dirty_pages.load(Relaxed),
            content_pages: self.content_pages.load(Relaxed),
            zero_pages: self.zero_pages.load(Relaxed),
            sent_bytes: self.sent_bytes.load(Relaxed),
            acked_bytes: self.acked_bytes.load(Relaxed),
            device_bytes: self.device_bytes.load(Relaxed),
            devices_awaited: self.devices_awaited.load(Relaxed),
            pages_given_back: self.pages_given_back.load(Relaxed),
            sent_again_bytes: self.sent_again_bytes.load(Relaxed),
            pages_mismatched: self.pages_mismatched.load(Relaxed),
            pages_torn: self.pages_torn.load(Relaxed),
            pages_damaged: self.pages_damaged.load(Relaxed),
            left_out_pages: self.left_out_pages.load(Relaxed),
            reconnect: Some(Reconnect {
                attempts: self.attempts.load(Relaxed),
                gives_up_in: Duration::from_millis(self.gives_up_in_ms.load(Relaxed)),
            })
            .filter(|reconnect| reconnect.attempts > 0),
            bandwidth: self.bandwidth.load(Relaxed),
            throttle_percent: self.throttle_percent.load(Relaxed),
            cpu: Duration::from_nanos(self.cpu_ns.load(Relaxed)),
            sources: self
                .sources
                .iter()
                .map(|live| SourceProgress {
                    name: Arc::clone(&live.name),
                    figures: live.figures.load(),
                })
                .collect(),
            forecast: outlook.map(|outlook| outlook.forecast),
            outlook,
            limits: *self.limits.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }
}

/// All channels are lost, and the destination is dialled again. Before the commit the guest runs here meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Reconnect {
    /// Attempts so far.
    pub attempts: u32,
    /// How long it is still tried.
    pub gives_up_in: Duration,
}

/// What one source of dirty pages has counted, as of its newest collection.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SourceProgress {
    /// Its name, such as `kvm-ring`.
    pub name: Arc<str>,
    /// What it counted.
    pub figures: Figures,
}

/// How far a migration is.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Snapshot {
    /// Where in its life.
    pub phase: Phase,
    /// The newest round, 0-based.
    pub round: u32,
    /// Data channels that live.
    pub lanes: u32,
    /// All pages of the guest.
    pub memory_pages: u64,
    /// Pages of the present round that no lane has taken yet.
    pub round_pages_left: u64,
    /// Pages found dirty when the newest finished round ended.
    pub dirty_pages: u64,
    /// Pages sent with their content, every version counted.
    pub content_pages: u64,
    /// Pages sent as "all zero", every version counted.
    pub zero_pages: u64,
    /// Bytes of heads and bodies handed to data channels.
    pub sent_bytes: u64,
    /// Bytes of those that the destination has acknowledged.
    pub acked_bytes: u64,
    /// Bytes of devices' state handed to data channels, initial bytes and what changed included.
    pub device_bytes: u64,
    /// Devices whose initial bytes are still to be loaded at the destination, and are all that the switchover waits for.
    pub devices_awaited: u32,
    /// Pages that came back into the dirty set: lost with a lane, or not matching their checksum.
    pub pages_given_back: u64,
    /// Pages that did not match their checksum at the destination, every time counted; they are sent again.
    pub pages_mismatched: u64,
    /// Of which: torn, because the guest wrote them while they were sent. A busy guest does that.
    pub pages_torn: u64,
    /// Of which: damaged on the way, because nobody wrote them. Those that are neither were not decided before a lane was lost.
    pub pages_damaged: u64,
    /// Pages that round 0 left out, unread and unsent: holes, which are zero, and what the VMM said is unused.
    pub left_out_pages: u64,
    /// Bytes of frames that were lost with their channel, so that their pages are sent again.
    pub sent_again_bytes: u64,
    /// While the link is lost: how it stands with coming back.
    pub reconnect: Option<Reconnect>,
    /// Measured bytes a second over all lanes; 0 before the first measurement.
    pub bandwidth: u64,
    /// How much of the guest's time is held back so that it writes less, in percent.
    pub throttle_percent: u8,
    /// CPU time of the migration's own threads so far.
    pub cpu: Duration,
    /// Each source of dirty pages, in the order in which they were handed over.
    pub sources: Vec<SourceProgress>,
    /// From a moment after the first round began; the guest's working set is known better with each.
    pub forecast: Option<Forecast>,
    /// The same with when it was made, when the migration will be over, and how sure that is.
    pub outlook: Option<Outlook>,
    /// The limits in force.
    pub limits: Limits,
}
