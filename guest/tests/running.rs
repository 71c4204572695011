//! A guest runs, beats, keeps its pace, and stops when it is told to.

mod common;

use std::time::{Duration, Instant};

use common::*;
use multifd_guest::{Config, Error, Fill, Guest, Kind, Pattern, Tracking};

#[test]
fn heart_beats_and_counters_grow_with_1_2_and_4_vcpus_in_both_patterns() {
    for tracking in kinds("heart_beats_and_counters_grow_with_1_2_and_4_vcpus_in_both_patterns") {
        for vcpus in [1, 2, 4] {
            for pattern in [Pattern::Random, Pattern::Sequential] {
                let guest = Guest::create(&Config {
                    vcpus,
                    pattern,
                    ..small(tracking)
                })
                .unwrap();
                assert_eq!(guest.heartbeats().len(), vcpus as usize);
                guest.run().unwrap();
                wait_beats(&guest, 2);
                let before = counters(&guest);
                wait_beats(&guest, 5);
                assert!(
                    counters(&guest)
                        .iter()
                        .zip(before)
                        .all(|(now, then)| *now > then)
                );
                guest.pause().unwrap();
                assert_whole(&guest);
            }
        }
    }
}

#[test]
fn it_says_what_it_is() {
    for tracking in kinds("it_says_what_it_is") {
        let guest = Guest::create(&small(tracking)).unwrap();
        let expected = if tracking == Tracking::Kvm {
            Kind::Kvm
        } else {
            Kind::Process
        };
        assert_eq!(guest.kind(), expected);
        assert_eq!(
            guest.kind().to_string(),
            if expected == Kind::Kvm {
                "KVM"
            } else {
                "process"
            }
        );
        let process = [Tracking::Userfault, Tracking::Marks].contains(&guest.tracking());
        assert_eq!(process, expected == Kind::Process);
        assert!(expected == Kind::Kvm || guest.tracking() == tracking);
    }
}

#[test]
fn auto_is_kvm_wherever_kvm_is() {
    let guest = Guest::create(&small(Tracking::Auto)).unwrap();
    let has_kvm = kvm_or_skip("auto_is_kvm_wherever_kvm_is");
    assert_eq!(
        guest.kind(),
        if has_kvm { Kind::Kvm } else { Kind::Process }
    );
}

#[test]
fn a_pause_is_quick_and_the_memory_then_stands_still() {
    for tracking in kinds("a_pause_is_quick_and_the_memory_then_stands_still") {
        let guest = Guest::create(&fast(tracking)).unwrap();
        let mut last = fingerprint(&guest.memory());
        let mut pauses = Vec::new();
        for _ in 0..20 {
            guest.run().unwrap();
            wait_beats(&guest, 1);
            let begun = Instant::now();
            guest.pause().unwrap();
            pauses.push(begun.elapsed());
            let now = fingerprint(&guest.memory());
            assert_ne!(now, last, "the guest wrote nothing while it ran");
            std::thread::sleep(Duration::from_millis(5));
            assert_eq!(
                fingerprint(&guest.memory()),
                now,
                "the guest wrote while it was paused"
            );
            last = now;
        }
        pauses.sort();
        // Some ten microseconds on a quiet host. The bound leaves room for a host whose processors are all taken.
        assert!(
            pauses[pauses.len() / 2] < Duration::from_millis(100),
            "{pauses:?}"
        );
    }
}

#[test]
fn a_guest_paused_at_any_instruction_is_whole_and_runs_on() {
    for tracking in kinds("a_guest_paused_at_any_instruction_is_whole_and_runs_on") {
        let guest = Guest::create(&fast(tracking)).unwrap();
        let mut last = counters(&guest);
        for round in 0..60 {
            guest.run().unwrap();
            std::thread::sleep(Duration::from_micros(100 * (round % 7)));
            guest.pause().unwrap();
            assert_whole(&guest);
            let now = counters(&guest);
            assert!(now.iter().zip(&last).all(|(now, then)| now >= then));
            last = now;
        }
        assert!(last.iter().all(|counter| *counter > 0));
    }
}

/// Never faster than asked, in any attempt. Slower only as far as others take the host's processors, so that one attempt
/// out of several has to come near.
#[test]
fn the_rate_is_kept_within_a_factor() {
    for tracking in kinds("the_rate_is_kept_within_a_factor") {
        for wanted in [4_000_000, 40_000_000] {
            let guest = Guest::create(&Config {
                dirty_rate_bytes_per_s: wanted,
                ..small(tracking)
            })
            .unwrap();
            guest.run().unwrap();
            wait_beats(&guest, 4);
            let mut ratios = Vec::new();
            while ratios.iter().all(|ratio| *ratio < 0.7) {
                assert!(
                    ratios.len() < 8,
                    "{tracking:?}, {wanted} bytes/s: {ratios:?}"
                );
                let (begun, before) = (Instant::now(), counters(&guest));
                std::thread::sleep(Duration::from_millis(800));
                let stores: u64 = counters(&guest)
                    .iter()
                    .zip(before)
                    .map(|(now, then)| now - then)
                    .sum();
                let rate = stores as f64 * 4096.0 / begun.elapsed().as_secs_f64();
                let ratio = rate / wanted as f64;
                assert!(ratio < 1.2, "{tracking:?}: {rate:.0} for {wanted}");
                ratios.push(ratio);
            }
        }
    }
}

