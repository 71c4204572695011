//! How far a migration is at the destination, for anybody to read at any time without a lock, also after it failed.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use multifd_wire::{ChannelRef, DamageList, Damaged, Phase};

use crate::error::Fault;

/// The live counters. Shared by all threads of a migration.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    phase: AtomicU32,
    damage: Mutex<DamageList>,
    mismatches: Mutex<DamageList>,
    pub(crate) round: AtomicU32,
    pub(crate) lanes: AtomicU32,
    pub(crate) memory_pages: AtomicU64,
    pub(crate) content_pages: AtomicU64,
    pub(crate) zero_pages: AtomicU64,
    pub(crate) received_bytes: AtomicU64,
    /// Bytes of devices' data that were loaded.
    pub(crate) device_bytes: AtomicU64,
    pub(crate) devices: AtomicU32,
    pub(crate) devices_loaded: AtomicU32,
    pub(crate) frames: AtomicU64,
    pub(crate) pages_mismatched: AtomicU64,
    pub(crate) pages_cleared: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) wrong_tokens: AtomicU64,
    cpu_ns: AtomicU64,
}

impl Counters {
    /// A checksum found bytes that were changed on the way.
    pub(crate) fn note_damage(&self, at: ChannelRef, frame: &'static str, count: u64) {
        let phase = Phase::from_u32(self.phase.load(Relaxed)).unwrap_or(Phase::Hello);
        let mut list = self.damage.lock().unwrap_or_else(PoisonError::into_inner);
        list.note(phase, at, frame, count);
    }

    /// Pages did not match their checksum: the guest wrote them meanwhile, or they were changed on the way. Only the source can tell.
    pub(crate) fn note_mismatch(&self, at: ChannelRef, frame: &'static str, pages: u64) {
        self.pages_mismatched.fetch_add(pages, Relaxed);
        let phase = Phase::from_u32(self.phase.load(Relaxed)).unwrap_or(Phase::Hello);
        let list = self.mismatches.lock();
        let mut list = list.unwrap_or_else(PoisonError::into_inner);
        list.note(phase, at, frame, pages);
    }

    /// Where pages did not match so far.
    pub(crate) fn mismatched(&self) -> Vec<Damaged> {
        let list = self.mismatches.lock();
        list.unwrap_or_else(PoisonError::into_inner)
            .entries()
            .to_vec()
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

    pub(crate) fn set_phase(&self, phase: Phase) {
        self.phase.store(phase.as_u32(), Relaxed);
    }

    /// What was counted of a source that came to nothing does not count for the next one. Who was refused stays counted.
    pub(crate) fn reset(&self) {
        self.set_phase(Phase::Hello);
        for counter in [
            &self.round,
            &self.lanes,
            &self.devices,
            &self.devices_loaded,
        ] {
            counter.store(0, Relaxed);
        }
        self.memory_pages.store(0, Relaxed);
        self.pages_cleared.store(0, Relaxed);
        for list in [&self.damage, &self.mismatches] {
            *list.lock().unwrap_or_else(PoisonError::into_inner) = DamageList::default();
        }
    }

    pub(crate) fn add_cpu(&self, spent: Duration) {
        self.cpu_ns
            .fetch_add(u64::try_from(spent.as_nanos()).unwrap_or(0), Relaxed);
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        Snapshot {
            phase: Phase::from_u32(self.phase.load(Relaxed)).unwrap_or(Phase::Hello),
            round: self.round.load(Relaxed),
            lanes: self.lanes.load(Relaxed),
            memory_pages: self.memory_pages.load(Relaxed),
            content_pages: self.content_pages.load(Relaxed),
            zero_pages: self.zero_pages.load(Relaxed),
            received_bytes: self.received_bytes.load(Relaxed),
            device_bytes: self.device_bytes.load(Relaxed),
            devices: self.devices.load(Relaxed),
            devices_loaded: self.devices_loaded.load(Relaxed),
            frames: self.frames.load(Relaxed),
            pages_mismatched: self.pages_mismatched.load(Relaxed),
            pages_cleared: self.pages_cleared.load(Relaxed),
            refused: self.refused.load(Relaxed),
            wrong_tokens: self.wrong_tokens.load(Relaxed),
            cpu: Duration::from_nanos(self.cpu_ns.load(Relaxed)),
        }
    }
}

/// How far a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Snapshot {
    /// Where in its life.
    pub phase: Phase,
    /// The round that is open, 0-based.
    pub round: u32,
    /// Data channels that live.
    pub lanes: u32,
    /// All pages of the guest.
    pub memory_pages: u64,
    /// Pages that landed with content, every version counted.
    pub content_pages: u64,
    /// Zero pages, every version counted.
    pub zero_pages: u64,
    /// Bytes of heads and bodies that came on data channels.
    pub received_bytes: u64,
    /// Bytes of devices' data that were loaded.
    pub device_bytes: u64,
    /// Devices that come with the guest.
    pub devices: u32,
    /// Of which: those that have everything.
    pub devices_loaded: u32,
    /// Frames that came on data channels.
    pub frames: u64,
    /// Pages that did not match their checksum, every time counted: torn by the guest, or damaged on the way. The source's report
    /// says which.
    pub pages_mismatched: u64,
    /// Pages that were not zero in the memory that the VMM prepared, and were made so.
    pub pages_cleared: u64,
    /// Connections that were refused.
    pub refused: u64,
    /// Of which: because of a wrong ticket or secret.
    pub wrong_tokens: u64,
    /// CPU time of the migration's own threads so far.
    pub cpu: Duration,
}
