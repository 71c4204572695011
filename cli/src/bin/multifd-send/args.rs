//! The command line of `multifd-send`.
#![allow(rustdoc::broken_intra_doc_links)] // comments on flags are the text of --help, as it is, and no links

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Parser, ValueEnum};
use multifd_cli::confinement::ConfineFlags;
use multifd_cli::control::ControlFlags;
use multifd_cli::flags::{NotConverging, Output, Silence, Transport};
use multifd_cli::tls::TlsFlags;
use multifd_cli::units;
use multifd_guest::{Device, DeviceConfig, Fill, Pattern, Tracking};
use multifd_sender::config::WhenDestinationLost;
use multifd_sender::{Config, DirtyScan, WhenAckLate};
use multifd_transport::rdma::{self, Registration};
use multifd_transport::{Address, AddressKind, ChannelOptions};
use multifd_wire::Token;

use crate::help;

/// What the built-in guest writes, unless it is told.
const WORKING_SET: u64 = 256 << 20;

/// Guest memory is counted in these.
const PAGE: u64 = 4096;

/// The flags.
#[derive(Debug, Parser)]
#[command(name = "multifd-send", version, about = help::ABOUT, long_about = help::LONG_ABOUT, after_help = help::SHORT, after_long_help = help::LONG)]
#[command(group(ArgGroup::new("destination").required(true).args(["connect", "loopback", "ask"])))]
pub(crate) struct Args {
    /// Where multifd-receive listens: HOST:PORT, [IPV6]:PORT or unix:/path
    ///
    /// With tcp:, tls: or rdma: before it for another kind of channel than --transport's.
    #[arg(
        long,
        value_name = "ADDRESS",
        help_heading = "Destination (one of these)"
    )]
    pub(crate) connect: Option<String>,

    /// Start a multifd-receive on this host, and migrate the guest there
    #[arg(long, help_heading = "Destination (one of these)")]
    pub(crate) loopback: bool,

    /// Query the outcome of an earlier migration, from its --state-file, and migrate nothing
    ///
    /// It is asked for as long as --reconnect-deadline. The program that wrote FILE must be dead: asking aborts a migration that is not
    /// committed.
    #[arg(long, value_name = "FILE", help_heading = "Destination (one of these)")]
    pub(crate) ask: Option<PathBuf>,

    /// Data channels, 1 to 256
    ///
    /// About one per 10 Gbit/s of link, and no more than cores, is a good number.
    #[arg(long, value_name = "N", default_value_t = 4, help_heading = "Channels")]
    pub(crate) channels: u32,

    /// The kind of channel for addresses that name none
    ///
    /// With --loopback also a list, such as tcp,rdma: data channels take one after the other, and the control channel the first.
    #[arg(
        long,
        value_name = "KIND",
        value_enum,
        value_delimiter = ',',
        default_value = "tcp",
        help_heading = "Channels"
    )]
    pub(crate) transport: Vec<Transport>,

    /// Where data channels go, if not where --connect says; may be given many times
    ///
    /// Several kinds or paths are taken in turn. All must be the same multifd-receive's.
    #[arg(
        long,
        value_name = "ADDRESS",
        requires = "connect",
        help_heading = "Channels"
    )]
    pub(crate) data: Vec<String>,

    /// Cap on the bandwidth of all data channels together (such as 100MB/s, 10Gbit/s). Default: none
    #[arg(long, value_name = "RATE", value_parser = units::rate, help_heading = "Channels")]
    pub(crate) bandwidth: Option<u64>,

    /// Body of a data frame, a multiple of 4K up to 1M
    #[arg(long, value_name = "SIZE", value_parser = parse_body, default_value = "256K", hide_short_help = true, help_heading = "Channels")]
    pub(crate) body: u64,

    /// With --loopback: the host of tcp:, tls: and rdma: addresses
    ///
    /// RDMA needs the address of an interface that has an RDMA device.
    #[arg(
        long,
        value_name = "HOST",
        default_value = "127.0.0.1",
        hide_short_help = true,
        help_heading = "Channels"
    )]
    pub(crate) loopback_host: String,

    /// With RDMA: how much guest memory may be registered, and so pinned, at a time; or all
    ///
    /// `all` registers all of it before the migration begins, which needs as much locked memory (ulimit -l) and saves registering on
    /// the way.
    #[arg(
        long,
        value_name = "SIZE",
        value_parser = parse_registration,
        default_value = "256M",
        hide_short_help = true,
        help_heading = "Channels"
    )]
    pub(crate) rdma_registration: Registration,

    #[command(flatten)]
    pub(crate) bridge: multifd_bridge::cli::SendArgs,

    #[command(flatten)]
    pub(crate) tls: TlsFlags,

    #[command(flatten)]
    pub(crate) confinement: ConfineFlags,

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

    /// Pre-copy rounds (iterations) before --if-not-converging decides; it decides sooner when more would not help
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

    /// Most vCPU time to hold back if it does not converge
    ///
    /// When the guest writes faster than the link carries, such as 80%. Only as much as the forecast needs, by steps of 20 % at most, and only until it is paused; it is released however the migration
    /// ends, and while the link is lost. 0% leaves the guest alone.
    #[arg(long, value_name = "PERCENT", value_parser = units::percent, default_value = "0%", help_heading = "Convergence")]
    pub(crate) throttle_limit: u8,

    #[command(flatten)]
    pub(crate) silence: Silence,

    /// Show this pass to the destination (multifd-receive --expect): 32 hexadecimal digits, or @FILE
    ///
    /// In a file nobody sees it in the list of processes. Without TLS, whoever reads along on the network learns it.
    #[arg(long, value_name = "PASS", value_parser = units::pass, help_heading = "Channels")]
    pub(crate) pass: Option<Token>,

    /// Dial lost channels again for this long; the guest runs on meanwhile
    ///
    /// The migration then goes on where it was. After the commit: ask the destination for this long how it ended. 0s: what is lost is
    /// lost.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = units::time, help_heading = "Deadlines")]
    pub(crate) reconnect_deadline: Duration,

    /// When the destination was restarted meanwhile: begin again with all of memory
    ///
    /// Without it the migration fails, and the guest runs on here.
    #[arg(long, hide_short_help = true, help_heading = "Deadlines")]
    pub(crate) restart_if_lost: bool,

    /// Keep what --ask needs in FILE until the outcome is known
    ///
    /// FILE is written, for its owner only, before anything is moved. It must not be there yet.
    #[arg(
        long,
        value_name = "FILE",
        requires = "connect",
        help_heading = "Deadlines"
    )]
    pub(crate) state_file: Option<PathBuf>,

    /// The guest's memory
    #[arg(long, value_name = "SIZE", value_parser = units::size, default_value = "1G", help_heading = "Built-in guest")]
    pub(crate) memory: u64,

    /// The guest's virtual CPUs
    #[arg(
        long,
        value_name = "N",
        default_value_t = 2,
        help_heading = "Built-in guest"
    )]
    pub(crate) vcpus: u32,

    /// How much memory the guest dirties a second (4 KiB for each page written; 0: an idle guest)
    #[arg(long, value_name = "RATE", value_parser = units::rate, default_value = "100M", help_heading = "Built-in guest")]
    pub(crate) dirty_rate: u64,

    /// The part of memory that the guest writes. Default: 256M, or half of a memory that is smaller than 512M
    #[arg(long, value_name = "SIZE", value_parser = units::size, help_heading = "Built-in guest")]
    pub(crate) working_set: Option<u64>,

    /// How dirty pages are found
    #[arg(long, value_name = "HOW", value_enum, default_value_t = HowTracked::Auto, help_heading = "Built-in guest")]
    pub(crate) tracking: HowTracked,

    /// The order in which the guest writes its working set
    #[arg(long, value_name = "ORDER", value_enum, default_value_t = WritePattern::Random, hide_short_help = true, help_heading = "Built-in guest")]
    pub(crate) pattern: WritePattern,

    /// Share of the memory outside the working set that is all zero, in percent
    #[arg(
        long,
        value_name = "PERCENT",
        default_value_t = 25,
        hide_short_help = true,
        help_heading = "Built-in guest"
    )]
    pub(crate) zero_percent: u8,

    /// Seed of the guest's content and writes
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        hide_short_help = true,
        help_heading = "Built-in guest"
    )]
    pub(crate) seed: u64,

    /// Let the guest run this long before the migration begins
    #[arg(long, value_name = "TIME", default_value = "500ms", value_parser = units::time, hide_short_help = true, help_heading = "Built-in guest")]
    pub(crate) warm_up: Duration,

    /// Pause the guest before the migration begins: it arrives paused
    ///
    /// A multifd-receive that can't leave it paused refuses it.
    #[arg(long, hide_short_help = true, help_heading = "Built-in guest")]
    pub(crate) start_paused: bool,

    /// A device that writes guest memory from the host, where no dirty log sees it
    #[arg(long, value_name = "KIND", value_enum, default_value_t = GuestDevice::None, hide_short_help = true, help_heading = "Built-in guest")]
    pub(crate) guest_device: GuestDevice,

    /// Find writes to guest memory that nobody reported
    ///
    /// With the guest paused, all of its memory is compared with what was sent. The migration fails, and names the pages, if one
    /// differs. The downtime grows by some tenths of a second per GiB.
    #[arg(long, hide_short_help = true, help_heading = "Built-in guest")]
    pub(crate) debug_dirty_scan: bool,

    /// A device to move with the guest; may be given many times. See "Devices" in --help
    #[arg(long, value_name = "MODEL", help_heading = "Devices")]
    pub(crate) device: Vec<DeviceConfig>,

    /// How long one call of a device's own code (a step, a read) may take
    ///
    /// After that the migration fails, and the guest runs on here without the device.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = units::time, hide_short_help = true, help_heading = "Devices")]
    pub(crate) device_deadline: Duration,

    /// How long the switchover waits for devices' initial bytes to be loaded there
    ///
    /// Default: as long as it takes, with the guest running.
    #[arg(long, value_name = "TIME", value_parser = units::time, hide_short_help = true, help_heading = "Devices")]
    pub(crate) ack_deadline: Option<Duration>,

    /// When --ack-deadline is over: what to do
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = AckLate::Fail, hide_short_help = true, help_heading = "Devices")]
    pub(crate) if_ack_late: AckLate,

    #[command(flatten)]
    pub(crate) control: ControlFlags,

    #[command(flatten)]
    pub(crate) output: Output,
}

