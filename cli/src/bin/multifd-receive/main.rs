//! `multifd-receive`: waits for a guest, takes it over, lets it run, and checks that nothing of it was lost.
#[macro_use]
extern crate multifd_cli;

mod args;
mod check;
mod hold;
mod machine;
mod report;
mod watch;

#[cfg(test)]
#[path = "../../../tests/common/readme.rs"]
mod readme;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::Context as _;
use args::Args;
use machine::{GuestHandle, Machine};
use multifd_cli::confinement::Places;
use multifd_cli::flags::ReportKind;
use multifd_cli::tls::clear_text_warning;
use multifd_cli::{folder_of, signals, start};
use multifd_confine::{Exec, Side};
use multifd_receiver::{Config, Parts, Reception};
use multifd_transport::{Address, ChannelOptions, Listener};

fn main() -> ExitCode {
    let args: Args = match start::arguments(report::not_begun) {
        Ok(args) => args,
        Err(status) => return status,
    };
    start::log();
    let settings = args
        .reception()
        .and_then(|config| Ok((config, args.places()?)));
    let (config, places) = match settings {
        Ok(settings) => settings,
        Err(error) => return not_begun(&args, start::USAGE, 2, &error),
    };
    if args.bridge.bridge.is_some() {
        return match bridge(&args, &places) {
            Ok(status) => ExitCode::from(status),
            Err(error) => not_begun(&args, start::NOT_BEGUN, 1, &error),
        };
    }
    let kinds = places.0.iter().map(Address::kind);
    if let Err(error) = args.confinement.give_up_capabilities(kinds, &places.0) {
        return not_begun(&args, start::NOT_BEGUN, 1, &error);
    }
    match run(&args, config, &places) {
        Ok(code) => ExitCode::from(code),
        Err(error) => not_begun(&args, start::NOT_BEGUN, 1, &error),
    }
}

/// Found before anybody could connect; a program that reads JSON gets its object all the same.
fn not_begun(args: &Args, code: &str, status: u8, error: &anyhow::Error) -> ExitCode {
    let text = start::words(error);
    if args.output.report() == ReportKind::Json {
        out!("{}", report::not_begun(start::fault(code, &text)));
    }
    err!("multifd-receive: {text}");
    ExitCode::from(status)
}

/// Carries another monitor's migration instead of the built-in guest's.
fn bridge(args: &Args, places: &(Vec<Address>, ChannelOptions)) -> anyhow::Result<u8> {
    use multifd_bridge::cli::{Print, receive};
    let stop = signals::catch(
        "multifd-receive",
        "ending as soon as it is known where the guest is; SIGQUIT (Ctrl-\\) ends this program at once",
    )?;
    let print = match args.output.report() {
        ReportKind::Json => Print::Json,
        ReportKind::Text => Print::Text,
    };
    Ok(receive(&args.bridge, places, &stop, print))
}

fn run(
    args: &Args,
    config: Config,
    (places, options): &(Vec<Address>, ChannelOptions),
) -> anyhow::Result<u8> {
    // Before it says where it listens: from then on somebody may interrupt it.
    let asked = signals::catch(
        "multifd-receive",
        "ending; SIGQUIT (Ctrl-\\) ends this program at once, and a guest that runs here with it",
    )?;
    if args.until_stdin_closes {
        let closed = Arc::clone(&asked);
        let listen = move || {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            closed.store(true, Ordering::Relaxed);
        };
        let thread = std::thread::Builder::new().spawn(listen);
        thread.context("no thread for standard input")?;
    }
    // Before the listeners: a descriptor of RDMA's connection manager is void once its process is restricted further.
    let door = args.control.bind()?;
    let written: Vec<_> = args
        .control
        .control
        .iter()
        .map(|path| folder_of(path))
        .collect();
    let listening = Places::Listening(places);
    args.confinement
        .confine(listening, &args.tls, &written, Exec::Forbidden)?;
    let listeners: Vec<_> = places
        .iter()
        .map(|place| Listener::bind_with(place, options))
        .collect::<Result<_, _>>()?;
    let addresses: Vec<_> = listeners
        .iter()
        .map(|listener| listener.local_address().clone())
        .collect();
    let guest = GuestHandle::default();
    let ceiling = args
        .memory_ceiling
        .unwrap_or_else(|| match args.overcommit {
            true => u64::MAX,
            false => multifd_receiver::memory_to_be_had(),
        });
    let machine = Machine::new(guest.clone(), args.hold_at.map(hold::Hold::at), ceiling);
    let by_rdma = places.iter().any(|place| matches!(place, Address::Rdma(_)));
    let side = if by_rdma {
        Side::DestinationByRdma
    } else {
        Side::Destination
    };
    let reception = Reception::start(Parts {
        vmm: Box::new(machine),
        listeners,
        config,
        spawner: args.confinement.spawner(side)?,
    })
    .map_err(|failed| failed.error)?;
    let warning = clear_text_warning(&addresses);
    if !warning.is_empty() {
        err!("{warning}");
    }
    announce(args, &addresses);
    let finished = watch::watch(&args.output, reception, Arc::clone(&asked), door);
    let check = check::observe(args.run_for, &finished, &guest, &asked);
    report::print(args.output.report(), &finished, check.as_ref());
    Ok(report::exit_status(finished.report.outcome, check.as_ref()))
}

/// Tells where it listens, for people and for whoever started this program and asked for any free port.
fn announce(args: &Args, addresses: &[Address]) {
    for address in addresses {
        if args.output.report() == ReportKind::Json {
            err!("listening on {address}");
        } else {
            out!("listening on {address}");
        }
    }
}
