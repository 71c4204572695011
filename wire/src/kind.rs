//! Frame kinds: number, name, direction, channel, phases and sizes of each. The table itself is in `frame/mod.rs`, beside the types.
//!
//! Everything that depends only on a frame's kind is looked up here, before anything else of the frame is used, and
//! SPEC.md prints the same table; a test compares the two.

use core::fmt;

pub use crate::frame::Kind;
pub use crate::role::{ChannelKind, Role};

use crate::code::Phase;
use crate::error::{Malformed, Misbehaved};
use crate::limits::{BODY_BYTES_MAX, PAGES_PER_FRAME_MAX, RUNS_PER_PAGES_MAX, TABLE_BYTES_MAX};

/// Who sends frames of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Senders {
    /// Only the source.
    Source,
    /// Only the destination.
    Destination,
    /// Either side.
    Both,
}

/// What follows the table of a frame of some kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyShape {
    /// No body.
    None,
    /// Octets with a checksum in the header.
    Octets {
        /// The shortest body.
        min: usize,
        /// The longest body.
        max: usize,
    },
    /// Whole pages, each with a checksum in the table.
    Pages,
}

impl BodyShape {
    /// The shortest body.
    #[must_use]
    pub const fn min(self) -> usize {
        match self {
            Self::None => 0,
            Self::Octets { min, .. } => min,
            Self::Pages => crate::PAGE_BYTES,
        }
    }

    /// The longest body.
    #[must_use]
    pub const fn max(self) -> usize {
        match self {
            Self::None => 0,
            Self::Octets { max, .. } => max,
            Self::Pages => BODY_BYTES_MAX,
        }
    }
}

/// The sizes that a frame of some kind can have, in octets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The shortest table.
    pub table_min: usize,
    /// The longest table.
    pub table_max: usize,
    /// Table lengths differ by multiples of this.
    pub table_step: usize,
    /// What follows the table.
    pub body: BodyShape,
}

/// A table of one structure.
pub(crate) const fn fixed(bytes: usize) -> Shape {
    Shape {
        table_min: bytes,
        table_max: bytes,
        table_step: 1,
        body: BodyShape::None,
    }
}

/// A table of a structure and `min..=max` entries.
pub(crate) const fn list(bytes: usize, entry: usize, min: usize, max: usize) -> Shape {
    Shape {
        table_min: bytes.saturating_add(entry.saturating_mul(min)),
        table_max: bytes.saturating_add(entry.saturating_mul(max)),
        table_step: entry,
        body: BodyShape::None,
    }
}

/// The same with a body of `min` octets to as many as a frame holds.
pub(crate) const fn with_body(shape: Shape, min: usize) -> Shape {
    Shape {
        body: BodyShape::Octets {
            min,
            max: BODY_BYTES_MAX,
        },
        ..shape
    }
}

/// PAGES: 16 octets, 16 per run, 4 per page.
pub(crate) const PAGES_SHAPE: Shape = Shape {
    table_min: 36,
    table_max: 16_usize
        .saturating_add(RUNS_PER_PAGES_MAX.saturating_mul(16))
        .saturating_add(PAGES_PER_FRAME_MAX.saturating_mul(4)),
    table_step: 4,
    body: BodyShape::Pages,
};

/// What a reader allows for a kind that it does not know and may skip.
// SPEC: EXT-2
pub(crate) const UNKNOWN_SHAPE: Shape = Shape {
    table_min: 0,
    table_max: TABLE_BYTES_MAX,
    table_step: 1,
    body: BodyShape::Octets {
        min: 0,
        max: BODY_BYTES_MAX,
    },
};

