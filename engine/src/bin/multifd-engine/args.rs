//! The command line of `multifd-engine`.
#![allow(rustdoc::broken_intra_doc_links)] // comments on flags are the text of --help, as it is, and no links

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};
use multifd::transport::{Address, AddressKind, ChannelOptions};
use multifd::{destination, source};
use multifd_cli::confinement::ConfineFlags;
use multifd_cli::flags::{NotConverging, Output, Silence, Transport};
use multifd_cli::tls::TlsFlags;
use multifd_cli::units;

use crate::help;

/// The flags.
#[derive(Debug, Parser)]
#[command(name = "multifd-engine", version, about = help::ABOUT, long_about = help::LONG_ABOUT, after_help = help::SHORT, after_long_help = help::LONG)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) role: Role,
}

/// The side.
#[derive(Debug, Subcommand)]
pub(crate) enum Role {
    /// Migrate the VMM's guest to the engine at another VMM; or, where an earlier engine died, find out whose it is
    #[command(after_long_help = help::SEND)]
    Send(Box<SendArgs>),
    /// Wait for a guest, and hand it to the VMM; or, where an earlier engine died, answer for it
    #[command(after_long_help = help::RECEIVE)]
    Receive(Box<ReceiveArgs>),
}

/// What both sides have.
#[derive(Debug, clap::Args)]
pub(crate) struct Common {
    /// The Unix socket at which the VMM listens; - : standard input is a socket that is connected to it
    #[arg(long, value_name = "PATH", help_heading = "VMM")]
    pub(crate) vmm: PathBuf,

    /// How long one call to the VMM (build, pause, save, load, run) may take
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = units::time, help_heading = "VMM")]
    pub(crate) vmm_deadline: Duration,

    /// The kind of channel for addresses that name none
    #[arg(long, value_name = "KIND", value_enum, default_value_t = Transport::Tcp, help_heading = "Channels")]
    pub(crate) transport: Transport,

    #[command(flatten)]
    pub(crate) silence: Silence,

    #[command(flatten)]
    pub(crate) tls: TlsFlags,

    #[command(flatten)]
    pub(crate) confinement: ConfineFlags,

    #[command(flatten)]
    pub(crate) output: Output,
}

/// The source's flags.
#[derive(Debug, clap::Args)]
pub(crate) struct SendArgs {
    #[command(flatten)]
    pub(crate) common: Common,

    /// Where the other engine listens: HOST:PORT, [IPV6]:PORT or unix:/path
    ///
    /// With tcp:, tls: or rdma: before it for another kind of channel than --transport's.
    #[arg(long, value_name = "ADDRESS", help_heading = "Channels")]
    pub(crate) connect: String,

    /// Where data channels go, if not where --connect says; may be given many times
    #[arg(long, value_name = "ADDRESS", help_heading = "Channels")]
    pub(crate) data: Vec<String>,

    /// Data channels, 1 to 256
    #[arg(long, value_name = "N", default_value_t = 4, help_heading = "Channels")]
    pub(crate) channels: u32,

    /// Cap on the bandwidth of all data channels together (such as 100MB/s, 10Gbit/s). Default: none
    #[arg(long, value_name = "RATE", value_parser = units::rate, help_heading = "Channels")]
    pub(crate) bandwidth: Option<u64>,

    /// Show this pass to the destination (receive --expect): 32 hexadecimal digits, or @FILE
    #[arg(long, value_name = "PASS", value_parser = units::pass, help_heading = "Channels")]
    pub(crate) pass: Option<units::Token>,

    /// The name that the destination's certificate must be for. Default: the host that is dialled
    #[arg(
        long,
        value_name = "NAME",
        conflicts_with = "tls_peer",
        help_heading = "TLS"
    )]
    pub(crate) tls_server_name: Option<String>,

    /// Longest downtime: how long the guest may be paused (such as 300ms, 2s)
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = units::time, help_heading = "Convergence")]
    pub(crate) downtime_limit: Duration,

    /// Pre-copy rounds (iterations) before --if-not-converging decides
    #[arg(
        long,
        value_name = "N",
        default_value_t = 30,
        help_heading = "Convergence"
    )]
    pub(crate) max_rounds: u32,

    /// When the guest writes faster than the link carries: what to do
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = NotConverging::Fail, help_heading = "Convergence")]
    pub(crate) if_not_converging: NotConverging,

    /// How much of the guest's time may be held back if it writes faster than its memory can be sent. 0%: none
    ///
    /// As little as the forecast needs. A VMM that slows no guest goes on as it was.
    #[arg(long, value_name = "PERCENT", default_value = "0%", value_parser = units::percent, help_heading = "Convergence")]
    pub(crate) throttle_limit: u8,

    /// Dial lost channels again for this long; the guest runs on meanwhile
    ///
    /// After the commit, and where an earlier engine died: ask the destination for this long how it ended.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = units::time, help_heading = "Deadlines")]
    pub(crate) reconnect_deadline: Duration,
}

/// The destination's flags.
#[derive(Debug, clap::Args)]
pub(crate) struct ReceiveArgs {
    #[command(flatten)]
    pub(crate) common: Common,

