//! Hello: 128 octets that the source sends first on every channel. Same layout in every version.
//!
//! ```text
//!        0       2       4       6       8      10      12  13  14      16
//!       +-------------------------------+-------+-------+---+---+-------+
//!     0 | magic "MULTIFD\n"             | v_min | v_max |rol|chn| intent|
//!       +-------------------------------+-------+-------+---+---+-------+
//!    16 | features_mandatory            | features_optional             |
//!       +-------------------------------+-------------------------------+
//!    32 | session                                                       |
//!       +---------------------------------------------------------------+
//!    48 | token: pass (start), ticket (join), resume secret (resume, ask)|
//!       +---------------+---------------+-------------------------------+
//!    64 | lane          | incarnation   | parameters, 48 octets ...     |
//!       +---------------+---------------+---------------+---------------+
//!   112 | ... parameters                | reserved      | crc of 0..124 |
//!       +-------------------------------+---------------+---------------+
//! ```
//!
//! A hello has a fixed size so that nothing is allocated for a peer before it has shown that it belongs here.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::codec;
use crate::error::Malformed;
use crate::feature::Features;
use crate::id::{Incarnation, LaneId, SessionId, Token};
use crate::kind::{ChannelKind, Role};
use crate::limits::PARAMETERS_MAX;
use crate::parameter::{self, Parameters};

/// The size of a hello in octets. SPEC: HELLO-1
pub const HELLO_BYTES: usize = 128;

/// What every hello and reply begins with. SPEC: HELLO-2
pub(crate) const MAGIC: [u8; 8] = *b"MULTIFD\n";

/// The octets of a hello that its checksum covers.
const COVERED_BYTES: usize = 124;

/// The versions that a side speaks: all from `min` to `max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VersionRange {
    min: u16,
    max: u16,
}

impl VersionRange {
    /// What this crate speaks.
    pub const OURS: Self = Self {
        min: crate::VERSION,
        max: crate::VERSION,
    };

    /// All versions from `min` to `max`; `None` when `min` is 0 or above `max`.
    #[must_use]
    pub const fn new(min: u16, max: u16) -> Option<Self> {
        if min == 0 || min > max {
            None
        } else {
            Some(Self { min, max })
        }
    }

    /// The lowest version.
    #[must_use]
    pub const fn min(self) -> u16 {
        self.min
    }

    /// The highest version.
    #[must_use]
    pub const fn max(self) -> u16 {
        self.max
    }

    /// Whether a version lies in the range.
    #[must_use]
    pub const fn contains(self, version: u16) -> bool {
        self.min <= version && version <= self.max
    }

    /// The highest version that both ranges hold.
    // SPEC: VER-2
    #[must_use]
    pub fn newest_common(self, other: Self) -> Option<u16> {
        let newest = self.max.min(other.max);
        (self.contains(newest) && other.contains(newest)).then_some(newest)
    }
}

/// What a channel is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Intent {
    /// Begin a session (code 1); control channel.
    Start,
    /// Add a data channel to a session (code 2).
    Join,
    /// Go on with a session that lost its channels (code 3); control channel.
    Resume,
    /// Ask how a session ended (code 4); control channel.
    Ask,
}

impl Intent {
    /// Every intent, in the order of the codes.
    pub const ALL: &'static [Self] = &[Self::Start, Self::Join, Self::Resume, Self::Ask];

    /// The intent that a code stands for.
    #[must_use]
    pub const fn from_u16(code: u16) -> Option<Self> {
        match code {
            1 => Some(Self::Start),
            2 => Some(Self::Join),
            3 => Some(Self::Resume),
            4 => Some(Self::Ask),
            _ => None,
        }
    }

    /// The code on the wire.
    #[must_use]
    pub const fn as_u16(self) -> u16 {
        match self {
            Self::Start => 1,
            Self::Join => 2,
            Self::Resume => 3,
            Self::Ask => 4,
        }
    }

    /// The kind of channel that is opened with this intent.
    #[must_use]
    pub const fn channel(self) -> ChannelKind {
        match self {
            Self::Join => ChannelKind::Data,
            Self::Start | Self::Resume | Self::Ask => ChannelKind::Control,
        }
    }
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    version_min: U16,
    version_max: U16,
    role: u8,
    channel: u8,
    intent: U16,
    features_mandatory: U64,
    features_optional: U64,
    session: [u8; 16],
    token: [u8; 16],
    lane: U32,
    incarnation: U32,
    parameters: [parameter::Raw; PARAMETERS_MAX],
    reserved: U32,
    crc: U32,
}

