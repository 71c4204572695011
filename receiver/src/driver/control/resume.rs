//! Without channels and back again: closing what is left, letting the source in again, saying what landed, answering it.
//!
//! The rules it keeps: LANDED is said only when no thread of an old lane can land anything any more; a note of an old channel is
//! never taken for one of the new; and "not committed" is said only by the session that then can't be committed any more.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use multifd_session::destination::blobs::Assembler;
use multifd_wire::frame::{
    Credits, Device, GiveBack, GiveBackReason, Grant, KeepAlive, Landed, LaneMark, OutcomeState,
    RawCredit, RawLaneMark, RawRun, SwitchoverAck,
};
use multifd_wire::limits::{PAGES_PER_FRAME_MAX, RUNS_PER_GIVE_BACK_MAX};
use multifd_wire::{ChannelRef, Kind, Layout, Misbehaved, Phase, Reason, Sequence};

use super::{Control, Note, Outcome};
use crate::driver::greet::{Opened, turn_away};
use crate::driver::link::{ControlSender, failed, read_control};
use crate::error::{Error, Fault};
use crate::session::{Event, Session};

/// An acceptance is 256 octets on a channel that has carried nothing: it never waits, unless the channel is lost.
const ANSWER_MAX: Duration = Duration::from_secs(1);

impl Control {
    /// Closes every channel. The lanes' threads end with what they have read whole.
    pub(super) fn suspend(&mut self) {
        self.epoch += 1;
        if let Some(closer) = self.closer.take() {
            closer.shutdown();
        }
        self.control = None;
        self.stragglers.extend(self.reader.take());
        self.stragglers.retain(|thread| !thread.is_finished());
        for slot in &self.lanes {
            slot.give_up(&self.gate);
        }
        self.early.clear();
        // What the VMM still loads belongs to a switchover that is void.
        self.void_loads = self.loads;
        if let Some(inventory) = &self.inventory {
            inventory.memory_moves_on();
        }
        self.timeline.suspended();
    }

    /// The source is back and has shown the secret.
    pub(super) fn resuming(&mut self, mut opened: Opened) {
        if !self.session.as_ref().is_some_and(Session::may_be_resumed) {
            let refusal = (Reason::WrongSession, "this migration can't be resumed now");
            return turn_away(&self.shared, (opened.tx, opened.rx), opened.reply, refusal);
        }
        self.drive(Event::Resuming);
        self.settle_lanes();
        self.seen = super::Seen::default();
        self.configs = Assembler::new(Kind::Config, self.shared.config.blob_bytes_max());
        self.states = Assembler::new(Kind::VmState, self.shared.config.blob_bytes_max());
        opened.tx.set_deadline(Some(Instant::now() + ANSWER_MAX));
        let reply = opened.reply.take();
        let sent = reply.map_or(Ok(()), |reply| opened.tx.send(&reply.encode(), &[]));
        opened.tx.set_deadline(None);
        if let Err(error) = sent {
            let error = Error::new(Phase::Suspended, failed(error)).at(ChannelRef::Control);
            return self.drive(Event::Lost(error));
        }
        tracing::info!(channel = %opened.description, "the source is back");
        self.take_control(opened);
    }

    /// Makes this the control channel, and grants.
    pub(super) fn take_control(&mut self, opened: Opened) {
        let now = self.now();
        self.keep_alive_due = now + self.shared.config.keep_alive();
        self.ack_due = now + self.shared.config.ack_period();
        let (shared, epoch, rx) = (Arc::clone(&self.shared), self.epoch, opened.rx);
        let mut tx = opened.tx;
        tx.set_stall(Some(self.shared.config.stall()));
        self.control = Some(ControlSender::new(tx));
        self.closer = Some(opened.closer);
        self.control_lost = false;
        self.ticket = Some(opened.ticket);
        let body = Box::new(move || read_control(rx, &shared, epoch));
        match self.shared.spawner.spawn("mfd-reader", body) {
            Ok(reader) => self.reader = Some(reader),
            Err(source) => {
                return self.drive(Event::Failed(Error::new(
                    Phase::Setup,
                    Fault::System {
                        step: "start a thread",
                        source,
                    },
                )));
            }
        }
        let suspend = if opened.kept {
            self.shared.config.suspend()
        } else {
            Duration::ZERO
        };
        self.send(Grant {
            ticket: opened.ticket,
            resume_secret: opened.resume_secret,
            lanes_max: self.shared.config.lanes_max(),
            suspend_ms: u32::try_from(suspend.as_millis()).unwrap_or(u32::MAX),
            device_window_bytes: self.shared.config.device_window_bytes(),
        });
    }

