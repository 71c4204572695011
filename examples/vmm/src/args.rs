//! The command line.
#![allow(rustdoc::broken_intra_doc_links)] // comments on flags are the text of --help, as it is, and no links

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use multifd::tracking::kvm::Method;
use multifd::transport::{Address, TlsFiles};

use crate::machine::{Boot, Shape};
use crate::migration::Settings;

/// A small virtual machine monitor that boots Linux, and moves it, running, to another process or host.
///
/// The guest's console is standard input and output. SIGUSR1 moves the guest to --migrate-to; SIGTERM and SIGINT end it, or cancel
/// a migration that is under way.
///
/// Exit status: 0 the guest shut down, or was moved; 1 something failed; 2 wrong usage; 3 stopped by a signal.
#[derive(Debug, Parser)]
#[command(name = "multifd-vmm", version)]
pub(crate) struct Args {
    /// The kernel: a bzImage, such as a distribution's vmlinuz
    #[arg(long, value_name = "FILE", required_unless_present = "incoming")]
    kernel: Option<PathBuf>,

    /// Its initial file system
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,

    /// Its command line
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "console=ttyS0 reboot=t panic=-1 pci=off"
    )]
    cmdline: String,

    /// The guest's memory, such as 512M; at most 3G
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = size)]
    memory: u64,

    /// The guest's processors
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    cpus: u8,

    /// How dirty pages are found
    #[arg(long, value_name = "WAY", value_enum, default_value_t = Tracking::Auto)]
    tracking: Tracking,

    /// Do not boot: wait here for a guest that another process moves, such as tcp:0.0.0.0:4444
    #[arg(long, value_name = "ADDRESS", conflicts_with_all = ["kernel", "initrd", "cmdline", "memory", "cpus"])]
    pub(crate) incoming: Option<Address>,

    /// Where SIGUSR1 moves the guest to, such as tcp:dest.example:4444
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) migrate_to: Option<Address>,

    /// Data channels
    #[arg(long, value_name = "COUNT", default_value_t = 4)]
    channels: u32,

    /// The longest predicted downtime at which the guest is switched over
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 300)]
    downtime_limit: u64,

    /// The most bytes a second, such as 100M
    #[arg(long, value_name = "SIZE", value_parser = size)]
    bandwidth: Option<u64>,

    /// How long lost channels are dialled again
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    reconnect_deadline: u64,

    /// A channel on which nothing moves for this long is given up
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    stall: u64,

    /// For tls: addresses: the certificate of the authority (CA) that signed the other side's
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,

    /// This side's own certificate
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,

    /// The private key of --tls-cert
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Tracking {
    /// The ring where KVM offers it, else the log
    Auto,
    /// KVM's dirty ring
    Ring,
    /// KVM's dirty log
    Log,
}

fn size(text: &str) -> Result<u64, parse_size::Error> {
    parse_size::Config::new().with_binary().parse_size(text)
}

impl Args {
    pub(crate) fn shape(&self) -> Shape {
        Shape {
            memory_bytes: self.memory,
            cpus: self.cpus,
        }
    }

    /// What is booted, unless a guest comes from elsewhere.
    pub(crate) fn boot(&self) -> Option<Boot> {
        Some(Boot {
            kernel: self.kernel.clone()?,
            initrd: self.initrd.clone(),
            command_line: self.cmdline.clone(),
        })
    }

    pub(crate) fn tracking(&self) -> Option<Method> {
        match self.tracking {
            Tracking::Auto => None,
            Tracking::Ring => Some(Method::Ring),
            Tracking::Log => Some(Method::Log),
        }
    }

    pub(crate) fn settings(&self) -> Settings {
        Settings {
            channels: self.channels,
            downtime_limit: Duration::from_millis(self.downtime_limit),
            bandwidth: self.bandwidth,
            reconnect: Duration::from_secs(self.reconnect_deadline),
            stall: Duration::from_secs(self.stall),
            tls: TlsFiles {
                authorities: self.tls_ca.clone(),
                certificate: self.tls_cert.clone(),
                key: self.tls_key.clone(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_guest_is_booted_or_comes_and_not_both() {
        let parses = |words: &[&str]| Args::try_parse_from([&["vmm"], words].concat()).is_ok();
        assert!(parses(&["--kernel", "k", "--memory", "1G"]));
        assert!(parses(&["--incoming", "tcp:127.0.0.1:0"]));
        assert!(!parses(&[]));
        assert!(!parses(&["--kernel", "k", "--incoming", "tcp:127.0.0.1:0"]));
        assert!(!parses(&["--incoming", "tcp:127.0.0.1:0", "--cpus", "2"]));
    }
}
