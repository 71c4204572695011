//! What a guest does of itself, or its user with it, while it is moved: it is paused, it is quiet, it is gone.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_tests::bounded::{Destination, GRACE, rx_builder, tx_builder, within};
use multifd_tests::fake_destination::FakeDestination;
use multifd_tests::model::{
    DestinationMachine, Refuse, SourceMachine, differing_page, fill, memory,
};
use multifd_transport::{Address, GuestMemory, TcpOptions};
use multifd_wire::{Features, Phase};
use tx::{GuestState, OutcomeKind, Vmm as _};

const BYTES: u64 = 8 << 20;

/// A machine whose user pauses it and lets it run again.
struct Told {
    inner: SourceMachine,
    /// What it is each time that it is asked; the last one from then on.
    states: Arc<Mutex<Vec<GuestState>>>,
    /// Whether it was left running, or paused, by the last call.
    left: Arc<Mutex<Option<GuestState>>>,
}

impl Told {
    fn now(&self) -> GuestState {
        self.states.lock().unwrap()[0]
    }
}

impl tx::Vmm for Told {
    fn config(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        self.inner.config()
    }

    fn guest(&mut self) -> GuestState {
        let mut states = self.states.lock().unwrap();
        if states.len() > 1 {
            return states.remove(0);
        }
        states[0]
    }

    fn pause(&mut self) -> Result<(), tx::VmmError> {
        self.inner.pause()
    }

    fn save(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        self.inner.save()
    }

    fn resume(&mut self, proof: tx::Reclaimed) -> Result<(), tx::VmmError> {
        let state = self.now();
        *self.left.lock().unwrap() = Some(state);
        match state {
            GuestState::Running => self.inner.resume(proof),
            GuestState::Paused => Ok(()),
        }
    }
}

struct Leaving {
    migration: tx::Migration,
    memory: GuestMemory,
    left: Arc<Mutex<Option<GuestState>>>,
}

fn leave(to: &Address, states: &[GuestState], config: tx::Config) -> Leaving {
    let memory = memory(BYTES);
    fill(&memory, 8, 3);
    let mut machine = SourceMachine::start(memory.clone(), 1, 2000, 5);
    if states[0] == GuestState::Paused {
        machine.pause().unwrap();
    }
    let (sources, left) = (vec![machine.source()], Arc::default());
    let vmm = Told {
        inner: machine,
        states: Arc::new(Mutex::new(states.to_vec())),
        left: Arc::clone(&left),
    };
    let parts = tx::Parts {
        vmm: Box::new(vmm),
        memory: memory.clone(),
        sources,
        dial: Box::new(tx::Dialer {
            address: to.clone(),
            options: TcpOptions::default().into(),
        }),
        config,
        spawner: None,
    };
    Leaving {
        migration: tx::Migration::start(parts).expect("a migration"),
        memory,
        left,
    }
}

fn end(migration: tx::Migration) -> tx::Finished {
    within(10 * GRACE, "the source's end", || migration.wait())
}

// SPEC: COMMIT-7
#[test]
fn a_guest_arrives_as_its_user_had_it_when_the_switchover_began() {
    use GuestState::{Paused, Running};
    for (states, paused) in [
        (vec![Paused], true),
        (vec![Running], false),
        (vec![Paused, Running], false),
        (vec![Running, Paused], true),
    ] {
        let destination = Destination::start();
        let there = Arc::clone(&destination.memory);
        let leaving = leave(&destination.address, &states, tx_builder().build().unwrap());
        let left = end(leaving.migration);
        assert_eq!(
            left.report.outcome,
            OutcomeKind::Migrated,
            "{states:?}: {:?}",
            left.error
        );
        assert_eq!(left.report.guest_paused, paused, "{states:?}");
        let arrived = destination.end(GRACE);
        assert_eq!(
            arrived.finished.report.outcome,
            rx::OutcomeKind::Running,
            "{states:?}"
        );
        assert_eq!(arrived.finished.report.guest_paused, paused, "{states:?}");
        assert_eq!(arrived.running, !paused, "{states:?}");
        let there = there.lock().unwrap().clone().unwrap();
        assert_eq!(differing_page(&leaving.memory, &there), None, "{states:?}");
    }
}

#[test]
fn a_paused_guest_that_could_not_be_moved_stays_paused_and_its_vmm_is_told() {
    let machine = DestinationMachine {
        refuse: Refuse::Load,
        ..DestinationMachine::default()
    };
    let destination = Destination::with(rx_builder().build().unwrap(), machine);
    let config = tx_builder().build().unwrap();
    let leaving = leave(&destination.address, &[GuestState::Paused], config);
    let left = end(leaving.migration);
    assert_eq!(left.report.outcome, OutcomeKind::Failed);
    assert!(left.report.guest_paused);
    assert_eq!(*leaving.left.lock().unwrap(), Some(GuestState::Paused));
}

