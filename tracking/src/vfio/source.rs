//! The source of the pages that devices write, whatever kernel interface logs them.
//!
//! ```text
//!              start          collect                       error                   collect
//!   new ────► logging ──► read bitmap, merge ──► log restarted, then all marked ──► read bitmap …
//!                │                                     │ not restarted
//!                └── start refused ──► untracked: all marked at every collection
//! ```
//!
//! The rule: **an error never means "nothing is dirty"**. It means that everything the device can reach is, and it is
//! counted, with its `errno`. Logging is begun again *before* the pages are marked, so that no write falls between.
//!
//! Devices are tracked in pre-copy and in the final collections. With pre-copy tracking off, the log is read in the final
//! collections only.

use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::iommufd::IommufdTracker;
use super::logging::LoggingTracker;
use super::map::{DmaMap, DmaRange};
use super::reach::{Reach, mark_memory};
use super::tracker::{Bits, CallFailed, Tracker, UnmapFailed};
use super::type1::Type1Tracker;
use crate::kernel::{Kernel, Linux};
use crate::source::Counters;
use crate::{CollectPhase, Collection, DirtySet, Error, Figures, Source};

/// Times that a log is begun again after it failed. The bound keeps a device that fails each time from paying for a new log each time.
pub const RESTARTS_MAX: u32 = 3;

/// Whether a device's pages are collected while the guest runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PreCopyTracking {
    /// In pre-copy and in the final collections.
    #[default]
    On,
    /// In the final collections only: for a device that dirties so much that no round would get smaller.
    Off,
}

/// What to do where nothing tracks a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Untracked {
    /// Everything that it can reach is dirty at each collection. Correct, and dear: the downtime carries all of it.
    #[default]
    AllDirty,
    /// The migration is refused at set-up.
    Refuse,
}

/// What the user decides for one device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DmaOptions {
    /// `pre-copy-dirty-page-tracking`.
    pub pre_copy: PreCopyTracking,
    /// What to do without tracking.
    pub untracked: Untracked,
}

/// Which kernel interface logs the writes. Descriptors are duplicated and held until the source is dropped.
#[derive(Debug)]
pub enum Tracking<'a> {
    /// The device's own log.
    DeviceLog {
        /// The VFIO device.
        device: BorrowedFd<'a>,
    },
    /// The log of a type 1 container, for all devices in it.
    Type1 {
        /// The container.
        container: BorrowedFd<'a>,
    },
    /// The dirty bits of hardware page tables.
    Iommufd {
        /// The iommufd.
        iommufd: BorrowedFd<'a>,
        /// The ids of the page tables to which devices are attached, all of one address space.
        tables: Vec<u32>,
        /// The id of the address space (`IOMMU_IOAS_ALLOC`).
        ioas: u32,
    },
    /// Nothing.
    None,
}

/// The source for one device, or for all devices of one container or address space.
pub struct DmaSource {
    name: String,
    inner: Arc<Mutex<Inner>>,
    counters: Arc<Counters>,
    still: Arc<Mutex<Still>>,
    options: DmaOptions,
    unmaps: bool,
    reason: Option<String>,
}

struct Inner {
    /// What logs; nothing for a device that nothing tracks.
    tracker: Option<Box<dyn Tracker>>,
    reach: Reach,
    /// The set, between start and stop.
    set: Option<DirtySet>,
    /// Whether the kernel logs now.
    logging: bool,
    restarts: u32,
    /// The epoch in which a collection was made with the devices stopped: there is no more to come in it.
    last_pass: Option<u64>,
}

/// Tells a source that a device of its writes no more. Cloning gives another handle for the same device.
///
/// Who stops the device calls [`Stopped::stopped`] when it has reached STOP or STOP_COPY. When all devices for which there is a
/// handle stand still, the next final collection is the last one: later ones find nothing, without asking the kernel. Who does not
/// know takes no handle, and each final collection asks.
#[derive(Clone)]
pub struct Stopped {
    still: Arc<Mutex<Still>>,
    device: usize,
}

/// Which devices stand still.
#[derive(Default)]
struct Still {
    /// Odd while all do.
    epoch: u64,
    devices: Vec<bool>,
}

impl Stopped {
    /// The device stands still.
    pub fn stopped(&self) {
        let still = &mut *locked(&self.still);
        still.devices[self.device] = true;
        if still.devices.iter().all(|stopped| *stopped) {
            still.epoch |= 1;
        }
    }

