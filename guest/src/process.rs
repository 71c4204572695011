//! The guest without KVM: threads of this process do the machine's work on the same memory.
//!
//! Layout, stamps, logs, pace and check are those of the machine; only the processor differs. A thread rests between
//! two stores, never inside one. The record of one virtual CPU in a state is 24 bytes:
//!
//! ```text
//!   0 u32 index    4 u32 reserved (0)    8 u64 counter    16 u64 reserved (0)
//! ```
//!
//! **Tracking** is by userfaultfd ([`ProcessSource`]), which sees the threads' plain stores; or, where that is not offered
//! or not wanted, by the writers themselves. A writer stores first and marks second; a collection takes the marks
//! first, and pages are read later. A mark that a collection misses belongs to a store that a later one reports; a mark
//! that it sees follows its store, so that whoever reads the page reads that store. The other order would lose the
//! store between mark and read.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use multifd_tracking::process::{MappedRange, ProcessSource};
use multifd_tracking::{CollectPhase, Collected, Collection, DirtySet, Figures, Source};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::codec::{Reader, put};
use crate::config::Tracking;
use crate::crew::{Crew, Threads};
use crate::error::Result;
use crate::gate::Order;
use crate::guest::{Engine, Kind, Plan};
use crate::layout::{self, HEADER_COUNTER_WORD};
use crate::memory::Memory;
use crate::pace::Pace;
use crate::program::{LastStore, Progress};
use crate::workload::Share;

/// Pages in one word of marks.
const MARKS_PER_WORD: u64 = 64;

/// The engine of a process guest.
#[derive(Debug)]
pub(crate) struct ProcessGuest {
    plan: Arc<Plan>,
    writers: Arc<[Writer]>,
    memory: Memory,
    way: Way,
    threads: Threads,
}

/// How the threads' writes are learnt.
#[derive(Clone, Debug)]
enum Way {
    /// By the kernel.
    Userfault,
    /// By the threads' own marks, and why not by the kernel if that was wanted.
    Marks {
        marks: Arc<Marks>,
        note: Option<String>,
    },
}

/// What a thread's processor would hold in registers.
#[derive(Debug, Default)]
struct Writer {
    counter: AtomicU64,
}

/// One bit for each page, set by writers and taken by the source.
#[derive(Debug)]
struct Marks {
    words: Box<[AtomicU64]>,
    /// Pages of each region, in order.
    regions: Vec<u64>,
}

#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct RawWriter {
    index: u32,
    reserved: u32,
    counter: u64,
    reserved_too: u64,
}

impl ProcessGuest {
    /// The engine, all its threads resting.
    ///
    /// # Errors
    /// [`Error::Kernel`](crate::Error::Kernel) if a thread cannot be made, [`Error::Tracking`](crate::Error::Tracking) if
    /// userfaultfd is demanded and not offered.
    pub(crate) fn new(plan: &Arc<Plan>, memory: &Memory, crew: &Arc<Crew>) -> Result<Self> {
        let writers: Arc<[Writer]> = plan
            .layout
            .shares
            .iter()
            .map(|_| Writer::default())
            .collect();
        let offered = || ProcessSource::new(Vec::new()).map(|_| ());
        let way = Way::choose(plan.config.tracking, offered, memory)?;
        let mut threads = Threads::new(crew);
        for vcpu in 0..plan.config.vcpus {
            let work = Work {
                vcpu,
                plan: Arc::clone(plan),
                crew: Arc::clone(crew),
                memory: memory.clone(),
                writers: Arc::clone(&writers),
                marks: way.marks(),
            };
            threads.spawn(None, move || work.run())?;
        }
        Ok(Self {
            plan: Arc::clone(plan),
            writers,
            memory: memory.clone(),
            way,
            threads,
        })
    }
}

impl Engine for ProcessGuest {
    fn kind(&self) -> Kind {
        Kind::Process
    }

    fn tracking(&self) -> Tracking {
        match self.way {
            Way::Userfault => Tracking::Userfault,
            Way::Marks { .. } => Tracking::Marks,
        }
    }

    fn tracking_note(&self) -> Option<String> {
        match &self.way {
            Way::Userfault => None,
            Way::Marks { note, .. } => note.clone(),
        }
    }

