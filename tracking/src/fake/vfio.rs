//! A fake VFIO device: a DMA log, and a state that can be migrated, as `linux/vfio.h` describes them.
//!
//! Numbers are written out as the C preprocessor gives them, on purpose apart from those that the crate computes. The device
//! has memory of its own as its state. Its stream is made of records (offset, length, bytes), closed by one with a checksum, so
//! that a lost, doubled or reordered piece is found on load.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::device_state::{Save, State, arc_allowed};
use super::{FakeFd, FakeKernel, FakeObject, refused, structure, structure_with, u32_at, u64_at};
use crate::kernel::{Parts, Request};

const VFIO_DEVICE_RESET: u32 = 0x3b6f;
const VFIO_DEVICE_FEATURE: u32 = 0x3b75;
const VFIO_MIG_GET_PRECOPY_INFO: u32 = 0x3b79;

const GET: u32 = 1 << 16;
const SET: u32 = 1 << 17;
const PROBE: u32 = 1 << 18;

const MIGRATION: u32 = 1;
const MIG_DEVICE_STATE: u32 = 2;
const DMA_LOGGING_START: u32 = 6;
const DMA_LOGGING_STOP: u32 = 7;
const DMA_LOGGING_REPORT: u32 = 8;
const MIG_DATA_SIZE: u32 = 9;
const MIG_PRECOPY_INFO_V2: u32 = 12;

/// What the kernel's core takes at most, whatever the device would.
const CORE_RANGES_MAX: u32 = 256;

/// What a fake device is like.
#[derive(Clone, Copy, Debug)]
pub struct FakeDeviceConfig {
    /// The ranges that its log takes; 0: it has no log.
    pub log_ranges_max: u32,
    /// The bytes that it logs by; a power of two, 4096 or more.
    pub log_page_bytes: u64,
    /// `VFIO_MIGRATION_*`; 0: it has no migration.
    pub migration_flags: u64,
    /// Whether it has `VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2`.
    pub version_2: bool,
    /// Bytes of its state; a multiple of 512.
    pub state_bytes: usize,
}

impl Default for FakeDeviceConfig {
    fn default() -> Self {
        Self {
            log_ranges_max: 64,
            log_page_bytes: 4096,
            migration_flags: 7,
            version_2: true,
            state_bytes: 16 << 10,
        }
    }
}

/// A fake device. Cloning gives another handle to the same one.
#[derive(Clone)]
pub struct FakeDevice {
    inner: Arc<Mutex<Inner>>,
}

pub(super) struct Inner {
    config: FakeDeviceConfig,
    kernel: FakeKernel,
    /// Ranges and their dirty units, while it logs.
    log: Option<Log>,
    pub(super) save: Save,
    session: u64,
    states_seen: Vec<State>,
    break_next: bool,
    version_2_on: bool,
}

struct Log {
    ranges: Vec<(u64, u64)>,
    dirty: BTreeSet<u64>,
}

impl FakeDevice {
    /// A device that runs, in that kernel.
    pub fn new(kernel: &FakeKernel, config: FakeDeviceConfig) -> Self {
        let inner = Inner {
            config,
            kernel: kernel.clone(),
            log: None,
            save: Save::new(config.state_bytes),
            session: 0,
            states_seen: vec![State::Running],
            break_next: false,
            version_2_on: false,
        };
        Self {
            inner: Arc::new(Mutex::new(inner)),
        }
    }

    /// Its descriptor.
    pub fn open(&self) -> FakeFd {
        let kernel = self.locked().kernel.clone();
        kernel.open(DeviceObject {
            inner: Arc::clone(&self.inner),
        })
    }

    /// The device has written `bytes` bytes from `iova`. Called after the bytes are in memory, as by a device that logs what it
    /// has done.
    ///
    /// # Panics
    /// If it stands still: that would be a device that breaks the interface.
    pub fn wrote(&self, iova: u64, bytes: u64) {
        let mut inner = self.locked();
        assert!(
            inner.save.state.runs(),
            "a device in {:?} writes no memory",
            inner.save.state
        );
        inner.wrote(iova, bytes);
    }