    /// It may write again. To be called before it is let go.
    pub fn running(&self) {
        let still = &mut *locked(&self.still);
        still.devices[self.device] = false;
        // An odd epoch is over; an even one goes on.
        still.epoch += still.epoch % 2;
    }
}

impl std::fmt::Debug for Stopped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stopped")
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DmaSource {
    /// A source on this process's kernel. `name` is the device's (or container's) for reports.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the reason if this kind of tracking cannot be used: a device log under a guest's IOMMU,
    /// a container without a log. [`Error::Misuse`] for an empty fixed map, or pinned ranges with tracking.
    /// [`Error::Kernel`] if a descriptor is not what it should be.
    pub fn new(
        name: &str,
        tracking: Tracking<'_>,
        reach: Reach,
        options: DmaOptions,
    ) -> Result<Self, Error> {
        Self::with_kernel(Arc::new(Linux), name, tracking, reach, options)
    }

    /// As [`DmaSource::new`], with another kernel and descriptors that it knows.
    ///
    /// # Errors
    /// As [`DmaSource::new`].
    pub fn with_kernel(
        kernel: Arc<dyn Kernel>,
        name: &str,
        tracking: Tracking<'_>,
        reach: Reach,
        options: DmaOptions,
    ) -> Result<Self, Error> {
        check(name, &tracking, &reach)?;
        let unmaps = matches!(tracking, Tracking::Type1 { .. } | Tracking::Iommufd { .. });
        let tracker = tracker(kernel, tracking)?;
        let kind = tracker
            .as_ref()
            .map_or("all-dirty", |tracker| tracker.kind());
        let inner = Inner {
            tracker,
            reach,
            set: None,
            logging: false,
            restarts: 0,
            last_pass: None,
        };
        Ok(Self {
            name: format!("{kind} {name}"),
            inner: Arc::new(Mutex::new(inner)),
            counters: Arc::new(Counters::default()),
            still: Arc::default(),
            options,
            unmaps,
            reason: None,
        })
    }

    /// For who stops a device of this source's: one call for each device.
    pub fn stopped_handle(&self) -> Stopped {
        let still = &mut *locked(&self.still);
        still.devices.push(false);
        // One more device, which has not stopped yet.
        still.epoch += still.epoch % 2;
        Stopped {
            still: Arc::clone(&self.still),
            device: still.devices.len() - 1,
        }
    }

    /// For who unmaps I/O addresses. `None` where unmapping is no business of the tracking: a device's own log, or none.
    pub fn unmapper(&self) -> Option<Unmapper> {
        self.unmaps.then(|| Unmapper {
            inner: Arc::clone(&self.inner),
            counters: Arc::clone(&self.counters),
        })
    }

    /// Marks everything, because `error` left nothing better.
    fn fall_back(&self, inner: &Inner, set: &DirtySet, error: &CallFailed) -> Collection {
        self.counters.failed(&error.error);
        self.mark_all(inner, set)
    }

    fn mark_all(&self, inner: &Inner, set: &DirtySet) -> Collection {
        self.counters.all_dirty.fetch_add(1, Ordering::Relaxed);
        inner.reach.mark_all(set).unwrap_or_else(|error| {
            self.counters.failed(&error);
            mark_memory(set)
        })
    }

    fn read(&self, inner: &mut Inner, set: &DirtySet, bits: Bits) -> Collection {
        if !inner.logging {
            self.restart(inner);
            return self.mark_all(inner, set);
        }
        let Some(tracker) = inner.tracker.as_mut() else {
            return self.mark_all(inner, set);
        };
        let walked;
        let map = match &inner.reach {
            Reach::Fixed(map) => map,
            Reach::Viommu(viommu) => match Reach::walk(&**viommu, set) {
                Ok(map) => {
                    walked = map;
                    &walked
                }
                Err(error) => {
                    let error = CallFailed {
                        call: "walk of the guest's IOMMU",
                        error,
                    };
                    return self.fall_back(inner, set, &error);
                }
            },
            // Refused when the source was made.
            Reach::Pinned(_) => return self.mark_all(inner, set),
        };
        let mut sum = Collection::default();
        match tracker.read(map, bits, &mut |bitmap| sum += map.merge(bitmap, set)) {
            Ok(()) => {
                if bits == Bits::Clear {
                    self.counters.resets.fetch_add(1, Ordering::Relaxed);
                }
                sum
            }
            Err(error) => {
                // The log cannot be trusted any more.
                if let Err(error) = tracker.stop() {
                    self.counters.failed(&error.error);
                }
                inner.logging = false;
                self.restart(inner);
                let all = self.fall_back(inner, set, &error);
                sum += all;
                sum
            }
        }
    }

    /// Begins the log again, as often as that is allowed.
    fn restart(&self, inner: &mut Inner) {
        if inner.restarts >= RESTARTS_MAX {
            return;
        }
        let Some(tracker) = inner.tracker.as_mut() else {
            return;
        };
        inner.restarts += 1;
        match tracker.start(start_map(&inner.reach)) {
            Ok(()) => inner.logging = true,
            Err(error) => self.counters.failed(&error.error),
        }
    }
}

