//! The thread of one data channel at the source: takes pages, tests, sums and sends them.
//!
//! Per page: one look for "all zero" that ends at the first other byte, one pass for the checksum, and the kernel's copy
//! out of guest memory while the page is still in the cache. Nothing is allocated per page and no lock is taken per page.
//! What it must never do: let go of a page that is neither in the ledger nor back in the dirty set ([`Unsent`]).

mod items;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use multifd_tracking::Run;
use multifd_transport::{ChannelError, IoSource, SendHalf};
use multifd_wire::digest::page_value;
use multifd_wire::frame::{Pages, RawRun, Zeros};
use multifd_wire::limits::{RUNS_PER_PAGES_MAX, RUNS_PER_ZEROS_MAX};
use multifd_wire::{Body, Frame, PAGE_BYTES_U64, PageRun, Round, Sequence};
use zerocopy::byteorder::little_endian::U32;

use super::link::failed;
use super::work::{RoundWork, Sorted, Unsent};
use super::{LaneState, Note, Shared, lock, thread_cpu};
use crate::error::Fault;
use crate::pacer::Look;
use crate::speed::should_take;

/// Frames a lane may have sent and not acknowledged. At 256 KiB a frame this is 1 GiB, far more than sockets hold: it
/// bounds the ledger against a receiver that reads but never acknowledges.
pub(super) const UNACKED_FRAMES_MAX: u64 = 4096;

/// Zero pages are told in frames of at most this many, so that they are acknowledged as they go.
const ZERO_PAGES_PER_FRAME_MAX: u64 = 1 << 16;

/// How often a wait checks whether the migration is over.
const STOP_POLL: Duration = Duration::from_millis(10);

/// How often an idle lane without a token checks whether there is an item all the same.
const TOKEN_POLL: Duration = Duration::from_millis(100);

/// How often a lane that leaves the round's pages to others checks how far they are.
const ROUND_POLL: Duration = Duration::from_millis(5);

/// How soon it does so for the first time.
const FIRST_WAIT: Duration = Duration::from_micros(100);

/// How long a slow lane leaves the pages to faster ones at most.
const REFUSES_MAX: Duration = Duration::from_millis(500);

/// What the control thread asks of a lane.
#[derive(Debug)]
pub(super) enum LaneCommand {
    /// Take part in a round until nothing is left of it, then end it with a mark.
    Round {
        work: Arc<RoundWork>,
        round: Round,
        last: bool,
        /// Earlier rounds that this lane was not part of and that the destination may not have closed yet, and whether the
        /// guest was paused in them: they are ended first, empty (SPEC: ROUND-6).
        behind: Vec<(Round, bool)>,
    },
}

/// Serves one lane until its channel dies or the migration ends. The result says why it ended, if not in peace.
pub(super) fn serve(
    shared: &Shared,
    state: &LaneState,
    tx: Box<dyn SendHalf>,
    commands: &Receiver<LaneCommand>,
    notes: &Sender<Note>,
) -> Result<(), Fault> {
    let mut feeder = Feeder::new(shared, state, tx);
    loop {
        // Between rounds items of devices go out as they come (SPEC: DEVSTREAM-7).
        let command = crossbeam_channel::select! {
            recv(commands) -> command => match command {
                Ok(command) => Some(command),
                Err(_) => return Ok(()),
            },
            recv(shared.devices.queue.tokens()) -> _ => None,
            default(TOKEN_POLL) => None,
        };
        match command {
            Some(LaneCommand::Round {
                work,
                round,
                last,
                behind,
            }) => {
                for (round, last) in behind {
                    feeder.end_empty(round, last)?;
                }
                feeder.round(&work, round, last, notes)?;
            }
            None => {
                feeder.check_stop()?;
                feeder.item()?;
            }
        }
        shared.counters.add_cpu(thread_cpu(&mut feeder.cpu));
    }
}

struct Feeder<'s> {
    shared: &'s Shared,
    state: &'s LaneState,
    tx: Box<dyn SendHalf>,
    head: Vec<u8>,
    raw_runs: Vec<RawRun>,
    checksums: Vec<U32>,
    cpu: Duration,
}

