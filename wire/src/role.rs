//! The two sides of a migration and the two kinds of channel between them.

use core::fmt;

/// Which side of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The host where the guest runs (code 1).
    Source,
    /// The host where the guest goes (code 2).
    Destination,
}

impl Role {
    /// The role that a code stands for.
    #[must_use]
    pub const fn from_u8(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Source),
            2 => Some(Self::Destination),
            _ => None,
        }
    }

    /// The code on the wire.
    #[must_use]
    pub const fn as_u8(self) -> u8 {
        match self {
            Self::Source => 1,
            Self::Destination => 2,
        }
    }

    /// The other side.
    #[must_use]
    pub const fn peer(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}

/// What a channel is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChannelKind {
    /// Set-up, round marks, acknowledgements, credits, switchover, errors (code 0).
    Control,
    /// Pages and device chunks (code 1).
    Data,
}

impl ChannelKind {
    /// The kind of channel that a code stands for.
    #[must_use]
    pub const fn from_u8(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Control),
            1 => Some(Self::Data),
            _ => None,
        }
    }

    /// The code on the wire.
    #[must_use]
    pub const fn as_u8(self) -> u8 {
        match self {
            Self::Control => 0,
            Self::Data => 1,
        }
    }
}

impl fmt::Display for ChannelKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Control => "control",
            Self::Data => "data",
        })
    }
}
