//! The command line of `multifd-send`.
#![allow(rustdoc::broken_intra_doc_links)] // comments on flags are the text of --help, as it is, and no links

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Parser, ValueEnum};
use multifd_guest::{Device, DeviceConfig, Fill, Pattern, Tracking};
use multifd_sender::config::WhenDestinationLost;
use multifd_sender::{Config, DirtyScan, WhenAckLate, WhenNotConverging};
use multifd_transport::rdma::{self, Registration};
use multifd_transport::tls::{TlsClient, TlsPem};
use multifd_transport::{Address, AddressKind, ChannelOptions};

/// Move a running guest to another process or host, over many channels at once.
///
/// multifd-send starts the built-in guest (a small real KVM machine that keeps writing its memory; without /dev/kvm the same
/// work is done by threads, and it says so), moves it to a multifd-receive while it runs, and prints what happened.
#[derive(Debug, Parser)]
#[command(name = "multifd-send", version, about, long_about, after_help = EXAMPLES)]
#[command(group(ArgGroup::new("destination").required(true).args(["connect", "loopback", "ask"])))]
pub(crate) struct Args {
    /// Where multifd-receive listens: HOST:PORT, [IPV6]:PORT or unix:/path, with tcp:, tls: or rdma: before it for another kind of
    /// channel than --transport's
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) connect: Option<String>,

    /// Start a multifd-receive on this host, and move the guest there
    #[arg(long)]
    pub(crate) loopback: bool,

    /// Write FILE (for its owner only) before anything is moved, and remove it once the outcome is known. If this program is killed in
    /// between, see --ask. FILE must not be there yet
    #[arg(long, value_name = "FILE", requires = "connect")]
    pub(crate) state_file: Option<PathBuf>,

    /// Move nothing: ask the destination how the migration ended of which --state-file left FILE behind, for as long as
    /// --reconnect-deadline. The program that wrote FILE must be dead: a migration that is not committed ends by the question
    #[arg(long, value_name = "FILE")]
    pub(crate) ask: Option<PathBuf>,

    /// Data channels, 1 to 256. About one per 10 Gb/s of link, and no more than cores, is a good number
    #[arg(long, value_name = "N", default_value_t = 4, help_heading = "Channels")]
    pub(crate) channels: u32,

    /// The kind of channel for addresses that name none. With --loopback: also a list, such as tcp,rdma, of which data channels
    /// take one after the other, and the control channel the first
    #[arg(
        long,
        value_name = "KIND",
        value_enum,
        value_delimiter = ',',
        default_value = "tcp",
        help_heading = "Channels"
    )]
    pub(crate) transport: Vec<Transport>,

    /// Where data channels go, if not where --connect says; give it several times for several kinds or paths, which are then taken
    /// in turn. All must be the same multifd-receive's
    #[arg(
        long,
        value_name = "ADDRESS",
        requires = "connect",
        help_heading = "Channels"
    )]
    pub(crate) data: Vec<String>,

    /// With --loopback: the host of tcp:, tls: and rdma: addresses. RDMA needs the address of an interface that has an RDMA device
    #[arg(
        long,
        value_name = "HOST",
        default_value = "127.0.0.1",
        help_heading = "Channels"
    )]
    pub(crate) loopback_host: String,

    /// With RDMA: how much of the guest's memory may be registered with the device, and so be pinned, at a time. `all` registers all of
    /// it before the migration begins, which needs as much locked memory (ulimit -l) and saves registering on the way
    #[arg(
        long,
        value_name = "SIZE|all",
        value_parser = parse_registration,
        default_value = "256M",
        help_heading = "Channels"
    )]
    pub(crate) rdma_registration: Registration,

    #[command(flatten)]
    pub(crate) tls: TlsFiles,

    /// Longest time that the guest may stand still (e.g. 300ms, 2s)
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = humantime::parse_duration, help_heading = "Migration")]
    pub(crate) downtime_limit: Duration,

    /// Cap on the bandwidth of all data channels together, in octets a second (e.g. 100M, 1.25G). Default: no cap
    #[arg(long, value_name = "SIZE", value_parser = parse_size, help_heading = "Migration")]
    pub(crate) bandwidth: Option<u64>,

    /// Live rounds that may be spent before --if-not-converging decides
    #[arg(
        long,
        value_name = "N",
        default_value_t = 30,
        help_heading = "Migration"
    )]
    pub(crate) max_rounds: u32,

    /// When the guest writes faster than the link carries: give up (the guest runs on here), or switch over all the same
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = NotConverging::Fail, help_heading = "Migration")]
    pub(crate) if_not_converging: NotConverging,

    /// Body of a data frame (a multiple of 4K, up to 1M)
    #[arg(long, value_name = "SIZE", value_parser = parse_body, default_value = "256K", help_heading = "Migration")]
    pub(crate) body: u64,

    /// Give a channel up when nothing moves on it for this long
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration, help_heading = "Migration")]
    pub(crate) stall: Duration,

    /// Dial lost channels again for this long, and go on where the migration was; the guest runs on meanwhile. After the
    /// commit: ask the destination for this long how it ended. 0s: what is lost is lost
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = humantime::parse_duration, help_heading = "Migration")]
    pub(crate) reconnect_deadline: Duration,

    /// When the destination was restarted and has nothing of the migration any more: begin again with all of memory, instead of
    /// giving up
    #[arg(long, help_heading = "Migration")]
    pub(crate) restart_if_lost: bool,

    /// Look for writes to guest memory that nobody reported: with the guest paused, compare all of its memory with what was
    /// sent. Gives up, and names the pages, if one differs. The downtime grows by some tenths of a second per GiB
    #[arg(long, help_heading = "Migration")]
    pub(crate) debug_dirty_scan: bool,

    /// The guest's memory
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "1G", help_heading = "Guest")]
    pub(crate) memory: u64,

    /// The guest's virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 2, help_heading = "Guest")]
    pub(crate) vcpus: u32,

    /// How much memory the guest dirties a second (4 KiB for each page written; 0: an idle guest)
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "100M", help_heading = "Guest")]
    pub(crate) dirty_rate: u64,

    /// The part of memory that the guest writes
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "256M", help_heading = "Guest")]
    pub(crate) working_set: u64,

    /// The order in which the guest writes its working set
    #[arg(long, value_enum, default_value_t = WritePattern::Random, help_heading = "Guest")]
    pub(crate) pattern: WritePattern,

    /// How dirty pages are found
    #[arg(long, value_enum, default_value_t = HowTracked::Auto, help_heading = "Guest")]
    pub(crate) tracking: HowTracked,

    /// A device that writes guest memory from the host, where no dirty log sees it
    #[arg(long, value_enum, default_value_t = GuestDevice::None, help_heading = "Guest")]
    pub(crate) guest_device: GuestDevice,

    /// Share of the memory outside the working set that is all zero, in percent
    #[arg(
        long,
        value_name = "PERCENT",
        default_value_t = 25,
        help_heading = "Guest"
    )]
    pub(crate) zero_percent: u8,

    /// Seed of the guest's content and writes
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Guest")]
    pub(crate) seed: u64,

    /// A device to move with the guest; may be given many times. See "Devices" below
    #[arg(long, value_name = "MODEL", help_heading = "Devices")]
    pub(crate) device: Vec<DeviceConfig>,

    /// Give up when one call of a device's own code (a step, a read) takes longer than this; the guest then runs on here without it
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration, help_heading = "Devices")]
    pub(crate) device_deadline: Duration,

    /// How long the switchover waits for devices' initial bytes to be loaded there. Default: as long as it takes, with the guest running
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, help_heading = "Devices")]
    pub(crate) ack_deadline: Option<Duration>,

    /// When that is over: give up (the guest runs on here), or switch over without
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = AckLate::Fail, help_heading = "Devices")]
    pub(crate) if_ack_late: AckLate,

    /// Let the guest run this long before the migration begins
    #[arg(long, value_name = "TIME", default_value = "500ms", value_parser = humantime::parse_duration, help_heading = "Guest")]
    pub(crate) warm_up: Duration,

    /// How the final report is printed: text for people, json for programs (one object on standard output, nothing else there)
    #[arg(long, value_enum, default_value_t = ReportKind::Text, help_heading = "Output")]
    pub(crate) report: ReportKind,

    /// No progress display
    #[arg(long, short, help_heading = "Output")]
    pub(crate) quiet: bool,
}

