//! The simulator in its short form, and what it promises itself. For hours: `cargo run --release -p multifd-tests --bin multifd-sim`.

#[path = "../src/sim/interpose.rs"]
mod interpose;

use std::time::{Duration, Instant};

use multifd_tests::model::Random;
use multifd_tests::sim::faults::Plan;
use multifd_tests::sim::machine::{Machine, Pace};
use multifd_tests::sim::network::{self, Quality};
use multifd_tests::sim::world::{Scene, World};
use multifd_tests::sim::{self, Mode, schedule};
use multifd_transport::conformance;
use multifd_wire::{ChannelRef, LaneId};

/// Other seeds than the long runs begin with: `git log` moves slowly, luck should not.
const FROM: u64 = 1 << 40;

/// Runs seeds until the time is up; at least `least`.
fn seeds(mode: Mode, least: u64, at_most: Duration) -> Vec<sim::Verdict> {
    let began = Instant::now();
    (FROM..)
        .take_while(|seed| *seed < FROM + least || began.elapsed() < at_most)
        .map(|seed| {
            let verdict = sim::run(seed, mode, false);
            assert!(
                verdict.violations.is_empty(),
                "seed {seed}: {:#?}\n{}",
                verdict.violations,
                sim::replay_command(seed, mode)
            );
            verdict
        })
        .collect()
}

// SPEC: LANE-4
#[test]
fn no_seed_breaks_a_promise() {
    let verdicts = seeds(Mode::Faults, 500, Duration::from_secs(20));
    let faults = verdicts.iter().filter(|v| !v.faults.is_empty()).count();
    assert!(
        faults * 10 > verdicts.len() * 8,
        "{faults} of {} with a fault",
        verdicts.len()
    );
}

#[test]
fn without_faults_every_migration_ends_well_or_says_what_took_too_long() {
    for verdict in seeds(Mode::Calm, 100, Duration::from_secs(2)) {
        assert!(
            verdict
                .code
                .is_none_or(|code| code.contains("converg") || code.contains("ack-deadline")),
            "{verdict:?}"
        );
    }
}

#[test]
fn flipped_bits_are_found_and_named() {
    let verdicts = seeds(Mode::Flips, 100, Duration::from_secs(5));
    let flips = verdicts.iter().flat_map(|verdict| &verdict.flips);
    let flips: u64 = flips.map(|(_, count)| count).sum();
    assert!(flips > 10 * verdicts.len() as u64, "{flips} flips");
}

/// What long runs found and nothing else had: a partly landed page behind an equal digest; a COMMIT of which nothing left; a greeter
/// that waited without a deadline for a peer that it had refused; a ROUND_CLOSED that was read although its sending had failed;
/// a channel that stayed in a queue after the end; a guest paused for less long than it was known to take; devices that left the lane to
/// few pages; a forecast from bytes that were in buffers.
#[test]
fn seeds_that_once_broke_a_promise_keep_it() {
    for seed in [
        10_263_076,
        307_715,
        10_438_353,
        12_183_973,
        20_305_251,
        10_374_689,
        80_000_627,
        90_021_317,
        90_117_484,
        120_138_787,
        140_310_108,
        141_069_948,
        // A source that stood still, and whose end came together with a sign of life that could not be sent any more.
        910_000_071,
        910_000_714,
        910_001_135,
        // Pages that came back while devices kept every lane busy: each lane left them to the others for good, a single one too.
        150_001_469,
        150_000_503,
        // A destination that stood still said that a guest could not be run which it then ran.
        150_007_289,
        // A forged load time held the guest paused for as long as it said.
        150_001_848,
        // A reply whose magic was changed on the way was taken for that of a stranger.
        150_002_668,
        // A second attempt was judged while the destination still stood still.
        1_099_511_628_777,
    ] {
        let verdict = sim::run(seed, Mode::Faults, false);
        assert!(verdict.violations.is_empty(), "seed {seed}: {verdict:#?}");
    }
}

#[test]
fn a_seed_always_takes_the_same_way() {
    for seed in FROM..FROM + 100 {
        let [one, other] = [(); 2].map(|()| sim::run(seed, Mode::Faults, false));
        assert_eq!(one.figures, other.figures, "seed {seed}");
        assert_eq!(one.faults, other.faults, "seed {seed}");
    }
}

#[test]
fn the_simulated_network_is_a_channel_like_any_other() {
    let pair = || {
        let pace = Pace {
            period_ns: 1_000_000,
            hot_pages: 1,
        };
        let machine = Machine::new(Random::new(1), &[8], pace);
        let scene = Scene {
            plan: Plan::none(),
            machine,
            devices: Vec::new(),
            lanes: 1,
            stall_ns: 1,
            resumes: false,
            starts_afresh: false,
            tears: true,
            trace: false,
        };
        let world = World::new(Random::new(1), scene);
        let quality = Quality {
            capacity: 8 << 10,
            ps_per_octet: 1_000,
            latency_ns: 10_000,
        };
        let lane = ChannelRef::Lane(LaneId::new(0));
        let (left, right, _) = network::connect(&world, lane, quality);
        (left, right)
    };
    // One check has a thread that writes memory and never waits: it would keep the baton for ever.
    let spins =
        |check: &&conformance::Check| check.name == "frames_stay_framed_while_the_guest_writes";
    assert_eq!(conformance::CHECKS.iter().filter(spins).count(), 1);
    for check in conformance::CHECKS.iter().filter(|check| !spins(check)) {
        let kind = conformance::Kind {
            name: "simulated",
            pair,
        };
        let ((), figures) = schedule::simulate(7, 600_000_000_000, check.name, || {
            conformance::run(check.name, kind)
        });
        assert!(figures.threads > 1, "{}: nobody was simulated", check.name);
    }
}
