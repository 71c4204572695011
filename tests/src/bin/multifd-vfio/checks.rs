//! What must be true of a migration of devices, each with its words.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_tests::vfio_machine::{Step, octets};
use multifd_wire::DeviceState::{
    self, Error, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy,
};
use multifd_wire::frame::DeviceFlags;

use crate::args::{Args, Side};
use crate::history::{Events, History, What, Who, states, steps};
use crate::lab_device::{Dma, Place, is_filled};
use crate::trip::{Ended, Guest, name};

/// How long a device that was started may take to do its work.
const SOON: Duration = Duration::from_secs(10);

/// What the checks look at.
pub(crate) struct Case<'a> {
    pub(crate) args: &'a Args,
    pub(crate) guest: &'a Guest,
    pub(crate) from: &'a [Place],
    pub(crate) to: &'a [Place],
    pub(crate) history: &'a History,
    pub(crate) ended: &'a Ended,
    /// What each pair's labdevs had written, and failed to write, when the attempt began.
    pub(crate) before: Vec<[Dma; 2]>,
}

/// The number that the kernel has for it (`enum vfio_device_mig_state`).
fn number(state: DeviceState) -> u8 {
    match state {
        Error => 0,
        Stop => 1,
        Running => 2,
        StopCopy => 3,
        Resuming => 4,
        RunningP2p => 5,
        PreCopy => 6,
        PreCopyP2p => 7,
    }
}

fn words(states: &[DeviceState]) -> String {
    let names: Vec<&str> = states.iter().map(|state| state.name()).collect();
    names.join(", ")
}

/// What each side's device must have gone through.
fn expected(flags: DeviceFlags) -> (Vec<DeviceState>, Vec<DeviceState>) {
    let p2p = flags.contains(DeviceFlags::P2P);
    let source = match (flags.contains(DeviceFlags::PRE_COPY), p2p) {
        (true, true) => vec![PreCopy, PreCopyP2p, StopCopy, Stop],
        (true, false) => vec![PreCopy, StopCopy, Stop],
        (false, true) => vec![RunningP2p, Stop, StopCopy, Stop],
        (false, false) => vec![Stop, StopCopy, Stop],
    };
    let destination = if p2p {
        vec![RunningP2p, Stop, Resuming, Stop, RunningP2p, Running]
    } else {
        vec![Stop, Resuming, Stop, Running]
    };
    (source, destination)
}

