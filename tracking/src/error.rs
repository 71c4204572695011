//! What can go wrong in tracking, sorted by who is at fault.

use std::io;

use crate::Run;

/// A tracking error. [`Error::code`] is stable over versions.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel refused a call, or answered what its interface does not allow.
    #[error("{call}: {error}")]
    Kernel {
        /// The call, by its name in the kernel's headers.
        call: &'static str,
        /// What it answered.
        #[source]
        error: io::Error,
    },
    /// The kernel or the device does not offer what is needed.
    #[error("not offered here: {what}")]
    Unsupported {
        /// What is missing, and what to do instead.
        what: String,
    },
    /// The embedder said no.
    #[error("the VMM refused to {what}: {error}")]
    Vmm {
        /// What it was asked to do.
        what: &'static str,
        /// Its answer.
        #[source]
        error: io::Error,
    },
    /// Our caller asked for what cannot be.
    #[error("{what}")]
    Misuse {
        /// What was asked and what is allowed.
        what: String,
    },
}

impl Error {
    /// A short name that stays the same over versions.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Kernel { .. } => "tracking-kernel",
            Self::Unsupported { .. } => "tracking-unsupported",
            Self::Vmm { .. } => "tracking-vmm",
            Self::Misuse { .. } => "tracking-misuse",
        }
    }

    pub(crate) fn outside(run: Run) -> Self {
        Self::Misuse {
            what: format!(
                "{} pages from page {} are not inside region {}",
                run.count, run.first, run.region
            ),
        }
    }
}
