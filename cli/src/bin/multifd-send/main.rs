//! `multifd-send`: runs the built-in guest and moves it to a multifd-receive.
#[macro_use]
extern crate multifd_cli;

mod args;
mod bridge;
mod display;
mod events;
mod help;
mod loopback;
mod machine;
mod state_file;
mod summary;
mod watch;

#[cfg(test)]
#[path = "../../../tests/common/readme.rs"]
mod readme;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use args::{Args, Way};
use machine::Machine;
use multifd_cli::confinement::Places;
use multifd_cli::flags::ReportKind;
use multifd_cli::tls::clear_text_warning;
use multifd_cli::units::{Rate, Size};
use multifd_cli::{folder_of, signals, start};
use multifd_confine::{Exec, Side};
use multifd_guest::{Guest, Tracking};
use multifd_sender::{Config, Finished, GuestState, Migration, OutcomeKind, Parts, SpreadDialer};
use multifd_transport::{Address, rdma::RdmaOptions};
use serde_json::Value;
use state_file::StateFile;
use summary::Summary;

/// How long the receiver of `--loopback` may take to check its guest: a large guest takes a second per few GiB.
const CHECK_MAX: Duration = Duration::from_secs(600);

/// Longest wait for a heart-beat. They come every few milliseconds, but a guest that is told to write a page now and then
/// reports only when it does.
const HEARTBEAT_MAX: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let args: Args = match start::arguments(Summary::not_begun) {
        Ok(args) => args,
        Err(status) => return status,
    };
    start::log();
    if args.bridge.bridge.is_some() {
        return match bridge::run(&args) {
            Ok(status) => ExitCode::from(status),
            Err(error) => not_begun(&args, start::USAGE, 2, &error),
        };
    }
    let (migration, guest, way) = match args.checked() {
        Ok(checked) => checked,
        Err(error) => return not_begun(&args, start::USAGE, 2, &error),
    };
    if let Some(file) = &args.ask {
        return match state_file::ask_outcome(file, way.options, args.reconnect_deadline) {
            Ok((status, answer)) => {
                match args.output.report() {
                    ReportKind::Json => out!("{answer}"),
                    ReportKind::Text => out!("{}", answer["text"].as_str().unwrap_or_default()),
                }
                ExitCode::from(status)
            }
            Err(error) => not_begun(&args, start::USAGE, 2, &error),
        };
    }
    match run(&args, migration, &guest, way) {
        Ok(summary) => {
            summary.print(args.output.report());
            ExitCode::from(summary.exit_status())
        }
        Err(error) => not_begun(&args, start::NOT_BEGUN, 1, &error),
    }
}

/// Found before anything was moved; a program that reads JSON gets its object all the same.
fn not_begun(args: &Args, code: &str, status: u8, error: &anyhow::Error) -> ExitCode {
    let text = start::words(error);
    if args.output.report() == ReportKind::Json {
        let object: Value = Summary::not_begun(start::fault(code, &text));
        out!("{object}");
    }
    err!("multifd-send: {text}");
    ExitCode::from(status)
}

