//! Without channels and back again: closing what is left, dialling the control channel, settling what landed.
//!
//! The rules it keeps: no thread of the old channels touches the dirty set or a ledger once new ones are open; a note of an old
//! channel is never taken for one of the new; and every page that LANDED does not cover is back in the dirty set before the
//! first round goes on (SPEC: RESUME-6).

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use multifd_session::source::redial::{Next, Redial};
use multifd_wire::frame::{Abort, GuestState};
use multifd_wire::limits::TEXT_BYTES_MAX;
use multifd_wire::{ChannelRef, Features, Frame, Hello, PageIndex, Phase, Reason, SessionId, Text};

use super::super::mismatch::Mismatches;
use super::{Control, Note, lanes};
use crate::driver::link::{ControlSender, Open, read_control};
use crate::driver::redial::{Purpose, Reached, reach};
use crate::error::{Error, Fault};
use crate::session::Event;

/// How long a destination that has no channel any more is tried to be told that it is over.
const LAST_WORD_MAX: Duration = Duration::from_secs(1);

/// The pause between two attempts to.
const LAST_WORD_PAUSE: Duration = Duration::from_millis(50);

/// How long the end waits for threads that are still dialling. A dialler that heeds its deadline ends soon by itself.
pub(super) const STRAGGLERS_MAX: Duration = Duration::from_millis(500);

/// What the destination sends behind RUNNING follows at once; one that sends nothing there is not waited for.
const GOODBYE_MAX: Duration = Duration::from_millis(500);

/// The way back to the destination.
#[derive(Debug, Clone, Copy)]
pub(super) struct Back {
    purpose: Purpose,
    redial: Redial,
    /// An attempt is under way.
    dialling: bool,
}

impl Control {
    /// When something of this file is due next.
    pub(super) fn back_due(&self) -> Duration {
        match &self.back {
            Some(back) if !back.dialling => back.redial.due,
            _ => Duration::MAX,
        }
    }

    /// Does what is due.
    pub(super) fn tend_back(&mut self, now: Duration) {
        let Some(back) = &mut self.back else { return };
        let left = back.redial.until.saturating_sub(now);
        self.shared
            .counters
            .gives_up_in_ms
            .store(u64::try_from(left.as_millis()).unwrap_or(u64::MAX), Relaxed);
        if back.dialling || now < back.redial.due {
            return;
        }
        back.dialling = true;
        let purpose = back.purpose;
        self.attempt += 1;
        self.shared.counters.attempts.fetch_add(1, Relaxed);
        if purpose == Purpose::Ask {
            self.timeline.asked();
        }
        if let Err(error) = self.dial_back(purpose) {
            self.drive(Event::Failed(error));
        }
    }

    fn dial_back(&mut self, purpose: Purpose) -> Result<(), Error> {
        let fail = |source| {
            Error::new(
                Phase::Suspended,
                Fault::System {
                    step: "start a thread",
                    source,
                },
            )
        };
        let Some(hello) = self.hello_for(purpose) else {
            return Ok(());
        };
        let (shared, dial, notes) = (
            Arc::clone(&self.shared),
            Arc::clone(&self.dial),
            self.notes.clone(),
        );
        let (attempt, round_trip) = (self.attempt, self.session.round_trip());
        let body = Box::new(move || {
            let result = reach(&shared, &*dial, purpose, &hello, round_trip)
                .inspect_err(|fault| shared.counters.note_fault(ChannelRef::Control, fault));
            let _ = notes.send(Note::Reached { attempt, result });
        });
        let thread = self.spawner.spawn("mfd-redial", body).map_err(fail)?;
        self.stragglers.retain(|thread| !thread.is_finished());
        self.stragglers.push(thread);
        Ok(())
    }

