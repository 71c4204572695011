//! The source's engine.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use multifd::source::{Handle, Migration, Parts, SpreadDialer};
use multifd::transport::{Address, RdmaOptions, Registration};
use multifd_cli::confinement::Places;
use multifd_cli::signals::{self, Asked};
use multifd_cli::tls::clear_text_warning;
use multifd_confine::{Exec, Side};
use multifd_engine::link::Said;
use multifd_engine::protocol::{Role, State};
use multifd_engine::source::{Leaving, memory, trackers};

use crate::args::{SendArgs, Way};
use crate::{Ended, NotBegun, ask, connect, link, report};

/// How often it is looked whether somebody wants something.
const PERIOD: Duration = Duration::from_millis(20);

pub(crate) fn run(args: &SendArgs) -> Ended {
    let common = &args.common;
    let way = args.way().map_err(NotBegun::usage)?;
    let config = args.config().map_err(NotBegun::usage)?;
    let socket = connect(common)?;
    let dialled: Vec<_> = way.data.iter().chain([&way.control]).cloned().collect();
    let kinds = dialled.iter().map(Address::kind);
    common.confinement.give_up_capabilities(kinds, &[])?;
    let asked = signals::catch(
        "multifd-engine",
        "cancelling; SIGQUIT (Ctrl-\\) ends this program at once",
    )
    .context("no handler of signals")?;
    let switch_over = signals::catch_switch_over().context("no handler of signals")?;
    let warning = clear_text_warning(&dialled);
    if !warning.is_empty() {
        err!("{warning}");
    }
    let dialling = Places::Dialling(&dialled);
    common
        .confinement
        .confine(dialling, &common.tls, &[], Exec::Forbidden)?;
    let link = Arc::new(link(common, socket)?);
    let welcome = link.hello(Role::Source).context("no HELLO with the VMM")?;
    let Way {
        control,
        data,
        mut options,
    } = way;
    match welcome.state {
        State::Fresh => {}
        State::Undecided => {
            let dial = SpreadDialer {
                control,
                data: Vec::new(),
                options,
            };
            let ended = ask::outcome(&link, &dial, &welcome.ticket, args.reconnect_deadline);
            report::settled(&common.output, &ended);
            return Ok(ended.outcome);
        }
        state => {
            let error = anyhow::anyhow!("this VMM's guest can't leave: its state is {state:?}");
            return Err(error.into());
        }
    }
    let handed = memory(&link).context("no memory from the VMM")?;
    let sources = trackers(&link, &handed.memory).context("no tracking from the VMM")?;
    options.rdma = RdmaOptions::with_memory(handed.memory.clone(), Registration::default());
    let dial = SpreadDialer {
        control,
        data,
        options,
    };
    let mut parts = Parts::new(Leaving::new(Arc::clone(&link)), handed.memory, dial).config(config);
    parts.sources = sources;
    parts.spawner = common.confinement.spawner(Side::Source)?;
    let migration = Migration::start(parts).map_err(|failed| anyhow::Error::from(failed.error))?;
    let watcher = Watcher {
        handle: migration.handle(),
        said: link.said(),
        asked,
        switch_over,
        done: Arc::default(),
    };
    let done = Arc::clone(&watcher.done);
    let watching = std::thread::Builder::new().spawn(move || watcher.run());
    if let Err(error) = &watching {
        err!("multifd-engine: signals and the VMM's wishes are not heeded: {error}");
    }
    let finished = migration.wait();
    done.store(true, Ordering::Relaxed);
    let ended = report::of_source(&finished);
    link.ended(&ended);
    report::sent(&common.output, &finished);
    Ok(ended.outcome)
}

/// Passes on what the user and the VMM want.
struct Watcher {
    handle: Handle,
    said: Arc<Said>,
    asked: Asked,
    switch_over: Asked,
    done: Arc<AtomicBool>,
}

impl Watcher {
    fn run(self) {
        let mut cancelled = false;
        while !self.done.load(Ordering::Relaxed) {
            let wants_end = self.asked.load(Ordering::Relaxed) || self.said.wants_end();
            if wants_end && !std::mem::replace(&mut cancelled, true) {
                self.handle.cancel();
            }
            if self.said.take_guest_gone() {
                self.handle.guest_gone();
            }
            let by_signal = self.switch_over.swap(false, Ordering::Relaxed);
            if self.said.take_switch_over() || by_signal {
                self.handle.switch_over_now();
            }
            std::thread::sleep(PERIOD);
        }
    }
}