const EXAMPLES: &str = "\
Examples:
  a demonstration on this host:
    multifd-send --loopback
  on the destination, then on the source:
    multifd-receive --listen 0.0.0.0:4444
    multifd-send --connect dest:4444 --channels 8
  encrypted and authenticated, both sides with certificates of one authority (CA):
    multifd-receive --listen tls:0.0.0.0:4444 --tls-ca ca.pem --tls-cert dest.pem --tls-key dest.key
    multifd-send --connect tls:dest:4444 --tls-ca ca.pem --tls-cert source.pem --tls-key source.key
  two kinds of channel in one migration, half of the data channels on each:
    multifd-receive --listen 0.0.0.0:4444 --listen rdma:10.0.0.2:4445
    multifd-send --connect dest:4444 --data dest:4444 --data rdma:10.0.0.2:4445 --channels 4
  a guest that is too busy (see the advice in the error):
    multifd-send --loopback --dirty-rate 2G --bandwidth 500M
  to learn how it ended even if this program is killed (within multifd-receive's --suspend):
    multifd-send --connect dest:4444 --state-file /run/vm7.state
    multifd-send --ask /run/vm7.state
  over a link that comes and goes:
    multifd-send --connect dest:4444 --reconnect-deadline 10min
  is there a writer of guest memory that tells nobody? (here there is one)
    multifd-send --loopback --debug-dirty-scan --guest-device dma-unreported
  for programs:
    multifd-send --loopback --report json | jq .downtime_ms

  with two devices, of which one gives most of its state while the guest runs:
    multifd-send --loopback --device model:name=a,size=100M,initial=80M,growth=1M \
                            --device model:name=b,size=50M,config=4K

Devices:
  model:KEY=VALUE,...   a device without hardware, whose content is checked where it is loaded
    name=NAME           its name, the same on both sides
    size=SIZE           its whole state
    initial=SIZE        of it, read and loaded before the guest is paused
    growth=SIZE         what it changes in a second while it runs
    read=SIZE write=SIZE  how fast it can be read and loaded, in a second
    config=SIZE         its configuration, loaded after the rest
    reinit=N            how often it announces new initial bytes
    p2p=no              it has no P2P-quiescent state: then it can only be moved alone
    ack=no pre-copy=yes after-memory=yes seed=N
    fail=WHAT           read@SIZE, write@SIZE, corrupt@SIZE, save-config, load-config, finish,
                        step@STATE, break@STATE, hang@STATE, hang-read@SIZE or hang-write@SIZE:
                        to see what a failure does

Sizes take K, M, G and T, powers of 1024.
Ctrl-C cancels the migration; the guest goes on running here. A second Ctrl-C ends
the program, and the guest with it.

Exit status:
  0  migrated
  1  failed; the guest runs on at the source
  2  wrong usage; nothing was begun
  3  cancelled; the guest runs on at the source
  4  outcome unknown: the commit was sent, and the destination could not be asked
     what came of it; the guest stays paused at the source
  5  migrated, but the guest's own check found an error
  6  the destination has the guest and could not run it: it is paused on both sides
With --ask: 0 the guest runs at the destination; 1 it was not committed and never will be;
  4 still unknown; 6 the destination has the guest and could not run it; 2 no such file

Log: RUST_LOG=info (or debug) writes to standard error.";

/// Certificates and key for TLS.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "TLS")]
pub(crate) struct TlsFiles {
    /// Certificate of the authority (CA) that must have signed the destination's, in PEM form. Needed for tls: addresses
    #[arg(long, value_name = "FILE")]
    pub(crate) tls_ca: Option<PathBuf>,

    /// This side's own certificate, for a destination that asks for one; with the chain to the authority, if there is one
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub(crate) tls_cert: Option<PathBuf>,

    /// The private key of --tls-cert
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub(crate) tls_key: Option<PathBuf>,

    /// The name that the destination's certificate must be for. Default: the host that is dialled
    #[arg(long, value_name = "NAME")]
    pub(crate) tls_server_name: Option<String>,
}

impl TlsFiles {
    /// What TLS needs to dial; nothing if no authority was given.
    fn client(&self) -> anyhow::Result<Option<TlsClient>> {
        if self.tls_ca.is_none() {
            return Ok(None);
        }
        let pem = TlsPem::read(
            self.tls_ca.as_deref(),
            self.tls_cert.as_deref(),
            self.tls_key.as_deref(),
        )?;
        let client = TlsClient::new(&pem)?;
        Ok(Some(match &self.tls_server_name {
            Some(name) => client.with_server_name(name)?,
            None => client,
        }))
    }
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

impl Transport {
    pub(crate) fn kind(self) -> AddressKind {
        match self {
            Self::Tcp => AddressKind::Tcp,
            Self::Tls => AddressKind::Tls,
            Self::Rdma => AddressKind::Rdma,
            Self::Unix => AddressKind::Unix,
        }
    }
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

/// See `--if-not-converging`.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum NotConverging {
    /// The guest runs on at the source; the error says what would help
    Fail,
    /// Switch over whatever the downtime
    Switch,
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

/// See `--report`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ReportKind {
    /// For people
    Text,
    /// One JSON object on standard output
    Json,
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
    fn way(&self) -> anyhow::Result<Way> {
        let kind = match &self.transport[..] {
            [first] => first.kind(),
            [first, ..] if self.loopback => first.kind(),
            _ => anyhow::bail!(
                "--transport with several kinds is for --loopback: use --connect for the control channel and --data for each kind of data channel"
            ),
        };
        let address = |text: &String| Address::parse_with(text, kind);
        let mut options = ChannelOptions::default();
        options.tls_client = self.tls.client()?;
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
            "TLS needs --tls-ca, the certificate of the authority (CA) that signed the destination's"
        );
        let by_rdma = |address: &Address| address.kind() == AddressKind::Rdma;
        if way.control.iter().chain(&way.data).any(by_rdma)
            || (self.loopback && self.transport.contains(&Transport::Rdma))
        {
            rdma::available()?;
        }
        anyhow::ensure!(
            !self.loopback || !uses_tls || self.tls.tls_cert.is_some(),
            "--loopback with TLS needs --tls-cert and --tls-key too: the receiver that it starts shows the same certificate, which must \
             be for {}",
            self.tls
                .tls_server_name
                .as_deref()
                .unwrap_or(&self.loopback_host)
        );
        Ok(way)
    }

    /// The migration's settings.
    pub(crate) fn migration(&self) -> anyhow::Result<Config> {
        let when = match self.if_not_converging {
            NotConverging::Fail => WhenNotConverging::Fail,
            NotConverging::Switch => WhenNotConverging::Switch,
        };
        Ok(Config::builder()
            .channels(self.channels)
            .downtime_limit(self.downtime_limit)
            .bandwidth(self.bandwidth)
            .max_rounds(self.max_rounds)
            .when_not_converging(when)
            .ack_deadline(self.ack_deadline)
            .when_ack_late(match self.if_ack_late {
                AckLate::Fail => WhenAckLate::Fail,
                AckLate::GoOn => WhenAckLate::GoOn,
            })
            .device_deadline(self.device_deadline)
            .body_bytes(self.body)
            .stall(self.stall)
            .reconnect_deadline(self.reconnect_deadline)
            .when_destination_lost(if self.restart_if_lost {
                WhenDestinationLost::StartAfresh
            } else {
                WhenDestinationLost::Fail
            })
            .progress_deadline(Duration::from_secs(60).max(self.stall))
            .dirty_scan(if self.debug_dirty_scan {
                DirtyScan::AtSwitchover
            } else {
                DirtyScan::Off
            })
            .keep_alive(Duration::from_secs(1).min(self.stall / 4))
            .build()?)
    }

    /// The guest's settings.
    pub(crate) fn guest(&self) -> multifd_guest::Config {
        multifd_guest::Config {
            memory_bytes: self.memory,
            vcpus: self.vcpus,
            working_set_bytes: self.working_set,
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

/// A number of octets; K, M, G and T are powers of 1024.
fn parse_size(text: &str) -> Result<u64, String> {
    let binary = parse_size::Config::new().with_binary();
    binary
        .parse_size(text)
        .map_err(|e| format!("{e}: write for example 64M or 1.5G"))
}

/// See `--rdma-registration`.
fn parse_registration(text: &str) -> Result<Registration, String> {
    if text == "all" {
        return Ok(Registration::All);
    }
    let bytes_max = parse_size(text)?;
    if bytes_max < rdma::CHUNK_BYTES {
        return Err(format!(
            "give at least {}M, or all",
            rdma::CHUNK_BYTES >> 20
        ));
    }
    Ok(Registration::Chunks { bytes_max })
}

/// A number of octets that is whole pages, as many as a frame carries.
fn parse_body(text: &str) -> Result<u64, String> {
    let octets = parse_size(text)?;
    let most = multifd_wire::limits::BODY_BYTES_MAX as u64;
    if octets == 0 || octets > most || !octets.is_multiple_of(multifd_wire::PAGE_BYTES_U64) {
        return Err("give a multiple of 4K, from 4K to 1M".to_owned());
    }
    Ok(octets)
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
    fn sizes_are_powers_of_1024() {
        assert_eq!(parse_size("64M"), Ok(64 << 20));
        assert_eq!(parse_size("1.5g"), Ok(3 << 29));
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("2GiB"), Ok(2 << 30));
        assert!(parse_size("12X").unwrap_err().contains("write for example"));
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
}
