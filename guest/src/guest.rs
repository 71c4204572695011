//! The guest as its users see it, whatever it is made of.
//!
//! ```text
//!   create ──────────────► paused ◄──pause── running
//!   create_empty ► empty ──load_state──┘  └──run──►┘          drop: everything ends, from anywhere
//! ```

use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use multifd_tracking::Source;

use crate::beat::Heartbeat;
use crate::check::{self, CheckReport};
use crate::codec::Reader;
use crate::config::{Config, Device, Tracking, refuse};
use crate::crew::Crew;
use crate::error::{Error, Result};
use crate::gate::Rested;
use crate::image::Image;
use crate::layout::Layout;
use crate::machine::Machine;
use crate::memory::{self, Memory};
use crate::process::ProcessGuest;
use crate::program::{Program, Progress};
use crate::state;
use crate::tracking::Rings;

/// How long a pause waits for the virtual CPUs, in milliseconds. They need microseconds, unless the host's processors
/// are all taken.
pub const PAUSE_MS_MAX: u64 = 5_000;

/// How long one signal is given before it is sent again.
const KICK_AGAIN: Duration = Duration::from_millis(10);

/// A guest: its memory, its virtual CPUs, and the proof that nothing was lost.
///
/// All methods may be called from any thread; those that change the phase exclude each other. Dropping it ends its
/// threads and gives everything back but the memory, which lives as long as a clone of [`memory`](Self::memory).
#[derive(Debug)]
pub struct Guest {
    plan: Arc<Plan>,
    memory: Memory,
    crew: Arc<Crew>,
    engine: Box<dyn Engine>,
    no_kvm: Option<String>,
    phase: Mutex<Phase>,
}

/// What the guest is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A machine of KVM.
    Kvm,
    /// Threads of this process.
    Process,
}

/// What is settled before anything is made.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) config: Config,
    pub(crate) layout: Layout,
    pub(crate) program: Program,
    pub(crate) rings: Rings,
}

/// Whether a fresh guest gets its image or waits for a state to be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    Image,
    Empty,
}

/// What differs between the kinds. Every call but `kick` comes while all threads rest. Dropping it ends its threads.
pub(crate) trait Engine: fmt::Debug + Send + Sync {
    /// Which kind it is.
    fn kind(&self) -> Kind;
    /// How it tracks.
    fn tracking(&self) -> Tracking;
    /// Why it does not track in the best way.
    fn tracking_note(&self) -> Option<String> {
        None
    }
    /// A new source of dirty pages.
    fn tracking_source(&self) -> Result<Box<dyn Source>>;
    /// Makes threads that run look at the gate.
    fn kick(&self);
    /// Appends the records of all virtual CPUs.
    fn save(&self, records: &mut Vec<u8>) -> Result<()>;
    /// Reads the records of all virtual CPUs and takes them over; returns their counters.
    fn load(&self, reader: Reader<'_>) -> Result<Vec<u64>>;
    /// How far each virtual CPU came.
    fn progress(&self) -> Result<Vec<std::result::Result<Progress, String>>>;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Waits for a state.
    Empty,
    /// Has the state that was loaded, and has never run it; another may take its place.
    Loaded,
    /// Has a state; all threads rest.
    Paused,
    /// Was told to run.
    Running,
}

impl Guest {
    /// A new guest with its image in memory, paused before its first instruction.
    ///
    /// # Errors
    /// [`Error::Config`] for what cannot be built, [`Error::NoKvm`] if KVM is demanded and not there,
    /// [`Error::Kernel`] for what the kernel refused, [`Error::Tracking`] for a tracking that is not offered.
    pub fn create(config: &Config) -> Result<Self> {
        Self::build(config, Origin::Image, Rings::default())
    }

    /// A guest for a destination: memory all zero and not populated, no state. `config` comes from
    /// [`Config::from_blob`]. It tracks like any other: a guest that arrived can leave again.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn create_empty(config: &Config) -> Result<Self> {
        Self::build(config, Origin::Empty, Rings::default())
    }

    /// Lets the virtual CPUs run: the first start, after a pause, or after a load. A running guest runs on.
    ///
    /// # Errors
    /// [`Error::Misuse`] before a state was loaded, [`Error::Vcpu`] if a virtual CPU failed for good.
    pub fn run(&self) -> Result<()> {
        let mut phase = self.lock_phase();
        self.refuse_failed()?;
        match *phase {
            Phase::Empty => Err(Error::Misuse {
                advice: "load a state before running an empty guest",
            }),
            Phase::Running => Ok(()),
            Phase::Paused | Phase::Loaded => {
                self.crew.gate.ask_run();
                *phase = Phase::Running;
                Ok(())
            }
        }
    }

