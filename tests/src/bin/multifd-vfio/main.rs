//! Migrates real VFIO devices, one to another, through the real source and destination in one process, and checks what came of it.
//!
//! For the lab. It opens the devices by any door, lets them write guest memory if they can (`labdev`), injects faults, chooses how writes
//! are tracked, and compares memory, device state and the order of states. It prints what it saw, and ends with status 1 if anything
//! is wrong.
#![allow(clippy::print_stdout, clippy::print_stderr)] // A program for a terminal.

mod args;
mod checks;
mod history;
mod lab_device;
mod trip;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use clap::error::ErrorKind;

use crate::args::{Args, Expect, Injection};
use crate::checks::Case;
use crate::history::History;
use crate::lab_device::{Place, Work};
use crate::trip::Guest;

fn say(text: &str) {
    println!("{text}");
}

fn migrate(args: &Args, from: &[Place], to: &[Place]) -> Result<()> {
    let at_states = args
        .inject
        .iter()
        .filter(|injection| injection.state.is_some());
    let injections = at_states.map(|injection| {
        let places = match injection.side {
            args::Side::Source => from,
            args::Side::Destination => to,
        };
        let place = places
            .get(injection.pair)
            .with_context(|| format!("there is no pair {}", injection.pair))?;
        Ok((injection.clone(), place.clone()))
    });
    let mut injections: Vec<(Injection, Place)> = injections.collect::<Result<_>>()?;
    if args.late_dma {
        for (pair, place) in from.iter().enumerate() {
            let late = format!("source.{pair}@pre-copy-p2p:dma_start=1");
            injections.push((late.parse().map_err(anyhow::Error::msg)?, place.clone()));
        }
    }
    let history = History::new(injections);
    let mut guest = Guest::start(args, from, &history)?;
    let mut attempt = |expect, first: &[Injection]| -> Result<()> {
        let work = Work {
            dma: if args.late_dma { 0 } else { args.dma },
            initial_bytes: args.initial.map(|kib| kib << 10),
        };
        let both = from.iter().zip(to);
        let before = both.map(|(from, to)| Ok([from.dma()?, to.dma()?]));
        let before = before.collect::<Result<_>>()?;
        guest.begin(from, work)?;
        let ended = guest.attempt(args, to, first, &history)?;
        let case = Case {
            args,
            guest: &guest,
            from,
            to,
            history: &history,
            ended: &ended,
            before,
        };
        match expect {
            Expect::Migrated => case.migrated(),
            Expect::Failed => case.failed(),
            Expect::Stranded => case.stranded(),
        }
    };
    attempt(args.expect, &args.inject)?;
    if args.expect == Expect::Failed {
        say("again, undisturbed:");
        history.clear();
        attempt(Expect::Migrated, &[])?;
    }
    Ok(())
}

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) if args.devices.len() % 2 == 0 => args,
        Ok(_) => {
            eprintln!(
                "multifd-vfio: devices come in pairs, source and destination; --help tells more"
            );
            return ExitCode::from(2);
        }
        Err(error) => {
            // Where it goes is clap's matter, and whether that is open is nobody's.
            let _ = error.print();
            let asked = matches!(
                error.kind(),
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
            );
            return ExitCode::from(if asked { 0 } else { 2 });
        }
    };
    let side = |index: usize| -> Vec<Place> {
        args.devices
            .chunks_exact(2)
            .filter_map(|pair| pair.get(index))
            .map(|path| Place::new(path))
            .collect()
    };
    let sides = [side(0), side(1)];
    for time in 0..args.times {
        let [from, to] = if time % 2 == 0 {
            [&sides[0], &sides[1]]
        } else {
            [&sides[1], &sides[0]]
        };
        if let Err(error) = migrate(&args, from, to) {
            eprintln!("multifd-vfio: {error:#}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
