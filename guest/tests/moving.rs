//! A guest moves into another machine and its own counters and its own check say that nothing was lost.

mod common;

use common::*;
use multifd_guest::{Config, Error, Guest, Pattern, Tracking};

#[test]
fn a_moved_guest_continues_its_counters_and_is_whole() {
    for tracking in kinds("a_moved_guest_continues_its_counters_and_is_whole") {
        for (vcpus, pattern) in [
            (1, Pattern::Random),
            (2, Pattern::Sequential),
            (4, Pattern::Random),
        ] {
            let source = Guest::create(&Config {
                vcpus,
                pattern,
                ..small(tracking)
            })
            .unwrap();
            run_a_while(&source);
            let left = counters(&source);
            assert!(left.iter().all(|counter| *counter > 0));

            let destination = moved(&source);
            assert_whole(&destination);
            assert!(
                counters(&destination)
                    .iter()
                    .zip(&left)
                    .all(|(arrived, left)| arrived >= left)
            );
            assert!(destination.heartbeats().iter().all(|beat| beat.beats == 0));
            destination.run().unwrap();
            wait_beats(&destination, 1);
            assert!(
                counters(&destination)
                    .iter()
                    .zip(&left)
                    .all(|(first, left)| first > left)
            );
            wait_beats(&destination, 3);
            destination.pause().unwrap();
            assert_whole(&destination);
            // The source is still what it was: it could have gone on.
            assert_eq!(counters(&source), left);
            assert_whole(&source);
        }
    }
}

#[test]
fn a_guest_moves_to_and_fro_thirty_times_from_any_instruction() {
    for tracking in kinds("a_guest_moves_to_and_fro_thirty_times_from_any_instruction") {
        let mut guest = Guest::create(&fast(tracking)).unwrap();
        let mut last = counters(&guest);
        for _ in 0..30 {
            guest.run().unwrap();
            wait_beats(&guest, 1);
            guest.pause().unwrap();
            guest = moved(&guest);
            assert_whole(&guest);
            let now = counters(&guest);
            assert!(
                now.iter().zip(&last).all(|(now, then)| now > then),
                "{last:?} then {now:?}"
            );
            last = now;
        }
    }
}

#[test]
fn a_state_saved_twice_is_the_same_and_survives_a_load() {
    for tracking in kinds("a_state_saved_twice_is_the_same_and_survives_a_load") {
        let source = Guest::create(&fast(tracking)).unwrap();
        run_a_while(&source);
        let state = source.save_state().unwrap();
        if tracking != Tracking::Kvm {
            assert_eq!(source.save_state().unwrap(), state);
        }
        let destination = moved(&source);
        let loaded = destination.save_state().unwrap();
        assert_eq!(loaded.len(), state.len());
        let (mut state, mut loaded) = (state, loaded);
        if tracking == Tracking::Kvm {
            let record = (state.len() - 32) / source.config().vcpus as usize;
            for at in (32..state.len()).step_by(record) {
                spell_out_extended_state(&mut state[at..at + record]);
                spell_out_extended_state(&mut loaded[at..at + record]);
            }
        }
        // What may differ is the time-stamp counter, which runs while the guest does not. It is the first MSR of each
        // virtual CPU's record: 32 bytes of head, then 5152 of structures, then index, zero, value.
        let mut differing: Vec<usize> = (0..state.len())
            .filter(|at| state[*at] != loaded[*at])
            .collect();
        if tracking == Tracking::Kvm {
            let record = (state.len() - 32) / source.config().vcpus as usize;
            let is_counter = |at: usize| (5160..5168).contains(&((at - 32) % record));
            differing.retain(|at| !is_counter(*at));
        }
        assert_eq!(differing, [] as [usize; 0]);
    }
}