/// Where channels go.
#[derive(Debug)]
pub(crate) struct Way {
    /// The control channel's address, unless a receiver of our own is started.
    pub(crate) control: Option<Address>,
    /// The data channels' addresses, if they differ.
    pub(crate) data: Vec<Address>,
    /// What the kinds need.
    pub(crate) options: ChannelOptions,
}

/// See `--if-ack-late`.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum AckLate {
    /// The guest runs on at the source; the error names the devices
    Fail,
    /// Switch over; what is missing is loaded while the guest stands still
    GoOn,
}

/// See `--pattern`.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum WritePattern {
    /// Anywhere in the working set
    Random,
    /// One page after another
    Sequential,
}

/// See `--tracking`.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum HowTracked {
    /// KVM's dirty ring if there is one, else its log. Without KVM: userfaultfd, or the threads' own marks (it says which)
    Auto,
    /// KVM's dirty ring
    Ring,
    /// KVM's dirty log
    Log,
    /// No KVM: threads that write a plain mapping, watched by userfaultfd (Linux 6.7; refused where it is not offered)
    Process,
    /// No KVM: threads that write a plain mapping and mark what they wrote
    Marks,
}

/// See `--guest-device`.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum GuestDevice {
    /// No device
    None,
    /// The guest's driver touches each page after the device wrote it, and so it is found (needs KVM)
    Dma,
    /// Nobody reports what the device wrote: the migration loses it. See --debug-dirty-scan (needs KVM)
    DmaUnreported,
}

