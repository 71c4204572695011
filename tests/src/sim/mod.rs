//! The deterministic simulator: whole migrations by the real drivers of both sides, one thread at a time on simulated time, in a
//! network and with machines in which everything goes wrong that the seed says.
//!
//! ```text
//!   seed ──► plan of faults, sizes, times
//!              │
//!   sender: control, reader, lanes ──┐                    ┌── receiver: control, reader, lanes, VMM thread
//!                                    ├── Network, World ──┤
//!   guest's processor, fate ─────────┘   (schedule: who)  └── verdict: memory, owners, dirty set, reports, threads
//! ```
//! See docs/decisions/0017 for why it runs the drivers and not only the machines. [`run`] needs a program that has
//! `interpose.rs` in it; `multifd-sim` is one.

pub mod claims;
mod devices;
pub mod faults;
pub mod machine;
pub mod network;
mod oracle;
pub mod schedule;
mod stranger;
mod troubles;
pub mod world;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use multifd_guest::DeviceConfig;
use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_transport::{Channel, Spawner};
use multifd_wire::{ChannelRef, LaneId};

use self::claims::Lasted;
use self::faults::{Fault, Plan, Side, WAYS_CLOSED_IN};
use self::machine::{DestinationVmm, Machine, Notes, Pace, SourceVmm};
use self::network::Quality;
use self::schedule::Group;
use self::troubles::Troubles;
use self::world::{Scene, World};
use crate::model::Random;

/// The longest that a simulated migration may last, second attempts included. The settings' deadlines add up to less, and the
/// slowest link with a device that grows takes about half of it.
const LIMIT_NS: u64 = 600_000_000_000;

/// An acknowledgement that is not expected to be late by then.
const ACK_LATEST_MS: u64 = 60_000;

/// What is simulated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Faults of the whole table.
    #[default]
    Faults,
    /// Many flipped bits.
    Flips,
    /// No fault: every migration has to succeed.
    Calm,
}

/// How a simulated migration ended.
#[derive(Debug, Clone)]
pub struct Verdict {
    /// Its seed.
    pub seed: u64,
    /// What must never be; empty if all is well.
    pub violations: Vec<String>,
    /// Faults that happened.
    pub faults: Vec<Fault>,
    /// What came of flipped bits: of which frame, in which part, how it ended; and how many.
    pub flips: Vec<(String, u64)>,
    /// Devices of the guest.
    pub devices: usize,
    /// Devices that run at the destination with their state.
    pub devices_moved: u64,
    /// How the source says that it ended.
    pub outcome: tx::OutcomeKind,
    /// The source's error, by code.
    pub code: Option<&'static str>,
    /// Pages that came back to the source.
    pub pages_given_back: u64,
    /// Lanes that the source lost.
    pub lanes_lost: u32,
    /// Whether the guest was moved by a further attempt after a failure.
    pub second: bool,
    /// Simulated time and what it took.
    pub figures: schedule::Figures,
}

/// The command that runs a seed again, with everything that happens.
#[must_use]
pub fn replay_command(seed: u64, mode: Mode) -> String {
    let mode = match mode {
        Mode::Faults => "",
        Mode::Flips => " --flips",
        Mode::Calm => " --calm",
    };
    format!(
        "replay: cargo run --release -p multifd-tests --bin multifd-sim -- --seed {seed} --trace{mode}"
    )
}

/// What came of a flipped bit that nobody read: the connection ended before.
pub const NEVER_READ: &str = "never read";

/// What a line begins with that says in which phase, and by which name, reports have flipped bits.
pub const BY_PHASE: &str = "reported by the ";

/// The settings that a seed gives.
#[derive(Clone)]
struct Settings {
    shape: Vec<u64>,
    quality: Vec<Quality>,
    config: tx::Config,
    receiver: rx::Config,
    stall_ns: u64,
    pace: Pace,
    step_ns: u64,
    must_converge: bool,
    resumes: bool,
    devices: Vec<DeviceConfig>,
    starts_afresh: bool,
    closed: Option<ClosedWay>,
    troubles: Troubles,
    /// How long the destination may hold a machine whose source has died, in ns.
    holds_ns: u64,
}

/// A way that is closed for a while, or for good, from so long after the first pages were moved on. The lane that lives goes on living.
#[derive(Debug, Clone, Copy)]
struct ClosedWay {
    lane: LaneId,
    after_ns: u64,
    lasts_ns: u64,
}

impl ClosedWay {
    /// Of numbers of its own, so that whatever else a seed draws stays what it was.
    fn draw(seed: u64, lanes: u32) -> Option<Self> {
        let mut random = Random::new(seed ^ 0x0077_6179);
        random.next_u64();
        (lanes > 1 && random.below(WAYS_CLOSED_IN) == 0).then(|| Self {
            lane: LaneId::new(random.below(lanes.into()) as u32),
            after_ns: random.below(20_000_000),
            lasts_ns: pick(&mut random, &[50_000_000, 1_000_000_000, u64::MAX / 2]),
        })
    }
}