    /// Lets the device write by `write`, unless it stands still; it cannot come to a stand in between. Says whether it did.
    pub fn dma(&self, iova: u64, bytes: u64, write: impl FnOnce()) -> bool {
        let mut inner = self.locked();
        let runs = inner.save.state.runs();
        if runs {
            write();
            inner.wrote(iova, bytes);
        }
        runs
    }

    /// Whether it may write memory now.
    pub fn runs(&self) -> bool {
        self.locked().save.state.runs()
    }

    /// Whether it logs, and what: (I/O address, bytes) of each range.
    pub fn logged_ranges(&self) -> Option<Vec<(u64, u64)>> {
        self.locked().log.as_ref().map(|log| log.ranges.clone())
    }

    /// Works on its state: changes the 512 bytes of that block.
    pub fn touch(&self, block: usize) {
        self.locked().save.touch(block);
    }

    /// Announces new initial bytes: everything is to be read again.
    pub fn reinit(&self) {
        self.locked().save.reinit();
    }

    /// A checksum of its state, to compare with another device's.
    pub fn checksum(&self) -> u64 {
        self.locked().save.checksum()
    }

    /// The states that it was in, oldest first, by their numbers.
    pub fn states_seen(&self) -> Vec<u32> {
        self.locked()
            .states_seen
            .iter()
            .map(|state| *state as u32)
            .collect()
    }

    /// Lets the next change of state fail with `EIO` and leave the device in ERROR.
    pub fn break_next(&self) {
        self.locked().break_next = true;
    }

    /// Lets the device break by itself: it is in ERROR, and its stream is no more.
    pub fn break_now(&self) {
        let mut inner = self.locked();
        inner.session += 1;
        inner.enter(State::Error);
    }

    fn locked(&self) -> MutexGuard<'_, Inner> {
        locked(&self.inner)
    }
}