const _: () = assert!(size_of::<Raw>() == HELLO_BYTES);

/// The first thing on a channel: who dials, what for, and what it can do.
///
/// The constructors make hellos that [`decode`](Self::decode) takes; fields that contradict each other are refused there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The versions that the dialler speaks.
    pub versions: VersionRange,
    /// The dialler's side; in version 1 always the source.
    pub role: Role,
    /// What the channel is for.
    pub channel: ChannelKind,
    /// What the channel is opened for.
    pub intent: Intent,
    /// Features without which the dialler does not go on.
    pub features_mandatory: Features,
    /// Features that the dialler would like to use; none of the mandatory ones.
    pub features_optional: Features,
    /// The session that is begun, joined, resumed or asked about.
    pub session: SessionId,
    /// The pass to start, if the destination wants to see one; the ticket to join, the resume secret to resume or ask.
    pub token: Token,
    /// The lane of a data channel; 0 on a control channel.
    pub lane: LaneId,
    /// The incarnation of that lane; 0 on a control channel.
    pub incarnation: Incarnation,
    /// Values of the features; none in a hello that does not start a session.
    pub parameters: Parameters,
}

impl Hello {
    /// The hello that begins a session on its control channel.
    #[must_use]
    pub const fn start(session: SessionId, mandatory: Features, optional: Features) -> Self {
        Self {
            versions: VersionRange::OURS,
            role: Role::Source,
            channel: ChannelKind::Control,
            intent: Intent::Start,
            features_mandatory: mandatory,
            features_optional: optional.without(mandatory),
            session,
            token: Token::NONE,
            lane: LaneId::new(0),
            incarnation: Incarnation::new(0),
            parameters: Parameters::NONE,
        }
    }

    /// The same, with the pass that the destination wants to see.
    #[must_use]
    pub const fn with_pass(self, pass: Token) -> Self {
        Self {
            token: pass,
            ..self
        }
    }

    /// The hello of a data channel, with the features that the control channel agreed on.
    #[must_use]
    pub const fn join(
        session: SessionId,
        ticket: Token,
        agreed: Features,
        lane: LaneId,
        incarnation: Incarnation,
    ) -> Self {
        let start = Self::start(session, agreed, Features::NONE);
        Self {
            channel: ChannelKind::Data,
            intent: Intent::Join,
            token: ticket,
            lane,
            incarnation,
            ..start
        }
    }

    /// The hello that goes on with a session that lost its channels, with the features that it had.
    #[must_use]
    pub const fn resume(session: SessionId, secret: Token, agreed: Features) -> Self {
        let start = Self::start(session, agreed, Features::NONE);
        Self {
            intent: Intent::Resume,
            token: secret,
            ..start
        }
    }

    /// The hello that asks how a session ended.
    #[must_use]
    pub const fn ask(session: SessionId, secret: Token) -> Self {
        let start = Self::start(session, Features::NONE, Features::NONE);
        Self {
            intent: Intent::Ask,
            token: secret,
            ..start
        }
    }

