//! Which source tracks which device, and why, from what the devices and the host's IOMMU offer and what the user wants.
//!
//! All devices behind one container (or one iommufd address space) are judged together:
//!
//! ```text
//!   every device has a log of its own, no IOMMU in the guest ──► a log for each device
//!   else the container or the page tables can log ──────────────► one source for all of them
//!   else, for each device alone:  a log of its own ─────────────► that (not with an IOMMU in the guest)
//!                                 pinned ranges are reported ───► these, at each collection
//!                                 nothing ──────────────────────► all it can reach, at each collection
//! ```
//!
//! The rule: a device that writes memory has a source, or the migration is refused with the reason.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::feature::Device;
use super::map::DmaMap;
use super::reach::{Pinned, Reach, Viommu};
use super::source::{DmaOptions, DmaSource, PreCopyTracking, Tracking, Untracked};
use super::{abi, iommufd, type1};
use crate::Error;
use crate::kernel::{Kernel, Linux};

/// The host's side of the devices' address translation.
#[derive(Debug)]
pub enum Translation<'a> {
    /// A type 1 container (`/dev/vfio/vfio`) with its IOMMU set.
    Container(BorrowedFd<'a>),
    /// An address space of an iommufd.
    AddressSpace {
        /// The iommufd.
        iommufd: BorrowedFd<'a>,
        /// The address space's id.
        ioas: u32,
        /// The page tables to which the devices are attached. Empty if they were attached to the address space itself:
        /// then there are no dirty bits to ask for.
        tables: Vec<u32>,
        /// The ids that binding the devices returned.
        devices: Vec<u32>,
    },
}

/// One device that writes guest memory.
pub struct DmaDevice<'a> {
    /// Its name in reports and reasons.
    pub name: &'a str,
    /// Its VFIO descriptor; `None` for a device that is none (it is then tracked by its translation, or not at all).
    pub device: Option<BorrowedFd<'a>>,
    /// What the user decided for it.
    pub options: DmaOptions,
    /// Says which pages its driver pins, if it can.
    pub pinned: Option<Box<dyn Pinned>>,
}

/// The devices behind one translation.
pub struct DmaGroup<'a> {
    /// Its name in reports and reasons, such as `container 0`.
    pub name: &'a str,
    /// The translation; `None` if nothing is known of it.
    pub translation: Option<Translation<'a>>,
    /// Its devices; at least one.
    pub devices: Vec<DmaDevice<'a>>,
    /// What they can reach: the mappings that were made.
    pub memory: DmaMemory,
}

/// What a group's devices can reach.
pub enum DmaMemory {
    /// The same mappings for the whole migration.
    Fixed(DmaMap),
    /// What the guest's own IOMMU maps, and all memory that it could map.
    Viommu {
        /// Tells of the mappings.
        viommu: Box<dyn Viommu>,
    },
}

/// A source that was chosen.
#[derive(Debug)]
pub struct Chosen {
    /// The source.
    pub source: DmaSource,
    /// Why it is this one, in words for the user.
    pub reason: String,
    /// The devices that it tracks.
    pub devices: Vec<String>,
}

/// How a group is tracked, before descriptors are touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plan {
    EachDevice,
    Translation,
    Mixed,
}

/// What the translation can do, with the reason.
struct Offer {
    logs: bool,
    why: String,
}

/// Chooses sources for all devices of a group.
///
/// # Errors
/// [`Error::Unsupported`] with a text that says which device can't be migrated, why, and what to do: a device log under the guest's
/// IOMMU with nothing else to track it, or a device without tracking whose user wants none such. [`Error::Misuse`] for a
/// group without devices.
pub fn choose(group: DmaGroup<'_>) -> Result<Vec<Chosen>, Error> {
    choose_with(Arc::new(Linux), group)
}

/// As [`choose`], on another kernel.
///
/// # Errors
/// As [`choose`].
pub fn choose_with(kernel: Arc<dyn Kernel>, group: DmaGroup<'_>) -> Result<Vec<Chosen>, Error> {
    let mut all = chosen(kernel, group)?;
    for one in &mut all {
        one.source.because(&one.reason);
    }
    Ok(all)
}