fn locked(inner: &Arc<Mutex<Inner>>) -> MutexGuard<'_, Inner> {
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    /// Logs what was written.
    fn wrote(&mut self, iova: u64, bytes: u64) {
        let unit = self.config.log_page_bytes;
        let Some(log) = &mut self.log else {
            return;
        };
        for unit_at in iova / unit..(iova + bytes).div_ceil(unit) {
            let at = (unit_at * unit).max(iova);
            let inside = |&(start, length): &(u64, u64)| (start..start + length).contains(&at);
            if log.ranges.iter().any(inside) {
                log.dirty.insert(unit_at);
            }
        }
    }

    fn enter(&mut self, state: State) {
        self.save.state = state;
        self.states_seen.push(state);
    }

    /// `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`: one arc at a time; combinations, which the kernel would take apart, are
    /// refused here, because nobody in this crate may ask for one.
    fn set_state(&mut self, to: u32, inner: &Arc<Mutex<Self>>) -> io::Result<i32> {
        let from = self.save.state;
        if self.break_next {
            self.break_next = false;
            self.session += 1;
            self.enter(State::Error);
            return refused(libc::EIO);
        }
        let Some(to) =
            State::of(to).filter(|&to| arc_allowed(from, to, self.config.migration_flags))
        else {
            return refused(libc::EINVAL);
        };
        if from == State::Resuming && !self.save.loaded() {
            self.session += 1;
            self.enter(State::Error);
            return refused(libc::EINVAL);
        }
        let begins = !from.streams() && to.streams();
        if begins || !to.streams() {
            self.session += 1;
        }
        if begins {
            self.save.begin(to);
        }
        self.enter(to);
        if !begins {
            return Ok(-1);
        }
        let stream = StreamObject {
            inner: Arc::clone(inner),
            session: self.session,
        };
        Ok(OwnedFd::from(self.kernel.open(stream)).into_raw_fd())
    }

    fn log_start(&mut self, octets: &mut [u8], ranges: &[u64]) -> io::Result<i32> {
        let (page_size, count) = (u64_at(octets, 8), u32_at(octets, 16));
        assert_eq!(u32_at(octets, 20), 0, "reserved");
        assert!(ranges.len() >= count as usize * 2, "the list of ranges");
        if count == 0 || !page_size.is_power_of_two() {
            return refused(libc::EINVAL);
        }
        if count > CORE_RANGES_MAX {
            return refused(libc::E2BIG);
        }
        let mut list: Vec<(u64, u64)> = Vec::new();
        for range in ranges[..count as usize * 2].chunks_exact(2) {
            let (iova, length) = (range[0], range[1]);
            let Some(end) = iova.checked_add(length) else {
                return refused(libc::EOVERFLOW);
            };
            let over = |&(start, bytes): &(u64, u64)| start < end && iova < start + bytes;
            if !(iova | length).is_multiple_of(page_size) || length == 0 || list.iter().any(over) {
                return refused(libc::EINVAL);
            }
            list.push((iova, length));
        }
        if self.log.is_some() {
            return refused(libc::EBUSY);
        }
        if count > self.config.log_ranges_max {
            return refused(libc::E2BIG);
        }
        octets[8..16].copy_from_slice(&self.config.log_page_bytes.to_ne_bytes());
        self.log = Some(Log {
            ranges: list,
            dirty: BTreeSet::new(),
        });
        Ok(0)
    }

    fn log_report(&mut self, octets: &[u8], words: &mut [u64]) -> io::Result<i32> {
        let (iova, length) = (u64_at(octets, 8), u64_at(octets, 16));
        let page_size = u64_at(octets, 24);
        if page_size < 4096 || !page_size.is_power_of_two() {
            return refused(libc::EINVAL);
        }
        let Some(end) = iova.checked_add(length) else {
            return refused(libc::EOVERFLOW);
        };
        assert!(
            words.len() as u64 * 64 >= length.div_ceil(page_size),
            "the bitmap holds the report"
        );
        let unit = self.config.log_page_bytes;
        let Some(log) = &mut self.log else {
            return refused(libc::EINVAL);
        };
        // A unit of which only a part is asked for is told of for that part, and cleared nevertheless.
        let asked: Vec<u64> = log
            .dirty
            .range(iova / unit..end.div_ceil(unit))
            .copied()
            .collect();
        for dirty in asked {
            log.dirty.remove(&dirty);
            let (from, to) = ((dirty * unit).max(iova), ((dirty + 1) * unit).min(end));
            for bit in (from - iova) / page_size..(to - iova).div_ceil(page_size) {
                words[(bit / 64) as usize] |= 1 << (bit % 64);
            }
        }
        Ok(0)
    }

    /// Which methods a feature has: 0 if there is no such feature.
    fn methods(&self, feature: u32) -> u32 {
        let migrates = self.config.migration_flags != 0;
        let logs = self.config.log_ranges_max != 0;
        match feature {
            MIGRATION | MIG_DATA_SIZE if migrates => GET,
            MIG_DEVICE_STATE if migrates => GET | SET,
            MIG_PRECOPY_INFO_V2 if migrates && self.config.version_2 => SET,
            DMA_LOGGING_START | DMA_LOGGING_STOP if logs => SET,
            DMA_LOGGING_REPORT if logs => GET,
            _ => 0,
        }
    }

    fn feature(&mut self, parts: Parts<'_>, inner: &Arc<Mutex<Self>>) -> io::Result<i32> {
        let Parts::Struct(head, _) = &parts else {
            panic!("a structure was expected, not {parts:?}");
        };
        let (argsz, flags) = (u32_at(head, 0), u32_at(head, 4));
        assert_eq!(argsz as usize, head.len(), "argsz is the structure's size");
        let (feature, method) = (flags & 0xffff, flags & (GET | SET));
        assert_eq!(flags & !(0xffff | GET | SET | PROBE), 0, "unknown flags");
        let methods = self.methods(feature);
        if methods == 0 {
            return refused(libc::ENOTTY);
        }
        if method & !methods != 0 || (flags & PROBE == 0 && method.count_ones() != 1) {
            return refused(libc::EINVAL);
        }
        if flags & PROBE != 0 {
            return Ok(0);
        }
        match (feature, method) {
            (MIGRATION, _) => {
                let octets = structure(parts, 16);
                octets[8..].copy_from_slice(&self.config.migration_flags.to_ne_bytes());
                Ok(0)
            }
            (MIG_DATA_SIZE, _) => {
                let octets = structure(parts, 16);
                octets[8..].copy_from_slice(&self.save.stop_copy_bytes().to_ne_bytes());
                Ok(0)
            }
            (MIG_PRECOPY_INFO_V2, _) => {
                structure(parts, 8);
                self.version_2_on = true;
                Ok(0)
            }
            (MIG_DEVICE_STATE, GET) => {
                let octets = structure(parts, 16);
                octets[8..12].copy_from_slice(&(self.save.state as u32).to_ne_bytes());
                octets[12..].copy_from_slice(&(-1i32).to_ne_bytes());
                Ok(0)
            }
            (MIG_DEVICE_STATE, _) => {
                let octets = structure(parts, 16);
                let answer = self.set_state(u32_at(octets, 8), inner);
                let fd = *answer.as_ref().unwrap_or(&-1);
                octets[12..].copy_from_slice(&fd.to_ne_bytes());
                answer.map(|_| 0)
            }
            (DMA_LOGGING_START, _) => {
                let (octets, ranges) = structure_with(parts, 32, 24);
                self.log_start(octets, ranges)
            }
            (DMA_LOGGING_STOP, _) => {
                structure(parts, 8);
                self.log = None;
                Ok(0)
            }
            _ => {
                let (octets, words) = structure_with(parts, 40, 32);
                self.log_report(octets, words)
            }
        }
    }
}