/// Defines [`Kind`] from one table.
macro_rules! kinds {
    ($($name:ident = $code:literal, $text:literal, $from:ident, $on:ident, [$($phase:ident),*], $shape:expr;)*) => {
        /// The kind of a frame. Source: SPEC, section "Frame kinds".
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Kind {
            $(#[doc = concat!("`", $text, "`, code ", stringify!($code), ".")] $name,)*
            /// A kind that this version does not know and whose code says that it may be skipped.
            OptionalUnknown(u16),
        }

        impl Kind {
            /// Every kind that this version knows, in the order of the codes.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The code in a header.
            #[must_use]
            pub const fn code(self) -> u16 {
                match self {
                    $(Self::$name => $code,)*
                    Self::OptionalUnknown(code) => code,
                }
            }

            /// The name that SPEC.md uses.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                    Self::OptionalUnknown(_) => "UNKNOWN",
                }
            }

            /// The kind that a code stands for.
            ///
            /// # Errors
            /// [`Malformed::UnknownKind`] for a code that is not known and not marked as optional.
            // SPEC: EXT-1, EXT-2
            pub const fn from_code(code: u16) -> Result<Self, Malformed> {
                match code {
                    $($code => Ok(Self::$name),)*
                    _ if code & OPTIONAL != 0 => Ok(Self::OptionalUnknown(code)),
                    _ => Err(Malformed::UnknownKind { code }),
                }
            }

            /// Who sends frames of this kind.
            #[must_use]
            pub const fn senders(self) -> Senders {
                match self {
                    $(Self::$name => Senders::$from,)*
                    Self::OptionalUnknown(_) => Senders::Both,
                }
            }

            /// The kind of channel that frames of this kind travel on; `None` for either.
            #[must_use]
            pub const fn channel(self) -> Option<ChannelKind> {
                match self {
                    $(Self::$name => Some(ChannelKind::$on),)*
                    Self::OptionalUnknown(_) => None,
                }
            }

            /// The phases of the reader in which frames of this kind are allowed.
            #[must_use]
            pub const fn phases(self) -> &'static [Phase] {
                match self {
                    $(Self::$name => &[$(Phase::$phase),*],)*
                    Self::OptionalUnknown(_) => Phase::ALL,
                }
            }

            /// The sizes that frames of this kind can have.
            #[must_use]
            pub const fn shape(self) -> Shape {
                match self {
                    $(Self::$name => $shape,)*
                    Self::OptionalUnknown(_) => UNKNOWN_SHAPE,
                }
            }
        }
    };
}

/// The bit of a kind's code that says: who does not know this kind may skip it. SPEC: EXT-2
pub(crate) const OPTIONAL: u16 = 0x8000;

pub(crate) use kinds;

impl Kind {
    /// Whether a reader that does not know this kind may skip it.
    #[must_use]
    pub const fn is_optional(self) -> bool {
        self.code() & OPTIONAL != 0
    }

    /// Whether frames of this kind travel from this side on this kind of channel.
    #[must_use]
    pub fn may_travel(self, from: Role, on: ChannelKind) -> bool {
        let sender = match self.senders() {
            Senders::Source => from == Role::Source,
            Senders::Destination => from == Role::Destination,
            Senders::Both => true,
        };
        sender && self.channel().is_none_or(|channel| channel == on)
    }

    /// Whether a reader in this phase takes frames of this kind.
    #[must_use]
    pub fn may_come_in(self, phase: Phase) -> bool {
        self.phases().contains(&phase)
    }

    /// Refuses a kind that does not travel from this side on this kind of channel.
    ///
    /// # Errors
    /// [`Misbehaved::Direction`].
    // SPEC: KIND-1
    pub fn check_direction(self, from: Role, on: ChannelKind) -> Result<(), Misbehaved> {
        if self.may_travel(from, on) {
            Ok(())
        } else {
            Err(Misbehaved::Direction {
                kind: self,
                from,
                on,
            })
        }
    }

    /// Refuses a kind that is not allowed in the reader's phase.
    ///
    /// # Errors
    /// [`Misbehaved::Phase`].
    // SPEC: KIND-2
    pub fn check_phase(self, phase: Phase) -> Result<(), Misbehaved> {
        if self.may_come_in(phase) {
            Ok(())
        } else {
            Err(Misbehaved::Phase { kind: self, phase })
        }
    }

    /// The error that says which table lengths this kind has.
    pub(crate) const fn table_error(self, bytes: usize) -> Malformed {
        let shape = self.shape();
        Malformed::TableBytes {
            kind: self,
            bytes,
            min: shape.table_min,
            max: shape.table_max,
            step: shape.table_step,
        }
    }

    /// Refuses sizes that no frame of this kind has.
    // SPEC: HEAD-5
    pub(crate) fn check_sizes(self, table: usize, body: usize) -> Result<(), Malformed> {
        let shape = self.shape();
        let variable = table
            .checked_sub(shape.table_min)
            .and_then(|v| v.checked_rem(shape.table_step));
        if table > shape.table_max || variable != Some(0) {
            return Err(self.table_error(table));
        }
        let whole_pages =
            shape.body != BodyShape::Pages || body.checked_rem(crate::PAGE_BYTES) == Some(0);
        if body < shape.body.min() || body > shape.body.max() || !whole_pages {
            return Err(self.body_error(body, shape.body.min(), shape.body.max()));
        }
        Ok(())
    }

    /// The error for a body whose size its own table rules out.
    pub(crate) const fn body_error(self, bytes: usize, min: usize, max: usize) -> Malformed {
        Malformed::BodyBytes {
            kind: self,
            bytes,
            min,
            max,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OptionalUnknown(code) => write!(f, "UNKNOWN({code:#06x})"),
            _ => f.write_str(self.name()),
        }
    }
}
