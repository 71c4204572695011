//! Certificates and keys: who this side is, and whom it trusts.
//!
//! Rule: nothing is trusted that was not given. Only TLS 1.3 is spoken, and no session is resumed, so that each connection proves anew who
//! the peer is.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

/// What both sides say they speak inside TLS (ALPN), so that a server of something else on the same port is found out.
const PROTOCOL: &[u8] = b"multifd";

/// Certificates and a key as text, in PEM form.
#[derive(Clone, Default)]
pub struct TlsPem {
    /// Certificates of the authorities (CA) that sign the peers'.
    pub authorities: Option<Vec<u8>>,
    /// This side's certificate, and then whatever leads from it to the authority.
    pub certificate: Option<Vec<u8>>,
    /// The private key of this side's certificate.
    pub key: Option<Vec<u8>>,
}

/// Why certificates or keys are of no use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsConfigError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// Something that this side needs was not given.
    #[error("{0}")]
    Missing(&'static str),
    /// What was given is not PEM, or does not hold what it should.
    #[error("{what}: {text}")]
    Invalid {
        /// Which of the three.
        what: &'static str,
        /// What is wrong.
        text: String,
    },
}

impl TlsPem {
    /// Reads the files that are given.
    ///
    /// # Errors
    /// [`TlsConfigError::Read`].
    pub fn read(
        authorities: Option<&Path>,
        certificate: Option<&Path>,
        key: Option<&Path>,
    ) -> Result<Self, TlsConfigError> {
        let read = |path: Option<&Path>| {
            path.map(|path| {
                fs::read(path).map_err(|source| TlsConfigError::Read {
                    path: path.to_owned(),
                    source,
                })
            })
            .transpose()
        };
        Ok(Self {
            authorities: read(authorities)?,
            certificate: read(certificate)?,
            key: read(key)?,
        })
    }

    fn roots(&self) -> Result<Option<Arc<RootCertStore>>, TlsConfigError> {
        let Some(pem) = &self.authorities else {
            return Ok(None);
        };
        let mut roots = RootCertStore::empty();
        for certificate in certificates(pem, AUTHORITIES)? {
            roots
                .add(certificate)
                .map_err(|error| invalid(AUTHORITIES, &error))?;
        }
        Ok(Some(Arc::new(roots)))
    }

    /// Both or neither.
    fn own(
        &self,
    ) -> Result<Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>, TlsConfigError>
    {
        match (&self.certificate, &self.key) {
            (None, None) => Ok(None),
            (Some(_), None) => Err(TlsConfigError::Missing(
                "a certificate without its key: give both",
            )),
            (None, Some(_)) => Err(TlsConfigError::Missing(
                "a key without its certificate: give both",
            )),
            (Some(certificate), Some(key)) => {
                let key = PrivateKeyDer::from_pem_slice(key)
                    .map_err(|error| invalid("the key", &error))?;
                Ok(Some((certificates(certificate, "the certificate")?, key)))
            }
        }
    }
}

impl fmt::Debug for TlsPem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the key.
        f.debug_struct("TlsPem").finish_non_exhaustive()
    }
}

const AUTHORITIES: &str = "the certificate of the authority (CA)";

fn invalid(what: &'static str, error: &dyn fmt::Display) -> TlsConfigError {
    TlsConfigError::Invalid {
        what,
        text: error.to_string(),
    }
}

fn certificates(
    pem: &[u8],
    what: &'static str,
) -> Result<Vec<CertificateDer<'static>>, TlsConfigError> {
    let found: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|error| invalid(what, &error))?;
    if found.is_empty() {
        return Err(invalid(what, &"the text holds no certificate in PEM form"));
    }
    Ok(found)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// What a side that dials needs.
#[derive(Clone, Debug)]
pub struct TlsClient {
    pub(super) config: Arc<ClientConfig>,
    pub(super) server_name: Option<ServerName<'static>>,
}

impl TlsClient {
    /// Trusts the authorities given, which must be there; shows the certificate to a peer that asks for one.
    ///
    /// # Errors
    /// [`TlsConfigError`].
    pub fn new(pem: &TlsPem) -> Result<Self, TlsConfigError> {
        let roots = pem.roots()?.ok_or(TlsConfigError::Missing(
            "to connect by TLS, give the certificate of the authority (CA) that signed the peer's",
        ))?;
        let builder = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|error| invalid("TLS", &error))?
            .with_root_certificates(roots);
        let mut config = match pem.own()? {
            Some((chain, key)) => builder
                .with_client_auth_cert(chain, key)
                .map_err(|error| invalid("the certificate and its key", &error))?,
            None => builder.with_no_client_auth(),
        };
        config.resumption = Resumption::disabled();
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
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
}

/// What a side that listens needs.
#[derive(Clone, Debug)]
pub struct TlsServer {
    pub(super) config: Arc<ServerConfig>,
}

impl TlsServer {
    /// Shows the certificate, which must be there. If authorities are given, whoever connects must show a certificate that one of
    /// them signed; otherwise anybody may connect, and TLS protects only against those on the way.
    ///
    /// # Errors
    /// [`TlsConfigError`].
    pub fn new(pem: &TlsPem) -> Result<Self, TlsConfigError> {
        let (chain, key) = pem.own()?.ok_or(TlsConfigError::Missing(
            "to accept by TLS, give this side's certificate and key",
        ))?;
        let builder = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|error| invalid("TLS", &error))?;
        let builder = match pem.roots()? {
            Some(roots) => {
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
                    .build()
                    .map_err(|error| invalid(AUTHORITIES, &error))?;
                builder.with_client_cert_verifier(verifier)
            }
            None => builder.with_no_client_auth(),
        };
        let mut config = builder
            .with_single_cert(chain, key)
            .map_err(|error| invalid("the certificate and its key", &error))?;
        config.send_tls13_tickets = 0;
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
        Ok(Self {
            config: Arc::new(config),
        })
    }
}
