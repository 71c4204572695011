//! The messages between an engine and a VMM, as `PROTOCOL.md` has them.
//!
//! ```text
//!   0         4         8         12        16
//!   | kind    | serial  | status  | bytes   | body: so many bytes        one message is one packet of the socket
//! ```
//! The rule it keeps: nothing of a message is used before it was compared with a limit that has a name, and no length that is written in
//! a message reaches further than the message.

mod blobs;
mod body;
mod memory;
mod trackers;

use std::fmt;

pub use blobs::{BlobEntry, read_blobs, write_blobs};
pub use body::{Reader, Writer};
pub use memory::{RegionEntry, read_layout, read_regions, write_layout, write_regions};
pub use trackers::{TrackerEntry, TrackerKind, read_trackers, write_trackers};

/// The version that this crate speaks.
pub const VERSION: u32 = 1;

/// The first word of HELLO: `MFDE`.
pub const MAGIC: u32 = u32::from_le_bytes(*b"MFDE");

/// The longest message with its header. Twice as long fits into the send buffer that Linux gives a Unix socket.
pub const MESSAGE_BYTES_MAX: usize = 65_536;

/// Header of a message.
pub const HEADER_BYTES: usize = 16;

/// The most descriptors in a message; the kernel takes 253.
pub const DESCRIPTORS_MAX: usize = 64;

/// The longest text of an error.
pub const TEXT_BYTES_MAX: usize = 1024;

/// The bit of `kind` that an answer has.
const ANSWER: u32 = 1 << 31;

/// A ticket: the session's name and its secret.
pub const TICKET_BYTES: usize = 32;

/// The name of a session.
pub const SESSION_BYTES: usize = 16;

/// What a message asks for, or says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum Kind {
    /// Engine to VMM, first: which versions, which role. Answered with the VMM's [`State`].
    Hello = 1,
    /// The session's ticket, to be kept.
    Granted = 2,
    /// Source: the guest's memory.
    Memory = 16,
    /// Source: how dirty pages are found.
    Trackers = 17,
    /// Source: the machine's configuration.
    Config = 18,
    /// Source: whether the guest runs.
    Guest = 19,
    /// Source: stop the guest.
    Pause = 20,
    /// Source: write the bitmap of dirty pages.
    Collect = 21,
    /// Source: the state of the paused machine.
    Save = 22,
    /// Source: the commit is sent when this was answered.
    Committing = 23,
    /// Source: the guest is the VMM's again.
    Resume = 24,
    /// Source: the guest is the destination's for good.
    Migrated = 25,
    /// Source: hold so much of the guest's time back.
    Throttle = 26,
    /// Destination: build the machine, and give its memory.
    Prepare = 32,
    /// Destination: load the state.
    Load = 33,
    /// Destination: the guest is the VMM's; run it.
    Run = 34,
    /// Destination: the guest is the VMM's, and stays paused.
    TakeOver = 35,
    /// Destination: take the machine down; it never runs.
    Discard = 36,
    /// Engine to VMM, no answer: how it ended. The engine says nothing more.
    Ended = 48,
    /// VMM to engine, no answer: give up; the guest goes on at the source.
    Cancel = 64,
    /// VMM to engine, no answer: switch over with the round under way.
    SwitchOver = 65,
    /// VMM to engine, no answer: the guest has shut down or crashed.
    GuestGone = 66,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 22] = [
        Self::Hello,
        Self::Granted,
        Self::Memory,
        Self::Trackers,
        Self::Config,
        Self::Guest,
        Self::Pause,
        Self::Collect,
        Self::Save,
        Self::Committing,
        Self::Resume,
        Self::Migrated,
        Self::Throttle,
        Self::Prepare,
        Self::Load,
        Self::Run,
        Self::TakeOver,
        Self::Discard,
        Self::Ended,
        Self::Cancel,
        Self::SwitchOver,
        Self::GuestGone,
    ];

    /// Its number.
    #[must_use]
    pub const fn value(self) -> u32 {
        self as u32
    }

    fn from_value(value: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.value() == value)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = format!("{self:?}");
        for (place, letter) in name.char_indices() {
            if letter.is_uppercase() && place > 0 {
                f.write_str("_")?;
            }
            write!(f, "{}", letter.to_ascii_uppercase())?;
        }
        Ok(())
    }
}

