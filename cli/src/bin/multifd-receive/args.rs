//! The command line of `multifd-receive`.
#![allow(rustdoc::broken_intra_doc_links)] // comments on flags are the text of --help, as it is, and no links

use std::time::Duration;

use clap::Parser;
use multifd_cli::confinement::ConfineFlags;
use multifd_cli::control::ControlFlags;
use multifd_cli::flags::{Output, Silence, Transport};
use multifd_cli::tls::TlsFlags;
use multifd_cli::units;
use multifd_receiver::{AfterFailedSetup, Config, Overcommit};
use multifd_transport::{Address, AddressKind, ChannelOptions};
use multifd_wire::Token;

use crate::hold::Moment;

/// The flags.
#[derive(Debug, Parser)]
#[command(name = "multifd-receive", version, about = ABOUT, long_about = LONG_ABOUT, after_help = SHORT, after_long_help = LONG)]
pub(crate) struct Args {
    /// Where to listen: HOST:PORT, [IPV6]:PORT or unix:/path; may be given many times
    ///
    /// Port 0 is any free one, which the first line of output names. tcp:, tls: or rdma: before it is for another kind of channel than
    /// --transport's. Several places are for one source that uses several kinds or paths.
    #[arg(
        long,
        value_name = "ADDRESS",
        default_value = "127.0.0.1:4444",
        help_heading = "Channels"
    )]
    pub(crate) listen: Vec<String>,

    /// The kind of channel for addresses that name none
    #[arg(long, value_name = "KIND", value_enum, default_value_t = Transport::Tcp, help_heading = "Channels")]
    pub(crate) transport: Transport,

    #[command(flatten)]
    pub(crate) bridge: multifd_bridge::cli::ReceiveArgs,

    #[command(flatten)]
    pub(crate) tls: TlsFlags,

    /// Let in by TLS whoever connects, not only those whose certificate the authority signed
    ///
    /// TLS then keeps out those on the way, and nobody else.
    #[arg(long, conflicts_with_all = ["tls_ca", "tls_dir", "tls_peer"], hide_short_help = true, help_heading = "TLS")]
    pub(crate) tls_any_source: bool,

    #[command(flatten)]
    pub(crate) confinement: ConfineFlags,

    #[command(flatten)]
    pub(crate) silence: Silence,

    /// When all channels are lost, wait this long for the source to come back
    ///
    /// The guest's memory is kept meanwhile. For as long the source is answered how the migration ended. 0s: free everything at once.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = units::time, help_heading = "Deadlines")]
    pub(crate) suspend: Duration,

    /// How long a new connection may take to say hello
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = units::time, hide_short_help = true, help_heading = "Deadlines")]
    pub(crate) hello_deadline: Duration,

    /// The most guest memory to accept (such as 64G). Default: whatever can be had
    #[arg(long, value_name = "SIZE", value_parser = units::size, help_heading = "Built-in guest")]
    pub(crate) max_memory: Option<u64>,

    /// Take a guest that may need more memory than this host or its control groups have left
    #[arg(long, help_heading = "Built-in guest")]
    pub(crate) overcommit: bool,

    /// The most memory that the guest and its devices' bookkeeping may need together
    ///
    /// Default: what the host, the control group and the limits of this
    /// process have to give.
    #[arg(long, value_name = "SIZE", value_parser = units::size, help_heading = "Built-in guest")]
    pub(crate) memory_ceiling: Option<u64>,

    /// How long the guest runs here before it is stopped and checked
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = units::time, help_heading = "Built-in guest")]
    pub(crate) run_for: Duration,

    /// Let only a source begin that shows this pass (multifd-send --pass): 32 hexadecimal digits, or @FILE
    ///
    /// In a file nobody sees it in the list of processes. Without TLS, whoever reads along on the network learns it.
    #[arg(long, value_name = "PASS", value_parser = units::pass, help_heading = "Channels")]
    pub(crate) expect: Option<Token>,

    /// End when a source's set-up fails, instead of waiting for the next source
    #[arg(long, help_heading = "Channels")]
    pub(crate) one_attempt: bool,

    #[command(flatten)]
    pub(crate) control: ControlFlags,

    #[command(flatten)]
    pub(crate) output: Output,

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
}