fn run(
    args: &Args,
    config: Config,
    guest_config: &multifd_guest::Config,
    way: Way,
) -> anyhow::Result<Summary> {
    let dialled = way.data.iter().chain(&way.control).map(Address::kind);
    let kinds = dialled.chain(args.transport.iter().map(|kind| kind.kind()));
    args.confinement.give_up_capabilities(kinds, &[])?;
    // Before anything is started that would have to be taken down.
    let asked = signals::catch(
        "multifd-send",
        "cancelling; SIGQUIT (Ctrl-\\) ends this program at once, and the guest with it",
    )?;
    let switch_over = signals::catch_switch_over()?;
    let receiver = if args.loopback {
        Some(loopback::Receiver::start(args)?)
    } else {
        None
    };
    let (control, data) = match (&receiver, way.control) {
        (Some(receiver), _) => receiver.addresses(),
        (None, Some(address)) => (address, way.data),
        (None, None) => anyhow::bail!("give --connect ADDRESS, or --loopback"),
    };
    let to = destinations(&control, &data);
    let dialled: Vec<_> = data.iter().chain([&control]).cloned().collect();
    let warning = clear_text_warning(&dialled);
    if !warning.is_empty() {
        err!("{warning}");
    }
    // Before it is confined; its folder stays in reach, so that it can be removed.
    let door = args.control.bind()?;
    let written = args.state_file.iter().chain(&args.control.control);
    let written: Vec<_> = written.map(|file| folder_of(file)).collect();
    let dialling = Places::Dialling(&dialled);
    let confined = args
        .confinement
        .confine(dialling, &args.tls, &written, Exec::Forbidden);
    confined?;
    let guest = Arc::new(Guest::create(guest_config).context("the guest can't be made")?);
    introduce(args, &guest, guest_config.tracking);
    guest.run()?;
    let began = Instant::now();
    while began.elapsed() < args.warm_up && !asked.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(5).min(args.warm_up));
    }
    let state = if args.start_paused {
        guest.pause()?;
        GuestState::Paused
    } else {
        GuestState::Running
    };
    let channels = args.channels;
    match &receiver {
        Some(receiver) => tell(
            args,
            format_args!(
                "moving it to process {} on this host, {to}, over {channels} channels",
                receiver.id()
            ),
        ),
        None => tell(
            args,
            format_args!("moving it to {to} over {channels} channels"),
        ),
    }
    let sources = vec![guest.tracking_source()?];
    let mut options = way.options;
    options.rdma = RdmaOptions::with_memory(guest.memory().to_channels(), args.rdma_registration);
    let state_file = args
        .state_file
        .as_deref()
        .map(|path| StateFile::new(path, &control));
    let parts = Parts {
        vmm: Box::new(Machine {
            guest: Arc::clone(&guest),
            devices: args.device.clone(),
            state_file: state_file.clone(),
            state,
        }),
        memory: guest.memory().to_channels(),
        sources,
        dial: Box::new(SpreadDialer {
            control,
            data,
            options,
        }),
        config,
        spawner: args.confinement.spawner(Side::Source)?,
    };
    let finished = watch::watch(
        &args.output,
        Migration::start(parts).map_err(|failed| failed.error)?,
        asked,
        switch_over,
        door,
    );
    if let Some(file) = state_file.filter(|_| finished.report.outcome != OutcomeKind::Unknown) {
        file.remove();
    }
    let alive = still_runs(&finished, &guest);
    let theirs = receiver.map(|receiver| {
        receiver.wait(if finished.error.is_none() {
            CHECK_MAX
        } else {
            Duration::from_secs(5)
        })
    });
    Ok(Summary::new(&finished, theirs, alive))
}

/// A line about what happens, unless the user wants none.
fn tell(args: &Args, text: std::fmt::Arguments<'_>) {
    if !args.output.quiet {
        err!("{text}");
    }
}

/// Says what guest it is, and how its dirty pages are found.
fn introduce(args: &Args, guest: &Guest, wanted: Tracking) {
    let (kind, config) = (guest.kind(), guest.config());
    tell(
        args,
        format_args!(
            "guest: {kind}, {}, {} vCPUs, dirties {} of a {} working set",
            Size(config.memory_bytes),
            config.vcpus,
            Rate(config.dirty_rate_bytes_per_s),
            Size(config.working_set_bytes)
        ),
    );
    tell(
        args,
        format_args!(
            "       dirty pages are found by {}",
            how_found(guest.tracking())
        ),
    );
    if let Some(note) = guest.tracking_note() {
        tell(
            args,
            format_args!("       (userfaultfd is not used. {note})"),
        );
    }
    if kind == multifd_guest::Kind::Process && wanted == Tracking::Auto {
        let why = guest.no_kvm().unwrap_or("KVM is not used");
        tell(
            args,
            format_args!("       ({why}: the same work is done by threads on a plain mapping)"),
        );
    }
}

/// Where channels go, for people.
fn destinations(
    control: &multifd_transport::Address,
    data: &[multifd_transport::Address],
) -> String {
    if data.iter().all(|address| address == control) {
        return control.to_string();
    }
    let data: Vec<_> = data.iter().map(ToString::to_string).collect();
    format!("{control} (data channels: {})", data.join(", "))
}

/// A way of tracking in words.
fn how_found(tracking: Tracking) -> &'static str {
    match tracking {
        Tracking::Ring => "KVM's dirty ring",
        Tracking::Log => "KVM's dirty log",
        Tracking::Userfault => "userfaultfd",
        Tracking::Marks => "the writing threads themselves",
        Tracking::Auto | Tracking::Kvm | Tracking::Process => "the best way there is",
    }
}

/// After a migration that did not happen: whether the guest really goes on here, which its heart-beats show.
fn still_runs(finished: &Finished, guest: &Guest) -> Option<bool> {
    let ended_here = matches!(
        finished.report.outcome,
        OutcomeKind::Failed | OutcomeKind::Cancelled
    );
    if !ended_here || finished.report.guest_paused {
        return None;
    }
    let counters = || {
        guest
            .heartbeats()
            .iter()
            .map(|beat| beat.counter)
            .sum::<u64>()
    };
    let (before, began) = (counters(), Instant::now());
    while counters() == before && began.elapsed() < HEARTBEAT_MAX {
        std::thread::sleep(Duration::from_millis(5));
    }
    Some(counters() > before)
}
