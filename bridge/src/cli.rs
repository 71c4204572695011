//! What the two programs say about the bridge: flags, examples, and the report.

use std::io::Write as _;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use multifd_transport::{Address, ChannelOptions, Listener};

use crate::config::Config;
use crate::destination::{self, Destination};
use crate::keeper::{self, Kept};
use crate::monitor::MonitorAddress;
use crate::report::{Ended, Report};
use crate::source::{self, Source};

/// Flags that both programs have.
#[derive(Debug, Clone, clap::Args)]
pub struct Timing {
    /// With --bridge: give the migration up when the link is gone for this long
    ///
    /// libvirt gives its own connection up after 25s. The guest then runs on at the source, unless it may run at the destination already:
    /// then the destination is asked, and the source's monitor waits.
    #[arg(long, value_name = "TIME", default_value = "20s", value_parser = humantime::parse_duration, hide_short_help = true, help_heading = "Bridge")]
    pub bridge_outage: Duration,

    /// With --bridge: hold no more between the monitors than arrives in this time, beside the round trip
    ///
    /// A monitor counts what is held as sent, so the guest's downtime may be longer by this than the monitor believes.
    #[arg(long, value_name = "TIME", default_value = "20ms", value_parser = humantime::parse_duration, hide_short_help = true, help_heading = "Bridge")]
    pub bridge_buffer: Duration,
}

impl Timing {
    fn config(&self) -> Config {
        Config {
            outage: self.bridge_outage,
            horizon: self.bridge_buffer,
            ..Config::default()
        }
    }
}

/// The bridge's flags of `multifd-send`.
#[derive(Debug, Clone, clap::Args)]
pub struct SendArgs {
    /// Carry the migration of an unmodified QEMU or Cloud Hypervisor, which is told to migrate to ADDRESS
    ///
    /// Listens there (unix:/path or tcp:HOST:PORT) for the monitor, and carries all its connections to the multifd-receive of --connect,
    /// which was started with its own --bridge. The built-in guest's flags mean nothing then.
    #[arg(
        long,
        value_name = "ADDRESS",
        requires = "connect",
        help_heading = "Bridge"
    )]
    pub bridge: Option<String>,

    #[command(flatten)]
    timing: Timing,
}

/// The bridge's flags of `multifd-receive`.
#[derive(Debug, Clone, clap::Args)]
pub struct ReceiveArgs {
    /// Carry the migration of an unmodified QEMU or Cloud Hypervisor, which waits for the guest at ADDRESS
    ///
    /// Waits at --listen for a multifd-send that was started with its own --bridge, and connects to the monitor at ADDRESS (unix:/path or
    /// tcp:HOST:PORT) as often as the source's monitor connects there.
    #[arg(long, value_name = "ADDRESS", help_heading = "Bridge")]
    pub bridge: Option<String>,

    #[command(flatten)]
    timing: Timing,
}

/// How a report is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Print {
    /// For people.
    Text,
    /// One JSON object on standard output.
    Json,
}

/// Where lanes go, and how many.
#[derive(Debug)]
pub struct Way {
    /// The control channel's address.
    pub control: Address,
    /// The data channels' addresses, if they differ.
    pub data: Vec<Address>,
    /// Data channels.
    pub channels: u32,
    /// What the kinds need.
    pub options: ChannelOptions,
}

