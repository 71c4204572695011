//! Who a side is, and whom it trusts, as configurations of rustls.
//!
//! Rule: nothing is trusted that was not given. Only TLS 1.3 is spoken, and no session is resumed, so that each connection proves anew who
//! the peer is.

use std::fmt;
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::ServerName;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{ClientConfig, ServerConfig};

use super::files::{Origin, Renewing, TlsFiles};
use super::peers::{Clients, ListedClients, ListedServers, PeerName};
use super::pem::{AUTHORITIES, TlsConfigError, TlsPem, invalid};

/// What both sides say they speak inside TLS (ALPN), so that a server of something else on the same port is found out.
const PROTOCOL: &[u8] = b"multifd";

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// What a side that dials needs.
#[derive(Clone)]
pub struct TlsClient {
    config: Arc<Renewing<ClientConfig>>,
    server_name: Option<ServerName<'static>>,
}

impl TlsClient {
    /// Trusts the authorities given, which must be there; shows the certificate to a peer that asks for one.
    ///
    /// # Errors
    /// [`TlsConfigError`].
    pub fn new(pem: &TlsPem) -> Result<Self, TlsConfigError> {
        Self::of(Origin::Pem(pem.clone()), Vec::new())
    }

    /// As [`new`](Self::new), from files that are read again for each connection, so that a certificate that is renewed on disk is shown
    /// from then on.
    ///
    /// # Errors
    /// [`TlsConfigError`]. Later on, files that cannot be used are a warning, and what was read before stays in use.
    pub fn from_files(files: TlsFiles) -> Result<Self, TlsConfigError> {
        Self::of(Origin::Files(files), Vec::new())
    }

    fn of(origin: Origin, names: Vec<PeerName>) -> Result<Self, TlsConfigError> {
        let config = Renewing::new(origin, move |pem| client(pem, &names))?;
        Ok(Self {
            config: Arc::new(config),
            server_name: None,
        })
    }

    /// Asks for this name in the peer's certificate instead of the host that is dialled.
    ///
    /// # Errors
    /// [`TlsConfigError::Invalid`] for what is neither a DNS name nor an address.
    pub fn with_server_name(mut self, name: &str) -> Result<Self, TlsConfigError> {
        let name = ServerName::try_from(name.to_owned())
            .map_err(|error| invalid("the server's name", &error))?;
        self.server_name = Some(name);
        Ok(self)
    }

    /// Asks for one of these names in the peer's certificate instead of the host that is dialled; they may be URIs (SPIFFE IDs).
    ///
    /// # Errors
    /// [`TlsConfigError::Missing`] without a name: nobody would be left.
    pub fn with_peers(self, names: Vec<PeerName>) -> Result<Self, TlsConfigError> {
        refuse_nobody(&names)?;
        Ok(Self {
            server_name: self.server_name,
            ..Self::of(self.config.origin().clone(), names)?
        })
    }

    pub(super) fn config(&self) -> Arc<ClientConfig> {
        self.config.current()
    }

    /// The name to ask the peer for when this host was dialled.
    pub(super) fn name_for(&self, host: &str) -> Result<ServerName<'static>, String> {
        match &self.server_name {
            Some(name) => Ok(name.clone()),
            None => ServerName::try_from(host.to_owned())
                .map_err(|error| format!("{host} names no server: {error}")),
        }
    }
}

fn client(pem: &TlsPem, names: &[PeerName]) -> Result<ClientConfig, TlsConfigError> {
    let roots = pem.roots()?.ok_or(TlsConfigError::Missing(
        "to connect by TLS, give the certificate of the authority (CA) that signed the peer's",
    ))?;
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| invalid("TLS", &error))?;
    let builder = if names.is_empty() {
        builder.with_root_certificates(roots)
    } else {
        let listed: Arc<dyn ServerCertVerifier> = Arc::new(ListedServers {
            roots,
            algorithms: provider().signature_verification_algorithms,
            names: names.to_vec(),
        });
        // Not less than rustls's own checks: its chain of trust, and names of ours instead of the host's.
        builder.dangerous().with_custom_certificate_verifier(listed)
    };
    let mut config = match pem.own()? {
        Some((chain, key)) => builder
            .with_client_auth_cert(chain, key)
            .map_err(|error| invalid("the certificate and its key", &error))?,
        None => builder.with_no_client_auth(),
    };
    config.resumption = Resumption::disabled();
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    Ok(config)
}

/// What a side that listens needs.
#[derive(Clone)]
pub struct TlsServer {
    config: Arc<Renewing<ServerConfig>>,
}

impl TlsServer {
    /// Shows the certificate, which must be there, and lets in whom `clients` says.
    ///
    /// # Errors
    /// [`TlsConfigError`]; [`TlsConfigError::Missing`] without an authority, unless [anybody](Clients::Anybody) may connect.
    pub fn new(pem: &TlsPem, clients: Clients) -> Result<Self, TlsConfigError> {
        Self::of(Origin::Pem(pem.clone()), clients)
    }

    /// As [`new`](Self::new), from files that are read again for each connection.
    ///
    /// # Errors
    /// As [`TlsClient::from_files`].
    pub fn from_files(files: TlsFiles, clients: Clients) -> Result<Self, TlsConfigError> {
        Self::of(Origin::Files(files), clients)
    }

    fn of(origin: Origin, clients: Clients) -> Result<Self, TlsConfigError> {
        if let Clients::Named(names) = &clients {
            refuse_nobody(names)?;
        }
        let config = Renewing::new(origin, move |pem| server(pem, &clients))?;
        Ok(Self {
            config: Arc::new(config),
        })
    }

    pub(super) fn config(&self) -> Arc<ServerConfig> {
        self.config.current()
    }
}

fn server(pem: &TlsPem, clients: &Clients) -> Result<ServerConfig, TlsConfigError> {
    let (chain, key) = pem.own()?.ok_or(TlsConfigError::Missing(
        "to accept by TLS, give this side's certificate and key",
    ))?;
    let builder = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| invalid("TLS", &error))?;
    let builder = match verifier(pem, clients)? {
        Some(verifier) => builder.with_client_cert_verifier(verifier),
        None => builder.with_no_client_auth(),
    };
    let mut config = builder
        .with_single_cert(chain, key)
        .map_err(|error| invalid("the certificate and its key", &error))?;
    config.send_tls13_tickets = 0;
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    Ok(config)
}

fn verifier(
    pem: &TlsPem,
    clients: &Clients,
) -> Result<Option<Arc<dyn ClientCertVerifier>>, TlsConfigError> {
    if *clients == Clients::Anybody {
        return Ok(None);
    }
    let roots = pem.roots()?.ok_or(TlsConfigError::Missing(
        "to know who connects by TLS, give the certificate of the authority (CA) that signed the peers'; to let anybody connect has to be asked for",
    ))?;
    let inner = WebPkiClientVerifier::builder_with_provider(roots, provider())
        .build()
        .map_err(|error| invalid(AUTHORITIES, &error))?;
    Ok(Some(match clients {
        Clients::Named(names) => Arc::new(ListedClients {
            inner,
            names: names.clone(),
        }),
        _ => inner,
    }))
}

fn refuse_nobody(names: &[PeerName]) -> Result<(), TlsConfigError> {
    if names.is_empty() {
        return Err(TlsConfigError::Missing(
            "an empty list of names of peers lets nobody in: give at least one",
        ));
    }
    Ok(())
}

impl fmt::Debug for TlsClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsClient")
            .field("server_name", &self.server_name)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for TlsServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsServer").finish_non_exhaustive()
    }
}