fn chosen(kernel: Arc<dyn Kernel>, group: DmaGroup<'_>) -> Result<Vec<Chosen>, Error> {
    if group.devices.is_empty() {
        return Err(Error::Misuse {
            what: format!("{} has no devices", group.name),
        });
    }
    let logs: Vec<bool> = group
        .devices
        .iter()
        .map(|device| {
            device
                .device
                .is_some_and(|fd| device_logs(Arc::clone(&kernel), fd))
        })
        .collect();
    let viommu = matches!(group.memory, DmaMemory::Viommu { .. });
    let offer = offer(&*kernel, group.translation.as_ref());
    let plan = if !viommu && logs.iter().all(|&logs| logs) {
        Plan::EachDevice
    } else if offer.logs {
        Plan::Translation
    } else {
        Plan::Mixed
    };
    if plan == Plan::Translation {
        return translation(kernel, group, &offer);
    }
    let DmaGroup {
        devices, memory, ..
    } = group;
    let map = match memory {
        DmaMemory::Fixed(map) => map,
        DmaMemory::Viommu { viommu } => {
            return behind_viommu(kernel, devices, &logs, &offer, viommu);
        }
    };
    devices
        .into_iter()
        .zip(logs)
        .map(|(device, logs)| one(&kernel, device, logs, &map, &offer, plan))
        .collect()
}

/// Whether the device has a log of its own.
fn device_logs(kernel: Arc<dyn Kernel>, device: BorrowedFd<'_>) -> bool {
    Device::new(kernel, device).is_ok_and(|device| {
        device.has(abi::LOGGING_START, abi::SET)
            && device.has(abi::LOGGING_STOP, abi::SET)
            && device.has(abi::LOGGING_REPORT, abi::GET)
    })
}

fn offer(kernel: &dyn Kernel, translation: Option<&Translation<'_>>) -> Offer {
    let (logs, why) = match translation {
        None => (false, "nothing is known of their address translation".into()),
        Some(Translation::Container(container)) => match type1::probe(kernel, *container) {
            Ok(support) => (
                true,
                format!("the container logs by {} bytes", support.page_bytes),
            ),
            Err(error) => (false, format!("their container has no dirty log ({error})")),
        },
        Some(Translation::AddressSpace { tables, .. }) if tables.is_empty() => (
            false,
            "they are attached to an address space without a page table that tracks (IOMMU_HWPT_ALLOC_DIRTY_TRACKING)".into(),
        ),
        Some(Translation::AddressSpace {
            iommufd, devices, ..
        }) => {
            let mut refused = None;
            for &device in devices {
                match iommufd::probe(kernel, *iommufd, device) {
                    Ok(true) => {}
                    Ok(false) => {
                        refused = Some(format!(
                            "the IOMMU behind device {device} of their iommufd has no dirty bits"
                        ));
                    }
                    Err(error) => refused = Some(format!("their iommufd does not say ({error})")),
                }
            }
            match refused {
                None => (true, "the IOMMU's page tables have dirty bits".into()),
                Some(why) => (false, why),
            }
        }
    };
    Offer { logs, why }
}

/// One source for all devices of the group.
fn translation(
    kernel: Arc<dyn Kernel>,
    group: DmaGroup<'_>,
    offer: &Offer,
) -> Result<Vec<Chosen>, Error> {
    let names: Vec<String> = group
        .devices
        .iter()
        .map(|device| device.name.to_owned())
        .collect();
    let off = |device: &DmaDevice<'_>| device.options.pre_copy == PreCopyTracking::Off;
    // The log is one for all: it is read in pre-copy as soon as one device is to be tracked there.
    let (off_count, all) = (group.devices.iter().filter(|d| off(d)).count(), names.len());
    let refuse = |device: &DmaDevice<'_>| device.options.untracked == Untracked::Refuse;
    let options = DmaOptions {
        pre_copy: if off_count == all {
            PreCopyTracking::Off
        } else {
            PreCopyTracking::On
        },
        untracked: if group.devices.iter().any(refuse) {
            Untracked::Refuse
        } else {
            Untracked::AllDirty
        },
    };
    let mut reason = format!("{}: {}", list(&names), offer.why);
    let reach = match group.memory {
        DmaMemory::Fixed(map) => Reach::Fixed(map),
        DmaMemory::Viommu { viommu } => {
            reason += "; the guest has an IOMMU: what it unmaps hands back its dirty pages, what is mapped at the stop is \
                       walked";
            Reach::Viommu(viommu)
        }
    };
    if options.pre_copy == PreCopyTracking::Off {
        reason += "; pre-copy-dirty-page-tracking is off: final collection only";
    } else if off_count > 0 {
        reason += "; pre-copy-dirty-page-tracking is off for some, which one log for all cannot tell apart";
    }
    let tracking = match group.translation {
        Some(Translation::Container(container)) => Tracking::Type1 { container },
        Some(Translation::AddressSpace {
            iommufd,
            ioas,
            tables,
            ..
        }) => Tracking::Iommufd {
            iommufd,
            tables,
            ioas,
        },
        None => Tracking::None,
    };
    let source = DmaSource::with_kernel(kernel, group.name, tracking, reach, options)?;
    Ok(vec![Chosen {
        source,
        reason,
        devices: names,
    }])
}

