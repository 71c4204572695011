//! The flags that both programs have. Flattened into each program's own.
#![allow(rustdoc::broken_intra_doc_links)] // comments on flags are the text of --help, as it is, and no links

use std::time::Duration;

use clap::ValueEnum;
use multifd_sender::WhenNotConverging;
use multifd_transport::AddressKind;

use crate::units;

/// See `--transport`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// TCP: any network, not protected
    Tcp,
    /// TLS 1.3 over TCP: encrypted, and both sides know each other; see the flags under TLS
    Tls,
    /// RDMA (InfiniBand, RoCE, iWARP): needs an RDMA device on both hosts; not protected
    Rdma,
    /// A Unix socket: both programs on this host
    Unix,
}

impl Transport {
    /// The kind of an address that names none.
    #[must_use]
    pub fn kind(self) -> AddressKind {
        match self {
            Self::Tcp => AddressKind::Tcp,
            Self::Tls => AddressKind::Tls,
            Self::Rdma => AddressKind::Rdma,
            Self::Unix => AddressKind::Unix,
        }
    }
}

/// See `--if-not-converging`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum NotConverging {
    /// The guest runs on at the source; the error says what would help
    Fail,
    /// Switch over whatever the downtime
    Switch,
}

impl NotConverging {
    /// As the flag, the reports and the control socket call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Fail => "fail",
            Self::Switch => "switch",
        }
    }
}

impl From<NotConverging> for WhenNotConverging {
    fn from(what: NotConverging) -> Self {
        match what {
            NotConverging::Fail => Self::Fail,
            NotConverging::Switch => Self::Switch,
        }
    }
}

/// How long silence is borne.
#[derive(Debug, clap::Args)]
pub struct Silence {
    /// Give a channel up when nothing moves on it for this long
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = units::time, help_heading = "Deadlines")]
    pub stall: Duration,
}

impl Silence {
    /// How often this side says that it lives.
    #[must_use]
    pub fn keep_alive(&self) -> Duration {
        Duration::from_secs(1).min(self.stall / 4)
    }

    /// How long a peer may live without getting on.
    #[must_use]
    pub fn progress_deadline(&self) -> Duration {
        Duration::from_secs(60).max(self.stall)
    }
}

/// What is printed, and for whom.
#[derive(Debug, clap::Args)]
pub struct Output {
    /// How the final report is printed
    ///
    /// With json there is one object on standard output and nothing else, however the program ends, also on wrong usage.
    #[arg(long, value_name = "KIND", value_enum, default_value_t = ReportKind::Text, help_heading = "Output")]
    pub report: ReportKind,

    /// How progress is shown
    ///
    /// With json it is lines on standard output, each an object with the key "event"; the report is then the last line, without that
    /// key, as with --report json.
    #[arg(long, value_name = "KIND", value_enum, default_value_t = ProgressKind::Text, help_heading = "Output")]
    pub progress: ProgressKind,

    /// No progress display on standard error
    #[arg(long, short, help_heading = "Output")]
    pub quiet: bool,
}

impl Output {
    /// How the report is printed, with what `--progress` implies.
    #[must_use]
    pub fn report(&self) -> ReportKind {
        match self.progress {
            ProgressKind::Json => ReportKind::Json,
            ProgressKind::Text => self.report,
        }
    }
}

/// See `--report`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ReportKind {
    /// For people
    Text,
    /// For programs
    Json,
}

/// See `--progress`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ProgressKind {
    /// For people, on standard error
    Text,
    /// For programs, on standard output
    Json,
}
