//! Real faults: the two programs, in network namespaces and on loopback, while links, processes, descriptors, memory and disks fail.
//!
//! ```text
//!   table.rs   fault × moment × channel, and how each may end
//!   net.rs     two namespaces, the links between them, and what happens to links
//!   play.rs    one migration of the table, from its seed
//!   judge.rs   what must hold afterwards
//! ```
//! `multifd-faults` runs them by the thousand; `tests/tests/faults.rs` runs some.

pub mod judge;
pub mod net;
pub mod play;
pub mod table;