    fn hello_for(&self, purpose: Purpose) -> Option<Hello> {
        let features = self.agreement.map(|agreement| agreement.features);
        Some(match purpose {
            Purpose::Start => Hello::start(self.id, self.needed(), self.wanted())
                .with_pass(self.shared.config.pass()),
            Purpose::Resume => Hello::resume(self.id, self.secret?, features?),
            Purpose::Ask => Hello::ask(self.id, self.secret?),
        })
    }

    /// The features that this side can't do without.
    pub(super) fn needed(&self) -> Features {
        let devices = if self.device_set.is_empty() {
            Features::NONE
        } else {
            Features::DEVICE_STATE
        };
        // SPEC: FEAT-7
        match self.timeline.guest {
            GuestState::Running => devices,
            GuestState::Paused => devices.union(Features::PAUSED),
        }
    }

    /// The features that this side would like.
    pub(super) fn wanted(&self) -> Features {
        let comes_back = if self.shared.config.reconnect().is_zero() {
            Features::NONE
        } else {
            Features::RESUME
        };
        comes_back.union(Features::PAUSED).without(self.needed())
    }

    /// Begins to dial.
    pub(super) fn go_back(&mut self, purpose: Purpose, until: Duration) {
        let now = self.shared.now();
        self.back = Some(Back {
            purpose,
            redial: Redial::at_once(now, until),
            dialling: false,
        });
    }

    /// An attempt has ended.
    pub(super) fn reached(&mut self, attempt: u32, result: Result<Reached, Fault>) {
        let now = self.shared.now();
        let Some(back) = self.back.as_mut().filter(|_| attempt == self.attempt) else {
            // Nobody waits for it any more; a channel is closed by being dropped.
            return;
        };
        back.dialling = false;
        let purpose = back.purpose;
        match result {
            Ok(Reached::Control(opened)) => {
                self.back = None;
                self.shared.counters.attempts.store(0, Relaxed);
                if let Err(error) = self.take_control(opened) {
                    return self.drive(Event::Failed(error));
                }
                if purpose == Purpose::Resume {
                    self.drive(Event::Reconnected);
                }
            }
            Ok(Reached::Answer(state)) => {
                let _ = back.redial.failed(now);
                self.drive(Event::Answered(state));
            }
            // SPEC: RESUME-1, RESUME-3
            Err(Fault::Refused { reason, text })
                if matches!(
                    reason,
                    Reason::WrongSession | Reason::BadTicket | Reason::Feature
                ) && purpose != Purpose::Start =>
            {
                self.back = None;
                let fault = Fault::DestinationLost { reason, text };
                let error = Error::new(self.session.phase(), fault).at(ChannelRef::Control);
                self.drive(Event::Forgotten(error));
            }
            Err(fault) if purpose == Purpose::Start => {
                let error = Error::new(Phase::Hello, fault).at(ChannelRef::Control);
                self.drive(Event::Failed(error));
            }
            Err(fault) => {
                let next = back.redial.failed(now);
                let pause = match next {
                    Next::In(pause) => pause,
                    // The session's own deadline ends it in this moment.
                    Next::GiveUp => Duration::ZERO,
                };
                tracing::debug!(%fault, ?pause, "the destination can't be reached yet");
                let error = Error::new(Phase::Suspended, fault).at(ChannelRef::Control);
                self.session.hindered(error);
            }
        }
    }

    /// Makes this the control channel.
    pub(super) fn take_control(&mut self, opened: Open) -> Result<(), Error> {
        tracing::info!(channel = %opened.description, session = ?self.id, "control channel open");
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
        self.agreement = Some(opened.agreement);
        self.grant = None;
        let features = opened.agreement.features;
        self.session
            .connected(features, opened.round_trip, self.shared.now());
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
        self.timeline.suspended();
        stuck
    }

