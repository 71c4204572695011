//! Reason and phase codes: what one side tells the other, and the user, about where and why something ended.
//!
//! A code never changes its meaning. Reasons are an open list: one that this version does not know is kept with its
//! number (SPEC EXT-4). Phases are a closed list.

use core::fmt;
use core::num::NonZeroU32;

/// A reason code that this version gives no name to; only [`Reason::from_u32`] makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Unassigned(NonZeroU32);

/// Defines [`Reason`] from one list of code, name, meaning and advice.
macro_rules! reasons {
    ($($name:ident = $code:literal, $text:literal, $advice:literal;)*) => {
        /// Why a hello was refused, a lane was given up or a session ended. Source: SPEC, section "Reasons".
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Reason {
            $(#[doc = concat!($text, " (code ", $code, ").")] $name,)*
            /// A code from a later list; to be handled like [`Reason::Internal`].
            Unassigned(Unassigned),
        }

        impl Reason {
            /// Every reason that has a name, in the order of the codes.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The reason that a code stands for; `None` for 0, which means "no reason".
            // SPEC: REASON-1, EXT-4
            #[must_use]
            pub const fn from_u32(code: u32) -> Option<Self> {
                match code {
                    $($code => Some(Self::$name),)*
                    _ => match NonZeroU32::new(code) {
                        Some(code) => Some(Self::Unassigned(Unassigned(code))),
                        None => None,
                    },
                }
            }

            /// The code on the wire, never 0.
            #[must_use]
            pub const fn as_u32(self) -> u32 {
                match self {
                    $(Self::$name => $code,)*
                    Self::Unassigned(Unassigned(code)) => code.get(),
                }
            }

            /// What the reason means, as a clause without a full stop.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                    Self::Unassigned(_) => "a reason that this version does not know",
                }
            }

            /// What the user can do about it, as a sentence.
            #[must_use]
            pub const fn advice(self) -> &'static str {
                match self {
                    $(Self::$name => $advice,)*
                    Self::Unassigned(_) => "Look the number up in the specification that the peer follows.",
                }
            }
        }
    };
}

reasons! {
    Cancelled = 1, "the migration was cancelled", "Nothing is wrong; start it again when wanted.";
    Malformed = 2, "octets that the format does not allow", "Check that the peer speaks multifd and that its version is sound.";
    Misbehaved = 3, "a legal frame at a moment when it is not allowed", "Report it: one of the two implementations breaks the protocol.";
    Incompatible = 4, "no protocol version or feature set in common", "Compare versions and set-up of both sides.";
    Timeout = 5, "the peer did not answer in time", "Check the link and the peer's load, or raise the deadline.";
    VmmRefused = 6, "the machine monitor refused", "Read the monitor's own message on the side that refused.";
    DigestMismatch = 7, "the memory digests of the two sides differ", "Report it: memory would have been lost; the guest was not resumed.";
    MemoryMismatch = 8, "the memory layouts of the two sides differ", "Start the destination with the source's memory layout.";
    DeviceRefused = 9, "a device refused its state or the migration", "Read the device's own message; compare its model and version on both sides.";
    ResourceLimit = 10, "a resource limit was reached", "Raise the limit named in the text, or free the resource.";
    Internal = 11, "an internal error", "Report it with the text.";
    Busy = 12, "the destination is busy with another session", "Wait for the other session to end, or use another destination.";
    Version = 13, "no protocol version in common", "Upgrade the older side.";
    Feature = 14, "a feature that one side requires is not offered by the other", "Upgrade the side that lacks it, or do not require it.";
    WrongSession = 15, "the session is not known here", "Start a new migration; the destination holds no such session.";
    BadTicket = 16, "the ticket or secret does not match", "Check that no two migrations are mixed up; start again.";
    TooManyLanes = 17, "more data channels than allowed", "Use fewer channels, or raise the destination's limit.";
    ChannelsLost = 18, "the channels were lost", "Check the link; resume if the session allows it.";
    ShuttingDown = 19, "the peer is shutting down", "Try again when it is back, or use another destination.";
    Corruption = 20, "octets were changed on the way", "Check the network path; checksums caught it.";
    CannotConverge = 21, "the guest changes memory faster than it can be sent", "Throttle the guest, allow more downtime or give more bandwidth.";
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unassigned(code) => write!(f, "{} ({})", self.text(), code.0),
            _ => f.write_str(self.text()),
        }
    }
}

/// Where in its life a session is. Source: SPEC, section "Phases".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Hellos are exchanged (code 0).
    Hello,
    /// Configuration, regions and devices are agreed on (code 1).
    Setup,
    /// Memory and devices travel while the guest runs (code 2).
    Rounds,
    /// The guest is paused and what is left travels (code 3).
    Switchover,
    /// From `prepared` to `running` (code 4).
    Commit,
    /// The guest runs at the destination, or the session ended (code 5).
    Done,
    /// All channels are lost and the destination waits for a resume (code 6).
    Suspended,
    /// Connections of machine monitors are carried (code 7).
    Carrying,
}

impl Phase {
    /// Every phase, in the order of the codes.
    pub const ALL: &'static [Self] = &[
        Self::Hello,
        Self::Setup,
        Self::Rounds,
        Self::Switchover,
        Self::Commit,
        Self::Done,
        Self::Suspended,
        Self::Carrying,
    ];

    /// The phase that a code stands for.
    #[must_use]
    pub const fn from_u32(code: u32) -> Option<Self> {
        match code {
            0 => Some(Self::Hello),
            1 => Some(Self::Setup),
            2 => Some(Self::Rounds),
            3 => Some(Self::Switchover),
            4 => Some(Self::Commit),
            5 => Some(Self::Done),
            6 => Some(Self::Suspended),
            7 => Some(Self::Carrying),
            _ => None,
        }
    }

    /// The code on the wire.
    #[must_use]
    pub const fn as_u32(self) -> u32 {
        match self {
            Self::Hello => 0,
            Self::Setup => 1,
            Self::Rounds => 2,
            Self::Switchover => 3,
            Self::Commit => 4,
            Self::Done => 5,
            Self::Suspended => 6,
            Self::Carrying => 7,
        }
    }

    /// The phase's name as reports and SPEC.md print it.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Hello => "hello",
            Self::Setup => "set-up",
            Self::Rounds => "rounds",
            Self::Switchover => "switchover",
            Self::Commit => "commit",
            Self::Done => "done",
            Self::Suspended => "suspended",
            Self::Carrying => "carrying",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}