fn pick<T: Copy>(random: &mut Random, of: &[T]) -> T {
    of[random.below(of.len() as u64) as usize]
}

impl Settings {
    fn draw(random: &mut Random) -> Self {
        let lanes = pick(random, &[1, 2, 2, 2, 3, 3, 4]);
        let shape = pick(
            random,
            &[
                &[8][..],
                &[24],
                &[16, 24],
                &[16, 24],
                &[40, 8],
                &[40, 8],
                &[60],
                &[10, 20, 60],
                &[30, 90],
                &[160, 40],
            ],
        )
        .to_vec();
        let quality = (0..=lanes)
            .map(|_| Quality {
                capacity: pick(random, &[16 << 10, 64 << 10, 256 << 10]),
                ps_per_octet: pick(random, &[2_000, 10_000, 10_000, 50_000]),
                latency_ns: pick(random, &[100_000, 200_000, 1_000_000, 10_000_000]),
            })
            .collect();
        let stall_ms = pick(random, &[500, 1000]);
        let stall = Duration::from_millis(stall_ms);
        let keep_alive = Duration::from_millis(pick(random, &[100, 200, 240]));
        let must_converge = random.below(4) > 0;
        let reconnect_ms = pick(random, &[0, 300, 4000, 4000]);
        let suspend_ms = pick(random, &[0, 300, 8000, 8000, 8000]);
        let devices = devices::draw(random);
        // A destination that loads slowly is waited for, or not. One that never says that it has loaded, since a stranger changed
        // what it was told, would be waited for without end if there were no deadline at all.
        let ack_deadline_ms = pick(
            random,
            &[ACK_LATEST_MS, ACK_LATEST_MS, ACK_LATEST_MS, 5, 500],
        );
        let when_ack_late = if random.below(2) == 0 {
            tx::WhenAckLate::Fail
        } else {
            tx::WhenAckLate::GoOn
        };
        let ack_may_fail =
            ack_deadline_ms < ACK_LATEST_MS && when_ack_late == tx::WhenAckLate::Fail;
        let starts_afresh = random.below(2) == 0;
        let config = tx::Config::builder()
            .when_destination_lost(if starts_afresh {
                tx::WhenDestinationLost::StartAfresh
            } else {
                tx::WhenDestinationLost::Fail
            })
            .device_chunk_bytes(pick(random, &[4096, 10_000, 64 << 10]))
            .ack_deadline(Some(Duration::from_millis(ack_deadline_ms)))
            .when_ack_late(when_ack_late)
            .reconnect_deadline(Duration::from_millis(reconnect_ms))
            .progress_deadline(Duration::from_secs(3))
            .channels(lanes)
            .lanes_at_work(lanes)
            .body_bytes(pick(random, &[4096, 8192, 16384, 32768, 1 << 18]))
            .downtime_limit(Duration::from_millis(pick(random, &[5, 10, 20, 300])))
            .max_rounds(pick(random, &[1, 2, 3, 4, 8]))
            .when_not_converging(if must_converge {
                tx::WhenNotConverging::Switch
            } else {
                tx::WhenNotConverging::Fail
            })
            .hello_deadline(Duration::from_secs(1))
            .setup_deadline(Duration::from_secs(2))
            .stall(stall)
            .keep_alive(keep_alive)
            .commit_deadline(Duration::from_secs(4))
            .build()
            .expect("settings within their ranges");
        let receiver = rx::Config::builder()
            .device_window_bytes(pick(random, &[64 << 10, 64 << 10, 1 << 20]))
            .suspend(Duration::from_millis(suspend_ms))
            .progress_deadline(Duration::from_secs(3))
            .hello_deadline(Duration::from_secs(1))
            .setup_deadline(Duration::from_secs(2))
            .stall(stall)
            .keep_alive(keep_alive)
            .build()
            .expect("settings within their ranges");
        Self {
            shape,
            quality,
            config,
            receiver,
            stall_ns: stall_ms * 1_000_000,
            pace: Pace {
                period_ns: pick(random, &[20_000, 100_000, 500_000, 5_000_000]),
                hot_pages: pick(random, &[4, 16, 1000]),
            },
            step_ns: pick(random, &[10_000, 100_000, 20_000_000]),
            must_converge: must_converge && (!ack_may_fail || devices.is_empty()),
            resumes: reconnect_ms >= 4000 && suspend_ms >= 8000,
            devices,
            starts_afresh,
            closed: None,
            troubles: Troubles::default(),
            // Noticing it may take a stall or the set-up's deadline, and the VMM may be at work.
            holds_ns: (suspend_ms + stall_ms + 6_000) * 1_000_000,
        }
    }
}

