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
    /// How much of the guest's time is held back, in percent.
    throttle: u8,
}

impl<M: SourceMachine> Source<M> {
    /// Of which no engine has asked anything yet.
    pub const fn new(machine: M) -> Self {
        Self {
            machine,
            known: Known::new(Role::Source),
            paused: false,
            throttle: 0,
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
                self.throttle(percent)?
            }
            _ => Reply::out_of_turn("no question for a source"),
        })
    }

    fn throttle(&mut self, percent: u32) -> Result<Reply, VmmError> {
        let Some(percent) = u8::try_from(percent).ok().filter(|share| *share < 100) else {
            return Ok(Reply::out_of_turn("a share of 0 to 99 percent"));
        };
        // Also one that fails may have slowed it.
        self.throttle = percent.max(self.throttle);
        let done = self.machine.throttle(percent)?;
        self.throttle = percent;
        Ok(match done {
            Throttled::Done => Reply::empty(),
            Throttled::NotSupported => {
                Reply::No(Status::UnknownKind, "this VMM slows no guest".to_owned())
            }
        })
    }

    /// A guest that is left to itself has all of its time.
    fn let_go(&mut self) {
        if self.throttle == 0 {
            return;
        }
        match self.machine.throttle(0) {
            Ok(_) => self.throttle = 0,
            Err(error) => tracing::error!(%error, "the guest could not be let go on at its speed"),
        }
    }

    fn resume(&mut self) -> Result<Reply, VmmError> {
        self.let_go();
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
            // Nothing is held back of a guest that its owner finds again.
            (State::Undecided, Kind::Throttle) if body.iter().all(|byte| *byte == 0) => {
                self.ask(kind, body)
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
        self.let_go();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Machine {
        held_back: u8,
        runs: bool,
    }

    impl SourceMachine for Machine {
        fn memory(&mut self) -> Result<Vec<MemoryRegion>, VmmError> {
            Ok(Vec::new())
        }

        fn trackers(&mut self) -> Result<Vec<Tracker>, VmmError> {
            Ok(Vec::new())
        }

        fn config(&mut self) -> Result<Vec<Blob>, VmmError> {
            Ok(Vec::new())
        }

        fn throttle(&mut self, percent: u8) -> Result<Throttled, VmmError> {
            self.held_back = percent;
            Ok(Throttled::Done)
        }

        fn pause(&mut self) -> Result<(), VmmError> {
            self.runs = false;
            Ok(())
        }

        fn save(&mut self) -> Result<Vec<Blob>, VmmError> {
            Ok(Vec::new())
        }

        fn resume(&mut self) -> Result<(), VmmError> {
            self.runs = true;
            Ok(())
        }
    }

    fn ask(source: &mut Source<Machine>, kind: Kind, body: &[u8]) -> bool {
        let reply = source.answer(kind, body, Vec::new()).unwrap();
        matches!(reply, Reply::Done(..))
    }

    /// One whose guest is slowed by 40 %, after these questions.
    fn slowed(questions: &[Kind]) -> Source<Machine> {
        let mut source = Source::new(Machine::default());
        assert!(ask(&mut source, Kind::Throttle, &protocol::word(40)));
        for kind in questions {
            assert!(ask(&mut source, *kind, &[]), "{kind}");
        }
        assert_eq!(source.machine.held_back, 40);
        source
    }

    #[test]
    fn nothing_is_held_back_of_a_guest_whose_engine_died() {
        for questions in [&[][..], &[Kind::Pause], &[Kind::Pause, Kind::Committing]] {
            let mut source = slowed(questions);
            source.engine_gone();
            assert_eq!(source.machine.held_back, 0, "{questions:?}");
        }
    }

    #[test]
    fn nor_of_one_that_runs_again_whoever_asked_for_it() {
        let mut source = slowed(&[Kind::Pause, Kind::Committing]);
        let session = source.known.ticket;
        assert!(ask(&mut source, Kind::Resume, &session[..16]));
        assert!(source.machine.runs);
        assert_eq!(source.machine.held_back, 0);
    }

    #[test]
    fn with_the_outcome_open_a_guest_is_let_go_and_not_slowed() {
        let mut source = slowed(&[Kind::Pause, Kind::Committing]);
        assert!(!ask(&mut source, Kind::Throttle, &protocol::word(60)));
        assert!(ask(&mut source, Kind::Throttle, &protocol::word(0)));
        assert_eq!(source.machine.held_back, 0);
    }

    #[test]
    fn all_of_a_guest_s_time_is_not_to_be_held_back() {
        let mut source = Source::new(Machine::default());
        for percent in [100, 255, 256, u32::MAX] {
            assert!(
                !ask(&mut source, Kind::Throttle, &protocol::word(percent)),
                "{percent}"
            );
        }
        assert_eq!(source.machine.held_back, 0);
    }
}