#[test]
fn an_idle_guest_beats_and_writes_nothing() {
    for tracking in kinds("an_idle_guest_beats_and_writes_nothing") {
        let config = Config {
            dirty_rate_bytes_per_s: 0,
            ..small(tracking)
        };
        let guest = Guest::create(&config).unwrap();
        let before = fingerprint(&guest.memory());
        run_a_while(&guest);
        assert_eq!(fingerprint(&guest.memory()), before);
        assert!(counters(&guest).iter().all(|counter| *counter >= 4));
        assert_whole(&guest);
    }
}

#[test]
fn five_gib_in_two_regions_run_and_are_dirtied_in_both() {
    for tracking in kinds("five_gib_in_two_regions_run_and_are_dirtied_in_both") {
        let config = Config {
            memory_bytes: 5 << 30,
            fill: Fill {
                filled_percent: 0,
                zero_percent: 0,
            },
            ..small(tracking)
        };
        let guest = Guest::create(&config).unwrap();
        let memory = guest.memory();
        let regions: Vec<_> = memory
            .regions()
            .iter()
            .map(|region| (region.guest_address, region.bytes))
            .collect();
        assert_eq!(regions, [(0, 3 << 30), (4 << 30, 2 << 30)]);
        run_a_while(&guest);
        assert_whole(&guest);
        // The stamps are at the top of the second region; the headers (counters) and logs are in the first.
        let last_mib = (5 << 30) + (1 << 30) - (16 << 20);
        let stamped = (last_mib..6 << 30)
            .step_by(4096)
            .filter(|page| read_page(&memory, *page) != [0; 512])
            .count();
        assert!(stamped > 0);
        let report = guest.check().unwrap();
        assert_eq!(report.stamps, stamped as u64);
    }
}

#[test]
fn sixteen_vcpus_run() {
    if !kvm_or_skip("sixteen_vcpus_run") {
        return;
    }
    let guest = Guest::create(&Config {
        vcpus: 16,
        ..small(Tracking::Kvm)
    })
    .unwrap();
    run_a_while(&guest);
    assert_whole(&guest);
}

#[test]
fn run_and_pause_may_be_repeated_and_called_twice() {
    for tracking in kinds("run_and_pause_may_be_repeated_and_called_twice") {
        let guest = Guest::create(&small(tracking)).unwrap();
        guest.pause().unwrap();
        for _ in 0..30 {
            guest.run().unwrap();
            guest.run().unwrap();
            guest.pause().unwrap();
            guest.pause().unwrap();
        }
        assert_whole(&guest);
    }
}

#[test]
fn what_needs_a_pause_is_refused_while_running() {
    for tracking in kinds("what_needs_a_pause_is_refused_while_running") {
        let guest = Guest::create(&small(tracking)).unwrap();
        guest.run().unwrap();
        assert!(matches!(guest.save_state(), Err(Error::Misuse { .. })));
        assert!(matches!(guest.check(), Err(Error::Misuse { .. })));
        assert!(matches!(guest.load_state(&[]), Err(Error::Misuse { .. })));
        guest.pause().unwrap();
        guest.save_state().unwrap();
    }
}

#[test]
fn an_empty_guest_does_nothing_before_a_state_is_loaded() {
    for tracking in kinds("an_empty_guest_does_nothing_before_a_state_is_loaded") {
        let guest = Guest::create_empty(&small(tracking)).unwrap();
        assert!(matches!(guest.run(), Err(Error::Misuse { .. })));
        assert!(matches!(guest.save_state(), Err(Error::Misuse { .. })));
        assert!(matches!(guest.check(), Err(Error::Misuse { .. })));
        guest.pause().unwrap();
    }
}

/// Counted in processor time of this thread, because the wall clock on a shared host measures the neighbours. 64 MiB are
/// filled and checked by the calling thread alone; larger memories by up to four, each at this speed.
#[test]
fn one_processor_fills_and_checks_half_a_gib_per_second_at_least() {
    let config = Config {
        fill: Fill::default(),
        ..small(Tracking::Process)
    };
    let best = |work: &dyn Fn()| (0..5).map(|_| processor_time(work)).min().unwrap();
    let fill = best(&|| drop(Guest::create(&config).unwrap()));
    let guest = Guest::create(&config).unwrap();
    let check = best(&|| assert_whole(&guest));
    let most = Duration::from_millis(125);
    assert!(
        fill < most && check < most,
        "64 MiB: fill {fill:?}, check {check:?}"
    );
}

/// Time that this thread spent on a processor while it did `work` (the first number of schedstat, nanoseconds).
fn processor_time(work: &dyn Fn()) -> Duration {
    let spent = || {
        let line = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        let first = line.split_whitespace().next().unwrap();
        Duration::from_nanos(first.parse().unwrap())
    };
    let before = spent();
    work();
    spent() - before
}

#[test]
fn the_memory_lives_as_long_as_a_clone_of_it() {
    let guest = Guest::create(&small(Tracking::Process)).unwrap();
    let memory = guest.memory();
    let before = fingerprint(&memory);
    drop(guest);
    assert_eq!(fingerprint(&memory), before);
}

/// Beyond 64 GiB addresses have more bits than KVM assumes of a processor that does not say how many it has.
#[test]
fn seventy_sparse_gib_are_written_at_their_top() {
    if !kvm_or_skip("seventy_sparse_gib_are_written_at_their_top") {
        return;
    }
    let fill = Fill {
        filled_percent: 0,
        zero_percent: 0,
    };
    let guest = Guest::create(&Config {
        memory_bytes: 70 << 30,
        fill,
        ..small(Tracking::Kvm)
    })
    .unwrap();
    run_a_while(&guest);
    let memory = guest.memory();
    let top = 71 << 30;
    let stamped = (top - (16 << 20)..top)
        .step_by(4096)
        .filter(|page| read_page(&memory, *page) != [0; 512])
        .count();
    assert!(stamped > 0);
}
