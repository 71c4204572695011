//! Test machines and helpers for end-to-end tests: a model machine whose memory is plain memory, so that a whole migration
//! runs in one process, over any kind of channel, without KVM.

pub mod blotter;
pub mod bounded;
pub mod built_in;
pub mod cutting;
pub mod devices;
pub mod dma;
pub mod fake_destination;
pub mod fake_source;
pub mod faults;
pub mod flow;
pub mod host;
pub mod impaired;
pub mod links;
pub mod losing;
pub mod lost_threads;
pub mod model;
pub mod peer;
pub mod programs;
pub mod proxy;
pub mod resident;
pub mod sim;
pub mod tapped;
pub mod vfio_machine;
