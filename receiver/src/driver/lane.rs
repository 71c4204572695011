//! The thread of one data channel at the destination: reads heads, lands bodies straight in guest memory, checks them there.
//!
//! Per page: the kernel's copy into guest memory, and one pass for the checksum while the page is still in the cache.
//! What it must never do: read past its end mark before the gate opens, or land a run that was not admitted.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crossbeam_channel::Sender;
use multifd_transport::{ChannelError, ReceiveHalf, Span};
use multifd_wire::frame::{Pages, Zeros};
use multifd_wire::{
    ChannelKind, ChannelRef, Frame, HEADER_BYTES, Header, Incarnation, Kind, LaneId, Misbehaved,
    PageRun, Round,
};

use super::device::{DeviceNote, DeviceTable};
use super::gate::Gate;
use super::link::{failed, read_first, read_table, skip_body};
use super::{Note, Shared, lock, thread_cpu};
use crate::device::assembler::Came;
use crate::error::Fault;
use crate::landing::Landing;
use crate::lane::{Begins, Lane, Mark};

/// What a lane's thread works with.
pub(super) struct LaneThread {
    pub(super) id: LaneId,
    pub(super) incarnation: Incarnation,
    /// Where it begins to read; `None`: in the round with which all begin.
    pub(super) begins: Option<Begins>,
    pub(super) shared: Arc<Shared>,
    pub(super) start: Arc<Start>,
    pub(super) gate: Arc<Gate>,
    /// Every frame below this number was handled; read by the control thread for acknowledgements.
    pub(super) handled: Arc<AtomicU64>,
    /// Set when nobody wants anything more of this channel, which is closed then.
    pub(super) given_up: Arc<AtomicBool>,
    pub(super) notes: Sender<Note>,
}

/// What lanes work on, once the machine is there.
#[derive(Clone)]
pub(super) struct Work {
    /// The round with which all begin.
    pub(super) round: Round,
    pub(super) landing: Arc<Landing>,
    /// Where items of devices go; `None` if the feature was not agreed on.
    pub(super) devices: Option<Arc<DeviceTable>>,
}

/// Where lanes that joined during set-up wait for READY.
#[derive(Default)]
pub(super) struct Start {
    work: Mutex<Option<Work>>,
    changed: Condvar,
}

impl Start {
    pub(super) fn begin(&self, work: Work) {
        *lock(&self.work) = Some(work);
        self.changed.notify_all();
    }

    /// Lets lanes that were given up while they wait see it.
    pub(super) fn nudge(&self) {
        // Under the lock: a lane has either not looked yet, or waits already.
        let _work = lock(&self.work);
        self.changed.notify_all();
    }

    fn wait(&self, given_up: &AtomicBool) -> Option<Work> {
        let waits = |work: &mut Option<Work>| work.is_none() && !given_up.load(Ordering::Relaxed);
        let work = self
            .changed
            .wait_while(lock(&self.work), waits)
            .unwrap_or_else(PoisonError::into_inner);
        work.clone().filter(|_| !given_up.load(Ordering::Relaxed))
    }
}

impl LaneThread {
    /// Reads until the channel ends or is given up; says why.
    pub(super) fn run(self, mut rx: Box<dyn ReceiveHalf>) -> Fault {
        let mut cpu = Duration::ZERO;
        let fault = match self.read(&mut *rx, &mut cpu) {
            Ok(()) => failed(ChannelError::ShutDown),
            Err(fault) => fault,
        };
        let counters = &self.shared.counters;
        counters.add_cpu(thread_cpu(&mut cpu));
        counters.note_fault(ChannelRef::Lane(self.id), &fault);
        // What it carried may come again.
        if let Some(devices) = lock(&self.start.work)
            .as_ref()
            .and_then(|work| work.devices.as_ref())
        {
            devices.lane_lost();
        }
        fault
    }

    /// Until it is given up.
    fn read(&self, rx: &mut dyn ReceiveHalf, cpu: &mut Duration) -> Result<(), Fault> {
        // A channel that ends before anything is sent on it is noticed now, and not when it is needed.
        rx.set_stall(Some(self.shared.config.stall()));
        let mut first = Some(read_first(rx)?);
        let Some(work) = self.start.wait(&self.given_up) else {
            return Ok(());
        };
        let lane = match self.begins {
            None => Lane::new(work.round),
            Some(Begins::Within(round)) => Lane::rejoined(round),
            Some(Begins::Behind(round)) => {
                if !self.gate.wait_for(round, &self.given_up) {
                    return Ok(());
                }
                Lane::rejoined(round)
            }
        };
        let mut buffers = Buffers {
            table: Vec::with_capacity(8192),
            runs: Vec::new(),
            bad: Vec::new(),
            lane,
        };
        loop {
            let octets = match first.take() {
                Some(octets) => octets,
                None => read_first(rx)?,
            };
            if let Step::Fence { last } = self.frame(rx, &octets, &work, &mut buffers)? {
                self.shared.counters.add_cpu(thread_cpu(cpu));
                let round = buffers.lane.round();
                let arrived = Note::LaneArrived {
                    lane: self.id,
                    incarnation: self.incarnation,
                    round,
                    last,
                };
                let Some(next) = round.next() else {
                    let what = "a round after the last".into();
                    return Err(Fault::OutOfTurn { what });
                };
                if self.notes.send(arrived).is_err() || !self.gate.wait_for(next, &self.given_up) {
                    return Ok(());
                }
                buffers.lane.gate_opened(next)?;
            }
        }
    }