/// Devices under the guest's IOMMU that the host's IOMMU does not track.
fn behind_viommu(
    kernel: Arc<dyn Kernel>,
    devices: Vec<DmaDevice<'_>>,
    logs: &[bool],
    offer: &Offer,
    viommu: Box<dyn Viommu>,
) -> Result<Vec<Chosen>, Error> {
    if let Some((device, _)) = devices.iter().zip(logs).find(|(_, logs)| **logs) {
        return Err(Error::Unsupported {
            what: format!(
                "migration of {} under the guest's own IOMMU: the device logs by I/O address ranges that are fixed when logging \
                 begins, and {}. Let the host's IOMMU track it, or give the guest no IOMMU",
                device.name, offer.why
            ),
        });
    }
    let names: Vec<String> = devices
        .iter()
        .map(|device| device.name.to_owned())
        .collect();
    refuse_untracked(&devices, offer)?;
    let off = devices
        .iter()
        .all(|device| device.options.pre_copy == PreCopyTracking::Off);
    let options = DmaOptions {
        pre_copy: if off {
            PreCopyTracking::Off
        } else {
            PreCopyTracking::On
        },
        untracked: Untracked::AllDirty,
    };
    let source = DmaSource::with_kernel(
        kernel,
        &list(&names),
        Tracking::None,
        Reach::Viommu(viommu),
        options,
    )?;
    Ok(vec![Chosen {
        source,
        reason: format!(
            "{}: nothing tracks them ({}), and the guest's IOMMU may map anything: all memory counts as dirty",
            list(&names),
            offer.why
        ),
        devices: names,
    }])
}

fn refuse_untracked(devices: &[DmaDevice<'_>], offer: &Offer) -> Result<(), Error> {
    let refusing = |device: &&DmaDevice<'_>| device.options.untracked == Untracked::Refuse;
    match devices.iter().find(refusing) {
        None => Ok(()),
        Some(device) => Err(Error::Unsupported {
            what: format!(
                "migration of {}: it has no log of the pages that it writes, and {}. Allow that all it can reach counts as dirty, \
                 or take the device away first",
                device.name, offer.why
            ),
        }),
    }
}

/// A source for one device by itself.
fn one(
    kernel: &Arc<dyn Kernel>,
    device: DmaDevice<'_>,
    logs: bool,
    map: &DmaMap,
    offer: &Offer,
    plan: Plan,
) -> Result<Chosen, Error> {
    let name = device.name.to_owned();
    let mut reason;
    let (tracking, reach) = match device.device {
        Some(fd) if logs => {
            reason = format!("{name}: the device has a log of its own");
            if plan == Plan::Mixed {
                reason += ", others of its group have none";
            }
            (
                Tracking::DeviceLog { device: fd },
                Reach::Fixed(map.clone()),
            )
        }
        _ => {
            refuse_untracked(std::slice::from_ref(&device), offer)?;
            reason = format!("{name}: nothing tracks it ({})", offer.why);
            let reach = match device.pinned {
                Some(pinned) => {
                    reason += ": the pages that its driver pins count as dirty each time";
                    Reach::Pinned(pinned)
                }
                None => {
                    reason += ": all that it can reach counts as dirty each time";
                    Reach::Fixed(map.clone())
                }
            };
            (Tracking::None, reach)
        }
    };
    if device.options.pre_copy == PreCopyTracking::Off {
        reason += "; pre-copy-dirty-page-tracking is off: final collection only";
    }
    let source =
        DmaSource::with_kernel(Arc::clone(kernel), &name, tracking, reach, device.options)?;
    Ok(Chosen {
        source,
        reason,
        devices: vec![name],
    })
}

fn list(names: &[String]) -> String {
    names.join(", ")
}

impl fmt::Debug for DmaDevice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaDevice")
            .field("name", &self.name)
            .field("device", &self.device)
            .field("options", &self.options)
            .field("pinned", &self.pinned.is_some())
            .finish()
    }
}