    /// Waits until every thread of a lane has ended, and notes down how far its frames were handled. What else is said meanwhile
    /// is kept for later.
    fn settle_lanes(&mut self) {
        for place in 0..self.lanes.len() {
            let Some(thread) = self
                .lanes
                .get_mut(place)
                .and_then(|slot| slot.thread.take())
            else {
                continue;
            };
            while !thread.is_finished() {
                match self.inbox.recv_timeout(Duration::from_millis(1)) {
                    // LANDED says how far they got, and damaged pages are given back before it.
                    Ok(
                        Note::LaneArrived { .. } | Note::LaneEnded { .. } | Note::Damaged { .. },
                    )
                    | Err(_) => {}
                    Ok(note) => self.later.push_back(note),
                }
            }
            let _ = thread.join();
        }
        for slot in std::mem::take(&mut self.lanes) {
            let mark = slot.mark();
            // SPEC: LANDED-1
            if mark.frames > 0 {
                self.landed.insert(mark.lane, mark);
            }
        }
        self.given_up.clear();
        self.count_lanes();
    }

    /// SPEC: RESUME-6
    pub(super) fn send_landed(&mut self) -> Result<(), Error> {
        let marks: Vec<RawLaneMark> = self
            .landed
            .values()
            .copied()
            .map(RawLaneMark::from)
            .collect();
        let rounds_closed = self
            .session
            .as_ref()
            .map_or(0, |session| session.round().value());
        self.give_back_damaged()?;
        self.try_send(Landed {
            rounds_closed,
            lanes: &marks,
        })?;
        self.timeline.resumed();
        self.repeat_for_devices()
    }

    /// What was said of damaged pages on the old channel may be lost. The source has to know of them before it acts on LANDED, which
    /// covers their frames (SPEC: RESUME-10).
    fn give_back_damaged(&mut self) -> Result<(), Error> {
        // Any frame that LANDED covers will do.
        let covered: Option<LaneMark> = self.landed.values().next().copied();
        let (Some(landing), Some(mark)) = (self.landing.clone(), covered) else {
            return Ok(());
        };
        let damaged = landing.damaged_runs(PAGES_PER_FRAME_MAX as u32);
        let mut rest = damaged.as_slice();
        while !rest.is_empty() {
            let (mut runs, mut pages) = (Vec::new(), 0);
            while let Some((run, more)) = rest.split_first()
                && runs.len() < RUNS_PER_GIVE_BACK_MAX
                && pages + run.pages() <= PAGES_PER_FRAME_MAX
            {
                pages += run.pages();
                runs.push(RawRun::from(*run));
                rest = more;
            }
            self.try_send(GiveBack {
                lane: mark.lane,
                incarnation: mark.incarnation,
                sequence: Sequence::new(mark.frames.saturating_sub(1)),
                reason: GiveBackReason::Checksum,
                runs: &runs,
            })?;
        }
        Ok(())
    }

    /// What was said of devices on the old channel may be lost (SPEC: RESUME-12). Where nothing landed, nothing was said.
    fn repeat_for_devices(&mut self) -> Result<(), Error> {
        if self.landed.is_empty() {
            return Ok(());
        }
        let Some(inventory) = self.inventory.clone() else {
            return Ok(());
        };
        let credits: Vec<RawCredit> = inventory
            .credits()
            .into_iter()
            .map(RawCredit::from)
            .collect();
        if !credits.is_empty() {
            self.try_send(Credits { credits: &credits })?;
        }
        let acks: Vec<SwitchoverAck> = self.device_acks.values().copied().collect();
        acks.into_iter().try_for_each(|ack| self.try_send(ack))
    }