/// Writes the extended state of one virtual CPU's record in the one way that names each part: a processor may leave a part that
/// is in its initial configuration out of XSTATE_BV (some do, some do not), and what stands in its place then means nothing
/// (Intel SDM volume 1, 13.6; AMD APM volume 2, 11.5.6).
fn spell_out_extended_state(record: &mut [u8]) {
    const X87: u8 = 1;
    const SSE: u8 = 2;
    let xsave = &mut record[464..464 + 4096];
    let in_use = xsave[512];
    if in_use & X87 == 0 {
        // Control word 0x37F, all else zero: status, tags, opcode, pointers, and the registers ST0 to ST7.
        xsave[..24].fill(0);
        xsave[..2].copy_from_slice(&0x37F_u16.to_le_bytes());
        xsave[32..160].fill(0);
    }
    if in_use & SSE == 0 {
        xsave[160..416].fill(0);
    }
    xsave[512] |= X87 | SSE;
}

/// Values that no fresh processor has, in each part of the state that the guest's program leaves alone.
#[test]
fn every_part_of_a_vcpu_state_is_loaded_and_saved_again() {
    if !kvm_or_skip("every_part_of_a_vcpu_state_is_loaded_and_saved_again") {
        return;
    }
    let source = Guest::create(&Config {
        vcpus: 1,
        ..fast(Tracking::Kvm)
    })
    .unwrap();
    run_a_while(&source);
    let mut state = source.save_state().unwrap();
    let record = 32;
    let msr = |index: u32, state: &[u8]| {
        let entries = state[record + 5152..].chunks_exact(16);
        let place = entries
            .into_iter()
            .position(|entry| entry[..4] == index.to_le_bytes());
        record
            + 5152
            + 16 * place.unwrap_or_else(|| panic!("MSR {index:#x} is not in the state"))
            + 8
    };
    let lstar = msr(0xC000_0082, &state);
    let patches: [(usize, &[u8]); 6] = [
        (record + 8 + 15 * 8, b"R15R15R!"), // general register r15
        (record + 152 + 3 * 24, &[0x78, 0x56, 0x34, 0x12]), // base of FS
        (record + 464 + 160, b"the contents of XMM register 0!!"), // two vector registers
        (record + 464 + 512, &[3]), // which say that they are in use, as x87 does, which is not
        (record + 4952, &[0, 0x40, 0x20, 0x10]), // debug address 0
        (lstar, &[0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0, 0]), // an MSR
    ];
    for (at, octets) in patches {
        assert_ne!(state[at..at + octets.len()], *octets);
        state[at..at + octets.len()].copy_from_slice(octets);
    }
    let destination = destination(&source);
    copy_memory(&source.memory(), &destination.memory());
    destination.load_state(&state).unwrap();
    let mut loaded = destination.save_state().unwrap();
    let time_stamp = msr(0x10, &state);
    spell_out_extended_state(&mut state[record..]);
    spell_out_extended_state(&mut loaded[record..]);
    for at in (0..state.len()).filter(|at| !(time_stamp..time_stamp + 8).contains(at)) {
        assert_eq!(loaded[at], state[at], "byte {at}");
    }
    run_a_while(&destination);
    assert_whole(&destination);
    // And they are still there after the guest ran.
    let mut later = destination.save_state().unwrap();
    spell_out_extended_state(&mut later[record..]);
    for (at, octets) in patches {
        assert_eq!(later[at..at + octets.len()], *octets, "byte {at}");
    }
}

#[test]
fn truncated_and_prolonged_states_are_refused_at_every_length() {
    for tracking in kinds("truncated_and_prolonged_states_are_refused_at_every_length") {
        let source = Guest::create(&small(tracking)).unwrap();
        run_a_while(&source);
        let state = source.save_state().unwrap();
        let destination = destination(&source);
        for length in 0..state.len() {
            let refused = destination.load_state(&state[..length]).unwrap_err();
            assert_eq!(
                refused.code(),
                "guest-malformed",
                "{length} of {}",
                state.len()
            );
        }
        let longer = [&state[..], &[0]].concat();
        assert_eq!(
            destination.load_state(&longer).unwrap_err().code(),
            "guest-malformed"
        );
        // None of them left a trace: the state itself still loads.
        copy_memory(&source.memory(), &destination.memory());
        destination.load_state(&state).unwrap();
        assert_whole(&destination);
        run_a_while(&destination);
        assert_whole(&destination);
    }
}

