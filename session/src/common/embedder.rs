//! What an embedder gives to either role: pieces of state, and its reasons to refuse.

use bytes::Bytes;

/// A piece of VM state or configuration, opaque to multifd.
///
/// `kind` and `version` are the embedder's own numbers; the destination's VMM is handed exactly the three values that the source's
/// VMM gave. There they come from the peer: untrusted until the embedder has checked them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    /// What it is, in the embedder's numbering.
    pub kind: u32,
    /// Which encoding of it, in the embedder's numbering.
    pub version: u32,
    /// The bytes; at most `wire::limits::BLOB_BYTES_MAX`.
    pub bytes: Bytes,
}

impl Blob {
    /// These bytes, under the embedder's own numbers.
    #[must_use]
    pub fn new(kind: u32, version: u32, bytes: impl Into<Bytes>) -> Self {
        Self {
            kind,
            version,
            bytes: bytes.into(),
        }
    }
}

/// The embedder said no; its reason travels to the user and, in an ABORT, to the peer.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct VmmError(Box<dyn std::error::Error + Send + Sync>);

impl VmmError {
    /// Wraps the embedder's own error, or a text.
    pub fn new(reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self(reason.into())
    }
}

/// A device did not do what it was asked for; its reason travels to the user and, in an ABORT, to the peer.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct DeviceError(Box<dyn std::error::Error + Send + Sync>);

impl DeviceError {
    /// Wraps the device's own error, or a text.
    pub fn new(reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self(reason.into())
    }
}
