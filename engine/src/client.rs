//! The VMM's side, for a VMM in Rust: answers an engine's calls by those of a trait.
//!
//! ```text
//!   serve(socket): one engine, to its end     then again, with the next one     state and ticket are kept between them
//! ```
//! The rule it keeps: between the answer to COMMITTING and RESUME or MIGRATED the guest is not run, whatever becomes of the engine; in
//! every other moment the engine's death leaves it with the VMM, running, at the source, and nowhere at the destination before RUN.

mod destination;
mod source;

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use multifd::VmmError;
use multifd::tracking::process::{MappedRange, Permission};

pub use destination::{Destination, DestinationMachine};
pub use source::{Source, SourceMachine};

use crate::protocol::{
    self, Ended, Header, Hello, Kind, Malformed, RegionEntry, Role, SESSION_BYTES, State, Status,
    TICKET_BYTES, VERSION, Welcome,
};
use crate::socket::{Packet, ReceiveError, Socket};

/// A region of guest memory, and the file that it lies in.
#[derive(Debug)]
pub struct MemoryRegion {
    /// Where it lies for the guest.
    pub guest_address: u64,
    /// Its size.
    pub bytes: u64,
    /// The file: a memfd, or one of tmpfs or hugetlbfs. A copy, which is given away.
    pub file: OwnedFd,
    /// Where in the file it begins.
    pub offset: u64,
}

/// A way to find dirty pages.
#[derive(Debug)]
pub enum Tracker {
    /// By the engine, from outside. The permission is given away: it is for one migration.
    Process {
        /// Of this process.
        permission: Permission,
        /// Where the regions are mapped here; every mapping that is written through.
        ranges: Vec<MappedRange>,
    },
    /// By the VMM, which writes a bitmap into this file when it is asked to ([`SourceMachine::collect`]).
    Bitmap(OwnedFd),
}

/// Why an engine was not served to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// It said what can't be.
    #[error("the engine said what can't be: {0}")]
    Malformed(#[from] Malformed),
    /// The socket.
    #[error("the engine's socket: {0}")]
    System(#[from] io::Error),
}

impl From<ReceiveError> for ServeError {
    fn from(error: ReceiveError) -> Self {
        match error {
            ReceiveError::Malformed(error) => Self::Malformed(error),
            ReceiveError::System(error) => Self::System(error),
        }
    }
}

/// How it is with the guest after an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Served {
    /// What is known.
    pub state: State,
    /// What the engine said last, if it did.
    pub ended: Option<Ended>,
}

/// Something to be said to the engine without being asked, from any thread.
///
/// # Errors
/// The engine is gone, or there is no such thing to be said.
pub fn say(socket: &Socket, kind: Kind) -> io::Result<()> {
    if !matches!(kind, Kind::Cancel | Kind::SwitchOver | Kind::GuestGone) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let message = Header {
        kind,
        is_answer: false,
        serial: 0,
        status: Status::Done,
    };
    socket.send(&message.encode(&[]), &[])
}

/// What is known between two engines.
#[derive(Debug)]
pub(crate) struct Known {
    role: Role,
    pub(crate) state: State,
    pub(crate) ticket: [u8; TICKET_BYTES],
}

/// What is answered.
pub(crate) enum Reply {
    Done(Vec<u8>, Vec<OwnedFd>),
    No(Status, String),
}

impl Reply {
    pub(crate) const fn empty() -> Self {
        Self::Done(Vec::new(), Vec::new())
    }

    /// The VMM's own errors.
    pub(crate) fn failed(error: &VmmError) -> Self {
        Self::No(Status::Failed, error.to_string())
    }

    pub(crate) fn out_of_turn(text: &str) -> Self {
        Self::No(Status::OutOfTurn, text.to_owned())
    }
}

/// One who answers.
pub(crate) trait Answers {
    fn known(&mut self) -> &mut Known;
    /// # Errors
    /// The question can't be.
    fn answer(&mut self, kind: Kind, body: &[u8], files: Vec<OwnedFd>) -> Result<Reply, Malformed>;
    /// The engine is gone.
    fn engine_gone(&mut self);
}

impl Known {
    pub(crate) const fn new(role: Role) -> Self {
        Self {
            role,
            state: State::Fresh,
            ticket: [0; TICKET_BYTES],
        }
    }

