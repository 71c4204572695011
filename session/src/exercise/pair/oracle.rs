//! What must hold: while it goes on, no deadline passes unnoticed; in the end there is one owner, and each error fits what was done.

use std::time::Duration;

use multifd_wire::frame::OutcomeState;
use multifd_wire::{Frame, HEADER_BYTES, Header, Phase, Role};

use super::{MS, Pair, Run};
use crate::common::Encoded;
use crate::{destination as rx, source as tx};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Says {
    Migrated,
    Running,
    Failed,
    Cancelled,
    Stranded,
    Unknown,
}

/// How one side says that it ended.
#[derive(Debug)]
pub(super) struct End {
    pub(super) says: Says,
    pub(super) at: Duration,
    code: &'static str,
    text: String,
    /// What was changed on the way.
    damage: bool,
}

impl End {
    pub(super) fn new(says: Says, at: Duration) -> Self {
        Self {
            says,
            at,
            code: "",
            text: String::new(),
            damage: false,
        }
    }

    pub(super) fn of_source(says: Says, error: &tx::Error, at: Duration) -> Self {
        Self {
            code: error.code(),
            text: error.to_string(),
            damage: error.is_damage(),
            ..Self::new(says, at)
        }
    }

    pub(super) fn of_destination(says: Says, error: &rx::Error, at: Duration) -> Self {
        Self {
            code: error.code(),
            text: error.to_string(),
            damage: error.is_damage(),
            ..Self::new(says, at)
        }
    }

    /// It says that the other side broke the protocol.
    fn accuses(&self) -> bool {
        let words = [
            "misbehaved",
            "malformed",
            "digest",
            "limit",
            "device.refused",
        ];
        !self.damage && words.iter().any(|word| self.code.contains(word))
    }
}

/// Since when each side is where it is.
#[derive(Debug, Default)]
pub(super) struct Watch {
    heard: [Duration; 2],
    /// How long the destination keeps the session, as the source was told.
    kept: Option<Duration>,
    /// The source's first set-up began, and whether the rounds did.
    set_up: Duration,
    begun: bool,
    out: Option<Duration>,
    paused: Option<Duration>,
    committed: Option<Duration>,
    asks: Option<Duration>,
    /// Since when the destination has the guest.
    owns: Option<Duration>,
    taken: Duration,
    phases: [Option<(Phase, Duration)>; 2],
    /// Pages that were said to have landed, in rounds that were closed.
    closed_pages: u64,
}

impl Watch {
    pub(super) fn heard(&mut self, who: Role, now: Duration) {
        self.heard[usize::from(who == Role::Destination)] = now;
    }

    pub(super) fn granted(&mut self, suspend_ms: u32) {
        self.kept = Some(MS * suspend_ms);
    }

    pub(super) fn paused(&mut self, now: Duration) {
        self.paused = Some(now);
    }

    pub(super) fn reclaimed(&mut self) {
        (self.paused, self.committed, self.asks) = (None, None, None);
    }

    pub(super) fn owns(&mut self, now: Duration) {
        self.owns = Some(now);
    }

    pub(super) fn asks(&mut self, now: Duration) {
        (self.committed, self.asks) = (None, Some(self.asks.unwrap_or(now)));
    }

    pub(super) fn committed(&mut self, now: Duration) {
        (self.paused, self.committed) = (None, Some(now));
    }

    pub(super) fn taken(&mut self, bytes: u64, now: Duration) {
        if bytes > 0 {
            self.taken = now;
        }
    }

    pub(super) fn started_afresh(&mut self, now: Duration) {
        (self.set_up, self.begun, self.out) = (now, false, None);
    }

    /// The destination makes a set-up, for the first time or again.
    pub(super) fn sets_up(&mut self) {
        self.phases[1] = None;
    }

    /// Another program of the destination.
    pub(super) fn begun_again(&mut self, now: Duration) {
        self.closed_pages = 0;
        self.phases[1] = None;
        self.heard[1] = now;
    }
}

impl Pair {
    pub(super) fn is_honest(&self) -> bool {
        self.plan.liar.is_none()
    }

    // ── while it goes on ─────────────────────────────────────────────────────────────────────────────────────────────

