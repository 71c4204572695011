//! Numbers with an owner: one type per meaning, so that a lane is never passed for a region.
//!
//! These are names, not proofs: any value can be made. Whether a number is within the limits is checked where a frame is
//! decoded, and whether it names something that exists is checked by the session or the [`Layout`](crate::Layout).

use core::fmt;

/// Defines a `Copy` newtype over an integer with `new`, `value` and `Display`.
macro_rules! number {
    ($(#[$doc:meta])* $name:ident($int:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name($int);

        impl $name {
            /// Gives the number its meaning.
            #[must_use]
            pub const fn new(value: $int) -> Self {
                Self(value)
            }

            /// The bare number.
            #[must_use]
            pub const fn value(self) -> $int {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number! {
    /// The number of a round, from 0 (all memory), at most [`ROUND_MAX`](crate::limits::ROUND_MAX).
    Round(u32)
}
number! {
    /// The number of a data channel in its session, below [`LANES_MAX`](crate::limits::LANES_MAX).
    LaneId(u32)
}
number! {
    /// Which connection of a lane: 0 for the first, one more each time the lane is dialled again.
    Incarnation(u32)
}
number! {
    /// The number of a region: its 0-based place in the region table.
    RegionId(u32)
}
number! {
    /// The number of a device: its 0-based place in the device table.
    DeviceId(u32)
}
number! {
    /// The number of a carried stream: its connection's 0-based place in the order of accepting, below
    /// [`STREAMS_MAX`](crate::limits::STREAMS_MAX).
    StreamId(u32)
}
number! {
    /// Which batch of a device's initial bytes: 1 for the first, one more each time the device announces new ones; 0 for none.
    Generation(u32)
}
number! {
    /// The number of a frame on its channel and in its direction, from 0.
    Sequence(u64)
}
number! {
    /// A page's 0-based place inside its region.
    PageIndex(u64)
}
number! {
    /// A number of pages.
    PageCount(u64)
}

impl Round {
    /// The round after this one, or `None` past [`ROUND_MAX`](crate::limits::ROUND_MAX).
    #[must_use]
    pub fn next(self) -> Option<Self> {
        let next = self.0.checked_add(1)?;
        (next <= crate::limits::ROUND_MAX).then_some(Self(next))
    }
}

impl Incarnation {
    /// The incarnation that follows when the lane is dialled again, or `None` when the numbers are used up.
    #[must_use]
    pub fn next(self) -> Option<Self> {
        self.0.checked_add(1).map(Self)
    }
}

impl Generation {
    /// The generation that follows, or `None` when the numbers are used up.
    #[must_use]
    pub fn next(self) -> Option<Self> {
        self.0.checked_add(1).map(Self)
    }
}

impl Sequence {
    /// The sequence of the first frame on a channel.
    pub const FIRST: Self = Self(0);

    /// The sequence of the next frame. 2^64 frames are never sent; at the end the number stays.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// The identity of a migration, drawn at random by the source; not a secret. Source: SPEC HELLO-7.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId([u8; 16]);

impl SessionId {
    /// Wraps sixteen octets; all zero is not a session and is refused by the peer.
    #[must_use]
    pub const fn new(octets: [u8; 16]) -> Self {
        Self(octets)
    }

    /// The octets as they travel.
    #[must_use]
    pub const fn value(self) -> [u8; 16] {
        self.0
    }

    /// Whether all octets are zero.
    #[must_use]
    pub fn is_zero(self) -> bool {
        self.0 == [0; 16]
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|octet| write!(f, "{octet:02x}"))
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SessionId({self})")
    }
}

/// A secret: the ticket of a data channel or the resume secret, which the destination issued, or the pass of a source, on which the
/// users of both sides agreed.
///
/// It is never shown (`Debug` prints no octet) and is compared in a time that does not depend on where two tokens
/// differ, because a peer that could measure the comparison could find the secret octet by octet. Source: SPEC SEC-2.
#[derive(Clone, Copy)]
pub struct Token([u8; 16]);

impl Token {
    /// No token: what a hello that starts a session carries where no pass is asked for.
    pub const NONE: Self = Self([0; 16]);

    /// Wraps sixteen octets from a cryptographic random source; all zero means no token.
    #[must_use]
    pub const fn new(octets: [u8; 16]) -> Self {
        Self(octets)
    }

    /// Reads 32 hexadecimal digits; `None` for anything else, and for zero, which is no token.
    #[must_use]
    pub fn from_hex(text: &str) -> Option<Self> {
        let is_hex = text.len() == 32 && text.bytes().all(|digit| digit.is_ascii_hexdigit());
        let number = is_hex
            .then(|| u128::from_str_radix(text, 16).ok())
            .flatten()?;
        (number != 0).then(|| Self(number.to_be_bytes()))
    }

    /// The octets as they travel.
    #[must_use]
    pub const fn value(self) -> [u8; 16] {
        self.0
    }

    /// Whether all octets are zero.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::NONE
    }
}

impl PartialEq for Token {
    fn eq(&self, other: &Self) -> bool {
        let differing = self
            .0
            .iter()
            .zip(other.0.iter())
            .fold(0_u8, |sum, (a, b)| sum | (a ^ b));
        core::hint::black_box(differing) == 0
    }
}

impl Eq for Token {}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_none() {
            "Token(none)"
        } else {
            "Token(redacted)"
        })
    }
}

/// Which channel a report is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChannelRef {
    /// No channel in particular.
    None,
    /// The control channel.
    Control,
    /// The data channel of this lane.
    Lane(LaneId),
}

impl ChannelRef {
    /// The number that stands for it on the wire: `u32::MAX` none, 0 control, lane + 1.
    #[must_use]
    pub const fn as_u32(self) -> u32 {
        match self {
            Self::None => u32::MAX,
            Self::Control => 0,
            // A lane that cannot exist must not turn into "none": it becomes a number that the peer refuses.
            Self::Lane(lane) if lane.value() < u32::MAX.saturating_sub(1) => {
                lane.value().saturating_add(1)
            }
            Self::Lane(_) => u32::MAX.saturating_sub(1),
        }
    }

    /// The channel that a number stands for; `None` for a lane past [`LANES_MAX`](crate::limits::LANES_MAX).
    #[must_use]
    pub fn from_u32(value: u32) -> Option<Self> {
        match value {
            u32::MAX => Some(Self::None),
            0 => Some(Self::Control),
            _ => crate::codec::lane("channel", value.saturating_sub(1))
                .ok()
                .map(Self::Lane),
        }
    }
}

impl fmt::Display for ChannelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("no channel"),
            Self::Control => f.write_str("control channel"),
            Self::Lane(lane) => write!(f, "data channel {lane}"),
        }
    }
}
