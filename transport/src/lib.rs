//! How bytes move: channels that send frames out of guest memory and receive them into it.
//!
//! A [`Channel`] is one connection. It splits into a [`SendHalf`], a [`ReceiveHalf`] and a [`Closer`], so that one thread sends,
//! another receives, and any thread can end it. This crate knows no frame format: a frame is a *head* (private octets) and a
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
//! let mut octets = [0; 5];
//! target.span(0, 8192, 5)?.copy_to(&mut octets);
//! assert_eq!((&head, &octets), (b"head", b"hello"));
//! # Ok(())
//! # }
//! ```
//!
//! # Kinds
//!
//! | property | in memory | Unix socket | TCP | TLS (feature `tls`) |
//! |---|---|---|---|---|
//! | made by | [`memory::pair`] | [`unix::pair`], [`unix::connect`], [`Listener`] | [`tcp::connect`], [`Listener`] | [`connect_with`], [`Listener`] |
//! | reaches | this process | this host | any host | any host, over networks that are not trusted |
//! | descriptor to poll | none | yes | yes | yes; [`buffered`](ReceiveHalf::buffered) octets do not show there |
//! | copies of a body, both sides together, in this process | 2 (into and out of the buffer) | 0 (the kernel makes 2) | 0 (the kernel makes 2, the network card none) | 6, and the ciphers |
//! | holds on the way | `capacity` | the socket's send buffer | both sockets' buffers | both sockets' buffers, and 144 KiB |
//! | peer's death is found out | at once | at once | by its kernel's reset; by keep-alive and user timeout if its host is gone | as TCP |
//! | [`ChannelError::Reset`], [`Lost`](ChannelError::Lost) | never | `Reset` | both | both; every end that was not announced is a `Reset` |
//! | dropping only the [`ReceiveHalf`] | the peer's sends fail | the peer's sends stall | the peer's sends stall | the peer's sends stall |
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
//!   [`Closer::shutdown`], or by the peer. Limits cost no system call while octets flow.
//! - An error says how much was moved. A half that lost its place in the stream repeats its error for ever; one that only ran out
//!   of time before anything moved goes on working ([`ChannelError::may_retry`]).
//!
//! # How RDMA will fit
//!
//! An RDMA channel is one more [`Channel`] whose connecting and accepting take the [`GuestMemory`], because it needs registered
//! memory: all of it at once or chunk by chunk on demand. It keeps its own clone, so that the mappings outlive whatever the device
//! may still write. Heads and private octets go by send and receive with credits, through a pool of registered buffers. Guest
//! spans go one-sided into the *landing*, the registered parts of the regions whose keys the receiver has advertised:
//!
//! - `send(head, body)` finds the [`Place`](memory::Place) of each span ([`GuestMemory::locate`]); both sides agreed on the same
//!   regions, so the same place is where it belongs at the peer. It writes there straight from guest memory, gathering the spans,
//!   and then sends the head, with the list of places before it, on the same queue: when the head has arrived, the body has landed.
//! - `receive_into(spans)` compares the spans with that list and finds nothing left to move. A list that differs is an error of
//!   the peer. So the caller's admission of runs works unchanged, with one difference that the design of that kind must answer: the
//!   octets are there before they were admitted. Keys cover the agreed regions and nothing else, and a page that arrived wrongly is
//!   found by its checksum, as on every kind.
//! - The fence between rounds rests on octets waiting in the connection until somebody receives them. One-sided writes do not wait, so
//!   that kind needs a mark: after a frame that ends a round, the sending half writes nothing until the receiving half was called
//!   again. It is one more method of [`SendHalf`], which does nothing in the other kinds.
//! - The read-ahead holds whole received heads, so the rule that a small receive is all or nothing keeps itself.
//! - A completion with an error ends the half with [`ChannelError::Lost`] and the reason; [`Closer::shutdown`] moves the queue pair to
//!   its error state, which flushes every wait; keys are withdrawn before the call that fails returns.
//! - [`SendHalf::poll_fd`] and [`ReceiveHalf::poll_fd`] are the completion channel's descriptor.
//!
//! # Where `unsafe` is
//!
//! In `memory` (raw pointers to guest memory) and `sys` (system calls on raw memory), nowhere else. Both give out values that safe
//! code cannot misuse: a [`Span`] borrows its memory, and a list for the kernel borrows everything it points to.

mod address;
mod channel;
#[cfg(feature = "conformance")]
pub mod conformance;
mod error;
mod in_memory;
mod listener;
pub mod memory;
mod options;
mod patience;
#[cfg(feature = "rdma")]
pub mod rdma;
mod read_ahead;
mod spawn;
mod stream;
mod sys;
pub mod tcp;
#[cfg(feature = "tls")]
pub mod tls;
pub mod unix;

pub use address::{
    Address, AddressError, AddressKind, HOST_BYTES_MAX, HostPort, UNIX_PATH_BYTES_MAX,
};
pub use channel::{Channel, Closer, IoSource, READ_AHEAD_BYTES, ReceiveHalf, SendHalf};
pub use error::{
    ChannelError, ConnectAttempt, ConnectError, EstablishError, ListenError, Unavailable,
};
pub use listener::Listener;
pub use memory::{GuestMemory, Span};
pub use options::{ChannelOptions, connect, connect_with};
pub use spawn::{Spawner, StdSpawner};
pub use tcp::{KeepAlive, TcpOptions};
