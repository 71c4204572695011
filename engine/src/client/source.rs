//! A VMM whose guest leaves.

use std::os::fd::OwnedFd;

use multifd::source::{GuestState, Throttled};
use multifd::{Blob, VmmError};

use super::{Answers, Known, MemoryRegion, Reply, ServeError, Served, Tracker, memory, serve};
use crate::protocol::{
    self, Collect, Kind, Malformed, Role, State, Status, TrackerEntry, TrackerKind, Writer,
};
use crate::socket::Socket;

/// What a VMM does whose guest leaves. All calls come from the thread that serves.
pub trait SourceMachine {
    /// The guest's memory.
    ///
    /// # Errors
    /// The migration does not begin.
    fn memory(&mut self) -> Result<Vec<MemoryRegion>, VmmError>;

    /// How dirty pages are found.
    ///
    /// # Errors
    /// The migration does not begin.
    fn trackers(&mut self) -> Result<Vec<Tracker>, VmmError>;

    /// The configuration, from which the destination builds the same machine.
    ///
    /// # Errors
    /// The migration does not begin.
    fn config(&mut self) -> Result<Vec<Blob>, VmmError>;

    /// Whether the guest runs, or its user has paused it.
    fn guest(&mut self) -> GuestState {
        GuestState::Running
    }

    /// Writes the whole bitmap of what was written since the last call, for a [`Tracker::Bitmap`].
    ///
    /// # Errors
    /// All pages count as written.
    fn collect(&mut self, step: Collect) -> Result<(), VmmError> {
        Err(VmmError::new(format!("no bitmap is written ({step:?})")))
    }

    /// Holds so much of the guest's time back from now on, in percent, 0 to 99. Asked only if the engine's user allows it.
    ///
    /// # Errors
    /// The migration goes on with the guest as it was.
    fn throttle(&mut self, percent: u8) -> Result<Throttled, VmmError> {
        let _ = percent;
        Ok(Throttled::NotSupported)
    }

    /// Stops the vCPUs and all other writers of guest memory.
    ///
    /// # Errors
    /// The migration fails, and the guest is resumed.
    fn pause(&mut self) -> Result<(), VmmError>;

    /// The state of the paused machine.
    ///
    /// # Errors
    /// The migration fails, and the guest is resumed.
    fn save(&mut self) -> Result<Vec<Blob>, VmmError>;

    /// Makes the guest what it was before [`SourceMachine::pause`]. Also called when an engine died in between.
    ///
    /// # Errors
    /// The guest is then still paused here.
    fn resume(&mut self) -> Result<(), VmmError>;

    /// The guest is the destination's. It must never run here again.
    fn migrated(&mut self) {}
}

/// The machine, and what is known of its guest between two engines.
#[derive(Debug)]
pub struct Source<M> {
    /// The machine.
    pub machine: M,
    known: Known,
    paused: bool,
}

impl<M: SourceMachine> Source<M> {
    /// Of which no engine has asked anything yet.
    pub const fn new(machine: M) -> Self {
        Self {
            machine,
            known: Known::new(Role::Source),
            paused: false,
        }
    }

    /// What is known.
    pub const fn state(&self) -> State {
        self.known.state
    }

    /// Answers one engine, to its end.
    ///
    /// # Errors
    /// [`ServeError`]. What is known holds all the same ([`Source::state`]).
    pub fn serve(&mut self, socket: &Socket) -> Result<Served, ServeError> {
        serve(self, socket)
    }

    fn trackers(&mut self) -> Result<Reply, VmmError> {
        let (mut entries, mut files) = (Vec::new(), Vec::new());
        for tracker in self.machine.trackers()? {
            let descriptor = u32::try_from(files.len()).unwrap_or(u32::MAX);
            match tracker {
                Tracker::Process { permission, ranges } => {
                    files.extend([permission.faults, permission.pagemap]);
                    entries.extend(ranges.iter().map(|range| TrackerEntry {
                        kind: TrackerKind::Process,
                        descriptor,
                        region: range.region,
                        first_page: range.first,
                        address: range.address,
                        pages: range.pages,
                    }));
                }
                Tracker::Bitmap(file) => {
                    files.push(file);
                    entries.push(TrackerEntry {
                        kind: TrackerKind::Bitmap,
                        descriptor,
                        region: 0,
                        first_page: 0,
                        address: 0,
                        pages: 0,
                    });
                }
            }
        }
        Ok(Reply::Done(protocol::write_trackers(&entries), files))
    }

