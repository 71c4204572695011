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

pub mod faults;
pub mod machine;
pub mod network;
mod oracle;
pub mod schedule;
pub mod world;

use std::sync::Arc;
use std::time::{Duration, Instant};

use multifd_receiver as rx;
use multifd_sender as tx;
use multifd_transport::{Channel, Spawner};
use multifd_wire::ChannelRef;

use self::faults::{Fault, Plan, Side};
use self::machine::{DestinationVmm, Machine, Notes, Pace, SourceVmm};
use self::network::Quality;
use self::world::World;
use crate::model::Random;

/// The longest that a simulated migration may last, second attempts included. The settings' deadlines add up to less.
const LIMIT_NS: u64 = 240_000_000_000;

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
    /// Bits that were flipped.
    pub flips: u64,
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
pub fn replay_command(seed: u64) -> String {
    format!(
        "replay: cargo run --release -p multifd-tests --bin multifd-sim -- --seed {seed} --trace"
    )
}

/// The settings that a seed gives.
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
        let config = tx::Config::builder()
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
            must_converge,
            resumes: reconnect_ms >= 4000 && suspend_ms >= 8000,
        }
    }
}

/// Starts threads with a small stack, as a simulation has many of them in its life.
struct SmallThreads;

impl Spawner for SmallThreads {
    fn spawn(
        &self,
        name: &str,
        body: Box<dyn FnOnce() + Send>,
    ) -> std::io::Result<std::thread::JoinHandle<()>> {
        std::thread::Builder::new()
            .name(name.to_owned())
            .stack_size(512 << 10)
            .spawn(body)
    }
}

/// Dials the simulated destination.
struct SimDial {
    world: Arc<World>,
    destination: rx::Handle,
    quality: Vec<Quality>,
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
        let (ours, theirs, link) = network::connect(&self.world, channel, quality);
        self.world.connected(link);
        self.destination.offer(theirs)?;
        Ok(ours)
    }
}

/// Runs the migration of a seed.
///
/// # Panics
/// If the program has not `interpose.rs` in it: then threads would wait for real.
#[must_use]
pub fn run(seed: u64, mode: Mode, trace: bool) -> Verdict {
    let (mut verdict, figures) =
        schedule::simulate(seed, LIMIT_NS, || simulated(seed, mode, trace));
    verdict.figures = figures;
    verdict
}

fn simulated(seed: u64, mode: Mode, trace: bool) -> Verdict {
    let before = schedule::now();
    std::thread::sleep(Duration::from_millis(1));
    assert!(
        schedule::now() >= before + 1_000_000,
        "this program has no interpose.rs in it"
    );
    let mut random = Random::new(seed);
    random.next_u64();
    let settings = Settings::draw(&mut random);
    let plan = match mode {
        Mode::Faults => Plan::draw(&mut random),
        Mode::Flips => Plan::flips(&mut random, 14),
        Mode::Calm => Plan::none(),
    };
    let machine = Machine::new(
        Random::new(random.next_u64()),
        &settings.shape,
        settings.pace,
    );
    let world = World::new(
        Random::new(random.next_u64()),
        plan,
        machine,
        settings.config.channels(),
        settings.stall_ns,
        settings.resumes,
        trace,
    );
    let theirs = Arc::clone(&world);
    let fate = SmallThreads.spawn("fate", Box::new(move || theirs.fate_life()));
    let attempt = attempt(&world, &settings, true);
    world.end();
    let _ = fate.expect("a thread can be started").join();
    let judged = oracle::judge(&world, &attempt, &settings);
    let second = oracle::may_try_again(&world, &attempt) && random.below(4) == 0;
    if second {
        world.calm_down();
        let again = self::attempt(&world, &settings, false);
        oracle::judge_second(&world, &again);
    }
    let summary = world.summary();
    Verdict {
        seed,
        violations: summary.violations,
        faults: summary
            .happened
            .iter()
            .map(|(_, fault, _)| *fault)
            .collect(),
        flips: summary.flips.len() as u64,
        outcome: judged,
        code: attempt.sent.error.as_ref().map(tx::Error::code),
        pages_given_back: attempt.sent.report.pages_given_back,
        lanes_lost: attempt.sent.report.channels_lost,
        second,
        figures: schedule::Figures::default(),
    }
}

/// What the two sides left behind.
struct Attempt {
    sent: tx::Finished,
    received: rx::Finished,
}

fn attempt(world: &Arc<World>, settings: &Settings, first: bool) -> Attempt {
    let reception = rx::Reception::start(rx::Parts {
        vmm: Box::new(DestinationVmm {
            world: Arc::clone(world),
            step_ns: settings.step_ns,
        }),
        listeners: Vec::new(),
        config: settings.receiver.clone(),
        spawner: Some(Box::new(SmallThreads)),
    })
    .expect("threads can be started");
    let destination = reception.handle();
    let migration = tx::Migration::start(tx::Parts {
        vmm: Box::new(SourceVmm(Arc::clone(world))),
        memory: world.machine.memory(),
        sources: vec![Box::new(Notes(Arc::clone(world)))],
        dial: Box::new(SimDial {
            world: Arc::clone(world),
            destination: destination.clone(),
            quality: settings.quality.clone(),
        }),
        config: settings.config.clone(),
        spawner: Some(Box::new(SmallThreads)),
    })
    .expect("threads can be started");
    if first {
        let (source, theirs) = (migration.handle(), destination.clone());
        world.set_cancel(Side::Source, move || source.cancel());
        world.set_cancel(Side::Destination, move || theirs.cancel());
    }
    let sent = migration.wait();
    // A destination to which nobody came, or comes any more, waits until it is told to go.
    if sent.error.is_some() && destination.progress().phase == multifd_wire::Phase::Hello {
        destination.cancel();
    }
    let received = reception.wait();
    Attempt { sent, received }
}
