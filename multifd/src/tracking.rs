//! Who reports which pages of guest memory were written.
//!
//! A migration takes any number of [`Source`]s. Whoever writes guest memory and is no vCPU marks what it wrote, after the write, with a
//! [`VmmMarker`]; vCPUs are tracked by the hypervisor (`kvm`), devices by `vfio`.

#[cfg(feature = "kvm")]
pub use multifd_tracking::kvm;
#[cfg(feature = "vfio")]
pub use multifd_tracking::vfio;
#[cfg(feature = "vm-memory")]
pub use multifd_tracking::vm_memory;
pub use multifd_tracking::{
    CollectPhase, Collection, DirtySet, Error, Figures, Run, Source, VmmMarker, VmmWrites,
};
pub use multifd_tracking::{process, scan, vhost_log};