    fn hello(&self, body: &[u8]) -> Result<Reply, Malformed> {
        let hello = Hello::decode(body)?;
        if hello.version_min > VERSION || hello.version_max < VERSION {
            let text = format!("this VMM speaks version {VERSION}");
            return Ok(Reply::No(Status::Version, text));
        }
        if hello.role != self.role {
            let text = format!("this VMM is a {:?}, and so is not the engine", self.role);
            return Ok(Reply::out_of_turn(&text));
        }
        let welcome = Welcome {
            version: VERSION,
            state: self.state,
            ticket: match self.state {
                State::Fresh | State::Gone => [0; TICKET_BYTES],
                _ => self.ticket,
            },
        };
        Ok(Reply::Done(welcome.encode(), Vec::new()))
    }

    /// Whether a proof is of the session that is known.
    pub(crate) fn is_session(&self, body: &[u8]) -> Result<bool, Malformed> {
        let session: [u8; SESSION_BYTES] = protocol::read_array("a session's name", body)?;
        Ok(self.ticket.starts_with(&session))
    }
}

/// Answers one engine, to its end.
pub(crate) fn serve(vmm: &mut impl Answers, socket: &Socket) -> Result<Served, ServeError> {
    let result = answer_all(vmm, socket);
    vmm.engine_gone();
    let state = vmm.known().state;
    result.map(|ended| Served { state, ended })
}

fn answer_all(vmm: &mut impl Answers, socket: &Socket) -> Result<Option<Ended>, ServeError> {
    let mut welcome = false;
    while let Some(Packet { bytes, descriptors }) = socket.receive()? {
        let (header, body) = match Header::decode(&bytes) {
            Ok(header) => header,
            Err(error @ Malformed::Kind(_)) => {
                // A later version may ask for more; this one says that it does not know it.
                let Some(serial) = Header::serial_of_unknown(&bytes) else {
                    return Err(error.into());
                };
                let header = Header {
                    kind: Kind::Hello,
                    is_answer: false,
                    serial,
                    status: Status::Done,
                };
                let no = Reply::No(Status::UnknownKind, error.to_string());
                reply(socket, header, no)?;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        if header.is_answer {
            let what = "an answer to a VMM";
            let value = header.kind.value().into();
            return Err(Malformed::Value { what, value }.into());
        }
        let answer = match header.kind {
            Kind::Ended => return Ok(Some(Ended::decode(body)?)),
            Kind::Hello => {
                welcome = true;
                vmm.known().hello(body)
            }
            _ if !welcome => Ok(Reply::out_of_turn("HELLO comes first")),
            kind => vmm.answer(kind, body, descriptors),
        };
        let answer = answer.unwrap_or_else(|error| Reply::No(Status::Malformed, error.to_string()));
        reply(socket, header, answer)?;
    }
    Ok(None)
}

fn reply(socket: &Socket, header: Header, reply: Reply) -> io::Result<()> {
    let (status, body, files) = match reply {
        Reply::Done(body, files) => (Status::Done, body, files),
        Reply::No(status, text) => (status, protocol::cut(&text).as_bytes().to_vec(), Vec::new()),
    };
    let header = Header {
        is_answer: true,
        status,
        ..header
    };
    let files: Vec<BorrowedFd<'_>> = files.iter().map(|file| file.as_fd()).collect();
    socket.send(&header.encode(&body), &files)
}

/// The answer that hands memory over.
pub(crate) fn memory(regions: Vec<MemoryRegion>) -> Reply {
    let mut entries = Vec::new();
    let mut files = Vec::new();
    for (region, descriptor) in regions.into_iter().zip(0..) {
        entries.push(RegionEntry {
            guest_address: region.guest_address,
            bytes: region.bytes,
            offset: region.offset,
            descriptor,
        });
        files.push(region.file);
    }
    if files.len() > protocol::DESCRIPTORS_MAX {
        let text = format!(
            "{} regions with a file each; a message has room for {}",
            files.len(),
            protocol::DESCRIPTORS_MAX
        );
        return Reply::No(Status::Failed, text);
    }
    Reply::Done(protocol::write_regions(&entries), files)
}
