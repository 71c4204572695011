//! What the destination's session does as time goes on: says that it lives, acknowledges, and gives up what does not come.

use std::time::Duration;

use multifd_wire::Phase;
use multifd_wire::frame::Progress;

use super::{Done, Session, State, micros};
use crate::destination::error::{Error, Fault};
use crate::destination::event::{Counts, Effect};

impl Session {
    /// The time has gone on.
    pub(super) fn tick(&mut self, counts: Counts, now: Duration, out: &mut Vec<Effect>) -> Done {
        self.deadlines.counted(counts.frames, now);
        if self.is_connected() {
            if self.deadlines.acks_are_due(&self.config, now) {
                out.push(Effect::CountHandled);
            }
            if self.deadlines.keep_alive_is_due(&self.config, now) {
                self.say_alive(counts, now, out)?;
            }
        }
        let (deadline, what) = self.deadline();
        if now < deadline {
            return Ok(());
        }
        self.too_late(what, now, out)
    }

    fn say_alive(&mut self, counts: Counts, now: Duration, out: &mut Vec<Effect>) -> Done {
        let alive = self.pulse.ask(now);
        self.send(alive, out)?;
        // SPEC: KIND-2, PROGRESS has no place in set-up.
        if self.phase() < Phase::Rounds {
            return Ok(());
        }
        let progress = Progress {
            landed_bytes: counts.landed_bytes(),
            zero_pages: counts.zero_pages,
            frames: counts.frames,
            cpu_us: micros(counts.cpu),
            round: self.rounds.round(),
            lanes: self.lanes.alive(),
        };
        self.send(progress, out)
    }

    /// Until when what is waited for may take, and what that is.
    pub(super) fn deadline(&self) -> (Duration, &'static str) {
        let of_source = self.deadline_of_the_source();
        let own = self.deadline_of_our_own();
        match own {
            Some((_, due)) if due < of_source.0 => (due, "a thread of this side"),
            _ => of_source,
        }
    }

    /// Until when a thread of this side has to come back, and which.
    pub(super) fn deadline_of_our_own(&self) -> Option<(String, Duration)> {
        match &self.state {
            State::Owning { since } => Some((
                "the VMM, which was to run the guest,".to_owned(),
                self.deadlines.own_since(*since) + self.config.progress_deadline(),
            )),
            _ => self.lanes.closing().map(|(lane, since)| {
                let thread = format!("data channel {lane}, which was closed,");
                let since = self.deadlines.own_since(since);
                (thread, since + self.config.device_deadline())
            }),
        }
    }

    fn deadline_of_the_source(&self) -> (Duration, &'static str) {
        let (config, clocks) = (&self.config, &self.deadlines);
        let silence = (
            clocks.heard + config.stall(),
            "a sign of life from the source",
        );
        let set_up = (
            clocks.began + config.setup_deadline(),
            "the source to finish set-up",
        );
        let idle = (
            clocks.progress + config.progress_deadline(),
            "the source to go on; it only says that it lives",
        );
        let in_rounds = matches!(self.state, State::Rounds | State::Fenced(_));
        if let Some(since) = clocks.alone_since.filter(|_| in_rounds) {
            let alone = (
                since + config.suspend(),
                "the source to open a data channel again",
            );
            return if alone.0 < silence.0 { alone } else { silence };
        }
        let (missed, short) = match &self.state {
            State::Fenced(fence) => (fence.missed_since(), fence.short_since()),
            _ => (None, None),
        };
        match &self.state {
            State::Setup if set_up.0 < silence.0 => set_up,
            // Not of a source that stands still, whatever of it was still on its way: it had no time to send anything.
            State::Fenced(_)
                if let Some(since) = missed
                    && since + config.stall() < silence.0 =>
            {
                (since + config.stall(), "the source to send what is missing")
            }
            // Nor for ever, whatever it says meanwhile that is no answer.
            State::Fenced(_)
                if let Some(since) = short
                    && since + config.progress_deadline() < silence.0 =>
            {
                (
                    since + config.progress_deadline(),
                    "the source to send what is missing",
                )
            }
            // The guest is ours: no silence of the source changes that any more.
            State::Owning { .. } | State::Over => (Duration::MAX, ""),
            State::Suspended { until } => (*until, "the source to come back"),
            State::Rounds | State::Fenced(_) | State::Prepared(_) if idle.0 < silence.0 => idle,
            _ => silence,
        }
    }

    fn too_late(&mut self, what: &'static str, now: Duration, out: &mut Vec<Effect>) -> Done {
        if let Some((thread, due)) = self.deadline_of_our_own().filter(|(_, due)| now >= *due) {
            let waited_ms = match &self.state {
                State::Owning { .. } => self.config.progress_deadline(),
                _ => self.config.device_deadline(),
            };
            let waited_ms = (waited_ms + now.saturating_sub(due)).as_millis();
            let fault = Fault::ThreadStuck { thread, waited_ms };
            if matches!(self.state, State::Owning { .. }) {
                self.may_run_yet(fault, now, out);
                return Ok(());
            }
            return Err(fault);
        }
        let silent = now >= self.deadlines.heard + self.config.stall();
        if let Some(since) = self.deadlines.alone_since
            && now >= since + self.config.suspend()
            && !silent
        {
            let last = format!("none was opened again within {:?}", self.config.suspend());
            return Err(Fault::AllLanesLost { last });
        }
        if let State::Fenced(fence) = &self.state
            && let Some(fault) = self.rounds.missing(fence)
            && !silent
        {
            return Err(fault);
        }
        let fault = Fault::Timeout { what };
        let in_resume = self.resumed && matches!(self.state, State::Setup);
        let suspended = matches!(self.state, State::Suspended { .. });
        if (silent || in_resume) && !suspended {
            let error = Error::new(self.phase(), fault);
            self.lost(error, now, out);
            return Ok(());
        }
        Err(fault)
    }
}