    fn ask(&mut self, kind: Kind, body: &[u8]) -> Result<Reply, VmmError> {
        Ok(match kind {
            Kind::Memory => memory(self.machine.memory()?),
            Kind::Trackers => self.trackers()?,
            Kind::Config => blobs(&self.machine.config()?)?,
            Kind::Guest => {
                let paused = self.machine.guest() == GuestState::Paused;
                Reply::Done(protocol::word(paused.into()), Vec::new())
            }
            Kind::Pause => {
                // Half paused is to be resumed as well.
                self.paused = true;
                self.machine.pause()?;
                Reply::empty()
            }
            Kind::Save => blobs(&self.machine.save()?)?,
            Kind::Collect => {
                let step = Collect::decode(body).map_err(VmmError::new)?;
                self.machine.collect(step)?;
                Reply::empty()
            }
            Kind::Throttle => {
                let percent = protocol::read_word("THROTTLE", body).map_err(VmmError::new)?;
                let percent = u8::try_from(percent).map_err(VmmError::new)?;
                match self.machine.throttle(percent)? {
                    Throttled::Done => Reply::empty(),
                    Throttled::NotSupported => {
                        Reply::No(Status::UnknownKind, "this VMM slows no guest".to_owned())
                    }
                }
            }
            _ => Reply::out_of_turn("no question for a source"),
        })
    }

    fn resume(&mut self) -> Result<Reply, VmmError> {
        self.known.state = State::Fresh;
        self.machine.resume()?;
        self.paused = false;
        Ok(Reply::empty())
    }
}

impl<M: SourceMachine> Answers for Source<M> {
    fn known(&mut self) -> &mut Known {
        &mut self.known
    }

    fn answer(&mut self, kind: Kind, body: &[u8], _: Vec<OwnedFd>) -> Result<Reply, Malformed> {
        let state = self.known.state;
        let of_decision = matches!(kind, Kind::Resume | Kind::Migrated);
        if of_decision && !self.known.is_session(body)? {
            return Ok(Reply::out_of_turn("the proof is of another session"));
        }
        let answer = match (state, kind) {
            (State::Gone, _) => Ok(Reply::out_of_turn("the guest has migrated")),
            (State::Undecided, Kind::Resume) => self.resume(),
            (State::Fresh, Kind::Resume) if self.paused => self.resume(),
            (State::Undecided, Kind::Migrated) => {
                self.known.state = State::Gone;
                self.machine.migrated();
                Ok(Reply::empty())
            }
            (State::Undecided, _) => Ok(Reply::out_of_turn("the outcome is not known")),
            (_, Kind::Granted) => {
                self.known.ticket = protocol::read_array("a ticket", body)?;
                Ok(Reply::empty())
            }
            (_, Kind::Committing) if self.paused => {
                protocol::read_nothing("COMMITTING", body)?;
                self.known.state = State::Undecided;
                Ok(Reply::empty())
            }
            (_, Kind::Committing | Kind::Resume) => Ok(Reply::out_of_turn("it was not paused")),
            (_, Kind::Migrated) => Ok(Reply::out_of_turn("it was not committed")),
            (_, kind) => self.ask(kind, body),
        };
        Ok(answer.unwrap_or_else(|error| Reply::failed(&error)))
    }

    fn engine_gone(&mut self) {
        if self.known.state == State::Fresh && self.paused {
            match self.machine.resume() {
                Ok(()) => self.paused = false,
                Err(error) => {
                    tracing::error!(%error, "the engine is gone, and the guest could not be resumed");
                }
            }
        }
    }
}

fn blobs(blobs: &[Blob]) -> Result<Reply, VmmError> {
    let mut body = Writer::default();
    let file = protocol::write_blobs(&mut body, blobs).map_err(VmmError::new)?;
    Ok(Reply::Done(body.finish(), file.into_iter().collect()))
}
