//! What happened to the machine and to its devices at both sides, in one order, and what is injected at its moments.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use multifd_sender as tx;
use multifd_tests::vfio_machine::{Seen, Step};
use multifd_wire::DeviceState;

use crate::args::{Injection, Side};
use crate::lab_device::{Content, Place};

/// To whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Who {
    /// The source's guest.
    Guest,
    /// The device of that pair.
    Device(Side, usize),
}

/// What.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    Device(Step),
    Paused,
    Resumed,
}

/// What happened, oldest first.
pub(crate) type Events = Vec<(Who, What)>;

/// Shared by everything that notes something.
#[derive(Clone, Default)]
pub(crate) struct History(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    events: Events,
    /// Each happens once.
    injections: Vec<(Injection, Place)>,
    /// What could not be injected or looked at.
    failures: Vec<String>,
    /// What destinations' devices had inside when they stood still last, by pair.
    contents: BTreeMap<usize, Content>,
}

impl History {
    /// With registers to be written at states of devices.
    pub(crate) fn new(injections: Vec<(Injection, Place)>) -> Self {
        let history = Self::default();
        history.lock().injections = injections;
        history
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn note(&self, who: Who, what: What) {
        let mut inner = self.lock();
        inner.events.push((who, what));
        let due = |injection: &Injection| {
            who == Who::Device(injection.side, injection.pair)
                && injection
                    .state
                    .is_some_and(|state| what == What::Device(Step::State(state)))
        };
        let (now, later): (Vec<_>, Vec<_>) = std::mem::take(&mut inner.injections)
            .into_iter()
            .partition(|(injection, _)| due(injection));
        inner.injections = later;
        for (injection, place) in now {
            if let Err(error) = place.set(&injection.register, injection.value) {
                inner.failures.push(format!("{error:#}"));
            }
        }
    }

    /// What happened so far; what was to be injected and was not; what could not be.
    pub(crate) fn events(&self) -> (Events, Vec<Injection>, Vec<String>) {
        let inner = self.lock();
        let left = inner
            .injections
            .iter()
            .map(|(injection, _)| injection.clone());
        (inner.events.clone(), left.collect(), inner.failures.clone())
    }

    /// Begins anew, for a second attempt.
    pub(crate) fn clear(&self) {
        *self.lock() = Inner::default();
    }

    /// What a source's device tells. So many bytes of it become initial anew when its initial bytes were read.
    pub(crate) fn of_source(&self, pair: usize, place: &Place, reinit: Option<u64>) -> Seen {
        let (history, place) = (self.clone(), place.clone());
        let reinit = Mutex::new(reinit);
        Seen::watched(Arc::new(move |step| {
            history.note(Who::Device(Side::Source, pair), What::Device(step));
            if let Step::InitialRead(_) = step
                && let Some(bytes) = reinit.lock().unwrap_or_else(PoisonError::into_inner).take()
                && let Err(error) = place.set("reinit", bytes)
            {
                history.lock().failures.push(format!("{error:#}"));
            }
        }))
    }

    /// What a destination's device tells. A labdev that stands still is looked into at that moment: when it runs, it changes.
    pub(crate) fn of_destination(&self, pair: usize, place: &Place) -> Seen {
        let (history, place) = (self.clone(), place.clone());
        Seen::watched(Arc::new(move |step| {
            if step == Step::State(DeviceState::Stop) && place.is_labdev() {
                let content = place.memory();
                let mut inner = history.lock();
                match content {
                    Ok(content) => drop(inner.contents.insert(pair, content)),
                    Err(error) => inner.failures.push(format!("{error:#}")),
                }
            }
            history.note(Who::Device(Side::Destination, pair), What::Device(step));
        }))
    }

    /// What a destination's labdev had inside when it stood still last.
    pub(crate) fn content(&self, pair: usize) -> Option<Content> {
        self.lock().contents.get(&pair).copied()
    }
}

/// The source's machine, which notes when it stands still and when it runs again.
pub(crate) struct Watched {
    machine: Box<dyn tx::Vmm>,
    history: History,
}

impl Watched {
    pub(crate) fn new(machine: impl tx::Vmm + 'static, history: &History) -> Self {
        Self {
            machine: Box::new(machine),
            history: history.clone(),
        }
    }
}

impl tx::Vmm for Watched {
    fn config(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        self.machine.config()
    }

    fn pause(&mut self) -> Result<(), tx::VmmError> {
        self.history.note(Who::Guest, What::Paused);
        self.machine.pause()
    }

    fn save(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        self.machine.save()
    }

    fn resume(&mut self, proof: tx::Reclaimed) -> Result<(), tx::VmmError> {
        self.machine.resume(proof)?;
        self.history.note(Who::Guest, What::Resumed);
        Ok(())
    }

    fn migrated(&mut self) {
        self.machine.migrated();
    }
}

/// The steps of a device, in order.
pub(crate) fn steps(events: &Events, side: Side, pair: usize) -> Vec<Step> {
    let of = |(who, what): &(Who, What)| match what {
        What::Device(step) if *who == Who::Device(side, pair) => Some(*step),
        _ => None,
    };
    events.iter().filter_map(of).collect()
}

/// The states among the steps of a device, each once where it was told several times in a row.
pub(crate) fn states(events: &Events, side: Side, pair: usize) -> Vec<DeviceState> {
    let state = |step| match step {
        Step::State(state) => Some(state),
        _ => None,
    };
    let mut states: Vec<_> = steps(events, side, pair)
        .into_iter()
        .filter_map(state)
        .collect();
    states.dedup();
    states
}
