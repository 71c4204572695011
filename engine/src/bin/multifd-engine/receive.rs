//! The destination's engine.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use multifd::destination::{Answered, AskTicket, OutcomeState, Parts, Reception, answer};
use multifd::transport::{Address, Listener};
use multifd_cli::confinement::Places;
use multifd_cli::flags::ReportKind;
use multifd_cli::signals;
use multifd_cli::tls::clear_text_warning;
use multifd_confine::{Exec, Side};
use multifd_engine::destination::Arriving;
use multifd_engine::link::Link;
use multifd_engine::protocol::{self, Outcome, Role, State, TICKET_BYTES};

use crate::args::ReceiveArgs;
use crate::ask::halves;
use crate::{Ended, NotBegun, connect, link, report};

/// How often it is looked whether somebody wants something.
const PERIOD: Duration = Duration::from_millis(20);

pub(crate) fn run(args: &ReceiveArgs) -> Ended {
    let common = &args.common;
    let (places, options) = args.places().map_err(NotBegun::usage)?;
    let config = args.config().map_err(NotBegun::usage)?;
    let socket = connect(common)?;
    let kinds = places.iter().map(Address::kind);
    common.confinement.give_up_capabilities(kinds, &places)?;
    let asked = signals::catch(
        "multifd-engine",
        "ending; SIGQUIT (Ctrl-\\) ends this program at once",
    )
    .context("no handler of signals")?;
    let listening = Places::Listening(&places);
    common
        .confinement
        .confine(listening, &common.tls, &[], Exec::Forbidden)?;
    let listeners: Vec<_> = places
        .iter()
        .map(|place| Listener::bind_with(place, &options))
        .collect::<Result<_, _>>()
        .map_err(anyhow::Error::from)?;
    let link = Arc::new(link(common, socket)?);
    let welcome = link
        .hello(Role::Destination)
        .context("no HELLO with the VMM")?;
    let addresses: Vec<_> = listeners
        .iter()
        .map(|listener| listener.local_address().clone())
        .collect();
    let warning = clear_text_warning(&addresses);
    if !warning.is_empty() {
        err!("{warning}");
    }
    for address in &addresses {
        match common.output.report() {
            ReportKind::Json => err!("listening on {address}"),
            ReportKind::Text => out!("listening on {address}"),
        }
    }
    let by_rdma = places.iter().any(|place| matches!(place, Address::Rdma(_)));
    let side = match by_rdma {
        true => Side::DestinationByRdma,
        false => Side::Destination,
    };
    let spawner = common.confinement.spawner(side)?;
    let known = match welcome.state {
        State::Fresh => None,
        State::Taken => Some(OutcomeState::Running),
        State::Discarded => Some(OutcomeState::NotCommitted),
        state => {
            let error = anyhow::anyhow!("no guest can come to this VMM: its state is {state:?}");
            return Err(error.into());
        }
    };
    if let Some(state) = known {
        let ticket = ticket(&welcome.ticket);
        let said = link.said();
        let is_cancelled = || asked.load(Ordering::Relaxed) || said.wants_end();
        let answered = answer(
            listeners,
            &ticket,
            state,
            config,
            spawner,
            args.suspend,
            &is_cancelled,
        )
        .map_err(anyhow::Error::from)?;
        return Ok(settle(args, &link, state, answered));
    }
    let mut parts = Parts::new(Arriving::new(Arc::clone(&link))).config(config);
    parts.listeners = listeners;
    parts.spawner = spawner;
    let reception = Reception::start(parts).map_err(|failed| anyhow::Error::from(failed.error))?;
    let (handle, said) = (reception.handle(), link.said());
    let done = Arc::<AtomicBool>::default();
    let ended = Arc::clone(&done);
    let watching = std::thread::Builder::new().spawn(move || {
        while !ended.load(Ordering::Relaxed) {
            if asked.load(Ordering::Relaxed) || said.wants_end() {
                handle.cancel();
            }
            std::thread::sleep(PERIOD);
        }
    });
    if let Err(error) = &watching {
        err!("multifd-engine: signals and the VMM's wishes are not heeded: {error}");
    }
    let finished = reception.wait();
    done.store(true, Ordering::Relaxed);
    let ended = report::of_destination(&finished);
    link.ended(&ended);
    report::received(&common.output, &finished);
    Ok(ended.outcome)
}

fn ticket(bytes: &[u8; TICKET_BYTES]) -> AskTicket {
    let (session, secret) = halves(bytes);
    AskTicket::new(session, secret)
}

/// An earlier engine's source was told, or did not ask.
fn settle(args: &ReceiveArgs, link: &Link, state: OutcomeState, answered: Answered) -> Outcome {
    let (outcome, whose) = match state {
        OutcomeState::Running => (Outcome::Migrated, "the guest is this VMM's"),
        _ => (Outcome::Failed, "the guest is the source's"),
    };
    let asked = match answered {
        Answered::Source => "its source was told so",
        Answered::Nobody => "nobody asked",
    };
    let ended = protocol::Ended {
        outcome,
        text: format!("{whose}; {asked}"),
    };
    link.ended(&ended);
    report::settled(&args.common.output, &ended);
    outcome
}
