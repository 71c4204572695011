//! What the source's VMM gives to a migration, and the proof it must be shown before it may run the guest again.
//!
//! The rule this file keeps: after the commit was sent the source can't run the guest, because the only way to
//! [`Vmm::resume`] is a [`Reclaimed`], and the session makes none once it is committed (SPEC: COMMIT-3).

use std::any::Any;

use multifd_tracking::Run;
use multifd_wire::frame::GuestState;

use crate::AskTicket;
use crate::device::DeviceSource;

pub use multifd_session::common::{Blob, VmmError};
pub use multifd_session::source::Reclaimed;

/// What a VMM made of [`Vmm::throttle`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Throttled {
    /// It is so from now on.
    Done,
    /// This VMM slows no guest; nothing has changed.
    NotSupported,
}

/// The source's virtual machine monitor, as the migration sees it.
///
/// All calls come from the migration's control thread, one at a time. Guest memory and dirty tracking are handed over
/// apart from this ([`crate::Migration`]), since they are used from other threads.
pub trait Vmm: Any + Send {
    /// The configuration that the destination needs to build the same machine. Called once, first, with the guest running.
    ///
    /// # Errors
    /// An error refuses the migration before anything was sent.
    fn config(&mut self) -> Result<Vec<Blob>, VmmError>;

    /// Whether the guest runs, or its user has paused it. Called after [`Vmm::config`], and again directly before [`Vmm::pause`]: one that
    /// is paused then arrives paused, if the destination can do that. One that is paused at the first call goes to no other destination.
    fn guest(&mut self) -> GuestState {
        GuestState::Running
    }

    /// The devices whose state is to be moved, running. Called once, directly after [`Vmm::config`]. They come back in
    /// [`Finished`](crate::Finished): running, unless the guest was given away.
    ///
    /// # Errors
    /// An error refuses the migration before anything was sent.
    fn devices(&mut self) -> Result<Vec<Box<dyn DeviceSource>>, VmmError> {
        Ok(Vec::new())
    }

    /// Pages whose content nobody needs, by region and page: unplugged (virtio-mem), ballooned, reported free by the guest. They are
    /// neither read nor sent in round 0, and are zero at the destination; a run may be named twice. Called when all sources of
    /// dirty pages were started, before round 0, and again if the migration begins afresh: a page that is used after the call is
    /// written, and goes by those sources. Holes that the kernel knows of need not be named. A source that begins with every page
    /// dirty (KVM's log, initially set) has these pages sent all the same.
    ///
    /// # Errors
    /// An error ends the migration before anything was moved.
    fn unused_pages(&mut self) -> Result<Vec<Run>, VmmError> {
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

    /// Holds so much of the guest's time back from now on, in percent, 0 to 99: each vCPU runs for the rest of it. The migration asks for
    /// this if the guest writes faster than its memory can be sent, never for more than
    /// [`throttle_limit`](crate::ConfigBuilder::throttle_limit), by steps, with the guest running. It says 0 at every end and whenever the
    /// channels are lost, also after [`Vmm::resume`], but not of a guest that was given away.
    ///
    /// # Errors
    /// Reported to the user; the migration goes on with the guest as it was, and only 0 is asked for from then on.
    fn throttle(&mut self, percent: u8) -> Result<Throttled, VmmError> {
        let _ = percent;
        Ok(Throttled::NotSupported)
    }

    /// Stops all vCPUs and the VMM's own writers of guest memory, also if the guest's user has paused it already. After it returns, guest memory changes only through
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

    /// The destination has everything, and the commit goes out when this returns: from here on the guest may be the destination's, until
    /// [`Vmm::resume`] or [`Vmm::migrated`] says whose it is. For a machine that outlives the migration's process, and has to know
    /// whether the outcome must be asked for ([`crate::ask`]) when that dies. The guest is paused meanwhile, so it should not take long.
    ///
    /// # Errors
    /// An error ends the migration; nothing was committed, and the guest is resumed.
    fn committing(&mut self) -> Result<(), VmmError> {
        Ok(())
    }

    /// Makes the guest again what it was before [`Vmm::pause`]: runs it, or leaves it paused if its user wants that. Called after a migration that failed, was cancelled or lost its link while it was paused. In
    /// the last case the migration may go on, and [`Vmm::pause`] and [`Vmm::save`] are called again. Its devices run already.
    ///
    /// # Errors
    /// Reported to the user beside the first error: the guest is then still paused at the source.
    fn resume(&mut self, proof: Reclaimed) -> Result<(), VmmError>;

    /// The guest runs at the destination. The source's machine must never run again; it may be taken down.
    fn migrated(&mut self) {}
}
