//! `multifd-receive`: waits for a guest, takes it over, lets it run, and checks that nothing of it was lost.
#[macro_use]
mod say;

mod args;
mod hold;
mod machine;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use args::{Args, ReportKind};
use clap::Parser as _;
use machine::{GuestHandle, Machine};
use multifd_receiver::{Config, Finished, OutcomeKind, Parts, Reception};
use multifd_transport::{Address, ChannelOptions, Listener};
use serde_json::json;

/// Longest wait for the first heart-beat after `--run-for`. They come every few milliseconds, but a guest that is told to write
/// a page now and then reports only when it does.
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
    let settings = args
        .reception()
        .and_then(|config| Ok((config, args.places()?)));
    let (config, places) = match settings {
        Ok(settings) => settings,
        Err(error) => {
            err!("multifd-receive: {error:#}");
            return ExitCode::from(2);
        }
    };
    match run(&args, config, &places) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            // A program that reads JSON gets its object all the same.
            if args.report == ReportKind::Json {
                let text = format!("{error:#}");
                let error = json!({ "code": "cli.not-begun", "phase": "hello", "channel": null, "text": text });
                out!(
                    "{}",
                    json!({ "outcome": "failed", "guest_check": null, "error": error })
                );
            }
            err!("multifd-receive: {error:#}");
            ExitCode::from(1)
        }
    }
}

fn run(
    args: &Args,
    config: Config,
    (places, options): &(Vec<Address>, ChannelOptions),
) -> anyhow::Result<u8> {
    // Before it says where it listens: from then on somebody may interrupt it.
    let interrupted = catch_signals()?;
    if args.until_stdin_closes {
        let closed = Arc::clone(&interrupted);
        let listen = move || {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            closed.store(true, Ordering::Relaxed);
        };
        let thread = std::thread::Builder::new().spawn(listen);
        thread.context("no thread for standard input")?;
    }
    let listeners: Vec<_> = places
        .iter()
        .map(|place| {
            Listener::bind_with(place, options).with_context(|| format!("cannot listen on {place}"))
        })
        .collect::<Result<_, _>>()?;
    let addresses: Vec<_> = listeners
        .iter()
        .map(|listener| listener.local_address().clone())
        .collect();
    let guest = GuestHandle::default();
    let machine = Machine::new(guest.clone(), args.hold_at.map(hold::Hold::at));
    let reception = Reception::start(Parts {
        vmm: Box::new(machine),
        listeners,
        config,
        spawner: None,
    })?;
    announce(args, &addresses);

    let (handle, watch) = (reception.handle(), Arc::clone(&interrupted));
    let done = Arc::new(AtomicBool::new(false));
    let (ended, quiet) = (
        Arc::clone(&done),
        args.quiet || args.report == ReportKind::Json,
    );
    let watcher = std::thread::Builder::new().spawn(move || {
        let mut told = Instant::now();
        while !ended.load(Ordering::Relaxed) {
            if watch.load(Ordering::Relaxed) {
                handle.cancel();
            }
            let now = handle.progress();
            if !quiet && now.memory_pages > 0 && told.elapsed() > Duration::from_secs(1) {
                told = Instant::now();
                if now.phase == multifd_wire::Phase::Suspended {
                    err!("  link lost: keeping what came until the source is back");
                    continue;
                }
                err!(
                    "  round {}: {:.0} MiB received on {} channels ({})",
                    now.round,
                    now.octets as f64 / 1048576.0,
                    now.lanes,
                    now.phase
                );
                if now.devices > 0 {
                    err!(
                        "  devices: {:.0} MiB loaded, {} of {} have everything",
                        now.device_bytes as f64 / 1048576.0,
                        now.devices_loaded,
                        now.devices
                    );
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    // The reception needs nobody who watches it.
    if let Err(error) = &watcher {
        err!("multifd-receive: no progress display, and Ctrl-C does not end it: {error}");
    }
    let finished = reception.wait();
    done.store(true, Ordering::Relaxed);
    let _ = watcher.map(std::thread::JoinHandle::join);
    let check = observe(args, &finished, &guest, &interrupted);
    report(args, &finished, check.as_ref());
    Ok(match (finished.report.outcome, check) {
        (OutcomeKind::Running, Some(Check { passed: true, .. }) | None) => 0,
        (OutcomeKind::Running, _) => 5,
        (OutcomeKind::Failed, _) => 1,
        (OutcomeKind::Stranded, _) => 4,
    })
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

/// Tells where it listens, for people and for whoever started this program and asked for any free port.
fn announce(args: &Args, addresses: &[Address]) {
    for address in addresses {
        if args.report == ReportKind::Json {
            err!("listening on {address}");
        } else {
            out!("listening on {address}");
        }
    }
}

/// What became of the guest after it arrived.
struct Check {
    passed: bool,
    text: String,
    beats: u64,
}

/// Lets the guest run, then stops it and has all of its memory checked.
fn observe(
    args: &Args,
    finished: &Finished,
    guest: &GuestHandle,
    interrupted: &AtomicBool,
) -> Option<Check> {
    if finished.report.outcome != OutcomeKind::Running {
        return None;
    }
    let guest = guest.get()?;
    let until = Instant::now() + args.run_for;
    let beats = || -> u64 { guest.heartbeats().iter().map(|beat| beat.beats).sum() };
    let hurried = || args.run_for.is_zero() || interrupted.load(Ordering::Relaxed);
    let enough =
        || Instant::now() >= until && (beats() > 0 || Instant::now() >= until + HEARTBEAT_MAX);
    while !enough() && !hurried() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let (beats, hurried) = (beats(), hurried());
    let check = guest.pause().and_then(|()| guest.check());
    Some(match check {
        Ok(report) if report.passed() && (beats > 0 || hurried) => Check {
            passed: true,
            text: report.to_string(),
            beats,
        },
        Ok(report) if report.passed() => Check {
            passed: false,
            text: "the guest's heart does not beat here".into(),
            beats,
        },
        Ok(report) => Check {
            passed: false,
            text: report.to_string(),
            beats,
        },
        Err(error) => Check {
            passed: false,
            text: error.to_string(),
            beats,
        },
    })
}

fn report(args: &Args, finished: &Finished, check: Option<&Check>) {
    if args.report == ReportKind::Json {
        let mut report = serde_json::to_value(&finished.report).unwrap_or_default();
        report["guest_check"] = check.map_or(json!(null), |check| {
            if check.passed {
                json!("passed")
            } else {
                json!(check.text)
            }
        });
        report["guest_beats"] = json!(check.map(|check| check.beats));
        out!("{report}");
        return;
    }
    let r = &finished.report;
    for damage in &r.damaged {
        err!(
            "multifd-receive: damaged on the way, found by its checksum: {} times {} on {}, in phase {}",
            damage.count,
            damage.frame,
            damage.channel.as_deref().unwrap_or("a new connection"),
            damage.phase
        );
    }
    match (&r.error, check) {
        (None, Some(check)) => {
            out!(
                "the guest runs here: {:.0} MiB of memory in {} rounds, digest {}",
                r.memory_bytes as f64 / 1048576.0,
                r.rounds,
                r.digest.as_deref().unwrap_or("?")
            );
            out!(
                "guest check: {} ({} heart-beats since it arrived)",
                check.text,
                check.beats
            );
        }
        (None, None) => out!("the guest runs here"),
        (Some(error), _) => err!(
            "multifd-receive: {} [{}] in phase {}{}",
            error.text,
            error.code,
            error.phase,
            error
                .channel
                .as_ref()
                .map(|c| format!(", {c}"))
                .unwrap_or_default()
        ),
    }
}