/// What cannot work, said before anything is tried.
fn check(name: &str, tracking: &Tracking<'_>, reach: &Reach) -> Result<(), Error> {
    match (tracking, reach) {
        (Tracking::DeviceLog { .. }, Reach::Viommu(_)) => Err(Error::Unsupported {
            what: format!(
                "migration of {name} under the guest's own IOMMU: the device logs by I/O address ranges that are fixed when \
                 logging begins, and the guest changes them. Let the host's IOMMU track it, or give the guest no IOMMU"
            ),
        }),
        (Tracking::None, Reach::Pinned(_)) => Ok(()),
        (_, Reach::Pinned(_)) => Err(Error::Misuse {
            what: format!("{name}: pinned ranges are for a device that nothing tracks"),
        }),
        (_, Reach::Fixed(map)) if map.ranges().is_empty() => Err(Error::Misuse {
            what: format!("{name}: a device that can reach no memory needs no source"),
        }),
        _ => Ok(()),
    }
}

fn tracker(
    kernel: Arc<dyn Kernel>,
    tracking: Tracking<'_>,
) -> Result<Option<Box<dyn Tracker>>, Error> {
    Ok(match tracking {
        Tracking::DeviceLog { device } => {
            let tracker = LoggingTracker::new(kernel, device).map_err(|error| Error::Kernel {
                call: "dup of the device",
                error,
            })?;
            Some(Box::new(tracker))
        }
        Tracking::Type1 { container } => Some(Box::new(Type1Tracker::new(kernel, container)?)),
        Tracking::Iommufd {
            iommufd,
            tables,
            ioas,
        } => Some(Box::new(IommufdTracker::new(
            kernel, iommufd, tables, ioas,
        )?)),
        Tracking::None => None,
    })
}

/// The map that a log begins with. Under a guest's IOMMU it is not needed: only containers and page tables log there.
fn start_map(reach: &Reach) -> &DmaMap {
    static EMPTY: DmaMap = DmaMap::EMPTY;
    match reach {
        Reach::Fixed(map) => map,
        Reach::Viommu(_) | Reach::Pinned(_) => &EMPTY,
    }
}

impl DmaSource {
    /// Says why it was chosen.
    pub(super) fn because(&mut self, reason: &str) {
        self.reason = Some(reason.to_owned());
    }
}

impl Source for DmaSource {
    fn name(&self) -> &str {
        &self.name
    }

    fn reason(&self) -> Option<String> {
        self.reason.clone()
    }

    fn start(&mut self, set: &DirtySet) -> Result<(), Error> {
        let mut guard = locked(&self.inner);
        let inner = &mut *guard;
        inner.reach.check(set)?;
        if inner.set.is_some() {
            return Err(Error::Misuse {
                what: format!("{} is tracked already", self.name),
            });
        }
        inner.restarts = 0;
        inner.last_pass = None;
        if let Some(tracker) = inner.tracker.as_mut() {
            match tracker.start(start_map(&inner.reach)) {
                Ok(()) => inner.logging = true,
                Err(CallFailed { call, error }) => {
                    self.counters.failed(&error);
                    // Part of it may have begun (one of several page tables). What that answers is of no interest.
                    let _ = tracker.stop();
                    if self.options.untracked == Untracked::Refuse {
                        return Err(Error::Kernel { call, error });
                    }
                }
            }
        }
        inner.set = Some(set.clone());
        Ok(())
    }

