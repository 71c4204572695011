//! How bytes move: addresses, channels of every kind, listeners, and guest memory as spans.
//!
//! A kind of one's own implements [`Channel`] with its two halves; `examples/own_channel.rs` has one.

pub use multifd_transport::memory::{MapError, RegionLayout, SpanError, pair};
#[cfg(feature = "rdma")]
pub use multifd_transport::rdma::{RdmaOptions, Registration};
#[cfg(feature = "tls")]
pub use multifd_transport::tls::{TlsClient, TlsConfigError, TlsPem, TlsServer};
pub use multifd_transport::{
    Address, AddressError, AddressKind, Channel, ChannelError, ChannelOptions, Closer,
    ConnectError, EstablishError, GuestMemory, HostPort, IoSource, KeepAlive, ListenError,
    Listener, READ_AHEAD_BYTES, ReceiveHalf, SendHalf, Span, Spawner, StdSpawner, TcpOptions,
    Unavailable, connect_with,
};
