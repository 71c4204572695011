//! What can go wrong with the guest, sorted by who is at fault.
//!
//! Every variant has a stable [`Error::code`], and its text says what to do about it.

use std::io;

/// The result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// Why the guest refused or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A field of [`Config`](crate::Config) is outside what the guest can be built with.
    #[error("{field} is {given}: {advice}")]
    Config {
        /// Name of the field.
        field: &'static str,
        /// The value that was given.
        given: String,
        /// What to give instead.
        advice: String,
    },
    /// The configuration asks for KVM and this host offers none.
    #[error("no KVM here: {reason}. Mend that, or choose tracking `process`")]
    NoKvm {
        /// What opening or probing answered.
        reason: String,
    },
    /// The kernel refused a call.
    #[error("{call} failed: {source}")]
    Kernel {
        /// The system call or ioctl.
        call: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The bytes of a configuration or of a state are not what this crate writes.
    #[error("the guest's {what} is malformed: {detail}")]
    Malformed {
        /// Which encoding it is.
        what: &'static str,
        /// The first thing found wrong.
        detail: String,
    },
    /// The bytes are well formed and do not fit this guest or this host.
    #[error("{detail}")]
    Incompatible {
        /// What does not fit, and what would.
        detail: String,
    },
    /// The caller asked for something that the guest's present phase does not allow.
    #[error("{advice}")]
    Misuse {
        /// What to do first.
        advice: &'static str,
    },
    /// A virtual CPU did not come to rest in time.
    #[error("vcpu{vcpu} did not stop within {waited_ms} ms: the guest must be dropped")]
    PauseTimeout {
        /// 0-based index of the first virtual CPU that still runs.
        vcpu: u32,
        /// How long was waited, in milliseconds.
        waited_ms: u64,
    },
    /// A virtual CPU ended for good; the guest can be looked at but not run any more.
    #[error("vcpu{vcpu} failed: {detail}")]
    Vcpu {
        /// 0-based index of the virtual CPU.
        vcpu: u32,
        /// How it left, and where it was.
        detail: String,
    },
    /// Dirty tracking failed.
    #[error(transparent)]
    Tracking(#[from] multifd_tracking::Error),
}

impl Error {
    /// A short name that stays the same between versions.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Config { .. } => "guest-config",
            Self::NoKvm { .. } => "guest-no-kvm",
            Self::Kernel { .. } => "guest-kernel",
            Self::Malformed { .. } => "guest-malformed",
            Self::Incompatible { .. } => "guest-incompatible",
            Self::Misuse { .. } => "guest-misuse",
            Self::PauseTimeout { .. } => "guest-pause-timeout",
            Self::Vcpu { .. } => "guest-vcpu",
            Self::Tracking(error) => error.code(),
        }
    }

    /// The last error of the C library, as the answer to `call`.
    pub(crate) fn last_os(call: &'static str) -> Self {
        Self::Kernel {
            call,
            source: io::Error::last_os_error(),
        }
    }

    /// An answer of kvm-ioctls to `call`.
    pub(crate) fn kvm(call: &'static str, error: kvm_ioctls::Error) -> Self {
        Self::Kernel {
            call,
            source: io::Error::from_raw_os_error(error.errno()),
        }
    }
}
