//! What kinds of channel need besides an address, for connecting and listening by address alone.

use std::sync::Arc;
use std::time::Instant;

use crate::address::Address;
use crate::channel::Channel;
use crate::error::{ConnectError, Unavailable};
use crate::resolve::Resolver;
use crate::spawn::Spawner;
use crate::tcp::{self, TcpOptions};
#[cfg(feature = "tls")]
use crate::tls::{TlsClient, TlsServer};
use crate::unix::{self, UnixOptions};
use crate::vsock;

/// Settings of all kinds; those of a kind that is not used may be left out.
///
/// Clones share what is remembered of host names: which of its addresses worked last, so that the next channel tries it first.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct ChannelOptions {
    /// For TCP, and for the TCP connection below TLS.
    pub tcp: TcpOptions,
    /// For connecting by TLS.
    #[cfg(feature = "tls")]
    pub tls_client: Option<TlsClient>,
    /// For accepting by TLS.
    #[cfg(feature = "tls")]
    pub tls_server: Option<TlsServer>,
    /// For RDMA.
    #[cfg(feature = "rdma")]
    pub rdma: crate::rdma::RdmaOptions,
    /// For listening on a Unix socket.
    pub unix: UnixOptions,
    pub(crate) resolver: Resolver,
}

impl ChannelOptions {
    /// Has the threads that connecting and listening need started by `spawner`: to look a host name up (`mfd-resolve`), and to dial on
    /// behalf of a listener (`mfd-call`). Without this they are started plainly.
    #[must_use]
    pub fn with_spawner(mut self, spawner: Arc<dyn Spawner>) -> Self {
        self.resolver = Resolver::new(spawner);
        self
    }
}

impl From<TcpOptions> for ChannelOptions {
    fn from(tcp: TcpOptions) -> Self {
        Self {
            tcp,
            ..Self::default()
        }
    }
}

/// Connects to an address of whatever kind; `options` are for TCP. TLS and RDMA need more: see [`connect_with`].
///
/// # Errors
/// [`ConnectError`].
pub fn connect(
    address: &Address,
    options: &TcpOptions,
    deadline: Instant,
) -> Result<Box<dyn Channel>, ConnectError> {
    connect_with(address, &options.clone().into(), deadline)
}

/// Connects to an address of whatever kind. The channel is complete: handshakes are done.
///
/// # Errors
/// [`ConnectError`]; [`ConnectError::Unavailable`] if this side lacks what the kind needs, which is found out before anything is
/// sent.
pub fn connect_with(
    address: &Address,
    options: &ChannelOptions,
    deadline: Instant,
) -> Result<Box<dyn Channel>, ConnectError> {
    let unavailable = |cause| ConnectError::Unavailable {
        target: address.to_string(),
        cause,
    };
    match address {
        Address::Tcp(target) => tcp::connect_with(
            target,
            &options.tcp,
            &options.resolver,
            deadline,
            tcp::channel,
        ),
        Address::Unix(path) => unix::connect(path, deadline),
        Address::Vsock(place) => vsock::connect(*place, deadline),
        #[cfg(feature = "tls")]
        Address::Tls(target) => match &options.tls_client {
            Some(client) => crate::tls::connect_with(target, client, options, deadline),
            None => Err(unavailable(NO_AUTHORITY)),
        },
        #[cfg(not(feature = "tls"))]
        Address::Tls(_) => Err(unavailable(NO_TLS)),
        #[cfg(feature = "rdma")]
        Address::Rdma(target) => crate::rdma::connect_with(target, options, deadline),
        #[cfg(not(feature = "rdma"))]
        Address::Rdma(_) => Err(unavailable(NO_RDMA)),
    }
}

/// The answer to who dials by TLS and trusts nobody.
#[cfg(feature = "tls")]
pub(crate) const NO_AUTHORITY: Unavailable = Unavailable::NotConfigured {
    kind: "TLS",
    what: "the certificate of the authority that signed the peer's (CA)",
};

/// The answer of a build without TLS.
#[cfg(not(feature = "tls"))]
pub(crate) const NO_TLS: Unavailable = Unavailable::NotBuilt {
    kind: "TLS",
    feature: "tls",
};

/// The answer of a build without RDMA.
#[cfg(not(feature = "rdma"))]
pub(crate) const NO_RDMA: Unavailable = Unavailable::NotBuilt {
    kind: "RDMA",
    feature: "rdma",
};
