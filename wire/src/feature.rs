//! Feature bits: what two sides may agree on in their hellos. Source: SPEC, section "Features".
//!
//! A bit never changes its meaning. An unknown mandatory bit is a refusal, an unknown optional bit is dropped.

use core::fmt;

/// A set of feature bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Features(u64);

impl Features {
    /// No feature.
    pub const NONE: Self = Self(0);
    /// Bit 0: device streams (DEVICES that are not empty, DEVICE_CHUNK, DEVICE_MARK, credits). SPEC: FEAT-4
    pub const DEVICE_STATE: Self = Self(1);
    /// Bit 1: a session that lost all its channels can go on. SPEC: FEAT-5
    pub const RESUME: Self = Self(2);
    /// Bit 2: the session carries a machine monitor's own connections. SPEC: FEAT-6
    pub const BRIDGE: Self = Self(4);
    /// Bit 3: a guest that is paused at the source arrives paused. SPEC: FEAT-7
    pub const PAUSED: Self = Self(8);
    /// All bits that version 1 defines.
    pub const KNOWN: Self = Self(15);

    /// Wraps the bits as they travel; unknown bits are kept, since refusing or dropping them is negotiation's work.
    #[must_use]
    pub const fn new(bits: u64) -> Self {
        Self(bits)
    }

    /// The bits as they travel.
    #[must_use]
    pub const fn value(self) -> u64 {
        self.0
    }

    /// Whether every feature of `other` is in this set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether there is no feature in this set.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Features that are in this set or in `other`.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Features that are in this set and in `other`.
    #[must_use]
    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Features that are in this set and not in `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("none");
        }
        let mut separator = "";
        for (bit, name) in [
            (Self::DEVICE_STATE, "device-state"),
            (Self::RESUME, "resume"),
            (Self::BRIDGE, "bridge"),
            (Self::PAUSED, "paused"),
        ] {
            if self.contains(bit) {
                write!(f, "{separator}{name}")?;
                separator = "+";
            }
        }
        let unknown = self.without(Self::KNOWN);
        if unknown.is_empty() {
            Ok(())
        } else {
            write!(f, "{separator}{:#x}", unknown.0)
        }
    }
}
