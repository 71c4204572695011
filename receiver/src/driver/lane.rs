//! The thread of one data channel at the destination: reads heads, lands bodies straight in guest memory, checks them there.
//!
//! Per page: the kernel's copy into guest memory, and one pass for the checksum while the page is still in the cache.
//! What it must never do: read past its end mark before the gate opens, or land a run that was not admitted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_channel::Sender;
use multifd_transport::{ChannelError, ReceiveHalf, Span};
use multifd_wire::frame::{Pages, Zeros};
use multifd_wire::{
    ChannelKind, ChannelRef, Frame, HEADER_BYTES, Header, Incarnation, Kind, LaneId, Misbehaved,
    PageRun, Round,
};

use super::device::{DeviceNote, Inventory};
use super::gate::Gate;
use super::link::{failed, read_head, skip_body};
use super::{Note, Shared, thread_cpu};
use crate::device::assembler::Came;
use crate::error::Fault;
use crate::landing::Landing;
use crate::lane::{Lane, Mark};

/// What a lane's thread works with.
pub(super) struct LaneThread {
    pub(super) id: LaneId,
    pub(super) incarnation: Incarnation,
    pub(super) begins: Begins,
    pub(super) shared: Arc<Shared>,
    pub(super) landing: Arc<Landing>,
    pub(super) gate: Arc<Gate>,
    /// Where items of devices go; `None` if the feature was not agreed on.
    pub(super) inventory: Option<Arc<Inventory>>,
    /// Every frame below this number was handled; read by the control thread for acknowledgements.
    pub(super) handled: Arc<AtomicU64>,
    /// Set when nobody wants anything more of this channel, which is closed then.
    pub(super) given_up: Arc<AtomicBool>,
    pub(super) notes: Sender<Note>,
}

/// Where a lane's thread begins to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Begins {
    /// In this round, which is the first of the session or of its resumption.
    With(Round),
    /// In this round, which is under way.
    Within(Round),
    /// In this round, when the gate to it opens.
    Behind(Round),
}

impl LaneThread {
    /// Reads until the channel ends or the gate sends it home; says why.
    pub(super) fn run(self, mut rx: Box<dyn ReceiveHalf>) -> Fault {
        let lane = match self.begins {
            Begins::With(round) => Lane::new(round),
            Begins::Within(round) | Begins::Behind(round) => Lane::rejoined(round),
        };
        let mut work = Work {
            table: Vec::with_capacity(8192),
            runs: Vec::new(),
            bad: Vec::new(),
            lane,
        };
        let mut cpu = Duration::ZERO;
        if let Begins::Behind(round) = self.begins
            && !self.gate.wait_for(round, &self.given_up)
        {
            return failed(ChannelError::ShutDown);
        }
        loop {
            match self.frame(&mut *rx, &mut work) {
                Ok(Step::Next) => {}
                Ok(Step::Fence { last }) => {
                    self.shared.counters.add_cpu(thread_cpu(&mut cpu));
                    let round = work.lane.round();
                    let arrived = Note::LaneArrived {
                        lane: self.id,
                        incarnation: self.incarnation,
                        round,
                        last,
                    };
                    let Some(next) = round.next() else {
                        return Fault::OutOfTurn {
                            what: "a round after the last".into(),
                        };
                    };
                    if self.notes.send(arrived).is_err()
                        || !self.gate.wait_for(next, &self.given_up)
                    {
                        return failed(ChannelError::ShutDown);
                    }
                    if let Err(error) = work.lane.gate_opened(next) {
                        return error.into();
                    }
                }
                Err(fault) => {
                    let counters = &self.shared.counters;
                    counters.add_cpu(thread_cpu(&mut cpu));
                    counters.note_fault(ChannelRef::Lane(self.id), &fault);
                    return fault;
                }
            }
        }
    }

