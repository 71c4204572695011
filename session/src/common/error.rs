//! The shell of both roles' errors: what went wrong, in which phase, and on which channel.

use std::fmt;

use multifd_wire::{ChannelRef, Malformed, Phase, Reason};

/// A role's list of what can go wrong, as the shell has to know it.
pub trait Failure: std::error::Error + 'static {
    /// A stable identifier, the same in every version.
    fn code(&self) -> &'static str;

    /// The reason that the peer is told.
    fn reason(&self) -> Reason;

    /// The bytes that did not parse, if that is what it is.
    fn malformed(&self) -> Option<&Malformed>;

    /// Whether a channel failed, and nothing else.
    fn is_channel(&self) -> bool;

    /// Whether bytes were changed on the way: a checksum is wrong.
    fn is_damage(&self) -> bool {
        self.malformed()
            .is_some_and(|error| error.reason() == Reason::Corruption)
    }
}

/// Why a migration ended, when, and on which channel.
#[derive(Debug)]
pub struct Error<F> {
    phase: Phase,
    at: ChannelRef,
    fault: Box<F>,
}

impl<F> Error<F> {
    /// A fault on no channel in particular.
    #[must_use]
    pub fn new(phase: Phase, fault: impl Into<F>) -> Self {
        Self {
            phase,
            at: ChannelRef::None,
            fault: Box::new(fault.into()),
        }
    }

    /// Names the channel.
    #[must_use]
    pub fn at(mut self, at: ChannelRef) -> Self {
        self.at = at;
        self
    }

    /// Says when it happened, once that is known.
    #[must_use]
    pub fn in_phase(mut self, phase: Phase) -> Self {
        self.phase = phase;
        self
    }

    /// When it happened.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// On which channel.
    #[must_use]
    pub fn channel(&self) -> ChannelRef {
        self.at
    }

    /// What happened.
    #[must_use]
    pub fn fault(&self) -> &F {
        &self.fault
    }
}

impl<F: Failure> Error<F> {
    /// Whether the link of the control channel failed, and no more than that: then the session may go on over another.
    #[must_use]
    pub fn loses_control(&self) -> bool {
        self.at == ChannelRef::Control && (self.fault.is_channel() || self.is_damage())
    }

    /// Whether bytes were changed on the way: a checksum is wrong.
    #[must_use]
    pub fn is_damage(&self) -> bool {
        self.fault.is_damage()
    }

    /// A stable identifier, the same in every version.
    #[must_use]
    pub fn code(&self) -> &'static str {
        self.fault.code()
    }

    /// The reason that the peer is told.
    #[must_use]
    pub fn reason(&self) -> Reason {
        self.fault.reason()
    }
}

impl<F: fmt::Display> fmt::Display for Error<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (phase: {}", self.fault, self.phase)?;
        if self.at != ChannelRef::None {
            write!(f, ", {}", self.at)?;
        }
        f.write_str(")")
    }
}

impl<F: Failure> std::error::Error for Error<F> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&*self.fault)
    }
}

/// A migration that could not begin, with what it was to work on.
#[non_exhaustive]
pub struct StartError<F, P> {
    /// Why.
    pub error: Error<F>,
    /// What was handed over, untouched.
    pub parts: P,
}

impl<F, P> StartError<F, P> {
    /// These parts, and why nothing was begun with them.
    pub fn new(error: Error<F>, parts: P) -> Self {
        Self { error, parts }
    }

    /// The same about other parts.
    pub fn map<Q>(self, parts: impl FnOnce(P) -> Q) -> StartError<F, Q> {
        StartError::new(self.error, parts(self.parts))
    }
}

impl<F: fmt::Display, P> fmt::Debug for StartError<F, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.error, f)
    }
}

impl<F: fmt::Display, P> fmt::Display for StartError<F, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.error, f)
    }
}

impl<F: Failure, P> std::error::Error for StartError<F, P> {}