/// Since when a lane has left the pages of a round to others, and how many there were then.
struct Refused {
    since: Instant,
    pages_left: u64,
    /// How long it waits before it looks again. Short at first: two lanes that looked at the same moment may each have left the pages
    /// to the other.
    wait: Duration,
}

impl Refused {
    fn next_wait(&mut self) -> Duration {
        let wait = self.wait;
        self.wait = (wait * 2).min(ROUND_POLL);
        wait
    }
}

impl<'s> Feeder<'s> {
    fn new(shared: &'s Shared, state: &'s LaneState, tx: Box<dyn SendHalf>) -> Self {
        Self {
            shared,
            state,
            tx,
            head: Vec::with_capacity(8192),
            raw_runs: Vec::new(),
            checksums: Vec::new(),
            cpu: Duration::ZERO,
        }
    }

    /// Ends a round in which this lane has no part.
    fn end_empty(&mut self, round: Round, last: bool) -> Result<(), Fault> {
        self.with_lane(|lane| lane.begin_round(round, last))?;
        let (mark, sequence) = self.with_lane(crate::lane::Lane::end_round)?;
        self.head.clear();
        Frame::from(mark).encode(sequence, Body::None, &mut self.head)?;
        self.tx.send(&self.head, &[]).map_err(failed)
    }

    fn round(
        &mut self,
        work: &RoundWork,
        round: Round,
        last: bool,
        notes: &Sender<Note>,
    ) -> Result<(), Fault> {
        self.with_lane(|lane| lane.begin_round(round, last))?;
        // The end mark follows whatever is sent below, and is sent without delay. Not so while devices are read with the guest
        // paused: what follows may take them a while, and the destination waits for the last bytes of each chunk.
        self.tx
            .set_more(!(last && self.shared.devices.queue.is_used()));
        let mut unsent = Unsent::new(self.shared.dirty.clone());
        let shared = self.shared;
        let mut permit = None;
        let mut ahead = 0;
        let mut refused = None;
        loop {
            self.check_stop()?;
            self.items(last, &mut ahead)?;
            permit = permit.or_else(|| shared.permits.acquire(last));
            if permit.is_none() {
                // It has only devices to serve.
                ahead = 0;
                self.check_stop()?;
                let served = !self.shared.devices.queue.has_item();
                if work.wait_until_taken(if served { ROUND_POLL } else { Duration::ZERO }) {
                    break;
                }
                self.shared.permits.observe(Instant::now());
                continue;
            }
            let Some(pages) = self.share(work, &mut refused) else {
                // The others will be done with all of it before this lane would be with one frame more.
                (permit, ahead) = (None, 0);
                self.check_stop()?;
                let wait = refused.as_mut().map_or(ROUND_POLL, Refused::next_wait);
                if work.wait_until_taken(wait) {
                    break;
                }
                continue;
            };
            let left = work.take(&mut unsent.extent, pages);
            self.shared.counters.round_pages_left.store(left, Relaxed);
            if unsent.extent.is_empty() {
                break;
            }
            let pages: u64 = unsent.extent.iter().map(|run| run.count).sum();
            ahead = ahead.saturating_sub(pages * PAGE_BYTES_U64);
            while let Some(run) = unsent.extent.last().copied() {
                self.state.pulse.beat();
                self.sort(run, &mut unsent, round)?;
                unsent.extent.pop();
            }
            let ran = thread_cpu(&mut self.cpu);
            self.shared.counters.add_cpu(ran);
            self.shared.permits.ran(ran);
        }
        self.send_zeros(&mut unsent, round)?;
        self.send_pages(&mut unsent, round)?;
        if last {
            self.rest_of_devices()?;
        }
        let (mark, sequence) = self.with_lane(crate::lane::Lane::end_round)?;
        // Before the mark is sent: a slow lane must not keep the others from beginning the next round (SPEC: ROUND-2 needs
        // only that what this lane sends of the round was taken from memory before).
        let _ = notes.send(Note::LaneEncoded {
            lane: self.state.id,
            incarnation: self.state.incarnation,
            round,
        });
        self.tx.set_more(false);
        self.head.clear();
        Frame::from(mark).encode(sequence, Body::None, &mut self.head)?;
        self.tx.send(&self.head, &[]).map_err(failed)
    }