    fn frame(&self, rx: &mut dyn ReceiveHalf, work: &mut Work) -> Result<Step, Fault> {
        rx.set_stall(Some(self.shared.config.stall()));
        let lane = &mut work.lane;
        let header = read_head(rx, &mut work.table, ChannelKind::Data, |header| {
            lane.header(header)
        })?;
        let frame = Frame::decode(&header, &work.table)?;
        let mut step = Step::Next;
        let mut complete = None;
        match frame {
            Frame::Pages(pages) => {
                self.pages(rx, &pages, &header, lane, &mut work.runs, &mut work.bad)?
            }
            Frame::Zeros(zeros) => self.zeros(&zeros, lane, &mut work.runs)?,
            Frame::RoundEnd(mark) => {
                if lane.round_end(&mark)? == Mark::Fence {
                    step = Step::Fence {
                        last: mark.final_round,
                    };
                }
            }
            Frame::DeviceChunk(chunk) => {
                let came = self.devices(header.kind())?.chunk(rx, &chunk, &header)?;
                complete = (came == Came::All).then_some(chunk.device);
            }
            Frame::DeviceMark(mark) => {
                let came = self.devices(header.kind())?.mark(&mark)?;
                complete = (came == Came::All).then_some(mark.device);
            }
            Frame::Skipped(_) => skip_body(rx, header.body_bytes()).map_err(failed)?,
            // Only kinds that the table does not let travel here.
            other => return Err(Misbehaved::Feature { kind: other.kind() }.into()),
        }
        let counters = &self.shared.counters;
        counters.octets.fetch_add(
            (HEADER_BYTES + header.table_bytes() + header.body_bytes()) as u64,
            Ordering::Relaxed,
        );
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

    /// SPEC: FEAT-4
    fn devices(&self, kind: Kind) -> Result<&Inventory, Misbehaved> {
        self.inventory
            .as_deref()
            .ok_or(Misbehaved::Feature { kind })
    }

    fn pages(
        &self,
        rx: &mut dyn ReceiveHalf,
        pages: &Pages<'_>,
        header: &Header,
        lane: &mut Lane,
        runs: &mut Vec<PageRun>,
        bad: &mut Vec<PageRun>,
    ) -> Result<(), Fault> {
        lane.pages(pages.round, pages.checksums.len() as u64)?;
        self.landing.admit(pages.runs, runs)?;
        let memory = self.landing.memory();
        let spans = runs.iter().filter_map(|run| {
            memory
                .span(run.region().value(), run.offset_bytes(), run.bytes())
                .ok()
        });
        let spans: Vec<Span<'_>> = spans.collect();
        self.landing.touch(runs);
        rx.receive_into(&spans)
            .inspect_err(|_| self.landing.cut_off(runs))
            .map_err(failed)?;
        bad.clear();
        self.landing.landed(runs, pages.checksums, bad);
        self.shared
            .counters
            .pages
            .fetch_add(pages.checksums.len() as u64, Ordering::Relaxed);
        if !bad.is_empty() {
            let pages = bad.iter().map(|run| u64::from(run.count())).sum();
            let counters = &self.shared.counters;
            counters.pages_damaged.fetch_add(pages, Ordering::Relaxed);
            counters.note_damage(ChannelRef::Lane(self.id), header.kind().name(), pages);
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
        lane: &mut Lane,
        runs: &mut Vec<PageRun>,
    ) -> Result<(), Fault> {
        let pages = zeros.page_count();
        lane.zeros(zeros.round, pages, self.landing.pages_total())?;
        self.landing.admit(zeros.runs, runs)?;
        for run in runs.iter() {
            self.landing.zeros(*run);
        }
        self.shared
            .counters
            .zero_pages
            .fetch_add(pages, Ordering::Relaxed);
        Ok(())
    }
}

/// What one frame means for the thread.
enum Step {
    Next,
    Fence { last: bool },
}

/// Buffers that are reused from frame to frame, and the machine.
struct Work {
    table: Vec<u8>,
    runs: Vec<PageRun>,
    bad: Vec<PageRun>,
    lane: Lane,
}