impl Args {
    /// All parts of the settings, if they can be.
    pub(crate) fn checked(&self) -> anyhow::Result<(Config, multifd_guest::Config, Way)> {
        let guest = self.guest();
        guest.validate()?;
        if let Some(device) = self.device.iter().find(|device| device.dma > 0) {
            anyhow::bail!(
                "device {}: the built-in guest checks all of its memory and has none to spare for dma=",
                device.name
            );
        }
        Ok((self.migration()?, guest, self.way()?))
    }

    /// Where channels go, as far as it is known before a receiver of our own is started.
    pub(crate) fn way(&self) -> anyhow::Result<Way> {
        let kind = match &self.transport[..] {
            [first] => first.kind(),
            [first, ..] if self.loopback => first.kind(),
            _ => anyhow::bail!(
                "--transport with several kinds is for --loopback: use --connect for the control channel and --data for each kind of data channel"
            ),
        };
        let address = |text: &String| Address::parse_with(text, kind);
        let mut options = ChannelOptions::default();
        options.tls_client = self.tls.client(self.tls_server_name.as_deref())?;
        let way = Way {
            control: self.connect.as_ref().map(address).transpose()?,
            data: self.data.iter().map(address).collect::<Result<_, _>>()?,
            options,
        };
        let by_tls = |address: &Address| address.kind() == AddressKind::Tls;
        let uses_tls = way.control.iter().chain(&way.data).any(by_tls)
            || (self.loopback && self.transport.contains(&Transport::Tls));
        anyhow::ensure!(
            way.options.tls_client.is_some() || !uses_tls,
            "TLS needs --tls-ca, the certificate of the authority (CA) that signed the destination's, or --tls-dir"
        );
        self.tls
            .check_clear_text(way.control.iter().chain(&way.data))?;
        let by_rdma = |address: &Address| address.kind() == AddressKind::Rdma;
        if way.control.iter().chain(&way.data).any(by_rdma)
            || (self.loopback && self.transport.contains(&Transport::Rdma))
        {
            rdma::available()?;
        }
        anyhow::ensure!(
            !self.loopback
                || !uses_tls
                || self.tls.tls_cert.is_some()
                || self.tls.tls_dir.is_some(),
            "--loopback with TLS needs --tls-cert and --tls-key too: the receiver that it starts shows the same certificate, which must \
             be for {}",
            self.tls_server_name
                .as_deref()
                .unwrap_or(&self.loopback_host)
        );
        Ok(way)
    }