    /// Nobody is where it is for longer than it may be.
    pub(super) fn check_deadlines(&mut self) {
        if !self.hosts[0].gone && self.source.outcome.is_none() {
            let phase = self.source.session.phase();
            self.enter(0, phase);
            if phase == Phase::Suspended {
                self.check_released("while the channels are lost");
            }
            if let Some((since, bound, what)) = self.overdue_at_source(phase) {
                self.late("source", phase, since, bound, what);
            }
        }
        if !self.hosts[1].gone
            && self.destination.outcome.is_none()
            && let Some(session) = &self.destination.session
        {
            let phase = session.phase();
            self.enter(1, phase);
            if let Some((since, bound, what)) = self.overdue_at_destination(phase) {
                self.late("destination", phase, since, bound, what);
            }
        }
        self.check_end();
    }

    /// A guest that is left to its owner has all of its time. One whose program died has none.
    fn check_released(&mut self, when: &str) {
        let guest = &self.source.guest;
        if guest.runs && guest.throttle > 0 && !self.done.crashed[0] {
            let text = format!(
                "{} % of the guest's time are held back {when}",
                guest.throttle
            );
            self.violation(text);
        }
    }

    /// Everything has an end.
    pub(super) fn check_end(&mut self) {
        let patience = Self::patience(&self.plan.source, &self.plan.destination);
        if self.now > self.done.last + patience {
            self.violation(format!("no end at {:?}, within {patience:?}", self.now));
        }
    }

    fn late(&mut self, who: &str, phase: Phase, since: Duration, bound: Duration, what: &str) {
        let now = self.now;
        self.violation(format!(
            "{who} in {phase} at {now:?}: {what} since {since:?}, for longer than {bound:?}"
        ));
    }

    fn enter(&mut self, who: usize, phase: Phase) {
        let now = self.now;
        let place = &mut self.watch.phases[who];
        if place.is_none_or(|(before, _)| before != phase) {
            *place = Some((phase, now));
        }
    }

    /// Whether so much time has passed, and its program could have noticed.
    fn passed(&self, who: usize, since: Duration, bound: Duration) -> bool {
        self.now
            > since
                .saturating_add(bound)
                .max(self.hosts[who].frozen_until)
                + MS
    }

    fn overdue_at_source(&mut self, phase: Phase) -> Option<(Duration, Duration, &'static str)> {
        if phase == Phase::Hello {
            let since = self.watch.phases[0].map_or(self.now, |(_, since)| since);
            let config = &self.plan.source;
            let bound = config.hello_deadline() + config.device_deadline();
            return self.first_overdue(0, [(Some(since), bound, "in the hello")]);
        }
        if phase == Phase::Done {
            let since = self.watch.phases[0].map_or(self.now, |(_, since)| since);
            let waits = [(Some(since), Duration::from_secs(1), "with its last word")];
            return self.first_overdue(0, waits);
        }
        let config = &self.plan.source;
        let in_rounds = matches!(phase, Phase::Rounds | Phase::Switchover);
        if in_rounds {
            (self.watch.begun, self.watch.out) = (true, None);
        } else if self.watch.begun && phase != Phase::Commit {
            self.watch.out.get_or_insert(self.now);
        }
        let watch = &self.watch;
        let kept = config.reconnect().min(watch.kept.unwrap_or_default());
        let predicted = self.source.session.predicted_downtime();
        let rounds = config.progress_deadline()
            + config.stall() * 5
            + config.reconnect()
            + config.ack_deadline().unwrap_or_default()
            + 200 * MS * config.rounds_max();
        let connected = self.source.control.is_some() && phase != Phase::Suspended;
        let waits = [
            (
                (!watch.begun).then_some(watch.set_up),
                config.setup_deadline(),
                "in the first set-up",
            ),
            (watch.out, kept, "without rounds"),
            (
                watch.paused.filter(|_| phase == Phase::Switchover),
                predicted.unwrap_or_default() + config.commit_deadline(),
                "with the guest paused",
            ),
            (
                watch.committed.filter(|_| phase == Phase::Commit),
                config.commit_deadline(),
                "committed",
            ),
            (watch.asks, config.reconnect(), "asking"),
            (
                connected.then_some(watch.heard[0]),
                config.stall(),
                "nothing heard",
            ),
            (
                (phase == Phase::Rounds).then_some(watch.taken.max(self.done.last)),
                rounds,
                "nothing taken",
            ),
        ];
        self.first_overdue(0, waits)
    }

