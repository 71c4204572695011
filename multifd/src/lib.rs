//! Live migration of virtual machines over many channels at once, as a library that a VMM embeds.
//!
//! Memory moves by pre-copy: while the guest runs, all of its memory is sent (round 0), then in each further round (iteration) what it
//! dirtied meanwhile, until what is left fits into the downtime limit. Then the guest is paused, the rest and the VM state are sent,
//! and it runs at the destination. Whatever fails before that leaves it running at the source; afterwards it never runs there again.
//!
//! | what | at the source | at the destination |
//! |---|---|---|
//! | what the VMM implements | [`source::Vmm`] | [`destination::Vmm`] |
//! | what it starts | [`source::Migration`] | [`destination::Reception`] |
//! | devices with state of their own | [`source::DeviceSource`] | [`destination::DeviceSink`] |
//! | proof that the guest may run | [`source::Reclaimed`] | [`destination::Ownership`] |
//!
//! [`transport`] has channels and guest memory, [`tracking`] the sources of dirty pages. [`Blob`], [`VmmError`] and [`DeviceError`] are the
//! same on both sides.
//!
//! # A migration inside one process
//!
//! Two machines that are nothing but memory; `examples/` has the same with writers, over TCP, with devices, and with a channel of one's own.
//!
//! ```
//! use multifd::transport::{GuestMemory, RegionLayout, pair};
//! use multifd::{Blob, Layout, VmmError, destination, source, tracking};
//!
//! /// The machine that leaves: it has nothing but memory.
//! struct Leaving;
//!
//! impl source::Vmm for Leaving {
//!     fn config(&mut self) -> Result<Vec<Blob>, VmmError> { Ok(vec![Blob::new(1, 1, "one CPU")]) }
//!     fn pause(&mut self) -> Result<(), VmmError> { Ok(()) }
//!     fn save(&mut self) -> Result<Vec<Blob>, VmmError> { Ok(vec![Blob::new(2, 1, "its registers")]) }
//!     fn resume(&mut self, _: source::Reclaimed) -> Result<(), VmmError> { Ok(()) }
//! }
//!
//! /// The machine that arrives.
//! #[derive(Default)]
//! struct Arriving { memory: Option<GuestMemory>, runs: bool }
//!
//! impl destination::Vmm for Arriving {
//!     fn prepare(&mut self, _: Vec<Blob>, layout: &Layout) -> Result<GuestMemory, VmmError> {
//!         let regions: Vec<_> = layout.regions().map(|region| RegionLayout {
//!             guest_address: region.guest_address,
//!             bytes: region.bytes,
//!         }).collect();
//!         let memory = GuestMemory::anonymous(&regions).map_err(VmmError::new)?;
//!         self.memory = Some(memory.clone());
//!         Ok(memory)
//!     }
//!     fn load(&mut self, _: Vec<Blob>) -> Result<(), VmmError> { Ok(()) }
//!     fn resume(&mut self, _: destination::Ownership) -> Result<(), VmmError> { self.runs = true; Ok(()) }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let memory = GuestMemory::anonymous(&[RegionLayout { guest_address: 0, bytes: 8 << 20 }])?;
//! memory.span(0, 4096, 5)?.copy_from(b"hello");
//!
//! let reception = destination::Reception::start(destination::Parts::new(Arriving::default()))?;
//! let there = reception.handle();
//! // Each channel is a pair in memory, of which the destination is handed the other end.
//! let dial = source::dial_by(move |_, _| {
//!     let (ours, theirs) = pair(1 << 20);
//!     there.offer(theirs)?;
//!     Ok(ours)
//! });
//! let writes = tracking::VmmWrites::new(); // whoever writes guest memory marks it with `writes.marker()`
//! let migration = source::Migration::start(source::Parts::new(Leaving, memory, dial).source(writes))?;
//!
//! let left = migration.wait();
//! let arrived = reception.wait();
//! assert_eq!(left.report.outcome, source::OutcomeKind::Migrated);
//! // Both sides give the VMM back as what it is.
//! let machine: Arriving = arrived.vmm.ok_or("it did not come back")?;
//! assert!(machine.runs);
//! let mut words = [0; 5];
//! machine.memory.expect("prepared").span(0, 4096, 5)?.copy_to(&mut words);
//! assert_eq!(&words, b"hello");
//! # Ok(())
//! # }
//! ```
//!
//! # Features
//!
//! | feature | what it brings |
//! |---|---|
//! | `kvm` (default) | `tracking::kvm`: KVM's dirty ring and dirty log; without it the library builds for other hypervisors |
//! | `vfio` | VFIO devices: their state, and `tracking::vfio` for the pages that they write |
//! | `vm-memory` | guest memory and bitmaps of rust-vmm's `vm-memory` |
//! | `tls`, `rdma` | these kinds of channel |
//!
//! # Threads
//!
//! Everything blocks in threads of its own, which a [`transport::Spawner`] of the embedder may start (names, seccomp filters, CPU
//! affinity). A VMM with an event loop polls [`source::Migration::ended`], an event descriptor.

#![forbid(unsafe_code)]

pub mod destination;
pub mod source;
pub mod tracking;
pub mod transport;

pub use bytes::Bytes;
pub use multifd_session::common::{Blob, DeviceError, Error, Failure, StartError, VmmError};
pub use multifd_wire::frame::{Device, DeviceFlags};
pub use multifd_wire::{
    ChannelRef, DeviceState, LaneId, Layout, PAGE_BYTES, Phase, Reason, Region, RegionId,
};