    /// The octets as they travel.
    #[must_use]
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut raw = Raw {
            magic: MAGIC,
            version_min: U16::new(self.versions.min),
            version_max: U16::new(self.versions.max),
            role: self.role.as_u8(),
            channel: self.channel.as_u8(),
            intent: U16::new(self.intent.as_u16()),
            features_mandatory: U64::new(self.features_mandatory.value()),
            features_optional: U64::new(self.features_optional.value()),
            session: self.session.value(),
            token: self.token.value(),
            lane: U32::new(self.lane.value()),
            incarnation: U32::new(self.incarnation.value()),
            parameters: self.parameters.encode(),
            reserved: U32::ZERO,
            crc: U32::ZERO,
        };
        raw.crc = U32::new(raw.crc());
        zerocopy::transmute!(raw)
    }

    /// Checks a hello: magic, checksum, versions, then everything else.
    ///
    /// # Errors
    /// [`Malformed`]: `Magic`, `HelloCrc`, `Reserved` or `Value`. To answer such a peer, see
    /// [`negotiate::refuse`](crate::negotiate::refuse).
    // SPEC: HELLO-1, HELLO-3, HELLO-5
    pub fn decode(octets: &[u8; HELLO_BYTES]) -> Result<Self, Malformed> {
        let raw = Raw::checked(octets)?;
        let hello = Self {
            versions: raw.versions()?,
            role: raw.role()?,
            channel: ChannelKind::from_u8(raw.channel)
                .ok_or_else(|| refused("hello.channel", u64::from(raw.channel)))?,
            intent: Intent::from_u16(raw.intent.get())
                .ok_or_else(|| refused("hello.intent", u64::from(raw.intent.get())))?,
            features_mandatory: Features::new(raw.features_mandatory.get()),
            features_optional: Features::new(raw.features_optional.get()),
            session: SessionId::new(raw.session),
            token: Token::new(raw.token),
            lane: codec::lane("hello.lane", raw.lane.get())?,
            incarnation: Incarnation::new(raw.incarnation.get()),
            parameters: raw.parameters()?,
        };
        codec::reserved("hello.reserved", u64::from(raw.reserved.get()))?;
        hello.check()?;
        Ok(hello)
    }

    /// The versions and the session in octets whose magic and checksum are right, whatever else they hold: what is
    /// needed to refuse politely a peer of a later version.
    ///
    /// # Errors
    /// [`Malformed`]: `Magic`, `HelloCrc`, or `Value` for an impossible range.
    // SPEC: VER-3
    pub fn peek(octets: &[u8; HELLO_BYTES]) -> Result<(VersionRange, SessionId), Malformed> {
        let raw = Raw::checked(octets)?;
        Ok((raw.versions()?, SessionId::new(raw.session)))
    }

    /// Refuses fields that contradict each other.
    // SPEC: HELLO-6, HELLO-7, HELLO-8, HELLO-9, FEAT-2, PARAM-2
    fn check(&self) -> Result<(), Malformed> {
        if self.channel != self.intent.channel() {
            return Err(refused("hello.intent", u64::from(self.intent.as_u16())));
        }
        let both = self.features_mandatory.intersection(self.features_optional);
        if !both.is_empty() {
            return Err(refused(
                "hello.features_optional",
                self.features_optional.value(),
            ));
        }
        if self.session.is_zero() {
            return Err(refused("hello.session", 0));
        }
        if self.token.is_none() && self.intent != Intent::Start {
            return Err(refused("hello.token", 0));
        }
        if self.intent != Intent::Start && self.parameters != Parameters::NONE {
            return Err(refused(
                "hello.parameters",
                self.parameters.features().value(),
            ));
        }
        if self.channel == ChannelKind::Control {
            codec::reserved("hello.lane", u64::from(self.lane.value()))?;
            codec::reserved("hello.incarnation", u64::from(self.incarnation.value()))?;
        }
        Ok(())
    }
}

impl Raw {
    /// Views octets whose magic and checksum are right.
    // SPEC: HELLO-2, HELLO-4
    fn checked(octets: &[u8; HELLO_BYTES]) -> Result<Self, Malformed> {
        let raw: Self = zerocopy::transmute!(*octets);
        if raw.magic != MAGIC {
            return Err(Malformed::Magic { structure: "hello" });
        }
        let (found, computed) = (raw.crc.get(), raw.crc());
        if found != computed {
            return Err(Malformed::HelloCrc {
                structure: "hello",
                found,
                computed,
            });
        }
        Ok(raw)
    }

    /// The version range, if it is one.
    // SPEC: VER-1
    fn versions(&self) -> Result<VersionRange, Malformed> {
        let (min, max) = (self.version_min.get(), self.version_max.get());
        VersionRange::new(min, max).ok_or(refused("hello.version_min", u64::from(min)))
    }

    /// The dialler's side. A destination that dials is left for a later version.
    // SPEC: HELLO-6
    fn role(&self) -> Result<Role, Malformed> {
        match Role::from_u8(self.role) {
            Some(Role::Source) => Ok(Role::Source),
            _ => Err(refused("hello.role", u64::from(self.role))),
        }
    }

    /// The values of the features that the hello names.
    fn parameters(&self) -> Result<Parameters, Malformed> {
        let named = self.features_mandatory.get() | self.features_optional.get();
        Parameters::decode("hello.parameters", &self.parameters, Features::new(named))
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

/// A value that is not allowed here. Token values are never passed.
const fn refused(field: &'static str, value: u64) -> Malformed {
    Malformed::Value { field, value }
}