// SPEC: FEAT-7
#[test]
fn a_paused_guest_goes_to_no_destination_that_would_run_it() {
    for (state, mandatory) in [(GuestState::Paused, true), (GuestState::Running, false)] {
        let old = FakeDestination::listen();
        let address = old.address.clone();
        let leaving = leave(&address, &[state], tx_builder().build().unwrap());
        let mut control = multifd_tests::peer::Peer::new(old.accept());
        let hello = control.hear_hello();
        let of = |features: Features| features.contains(Features::PAUSED);
        assert_eq!(of(hello.features_mandatory), mandatory, "{state:?}");
        assert_eq!(of(hello.features_optional), !mandatory, "{state:?}");
        leaving.migration.handle().cancel();
        drop(control);
        assert_eq!(
            end(leaving.migration).report.outcome,
            OutcomeKind::Cancelled
        );
    }
}

/// A guest that writes as fast as its link carries, and a limit that it can never keep.
fn hopeless() -> tx::Config {
    tx_builder()
        .bandwidth(Some(8 << 20))
        .downtime_limit(Duration::from_millis(1))
        .max_rounds(10_000)
        .build()
        .unwrap()
}

#[test]
fn a_switchover_that_is_wanted_now_comes_after_the_round_whatever_the_forecast_says() {
    let destination = Destination::start();
    let leaving = leave(&destination.address, &[GuestState::Running], hopeless());
    let handle = leaving.migration.handle();
    within(10 * GRACE, "the second round", {
        let handle = handle.clone();
        move || {
            while handle.progress().round < 1 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
    handle.switch_over_now();
    let left = end(leaving.migration);
    assert_eq!(
        left.report.outcome,
        OutcomeKind::Migrated,
        "{:?}",
        left.error
    );
    let predicted = left.report.predicted_downtime_ms.unwrap();
    assert!(predicted > 1.0, "the limit was not kept: {predicted} ms");
    // The round under way, and the one with the guest paused.
    assert!(left.report.rounds <= 4, "{}", left.report.rounds);
    assert!(destination.end(GRACE).running);
}

#[test]
fn what_is_wanted_before_the_first_round_is_remembered() {
    let destination = Destination::start();
    let leaving = leave(&destination.address, &[GuestState::Running], hopeless());
    leaving.migration.handle().switch_over_now();
    let left = end(leaving.migration);
    assert_eq!(
        left.report.outcome,
        OutcomeKind::Migrated,
        "{:?}",
        left.error
    );
    // Round 0, and those with the guest paused: saving its state writes its memory once more.
    assert!(left.report.rounds <= 3, "{}", left.report.rounds);
}

#[test]
fn a_guest_that_is_gone_ends_the_migration_and_the_destination_discards_what_it_has() {
    for round in [None, Some(0), Some(1)] {
        let destination = Destination::start();
        let leaving = leave(&destination.address, &[GuestState::Running], hopeless());
        let handle = leaving.migration.handle();
        if let Some(round) = round {
            let seen = handle.clone();
            within(10 * GRACE, "a round", move || {
                while seen.progress().phase != Phase::Rounds || seen.progress().round < round {
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
        }
        handle.guest_gone();
        let left = end(leaving.migration);
        assert_eq!(left.report.outcome, OutcomeKind::Gone, "{round:?}");
        assert_eq!(left.error.unwrap().code(), "sender.guest-gone", "{round:?}");
        destination.handle().cancel();
        let there = destination.end(GRACE);
        assert!(!there.running, "{round:?}");
        assert_eq!(
            there.finished.report.outcome,
            rx::OutcomeKind::Failed,
            "{round:?}"
        );
        if round.is_some() {
            assert!(there.discarded, "{round:?}");
            let text = there.finished.error.unwrap().to_string();
            assert!(
                text.contains("shut down or crashed at the source"),
                "{text}"
            );
        }
    }
}

#[test]
fn a_guest_that_was_given_away_is_not_gone() {
    let destination = Destination::start();
    let config = tx_builder().build().unwrap();
    let leaving = leave(&destination.address, &[GuestState::Running], config);
    let handle = leaving.migration.handle();
    let left = end(leaving.migration);
    handle.guest_gone();
    handle.switch_over_now();
    assert_eq!(
        left.report.outcome,
        OutcomeKind::Migrated,
        "{:?}",
        left.error
    );
    let there = destination.end(GRACE);
    assert!(there.running);
}
