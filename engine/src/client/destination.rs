//! A VMM whose guest arrives.

use std::os::fd::OwnedFd;

use multifd::transport::RegionLayout;
use multifd::{Blob, VmmError};

use super::{Answers, Known, MemoryRegion, Reply, ServeError, Served, memory, serve};
use crate::protocol::{self, Kind, Malformed, Reader, Role, State};
use crate::socket::Socket;

/// What a VMM does whose guest arrives. All calls come from the thread that serves.
pub trait DestinationMachine {
    /// Builds the machine, not running, and hands its memory over: these regions, in this order. May come again after
    /// [`DestinationMachine::discard`].
    ///
    /// # Errors
    /// The migration is refused.
    fn prepare(
        &mut self,
        configs: Vec<Blob>,
        regions: &[RegionLayout],
    ) -> Result<Vec<MemoryRegion>, VmmError>;

    /// Loads the state over complete memory. May come again, with a newer one.
    ///
    /// # Errors
    /// The migration fails; the guest runs on at the source.
    fn load(&mut self, states: Vec<Blob>) -> Result<(), VmmError>;

    /// Runs the guest, which is this side's.
    ///
    /// # Errors
    /// The guest is this side's, loaded and paused.
    fn run(&mut self) -> Result<(), VmmError>;

    /// Takes over a guest that was paused, and stays so.
    ///
    /// # Errors
    /// As for [`DestinationMachine::run`].
    fn take_over(&mut self) -> Result<(), VmmError> {
        Ok(())
    }

    /// Takes the machine down. Also called when the engine died before [`DestinationMachine::run`].
    fn discard(&mut self);
}

/// The machine, and what is known of its guest between two engines.
#[derive(Debug)]
pub struct Destination<M> {
    /// The machine.
    pub machine: M,
    known: Known,
    /// A session has begun.
    granted: bool,
}

impl<M: DestinationMachine> Destination<M> {
    /// To which no engine has come yet.
    pub const fn new(machine: M) -> Self {
        Self {
            machine,
            known: Known::new(Role::Destination),
            granted: false,
        }
    }

    /// What is known.
    pub const fn state(&self) -> State {
        self.known.state
    }

    /// Answers one engine, to its end.
    ///
    /// # Errors
    /// [`ServeError`]. What is known holds all the same ([`Destination::state`]).
    pub fn serve(&mut self, socket: &Socket) -> Result<Served, ServeError> {
        serve(self, socket)
    }

    fn discard(&mut self) {
        self.machine.discard();
        self.granted = false;
        self.known.state = State::Discarded;
    }

    fn ask(
        &mut self,
        kind: Kind,
        body: &[u8],
        mut files: Vec<OwnedFd>,
    ) -> Result<Result<Reply, VmmError>, Malformed> {
        Ok(match kind {
            Kind::Prepare => {
                let mut reader = Reader::new("PREPARE", body);
                let regions = protocol::read_layout(&mut reader)?;
                let configs = protocol::read_blobs(reader, &mut files)?;
                let regions: Vec<_> = regions
                    .into_iter()
                    .map(|(guest_address, bytes)| RegionLayout {
                        guest_address,
                        bytes,
                    })
                    .collect();
                self.machine.prepare(configs, &regions).map(memory)
            }
            Kind::Load => {
                let states = protocol::read_blobs(Reader::new("LOAD", body), &mut files)?;
                self.machine.load(states).map(|()| Reply::empty())
            }
            _ => Ok(Reply::out_of_turn("no question for a destination")),
        })
    }
}

impl<M: DestinationMachine> Answers for Destination<M> {
    fn known(&mut self) -> &mut Known {
        &mut self.known
    }

    fn answer(&mut self, kind: Kind, body: &[u8], files: Vec<OwnedFd>) -> Result<Reply, Malformed> {
        if self.known.state == State::Taken {
            return Ok(Reply::out_of_turn("the guest is this VMM's"));
        }
        if kind == Kind::Granted {
            self.known.ticket = protocol::read_array("a ticket", body)?;
            self.known.state = State::Fresh;
            self.granted = true;
            return Ok(Reply::empty());
        }
        if !self.granted {
            return Ok(Reply::out_of_turn("no session was granted"));
        }
        let answer = match kind {
            Kind::Run | Kind::TakeOver if !self.known.is_session(body)? => {
                Ok(Reply::out_of_turn("the proof is of another session"))
            }
            Kind::Run | Kind::TakeOver => {
                self.known.state = State::Taken;
                let run = match kind {
                    Kind::Run => self.machine.run(),
                    _ => self.machine.take_over(),
                };
                run.map(|()| Reply::empty())
            }
            Kind::Discard => {
                protocol::read_nothing("DISCARD", body)?;
                self.discard();
                Ok(Reply::empty())
            }
            kind => self.ask(kind, body, files)?,
        };
        Ok(answer.unwrap_or_else(|error| Reply::failed(&error)))
    }

    fn engine_gone(&mut self) {
        if self.known.state == State::Fresh && self.granted {
            self.discard();
        }
    }
}
