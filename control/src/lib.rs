#![forbid(unsafe_code)]
//! A control socket: whoever owns a migration asks how far it is, is told what happens, and steers it, from outside of the program.
//!
//! ```text
//!   door      whose socket it is, who is let in, how many          client    the other end, for programs that ask
//!   session   one client: its calls, its events                    status    what is told, under the names of the reports
//!   socket    how bytes come and go, and how many at most          subject   the side that is asked
//! ```
//! It speaks [Varlink](https://varlink.org): the interface is in [`INTERFACE`], and `varlinkctl` and systemd's tools can ask for it.
//!
//! The rules it keeps: the socket is its owner's alone; nothing that a client sends costs more than a bound; and no client, however
//! slow, keeps the migration waiting: each has a thread of its own, which only looks.
//!
//! ```no_run
//! # fn with(handle: multifd_sender::Handle) -> Result<(), Box<dyn std::error::Error>> {
//! let control = multifd_control::Door::bind("/run/vm7/migration.sock".as_ref())?.serve(handle)?;
//! // … the migration ends …
//! control.end(multifd_control::End::new("migrated", None));
//! # Ok(()) }
//! ```

pub mod client;
mod door;
mod session;
mod socket;
pub mod status;
mod subject;

pub use door::{CLIENTS_MAX, Control, Door};
pub use socket::MESSAGE_BYTES_MAX;
pub use status::End;
pub use subject::Subject;

/// The interface, in Varlink's own language.
pub const INTERFACE: &str = include_str!("org.multifd.Migration.varlink");

/// Its name.
pub const NAME: &str = "org.multifd.Migration";