    /// Stops the virtual CPUs. When this returns `Ok`, all are out of `KVM_RUN`, what the kernel had to complete is
    /// complete, and the memory does not change until [`run`](Self::run). Otherwise a no-op.
    ///
    /// # Errors
    /// [`Error::PauseTimeout`] after [`PAUSE_MS_MAX`]; the pause may be tried again.
    pub fn pause(&self) -> Result<()> {
        let mut phase = self.lock_phase();
        if *phase != Phase::Running {
            return Ok(());
        }
        let begun = Instant::now();
        self.crew.gate.ask_rest();
        loop {
            self.engine.kick();
            let Rested::NotYet { index } = self.crew.gate.wait_rested(KICK_AGAIN) else {
                break;
            };
            let waited_ms = begun.elapsed().as_millis() as u64;
            if waited_ms >= PAUSE_MS_MAX {
                return Err(Error::PauseTimeout {
                    vcpu: index,
                    waited_ms,
                });
            }
        }
        *phase = Phase::Paused;
        Ok(())
    }

    /// Holds so much of each virtual CPU's time back from the end of its present batch on, in percent, 99 at most; 0 releases it. Its own pace is
    /// stretched alike, so that it writes as much less as it runs less, whether or not it was at the end of its strength.
    pub fn throttle(&self, percent: u8) {
        self.crew.throttle.store(percent.min(99), Ordering::Relaxed);
    }

    /// The state of all virtual CPUs as bytes, for [`load_state`](Self::load_state) of a guest built from
    /// [`config_blob`](Self::config_blob). It does not contain the memory.
    ///
    /// # Errors
    /// [`Error::Misuse`] unless paused, [`Error::Vcpu`] if a virtual CPU failed for good, [`Error::Kernel`].
    pub fn save_state(&self) -> Result<Vec<u8>> {
        let phase = self.lock_phase();
        refuse_unless_paused(*phase)?;
        self.refuse_failed()?;
        let mut records = Vec::new();
        self.engine.save(&mut records)?;
        Ok(state::encode(self.kind(), self.plan.config.vcpus, &records))
    }

    /// Gives an empty guest the state that a source saved; it is paused afterwards. As long as it has not run, a newer state can
    /// take its place: a source that lost its link comes back with one.
    ///
    /// Everything is decoded and checked before anything is loaded.
    ///
    /// # Errors
    /// [`Error::Malformed`] for bytes that no guest saved, [`Error::Incompatible`] for those of another guest or what
    /// this host refuses, [`Error::Kernel`], [`Error::Misuse`] unless empty. The guest stays empty then.
    pub fn load_state(&self, octets: &[u8]) -> Result<()> {
        let mut phase = self.lock_phase();
        if !matches!(*phase, Phase::Empty | Phase::Loaded) {
            return Err(Error::Misuse {
                advice: "load a state into a guest made by create_empty, before it runs",
            });
        }
        let reader = state::open(octets, self.kind(), self.plan.config.vcpus)?;
        let counters = self.engine.load(reader)?;
        self.crew
            .beats
            .iter()
            .zip(counters)
            .for_each(|(beat, counter)| beat.arrive(counter));
        *phase = Phase::Loaded;
        Ok(())
    }

    /// Compares the whole memory of a paused guest with what it must be. Takes about 0.3 s for each GiB.
    ///
    /// # Errors
    /// [`Error::Misuse`] unless paused, [`Error::Kernel`]. A failed check is an `Ok` with a report that says so.
    pub fn check(&self) -> Result<CheckReport> {
        let phase = self.lock_phase();
        refuse_unless_paused(*phase)?;
        Ok(check::check(
            self.plan.image(),
            &self.memory,
            &self.engine.progress()?,
            self.plan.config.device,
        ))
    }

    /// A new source for the dirty pages of this guest's virtual CPUs. Pages are numbered inside the regions of
    /// [`memory`](Self::memory), in their order. One source at a time may be started.
    ///
    /// # Errors
    /// [`Error::Tracking`] if the kernel refuses it.
    pub fn tracking_source(&self) -> Result<Box<dyn Source>> {
        self.engine.tracking_source()
    }

    /// What a destination needs to build the same machine; see [`Config::from_blob`].
    pub fn config_blob(&self) -> Vec<u8> {
        self.plan.config.to_blob(self.kind())
    }