    /// The migration's settings.
    pub(crate) fn migration(&self) -> anyhow::Result<Config> {
        Ok(Config::builder()
            .channels(self.channels)
            .pass(self.pass.unwrap_or(Token::NONE))
            .downtime_limit(self.downtime_limit)
            .bandwidth(self.bandwidth)
            .max_rounds(self.max_rounds)
            .when_not_converging(self.if_not_converging.into())
            .throttle_limit(self.throttle_limit)
            .ack_deadline(self.ack_deadline)
            .when_ack_late(match self.if_ack_late {
                AckLate::Fail => WhenAckLate::Fail,
                AckLate::GoOn => WhenAckLate::GoOn,
            })
            .device_deadline(self.device_deadline)
            .body_bytes(self.body)
            .stall(self.silence.stall)
            .reconnect_deadline(self.reconnect_deadline)
            .when_destination_lost(if self.restart_if_lost {
                WhenDestinationLost::StartAfresh
            } else {
                WhenDestinationLost::Fail
            })
            .progress_deadline(self.silence.progress_deadline())
            .dirty_scan(if self.debug_dirty_scan {
                DirtyScan::AtSwitchover
            } else {
                DirtyScan::Off
            })
            .keep_alive(self.silence.keep_alive())
            .build()?)
    }

    /// The guest's settings.
    pub(crate) fn guest(&self) -> multifd_guest::Config {
        multifd_guest::Config {
            memory_bytes: self.memory,
            vcpus: self.vcpus,
            working_set_bytes: self
                .working_set
                .unwrap_or_else(|| WORKING_SET.min(self.memory / 2 / PAGE * PAGE)),
            dirty_rate_bytes_per_s: self.dirty_rate,
            pattern: match self.pattern {
                WritePattern::Random => Pattern::Random,
                WritePattern::Sequential => Pattern::Sequential,
            },
            tracking: match self.tracking {
                HowTracked::Auto => Tracking::Auto,
                HowTracked::Ring => Tracking::Ring,
                HowTracked::Log => Tracking::Log,
                HowTracked::Process => Tracking::Userfault,
                HowTracked::Marks => Tracking::Marks,
            },
            device: match self.guest_device {
                GuestDevice::None => Device::None,
                GuestDevice::Dma => Device::Dma,
                GuestDevice::DmaUnreported => Device::DmaUnreported,
            },
            seed: self.seed,
            fill: Fill {
                filled_percent: 100,
                zero_percent: self.zero_percent,
            },
        }
    }
}

/// See `--rdma-registration`.
fn parse_registration(text: &str) -> Result<Registration, String> {
    if text == "all" {
        return Ok(Registration::All);
    }
    let bytes_max = units::size(text)?;
    if bytes_max < rdma::CHUNK_BYTES {
        return Err(format!(
            "give at least {}M, or all",
            rdma::CHUNK_BYTES >> 20
        ));
    }
    Ok(Registration::Chunks { bytes_max })
}

