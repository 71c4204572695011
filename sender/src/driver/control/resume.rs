//! The control channel's threads: opening one, closing what is left of another, beginning again.
//!
//! The rules it keeps: no thread of the old channels touches the dirty set or a ledger once new ones are open; a note of an old
//! channel is never taken for one of the new; and every page that LANDED does not cover is back in the dirty set before the
//! first round goes on (SPEC: RESUME-6).

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use multifd_session::source::{Attempt, NotOpened, Purpose};
use multifd_wire::{ChannelRef, PageIndex, Phase};

use super::super::mismatch::Mismatches;
use super::{Control, Note, lanes};
use crate::driver::attempt::{Open, Reached, reach};
use crate::driver::link::{ControlSender, read_control};
use crate::error::{Error, Fault};
use crate::session::Event;

/// How long the end waits for threads that are still dialling. A dialler that heeds its deadline ends soon by itself.
pub(super) const STRAGGLERS_MAX: Duration = Duration::from_millis(500);

impl Control {
    /// Makes an attempt to reach the destination, on a thread of its own.
    pub(super) fn dial_control(
        &mut self,
        number: u32,
        purpose: Purpose,
        attempt: Attempt,
    ) -> Result<(), Error> {
        if purpose != Purpose::Start {
            self.shared.counters.attempts.fetch_add(1, Relaxed);
        }
        if purpose == Purpose::Ask {
            self.timeline.asked();
        }
        let (shared, dial, notes) = (
            Arc::clone(&self.shared),
            Arc::clone(&self.dial),
            self.notes.clone(),
        );
        let body = Box::new(move || {
            let result = reach(&shared, &*dial, purpose, &attempt);
            if let Err(why) = &result {
                let counters = &shared.counters;
                counters.note_fault(ChannelRef::Control, why.fault());
            }
            // Whoever is gone leaves what was opened to be dropped here.
            let _ = notes.send(Note::Reached { number, result });
        });
        let thread = self.spawner.spawn("mfd-dial", body).map_err(|source| {
            let step = "start a thread";
            Error::new(self.session.phase(), Fault::System { step, source }).at(ChannelRef::Control)
        })?;
        self.stragglers.retain(|thread| !thread.is_finished());
        self.stragglers.push(thread);
        Ok(())
    }

    /// An attempt has ended. What nobody waits for any more is dropped, and closed by that.
    pub(super) fn reached(&mut self, number: u32, result: Result<Reached, NotOpened>) {
        if !self.session.awaits(number) {
            return;
        }
        let event = match result {
            Ok(Reached::Control(offer)) => {
                let Some(opened) = offer.take() else { return };
                let (agreed, round_trip) = (opened.agreed, opened.round_trip);
                self.shared.counters.attempts.store(0, Relaxed);
                match self.take_control(opened) {
                    Ok(()) => Event::Connected { agreed, round_trip },
                    Err(error) => Event::Failed(error),
                }
            }
            Ok(Reached::Answer(state)) => Event::Answered(state),
            Err(why) => {
                tracing::debug!(fault = %why.fault(), "the destination can't be reached");
                Event::NotConnected { number, why }
            }
        };
        self.drive(event);
    }

    /// Makes this the control channel.
    pub(super) fn take_control(&mut self, opened: Open) -> Result<(), Error> {
        tracing::info!(channel = %opened.description, "control channel open");
        let (notes, epoch, rx) = (self.notes.clone(), self.epoch, opened.rx);
        let shared = Arc::clone(&self.shared);
        let body = Box::new(move || read_control(rx, &shared, epoch, &notes));
        let reader = self.spawner.spawn("mfd-reader", body).map_err(|source| {
            Error::new(
                Phase::Hello,
                Fault::System {
                    step: "start a thread",
                    source,
                },
            )
            .at(ChannelRef::Control)
        })?;
        self.reader = Some(reader);
        let mut tx = opened.tx;
        tx.set_stall(Some(self.shared.config.stall()));
        self.control = Some(ControlSender::new(tx));
        self.shared.watch.control_channel(opened.closer.clone());
        self.control_closer = Some(opened.closer);
        self.control_lost = false;
        Ok(())
    }

    /// Closes every channel and waits for the threads that feed lanes, so that what they had taken is back. What the lanes carried
    /// stays in their ledgers. Gives why the migration can't go on, if a thread that may have taken pages does not end.
    pub(super) fn disconnect(&mut self) -> Option<Error> {
        self.epoch += 1;
        self.device_set.suspend(&self.shared.devices);
        if let Some(closer) = self.control_closer.take() {
            closer.shutdown();
        }
        self.control = None;
        self.stragglers.extend(self.reader.take());
        self.stragglers.retain(|thread| !thread.is_finished());
        self.lanes.iter_mut().for_each(lanes::Slot::close);
        let limit = self.shared.config.device_deadline();
        let (until, mut stuck) = (Instant::now() + limit, None);
        for place in 0..self.lanes.len() {
            let Some(slot) = self.lanes.get_mut(place) else {
                break;
            };
            let (id, fed) = (slot.state.id, slot.closer.is_some());
            let Some(thread) = slot.thread.take() else {
                continue;
            };
            if !fed {
                // It is dialling, or has ended long ago; it has taken nothing.
                self.stragglers.push(thread);
                continue;
            }
            // Nothing that the old channels still say counts: LANDED will say it, finally. What devices say does.
            if self.join(thread, until).is_err() {
                stuck = Some(self.lane_stuck(id, limit));
            }
        }
        for slot in &mut self.lanes {
            // A resume that came to nothing has left no ledger of its own behind.
            slot.before.get_or_insert_with(|| Arc::clone(&slot.state));
        }
        // With the last lane gone this gives back what no lane had taken.
        self.open = None;
        if self.session.is_committed() {
            // No page is needed any more.
            return None;
        }
        self.timeline
            .suspended(self.shared.sent(), self.shared.now());
        stuck
    }

    /// Everything as at the beginning, for a destination that has nothing.
    pub(super) fn start_afresh(&mut self) -> Result<Event, Error> {
        self.lanes.clear();
        self.start_devices_over()?;
        // Nothing is at the destination any more, also if this attempt gets no further than to dial.
        self.mismatches.leave_open(&self.shared.dirty);
        self.mismatches = Mismatches::new(&self.shared.dirty);
        self.mark_first_round()?;
        let shared = Arc::clone(&self.shared);
        for region in shared.layout.regions() {
            let pages = region.bytes / multifd_wire::PAGE_BYTES_U64;
            let mut first = 0;
            while first < pages {
                let count = (pages - first).min(1 << 20);
                let count = u32::try_from(count).unwrap_or(u32::MAX);
                let Ok(run) = shared.layout.run(region.id, PageIndex::new(first), count) else {
                    break;
                };
                shared.digest.merge(shared.values.clear(run));
                first += u64::from(count);
            }
        }
        tracing::warn!("the destination has lost the migration: beginning again");
        self.timeline.resumed();
        self.name()
    }

    /// Waits a moment for threads of channels that were given up; notes are read meanwhile so that none blocks on them. One that
    /// dials and is not answered is left behind: it ends by itself, and can do nothing more.
    pub(super) fn join_stragglers(&mut self) {
        let began = Instant::now();
        for thread in std::mem::take(&mut self.stragglers) {
            let _ = self.join(thread, began + STRAGGLERS_MAX);
        }
        tracing::trace!(took = ?began.elapsed(), "threads of lost channels have ended");
    }
}
