//! A host's address translation and the devices opened behind it.
#![allow(unsafe_code)] // Justification: opening VFIO devices and mapping memory for their DMA are ioctls.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use multifd_transport::GuestMemory;
use zerocopy::{Immutable, IntoBytes};

/// `_IO(';', 100 + index)` of `linux/vfio.h`.
const fn vfio(index: u32) -> u32 {
    0x3b00 + 100 + index
}

const SET_IOMMU: u32 = vfio(2);
const GROUP_SET_CONTAINER: u32 = vfio(4);
const GROUP_GET_DEVICE_FD: u32 = vfio(6);
const IOMMU_MAP_DMA: u32 = vfio(13);
const DEVICE_BIND_IOMMUFD: u32 = vfio(18);
const DEVICE_ATTACH_IOMMUFD_PT: u32 = vfio(19);
/// `IOMMU_IOAS_ALLOC` of `linux/iommufd.h`.
const IOAS_ALLOC: u32 = 0x3b81;
/// `IOMMU_IOAS_MAP`.
const IOAS_MAP: u32 = 0x3b85;
/// `IOMMU_HWPT_ALLOC`, and its flag `IOMMU_HWPT_ALLOC_DIRTY_TRACKING`.
const HWPT_ALLOC: u32 = 0x3b89;
const ALLOC_DIRTY_TRACKING: u32 = 2;

/// `VFIO_TYPE1v2_IOMMU`.
const TYPE1_V2: u64 = 3;
/// Readable and writable: `VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE`.
const DMA_READ_WRITE: u32 = 3;
/// `IOMMU_IOAS_MAP_FIXED_IOVA | _WRITEABLE | _READABLE`.
const IOAS_FIXED_READ_WRITE: u32 = 7;

/// `struct vfio_device_bind_iommufd`.
#[repr(C)]
#[derive(Default, IntoBytes, Immutable)]
struct Bind {
    argsz: u32,
    flags: u32,
    iommufd: i32,
    out_devid: u32,
}

/// `struct vfio_device_attach_iommufd_pt`, without the process address space of newer headers.
#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct Attach {
    argsz: u32,
    flags: u32,
    pt_id: u32,
}

/// `struct vfio_iommu_type1_dma_map`.
#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct DmaMap {
    argsz: u32,
    flags: u32,
    vaddr: u64,
    iova: u64,
    size: u64,
}

/// `struct iommu_ioas_alloc`.
#[repr(C)]
#[derive(Default, IntoBytes, Immutable)]
struct IoasAlloc {
    size: u32,
    flags: u32,
    out_ioas_id: u32,
}

/// `struct iommu_ioas_map`.
#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct IoasMap {
    size: u32,
    flags: u32,
    ioas_id: u32,
    reserved: u32,
    user_va: u64,
    length: u64,
    iova: u64,
}

/// `struct iommu_hwpt_alloc` as Linux 6.7 has it.
#[repr(C)]
#[derive(Default, IntoBytes, Immutable)]
struct HwptAlloc {
    size: u32,
    flags: u32,
    dev_id: u32,
    pt_id: u32,
    out_hwpt_id: u32,
    reserved: u32,
    data_type: u32,
    data_len: u32,
    data_uptr: u64,
}

const _: () = assert!(
    size_of::<HwptAlloc>() == 40
        && size_of::<Bind>() == 16
        && size_of::<Attach>() == 12
        && size_of::<DmaMap>() == 32
        && size_of::<IoasAlloc>() == 12
        && size_of::<IoasMap>() == 40
);

/// By which door devices are opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Door {
    /// A group in a type 1 container.
    Group,
    /// A character device bound to an iommufd, attached to its address space.
    Cdev,
    /// The same, attached to a page table that tracks dirty pages.
    CdevTracked,
}

#[derive(Debug)]
enum Translation {
    Container {
        container: File,
        groups: Vec<File>,
    },
    AddressSpace {
        iommufd: File,
        ioas: u32,
        tracked: bool,
    },
}

/// The host's side: a container or an iommufd, and the memory that was mapped for devices.
#[derive(Debug)]
pub struct Host {
    // Groups are closed before the container, and memory is unmapped by closing both.
    translation: Translation,
    /// Kept until the translation is closed: devices write it.
    mapped: Vec<GuestMemory>,
}

/// A device of a [`Host`]. Close it before the host.
#[derive(Debug)]
pub struct HostDevice {
    file: File,
    id: Option<u32>,
    table: Option<u32>,
}

