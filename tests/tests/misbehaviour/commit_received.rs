//! Against the destination, around the commit: the guest starts on a COMMIT that fits, and on nothing else.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use multifd_receiver as rx;
use multifd_tests::bounded::{Destination, GRACE, STALL, destination_config};
use multifd_tests::fake_source::FakeSource;
use multifd_tests::model::{DestinationMachine, Refuse};
use multifd_tests::peer::encode;
use multifd_wire::frame::{Commit, Final};
use multifd_wire::{Body, Digest, Kind, Phase, Reason};

fn other(digest: Digest) -> Digest {
    Digest::new(digest.value() ^ 1)
}

// SPEC: FINAL-4
#[test]
fn final_with_another_digest_ends_it_with_reason_7() {
    let destination = Destination::start();
    let connect = || destination.connect();
    let mut source = FakeSource::in_switchover(&connect);
    source.end_round(0, 1, true);
    source.send_state();
    let last = source.final_of(1);
    let digest = other(last.digest);
    source.control.send(Final { digest, ..last });
    let told = source.control.hear_abort();
    assert_eq!(
        (told.reason, told.phase),
        (Reason::DigestMismatch, Phase::Switchover)
    );
    assert_eq!(told.reason.as_u32(), 7);
    destination.fails(
        GRACE,
        "receiver.digest-mismatch",
        "FINAL with another digest",
    );
}

#[test]
fn commit_with_another_digest_starts_nothing() {
    let destination = Destination::start();
    let connect = || destination.connect();
    let mut source = FakeSource::prepared(&connect);
    source.control.send(Commit {
        digest: other(source.digest()),
    });
    let told = source.control.hear_abort();
    assert_eq!(
        (told.reason, told.phase),
        (Reason::DigestMismatch, Phase::Commit)
    );
    destination.fails(
        GRACE,
        "receiver.digest-mismatch",
        "COMMIT with another digest",
    );
}

#[test]
fn a_commit_cut_off_at_any_place_starts_nothing() {
    for bytes in [1, 8, 16, 31, 32, 33, 36, 39] {
        let destination = Destination::start();
        let connect = || destination.connect();
        let mut source = FakeSource::prepared(&connect);
        source.control.fall_silent();
        let digest = source.digest();
        source.control.instead(|number| {
            let whole = encode(number, Commit { digest }, Body::None);
            assert_eq!(whole.len(), 40);
            whole[..bytes].to_vec()
        });
        source.control.finish();
        assert_eq!(source.control.hear_abort().reason, Reason::ChannelsLost);
        let end = destination.end(GRACE);
        let error = end.finished.error.unwrap();
        assert!(
            error.code().starts_with("channel-closed"),
            "{bytes} bytes: {error}"
        );
        assert!(!end.running && end.discarded, "{bytes} bytes");
    }
}

#[test]
fn a_commit_with_a_flipped_bit_starts_nothing() {
    for bit in (0..40 * 8).step_by(7) {
        let destination = Destination::start();
        let connect = || destination.connect();
        let mut source = FakeSource::prepared(&connect);
        let digest = source.digest();
        source.control.instead(|number| {
            let mut octets = encode(number, Commit { digest }, Body::None);
            octets[bit / 8] ^= 1 << (bit % 8);
            octets
        });
        assert_eq!(
            source.control.hear_abort().reason,
            Reason::Corruption,
            "bit {bit}"
        );
        let end = destination.end(GRACE);
        assert!(!end.running && end.discarded, "bit {bit}");
    }
}

