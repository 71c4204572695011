//! `multifd-send`: runs the built-in guest and moves it to a multifd-receive.
#[macro_use]
mod say;

mod args;
mod display;
mod loopback;
mod machine;
mod state_file;
mod summary;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use args::{Args, ReportKind, Way};
use clap::Parser as _;
use display::Display;
use machine::Machine;
use multifd_guest::{Guest, Tracking};
use multifd_sender::{Config, Finished, Migration, OutcomeKind, Parts, SpreadDialer};
use multifd_transport::rdma::RdmaOptions;
use state_file::StateFile;
use summary::Summary;

/// How long the receiver of `--loopback` may take to check its guest: a large guest takes a second per few GiB.
const CHECK_MAX: Duration = Duration::from_secs(600);

/// Longest wait for a heart-beat. They come every few milliseconds, but a guest that is told to write a page now and then
/// reports only when it does.
const HEARTBEAT_MAX: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let args = Args::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // What can't be written must not end the thread that said it.
        .log_internal_errors(false)
        .init();
    let (migration, guest, way) = match args.checked() {
        Ok(checked) => checked,
        Err(error) => {
            err!("multifd-send: {error:#}");
            return ExitCode::from(2);
        }
    };
    if let Some(file) = &args.ask {
        return match state_file::ask_outcome(file, way.options, args.reconnect_deadline) {
            Ok((status, answer)) => {
                match args.report {
                    ReportKind::Json => out!("{answer}"),
                    ReportKind::Text => out!("{}", answer["text"].as_str().unwrap_or_default()),
                }
                ExitCode::from(status)
            }
            Err(error) => {
                err!("multifd-send: {error:#}");
                ExitCode::from(2)
            }
        };
    }
    match run(&args, migration, &guest, way) {
        Ok(summary) => {
            summary.print(args.report);
            ExitCode::from(summary.exit_status())
        }
        Err(error) => {
            // Found before anything was moved; a program that reads JSON gets its object all the same.
            if args.report == ReportKind::Json {
                out!("{}", Summary::not_begun(&error));
            }
            err!("multifd-send: {error:#}");
            ExitCode::from(1)
        }
    }
}

fn run(
    args: &Args,
    config: Config,
    guest_config: &multifd_guest::Config,
    way: Way,
) -> anyhow::Result<Summary> {
    // Before anything is started that would have to be taken down.
    let interrupted = catch_signals()?;
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
    let tell = |text: String| {
        if !args.quiet {
            err!("{text}");
        }
    };
    let guest = Arc::new(Guest::create(guest_config).context("the guest can't be made")?);
    let (kind, config_of_guest) = (guest.kind(), guest.config());
    tell(format!(
        "guest: {kind}, {} MiB, {} vCPUs, dirties {:.0} MB/s of a {} MiB working set",
        config_of_guest.memory_bytes >> 20,
        config_of_guest.vcpus,
        config_of_guest.dirty_rate_bytes_per_s as f64 / 1e6,
        config_of_guest.working_set_bytes >> 20
    ));
    tell(format!(
        "       dirty pages are found by {}",
        how_found(guest.tracking())
    ));
    if let Some(note) = guest.tracking_note() {
        tell(format!("       (userfaultfd is not used. {note})"));
    }
    if kind == multifd_guest::Kind::Process && guest_config.tracking == Tracking::Auto {
        tell(
            "       (there is no /dev/kvm: the same work is done by threads on a plain mapping)"
                .into(),
        );
    }
    guest.run()?;
    let until = Instant::now() + args.warm_up;
    while Instant::now() < until && !interrupted.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(5).min(args.warm_up));
    }
    match &receiver {
        Some(receiver) => tell(format!(
            "moving it to process {} on this host, {to}, over {} channels",
            receiver.id(),
            args.channels
        )),
        None => tell(format!("moving it to {to} over {} channels", args.channels)),
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
        }),
        memory: guest.memory().to_channels(),
        sources,
        dial: Box::new(SpreadDialer {
            control,
            data,
            options,
        }),
        config,
        spawner: None,
    };
    let finished = watch(args, Migration::start(parts)?, interrupted);
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

/// Set by the first SIGINT or SIGTERM.
fn catch_signals() -> anyhow::Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        // The second one ends the program at once.
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&interrupted))?;
        signal_hook::flag::register(signal, Arc::clone(&interrupted))?;
    }
    Ok(interrupted)
}

/// Shows the progress, and cancels when the user wants that.
fn watch(args: &Args, migration: Migration, interrupted: Arc<AtomicBool>) -> Finished {
    let handle = migration.handle();
    let done = Arc::new(AtomicBool::new(false));
    let ended = Arc::clone(&done);
    let mut display = Display::new(args.quiet);
    let watcher = std::thread::Builder::new().spawn(move || {
        let mut told = false;
        while !ended.load(Ordering::Relaxed) {
            if interrupted.load(Ordering::Relaxed) && !told {
                told = true;
                handle.cancel();
            }
            display.show(handle.progress());
            std::thread::sleep(Duration::from_millis(20));
        }
        display.finish();
    });
    // The migration needs nobody who watches it.
    if let Err(error) = &watcher {
        err!("multifd-send: no progress display, and Ctrl-C does not cancel: {error}");
    }
    let finished = migration.wait();
    done.store(true, Ordering::Relaxed);
    let _ = watcher.map(std::thread::JoinHandle::join);
    finished
}

/// After a migration that did not happen: whether the guest really goes on here, which its heart-beats show.
fn still_runs(finished: &Finished, guest: &Guest) -> Option<bool> {
    if !matches!(
        finished.report.outcome,
        OutcomeKind::Failed | OutcomeKind::Cancelled
    ) {
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