/// Why something was not done: the status of an answer, 0 being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[non_exhaustive]
pub enum Status {
    /// It was done.
    Done = 0,
    /// No such kind is known.
    UnknownKind = 1,
    /// The message is not one that can be.
    Malformed = 2,
    /// It is not the time for it.
    OutOfTurn = 3,
    /// The VMM could not do it; the text says why.
    Failed = 4,
    /// No version in common.
    Version = 5,
}

impl Status {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Done,
        Self::UnknownKind,
        Self::Malformed,
        Self::OutOfTurn,
        Self::Failed,
        Self::Version,
    ];

    /// Its number.
    #[must_use]
    pub const fn value(self) -> u32 {
        self as u32
    }

    fn from_value(value: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.value() == value)
    }
}

/// Which side of a migration the engine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Role {
    /// The guest leaves.
    Source = 1,
    /// The guest arrives.
    Destination = 2,
}

/// What the VMM knows of its guest when an engine comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum State {
    /// Nothing is open: at the source the guest is the VMM's, at the destination none has come.
    Fresh = 0,
    /// Source: an earlier engine ended after COMMITTING was answered, and neither RESUME nor MIGRATED came. The guest is paused.
    Undecided = 1,
    /// Source: MIGRATED came.
    Gone = 2,
    /// Destination: RUN or TAKE_OVER came; the guest is the VMM's.
    Taken = 3,
    /// Destination: a session began, and its machine was discarded, by DISCARD or because the socket ended before RUN.
    Discarded = 4,
}

impl State {
    const ALL: [Self; 5] = [
        Self::Fresh,
        Self::Undecided,
        Self::Gone,
        Self::Taken,
        Self::Discarded,
    ];
}

/// How a migration ended, as [`Kind::Ended`] says it: the numbers are the programs' exit statuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Outcome {
    /// The guest runs, or is, at the destination.
    Migrated = 0,
    /// It failed: the guest is the source's.
    Failed = 1,
    /// It was cancelled: the guest is the source's.
    Cancelled = 3,
    /// The source does not know.
    Unknown = 4,
    /// The destination has the guest and could not run it.
    Stranded = 6,
    /// The guest is no more.
    Gone = 7,
}

impl Outcome {
    const ALL: [Self; 6] = [
        Self::Migrated,
        Self::Failed,
        Self::Cancelled,
        Self::Unknown,
        Self::Stranded,
        Self::Gone,
    ];

    /// Its number.
    #[must_use]
    pub const fn value(self) -> u32 {
        self as u32
    }
}

/// Bytes that are no message, or a message that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// It ends too soon.
    #[error("{what} ends after {bytes} bytes, and has {needed}")]
    Short {
        /// What was read.
        what: &'static str,
        /// What there was.
        bytes: usize,
        /// What it needs.
        needed: usize,
    },
    /// Something follows.
    #[error("{bytes} bytes follow on {what}")]
    Trailing {
        /// What was read.
        what: &'static str,
        /// What follows.
        bytes: usize,
    },
    /// The header's length is not the packet's.
    #[error("the header says {said} bytes of body, and there are {there}")]
    Length {
        /// What the header says.
        said: u32,
        /// What there is.
        there: usize,
    },
    /// The packet was longer than a message, or had more descriptors, and the kernel cut it.
    #[error(
        "the message is too long, or has too many descriptors (at most {MESSAGE_BYTES_MAX} bytes and {DESCRIPTORS_MAX})"
    )]
    Cut,
    /// No such kind.
    #[error("there is no message of kind {0}")]
    Kind(u32),
    /// A number that means nothing there.
    #[error("{what} can't be {value}")]
    Value {
        /// Of what.
        what: &'static str,
        /// The number.
        value: u64,
    },
    /// Too many.
    #[error("{count} {what}: at most {max}")]
    Count {
        /// Of what.
        what: &'static str,
        /// How many.
        count: u64,
        /// How many there may be.
        max: u64,
    },
    /// A descriptor that did not come with the message.
    #[error("descriptor {index} of a message that has {count}")]
    Descriptor {
        /// Which.
        index: u32,
        /// How many came.
        count: usize,
    },
    /// A text that is none.
    #[error("the text is not UTF-8")]
    Text,
    /// No HELLO of this protocol.
    #[error("it does not begin as a HELLO of this protocol")]
    Magic,
    /// A blob's bytes do not lie in its file.
    #[error("{bytes} bytes at offset {offset} do not lie in a file of {file_bytes}")]
    OutsideFile {
        /// Where it begins.
        offset: u64,
        /// How long it is.
        bytes: u64,
        /// How long the file is.
        file_bytes: u64,
    },
    /// A file that can't be read as a file.
    #[error("a descriptor that can't be used: {0}")]
    File(String),
}