struct DeviceObject {
    inner: Arc<Mutex<Inner>>,
}

impl FakeObject for DeviceObject {
    fn ioctl(&mut self, request: Request, parts: Parts<'_>) -> io::Result<i32> {
        let mut inner = locked(&self.inner);
        match request.number() {
            VFIO_DEVICE_FEATURE => inner.feature(parts, &self.inner),
            VFIO_DEVICE_RESET => {
                inner.session += 1;
                inner.enter(State::Running);
                Ok(0)
            }
            _ => refused(libc::ENOTTY),
        }
    }
}

/// The data stream of one session of a device.
struct StreamObject {
    inner: Arc<Mutex<Inner>>,
    session: u64,
}

impl FakeObject for StreamObject {
    fn ioctl(&mut self, request: Request, parts: Parts<'_>) -> io::Result<i32> {
        if request.number() != VFIO_MIG_GET_PRECOPY_INFO {
            return refused(libc::ENOTTY);
        }
        let mut inner = locked(&self.inner);
        let octets = structure(parts, 24);
        assert_eq!(u32_at(octets, 0), 24, "argsz is the structure's size");
        if self.session != inner.session {
            return refused(libc::ENODEV);
        }
        if !matches!(inner.save.state, State::PreCopy | State::PreCopyP2p) {
            return refused(libc::EINVAL);
        }
        let (initial, dirty) = inner.save.left();
        let again = inner.save.take_reinit();
        // Without version 2 the flags are what the caller left there.
        if inner.version_2_on {
            octets[4..8].copy_from_slice(&u32::from(again).to_ne_bytes());
        }
        octets[8..16].copy_from_slice(&initial.to_ne_bytes());
        octets[16..].copy_from_slice(&dirty.to_ne_bytes());
        Ok(0)
    }

    fn read(&mut self, octets: &mut [u8]) -> io::Result<usize> {
        let mut inner = locked(&self.inner);
        if self.session != inner.session {
            return refused(libc::ENODEV);
        }
        inner.save.read(octets)
    }

    fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        let mut inner = locked(&self.inner);
        if self.session != inner.session {
            return refused(libc::ENODEV);
        }
        inner.save.write(octets)
    }
}