    fn frame(
        &self,
        rx: &mut dyn ReceiveHalf,
        octets: &[u8; HEADER_BYTES],
        work: &Work,
        buffers: &mut Buffers,
    ) -> Result<Step, Fault> {
        let lane = &mut buffers.lane;
        let header = read_table(
            rx,
            octets,
            &mut buffers.table,
            ChannelKind::Data,
            |header| lane.header(header),
        )?;
        let frame = Frame::decode(&header, &buffers.table)?;
        let mut step = Step::Next;
        let mut complete = None;
        match frame {
            Frame::Pages(pages) => {
                let runs = &mut buffers.runs;
                lane.pages(pages.round, pages.checksums.len() as u64)?;
                self.pages(rx, &pages, &header, &work.landing, runs, &mut buffers.bad)?
            }
            Frame::Zeros(zeros) => {
                let landing = &work.landing;
                lane.zeros(zeros.round, zeros.page_count(), landing.pages_total())?;
                self.zeros(&zeros, landing, &mut buffers.runs)?
            }
            Frame::RoundEnd(mark) => {
                if lane.round_end(&mark)? == Mark::Fence {
                    step = Step::Fence {
                        last: mark.final_round,
                    };
                }
            }
            Frame::DeviceChunk(chunk) => {
                let came = work.devices(header.kind())?.chunk(rx, &chunk, &header)?;
                complete = (came == Came::All).then_some(chunk.device);
            }
            Frame::DeviceMark(mark) => {
                let came = work.devices(header.kind())?.mark(&mark)?;
                complete = (came == Came::All).then_some(mark.device);
            }
            Frame::Skipped(_) => skip_body(rx, header.body_bytes()).map_err(failed)?,
            // Only kinds that the table does not let travel here.
            other => return Err(Misbehaved::Feature { kind: other.kind() }.into()),
        }
        let counters = &self.shared.counters;
        let octets = header.frame_bytes() as u64;
        counters.received_bytes.fetch_add(octets, Ordering::Relaxed);
        counters.frames.fetch_add(1, Ordering::Relaxed);
        // Release: whoever acknowledges this frame has seen what became of its pages.
        self.handled.store(lane.frames(), Ordering::Release);
        if let Some(device) = complete {
            // After the frame counts: it is acknowledged at once, and the source knows when all of the device was here.
            let _ = self
                .notes
                .send(Note::Device(DeviceNote::Arrived { device }));
        }
        Ok(step)
    }

    fn pages(
        &self,
        rx: &mut dyn ReceiveHalf,
        pages: &Pages<'_>,
        header: &Header,
        landing: &Landing,
        runs: &mut Vec<PageRun>,
        bad: &mut Vec<PageRun>,
    ) -> Result<(), Fault> {
        landing.admit(pages.runs, runs)?;
        let memory = landing.memory();
        let spans = runs.iter().filter_map(|run| {
            memory
                .span(run.region().value(), run.offset_bytes(), run.bytes())
                .ok()
        });
        let spans: Vec<Span<'_>> = spans.collect();
        landing.touch(runs);
        rx.receive_into(&spans)
            .inspect_err(|_| landing.cut_off(runs))
            .map_err(failed)?;
        bad.clear();
        landing.landed(runs, pages.checksums, bad);
        let counters = &self.shared.counters;
        let damaged: u64 = bad.iter().map(|run| u64::from(run.count())).sum();
        // SPEC: PAGES-6, CLOSED-1
        let landed = (pages.checksums.len() as u64).saturating_sub(damaged);
        counters.content_pages.fetch_add(landed, Ordering::Relaxed);
        if !bad.is_empty() {
            counters.note_mismatch(ChannelRef::Lane(self.id), header.kind().name(), damaged);
            // Before the frame counts as handled: the give-back must overtake its acknowledgement (SPEC: BACK-2).
            let _ = self.notes.send(Note::Damaged {
                lane: self.id,
                incarnation: self.incarnation,
                sequence: header.sequence(),
                runs: bad.clone(),
            });
        }
        Ok(())
    }

    fn zeros(
        &self,
        zeros: &Zeros<'_>,
        landing: &Landing,
        runs: &mut Vec<PageRun>,
    ) -> Result<(), Fault> {
        landing.admit(zeros.runs, runs)?;
        for run in runs.iter() {
            landing.zeros(*run);
        }
        self.shared
            .counters
            .zero_pages
            .fetch_add(zeros.page_count(), Ordering::Relaxed);
        Ok(())
    }
}

impl Work {
    /// SPEC: FEAT-4
    fn devices(&self, kind: Kind) -> Result<&DeviceTable, Misbehaved> {
        self.devices.as_deref().ok_or(Misbehaved::Feature { kind })
    }
}

/// What one frame means for the thread.
enum Step {
    Next,
    Fence { last: bool },
}

/// Buffers that are reused from frame to frame, and the machine.
struct Buffers {
    table: Vec<u8>,
    runs: Vec<PageRun>,
    bad: Vec<PageRun>,
    lane: Lane,
}
