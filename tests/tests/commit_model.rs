//! The commit as a small formal model, checked over every reachable state (SPEC: sections 15 and 16; docs/decisions/0018).
//!
//! ```text
//!   source       Running ─SWITCHOVER, FINAL─► Paused ─PREPARED─► Committed ─RUNNING─► Migrated
//!                  ▲  └─lost: runs, resumes─────┘                  │ lost      ▲ outcome 3
//!                  └──────────── outcome 1 ────── Unknown ◄────────┘ ──ask─────┘
//!   destination  Receiving ─FINAL─► Prepared ─COMMIT─► Owning ─► Running        Closed: dropped, aborted, or answered "not committed"
//! ```
//! The network is worse than TCP: whatever was ever sent can arrive any number of times, in any order, late, or never; only
//! which connection it belongs to is certain. Either program can die at any moment, either side can think that the connection
//! is lost at any moment. What the model leaves out: memory, lanes and devices (the simulator has them), and a peer that lies.
//!
//! A model that cannot fail proves nothing: each rule that matters is also broken on purpose, and the checker has to find it.

use std::collections::BTreeSet;

use stateright::{Checker, Model, Property};

/// Connections that a source makes at most: the first, and two more to resume or ask.
const CONNECTIONS: u8 = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Source {
    /// The guest runs here.
    Running,
    /// The guest is paused, FINAL was sent.
    Paused,
    /// COMMIT was (perhaps) sent.
    Committed,
    /// The connection was lost after that.
    Unknown,
    /// RUNNING, or the answer that says so, was read.
    Migrated,
    /// Given up before the commit: the guest runs here.
    Ended,
    /// The answer was "not committed": the guest runs here again.
    Reclaimed,
    Crashed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Destination {
    Receiving,
    Prepared,
    /// COMMIT was read; the guest is about to run.
    Owning,
    Running,
    /// It could not be run.
    Stranded,
    /// The session is no more: dropped, aborted, or the source was told that it is not committed.
    Closed,
    Crashed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Message {
    Final,
    Prepared,
    Commit,
    Running,
    AbortBySource,
    AbortByDestination,
    Resume,
    Resumed,
    Ask,
    /// OUTCOME with its state (SPEC: ASK-2).
    Outcome(u8),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    source: Source,
    destination: Destination,
    /// The connection that each side holds for the present one, and whether it still uses it.
    source_connection: (u8, bool),
    destination_connection: (u8, bool),
    /// Everything that was ever sent, with its connection.
    sent: BTreeSet<(u8, Message)>,
    commit_sent: bool,
    /// The destination ran the guest at some time.
    ran: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Action {
    Switchover,
    SourceLoses,
    SourceGivesUp,
    SourceResumes,
    SourceAsks,
    SourceCrashes,
    DestinationLoses,
    DestinationDrops,
    DestinationRuns,
    DestinationFails,
    DestinationCrashes,
    /// A message arrives at the side that it is for.
    Arrives(u8, Message),
}

/// A rule that is broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Broken {
    Nothing,
    /// The source runs the guest when the connection is lost after COMMIT (COMMIT-3).
    SourceRunsOnSilence,
    /// The source resumes the session after COMMIT instead of asking (RESUME-1).
    SourceResumesAfterCommit,
    /// The source takes the guest back whatever the answer is (ASK-5).
    SourceBelievesAnyAnswer,
    /// The source hands COMMIT to the channel before it gives up the guest, and runs it when that fails (COMMIT-3).
    SourceGivesUpTooLate,
    /// The destination runs the guest when the source is silent after PREPARED (COMMIT-1).
    DestinationRunsOnSilence,
    /// The destination takes a COMMIT after it has answered "not committed" (ASK-3).
    DestinationTakesLateCommit,
    /// The destination answers "not committed" while it is about to run the guest (ASK-2).
    DestinationAnswersTooEarly,
    /// The destination takes the machine down though it runs (COMMIT-4).
    DestinationDropsAfterRunning,
}

struct Commit(Broken);

impl State {
    fn source_runs(&self) -> bool {
        matches!(
            self.source,
            Source::Running | Source::Ended | Source::Reclaimed
        )
    }

    fn destination_runs(&self) -> bool {
        self.destination == Destination::Running
    }

    fn source_says(&mut self, message: Message) {
        self.sent.insert((self.source_connection.0, message));
    }

    fn destination_says(&mut self, connection: u8, message: Message) {
        self.sent.insert((connection, message));
    }

    fn dial(&mut self, message: Message) {
        self.source_connection = (self.source_connection.0 + 1, true);
        self.source_says(message);
    }

    fn can_dial(&self) -> bool {
        self.source_connection.0 + 1 < CONNECTIONS
    }
}

impl Commit {
    fn breaks(&self, rule: Broken) -> bool {
        self.0 == rule
    }

    fn source_reads(&self, state: &mut State, connection: u8, message: Message) -> bool {
        if state.source_connection != (connection, true) {
            return false;
        }
        match (state.source, message) {
            (Source::Running, Message::Resumed) => return false,
            (Source::Paused, Message::Prepared) => {
                // SPEC: COMMIT-3, the guest is given up before the first byte is handed over.
                state.source = Source::Committed;
                state.commit_sent = true;
                state.source_says(Message::Commit);
            }
            (Source::Running | Source::Paused, Message::AbortByDestination) => {
                state.source = Source::Ended;
            }
            (Source::Committed, Message::Running) => state.source = Source::Migrated,
            // SPEC: COMMIT-5
            (Source::Committed, Message::AbortByDestination) => {
                state.source = Source::Unknown;
                state.source_connection.1 = false;
            }
            (Source::Unknown, Message::Outcome(1)) => state.source = Source::Reclaimed,
            (Source::Unknown, Message::Outcome(3)) => state.source = Source::Migrated,
            (Source::Unknown, Message::Outcome(_))
                if self.breaks(Broken::SourceBelievesAnyAnswer) =>
            {
                state.source = Source::Reclaimed;
            }
            _ => return false,
        }
        true
    }

    fn destination_reads(&self, state: &mut State, connection: u8, message: Message) -> bool {
        use Destination as D;
        if state.destination == D::Crashed {
            return false;
        }
        // These two come on a connection of their own.
        match (state.destination, message) {
            (_, Message::Ask) => {
                let early = self.breaks(Broken::DestinationAnswersTooEarly);
                let outcome = match state.destination {
                    D::Owning if early => 1,
                    D::Owning => 2,
                    D::Running => 3,
                    D::Stranded => 4,
                    D::Receiving | D::Prepared | D::Closed | D::Crashed => {
                        // SPEC: ASK-3
                        if !self.breaks(Broken::DestinationTakesLateCommit) {
                            state.destination = D::Closed;
                        }
                        1
                    }
                };
                state.destination_says(connection, Message::Outcome(outcome));
                return true;
            }
            (D::Receiving | D::Prepared, Message::Resume)
                if connection > state.destination_connection.0 =>
            {
                // SPEC: RESUME-4, RESUME-8
                state.destination = D::Receiving;
                state.destination_connection = (connection, true);
                state.destination_says(connection, Message::Resumed);
                return true;
            }
            _ => {}
        }
        if state.destination_connection != (connection, true) {
            return false;
        }
        match (state.destination, message) {
            (D::Receiving, Message::Final) => {
                state.destination = D::Prepared;
                state.destination_says(connection, Message::Prepared);
            }
            (D::Prepared, Message::Commit) => state.destination = D::Owning,
            (D::Receiving | D::Prepared, Message::AbortBySource) => state.destination = D::Closed,
            _ => return false,
        }
        true
    }
}

impl Model for Commit {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            source: Source::Running,
            destination: Destination::Receiving,
            source_connection: (0, true),
            destination_connection: (0, true),
            sent: BTreeSet::new(),
            commit_sent: false,
            ran: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        use Destination as D;
        actions.extend([
            Action::Switchover,
            Action::SourceLoses,
            Action::SourceGivesUp,
            Action::SourceResumes,
            Action::SourceAsks,
            Action::SourceCrashes,
            Action::DestinationLoses,
            Action::DestinationDrops,
            Action::DestinationRuns,
            Action::DestinationFails,
            Action::DestinationCrashes,
        ]);
        if state.destination == D::Crashed && state.source == Source::Crashed {
            actions.clear();
        }
        actions.extend(
            state
                .sent
                .iter()
                .map(|(connection, message)| Action::Arrives(*connection, *message)),
        );
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        use Destination as D;
        let mut state = last.clone();
        let happens = match action {
            Action::Switchover => {
                let may = state.source == Source::Running && state.source_connection.1;
                if may {
                    state.source = Source::Paused;
                    state.source_says(Message::Final);
                }
                may
            }
            Action::SourceLoses => {
                let had = std::mem::replace(&mut state.source_connection.1, false);
                match state.source {
                    Source::Paused => state.source = Source::Running,
                    Source::Committed
                        if self.breaks(Broken::SourceRunsOnSilence)
                            || self.breaks(Broken::SourceResumesAfterCommit) =>
                    {
                        state.source = Source::Running;
                    }
                    Source::Committed => state.source = Source::Unknown,
                    _ => {}
                }
                had
            }
            Action::SourceGivesUp => {
                let late =
                    self.breaks(Broken::SourceGivesUpTooLate) && state.source == Source::Committed;
                let may = matches!(state.source, Source::Running | Source::Paused) || late;
                if may {
                    if state.source_connection.1 {
                        state.source_says(Message::AbortBySource);
                    }
                    state.source = Source::Ended;
                }
                may
            }
            Action::SourceResumes => {
                let may = state.source == Source::Running
                    && !state.source_connection.1
                    && state.can_dial();
                if may {
                    state.dial(Message::Resume);
                }
                may
            }
            Action::SourceAsks => {
                let may = state.source == Source::Unknown && state.can_dial();
                if may {
                    state.dial(Message::Ask);
                }
                may
            }
            Action::SourceCrashes => {
                std::mem::replace(&mut state.source, Source::Crashed) != Source::Crashed
            }
            Action::DestinationLoses => {
                let had = std::mem::replace(&mut state.destination_connection.1, false);
                if had
                    && state.destination == D::Prepared
                    && self.breaks(Broken::DestinationRunsOnSilence)
                {
                    state.destination = D::Running;
                    state.ran = true;
                }
                had
            }
            Action::DestinationDrops => {
                let late = self.breaks(Broken::DestinationDropsAfterRunning)
                    && state.destination == D::Running;
                let may = matches!(state.destination, D::Receiving | D::Prepared) || late;
                if may {
                    if state.destination_connection.1 {
                        let connection = state.destination_connection.0;
                        state.destination_says(connection, Message::AbortByDestination);
                    }
                    state.destination = D::Closed;
                }
                may
            }
            Action::DestinationRuns | Action::DestinationFails => {
                let may = state.destination == D::Owning;
                if may {
                    let runs = action == Action::DestinationRuns;
                    state.destination = if runs { D::Running } else { D::Stranded };
                    state.ran |= runs;
                    let message = if runs {
                        Message::Running
                    } else {
                        Message::AbortByDestination
                    };
                    if state.destination_connection.1 {
                        state.destination_says(state.destination_connection.0, message);
                    }
                }
                may
            }
            Action::DestinationCrashes => {
                std::mem::replace(&mut state.destination, D::Crashed) != D::Crashed
            }
            Action::Arrives(connection, message) => match message {
                Message::Prepared
                | Message::Running
                | Message::AbortByDestination
                | Message::Resumed
                | Message::Outcome(_) => self.source_reads(&mut state, connection, message),
                Message::Final
                | Message::Commit
                | Message::AbortBySource
                | Message::Resume
                | Message::Ask => self.destination_reads(&mut state, connection, message),
            },
        };
        (happens && state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(TWO, |_, s: &State| {
                !(s.source_runs() && s.destination_runs())
            }),
            Property::always(NONE, |_, s: &State| {
                !s.ran || matches!(s.destination, Destination::Running | Destination::Crashed)
            }),
            // Only the destination's own word that it has not, and never will, gives the guest back.
            Property::always(REFUSES, |_, s: &State| {
                let answered = s.sent.iter().any(|(_, m)| *m == Message::Outcome(1));
                !s.commit_sent || !s.source_runs() || (answered && s.source == Source::Reclaimed)
            }),
            Property::always(OWNER_KNOWN, |_, s: &State| {
                s.source != Source::Migrated || s.ran
            }),
            Property::always(RESOLVABLE, |model: &Commit, s: &State| {
                s.source != Source::Unknown
                    || s.destination == Destination::Crashed
                    || !s.can_dial()
                    || model.asking_resolves(s)
            }),
            Property::sometimes("the guest can move", |_, s: &State| {
                s.source == Source::Migrated && s.destination_runs()
            }),
            Property::sometimes("the guest can come back after COMMIT", |_, s: &State| {
                s.source == Source::Reclaimed
            }),
            Property::sometimes("the outcome can be unknown", |_, s: &State| {
                s.source == Source::Unknown && s.destination_runs()
            }),
            Property::sometimes("it can move after a resume", |_, s: &State| {
                s.source == Source::Migrated && s.destination_connection.0 > 0
            }),
        ]
    }
}

const TWO: &str = "never two owners";
const NONE: &str = "never none after running";
const REFUSES: &str = "the source refuses to run after COMMIT";
const OWNER_KNOWN: &str = "migrated means that the guest ran at the destination";
const RESOLVABLE: &str = "an unknown outcome is resolved by asking";

impl Commit {
    /// Whether the source learns who owns the guest, when it asks and its question and the answer arrive.
    fn asking_resolves(&self, state: &State) -> bool {
        let mut state = state.clone();
        if state.destination == Destination::Owning {
            // It will run the guest, or fail to, whatever happens to the network (SPEC: COMMIT-4).
            match self.next_state(&state, Action::DestinationRuns) {
                Some(next) => state = next,
                None => return false,
            }
        }
        let Some(asked) = self.next_state(&state, Action::SourceAsks) else {
            return false;
        };
        let connection = asked.source_connection.0;
        let mut answered = asked;
        if !self.destination_reads(&mut answered, connection, Message::Ask) {
            return false;
        }
        (1..=4).any(|outcome| {
            let answer = (connection, Message::Outcome(outcome));
            if !answered.sent.contains(&answer) {
                return false;
            }
            let mut settled = answered.clone();
            self.source_reads(&mut settled, connection, Message::Outcome(outcome));
            match outcome {
                1 => settled.source == Source::Reclaimed && !settled.destination_runs(),
                3 => settled.source == Source::Migrated && settled.destination_runs(),
                // It is known who has it: nobody runs it until a person decides (SPEC: ASK-5).
                4 => settled.destination == Destination::Stranded && !settled.source_runs(),
                _ => false,
            }
        })
    }
}

fn violated(broken: Broken) -> Vec<&'static str> {
    let checker = Commit(broken).checker().spawn_bfs().join();
    assert!(checker.is_done() || !checker.discoveries().is_empty());
    [TWO, NONE, REFUSES, OWNER_KNOWN, RESOLVABLE]
        .into_iter()
        .filter(|name| checker.discovery(name).is_some())
        .collect()
}

#[test]
fn every_reachable_state_of_the_commit_keeps_the_promises() {
    let checker = Commit(Broken::Nothing).checker().spawn_bfs().join();
    checker.assert_properties();
    assert!(
        checker.unique_state_count() > 1_000,
        "{} states are hardly all",
        checker.unique_state_count()
    );
}

#[test]
fn a_source_that_breaks_a_rule_is_found() {
    for (broken, expected) in [
        (Broken::SourceRunsOnSilence, TWO),
        (Broken::SourceResumesAfterCommit, REFUSES),
        (Broken::SourceBelievesAnyAnswer, TWO),
        (Broken::SourceGivesUpTooLate, TWO),
    ] {
        let found = violated(broken);
        assert!(found.contains(&expected), "{broken:?}: {found:?}");
    }
}

#[test]
fn a_destination_that_breaks_a_rule_is_found() {
    for (broken, expected) in [
        (Broken::DestinationRunsOnSilence, TWO),
        (Broken::DestinationTakesLateCommit, TWO),
        (Broken::DestinationAnswersTooEarly, TWO),
        (Broken::DestinationDropsAfterRunning, NONE),
    ] {
        let found = violated(broken);
        assert!(found.contains(&expected), "{broken:?}: {found:?}");
    }
}
