//! `--progress json`: an object in a line of its own for each thing that happens, and one a second.
//!
//! What an event carries, and its name, are those of the control socket; where the report has it, its names are the same.

use std::time::{Duration, Instant};

use multifd_cli::round_end::RoundEnd;
use multifd_control::status::Seen;
use multifd_sender::Snapshot;
use serde_json::json;

/// How often an event comes when nothing else happens.
const PERIOD: Duration = Duration::from_secs(1);

/// What was told so far.
pub(crate) struct Events {
    began: Instant,
    told: Instant,
    newest: Option<Seen>,
    round_end: RoundEnd,
}

impl Default for Events {
    fn default() -> Self {
        let now = Instant::now();
        Self {
            began: now,
            told: now,
            newest: None,
            round_end: RoundEnd::default(),
        }
    }
}

impl Events {
    /// Takes note of how far it is, and tells what is new.
    pub(crate) fn show(&mut self, now: &Snapshot) {
        self.round_end.note(self.began.elapsed(), now.into());
        let seen = Seen::Source(Box::new(now.clone()));
        for event in seen.news(self.newest.as_ref()) {
            self.tell(event, &seen);
        }
        if self.told.elapsed() >= PERIOD {
            self.tell("progress", &seen);
        }
        self.newest = Some(seen);
    }

    /// The user asked for a cancellation.
    pub(crate) fn cancelling(&mut self, now: &Snapshot) {
        self.tell("cancelling", &Seen::Source(Box::new(now.clone())));
    }

    fn tell(&mut self, event: &str, now: &Seen) {
        self.told = Instant::now();
        let mut object = now.status();
        object["event"] = json!(event);
        object["elapsed_ms"] = json!(self.began.elapsed().as_millis() as u64);
        let ends = self.round_end.expected();
        object["round_ends_in_ms"] = json!(ends.map(|ends| ends.within.as_millis() as u64));
        out!("{object}");
    }
}