    /// How many pages this lane should take at once of what is left; `None` while it had better take none.
    fn share(&self, work: &RoundWork, refused: &mut Option<Refused>) -> Option<u64> {
        let on_its_way = lock(&self.state.lane)
            .as_ref()
            .map_or(0, crate::lane::Lane::unacked_octets);
        let whole = work.extent_pages();
        let pages_left = work.left();
        let mut loads = lock(&self.shared.loads);
        let Some(own) = loads.now(self.state.id, on_its_way) else {
            return Some(whole);
        };
        let left = (pages_left * PAGE_BYTES_U64) as f64;
        let fits = |pages: u64| {
            let bytes = (pages * PAGE_BYTES_U64) as f64;
            should_take(own, loads.all(), left, bytes)
        };
        let sizes = [whole, self.shared.config.body_pages().min(whole)];
        let fitting = sizes.into_iter().find(|pages| fits(*pages));
        if fitting.is_some() {
            *refused = None;
            return fitting;
        }
        let before = refused.get_or_insert_with(|| Refused {
            since: Instant::now(),
            pages_left,
            wait: FIRST_WAIT,
        });
        if before.since.elapsed() <= REFUSES_MAX {
            return None;
        }
        // Speeds may be old news: a lane that stands still may have been fast. One frame at a time finds out: what is on its way
        // when the guest is paused is waited for. Unless nobody takes any: devices may keep each lane busy for good.
        let nobody_takes = self.shared.devices.queue.is_used() && before.pages_left <= pages_left;
        *refused = None;
        (on_its_way == 0 || nobody_takes).then_some(sizes[1])
    }

    /// Sorts the pages of one run into zeros and content, and sends frames as they fill up.
    fn sort(&mut self, run: Run, unsent: &mut Unsent, round: Round) -> Result<(), Fault> {
        for page in run.first..run.first + run.count {
            let Ok(span) =
                self.shared
                    .memory
                    .span(run.region, page * PAGE_BYTES_U64, PAGE_BYTES_U64)
            else {
                return Err(Fault::Internal {
                    what: format!("the dirty set and guest memory disagree about {run:?}"),
                });
            };
            if span.is_zero() {
                unsent.sort_first(Sorted::Zero);
                if unsent.zeros.runs() >= RUNS_PER_ZEROS_MAX
                    || unsent.zeros.pages() >= ZERO_PAGES_PER_FRAME_MAX
                {
                    self.send_zeros(unsent, round)?;
                }
            } else {
                if unsent.pages.is_empty() {
                    // May fail: the page is still in the extent.
                    self.tx.wait_for_room().map_err(failed)?;
                }
                self.checksums.push(U32::new(span.crc32()));
                unsent.sort_first(Sorted::Content);
                if unsent.pages.pages() >= self.shared.config.body_pages()
                    || unsent.pages.runs() >= RUNS_PER_PAGES_MAX
                {
                    self.send_pages(unsent, round)?;
                }
            }
        }
        Ok(())
    }

    fn send_pages(&mut self, unsent: &mut Unsent, round: Round) -> Result<(), Fault> {
        if unsent.pages.is_empty() {
            return Ok(());
        }
        let runs = unsent.pages.admitted(&self.shared.layout);
        let pages = unsent.pages.pages();
        let body = pages * PAGE_BYTES_U64;
        self.wait_for_turn(body)?;
        let mut values = self.checksums.iter().map(|crc| page_value(crc.get()));
        for run in &runs {
            self.shared.digest.merge(
                self.shared
                    .values
                    .replace(*run, values.by_ref().take(run.pages())),
            );
        }
        self.raw_runs.clear();
        self.raw_runs.extend(runs.iter().copied().map(RawRun::from));
        let memory = &self.shared.memory;
        let sources = runs.iter().filter_map(|run| {
            memory
                .span(run.region().value(), run.offset_bytes(), run.bytes())
                .ok()
        });
        let sources: Vec<IoSource<'_>> = sources.map(IoSource::Guest).collect();
        let frame = Frame::Pages(Pages {
            round,
            runs: &self.raw_runs,
            checksums: &self.checksums,
        });
        let octets = body + frame.head_bytes() as u64;
        let sequence = self.enter(runs, octets, crate::lane::Lane::pages)?;
        unsent.pages.clear();
        self.head.clear();
        let encoded = frame.encode(sequence, Body::Pages, &mut self.head);
        self.checksums.clear();
        encoded?;
        self.tx.send(&self.head, &sources).map_err(failed)?;
        self.count(octets, pages, 0);
        Ok(())
    }