/// The header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What it is.
    pub kind: Kind,
    /// It answers such a message.
    pub is_answer: bool,
    /// Of the question, and of its answer.
    pub serial: u32,
    /// Of an answer.
    pub status: Status,
}

impl Header {
    /// The whole message.
    #[must_use]
    pub fn encode(&self, body: &[u8]) -> Vec<u8> {
        let mut out = Writer::default();
        let answer = if self.is_answer { ANSWER } else { 0 };
        out.u32(self.kind.value() | answer);
        out.u32(self.serial);
        out.u32(self.status.value());
        out.u32(u32::try_from(body.len()).unwrap_or(u32::MAX));
        out.bytes(body);
        out.finish()
    }

    /// The header and the body of a message.
    ///
    /// # Errors
    /// It is none.
    pub fn decode(message: &[u8]) -> Result<(Self, &[u8]), Malformed> {
        let mut reader = Reader::new("a message's header", message);
        let (kind, serial) = (reader.u32()?, reader.u32()?);
        let (status, said) = (reader.u32()?, reader.u32()?);
        let body = reader.rest();
        if usize::try_from(said) != Ok(body.len()) {
            let there = body.len();
            return Err(Malformed::Length { said, there });
        }
        let is_answer = kind & ANSWER != 0;
        let what = Kind::from_value(kind & !ANSWER).ok_or(Malformed::Kind(kind & !ANSWER))?;
        let value = |what| Malformed::Value {
            what,
            value: status.into(),
        };
        let status = Status::from_value(status).ok_or(value("a status"))?;
        if !is_answer && status != Status::Done {
            return Err(value("the status of a question"));
        }
        let header = Self {
            kind: what,
            is_answer,
            serial,
            status,
        };
        Ok((header, body))
    }

    /// The serial of a message whose kind nobody knows, for an answer that says so.
    #[must_use]
    pub fn serial_of_unknown(message: &[u8]) -> Option<u32> {
        let mut reader = Reader::new("a message's header", message);
        let kind = reader.u32().ok()?;
        let serial = reader.u32().ok()?;
        (kind & ANSWER == 0).then_some(serial)
    }
}

/// HELLO.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// The oldest version that the engine speaks.
    pub version_min: u32,
    /// The newest.
    pub version_max: u32,
    /// Its side.
    pub role: Role,
}

impl Hello {
    /// This crate's.
    #[must_use]
    pub const fn of(role: Role) -> Self {
        Self {
            version_min: VERSION,
            version_max: VERSION,
            role,
        }
    }

    /// Its body.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.u32(MAGIC);
        out.u32(self.version_min);
        out.u32(self.version_max);
        out.u32(self.role as u32);
        out.finish()
    }

    /// From a body.
    ///
    /// # Errors
    /// It is none.
    pub fn decode(body: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new("HELLO", body);
        if reader.u32()? != MAGIC {
            return Err(Malformed::Magic);
        }
        let (version_min, version_max, role) = (reader.u32()?, reader.u32()?, reader.u32()?);
        reader.end()?;
        let role = match role {
            1 => Role::Source,
            2 => Role::Destination,
            other => {
                return Err(Malformed::Value {
                    what: "a role",
                    value: other.into(),
                });
            }
        };
        if version_min == 0 || version_min > version_max {
            return Err(Malformed::Value {
                what: "the oldest version",
                value: version_min.into(),
            });
        }
        Ok(Self {
            version_min,
            version_max,
            role,
        })
    }
}

/// The answer to HELLO.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Welcome {
    /// The version that is spoken.
    pub version: u32,
    /// What the VMM knows.
    pub state: State,
    /// The ticket of the session that the state is about; zeros if there is none.
    pub ticket: [u8; TICKET_BYTES],
}

