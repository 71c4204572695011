//! Certificates and keys in files, which are renewed while the program runs.
//!
//! Rule: the files are read again whenever a connection is made or accepted, a few kilobytes each, and not only when their times say
//! so: times are coarse, and links are swapped. What cannot be used, such as a certificate whose key is not written yet, changes nothing: what
//! was good before stays in use, with a warning.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::pem::{TlsConfigError, TlsPem};

/// Where certificates and a key are kept, in PEM form.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificates of the authorities (CA) that sign the peers'.
    pub authorities: Option<PathBuf>,
    /// This side's certificate, and then whatever leads from it to the authority.
    pub certificate: Option<PathBuf>,
    /// The private key of this side's certificate.
    pub key: Option<PathBuf>,
}

/// Which side's certificate is looked for in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsSide {
    /// The one that dials.
    Client,
    /// The one that accepts.
    Server,
}

/// How the field lays certificates out in a directory: authorities, certificate, key.
const LAYOUTS: [(&str, TlsSide, [&str; 3]); 4] = [
    (
        "QEMU",
        TlsSide::Client,
        ["ca-cert.pem", "client-cert.pem", "client-key.pem"],
    ),
    (
        "QEMU",
        TlsSide::Server,
        ["ca-cert.pem", "server-cert.pem", "server-key.pem"],
    ),
    (
        "Kubernetes",
        TlsSide::Client,
        ["ca.crt", "tls.crt", "tls.key"],
    ),
    (
        "Kubernetes",
        TlsSide::Server,
        ["ca.crt", "tls.crt", "tls.key"],
    ),
];

impl TlsFiles {
    /// The files of one side in a directory that is laid out as QEMU's (`ca-cert.pem`, and `server-cert.pem` with `server-key.pem` or
    /// `client-cert.pem` with `client-key.pem`) or as a Kubernetes secret (`ca.crt`, `tls.crt`, `tls.key`).
    ///
    /// # Errors
    /// [`TlsConfigError::Directory`] if it is laid out neither way, both ways, or lacks a file. A client's certificate and key may
    /// both be left out.
    pub fn in_directory(directory: &Path, side: TlsSide) -> Result<Self, TlsConfigError> {
        let failed = |text: String| TlsConfigError::Directory {
            path: directory.to_owned(),
            text,
        };
        let is_there = |name: &str| directory.join(name).exists();
        let found: Vec<_> = LAYOUTS
            .iter()
            .filter(|(_, of, files)| *of == side && is_there(files[0]))
            .collect();
        let (layout, [authorities, certificate, key]) = match found.as_slice() {
            [(layout, _, files)] => (layout, files),
            [] => {
                return Err(failed(
                    "there is neither ca-cert.pem (as QEMU has it) nor ca.crt (as Kubernetes has it)"
                        .to_owned(),
                ));
            }
            _ => {
                return Err(failed(
                    "there are both ca-cert.pem (QEMU) and ca.crt (Kubernetes): remove one set"
                        .to_owned(),
                ));
            }
        };
        let own = match (is_there(certificate), is_there(key), side) {
            (true, true, _) => true,
            (false, false, TlsSide::Client) => false,
            (there, _, _) => {
                let missing = if there { key } else { certificate };
                return Err(failed(format!(
                    "it is laid out as {layout} has it, and {missing} is missing"
                )));
            }
        };
        Ok(Self {
            authorities: Some(directory.join(authorities)),
            certificate: own.then(|| directory.join(certificate)),
            key: own.then(|| directory.join(key)),
        })
    }

    /// Reads them.
    ///
    /// # Errors
    /// [`TlsConfigError::Read`].
    pub fn read(&self) -> Result<TlsPem, TlsConfigError> {
        let read = |path: &Option<PathBuf>| {
            path.as_ref()
                .map(|path| {
                    fs::read(path).map_err(|cause| TlsConfigError::Read {
                        path: path.clone(),
                        cause,
                    })
                })
                .transpose()
        };
        Ok(TlsPem {
            authorities: read(&self.authorities)?,
            certificate: read(&self.certificate)?,
            key: read(&self.key)?,
        })
    }
}

/// Where a side's certificates come from.
#[derive(Clone, Debug)]
pub(super) enum Origin {
    /// Given once.
    Pem(TlsPem),
    /// Read again at each use.
    Files(TlsFiles),
}

impl Origin {
    fn read(&self) -> Result<TlsPem, TlsConfigError> {
        match self {
            Self::Pem(pem) => Ok(pem.clone()),
            Self::Files(files) => files.read(),
        }
    }
}

/// How a configuration is made of certificates.
type Build<C> = dyn Fn(&TlsPem) -> Result<C, TlsConfigError> + Send + Sync;

/// A configuration of rustls that follows its files.
pub(super) struct Renewing<C> {
    origin: Origin,
    build: Box<Build<C>>,
    kept: Mutex<Kept<C>>,
}

struct Kept<C> {
    config: Arc<C>,
    /// What `config` was made of.
    pem: TlsPem,
    /// What is wrong with what is in the files now, so that it is said once.
    complaint: Option<String>,
}

impl<C> Renewing<C> {
    pub(super) fn new(
        origin: Origin,
        build: impl Fn(&TlsPem) -> Result<C, TlsConfigError> + Send + Sync + 'static,
    ) -> Result<Self, TlsConfigError> {
        let pem = origin.read()?;
        let kept = Kept {
            config: Arc::new(build(&pem)?),
            pem,
            complaint: None,
        };
        Ok(Self {
            origin,
            build: Box::new(build),
            kept: Mutex::new(kept),
        })
    }

    pub(super) fn origin(&self) -> &Origin {
        &self.origin
    }

    /// The newest configuration that can be used.
    pub(super) fn current(&self) -> Arc<C> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Origin::Files(files) = &self.origin {
            let renewed = files.read().and_then(|pem| {
                let changed = pem != kept.pem;
                let config = changed.then(|| (self.build)(&pem)).transpose()?;
                Ok(config.map(|config| (config, pem)))
            });
            match renewed {
                Ok(None) => kept.complaint = None,
                Ok(Some((config, pem))) => {
                    tracing::info!(files = %Names(files), "certificates were renewed");
                    *kept = Kept {
                        config: Arc::new(config),
                        pem,
                        complaint: None,
                    };
                }
                Err(error) => kept.complain(files, &error),
            }
        }
        Arc::clone(&kept.config)
    }
}

impl<C> Kept<C> {
    fn complain(&mut self, files: &TlsFiles, error: &TlsConfigError) {
        let text = error.to_string();
        if self.complaint.as_ref() != Some(&text) {
            tracing::warn!(files = %Names(files), %error,
                "certificates on disk changed and can't be used; those read before stay in use");
            self.complaint = Some(text);
        }
    }
}

/// The files' names, for people.
struct Names<'f>(&'f TlsFiles);

impl fmt::Display for Names<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = [&self.0.authorities, &self.0.certificate, &self.0.key];
        for (index, path) in all.into_iter().flatten().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{}", path.display())?;
        }
        Ok(())
    }
}