    fn send_zeros(&mut self, unsent: &mut Unsent, round: Round) -> Result<(), Fault> {
        if unsent.zeros.is_empty() {
            return Ok(());
        }
        let runs = unsent.zeros.admitted(&self.shared.layout);
        let pages = unsent.zeros.pages();
        for run in &runs {
            self.shared.digest.merge(self.shared.values.clear(*run));
        }
        self.raw_runs.clear();
        self.raw_runs.extend(runs.iter().copied().map(RawRun::from));
        let frame = Frame::Zeros(Zeros {
            round,
            runs: &self.raw_runs,
        });
        let octets = frame.head_bytes() as u64;
        self.wait_for_turn(octets)?;
        let sequence = self.enter(runs, octets, crate::lane::Lane::zeros)?;
        unsent.zeros.clear();
        self.head.clear();
        frame.encode(sequence, Body::None, &mut self.head)?;
        self.tx.send(&self.head, &[]).map_err(failed)?;
        self.count(octets, 0, pages);
        Ok(())
    }

    fn count(&self, octets: u64, pages: u64, zero_pages: u64) {
        let counters = &self.shared.counters;
        counters.sent_bytes.fetch_add(octets, Relaxed);
        counters.content_pages.fetch_add(pages, Relaxed);
        counters.zero_pages.fetch_add(zero_pages, Relaxed);
    }

    /// Enters a frame in the ledger. From here on its pages come back if the lane dies.
    fn enter(
        &self,
        runs: Vec<PageRun>,
        octets: u64,
        how: impl FnOnce(
            &mut crate::lane::Lane,
            Vec<PageRun>,
            u64,
        ) -> Result<Sequence, crate::lane::LaneMisuse>,
    ) -> Result<Sequence, Fault> {
        self.with_lane(|lane| how(lane, runs, octets))
    }

    fn with_lane<T>(
        &self,
        f: impl FnOnce(&mut crate::lane::Lane) -> Result<T, crate::lane::LaneMisuse>,
    ) -> Result<T, Fault> {
        match lock(&self.state.lane).as_mut() {
            Some(lane) => f(lane).map_err(|misuse| Fault::Internal {
                what: format!("lane {}: {misuse}", self.state.id),
            }),
            None => Err(failed(ChannelError::ShutDown)),
        }
    }

    fn check_stop(&self) -> Result<(), Fault> {
        self.state.pulse.beat();
        if self.state.given_up.load(Relaxed) {
            return Err(failed(ChannelError::ShutDown));
        }
        self.shared.check_stop()
    }

    /// Waits for the bandwidth cap and for room in the ledger.
    fn wait_for_turn(&self, octets: u64) -> Result<(), Fault> {
        let pacer = &self.shared.pacer;
        let mut turn = pacer.book(octets, self.shared.now());
        loop {
            match pacer.look(turn, self.shared.now()) {
                Look::Now => break,
                Look::Wait(time) => std::thread::sleep(time.min(STOP_POLL)),
                Look::Void => turn = pacer.book(octets, self.shared.now()),
            }
            self.check_stop()?;
        }
        let since = Instant::now();
        while lock(&self.state.lane)
            .as_ref()
            .is_some_and(|lane| lane.unacked_frames() >= UNACKED_FRAMES_MAX)
        {
            self.check_stop()?;
            if since.elapsed() > self.shared.config.stall() {
                return Err(Fault::Timeout {
                    what: "an acknowledgement",
                });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}