impl Host {
    /// Opens a container or an iommufd with an address space.
    ///
    /// # Errors
    /// The kernel's answer, `ENOENT` where it has no such thing.
    pub fn open(door: Door) -> io::Result<Self> {
        let translation = match door {
            Door::Group => Translation::Container {
                container: read_write(Path::new("/dev/vfio/vfio"))?,
                groups: Vec::new(),
            },
            Door::Cdev | Door::CdevTracked => {
                let iommufd = read_write(Path::new("/dev/iommu"))?;
                let mut alloc = IoasAlloc {
                    size: size_of::<IoasAlloc>() as u32,
                    ..IoasAlloc::default()
                };
                ioctl(&iommufd, IOAS_ALLOC, &mut alloc)?;
                Translation::AddressSpace {
                    iommufd,
                    ioas: alloc.out_ioas_id,
                    tracked: door == Door::CdevTracked,
                }
            }
        };
        Ok(Self {
            translation,
            mapped: Vec::new(),
        })
    }

    /// Opens the device at that place of sysfs, such as `/sys/bus/mdev/devices/<uuid>`.
    ///
    /// # Errors
    /// What is missing, or the kernel's answer.
    pub fn open_device(&mut self, sysfs: &Path) -> io::Result<HostDevice> {
        match &mut self.translation {
            Translation::Container { container, groups } => {
                let group = open_group(sysfs)?;
                let mut number = container.as_raw_fd();
                ioctl(&group, GROUP_SET_CONTAINER, &mut number)?;
                if groups.is_empty() {
                    ioctl_value(container, SET_IOMMU, TYPE1_V2)?;
                }
                let file = device_of(&group, sysfs)?;
                groups.push(group);
                Ok(HostDevice {
                    file,
                    id: None,
                    table: None,
                })
            }
            Translation::AddressSpace {
                iommufd,
                ioas,
                tracked,
            } => {
                let file = open_cdev(sysfs)?;
                let mut bind = Bind {
                    argsz: size_of::<Bind>() as u32,
                    iommufd: iommufd.as_raw_fd(),
                    ..Bind::default()
                };
                ioctl(&file, DEVICE_BIND_IOMMUFD, &mut bind)?;
                let table = if *tracked {
                    Some(tracking_table(iommufd, bind.out_devid, *ioas)?)
                } else {
                    None
                };
                let mut attach = Attach {
                    argsz: size_of::<Attach>() as u32,
                    flags: 0,
                    pt_id: table.unwrap_or(*ioas),
                };
                ioctl(&file, DEVICE_ATTACH_IOMMUFD_PT, &mut attach)?;
                Ok(HostDevice {
                    file,
                    id: Some(bind.out_devid),
                    table,
                })
            }
        }
    }

    /// Lets the devices read and write `bytes` bytes of a region from `offset`, at `iova`. The memory stays until the host is dropped.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if there is no such memory; the kernel's answer.
    pub fn map(
        &mut self,
        memory: &GuestMemory,
        region: u32,
        offset: u64,
        bytes: u64,
        iova: u64,
    ) -> io::Result<()> {
        let span = memory
            .span(region, offset, bytes)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        // The span's memory lives as long as the handle that is kept, and nobody has a reference into guest memory.
        let address = span.as_ptr().expose_provenance() as u64;
        self.mapped.push(memory.clone());
        match &self.translation {
            Translation::Container { container, .. } => {
                let mut map = DmaMap {
                    argsz: size_of::<DmaMap>() as u32,
                    flags: DMA_READ_WRITE,
                    vaddr: address,
                    iova,
                    size: bytes,
                };
                ioctl(container, IOMMU_MAP_DMA, &mut map).map(|_| ())
            }
            Translation::AddressSpace { iommufd, ioas, .. } => {
                let mut map = IoasMap {
                    size: size_of::<IoasMap>() as u32,
                    flags: IOAS_FIXED_READ_WRITE,
                    ioas_id: *ioas,
                    reserved: 0,
                    user_va: address,
                    length: bytes,
                    iova,
                };
                ioctl(iommufd, IOAS_MAP, &mut map).map(|_| ())
            }
        }
    }

