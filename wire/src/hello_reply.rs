//! The reply to a hello: 256 octets, accepted or refused with a reason. Same layout in every version.
//!
//! ```text
//!        0       2       4               8      10      12              16
//!       +-------------------------------+-------+-------+---------------+
//!     0 | magic "MULTIFD\n"             |version|status | reason        |
//!       +-------------------------------+-------+-------+---------------+
//!    16 | features                      | session ...                   |
//!       +-------------------------------+---+---------------------------+
//!    32 | ... session                   |rol| reserved, 7 octets        |
//!       +-------+-----------------------+---+---------------------------+
//!    48 | bytes | reserved, 6 octets    | text, 136 octets ...          |
//!       +-------+-----------------------+-------------------------------+
//!   192 | parameters, 48 octets ...                                     |
//!       +---------------------------------------------------------------+
//!   240 | reserved, 12 octets                           | crc of 0..252 |
//!       +-----------------------------------------------+---------------+
//! ```

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::code::Reason;
use crate::codec;
use crate::error::Malformed;
use crate::feature::Features;
use crate::hello::MAGIC;
use crate::id::SessionId;
use crate::kind::Role;
use crate::limits::{PARAMETERS_MAX, REPLY_TEXT_BYTES_MAX};
use crate::parameter::{self, Parameters};
use crate::text::Text;

/// The size of a reply in octets. SPEC: REPLY-1
pub const HELLO_REPLY_BYTES: usize = 256;

/// The octets of a reply that its checksum covers.
const COVERED_BYTES: usize = 252;

/// The status codes.
const ACCEPTED: u16 = 0;
const REFUSED: u16 = 1;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    version: U16,
    status: U16,
    reason: U32,
    features: U64,
    session: [u8; 16],
    role: u8,
    reserved_a: [u8; 7],
    text_bytes: U16,
    reserved_b: [u8; 6],
    text: [u8; REPLY_TEXT_BYTES_MAX],
    parameters: [parameter::Raw; PARAMETERS_MAX],
    reserved_c: [u8; 12],
    crc: U32,
}

const _: () = assert!(size_of::<Raw>() == HELLO_REPLY_BYTES);

/// What the destination answers to a hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HelloReply {
    /// The channel is open.
    Accepted {
        /// The version to be spoken on it.
        version: u16,
        /// The features that both sides use.
        features: Features,
        /// The session of the hello.
        session: SessionId,
        /// Values of those features.
        parameters: Parameters,
    },
    /// The channel will be closed.
    Refused {
        /// Why.
        reason: Reason,
        /// More about it, for people; possibly empty.
        text: Text<REPLY_TEXT_BYTES_MAX>,
        /// The session of the hello; all zero when the hello could not be read.
        session: SessionId,
    },
}

impl HelloReply {
    /// An acceptance without parameters.
    #[must_use]
    pub const fn accepted(version: u16, features: Features, session: SessionId) -> Self {
        Self::Accepted {
            version,
            features,
            session,
            parameters: Parameters::NONE,
        }
    }

    /// A refusal whose text is cut to what fits.
    #[must_use]
    pub fn refused(reason: Reason, text: &str, session: SessionId) -> Self {
        Self::Refused {
            reason,
            text: Text::clip(text),
            session,
        }
    }

    /// The octets as they travel.
    #[must_use]
    pub fn encode(&self) -> [u8; HELLO_REPLY_BYTES] {
        let mut raw = self.raw();
        raw.crc = U32::new(raw.crc());
        zerocopy::transmute!(raw)
    }

    /// Checks a reply.
    ///
    /// # Errors
    /// [`Malformed`]: `Magic`, `HelloCrc`, `Reserved`, `Value` or `Text`.
    // SPEC: REPLY-1, REPLY-2, REPLY-3, REPLY-4
    pub fn decode(octets: &[u8; HELLO_REPLY_BYTES]) -> Result<Self, Malformed> {
        let raw = Raw::checked(octets)?;
        raw.check_common()?;
        match raw.status.get() {
            ACCEPTED => raw.accepted(),
            REFUSED => raw.refused(),
            status => Err(Malformed::Value {
                field: "hello_reply.status",
                value: u64::from(status),
            }),
        }
    }