    /// The configuration that it was built from.
    pub fn config(&self) -> &Config {
        &self.plan.config
    }

    /// The memory.
    pub fn memory(&self) -> Memory {
        self.memory.clone()
    }

    /// What it is made of.
    pub fn kind(&self) -> Kind {
        self.engine.kind()
    }

    /// How its writes are learnt: what `Auto` came to.
    pub fn tracking(&self) -> Tracking {
        self.engine.tracking()
    }

    /// Why its writes are learnt by another way than the best, in words for the user; `None` if they are not.
    pub fn tracking_note(&self) -> Option<String> {
        self.engine.tracking_note()
    }

    /// Why it is no machine of KVM although [`Tracking::Auto`] would have made one.
    pub fn no_kvm(&self) -> Option<&str> {
        self.no_kvm.as_deref()
    }

    /// The last heart-beat of each virtual CPU. Takes no lock.
    pub fn heartbeats(&self) -> Vec<Heartbeat> {
        self.crew
            .beats
            .iter()
            .zip(0..)
            .map(|(beat, vcpu)| beat.read(vcpu))
            .collect()
    }

    /// The first virtual CPU that failed for good, as an error.
    pub fn failure(&self) -> Option<Error> {
        let failure = self.crew.gate.failure()?;
        Some(Error::Vcpu {
            vcpu: failure.index,
            detail: failure.detail,
        })
    }

    fn build(config: &Config, origin: Origin, rings: Rings) -> Result<Self> {
        let layout = Layout::new(config)?;
        let host_bytes = memory::host_bytes();
        if config.resident_bytes() > host_bytes {
            let advice = format!("this host has {host_bytes} bytes: give less, or fill less of it");
            return Err(refuse("memory_bytes", config.memory_bytes, advice));
        }
        let program = Program::new(&layout);
        let plan = Arc::new(Plan {
            config: config.clone(),
            layout,
            program,
            rings,
        });
        let memory = Memory::new(config.memory_bytes)?;
        let crew = Arc::new(Crew::new(config.vcpus));
        let (kind, no_kvm) = choose(config.tracking)?;
        let engine: Box<dyn Engine> = match kind {
            Kind::Kvm => Box::new(Machine::new(&plan, &memory, &crew, origin)?),
            Kind::Process if config.device != Device::None => {
                let advice = "no device, or a guest of KVM: threads of a process have no device";
                return Err(refuse(
                    "device",
                    format!("{:?}", config.device),
                    advice.to_owned(),
                ));
            }
            Kind::Process => Box::new(ProcessGuest::new(&plan, &memory, &crew)?),
        };
        let phase = match origin {
            Origin::Empty => Phase::Empty,
            Origin::Image => {
                plan.image().write_to(&memory);
                Phase::Paused
            }
        };
        Ok(Self {
            plan,
            memory,
            crew,
            engine,
            no_kvm,
            phase: Mutex::new(phase),
        })
    }

    fn refuse_failed(&self) -> Result<()> {
        self.failure().map_or(Ok(()), Err)
    }

    fn lock_phase(&self) -> MutexGuard<'_, Phase> {
        self.phase
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
    }
}

impl Plan {
    pub(crate) fn image(&self) -> Image<'_> {
        Image {
            layout: &self.layout,
            program: &self.program,
        }
    }
}

impl Kind {
    /// Its number in the encodings.
    pub(crate) fn code(self) -> u32 {
        match self {
            Self::Kvm => 1,
            Self::Process => 2,
        }
    }

    pub(crate) fn from_code(code: u32) -> Option<Self> {
        [Self::Kvm, Self::Process]
            .into_iter()
            .find(|kind| kind.code() == code)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "KVM",
            Self::Process => "process",
        })
    }
}

/// What kind it becomes, and why not KVM if that was only wished for.
fn choose(tracking: Tracking) -> Result<(Kind, Option<String>)> {
    match tracking {
        Tracking::Process | Tracking::Userfault | Tracking::Marks => Ok((Kind::Process, None)),
        Tracking::Kvm | Tracking::Ring | Tracking::Log => Ok((Kind::Kvm, None)),
        Tracking::Auto => match Machine::offered() {
            Ok(()) => Ok((Kind::Kvm, None)),
            Err(Error::NoKvm { reason }) => Ok((Kind::Process, Some(reason))),
            Err(error) => Err(error),
        },
    }
}