    /// Where to listen: HOST:PORT, [IPV6]:PORT or unix:/path; may be given many times
    ///
    /// Port 0 is any free one, which the first line of output names.
    #[arg(
        long,
        value_name = "ADDRESS",
        default_value = "127.0.0.1:4444",
        help_heading = "Channels"
    )]
    pub(crate) listen: Vec<String>,

    /// Let only a source begin that shows this pass (send --pass): 32 hexadecimal digits, or @FILE
    #[arg(long, value_name = "PASS", value_parser = units::pass, help_heading = "Channels")]
    pub(crate) expect: Option<units::Token>,

    /// Let in by TLS whoever connects, not only those whose certificate the authority signed
    #[arg(long, conflicts_with_all = ["tls_ca", "tls_dir", "tls_peer"], hide_short_help = true, help_heading = "TLS")]
    pub(crate) tls_any_source: bool,

    /// End when a source's set-up fails, instead of waiting for the next source
    #[arg(long, help_heading = "Channels")]
    pub(crate) one_attempt: bool,

    /// Take a guest that may need more memory than this host or its control groups have left
    #[arg(long, help_heading = "VMM")]
    pub(crate) overcommit: bool,

    /// When all channels are lost, wait this long for the source to come back
    ///
    /// For as long the source is answered how the migration ended, also where an earlier engine died.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = units::time, help_heading = "Deadlines")]
    pub(crate) suspend: Duration,
}

/// Where the source's channels go.
#[derive(Debug)]
pub(crate) struct Way {
    pub(crate) control: Address,
    pub(crate) data: Vec<Address>,
    pub(crate) options: ChannelOptions,
}

impl SendArgs {
    pub(crate) fn way(&self) -> anyhow::Result<Way> {
        let kind = self.common.transport.kind();
        let address = |text: &String| Address::parse_with(text, kind);
        let control = address(&self.connect)?;
        let data: Vec<_> = self.data.iter().map(address).collect::<Result<_, _>>()?;
        let mut options = ChannelOptions::default();
        options.tls_client = self.common.tls.client(self.tls_server_name.as_deref())?;
        let way = Way {
            control,
            data,
            options,
        };
        let all = || way.data.iter().chain([&way.control]);
        let by_tls = |address: &Address| address.kind() == AddressKind::Tls;
        anyhow::ensure!(
            way.options.tls_client.is_some() || !all().any(by_tls),
            "TLS needs --tls-ca, the certificate of the authority (CA) that signed the destination's, or --tls-dir"
        );
        self.common.tls.check_clear_text(all())?;
        Ok(way)
    }

    pub(crate) fn config(&self) -> anyhow::Result<source::Config> {
        let silence = &self.common.silence;
        let mut config = source::Config::builder()
            .channels(self.channels)
            .downtime_limit(self.downtime_limit)
            .bandwidth(self.bandwidth)
            .max_rounds(self.max_rounds)
            .throttle_limit(self.throttle_limit)
            .when_not_converging(self.if_not_converging.into())
            .device_deadline(self.common.vmm_deadline)
            .stall(silence.stall)
            .keep_alive(silence.keep_alive())
            .progress_deadline(silence.progress_deadline())
            .reconnect_deadline(self.reconnect_deadline);
        if let Some(pass) = self.pass {
            config = config.pass(pass);
        }
        Ok(config.build()?)
    }
}

impl ReceiveArgs {
    pub(crate) fn places(&self) -> anyhow::Result<(Vec<Address>, ChannelOptions)> {
        let kind = self.common.transport.kind();
        let places: Vec<_> = self
            .listen
            .iter()
            .map(|text| Address::parse_with(text, kind))
            .collect::<Result<_, _>>()?;
        let tls = &self.common.tls;
        let mut options = ChannelOptions::default();
        options.tls_server = tls.server(self.tls_any_source)?;
        anyhow::ensure!(
            options.tls_server.is_some() || !places.iter().any(|it| it.kind() == AddressKind::Tls),
            "TLS needs --tls-cert and --tls-key, or --tls-dir"
        );
        tls.check_clear_text(&places)?;
        Ok((places, options))
    }

    pub(crate) fn config(&self) -> anyhow::Result<destination::Config> {
        let silence = &self.common.silence;
        let mut config = destination::Config::builder()
            .device_deadline(self.common.vmm_deadline)
            .stall(silence.stall)
            .keep_alive(silence.keep_alive())
            .progress_deadline(silence.progress_deadline())
            .suspend(self.suspend)
            .overcommit(match self.overcommit {
                true => destination::Overcommit::Allowed,
                false => destination::Overcommit::Refused,
            })
            .after_failed_setup(match self.one_attempt {
                true => destination::AfterFailedSetup::End,
                false => destination::AfterFailedSetup::WaitOn,
            });
        if let Some(pass) = self.expect {
            config = config.pass(pass);
        }
        Ok(config.build()?)
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
    fn each_side_says_what_it_lacks() {
        let send = |flags: &[&str]| {
            let all = ["multifd-engine", "send", "--vmm", "/x"]
                .iter()
                .chain(flags);
            match Args::parse_from(all).role {
                Role::Send(args) => args.way().map(|way| way.control.to_string()),
                Role::Receive(_) => unreachable!("it was send"),
            }
        };
        assert_eq!(send(&["--connect", "a:1"]).unwrap(), "tcp:a:1");
        let error = send(&["--connect", "tls:a:1"]).unwrap_err().to_string();
        assert!(error.contains("--tls-ca"), "{error}");
        let all = [
            "multifd-engine",
            "receive",
            "--vmm",
            "-",
            "--listen",
            "tls:a:1",
        ];
        match Args::parse_from(all).role {
            Role::Receive(args) => {
                let error = args.places().unwrap_err().to_string();
                assert!(error.contains("--tls-cert"), "{error}");
            }
            Role::Send(_) => unreachable!("it was receive"),
        }
    }
}
