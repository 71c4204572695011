//! The built-in guest: what the binaries migrate when no VMM embeds the library.
//!
//! It is a small real KVM machine: one to sixteen virtual CPUs in 64-bit mode, each writing its share of a working set
//! at a given rate, stamping every write with an ever-growing counter, logging it in guest memory, and reporting by
//! port I/O. Where there is no `/dev/kvm` the same work is done by threads of this process on a plain mapping, and the
//! guest says so ([`Guest::kind`]).
//!
//! ```text
//!   source:       Guest::create(&config) ─ run ─ … pre-copy … ─ pause ─ save_state
//!                      │ config_blob                                       │
//!   destination:  Guest::create_empty(&Config::from_blob) ─ memory ─ … ─ load_state ─ run
//!                                                                             └─ check
//! ```
//!
//! **The proof.** [`Guest::check`] compares *every word* of a paused guest's memory with what it must be: pages that are
//! never written with what they held at the start, and the others with what follows from the counters, which are
//! registers and travel outside the memory. Nothing is remembered on the host, so it works on either side. A page that
//! is one store old fails.
//!
//! **Who writes the memory.** The guest, and before its first start this crate (the image) or the destination's
//! receiver. Nobody on the host writes it afterwards, since KVM does not report such writes; but for the device of a guest
//! that is to show just that ([`Device`]).
//!
//! ```
//! use multifd_guest::{Config, Guest};
//!
//! let config = Config { memory_bytes: 64 << 20, working_set_bytes: 8 << 20, ..Config::default() };
//! let source = Guest::create(&config)?;
//! source.run()?;
//! source.pause()?;
//!
//! // A destination: the same machine, the memory moved (here by copying), the state loaded.
//! let destination = Guest::create_empty(&Config::from_blob(&source.config_blob())?)?;
//! let (from, to) = (source.memory(), destination.memory());
//! let mut words = vec![0; 512];
//! for region in from.regions() {
//!     for page in (0..region.bytes).step_by(4096) {
//!         from.read_words(region.guest_address + page, &mut words)?;
//!         to.write_words(region.guest_address + page, &words)?;
//!     }
//! }
//! destination.load_state(&source.save_state()?)?;
//! assert!(destination.check()?.passed());
//! destination.run()?;
//! # Ok::<(), multifd_guest::Error>(())
//! ```

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("the built-in guest is an x86-64 KVM machine: build it on Linux on x86-64");

mod asm;
mod beat;
mod blob;
mod check;
mod codec;
mod config;
mod crew;
mod device;
mod error;
mod gate;
mod guest;
mod image;
mod kick;
mod layout;
mod machine;
mod memory;
mod model_device;
mod pace;
mod prepare;
mod process;
mod program;
mod slots;
mod state;
mod tracking;
mod vcpu;
mod vcpu_state;
#[cfg(feature = "vfio")]
pub mod vfio;
mod workload;

pub use beat::Heartbeat;
pub use blob::{BLOB_KIND, CONFIG_BLOB_BYTES};
pub use check::{CheckReport, FAILURES_MAX};
pub use config::{
    Config, Device, Fill, MEMORY_BYTES_MAX, MEMORY_BYTES_MIN, PAGE_BYTES, Pattern, Tracking,
    VCPUS_MAX,
};
pub use error::{Error, Result};
pub use guest::{Guest, Kind, PAUSE_MS_MAX};
pub use memory::{Memory, MemoryRegion};
pub use model_device::{
    DEVICE_CONFIG_BYTES_MAX, DEVICE_STATE_BYTES_MAX, DEVICE_STATE_BYTES_MIN, DEVICES_BLOB_KIND,
    DeviceConfig, DeviceConfigError, DeviceFailure, DeviceFault, DevicePreCopy, DeviceProbe,
    DeviceRead, Dma, ModelDevice,
};
pub use prepare::{Preparation, Preparing};