    /// The same table, but for the estimates in it.
    pub(super) fn same_devices(&self, first: &[Device], again: &[Device]) -> Result<(), Error> {
        let fixed = |device: &Device| Device {
            initial_bytes: 0,
            state_bytes: 0,
            ..*device
        };
        let same = first.iter().map(fixed).eq(again.iter().map(fixed));
        self.same("a table of devices", same)
    }

    /// A resume brings the set-up again: it must be the same (SPEC: RESUME-5).
    pub(super) fn same_layout(&self, layout: &Layout) -> Result<(), Error> {
        self.same("a memory layout", self.layout.as_ref() == Some(layout))
    }

    /// The same for the configuration.
    pub(super) fn same_configs(&mut self) -> Result<(), Error> {
        let phase = Phase::Setup;
        let configs = self
            .configs
            .take(self.configs.count())
            .map_err(|e: Misbehaved| Error::new(phase, e))?;
        self.same("a configuration", self.first_configs == configs)
    }

    fn same(&self, what: &'static str, same: bool) -> Result<(), Error> {
        if same {
            Ok(())
        } else {
            let fault = Fault::SetupChanged { what };
            Err(Error::new(Phase::Setup, fault).at(ChannelRef::Control))
        }
    }

    /// The source asks how it stands. The answer is the session's, or what it was when it ended.
    pub(super) fn asked(&mut self, answer: Sender<OutcomeState>) {
        self.asking = Some(answer);
        self.timeline.asked += 1;
        self.drive(Event::Asked);
        // A session that was never begun, or is over.
        self.asking = None;
    }

    /// After the end: the source may still have to ask, until it has said goodbye or was answered (SPEC: ASK-4).
    pub(super) fn linger(&mut self, outcome: &Outcome) {
        let state = match outcome {
            Outcome::Running if self.said_goodbye => return,
            Outcome::Running => OutcomeState::Running,
            Outcome::Stranded(_) => OutcomeState::FailedAfterCommit,
            // Before PREPARED the source can't have committed; and who was answered knows.
            Outcome::Failed(_) if !self.prepared || self.answered => {
                return self.see_greeters_off();
            }
            Outcome::Failed(_) => OutcomeState::NotCommitted,
        };
        let until = Instant::now() + self.shared.config.suspend();
        while !self.answered && Instant::now() < until {
            let note = match self.later.pop_front() {
                Some(note) => Ok(note),
                None => self.inbox.recv_deadline(until),
            };
            match note {
                Ok(Note::Asked { answer }) => {
                    self.timeline.asked += 1;
                    self.answered = answer.send(state).is_ok();
                }
                Ok(Note::Resuming(opened)) => {
                    let refusal = (Reason::ShuttingDown, "the migration is over: ask");
                    turn_away(&self.shared, (opened.tx, opened.rx), opened.reply, refusal);
                }
                Ok(Note::Cancel) | Err(_) => break,
                Ok(_) => {}
            }
        }
        self.see_greeters_off();
    }

    /// An answer is on its way while a greeter lives; if this process ended now it would be lost.
    fn see_greeters_off(&self) {
        let until = Instant::now() + self.shared.config.hello_deadline();
        let busy = || {
            self.shared
                .greeters
                .load(std::sync::atomic::Ordering::Acquire)
                > 0
        };
        while self.answered && busy() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Behind RUNNING goes a stamp: who echoes it has read RUNNING (SPEC: RUNNING-2). That a channel is closed proves nothing: a
    /// source that gave it up, or whatever lies on the way, closes it as well.
    pub(super) fn ask_for_goodbye(&mut self) -> Result<(), Error> {
        let stamp_us = super::micros(self.now()).max(1);
        self.goodbye_us = Some(stamp_us);
        self.try_send(KeepAlive {
            stamp_us,
            echo_us: 0,
        })
    }

    pub(super) fn note_goodbye(&mut self, echo_us: u64) {
        self.said_goodbye |= self.goodbye_us == Some(echo_us);
    }

    /// Threads of channels that were given up end by themselves; notes are read meanwhile so that none blocks on them.
    pub(super) fn join_stragglers(&mut self) {
        for thread in std::mem::take(&mut self.stragglers) {
            while !thread.is_finished() {
                let _ = self.inbox.recv_timeout(Duration::from_millis(1));
            }
            let _ = thread.join();
        }
    }
}