impl Case<'_> {
    fn events(&self) -> Events {
        self.history.events().0
    }

    fn passed(&self, text: &str) {
        crate::say(&format!("  ok  {text}"));
    }

    /// The guest runs at the destination, with everything.
    pub(crate) fn migrated(&self) -> Result<()> {
        if let Some(error) = &self.ended.sent_error {
            bail!("the source: {error}");
        }
        if let Some(error) = &self.ended.received_error {
            bail!("the destination: {error}");
        }
        self.injected()?;
        for (pair, flags) in self.guest.flags.iter().enumerate() {
            self.order_of_states(pair, *flags)?;
            if flags.contains(DeviceFlags::PRE_COPY) {
                self.acknowledged(pair)?;
            }
            self.content(pair)?;
        }
        if self.from.len() > 1 {
            self.quiescent_together()?;
        }
        ensure!(
            self.ended.arrived == octets(&self.guest.memory),
            "the memory that arrived is not the source's"
        );
        self.passed("memory on arrival is the source's");
        self.device_writes()?;
        ensure!(
            !self.guest.running.load(Ordering::SeqCst),
            "the guest runs at the source"
        );
        for (state, place) in self.ended.device_states.iter().zip(self.from) {
            ensure!(*state == Stop, "{} is in {state} at the end", place.name());
        }
        self.passed("guest and devices stand still at the source");
        let report = &self.ended.sent;
        crate::say(&format!(
            "migrated: {} rounds, {} devices, {} bytes of device state, downtime {:.0} ms",
            report.rounds,
            report.devices.len(),
            report.device_bytes,
            report.downtime_ms.unwrap_or(0.0),
        ));
        Ok(())
    }

    /// Everything that was to be injected was.
    fn injected(&self) -> Result<()> {
        let (_, left, failures) = self.history.events();
        ensure!(failures.is_empty(), "{}", failures.join("; "));
        ensure!(
            left.is_empty(),
            "not injected, since no device came to that state: {left:?}"
        );
        Ok(())
    }

    fn order_of_states(&self, pair: usize, flags: DeviceFlags) -> Result<()> {
        let events = self.events();
        let want = expected(flags);
        for (side, want) in [(Side::Source, want.0), (Side::Destination, want.1)] {
            let seen = states(&events, side, pair);
            ensure!(
                seen == want,
                "{} at the {side:?}: {}; expected: {}",
                name(pair),
                words(&seen),
                words(&want)
            );
            self.kernel_saw(side, pair, &seen)?;
            self.passed(&format!("{} at the {side:?}: {}", name(pair), words(&seen)));
        }
        Ok(())
    }

    /// The kernel's device has the same in its own book.
    fn kernel_saw(&self, side: Side, pair: usize, seen: &[DeviceState]) -> Result<()> {
        let places = if side == Side::Source {
            self.from
        } else {
            self.to
        };
        let Some(place) = places.get(pair).filter(|place| place.is_labdev()) else {
            return Ok(());
        };
        // It ran when its book was emptied, and what it refused left it where it was.
        let with_start = |states: Vec<u8>| {
            let mut all = vec![number(Running)];
            all.extend(states);
            all.dedup();
            all
        };
        let numbers = with_start(seen.iter().copied().map(number).collect());
        let trace = place.trace()?;
        let same = if trace.len() < 16 {
            with_start(trace.clone()) == numbers
        } else {
            numbers.ends_with(&trace)
        };
        ensure!(
            same,
            "the kernel saw {} go through {trace:?}, we through {numbers:?}",
            place.name()
        );
        Ok(())
    }

    /// Every batch of initial bytes was loaded before the guest was paused.
    fn acknowledged(&self, pair: usize) -> Result<()> {
        let events = self.events();
        let paused = events
            .iter()
            .position(|event| *event == (Who::Guest, What::Paused))
            .context("the guest was never paused")?;
        let before = events.split_at(paused).0.to_vec();
        let read: Vec<u64> = steps(&events, Side::Source, pair)
            .into_iter()
            .filter_map(|step| match step {
                Step::InitialRead(octets) => Some(octets),
                _ => None,
            })
            .collect();
        let loaded = |events: &Events| -> Vec<u64> {
            let loaded = |step| match step {
                Step::InitialLoaded(octets) => Some(octets),
                _ => None,
            };
            steps(events, Side::Destination, pair)
                .into_iter()
                .filter_map(loaded)
                .collect()
        };
        let batches = if self.args.reinit.is_some() { 2 } else { 1 };
        ensure!(
            read.len() == batches,
            "{} announced {read:?}, not {batches} batches",
            name(pair)
        );
        ensure!(
            loaded(&before) == read,
            "{}: initial bytes read up to {read:?}, loaded before the pause {:?}, in all {:?}",
            name(pair),
            loaded(&before),
            loaded(&events)
        );
        let report = self
            .ended
            .sent
            .devices
            .get(pair)
            .context("a report of each device")?;
        ensure!(
            report.generations as usize == batches && report.acked == report.generations,
            "{}: {} batches, the last acknowledged was {}",
            name(pair),
            report.generations,
            report.acked
        );
        self.passed(&format!(
            "{}: initial bytes ({read:?} bytes into the stream) were loaded and acknowledged before the guest was paused",
            name(pair)
        ));
        Ok(())
    }

    /// What the device has inside is the same when it has arrived.
    fn content(&self, pair: usize) -> Result<()> {
        let ended = self
            .ended
            .there
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let pick = |devices: &[multifd_guest::vfio::HostDevice], places: &[Place]| {
            let (device, place) = (devices.get(pair), places.get(pair));
            let (device, place) = device.zip(place).context("a device for each pair")?;
            place.content(device)
        };
        let here = pick(&self.guest.opened.devices, self.from)?;
        let there = match self.history.content(pair) {
            Some(content) => content,
            None => pick(&ended.0.devices, self.to)?,
        };
        here.check()?;
        ensure!(here == there, "{}: {here:x?} became {there:x?}", name(pair));
        self.passed(&format!(
            "{}: content on arrival is the source's: {here:x?}",
            name(pair)
        ));
        Ok(())
    }

    /// No device stops before all are quiescent, and none runs before all are.
    fn quiescent_together(&self) -> Result<()> {
        let events = self.events();
        let when = |side: Side, state: DeviceState| -> Vec<usize> {
            let is = |(who, what): &(Who, What)| {
                matches!(who, Who::Device(of, _) if *of == side)
                    && *what == What::Device(Step::State(state))
            };
            (0..)
                .zip(&events)
                .filter(|(_, event)| is(event))
                .map(|(at, _)| at)
                .collect()
        };
        let both = |side, before: &[DeviceState], after| {
            let last = before.iter().flat_map(|state| when(side, *state)).max();
            last < when(side, after).into_iter().min()
        };
        ensure!(
            both(Side::Source, &[PreCopyP2p, RunningP2p], StopCopy),
            "a device stopped before all were quiescent"
        );
        ensure!(
            both(Side::Destination, &[RunningP2p], Running),
            "a device ran before all were quiescent"
        );
        self.passed("all devices were quiescent before any stopped, and before any ran");
        Ok(())
    }

    /// What devices wrote in guest memory was tracked; and what a peer wanted of a quiescent one is done at the destination.
    fn device_writes(&self) -> Result<()> {
        let there = self
            .ended
            .there
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let labdevs = self.from.iter().zip(self.to).zip(&self.before);
        let mut written = 0;
        for ((from, to), [from_before, to_before]) in
            labdevs.filter(|((from, _), _)| from.is_labdev())
        {
            let (now, to_now) = (from.dma()?, to.dma()?);
            let (here, before) = (now.pages, &from_before.pages);
            written += here - before;
            ensure!(
                now.errors == from_before.errors && to_now.errors == to_before.errors,
                "a page could not be written"
            );
            if self.args.late_dma {
                ensure!(
                    here == *before,
                    "{} wrote while it was quiescent",
                    from.name()
                );
                let until = Instant::now() + SOON;
                while to.get("dma_pending")? == 1 && Instant::now() < until {
                    std::thread::sleep(Duration::from_millis(20));
                }
                let pages = to.get("dma_bytes")? / 4096;
                let done = to.get("dma_pages")?;
                ensure!(
                    done == here + pages,
                    "{} wrote {} pages of {pages}",
                    to.name(),
                    done - here
                );
            }
        }
        if self.args.late_dma {
            let memory = there.1.as_ref().context("memory at the destination")?;
            ensure!(
                is_filled(memory)?,
                "the destination's memory does not hold what its device was to write"
            );
            self.passed("what a peer asked of a quiescent device was done at the destination, and not before");
            return Ok(());
        }
        // The first source is the machine's own.
        let sources = self.ended.sent.sources.get(1..).unwrap_or(&[]);
        let reported: u64 = sources.iter().map(|source| source.pages).sum();
        if written > 0 {
            ensure!(
                reported > 0,
                "devices wrote {written} pages, and none was reported"
            );
            let all = sources.iter().map(|source| source.all_dirty).sum::<u64>();
            self.passed(&format!(
                "devices wrote {written} times into guest memory meanwhile; {reported} pages were reported, {all} times all of them"
            ));
        } else {
            ensure!(
                self.args.dma == 0 || !self.from.iter().any(Place::is_labdev),
                "no device wrote guest memory, so nothing was shown"
            );
        }
        Ok(())
    }

    /// The guest and all its devices run on at the source.
    pub(crate) fn failed(&self) -> Result<()> {
        self.ended_as(tx::OutcomeKind::Failed)?;
        ensure!(
            self.ended.received.outcome != rx::OutcomeKind::Running,
            "the guest runs at the destination"
        );
        self.injected()?;
        ensure!(
            self.guest.running.load(Ordering::SeqCst),
            "the guest does not run at the source"
        );
        let before = (self.guest.writes)();
        let mut works = Vec::new();
        for (pair, place) in self.from.iter().enumerate() {
            let state = self.ended.device_states.get(pair).copied();
            ensure!(state == Some(Running), "{} is in {state:?}", place.name());
            let seen = states(&self.events(), Side::Source, pair);
            self.kernel_saw(Side::Source, pair, &seen)?;
            // Before the set-up is done there is no report of devices, and nothing has been asked of them.
            let reset = self
                .ended
                .sent
                .devices
                .get(pair)
                .is_some_and(|report| report.was_reset);
            let broke = seen.contains(&Error);
            ensure!(
                broke == reset,
                "{} broke: {broke}, was reset: {reset}",
                place.name()
            );
            self.passed(&format!(
                "{} runs at the source, after {}",
                place.name(),
                words(&seen)
            ));
            // A reset stops what it was told to do.
            if place.is_labdev() && !broke && self.args.dma > 0 && !self.args.late_dma {
                works.push((place, place.get("dma_pages")?));
            }
        }
        std::thread::sleep(Duration::from_millis(300));
        ensure!(
            (self.guest.writes)() > before,
            "the guest writes nothing any more"
        );
        for (place, before) in works {
            ensure!(
                place.get("dma_pages")? > before,
                "{} writes nothing any more",
                place.name()
            );
        }
        self.passed("the guest and its devices go on working at the source");
        Ok(())
    }

    /// Nobody runs the guest: the destination owns it and could not.
    pub(crate) fn stranded(&self) -> Result<()> {
        self.ended_as(tx::OutcomeKind::Stranded)?;
        self.injected()?;
        ensure!(
            !self.guest.running.load(Ordering::SeqCst),
            "the guest runs at the source as well"
        );
        for (state, place) in self.ended.device_states.iter().zip(self.from) {
            ensure!(
                matches!(state, Stop | StopCopy),
                "{} is in {state} at the source",
                place.name()
            );
        }
        ensure!(
            self.ended.received.outcome == rx::OutcomeKind::Stranded,
            "the destination: {:?}",
            self.ended.received.outcome
        );
        self.passed("nothing runs at the source; the destination owns the guest");
        Ok(())
    }

    fn ended_as(&self, outcome: tx::OutcomeKind) -> Result<()> {
        let error = self.ended.sent_error.clone().unwrap_or_default();
        ensure!(
            self.ended.sent.outcome == outcome,
            "it ended as {:?}: {error}",
            self.ended.sent.outcome
        );
        if let Some(because) = &self.args.because {
            ensure!(
                error.contains(because.as_str()),
                "the error does not say `{because}`: {error}"
            );
        }
        self.passed(&format!("it ended as {outcome:?}: {error}"));
        let there = self.ended.received_error.as_deref().unwrap_or("no error");
        crate::say(&format!("      the destination says: {there}"));
        Ok(())
    }
}
