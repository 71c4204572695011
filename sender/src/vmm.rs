//! What the source's VMM gives to a migration, and the proof it must be shown before it may run the guest again.
//!
//! The rule this file keeps: after the commit was sent the source can't run the guest, because the only way to
//! [`Vmm::resume`] is a [`Reclaimed`], and the session makes none once it is committed (SPEC: COMMIT-3).

use bytes::Bytes;

use crate::device::DeviceSource;
use crate::driver::AskTicket;

/// A piece of VM state or configuration, opaque to multifd.
///
/// `kind` and `version` are the embedder's own numbers; the destination's VMM is handed exactly these three values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    /// What it is, in the embedder's numbering.
    pub kind: u32,
    /// Which encoding of it, in the embedder's numbering.
    pub version: u32,
    /// The octets; at most `wire::limits::BLOB_BYTES_MAX`.
    pub octets: Bytes,
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

/// Proof that the guest belongs to the source: no commit left for the destination in the pause that it ends, or the destination
/// gave its word that it has read none and will take none any more (SPEC: ASK-3).
///
/// Only the session makes it. It is consumed by [`Vmm::resume`].
#[derive(Debug)]
#[must_use = "the guest stays paused until the VMM is shown this"]
pub struct Reclaimed(());

impl Reclaimed {
    /// Only for the session's transition tables, which call it in states before the commit.
    pub(crate) fn new() -> Self {
        Self(())
    }

    /// Only for the session's transition table, on the destination's answer that it is not committed and never will be.
    pub(crate) fn not_committed() -> Self {
        Self(())
    }
}

/// The source's virtual machine monitor, as the migration sees it.
///
/// All calls come from the migration's control thread, one at a time. Guest memory and dirty tracking are handed over
/// apart from this ([`crate::Migration`]), since they are used from other threads.
pub trait Vmm: Send {
    /// The configuration that the destination needs to build the same machine. Called once, first, with the guest running.
    ///
    /// # Errors
    /// An error refuses the migration before anything was sent.
    fn config(&mut self) -> Result<Vec<Blob>, VmmError>;

    /// The devices whose state is to be moved, running. Called once, directly after [`Vmm::config`]. They come back in
    /// [`Finished`](crate::Finished): running, unless the guest was given away.
    ///
    /// # Errors
    /// An error refuses the migration before anything was sent.
    fn devices(&mut self) -> Result<Vec<Box<dyn DeviceSource>>, VmmError> {
        Ok(Vec::new())
    }

    /// The destination granted the session, and nothing else has happened yet. With this ticket another process can ask how the session
    /// ended ([`crate::ask`]), if this one dies after the commit. Called once for each session; a resume goes on with the
    /// same one. Whoever keeps the ticket has it on disk when this returns.
    ///
    /// # Errors
    /// An error ends the migration before anything was moved.
    fn granted(&mut self, ticket: &AskTicket) -> Result<(), VmmError> {
        let _ = ticket;
        Ok(())
    }

    /// Stops all vCPUs and the VMM's own writers of guest memory. After it returns, guest memory changes only through
    /// devices that are still running and through [`Vmm::save`].
    ///
    /// # Errors
    /// An error ends the migration; [`Vmm::resume`] is called next, so a half-paused guest must be able to resume.
    fn pause(&mut self) -> Result<(), VmmError>;

    /// The state of the paused machine apart from memory. It may write guest memory: there is one more collection after it.
    ///
    /// # Errors
    /// An error ends the migration; the guest is resumed.
    fn save(&mut self) -> Result<Vec<Blob>, VmmError>;

    /// Runs the guest again at the source, after a migration that failed, was cancelled or lost its link while it was paused. In
    /// the last case the migration may go on, and [`Vmm::pause`] and [`Vmm::save`] are called again. Its devices run already.
    ///
    /// # Errors
    /// Reported to the user beside the first error: the guest is then still paused at the source.
    fn resume(&mut self, proof: Reclaimed) -> Result<(), VmmError>;

    /// The guest runs at the destination. The source's machine must never run again; it may be taken down.
    fn migrated(&mut self) {}
}