impl fmt::Debug for Welcome {
    /// Without the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Welcome")
            .field("version", &self.version)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl Welcome {
    /// Its body.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.u32(self.version);
        out.u32(self.state as u32);
        out.bytes(&self.ticket);
        out.finish()
    }

    /// From a body.
    ///
    /// # Errors
    /// It is none, or of a version that was not offered.
    pub fn decode(body: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new("the answer to HELLO", body);
        let (version, state) = (reader.u32()?, reader.u32()?);
        let ticket = reader.array()?;
        reader.end()?;
        let value = |what, value: u32| Malformed::Value {
            what,
            value: value.into(),
        };
        if version != VERSION {
            return Err(value("the version of an answer", version));
        }
        let known = State::ALL.into_iter().find(|known| *known as u32 == state);
        Ok(Self {
            version,
            state: known.ok_or(value("a VMM's state", state))?,
            ticket,
        })
    }
}

/// The step of a collection by bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Collect {
    /// Begin: what is written from now on is to be found. The bitmap's content does not matter.
    Start = 0,
    /// The guest runs.
    Running = 1,
    /// The guest is paused.
    Paused = 2,
    /// It is over: no page need be found any more.
    Stop = 3,
}

impl Collect {
    /// Its body.
    #[must_use]
    pub fn encode(self) -> Vec<u8> {
        word(self as u32)
    }

    /// From a body.
    ///
    /// # Errors
    /// It is none.
    pub fn decode(body: &[u8]) -> Result<Self, Malformed> {
        match read_word("COLLECT", body)? {
            0 => Ok(Self::Start),
            1 => Ok(Self::Running),
            2 => Ok(Self::Paused),
            3 => Ok(Self::Stop),
            other => Err(Malformed::Value {
                what: "the step of COLLECT",
                value: other.into(),
            }),
        }
    }
}

/// ENDED: how, and in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// How.
    pub outcome: Outcome,
    /// In words, for a log; empty if it went well.
    pub text: String,
}

impl Ended {
    /// Its body.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.u32(self.outcome.value());
        out.u32(0);
        out.bytes(cut(&self.text).as_bytes());
        out.finish()
    }

    /// From a body.
    ///
    /// # Errors
    /// It is none.
    pub fn decode(body: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new("ENDED", body);
        let outcome = reader.u32()?;
        reader.zero()?;
        let text = text(reader.rest())?;
        let known = Outcome::ALL.into_iter().find(|it| it.value() == outcome);
        let outcome = known.ok_or(Malformed::Value {
            what: "an outcome",
            value: outcome.into(),
        })?;
        Ok(Self { outcome, text })
    }
}

/// A body of one word and a zero: GUEST's answer (0 runs, 1 is paused), COLLECT, THROTTLE (percent).
#[must_use]
pub fn word(value: u32) -> Vec<u8> {
    let mut out = Writer::default();
    out.u32(value);
    out.u32(0);
    out.finish()
}

/// As [`word`] writes it.
///
/// # Errors
/// It is none.
pub fn read_word(what: &'static str, body: &[u8]) -> Result<u32, Malformed> {
    let mut reader = Reader::new(what, body);
    let value = reader.u32()?;
    reader.zero()?;
    reader.end()?;
    Ok(value)
}

/// A ticket or a session's name, and nothing else.
///
/// # Errors
/// It is none.
pub fn read_array<const N: usize>(what: &'static str, body: &[u8]) -> Result<[u8; N], Malformed> {
    let mut reader = Reader::new(what, body);
    let array = reader.array()?;
    reader.end()?;
    Ok(array)
}

/// Nothing.
///
/// # Errors
/// There is something.
pub fn read_nothing(what: &'static str, body: &[u8]) -> Result<(), Malformed> {
    Reader::new(what, body).end()
}

/// The text of an error.
///
/// # Errors
/// It is none.
pub fn text(bytes: &[u8]) -> Result<String, Malformed> {
    if bytes.len() > TEXT_BYTES_MAX {
        return Err(Malformed::Count {
            what: "bytes of text",
            count: bytes.len() as u64,
            max: TEXT_BYTES_MAX as u64,
        });
    }
    let text = std::str::from_utf8(bytes).map_err(|_| Malformed::Text)?;
    Ok(text.to_owned())
}

/// As much of a text as may be sent.
#[must_use]
pub fn cut(text: &str) -> &str {
    let mut end = text.len().min(TEXT_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests;