    /// Everything as at the beginning, for a destination that has nothing.
    pub(super) fn start_afresh(&mut self) -> Result<(), Error> {
        let fail = |fault: Fault| Error::new(Phase::Hello, fault);
        let mut id = [0u8; 16];
        getrandom::fill(&mut id).map_err(|e| {
            fail(Fault::System {
                step: "random numbers",
                source: std::io::Error::other(e),
            })
        })?;
        self.id = SessionId::new(id);
        self.lanes.clear();
        self.start_devices_over()?;
        self.secret = None;
        self.agreement = None;
        // Nothing is at the destination any more, also if this attempt gets no further than to dial.
        self.mismatches.leave_open(&self.shared.dirty);
        self.mismatches = Mismatches::new(&self.shared.dirty);
        self.mark_first_round()?;
        // SPEC: DIGEST-5
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
        let until = self.shared.now() + self.shared.config.hello_deadline();
        self.go_back(Purpose::Start, until);
        Ok(())
    }

    /// Echoes the stamp that the destination sent behind RUNNING, so that it knows that nobody will ask it (SPEC: RUNNING-2).
    pub(super) fn say_goodbye(&mut self) {
        let until = Instant::now() + GOODBYE_MAX;
        while self.control.is_some() && !self.control_lost {
            match self.next_note(until.saturating_duration_since(Instant::now())) {
                Ok(Note::Frame {
                    epoch,
                    header,
                    table,
                }) if epoch == self.epoch => {
                    if let Ok(Frame::KeepAlive(asked)) = Frame::decode(&header, &table)
                        && let Some(answer) = self.session.answers(&asked, self.shared.now())
                    {
                        let _ = self.try_send(answer);
                        return;
                    }
                }
                Ok(Note::ControlLost { epoch, .. }) if epoch == self.epoch => {
                    self.control_lost = true;
                }
                Ok(Note::LaneUp { closer, .. }) => closer.shutdown(),
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }

    /// It is over while there was no channel: the destination keeps the guest's memory for a source that will not come, and is told so
    /// if it can be reached at once. Otherwise it frees everything after its own deadline (SPEC: RESUME-3).
    pub(super) fn last_word(&mut self, error: &Error) {
        let gone = matches!(
            error.fault(),
            Fault::NotReconnected { .. }
                | Fault::DestinationLost { .. }
                | Fault::NotCommitted { .. }
        );
        if self.control.is_some() || !self.session.is_kept() || gone {
            return;
        }
        let until = Instant::now() + LAST_WORD_MAX;
        let mut dialling = self.back.take().is_some_and(|back| back.dialling);
        while Instant::now() < until {
            if !dialling {
                self.attempt += 1;
                if self.dial_back(Purpose::Resume).is_err() {
                    return;
                }
                dialling = true;
            }
            match self.inbox.recv_deadline(until) {
                Ok(Note::Reached { attempt, result }) if attempt == self.attempt => match result {
                    Ok(Reached::Control(opened)) => return say_last_word(opened, error, until),
                    // It keeps nothing any more.
                    Err(Fault::Refused { .. }) => return,
                    _ => {
                        dialling = false;
                        std::thread::sleep(LAST_WORD_PAUSE);
                    }
                },
                Ok(Note::LaneUp { closer, .. }) => closer.shutdown(),
                Ok(_) => {}
                Err(_) => return,
            }
        }
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

/// Says why it is over on a channel that was opened for nothing else, and lets the destination close it.
fn say_last_word(opened: Open, error: &Error, until: Instant) {
    let Open { mut tx, mut rx, .. } = opened;
    tx.set_deadline(Some(until));
    rx.set_deadline(Some(until));
    let text = error.fault().to_string();
    let text = Text::<TEXT_BYTES_MAX>::clip(&text);
    let mut control = ControlSender::new(tx);
    let said = control.send(Abort {
        reason: error.reason(),
        phase: error.phase(),
        channel: error.channel(),
        text: text.as_str(),
    });
    match said {
        Ok(()) => {
            let _ = control.half().finish();
            let _ = rx.drain(64 << 10);
        }
        Err(fault) => tracing::debug!(%fault, "the destination could not be told"),
    }
}