/// What it is, in a line. Given here because a comment on a flattened struct of flags would take its place.
const ABOUT: &str = "Wait for a guest that multifd-send migrates here, and run it";

/// What it is.
const LONG_ABOUT: &str = "\
Wait for a guest that multifd-send migrates here, and run it.

One guest is taken over. A source whose set-up fails is forgotten, and the next one waited for. After the guest
has run here for a while its memory is checked (every word of it), and the program ends.";

/// After `-h`.
const SHORT: &str = "\
Examples:
  multifd-receive --listen 0.0.0.0:4444
  multifd-receive --listen tls:0.0.0.0:4444 --tls-ca ca.pem --tls-cert dest.pem --tls-key dest.key

More flags, exit status and more examples: --help";

/// After `--help`.
const LONG: &str = "\
Examples:
  on the destination, first:
    multifd-receive --listen 0.0.0.0:4444
  for one source only, which has the same pass (openssl rand -hex 16):
    multifd-receive --listen 0.0.0.0:4444 --expect @/run/secret/pass
  for programs:
    multifd-receive --listen unix:/run/multifd.sock --report json
  encrypted and authenticated, with certificates of one authority (CA):
    multifd-receive --listen tls:0.0.0.0:4444 --tls-ca ca.pem --tls-cert dest.pem --tls-key dest.key
  two kinds of channel for one source:
    multifd-receive --listen 0.0.0.0:4444 --listen rdma:10.0.0.2:4445

Whoever reaches a tcp: or rdma: address can send a guest, and whoever is on the way can read
and change it: use them on trusted networks only. With tls: and --tls-ca only those can send
who show a certificate that the authority signed.

Units: sizes as 64M or 64MiB (powers of 1024) or 64MB (powers of 1000); times as 300ms, 1.5s, 2min
  or 1h 30m, at most 24h.

Signals: Ctrl-C (SIGINT), SIGTERM and SIGHUP end the reception, and the guest stays the source's. Once the guest
  runs here they end its run early: it is checked, and the program ends. More of them change nothing.

Exit status:
  0  the guest arrived, and its check passed
  1  failed or cancelled; the guest is the source's
  2  wrong usage; nothing was begun
  4  the guest was handed over but could not be run
  5  it arrived, but its check found an error

Log: RUST_LOG=info (or debug) writes to standard error.";

impl Args {
    /// Where to listen, and what the kinds of channel need for that.
    pub(crate) fn places(&self) -> anyhow::Result<(Vec<Address>, ChannelOptions)> {
        let kind = self.transport.kind();
        let places: Vec<_> = self
            .listen
            .iter()
            .map(|text| Address::parse_with(text, kind))
            .collect::<Result<_, _>>()?;
        let mut options = ChannelOptions::default();
        let by_tls = |address: &Address| address.kind() == AddressKind::Tls;
        options.tls_server = self.tls.server(self.tls_any_source)?;
        anyhow::ensure!(
            options.tls_server.is_some() || !places.iter().any(by_tls),
            "TLS needs --tls-cert and --tls-key, or --tls-dir"
        );
        self.tls.check_clear_text(&places)?;
        Ok((places, options))
    }

    /// The settings of the reception.
    pub(crate) fn reception(&self) -> anyhow::Result<Config> {
        Ok(Config::builder()
            .hello_deadline(self.hello_deadline)
            .stall(self.silence.stall)
            .suspend(self.suspend)
            .progress_deadline(self.silence.progress_deadline())
            .keep_alive(self.silence.keep_alive())
            .memory_bytes_max(self.max_memory)
            .overcommit(match self.overcommit {
                true => Overcommit::Allowed,
                false => Overcommit::Refused,
            })
            .pass(self.expect.unwrap_or(Token::NONE))
            .after_failed_setup(match self.one_attempt {
                true => AfterFailedSetup::End,
                false => AfterFailedSetup::WaitOn,
            })
            .build()?)
    }
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
