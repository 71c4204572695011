//! The progress display: a live line on a terminal, plain lines elsewhere.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use multifd_cli::round_end::{Expected, RoundEnd};
use multifd_cli::units::{Rate, Size, Time};
use multifd_sender::forecast::Forecast;
use multifd_sender::{Sending, Snapshot};
use multifd_wire::Phase;

/// Shows snapshots as they come.
pub(crate) struct Display {
    bar: Option<ProgressBar>,
    quiet: bool,
    round: Option<u32>,
    newest: Option<Snapshot>,
    told: Instant,
    began: Instant,
    round_end: RoundEnd,
}

impl Display {
    pub(crate) fn new(quiet: bool) -> Self {
        let bar = (!quiet && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template("  {prefix} [{bar:30}] {msg}") {
                bar.set_style(style.progress_chars("=> "));
            }
            bar
        });
        Self {
            bar,
            quiet,
            round: None,
            newest: None,
            told: Instant::now(),
            began: Instant::now(),
            round_end: RoundEnd::default(),
        }
    }

    /// Takes note of how far it is.
    pub(crate) fn show(&mut self, now: Snapshot) {
        self.round_end.note(self.began.elapsed(), (&now).into());
        let expected = self.round_end.expected();
        if self.round.is_some_and(|round| round != now.round)
            && let Some(before) = &self.newest
        {
            self.line(&round_line(before, &now));
        }
        if now.sent_bytes > 0 {
            self.round = Some(now.round);
        }
        if let Some(back) = now.reconnect
            && self
                .newest
                .as_ref()
                .is_none_or(|newest| newest.reconnect.is_none())
        {
            self.line(&format!(
                "  link lost: dialling again for {} at most",
                Time(back.gives_up_in)
            ));
        } else if now.reconnect.is_none()
            && self.newest.as_ref().is_some_and(|n| n.reconnect.is_some())
        {
            self.line("  link is back");
        }
        if let Some(bar) = &self.bar {
            bar.set_prefix(format!("round {}", now.round));
            bar.set_length(now.memory_pages.max(1));
            bar.set_position(now.memory_pages.saturating_sub(now.round_pages_left));
            bar.set_message(message(&now, expected));
        } else if self.told.elapsed() > Duration::from_secs(2) {
            self.told = Instant::now();
            self.line(&format!(
                "  round {}: {}",
                now.round,
                message(&now, expected)
            ));
        }
        self.newest = Some(now);
    }

    /// The migration is over.
    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None if !self.quiet => err!("{text}"),
            None => {}
        }
    }
}

fn message(now: &Snapshot, expected: Option<Expected>) -> String {
    if now.devices_awaited > 0 && now.reconnect.is_none() {
        return format!(
            "waiting for the initial bytes of {} devices to be loaded there, guest running here; {} of devices sent",
            now.devices_awaited,
            Size(now.device_bytes)
        );
    }
    if let Some(back) = now.reconnect {
        let guest = if now.phase == Phase::Commit {
            "asking the destination whether the guest runs there"
        } else {
            "guest running here"
        };
        return format!(
            "link lost, {guest}; attempt {}, gives up in {}",
            back.attempts,
            Time(back.gives_up_in)
        );
    }
    if now.limits.sending == Sending::Held {
        return format!(
            "held: {} left, {} sent, guest running here",
            Size(now.round_pages_left * 4096),
            Size(now.sent_bytes)
        );
    }
    let slowed = match now.throttle_percent {
        0 => String::new(),
        percent => format!(", guest slowed by {percent} %"),
    };
    let measured = Some(now.bandwidth).filter(|bandwidth| *bandwidth > 0);
    let rate = measured.or(expected.map(|expected| expected.rate));
    // Once there is a forecast it says more than the end of one round.
    let ends = expected
        .filter(|_| now.forecast.is_none())
        .map(|expected| format!(", round {} ends in {}", now.round, Time(expected.within)));
    format!(
        "{} left, {} sent, {}{slowed}{}{}",
        Size(now.round_pages_left * 4096),
        Size(now.sent_bytes),
        rate.map_or_else(|| "measuring".into(), |rate| Rate(rate).to_string()),
        ends.unwrap_or_default(),
        outlook(now.forecast)
    )
}

fn round_line(before: &Snapshot, now: &Snapshot) -> String {
    let found: Vec<String> = now
        .sources
        .iter()
        .map(|source| {
            let (name, figures) = (&source.name, &source.figures);
            let all_dirty = match figures.all_dirty {
                0 => String::new(),
                times => format!(", {times} times everything"),
            };
            let errors = match figures.errors {
                0 => String::new(),
                count => {
                    let last = std::io::Error::from_raw_os_error(figures.last_errno);
                    format!(", {count} errors, the last: {last}")
                }
            };
            let ms = figures.harvest_ns as f64 / 1e6;
            format!(
                "{name} found {} pages in {ms:.1} ms{all_dirty}{errors}",
                figures.pages
            )
        })
        .collect();
    // The round's own bandwidth is known when the next one has begun.
    let rate = Some(now.bandwidth).filter(|rate| *rate > 0);
    format!(
        "  round {}: sent {} in all{}, then dirty {} ({})",
        before.round,
        Size(before.sent_bytes),
        rate.map_or_else(String::new, |rate| format!(", {}", Rate(rate))),
        Size(now.dirty_pages * 4096),
        found.join("; ")
    )
}

fn outlook(forecast: Option<Forecast>) -> String {
    match forecast {
        Some(Forecast::Converges {
            within, downtime, ..
        }) => {
            format!(
                ", switchover in {}, downtime {}",
                Time(within),
                Time(downtime)
            )
        }
        Some(Forecast::Diverges {
            bandwidth_needed,
            throttle_percent,
            downtime,
        }) => {
            let ways = [
                bandwidth_needed.map(|needed| Rate(needed).to_string()),
                throttle_percent.map(|percent| format!("{percent} % fewer writes")),
                Some(format!(
                    "a downtime limit of {} ms",
                    downtime.as_millis() + 1
                )),
            ];
            format!(
                ", will not converge without {}",
                ways.into_iter().flatten().collect::<Vec<_>>().join(" or ")
            )
        }
        _ => String::new(),
    }
}
