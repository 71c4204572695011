//! How bytes move: channels that send frames out of guest memory and receive them into it.
//!
//! A [`Channel`] is one connection. It splits into a [`SendHalf`], a [`ReceiveHalf`] and a [`Closer`], so that one thread sends,
//! another receives, and any thread can end it. This crate knows no frame format: a frame is a *head* (private bytes) and a
//! *body* (pieces of private or guest memory). Guest memory is reached through [`GuestMemory`] and its [`Span`]s only, by pointer
//! and length, never by reference.
//!
//! ```
//! use multifd_transport::memory::{self, GuestMemory, RegionLayout};
//! use multifd_transport::IoSource;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let source = GuestMemory::anonymous(&[RegionLayout { guest_address: 0, bytes: 1 << 20 }])?;
//! let target = GuestMemory::anonymous(&[RegionLayout { guest_address: 0, bytes: 1 << 20 }])?;
//! source.span(0, 4096, 5)?.copy_from(b"hello");
//!
//! let (left, right) = memory::pair(memory::PAIR_CAPACITY_DEFAULT);
//! let (mut send, _, _) = left.split();
//! let (_, mut receive, _) = right.split();
//! send.send(b"head", &[IoSource::Guest(source.span(0, 4096, 4096)?)])?;
//!
//! let mut head = [0; 4];
//! receive.receive(&mut head)?;
//! receive.receive_into(&[target.span(0, 8192, 4096)?])?;
//! let mut bytes = [0; 5];
//! target.span(0, 8192, 5)?.copy_to(&mut bytes);
//! assert_eq!((&head, &bytes), (b"head", b"hello"));
//! # Ok(())
//! # }
//! ```
//!
//! # Kinds
//!
//! | property | in memory | Unix socket, vsock | TCP | TLS (feature `tls`) | RDMA (feature `rdma`) |
//! |---|---|---|---|---|---|
//! | made by | [`memory::pair`] | [`unix::pair`], [`connect_with`], [`Listener`] | [`connect_with`], [`Listener`] | [`connect_with`], [`Listener`] | [`connect_with`], [`Listener`] |
//! | reaches | this process | this host; its virtual machines | any host | any host, over networks that are not trusted | hosts with RDMA devices |
//! | descriptor to poll | none | yes | yes | yes; [`buffered`](ReceiveHalf::buffered) bytes do not show there | none |
//! | copies of a body, both sides together, in this process | 2 (into and out of the buffer) | 0 (the kernel makes 2) | 0 (the kernel makes 2, the network card none) | 6, and the ciphers | 1 (out of the landing) |
//! | holds on the way | `capacity` | the socket's send buffer | both sockets' buffers | both sockets' buffers, and 144 KiB | the landing, 4 MiB, and 64 messages |
//! | peer's death is found out | at once | at once | by its kernel's reset; by keep-alive and user timeout if its host is gone | as TCP | by its kernel's farewell; by a send that is not acknowledged if its host is gone |
//! | [`ChannelError::Reset`], [`Lost`](ChannelError::Lost) | never | `Reset` | both | both; every end that was not announced is a `Reset` | both; `Lost` has the device's reason |
//! | dropping only the [`ReceiveHalf`] | the peer's sends fail | the peer's sends stall | the peer's sends stall | the peer's sends stall | the peer's sends fail |
//!
//! A channel over a socket that somebody else made comes from [`adopt::from_fd`], a listener from [`Listener::from_fd`]; a listener that dials, so
//! that a destination can call its source, from [`Listener::calling`].
//!
//! All kinds pass the suite in `conformance` (feature of that name), which a new kind is developed against.
//!
//! # What every kind keeps
//!
//! - One call per frame. `send` takes any number of pieces and sends all of them; `receive_into` fills all spans. The cost of a
//!   virtual call is paid per frame, and a call allocates nothing.
//! - Reading ahead is bounded by [`READ_AHEAD_BYTES`]. It saves the system calls that reading heads would cost and is never
//!   visible otherwise, but for [`ReceiveHalf::buffered`].
//! - Every wait ends: by [`set_deadline`](ReceiveHalf::set_deadline), by [`set_stall`](ReceiveHalf::set_stall), by
//!   [`Closer::shutdown`], or by the peer. Limits cost no system call while bytes flow.
//! - An error says how much was moved. A half that lost its place in the stream repeats its error for ever; one that only ran out
//!   of time before anything moved goes on working ([`ChannelError::may_retry`]).
//!
//! # RDMA
//!
//! The RDMA kind (`rdma`, feature of that name) writes bodies from registered guest memory into a *landing* of the receiving channel, and
//! copies them from there once they were admitted. So what every other kind does holds there too: nothing reaches guest memory before
//! `receive_into` was called for it. Connecting takes the [`GuestMemory`], because memory has to be registered; a clone is kept, so that the
//! mappings outlive whatever the device still reads. Half of the promises below are the kernel's on a socket, and are kept by
//! credit there: [`SendHalf::send`] returns when a device has the work, and the peer's memory has room for it.
//!
//! # Where `unsafe` is
//!
//! In `memory` (raw pointers to guest memory), `sys` (system calls on raw memory) and `rdma/sys` (verbs), nowhere else. Both give out values that safe
//! code cannot misuse: a [`Span`] borrows its memory, and a list for the kernel borrows everything it points to.

mod accept;
mod address;
pub mod adopt;
mod calling;
mod channel;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod door;
mod ended;
mod error;
mod in_memory;
mod listener;
pub mod memory;
mod options;
mod patience;
mod pulse;
#[cfg(feature = "rdma")]
pub mod rdma;
mod read_ahead;
mod resolve;
mod spawn;
mod stranger;
mod stream;
mod sys;
pub mod tcp;
#[cfg(feature = "tls")]
pub mod tls;
pub mod unix;
pub mod vsock;

pub use address::{
    Address, AddressError, AddressKind, HOST_BYTES_MAX, HostPort, UNIX_PATH_BYTES_MAX, VsockPlace,
};
pub use channel::{
    Approach, BINDING_BYTES, Channel, Closer, IoSource, READ_AHEAD_BYTES, ReceiveHalf, SendHalf,
};
pub use ended::{EndGuard, Ended, Running, ended};
pub use error::{
    AdoptError, ChannelError, ConnectAttempt, ConnectError, EstablishError, ListenError,
    Unavailable,
};
pub use listener::{Accepted, Listen, Listener};
pub use memory::{GuestMemory, Span};
pub use options::{ChannelOptions, connect, connect_with};
pub use pulse::{LOOK_MAX, Pulse, Silence};
pub use spawn::{Spawner, StdSpawner, join_within, spawn_with, thread_cpu};
pub use stranger::{STRANGER_BYTES, Stranger};
pub use tcp::{KeepAlive, TcpOptions};
