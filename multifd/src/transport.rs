//! How bytes move: addresses, channels of every kind, listeners, and guest memory as spans.
//!
//! A kind of one's own implements [`Channel`] with its two halves; `examples/own_channel.rs` has one.

pub use multifd_transport::adopt;
pub use multifd_transport::memory::{FileRegion, MapError, RegionLayout, SpanError, pair};
#[cfg(feature = "rdma")]
pub use multifd_transport::rdma::{RdmaOptions, Registration};
#[cfg(feature = "tls")]
pub use multifd_transport::tls::{
    Clients, PeerName, TlsClient, TlsConfigError, TlsFiles, TlsPem, TlsServer, TlsSide,
};
pub use multifd_transport::{
    Accepted, Address, AddressError, AddressKind, Channel, ChannelError, ChannelOptions, Closer,
    ConnectError, EstablishError, GuestMemory, HostPort, IoSource, KeepAlive, Listen, ListenError,
    Listener, READ_AHEAD_BYTES, ReceiveHalf, SendHalf, Span, Spawner, StdSpawner, TcpOptions,
    Unavailable, connect_with,
};
