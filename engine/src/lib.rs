//! Live migration outside the VMM: one process per migration and side, to which the VMM hands over its guest's memory.
//!
//! ```text
//!     VMM ──────── Unix socket ──────── multifd-engine ═══ channels ═══ multifd-engine ──────── Unix socket ──────── VMM
//!   the guest     calls, descriptors     sends memory                    lands memory                             the guest
//! ```
//! The engine maps the guest's memory (files of memfd, tmpfs or hugetlbfs), finds dirty pages from outside, and asks the VMM for a
//! handful of things: pause, save, load, run. The stream between the engines is the one that is spoken in process.
//!
//! | module | what it is | who uses it |
//! |---|---|---|
//! | [`protocol`] | the messages on the socket, as bytes and as types | both |
//! | [`socket`] | a socket that carries messages and descriptors | both |
//! | [`link`] | calls of the engine to the VMM | the engine |
//! | [`source`], [`destination`] | the VMM as the libraries see it, over the link | the engine |
//! | [`client`] | the VMM's side for a VMM in Rust; in C it is `include/multifd_engine.h` | a VMM |
//!
//! The specification is `PROTOCOL.md` beside the crate's manifest. The rule that makes the engine's death harmless: the VMM knows at any
//! moment whether the guest is certainly its own, because it is told before the commit is sent ([`protocol::Kind::Committing`]) and keeps
//! the session's ticket; another engine can ask, or answer, with that.

#![forbid(unsafe_code)]

pub mod bitmap;
pub mod client;
pub mod destination;
pub mod link;
pub mod protocol;
pub mod socket;
pub mod source;