#[test]
fn no_single_damaged_octet_of_a_state_hangs_or_panics() {
    for tracking in kinds("no_single_damaged_octet_of_a_state_hangs_or_panics") {
        let source = Guest::create(&small(tracking)).unwrap();
        run_a_while(&source);
        let state = source.save_state().unwrap();
        let mut refused = 0;
        // Every byte of the head, then a sample: each needs a machine of its own.
        for at in (0..32).chain((32..state.len()).step_by(211)) {
            let destination = destination(&source);
            let mut damaged = state.clone();
            damaged[at] ^= 0x80;
            match destination.load_state(&damaged) {
                // Most registers may hold anything; then the guest runs, fails by itself or fails the check.
                Ok(()) => {
                    destination.run().unwrap();
                    destination.pause().unwrap();
                }
                Err(
                    Error::Malformed { .. } | Error::Incompatible { .. } | Error::Kernel { .. },
                ) => refused += 1,
                Err(other) => panic!("byte {at}: {other}"),
            }
        }
        assert!(refused >= 24, "{refused}");
    }
}

#[test]
fn a_state_is_refused_by_a_guest_of_another_shape() {
    for tracking in kinds("a_state_is_refused_by_a_guest_of_another_shape") {
        let source = Guest::create(&small(tracking)).unwrap();
        let state = source.save_state().unwrap();
        let other = Guest::create_empty(&Config {
            vcpus: 3,
            ..small(tracking)
        })
        .unwrap();
        assert!(matches!(
            other.load_state(&state),
            Err(Error::Incompatible { .. })
        ));
    }
    if kvm_or_skip("a_state_is_refused_by_a_guest_of_another_shape") {
        let source = Guest::create(&small(Tracking::Kvm)).unwrap();
        let other = Guest::create_empty(&small(Tracking::Process)).unwrap();
        assert!(matches!(
            other.load_state(&source.save_state().unwrap()),
            Err(Error::Incompatible { .. })
        ));
    }
}

#[test]
fn a_loaded_state_may_be_replaced_until_the_guest_runs() {
    for tracking in kinds("a_loaded_state_may_be_replaced_until_the_guest_runs") {
        let source = Guest::create(&small(tracking)).unwrap();
        let destination = moved(&source);
        let state = source.save_state().unwrap();
        destination.load_state(&state).unwrap();
        destination.run().unwrap();
        destination.pause().unwrap();
        assert!(matches!(
            destination.load_state(&state),
            Err(Error::Misuse { .. })
        ));
    }
}

#[test]
fn a_guest_whose_program_was_destroyed_says_so_and_cannot_be_saved() {
    if !kvm_or_skip("a_guest_whose_program_was_destroyed_says_so_and_cannot_be_saved") {
        return;
    }
    let guest = Guest::create(&small(Tracking::Kvm)).unwrap();
    // Two bytes that are no instruction (ud2), again and again: there is no handler, so the processor shuts down.
    guest
        .memory()
        .write_words(4096, &[0x0B0F_0B0F_0B0F_0B0F; 16])
        .unwrap();
    guest.run().unwrap();
    let begun = std::time::Instant::now();
    while guest.failure().is_none() {
        assert!(begun.elapsed() < PATIENCE);
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert!(matches!(guest.failure(), Some(Error::Vcpu { .. })));
    guest.pause().unwrap();
    assert!(matches!(guest.save_state(), Err(Error::Vcpu { .. })));
    assert!(matches!(guest.run(), Err(Error::Vcpu { .. })));
    assert!(!guest.check().unwrap().passed());
}