    fn overdue_at_destination(&self, phase: Phase) -> Option<(Duration, Duration, &'static str)> {
        let config = &self.plan.destination;
        let since = self.watch.phases[1].map_or(self.now, |(_, since)| since);
        let owns = self.watch.owns;
        let connected = owns.is_none() && phase != Phase::Suspended;
        let waits = [
            (
                (phase == Phase::Setup).then_some(since),
                config.setup_deadline(),
                "in set-up",
            ),
            (
                (phase == Phase::Suspended).then_some(since),
                config.suspend(),
                "without channels",
            ),
            (
                connected.then_some(self.watch.heard[1]),
                config.stall(),
                "nothing heard",
            ),
            // A program that stood still gives its VMM its time again.
            (
                owns.map(|since| since.max(self.hosts[1].frozen_until)),
                config.progress_deadline(),
                "with the guest",
            ),
        ];
        self.first_overdue(1, waits)
    }

    fn first_overdue<const N: usize>(
        &self,
        who: usize,
        waits: [(Option<Duration>, Duration, &'static str); N],
    ) -> Option<(Duration, Duration, &'static str)> {
        waits.into_iter().find_map(|(since, bound, what)| {
            let since = since?;
            self.passed(who, since, bound)
                .then_some((since, bound, what))
        })
    }

    /// What the destination says of what landed is what landed.
    pub(super) fn check_counts(&mut self, frame: &Encoded) {
        if self.plan.liar == Some(Role::Destination) {
            return;
        }
        let Some((header, table)) = frame.bytes().split_first_chunk::<HEADER_BYTES>() else {
            return;
        };
        let header = Header::decode(header).unwrap();
        let counts = self.destination.counts;
        match Frame::decode(&header, table).unwrap() {
            Frame::RoundClosed(closed) => {
                self.watch.closed_pages += closed.pages + closed.zero_pages;
                let (said, truth) = (self.watch.closed_pages, counts.pages + counts.zero_pages);
                if said != truth {
                    self.violation(format!("{said} pages landed, it says; {truth} did"));
                }
            }
            Frame::Running(running) if running.landed_bytes != counts.landed_bytes() => {
                self.violation("RUNNING counts what did not land");
            }
            _ => {}
        }
    }

    /// What the destination answers is so, and stays so.
    pub(super) fn check_answer(&mut self, state: OutcomeState) {
        let runs = self.destination.runs;
        let true_so_far = match state {
            OutcomeState::NotCommitted => !runs,
            OutcomeState::CommittedNotRunning | OutcomeState::Running => runs,
            OutcomeState::FailedAfterCommit => true,
        };
        self.done.refused |= state == OutcomeState::NotCommitted;
        if !true_so_far {
            self.violation(format!("the answer is {state:?}, and it runs: {runs}"));
        }
    }

    // ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────

    pub(super) fn judge(mut self) -> Run {
        if self.violations.is_empty() {
            if self.source.guest.runs && self.destination.runs && self.is_honest() {
                self.violation("two owners");
            }
            match self.plan.liar {
                None => self.judge_both(),
                Some(liar) => self.judge_against(liar),
            }
        }
        let outcome = match self.source.outcome.as_ref().map(|end| end.says) {
            Some(Says::Migrated | Says::Running) => "migrated",
            Some(Says::Failed) => "failed",
            Some(Says::Cancelled) => "cancelled",
            Some(Says::Stranded) => "stranded",
            Some(Says::Unknown) => "unknown",
            None => "died",
        };
        Run {
            outcome,
            faults: self.done.faults + self.liar.lies,
            throttled: self.done.throttled,
            violations: self.violations,
            trace: self.trace.unwrap_or_default(),
        }
    }

    fn judge_both(&mut self) {
        self.judge_owner();
        let ends = [self.source.outcome.take(), self.destination.outcome.take()];
        for (who, end) in ends.iter().enumerate() {
            let Some(end) = end else { continue };
            if !self.explains(who, end, &ends) {
                let done = &self.done;
                let text = format!("{:?} {} has no reason: {done:?}", end.says, end.text);
                self.violation(text);
            }
        }
        let migrated = ends[0]
            .as_ref()
            .is_some_and(|end| end.says == Says::Migrated);
        // A COMMIT that was lost on its way is as if it had not been sent, once the destination has said so.
        let undone = self.done.to_the_way()
            && ends[0]
                .as_ref()
                .is_some_and(|end| end.code == "sender.not-committed");
        if !migrated && !undone && self.must_succeed() {
            let text = ends[0].as_ref().map_or("", |end| &end.text).to_owned();
            self.violation(format!("ended without a reason: {text}"));
        }
        let [source, destination] = ends;
        (self.source.outcome, self.destination.outcome) = (source, destination);
    }

    /// Whose the guest is, and what each side says of that.
    fn judge_owner(&mut self) {
        self.check_released("at the end");
        let Some(end) = &self.source.outcome else {
            return;
        };
        let (here, there) = (self.source.guest.runs, self.destination.runs);
        let fits = match end.says {
            Says::Migrated | Says::Running => there && !here,
            Says::Failed | Says::Cancelled => here && !there,
            Says::Stranded => !here && self.done.committed,
            Says::Unknown => !here && self.done.committed,
        };
        if !fits {
            let text = format!(
                "{:?}, and the guest runs here: {here}, there: {there}",
                end.says
            );
            self.violation(text);
        }
    }

    /// Whether nothing happened that may end a migration.
    fn must_succeed(&self) -> bool {
        let done = &self.done;
        let spared = done.cancelled == [false; 2] && done.crashed == [false; 2];
        let unwilling = done.vmm_refused || done.vmm_hung;
        self.plan.gentle && spared && !unwilling && !done.early && !done.answer_lost
    }

    /// Whether an error fits what was done.
    fn explains(&self, who: usize, end: &End, ends: &[Option<End>; 2]) -> bool {
        let done = &self.done;
        let way = done.to_the_way() || !self.plan.gentle;
        if end.accuses() {
            return false;
        }
        if end.damage {
            return done.flips > 0;
        }
        match end.code {
            "" => true,
            "sender.cancelled" => done.cancelled[0],
            "receiver.cancelled" => done.cancelled[1],
            // What the other side said is looked at there.
            "sender.peer.aborted" | "receiver.peer.aborted" => {
                let other = ends[1 - who].as_ref();
                other.is_some_and(|other| {
                    other.says != Says::Migrated && !other.code.contains("aborted")
                }) || !self.ends.is_empty()
            }
            "sender.vmm.refused" | "receiver.vmm.refused" | "sender.peer.failed-after-commit" => {
                done.vmm_refused || done.vmm_hung
            }
            "receiver.thread-stuck" => done.vmm_hung || done.freezes > 0,
            "sender.not-converging" | "sender.device.ack-deadline" => !self.plan.gentle,
            "sender.unrepairable" => done.cuts + done.flips > 12,
            "sender.peer.session-lost" => way || done.unwilling(),
            "sender.timeout" | "receiver.timeout" => way || done.vmm_hung,
            "sender.outcome-unknown" | "sender.not-committed" | "receiver.asked-before-commit" => {
                way || done.unwilling()
            }
            "channel-closed"
            | "sender.channel.all-lanes-lost"
            | "sender.channel.lane-down"
            | "sender.channel.nothing-taken"
            | "sender.channel.not-reconnected"
            | "receiver.channel.all-lanes-lost" => way || done.unwilling(),
            "sender.peer.refused" => done.to_the_way() || done.unwilling(),
            _ => false,
        }
    }

    /// The honest side of a liar ends, with an error that says whose fault it is where it does.
    fn judge_against(&mut self, liar: Role) {
        let end = match liar {
            Role::Source => self.destination.outcome.as_ref(),
            Role::Destination => self.source.outcome.as_ref(),
        };
        let Some(end) = end else { return };
        let accuses = end.accuses();
        let (code, text) = (end.code, end.text.clone());
        if code.contains("internal") {
            self.violation(format!("a lie is called our own fault: {text}"));
        }
        let peer = match liar {
            Role::Source => "source",
            Role::Destination => "destination",
        };
        // What is too much for this side is no accusation.
        let accuses = accuses && !code.ends_with("limit");
        if accuses && !text.contains(peer) {
            self.violation(format!("{code} does not say who: {text}"));
        }
    }
}