#[test]
fn no_frame_but_commit_starts_the_guest() {
    type Act = fn(&mut FakeSource<'_>);
    let cases: [(&str, Act, &str); 4] = [
        ("CONFIG", |s| s.send_config(), "wire.misbehaved.phase"),
        ("VM_STATE", |s| s.send_state(), "wire.misbehaved.phase"),
        (
            "SETUP_END",
            |s| s.control.send(s.setup_end(1)),
            "wire.misbehaved.phase",
        ),
        (
            "a frame that was left out",
            |s| {
                s.control.skip(1);
                s.commit();
            },
            "wire.misbehaved.sequence",
        ),
    ];
    for (name, act, code) in cases {
        let destination = Destination::start();
        let connect = || destination.connect();
        let mut source = FakeSource::prepared(&connect);
        act(&mut source);
        assert_eq!(
            source.control.hear_abort().reason,
            Reason::Misbehaved,
            "{name}"
        );
        destination.fails(GRACE, code, name);
    }
}

#[test]
fn switchover_final_and_lost_lanes_that_cross_with_prepared_are_ignored() {
    let destination = Destination::start();
    let connect = || destination.connect();
    let mut source = FakeSource::prepared(&connect);
    source.lanes.clear();
    source.switchover(2);
    source.control.send(source.final_of(2));
    source.commit();
    source.control.hear_kind(Kind::Running);
    source.control.finish();
    let end = destination.end(GRACE);
    assert!(end.finished.error.is_none() && end.running);
}

#[test]
fn a_control_channel_that_closes_before_commit_starts_nothing() {
    for half in [true, false] {
        let destination = Destination::start();
        let connect = || destination.connect();
        let mut source = FakeSource::prepared(&connect);
        if half {
            source.control.finish();
        } else {
            source.control.cut();
        }
        let end = destination.end(GRACE);
        assert!(["channel-closed", "channel-reset"].contains(&end.finished.error.unwrap().code()));
        assert!(!end.running && end.discarded);
    }
}

#[test]
fn a_control_channel_that_closes_right_after_commit_does_not_stop_the_guest() {
    let path = std::env::temp_dir().join(format!("multifd-commit-{}.sock", std::process::id()));
    let unix = format!("unix:{}", path.display());
    for (address, whole) in [
        ("127.0.0.1:0", false),
        ("127.0.0.1:0", true),
        (&unix, false),
        (&unix, true),
    ] {
        let destination =
            Destination::at(address, destination_config(), DestinationMachine::default());
        let connect = || destination.connect();
        let mut source = FakeSource::prepared(&connect);
        source.commit();
        if whole {
            // Neither RUNNING nor anything else can be told any more.
            source.control.cut();
            drop(source);
        } else {
            source.control.finish();
            source.control.hear_kind(Kind::Running);
        }
        let end = destination.end(GRACE);
        assert!(end.finished.error.is_none(), "{address}");
        assert_eq!(
            end.finished.report.outcome,
            rx::OutcomeKind::Running,
            "{address}"
        );
        assert!(end.running && !end.discarded, "{address}");
    }
}

#[test]
fn silence_after_prepared_never_starts_the_guest() {
    let destination = Destination::start();
    let connect = || destination.connect();
    let mut source = FakeSource::prepared(&connect);
    source.control.fall_silent();
    let began = Instant::now();
    let told = source.control.hear_abort();
    assert_eq!((told.reason, told.phase), (Reason::Timeout, Phase::Commit));
    assert!(began.elapsed() < STALL + GRACE);
    // A COMMIT that comes too late finds nobody (SPEC: COMMIT-6).
    source.commit();
    std::thread::sleep(Duration::from_millis(50));
    assert!(!destination.running.load(Ordering::SeqCst));
    destination.fails(GRACE, "receiver.timeout", "silence after PREPARED");
}

#[test]
fn a_machine_that_cannot_load_its_state_leaves_the_guest_to_the_source() {
    let machine = DestinationMachine {
        refuse: Refuse::Load,
        ..DestinationMachine::default()
    };
    let destination = Destination::with(destination_config(), machine);
    let connect = || destination.connect();
    let mut source = FakeSource::in_switchover(&connect);
    source.last_round(1);
    let told = source.control.hear_abort();
    assert_eq!(told.reason, Reason::VmmRefused);
    assert!(told.text.contains("another version"), "{}", told.text);
    destination.fails(GRACE, "receiver.vmm.refused", "load");
}

#[test]
fn a_machine_that_cannot_run_after_the_commit_says_so_and_is_kept() {
    let machine = DestinationMachine {
        refuse: Refuse::Resume,
        ..DestinationMachine::default()
    };
    let destination = Destination::with(destination_config(), machine);
    let connect = || destination.connect();
    let mut source = FakeSource::prepared(&connect);
    source.commit();
    let told = source.control.hear_abort();
    assert_eq!(
        (told.reason, told.phase),
        (Reason::VmmRefused, Phase::Commit)
    );
    let end = destination.end(GRACE);
    assert_eq!(end.finished.error.unwrap().code(), "receiver.vmm.refused");
    assert_eq!(end.finished.report.outcome, rx::OutcomeKind::Stranded);
    assert!(
        !end.running && !end.discarded,
        "the loaded guest is the only one there is"
    );
}
