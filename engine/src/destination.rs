//! A VMM whose guest arrives, as the destination's library sees it: each call goes over the link.
//!
//! The rule it keeps: the VMM is told [`Kind::Run`] or [`Kind::TakeOver`] only with the library's [`Ownership`]. A VMM that sees the
//! socket's end before that has no guest.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use multifd::destination::{AskTicket, Ownership, Vmm};
use multifd::transport::GuestMemory;
use multifd::{Blob, Layout, VmmError};

use crate::link::{Link, LinkError, wrong};
use crate::protocol::{self, Kind, SESSION_BYTES, Writer};
use crate::source::{HandOverError, map};

/// The VMM.
#[derive(Debug)]
pub struct Arriving {
    link: Arc<Link>,
    session: [u8; SESSION_BYTES],
    /// Of the memory, kept open.
    files: Vec<OwnedFd>,
}

impl Arriving {
    /// Over this link.
    #[must_use]
    pub const fn new(link: Arc<Link>) -> Self {
        Self {
            link,
            session: [0; SESSION_BYTES],
            files: Vec::new(),
        }
    }

    fn build(&mut self, configs: &[Blob], layout: &Layout) -> Result<GuestMemory, HandOverError> {
        let wanted: Vec<_> = layout
            .regions()
            .map(|region| (region.guest_address, region.bytes))
            .collect();
        let mut body = Writer::default();
        protocol::write_layout(&mut body, &wanted);
        let answer = self.link.ask_with(Kind::Prepare, body, configs)?;
        let made = map(Kind::Prepare, answer)?;
        let is: Vec<_> = made
            .memory
            .layouts()
            .map(|region| (region.guest_address, region.bytes))
            .collect();
        if is != wanted {
            let what = format!("asked for {wanted:x?}, given {is:x?} (address, bytes)");
            return Err(HandOverError::Regions { what });
        }
        self.files = made.files;
        Ok(made.memory)
    }
}

impl Arriving {
    /// Tells the VMM that the guest is its own. Only a refusal is a failure: a VMM that does not answer, or answers what can't be, may run
    /// the guest all the same, now or later. Then this does not come back, and the library says what is known: here, and not known to run.
    fn give(&self, kind: Kind) -> Result<(), VmmError> {
        match self.link.tell(kind, &self.session) {
            Ok(()) => Ok(()),
            Err(error @ LinkError::Refused { .. }) => Err(error.into()),
            Err(error) => {
                tracing::error!(%error, "whether the VMM runs the guest is not known");
                loop {
                    std::thread::park();
                }
            }
        }
    }
}

impl Vmm for Arriving {
    fn granted(&mut self, ticket: &AskTicket) -> Result<(), VmmError> {
        self.session = ticket.session();
        let ticket = [ticket.session(), ticket.secret()].concat();
        Ok(self.link.tell(Kind::Granted, &ticket)?)
    }

    fn prepare(&mut self, configs: Vec<Blob>, layout: &Layout) -> Result<GuestMemory, VmmError> {
        self.build(&configs, layout).map_err(VmmError::new)
    }

    fn load(&mut self, states: Vec<Blob>) -> Result<(), VmmError> {
        let load = || -> Result<(), LinkError> {
            let answer = self.link.ask_with(Kind::Load, Writer::default(), &states)?;
            wrong(
                Kind::Load,
                protocol::read_nothing("an empty answer", &answer.body),
            )
        };
        Ok(load()?)
    }

    fn resume(&mut self, _: Ownership) -> Result<(), VmmError> {
        self.give(Kind::Run)
    }

    fn take_over(&mut self, _: Ownership) -> Result<(), VmmError> {
        self.give(Kind::TakeOver)
    }

    fn discard(&mut self) {
        if let Err(error) = self.link.tell(Kind::Discard, &[]) {
            tracing::warn!(%error, "the destination's VMM could not be told to discard its machine");
        }
    }
}
