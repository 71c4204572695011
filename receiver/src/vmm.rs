//! What the destination's VMM gives to a migration, and the proof it is shown before it may run the guest.
//!
//! The rule this file keeps: the guest runs here only with a [`Ownership`], which the session makes from a
//! `ReadyToCommit` (last round closed, digests equal, state loaded) and a COMMIT (SPEC: COMMIT-1).

use std::any::Any;

use multifd_transport::GuestMemory;
use multifd_wire::Layout;
use multifd_wire::frame::Device;

pub use multifd_session::common::{AskTicket, Blob, VmmError};
pub use multifd_session::destination::Ownership;

use crate::device::DeviceSink;

/// The destination's virtual machine monitor, as the migration sees it.
///
/// All calls come from one thread of their own, one at a time, so they may take their time: the source is told meanwhile that
/// this side lives.
pub trait Vmm: Any + Send {
    /// A source began a session, and nothing else has happened yet: directly before [`Vmm::prepare`]. With this ticket another process can
    /// answer for the session ([`crate::answer`]), if this one dies: for a machine that outlives the migration's process.
    ///
    /// # Errors
    /// An error refuses the migration in its first second.
    fn granted(&mut self, ticket: &AskTicket) -> Result<(), VmmError> {
        let _ = ticket;
        Ok(())
    }

    /// Builds the machine, not running, and returns its memory: the regions of `layout`, in its order.
    ///
    /// The memory is looked at when this returns. It must have room for the whole guest, or the migration is refused
    /// ([`GuestMemory::check_backing`]). Pages that exist and are not zero are made zero, so that it may have been used before;
    /// fresh memory costs nothing, and memory that was populated costs reading it once. From then on it is the migration's, until
    /// [`Vmm::load`]: what is written meanwhile by others is not found.
    ///
    /// # Errors
    /// An error refuses the migration in its first second; the source's guest was not touched.
    fn prepare(&mut self, configs: Vec<Blob>, layout: &Layout) -> Result<GuestMemory, VmmError>;

    /// The machine's devices that take in the state of those in the source's table, in its order, each with the table's name.
    /// Called once, directly after [`Vmm::prepare`], and only if there are any. They come back in
    /// [`Finished`](crate::Finished).
    ///
    /// # Errors
    /// An error refuses the migration in its first second. A machine without such devices need not implement it.
    fn devices(&mut self, table: &[Device]) -> Result<Vec<Box<dyn DeviceSink>>, VmmError> {
        Err(VmmError::new(format!(
            "this machine has no devices to take the source's {}",
            table.len()
        )))
    }

    /// Loads the state apart from memory. Memory is complete and verified by now. Called again, with a newer state over newer
    /// memory, when the link was lost after it and before the commit: what was loaded before is void then.
    ///
    /// # Errors
    /// An error ends the migration; the guest runs on at the source.
    fn load(&mut self, states: Vec<Blob>) -> Result<(), VmmError>;

    /// Runs the guest. Its devices run already.
    ///
    /// # Errors
    /// The source has given the guest away by now: an error here leaves a loaded, paused guest at this side, and says so.
    fn resume(&mut self, proof: Ownership) -> Result<(), VmmError>;

    /// In the place of [`Vmm::resume`], for a guest that its user had paused at the source: it is this side's from here on, loaded and
    /// paused, and so it stays until its user runs it. Its devices do not run either; they come back in [`Finished`](crate::Finished) as
    /// they were loaded, to be run with the guest.
    ///
    /// # Errors
    /// As for [`Vmm::resume`].
    fn take_over(&mut self, proof: Ownership) -> Result<(), VmmError> {
        let _ = proof;
        Ok(())
    }

    /// The migration ended before the commit: take the machine down. It must never run.
    fn discard(&mut self) {}
}
