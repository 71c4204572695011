//! Who may be the peer: names that its certificate must be for, beyond being signed by an authority that was given.
//!
//! Rule: rustls checks the chain, the dates and the signature; here it is only asked for whom the certificate is. One of the names is enough.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore,
    SignatureScheme,
};
use webpki::EndEntityCert;

use super::pem::{TlsConfigError, invalid};

/// A name in a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerName(Name);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Name {
    /// A DNS name or an address.
    Host(ServerName<'static>),
    /// A URI, such as a SPIFFE ID, compared byte by byte.
    Uri(String),
}

impl FromStr for PeerName {
    type Err = TlsConfigError;

    /// A text with `://` is a URI (`spiffe://cluster.example/ns/vms/sa/migration`), and everything else a DNS name or an address.
    fn from_str(text: &str) -> Result<Self, TlsConfigError> {
        const WHAT: &str = "the name of a peer";
        if text.contains("://") {
            let printable = text.bytes().all(|octet| octet.is_ascii_graphic());
            return match printable {
                true => Ok(Self(Name::Uri(text.to_owned()))),
                false => Err(invalid(WHAT, &"a URI has printable ASCII characters only")),
            };
        }
        let name = ServerName::try_from(text.to_owned())
            .map_err(|_| invalid(WHAT, &"it is neither a host name (dest.example) nor an address nor a URI (spiffe://domain/path)"))?;
        Ok(Self(Name::Host(name)))
    }
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Name::Host(name) => f.write_str(&name.to_str()),
            Name::Uri(uri) => f.write_str(uri),
        }
    }
}

/// Who may connect to a side that listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Clients {
    /// Whoever shows a certificate that an authority given signed.
    OfAuthority,
    /// Of those, whoever's certificate is for one of these names.
    Named(Vec<PeerName>),
    /// Anybody. TLS then protects against those on the way only: whoever reaches the port may be the source, and what he
    /// sends becomes a guest.
    Anybody,
}

fn check(certificate: &CertificateDer<'_>, wanted: &[PeerName]) -> Result<(), Error> {
    let bad = |_| Error::InvalidCertificate(CertificateError::BadEncoding);
    let parsed = EndEntityCert::try_from(certificate).map_err(bad)?;
    let fits = |name: &PeerName| match &name.0 {
        Name::Host(host) => parsed.verify_is_valid_for_subject_name(host).is_ok(),
        Name::Uri(uri) => parsed.valid_uri_names().any(|presented| presented == uri),
    };
    if wanted.iter().any(fits) {
        return Ok(());
    }
    let presented = parsed.valid_dns_names().chain(parsed.valid_uri_names());
    let other = NotNamed {
        // A certificate is the peer's text.
        presented: presented
            .take(NAMES_SHOWN_MAX)
            .map(|name| name.escape_debug().to_string())
            .collect(),
        wanted: wanted.iter().map(PeerName::to_string).collect(),
    };
    let other = CertificateError::Other(OtherError(Arc::new(other)));
    Err(Error::InvalidCertificate(other))
}

/// Names of a peer's certificate that a text shows, at most.
const NAMES_SHOWN_MAX: usize = 8;

/// The certificate is good, and for somebody else.
#[derive(Debug)]
struct NotNamed {
    presented: Vec<String>,
    wanted: Vec<String>,
}

impl fmt::Display for NotNamed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let presented = match self.presented.as_slice() {
            [] => "no name that is compared here".to_owned(),
            names => names.join(", "),
        };
        write!(
            f,
            "it is for {presented}, and the peer may only be: {}",
            self.wanted.join(", ")
        )
    }
}

impl std::error::Error for NotNamed {}

/// Checks a server's certificate against names that were listed instead of the host that was dialled.
#[derive(Debug)]
pub(super) struct ListedServers {
    pub(super) roots: Arc<RootCertStore>,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
    pub(super) names: Vec<PeerName>,
}

impl ServerCertVerifier for ListedServers {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &self.roots,
            intermediates,
            now,
            self.algorithms.all,
        )?;
        check(end_entity, &self.names)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Checks a client's certificate as rustls does, and then its names.
#[derive(Debug)]
pub(super) struct ListedClients {
    pub(super) inner: Arc<dyn ClientCertVerifier>,
    pub(super) names: Vec<PeerName>,
}

impl ClientCertVerifier for ListedClients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self
            .inner
            .verify_client_cert(end_entity, intermediates, now)?;
        check(end_entity, &self.names)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