impl Settings {
    /// What goes wrong beside the table, and what follows for the others.
    fn trouble(&mut self, troubles: Troubles) {
        let lanes = self.quality.len() as u64 - 1;
        for (place, quality) in (0..).zip(self.quality.iter_mut().skip(1)) {
            quality.ps_per_octet *= troubles.slowness(place, lanes);
        }
        let stop = troubles.stop.map_or(Duration::ZERO, |stop| stop.lasts);
        self.holds_ns += u64::try_from(stop.as_nanos()).unwrap_or(u64::MAX);
        self.troubles = troubles;
    }
}

/// Starts threads with a small stack, as a simulation has many of them in its life; they belong to this program.
struct SmallThreads(Group);

impl Spawner for SmallThreads {
    fn spawn(
        &self,
        name: &str,
        body: Box<dyn FnOnce() + Send>,
    ) -> std::io::Result<std::thread::JoinHandle<()>> {
        let group = self.0;
        std::thread::Builder::new()
            .name(name.to_owned())
            .stack_size(512 << 10)
            .spawn(move || {
                schedule::belongs_to(group);
                body();
            })
    }
}

/// Dials the simulated destination.
struct SimDial {
    world: Arc<World>,
    destination: Arc<Mutex<rx::Handle>>,
    quality: Vec<Quality>,
    closed: Option<ClosedWay>,
}

impl tx::Dial for SimDial {
    fn dial(
        &self,
        channel: ChannelRef,
        _: Instant,
    ) -> Result<Box<dyn Channel>, Box<dyn std::error::Error + Send + Sync>> {
        let at = match channel {
            ChannelRef::Lane(lane) => lane.value() as usize + 1,
            _ => 0,
        };
        let quality = self.quality[at % self.quality.len()];
        schedule::sleep(quality.latency_ns * 2);
        if !self.world.lives(Side::Source) || !self.world.lives(Side::Destination) {
            return Err("nobody listens there".into());
        }
        let closed = self
            .closed
            .filter(|way| channel == ChannelRef::Lane(way.lane));
        if closed.is_some_and(|way| {
            self.world
                .way_is_closed(channel, way.after_ns, way.lasts_ns)
        }) {
            return Err("the way is closed".into());
        }
        let (ours, theirs, link) = network::connect(&self.world, channel, quality);
        self.world.connected(link);
        let destination = lock(&self.destination).clone();
        destination.offer(theirs)?;
        Ok(ours)
    }
}

/// Runs the migration of a seed.
///
/// # Panics
/// If the program has not `interpose.rs` in it: then threads would wait for real.
#[must_use]
pub fn run(seed: u64, mode: Mode, trace: bool) -> Verdict {
    let replay = replay_command(seed, mode);
    let ((mut verdict, world), figures) =
        schedule::simulate(seed, LIMIT_NS, &replay, || simulated(seed, mode, trace));
    verdict.figures = figures;
    // Every thread has ended. Channels, machines and devices hold the world, and the world holds the programs' handles.
    let left = world.strong_count();
    if left > 0 {
        let what = format!("{left} of its channels, machines or devices are left behind");
        verdict.violations.push(what);
    }
    verdict
}

fn simulated(seed: u64, mode: Mode, trace: bool) -> (Verdict, Weak<World>) {
    let before = schedule::now();
    std::thread::sleep(Duration::from_millis(1));
    assert!(
        schedule::now() >= before + 1_000_000,
        "this program has no interpose.rs in it"
    );
    let mut random = Random::new(seed);
    random.next_u64();
    let mut settings = Settings::draw(&mut random);
    if mode == Mode::Faults {
        settings.closed = ClosedWay::draw(seed, settings.config.channels());
    }
    settings.trouble(Troubles::draw(seed, mode));
    let plan = match mode {
        Mode::Faults => Plan::draw(&mut random),
        Mode::Flips => Plan::flips(&mut random),
        Mode::Calm => Plan::none(),
    };
    let machine = Machine::new(
        Random::new(random.next_u64()),
        &settings.shape,
        settings.pace,
    );
    let world = World::new(
        Random::new(random.next_u64()),
        Scene {
            plan,
            machine,
            devices: settings.devices.clone(),
            lanes: settings.config.channels(),
            stall_ns: settings.stall_ns,
            resumes: settings.resumes,
            starts_afresh: settings.starts_afresh,
            // Where every flipped bit is accounted for, no page is damaged for another reason.
            tears: mode != Mode::Flips,
            trace,
        },
    );
    let theirs = Arc::clone(&world);
    let fate = SmallThreads(Group::Nobody).spawn("fate", Box::new(move || theirs.fate_life()));
    let stop = settings.troubles.stop.map(|stop| {
        let theirs = Arc::clone(&world);
        let body = Box::new(move || Troubles::stop_life(stop, &theirs));
        SmallThreads(Group::Nobody).spawn("stop", body)
    });
    let devices = devices::at_source(&world);
    let mut attempt = attempt(&world, &settings, devices, true);
    world.end();
    let _ = fate.expect("a thread can be started").join();
    if let Some(stop) = stop {
        let _ = stop.expect("a thread can be started").join();
    }
    let judged = oracle::judge(&world, &attempt, &settings);
    let second = oracle::may_try_again(&world, &attempt) && random.below(4) == 0;
    if second {
        world.calm_down();
        let devices = std::mem::take(&mut attempt.sent.devices);
        let again = self::attempt(&world, &settings, devices, false);
        oracle::judge_second(&world, &again);
    }
    let summary = world.summary();
    let verdict = Verdict {
        seed,
        violations: summary.violations,
        faults: summary
            .happened
            .iter()
            .map(|(_, fault, _)| *fault)
            .collect(),
        flips: oracle::fates_of_flips(&world, &attempt),
        devices: settings.devices.len(),
        devices_moved: summary.devices_moved,
        outcome: judged,
        code: attempt.sent.error.as_ref().map(tx::Error::code),
        pages_given_back: attempt.sent.report.pages_given_back,
        lanes_lost: attempt.sent.report.channels_lost,
        second,
        figures: schedule::Figures::default(),
    };
    (verdict, Arc::downgrade(&world))
}

