//! Waiting on after a source whose set-up came to nothing (SPEC: SEC-8).
//!
//! Rule: nothing of one source's session reaches the next one's. Every thread that could say something of it has ended, and every
//! note of it was thrown away, before the registry lets another one in. Greeters may be late: what they bring shows the old secrets.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use multifd_session::destination::{Event, Outcome};
use multifd_transport::door::Door;

use super::{Control, thread_cpu};
use crate::driver::lock;
use crate::error::Fault;
use crate::vmm::Vmm;

impl Control {
    /// Whether another source may take the place of the one that is here.
    pub(super) fn gives_way(&self) -> bool {
        self.session.as_ref().is_some_and(|it| it.may_give_way())
    }

    /// Another source begins.
    pub(super) fn give_way(&mut self) {
        // The one that is here may have come back meanwhile.
        if self.gives_way() {
            let what = "the source to come back before another one began";
            self.drive(Event::Failed(Fault::Timeout { what }));
        }
    }

    /// Whether the next source is waited for after this outcome.
    pub(super) fn waits_on(&self, outcome: &Outcome) -> bool {
        let wanted = !self.shared.cancelled.load(Ordering::Relaxed)
            && self.session.as_ref().is_some_and(|it| it.may_be_followed());
        let Outcome::Failed(error) = outcome else {
            return false;
        };
        if wanted && let Some(unsaid) = self.shared.log_limit.allow() {
            tracing::warn!(%error, unsaid, "no migration came of it; waiting for the next source");
        }
        wanted
    }

    /// The same reception, for the next source. Nothing of the session that is over runs any more.
    ///
    /// # Errors
    /// No thread for the machine, which is in the error.
    pub(super) fn for_next_source(
        &self,
        vmm: Box<dyn Vmm>,
        door: Door,
    ) -> Result<Box<Self>, (std::io::Error, Box<dyn Vmm>)> {
        self.inbox.try_iter().for_each(drop);
        self.shared.counters.reset();
        let (shared, inbox) = (Arc::clone(&self.shared), self.inbox.clone());
        let mut next = Self::new(shared, inbox, vmm, door)?;
        // What this thread used until now was for others.
        thread_cpu(&mut next.cpu);
        lock(&self.shared.registry).clear();
        Ok(Box::new(next))
    }
}