    /// The container, if devices are opened through one.
    pub fn container(&self) -> Option<BorrowedFd<'_>> {
        match &self.translation {
            Translation::Container { container, .. } => Some(container.as_fd()),
            Translation::AddressSpace { .. } => None,
        }
    }

    /// The iommufd and its address space's id, if devices are opened through one.
    pub fn address_space(&self) -> Option<(BorrowedFd<'_>, u32)> {
        match &self.translation {
            Translation::Container { .. } => None,
            Translation::AddressSpace { iommufd, ioas, .. } => Some((iommufd.as_fd(), *ioas)),
        }
    }
}

impl HostDevice {
    /// The id that binding it to the iommufd returned.
    pub fn id(&self) -> Option<u32> {
        self.id
    }

    /// The id of the page table that tracks for it.
    pub fn table(&self) -> Option<u32> {
        self.table
    }

    /// Reads a register of 64 bits at that offset of the device's file.
    ///
    /// # Errors
    /// The device's answer.
    pub fn read_u64(&self, offset: u64) -> io::Result<u64> {
        let mut octets = [0; 8];
        self.file.read_exact_at(&mut octets, offset)?;
        Ok(u64::from_ne_bytes(octets))
    }

    /// Writes a register of 64 bits.
    ///
    /// # Errors
    /// The device's answer.
    pub fn write_u64(&self, offset: u64, value: u64) -> io::Result<()> {
        self.file.write_all_at(&value.to_ne_bytes(), offset)
    }

    /// Reads bytes at that offset of the device's file.
    ///
    /// # Errors
    /// The device's answer.
    pub fn read_at(&self, octets: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(octets, offset)
    }

    /// Writes bytes at that offset.
    ///
    /// # Errors
    /// The device's answer.
    pub fn write_at(&self, octets: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(octets, offset)
    }
}

impl AsFd for HostDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A page table over the address space, with dirty bits, for that device.
fn tracking_table(iommufd: &File, device: u32, ioas: u32) -> io::Result<u32> {
    let mut alloc = HwptAlloc {
        size: size_of::<HwptAlloc>() as u32,
        flags: ALLOC_DIRTY_TRACKING,
        dev_id: device,
        pt_id: ioas,
        ..HwptAlloc::default()
    };
    ioctl(iommufd, HWPT_ALLOC, &mut alloc)?;
    Ok(alloc.out_hwpt_id)
}

fn read_write(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}

fn open_group(sysfs: &Path) -> io::Result<File> {
    let link = sysfs.join("iommu_group");
    let group = link
        .read_link()
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", link.display())))?;
    let number = group
        .file_name()
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    read_write(&Path::new("/dev/vfio").join(number))
}

fn device_of(group: &File, sysfs: &Path) -> io::Result<File> {
    let name = sysfs
        .file_name()
        .and_then(|name| name.to_str())
        .and_then(|name| std::ffi::CString::new(name).ok())
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: the descriptor is open, and the name is a string that ends in zero and lives for the call.
    let fd = unsafe {
        libc::ioctl(
            group.as_raw_fd(),
            libc::Ioctl::from(GROUP_GET_DEVICE_FD),
            name.as_ptr(),
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel made the descriptor for this call, and nobody else knows it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn open_cdev(sysfs: &Path) -> io::Result<File> {
    let directory = sysfs.join("vfio-dev");
    let names: Vec<PathBuf> = std::fs::read_dir(&directory)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", directory.display())))?
        .filter_map(|entry| Some(PathBuf::from(entry.ok()?.file_name())))
        .collect();
    let [name] = names.as_slice() else {
        return Err(io::ErrorKind::NotFound.into());
    };
    read_write(&Path::new("/dev/vfio/devices").join(name))
}

/// One call with a structure of integers that the kernel knows the size of: by the request, or by its first field.
fn ioctl<T: IntoBytes + Immutable>(
    file: &impl AsRawFd,
    request: u32,
    structure: &mut T,
) -> io::Result<i32> {
    // SAFETY: the descriptor is open, since its owner is borrowed. Every request here takes a structure of this very type, which says its
    // size itself where the kernel asks for it, and which holds addresses of memory that its caller keeps alive.
    let answer = unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            libc::Ioctl::from(request),
            std::ptr::from_mut(structure),
        )
    };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(answer)
}

fn ioctl_value(file: &File, request: u32, value: u64) -> io::Result<i32> {
    // SAFETY: the descriptor is open; the request takes a number.
    let answer = unsafe { libc::ioctl(file.as_raw_fd(), libc::Ioctl::from(request), value) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(answer)
}
