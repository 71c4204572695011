//! `multifd-vmm`: a small virtual machine monitor on rust-vmm's crates that boots a distribution's kernel, and moves it, running.
//!
//! ```text
//!   args ─► machine (KVM, memory, threads) ─┬─ boot, acpi      a kernel before its first instruction
//!                                           ├─ gate, vcpu      who may run
//!                                           ├─ state           processors, controllers, clocks as data
//!                                           └─ devices, virtio the console, random numbers
//!           migration                       what an author of another VMM copies
//! ```
#![allow(clippy::print_stderr)] // a program speaks to its user; standard output is the guest's console

mod acpi;
mod args;
mod boot;
mod devices;
mod gate;
mod machine;
mod migration;
mod state;
mod vcpu;
mod virtio;

use std::io::Read as _;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use args::Args;
use clap::Parser as _;
use devices::Devices;
use gate::End;
use machine::Machine;
use migration::Left;
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};

/// How often the program looks whether something is to be done.
const LOOK: Duration = Duration::from_millis(20);

fn main() -> ExitCode {
    let args = Args::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    match run(&args) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            say(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<u8> {
    let (stop, move_it) = (Arc::new(AtomicBool::new(false)), Arc::default());
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    signal_hook::flag::register(SIGUSR1, Arc::clone(&move_it))?;
    let settings = args.settings();
    let stopping = || stop.load(Ordering::Relaxed);

    let mut machine = match &args.incoming {
        Some(at) => {
            let listening = |at: &_| say(&format!("listening on {at}"));
            let (machine, report) =
                migration::arrive(at, &settings, args.tracking(), listening, stopping)?;
            say(&format!("arrived: {report}"));
            machine
        }
        None => {
            let machine = Machine::new(args.shape(), args.tracking())?;
            machine.boot(&args.boot().context("no kernel")?)?;
            machine.run();
            Box::new(machine)
        }
    };
    let typist = Typist::start(&machine)?;
    loop {
        match machine.ended() {
            Some(End::Down) => return Ok(0),
            Some(End::Failed(why)) => anyhow::bail!("the guest was ended: {why}"),
            None => {}
        }
        if stopping() {
            return Ok(3);
        }
        if move_it.swap(false, Ordering::Relaxed) {
            let Some(to) = &args.migrate_to else {
                say("nowhere to go: --migrate-to was not given");
                continue;
            };
            typist.rest();
            // A migration that is cancelled leaves the guest running, so the signal is used up by that.
            let cancelled = || stop.swap(false, Ordering::Relaxed);
            match migration::leave(machine, to, &settings, cancelled) {
                Left::Moved(report) => {
                    say(&format!("moved: {report}"));
                    return Ok(0);
                }
                Left::Stayed(back, why) => {
                    say(&format!("it runs on here: {why:#}"));
                    machine = back;
                    typist.type_into(&machine);
                }
                Left::Lost(why) => return Err(why),
            }
        }
        std::thread::sleep(LOOK);
    }
}

/// Who types what comes on standard input.
struct Typist {
    devices: Arc<Mutex<Option<Arc<Devices>>>>,
}

impl Typist {
    fn start(machine: &Machine) -> Result<Self> {
        let typist = Self {
            devices: Arc::new(Mutex::new(Some(Arc::clone(&machine.devices)))),
        };
        let devices = Arc::clone(&typist.devices);
        std::thread::Builder::new()
            .name("typist".into())
            .spawn(move || {
                let mut bytes = [0; 16];
                while let Ok(count @ 1..) = std::io::stdin().read(&mut bytes) {
                    while !type_into(&devices, &bytes[..count]) {
                        std::thread::sleep(LOOK);
                    }
                }
            })?;
        Ok(typist)
    }

    /// What is typed waits: during a migration it would change a state that was saved.
    fn rest(&self) {
        *self.devices.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn type_into(&self, machine: &Machine) {
        *self.devices.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Arc::clone(&machine.devices));
    }
}

/// Whether somebody takes it now.
fn type_into(devices: &Mutex<Option<Arc<Devices>>>, bytes: &[u8]) -> bool {
    let devices = devices.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(devices) = &*devices {
        devices.typed(bytes);
    }
    devices.is_some()
}

fn say(text: &str) {
    eprintln!("multifd-vmm: {text}");
}
