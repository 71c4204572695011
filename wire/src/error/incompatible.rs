//! Nobody is at fault: the two sides have no protocol version or feature set in common.

use crate::code::Reason;

/// The two sides have no protocol version or feature set in common.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Incompatible {
    /// The destination refused the hello.
    #[error("the destination refused: {reason}{}{}", if text.is_empty() { "" } else { ": " }, text)]
    Refused {
        /// The destination's reason.
        reason: Reason,
        /// The destination's text, possibly empty.
        text: Box<str>,
    },
    /// The destination chose a version that was not offered.
    #[error("the destination chose version {version}, which was not offered")]
    Version {
        /// The version in the reply.
        version: u16,
    },
    /// The destination agreed to features that were not asked for, or left out mandatory ones.
    #[error("the destination agreed to features {agreed}, which is not what was asked for")]
    Features {
        /// The features in the reply.
        agreed: crate::Features,
    },
    /// The reply is about another session.
    #[error("the reply names another session")]
    Session,
    /// The reply has values of features although the hello did not begin a session.
    #[error("the reply has values of features, which only that to the start of a session has")]
    Parameters,
}

impl Incompatible {
    /// A stable name for logs and reports.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Refused { .. } => "wire.incompatible.refused",
            Self::Version { .. } => "wire.incompatible.version",
            Self::Features { .. } => "wire.incompatible.features",
            Self::Session => "wire.incompatible.session",
            Self::Parameters => "wire.incompatible.parameters",
        }
    }

    /// The reason that the destination gave, or that it is told.
    #[must_use]
    pub const fn reason(&self) -> Reason {
        match self {
            Self::Refused { reason, .. } => *reason,
            Self::Version { .. } => Reason::Version,
            Self::Features { .. } | Self::Parameters => Reason::Feature,
            Self::Session => Reason::WrongSession,
        }
    }
}
