//! Certificates and keys as text, and what is wrong with them.
//!
//! Rule: a key is never printed.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::files::TlsFiles;

/// Certificates and a key as text, in PEM form.
#[derive(Clone, Default, PartialEq, Eq)]
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
    #[error("cannot read {}: {cause}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        cause: io::Error,
    },
    /// Something that this side needs was not given.
    #[error("{0}")]
    Missing(&'static str),
    /// A directory does not hold certificates in a way that is known.
    #[error("no certificates can be taken from the directory {}: {text}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        text: String,
    },
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
        TlsFiles {
            authorities: authorities.map(Path::to_owned),
            certificate: certificate.map(Path::to_owned),
            key: key.map(Path::to_owned),
        }
        .read()
    }

    pub(super) fn roots(&self) -> Result<Option<Arc<RootCertStore>>, TlsConfigError> {
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
    pub(super) fn own(
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
                refuse_encrypted(key)?;
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

pub(super) const AUTHORITIES: &str = "the certificate of the authority (CA)";

pub(super) fn invalid(what: &'static str, error: &dyn fmt::Display) -> TlsConfigError {
    TlsConfigError::Invalid {
        what,
        text: error.to_string(),
    }
}

/// A key that a password protects: nobody is there to be asked for it.
fn refuse_encrypted(key: &[u8]) -> Result<(), TlsConfigError> {
    let has = |mark: &[u8]| key.windows(mark.len()).any(|part| part == mark);
    // PKCS #8 (RFC 7468 section 11), and the older form of OpenSSL (RFC 1421 section 4.6.1.1).
    if has(b"BEGIN ENCRYPTED PRIVATE KEY") || has(b"Proc-Type: 4,ENCRYPTED") {
        let text = "it is protected by a password, and nobody is asked for one here: \
                    `openssl pkey -in KEY -out PLAIN` takes the password away; keep the result readable by this user only";
        return Err(invalid("the key", &text));
    }
    Ok(())
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