/// What the two sides left behind.
struct Attempt {
    sent: tx::Finished,
    received: rx::Finished,
    /// Of the destination's program that was started after the first one died.
    restarted: Option<rx::Finished>,
    lasted: Lasted,
}

impl Attempt {
    /// What the destination that lived last has to say.
    fn received(&self) -> &rx::Finished {
        self.restarted.as_ref().unwrap_or(&self.received)
    }
}

fn attempt(
    world: &Arc<World>,
    settings: &Settings,
    devices: Vec<Box<dyn tx::DeviceSource>>,
    first: bool,
) -> Attempt {
    let began = schedule::now();
    let reception = receive(world, settings, world.life(), first);
    let destination = Arc::new(Mutex::new(reception.handle()));
    let restarted = Arc::new(Mutex::new(None));
    let migration = tx::Migration::start(tx::Parts {
        vmm: Box::new(SourceVmm {
            world: Arc::clone(world),
            devices,
        }),
        memory: world.machine.memory(),
        sources: vec![Box::new(Notes(Arc::clone(world)))],
        dial: Box::new(SimDial {
            world: Arc::clone(world),
            destination: Arc::clone(&destination),
            quality: settings.quality.clone(),
            closed: settings.closed.filter(|_| first),
        }),
        config: settings.config.clone(),
        spawner: Some(Box::new(SmallThreads(Group::Source))),
    })
    .expect("threads can be started");
    if first {
        let (source, theirs) = (migration.handle(), reception.handle());
        world.set_cancel(Side::Source, move || source.cancel());
        world.set_cancel(Side::Destination, move || theirs.cancel());
        let (again, to, place) = (
            Arc::clone(world),
            settings.clone(),
            (Arc::clone(&destination), Arc::clone(&restarted)),
        );
        world.set_restart(move || {
            let reception = receive(&again, &to, again.life(), first);
            *lock(&place.0) = reception.handle();
            *lock(&place.1) = Some(reception);
        });
        let (strange, to) = (Arc::clone(world), Arc::clone(&destination));
        let quality = settings.quality[0];
        world.set_stranger(Arc::new(move |draw, hello| {
            stranger::comes(&strange, &lock(&to), quality, draw, hello);
        }));
    }
    let sent = migration.wait();
    let source = schedule::now();
    world.no_more_comers();
    let finish = |reception: rx::Reception| {
        let handle = reception.handle();
        // A destination to which nobody came, or comes any more, waits until it is told to go.
        if handle.progress().phase == multifd_wire::Phase::Hello {
            handle.cancel();
        }
        reception.wait()
    };
    let received = finish(reception);
    let restarted = lock(&restarted).take().map(finish);
    Attempt {
        sent,
        received,
        restarted,
        lasted: Lasted {
            began,
            source,
            destination: schedule::now(),
        },
    }
}

/// Starts the destination's program.
fn receive(world: &Arc<World>, settings: &Settings, life: u32, first: bool) -> rx::Reception {
    rx::Reception::start(rx::Parts {
        vmm: Box::new(DestinationVmm {
            world: Arc::clone(world),
            step_ns: settings.step_ns,
            life,
            troubles: settings.troubles,
            hangs: settings.troubles.hangs.filter(|_| first),
        }),
        listeners: Vec::new(),
        config: settings.receiver.clone(),
        spawner: Some(Box::new(SmallThreads(Group::Destination))),
    })
    .expect("threads can be started")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