    /// The raw structure without its checksum.
    fn raw(&self) -> Raw {
        let blank = Raw {
            magic: MAGIC,
            version: U16::ZERO,
            status: U16::ZERO,
            reason: U32::ZERO,
            features: U64::ZERO,
            session: [0; 16],
            role: Role::Destination.as_u8(),
            reserved_a: [0; 7],
            text_bytes: U16::ZERO,
            reserved_b: [0; 6],
            text: [0; REPLY_TEXT_BYTES_MAX],
            parameters: Parameters::NONE.encode(),
            reserved_c: [0; 12],
            crc: U32::ZERO,
        };
        match self {
            Self::Accepted {
                version,
                features,
                session,
                parameters,
            } => Raw {
                version: U16::new(*version),
                status: U16::new(ACCEPTED),
                features: U64::new(features.value()),
                session: session.value(),
                parameters: parameters.encode(),
                ..blank
            },
            Self::Refused {
                reason,
                text,
                session,
            } => Raw {
                status: U16::new(REFUSED),
                reason: U32::new(reason.as_u32()),
                session: session.value(),
                text_bytes: U16::new(u16::try_from(text.bytes()).unwrap_or(0)),
                text: *text.field(),
                ..blank
            },
        }
    }
}

impl HelloReply {
    /// What a reply is refused for of which it is known that octets were changed on the way, in the magic too: its checksum is wrong.
    #[must_use]
    pub fn damaged(octets: &[u8; HELLO_REPLY_BYTES]) -> Malformed {
        let raw: Raw = zerocopy::transmute!(*octets);
        Malformed::HelloCrc {
            structure: "hello_reply",
            found: raw.crc.get(),
            computed: raw.crc(),
        }
    }
}

impl Raw {
    /// Views octets whose magic and checksum are right.
    // SPEC: REPLY-1
    fn checked(octets: &[u8; HELLO_REPLY_BYTES]) -> Result<Self, Malformed> {
        let raw: Self = zerocopy::transmute!(*octets);
        if raw.magic != MAGIC {
            return Err(Malformed::Magic {
                structure: "hello_reply",
            });
        }
        let (found, computed) = (raw.crc.get(), raw.crc());
        if found != computed {
            return Err(Malformed::HelloCrc {
                structure: "hello_reply",
                found,
                computed,
            });
        }
        Ok(raw)
    }

    /// Refuses what neither kind of reply may have.
    fn check_common(&self) -> Result<(), Malformed> {
        codec::reserved_octets("hello_reply.reserved", &self.reserved_a)?;
        codec::reserved_octets("hello_reply.reserved", &self.reserved_b)?;
        codec::reserved_octets("hello_reply.reserved", &self.reserved_c)?;
        if self.role != Role::Destination.as_u8() {
            return Err(Malformed::Value {
                field: "hello_reply.role",
                value: u64::from(self.role),
            });
        }
        Ok(())
    }

    /// An acceptance has a version and a session, and neither reason nor text.
    // SPEC: REPLY-2
    fn accepted(&self) -> Result<HelloReply, Malformed> {
        codec::reserved("hello_reply.reason", u64::from(self.reason.get()))?;
        codec::reserved("hello_reply.text_bytes", u64::from(self.text_bytes.get()))?;
        codec::reserved_octets("hello_reply.text", &self.text)?;
        let version = self.version.get();
        let session = SessionId::new(self.session);
        if version == 0 {
            return Err(Malformed::Value {
                field: "hello_reply.version",
                value: 0,
            });
        }
        if session.is_zero() {
            return Err(Malformed::Value {
                field: "hello_reply.session",
                value: 0,
            });
        }
        let features = Features::new(self.features.get());
        let parameters = Parameters::decode("hello_reply.parameters", &self.parameters, features)?;
        Ok(HelloReply::Accepted {
            version,
            features,
            session,
            parameters,
        })
    }

    /// A refusal has a reason, and neither version nor features.
    // SPEC: REPLY-3, PARAM-2
    fn refused(&self) -> Result<HelloReply, Malformed> {
        codec::reserved("hello_reply.version", u64::from(self.version.get()))?;
        codec::reserved("hello_reply.features", self.features.get())?;
        Parameters::decode("hello_reply.parameters", &self.parameters, Features::NONE)?;
        let reason = Reason::from_u32(self.reason.get()).ok_or(Malformed::Value {
            field: "hello_reply.reason",
            value: 0,
        })?;
        let bytes = usize::from(self.text_bytes.get());
        let text = Text::from_field("hello_reply.text", &self.text, bytes)?;
        Ok(HelloReply::Refused {
            reason,
            text,
            session: SessionId::new(self.session),
        })
    }

    /// The checksum of everything before the checksum itself.
    fn crc(&self) -> u32 {
        let (covered, _) = self
            .as_bytes()
            .split_at_checked(COVERED_BYTES)
            .unwrap_or_default();
        crc32fast::hash(covered)
    }
}