    fn tracking_source(&self) -> Result<Box<dyn Source>> {
        let Some(marks) = self.way.marks() else {
            let ranges = self.memory.regions().iter().zip(0..);
            let ranges = ranges.map(|(region, index)| MappedRange {
                region: index,
                first: 0,
                address: region.host.addr().get() as u64,
                pages: region.bytes / crate::config::PAGE_BYTES,
            });
            return Ok(Box::new(ProcessSource::new(ranges.collect())?));
        };
        Ok(Box::new(MarksSource {
            marks,
            tracking: false,
            figures: Figures::default(),
        }))
    }

    fn kick(&self) {
        self.threads.kick();
    }

    fn save(&self, records: &mut Vec<u8>) -> Result<()> {
        for (writer, index) in self.writers.iter().zip(0..) {
            let counter = writer.counter.load(Ordering::Acquire);
            put(
                records,
                &RawWriter {
                    index,
                    reserved: 0,
                    counter,
                    reserved_too: 0,
                },
            );
        }
        Ok(())
    }

    fn load(&self, mut reader: Reader<'_>) -> Result<Vec<u64>> {
        let mut counters = Vec::new();
        for index in 0..self.plan.config.vcpus {
            let raw: RawWriter = reader.take()?;
            reader.expect("vCPU index", raw.index, index)?;
            reader.expect("reserved field", (raw.reserved, raw.reserved_too), (0, 0))?;
            counters.push(raw.counter);
        }
        reader.finish()?;
        for (writer, counter) in self.writers.iter().zip(&counters) {
            writer.counter.store(*counter, Ordering::Release);
        }
        Ok(counters)
    }

    fn progress(&self) -> Result<Vec<std::result::Result<Progress, String>>> {
        let progress = |(writer, share): (&Writer, &Share)| {
            let counter = writer.counter.load(Ordering::Acquire);
            let header = if share.batch == 0 {
                0
            } else {
                counter - counter % share.batch
            };
            Ok(Progress {
                counter,
                last_store: LastStore::Done,
                header,
            })
        };
        Ok(self
            .writers
            .iter()
            .zip(&self.plan.layout.shares)
            .map(progress)
            .collect())
    }
}

impl Way {
    /// What `wanted` comes to, given whether the kernel offers the better way.
    fn choose(
        wanted: Tracking,
        offered: impl FnOnce() -> std::result::Result<(), multifd_tracking::Error>,
        memory: &Memory,
    ) -> Result<Self> {
        let marks = |note| Self::Marks {
            marks: Arc::new(Marks::new(memory)),
            note,
        };
        if wanted == Tracking::Marks {
            return Ok(marks(None));
        }
        match offered() {
            Ok(()) => Ok(Self::Userfault),
            Err(error) if wanted == Tracking::Userfault => Err(error.into()),
            Err(error) => Ok(marks(Some(error.to_string()))),
        }
    }

    fn marks(&self) -> Option<Arc<Marks>> {
        match self {
            Self::Userfault => None,
            Self::Marks { marks, .. } => Some(Arc::clone(marks)),
        }
    }
}

/// What one thread works with.
struct Work {
    vcpu: u32,
    plan: Arc<Plan>,
    crew: Arc<Crew>,
    memory: Memory,
    writers: Arc<[Writer]>,
    marks: Option<Arc<Marks>>,
}

impl Work {
    fn run(self) {
        let share = &self.plan.layout.shares[self.vcpu as usize];
        while self.crew.gate.rest(self.vcpu) == Order::Run {
            let mut pace = Pace::new(share.batch_ns, Instant::now());
            while self.crew.gate.may_run() {
                if self.step(share) == Step::BatchEnded {
                    let due = pace.batch_ended(Instant::now(), self.crew.throttle());
                    self.crew.gate.wait_until(due);
                }
            }
        }
    }

    /// One store, or one heart-beat of an idle guest. When it returns, memory and counter agree.
    fn step(&self, share: &Share) -> Step {
        let counter = &self.writers[self.vcpu as usize].counter;
        let stamp = counter.load(Ordering::Relaxed).wrapping_add(1);
        if share.batch > 0 {
            let page = share.page_of(stamp);
            self.store(share.log_page, page, stamp);
            self.store(
                share.first_page + page,
                layout::stamp_word(self.vcpu) as u64,
                stamp,
            );
        }
        let batch_ended = stamp.checked_rem(share.batch).unwrap_or(0) == 0;
        if batch_ended && share.batch > 0 {
            self.store(
                self.plan.layout.header_page(self.vcpu),
                HEADER_COUNTER_WORD as u64,
                stamp,
            );
        }
        counter.store(stamp, Ordering::Release);
        if !batch_ended {
            return Step::Stored;
        }
        self.crew.beats[self.vcpu as usize].report(stamp);
        Step::BatchEnded
    }

