//! What all seeds came to: counters by name, which several processes can add up.

use std::collections::BTreeMap;
use std::time::Duration;

use multifd_tests::sim::faults::{Fault, RATES, WAYS_CLOSED_IN};
use multifd_tests::sim::{BY_PHASE, Mode, NEVER_READ, Verdict};

/// What a line begins with that carries a counter from one process to another.
const LINE: &str = "TALLY ";

/// Counters by name; a dot parts a group from what is in it.
#[derive(Debug, Default)]
pub(crate) struct Tally(BTreeMap<String, u64>);

impl Tally {
    /// One more migration.
    pub(crate) fn add(&mut self, verdict: &Verdict) {
        self.count("migrations", 1);
        self.count("without-fault", u64::from(verdict.faults.is_empty()));
        self.count("given-back", verdict.pages_given_back);
        self.count("lanes-lost", u64::from(verdict.lanes_lost));
        self.count("second", u64::from(verdict.second));
        self.count("switches", verdict.figures.switches);
        self.count("simulated-ms", verdict.figures.ns / 1_000_000);
        self.count("violations", u64::from(!verdict.violations.is_empty()));
        self.count("with-devices", u64::from(verdict.devices > 0));
        self.count("devices-moved", verdict.devices_moved);
        self.count(&format!("outcome.{:?}", verdict.outcome), 1);
        if let Some(code) = verdict.code {
            self.count(&format!("error.{code}"), 1);
        }
        for fault in &verdict.faults {
            self.count(&format!("fault.{fault:?}"), 1);
        }
        for (what, count) in &verdict.flips {
            self.count(&format!("flip.{what}"), *count);
        }
    }

    fn count(&mut self, name: &str, count: u64) {
        if let Some(sum) = self.0.get_mut(name) {
            *sum += count;
        } else {
            self.0.insert(name.to_owned(), count);
        }
    }

    fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    fn group<'a>(&'a self, group: &'a str) -> impl Iterator<Item = (&'a str, u64)> {
        self.0.iter().filter_map(move |(name, count)| {
            let rest = name.strip_prefix(group)?.strip_prefix('.')?;
            Some((rest, *count))
        })
    }

    /// Migrations with violations.
    pub(crate) fn violations(&self) -> u64 {
        self.get("violations")
    }

    /// Migrations in all.
    pub(crate) fn migrations(&self) -> u64 {
        self.get("migrations")
    }

    /// A simulation that ended its process: it hung, or a thread of it panicked.
    pub(crate) fn add_broken(&mut self) {
        self.count("migrations", 1);
        self.count("violations", 1);
    }

    /// A process that ended before its last seed.
    pub(crate) fn add_unfinished(&mut self) {
        self.count("unfinished", 1);
    }

    /// Processes that ended before their last seed.
    pub(crate) fn unfinished(&self) -> u64 {
        self.get("unfinished")
    }

    /// Says everything in lines for another process.
    pub(crate) fn tell(self) {
        for (name, count) in self.0 {
            println!("{LINE}{name} {count}");
        }
    }

    /// Takes a line of another process; false if it is none of these.
    pub(crate) fn hear(&mut self, line: &str) -> bool {
        let Some((name, count)) = line
            .strip_prefix(LINE)
            .and_then(|rest| rest.rsplit_once(' '))
        else {
            return false;
        };
        self.count(name, count.parse().unwrap_or(0));
        true
    }

    /// For people.
    pub(crate) fn print(&self, mode: Mode, took: Duration) {
        let (migrations, seconds) = (self.migrations(), took.as_secs_f64());
        println!(
            "{migrations} migrations in {seconds:.1} s ({:.0} a second), {} s of simulated time, {} switches each",
            migrations as f64 / seconds,
            self.get("simulated-ms") / 1000,
            self.get("switches") / migrations.max(1)
        );
        println!(
            "without any fault {}, with devices {} ({} devices moved), second attempts {}, pages given back {}, lanes lost {}",
            self.get("without-fault"),
            self.get("with-devices"),
            self.get("devices-moved"),
            self.get("second"),
            self.get("given-back"),
            self.get("lanes-lost"),
        );
        self.list("outcomes", "outcome");
        self.list("errors", "error");
        match mode {
            Mode::Faults => self.print_faults(),
            Mode::Flips => self.print_flips(),
            Mode::Calm => {}
        }
        println!("violations: {}", self.violations());
        if self.unfinished() > 0 {
            println!(
                "NOT ALL SEEDS WERE SIMULATED: {} workers ended before their last",
                self.unfinished()
            );
        }
    }

    fn list(&self, what: &str, group: &str) {
        let all: Vec<String> = self
            .group(group)
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        println!("{what}: {}", all.join(", "));
    }

    /// Each fault with its rate among all that are drawn, and how often it happened.
    fn print_faults(&self) {
        let total: u32 = RATES.iter().map(|(_, weight)| weight).sum();
        println!("| fault | of 1000 drawn | happened |\n|---|---|---|");
        for (fault, weight) in RATES {
            let name = format!("{fault:?}");
            let happened = self.get(&format!("fault.{name}"));
            println!("| {name} | {} | {happened} |", weight * 1000 / total);
        }
        let name = format!("{:?}", Fault::WayClosed);
        let happened = self.get(&format!("fault.{name}"));
        println!("| {name} | beside them, in 1 of {WAYS_CLOSED_IN} | {happened} |");
    }

    /// Which bytes were changed, and what came of it.
    fn print_flips(&self) {
        let mut sum = 0;
        println!("| bytes of | part | what came of the flipped bit | flips |\n|---|---|---|---|");
        for (what, count) in self.group("flip") {
            println!("| {} | {count} |", what.replace('/', " | "));
            if !what.ends_with(NEVER_READ) && !what.starts_with(BY_PHASE) {
                sum += count;
            }
        }
        println!("flipped bits that arrived: {sum}");
    }
}
