//! What the reports of both roles say of an error, and of bytes that were changed on the way.

use multifd_wire::{ChannelRef, Damaged};
use serde::Serialize;

use super::error::{Error, Failure};

/// Bytes that were changed on the way; or, of `PAGES` while the guest runs, written while they were sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DamageReport {
    /// When in the migration's life it was found.
    pub phase: String,
    /// On which channel; null for a connection whose hello could not be read.
    pub channel: Option<String>,
    /// Of which frame: the name of its kind; `header` where the kind can't be trusted either; `hello`, `hello_reply`.
    pub frame: String,
    /// How often: pages for `PAGES`, otherwise frames.
    pub count: u64,
}

impl From<&Damaged> for DamageReport {
    fn from(damaged: &Damaged) -> Self {
        let channel = damaged.channel;
        Self {
            phase: damaged.phase.to_string(),
            channel: (channel != ChannelRef::None).then(|| channel.to_string()),
            frame: damaged.frame.to_owned(),
            count: damaged.count,
        }
    }
}

/// What went wrong.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct ErrorReport {
    /// A stable identifier.
    pub code: String,
    /// Where in the migration's life.
    pub phase: String,
    /// On which channel, if on one.
    pub channel: Option<String>,
    /// In words.
    pub text: String,
}

impl<F: Failure> From<&Error<F>> for ErrorReport {
    fn from(error: &Error<F>) -> Self {
        Self {
            code: error.code().to_owned(),
            phase: error.phase().to_string(),
            channel: (error.channel() != ChannelRef::None).then(|| error.channel().to_string()),
            text: error.fault().to_string(),
        }
    }
}
