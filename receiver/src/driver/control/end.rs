//! The end of a reception: the source reads why, may still ask, and every thread is waited for, as long as it may take.

use std::ops::ControlFlow;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use multifd_session::destination::{Outcome, Session};
use multifd_transport::join_within;

use super::{CLOSE_MAX, Control, Finished, Note, ms, thread_cpu};
use crate::report::Report;

impl Control {
    /// Ends the session, and the reception with it unless that waits on for the next source.
    pub(super) fn wind_up(mut self, mut outcome: Outcome) -> ControlFlow<Finished, Box<Self>> {
        let waits_on = self.waits_on(&outcome);
        self.timeline.total_ms = ms(self.now());
        if let Some(session) = &self.session {
            self.timeline.ended(session);
        }
        // The control channel first: if the lanes went first, the source would see lost lanes before it read why.
        if let Some(sender) = &mut self.link.sender {
            let _ = sender.half().finish();
        }
        self.close_control();
        if !waits_on {
            self.answer_questions();
        }
        let threads = self.lanes.end();
        self.detached.extend(threads);
        self.later.clear();
        let ended = self.join_all();
        // Dropping it stops the accept thread and closes the listeners.
        let door = self.door.take().filter(|_| waits_on && ended);
        let limit = self.shared.config.device_deadline();
        let mut vmm = self.vmm.take().and_then(|vmm| {
            vmm.give_back(limit, || {
                let note = self.inbox.try_recv();
                self.later.extend(note.ok().filter(is_of_the_vmm));
            })
        });
        // One that was given up may have run the guest after all.
        self.later
            .extend(self.inbox.try_iter().filter(is_of_the_vmm));
        while let Some(note) = self.later.pop_front() {
            self.note(note);
        }
        outcome = self.outcome.take().unwrap_or(outcome);
        let mut devices = self.take_devices_back();
        if let Some(door) = door.filter(|_| self.devices.left.is_empty())
            && let Some(machine) = vmm.take()
        {
            drop(devices);
            match self.for_next_source(machine, door) {
                Ok(next) => return ControlFlow::Continue(next),
                Err((error, machine)) => {
                    tracing::error!(%error, "there is no thread for the next source's machine");
                    (vmm, devices) = (Some(machine), Vec::new());
                }
            }
        }
        if vmm.is_none() {
            tracing::error!("the machine is not given back: the VMM's thread does not return");
        }
        self.shared.counters.add_cpu(thread_cpu(&mut self.cpu));
        self.timeline.devices_left = std::mem::take(&mut self.devices.left);
        let mut report = Report::new(&self.timeline, &outcome, &self.shared.counters.snapshot());
        let damaged = self.shared.counters.damaged();
        report.damaged = damaged.iter().map(Into::into).collect();
        let mismatched = self.shared.counters.mismatched();
        report.mismatched = mismatched.iter().map(Into::into).collect();
        let error = match outcome {
            Outcome::Running => None,
            Outcome::Failed(error) | Outcome::Stranded(error) => Some(error),
        };
        // Unread messages live until the last sender is dropped, and every handle has one: a channel in them would stay open, and guest
        // memory mapped.
        self.inbox.try_iter().for_each(drop);
        ControlFlow::Break(Finished {
            report,
            error,
            vmm,
            devices,
        })
    }

    /// Waits a moment for the source to close, so that what it was told is not destroyed by our own close.
    fn close_control(&mut self) {
        let until = Instant::now() + CLOSE_MAX;
        while self.link.reader.is_some() && !self.link.lost && Instant::now() < until {
            match self.inbox.recv_deadline(until) {
                Ok(note) => self.note(note),
                Err(_) => break,
            }
        }
        if let Some(closer) = &self.link.closer {
            closer.shutdown();
        }
        self.detached.extend(self.link.reader.take());
    }

    /// The source may still have to ask how it went.
    fn answer_questions(&mut self) {
        while let Some(until) = self.session.as_ref().and_then(Session::remembers_until) {
            let left = until.saturating_sub(self.now());
            let note = match self.later.pop_front() {
                Some(note) => Ok(note),
                None => self.inbox.recv_timeout(left),
            };
            match note {
                Ok(Note::Cancel) | Err(_) => break,
                Ok(note) => self.note(note),
            }
            if self.shared.cancelled.load(Ordering::Relaxed) || left.is_zero() {
                break;
            }
        }
        // An answer is on its way while a greeter lives; if this process ended now it would be lost.
        let until = Instant::now() + self.shared.config.hello_deadline();
        let answered = self.session.as_ref().is_some_and(Session::was_answered);
        let busy = || self.shared.greeters.load(Ordering::Acquire) > 0;
        while answered && busy() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Threads of channels that are closed end by themselves; notes are read meanwhile so that none blocks on them.
    /// False if one does not.
    fn join_all(&mut self) -> bool {
        let mut ended = true;
        let until = Instant::now() + self.shared.config.device_deadline();
        for thread in std::mem::take(&mut self.detached) {
            let left = until.saturating_duration_since(Instant::now());
            let joined = join_within(thread, left, || {
                let note = self.inbox.recv_timeout(Duration::from_millis(1));
                self.later.extend(note.ok().filter(is_of_the_vmm));
            });
            if let Err(thread) = joined {
                let thread = thread.thread().name().unwrap_or("a thread").to_owned();
                tracing::error!(%thread, "a thread does not end: it is left alone");
                ended = false;
            }
        }
        ended
    }
}

fn is_of_the_vmm(note: &Note) -> bool {
    matches!(note, Note::Vmm(_))
}