    fn collect(&mut self, set: &DirtySet, phase: CollectPhase) -> Result<Collection, Error> {
        let mut guard = locked(&self.inner);
        let inner = &mut *guard;
        if inner.set.is_none() {
            return Err(Error::Misuse {
                what: format!("{} collects only between start and stop", self.name),
            });
        }
        let begun = Instant::now();
        let epoch = locked(&self.still).epoch;
        let still = epoch % 2 == 1;
        let live = phase == CollectPhase::PreCopy;
        let skip = still && inner.last_pass == Some(epoch)
            || live && self.options.pre_copy == PreCopyTracking::Off
            // What the guest's IOMMU unmaps comes by itself; what it maps is walked when it stands still.
            || live && inner.logging && matches!(inner.reach, Reach::Viommu(_));
        if skip {
            return Ok(Collection::default());
        }
        // Bits may stay only if nothing is written any more: then they are the last ones.
        let last = still && !live;
        let bits = if last { Bits::Keep } else { Bits::Clear };
        let sum = self.read(inner, set, bits);
        if last {
            inner.last_pass = Some(epoch);
        }
        self.counters.harvested(begun, sum);
        Ok(sum)
    }

    fn stop(&mut self) -> Result<(), Error> {
        let mut inner = locked(&self.inner);
        inner.set = None;
        if !std::mem::take(&mut inner.logging) {
            return Ok(());
        }
        let Some(tracker) = inner.tracker.as_mut() else {
            return Ok(());
        };
        tracker.stop().map_err(|CallFailed { call, error }| {
            self.counters.failed(&error);
            Error::Kernel { call, error }
        })
    }

    fn figures(&self) -> Figures {
        self.counters.figures()
    }
}

impl Drop for DmaSource {
    fn drop(&mut self) {
        // Nobody is there to be told; a log that stays on costs time and loses nothing.
        let _ = self.stop();
    }
}

impl std::fmt::Debug for DmaSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DmaSource")
            .field("name", &self.name)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

/// Unmaps I/O addresses without losing what devices wrote behind them. Cloning gives another handle.
///
/// While a migration tracks a container or an address space, whoever unmaps a part of it (a guest's IOMMU, the removal
/// of memory) does it here: the kernel forgets the dirty pages of what is unmapped.
#[derive(Clone)]
pub struct Unmapper {
    inner: Arc<Mutex<Inner>>,
    counters: Arc<Counters>,
}

impl Unmapper {
    /// Unmaps a whole mapping, or several side by side: `VFIO_IOMMU_UNMAP_DMA` or `IOMMU_IOAS_UNMAP`. While tracking runs its dirty pages
    /// are in the set when this returns; otherwise it only unmaps. Waits for a collection that runs.
    ///
    /// The device must be done with the range, as a guest promises when it unmaps: a write between reading the dirty bits
    /// and unmapping would be lost in the kernel.
    ///
    /// # Errors
    /// [`Error::Kernel`] if it is still mapped; its pages are then all marked. [`Error::Misuse`] if `range` is none or has pages
    /// that are not the guest's. A bitmap that was lost is no error: the pages are all marked, and it is counted.
    pub fn unmap(&self, range: DmaRange) -> Result<(), Error> {
        let map = DmaMap::new(vec![range])?;
        let mut guard = locked(&self.inner);
        let inner = &mut *guard;
        if let Some(set) = &inner.set {
            map.check(set)?;
        }
        let tracker = inner.tracker.as_mut().ok_or_else(|| Error::Misuse {
            what: "nothing maps here".into(),
        })?;
        let mut sum = Collection::default();
        let mark = |sum: &mut Collection| {
            if let Some(set) = &inner.set {
                *sum += map.mark(set);
                self.counters.all_dirty.fetch_add(1, Ordering::Relaxed);
            }
        };
        let answer = match &inner.set {
            Some(set) if inner.logging => {
                tracker.unmap(&range, Some(&mut |bitmap| sum += map.merge(bitmap, set)))
            }
            _ => tracker.unmap(&range, None),
        };
        let answer = match answer {
            Ok(()) => {
                if !inner.logging {
                    mark(&mut sum);
                }
                Ok(())
            }
            Err(UnmapFailed::BitmapLost(CallFailed { error, .. })) => {
                self.counters.failed(&error);
                mark(&mut sum);
                Ok(())
            }
            Err(UnmapFailed::StillMapped(CallFailed { call, error })) => {
                self.counters.failed(&error);
                mark(&mut sum);
                Err(Error::Kernel { call, error })
            }
        };
        if answer.is_ok() {
            if inner.set.is_some() {
                self.counters.unmaps.fetch_add(1, Ordering::Relaxed);
            }
            if let Reach::Fixed(map) = &mut inner.reach {
                map.remove(&range);
            }
        }
        self.counters.add(sum);
        answer
    }
}

impl std::fmt::Debug for Unmapper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unmapper").finish_non_exhaustive()
    }
}