fn refuse_unless_paused(phase: Phase) -> Result<()> {
    match phase {
        Phase::Paused | Phase::Loaded => Ok(()),
        Phase::Running => Err(Error::Misuse {
            advice: "pause the guest first",
        }),
        Phase::Empty => Err(Error::Misuse {
            advice: "load a state first: the guest is empty",
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::PAGE_WORDS;
    use crate::program::LastStore;
    use multifd_tracking::{CollectPhase, DirtySet};

    #[allow(clippy::print_stderr)] // a skipped test says so
    fn kvm_or_skip(test: &str) -> bool {
        if std::path::Path::new("/dev/kvm").exists() {
            return true;
        }
        let required = std::env::var("MULTIFD_REQUIRE_KVM");
        assert_ne!(required.as_deref(), Ok("1"), "{test}: /dev/kvm missing");
        eprintln!("SKIPPED {test}: /dev/kvm missing");
        false
    }

    /// Two virtual CPUs that write 1 MiB as fast as it goes.
    fn fast(tracking: Tracking) -> Config {
        Config {
            memory_bytes: 64 << 20,
            vcpus: 2,
            working_set_bytes: 1 << 20,
            dirty_rate_bytes_per_s: u64::MAX,
            tracking,
            ..Config::default()
        }
    }

    /// Copies what a round holds, as a sender does.
    fn copy_round(set: &DirtySet, from: &Memory, to: &Memory) {
        let mut round = set.take_round();
        let mut words = [0; PAGE_WORDS];
        while let Some(run) = round.next_run(256) {
            for page in run.first..run.first + run.count {
                from.read_page(page, &mut words);
                to.write_page(page, &words);
            }
        }
    }

    /// Nobody but the vCPUs' own threads empties the rings, and each holds 1,024 entries: some 450 stores.
    #[test]
    fn a_ring_that_runs_full_is_emptied_by_its_vcpu_and_loses_nothing() {
        if !kvm_or_skip("a_ring_that_runs_full_is_emptied_by_its_vcpu_and_loses_nothing") {
            return;
        }
        let config = fast(Tracking::Ring);
        let source = Guest::build(&config, Origin::Image, Rings::that_run_full()).unwrap();
        let destination = Guest::create_empty(&config).unwrap();
        let set = DirtySet::new(&[source.memory.pages()]);
        let mut tracker = source.tracking_source().unwrap();
        source.run().unwrap();
        tracker.start(&set).unwrap();
        set.mark_all();
        copy_round(&set, &source.memory, &destination.memory);
        let begun = Instant::now();
        while tracker.figures().ring_full_soft < 100 {
            assert!(source.failure().is_none(), "{:?}", source.failure());
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "{:?}",
                tracker.figures()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        source.pause().unwrap();
        tracker.collect(&set, CollectPhase::Final).unwrap();
        copy_round(&set, &source.memory, &destination.memory);
        destination
            .load_state(&source.save_state().unwrap())
            .unwrap();
        let report = destination.check().unwrap();
        assert!(report.passed(), "{report}");
        // Each was emptied before it overflowed, so nothing had to be guessed: all came from the exits.
        let figures = tracker.figures();
        assert_eq!(
            (figures.ring_full_hard, figures.all_dirty, figures.errors),
            (0, 0, 0),
            "{figures:?}"
        );
        assert!(
            figures.reported > figures.ring_full_soft * 900,
            "{figures:?}"
        );
    }

    /// The check is exact because the instruction pointer tells how far the last store came. This test sees every one
    /// of those cases happen to a real vCPU, and the check pass in each.
    #[test]
    fn vcpus_are_stopped_in_every_part_of_a_store_and_are_whole() {
        if !kvm_or_skip("vcpus_are_stopped_in_every_part_of_a_store_and_are_whole") {
            return;
        }
        let guest = Guest::create(&fast(Tracking::Kvm)).unwrap();
        let mut seen = [0; 3];
        for pause in 0..2_000 {
            guest.run().unwrap();
            std::thread::sleep(Duration::from_micros(pause % 50));
            guest.pause().unwrap();
            for progress in guest.engine.progress().unwrap() {
                seen[match progress.unwrap().last_store {
                    LastStore::Begun => 0,
                    LastStore::Logged => 1,
                    LastStore::Done => 2,
                }] += 1;
            }
            let report = guest.check().unwrap();
            assert!(report.passed(), "{report}");
            if seen.iter().all(|times| *times >= 10) {
                return;
            }
        }
        panic!("begun, logged, done: {seen:?}");
    }
}