fn say(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

fn out(text: &str) {
    let mut output = std::io::stdout().lock();
    let _ = writeln!(output, "{text}").and_then(|()| output.flush());
}

fn monitor(text: &str) -> Result<MonitorAddress, String> {
    let address: Address = text.parse().map_err(|error| format!("{error}"))?;
    MonitorAddress::try_from(&address)
}

/// Set for a process that is to be a keeper.
const KEEPER: &str = "MULTIFD_BRIDGE_KEEPER";

/// This program again, with the same arguments, as a keeper.
fn keeper_command() -> std::process::Command {
    let mut command = std::process::Command::new("/proc/self/exe");
    command.args(std::env::args_os().skip(1)).env(KEEPER, "1");
    command
}

/// Whether this process is a [keeper], for which [`keep`] is to be called instead of [`send`].
#[must_use]
pub fn is_keeper() -> bool {
    std::env::var_os(KEEPER).is_some()
}

/// The keeper's life: returns its exit status.
pub fn keep(way: &Way) -> u8 {
    let kept = match keeper::wait() {
        Ok(kept) => kept,
        Err(error) => return usage("multifd-send", &format!("keeper: {error}")),
    };
    if matches!(kept, Kept::Over) {
        return 0;
    }
    say(&format!(
        "multifd-send: the bridge was killed after the guest was stopped here. Process {} keeps the monitor from running it again, and asks {} \
         whether it runs there. End this process only if you know that it does not",
        std::process::id(),
        way.control
    ));
    match source::keep(kept, &way.options, &way.control) {
        Some(Ended::Migrated) => {
            say("multifd-send: the guest runs at the destination");
            0
        }
        _ => {
            say(
                "multifd-send: the destination's monitor ended without running the guest: it runs here again",
            );
            1
        }
    }
}

/// `multifd-send --bridge`: returns the exit status.
pub fn send(args: &SendArgs, way: Way, stop: &AtomicBool, print: Print) -> u8 {
    let listen = match monitor(args.bridge.as_deref().unwrap_or_default()) {
        Ok(listen) => listen,
        Err(error) => return usage("multifd-send", &error),
    };
    if !(1..=multifd_wire::limits::LANES_MAX as u32).contains(&way.channels) {
        return usage("multifd-send", "--channels: 1 to 256");
    }
    let told = format!(
        "bridge: a machine monitor may migrate to {listen}, on to {}",
        way.control
    );
    let source = Source {
        listen,
        control: way.control,
        data: way.data,
        lanes: way.channels,
        options: way.options,
        config: args.timing.config(),
        keeper: Some(Box::new(keeper_command)),
    };
    let announce = || say(&told);
    finish("multifd-send", source::run(source, stop, announce), print)
}

/// `multifd-receive --bridge`: returns the exit status.
pub fn receive(
    args: &ReceiveArgs,
    (places, options): &(Vec<Address>, ChannelOptions),
    stop: &AtomicBool,
    print: Print,
) -> u8 {
    let monitor = match monitor(args.bridge.as_deref().unwrap_or_default()) {
        Ok(monitor) => monitor,
        Err(error) => return usage("multifd-receive", &error),
    };
    let listeners: Result<Vec<_>, _> = places
        .iter()
        .map(|place| Listener::bind_with(place, options))
        .collect();
    let listeners = match listeners {
        Ok(listeners) => listeners,
        Err(error) => {
            say(&format!("multifd-receive: {error}"));
            return 1;
        }
    };
    for listener in &listeners {
        say(&format!(
            "bridge: listening on {}, for {monitor}",
            listener.local_address()
        ));
    }
    let destination = Destination {
        monitor,
        listeners,
        config: args.timing.config(),
    };
    finish(
        "multifd-receive",
        destination::run(destination, stop),
        print,
    )
}

fn usage(program: &str, error: &str) -> u8 {
    say(&format!("{program}: {error}"));
    2
}

fn finish(program: &str, result: std::io::Result<Report>, print: Print) -> u8 {
    let report = match result {
        Ok(report) => report,
        Err(error) => {
            say(&format!("{program}: {error}"));
            return 1;
        }
    };
    match print {
        Print::Json => out(&serde_json::to_string(&report).unwrap_or_default()),
        Print::Text => out(&text(&report)),
    }
    match report.outcome {
        Ended::Migrated | Ended::Carried => 0,
        Ended::Failed => 1,
        Ended::Cancelled => 3,
        Ended::Unknown => 4,
    }
}

/// The report for people.
fn text(report: &Report) -> String {
    let first = match report.outcome {
        Ended::Migrated => "migrated: the guest runs at the destination",
        Ended::Carried => "carried to its end; what the monitors said can't be read here",
        Ended::Failed => "failed: the guest is the source's",
        Ended::Cancelled => "cancelled: the guest is the source's",
        Ended::Unknown => {
            "not known: the destination may run the guest. Look there (query-status) before you run it here"
        }
    };
    let mut lines = vec![first.to_owned()];
    lines.extend(report.reason.iter().map(|reason| format!("  {reason}")));
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    lines.push(format!(
        "  {} connections, {:.1} MiB from the monitor here, {:.1} MiB to it, in {:.1} s",
        report.streams,
        mib(report.bytes_from_monitor),
        mib(report.bytes_to_monitor),
        report.elapsed_ms as f64 / 1e3
    ));
    if report.seen.memory_bytes > 0 {
        lines.push(format!(
            "  memory {:.0} MiB: {} pages and {} of zeros, {} passes",
            mib(report.seen.memory_bytes),
            report.seen.pages,
            report.seen.zero_pages,
            report.seen.iterations
        ));
    }
    lines.push(format!(
        "  {} lanes lost, {} resumes, longest outage {} ms; a stream held at most {:.1} MiB here",
        report.lanes_lost,
        report.resumes,
        report.outage_ms_max,
        mib(report.held_bytes_max)
    ));
    lines.join("\n")
}
