//! The command line of `multifd-receive`.
#![allow(rustdoc::broken_intra_doc_links)] // comments on flags are the text of --help, as it is, and no links

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use multifd_receiver::Config;
use multifd_transport::tls::{TlsPem, TlsServer};
use multifd_transport::{Address, AddressKind, ChannelOptions};

use crate::hold::Moment;

/// Wait for a guest that multifd-send moves here, and run it.
///
/// One guest is taken over; after it has run here for a while its memory is checked (every word of it), and the program ends.
#[derive(Debug, Parser)]
#[command(name = "multifd-receive", version, about, long_about, after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Where to listen: HOST:PORT (port 0: any free one, see the first line of output), [IPV6]:PORT or unix:/path, with tcp:, tls: or
    /// rdma: before it for another kind of channel than --transport's. Several times: at each of them, for one source that uses
    /// several kinds
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:4444")]
    pub(crate) listen: Vec<String>,

    /// The kind of channel for addresses that name none
    #[arg(long, value_name = "KIND", value_enum, default_value_t = Transport::Tcp)]
    pub(crate) transport: Transport,

    #[command(flatten)]
    pub(crate) tls: TlsFiles,

    /// How long the guest runs here before it is stopped and checked (e.g. 1s)
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = humantime::parse_duration)]
    pub(crate) run_for: Duration,

    /// The most guest memory to accept (e.g. 64G). Default: whatever can be had
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) max_memory: Option<u64>,

    /// Give the source up when nothing is heard of it for this long
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
    pub(crate) stall: Duration,

    /// When all channels are lost, keep the guest's memory for this long, for the source to come back; and answer it for as
    /// long how the migration ended. 0s: free everything at once
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = humantime::parse_duration)]
    pub(crate) suspend: Duration,

    /// How long a new connection may take to say hello
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = humantime::parse_duration)]
    pub(crate) hello_deadline: Duration,

    /// How the final report is printed: text for people, json for programs (one object on standard output, nothing else there)
    #[arg(long, value_enum, default_value_t = ReportKind::Text)]
    pub(crate) report: ReportKind,

    /// Stop waiting for a source when standard input ends: for whoever starts this program, and may be killed
    #[arg(long, hide = true)]
    pub(crate) until_stdin_closes: bool,

    /// Stand still at this moment until a line comes on standard input: for tests that let something happen just then
    #[arg(
        long,
        hide = true,
        value_name = "MOMENT",
        conflicts_with = "until_stdin_closes"
    )]
    pub(crate) hold_at: Option<Moment>,

    /// No progress display
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

const EXAMPLES: &str = "\
Examples:
  multifd-receive --listen 0.0.0.0:4444
  multifd-receive --listen unix:/run/multifd.sock --report json

  multifd-receive --listen tls:0.0.0.0:4444 --tls-ca ca.pem --tls-cert dest.pem --tls-key dest.key
  multifd-receive --listen 0.0.0.0:4444 --listen rdma:10.0.0.2:4445

Whoever reaches a tcp: or rdma: address can send a guest, and whoever is on the way can read
and change it: use them on trusted networks only. With tls: and --tls-ca only those can send
who show a certificate that the authority signed.

Exit status:
  0  the guest arrived, and its check passed
  1  failed; the guest is the source's
  2  wrong usage
  4  the guest was handed over but could not be run
  5  it arrived, but its check found an error

Log: RUST_LOG=info (or debug) writes to standard error.";

/// Certificates and key for TLS.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "TLS")]
pub(crate) struct TlsFiles {
    /// Certificate of the authority (CA) that must have signed the source's, in PEM form. Without it any source is let in, and TLS
    /// protects only against those on the way
    #[arg(long, value_name = "FILE")]
    pub(crate) tls_ca: Option<PathBuf>,

    /// This side's certificate, with the chain to the authority, if there is one. Needed for tls: addresses
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub(crate) tls_cert: Option<PathBuf>,

    /// The private key of --tls-cert
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub(crate) tls_key: Option<PathBuf>,
}

/// See `--transport`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Transport {
    /// TCP: any network, not protected
    Tcp,
    /// TLS 1.3 over TCP: encrypted, and both sides know each other; see the flags under TLS
    Tls,
    /// RDMA (InfiniBand, RoCE, iWARP): needs an RDMA device on both hosts; not protected
    Rdma,
    /// A Unix socket: both programs on this host
    Unix,
}

/// See `--report`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ReportKind {
    /// For people
    Text,
    /// One JSON object on standard output
    Json,
}

impl Args {
    /// Where to listen, and what the kinds of channel need for that.
    pub(crate) fn places(&self) -> anyhow::Result<(Vec<Address>, ChannelOptions)> {
        let kind = match self.transport {
            Transport::Tcp => AddressKind::Tcp,
            Transport::Tls => AddressKind::Tls,
            Transport::Rdma => AddressKind::Rdma,
            Transport::Unix => AddressKind::Unix,
        };
        let places: Vec<_> = self
            .listen
            .iter()
            .map(|text| Address::parse_with(text, kind))
            .collect::<Result<_, _>>()?;
        let mut options = ChannelOptions::default();
        let TlsFiles {
            tls_ca,
            tls_cert,
            tls_key,
        } = &self.tls;
        if tls_cert.is_some() {
            let pem = TlsPem::read(tls_ca.as_deref(), tls_cert.as_deref(), tls_key.as_deref())?;
            options.tls_server = Some(TlsServer::new(&pem)?);
        }
        let by_tls = |address: &Address| address.kind() == AddressKind::Tls;
        anyhow::ensure!(
            options.tls_server.is_some() || !places.iter().any(by_tls),
            "TLS needs --tls-cert and --tls-key"
        );
        Ok((places, options))
    }

    /// The settings of the reception.
    pub(crate) fn reception(&self) -> anyhow::Result<Config> {
        Ok(Config::builder()
            .hello_deadline(self.hello_deadline)
            .stall(self.stall)
            .suspend(self.suspend)
            .progress_deadline(Duration::from_secs(60).max(self.stall))
            .keep_alive(Duration::from_secs(1).min(self.stall / 4))
            .memory_bytes_max(self.max_memory)
            .build()?)
    }
}

/// A number of octets; K, M, G and T are powers of 1024.
fn parse_size(text: &str) -> Result<u64, String> {
    let binary = parse_size::Config::new().with_binary();
    binary
        .parse_size(text)
        .map_err(|e| format!("{e}: write for example 64M or 1.5G"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn every_place_to_listen_is_of_its_own_kind() {
        let places = |arguments: &[&str]| {
            Args::parse_from(["multifd-receive"].iter().chain(arguments)).places()
        };
        let (found, _) = places(&[
            "--listen",
            "tcp:a:1",
            "--listen",
            "b:2",
            "--transport",
            "rdma",
        ])
        .unwrap();
        let found: Vec<_> = found.iter().map(ToString::to_string).collect();
        assert_eq!(found, ["tcp:a:1", "rdma:b:2"]);
        let error = places(&["--listen", "tls:a:1"]).unwrap_err().to_string();
        assert!(error.contains("--tls-cert and --tls-key"), "{error}");
        let (found, _) = places(&[]).unwrap();
        assert_eq!(found[0].to_string(), "tcp:127.0.0.1:4444");
    }
}