/// A number of bytes that is whole pages, as many as a frame carries.
fn parse_body(text: &str) -> Result<u64, String> {
    let bytes = units::size(text)?;
    let most = multifd_wire::limits::BODY_BYTES_MAX as u64;
    if bytes == 0 || bytes > most || !bytes.is_multiple_of(multifd_wire::PAGE_BYTES_U64) {
        return Err("give a multiple of 4K, from 4K to 1M".to_owned());
    }
    Ok(bytes)
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
    fn addresses_without_a_kind_are_of_the_kind_of_transport() {
        let way = |arguments: &[&str]| {
            let arguments = ["multifd-send"].iter().chain(arguments);
            Args::parse_from(arguments).way()
        };
        let found = way(&[
            "--connect",
            "tcp:a:1",
            "--transport",
            "unix",
            "--data",
            "b:2",
        ])
        .unwrap();
        assert_eq!(found.control.unwrap().to_string(), "tcp:a:1");
        assert_eq!(found.data[0].to_string(), "unix:b:2");
        let found = way(&["--connect", "/run/x", "--transport", "unix"]).unwrap();
        assert_eq!(found.control.unwrap().to_string(), "unix:/run/x");
        let refused = |arguments: &[&str]| way(arguments).unwrap_err().to_string();
        assert!(refused(&["--connect", "tls:a:1"]).contains("--tls-ca"));
        assert!(refused(&["--connect", "a:1", "--transport", "tcp,rdma"]).contains("--data"));
        assert!(refused(&["--connect", "nonsense"]).contains("is not an address"));
    }

    #[test]
    fn registration_is_all_or_at_least_a_chunk() {
        assert_eq!(parse_registration("all"), Ok(Registration::All));
        let chunk = Registration::Chunks { bytes_max: 2 << 20 };
        assert_eq!(parse_registration("2M"), Ok(chunk));
        assert!(
            parse_registration("1M")
                .unwrap_err()
                .contains("at least 2M")
        );
        assert!(parse_registration("most").is_err());
    }

    #[test]
    fn defaults_are_accepted_by_the_library() {
        let args = Args::parse_from(["multifd-send", "--loopback"]);
        args.migration().unwrap();
        args.guest().validate().unwrap();
    }

    /// Every flag that takes a number, with every number that is too much for something: refused, or small enough for every sum
    /// that is made of it later.
    #[test]
    fn no_number_is_taken_that_later_sums_could_not_bear() {
        let texts = [
            "0",
            "1",
            "18446744073709551615",
            "18446744073709551616",
            "-1",
            "0.000001",
            "18446744073709551615s",
            "18446744073709551s",
            "24h",
            "24h 1ms",
            "0s",
            "1ns",
            "18446744073709551615y",
            "99999999999T",
            "16777215T",
            "18446744073709551615B/s",
            "1e308s",
            "148Ebit/s",
            "4294967295",
            "4294967296",
            "255",
            "256",
        ];
        let numbers = ["TIME", "SIZE", "RATE", "N", "PERCENT"];
        let command = Args::command();
        let (mut flags, mut taken) = (0, 0);
        for argument in command.get_arguments() {
            let name = argument.get_value_names().and_then(|names| names.first());
            let Some(name) = name.filter(|name| numbers.contains(&name.as_str())) else {
                continue;
            };
            flags += 1;
            let flag = format!("--{}", argument.get_long().expect("long flags only"));
            for text in texts {
                let arguments = [
                    "multifd-send",
                    "--connect",
                    "a:1",
                    &format!("{flag}={text}"),
                ];
                let Ok(args) = Args::try_parse_from(arguments) else {
                    continue;
                };
                if args.checked().is_err() {
                    continue;
                }
                taken += 1;
                let times = [
                    args.downtime_limit,
                    args.silence.stall,
                    args.reconnect_deadline,
                    args.warm_up,
                    args.device_deadline,
                    args.ack_deadline.unwrap_or_default(),
                ];
                for time in times {
                    assert!(time <= units::TIME_MAX, "{flag} {text} of {name}");
                    assert!(std::time::Instant::now().checked_add(time * 1000).is_some());
                }
                assert!(
                    args.memory <= 1 << 38 && args.working_set.is_none_or(|bytes| bytes <= 1 << 38),
                    "{flag} {text}"
                );
            }
        }
        assert!(
            flags >= 15 && taken >= flags,
            "{flags} flags, {taken} taken"
        );
    }
}