    /// Stores `value` in the word `word` counted from the start of page `page`, then marks its page if nobody else finds it.
    fn store(&self, page: u64, word: u64, value: u64) {
        let page = page + word / layout::PAGE_WORDS as u64;
        self.memory
            .word(page, word % layout::PAGE_WORDS as u64)
            .store(value, Ordering::Relaxed);
        if let Some(marks) = &self.marks {
            marks.mark(page);
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Stored,
    BatchEnded,
}

impl Marks {
    fn new(memory: &Memory) -> Self {
        let words = memory.pages().div_ceil(MARKS_PER_WORD);
        let regions = memory
            .regions()
            .iter()
            .map(|region| region.bytes / crate::config::PAGE_BYTES)
            .collect();
        Self {
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
            regions,
        }
    }

    fn mark(&self, page: u64) {
        // Release: whoever takes the mark sees the store before it.
        self.words[(page / MARKS_PER_WORD) as usize]
            .fetch_or(1 << (page % MARKS_PER_WORD), Ordering::Release);
    }

    /// Takes all marks. Taking is what re-arms: a store after it leaves a new mark.
    fn take(&self) -> Collected {
        let mut collected = Collected::new();
        let mut words = self.words.iter();
        for (pages, region) in self.regions.iter().zip(0..) {
            // All regions but the last are whole words long: 3 GiB.
            for (word, index) in words
                .by_ref()
                .take(pages.div_ceil(MARKS_PER_WORD) as usize)
                .zip(0..)
            {
                if word.load(Ordering::Relaxed) != 0 {
                    collected.push_bits(region, index, word.swap(0, Ordering::AcqRel));
                }
            }
        }
        collected
    }
}

/// The marks as a source.
struct MarksSource {
    marks: Arc<Marks>,
    tracking: bool,
    figures: Figures,
}

impl Source for MarksSource {
    fn name(&self) -> &str {
        "process-marks"
    }

    fn start(&mut self, _set: &DirtySet) -> std::result::Result<(), multifd_tracking::Error> {
        // What was written before is covered by round 0.
        drop(self.marks.take().rearm(|| Ok::<(), Infallible>(())));
        self.tracking = true;
        Ok(())
    }

    fn collect(
        &mut self,
        set: &DirtySet,
        _phase: CollectPhase,
    ) -> std::result::Result<Collection, multifd_tracking::Error> {
        if !self.tracking {
            return Err(multifd_tracking::Error::Misuse {
                what: "the guest's marks are collected only between start and stop".into(),
            });
        }
        let begun = Instant::now();
        let collected = self.marks.take();
        let reported = collected.pages();
        let Ok(rearmed) = collected.rearm(|| Ok::<(), Infallible>(()));
        let collection = Collection {
            pages: set.merge(rearmed),
            reported,
        };
        self.figures.pages += collection.pages;
        self.figures.reported += collection.reported;
        self.figures.harvests += 1;
        self.figures.resets += 1;
        self.figures.harvest_ns += begun.elapsed().as_nanos() as u64;
        Ok(collection)
    }

    fn stop(&mut self) -> std::result::Result<(), multifd_tracking::Error> {
        self.tracking = false;
        Ok(())
    }

    fn figures(&self) -> Figures {
        self.figures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused() -> std::result::Result<(), multifd_tracking::Error> {
        Err(multifd_tracking::Error::Unsupported {
            what: "tracking a process by userfaultfd: not permitted".into(),
        })
    }

    #[test]
    fn without_userfaultfd_the_threads_mark_only_if_that_was_left_open() {
        let memory = Memory::new(64 << 20).unwrap();
        let way = Way::choose(Tracking::Process, refused, &memory).unwrap();
        let Way::Marks {
            note: Some(note), ..
        } = way
        else {
            panic!("{way:?}");
        };
        assert_eq!(
            note,
            "not offered here: tracking a process by userfaultfd: not permitted"
        );
        let error = Way::choose(Tracking::Userfault, refused, &memory).unwrap_err();
        assert_eq!(error.to_string(), note);
        let asked = Way::choose(Tracking::Marks, refused, &memory).unwrap();
        assert!(matches!(asked, Way::Marks { note: None, .. }), "{asked:?}");
        let offered = Way::choose(Tracking::Auto, || Ok(()), &memory).unwrap();
        assert!(matches!(offered, Way::Userfault), "{offered:?}");
    }
}
