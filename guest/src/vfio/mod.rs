//! Opening real VFIO devices for tests and for machines without a VMM of their own: both doors, group and character device.
//!
//! An embedder brings its own devices and needs none of this. `vfio-ioctls` would do for PCI and platform devices; it refuses others,
//! such as the sample devices of the kernel, so the few calls are made here.
//!
//! ```text
//!   Host::open(Door::Group)   /dev/vfio/vfio ◄─ set container ─ /dev/vfio/<group> ─ get device ─► HostDevice
//!   Host::open(Door::Cdev)    /dev/iommu, an address space ◄─ bind, attach ─ /dev/vfio/devices/vfioN = HostDevice
//! ```

mod host;

pub use host::{Door, Host, HostDevice};
